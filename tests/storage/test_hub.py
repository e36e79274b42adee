"""Names on the Hugging Face Hub, and their files on this machine, against a Hub on 127.0.0.1."""

import errno
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants, file_download

from rynnvla_jax.storage import bucket_cache, files, hub
from rynnvla_jax.storage.hub import HubError, Name
from tests import hub as hubs

LARGE = os.urandom(20_000)


@pytest.fixture
def served(monkeypatch, tmp_path):
    with hubs.running(monkeypatch, tmp_path / "home") as found:
        yield found


def local(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://user/name", Name("user/name")),
        ("hf://user/name/", Name("user/name")),
        ("hf://user/na.me_1-x@v1.0", Name("user/na.me_1-x", "v1.0")),
        ("hf://user/name@refs%2Fpr%2F3/sub/dir", Name("user/name", "refs/pr/3", "sub/dir")),
        ("hf://datasets/user/name@main/a", Name("user/name", "main", "a", "dataset")),
        ("hf://models/user/name", Name("user/name", kind="model")),
    ],
)
def test_names(text, name):
    assert hub.parse(text) == name
    assert hub.parse(str(name)) == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf://name", "has no NAME"),
        ("hf:///name", "'' is no USER"),
        ("hf:/user/name", "must be hf://USER/NAME"),
        ("hf://user/name@", "revision after @ is empty"),
        ("hf://user/name@v1/../x", r"\. or \.\."),
        ("hf://us er/name", "'us er' is no USER"),
        ("hf://user/a--b", "'a--b' is no USER"),
        ("hf://spaces/user/name", "spaces of the Hub cannot be read"),
    ],
)
def test_malformed_names(text, said):
    with pytest.raises(HubError, match=said):
        hub.parse(text)


def test_other_paths_refuse_names():
    assert not files.is_bucket("hf://user/name")
    with pytest.raises(HubError, match="no name on the Hub can be used here"):
        files.place("hf://user/name")


def test_only_chosen_files_come_and_come_once(served):
    first = served.add("user/set", {"a.txt": b"1", "sub/b.bin": LARGE, "sub/c.txt": b"3", ".gitattributes": b""})
    sub = hub.here("hf://user/set/sub", choose=lambda names: [n for n in names if n.endswith(".bin")])
    assert (sub / "b.bin").read_bytes() == LARGE and local(sub.parent) == ["sub/b.bin"]
    root = hub.here("hf://user/set")
    assert local(root) == ["a.txt", "sub/b.bin", "sub/c.txt"]
    asked = len(served.requests)
    assert hub.here("hf://user/set") == root and len(served.requests) == asked
    assert hub.here("hf://user/set/sub/c.txt").read_bytes() == b"3"
    assert hub.contents("hf://user/set/sub") == {"b.bin": len(LARGE), "c.txt": 1}
    assert bucket_cache.named(f"{root}/a.txt is bad") == f"hf://user/set@{first}/a.txt is bad"


def test_a_process_reads_one_commit(served):
    first = served.add("user/set", {"a.txt": b"old"})
    assert hub.here("hf://user/set/a.txt").read_bytes() == b"old"
    second = served.add("user/set", {"a.txt": b"new"})
    assert hub.here("hf://user/set/a.txt").read_bytes() == b"old"
    assert hub.here(f"hf://user/set@{second}/a.txt").read_bytes() == b"new"
    assert hub.here(hub.at("hf://user/set/a.txt", first)).read_bytes() == b"old"
    with pytest.raises(HubError, match="no such data set"):  # a model has that name
        hub.here("hf://user/set", "dataset")
    assert hub.here("hf://models/user/set/a.txt", "dataset").read_bytes() == b"old"


def test_a_listing_of_several_pages(served):
    served.add("user/set", {f"{i:03d}": b"%d" % i for i in range(100)})
    assert len(local(hub.here("hf://user/set", show=False))) == 100


def test_a_download_that_is_cut_off_is_resumed(served, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    served.add("user/set", {"b.bin": LARGE})
    served.cut = 3
    assert hub.here("hf://user/set/b.bin").read_bytes() == LARGE
    assert sum("bytes=" in request for request in served.requests) == 3


def test_complete_files_stay_when_a_download_fails(served):
    served.add("user/set", {"a.txt": b"1", "b.bin": LARGE})
    served.refuse = "b.bin"
    with pytest.raises(HubError, match=r"\(b.bin\): the Hub answered 500 .* files that are complete are kept"):
        hub.here("hf://user/set")
    served.refuse = ""
    asked = len(served.requests)
    assert len(local(hub.here("hf://user/set"))) == 2
    assert not any("a.txt" in request for request in served.requests[asked:])


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("user/none", "", "no such model, or it is private; .*hf auth login"),
        ("owner/private", "", "no such model, or it is private"),
        ("owner/private", "hf_other", "no such model, or it is private"),
        ("owner/gated", "", "is gated: ask for access at http.*/owner/gated, and log in"),
        ("owner/gated", "hf_other", "is gated"),
        ("owner/open", "hf_wrong", "does not accept the token"),
        ("owner/open@v9", "", "no branch, tag or commit v9"),
        ("owner/open/dir", "", "no file or folder dir; it has a.txt"),
    ],
)
def test_refusals(served, monkeypatch, name, token, said):
    served.add("owner/private", {"a.txt": b"1"}, private=True)
    served.add("owner/gated", {"a.txt": b"1"}, gated=True)
    served.add("owner/open", {"a.txt": b"1"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=said):
        hub.here(f"hf://{name}")
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    assert hub.here("hf://owner/private/a.txt").read_bytes() == hub.here("hf://owner/gated/a.txt").read_bytes() == b"1"


def test_a_file_that_was_listed_and_is_gone(served):
    commit = served.add("user/set", {"a.txt": b"1"})
    hub.contents("hf://user/set")
    served.repositories["model", "user/set"].commits[commit] = {}
    with pytest.raises(HubError, match="has no file a.txt"):
        hub.here("hf://user/set")


def test_without_a_network(served, monkeypatch):
    served.add("user/set", {"a.txt": b"1", "b.txt": b"2"})
    hub.here("hf://user/set/a.txt")
    served.close()
    hub._commit.cache_clear()
    assert hub.here("hf://user/set/a.txt").read_bytes() == b"1"  # at the commit that the branch had
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.here("hf://user/set/a.txt").read_bytes() == b"1"
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and b.txt is not in the cache"):
        hub.here("hf://user/set/b.txt")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and this revision is not in the cache"):
        hub.here("hf://user/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"127.0.0.1:\d+ cannot be reached"):
        hub.here("hf://user/other")


def test_a_full_disk(served, monkeypatch):
    served.add("user/set", {"b.bin": LARGE})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", full)
        with pytest.raises(HubError, match="disk of .* is full; make room, or set HF_HUB_CACHE"):
            hub.here("hf://user/set")
        patched.setattr(hub.shutil, "disk_usage", lambda path: _Free())
        with pytest.raises(HubError, match="are to be downloaded, but the disk"):
            hub.here("hf://user/set")


class _Free:
    free = 10_000


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    hub._commit.cache_clear()
    with pytest.raises(HubError, match=r"pip install 'rynnvla_jax\[hub\]'"):
        hub.here("hf://user/name")


def test_several_processes_share_one_download(served):
    served.add("user/set", {f"{i}.bin": os.urandom(5000) for i in range(12)})
    code = "from rynnvla_jax.storage import hub; print(len(list(hub.here('hf://user/set', show=False).iterdir())))"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
    assert [int(process.communicate(timeout=120)[0]) for process in running] == [12] * 4
