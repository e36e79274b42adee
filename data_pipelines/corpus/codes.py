"""VQ codes of frames, computed once before training, so that training steps neither decode video nor run the encoder.

A store is a folder: `manifest.json`, and per episode one `<episode>/<view>.npy` uint16 [N, h/16, w/16] of each view and
`<episode>/sha256.json`, the SHA-256 of these files. Each file is written under a temporary name and then renamed, so an
interrupted store can be continued. The manifest records the source and cameras, because episodes of a different data
set or camera can have the same names. Of a store in a bucket a copy (`bucket_cache`) is read.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.sources.exclude import kind_and_path
from rynnvla_jax.config import DataConfig, ImageConfig
from rynnvla_jax.errors import brief
from rynnvla_jax.images import frame_size, preprocess
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.sequence import PATCH
from rynnvla_jax.storage import arrays, bucket_cache, files

SUMS = "sha256.json"
_VERSION = 2
_SUMMED = {"sums": "sha256"}  # in the manifest of a store whose files all have sums; older ones lack it


class CodeStore:
    """Reads a store: `store(episode, view)` -> uint16 [N, h/16, w/16], mapped from disk, not loaded.

    What a store in a bucket holds is copied when a file is first read that is not here; reading then needs no request.
    The SHA-256 of a file is compared when the file is first read, once in each process. `summed`: every file has one;
    in a store of an older version those without are read unchecked.
    """

    def __init__(self, directory: str | Path, source: str, config: DataConfig, fingerprint: str):
        """Raises DataError when `directory` is not a store, or its frames, image configuration or VQGAN differ."""
        self.directory = files.place(directory)
        self._here = None if files.is_bucket(self.directory) else self.directory
        self._image = config.image
        found = _check_manifest(self.directory, _manifest(source, config, fingerprint))
        self.summed = found.items() >= _SUMMED.items()
        self._checked: set[str] = set()

    def path(self, episode: Episode, view: str) -> Path:
        """Path of the codes of one episode and view."""
        return self.directory / episode.name / f"{view}.npy"

    def __call__(self, episode: Episode, view: str) -> np.ndarray:
        path = self.path(episode, view)
        file = self._local(path)
        try:
            codes = arrays.map_array(file)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; start the run again, which encodes what is missing") from None
        except (arrays.DamagedArrayError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); delete it and start the run again") from None
        camera = episode.views[view]
        height, width = frame_size(camera.height, camera.width, self._image)
        expected = (len(episode), height // PATCH, width // PATCH)
        if codes.dtype != np.uint16 or codes.shape != expected:
            raise DataError(
                f"{path} is {codes.dtype} {list(codes.shape)} but the episode has {len(episode)} steps of "
                f"{list(expected[1:])} codes; delete it and start the run again"
            )
        if str(path) not in self._checked:
            self._check_sum(path, file)
            self._checked.add(str(path))
        return codes

    def _local(self, path: Path) -> Path:
        """Where `path` is on this machine. Raises CacheError when its copy does not fit."""
        name = path.relative_to(self.directory)
        if self._here is None or (files.is_bucket(self.directory) and not (self._here / name).exists()):
            self._here = bucket_cache.copy(self.directory)
        return self._here / name

    def _check_sum(self, path: Path, file: Path) -> None:
        """Raises DataError when the file is not as it was written."""
        expected = _read_sums(file.parent).get(path.name)
        if expected is None:
            if self.summed:
                raise DataError(f"{path.parent / SUMS} lacks {path.name}; delete {path} and start the run again")
            return
        try:
            found = files.sha256(file)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}); delete it and start the run again") from None
        if found != expected:
            raise DataError(
                f"{path} is not the file that was written (its SHA-256 differs); delete it and start the run again, "
                "which makes it anew"
            )


def encode_all(
    source: Episodes,
    encode_fn: Callable[[np.ndarray], np.ndarray],
    config: DataConfig,
    directory: str | Path,
    fingerprint: str,
    batch: int = 32,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
) -> CodeStore:
    """Encodes every view of the episodes and returns the store. Codes that exist already are not computed again.

    Args:
      encode_fn: uint8 [batch, h, w, 3] -> int [batch, h/16, w/16]; always called with `batch` frames.
      share: (i, n): encode every n-th episode starting with episode i, where n processes share the work.
      fingerprint: hash of the VQGAN's weights.

    Raises:
      DataError: `directory` holds codes of different frames or of a different image configuration or VQGAN, or an
        episode cannot be encoded.
    """
    directory = files.place(directory)
    manifest = _manifest(source.source, config, fingerprint)
    if (directory / "manifest.json").exists():
        _check_manifest(directory, manifest)
    elif directory.exists() and files.contents(directory):
        raise DataError(f"{directory} is not empty and is not a code store; remove it, or use another --workdir")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        files.remove_partial(directory)
        files.write_json(directory / "manifest.json", manifest | _SUMMED)
    store = CodeStore(directory, source.source, config, fingerprint)
    numbers = range(share[0], len(source), share[1])
    written = _written(directory) if numbers else set()
    total = int(source.lengths[numbers.start :: numbers.step].sum()) * len(source.views)
    with progress_bar(total=total, desc="VQ codes", unit="frame", show=progress) as bar:
        for episode in (source[number] for number in numbers):
            for view in episode.views:
                path = store.path(episode, view)
                if path in written:
                    store(episode, view)  # raises when it does not fit the episode
                else:
                    _write(path, _encode(episode, view, encode_fn, config.image, batch))
                bar.update(len(episode))
    return store


def _written(directory: Path) -> set[Path]:
    """The codes of a store."""
    found = directory.files() if files.is_bucket(directory) else directory.rglob("*.npy")  # type: ignore[attr-defined]
    return {path for path in found if path.suffix == ".npy"}


def _write(path: Path, codes: np.ndarray) -> None:
    """Writes the codes of one episode and view, and their sum."""
    content = io.BytesIO()
    np.save(content, codes)
    data = content.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    files.remove_partial(path.parent)  # of killed runs
    sums = _read_sums(path.parent) | {path.name: hashlib.sha256(data).hexdigest()}
    files.write_json(path.parent / SUMS, dict(sorted(sums.items())))
    files.write_bytes(path, data)  # last: a file without its sum would be refused, a sum without its file is not read


def _read_sums(folder: Path) -> dict[str, str]:
    """The sums of an episode's files; empty in a store of an older version. Raises DataError when they are damaged."""
    try:
        sums = files.read_json(folder / SUMS)
    except FileNotFoundError:
        return {}
    except (files.DamagedFileError, OSError) as error:
        raise DataError(f"{error}; delete the folder {folder} and start the run again") from None
    if not isinstance(sums, dict):
        raise DataError(f"{folder / SUMS} is not a table of sums; delete the folder {folder} and start the run again")
    return sums


