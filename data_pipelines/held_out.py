"""Which episodes of a source a run does not train on, so that it can be evaluated on them.

The choice is a function of the episode's name, the kind of source and `evaluation.seed` alone: episodes that are added,
left out or moved to another folder move no other one across, and all stages of a curriculum hold out the same ones.

A number in the name spreads the choice evenly: consecutive numbers are the golden ratio of a circle apart, so every run
of neighbouring episodes, and with it every instruction that was recorded in a row, gives its share to within about one
episode. Drawing each episode on its own would leave out one instruction of ten episodes in three at a share of 0.1.

Source: low-discrepancy sequence of the golden ratio (Kronecker, Weyl), as in Knuth's Fibonacci hashing.
"""

import hashlib
import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_pipelines.corpus import records
from data_pipelines.episode import DataError, Episodes, Summary
from rynnvla_jax.config import EvaluationConfig
from rynnvla_jax.errors import listing

_CIRCLE = 2**64
_GOLDEN = 0x9E3779B97F4A7C15  # of the circle
# The last number of a name, before a suffix such as .mp4, whose digits mean nothing.
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})([^0-9]*(?:\.[A-Za-z][A-Za-z0-9]*)?)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Split:
    """The two parts of a source; `held_out` is None where no episode is. `said` is a line for people."""

    train: Episodes
    held_out: Episodes | None
    said: str


def position(kind: str, name: str, seed: int) -> int:
    """Where the episode `name` of a source of this kind lies on a circle of 2^64; below share x 2^64 it is held out."""
    found = _NUMBERED.fullmatch(name)
    before, number, after = (found[1], int(found[2]), found[3]) if found else (name, 0, "")
    text = json.dumps([seed, kind, before, after])
    phase = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return (phase + number * _GOLDEN) % _CIRCLE


def split(sources: list[Episodes], config: EvaluationConfig) -> list[Split]:
    """The parts of every source by `config.share`.

    Raises DataError, which says what share would do, when none of the sources holds out an episode, or one has no
    episode left to train on.
    """
    found = [_Places(source, config.seed) for source in sources]
    parts = []
    for source, places in zip(sources, found, strict=True):
        out = places.below(config.share)
        if out.all():
            raise DataError(
                f"{source.source}: evaluation.share {config.share:g} leaves none of its {len(source)} episodes to "
                f"train on; {places.remedy()}"
            )
        parts.append(places.parted(out))
    if all(part.held_out is None for part in parts):
        best = min(found, key=lambda places: places.least)
        number = sum(map(len, sources))
        raise DataError(
            f"{listing([source.source for source in sources], 3)}: evaluation.share {config.share:g} holds out none of "
            f"{number} episodes; {best.remedy()}"
        )
    return parts


def kind_of(source: Episodes) -> str:
    """The kind of source that its episodes were recorded in: that of a tokenized corpus is the kind it was made from,
    so that both hold out the same episodes."""
    if source.corpus is not None:
        made_from = records.read_corpus(source.corpus)[0].get("about", {})
        if isinstance(made_from, dict) and isinstance(made_from.get("source"), str):
            return made_from["source"].partition(":")[0]
    return source.source.partition(":")[0]


class _Places:
    """Positions uint64 [n] and rates of the episodes of a source, and the instructions of each."""

    def __init__(self, source: Episodes, seed: int):
        self._source, kind = source, kind_of(source)
        places, fps, texts = array("Q"), array("d"), array("q")
        known: dict[tuple[str, ...], int] = {}
        for summary in source.summaries() if source.summaries else _read(source):
            places.append(position(kind, summary.name, seed))
            fps.append(summary.fps)
            texts.append(known.setdefault(tuple(summary.texts), len(known)))
        if len(places) != len(source):
            raise DataError(f"{source.source} was changed while it was opened; start the run again")
        self._places, self._fps = np.frombuffer(places, np.uint64), np.frombuffer(fps, np.float64)
        self._texts, self._known = np.frombuffer(texts, np.int64), list(known)

    @property
    def least(self) -> float:
        """The share from which on an episode is held out."""
        return int(self._places.min()) / _CIRCLE if len(self._places) > 1 else 1.0

    def below(self, share: float) -> np.ndarray:
        """bool [n]: the episodes that are held out."""
        return self._places < np.uint64(share * _CIRCLE)

    def remedy(self) -> str:
        """What share would leave episodes on both sides."""
        if len(self._places) < 2:
            return "name other data in evaluation.sources"
        low, high = (int(x) / _CIRCLE for x in np.sort(self._places)[[0, -1]])
        digits = 2
        while not low < (share := round((low + min(high, low + 0.02)) / 2, digits)) < high:
            digits += 1
        return f"set it to {share:g}, or name other data in evaluation.sources"

    def parted(self, out: np.ndarray) -> Split:
        source = self._source
        if not out.any():
            return Split(source, None, f"{source.source}: none of {len(source)} episodes")
        train, held_out = (self._part(np.flatnonzero(chosen)) for chosen in (~out, out))
        said = f"{source.source}: {len(held_out)} of {len(source)} episodes"
        if any(self._known):
            all_, here = (Counter(self._texts[chosen].tolist()) for chosen in (slice(None), out))
            said += f", of {len(here)} of {len(all_)} instructions"
            for what, numbers in (
                ("none of", [i for i in all_ if i not in here]),
                ("not trained on:", [i for i in here if here[i] == all_[i]]),
            ):
                said += f"; {what} {self._named(numbers)}" if numbers else ""
        return Split(train, held_out, said)

    def _named(self, numbers: list[int]) -> str:
        return listing([repr(" / ".join(self._known[i])) for i in numbers], 3)

    def _part(self, kept: np.ndarray) -> Episodes:
        texts = [text for i in np.unique(self._texts[kept]) for text in self._known[i]]
        return self._source.part(kept, texts, self._fps[kept])


def _read(source: Episodes):
    for episode in source:
        yield Summary(episode.name, episode.texts, episode.fps)
