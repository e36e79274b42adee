"""What a run was made with: git, versions, data; and a run whose data changes under it."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.episode import Episodes
from rynnvla_jax.checkpoint import model_dir, provenance, reader
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ConfigError, TrainConfig, from_dict, to_dict
from rynnvla_jax.recording import Recording
from rynnvla_jax.report import page
from rynnvla_jax.train import assets, metrics
from rynnvla_jax.train.loop import train
from tests import tiny

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git here")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path) -> Path:
    """A package in a checkout, committed."""
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("one = 1\n", encoding="utf-8")
    git(tmp_path / "checkout", "init", "-q")
    git(tmp_path / "checkout", "add", ".")
    git(tmp_path / "checkout", "commit", "-q", "-m", "first")
    return folder


@needs_git
def test_revision_and_whether_tracked_files_changed(package):
    commit = git(package, "rev-parse", "HEAD")
    (package / "notes.txt").write_text("not tracked", encoding="utf-8")
    assert provenance.revision(package) == {"revision": commit, "dirty": False}
    (package / "__init__.py").write_text("one = 2\n", encoding="utf-8")
    assert provenance.revision(package) == {"revision": commit, "dirty": True}


@needs_git
def test_code_that_git_does_not_know_has_no_revision(package, tmp_path, monkeypatch):
    installed = package / "venv" / "other"  # inside the checkout, but not of it
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("", encoding="utf-8")
    assert provenance.revision(installed) is None
    assert provenance.revision(tmp_path / "nowhere") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.revision(package) is None


@needs_git
def test_a_hook_of_another_checkout_does_not_mislead(package, tmp_path, monkeypatch):
    git(tmp_path, "init", "-q", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert provenance.revision(package)["dirty"] is False


def episodes(source="lerobot:/data/a", lengths=(5, 6), texts=("lift",), unit="degrees") -> Episodes:
    return Episodes(
        source=source,
        lengths=np.array(lengths),
        read=lambda i: pytest.fail("an episode was read"),
        texts=texts,
        frame_sizes={(48, 64): "front"},
        seconds=sum(lengths) / 30,
        views=("front",),
        columns=Columns.unstated(unit, 6, 6, (5,)),
    )


def entry(**changes) -> dict:
    return provenance.describe_run(TrainConfig(stage="robot"), [episodes(**changes)], {})


def test_data_are_what_is_read_and_not_where_it_lies():
    one = entry()
    assert entry()["data"] == one["data"] == entry(source="lerobot:/elsewhere")["data"]
    others = [entry(lengths=(6, 5)), entry(lengths=(5, 7)), entry(texts=("drop",)), entry(unit="radians")]
    assert len({one["data"], *(o["data"] for o in others)}) == 5
    json.dumps(one)
    assert provenance.differences(one, others[1]) == [
        "lerobot:/data/a: steps 11 -> 12, different lengths, seconds 0.367 -> 0.4"
    ]
    assert provenance.differences(one, others[2]) == ["lerobot:/data/a: different texts"]


def test_rates_are_noted_and_data_of_older_versions_stay_the_same(tmp_path):
    one, other = episodes(), replace(episodes("lerobot:/data/b"), rates=(10.0, 29.9), frame_sizes={(480, 480): "front"})
    now = provenance.describe_run(TrainConfig(stage="robot"), [one, other], {})
    unknown = [one, replace(other, rates=())]
    assert now["data"] == provenance.describe_run(TrainConfig(stage="robot"), unknown, {})["data"]
    assert provenance.recording(tmp_path) == Recording()
    (tmp_path / "assets").mkdir()
    provenance.record_attempt(tmp_path, now)
    assert provenance.recording(tmp_path) == Recording((10.0, 29.9), ((48, 64), (480, 480)))
    for source in now["sources"]:
        del source["rates"]
    provenance.record_attempt(tmp_path, now)  # of an older version
    assert provenance.recording(tmp_path).rates == ()


def test_an_action_vae_of_another_rate_is_said(tmp_path):
    (tmp_path / "assets").mkdir()
    config = TrainConfig(stage="robot")
    slow, fast = (replace(episodes(f"lerobot:/{rate:g}"), rates=(rate,)) for rate in (10.0, 29.9))
    frozen = {"vqgan": tmp_path / "vqgan", "action_vae": tmp_path}
    assert assets.rate_warnings(frozen, [slow, fast]) == []  # an imported one does not say
    provenance.record_attempt(tmp_path, provenance.describe_run(config, [replace(slow, rates=(30.0,))], {}))
    (line,) = assets.rate_warnings(frozen, [slow, fast, episodes()])
    assert line.startswith("WARNING: lerobot:/10 is recorded at 10 Hz, but the action VAE was trained on")
    assert "at 30 Hz" in line and assets.rate_warnings({}, [slow]) == []


def test_the_configuration_is_told_apart_by_every_key():
    hashes = [
        provenance.describe_run(TrainConfig(stage="robot", seed=seed), [episodes()], {})["config"] for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def begin(workdir: Path, **changes) -> list[str]:
    """What a start says about its changes, and notes of itself."""
    said = provenance.changes(workdir, now := entry(**changes))
    provenance.record_attempt(workdir, now)
    return said


@pytest.fixture
def workdir(tmp_path) -> Path:
    """A run that saved step 40."""
    (tmp_path / "run" / "assets").mkdir(parents=True)
    assert begin(tmp_path / "run") == []
    reader.step_folder(tmp_path / "run", 40).mkdir(parents=True)
    return tmp_path / "run"


def test_every_start_is_kept(workdir):
    begin(workdir)
    begin(workdir, source="lerobot:/moved")
    assert [a["step"] for a in provenance.attempts(workdir)] == [0, 40, 40]
    assert len({a["data"] for a in provenance.attempts(workdir)}) == 1


def test_data_that_changed_under_a_run_is_refused_and_nothing_is_written(workdir):
    before = (workdir / provenance.FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"data of run changed since step 40.*steps 11 -> 12.*config.init_from.path"):
        begin(workdir, lengths=(5, 7))
    assert (workdir / provenance.FILE).read_bytes() == before


def test_other_data_that_the_command_names_is_said(workdir):
    (line,) = begin(workdir, source="lerobot:/data/b", lengths=(5, 7))
    assert "lerobot:/data/b: steps 11 -> 12" in line
    assert begin(workdir, source="lerobot:/data/b", lengths=(5, 7)) == []


def test_before_the_first_checkpoint_data_may_change(tmp_path):
    (tmp_path / "assets").mkdir()
    begin(tmp_path)
    assert begin(tmp_path, lengths=(5, 7)) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"attempts": null}', '{"attempts": [1]}'])
def test_a_damaged_file_is_set_aside_and_stops_nothing(workdir, capsys, content):
    file = workdir / provenance.FILE
    file.write_text(content, encoding="utf-8")
    assert begin(workdir) == [] and len(provenance.attempts(workdir)) == 1
    assert f"{file}" in (said := capsys.readouterr().err) and "renamed to run.json.damaged" in said
    assert (workdir / "assets/run.json.damaged").read_text(encoding="utf-8") == content


def test_a_run_and_its_checkpoints_say_what_they_were_made_with(tmp_path):
    """And a resume with fewer episodes under the same names is refused before anything else is written."""
    left_out = tmp_path / "exclude.json"
    left_out.write_text(json.dumps({"episodes": {tiny.SO100: []}}), encoding="utf-8")

    def run(steps: int) -> None:
        config = tiny.config("action_vae", tiny.SO100, total_steps=steps, **{"data.exclude": str(left_out)})
        train(tiny.typed(config), tmp_path / "run")

    run(1)
    lines = metrics.read(tmp_path / "run")
    run(2)
    first, second = provenance.attempts(tmp_path / "run")
    assert (first["step"], second["step"]) == (0, 1)
    assert second["packages"]["jax"] and second["code"]["version"]
    config = json.loads((tmp_path / "run/assets/config.json").read_text(encoding="utf-8"))
    assert second["config"] == provenance.digest(config) == provenance.digest(to_dict(from_dict(TrainConfig, config)))
    assert first["data"] == second["data"] and first["sources"][0]["episodes"] > 1
    for step, one in ((1, first), (2, second)):
        assert reader.read_json(reader.step_folder(tmp_path / "run", step), "run") == provenance.of_checkpoint(one)
        assert reader.verify(reader.step_folder(tmp_path / "run", step)) == []
    assert metrics.read(tmp_path / "run")[:1] == lines

    code, versions = (dict(page.facts(page.read_run(tmp_path / "run"), ""))[k] for k in ("Code", "Versions"))
    assert code.startswith(provenance.code_line(second["code"])) and f"jax {second['packages']['jax']}" in versions
    model_dir.copy_model(tmp_path / "run", tmp_path / "copy")
    assert provenance.attempts(tmp_path / "copy") == [first, second]

    left_out.write_text(json.dumps({"episodes": {tiny.SO100: ["episode_000000"]}}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data of run changed since step 2.*episodes 6 -> 5"):
        run(3)
    assert provenance.attempts(tmp_path / "run") == [first, second] and len(metrics.read(tmp_path / "run")) == 2
    assert json.loads((tmp_path / "run/assets/config.json").read_text(encoding="utf-8"))["total_steps"] == 2
