"""Plans which records of a corpus form which training sequence. The plan is stored in the corpus.

A plan is a folder of two arrays and plan.json, which is written last: without it there is no plan.

A filter or a packer inside the stream would make its position depend on what came before; with a plan, sequence k
depends on k alone. Records that are too short, or whose text does not fit, are left out here and counted.

Lengths of a sequence that would hold the same records with less padding are proposed with every plan.

Source: best-fit decreasing over the histogram of lengths, as "Efficient Sequence Packing without Cross-contamination"
(arXiv 2107.02027) proposes, with a limit on the number of clips per sequence.
"""

import dataclasses
import hashlib
import io
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np

from data_pipelines.corpus import records
from data_pipelines.episode import DataError
from data_pipelines.sources.exclude import left_out
from rynnvla_jax import metadata
from rynnvla_jax.config import ConfigError, TrainConfig
from rynnvla_jax.errors import shorten
from rynnvla_jax.metadata import Between, Count, Share
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.sequence import frame_length, sequence_length
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import arrays, bucket_cache, files
from rynnvla_jax.vocabulary import TextTokenizer

_ARRAYS, _PLAN = ("records.npy", "ends.npy"), "plan.json"
_MULTIPLE = 128  # of a proposed length: tiles of TPUs
_CLIPS = (1, 2, 3, 4)  # that lengths are proposed for, beside sequence.clips
_WORSE = 0.05  # padding beyond that of the proposal of as many clips, from which the plan mentions it


@dataclass(frozen=True)
class Proposal:
    """A setting that all records fit: `sequence.length`, `sequence.clips`, and the share of padding it would have."""

    length: Annotated[int, Between(1, 2**40)]
    clips: Annotated[int, Between(1, 2**20)]
    padding: Share

    def __str__(self) -> str:
        return f"sequence.length={self.length} sequence.clips={self.clips} ({100 * self.padding:.1f} % padding)"


@dataclass(frozen=True)
class _About:
    """plan.json."""

    tokens: Count
    length: Annotated[int, Between(1, 2**40)]
    left_out: dict[str, Count]
    clips: Annotated[int, Between(1, 2**20)] = 1  # of older plans: not known, so nothing is proposed
    proposals: list[Proposal] = field(default_factory=list)
    sha256: dict[str, str] = field(default_factory=dict)  # of the arrays' files; older plans have none


@dataclass(frozen=True, eq=False)
class Plan:
    """Sequence k holds `records[ends[k - 1] : ends[k]]`; arrays are mapped from disk, not loaded.

    Records are numbered as in the opened source: without duplicates and those in data.exclude. `tokens` is the number
    of tokens in all sequences, `left_out` the number of records left out for each reason, `clips` the most that a
    sequence may hold.
    """

    records: np.ndarray
    ends: np.ndarray
    tokens: int
    length: int
    left_out: dict[str, int]
    clips: int = 1
    proposals: tuple[Proposal, ...] = ()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.records[self.ends[number - 1] if number else 0 : self.ends[number]]

    @property
    def padding(self) -> float:
        """Fraction of all positions that hold padding."""
        return 1 - self.tokens / (len(self) * self.length)

    @property
    def packs(self) -> bool:
        """Whether a sequence holds two records."""
        return len(self) < len(self.records)

    def describe(self) -> str:
        """For people."""
        left_out = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items() if n)
        better = [p for p in self.proposals if p.clips == self.clips and p.padding < self.padding - _WORSE]
        return (
            f"{len(self)} sequences of {self.length} tokens hold {len(self.records)} records, "
            f"{100 * self.padding:.1f} % padding"
            + (", no two records in one sequence" if self.clips > 1 and not self.packs else "")
            + (f" (better: {better[0]})" if better else "")
            + (f"; left out: {left_out}" if left_out else "")
        )


