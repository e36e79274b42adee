"""Names on the Hugging Face Hub, hf://USER/NAME[@REV][/PATH], and their files on this machine.

A name is a data set or a model by where it is used; hf://datasets/... and hf://models/... say it. REV is a branch, a
tag or a commit; "/" in it is written %2F. PATH is a folder of the repository, or a file.

Files lie in huggingface_hub's cache (HF_HOME, HF_HUB_CACHE), which other programs share; a file appears when it is
complete, and what is there is not asked for again. All that one process reads of a branch is of one commit.

Source: huggingface_hub.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.progress import Bar, progress_bar

PREFIX = "hf://"
FORM = "hf://USER/NAME, hf://USER/NAME@REVISION or hf://USER/NAME/PATH"
LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"
COMMIT = re.compile(r"[0-9a-f]{40}")
_PART = re.compile(r"\w(?:[\w.-]{0,94}\w)?", re.ASCII)  # USER and NAME
_KINDS = {"models": "model", "datasets": "dataset"}
_UNUSED = (".gitattributes",)
_THREADS = 8

Choose = Callable[[Sequence[str]], Sequence[str]]  # names below PATH -> those that are needed


class HubError(OSError):
    """A name on the Hub that cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Name:
    """hf://[KIND/]REPOSITORY[@REVISION][/PATH]. `kind` is "model", "dataset", or "" where the name does not say it."""

    repository: str  # USER/NAME
    revision: str = ""
    path: str = ""
    kind: str = ""

    def __str__(self) -> str:
        kind = f"{self.kind}s/" if self.kind else ""
        revision = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        return f"{PREFIX}{kind}{self.repository}{revision}{f'/{self.path}' if self.path else ''}"

    @property
    def pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return COMMIT.fullmatch(self.revision) is not None

    def of(self, kind: str) -> "Name":
        """The whole repository, as a "model" or "dataset" where the name does not say it."""
        return replace(self, path="", kind=self.kind or kind)


def is_name(text: str | os.PathLike) -> bool:
    """Whether a text is meant as a name on the Hub; also hf:/USER/NAME, which a Path makes of it."""
    return os.fspath(text).startswith("hf:/")


def parse(text: str) -> Name:
    """Raises HubError for a name that is not of the form."""
    wrong = f"{text} is not a name on the Hub: it must be {FORM}"
    if not text.startswith(PREFIX):
        raise HubError(wrong)
    parts = text.removeprefix(PREFIX).rstrip("/").split("/")
    kind = _KINDS.get(parts[0], "")
    if parts[0] in ("spaces", "buckets", "kernels"):
        raise HubError(f"{text}: {parts[0]} of the Hub cannot be read; give a model or a data set")
    if kind:
        parts = parts[1:]
    if len(parts) < 2:
        raise HubError(f"{wrong}; it has {'no NAME' if parts[0] else 'no USER'}")
    user, (name, at, revision), path = parts[0], parts[1].partition("@"), parts[2:]
    for part in (user, name):
        if not _PART.fullmatch(part) or "--" in part or ".." in part:
            raise HubError(f"{wrong}; {part!r} is no USER or NAME (letters, digits, - _ . inside)")
    if at and not revision:
        raise HubError(f"{text}: the revision after @ is empty; give a branch, a tag or a commit, or leave out the @")
    if any(part in ("", ".", "..") for part in path):
        raise HubError(f"{text}: its PATH has an empty part, . or ..; write the path as the repository shows it")
    return Name(f"{user}/{name}", urllib.parse.unquote(revision), "/".join(path), kind)


