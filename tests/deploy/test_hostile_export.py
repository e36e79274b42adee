"""Export folders with damaged files: `Policy.load` refuses them with a PolicyError of one line."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rynnvla_jax.deploy import export_format
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.policy import Policy
from tests import exports
from tests.hostile import VALUES, attempt, damaged, examples, json_files


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return exports.write_tiny(tmp_path_factory.mktemp("export") / "sound")


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "export")


def load(folder):
    """A policy, and one motion of it."""
    policy = Policy.load(folder)
    return policy.act(*policy.example())


def try_contents(folder, file, contents, number):
    sound = file.read_bytes()

    @examples(number)
    @given(contents)
    def try_it(content):
        file.write_bytes(content)
        attempt(load, folder, allowed=PolicyError)

    try_it()
    file.write_bytes(sound)
    assert attempt(load, folder) is not None


@pytest.mark.parametrize("name", ["config.json", "vqgan/config.json", "action_vae/config.json", "statistics.json"])
def test_json(name, folder):
    file = folder / name
    try_contents(folder, file, json_files(json.loads(file.read_bytes())), 25)


def test_tokenizer(folder):
    file = folder / "tokenizer.json"
    try_contents(folder, file, json_files(json.loads(file.read_bytes())), 8)


@pytest.mark.parametrize("name", ["model.safetensors", "vqgan/model.safetensors", "action_vae/model.safetensors"])
def test_weights(name, folder):
    file = folder / name
    sound = file.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    try_contents(folder, file, st.one_of(damaged(sound), damaged(sound, header), damaged(sound, 16)), 8)


def test_the_index_of_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}, "metadata": {}}
    file = folder / export_format.INDEX
    file.write_text(json.dumps(index), encoding="utf-8")
    try_contents(folder, file, json_files(index), 15)


def test_a_name_that_no_file_can_have(folder):
    (folder / export_format.INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 256}}), encoding="utf-8")
    (folder / "model.safetensors").unlink()
    assert attempt(load, folder, allowed=PolicyError) is None


def test_each_key_of_config_json_with_each_value(sound):
    values = json.loads((sound / "config.json").read_bytes())
    for key in (*values, *(f"rynnvla.{k}" for k in values["rynnvla"])):
        for value in VALUES:
            group, _, name = key.rpartition(".")
            changed = values | ({group: values[group] | {name: value}} if group else {name: value})
            attempt(export_format.config_from_json, changed)
