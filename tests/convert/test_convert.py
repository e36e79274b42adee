"""Import, export and verification: round trips of every format, parity with transformers, refusals."""

import dataclasses
import errno
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.cli import main as cli
from rynnvla_jax.config import MeshConfig, TransformerConfig, VLAConfig, VQGANConfig
from rynnvla_jax.convert import ConversionError, exporter, foreign, importer, stream, vla
from rynnvla_jax.convert.foreign import open_checkpoint
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer
from tests import GOLDEN

SMALL = TransformerConfig(
    vocab_size=130, width=32, num_layers=2, num_heads=4, num_kv_heads=4, feed_forward=48, image_tokens=(4, 20)
)
VARIANTS = {
    "plain": {},
    "gqa": {"num_kv_heads": 2},
    "mqa": {"num_kv_heads": 1, "rope_theta": 5e5, "norm_eps": 1e-6},
    "biases": {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 2},
    "34b": {"swin_norm": True, "num_kv_heads": 2, "q_norm_rows": 2, "k_norm_rows": 2},
    "row_a_head": {"q_norm_rows": 4, "k_norm_rows": 4, "mask_image_logits": True},
}


def small(**changes) -> VLAConfig:
    return VLAConfig(transformer=dataclasses.replace(SMALL, **changes))


def random_tensors(config: VLAConfig, heads=True, norm_rows=None, dtype=np.float32, seed=0):
    """A state dict in the public layout. Norm scales are near one; repeated norm rows really repeat."""
    rng = np.random.default_rng(seed)
    shapes = importer.model_shapes(config)
    tensors = {}
    for entry in vla.table(config, heads=heads, norm_rows=norm_rows):
        ours = shapes[entry.ours] if entry.layer is None else shapes[entry.ours][1:]
        one = "norm" in entry.foreign and entry.foreign.endswith("weight")
        value = rng.standard_normal(ours).astype(np.float32) * 0.1 + one
        tensors[entry.foreign] = np.ascontiguousarray(entry.transform.to_foreign(value)[: entry.rows].astype(dtype))
    return tensors


