"""A Hugging Face Hub on 127.0.0.1 for the tests, with the HTTP API that huggingface_hub's client uses.

What a client needs is in `Hub.environment(...)`; processes that a test starts inherit it. Files of LFS_BYTES and more
are stored as LFS objects: they are answered with a redirect, and are uploaded as an object of their own.

Source: the Hub's API (huggingface.co/docs/hub/api), as huggingface_hub 2.4 calls it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LFS_BYTES = 1000
PAGE = 40  # entries of one page of a listing
TOKENS = {"hf_owner": "owner", "hf_other": "other"}  # token -> user


@contextlib.contextmanager
def running(monkeypatch: Any, home: Path, token: str = "") -> Iterator["Hub"]:
    """A Hub that this process and those that it starts use, with an empty cache in `home`."""
    from huggingface_hub import constants

    from rynnvla_jax.storage import hub as names

    hub = Hub()
    for key, value in hub.environment(home, token).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # the client read its environment when it was imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    names._commit.cache_clear()
    monkeypatch.setattr(names, "_roots", {})
    try:
        yield hub
    finally:
        hub.close()


@dataclass
class Repository:
    """`commits`: by hash, the files by name; `refs`: hash by branch or tag."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, content: dict[str, bytes], title: str, branch: str = "main") -> str:
        number = hashlib.sha1(f"{title} {len(self.commits)} {sorted(content)}".encode()).hexdigest()
        self.commits[number], self.refs[branch] = content, number
        self.titles.append(title)
        return number

    def at(self, revision: str) -> str | None:
        revision = urllib.parse.unquote(revision)
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """A running Hub. `cut`: how many of the next answers with content of LFS objects end in the middle. `down`: all
    requests are answered with 503. `refuse`: a part of a URL; requests with it are answered with 500."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []  # "GET /path"; of a part of a file "GET /path bytes=..."
        self.cut, self.down, self.refuse, self.closed = 0, False, "", False
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.closed = True  # for connections that clients keep
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str = "") -> dict[str, str]:
        """What a client needs, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
        }

    def add(self, name: str, folder: Path | dict[str, bytes], kind: str = "model", **about: Any) -> str:
        """A repository, or a new commit in it, with the files of a folder; the commit's hash."""
        repository = self.repositories.setdefault((kind, name), Repository(**about))
        files = content(folder) if isinstance(folder, Path) else dict(folder)
        return repository.commit(files, f"commit {len(repository.commits)}")


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    # Answers

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, text: str) -> None:
        body = json.dumps({"error": text}).encode()
        self._send(status, body, {"Content-Type": "application/json", "X-Error-Code": code, "X-Error-Message": text})

    # Requests

    def _answer(self) -> None:
        size = self.headers.get("Content-Length")
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while count := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(count))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        else:
            body = self.rfile.read(int(size or 0))
        if self.hub.closed:
            self.close_connection = True
            return None
        part = self.headers.get("Range")
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {self.path}{f' {part}' if part else ''}")
        if self.hub.down:
            return self._send(503)
        if self.hub.refuse and self.hub.refuse in self.path:
            return self._send(500)
        path, _, query = self.path.partition("?")
        options = dict(urllib.parse.parse_qsl(query))
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, path):
                return getattr(self, method)(found.groupdict(), options, body)
        self._error(404, "", f"no such address: {path}")

    @property
    def _user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _repository(self, names: dict[str, str], write: bool = False) -> Repository | None:
        """None once a refusal was sent."""
        given = self.headers.get("Authorization")
        if given and self._user is None:
            self._error(401, "", "Invalid credentials in Authorization header")
            return None
        kind = (names.get("kind") or "models").rstrip("/").removesuffix("s")
        found = self.hub.repositories.get((kind, names["name"]))
        owner = names["name"].partition("/")[0]
        if found is None or (found.private and self._user != owner):
            status = 404 if self._user else 401
            self._error(
                status, "RepoNotFound", "Repository not found" if self._user else "Invalid username or password."
            )
            return None
        if write and self._user != owner:
            self._error(403, "", "You don't have the rights to write to this repository")
            return None
        return found

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.at(revision)
        if commit is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def whoami(self, *_):
        if self._user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        self._json({"type": "user", "name": self._user, "auth": {}, "orgs": []})

    def info(self, names, options, body):
        repository = self._repository(names)
        commit = repository and self._commit(repository, names.get("revision") or "main")
        if commit:
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            about = {"id": names["name"], "private": repository.private, "tags": [], "downloads": 0, "likes": 0}
            self._json({**about, "sha": commit, "siblings": siblings, "gated": repository.gated and "auto"})

    def tree(self, names, options, body):
        repository = self._repository(names)
        commit = repository and self._commit(repository, names["revision"])
        if not commit:
            return
        entries = []
        for name, content in repository.commits[commit].items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
            if len(content) >= LFS_BYTES:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        start = int(options.get("cursor", 0))
        headers = {}
        if start + PAGE < len(entries):
            there = urllib.parse.urlencode({**options, "cursor": start + PAGE})
            headers["Link"] = f'<{self.hub.url}{self.path.partition("?")[0]}?{there}>; rel="next"'
        self._json(entries[start : start + PAGE], headers)

    def resolve(self, names, options, body):
        repository = self._repository(names)
        if repository is None:
            return
        if repository.gated and self._user != names["name"].partition("/")[0]:
            return self._error(403 if self._user else 401, "GatedRepo", "Access to this repository is restricted")
        commit = self._commit(repository, names["revision"])
        if commit is None:
            return
        content = repository.commits[commit].get(urllib.parse.unquote(names["path"]))
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(content) < LFS_BYTES:
            self._content(content, {**headers, "ETag": f'"{_git_oid(content)}"'})
        else:
            oid = _sha256(content)
            self.hub.objects[oid] = content
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "ETag": f'"{oid}"'}
            self._send(302, b"", {**headers, **linked, "Location": f"http://localhost:{self.hub.port}/objects/{oid}"})

    def object(self, names, options, body):
        if self.command == "PUT":
            assert _sha256(body) == names["oid"]
            self.hub.objects[names["oid"]] = body
            return self._send(200)
        content = self.hub.objects[names["oid"]]
        with self.hub.lock:
            cut = self.command == "GET" and self.hub.cut > 0
            self.hub.cut -= cut
        self._content(content, {"ETag": f'"{names["oid"]}"', "Accept-Ranges": "bytes"}, cut)

    def _content(self, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
        if self.command == "HEAD":
            return self._send(200, b"", {**headers, "Content-Length": str(len(content))})
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            where = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self._send(
                206, content[start:], {**headers, **where, "Content-Length": str(len(content) - start)}, cut
            )
        self._send(200, content, {**headers, "Content-Length": str(len(content))}, cut)

    # Uploads

    def create(self, names, options, body):
        wanted = json.loads(body)
        owner = wanted.get("organization") or self._user
        if self._user is None:
            return self._error(401, "", "Invalid username or password.")
        if owner != self._user:
            return self._error(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        key = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{key[1]}"
        if key in self.hub.repositories:
            return self._send(409, json.dumps({"url": url, "error": "You already created this repo"}).encode())
        repository = self.hub.repositories[key] = Repository(private=wanted.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self._json({"url": url})

    def check_card(self, names, options, body):
        self._json({"errors": [], "warnings": []})

    def preupload(self, names, options, body):
        repository = self._repository(names, write=True)
        if repository is None:
            return
        now = repository.commits[repository.refs["main"]]
        answer = []
        for file in json.loads(body)["files"]:
            lfs = file["size"] >= LFS_BYTES
            old = now.get(file["path"])
            oid = None if old is None else _sha256(old) if len(old) >= LFS_BYTES else _git_oid(old)
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def batch(self, names, options, body):
        if self._repository({**names, "kind": names.get("kind")}, write=True) is None:
            return
        objects = []
        for wanted in json.loads(body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{wanted['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def commit(self, names, options, body):
        repository = self._repository(names, write=True)
        if repository is None:
            return
        header, *operations = [json.loads(line) for line in body.splitlines()]
        content = dict(repository.commits[repository.refs["main"]])
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del content[value["path"]]
        number = repository.commit(content, header["value"]["summary"])
        url = f"{self.hub.url}/{names['name']}/commit/{number}"
        self._json({"success": True, "commitUrl": url, "commitOid": number, "hookOutput": ""})


_API = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
_ROUTES = (
    (r"/api/whoami-v2", "whoami"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "check_card"),
    (_API, "info"),
    (_API + r"/revision/(?P<revision>[^/]+)", "info"),
    (_API + r"/tree/(?P<revision>[^/]+)", "tree"),
    (_API + r"/preupload/(?P<revision>[^/]+)", "preupload"),
    (_API + r"/commit/(?P<revision>[^/]+)", "commit"),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    (r"/objects/(?P<oid>[0-9a-f]{64})", "object"),
)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
