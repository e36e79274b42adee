"""RLDS and Open-X data sets prepared by TFDS: episodes of `steps` (observation, action, instruction).

`config.data.rlds` names the keys, the split and the rate, which such data sets do not state; those of Open-X data sets
are known (`openx`). Actions have a different meaning in each data set (deltas, targets, velocities), so every column is
kept as recorded unless `rynnvla_columns.json` says otherwise.

TensorFlow is not needed. The files are TFRecord or ArrayRecord. An episode is read as a whole, but only the requested
images are decoded.

Source: RLDS, arXiv 2111.02767; TensorFlow Datasets' folder format.
"""

import bisect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from data_pipelines import tfrecord
from data_pipelines.column_guess import guess
from data_pipelines.columns import Meaning, resolve
from data_pipelines.episode import DataError, Episode, Episodes, Kept, rates_of, summarize
from data_pipelines.sources.exclude import LEAVE_OUT, DamagedEpisodesError, left_in
from data_pipelines.sources.index import Row, index_files
from data_pipelines.sources.openx import DATA_SETS
from rynnvla_jax.config import ONE_CAMERA, ConfigError, DataConfig, RLDSConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.images import check_header
from rynnvla_jax.storage import bucket_cache, files

# Where instructions are kept, the usual place first; "steps" leads into the steps.
_STEPS = {"steps": tfds.decode.SkipDecoding()}
_FORMATS = tfds.core.FileFormat
_DEFAULTS = RLDSConfig()
_TEXTS = (
    ("steps", "language_instruction"),
    ("steps", "observation", "natural_language_instruction"),
    ("steps", "observation", "language_instruction"),
    ("steps", "natural_language_instruction"),
    ("language_instruction",),
    ("natural_language_instruction",),
    ("episode_metadata", "language_instruction"),
    ("episode_metadata", "natural_language_instruction"),
)


def load(root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True) -> Episodes:
    """Episodes in the order of the split, named "<split>_<number>".

    Raises:
      ConfigError: a key or split of `data.rlds` that the data set lacks; the message lists the existing ones.
      DataError: a damaged episode, a folder not prepared by TFDS, or a format that only TensorFlow reads.
    """
    read, shards = _opened(root, config, views)
    layout = read.layout
    if layout.known:
        print(bucket_cache.named(f"rlds:{root}: {layout.known}"), file=sys.stderr)

    @cache
    def fault(path: Path) -> str:
        return _fault_of_file(path, read.data, *shards[path.name])

    def episode(path: Path, number: int) -> Row:
        return _faulty(fault(path)) if fault(path) else _summary(read, number)

    def row(path: Path) -> Row:
        return {"episodes": [episode(path, i) for i in range(*shards[path.name])]}

    key = f"rlds 4 {config.rlds.split} {layout} {[end - first for first, end in shards.values()]}"
    there = [name for name in shards if (root / name).exists()]
    rows = dict(zip(there, index_files(key, root, there, row, progress), strict=True))
    paths = [root / name for name, numbers in shards.items() for _ in range(*numbers)]  # by episode
    found = [e for name in shards for e in (rows[name] if name in rows else row(root / name))["episodes"]]
    names = [read.name(i) for i in range(len(found))]
    source = f"rlds:{root}"
    keep = left_in(source, names, config)
    sizes: dict[tuple[int, int], str] = {}
    # A failure while the index was made may have been the network's, so these episodes are read again.
    kept = {i: episode(paths[i], i) if found[i]["fault"] else found[i] for i in keep}
    if faults := {names[i]: (paths[i], e["fault"]) for i, e in kept.items() if e["fault"]}:
        raise DamagedEpisodesError(faults)
    for i in keep:
        for view, size in kept[i]["sizes"].items():
            sizes.setdefault(tuple(size), f"{names[i]} {view}")
    lengths = np.array([kept[i]["steps"] for i in keep], np.int64)
    return Episodes(
        source=source,
        lengths=lengths,
        read=Kept(read, np.array(keep)),
        texts=tuple(sorted({t for i in keep for t in kept[i]["texts"]})),
        frame_sizes=sizes,
        seconds=float(lengths.sum() / layout.fps),
        views=tuple(layout.views),
        columns=read.meaning.columns,
        rates=rates_of((layout.fps,)),
        files=partial(_files, root, tuple(shards)),
        summaries=partial(
            summarize, [names[i] for i in keep], [kept[i]["texts"] for i in keep], [layout.fps] * len(keep)
        ),
    )


