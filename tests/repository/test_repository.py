"""What makes the repository fit to fork: the licence in tree and package, and continuous integration."""

import re
import subprocess
import sys

import yaml

from tests.documented import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def test_the_package_carries_the_whole_licence(tmp_path):
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert all(re.search(rf"^\s+{i}\. ", text, re.MULTILINE) for i in range(1, 10))
    assert "APPENDIX: How to apply the Apache License to your work." in text

    command = [sys.executable, "setup.py", "-q", "dist_info", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("rynnvla_jax-*.dist-info")
    assert "License: Apache-2.0" in re.sub(
        "License-Expression", "License", (folder / "METADATA").read_text(encoding="utf-8")
    )
    assert (folder / "licenses" / "LICENSE").read_text(encoding="utf-8") == text


def commands(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines()}


def test_github_runs_what_ci_runs():
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    steps = {name: [step.get("run", "") for step in job["steps"]] for name, job in jobs.items()}
    ours = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    made = {line for line in commands(ours) if line.startswith("make ")}
    assert made == {"make lint", "make test"}
    assert made <= commands("\n".join(steps["test"]))
    assert "make docs" in steps["docs"]

    packages = {word for word in re.search(r"--no-install-recommends (.*)", ours)[1].split()}
    assert packages <= set(" ".join(steps["test"]).split())


def test_the_workflow_uses_the_oldest_python_we_support_and_pinned_actions():
    text = WORKFLOW.read_text(encoding="utf-8")
    for job in yaml.safe_load(text)["jobs"].values():
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions), actions
        (python,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert f">={python}" in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "://" not in text
