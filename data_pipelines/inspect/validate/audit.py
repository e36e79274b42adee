"""Warnings about data that can be read and are probably not what was meant, for every source.

Pictures: black, of a single colour, frozen while something moves, every frame twice, two cameras that are the same or
swapped. Rows: nothing moves, actions that repeat the state, angles that wrap, quaternions that change sign. Episodes
too short for a stage. Only what is clear is reported; `rows.py` and `videos.py` find what is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipelines.columns import FILE
from data_pipelines.inspect.validate.findings import Findings
from data_pipelines.inspect.validate.pictures import Look, alike
from data_pipelines.inspect.validate.rows import Location
from rynnvla_jax.columns import ActionColumn, Column, Columns, labels
from rynnvla_jax.config import DataConfig, TrainConfig
from rynnvla_jax.errors import listing
from rynnvla_jax.stage import STAGES, start_counts

_POINTS = 16  # of an episode's path, by which motion during a frozen picture is told
_MOTION = 0.2  # share of a column's range over the data set that is a motion
_FROZEN = 0.5  # share of an episode without a change of the picture
_IDLE = 0.005  # share of a column's range, within 0.2 s, below which it rests
_IDLE_MOST = 0.5, 0.9  # share of the steps, of the data set and of an episode, that is worth a warning
_EQUAL = 0.99  # share of the steps at which an action repeats the state
_WRAP_RADIANS, _WRAP_DEGREES = 0.4, 20.0  # that a joint may turn in the step in which it wraps
_WIDEST = {"radians": 2 * np.pi + 0.5, "degrees": 380.0}  # values of an angle that wraps
_UNIT_NORM = 0.02
_WRAPS = ("euler", "quaternion", "rotation_vector")  # kinds of which no jump is learnt
_FEW_TO_COMPARE = 3  # episodes from which the usual picture of a camera is known


@dataclass
class _Jumps:
    """Steps of one kind at one column: how many, and where the first is."""

    count: int = 0
    where: tuple[Location, int, float] | None = None


@dataclass
class _View:
    """Of one camera in one episode: its place, and what it looks like; `mean`, `copies` only beside another camera."""

    file: Path | str
    first: int
    still: tuple[int, int]
    count: int
    empty: bool
    mean: np.ndarray | None
    copies: list[np.ndarray]


@dataclass
class Audit:
    """Takes rows and pictures of the episodes in any order, holds a few numbers of each, and reports in `finish`.

    `whole` is the file or folder that findings about all data name; `cameras` is their number in an episode.
    """

    findings: Findings
    columns: Columns
    whole: Path
    config: DataConfig
    cameras: int
    lengths: dict[str, int] = field(default_factory=dict)
    acts: bool = False
    idle_steps: int = 0
    steps: int = 0
    _low: dict[str, np.ndarray] = field(default_factory=dict)
    _high: dict[str, np.ndarray] = field(default_factory=dict)
    _paths: dict[str, np.ndarray] = field(default_factory=dict)
    _idle: list[tuple[Location, float]] = field(default_factory=list)
    _compared: int = 0
    _equal: np.ndarray | None = None
    _moved: np.ndarray | None = None
    _wraps: dict[tuple[str, int, str], _Jumps] = field(default_factory=dict)
    _norms: dict[str, np.ndarray] = field(default_factory=dict)
    _flips: dict[tuple[str, int], _Jumps] = field(default_factory=dict)
    _views: dict[str, dict[str, _View]] = field(default_factory=dict)

    # --- rows --------------------------------------------------------------------------------------------------------

    def rows(self, location: Location, state: np.ndarray, action: np.ndarray, fps: float, joints: bool = True) -> None:
        """state [N, S], action [N, A] of one episode, finite. `joints`: an action is a target of the state's columns;
        otherwise (positions in a frame of the episode's own) only the state is looked at."""
        self.acts = True
        if not len(action) or not np.isfinite(state).all() or not np.isfinite(action).all():
            return
        groups = {"state": state} if state.shape[1] else {}
        if joints:
            groups["action"] = action
        for what, values in groups.items():
            self._range(what, values)
            self._jumps(what, values.astype(np.float64), location)
        what = "state" if state.shape[1] else "action"
        if what in groups:
            self._rest(what, groups[what], location, fps)
        if joints and (relative := list(self.columns.relative)):
            origin = self.columns.origin(state)
            equal, moved = np.zeros(action.shape, bool), np.ptp(origin, axis=0) > 0
            near = np.abs(origin - action) <= 1e-6 * np.maximum(np.abs(origin), 1.0)
            equal[:, relative] = near[:, relative]
            if self._equal is None:
                self._equal, self._moved = np.zeros(action.shape[1], np.int64), np.zeros(action.shape[1], bool)
            self._equal += equal.sum(0)
            self._moved |= moved
            self._compared += len(state)

    def _range(self, what: str, values: np.ndarray) -> None:
        low, high = values.min(0), values.max(0)
        self._low[what] = np.minimum(self._low[what], low) if what in self._low else low
        self._high[what] = np.maximum(self._high[what], high) if what in self._high else high

    def _rest(self, what: str, values: np.ndarray, location: Location, fps: float) -> None:
        """Counts steps at which no column moves, by the range so far."""
        span = np.maximum(self._high[what] - self._low[what], 1e-9)
        within = max(1, round(fps / 5)) if 0 < fps < 1e4 else 1  # another rate is an error, reported elsewhere
        self._paths[location.episode] = values[np.linspace(0, len(values) - 1, _POINTS).round().astype(int)]
        if len(values) <= within:
            return
        resting = (np.abs(values[within:] - values[:-within]) < _IDLE * span).all(1)
        idle = int(resting.sum())
        self.idle_steps, self.steps = self.idle_steps + idle, self.steps + len(resting)
        self._idle.append((location, idle / len(resting)))

    def _jumps(self, what: str, values: np.ndarray, location: Location) -> None:
        steps = np.diff(values, axis=0)
        columns: Sequence[Column] = self.columns.state if what == "state" else self.columns.action
        handled = np.array([_handled(column) for column in columns], bool)
        for kind, turn, slack in (("radians", 2 * np.pi, _WRAP_RADIANS), ("degrees", 360.0, _WRAP_DEGREES)):
            before, after = values[:-1], values[1:]
            # From one end of the range to the other: of -pi .. pi, or of 0 .. 2 pi.
            ends = (np.abs(np.abs(before) - turn / 2) < slack) & (np.abs(np.abs(after) - turn / 2) < slack)
            ends |= (np.minimum(before, after) > -slack) & (np.minimum(before, after) < slack)
            found = (np.abs(np.abs(steps) - turn) < slack) & ends & ~handled
            for column in np.flatnonzero(found.any(0)).tolist():
                at = int(np.argmax(found[:, column]))
                jumps = self._wraps.setdefault((what, column, kind), _Jumps())
                jumps.count += int(found[:, column].sum())
                jumps.where = jumps.where or (location, at + 1, float(steps[at, column]))
        if values.shape[1] < 4:
            return
        windows = np.lib.stride_tricks.sliding_window_view(values, 4, axis=1)  # [N, A - 3, 4]
        unit = (np.abs(np.square(windows).sum(2) - 1) < _UNIT_NORM).all(0)
        self._norms[what] = self._norms[what] & unit if what in self._norms else unit
        flips = np.einsum("nqi,nqi->nq", windows[:-1], windows[1:]) < -0.9
        learnt = ~np.lib.stride_tricks.sliding_window_view(handled, 4).all(1)
        for column in np.flatnonzero(unit & learnt & flips.any(0)).tolist():
            at = int(np.argmax(flips[:, column]))
            jumps = self._flips.setdefault((what, column), _Jumps())
            jumps.count += int(flips[:, column].sum())
            jumps.where = jumps.where or (location, at + 1, 0.0)

    # --- pictures ----------------------------------------------------------------------------------------------------

    def view(self, episode: str, view: str, look: Look, file: Path | str, first: int = 0) -> None:
        """The pictures of one camera in one episode, which begin at frame `first` of `file`."""
        if episode in self.findings.left_out or look.seen < 2:
            return
        where = f"{episode}, camera {view}"
        if look.black >= 0.9 * look.seen:
            message = (
                f"{where}: {_share(look.black, look.seen)} of the pictures are black; was the camera covered or off?"
            )
            self.findings.warn("picture", file, first, message, [episode])
        elif look.empty:
            message = f"{where}: {_share(look.flat, look.seen)} of the pictures have a single colour"
            self.findings.warn("picture", file, first, message, [episode])
        elif (times := look.repeats()) > 1:
            message = f"{where}: every picture occurs {times} times in a row; the camera was {times} times slower"
            self.findings.warn("repeated pictures", file, first, message, [episode])
        several = self.cameras > 1
        kept = _View(
            file,
            first,
            look.still,
            look.seen,
            look.empty,
            look.mean.astype(np.float16) if several else None,
            look.copies if several else [],
        )
        others = self._views.setdefault(episode, {})
        for name, other in others.items():
            if not kept.empty and not other.empty and alike(kept.copies, other.copies):
                message = f"{episode}: the cameras {name} and {view} show the same pictures"
                self.findings.warn("camera", file, first, message, [episode])
        others[view] = kept
        if len(others) == self.cameras:
            for each in others.values():
                each.copies = []

    # --- all ---------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Compares every episode with the whole data set."""
        for episode, views in self._views.items():
            for view, kept in views.items():
                if not kept.empty and not kept.still[1] < max(_FROZEN * kept.count, 10):
                    self._frozen(episode, view, kept)
        self._swapped()
        self._moving()
        self._short()

    def _frozen(self, episode: str, view: str, kept: _View) -> None:
        start, number = kept.still
        path, what = self._paths.get(episode), "state" if "state" in self._low else "action"
        during = ""
        if path is not None:
            points = np.linspace(0, kept.count - 1, _POINTS)
            inside = path[(points >= start) & (points < start + number)]
            span = self._high[what] - self._low[what]
            moved = np.ptp(inside, axis=0) > _MOTION * span if len(inside) > 1 else np.zeros(len(span), bool)
            moved &= span > 0
            if not moved.any():
                return
            during = f" while the {what} of {self._which(what, moved)} moves"
        elif number < 0.9 * kept.count:
            return
        message = f"{episode}, camera {view}: the picture does not change for {number} of {kept.count} frames{during}"
        self.findings.warn("picture", kept.file, kept.first + start, message, [episode])

    def _swapped(self) -> None:
        pairs = {tuple(sorted(views)) for views in self._views.values() if len(views) > 1}
        for a, b in {(a, b) for names in pairs for i, a in enumerate(names) for b in names[i + 1 :]}:
            both = {
                e: [np.asarray(v[name].mean, np.float32) for name in (a, b)]
                for e, v in self._views.items()
                if a in v and b in v and not v[a].empty and not v[b].empty
            }
            if len(both) < _FEW_TO_COMPARE:
                continue
            usual = [np.median([pair[i] for pair in both.values()], axis=0) for i in (0, 1)]
            between = _distance(usual[0], usual[1])
            own = {e: (_distance(p, usual[0]) + _distance(q, usual[1])) / 2 for e, (p, q) in both.items()}
            if np.median(list(own.values())) > 0.45 * between:
                continue  # the cameras do not look so different that a swap could be told
            for episode, (p, q) in both.items():
                other = (_distance(p, usual[1]) + _distance(q, usual[0])) / 2
                if other < 0.6 * min(between, own[episode]):
                    message = f"{episode}: the cameras {a} and {b} look swapped, compared with the other episodes"
                    view = self._views[episode][a]
                    self.findings.warn("camera", view.file, view.first, message, [episode])

    def _moving(self) -> None:
        if self._equal is not None and self._moved is not None and self._moved.any():
            same = self._moved & (self._equal >= _EQUAL * self._compared)
            # A gripper alone may be recorded as it was commanded.
            if same.sum() > self._moved.sum() / 2:
                message = (
                    f"action of {self._which('action', same)} equals the state of the same step: the recording has no "
                    "commands, so a policy would learn to stay where it is; record the commanded positions, or the "
                    "next state"
                )
                self.findings.warn("action", self.whole, None, message)
        for (what, column, kind), jumps in self._wraps.items():
            assert jumps.where is not None  # set with the first
            if max(abs(self._low[what][column]), abs(self._high[what][column])) > _WIDEST[kind]:
                continue  # a motion of a column in another unit
            location, at, size = jumps.where
            where = f"{location.episode}: {what} of {self._name(what, column)} jumps by {size:.4g} at step {at}"
            # The columns of a rotation vector wrap together, when it reaches half a turn.
            kinds = f"it is an euler angle in {kind} (kind euler; three of axis times angle: rotation_vector)"
            message = (
                f"{where}, a whole turn in {kind} ({jumps.count} times in all episodes), which is learnt as a motion; "
                f"{self._remedy(what, column, kinds)}, or unwrap it"
            )
            self.findings.warn("angle", location.file, location.first + at, message, [location.episode])
        for (what, column), jumps in self._flips.items():
            if not self._norms[what][column]:
                continue  # these four columns are no quaternion: not of unit length everywhere
            assert jumps.where is not None
            location, at, _ = jumps.where
            message = (
                f"{location.episode}: the quaternion in {what} columns {column} to {column + 3} changes its sign at "
                f"step {at} ({jumps.count} times in all episodes), which is learnt as a motion; "
                f"{self._remedy(what, column, 'they are a quaternion')}, or keep the sign of the step before"
            )
            self.findings.warn("angle", location.file, location.first + at, message, [location.episode])
        if self.steps:
            share = self.idle_steps / self.steps
            self.findings.figures["idle share"] = round(share, 4)
            if share >= _IDLE_MOST[0]:
                message = f"nothing moves in {share:.0%} of all steps; cut the pauses"
                self.findings.warn("idle", self.whole, None, message)
            for location, part in self._idle:
                if part >= max(_IDLE_MOST[1], 1.5 * share):
                    message = f"{location.episode}: nothing moves in {part:.0%} of its steps"
                    self.findings.warn("idle", location.file, location.first, message, [location.episode])

    def _short(self) -> None:
        needs: dict[int, list[str]] = {}
        lengths = np.array(list(self.lengths.values()), np.int64)
        for name, stage in STAGES.items():
            if stage.single_frames or (stage.actions and not self.acts):
                continue
            span, after = stage.window(TrainConfig(stage=name, data=self.config), published=True)
            if (start_counts(lengths, span, after) == 0).any():
                needs.setdefault(span + after, []).append(name)
        before: set[str] = set()
        for needed, stages in sorted(needs.items()):
            short = {name: n for name, n in self.lengths.items() if 0 < n < needed and name not in before}
            before |= short.keys()
            if not short:
                continue
            first = next(iter(short))
            where = f"{listing(list(short), 3)} ({short[first]} steps)" if len(short) == 1 else listing(list(short), 3)
            message = (
                f"{where}: stage {' and '.join(stages)} needs {needed} steps with data.chunk={self.config.chunk} and "
                f"the default frames, so {len(short)} of {len(self.lengths)} episodes give no example there; record "
                "longer ones, or set a smaller data.chunk"
            )
            self.findings.warn("short", self.whole, None, message, list(short))

    def _which(self, what: str, mask: np.ndarray) -> str:
        return listing([self._name(what, c) for c in np.flatnonzero(mask).tolist()], 8)

    def _name(self, what: str, column: int) -> str:
        name = labels(self.columns.state if what == "state" else self.columns.action)[column]
        return f"column {name}" if name.isdigit() else name

    def _remedy(self, what: str, column: int, meaning: str) -> str:
        if what == "action" and self.columns.action[column].kind in _WRAPS:  # and not handled: it has no pair
            return f"pair it in {FILE} beside {self._where()} with the state that it is a target of"
        return f"say in {FILE} beside {self._where()} that {meaning}, in state and action"

    def _where(self) -> str:
        """Where the file of columns is read; beside a corpus, which holds its columns, it is refused."""
        corpus = (self.whole / "corpus.json").exists()
        return "the data that this corpus is made from, and make it again," if corpus else "the data set"


def _handled(column: Column) -> bool:
    """Whether training knows that this column wraps: an action is unwrapped along a path from its state."""
    return column.kind in _WRAPS and not (isinstance(column, ActionColumn) and column.pair is None)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).mean())


def check_pairs(path: Path, columns: Columns, findings: Findings) -> None:
    """Warns when state and action are equally wide, and no action finds its state by name."""
    kept = all(c.delta or c.kind == "gripper" for c in columns.action)
    if len(columns.state) != len(columns.action) or columns.relative or kept:
        return
    state, action = (listing(labels(c), 3) for c in (columns.state, columns.action))
    message = (
        f"state ({state}) and action ({action}) have columns of other names, so all actions are kept as recorded; if "
        f"they are absolute targets of the state's columns, pair them in {FILE} beside the data set"
    )
    findings.warn("column", path, None, message)


def _share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{part} of {whole}"