def _files(root: Path, shards: Sequence[str]) -> list[Path]:
    return [root / name for name in ("dataset_info.json", "features.json", *shards)]


def features(root: Path) -> tuple[str, dict[str, tuple[tuple[int | None, ...], str]]]:
    """(name of the data set, {path of a feature of the steps: (shape, dtype)}). Raises DataError."""
    _check_metadata(root)
    try:
        builder = tfds.builder_from_directory(root)
        found = _leaves(builder.info.features["steps"].feature, "")
    except Exception as error:  # TFDS can raise any exception for metadata of another form
        raise DataError(f"{root}: features.json cannot be used ({shorten(error)}); copy it again") from None
    return builder.name, found


def _leaves(feature: Any, path: str) -> dict[str, tuple[tuple[int | None, ...], str]]:
    if isinstance(feature, tfds.features.FeaturesDict):
        parts = [_leaves(feature[key], f"{path}/{key}".lstrip("/")) for key in feature]
        return {key: value for part in parts for key, value in part.items()}
    return {path: (tuple(feature.shape), np.dtype(feature.np_dtype).name)} if hasattr(feature, "np_dtype") else {}


def _opened(
    root: Path, config: DataConfig, views: tuple[str, ...] | None
) -> tuple["_EpisodeReader", dict[str, tuple[int, int]]]:
    """The reader of a split, and (first, last + 1) episode of each of its files."""
    _check_metadata(root)
    rlds = config.rlds
    try:
        builder = tfds.builder_from_directory(root)
        kind = _check_format(root, builder)
        layout = _Layout.of(root, builder, config, views)
        if rlds.split not in set(builder.info.splits):
            known = ", ".join(sorted(builder.info.splits))
            raise ConfigError(f"data.rlds.split is {rlds.split!r}, which {root} lacks; set one of {known}")
        split = builder.info.splits[rlds.split]
        ends = np.cumsum(split.shard_lengths)
        shards = {
            Path(path).name: (int(end - n), int(end))
            for path, end, n in zip(split.filepaths, ends, split.shard_lengths, strict=True)
        }
        data: Any
        if kind is _FORMATS.TFRECORD:
            data = _TFRecords(builder.info, [root / name for name in shards], [first for first, _ in shards.values()])
        else:
            data = builder.as_data_source(rlds.split, decoders=_STEPS)
    except (DataError, ConfigError):
        raise
    except Exception as error:  # TFDS can raise any exception for metadata of another form
        raise DataError(
            f"{root}: features.json or dataset_info.json cannot be used ({type(error).__name__}: {shorten(error)}); "
            "copy them again, or prepare the data again with TFDS"
        ) from None
    widths = layout.state_width, layout.action_width
    found = guess(f"rlds:{builder.name}", (), (), widths, unnamed=("state_", "action_"))
    meaning = resolve(found, config.columns, root)
    return _EpisodeReader(root, data, layout, rlds.split, meaning), shards


@dataclass(eq=False)
class _TFRecords:
    """Number -> episode, as TFDS's data source gives it, of TFRecord files; `firsts` are their first episodes."""

    dataset_info: Any
    paths: list[Path]
    firsts: list[int]
    _offsets: dict[Path, list[tuple[int, int]]] = field(default_factory=dict)

    def offsets(self, path: Path) -> list[tuple[int, int]]:
        """As `tfrecord.offsets`, kept."""
        if path not in self._offsets:
            self._offsets[path] = tfrecord.offsets(path)
        return self._offsets[path]

    def __getitem__(self, number: int) -> Any:
        shard = bisect.bisect_right(self.firsts, number) - 1
        path = self.paths[shard]
        record = tfrecord.read(path, *self.offsets(path)[number - self.firsts[shard]])
        return self.dataset_info.features.deserialize_example_np(record, decoders=_STEPS)


