"""Runs that train a part of the weights: what is saved, resumed, merged for whoever reads it, and refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.checkpoint import base as base_lib
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.cli.checkpoint import main as checkpoint
from rynnvla_jax.config import ConfigError, FinetuneConfig, LoraConfig, MeshConfig
from rynnvla_jax.convert import exporter, verify
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.inference import imagine
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.action_vae import ActionVAE
from rynnvla_jax.train import finetune
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.saved_evaluation import evaluate_saved
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import abstract_state, gradients
from tests import conftest
from tests.distributed.test_sharding import CONFIG, packed_batch, robot_batch
from tests.train.test_train import run_config

TRAIN = ("state_projection.*", "action_head.*", "transformer.final_norm")
KEYS = {
    "init_from.new": (),
    "finetune.train": TRAIN,
    "finetune.lora.rank": 4,
    "total_steps": 4,
    "checkpoint.every_steps": 2,
    "optimizer.peak_lr": 1e-2,
    "optimizer.warmup_steps": 1.0,
    "optimizer.ema": 0.9,
    "optimizer.rates": (("*.lora.*.b", 2.0), ("action_head.*", 3.0)),
    "optimizer.no_decay": ("*.lora.*",),
    "evaluation.share": 0.34,
    "evaluation.every_steps": 4,
    "evaluation.examples": 16,
}


def config_of(assets, path, **more):
    return run_config("robot", assets, **{**KEYS, "init_from.path": str(path), **more})


@pytest.fixture(scope="module")
def tuned(curriculum, assets):
    """A folder with base/ and run/, which was trained from it: four updates of adapters and heads."""

    def make(folder):
        shutil.copytree(curriculum / "robot", folder / "base")
        train(config_of(assets, folder / "base"), folder / "run")

    return conftest.once("tuned", make)


@pytest.fixture
def copy(tuned, tmp_path):
    """A copy that a test may change; its run still names the base of the original."""
    shutil.copytree(tuned, tmp_path / "copy")
    return tmp_path / "copy"


def arrays_of(workdir, step):
    return {path: array.read() for path, array in reader.open_step(reader.step_folder(workdir, step)).items()}


def flat(params):
    return {path_string(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(params)}


def test_checkpoints_hold_what_trains(tuned):
    stored = {path for path in arrays_of(tuned / "run", 4) if path.startswith("params.")}
    adapters = {f"params.transformer.blocks.lora.{name}.{part}" for name in base_lib.MATRICES for part in "ab"}
    heads = {
        "state_projection.kernel",
        "state_projection.bias",
        "action_head.layer_0.kernel",
        "action_head.layer_0.bias",
    }
    assert stored == adapters | {f"params.{name}" for name in (*heads, "transformer.final_norm")}
    assert not any("wq" in path or path == "head" for path in arrays_of(tuned / "run", 4))  # nor moments


def test_a_run_that_is_resumed_has_the_same_bytes(copy, assets, tuned):
    """As after a kill: only the checkpoint in the middle is left. The base has moved meanwhile."""
    shutil.rmtree(reader.step_folder(copy / "run", 4))
    train(config_of(assets, copy / "base"), copy / "run")
    whole, resumed = arrays_of(tuned / "run", 4), arrays_of(copy / "run", 4)
    assert whole.keys() == resumed.keys()
    for path, values in whole.items():
        np.testing.assert_array_equal(resumed[path], values, err_msg=path)
    assert base_lib.path_of(copy / "run") == copy / "base"
    assert (copy / "run" / "eval.jsonl").read_text(encoding="utf-8") == (
        (tuned / "run" / "eval.jsonl").read_text(encoding="utf-8")
    )


def test_readers_get_merged_weights(tuned):
    found, base = flat(model_dir.load_params(tuned / "run")[0]), flat(model_dir.load_params(tuned / "base")[0])
    assert found.keys() == base.keys()
    own = arrays_of(tuned / "run", 4)
    name = "transformer.blocks.wo"
    a, b = (own[f"params.transformer.blocks.lora.o.{part}"] for part in "ab")
    rounded = base[name].astype("bfloat16").astype(np.float32)
    product = np.stack([x @ y for x, y in zip(a, b, strict=True)]).reshape(rounded.shape)
    np.testing.assert_allclose(found[name], rounded + 16.0 / 4 * product, atol=1e-6)
    assert np.abs(product).max() > 1e-4
    np.testing.assert_array_equal(found["transformer.final_norm"], own["params.transformer.final_norm"])
    np.testing.assert_array_equal(found["transformer.blocks.mlp_norm"], base["transformer.blocks.mlp_norm"])
    average = flat(model_dir.load_params(tuned / "run", weights="ema")[0])
    assert average.keys() == base.keys() and not np.array_equal(average[name], found[name])
    pictures = imagine.load(imagine.find(tuned / "run")).params
    assert {k: v.tobytes() for k, v in flat(pictures).items()} == {k: v.tobytes() for k, v in found.items()}


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_the_merged_export_is_the_adapted_model(tuned, tmp_path, weights):
    exporter.write_export(tuned / "run", tmp_path, weights=weights)
    differences = verify.verify(tuned / "run", tmp_path, weights=weights)
    assert not verify.failures(differences) and max(d.limit for d in differences if "codes" not in d.quantity) <= 1e-4


def test_verify_tells_an_export_without_the_adapters(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(base_lib, "_adapted", lambda array, adapters, scale: array)
    exporter.write_export(tuned / "run", tmp_path)
    assert "hidden states" in verify.failures(verify.verify(tuned / "run", tmp_path))


def test_it_is_evaluated_alike_during_training_and_afterwards(tuned):
    during = json.loads((tuned / "run" / "eval.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    step, after = evaluate_saved(tuned / "run")
    assert step == during["step"] == 4
    for name, value in after.items():
        assert during[name] == pytest.approx(value, rel=1e-4), name


def test_a_run_starts_from_merged_weights(tuned, assets, tmp_path):
    still = {"optimizer.peak_lr": 0.0, "optimizer.min_lr": 0.0, "total_steps": 1, "optimizer.ema": 0.0}
    train(config_of(assets, tuned / "run", **still), tmp_path / "next")
    found, wanted = (flat(model_dir.load_params(path)[0]) for path in (tmp_path / "next", tuned / "run"))
    for path, values in wanted.items():
        matrix = path.startswith("transformer.") and "norm" not in path
        expected = values.astype("bfloat16").astype(np.float32) if matrix else values
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def test_a_base_that_is_elsewhere_is_found_by_the_remedy(copy, tuned, capsys):
    run, gone = copy / "run", copy / "gone"
    base_lib.record_path(run, gone)
    with pytest.raises(CheckpointError, match=r"its base, .*gone, .* is not there; .*`rynnvla checkpoint base") as told:
        model_dir.load_params(run)
    (copy / "base").rename(copy / "elsewhere")
    command = str(told.value).partition("`rynnvla checkpoint ")[2].partition("`")[0].split()
    assert checkpoint([str(copy / "elsewhere") if word == "DIR" else word for word in command]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert flat(model_dir.load_params(run)[0]).keys() == flat(model_dir.load_params(tuned / "run")[0]).keys()


def test_another_base_is_refused_and_the_same_weights_saved_again_are_not(copy, assets, tmp_path):
    run, params = copy / "run", model_dir.load_params(copy / "base")[0]
    kind, config = "vla", model_dir.read_model_config(copy / "base", "vla")
    model_dir.save_model(tmp_path / "again", kind, config, params, step=2)
    base_lib.record_path(run, tmp_path / "again")
    model_dir.load_params(run)
    params["transformer"]["blocks"]["wq"] = params["transformer"]["blocks"]["wq"].at[0, 0, 0, 0].add(1.0)
    model_dir.save_model(tmp_path / "other", kind, config, params, step=2)
    base_lib.record_path(run, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"is not the base that .* was trained on: transformer.blocks.wq of"):
        model_dir.load_params(run)
    shutil.copytree(copy / "base" / "assets", tmp_path / "other" / "assets", dirs_exist_ok=True)
    shutil.rmtree(reader.step_folder(run, 4))
    with pytest.raises(CheckpointError, match=r"is not the base that .* was started from: transformer.blocks.wq of"):
        train(config_of(assets, tmp_path / "other"), run)


def test_a_run_keeps_what_it_trains(copy, assets):
    with pytest.raises(ConfigError, match=r"was started with config.finetune .*use another --workdir"):
        train(config_of(assets, copy / "base", total_steps=6, **{"finetune.lora.rank": 8}), copy / "run")


def test_a_frozen_model_is_copied_whole(tuned, tmp_path):
    model_dir.copy_model(tuned / "run", tmp_path / "copied")
    found, wanted = (flat(model_dir.load_params(path)[0]) for path in (tmp_path / "copied", tuned / "run"))
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in wanted.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from.path": ""}, r"config.init_from.path is empty, so they would be random; set it"),
        ({"finetune.train": ("action_haed.*",)}, r"finetune.train: 'action_haed.\*' matches no parameter; correct it"),
        ({"finetune.train": ("*",)}, r"finetune.train matches every parameter; set finetune.train=\(\)"),
        ({"finetune.train": ("*.wq",)}, r"transformer.blocks.wq would train and have an adapter as well; leave it out"),
        ({"init_from.new": ("*embed",)}, r"transformer.embed would be random and stay so"),
        ({"optimizer.rates": (("*.wq", 2.0),)}, r"optimizer.rates: '\*.wq' matches no parameter"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_written(tuned, assets, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train(config_of(assets, tuned / "base", **changes), tmp_path / "run")
    assert not reader.steps(tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": -1}, r"finetune.lora.rank is -1; it must be at least 0"),
        ({"rank": 4, "alpha": 0.0}, r"finetune.lora.alpha is 0, .*give a number above 0"),
        ({"targets": ("qq",)}, r"finetune.lora.targets: 'qq' matches none of q, k, v, o, gate, up, down; correct it"),
        ({"rank": 4, "targets": ()}, r"finetune.lora.targets is \(\), so there is nothing to adapt; name some"),
    ],
)
def test_wrong_adapters_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


def test_stages_without_a_transformer_have_no_adapters(assets):
    with pytest.raises(ConfigError, match=r"stage action_vae has none; set finetune.lora.rank=0"):
        run_config("action_vae", assets, **{"finetune.lora.rank": 4})
    with pytest.raises(ConfigError, match=r"finetune.base_dtype is 'int8'; choose one of bfloat16, float32"):
        FinetuneConfig(base_dtype="int8")


TUNED = FinetuneConfig(train=TRAIN, base_dtype="float32", lora=LoraConfig(rank=8))


def step_of(config, mesh, batch):
    """Gradients and metrics of a batch; adapters' B is not zero."""
    objective = OBJECTIVES["robot"]
    graphdef, params = params_lib.split(objective.build(config, nnx.Rngs(0)))
    for one in params["transformer"]["blocks"]["lora"].values():
        one["b"] = jax.random.normal(jax.random.key(1), one["b"].shape) * 0.1
    trained, base = finetune.split(config.finetune, params)
    vae = params_lib.split(ActionVAE(config.action_vae_model, rngs=nnx.Rngs(1)))[1]
    with jax.set_mesh(mesh):
        _, shaped, frozen_shapes, _ = finetune.abstract_params(config, objective, mesh)
        place = lambda x, wanted: jax.device_put(x, wanted.sharding)  # noqa: E731
        trained, base = jax.tree.map(place, trained, shaped), jax.tree.map(place, base, frozen_shapes)
        frozen = dataclasses.replace(jax.device_put(Frozen(action_vae=vae), mesh_lib.replicated(mesh)), base=base)
        rows = {k: jax.device_put(v, mesh_lib.batch_sharding(mesh)) for k, v in batch.items()}
        run = jax.jit(lambda p, f, b: gradients(config, objective, graphdef, p, f, b, jax.random.key(3)))
        grads, metrics = run(trained, frozen, rows)
    return flat(grads), {name: float(x) for name, x in metrics.items()}


