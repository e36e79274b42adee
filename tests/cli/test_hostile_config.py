"""Config files and overrides of any content: a ConfigError, whatever they do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rynnvla_jax import config_file
from rynnvla_jax.config import ConfigError, DataConfig, TrainConfig, from_dict, to_dict
from rynnvla_jax.configs import robot
from tests.hostile import VALUES, attempt, changed, damaged, examples

SOUND = b"""from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.stage = "robot"
    config.batch_size = 8
    config.data = ConfigDict({"chunk": 5, "image": {"shortest_edge": 64}})
    return config
"""
BODIES = (
    *("raise SystemExit(3)", "raise KeyboardInterrupt", "exit()", "1 / 0", "return None", "return get_config(arg)"),
    *("config = ConfigDict(); config.data = config; return config", "return {'data': {1: 2}}", "return {'stage': []}"),
    *("raise RecursionError('deep')", "return {'seed': 10**400}", "return {'optimizer': {'learning_rate': 10**400}}"),
    *("return {'data': {'mixture': 5}}", "return {'data': None}", "return {None: 1}", "return {'': 1}"),
    *("import nothing", "assert False, 'a\\nb'", "return ConfigDict({'a': {'b': ConfigDict({'c': float('nan')})}})"),
)  # fmt: skip


def load(file):
    return config_file.load(str(file)).build()


def test_bytes_of_a_config_file(tmp_path):
    file = tmp_path / "config.py"
    file.write_bytes(SOUND)
    assert load(file).batch_size == 8
    others = st.sampled_from(
        (b"", b"\0", b"\xff", b"(" * 10_000, b"x = " + b"[" * 150, b"def", b"get_config = 1", b"\xef\xbb\xbf")
    )

    @examples(40)
    @given(st.one_of(damaged(SOUND), others))
    def try_it(content):
        file.write_bytes(content)
        attempt(load_any, file, allowed=ConfigError)

    try_it()


def load_any(file):
    """Errors of a config file are two lines: the error, and the line of the file."""
    try:
        return load(file)
    except ConfigError as error:
        text = str(error)
        assert text.count("\n") <= 1
        raise ConfigError(text.replace("\n", " ")) from None


@pytest.mark.parametrize("body", BODIES)
def test_what_a_config_file_does(body, tmp_path):
    if body == "raise KeyboardInterrupt":
        pytest.skip("this is the user's own")
    file = tmp_path / "config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config(arg=None):\n    {body}\n", encoding="utf-8"
    )
    attempt(load_any, file, allowed=ConfigError)


KEYS = (
    *("data.chunk", "data.image.shortest_edge", "seed", "data", "optimizer.learning_rate", "mesh", "x", "data.mixture"),
    *("stage", "sequence.use_state", "vla.action_outputs", "", ".", "data.", "__class__", "data.image.fit"),
)
TEXTS = (
    *("", "=", "=1", "=None", "=nan", "=" + "9" * 5000, "=[", "=" + "(" * 500, "={}", "=(1,2)", "='", "=\0", "=\n"),
    *("=\ud800", "=__import__('os')", "=@x", "=1e999", "=-1", "=True", "=robot", "=" + "[" * 3000),
)


def test_overrides():
    overrides = st.lists(
        st.builds("--{}config.{}{}".format, st.sampled_from(["", "no"]), st.sampled_from(KEYS), st.sampled_from(TEXTS)),
        min_size=1, max_size=2,
    )  # fmt: skip

    def with_overrides(found):
        return config_file.load("configs/robot.py:tiny", found).build()

    @examples(60)
    @given(overrides)
    def try_it(found):
        attempt(with_overrides, found, allowed=ConfigError)

    try_it()


@pytest.mark.parametrize(
    "name", ["", ":", "\0", "x" * 5000, "/dev/null", "/", "~nobody/x", "configs/", "configs/../x.py", "a\nb"]
)
def test_names_of_config_files(name):
    with pytest.raises(ConfigError):
        config_file.load(name)


def test_values_of_a_config():
    values = to_dict(from_dict(TrainConfig, robot.get_config("tiny").to_dict()))

    def build(found):
        return from_dict(TrainConfig, found)

    @examples(100)
    @given(changed(values))
    def try_it(found):
        if isinstance(found, dict):
            attempt(build, found, allowed=ConfigError)

    try_it()


@pytest.mark.parametrize("key", to_dict(DataConfig()))
def test_each_key_of_data_with_each_value(key):
    for value in VALUES:
        attempt(from_dict, DataConfig, {key: value}, allowed=ConfigError)
