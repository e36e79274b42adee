"""Foreign checkpoints with damaged headers, configurations and bytes: refused in one line, and nothing is written."""

import json

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from rynnvla_jax.actions import Statistics
from rynnvla_jax.columns import Columns
from rynnvla_jax.config import ActionVAEConfig, VQGANConfig
from rynnvla_jax.convert import ConversionError, action_vae, frozen, importer, vla, vqgan
from rynnvla_jax.convert.foreign import open_checkpoint, safetensors_header
from rynnvla_jax.convert.report import ImportReport
from rynnvla_jax.vocabulary import TextTokenizer, train_tokenizer
from tests.convert.test_convert import config_json, random_tensors, small, write_folder
from tests.hostile import BROKEN_JSON, VALUES, attempt, changed, damaged, examples, json_files


def read(source):
    """Everything that an import does before it writes: the configuration, all shapes and all tensors."""
    opened = open_checkpoint(source)
    for key in opened.shapes:
        assert opened.read(key).shape == opened.shapes[key]
    if opened.config:
        opened = importer.replace(opened, config=vla.given_fields(opened.config))
    config, entries = importer._plan(opened, opened.tokenizer)
    importer._check(opened, entries, importer.model_shapes(config), (), ImportReport("vla", "", ""))
    return config


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(small())


@pytest.fixture
def folder(tmp_path, tensors):
    return write_folder(tmp_path / "model", tensors, config_json(small()))


# --- safetensors -----------------------------------------------------------------------------------------------------


def safetensors(header, data=bytes(48)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]},
}


def test_headers_of_safetensors(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(HEADER))
    assert {k: v.shape for k, v in read_all(file).items()} == {"a": (2, 4), "b": (8,)}

    @examples(60)
    @given(st.one_of(json_files(HEADER).map(safetensors), damaged(safetensors(HEADER))))
    def try_it(content):
        file.write_bytes(content)
        attempt(read_all, file)

    try_it()


def read_all(source):
    opened = open_checkpoint(source)
    return {key: opened.read(key) for key in opened.shapes}


@pytest.mark.parametrize("shape", [[-2, -2], [4.0], [2**62, 2**62, 0], "4", None, [True, 4], [[2], 2], [1] * 100])
def test_a_shape_that_is_none(shape, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}))
    with pytest.raises(ConversionError, match=r"model.safetensors is truncated or damaged at a \(it: shape"):
        safetensors_header(file)


def test_a_header_that_is_nested_too_deeply(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors(b"[" * 100_000))
    with pytest.raises(ConversionError, match=r"model.safetensors is not a safetensors file \(maximum recursion"):
        safetensors_header(file)


def test_the_index_of_shards(tmp_path, tensors):
    folder = write_folder(tmp_path / "model", tensors, config_json(small()), layout="sharded")
    file = folder / "model.safetensors.index.json"
    names = list(tensors)[:3]
    document = json.loads(file.read_text(encoding="utf-8"))
    document = {"weight_map": {k: document["weight_map"][k] for k in names}, "metadata": {"total_size": 3}}
    assert read(folder)

    @examples(40)
    @given(json_files(document))
    def try_it(content):
        file.write_bytes(content)
        attempt(read_all, folder)

    try_it()


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_bytes_of_a_pickle(legacy, tmp_path):
    file = tmp_path / "model.pth"
    content = {"a": torch.arange(8.0).reshape(2, 4), "b": torch.ones(4, dtype=torch.bfloat16)}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    sound = file.read_bytes()
    assert set(read_all(file)) == {"a", "b"}

    @examples(50)
    @given(st.one_of(damaged(sound), damaged(sound, 300)))
    def try_it(content):
        file.unlink()  # a mapping of the old file may still be alive
        file.write_bytes(content)
        attempt(read_all, file)

    try_it()


