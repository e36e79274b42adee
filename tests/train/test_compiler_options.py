"""The cache of compiled programs."""

import jax
import pytest

from rynnvla_jax.train.compiler_options import use_compilation_cache


@pytest.fixture(autouse=True)
def cache():
    """The setting of the other tests comes back."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert jax.config.values["jax_compilation_cache_dir"] is None
    said = capsys.readouterr().err
    assert "compiled programs are not cached" in said and "(Not a directory)" in said and len(said.splitlines()) == 1


def test_auto_keeps_what_the_environment_says(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "kept"))
    use_compilation_cache("auto")
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "kept")
    assert list((tmp_path / "kept").iterdir()) == []
    use_compilation_cache("")
    assert jax.config.values["jax_compilation_cache_dir"] is None
