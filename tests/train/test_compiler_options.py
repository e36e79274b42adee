"""The cache of compiled programs."""

import jax
import pytest

from rynnvla_jax.storage import files
from rynnvla_jax.train.compiler_options import use_compilation_cache


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
