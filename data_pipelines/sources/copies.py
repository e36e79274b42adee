"""What a reader reads for the PATH of a source: a folder of this machine, or local copies from a bucket or the Hub."""

import fnmatch
import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from data_pipelines.columns import FILE
from data_pipelines.episode import DataError
from rynnvla_jax.config import DataConfig
from rynnvla_jax.storage import bucket_cache, files, hub

if TYPE_CHECKING:
    from data_pipelines.sources.lerobot_format import Info

_HUB = "dataset"  # what a name on the Hub is, unless it says otherwise
_DESCRIBING = {  # globs of the files that say what a data set holds
    "lerobot": ("meta/*", FILE),
    "rlds": ("dataset_info.json", "features.json", FILE),
}
_MARKS = ("meta/info.json", "corpus.json", "dataset_info.json", "lang_annotations/*", "captions.*")
_HDF5 = (".hdf5", ".h5")


def check(path: str, missing: str) -> None:
    """Raises DataError with the text `missing` when there is no such file or folder; BucketError, HubError."""
    if hub.is_name(path):
        hub.contents(path, _HUB)
        return
    root = files.place(path)
    files.check(root)
    if not files.exists(root):
        raise DataError(missing)


def whole(kind: str, path: str, progress: bool = True) -> Path:
    """All files: of a bucket a local copy, unless a reader of this kind reads buckets by range itself.

    A .json in a bucket or on the Hub names files relative to its own folder, of which all is copied. Raises as
    `bucket_cache.copy` and `hub.here`.
    """
    return _copied(kind, path, list, progress)


def needed(kind: str, path: str, config: DataConfig, views: Sequence[str] | None, progress: bool = True) -> Path:
    """As `whole`; of a data set on the Hub only the files that a reader of these `views` opens (None: all it has)."""
    if not hub.is_name(path):
        return whole(kind, path, progress)
    if kind == "lerobot":
        from data_pipelines.sources import lerobot_format  # here: the commands' help does without pyarrow

        root = described(kind, path, progress)
        return _copied(kind, path, _lerobot(lerobot_format.read_features(root), config, views), progress)
    if kind == "egodex" and views is not None and "front" not in views:
        return _copied(kind, path, _like("*.hdf5"), progress)
    return whole(kind, path, progress)


def described(kind: str, path: str, progress: bool = True) -> Path:
    """As `whole`; of a data set on the Hub only the files that say what it holds, where its format has such files."""
    return _copied(kind, path, _like(*_DESCRIBING[kind]) if kind in _DESCRIBING else list, progress)


def marked(path: str) -> Path:
    """Of a data set on the Hub the few files that show its kind: see `recognize`."""

    def choose(names: Sequence[str]) -> list[str]:
        first = next((PurePosixPath(n) for n in names if n.endswith(_HDF5)), None)
        beside = {str(first), str(first.with_suffix(".mp4"))} if first else set()
        return [*_like(*_MARKS)(names), *beside.intersection(names)]

    return hub.here(path, _HUB, choose)


def _copied(kind: str, path: str, choose: hub.Choose, progress: bool) -> Path:
    if hub.is_name(path):
        if path.endswith(".json"):
            return hub.here(hub.folder_of(path), _HUB, choose, progress) / path.rpartition("/")[2]
        return hub.here(path, _HUB, choose, progress)
    root = files.place(path)
    if kind == "records":
        return root
    if files.is_bucket(root) and root.suffix == ".json":
        return bucket_cache.copy(root.parent, progress) / root.name
    return bucket_cache.copy(root, progress)


def _like(*patterns: str) -> Callable[[Sequence[str]], list[str]]:
    """The names that one of the globs matches; "*" stands for any text, also one with a "/"."""
    wanted = re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns))
    return lambda names: [name for name in names if wanted.match(name)]


def _lerobot(info: "Info", config: DataConfig, views: Sequence[str] | None) -> Callable[[Sequence[str]], list[str]]:
    """Metadata, rows, and the videos of the cameras in use."""
    keys = info.camera_keys(config)
    videos = [keys[view] for view in keys if (views is None or view in views) and keys[view] in info.cameras("video")]

    def pattern(template: str, key: str = "*") -> str:
        parts = re.split(r"\{(\w+)[^}]*\}", template)  # text, field, text, field, ...
        return "".join(
            glob.escape(part) if i % 2 == 0 else glob.escape(key) if part == "video_key" else "*"
            for i, part in enumerate(parts)
        )

    patterns = [*_DESCRIBING["lerobot"], pattern(info.data_path)]
    patterns += [pattern(info.video_path or "", key) for key in videos]
    return _like(*patterns)
