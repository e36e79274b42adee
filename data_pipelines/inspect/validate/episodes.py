"""Checks for episodes of any source; reads every episode and decodes all of its frames."""

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines import video
from data_pipelines.episode import DataError, Episode, Episodes, Frames, check_alike
from data_pipelines.inspect.validate.audit import Audit
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.opening import names_of
from data_pipelines.inspect.validate.pictures import Look
from data_pipelines.inspect.validate.rows import Location, Rows
from data_pipelines.sources import hdf5_files
from rynnvla_jax.config import DataConfig
from rynnvla_jax.progress import progress_bar
from rynnvla_jax.storage import bucket_cache, files

_FRAMES = 32  # decoded at once
_EPISODES = 64  # waiting for a thread


@dataclass
class _Read:
    """The readable part of one episode; `faults` are (view, step or None, message)."""

    episode: Episode | None
    faults: list[tuple[str, int | None, str]] = field(default_factory=list)
    digests: dict[str, bytes] = field(default_factory=dict)  # by view
    looks: dict[str, Look] = field(default_factory=dict)


def check(episodes: Episodes, root: Path, config: DataConfig, findings: Findings, progress: bool) -> None:
    """Adds to `findings`."""
    audit = Audit(findings, episodes.columns, root, config, cameras=len(episodes.views))
    rows, seen = Rows(findings, episodes.columns), dict[bytes, tuple[str, str]]()  # digest -> (episode, view)
    first: Episode | None = None
    called = functools.cache(lambda: names_of(episodes))  # only needed where an episode cannot be read
    for number, read in enumerate(_read_all(episodes, root, progress)):
        findings.looked_at["episodes"] += 1
        e = read.episode
        name = e.name if e is not None else called()[number] if called() else None
        for view, step, message in read.faults:
            text = f"{name or f'episode {number}'}: {message}"
            file = _file(e, view, message, root)
            findings.error("video" if view else "file", file, step, text, [name] if name else [])
        if e is None:
            continue
        findings.looked_at["rows"] += len(e)
        first = first or e
        _check(first, e, episodes, number, root, findings)
        audit.lengths[e.name] = len(e)
        for view, look in read.looks.items():
            audit.view(e.name, view, look, _file(e, view, "", root))
        for view, digest in read.digests.items():
            if read.looks[view].empty:
                continue  # a black picture is the same everywhere
            other = seen.setdefault(digest, (e.name, view))
            if other != (e.name, view):
                message = f"{name} has in view {view} the same pictures as {other[0]} in view {other[1]}"
                findings.error("duplicate", _file(e, view, "", root), None, message, [e.name])
        if e.action.shape[1] and len(e.state) == len(e.action):
            location = Location(e.name, _file(e, "", "", root))
            rows.add(location, e.state, e.action, e.origin)
            audit.rows(location, e.state, e.action, e.fps, joints=e.origin is None)
    rows.finish()
    audit.finish()


def _check(first: Episode, e: Episode, episodes: Episodes, number: int, root: Path, findings: Findings) -> None:
    file = _file(e, "", "", root)
    try:
        check_alike(first, e)
    except DataError as error:
        findings.error("units", file, None, str(error), [e.name])
    if len(e.state) != len(e.action) or len(e.text_of) != len(e.action):
        message = f"{e.name} has {len(e.state)} states, {len(e.action)} actions, {len(e.text_of)} instruction numbers"
        findings.error("row count", file, None, message, [e.name])
    if len(e) != episodes.lengths[number]:
        message = f"{e.name} has {len(e)} steps but its source announced {episodes.lengths[number]}"
        findings.error("row count", file, None, message, [e.name])
    if not len(e):
        findings.error("row count", file, None, f"{e.name} has no steps", [e.name])
    if not np.isfinite(e.fps) or e.fps <= 0:
        findings.error("frame rate", file, None, f"{e.name} has {e.fps} frames per second", [e.name])
    outside = np.flatnonzero((e.text_of < 0) | (e.text_of >= len(e.texts)))
    if len(outside):
        message = f"{e.name} has no instruction {e.text_of[outside[0]]} at step {outside[0]}"
        findings.error("instruction", file, outside[0], message, [e.name])
    if not all(text.strip() for text in e.texts):
        findings.error("instruction", file, None, f"{e.name} has an empty instruction", [e.name])
    for view, codes in e.codes.items():
        if len(codes) != -(-len(e) // e.stride):
            message = f"{e.name} has {len(codes)} frames of codes in view {view}, one per {e.stride} of {len(e)} steps"
            findings.error("frame count", file, None, message, [e.name])


def _read_all(episodes: Episodes, root: Path, progress: bool) -> Iterator[_Read]:
    with (
        progress_bar(total=len(episodes), desc=f"{root.name}: episodes", show=progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for start in range(0, len(episodes), _EPISODES):
            numbers = range(start, min(start + _EPISODES, len(episodes)))
            for read in pool.map(lambda n: _read(episodes, n), numbers):
                bar.update()
                yield read


def _read(episodes: Episodes, number: int) -> _Read:
    try:
        episode = episodes[number]
    except DataError as error:
        return _Read(None, [("", None, str(error))])
    read = _Read(episode)
    try:
        for view, frames in episode.views.items():
            faults, digest, look = decode(frames, len(episode))
            read.faults += [(view, step, message) for step, message in faults]
            if digest is not None:
                read.digests[view], read.looks[view] = digest, look
    finally:
        video.close_files()
        hdf5_files.close_files()
    return read


def decode(frames: Frames, length: int) -> tuple[list[tuple[int, str]], bytes | None, Look]:
    """Decodes all frames of a view: (faults, a digest of the pictures, None where no frame can be decoded, their look).

    A frame that cannot be decoded is a fault (step, message); of consecutive ones only the first.
    """
    digest, look = hashlib.blake2b(digest_size=16), Look(length)
    bad: list[int] = []
    faults: list[tuple[int, str]] = []
    for start in range(0, length, _FRAMES):
        steps = range(start, min(start + _FRAMES, length))
        try:
            pictures = frames.frames(steps)
            digest.update(pictures.data)
            for step, picture in zip(steps, pictures, strict=True):
                look.add(step, picture)
            continue
        except (DataError, IndexError):
            pass  # find the frames at fault one by one
        for step in steps:
            try:
                (picture,) = frames.frames([step])
                digest.update(picture.data)
                look.add(step, picture)
            except (DataError, IndexError) as error:
                if not bad or bad[-1] != step - 1:
                    faults.append((step, str(error)))
                bad.append(step)
    return faults, digest.digest() if len(bad) < length else None, look


def _file(episode: Episode | None, view: str, message: str, root: Path) -> Path:
    """The most specific file known to be at fault: the view's, the episode's, one in the message, or the source."""
    if episode is not None:
        views = [episode.views[view]] if view else episode.views.values()
        if paths := [files.place(frames.path) for frames in views if hasattr(frames, "path")]:
            return paths[0] if paths[0].exists() else root
        if (root / episode.name).is_file():
            return root / episode.name
    before = f"{bucket_cache.named(str(root))}/"
    _, found, rest = message.partition(before)
    name = re.split(r"[:;,]?(?:\s|$)", rest, maxsplit=1)[0]  # names of what is read here have no spaces
    return files.place(f"{before}{name}") if found and name else root
