"""What README.md and docs/ say: commands, Python, links, the picture, the site."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import documented
from tests.documented import DocumentationError, DocumentedCommand

ROOT = documented.ROOT
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SITE]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_of_a_page_is_one_that_its_program_takes(page, tmp_path):
    for shown in PAGES:
        documented.write_files(shown.read_text(encoding="utf-8"), tmp_path)
    wrong = []
    for command in documented.commands(page.read_text(encoding="utf-8"), page.name):
        try:
            documented.check(command, tmp_path)
        except DocumentationError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)


def test_commands_are_found_in_fences_indented_blocks_and_backticks():
    text = """Run `rynnvla data validate` first, or `make demo`:

    rynnvla train --config configs/robot.py:tiny \\
        --workdir DIR

```sh
A=1 python -m benchmarks.pods  # all rows
```

```text
rynnvla nothing of a command
```
"""
    found = list(documented.commands(text))
    assert [(c.where, c.loose) for c in found] == [
        ("text:3", False),
        ("text:7", False),
        ("text:1", True),
        ("text:1", True),
    ]
    assert found[0].text.split() == ["rynnvla", "train", "--config", "configs/robot.py:tiny", "--workdir", "DIR"]
    with pytest.raises(DocumentationError, match="text:2"):
        list(documented.commands("```sh\nrynvla train\n```"))


@pytest.mark.parametrize(
    "text",
    [
        "rynnvla trian --config configs/robot.py:tiny --workdir DIR",
        "rynnvla train --config configs/robot.py:tiny",
        "rynnvla train --config configs/robot.py:tiny --workdir DIR --config.optimizer.peaklr=1e-5",
        "rynnvla train --config configs/robot.py:tiny --workdir DIR --config.remat=ful",
        "rynnvla train --config configs/robots.py:tiny --workdir DIR",
        "rynnvla train --config configs/robot.py:8b --workdir DIR",
        "rynnvla train --config configs/robot.py:tiny --workdir DIR --wrong 1",
        "rynnvla aot --config configs/robot.py:tiny --topology v5p:4x4x4 --config.data.frames=ahead",
        "rynnvla aot --config configs/robot.py:tiny",
        "rynnvla launch slurm --nodes 4 --out run.sbatch -- train --config configs/robot.py:tiny --workdir DIR",
        "rynnvla launch local --processes 2 -- train --config configs/robot.py:tiny --workdir DIR --config.sed=1",
        "rynnvla data show lerobot:DATA --output page.html",
        "rynnvla data look lerobot:DATA",
        "rynnvla checkpoint list|verfy DIR",
        "rynnvla convert export WORKDIR EXPORT --format transformer",
        "rynnvla record --task block --episodes ten --out DATA",
        "rynnvla serve --policy EXPORT [--prt 8000]",
        "make tests",
        "pip install -e '.[trian]'",
        "pip install -c constraint.txt .",
        "python -m benchmarks.pod",
        "python -m benchmarks.table_top DIR --lerobot PYTHON",
        "python -m tests.golden",
        "LEROBOT/bin/lerobot-eval --policy.type=rynnvla --policy.path=EXPORT --policy.n_actions=3",
    ],
)
def test_a_wrong_command_is_noticed(text):
    with pytest.raises(DocumentationError):
        documented.check(DocumentedCommand(text, "text:1"))


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ("h.sweep('optimizer.peak_lr', [1e-5])", "--out DIR", None),
        ("h.sweep('optimizer.peaklr', [1e-5])", "--out DIR", "did you mean"),
        ("h.sweep('seed', [0])", "--out DIR --paralel 2", "paralel"),
        ("h.sweep('seed', [0])", "--out DIR --launcher slurm -- --nodes 4", "gpus-per-node"),
        ("h.zip([])", "--out DIR", "zip"),
    ],
)
def test_a_sweep_is_looked_at_with_the_file_that_the_document_shows(points, options, message, tmp_path):
    shown = f"# mine.py\nfrom rynnvla_jax.configs.robot import get_config\n\ndef get_hyper(h):\n    return {points}\n"
    documented.write_files(f"```python\n{shown}```", tmp_path)
    command = DocumentedCommand(f"rynnvla sweep --config mine.py:tiny {options}", "text:1")
    if message is None:
        documented.check(command, tmp_path)
    else:
        with pytest.raises(DocumentationError, match=f"(?i){message}"):
            documented.check(command, tmp_path)


@pytest.mark.parametrize("text", ["rynnvla serve --polcy EXPORT", "rynnvla data stat", "make tests"])
def test_a_wrong_command_between_backticks_is_noticed_too(text):
    with pytest.raises(DocumentationError):
        documented.check(DocumentedCommand(text, "text:1", loose=True))


def test_python_in_the_documentation_fits_the_code():
    found = 0
    for page in PAGES:
        for line, language, code in documented.blocks(page.read_text(encoding="utf-8")):
            if language == "python":
                documented.check_python(code, f"{page.name}:{line}")
                found += 1
    assert found


@pytest.mark.parametrize(
    "code",
    [
        "from rynnvla_jax.deploy.policy import Polcy",
        "from rynnvla_jax.deploy.policies import Policy",
        "from rynnvla_jax.deploy.policy import Policy\nPolicy.load('EXPORT', devise='cuda')",
        "from rynnvla_jax.deploy.policy import Policy\nPolicy.open('EXPORT')",
        "def f(:",
    ],
)
def test_wrong_python_is_noticed(code):
    with pytest.raises(DocumentationError):
        documented.check_python(code, "text:1")


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and MkDocs name them."""
    text = page.read_text(encoding="utf-8")
    if whole := re.fullmatch(r'--8<-- "(.+)"\n', text):  # MkDocs puts this file in its place
        text = (ROOT / whole[1]).read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", documented.prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", documented.prose(page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(there), f"{page.name} links to {target}; headings: {sorted(anchors(there))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    folders = "rynnvla_jax|data_pipelines|plugins|docs|examples|tests|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w/.]*)`", documented.prose(page.read_text(encoding="utf-8"))):
        assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"


def test_the_picture_shows_what_training_composes():
    script = ROOT / "docs" / "figures" / "sequence.py"
    drawn = runpy.run_path(str(script))["draw"]()
    assert drawn == script.with_suffix(".svg").read_text(encoding="utf-8"), "run python docs/figures/sequence.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation's site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return folder


def test_the_site_builds_without_a_warning(site):
    for page in SITE:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_the_site_opens_from_files_and_fetches_nothing(site):
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # only a web server shows it
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r'<a\s[^>]*href="([^"#?]+)', text):
            if re.match(r"\w+:", target):
                continue
            there = page.parent / target
            assert there.is_file(), f"{page.name} links to {target}, which is not a file"
        fetched = re.findall(r'<(?:script|img|iframe)\s[^>]*src="([^"]+)"', text)
        fetched += re.findall(r'<link\s[^>]*rel="(?:stylesheet|icon|preconnect)"[^>]*href="([^"]+)"', text)
        fetched += re.findall(r'<link\s[^>]*href="([^"]+)"[^>]*rel="(?:stylesheet|icon|preconnect)"', text)
        assert fetched
        for source in fetched:
            assert "//" not in source and (page.parent / source).is_file(), f"{page.name} fetches {source}"


def test_search_works_in_pages_that_are_opened_from_files(site):
    """A page of a file may not fetch: the index is a script, and the Worker is replaced before the theme starts it."""
    index = (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {") and "rynnvla_jax.deploy.policy.Policy.load" in index
    page = (site / "index.html").read_text(encoding="utf-8")
    worker, theme = page.index('src="theme/iframe-worker.js"'), page.index('src="assets/javascripts/bundle')
    assert worker < theme
    assert "window.IFrameWorker" in (site / "theme" / "iframe-worker.js").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "rynnvla_jax.config.TrainConfig",
        "rynnvla_jax.sequence.compose",
        "rynnvla_jax.models.vla.VLA",
        "rynnvla_jax.models.action_vae.ActionVAE",
        "rynnvla_jax.models.vqgan.VQGAN",
        "rynnvla_jax.distributed.mesh.make_mesh",
        "rynnvla_jax.checkpoint.manager.Checkpointer",
        "rynnvla_jax.deploy.policy.Policy",
        "data_pipelines.episode.Episodes",
        "rynnvla_jax.stage.Stage",
        "data_pipelines.sources.open_source",
        "data_pipelines.sources.Load",
    ],
)
def test_the_site_documents_public_names(name, site):
    assert any(f'id="{name}"' in page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
