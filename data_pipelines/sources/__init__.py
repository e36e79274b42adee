"""Foreign data sets -> lists of `Episode`."""

from collections.abc import Sequence
from pathlib import Path

from data_pipelines.episode import DataError, Episode
from rynnvla_jax.config import ConfigError, DataConfig


def open_source(
    source: str, config: DataConfig, views: Sequence[str] = ("front", "wrist"), progress: bool = True
) -> list[Episode]:
    """Opens and checks "lerobot:DIR" or "egodex:DIR".

    Only `views` are looked up and checked; () reads states and actions alone.

    Raises:
      ConfigError: an unknown kind of source, or a view the data set cannot have.
      DataError: data that is missing, inconsistent, empty, or in another unit than `config.state_unit`.
    """
    kind, _, directory = source.partition(":")
    root = Path(directory).expanduser()
    if kind not in ("lerobot", "egodex") or not directory:
        raise ConfigError(f"data.source is {source!r}; write 'lerobot:DIR' or 'egodex:DIR'")
    if not root.is_dir():
        raise DataError(f"data.source {source!r}: {root} is not a directory; correct the path")
    if kind == "lerobot":
        from data_pipelines.sources import lerobot as module
    else:
        from data_pipelines.sources import egodex as module
    episodes = module.load(root, config, tuple(views), progress)
    unit = episodes[0].unit
    if config.state_unit and config.state_unit != unit:
        raise DataError(
            f"{root} holds {unit!r} but data.state_unit asks for {config.state_unit!r}; "
            f"convert the data, or correct data.state_unit"
        )
    return episodes