def _fault_of_file(path: Path, data: Any, first: int, end: int) -> str:
    """Why its episodes cannot be used: it is damaged, or has not as many as the metadata say; "" if it is sound."""
    if not path.exists():
        return f"{path} does not exist; copy it again, or {LEAVE_OUT}"
    try:
        if isinstance(data, _TFRecords):
            count = len(data.offsets(path))
        else:
            reader = ArrayRecordReader(str(path))
            count = reader.num_records()
            reader.close()
    except DataError as error:
        return f"{error}, or {LEAVE_OUT}"
    except Exception as error:
        return files.damage(path, f"cannot be read ({shorten(error)}); copy it again, or {LEAVE_OUT}")
    if count != end - first:
        return (
            f"{path} has {count} episodes but dataset_info.json states {end - first}; copy both again, or {LEAVE_OUT}"
        )
    return ""


@dataclass(frozen=True)
class _Layout:
    """Paths of keys to the parts of an episode, checked against the data set's features; () for an absent part.

    State and action are several parts side by side. `known` says what the table of Open-X data sets decided.
    """

    views: dict[str, tuple[str, ...]]
    state: tuple[tuple[str, ...], ...]
    action: tuple[tuple[str, ...], ...]
    text: tuple[str, ...]
    state_width: int
    action_width: int
    fps: float
    known: str

    @classmethod
    def of(cls, root: Path, builder: Any, data: DataConfig, views: tuple[str, ...] | None) -> "_Layout":
        openx, config = DATA_SETS.get(builder.name), data.rlds
        features = builder.info.features
        if "steps" not in features or not {"observation", "action"} <= set(features["steps"].feature):
            raise DataError(f"{root} has no steps with observation and action, so it is not an RLDS data set")
        step = features["steps"].feature
        cameras = {"front": config.front, "wrist": config.wrist}
        decided = {}
        for view, key in cameras.items():
            other = getattr(openx, view, "")
            if key not in step["observation"] and key == getattr(_DEFAULTS, view) and other in step["observation"]:
                cameras[view] = decided[f"data.rlds.{view}"] = other
        cameras |= {view: view for view in data.extra_views}
        if views is None:
            views = tuple(view for view, key in cameras.items() if key in step["observation"])
        paths: dict[str, tuple[str, ...]] = {view: ("observation", cameras[view]) for view in views}
        for view, (_, key) in paths.items():
            one = f", or {ONE_CAMERA}" if view == "wrist" else ""
            setting = f"data.rlds.{view}" if view not in data.extra_views else "data.extra_views"
            _child(root, step["observation"], key, setting, one, _is_picture)
        states: tuple[str, ...] = (config.state,) if config.state else ()
        if openx and config.state == _DEFAULTS.state and config.state not in step["observation"]:
            states = openx.state
            decided["state"] = ", ".join(states) or "none"
        for key in states:
            _child(root, step["observation"], key, "data.rlds.state", ", or '' to use no state", _is_vector)
        state = tuple(("observation", key) for key in states)
        action: tuple[tuple[str, ...], ...] = (("action",),)
        feature = step["action"]
        if isinstance(feature, tfds.features.FeaturesDict):
            actions: tuple[str, ...] = (config.action,)
            if openx and openx.action and not config.action:
                actions = openx.action
                decided["action"] = ", ".join(actions)
            for key in actions:
                _child(root, feature, key, "data.rlds.action", "", _is_vector)
            action = tuple(("action", key) for key in actions)
        elif config.action:
            raise ConfigError(
                f"data.rlds.action is {config.action!r} but {root} has a single action without keys; set it to ''"
            )
        text = next((path for path in _TEXTS if _has_text(features, path)), None)
        if text is None:
            tried = ", ".join("/".join(path) for path in _TEXTS)
            raise DataError(f"{root} has no instruction; none of these keys exists: {tried}")
        widths = [
            sum(_width(root, _at(step, path), f"data.rlds.{what}") for path in parts)
            for what, parts in (("state", state), ("action", action))
        ]
        fps = config.fps
        if openx and fps == _DEFAULTS.fps:
            fps = openx.fps
            decided["steps per second"] = f"{fps:g}"
        known = "; ".join(f"{what}: {value}" for what, value in decided.items())
        known = known and f"known as the Open-X data set {builder.name}: {known}"
        return cls(paths, state, action, text, widths[0], widths[1], fps, known)


