"""Paths in buckets, the check before a start, copies, and the lease by conditional writes."""

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import time

import pytest

from rynnvla_jax.storage import buckets, files, lease
from tests import ROOT, stores


def test_a_path_has_the_methods_of_pathlib(bucket):
    folder = files.place(bucket)
    assert str(folder) == bucket and folder.absolute() == folder.resolve() == folder
    assert not folder.exists() and not folder.is_dir()
    file = folder / "a" / "b.txt"
    file.parent.mkdir(parents=True)  # nothing is needed
    file.write_text("ä", encoding="utf-8")
    assert file.read_text(encoding="utf-8") == "ä" and file.read_bytes() == "ä".encode()
    assert file.exists() and file.is_file() and not file.is_dir() and folder.is_dir()
    assert file.stat().st_size == 2 and abs(file.stat().st_mtime - time.time()) < 3600
    assert [p.name for p in folder.iterdir()] == ["a"]
    assert list(folder.glob("*/*.txt")) == list(folder.rglob("*.txt")) == folder.files() == [file]
    with file.open("rb") as opened:
        assert opened.read() == "ä".encode()
    assert pickle.loads(pickle.dumps(file)) == file
    file.replace(file.with_name("c.txt"))
    assert [p.name for p in (folder / "a").iterdir()] == ["c.txt"]
    file.with_name("c.txt").unlink()
    file.unlink(missing_ok=True)
    assert not folder.exists()
    with pytest.raises(FileNotFoundError, match=r"No such file") as caught:
        file.read_bytes()
    assert caught.value.filename == str(file)


def test_files_are_written_and_read_as_on_a_disk(bucket, tmp_path):
    folder = files.place(bucket)
    files.write_json(folder / "a.json", {"x": 1})
    assert files.read_json(folder / "a.json") == {"x": 1}
    with files.replacing(folder / "sub" / "b.bin") as partial:
        partial.write_bytes(b"12")
    with pytest.raises(RuntimeError), files.replacing(folder / "c.bin") as partial:
        partial.write_bytes(b"1")
        raise RuntimeError
    assert {p.name for p in files.contents(folder)} == {"a.json", "sub"}
    files.copy_folder(folder, tmp_path / "here", last="a.json")
    files.copy_folder(tmp_path / "here", folder / "again")
    assert (folder / "again" / "sub" / "b.bin").read_bytes() == b"12"
    files.remove(folder)
    files.remove(folder)
    assert not folder.exists()


def test_what_another_process_does_is_seen(bucket):
    folder = files.place(bucket)
    (folder / "1").write_text("1", encoding="utf-8")
    assert [p.name for p in folder.iterdir()] == ["1"]
    code = f"from rynnvla_jax.storage import files; p = files.place({bucket!r}); (p / '2').write_bytes(b'22222')"
    subprocess.run([sys.executable, "-c", f"{code}; (p / '1').unlink()"], check=True, cwd=ROOT)
    assert [p.name for p in folder.iterdir()] == ["2"] and (folder / "2").read_bytes() == b"22222"


def test_a_log_is_read_in_one_piece(bucket, store):
    """A run that starts again may replace it by a shorter one at any time."""
    log = files.place(bucket) / "metrics.jsonl"
    files.write_bytes(log, b'{"text": "%s"}\n' % (b"x" * 2**20) * 12)
    read = [request for request in store.counted(lambda: files.read_log(log)) if "alt=media" in request.path]
    assert len(read) == 1


@pytest.mark.parametrize("write", [False, True])
def test_the_check_of_a_bucket_leaves_nothing(bucket, store, write):
    assert len(store.counted(lambda: buckets.check(bucket, write))) <= 5
    assert not files.place(bucket).exists()


def test_what_cannot_be_used_is_one_line(bucket, store, monkeypatch):
    monkeypatch.setattr(buckets, "SECONDS", 1)
    with pytest.raises(buckets.BucketError, match=r"gs://other-bucket/x: the bucket other-bucket does not exist"):
        buckets.check("gs://other-bucket/x", write=True)
    with pytest.raises(buckets.BucketError, match="names no bucket; write gs://BUCKET/FOLDER"):
        buckets.check("gs://")
    with pytest.raises(
        buckets.BucketError, match="az://bucket/x cannot be used; paths in a bucket begin with gs:// or s3://"
    ):
        files.place("az://bucket/x")
    with pytest.raises(buckets.BucketError, match="gs:/bucket/x cannot be used; paths in a bucket begin with gs://"):
        files.place("gs:/bucket/x")
    store.down = True
    with pytest.raises(buckets.BucketError, match=r"no answer .*; check the network"):
        buckets.check(bucket)