def _encode(episode: Episode, view: str, encode_fn: Callable, image_config: ImageConfig, batch: int) -> np.ndarray:
    camera = episode.views[view]
    height, width = frame_size(camera.height, camera.width, image_config)
    expected = (batch, height // PATCH, width // PATCH)
    parts = []
    for start in range(0, len(episode), batch):
        steps = range(start, min(start + batch, len(episode)))
        frames = np.stack([preprocess(frame, image_config) for frame in episode.frames(view, steps)])
        # One shape for every call: the last batch is filled up, so that a jitted encoder compiles once.
        frames = np.pad(frames, ((0, batch - len(frames)), (0, 0), (0, 0), (0, 0)))
        codes = np.asarray(encode_fn(frames))
        if codes.shape != expected:
            raise DataError(
                f"{episode.name} {view}: the encoder returned {list(codes.shape)}, expected {list(expected)}"
            )
        if codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max:
            raise DataError(f"{episode.name} {view}: codes {codes.min()}..{codes.max()} do not fit in 16 bits")
        parts.append(codes[: len(steps)].astype(np.uint16))
    return np.concatenate(parts)


def _manifest(source: str, config: DataConfig, fingerprint: str) -> dict:
    kind, root = kind_and_path(source)
    keys = config.rlds if kind == "rlds" else config
    extra = {view: view for view in config.extra_views}
    return {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "source": f"{kind}:{root}",
        # in the other kinds the cameras have fixed names
        "cameras": {"front": keys.front, "wrist": keys.wrist, **extra} if kind in ("lerobot", "rlds") else {},
        "image": {k: v for k, v in asdict(config.image).items() if k != "jitter"},
    }


def _check_manifest(directory: Path, expected: dict) -> dict:
    """The manifest. Raises DataError when it is missing or damaged, or differs from what is expected."""
    path = directory / "manifest.json"
    try:
        found = files.read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{directory} is not a code store: manifest.json is missing; delete the directory and start the run again"
        ) from None
    except files.DamagedFileError as error:
        raise DataError(f"{error}; delete the folder {directory} and start the run again") from None
    if not isinstance(found, dict):
        raise DataError(
            f"{path} is {brief(found)}, not an object; delete the folder {directory} and start the run again"
        )
    for key, value in expected.items():
        if found.get(key) != value:
            raise DataError(
                f"{path}: {key} is {brief(found.get(key))} but this run has {value!r}; "
                f"delete the store {directory}, which the next start makes anew, or use another --workdir"
            )
    return found
