"""Pictures of held-out examples: what they show is what the model predicts, and no failure of them stops a run."""

import io
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from rynnvla_jax.config import ConfigError, EvaluationConfig
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.frozen import Frozen
from rynnvla_jax.models.vla import build_vla
from rynnvla_jax.report import page
from rynnvla_jax.train import metrics, stages
from rynnvla_jax.train.evaluation import Evaluator
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.pictures import Artist, chunk_figure, codes_of_rows, png
from tests.distributed.test_sharding import CONFIG, robot_batch
from tests.train.test_train import run_config

KEYS = {"evaluation.share": 0.4, "evaluation.every_steps": 1, "evaluation.examples": 8, "total_steps": 2}
KEYS |= {"evaluation.pictures": 2}


def test_predicted_codes_are_the_likeliest_of_the_image_tokens():
    graphdef, params = params_lib.split(build_vla(CONFIG, nnx.Rngs(0)))
    batch, ids = robot_batch(), np.array([40, 7, 21, 90], np.int32)
    given = {key: x for key, x in batch.items() if not key.startswith("actions")}

    def run(params, batch):
        model = nnx.merge(graphdef, params)
        logits = model.transformer.logits(model.hidden(batch))
        return stages.predict_codes(model, Frozen(code_to_token=ids), batch, 3), logits

    found, logits = jax.jit(run)(params, given)
    wanted = np.argmax(np.asarray(logits, np.float32)[:3, :-1, ids], axis=-1)
    assert (np.asarray(found)[:, 1:] == wanted).mean() > 0.99  # of bfloat16 logits two may tie


def test_codes_are_found_among_tokens_and_only_those_of_the_first_clip():
    ids = np.array([10, 11, 12, 13])
    tokens = np.array([[0, 10, 13, 5, 12, 12, 3, 11, 11, 11, 11], [9, 13, 13, 13, 13, 1, 1, 1, 10, 10, 10]])
    codes, places = codes_of_rows(tokens, ids, (1, 2, 1, 2))
    assert codes.reshape(2, -1).tolist() == [[0, 3, 2, 2], [3, 3, 3, 3]]
    assert places.reshape(2, -1).tolist() == [[1, 2, 4, 5], [1, 2, 3, 4]]


@pytest.fixture(scope="module")
def drawn(assets, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("drawn") / "run"
    train(run_config("robot", assets, **KEYS), workdir)
    return workdir


def test_a_run_draws_frames_and_actions_at_every_evaluation(drawn):
    names = sorted(path.name for path in (drawn / "pictures").iterdir())
    assert names == [f"{name}_0000000{step}.png" for name in ("actions", "frames") for step in (1, 2)]
    for name in names:
        content = (drawn / "pictures" / name).read_bytes()
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("L"))
        assert 100 < picture.shape[0] < 800 and picture.std() > 10 and len(content) < 400_000
    shown = page.newest_pictures(drawn)
    assert [caption.split(":")[0] for caption, _ in shown] == ["Held-out examples after 2 steps"] * 2
    assert all(url.startswith("data:image/png;base64,") for _, url in shown)
    events = b"".join(path.read_bytes() for path in (drawn / "tensorboard").iterdir())
    assert b"pictures/frames" in events and b"pictures/actions" in events


def test_pictures_that_fail_are_said_and_counted(assets, drawn, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise MemoryError("no room for a figure")

    with monkeypatch.context() as patch:
        patch.setattr(Artist, "__call__", fail)
        train(run_config("robot", assets, **KEYS), tmp_path / "failed")
    said = capsys.readouterr().err
    assert "step 2: no pictures were drawn" in said and "config.evaluation.pictures=0 leaves them out" in said
    timing = [line for line in metrics.read(tmp_path / "failed", "timing.jsonl") if "undrawn_pictures" in line]
    assert [line["undrawn_pictures"] for line in timing] == [1, 2] and not (tmp_path / "failed" / "pictures").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "_predict", fail, raising=False)
        train(run_config("robot", assets, **{**KEYS, "evaluation.pictures": 0}), tmp_path / "none")
    assert not (tmp_path / "none" / "pictures").exists()
    for name in ("metrics.jsonl", "eval.jsonl"):
        for other in ("failed", "none"):
            assert (tmp_path / other / name).read_bytes() == (drawn / name).read_bytes()
    shutil.rmtree(tmp_path / "none")


def test_an_action_vae_draws_its_chunks(assets, tmp_path):
    train(run_config("action_vae", assets, **{**KEYS, "total_steps": 1}), tmp_path)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["actions_00000001.png"]


def test_a_figure_of_many_columns_is_cut_and_the_same_each_time():
    rng = np.random.default_rng(0)
    chunks, names = rng.normal(size=(2, 3, 5, 40)), [f"c{i}" for i in range(40)]
    first, again = (png(chunk_figure(*chunks, names)) for _ in range(2))
    assert first == again and Image.open(io.BytesIO(first)).width < 2000


def test_a_negative_number_of_pictures_is_refused():
    with pytest.raises(ConfigError, match="evaluation.pictures is -1; it must be at least 0"):
        EvaluationConfig(pictures=-1)
