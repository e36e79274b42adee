"""Readers of data sets, one module per format. All return `Episodes`."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from data_pipelines.columns import FILE
from data_pipelines.episode import Episodes
from data_pipelines.sources import copies
from rynnvla_jax.config import ColumnsConfig, ConfigError, DataConfig, TrainConfig, did_you_mean
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import bucket_cache, files, hub

KINDS = {
    "lerobot": "LeRobot data set, v3.0, v2.1 or v2.0",
    "egodex": "EgoDex: <task>/<i>.hdf5 and <task>/<i>.mp4",
    "calvin": "CALVIN: a folder of episode_XXXXXXX.npz and lang_annotations/",
    "rlds": "RLDS or Open-X data set (TFRecord or ArrayRecord): a folder with dataset_info.json",
    "hdf5": "RynnVLA-001 HDF5: a folder of .hdf5 files, or the JSON file with task_data",
    "libero": "LIBERO's HDF5: a folder of .hdf5 files with data/demo_<i>, or one such file",
    "clips": "a folder of video clips with captions.csv, captions.jsonl or captions.parquet",
    "records": "ArrayRecord corpus made by `rynnvla data curate` or `rynnvla data tokenize`",
}


_ANY_CAMERA = ("lerobot", "rlds", "records")  # kinds that may have more cameras than front and wrist
KNOWN = ("egodex", "calvin", "libero", "records")  # kinds whose columns are always the same, or stored


class Load(Protocol):
    """Type of the function `load` that every module named in `KINDS` has: a data set -> its `Episodes`."""

    def __call__(
        self, root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True
    ) -> Episodes:
        """Reads lengths, texts and frame sizes; the episodes themselves are read on request.

        Args:
          root: the part of a source after "KIND:", a folder or file that exists; of one in a bucket or on the Hub the
            copy, but for the kind records in a bucket the `BucketPath`.
          config: its `exclude` names episodes to leave out (see `exclude.left_in`); other keys depend on the kind.
          views: required cameras, of "front", "wrist" and data.extra_views, which are checked; () reads states and
            actions only; None uses the cameras that exist.
          progress: show a progress bar on stderr where this takes long.

        Returns:
          At least one episode, in an order that is the same on every machine; `source` is "KIND:ROOT".

        Raises:
          ConfigError: settings that do not fit the data set, for example a camera that it does not have.
          DataError: data that is missing, damaged, inconsistent or empty; the message names the file and the remedy.
        """
        ...


def open_source(source: str, config: DataConfig, views: Sequence[str] | None = None, progress: bool = True) -> Episodes:
    """Opens and checks "KIND:PATH", where KIND is one of `KINDS`; PATH may be in a bucket or on the Hub (see `copies`).

    Only `views` ("front", "wrist", names of data.extra_views) are looked up and checked; () reads states and actions
    only, None uses the views that the source has.

    Raises:
      ConfigError: an unknown kind of source, or a view that the data set cannot have.
      DataError: data that is missing, inconsistent or empty.
      BucketError, CacheError, HubError: a bucket or a name on the Hub that cannot be used; too large a data set.
    """
    kind, _, path = source.partition(":")
    if kind not in KINDS or not path:
        raise ConfigError(
            f"data source {source!r} is not KIND:PATH; KIND is one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )
    copies.check(path, f"data source {source!r}: {path} does not exist; correct the path")
    if config.columns != ColumnsConfig() and kind in KNOWN:
        raise ConfigError(
            f"data.columns does not hold for {source}, whose columns are known; leave it out, or write "
            f"rynnvla_columns.json beside the data set that it is meant for"
        )
    if (extra := set(views or ()) & set(config.extra_views)) and kind not in _ANY_CAMERA:
        raise ConfigError(
            f"{source} has a front and a wrist camera at most, but data.extra_views names {', '.join(sorted(extra))}; "
            f"leave it out (sources of the kinds {', '.join(_ANY_CAMERA)} may have further cameras)"
        )
    load: Load = importlib.import_module(f"data_pipelines.sources.{kind}").load
    try:
        here = copies.needed(kind, path, config, views, progress)
        if kind in KNOWN and not files.is_bucket(here) and (here / FILE).is_file():
            raise ConfigError(f"{here / FILE} does not hold for {kind}:, whose columns are known; remove the file")
        episodes = load(here, config, None if views is None else tuple(views), progress)
    except ConfigError as error:
        raise ConfigError(bucket_cache.named(str(error))) from None
    return _named(episodes) if files.is_bucket(path) or hub.is_name(path) else episodes


def _named(episodes: Episodes) -> Episodes:
    """With the names of objects instead of those of their copies."""
    sizes = {size: bucket_cache.named(example) for size, example in episodes.frame_sizes.items()}
    return replace(episodes, source=bucket_cache.named(episodes.source), frame_sizes=sizes)


def open_sources(config: TrainConfig, progress: bool = True) -> list[Episodes]:
    """The sources of a run, with the views that its stage reads; a VQGAN uses all views of each source.

    Raises DataError, ConfigError.
    """
    views = STAGES[config.stage].views(config)
    found = [open_source(source, config.data, views, progress) for source, _ in mixture(config.data)]
    for source in found:
        if views is None and not source.views:
            open_source(source.source, config.data, ("front",), progress)  # raises, and lists the cameras
    return found


def mixture(config: DataConfig) -> tuple[tuple[str, float], ...]:
    """(source, weight) pairs. Raises ConfigError when no source is set."""
    if not config.mixture and not config.source:
        raise ConfigError("data.source is empty; set it to KIND:PATH, or data.mixture to (source, weight) pairs")
    return config.mixture or ((config.source, 1.0),)


def short_names(config: DataConfig) -> tuple[str, ...]:
    """A name for each source, for metrics: the end of its path, of as many folders as tell all sources apart."""
    paths = [[part.strip("/") for part in Path(source.partition(":")[2]).parts] for source, _ in mixture(config)]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["_".join(filter(None, path[-depth:])) for path in paths]
        if len(set(names)) == len(names):
            return tuple(names)
    return tuple(f"{i}_{path[-1] if path else ''}" for i, path in enumerate(paths, 1))
