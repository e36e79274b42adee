"""Data sets on the Hugging Face Hub as sources, on 127.0.0.1: which files are fetched, and what is read."""

import json

import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.inspect.validate import run
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.sources import open_source
from data_pipelines.sources.recognize import source_of
from rynnvla_jax.config import DataConfig
from rynnvla_jax.storage import hub
from tests import ROOT
from tests import hub as hubs

V21 = ROOT / "tests" / "data" / "so100_v21"
NAME = "hf://owner/set"


@pytest.fixture
def served(monkeypatch, tmp_path):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    with hubs.running(monkeypatch, tmp_path / "home") as found:
        yield found


def fetched(commit):
    root = hub.here(f"hf://datasets/owner/set@{commit}", choose=lambda names: [])
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", [demo.path("so100"), V21], ids=["v3.0", "v2.1"])
def test_only_the_cameras_in_use_are_fetched(served, folder):
    commit = served.add(
        "owner/set", {**hubs.content(folder), "README.md": b"x", "videos/other/file.mp4": b"x"}, "dataset"
    )
    opened = open_source(f"lerobot:{NAME}", DataConfig(), (), progress=False)
    local = open_source(f"lerobot:{folder}", DataConfig(), (), progress=False)
    assert not any(name.endswith(".mp4") for name in fetched(commit)) and "README.md" not in fetched(commit)
    assert np.array_equal(opened.read(0).action, local.read(0).action)
    assert opened.source == f"lerobot:{NAME}@{commit}"
    open_source(f"lerobot:{NAME}", DataConfig(), ("front",), progress=False)
    videos = {name for name in fetched(commit) if name.endswith(".mp4")}
    assert videos and all("observation.images.front" in name for name in videos)
    findings = Findings(0)
    run.validate(f"lerobot:{NAME}", findings, progress=False)
    assert not findings.errors and any("observation.images.wrist" in name for name in fetched(commit))


def test_egodex_without_frames_needs_no_video(served):
    commit = served.add("owner/set", demo.path("egodex"), "dataset")
    assert source_of(NAME) == f"egodex:{NAME}"
    assert len(fetched(commit)) == 2
    assert len(open_source(f"egodex:{NAME}/test", DataConfig(), (), progress=False)) == 4
    assert sorted(name.rpartition(".")[2] for name in fetched(commit)) == ["hdf5"] * 4 + ["mp4"]
    assert open_source(f"egodex:{NAME}", DataConfig(), progress=False).views == ("front",)


def test_a_list_of_left_out_episodes_holds_for_every_revision(served, tmp_path):
    commit = served.add("owner/set", demo.path("so100"), "dataset")
    exclude = tmp_path / "exclude.json"
    content = {"episodes": {f"lerobot:{NAME}": ["episode_000000"]}}
    exclude.write_text(json.dumps(content), encoding="utf-8")
    config = DataConfig(exclude=str(exclude))
    assert source_of(NAME) == f"lerobot:{NAME}"
    assert len(open_source(f"lerobot:{NAME}@{commit}", config, (), progress=False)) == 5
