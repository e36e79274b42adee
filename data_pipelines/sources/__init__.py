"""Foreign data sets -> `Episodes`."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from data_pipelines.episode import DataError, Episodes
from rynnvla_jax.config import ConfigError, DataConfig, TrainConfig, did_you_mean
from rynnvla_jax.stage import STAGES

KINDS = {
    "lerobot": "LeRobot data set, v3.0 or v2.1",
    "egodex": "EgoDex: <task>/<i>.hdf5 beside <task>/<i>.mp4",
    "calvin": "CALVIN: a folder of episode_XXXXXXX.npz and lang_annotations/",
    "rlds": "RLDS or Open-X data set as TFDS has prepared it: a folder with dataset_info.json",
    "hdf5": "RynnVLA-001 HDF5: a folder of .hdf5, or its JSON with task_data",
    "clips": "a folder of video clips with captions.csv, captions.jsonl or captions.parquet",
    "records": "ArrayRecord corpus of `rynnvla data curate` or `rynnvla data tokenize`",
}


class Load(Protocol):
    """`load` of every module of this package that is named in `KINDS`: a foreign data set -> its `Episodes`."""

    def __call__(
        self, root: Path, config: DataConfig, views: tuple[str, ...] | None, progress: bool = True
    ) -> Episodes:
        """Reads what is needed to know lengths, texts and sizes; episodes are read when they are asked for.

        Args:
          root: what follows "KIND:" in a source, a folder or file that exists.
          config: of it `exclude`, whose episodes are left out by name (`exclude.left_in`), and what concerns the kind.
          views: cameras that must be there and are checked, of ("front", "wrist"); () reads states and actions alone;
            None takes what is there.
          progress: a bar on stderr where it takes long.

        Returns:
          Episodes in an order that is the same everywhere (`source` is "KIND:ROOT"), at least one.

        Raises:
          ConfigError: settings that the data set cannot follow, for example a camera that it lacks.
          DataError: data that is missing, damaged, inconsistent or none; the message names the file and the remedy.
        """
        ...


def open_source(source: str, config: DataConfig, views: Sequence[str] | None = None, progress: bool = True) -> Episodes:
    """Opens and checks "KIND:PATH", KIND one of `KINDS`.

    Only `views` ("front", "wrist") are looked up and checked; () reads states and actions alone, None takes what the
    source has.

    Raises:
      ConfigError: an unknown kind of source, or a view the data set cannot have.
      DataError: data that is missing, inconsistent, empty, or in another unit than `config.state_unit`.
    """
    kind, _, path = source.partition(":")
    root = Path(path).expanduser()
    if kind not in KINDS or not path:
        raise ConfigError(
            f"data source {source!r} is not KIND:PATH; KIND is one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
        )
    if not root.exists():
        raise DataError(f"data source {source!r}: {root} does not exist; correct the path")
    load: Load = importlib.import_module(f"data_pipelines.sources.{kind}").load
    episodes = load(root, config, None if views is None else tuple(views), progress)
    if config.state_unit and config.state_unit != episodes.unit:
        raise DataError(
            f"{source} holds {episodes.unit!r} but data.state_unit asks for {config.state_unit!r}; "
            f"convert the data, or correct data.state_unit"
        )
    return episodes


def open_sources(config: TrainConfig, progress: bool = True) -> list[Episodes]:
    """The sources of a run, with the views its stage reads; a VQGAN takes from each the views it has.

    Raises DataError, ConfigError.
    """
    views = STAGES[config.stage].views(config)
    found = [open_source(source, config.data, views, progress) for source, _ in mixture(config.data)]
    for source in found:
        if views is None and not source.views:
            open_source(source.source, config.data, ("front",), progress)  # raises, and says what cameras there are
    return found


def mixture(config: DataConfig) -> tuple[tuple[str, float], ...]:
    """(source, weight) pairs. Raises ConfigError when there is none."""
    if not config.mixture and not config.source:
        raise ConfigError("data.source is empty; set it to KIND:PATH, or data.mixture to (source, weight) pairs")
    return config.mixture or ((config.source, 1.0),)