@dataclass(frozen=True, eq=False)
class _EpisodeReader:
    """Number in the split -> Episode."""

    root: Path
    data: Any
    layout: _Layout
    split: str
    meaning: Meaning

    def name(self, number: int) -> str:
        return f"{self.split}_{number:06d}"

    def __call__(self, number: int) -> Episode:
        name, layout = self.name(number), self.layout
        label = f"{self.root}: episode {name}"
        step = self.data.dataset_info.features["steps"].feature
        try:
            content = self.data[number]
            steps = content["steps"]
            action = _side_by_side(steps, step, layout.action)
            instructions = _at(content, layout.text)
        except DataError as error:
            raise DataError(f"{label} cannot be read: {error}") from None
        except Exception as error:  # TFDS can raise any exception for damaged bytes
            raise DataError(
                f"{label} cannot be read ({type(error).__name__}: {shorten(error)}); copy it again"
            ) from None
        state = _side_by_side(steps, step, layout.state) if layout.state else np.zeros((len(action), 0), np.float32)
        if len(action) < 1:
            raise DataError(f"{label} has no step; leave it out with data.exclude")
        for what, values in (("state", state), ("action", action)):
            if len(values) != len(action) or not np.isfinite(values).all():
                raise DataError(f"{label}: {what} is not finite or too short; leave it out with data.exclude")
        spoken = [
            t.decode().strip() for t in (instructions if layout.text[0] == "steps" else [instructions] * len(action))
        ]
        if not all(spoken):
            raise DataError(f"{label} has no instruction at step {spoken.index('')}; leave it out with data.exclude")
        texts, text_of = np.unique(spoken, return_inverse=True)
        return Episode(
            name=name,
            texts=tuple(map(str, texts)),
            text_of=text_of.astype(np.int32),
            fps=layout.fps,
            state=state[:, self.meaning.state],
            action=action[:, self.meaning.action],
            columns=self.meaning.columns,
            views={
                view: _Images.of(f"{label} {view}", _at(steps, path), step["observation"][path[-1]])
                for view, path in layout.views.items()
            },
        )


@dataclass(frozen=True, eq=False)
class _Images:
    """Images of one episode as they are stored."""

    name: str
    stored: Sequence[Any]
    feature: Any
    height: int
    width: int

    @classmethod
    def of(cls, name: str, stored: Sequence[Any], feature: Any) -> "_Images":
        height, width = feature.shape[:2]
        if height is None or width is None:
            height, width = _decode(name, stored, feature, 0).shape[:2]
        return cls(name, stored, feature, height, width)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        out = np.zeros((len(indices), self.height, self.width, 3), np.uint8)
        for row, i in zip(out, indices, strict=True):
            if not 0 <= i < len(self.stored):
                raise IndexError(f"{self.name}: frame {i} is outside the episode's {len(self.stored)} frames")
            image = _decode(self.name, self.stored, self.feature, int(i))
            if image.shape != row.shape:
                raise DataError(
                    f"{self.name}: frame {i} has shape {list(image.shape)}, expected {list(row.shape)}; copy it again"
                )
            row[:] = image
        return out


def _decode(name: str, stored: Sequence[Any], feature: Any, index: int) -> np.ndarray:
    try:
        if isinstance(feature, tfds.features.Image):
            check_header(stored[index], "the picture")
        return np.asarray(feature.decode_example_np(stored[index]))
    except Exception as error:  # image libraries can raise any exception for damaged bytes
        raise DataError(f"{name}: frame {index} cannot be decoded ({shorten(error)}); copy it again") from None


