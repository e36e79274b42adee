"""The checkpoints of a run: saved asynchronously, read back, restored; damaged ones are set aside (Orbax)."""

import contextlib
import functools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from rynnvla_jax.checkpoint import best as best_lib
from rynnvla_jax.checkpoint import model_dir, reader
from rynnvla_jax.checkpoint.best import Bests
from rynnvla_jax.checkpoint.reader import CheckpointError, step_folder, steps
from rynnvla_jax.config import (
    CheckpointConfig,
)
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed.mesh import path_string
from rynnvla_jax.errors import listing, shorten
from rynnvla_jax.storage import files

SYNC_STEPS = 10  # with several processes: steps between two exchanges of the save's outcome and the clock
FIRST_PAUSE, LONGEST_PAUSE = 5, 300  # seconds before a save that failed twice, or often, is made again
PAUSE = 2  # seconds after a failure: other writes of that save are still under way and would disturb the next
PATIENCE = 1800  # seconds that the first process waits for what the others read back


class Checkpointer:
    """The checkpoints of one work dir: asynchronous, committed atomically, verified after the save.

    A save copies the arrays to the host and returns; Orbax writes and commits in the background. Then a thread reads
    every array back from the disk and compares its fingerprint with the one the devices computed at the save. With
    several processes each reads its share and writes the sums into the step's folder; process 0 adds them up and marks
    the step or sets it aside. The other processes get its decision at the next collective call (`due` every SYNC_STEPS
    steps, `save`, `wait`, `latest`), so that all decide alike. Every method but `close` must be called by all processes
    at the same step.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: CheckpointConfig,
        items: dict[str, Any] | None = None,
        phase: Callable[[str], contextlib.AbstractContextManager] = lambda name: contextlib.nullcontext(),
        may_write: Callable[[], None] = lambda: None,
    ):
        """`items`: what every checkpoint stores beside the arrays, JSON by name: run (`provenance.py`), config. `phase`
        gets the name of what this process waits for: "save", "read-back" or "waiting to save again". `may_write` is
        called before each save, and does not return when another process writes there now."""
        self._directory = files.place(workdir).absolute()
        self._config, self._items, self._phase, self._may_write = config, items or {}, phase, may_write
        self._manager: ocp.CheckpointManager | None = None
        self._thread: threading.Thread | None = None
        self._committed = threading.Event()  # by Orbax, or it failed
        self._outcome: str | None = None  # of the last save, here: None while open, "" when good, else what went wrong
        self._failing_since = self._try_at = 0.0  # of process 0
        self._failures = 0  # in a row; like all below, the same on every process
        self._reason = ""  # of the last failure
        self._again = False  # the last save failed and was not repeated yet
        self._now = False  # it is to be repeated now
        self._given_up = False
        self._time_is_up = False
        self._saved_at = time.monotonic()
        self._saving = 0  # the step of the last save
        self._bests = Bests()

    def _orbax(self) -> ocp.CheckpointManager:
        """Orbax's manager, made on the first use and after a failure: it then sees what is on the disk."""
        if self._manager is None:
            kept: list[policies.PreservationPolicy] = [policies.LatestN(self._config.keep), self._bests]
            if self._config.keep_every:
                kept.append(policies.EveryNSteps(self._config.keep_every))
            self._manager = ocp.CheckpointManager(
                self._directory / "checkpoints",
                item_names=(*reader.ITEMS, *reader.JSON_ITEMS, "fingerprints"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policies.AnyPreservationPolicy(kept),
                    cleanup_tmp_directories=not self._failures,  # what a kill left half-written
                ),
            )
        return self._manager

    def _close_orbax(self) -> None:
        if self._manager is not None:
            for end in (self._manager.wait_until_finished, self._manager.close):
                with contextlib.suppress(Exception):  # of the last save, which was already printed: a full disk, say
                    end()
            self._manager = None

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved; the same answer on every process.

        Raises:
          CheckpointError: saves have failed for `patience_minutes`.
        """
        if jax.process_count() == 1 or step % SYNC_STEPS == 0:
            self._agree()
        if self._again:
            return self._now
        every = self._config.every_steps
        return self._time_is_up or (every > 0 and step % every == 0)

    def evaluated(self, step: int, values: dict[str, float]) -> bool:
        """Whether the metrics of held-out data make `step` the best one by `keep_best`: it is then to be saved now.

        The best before it is kept until the save of this one is known to be good.
        """
        if not self._config.keep_best:
            return False
        found = best_lib.evaluated(self._config.keep_best, step, values)
        if not _broadcast(found.beats(self._bests.best))[0]:
            return False
        self._bests.add(found)
        if jax.process_index() == 0:
            _say(f"step {step} is the best so far: {found.metric} {found.value:.5g}")
        return True

    def save(self, step: int, params: Any, train_state: Any, data: dict[str, Any]) -> None:
        """Starts saving `step`; returns when the arrays may be donated. A saved step is not changed, at most verified.

        Args:
          data: JSON: {"step": int, "skipped": [stream positions]}.

        Raises:
          CheckpointError: saves have failed for `patience_minutes`. A single failure is printed, and `due` asks for
            another after a while.
        """
        self._may_write()
        self._join()
        self._agree()
        self._again, self._time_is_up, self._saved_at = False, False, time.monotonic()
        self._committed.clear()
        self._saving = step
        tree = {"params": params, "train_state": train_state}
        try:
            if step not in self._orbax().all_steps():
                self._save(step, tree, data)
            elif not self._failures:
                return
        except Exception as error:  # disks, buckets and Orbax have a class of error each; all mean: not saved
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,), name="verify_checkpoint")
        self._thread.start()

    def _save(self, step: int, tree: dict[str, Any], data: dict[str, Any]) -> None:
        self._bests.limit({step, *self._orbax().all_steps()})  # an earlier save of one may have failed
        items = {"data": data | best_lib.to_json(self._bests.best), **self._items}
        known = fingerprints(tree) | {name: reader.json_fingerprint(item) for name, item in items.items()}
        self._orbax().save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(x, save_args=model_dir.chunked(x)) for name, x in tree.items()},
                fingerprints=ocp.args.JsonSave(known),
                **{name: ocp.args.JsonSave(item) for name, item in items.items()},
            ),
            force=True,  # `due` decides; Orbax by itself refuses a step that is not later than its newest
        )

    def wait(self) -> bool:
        """Waits until the last save is committed and verified. False: it failed, and must be repeated.

        Raises:
          CheckpointError: saves have failed for `patience_minutes`.
        """
        self._join()
        self._agree()
        return not self._failures

    def finish(self, step: int, params: Any, train_state: Any, data: dict[str, Any]) -> None:
        """Waits until the save of `step` is committed and verified, and repeats it until it is.

        Raises:
          CheckpointError: saves have failed for `patience_minutes`.
        """
        while not self.wait():
            with self._phase("waiting to save again"):
                time.sleep(_pause(self._failures))
            self.save(step, params, train_state, data)

    def latest(self) -> int | None:
        """The newest intact step; None when there is no step. Damaged ones are listed on stderr and set aside.

        A step that was not verified (the run was killed before that) is read back first. With several processes every
        step is, because a process that failed during a restore would leave the others waiting.

        Raises:
          CheckpointError: all steps are damaged.
        """
        self._join()
        self._agree()
        alone = jax.process_count() == 1
        while True:
            newest = (steps(self._directory) or [-1])[-1]
            if jax.process_index() == 0:
                for stray in reader.strays(self._directory):
                    _say(f"{stray} is a file, not a checkpoint, and was moved to {reader.set_aside(stray)}")
                if newest >= 0:
                    self._clear_reports(newest)
                if self._take_copied():
                    newest = (steps(self._directory) or [-1])[-1]
            (newest,) = _broadcast(newest)
            if newest < 0:
                break
            marked = alone and self._sound_outline(step_folder(self._directory, newest))
            if _broadcast(marked or not self._verify(newest))[0]:
                return newest
            self._close_orbax()
        bad = reader.damaged(self._directory)
        if _broadcast(bool(bad))[0]:
            raise CheckpointError(
                f"every checkpoint of {self._directory} is damaged: {', '.join(map(str, bad))}. "
                "Restore one from a copy to checkpoints/<step>. To start again from step 0, use another --workdir"
            )
        self._bests.restart(None)
        return None

    def _take_copied(self) -> bool:
        """Reads back the steps that were copied into a bucket, and makes them steps for Orbax or sets them aside.

        Returns:
          Whether there were any.
        """
        found = reader.copied(self._directory)
        for folder in found:
            if problems := reader.verify(folder):
                _say(f"{folder} was copied with faults: {listing(problems, 8, '; ')}; see {reader.set_aside(folder)}")
            else:
                reader.commit(folder)
        return bool(found)

    def _sound_outline(self, folder: Path) -> bool:
        """Whether a step is marked as verified and nothing that shows without reading arrays has changed since."""
        try:
            return reader.is_marked(folder) and not reader.outline(folder)
        except CheckpointError:
            return False

    def restore(self, step: int, params: Any, train_state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restores a run onto the shardings of the abstract trees, whatever mesh it was saved from.

        The restored arrays must have the fingerprints of the save. If they do not, because the disk changed after the
        verification, the newest intact step is restored instead: use `data["step"]`.

        Returns:
          (params, train_state, data item).

        Raises:
          CheckpointError: the step does not fit the model, or cannot be read.
        """
        while True:
            items, reason = self._read(step, params, train_state)
            if not reason:
                self._continue_best(step, items.data)
                return items.params, items.train_state, items.data
            del items  # its memory is needed for the next attempt
            # Without its mark `latest` reads the step back, and sets it aside if the disk has changed.
            reader.unmark(step_folder(self._directory, step))
            broken = f"step {step} of {self._directory} cannot be restored: {reason}"
            if jax.process_count() > 1:  # perhaps only here
                raise CheckpointError(f"{broken}. The same command tries again")
            newest = self.latest()
            if newest is None or newest == step:
                raise CheckpointError(f"{broken}. The files on disk are intact; check that there is enough memory")
            step = newest

    def _continue_best(self, step: int, data: dict[str, Any]) -> None:
        """Takes over the best step that the `data` item of `step` names, where it is there and of the same metric."""
        found, metric = best_lib.stored(data), self._config.keep_best
        self._bests.restart(None)
        if found is None or not metric:
            return
        if found.metric != metric:
            reason = f"it is so by {found.metric}, and checkpoint.keep_best is {metric} now"
        elif not _broadcast(found.step in steps(self._directory))[0]:
            reason = f"it is not in {self._directory / 'checkpoints'} any more"
        else:
            self._bests.restart(found)
            return
        if jax.process_index() == 0:
            _say(f"step {found.step} is not kept as the best one: {reason}; the best one after step {step} will be")

    def close(self) -> None:
        """Waits for this process's background work; not a collective call."""
        self._join()
        self._close_orbax()

    def _read(self, step: int, params: Any, train_state: Any) -> tuple[Any, str]:
        """Restores a step. Returns (items, what went wrong)."""
        tree = {"params": params, "train_state": train_state}
        try:
            shapes = {path: a.shape for path, a in reader.open_step(step_folder(self._directory, step)).items()}
        except (CheckpointError, ValueError, OSError) as error:
            return None, shorten(error)
        model_dir.check_tree(shapes, tree, self._directory)
        try:
            items = self._orbax().restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    train_state=ocp.args.StandardRestore(train_state),
                    data=ocp.args.JsonRestore(),
                ),
            )
            expected = reader.read_json(step_folder(self._directory, step), "fingerprints")
        except Exception as error:  # of any class, see save
            return None, f"{type(error).__name__}: {shorten(error)}"
        if expected is None:  # saved by an older version
            return items, ""
        found = fingerprints({"params": items.params, "train_state": items.train_state})
        if wrong := sorted(name for name in found if found[name] != expected.get(name)):
            return None, f"values differ from those that were saved in {', '.join(wrong)}"
        return items, ""

    def _finish(self, step: int) -> None:
        """In the background: waits for the commit, then verifies."""
        try:
            self._orbax().wait_until_finished()
            self._committed.set()
            problems = self._verify(step)
        except Exception as error:
            self._fail(step, error)
            return
        if problems:
            self._fail(step, CheckpointError("it was written, but reading it back gave different values"))
        else:
            self._outcome = ""

    def _verify(self, step: int) -> list[str]:
        """Reads back this process's share. Process 0 then marks the step, or sets it aside and prints why.

        Returns:
          The problems found; always empty on other processes.

        Raises:
          TimeoutError: a process did not report.
        """
        folder = step_folder(self._directory, step)
        part, parts = jax.process_index(), jax.process_count()
        _await(folder / reader.COMMIT if files.is_bucket(folder) else folder)
        report = reader.read_back(folder, part, parts)
        if part:
            files.write_text(folder / f"read_back.{part}.json", json.dumps(report))
            return []
        others = [folder / f"read_back.{p}.json" for p in range(1, parts)]
        problems = reader.judge(folder, [report, *(files.read_json(_await(path)) for path in others)])
        self._clear_reports(step)
        if problems:
            target = reader.set_aside(folder)
            _say(f"checkpoint {step} is damaged and was moved to {target}: {listing(problems, 8, '; ')}")
        elif reader.read_json(folder, "fingerprints") is not None:
            reader.mark(folder)
        return problems

    def _clear_reports(self, step: int) -> None:
        for path in step_folder(self._directory, step).iterdir():  # not glob: a work dir's name may have brackets
            if path.name.startswith("read_back."):
                path.unlink()

    def _remove_unfinished(self) -> None:
        """Deletes incomplete files after a failure; what cannot be deleted now is deleted at the next start."""
        time.sleep(PAUSE)
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                for path in reader.unfinished(self._directory):
                    files.remove(path)

    def _fail(self, step: int, error: Exception) -> None:
        self._committed.set()
        text = (
            f"saving step {step} in {self._directory / 'checkpoints'} failed ({self._failures + 1} in a row): "
            f"{type(error).__name__}: {shorten(error)}"
        )
        self._outcome = text
        _say(text)

    def _join(self) -> None:
        if self._thread is None:
            return
        if self._thread.is_alive():
            with self._phase("save"):
                self._committed.wait()
            with self._phase("read-back"):
                self._thread.join()
        self._thread = None

    def _agree(self) -> None:
        """Receives the outcome of the last save and the clock from process 0.

        Raises:
          CheckpointError: saves have failed for `patience_minutes`.
        """
        outcome, now = self._outcome, time.monotonic()
        if outcome:
            self._failing_since = self._failing_since if self._failures else now
            self._try_at = now + _pause(self._failures + 1)
        time_is_up = 0 < self._config.every_minutes <= (now - self._saved_at) / 60
        given_up = bool(outcome) and now - self._failing_since >= 60 * self._config.patience_minutes
        values = outcome is not None, bool(outcome), time_is_up, now >= self._try_at, given_up
        known, failed, self._time_is_up, self._now, given_up = map(bool, _broadcast(*values))
        if known:
            self._join()  # short: process 0 already has the reports of all others
            self._reason, self._outcome = self._outcome or "see the output of process 0", None
            self._failures = self._failures + 1 if failed else 0
            self._again = failed
            self._bests.saved(self._saving, good=not failed)
            if failed:
                self._close_orbax()
                self._remove_unfinished()
        self._given_up |= given_up
        if self._given_up:
            good = [s for s in steps(self._directory) if reader.is_marked(step_folder(self._directory, s))]
            raise CheckpointError(
                f"{self._failures} saves in a row failed, for checkpoint.patience_minutes "
                f"{self._config.patience_minutes:g}; the last: {self._reason}. The last good step is "
                f"{good[-1] if good else 'none'}. See that the directory is writable and has space; the same command "
                "continues"
            )