def require() -> None:
    """Raises HubError where huggingface_hub is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError("names that begin with hf:// need huggingface_hub: pip install 'rynnvla_jax[hub]'")


def commit(text: str, kind: str = "model") -> str:
    """The commit that a name means now; without a network, the one that its branch had when it was last asked for.

    One process asks once. Raises HubError.
    """
    return _commit(parse(text).of(kind))


@functools.cache
def _commit(name: Name) -> str:
    if name.pinned:
        return name.revision
    with _explained(name):
        found = _client().resolve_revision(name.repository, repo_type=name.kind, revision=name.revision or None)
    return found.resolved


def at(text: str, number: str) -> str:
    """The same name at a commit."""
    return str(replace(parse(text), revision=number))


def folder_of(text: str) -> str:
    """The name of the folder that a file is in."""
    name = parse(text)
    return str(replace(name, path=name.path.rpartition("/")[0]))


def contents(text: str, kind: str = "model") -> dict[str, int]:
    """Sizes in bytes of the files below PATH by relative name; of a file itself {"": size}.

    Raises HubError, also where there are none.
    """
    return _below(parse(text), kind)[1]


def here(text: str, kind: str = "model", choose: Choose = list, show: bool = True) -> Path:
    """The local folder, or file, of a name; of a folder the files that `choose` returns are there.

    `show`: a progress bar on stderr. Raises HubError.
    """
    name = parse(text)
    root, sizes = _below(name, kind)
    wanted = [""] if "" in sizes else choose([n for n in sizes if n not in _UNUSED])
    start = f"{name.path}/" if name.path else ""
    missing = {f"{start}{n}".rstrip("/"): sizes[n] for n in wanted if not (root / start / n).exists()}
    if missing:
        _download(replace(name.of(kind), revision=root.name), root, missing, show)
    return root / name.path


def named(text: str) -> str:
    """`text` with the local folders that `here` returned replaced by names, with their commits; for messages."""
    for root, name in _roots.items():
        text = text.replace(root, name)
    return text


_roots: dict[str, str] = {}  # local folder of a commit -> its name


def _below(name: Name, kind: str) -> tuple[Path, dict[str, int]]:
    """The local folder of the commit, and `contents`."""
    root, sizes = _tree(replace(name.of(kind), revision=_commit(name.of(kind))))
    _roots[str(root)] = str(replace(name, revision=root.name, path=""))
    if not name.path:
        return root, sizes
    if name.path in sizes:
        return root, {"": sizes[name.path]}
    start = f"{name.path}/"
    below = {n.removeprefix(start): size for n, size in sizes.items() if n.startswith(start)}
    if not below:
        tops = sorted({n.partition("/")[0] for n in sizes})
        raise HubError(f"{name}: the repository has no file or folder {name.path}; it has {listing(tops, 8)}")
    return root, below


def _tree(name: Name) -> tuple[Path, dict[str, int]]:
    """The local folder and the files, with sizes, of a pinned name; asked once, then kept in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    same: dict[str, Any] = {"repo_type": name.kind, "revision": name.revision}
    with _explained(name):
        _client()
        root = Path(huggingface_hub.snapshot_download(name.repository, allow_patterns=[], tqdm_class=_quiet(), **same))
        try:
            found = huggingface_hub.get_cached_repo_tree(name.repository, **same)
        except CachedRepoTreeNotFoundError:  # without a network, a copy that an older program made
            local = (path for path in root.rglob("*") if path.is_file())
            return root, {path.relative_to(root).as_posix(): path.stat().st_size for path in local}
    return root, {file.path: file.size for file in found}


def _download(name: Name, root: Path, missing: dict[str, int], show: bool) -> None:
    """Fetches files of a pinned name, side by side. A connection that breaks is resumed."""
    import huggingface_hub

    total = sum(missing.values())
    cache = root.parents[2]
    cache.mkdir(parents=True, exist_ok=True)
    others = root.parent.is_dir() and any(path != root for path in root.parent.iterdir())
    free = shutil.disk_usage(cache).free
    if total > free and not others:  # with another commit here, part of the files may be the same
        raise HubError(
            f"{name}: {total / 1e9:.3g} GB are to be downloaded, but the disk of {cache} has {free / 1e9:.3g} GB free; "
            "make room, or set HF_HUB_CACHE to a folder of a larger disk"
        )

    def one(file: str, bar: Bar) -> None:
        with _explained(name, file):
            huggingface_hub.hf_hub_download(
                name.repository, file, repo_type=name.kind, revision=name.revision, tqdm_class=_counting(bar)
            )

    pool = ThreadPoolExecutor(_THREADS)
    try:
        with progress_bar(total=total, desc=f"{name.repository}: download", unit="B", scale=True, show=show) as bar:
            for _ in pool.map(lambda file: one(file, bar), missing):
                pass
    finally:
        pool.shutdown(cancel_futures=True)