def prepare(
    directory: Path,
    config: TrainConfig,
    tokenizer: TextTokenizer,
    size: tuple[int, int],
    progress: bool = True,
    kept: np.ndarray | None = None,
) -> Plan:
    """The plan of a corpus for these settings, read from DIR/plans. A plan that does not exist is made and saved there.

    `size` is (height, width) of a frame in pixels, after preprocessing; `kept` int64 [n] are the numbers of the records
    to use (None: all of the opened source), in whose order they are numbered anew.

    Raises:
      DataError: no record fits, or the manifest or data.exclude cannot be read.
      ConfigError: data.exclude does not exist, or no sequence could hold two records although sequence.clips asks for
        it (in a mixture, whose other sources may pack, this is a warning).
    """
    corpus, layout = records.read_corpus(directory)
    excluded = left_out(f"records:{directory}", config.data.exclude) if config.data.exclude else set()
    excluded |= records.duplicates(directory, corpus)
    span, after = STAGES[config.stage].window(config, published=False)
    sequence = {k: v for k, v in dataclasses.asdict(config.sequence).items() if k != "train_later_text"}
    if not config.sequence.extra_views:  # older plans have none
        del sequence["extra_views"]
    key = {
        "manifest": corpus["manifest"],
        "tokenizer": hashlib.sha256(files.place(tokenizer.path).read_bytes()).hexdigest(),
        "sequence": sequence,
        "span": [span, after],
        "size": list(size),
        "without": sorted(excluded),  # the others are renumbered
    }
    if kept is not None:
        key["kept"] = hashlib.sha256(np.ascontiguousarray(kept, "<i8").tobytes()).hexdigest()
    path = directory / "plans" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    if not (path / _PLAN).exists():
        planned = make(directory, corpus, layout, config, tokenizer, size, excluded, progress, kept)
        try:
            _save(planned, path, key)
        except OSError as error:
            reason = error.strerror or shorten(error)
            print(f"{path} cannot be written ({reason}): the plan will be made again at every start", file=sys.stderr)
            return planned
    return _load(path, corpus["records"] - len(excluded) if kept is None else len(kept))


def make(
    directory: Path,
    corpus: dict,
    layout: records.CorpusLayout,
    config: TrainConfig,
    tokenizer: TextTokenizer,
    size: tuple[int, int],
    excluded: set[str],
    progress: bool = True,
    kept: np.ndarray | None = None,
) -> Plan:
    """Reads the manifest and packs. Raises as `prepare` does."""
    span, after = STAGES[config.stage].window(config, published=False)
    frame, needed = frame_length(*size), (span - 1) * layout.stride + 1 + after
    fitting, totals_of, all_totals = [], [], []
    refused: Counter[str] = Counter()
    tables = records.read_manifest(directory, corpus["shard_lengths"], ["clip_id", "captions", "steps"])
    total = len(corpus["shard_lengths"])
    first = seen = 0
    for table in progress_bar(tables, desc="plan", unit="shard", total=total, show=progress):
        if excluded:
            table = table.filter([name not in excluded for name in table["clip_id"].to_pylist()])
        if kept is not None:
            begin, end = np.searchsorted(kept, (seen, seen + len(table)))
            seen, table = seen + len(table), table.take(kept[begin:end] - seen)
        tokens = _text_tokens(table["captions"].to_pylist(), tokenizer)
        steps = table["steps"].to_numpy()
        reason = np.full(len(table), "", object)
        reason[tokens < 0] = "with captions that the tokenizer cannot encode"
        totals = np.array([sequence_length(max(int(t), 0), frame, config.sequence) for t in tokens], np.int64)
        all_totals.append(totals[(tokens >= 0) & (steps >= needed)])
        reason[totals > config.sequence.length] = f"longer than {config.sequence.length} tokens"
        reason[steps < needed] = f"shorter than {needed} steps"
        refused.update(r for r in reason if r)
        good = np.flatnonzero(reason == "")
        fitting.append((first + good).astype(np.int32))
        totals_of.append(totals[good])
        first += len(table)
    numbers, lengths = np.concatenate(fitting), np.concatenate(totals_of)
    proposals = propose(np.concatenate(all_totals), config.sequence.clips)
    if not len(numbers):
        to = next((f" to {p.length}" for p in proposals if p.clips == 1), "")
        remedies = {
            "with": "use a tokenizer that can write them (config.tokenizer)",
            "shorter": f"reduce {STAGES[config.stage].long_by(config)}",
            "longer": f"use fewer frames (sequence.num_frames) or increase sequence.length{to}",
        }
        wanted = [remedy for first, remedy in remedies.items() if any(r.startswith(first) for r in refused)]
        raise DataError(f"{directory}: no record fits stage {config.stage}: {dict(refused)}; {'; '.join(wanted)}")
    chosen, ends = pack(lengths, config.sequence.length, config.sequence.clips)
    plan = Plan(
        numbers[chosen],
        ends.astype(np.int32),
        tokens=int(lengths.sum()),
        length=config.sequence.length,
        left_out=dict(refused),
        clips=config.sequence.clips,
        proposals=proposals,
    )
    if plan.clips > 1 and not plan.packs and len(lengths) > 1:
        settings = ", or ".join(str(p) for p in reversed(proposals) if p.clips in (plan.clips, 1))
        text = (
            f"{directory}: sequence.clips={plan.clips} packs nothing, because no two records fit into "
            f"sequence.length={plan.length}: they have {lengths.min()} to {lengths.max()} tokens, so "
            f"{100 * plan.padding:.1f} % would be padding; set {settings}"
        )
        if not config.data.mixture:
            raise ConfigError(text)
        print(f"warning: {text}", file=sys.stderr)
    return plan


