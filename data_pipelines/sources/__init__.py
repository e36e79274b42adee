"""Foreign data sets -> `Episodes`."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.episode import DataError, Episodes
from rynnvla_jax.config import ConfigError, DataConfig, did_you_mean

KINDS = {
    "lerobot": "LeRobot data set, v3.0 or v2.1",
    "egodex": "EgoDex: <task>/<i>.hdf5 beside <task>/<i>.mp4",
    "calvin": "CALVIN: a folder of episode_XXXXXXX.npz and lang_annotations/",
    "rlds": "RLDS or Open-X data set as TFDS has prepared it: a folder with dataset_info.json",
    "hdf5": "RynnVLA-001 HDF5: a folder of .hdf5, or its JSON with task_data",
    "clips": "a folder of video clips with captions.csv, captions.jsonl or captions.parquet",
    "records": "ArrayRecord corpus of `rynnvla data curate` or `rynnvla data tokenize`",
}


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
    module = importlib.import_module(f"data_pipelines.sources.{kind}")
    episodes = module.load(root, config, None if views is None else tuple(views), progress)
    if config.state_unit and config.state_unit != episodes.unit:
        raise DataError(
            f"{source} holds {episodes.unit!r} but data.state_unit asks for {config.state_unit!r}; "
            f"convert the data, or correct data.state_unit"
        )
    return episodes