def _client() -> Any:
    require()
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # it writes a line for every try
    return huggingface_hub.HfApi(library_name="rynnvla_jax")


def _quiet() -> Any:
    from tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **{**options, "disable": True})

    return Quiet


def _counting(bar: Bar) -> Any:
    """A class with tqdm's interface whose instances move `bar`."""

    class Part:
        def __init__(self, *_: Any, initial: int = 0, **__: Any):
            pass

        def __enter__(self) -> "Part":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            bar.update(n or 0)

        def close(self) -> None:
            pass

        def update_transfer(self, *_: Any) -> None:
            pass

        set_postfix_str = set_transfer_postfix_str = update_transfer

    return Part


# Errors


@contextlib.contextmanager
def _explained(name: Name, file: str = "") -> Iterator[None]:
    """What the client raises as a HubError that says what to do."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        said = reason(name, error, file)
        if said is None:
            raise
        raise HubError(f"{name}{f' ({file})' if file else ''}: {said}") from error


def reason(name: Name, error: BaseException, file: str = "") -> str | None:
    """What an error of the client means, and what to do; None where it is no answer of the Hub, the network or the
    disk."""
    from huggingface_hub import constants, errors

    kind = {"model": "model", "dataset": "data set"}[name.kind or "model"]
    page = f"{constants.ENDPOINT}/{'datasets/' if name.kind == 'dataset' else ''}{name.repository}"
    chain = [error]
    while cause := (chain[-1].__cause__ or chain[-1].__context__):
        chain.append(cause)
    for e in chain:
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT):
            where = constants.HF_HUB_CACHE
            return f"the disk of {where} is full; make room, or set HF_HUB_CACHE to a folder of a larger disk"
        if isinstance(e, errors.LocalTokenNotFoundError):
            return f"you are not logged in to the Hub; {LOG_IN}"
        if isinstance(e, errors.GatedRepoError):
            return f"this {kind} is gated: ask for access at {page}, and {LOG_IN}"
        if isinstance(e, errors.RevisionNotFoundError):
            return f"it has no branch, tag or commit {name.revision}; {page}/commits shows them"
        if isinstance(e, errors.RemoteEntryNotFoundError):
            return f"it has no file {file}; {page}/tree/{name.revision or 'main'} shows its files"
        if isinstance(e, errors.RepositoryNotFoundError):
            return f"the Hub has no such {kind}, or it is private; correct the name, or {LOG_IN} as one who may read it"
        if isinstance(e, errors.HfHubHTTPError):
            code = e.response.status_code
            if code == 401:
                return f"the Hub does not accept the token; {LOG_IN}"
            if code == 403:
                return f"the token does not allow this ({e.server_message or 'forbidden'}); {LOG_IN} with one that does"
            return f"the Hub answered {code} ({shorten(e.server_message or str(e), 200)}); try again later: {_KEPT}"
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        return f"HF_HUB_OFFLINE is set, and {_absent(file)}; unset it, or {_BEFORE}"
    network = (
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.FileMetadataError,
        ConnectionError,
    )
    if any(isinstance(e, network) or type(e).__module__.partition(".")[0].startswith("http") for e in chain):
        said = shorten(chain[-1], 200)
        return f"{constants.ENDPOINT} cannot be reached ({said}), and {_absent(file)}; connect this machine: {_KEPT}"
    if isinstance(error, OSError):
        return f"{shorten(error)}; repeat the command: {_KEPT}"
    return None


_KEPT = "files that are complete are kept"
_BEFORE = "download it where there is a network, with the same HF_HOME"


def _absent(file: str) -> str:
    return f"{file or 'this revision'} is not in the cache"