def _pause(failures: int) -> float:
    """Seconds before the next save after so many failures in a row: none, 5, 10, 20 and so on."""
    return 0.0 if failures < 2 else min(FIRST_PAUSE * 2.0 ** (failures - 2), LONGEST_PAUSE)


def _broadcast(*values: int | bool) -> list[int]:
    """The values of process 0. With several processes it waits for the devices; with one it costs nothing."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist()


def _await(path: Path) -> Path:
    """Waits until another process, perhaps on another machine, has written `path`."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError(f"{path} did not appear within {PATIENCE // 60} minutes")
        time.sleep(1.0 if files.is_bucket(path) else 0.1)
    return path


def _say(text: str) -> None:
    process = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    with contextlib.suppress(OSError):  # stderr may be a file on the disk that is full
        print(f"{process}{text}", file=sys.stderr, flush=True)


def fingerprints(tree: Any) -> dict[str, int]:
    """Fingerprint of every array by dotted path, computed where the shards are; equals that of `reader`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sharding = leaves[0][1].sharding
    everywhere = mesh_lib.replicated(sharding.mesh) if isinstance(sharding, jax.sharding.NamedSharding) else None
    values = _fingerprint_program(everywhere)([x for _, x in leaves])
    return dict(zip([path_string(path) for path, _ in leaves], np.asarray(values).tolist(), strict=True))


@functools.cache
def _fingerprint_program(everywhere: jax.sharding.Sharding | None):
    return jax.jit(lambda arrays: jnp.stack([_fingerprint(x) for x in arrays]), out_shardings=everywhere)


@jax.jit  # so that arrays of one shape are traced once
def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32 scalar of one array; see `reader`."""
    x = jax.device_put(x, jax.memory.Space.Device)  # moments may wait on the host
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, jnp.uint32 if size == 8 else f"uint{8 * size}").astype(jnp.uint32)
    for axis, n in enumerate(words.shape):
        bits = reader.position_bits(jnp.arange(n, dtype=jnp.uint32), axis)
        words = words + bits.reshape([-1 if k == axis else 1 for k in range(words.ndim)])
    hashed = reader.scramble(words).reshape(1) if words.ndim == 0 else reader.scramble(words)
    # In two sums: XLA's CPU back end is three times as fast with them.
    return jnp.sum(jnp.sum(hashed, axis=-1, dtype=jnp.uint32), dtype=jnp.uint32)
