"""Clips of a finished corpus that show the same as another one: DIR/duplicates.json, which readers leave out.

    exact   the encoded clips are the same bytes: copies of a video, or of a part of it that was cut alike
    near    other videos, cut at the same times, whose sampled frames look the same: other sizes, rates or compression

Workers do not know each other's clips, so this is done when all shards are there, from the ledgers alone. Of each group
the first clip by name stays. Because the others are never read, no split of the corpus has the same pictures on both
sides. A video that was trimmed, mirrored or graded anew is not found.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from data_pipelines.corpus import records
from data_pipelines.curate import ledger
from data_pipelines.thumbnails import CELLS

# Brightness by which the cells of one picture differ when it is compressed anew: the most, and on average. Two
# recordings of one task from one place differ more, since hands and head are elsewhere.
_MOST, _MEAN = 8.0, 1.5
# The sum of a thousand such differences with random signs has a deviation of some 60; candidates lie within four of it.
_SPREAD = 240.0
_SECONDS = 0.25  # by which starts and lengths of the same clip differ, in videos of other rates


@dataclass(frozen=True)
class Duplicate:
    """Why a clip is left out: it is the same as the clip `of`; `kind` is exact or near."""

    of: str
    kind: str


def find(directory: Path, num_shards: int) -> dict[str, Duplicate]:
    """The clips to leave out, by name."""
    names, digests, places, prints = _kept(directory, num_shards)
    order = sorted(range(len(names)), key=names.__getitem__)
    found: dict[str, Duplicate] = {}
    first: dict[bytes, int] = {}
    left = []
    for i in order:
        before = first.setdefault(digests[i], i)
        if before == i:
            left.append(i)
        else:
            found[names[i]] = Duplicate(names[before], "exact")
    if len(left) < 2:
        return found
    points = np.concatenate([places[left] / _SECONDS, prints[left] / _SPREAD], axis=1)
    pairs = cKDTree(points).query_pairs(1.0, p=np.inf, output_type="ndarray")
    videos = [names[i].rpartition("#")[0] for i in left]
    pairs = np.array([p for p in np.sort(pairs, axis=1) if videos[p[0]] != videos[p[1]]], np.int64).reshape(-1, 2)
    copies = _copies(directory, num_shards, {names[left[i]] for i in pairs.ravel().tolist()})
    for a, b in sorted(map(tuple, pairs.tolist()), key=lambda pair: pair[::-1]):
        original, name = names[left[a]], names[left[b]]
        if original in found or name in found:
            continue  # compared with what stays only, so that likeness does not wander from clip to clip
        if _alike(copies[original], copies[name]):
            found[name] = Duplicate(original, "near")
    return found


def write(directory: Path, found: Mapping[str, Duplicate]) -> None:
    """Writes DIR/duplicates.json, which `records.duplicates` reads."""
    records.write_duplicates(directory, {name: duplicate.of for name, duplicate in found.items()})


def _kept(directory: Path, num_shards: int) -> tuple[list[str], list[bytes], np.ndarray, np.ndarray]:
    """Of all kept clips: name, digest of the encoded clip, (start, seconds) [n, 2], and `ledger.fingerprint` [n, 8]."""
    names: list[str] = []
    digests: list[bytes] = []
    places: list[tuple[float, float]] = []
    prints: list[np.ndarray] = []
    for shard in range(num_shards):
        columns = ["clip_id", "digest", "fingerprint", "start", "seconds"]
        table = ledger.read(directory, shard, num_shards, columns=columns, filters=[("outcome", "=", "kept")])
        names += table["clip_id"].to_pylist()
        digests += table["digest"].to_pylist()
        places += zip(table["start"].to_pylist(), table["seconds"].to_pylist(), strict=True)
        prints += [np.frombuffer(x, np.float32) for x in table["fingerprint"].to_pylist()]
    return names, digests, np.array(places).reshape(-1, 2), np.array(prints).reshape(len(names), -1)


def _copies(directory: Path, num_shards: int, names: set[str]) -> dict[str, np.ndarray]:
    """The small copies uint8 [samples, cells] of these clips."""
    found: dict[str, np.ndarray] = {}
    for shard in range(num_shards if names else 0):
        filters = [("clip_id", "in", sorted(names))]
        table = ledger.read(directory, shard, num_shards, columns=["clip_id", "copies"], filters=filters)
        for name, content in zip(table["clip_id"].to_pylist(), table["copies"].to_pylist(), strict=True):
            found[name] = np.frombuffer(content, np.uint8).reshape(-1, CELLS * CELLS)
    return found


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    apart = np.abs(a.astype(np.float32) - b)
    return bool(apart.max() <= _MOST and apart.mean(axis=1).max() <= _MEAN)
