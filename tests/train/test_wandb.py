"""Weights & Biases beside TensorBoard: the real package, offline."""

import importlib.metadata
import json
import os
import struct
import sys
from pathlib import Path

import pytest

from rynnvla_jax.config import ConfigError, TrainConfig, WandbConfig
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from tests import tiny

pytest.importorskip("wandb")

BLOCK = 2**15  # bytes; no record's head is cut by a block's end


def run(workdir: Path, steps: int, **wandb: str) -> None:
    keys = {f"wandb.{k}": v for k, v in wandb.items()}
    train(tiny.typed(tiny.config("action_vae", tiny.SO100, total_steps=steps, **keys)), workdir)


def records(folder: Path) -> list:
    """What an attempt's file holds, in order: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("*.wandb")
    content, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def histories(attempt: list) -> list[dict[str, float]]:
    """The logged lines."""
    return [
        {"/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in attempt
        if r.HasField("history")
    ]


def test_a_resumed_run_is_one_run_and_all_its_files_lie_in_the_work_dir(tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    run(tmp_path / "run", 2, project="arms", mode="offline")
    run(tmp_path / "run", 3, project="arms", mode="offline")
    assert not list(here.iterdir()) and not list(home.rglob("*wandb*"))

    attempts = [records(folder) for folder in sorted((tmp_path / "run/wandb").glob("offline-run-*"))]
    runs = [next(r.run for r in attempt if r.HasField("run")) for attempt in attempts]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {
        ((tmp_path / "run/wandb/run_id").read_text(encoding="utf-8"), "arms", "run")
    }
    config = {u.key: u.value_json for u in runs[0].config.update}
    assert config["batch_size"] == "8" and json.loads(config["run"])["packages"]["jax"]
    lines = [histories(attempt) for attempt in attempts]
    assert [[line["_step"] for line in attempt] for attempt in lines] == [[1, 2], [3]]
    (last,) = lines[1]
    assert last["metrics/loss"] == pytest.approx(metrics.read(tmp_path / "run")[-1]["loss"])
    assert "timing/steps_per_second" in last


def test_nothing_is_imported_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    metrics.MetricsWriter(tmp_path, 0, TrainConfig(stage="vqgan")).close()


def test_what_is_not_installed_is_said_before_anything_else(tmp_path, monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'rynnvla_jax\[wandb\]'"):
        run(tmp_path / "run", 1, project="arms")
    assert not (tmp_path / "run").exists()


def test_a_run_that_may_not_log_in_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = TrainConfig(stage="vqgan", wandb=WandbConfig(project="arms"))
    with pytest.raises(ConfigError, match=r"does not start.*config.wandb.mode=offline"):
        metrics.MetricsWriter(tmp_path / "run", 0, config)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="wandb.mode is 'off'.*online, offline"):
        WandbConfig(project="arms", mode="off")
