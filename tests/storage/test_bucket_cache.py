"""Local copies of objects: fetched once, whole, renewed when they change, and removed when room is needed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rynnvla_jax.storage import bucket_cache, buckets, files
from tests import ROOT

COPY = """
import sys
from rynnvla_jax.storage import bucket_cache, files
print(bucket_cache.copy(files.place(sys.argv[1]), show=False), flush=True)
sys.stdin.readline()
"""
CONTENT = {"a.txt": b"one", "in/b.bin": bytes(1000), "in/deep/c.txt": b"", "d é [x].txt": b"name"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bucket_cache, "_held", {})
    return tmp_path / "cache" / "buckets"


def put(bucket, content=None):
    path = files.place(bucket)
    for name, data in (content or CONTENT).items():
        (path / name).write_bytes(data)
    return path


def held(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def downloads(requests):
    return [r for r in requests if "alt=media" in r.path]


def start(url, **options):
    return subprocess.Popen([sys.executable, "-c", COPY, url], cwd=ROOT, stdin=subprocess.PIPE, text=True, **options)


def test_a_copy_has_all_files_and_is_not_fetched_twice(bucket, store, cache):
    path = put(bucket)
    requests = store.counted(lambda: bucket_cache.copy(path))
    assert len(downloads(requests)) == 3 and len(requests) <= 3 + 2 * 2  # the empty file needs none; two lists
    copy = bucket_cache.copy(path)
    assert held(copy) == CONTENT and copy.name == path.name
    times = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    requests = store.counted(lambda: bucket_cache.copy(path))
    assert len(requests) == 1 and times == {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    assert bucket_cache.named(f"{copy}/a.txt is bad, {copy}") == f"{path}/a.txt is bad, {path}"
    assert sorted(p.name for p in cache.iterdir() if p.is_dir()) == [copy.relative_to(cache).parts[0]]


def test_a_single_object_and_local_paths(bucket, tmp_path):
    path = put(bucket) / "a.txt"
    assert bucket_cache.copy(path).read_bytes() == b"one" and bucket_cache.copy(path).name == "a.txt"
    assert bucket_cache.copy(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match="none"):
        bucket_cache.copy(files.place(bucket) / "none")


def test_what_changes_in_the_bucket_changes_here(bucket, store):
    path = put(bucket)
    copy = bucket_cache.copy(path)
    (path / "a.txt").write_bytes(b"two")  # of the same size
    (path / "in/deep/c.txt").unlink()
    requests = store.counted(lambda: bucket_cache.copy(path))
    assert len(downloads(requests)) == 1
    assert held(copy) == {"a.txt": b"two", "in/b.bin": bytes(1000), "d é [x].txt": b"name"}


def test_names_that_lead_out_of_the_copy_are_refused(bucket):
    path = put(bucket)
    path._files.pipe_file(f"{path}/in/../../x", b"evil")
    with pytest.raises(bucket_cache.CacheError, match=r"no name of a file; rename the object"):
        bucket_cache.copy(path)


def test_processes_of_a_machine_fetch_once(bucket, store):
    path = put(bucket, {f"{i}.bin": bytes(10_000) for i in range(20)})
    store.delay = 0.05

    def both():
        processes = [start(bucket, stdout=subprocess.PIPE) for _ in range(2)]
        assert len({p.communicate("\n", timeout=60)[0] for p in processes}) == 1

    assert len(downloads(store.counted(both))) == 20
    assert len(held(bucket_cache.copy(path))) == 20


def test_who_waits_for_another_process_says_so(bucket, monkeypatch, capfd):
    folder = files.place(bucket)
    (folder / "a").write_bytes(b"1")
    here = bucket_cache.copy(folder)
    entry = next(p for p in here.parents if (p / "fetch.lock").exists())
    monkeypatch.setattr(files, "_SILENT", 0.05)
    with files.locked(entry / "fetch.lock"):
        waiting = threading.Thread(target=bucket_cache.copy, args=(folder,))
        waiting.start()
        time.sleep(0.5)
    waiting.join()
    assert capfd.readouterr().err.count(f"waiting for another process of this machine that copies {bucket}") == 1


def test_a_kill_leaves_nothing_half(bucket, store, cache):
    path = put(bucket, {f"{i}.bin": os.urandom(50_000) for i in range(40)})
    store.delay = 0.1
    process = start(bucket, stdout=subprocess.PIPE)
    while not (found := [p for p in cache.rglob("*.bin")]):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store.delay = 0
    whole = {path.name: path.stat().st_size for path in cache.rglob("*.bin")}
    assert found and len(whole) < 40 and set(whole.values()) == {50_000}
    requests = store.counted(lambda: bucket_cache.copy(path))
    assert len(downloads(requests)) == 40 - len(whole)
    assert held(bucket_cache.copy(path)) == {p.name: p.read_bytes() for p in path.iterdir()}
    assert not [p for p in cache.rglob("partial")]


def test_the_least_recently_used_make_room_but_none_in_use(bucket, cache, monkeypatch):
    monkeypatch.setenv("RYNNVLA_CACHE_GB", "2.5e-5")  # 25 kB
    sets = [put(f"{bucket}/{i}", {"x.bin": bytes(5_000), "y.bin": bytes(5_000)}) for i in range(4)]
    copies = [bucket_cache.copy(path) for path in sets[:2]]
    for file in bucket_cache._held.values():
        os.close(file)  # as when the process that used them has ended
    bucket_cache._held.clear()
    os.utime(copies[1].parents[len(copies[1].relative_to(cache).parts) - 2] / "use.lock", (1, 1))
    third = bucket_cache.copy(sets[2])
    assert [len(held(copy)) for copy in (*copies, third)] == [2, 1, 2]  # of the oldest, as much as needed
    again = bucket_cache.copy(sets[0])
    with pytest.raises(bucket_cache.CacheError, match=r"in use leave 5e-06 of 2.5e-05 GB; set RYNNVLA_CACHE_GB"):
        bucket_cache.copy(sets[3])
    assert [len(held(copy)) for copy in (again, third)] == [2, 2]
    large = put(f"{bucket}/large", {"x.bin": bytes(30_000)})
    with pytest.raises(bucket_cache.CacheError, match=r"has 3e-05 GB, and copies .* take 2.5e-05 GB; set RYNNVLA"):
        bucket_cache.copy(large)


def test_a_folder_that_cannot_be_written_is_named(bucket, tmp_path, monkeypatch):
    path = put(f"{bucket}/set", {"x.bin": b"x"})
    (tmp_path / "file").touch()
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(bucket_cache.CacheError, match=r"cannot be made \(Not a directory\); set RYNNVLA_CACHE to a"):
        bucket_cache.copy(path)
    monkeypatch.setenv("RYNNVLA_CACHE", str(tmp_path / "other"))
    assert held(bucket_cache.copy(path))


def test_another_process_that_uses_a_copy_keeps_it(bucket, monkeypatch):
    monkeypatch.setenv("RYNNVLA_CACHE_GB", "1.5e-5")
    one, two = (put(f"{bucket}/{i}", {"x.bin": bytes(10_000)}) for i in range(2))
    process = start(str(one), stdout=subprocess.PIPE)
    assert process.stdout.readline()
    with pytest.raises(bucket_cache.CacheError, match="in use"):
        bucket_cache.copy(two)
    process.communicate("\n")
    assert held(bucket_cache.copy(two))


def test_spoiled_answers_and_a_store_that_is_down(bucket, store, monkeypatch, capfd):
    path = put(bucket, {f"{i}.bin": os.urandom(20_000) for i in range(6)})
    store.refuse, store.cut = 5, 7
    copy = bucket_cache.copy(path)
    store.refuse = store.cut = 0
    assert store.spoiled and held(copy) == {p.name: p.read_bytes() for p in path.iterdir()}
    assert "Traceback" not in capfd.readouterr().err

    def refused():
        raise buckets.BucketError("503")

    pauses = []
    monkeypatch.setattr(bucket_cache.time, "sleep", pauses.append)
    monkeypatch.setattr(bucket_cache, "PATIENCE", 0.05)
    with pytest.raises(buckets.BucketError):
        bucket_cache._patiently(refused)
    assert pauses  # it was tried again
