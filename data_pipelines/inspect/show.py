"""One HTML page that shows frames, states and actions of some episodes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.inspect import figures
from data_pipelines.inspect.summary import duration, histogram, rates
from data_pipelines.sources import open_source
from rynnvla_jax.columns import describe, labels
from rynnvla_jax.config import ConfigError, DataConfig
from rynnvla_jax.pages import templates
from rynnvla_jax.progress import progress_bar

_STRIP = 8  # frames of an episode
_READ = 500  # episodes whose instructions are counted; more are sampled evenly
_TEXTS = 25  # instructions listed


@dataclass(frozen=True)
class _Strip:
    """A view's pictures as `data:` addresses, each with its time in seconds."""

    view: str
    pictures: list[tuple[str, str]]


@dataclass(frozen=True)
class _Section:
    """One episode on the page. `problem` says why it has no pictures."""

    name: str
    facts: str
    texts: list[tuple[str, str]]  # (instruction, steps it holds for)
    strips: list[_Strip]
    curves: str
    problem: str


def why_no_pictures(source: str, config: DataConfig) -> str | None:
    """The error of opening the source with its front camera; None when it has one."""
    try:
        open_source(source, config, ("front",), progress=False)
    except ConfigError as error:
        return str(error)
    return None


def page(source: str, episodes: Episodes, count: int, progress: bool = True) -> tuple[str, list[str]]:
    """(the page, messages about what could not be shown). Shows `count` episodes; reads more for the instructions."""
    names = labels(episodes.columns.action)
    bar = progress_bar(_spread(len(episodes), count), desc=f"{source}: page", show=progress)
    sections = [_section(episodes, number, names) for number in bar]
    read, texts, fps = _instructions(episodes)
    counts, edges = histogram(np.asarray(episodes.lengths))
    html = templates.render(
        Path(__file__).with_name("show.html"),
        source=source,
        tiles=_tiles(episodes, fps),
        lengths=figures.lengths(counts, edges, fps),
        texts=texts[:_TEXTS],
        more_texts=len(texts) - _TEXTS,
        read=read if read < len(episodes) else 0,
        total=len(episodes),
        sections=sections,
    )
    return html, [s.problem for s in sections if s.problem]


def _spread(total: int, count: int) -> list[int]:
    """At most `count` numbers below `total`, evenly, the first and last among them."""
    return np.unique(np.linspace(0, total - 1, min(total, max(count, 1))).round().astype(int)).tolist()


def _instructions(episodes: Episodes) -> tuple[int, list[tuple[str, int, int]], list[float]]:
    """(episodes read, (instruction, episodes, steps) by frequency, frame rates); unreadable ones are not counted."""
    rows: dict[str, list[int]] = {}
    fps, read = set(), 0
    for number in _spread(len(episodes), _READ):
        try:
            e = episodes[number]
        except DataError:
            continue  # `validate` names it; the count on the page says how many were read
        read += 1
        fps.add(round(e.fps, 3))
        for i, steps in zip(*np.unique(e.text_of, return_counts=True), strict=True):
            row = rows.setdefault(e.texts[i], [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + int(steps)
    return read, sorted(((t, n, steps) for t, (n, steps) in rows.items()), key=lambda r: (-r[1], r[0])), sorted(fps)


def _tiles(episodes: Episodes, fps: Sequence[float]) -> list[tuple[str, str]]:
    sizes = ", ".join(f"{w} x {h}" for h, w in sorted(episodes.frame_sizes))
    tiles = [
        (f"{len(episodes):,}", "episodes"),
        (f"{int(np.sum(episodes.lengths)):,}", "steps"),
        (duration(episodes.seconds), f"at {rates(fps)}"),
        (f"{np.min(episodes.lengths)} .. {np.max(episodes.lengths)}", f"steps, median {np.median(episodes.lengths):g}"),
    ]
    if episodes.views:
        tiles.append((", ".join(episodes.views), f"{sizes} pixels" if sizes else "views"))
    if episodes.action_width:
        tiles.append((f"{episodes.action_width}", f"action columns: {describe(episodes.columns.action)}"))
    return tiles


def _section(episodes: Episodes, number: int, names: Sequence[str]) -> _Section:
    try:
        e = episodes[number]
    except DataError as error:
        return _Section(f"episode {number}", "", [], [], "", str(error))
    strips, problem = [], ""
    for view in (*e.views, *e.codes):
        try:
            strips.append(_strip(e, view))
        except DataError as error:
            problem = str(error)
    return _Section(
        name=e.name,
        facts=f"{len(e):,} steps, {duration(len(e) / e.fps)} at {e.fps:g} fps",
        texts=[(text, _when(e, i)) for i, text in enumerate(e.texts)],
        strips=strips,
        curves=figures.curves(e, names) if e.action.shape[1] else "",
        problem=problem,
    )


def _strip(e: Episode, view: str) -> _Strip:
    if view in e.codes:
        numbers = _spread(len(e.codes[view]), _STRIP)
        pictures = [figures.codes(e.codes[view][i]) for i in numbers]
        steps = [i * e.stride for i in numbers]
    else:
        steps = _spread(len(e), _STRIP)
        pictures = [figures.frame(pixels) for pixels in e.frames(view, steps)]
    label = f"{view}, VQ codes" if view in e.codes else view
    return _Strip(label, [(p, f"{step / e.fps:.1f} s") for p, step in zip(pictures, steps, strict=True)])


def _when(e: Episode, text: int) -> str:
    if len(e.texts) == 1:
        return ""
    steps = np.flatnonzero(e.text_of == text)
    return f"steps {steps[0]} to {steps[-1]}" if len(steps) else "not used at any step"
