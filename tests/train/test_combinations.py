"""All that a run can have at once, at tiny size: whatever cuts the work up, the numbers stay the same."""

import shutil

import numpy as np
import pytest

from rynnvla_jax.checkpoint import reader
from rynnvla_jax.train import metrics
from rynnvla_jax.train.loop import train
from tests import tiny
from tests.train.test_train import run_config

# A mixture, packed clips, the VQGAN in the step, an average of the weights, norms by group; held-out data and pictures.
EVERYTHING = {
    "data.source": "",
    "data.mixture": ((tiny.SO100, 3.0), (f"{tiny.SO100}/.", 1.0)),
    "data.frame_codes": "step",
    "sequence.clips": 2,
    "sequence.length": 384,
    "vla.transformer.dropout": 0.0,  # drawn anew for each micro-batch
    "compute_dtype": "float32",
    "optimizer.ema": 0.9,
    "optimizer.warmup_steps": 0.0,
    "gradient_norms": True,
    "evaluation.share": 0.4,
    "evaluation.every_steps": 2,
    "evaluation.examples": 6,
    "evaluation.pictures": 1,
    "total_steps": 3,
    "checkpoint.every_steps": 2,
    "log_every": 3,
    "mesh.tensor": 2,
}
CUT_UP = {"optimizer.accumulation": 2, "mesh.sequence": 2}


def lines(workdir):
    return metrics.read(workdir) + metrics.read(workdir, "eval.jsonl")


def test_everything_at_once_is_the_same_run_however_it_is_cut_up(assets, tmp_path):
    train(run_config("robot", assets, **EVERYTHING), tmp_path / "whole")
    cut = run_config("robot", assets, **EVERYTHING, **CUT_UP)
    train(cut, tmp_path / "cut")
    whole, found = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert [line["step"] for line in whole] == [3, 2, 3]
    for one, other in zip(whole, found, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5)
        assert all(np.isfinite(x) for x in one.values())
    wanted = {"source/1_so100/cross_entropy", "source/2_so100/action_l1", "cross_entropy/image", "grad_norm/head"}
    assert wanted <= whole[0].keys() and whole[0]["source/1_so100/examples"] == 3 * 8 * 2 * 3 / 4
    assert {"action_error", "ema/action_error"} <= whole[1].keys()
    for workdir in ("whole", "cut"):
        assert len(list((tmp_path / workdir / "pictures").iterdir())) == 4

    shutil.rmtree(reader.step_folder(tmp_path / "cut", 3))  # as after a kill
    before = [(tmp_path / "cut" / name).read_bytes() for name in ("metrics.jsonl", "eval.jsonl")]
    train(cut, tmp_path / "cut")
    assert [(tmp_path / "cut" / name).read_bytes() for name in ("metrics.jsonl", "eval.jsonl")] == before
