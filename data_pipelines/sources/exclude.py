"""Leaves out the episodes that the file `data.exclude` names, before their data are read.

The file is JSON: {"episodes": {"KIND:PATH": ["name of an episode", ...]}}.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipelines.episode import DataError
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.errors import listing
from rynnvla_jax.storage import bucket_cache, files, hub

LEAVE_OUT = "leave the episode out with data.exclude (rynnvla data validate SOURCE --fix OUT.json writes its file)"


class DamagedEpisodesError(DataError):
    """Episodes that cannot be used: `faults` {name: (file at fault, message)}, of which the first message is shown.

    `others` is what the end of the message counts.
    """

    def __init__(self, faults: Mapping[str, tuple[Path, str]], others: str = "other episodes"):
        _, first = next(iter(faults.values()))
        super().__init__(first + (f" (and {len(faults) - 1} {others})" if len(faults) > 1 else ""))
        self.faults = faults


def left_in(source: str, names: Sequence[str], config: DataConfig) -> list[int]:
    """Indices in `names` of the episodes of `source` to keep; prints on stderr how many are left out.

    Raises DataError when `data.exclude` is damaged, names an unknown episode, or leaves no episode; ConfigError when
    the file is missing.
    """
    source = bucket_cache.named(source)
    listed = _listed(config.exclude) if config.exclude else {}
    out = _of(source, listed)
    if listed and not any(kind_and_path(other) == kind_and_path(source) for other in listed):
        others = listing(sorted(listed), 3)
        print(f"{source}: nothing is left out; data.exclude {config.exclude} is about {others}", file=sys.stderr)
    if not out:
        return list(range(len(names)))
    if unknown := sorted(out.difference(names)):
        raise DataError(
            f"data.exclude {config.exclude} names {unknown[0]!r} in {source}, which has no such episode "
            f"(unknown names: {len(unknown)}); correct the file"
        )
    kept = [i for i, name in enumerate(names) if name not in out]
    if not kept:
        raise DataError(f"data.exclude {config.exclude} leaves no episode of {source}; correct the file")
    print(f"{source}: {len(names) - len(kept)} of {len(names)} episodes left out by {config.exclude}", file=sys.stderr)
    return kept


def left_out(source: str, path: str) -> set[str]:
    """Names that the file at `path` lists for `source`. Raises the errors of `left_in`."""
    return _of(source, _listed(path))


def _listed(path: str) -> dict[str, list[str]]:
    """The names that a file lists, by source."""
    try:
        content = files.read_json(files.place(path))
    except FileNotFoundError:
        raise ConfigError(f"data.exclude {path} does not exist; correct the path") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.exclude {path} is not JSON ({error}); "
            f"write it again with `rynnvla data validate SOURCE --fix {path}`"
        ) from None
    episodes = content.get("episodes") if isinstance(content, dict) else None
    if not isinstance(episodes, dict) or not all(_is_texts(v) for v in episodes.values()):
        raise DataError(
            f'data.exclude {path} does not have the form {{"episodes": {{"KIND:PATH": [name, ...]}}}}; correct it'
        )
    return episodes


def _of(source: str, listed: Mapping[str, Sequence[str]]) -> set[str]:
    own = kind_and_path(source)
    return {name for other, names in listed.items() if kind_and_path(other) == own for name in names}


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def kind_and_path(source: str) -> tuple[str, str]:
    """(kind, absolute path) of "KIND:PATH": the same for every way to write the path, also that of a bucket's copy, and
    for every revision of a name on the Hub."""
    kind, _, path = bucket_cache.named(source).partition(":")
    if hub.is_name(path):
        return kind, str(replace(hub.parse(path), revision="", kind=""))
    return kind, str(files.place(path).resolve())