def config_json(config: VLAConfig, **extra):
    values = vla.config_to_foreign(config) | extra
    del values["image_tokens"]
    first, last = config.transformer.image_tokens
    names = {"IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(i)) + "Z": first + i for i in range(last - first)}
    return values | {"vocabulary_map": {"<s>": 0, **names}}


def write_folder(folder: Path, tensors, config=None, layout="single"):
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    keys = list(tensors)
    half = len(keys) // 2
    parts = [{k: tensors[k] for k in keys[:half]}, {k: tensors[k] for k in keys[half:]}]
    if layout == "single":
        save_file(tensors, folder / "model.safetensors")
    elif layout == "sharded":
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            save_file(part, folder / name)
        index = {"weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    elif layout == "bin":
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, part in zip(names, parts, strict=True):
            torch.save({k: as_torch(v) for k, v in part.items()}, folder / name)
        index = {"weight_map": {k: n for n, part in zip(names, parts, strict=True) for k in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    elif layout == "pth":
        torch.save({"model": {k: as_torch(v) for k, v in tensors.items()}}, folder / "checkpoint.pth")
    elif layout == "legacy":
        content = {k: as_torch(v) for k, v in tensors.items()}
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return folder


def as_torch(x):
    if x.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


def run(*arguments) -> int:
    return cli.main(["convert", *[str(a) for a in arguments]])


def import_model(source, out, *flags):
    assert run("import", source, out, *flags) == 0
    return model_dir.read_model_config(out, "vla")


def exported(folder: Path):
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def logits(directory: Path, embeddings) -> tuple[np.ndarray, np.ndarray]:
    config = model_dir.read_model_config(directory, "vla")
    weights, _ = model_dir.load_params(directory)
    model = nnx.merge(nnx.split(nnx.eval_shape(lambda: VLA(config, rngs=nnx.Rngs(0))))[0], weights)
    with jax.default_matmul_precision("highest"):
        hidden, _ = jax.jit(model.transformer)(embeddings)
        return np.asarray(hidden), np.asarray(model.transformer.logits(hidden))[..., : config.transformer.vocab_size]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_of_every_option(tmp_path, variant):
    config = small(**VARIANTS[variant])
    tensors = random_tensors(config)
    source = write_folder(
        tmp_path / "hf", tensors, config_json(config, model_parallel_size=config.transformer.q_norm_rows)
    )
    assert import_model(source, tmp_path / "model") == config
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    assert_same(exported(tmp_path / "out"), tensors)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("single", ml_dtypes.bfloat16),
        ("sharded", np.float16),
        ("bin", ml_dtypes.bfloat16),
        ("pth", np.float16),
        ("legacy", np.float32),
    ],
)
def test_round_trip_of_every_format(tmp_path, layout, dtype):
    config = small(num_kv_heads=2)
    tensors = random_tensors(config, dtype=dtype)
    source = write_folder(tmp_path / "hf", tensors, config_json(config), layout)
    assert import_model(source, tmp_path / "model") == config
    (tmp_path / "out").mkdir()
    exporter.write_export(
        tmp_path / "model",
        tmp_path / "out",
        dtype=np.dtype(dtype).name,
        shard_bytes=10**4 if layout == "sharded" else 10**9,
    )
    assert_same(exported(tmp_path / "out"), tensors)
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (layout == "sharded")


def test_mlp_action_head_from_golden_weights_gives_golden_logits(tmp_path, capsys):
    for case in ("vla_one_layer", "vla_gqa_mlp_head"):
        entry = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"][case]
        weights = load_file(GOLDEN / f"{case}.weights.safetensors")
        for key, rule in (entry["synthetic_weights"] or {}).items():
            draw = np.random.RandomState(rule["randomstate_seed"]).uniform(-1, 1, size=rule["shape"])
            weights[key] = (draw * rule["scale"]).astype(np.float32)
        ids = entry["image_token_ids"]
        source = write_folder(tmp_path / case, weights, entry["config"] | {"image_tokens": [ids[0], ids[-1] + 1]})
        import_model(source, tmp_path / f"{case}_model")
        io = load_file(GOLDEN / f"{case}.io.safetensors")
        hidden, found = logits(tmp_path / f"{case}_model", io["embeds_in"])
        np.testing.assert_allclose(hidden, io["hidden_final"], atol=3e-5)
        np.testing.assert_allclose(found, io["logits"], atol=3e-5)
        assert run("export", tmp_path / f"{case}_model", tmp_path / f"{case}_out") == 0
        assert_same(exported(tmp_path / f"{case}_out"), weights)
    assert "action latent" in capsys.readouterr().out


def interleave(x, head_dim):
    """HF's half-split order -> Meta's pairs, inside each head of the leading axis."""
    return np.ascontiguousarray(x.reshape(-1, 2, head_dim // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape))


def write_meta(folder: Path, tensors, config: VLAConfig, shards: int):
    t = config.transformer
    names = {
        "self_attn.q_proj.weight": ("attention.wq.weight", 0),
        "self_attn.k_proj.weight": ("attention.wk.weight", 0),
        "self_attn.v_proj.weight": ("attention.wv.weight", 0),
        "self_attn.o_proj.weight": ("attention.wo.weight", 1),
        "self_attn.q_norm.weight": ("attention.q_normalization.weight", "row"),
        "self_attn.q_norm.bias": ("attention.q_normalization.bias", "row"),
        "self_attn.k_norm.weight": ("attention.k_normalization.weight", "row"),
        "self_attn.k_norm.bias": ("attention.k_normalization.bias", "row"),
        "mlp.gate_proj.weight": ("feed_forward.w1.weight", 0),
        "mlp.down_proj.weight": ("feed_forward.w2.weight", 1),
        "mlp.up_proj.weight": ("feed_forward.w3.weight", 0),
        "input_layernorm.weight": ("attention_norm.weight", None),
        "post_attention_layernorm.weight": ("ffn_norm.weight", None),
    }
    top = {
        "model.embed_tokens.weight": ("tok_embeddings.weight", 1),
        "model.norm.weight": ("norm.weight", None),
        "lm_head.weight": ("output.weight", 0),
    }
    parts = [{} for _ in range(shards)]
    for key, value in tensors.items():
        if key in top:
            theirs, axis = top[key]
        else:
            _, _, layer, rest = key.split(".", 3)
            theirs, axis = names[rest]
            theirs = f"layers.{layer}.{theirs}"
        if any(n in key for n in ("q_proj", "k_proj")):
            value = interleave(value, t.head_dim)
        for i, part in enumerate(parts):
            if axis == "row":
                part[theirs] = interleave(value[i], t.head_dim)
            elif axis is None:
                part[theirs] = value
            else:
                part[theirs] = np.split(value, shards, axis)[i]
    folder.mkdir()
    for i, part in enumerate(parts):
        name = "consolidated.pth" if shards == 1 else f"consolidated.{i:02d}.pth"
        torch.save({k: as_torch(np.ascontiguousarray(v)) for k, v in part.items()}, folder / name)
    model = {"dim": t.width, "n_layers": t.num_layers, "n_heads": t.num_heads, "norm_eps": t.norm_eps}
    model |= {"swin_norm": t.swin_norm, "rope_theta": t.rope_theta, "n_kv_heads": t.num_kv_heads}
    (folder / "params.json").write_text(json.dumps({"model_parallel_size": shards, "model": model}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_meta_layout(tmp_path, shards):
    config = small(num_kv_heads=2, q_norm_rows=shards, k_norm_rows=shards, swin_norm=shards > 1)
    tensors = random_tensors(config, heads=False)
    source = write_meta(tmp_path / "meta", tensors, config, shards)
    found = import_model(source, tmp_path / "model")
    assert found.transformer == dataclasses.replace(
        config.transformer, vocab_size=134, image_tokens=TransformerConfig.image_tokens
    )
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    out = exported(tmp_path / "out")
    for key in (vla.EMBED, vla.HEAD):
        out[key] = out[key][:130]
    assert_same({k: v for k, v in out.items() if k.split(".")[0] not in vla.HEADS}, tensors)


def test_meta_and_half_split_weights_attend_alike(tmp_path):
    """Scores with rotary pairs and Meta's tensors = scores with rotary halves and what the reader gives."""
    config = small()
    tensors = random_tensors(config, heads=False)
    folder = write_meta(tmp_path / "meta", tensors, config, 1)
    meta = torch.load(folder / "consolidated.pth", weights_only=True)
    opened = open_checkpoint(folder)
    x = np.random.default_rng(1).standard_normal((5, 32)).astype(np.float32)
    angles = np.arange(5)[:, None, None] * 10000.0 ** (-np.arange(4) / 4)

    def norm(q, scale, bias):
        q = q.reshape(5, 4, 8)
        q = (q - q.mean(-1, keepdims=True)) / np.sqrt(q.var(-1, keepdims=True) + 1e-5)
        return q * scale.reshape(-1) + bias.reshape(-1)

    def pairs(q):
        turned = (q[..., ::2] + 1j * q[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(q.shape)

    def halves(q):
        turned = (q[..., :4] + 1j * q[..., 4:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], -1)

    def scores(read, rotate, q_names, k_names):
        q, k = (
            rotate(norm(x @ np.asarray(read(w)).T, np.asarray(read(s)), np.asarray(read(b))))
            for w, s, b in (q_names, k_names)
        )
        return np.einsum("she,the->hst", q, k)

    theirs = "layers.1.attention."
    ours = "model.layers.1.self_attn."
    wanted = scores(
        lambda n: meta[theirs + n].numpy(),
        pairs,
        ("wq.weight", "q_normalization.weight", "q_normalization.bias"),
        ("wk.weight", "k_normalization.weight", "k_normalization.bias"),
    )
    found = scores(
        lambda n: opened.read(ours + n),
        halves,
        ("q_proj.weight", "q_norm.weight", "q_norm.bias"),
        ("k_proj.weight", "k_norm.weight", "k_norm.bias"),
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(train_tokenizer(["put the block in the box"], 64, 20, 64), encoding="utf-8")
    return path


def test_base_chameleon_gets_new_rows_and_projections(tmp_path, tokenizer, capsys):
    vocabulary = TextTokenizer(tokenizer).vocabulary
    config = small(vocab_size=vocabulary.base_size, image_tokens=vocabulary.image_tokens)
    tensors = random_tensors(config, heads=False)
    tensors |= {"model.vqmodel.quant_conv.weight": np.ones((2, 2), np.float32)}
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    shutil.copy(tokenizer, source / "tokenizer.json")
    assert run("import", source, tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert "1 tensors do not fit config.json. Of the VQGAN's encoder: 1; give" in error
    assert "--ignore model.vqmodel." in error and error.index("--vqgan vqgan.ckpt") < error.index("quant_conv")
    found = import_model(source, tmp_path / "model", "--ignore", "model.vqmodel.")
    report = capsys.readouterr().out
    for line in ("transformer.embed vocabulary rows", "state_projection.kernel [6, 32]", "1 keys model.vqmodel."):
        assert line in report
    assert found.transformer.vocab_size == vocabulary.size
    assert (tmp_path / "model/assets/tokenizer.json").read_bytes() == tokenizer.read_bytes()
    weights, _ = model_dir.load_params(tmp_path / "model")
    embed, head = np.asarray(weights["transformer"]["embed"]), np.asarray(weights["transformer"]["head"]).T
    for ours, theirs in ((embed, tensors[vla.EMBED]), (head, tensors[vla.HEAD])):
        np.testing.assert_array_equal(ours[: vocabulary.base_size], theirs)
        new = ours[vocabulary.base_size : vocabulary.size]
        assert 0.01 < new.std() < 0.03 and len(np.unique(new)) == new.size
        assert not ours[vocabulary.size :].any() and len(ours) % 128 == 0
    assert not np.asarray(weights["state_projection"]["bias"]).any()
    assert np.asarray(weights["action_head"]["layer_0"]["kernel"]).std() > 0.1


def test_a_vqgan_of_its_own_replaces_the_checkpoints(tmp_path, tokenizer, capsys):
    """--vqgan implies ignoring model.vqmodel.*; a VQGAN and an ActionVAE that we exported are read back."""
    config = small()
    tensors = random_tensors(config) | {f"model.vqmodel.{i}": np.ones(2, np.float32) for i in range(67)}
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    folder, weights = golden_vqgan(tmp_path)
    import_model(source, tmp_path / "model", "--vqgan", folder)
    assert "67 keys model.vqmodel.*" in capsys.readouterr().out
    assert run("export", tmp_path / "model/assets/vqgan", tmp_path / "vqgan") == 0
    assert run("import", tmp_path / "vqgan", tmp_path / "again") == 0
    wanted = model_dir.read_model_config(tmp_path / "model/assets/vqgan", "vqgan")
    assert model_dir.read_model_config(tmp_path / "again", "vqgan") == wanted != VQGANConfig()
    assert run("export", tmp_path / "again", tmp_path / "twice") == 0
    assert_same(exported(tmp_path / "twice"), weights)
    import_model(source, tmp_path / "with", "--vqgan", tmp_path / "vqgan")

    case = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]["actionvae_post"]
    (tmp_path / "vae.json").write_text(json.dumps(case["config"]), encoding="utf-8")
    weights = GOLDEN / "actionvae_post.weights.safetensors"
    assert run("import", weights, tmp_path / "vae", "--model-config", tmp_path / "vae.json") == 0
    assert run("export", tmp_path / "vae", tmp_path / "vae_out") == 0
    assert run("import", tmp_path / "vae_out", tmp_path / "vae_again") == 0
    configs = [model_dir.read_model_config(tmp_path / name, "action_vae") for name in ("vae", "vae_again")]
    assert configs[0] == configs[1] and configs[0].num_heads == 4
    capsys.readouterr()
    (tmp_path / "vae_out/config.json").write_text(
        json.dumps(dataclasses.asdict(configs[0]) | {"chunk": 7}), encoding="utf-8"
    )
    assert run("import", tmp_path / "vae_out", tmp_path / "vae_wrong") == 1
    assert "num_queries 7 (the tensors say" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["sharded", "bin"])
def test_nested_names_of_transformers(tmp_path, layout, capsys):
    """transformers nests the text model under model.language_model, and its settings under text_config."""
    config = small()
    flat = random_tensors(config)
    nested = {
        k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v for k, v in flat.items()
    }
    assert "model.language_model.layers.0.mlp.up_proj.weight" in nested and vla.HEAD in nested
    values = {"text_config": config_json(config), "model_type": "chameleon"}
    write_folder(tmp_path / "hf", nested, values, layout)
    assert import_model(tmp_path / "hf", tmp_path / "model") == config
    assert "model.language_model.* is read as model.*" in capsys.readouterr().out
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    assert_same(exported(tmp_path / "out"), flat)
    write_folder(tmp_path / "both", flat | nested, values, layout)
    assert run("import", tmp_path / "both", tmp_path / "never") == 1
    assert "are stored both as model.language_model.* and as model.*" in capsys.readouterr().err


def test_wrong_keys_are_counted_and_shown_ten_at_a_time(tmp_path, capsys):
    config = small()
    tensors = random_tensors(config) | {f"vision.{i}": np.ones(2, np.float32) for i in range(67)}
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    assert run("import", source, tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert "67 tensors do not fit config.json. Leave out what is not part of the model with --ignore PREFIX" in error
    assert error.count(": unexpected") == 10 and error.count("\n") == 1
    import_model(source, tmp_path / "model", "--ignore", "vision.")  # the remedy

    folder, weights = golden_vqgan(tmp_path)
    save_file({k: v for k, v in weights.items() if not k.startswith("encoder.")}, tmp_path / "half.safetensors")
    shutil.copy(folder / "vqgan.yaml", tmp_path / "vqgan.yaml")
    assert run("import", tmp_path / "half.safetensors", tmp_path / "vqgan") == 1
    error = capsys.readouterr().err
    assert error.count(": missing") == 10 and "tensors do not fit the model" in error and " more" in error


def test_repeated_norm_rows_collapse_and_distinct_rows_stay(tmp_path):
    config = small(q_norm_rows=2, k_norm_rows=2)
    repeated = random_tensors(config, norm_rows=(4, 4))
    source = write_folder(tmp_path / "hf", repeated, config_json(config, model_parallel_size=2))
    assert import_model(source, tmp_path / "two").transformer.q_norm_rows == 2
    distinct = dict(repeated)
    key = "model.layers.1.self_attn.q_norm.bias"
    distinct[key] = repeated[key] + np.arange(4, dtype=np.float32)[:, None]
    source = write_folder(tmp_path / "hf4", distinct, config_json(config, model_parallel_size=2))
    found = import_model(source, tmp_path / "four").transformer
    assert (found.q_norm_rows, found.k_norm_rows) == (4, 2)


def test_tied_embeddings_are_untied(tmp_path, capsys):
    config = small()
    tensors = random_tensors(config)
    del tensors[vla.HEAD]
    source = write_folder(tmp_path / "hf", tensors, config_json(config, tie_word_embeddings=True))
    import_model(source, tmp_path / "model")
    assert "untied" in capsys.readouterr().out
    weights, _ = model_dir.load_params(tmp_path / "model")
    np.testing.assert_array_equal(weights["transformer"]["head"], np.asarray(weights["transformer"]["embed"]).T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_theta": 1.0}, "two different rope_theta"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"vocab_size": 99}, "vocab_size is 99"),
        ({"action_head_type": "MLP"}, "action_head_type is 'MLP'"),
        ({"vocabulary_map": {"IMGIMGAZ": 4, "IMGIMGBZ": 9}}, "contiguous"),
    ],
)
def test_unsupported_configurations(tmp_path, capsys, change, message):
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config, **{}) | change)
    assert run("import", source, tmp_path / "model") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.partial"))


def test_rope_theta_inside_rope_parameters(tmp_path):
    config = small(rope_theta=5e5)
    values = config_json(config)
    del values["rope_theta"]
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000}
    source = write_folder(tmp_path / "hf", random_tensors(config), values)
    assert import_model(source, tmp_path / "model") == config


def test_every_wrong_key_is_listed(tmp_path):
    config = small()
    tensors = random_tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)  # known, of no use
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    with pytest.raises(ConversionError) as error:
        importer.import_checkpoint(source, tmp_path / "model")
    message = str(error.value)
    assert "model.layers.1.mlp.up_proj.weight: missing" in message
    assert "model.layers.0.mlp.down_proj.weight: shape [3, 3], expected [32, 48]" in message
    assert "model.layers.7.mlp.up_proj.weight: unexpected" in message
    assert "inv_freq" not in message
    assert not (tmp_path / "model").exists()


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_folder(tmp_path / "hf", {}, config_json(small()), "none")
    torch.save({"model.norm.weight": torch.ones(3), "x": Evil()}, source / "pytorch_model.bin")
    assert run("import", source, tmp_path / "model") == 1
    assert "was not read" in capsys.readouterr().err
    (source / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert run("import", source, tmp_path / "model") == 1
    assert not (tmp_path / "pwned").exists()


def with_size(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def test_damaged_files_are_named(tmp_path, capsys):
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    file = source / "model.safetensors"
    content = file.read_bytes()
    for damaged, message in (
        (content[:-4], "truncated"),
        (content[:100], "not a safetensors"),
        (b"", "not a safetens"),
        (with_size(b"[1, 2]"), "its header is not an object"),
        (with_size(b'{"norm": 3}'), "damaged at norm"),
        (with_size(b'{"norm": {"dtype": "F32", "data_offsets": [0, 4]}}'), "damaged at norm"),
        (with_size(b'{"norm": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}'), "damaged at norm"),
        (with_size(b'{"norm": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}'), "norm is F4"),
    ):
        file.write_bytes(damaged)
        assert run("import", source, tmp_path / "model") == 1
        error = capsys.readouterr().err
        assert message in error and "model.safetensors" in error
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert run("import", source, tmp_path / "model") == 1
    assert "outside its folder" in capsys.readouterr().err


def test_a_file_that_is_no_pickle_is_not_called_dangerous(tmp_path, capsys):
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b""):
        (tmp_path / "vqgan.ckpt").write_bytes(content)
        assert run("import", tmp_path / "vqgan.ckpt", tmp_path / "model") == 1
        what = "is a Git LFS pointer" if content.startswith(b"version") else "is not a torch file (a web page?)"
        assert f"{tmp_path}/vqgan.ckpt {what}" in capsys.readouterr().err


def test_bad_companions_are_one_line(tmp_path, capsys):
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    for flag in ("--tokenizer", "--statistics", "--model-config"):
        assert run("import", source, tmp_path / "model", flag, tmp_path / "broken.json") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("rynnvla convert import: ")
    assert run("import", tmp_path / "nowhere", tmp_path / "model") == 1
    assert run("export", tmp_path / "hf", tmp_path / "out") == 1
    assert not (tmp_path / "model").exists()


def test_faults_of_companions_show_before_the_transformer_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importer, "_write_stored", lambda *_: pytest.fail("the transformer is written"))
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    folder, _ = golden_vqgan(tmp_path)
    (folder / "vqgan.yaml").write_text("model: {params: [", encoding="utf-8")
    for flags, message in (
        (["--vqgan", tmp_path / "nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--vqgan", folder], "vqgan.yaml is not YAML"),
        (["--action-vae", folder], "not an ActionVAE"),
        (["--statistics", tmp_path / "nowhere.json"], "nowhere.json do not exist"),
        (["--vq"], "drop --vq"),
    ):
        assert run("import", source, tmp_path / "model", *flags) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {params: [", "vqgan.yaml is not YAML"),
        (b"\xff\xfe", "vqgan.yaml is not YAML"),
        (b"model:\n  params:\n", "vqgan.yaml lacks model.params"),
        (b"model: {params: {n_embed: 1, embed_dim: 1, ddconfig: }}", "vqgan.yaml model.params lacks ddconfig"),
    ],
)
def test_a_damaged_vqgan_yaml_is_named(tmp_path, capsys, content, message):
    folder, _ = golden_vqgan(tmp_path)
    (folder / "vqgan.yaml").write_bytes(content)
    for flags in ([], ["--model-config", folder / "vqgan.yaml"]):
        assert run("import", folder, tmp_path / "model", *flags) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_existing_folders_are_left_alone(tmp_path, capsys):
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/precious").write_text("x", encoding="utf-8")
    assert run("import", source, tmp_path / "model") == 1
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "model/precious").read_text(encoding="utf-8") == "x"


def test_export_that_disagrees_is_not_left_behind(tmp_path, capsys, monkeypatch):
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    import_model(source, tmp_path / "model")
    assert run("export", tmp_path / "model", tmp_path / "out", "--tolerance", "1e-12") == 1
    assert "disagree on" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "model"]
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.q_norm.bias"] += 0.1
    save_file(tensors, file)
    capsys.readouterr()
    assert run("verify", tmp_path / "model", tmp_path / "out", "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert not printed["pass"]
    failed = {row["quantity"] for row in printed["differences"] if not row["pass"]}
    assert "logits" in failed and "embeddings" not in failed
    del tensors["lm_head.weight"]
    save_file(tensors, file)
    assert run("verify", tmp_path / "model", tmp_path / "out") == 1
    assert "lm_head.weight: missing" in capsys.readouterr().err


def test_float16_overflow_is_an_error(tmp_path, capsys):
    config = small()
    tensors = random_tensors(config)
    tensors["model.norm.weight"][3] = 1e6
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    import_model(source, tmp_path / "model")
    assert run("export", tmp_path / "model", tmp_path / "out", "--dtype", "float16") == 1
    assert "model.norm.weight has values above 65504, the limit of float16" in capsys.readouterr().err


def test_import_restores_under_eight_devices(tmp_path):
    """Stock Orbax, through both of its restores, onto a mesh that shards every matrix."""
    config = small()
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    import_model(source, tmp_path / "model")
    model = nnx.eval_shape(lambda: VLA(config, rngs=nnx.Rngs(0)))
    _, shapes = params.split(model)
    mesh = mesh_lib.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    shardings = mesh_lib.param_shardings(params.axes(model), shapes, mesh)
    abstract = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
    whole, _ = model_dir.load_params(tmp_path / "model")
    loaded, _ = model_dir.load_params(tmp_path / "model", abstract)
    with ocp.CheckpointManager(tmp_path / "model" / "checkpoints", item_names=("params",)) as manager:
        assert manager.latest_step() == 0
        arguments = ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
        restored = manager.restore(0, args=arguments).params
    for tree in (loaded, restored):
        jax.tree.map(np.testing.assert_array_equal, tree, whole)
        assert jax.tree.all(jax.tree.map(lambda x, h: x.sharding == h, tree, shardings))
    wq = loaded["transformer"]["blocks"]["wq"]
    assert wq.addressable_shards[0].data.size * 8 == wq.size


def test_chunks_hold_parts_of_one_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 512)
    config = small()
    tensors = random_tensors(config)
    source = write_folder(tmp_path / "hf", tensors, config_json(config))
    import_model(source, tmp_path / "model")
    arrays = stream.open_params(tmp_path / "model", 0)
    for path, array in arrays.items():
        chunk = array.store.chunk_layout.read_chunk.shape
        assert 4 * np.prod(chunk) <= 512, path
        assert not path.startswith("transformer.blocks.") or chunk[0] == 1
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    assert_same(exported(tmp_path / "out"), tensors)


def test_export_of_a_training_checkpoint(tmp_path, tokenizer):
    """What Orbax itself wrote (OCDBT), the step asked for, and assets on their way to the robot."""
    vocabulary = TextTokenizer(tokenizer).vocabulary
    config = small(vocab_size=vocabulary.size, image_tokens=vocabulary.image_tokens)
    rng = np.random.default_rng(0)
    draw = {k: rng.standard_normal(s).astype(np.float32) * 0.1 for k, s in importer.model_shapes(config).items()}
    model = stream.nest({k: jax.device_put(x) for k, x in draw.items()})
    model_dir.save_model(tmp_path / "work", "vla", config, model, step=3)
    model_dir.save_model(tmp_path / "work", "vla", config, jax.tree.map(np.sin, model), step=7)
    shutil.copy(tokenizer, tmp_path / "work/assets/tokenizer.json")
    assert run("export", tmp_path / "work", tmp_path / "out", "--step", "3") == 0
    np.testing.assert_array_equal(
        exported(tmp_path / "out")[vla.HEAD].T, model["transformer"]["head"][:, : vocabulary.size]
    )
    assert (tmp_path / "out/tokenizer.json").exists()
    assert run("verify", tmp_path / "work", tmp_path / "out") == 1  # the newest step is another model
    assert run("export", tmp_path / "work", tmp_path / "other", "--step", "5") == 1


def test_a_model_of_stage_1_is_no_policy(tmp_path, capsys):
    config = dataclasses.replace(small(), state_dim=0)
    params = stream.nest({k: np.zeros(s, np.float32) for k, s in importer.model_shapes(config).items()})
    model_dir.save_model(tmp_path / "work", "vla", config, params)
    assert run("export", tmp_path / "work", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/work is a model of stage 1" in error and error.count("\n") == 1
    assert run("export", tmp_path / "work", tmp_path / "out", "--format", "transformers") == 0


def golden_vqgan(tmp_path, case="vqgan_attn"):
    entry = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"][case]
    weights = {k: v for f in entry["files"] if ".weights" in f for k, v in load_file(GOLDEN / f).items()}
    weights["loss.discriminator.main.0.weight"] = np.ones((2, 2), np.float32)
    folder = tmp_path / case
    folder.mkdir()
    torch.save({"state_dict": {k: as_torch(v) for k, v in weights.items()}, "epoch": 3}, folder / "vqgan.ckpt")
    fields = {k: entry[k] for k in ("ddconfig", "n_embed", "embed_dim")}
    (folder / "vqgan.yaml").write_text(json.dumps({"model": {"params": fields}}), encoding="utf-8")  # JSON is YAML
    del weights["loss.discriminator.main.0.weight"]
    return folder, weights


def test_frozen_models_round_trip(tmp_path, capsys):
    folder, weights = golden_vqgan(tmp_path)
    assert run("import", folder / "vqgan.ckpt", tmp_path / "vqgan") == 0
    assert "1 keys loss.discriminator." in capsys.readouterr().out
    assert run("export", tmp_path / "vqgan", tmp_path / "vqgan_out") == 0
    assert_same(exported(tmp_path / "vqgan_out"), weights)
    entry = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]["actionvae_post"]
    weights = load_file(GOLDEN / "actionvae_post.weights.safetensors")
    torch.save({k: as_torch(v) for k, v in weights.items()}, tmp_path / "vae.pt")
    (tmp_path / "vae.json").write_text(json.dumps(entry["config"]), encoding="utf-8")
    assert run("import", tmp_path / "vae.pt", tmp_path / "vae", "--model-config", tmp_path / "vae.json") == 0
    assert model_dir.read_model_config(tmp_path / "vae", "action_vae").num_heads == 4
    assert run("export", tmp_path / "vae", tmp_path / "vae_out") == 0
    found = exported(tmp_path / "vae_out")
    np.testing.assert_allclose(found.pop("pos_table"), weights.pop("pos_table"), atol=1e-6)
    assert_same(found, weights)
    (tmp_path / "vae.json").write_text(json.dumps(entry["config"] | {"hidden_dim": 7}), encoding="utf-8")
    assert run("import", tmp_path / "vae.pt", tmp_path / "vae2", "--model-config", tmp_path / "vae.json") == 1
    assert "hidden_dim 7 (the tensors say 64)" in capsys.readouterr().err


def test_an_action_vae_takes_statistics_and_no_other_companion(tmp_path, capsys):
    statistics = write_statistics(tmp_path)
    shutil.copy(GOLDEN / "actionvae_post.weights.safetensors", tmp_path / "vae.safetensors")
    assert run("import", tmp_path / "vae.safetensors", tmp_path / "vae", "--statistics", statistics) == 0
    assert (tmp_path / "vae/assets/statistics.json").read_bytes() == statistics.read_bytes()
    unused = ("--vq", "--tokenizer", "x", "--ignore", "x", "--vqgan", "x", "--action-vae", "x", "--seed", "1")
    assert run("import", tmp_path / "vae.safetensors", tmp_path / "vae2", *unused) == 1
    error = capsys.readouterr().err
    assert all(flag in error for flag in unused if flag.startswith("--")) and "--statistics" not in error
    folder, _ = golden_vqgan(tmp_path)
    assert run("import", folder, tmp_path / "vqgan", "--statistics", statistics) == 1
    assert "of kind vqgan and does not use --statistics; leave out" in capsys.readouterr().err
    assert not (tmp_path / "vae2").exists() and not (tmp_path / "vqgan").exists()


def test_tokenising_half_of_a_vqgan(tmp_path, capsys):
    folder, _ = golden_vqgan(tmp_path, "vqgan_f16")
    assert run("import", folder, tmp_path / "vqgan") == 0
    assert "new: decoder" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["gqa", "34b", pytest.param("biases", marks=pytest.mark.slow)])
def test_transformers_loads_the_export(tmp_path, variant):
    from transformers import ChameleonForConditionalGeneration

    config = small(**VARIANTS[variant])
    tensors = random_tensors(config)
    rows = config.transformer.q_norm_rows
    source = write_folder(tmp_path / "hf", tensors, config_json(config, model_parallel_size=rows))
    folder, _ = golden_vqgan(tmp_path)
    import_model(source, tmp_path / "model", "--vqgan", folder / "vqgan.ckpt")
    assert run("export", tmp_path / "model", tmp_path / "out", "--format", "transformers") == 0
    model, info = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = np.random.default_rng(0).integers(20, 130, (2, 9))
    with torch.inference_mode():
        theirs = model.eval()(torch.from_numpy(tokens)).logits.numpy()
    _, ours = logits(tmp_path / "model", tensors[vla.EMBED][tokens])
    first, last = config.transformer.image_tokens
    assert (theirs[..., first:last] == np.finfo(np.float32).min).all()
    keep = np.r_[0:first, last:130]
    np.testing.assert_allclose(ours[..., keep], theirs[..., keep], atol=3e-5)
    io = load_file(GOLDEN / "vqgan_attn.io.safetensors")
    with torch.inference_mode():
        codes = model.model.vqmodel.encode(torch.from_numpy(io["image"])).image_tokens
    np.testing.assert_array_equal(codes.numpy().reshape(-1), io["indices"])


def test_what_transformers_saves_comes_back(tmp_path):
    """transformers -> ours -> transformers, with its own file names and config.json, VQGAN included."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    config = small(num_kv_heads=2)
    folder, _ = golden_vqgan(tmp_path)
    import_model(
        write_folder(tmp_path / "hf", random_tensors(config), config_json(config)),
        tmp_path / "seed",
        "--vqgan",
        folder / "vqgan.ckpt",
    )
    assert run("export", tmp_path / "seed", tmp_path / "base", "--format", "transformers") == 0
    hf = ChameleonForConditionalGeneration(ChameleonConfig.from_pretrained(tmp_path / "base")).eval()
    hf.save_pretrained(tmp_path / "saved")
    found = import_model(tmp_path / "saved", tmp_path / "model", "--vq")
    assert found.transformer.vocab_size == 134 and found.transformer.q_norm_rows == 1
    assert run("export", tmp_path / "model", tmp_path / "out", "--format", "transformers") == 0
    before, after = load_file(tmp_path / "saved/model.safetensors"), exported(tmp_path / "out")
    assert set(before) == set(after)
    for key, value in before.items():
        if key != "model.vqmodel.post_quant_conv.weight" and key != "model.vqmodel.post_quant_conv.bias":
            np.testing.assert_array_equal(after[key][: len(value)] if value.ndim else after[key], value, err_msg=key)


def write_statistics(folder: Path) -> Path:
    keys = ("rel_min_action", "rel_max_action", "rel_mean_action", "rel_std_action", "mean_state", "std_state")
    statistics = {k: [1.0] * 6 for k in keys} | {"unit": "degrees", "absolute_columns": [5]}
    (folder / "statistics.json").write_text(json.dumps(statistics), encoding="utf-8")
    return folder / "statistics.json"


def test_robot_export_runs_with_all_its_parts(tmp_path, tokenizer, capsys):
    vocabulary = TextTokenizer(tokenizer).vocabulary
    config = small(vocab_size=vocabulary.size, image_tokens=vocabulary.image_tokens)
    source = write_folder(tmp_path / "hf", random_tensors(config), config_json(config))
    vqgan, _ = golden_vqgan(tmp_path)
    weights = load_file(GOLDEN / "actionvae_post.weights.safetensors")
    save_file(weights, tmp_path / "vae.safetensors")
    statistics = write_statistics(tmp_path)
    import_model(
        source,
        tmp_path / "model",
        *("--tokenizer", tokenizer, "--vqgan", vqgan, "--action-vae", tmp_path / "vae.safetensors"),
        *("--statistics", statistics),
    )
    assets = tmp_path / "model/assets"  # of the model, and what training asks the ActionVAE for
    for file in (assets / "statistics.json", assets / "action_vae/assets/statistics.json"):
        assert file.read_bytes() == statistics.read_bytes()
    capsys.readouterr()
    assert run("export", tmp_path / "model", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    for quantity in ("action latent", "vqgan codes", "vqgan decoded image", "action VAE decoded chunk"):
        assert quantity in printed
    values = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["rynnvla"]
    assert values["chunk"] == 8
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    parts = {f"{kind}/{name}" for kind in ("vqgan", "action_vae") for name in ("config.json", "model.safetensors")}
    for_lerobot = {"sha256.json", "policy_preprocessor.json", "policy_postprocessor.json"}
    ours = {"config.json", "model.safetensors", "tokenizer.json", "statistics.json"}
    assert names == parts | ours | for_lerobot
    assert exporter.read_kind(tmp_path / "model") == "vla"


def test_a_full_disk_is_one_line_before_anything_is_mapped(tmp_path, monkeypatch):
    tensors = {"weight": (np.dtype(np.float32), (300, 1000))}
    foreign.create_safetensors(tmp_path / "a", tensors)
    assert 512 * (tmp_path / "a").stat().st_blocks >= 300 * 1000 * 4
    assert load_file(tmp_path / "a")["weight"].shape == (300, 1000)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ConversionError, match=r"b cannot be written \(No space left.*takes 0.0012 GB, and .* make room"
    ):
        foreign.create_safetensors(tmp_path / "b", tensors)


def test_an_import_onto_a_full_disk_names_the_file(tmp_path):
    (array,) = stream.create_params(tmp_path, {"w": (40, 1000)}, set()).values()
    values = np.random.default_rng(0).standard_normal((40, 1000)).astype(np.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConversionError, match="params/w/0.0.*too large"), stream.Writer() as writer:
            writer.write(array, (slice(None), slice(None)), values)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