@pytest.mark.parametrize(
    ("mesh", "torus", "accumulation"),
    [
        (MeshConfig(fsdp=8), None, 2),
        (MeshConfig(fsdp=4, tensor=2), (4, 2), 1),
        (MeshConfig(data=2, fsdp=2, sequence=2), None, 1),
    ],
)
def test_other_meshes_and_accumulation_give_the_same_gradients(mesh, torus, accumulation):
    """Of packed clips, too."""
    config = dataclasses.replace(
        CONFIG,
        finetune=TUNED,
        vla=dataclasses.replace(CONFIG.vla, transformer=dataclasses.replace(CONFIG.vla.transformer, dropout=0.0)),
    )
    batch = packed_batch() if mesh.tensor == 1 else robot_batch()
    single, told = step_of(config, mesh_lib.make_mesh(MeshConfig(), jax.devices()[:1]), batch)
    parts = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation=accumulation))
    grads, metrics = step_of(parts, mesh_lib.make_mesh(mesh, torus=torus), batch)
    assert any(name.endswith("lora.down.a") and np.abs(x).max() > 1e-6 for name, x in single.items())
    for name, value in told.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name
    for name, value in single.items():
        np.testing.assert_allclose(grads[name], value, atol=1e-5, rtol=1e-4, err_msg=name)


def test_what_does_not_train_has_no_moments_and_is_cut_over_the_mesh():
    config = dataclasses.replace(CONFIG, finetune=TUNED)
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=4, tensor=2))
    state = abstract_state(config, OBJECTIVES["robot"], mesh)[0]
    base = finetune.abstract_params(config, OBJECTIVES["robot"], mesh)[2]
    moments = {path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)}
    assert any("lora.gate.a" in name for name in moments) and not any("wq" in name for name in moments)
    a = state.params["transformer"]["blocks"]["lora"]["gate"]["a"]
    assert a.sharding.shard_shape(a.shape)[1] == a.shape[1] // 8
    wq = base["transformer"]["blocks"]["wq"]
    assert np.prod(wq.sharding.shard_shape(wq.shape)) * 8 == np.prod(wq.shape)