def test_a_check_outlives_what_passes(bucket, store):
    store.refuse, store.cut = 3, 4
    for _ in range(3):
        buckets.check(bucket, write=True)
    assert store.spoiled


class Refusing:
    """A store that answers everything with one status and text."""

    def __init__(self, status, text):
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = do_POST

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (
            403,
            "a@b does not have storage.objects.create",
            "may not use .* give the account roles/storage.objectU",
        ),
        (403, "Provided scope(s) are not authorized", "with the access scope cloud-platform"),
        (500, "oops", r"no answer \(.*oops\); check the network"),
        (400, "Invalid bucket name: 'x'", "gs://bucket/x: Invalid bucket name: 'x'$"),
    ],
)
def test_what_google_refuses_is_said_with_the_remedy(monkeypatch, status, said, expected):
    store = Refusing(status, json.dumps({"error": {"code": status, "message": said}}))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
    monkeypatch.setattr(buckets, "_client", buckets._client.__wrapped__)  # no client of other tests
    monkeypatch.setattr(buckets, "SECONDS", 1)
    with pytest.raises(buckets.BucketError, match=expected):
        buckets.check("gs://bucket/x", write=True)
    store.server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (403, "AccessDenied", "may not use .*; correct its policy or keys"),
        (403, "InvalidAccessKeyId", "no valid credentials .* AWS_ACCESS_KEY_ID"),
        (503, "SlowDown", "no answer .*; check the network"),
    ],
)
def test_what_amazon_refuses_is_said_with_the_remedy(monkeypatch, status, code, expected):
    store = Refusing(status, f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No</Message></Error>")
    for name, value in {"ENDPOINT_URL": store.url, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with pytest.raises(buckets.BucketError, match=expected):
        buckets.check("s3://bucket/x", write=True)
    store.server.shutdown()


def test_a_client_that_is_not_installed_is_named(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(buckets.BucketError, match=r"s3://bucket/x needs s3fs: pip install 'rynnvla_jax\[s3\]'"):
        files.place("s3://bucket/x")


def test_writes_with_a_condition(bucket):
    path = files.place(f"{bucket}/x")
    first = buckets.write_if(path, b"1", 0)
    assert first and buckets.write_if(path, b"2", 0) is None
    assert buckets.read_versioned(path) == (b"1", first)
    second = buckets.write_if(path, b"2", first)
    assert second and buckets.write_if(path, b"3", first) is None
    assert buckets.delete_if(path, second)  # the emulator does not look at the condition of this
    assert buckets.read_versioned(path) is None


def test_one_of_many_gets_the_lease_of_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.2)
    folder, held, refused, free = files.place(bucket), [], [], threading.Event()

    def take():
        try:
            with lease.hold(folder, "training in"):
                held.append(1)
                free.wait(60)
        except lease.LeaseError as error:
            refused.append(str(error))
            free.set() if len(refused) == 3 else None

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3 and f"another process is training in {bucket}" in refused[0]
    assert not folder.exists()


def test_a_lease_that_nobody_renews_is_taken_over_and_its_process_ends(bucket, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(lease, "STALE_SECONDS", 0.5)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    folder = files.place(bucket)
    before = lease.Lease(folder)
    assert before._file.create(before._content())
    with lease.hold(folder, "training in") as now:
        now.check()
        assert not ended
        before.check()
        assert ended
        assert not before._file.renew(before._content())


def test_a_lease_survives_a_spoiled_store(bucket, store, monkeypatch):
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    store.refuse, store.cut = 5, 7
    with lease.hold(files.place(bucket), "training in") as held:
        for _ in range(10):
            held.check()
            time.sleep(0.1)
    assert store.spoiled and not ended
    assert stores.BUCKET in bucket
