"""Today's code loads what version 0.1.0 wrote: `data/before` holds one of each, and what that version found in them."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.loader import Loader, open_sources
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.cli import main as cli
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.models.params import fingerprint
from rynnvla_jax.sweep import plan
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from rynnvla_jax.vocabulary import TextTokenizer
from tests import DATA, ROOT

BEFORE = DATA / "before"
KEYS = ("length", "num_frames", "frame_interval", "clips", "use_wrist_frame")  # of sequences that differ
EXPECTED = json.loads((BEFORE / "expected.json").read_text(encoding="utf-8"))
MODELS = ("robot", "robot/assets/vqgan", "robot/assets/action_vae", "action_vae", "sweep/000_seed=1")


@pytest.fixture
def before(tmp_path, monkeypatch):
    """A copy that may be changed. The runs name their data by paths relative to the repository."""
    monkeypatch.chdir(ROOT)
    return shutil.copytree(BEFORE, tmp_path / "before")


def resumed(workdir: Path) -> dict[str, float]:
    """What one more step of a finished run logs."""
    config = model_dir.read_train_config(workdir)
    return train(dataclasses.replace(config, total_steps=config.total_steps + 1), workdir)


def observation(config):
    """(front, wrist, state, text) of one step of the demonstrations."""
    episode = open_sources(config, progress=False)[0][1]
    return *(episode.frames(view, [20])[0] for view in ("front", "wrist")), episode.state[20], episode.text(20)


def targets(workdir: Path, export: Path) -> dict[str, list]:
    """Joint targets of a work dir and of its export."""
    seen = observation(model_dir.read_train_config(workdir))
    return {"work dir": JaxPolicy(workdir).act(*seen).tolist(), "export": Policy.load(export).act(*seen).tolist()}


def batches(corpus: Path) -> list[dict[str, str]]:
    """SHA-256 of every array of the first two batches that stage 1 draws from a corpus by the plan in it."""
    sequence = json.loads(next((corpus / "plans").glob("*/plan.json")).read_text(encoding="utf-8"))["made_for"][
        "sequence"
    ]
    run = model_dir.read_train_config(BEFORE / "robot")
    config = dataclasses.replace(
        run,
        stage="video",
        data=dataclasses.replace(run.data, source=f"records:{corpus}", frame_codes="ahead"),
        sequence=dataclasses.replace(run.sequence, **{k: sequence[k] for k in KEYS}),
        vla=dataclasses.replace(run.vla, state_dim=0),
        batch_size=2,
    )
    loader = Loader(config, tokenizer=TextTokenizer(BEFORE / "tokenizer.json"), progress=False)
    drawn = loader.batches(0)
    two = [next(drawn) for _ in range(2)]
    drawn.close()
    return [{k: hashlib.sha256(np.ascontiguousarray(v).tobytes()).hexdigest() for k, v in b.items()} for b in two]


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_hold_the_same_weights(name):
    params, _ = model_dir.load_params(BEFORE / name)
    assert fingerprint(params) == EXPECTED["fingerprints"][name]


def test_checkpoints_are_verified_and_listed(before, capsys):
    assert cli.main(["checkpoint", "verify", str(before / "robot")]) == 0
    assert cli.main(["checkpoint", "list", str(before / "robot")]) == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["robot", "action_vae"])
def test_a_run_goes_on(before, name):
    lines = metrics.read(before / name)
    assert [line["step"] for line in lines] == [1, 2]
    found = resumed(before / name)
    for key, value in EXPECTED["resumed"][name].items():
        assert found[key] == pytest.approx(value, rel=1e-3 if key == "grad_norm" else 1e-4, abs=1e-6), key
    assert metrics.read(before / name)[:2] == lines and reader.steps(before / name)[-1] == 3


def test_policies_answer_the_same(before):
    for name, found in targets(before / "robot", before / "export").items():
        assert np.abs(found).max() > 1  # degrees, not normalised numbers
        np.testing.assert_allclose(found, EXPECTED["targets"][name], atol=1e-3, err_msg=name)


def test_a_corpus_gives_the_same_batches_by_its_own_plan(before):
    plans = {p.name for p in (before / "corpus" / "plans").iterdir()}
    assert batches(before / "corpus") == EXPECTED["batches"]
    assert {p.name for p in (before / "corpus" / "plans").iterdir()} == plans  # it was found, not made anew


def test_a_sweep_is_the_same_sweep_and_finished(before):
    listed = plan.recalled(before / "sweep")
    definition = plan.define(listed["config"], listed["overrides"])
    points, faults = plan.resolve(definition, plan.points(definition))
    assert not faults and all(point.finished(before / "sweep") for point in points)
    plan.remember(definition, points, before / "sweep", listed["metric"])  # refuses another sweep
