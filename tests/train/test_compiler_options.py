"""The options of the compiler, and the cache of compiled programs."""

import jax
import pytest

from rynnvla_jax.config import TrainConfig
from rynnvla_jax.storage import files
from rynnvla_jax.train.compiler_options import describe, options, use_compilation_cache


class Device:
    def __init__(self, platform, kind):
        self.platform, self.device_kind = platform, kind


def test_options_are_those_of_the_chip_and_the_compiler_knows_them():
    gpu = options(TrainConfig(stage="robot"), Device("gpu", "NVIDIA H100"))
    assert gpu["xla_gpu_all_gather_combine_threshold_bytes"] == 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    jax.jit(lambda x: x, compiler_options=gpu).lower(0.0).compile()  # XLA for CPUs knows the names, too
    v6e = Device("tpu", "TPU v6 lite")
    assert (
        options(TrainConfig(stage="robot"), v6e)
        and "compiler_options=none" in describe(TrainConfig(stage="robot"), v6e)[0]
    )
    none = TrainConfig(stage="robot", compiler_options="none")
    for config, device in (
        (none, v6e),
        (TrainConfig(stage="robot"), Device("tpu", "TPU v5 lite")),
        (TrainConfig(stage="robot"), Device("cpu", "cpu")),
    ):
        assert options(config, device) == {} and describe(config, device) == []


@pytest.fixture(autouse=True)
def cache():
    """The setting of the other tests comes back."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    use_compilation_cache(str(tmp_path / "file" / "cache"), tmp_path)
    assert jax.config.values["jax_compilation_cache_dir"] is None
    said = capsys.readouterr().err
    assert "compiled programs are not cached" in said and "(Not a directory)" in said and len(said.splitlines()) == 1


def test_auto_keeps_what_the_environment_says(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "kept"))
    use_compilation_cache("auto", tmp_path)
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    use_compilation_cache("", tmp_path)
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_where_the_work_dir_is_in_a_bucket_programs_are_beside_it(bucket, monkeypatch):
    workdir = files.place(f"{bucket}/run")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    use_compilation_cache("auto", workdir)
    assert jax.config.values["jax_compilation_cache_dir"] == f"{bucket}/run/compiled"
    assert not (workdir / "compiled").exists()  # what showed that it can be written is gone