STRANGE = {
    "a view that claims much": {"a": torch.zeros(1).expand(1000, 1000)},
    "complex": {"a": torch.zeros(3, dtype=torch.complex64)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "quantized": {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
    "meta": {"a": torch.zeros(3, device="meta")},
    "float8": {"a": torch.zeros(3).to(torch.float8_e4m3fn)},
    "numbers as keys": {1: torch.zeros(3)},
    "no tensor": {"a": 1},
    "no dict": [torch.zeros(3)],
    "empty": {},
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_pickle_of_something_else(what, tmp_path):
    file = tmp_path / "model.pth"
    torch.save(STRANGE[what], file)
    with pytest.raises(ConversionError, match="model.pth"):
        read_all(file)


def write_meta(folder):
    """Meta's layout of one layer; a part of the tensors is enough."""
    folder.mkdir()
    shapes = {
        "tok_embeddings.weight": (16, 8),
        "layers.0.attention.wq.weight": (8, 8),
        "layers.0.attention.wk.weight": (8, 8),
        "layers.0.attention.q_normalization.weight": (4,),
        "norm.weight": (8,),
    }
    for i in range(2):
        torch.save({k: torch.ones(s) for k, s in shapes.items()}, folder / f"consolidated.0{i}.pth")
    params = {"model": {"dim": 8, "n_layers": 1, "n_heads": 2, "rope_theta": 1e4, "norm_eps": 1e-5, "n_kv_heads": None}}
    (folder / "params.json").write_text(json.dumps(params), encoding="utf-8")
    return params


def test_params_of_meta(tmp_path):
    params = write_meta(tmp_path / "meta")
    assert len(read_all(tmp_path / "meta")) == 5

    @examples(40)
    @given(json_files(params))
    def try_it(content):
        (tmp_path / "meta" / "params.json").write_bytes(content)
        attempt(read_all, tmp_path / "meta")

    try_it()


def test_shards_of_meta_that_cannot_be_joined(tmp_path):
    for i, shape in enumerate([(8,), (8, 8, 2), (8, 7), ()]):
        write_meta(tmp_path / str(i))
        file = tmp_path / str(i) / "consolidated.01.pth"
        torch.save(torch.load(file) | {"layers.0.attention.wq.weight": torch.zeros(shape)}, file)
        with pytest.raises(ConversionError, match="attention.wq.weight has shape.*(cannot be joined|are no heads)"):
            open_checkpoint(tmp_path / str(i))


# --- configurations --------------------------------------------------------------------------------------------------


def test_config_json(folder):
    document = config_json(small())
    document |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None}
    assert read(folder)

    @examples(60)
    @given(json_files(document))
    def try_it(content):
        (folder / "config.json").write_bytes(content)
        attempt(read, folder)

    try_it()


@pytest.mark.parametrize("key", [k for k in config_json(small()) if k != "architectures"])
def test_each_key_of_config_json_with_each_value(key, tensors):
    shapes = {k: v.shape for k, v in tensors.items()}
    for value in VALUES:
        attempt(vla.config_from_foreign, config_json(small()) | {key: value}, shapes)


def test_shapes_of_other_ranks(folder, tensors):
    """A tensor that decides the configuration has too few axes, or too many."""
    for key in (
        *("model.embed_tokens.weight", "state_projection.weight", "action_head.weight"),
        *("model.layers.0.self_attn.q_norm.weight", "model.norm.weight"),
    ):
        for value in (
            np.float32(1),
            np.ones(3, np.float32),
            np.ones((2, 3, 4), np.float32),
            np.ones((0, 3), np.float32),
        ):
            save_file(tensors | {key: np.asarray(value)}, folder / "model.safetensors")
            assert attempt(read, folder) is None


VQ_CONFIG = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": None,
    "resolution": 64,
    "latent_channels": 8,
    "num_embeddings": 32,
    "embed_dim": 8,
    "in_channels": 3,
    "dropout": 0.0,
    "double_latent": False,
}


def test_vq_config():
    @examples(100)
    @given(changed(VQ_CONFIG))
    def try_it(values):
        attempt(frozen.vqgan_config_from_hf, values)

    try_it()


def test_vqgan_yaml(tmp_path):
    config = VQGANConfig(channels=32, multipliers=(1, 1), num_res_blocks=1)
    document = {"model": {"target": "taming", "params": vqgan.config_to_foreign(config) | {"lossconfig": {"x": 1}}}}
    file = tmp_path / "vqgan.yaml"

    def from_yaml():
        return vqgan.config_from_foreign(frozen.read_vqgan_yaml(file))

    sound = yaml.safe_dump(document).encode()
    file.write_bytes(sound)
    assert from_yaml() == config
    tags = (b"a: !!int x", b"a: !!timestamp x", b"a: !!bool x", b"a: 2001-99-99", b"? [a]\n: b", b"a: &a [*a]")
    documents = changed(document).map(lambda value: yaml.dump(value).encode())

    @examples(60)
    @given(st.one_of(documents, damaged(sound), st.sampled_from((*BROKEN_JSON, *tags))))
    def try_it(content):
        file.write_bytes(content)
        attempt(from_yaml)

    try_it()


def test_arguments_of_the_action_vae():
    arguments = action_vae.config_to_foreign(ActionVAEConfig())

    @examples(100)
    @given(changed(arguments))
    def try_it(values):
        if isinstance(values, dict):  # a JSON file that holds an object
            attempt(action_vae.config_from_foreign, values)

    try_it()


def test_statistics(tmp_path):
    ones = np.ones(3)
    file = tmp_path / "statistics.json"
    Statistics(*[ones] * 6, columns=Columns.unstated("degrees", len(ones), len(ones), (2,))).to_json(file)

    @examples(60)
    @given(json_files(json.loads(file.read_text(encoding="utf-8"))))
    def try_it(content):
        file.write_bytes(content)
        attempt(Statistics.from_json, file)

    try_it()


def test_tokenizer_json(tmp_path):
    file = tmp_path / "tokenizer.json"
    sound = json.loads(train_tokenizer(["push the block"], num_codes=4, num_text=5, max_edge=64))
    names = list(sound["model"]["vocab"])
    few = {n: sound["model"]["vocab"][n] for n in names[:20]}
    small = sound | {"model": sound["model"] | {"vocab": few, "merges": []}, "added_tokens": sound["added_tokens"][:8]}

    def encode():
        tokenizer = TextTokenizer(file)
        return tokenizer.vocabulary.token_to_code(), tokenizer.encode("push the block")

    file.write_text(json.dumps(sound), encoding="utf-8")
    assert encode()

    @examples(80)
    @given(st.one_of(json_files(sound), json_files(small)))
    def try_it(content):
        file.write_bytes(content)
        attempt(encode)

    try_it()


def test_nothing_is_written_of_a_damaged_checkpoint(folder, tmp_path):
    document = config_json(small()) | {"num_hidden_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(
        ConversionError, match="config.json.*: num_hidden_layers is 1000000000, not a whole number from"
    ):
        importer.import_checkpoint(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