def _summary(read: _EpisodeReader, number: int) -> Row:
    """The index entry of one episode. A fault is stored too, since it matters only if the episode is not left out."""
    try:
        episode = read(number)
        for frames in episode.views.values():
            frames.frames([len(episode) - 1])
    except DataError as error:
        return _faulty(str(error))
    sizes = {view: [frames.height, frames.width] for view, frames in episode.views.items()}
    return {"fault": "", "steps": len(episode), "texts": list(episode.texts), "sizes": sizes}


def _faulty(message: str) -> Row:
    return {"fault": message, "steps": 0, "texts": [], "sizes": {}}


def _check_metadata(root: Path) -> None:
    """Raises DataError unless TFDS can open the folder without running code that the folder names."""
    for name in ("dataset_info.json", "features.json"):
        if not (root / name).is_file():
            raise DataError(
                f"{root} lacks {name}; use the folder of one version of a data set that was prepared by TFDS"
            )
    try:
        kinds = set(_feature_classes(files.read_json(root / "features.json")))
        # TFDS imports whatever module a feature names.
        if foreign := sorted(k for k in kinds if not k.startswith("tensorflow_datasets.core.features.")):
            raise DataError(
                f"{root}/features.json refers to {foreign[0]}, which is not a feature of TFDS; convert the data"
            )
    except (OSError, files.DamagedFileError, RecursionError) as error:
        raise DataError(f"{root} cannot be opened ({shorten(error)}); prepare it again with TFDS") from None


def _check_format(root: Path, builder: Any) -> Any:
    kind = builder.info.file_format
    if kind not in (_FORMATS.TFRECORD, _FORMATS.ARRAY_RECORD):
        raise DataError(
            f"{root} is stored as {kind.value}, which is not read here; prepare it again with TFDS and "
            "file_format='tfrecord' or 'array_record'"
        )
    return kind


def _feature_classes(content: Any) -> Iterator[str]:
    if isinstance(content, dict):
        yield from (str(content[k]) for k in ("pythonClassName", "python_class_name", "type") if k in content)
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _feature_classes(value)


def _child(root: Path, features: Any, key: str, setting: str, otherwise: str, fits: Callable[[Any], bool]) -> None:
    """Raises ConfigError, which lists the keys that fit, unless `key` is one of them."""
    if key in features and fits(features[key]):
        return
    what = f"of shape {getattr(features[key], 'shape', None)} in {root}" if key in features else f"which {root} lacks"
    fitting = ", ".join(sorted(k for k in features if fits(features[k])))
    raise ConfigError(f"{setting} is {key!r}, {what}; set one of {fitting or '(none fits)'}{otherwise}")


def _is_picture(feature: Any) -> bool:
    shape = getattr(feature, "shape", None)
    return isinstance(shape, tuple) and len(shape) == 3 and shape[2] == 3 and feature.np_dtype == np.uint8


def _is_vector(feature: Any) -> bool:
    shape = getattr(feature, "shape", None)
    return isinstance(shape, tuple) and len(shape) <= 1 and None not in shape and feature.np_dtype != np.object_


def _width(root: Path, feature: Any, setting: str) -> int:
    shape = getattr(feature, "shape", None)
    if not isinstance(shape, tuple) or len(shape) > 1 or None in shape:
        raise ConfigError(f"{setting} of {root} has shape {shape}, which is not a vector; choose another key")
    return shape[0] if shape else 1


def _has_text(features: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        features = getattr(features, "feature", features)
        if not isinstance(features, tfds.features.FeaturesDict) or key not in features:
            return False
        features = features[key]
    # Open-X data sets have a plain string here.
    plain = isinstance(features, tfds.features.Tensor) and features.shape == () and features.np_dtype == np.object_
    return isinstance(features, tfds.features.Text) or plain


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def _side_by_side(steps: Any, features: Any, paths: Sequence[tuple[str, ...]]) -> np.ndarray:
    return np.concatenate([_vectors(steps, features, path) for path in paths], axis=1)


def _vectors(steps: Any, features: Any, path: tuple[str, ...]) -> np.ndarray:
    feature = _at(features, path)
    rows = [np.asarray(feature.decode_example_np(row), np.float32).reshape(-1) for row in _at(steps, path)]
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)