def propose(lengths: np.ndarray, clips: int) -> tuple[Proposal, ...]:
    """For `clips` and a few smaller numbers of clips the length with the least padding that every record fits.

    Args:
      lengths: int [n] tokens of each record.
    """
    if not len(lengths):
        return ()
    values, counts = np.unique(lengths, return_counts=True)
    longest = int(values[-1])
    middle = [int(x) for x in np.percentile(lengths, [50, 75, 90, 95, 99], method="inverted_cdf")]
    found = []
    for each in sorted({*_CLIPS, clips}):
        best: Proposal | None = None
        for length in sorted({-(-max(each * edge, longest) // _MULTIPLE) * _MULTIPLE for edge in (*middle, longest)}):
            number = sum(sum(group.values()) for group in _bins(values, counts, length, each).values())
            if each > 1 and number == len(lengths) > 1:
                continue
            padding = 1 - int(lengths.sum(dtype=np.int64)) / (number * length)
            if best is None or padding < best.padding:
                best = Proposal(length, each, padding)
        assert best is not None  # the largest of these lengths holds `each` of any records
        found.append(best)
    return tuple(found)


def pack(lengths: np.ndarray, capacity: int, clips: int) -> tuple[np.ndarray, np.ndarray]:
    """int [n] lengths -> (int32 [n] order, int64 [m] ends): bin k holds `order[ends[k - 1] : ends[k]]`.

    A bin has at most `clips` items and a total length of at most `capacity`; every single length must fit.
    Deterministic.
    """
    if clips == 1:
        return np.arange(len(lengths), dtype=np.int32), np.arange(1, len(lengths) + 1)
    values, counts = np.unique(lengths, return_counts=True)
    bins = _bins(values, counts, capacity, clips)
    by_length = {int(v): np.flatnonzero(lengths == v) for v in values}
    used: Counter[int] = Counter()
    order, ends = [], []
    for _, group in sorted(bins.items()):
        for held, number in sorted((h, n) for h, n in group.items()):
            columns = []
            for value in held:
                columns.append(by_length[value][used[value] : used[value] + number])
                used[value] += number
            order.append(np.stack(columns, axis=1).ravel())
            ends.append(np.full(number, len(held)))
    return np.concatenate(order).astype(np.int32), np.cumsum(np.concatenate(ends))


def _bins(
    values: np.ndarray, counts: np.ndarray, capacity: int, clips: int
) -> dict[tuple[int, int], Counter[tuple[int, ...]]]:
    """(space left, slots left) -> {lengths in the bin: how many such bins}, by best fit over a histogram of lengths."""
    bins: dict[tuple[int, int], Counter[tuple[int, ...]]] = defaultdict(Counter)
    for value, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        for space, slots in sorted(k for k in bins if k[0] >= value and k[1]):  # the fullest first
            for held, number in bins.pop((space, slots)).items():
                count = _fill(bins, held, number, space, slots, value, count)
        _fill(bins, (), count, capacity, clips, value, count)
    for group in bins.values():
        del group[()]
    return bins


def _fill(bins, held: tuple, number: int, space: int, slots: int, value: int, count: int) -> int:
    """Puts up to `count` of `value` into `number` like bins, as many as fit in each; returns how many are left."""
    each = min(slots, space // value)
    full = min(number, count // each)
    rest = count - full * each if full < number else 0  # fewer than fit: they go into one more bin
    bins[space - each * value, slots - each][(*held, *[value] * each)] += full
    if rest:
        bins[space - rest * value, slots - rest][(*held, *[value] * rest)] += 1
    bins[space, slots][held] += number - full - bool(rest)
    return count - full * each - rest


def _text_tokens(captions: list[list[str]], tokenizer: TextTokenizer) -> np.ndarray:
    """Ids of the longest caption of each record; -1 where one cannot be encoded."""
    known: dict[str, int] = {}
    for caption in {c for per_record in captions for c in per_record}:
        try:
            known[caption] = len(tokenizer.encode(caption or ""))
        except ConfigError:
            known[caption] = -1
    return np.array(
        [-1 if min(n, default=-1) < 0 else max(n) for n in ([known[c] for c in cs] for cs in captions)], np.int64
    )


def _save(plan: Plan, path: Path, key: dict) -> None:
    about: dict = {"tokens": plan.tokens, "length": plan.length, "left_out": plan.left_out, "clips": plan.clips}
    about |= {"proposals": [dataclasses.asdict(p) for p in plan.proposals], "made_for": key}
    path.mkdir(parents=True, exist_ok=True)
    about["sha256"] = {}
    for name, array in zip(_ARRAYS, (plan.records, plan.ends), strict=True):
        content = io.BytesIO()
        np.save(content, array)
        files.write_bytes(path / name, content.getvalue())
        about["sha256"][name] = hashlib.sha256(content.getvalue()).hexdigest()
    files.write_json(path / _PLAN, about)


def _load(path: Path, count: int) -> Plan:
    """Raises DataError when the plan is damaged, or is not of `count` records."""
    try:
        about = metadata.read(_About, path / _PLAN)
        here = bucket_cache.copy(path, show=False)
        numbers, ends = (arrays.map_array(here / name) for name in _ARRAYS)
        if not _fit(numbers, ends, count):
            raise arrays.DamagedArrayError(f"records.npy and ends.npy do not describe sequences of {count} records")
        for name in _ARRAYS:
            if about.sha256 and files.sha256(here / name) != about.sha256.get(name):
                raise arrays.DamagedArrayError(f"{name} is not the file that was written: its SHA-256 differs")
    except (OSError, files.DamagedFileError, arrays.DamagedArrayError) as error:
        raise DataError(f"the plan {path} is damaged ({shorten(error)}); delete this folder and start again") from None
    return Plan(
        numbers,
        ends,
        tokens=about.tokens,
        length=about.length,
        left_out=about.left_out,
        clips=about.clips,
        proposals=tuple(about.proposals),
    )


def _fit(numbers: np.ndarray, ends: np.ndarray, count: int) -> bool:
    """Whether every sequence holds records that exist, and every entry of `numbers` is in a sequence."""
    if not all(a.ndim == 1 and a.dtype.kind in "iu" and len(a) for a in (numbers, ends)):
        return False
    parted = bool(ends[0] > 0 and (np.diff(ends) > 0).all() and ends[-1] == len(numbers))
    return parted and 0 <= int(numbers.min()) <= int(numbers.max()) < count
