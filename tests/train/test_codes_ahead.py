"""Codes made ahead: what a start says about those that exist already."""

from types import SimpleNamespace

import pytest

from data_pipelines.episode import DataError
from rynnvla_jax.config import DataConfig
from rynnvla_jax.storage import files
from rynnvla_jax.train import codes_ahead
from tests.data_pipelines.test_loader import IMAGE, fake_codes, flip, make_source


def test_a_start_checks_codes_and_tells_of_a_store_without_sums_once(tmp_path, monkeypatch, capfd):
    codec = SimpleNamespace(encode=fake_codes, fingerprint="abc", batch=50)
    monkeypatch.setattr(codes_ahead.FrameCodec, "load", lambda *_, **__: codec)
    source, data = make_source(), DataConfig(image=IMAGE)

    def start():
        capfd.readouterr()
        codes_ahead.encode_ahead(data, tmp_path, [source], tmp_path)
        return [line for line in capfd.readouterr().err.splitlines() if "SHA-256" in line]

    assert not start()
    store = tmp_path / "codes" / "0"
    flip(store / "episode_3" / "front.npy")
    with pytest.raises(DataError, match=r"episode_3/front.npy is not the file .*; delete it and start"):
        start()
    (store / "episode_3" / "front.npy").unlink()
    assert not start()
    manifest = files.read_json(store / "manifest.json")
    files.write_json(store / "manifest.json", {key: value for key, value in manifest.items() if key != "sums"})
    for path in store.rglob("sha256.json"):
        path.unlink()
    (said,) = start()
    assert said.startswith(f"{store} was begun by an older version") and said.endswith("to make them anew")
