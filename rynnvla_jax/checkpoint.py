"""Model directories and a run's checkpoints: parameters, training state and data position apart, and assets.

    DIR/assets/model.json       {"kind": "vla" | "action_vae" | "vqgan", "config": {...}}
    DIR/assets/config.json      the resolved TrainConfig (trained directories), and run.json: see identity.py
    DIR/assets/statistics.json  DIR/assets/tokenizer.json
    DIR/assets/vqgan/           DIR/assets/action_vae/      model directories of the frozen models
    DIR/checkpoints/<step>/     see stored.py; imports and frozen models have `params` only

A training work dir, an imported model and a frozen model inside `assets` all have this shape.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rynnvla_jax import sharding, stored
from rynnvla_jax.config import (
    ActionVAEConfig,
    CheckpointConfig,
    VLAConfig,
    VQGANConfig,
    from_dict,
    to_dict,
)
from rynnvla_jax.sharding import path_string
from rynnvla_jax.stored import CheckpointError, find_step, step_folder, steps, write_text

CHUNK_BYTES = 32 * 2**20
MODEL_CONFIGS = {"vla": VLAConfig, "action_vae": ActionVAEConfig, "vqgan": VQGANConfig}
SYNC_STEPS = 10  # several processes agree on what happened, and on the clock, every so many steps
PAUSE = 2  # seconds after a failure: other writes of that save are still under way and would disturb the next
PATIENCE = 1800  # seconds that the first process waits for what the others read back


class Checkpointer:
    """The checkpoints of one work dir: asynchronous, committed atomically, verified after the save.

    A save copies the arrays to the host and returns; Orbax writes and commits in the background. Then a thread reads
    every array back from the disk and compares its fingerprint with the one the devices computed at the save. With
    several processes each reads its share and leaves the sums beside the step; the first process adds them up, marks
    the step or sets it aside, and the others learn of it when all of them ask (`due` every SYNC_STEPS steps, `save`,
    `wait`, `latest`): its word alone decides, so that all take the same way. Every method but `close` must be called
    by all processes at the same step.
    """

    def __init__(self, workdir: epath.PathLike, config: CheckpointConfig, run: dict[str, Any] | None = None):
        """`run` (JSON): what every checkpoint keeps of the run that saves it; see `identity`."""
        self._directory = epath.Path(workdir).absolute()
        self._config, self._run = config, run
        self._manager: ocp.CheckpointManager | None = None
        self._thread: threading.Thread | None = None
        self._outcome: str | None = None  # of the last save, here: None while open, "" when good, else what went wrong
        self._failures = 0  # in a row; like all below, the same on every process
        self._reason = ""  # of the last failure
        self._again = False  # the last save failed and was not repeated yet
        self._time_is_up = False
        self._saved_at = time.monotonic()

    def _orbax(self) -> ocp.CheckpointManager:
        """Orbax's manager, made on the first use and after a failure: it then sees what is on the disk."""
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self._directory / "checkpoints",
                item_names=(*stored.ITEMS, "data", "fingerprints", "run"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._config.keep,
                    keep_period=self._config.keep_every or None,
                    cleanup_tmp_directories=not self._failures,  # what a kill left half-written
                ),
            )
        return self._manager

    def _close_orbax(self) -> None:
        if self._manager is not None:
            with contextlib.suppress(Exception):  # an error of the last save, which was said when it happened
                self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved; the same answer on every process.

        Raises:
          CheckpointError: the last `retries` saves all failed.
        """
        if jax.process_count() == 1 or step % SYNC_STEPS == 0:
            self._agree()
        every = self._config.every_steps
        return self._again or self._time_is_up or (every > 0 and step % every == 0)

    def save(self, step: int, params: Any, train_state: Any, data: dict[str, Any]) -> None:
        """Starts saving `step`; returns when the arrays may be donated. A step that is saved already stays as it is.

        Args:
          data: JSON: {"step": int, "skipped": [stream positions]}.

        Raises:
          CheckpointError: the last `retries` saves all failed. One that fails is said, and `due` asks for another.
        """
        self._join()
        self._agree()
        self._again, self._time_is_up, self._saved_at = False, False, time.monotonic()
        tree = {"params": params, "train_state": train_state}
        run = {"run": ocp.args.JsonSave(self._run)} if self._run else {}
        try:
            if step in self._orbax().all_steps():
                return
            self._orbax().save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params, save_args=chunked(params)),
                    train_state=ocp.args.StandardSave(train_state, save_args=chunked(train_state)),
                    data=ocp.args.JsonSave(data),
                    fingerprints=ocp.args.JsonSave(fingerprints(tree)),
                    **run,
                ),
                force=True,
            )
        except Exception as error:  # disks, buckets and Orbax have a class of error each; all mean: not saved
            self._fail(step, error)
            return
        self._thread = threading.Thread(target=self._finish, args=(step,), name="verify_checkpoint")
        self._thread.start()

    def wait(self) -> bool:
        """Waits until the last save is committed and verified. False: it failed, and is to be made again.

        Raises:
          CheckpointError: the last `retries` saves all failed.
        """
        self._join()
        self._agree()
        return not self._failures

    def latest(self) -> int | None:
        """The newest intact step; None when there is no step. Damaged ones are named on stderr and set aside.

        A step without the mark of the verification (the run was killed before it) is read back first. With several
        processes any step is: one that failed in the midst of a restore would leave the others waiting.

        Raises:
          CheckpointError: there are only damaged ones.
        """
        self._join()
        self._agree()
        alone = jax.process_count() == 1
        while True:
            newest = (steps(self._directory) or [-1])[-1]
            if jax.process_index() == 0 and newest >= 0:
                self._clear_reports(newest)
            (newest,) = _broadcast(newest)
            if newest < 0:
                break
            marked = alone and stored.is_marked(step_folder(self._directory, newest))
            if _broadcast(marked or not self._verify(newest))[0]:
                return newest
            self._close_orbax()
        bad = stored.damaged(self._directory)
        if _broadcast(bool(bad))[0]:
            raise CheckpointError(
                f"every checkpoint of {self._directory} is damaged: {', '.join(map(str, bad))}. "
                "To start again from step 0, remove them or use another work dir"
            )
        return None

    def restore(self, step: int, params: Any, train_state: Any) -> tuple[Any, Any, dict[str, Any]]:
        """Restores a run onto the shardings of the abstract trees, whatever mesh it was saved from.

        What arrives on the devices must have the fingerprints of the save. When it does not, because the disk changed
        after the verification, the newest intact step is restored instead: go by `data["step"]`.

        Returns:
          (params, train_state, data item).

        Raises:
          CheckpointError: the step does not fit the model, or cannot be read.
        """
        while True:
            items, reason = self._read(step, params, train_state)
            if not reason:
                return items.params, items.train_state, items.data
            del items
            stored.unmark(step_folder(self._directory, step))
            broken = f"step {step} of {self._directory} cannot be restored: {reason}"
            if jax.process_count() > 1:  # perhaps only here
                raise CheckpointError(f"{broken}. The same command tries again")
            newest = self.latest()
            if newest is None or newest == step:
                raise CheckpointError(f"{broken}. Yet it is on the disk as it was saved; is there enough memory?")
            step = newest

    def close(self) -> None:
        """Waits for the background work, without regard to what the other processes do."""
        self._join()
        self._close_orbax()

    def _read(self, step: int, params: Any, train_state: Any) -> tuple[Any, str]:
        """Restores a step. Returns (items, what went wrong)."""
        tree = {"params": params, "train_state": train_state}
        try:
            shapes = {path: a.shape for path, a in stored.open_step(step_folder(self._directory, step)).items()}
        except (CheckpointError, ValueError, OSError) as error:
            return None, stored.short(error)
        check_tree(shapes, tree, self._directory)
        try:
            items = self._orbax().restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    train_state=ocp.args.StandardRestore(train_state),
                    data=ocp.args.JsonRestore(),
                ),
            )
            expected = stored.read_json(step_folder(self._directory, step), "fingerprints")
        except Exception as error:  # of any class, see save
            return None, f"{type(error).__name__}: {stored.short(error)}"
        if expected is None:  # saved by an older version
            return items, ""
        found = fingerprints({"params": items.params, "train_state": items.train_state})
        if wrong := sorted(name for name in found if found[name] != expected.get(name)):
            return None, f"other values than were saved in {', '.join(wrong)}"
        return items, ""

    def _finish(self, step: int) -> None:
        """In the background: waits for the commit, then verifies."""
        try:
            self._orbax().wait_until_finished()
            problems = self._verify(step)
        except Exception as error:
            self._fail(step, error)
            return
        if problems:
            self._fail(step, CheckpointError("it was written, but does not read back as what was saved"))
        else:
            self._outcome = ""

    def _verify(self, step: int) -> list[str]:
        """Reads back this process's share. The first process judges: it marks the step or sets it aside, and says so.

        Returns:
          What is wrong; on the other processes always nothing.

        Raises:
          TimeoutError: a process did not report.
        """
        folder = step_folder(self._directory, step)
        part, parts = jax.process_index(), jax.process_count()
        _await(folder)
        report = stored.read_back(folder, part, parts)
        if part:
            write_text(folder / f"read_back.{part}.json", json.dumps(report))
            return []
        others = [folder / f"read_back.{p}.json" for p in range(1, parts)]
        problems = stored.judge(folder, [report, *(json.loads(_await(path).read_text()) for path in others)])
        self._clear_reports(step)
        if problems:
            place = stored.set_aside(folder)
            shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
            _say(f"checkpoint {step} is damaged and was moved to {place}: {shown}")
        elif stored.read_json(folder, "fingerprints") is not None:
            stored.mark(folder)
        return problems

    def _clear_reports(self, step: int) -> None:
        for path in step_folder(self._directory, step).glob("read_back.*.json"):
            path.unlink()

    def _remove_unfinished(self) -> None:
        """Makes room again after a failure; what cannot be removed is, at the next start."""
        time.sleep(PAUSE)
        if jax.process_index() == 0:
            for path in (self._directory / "checkpoints").glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    path.rmtree(missing_ok=True)

    def _fail(self, step: int, error: Exception) -> None:
        count = f"{self._failures + 1} of {self._config.retries}"
        text = f"saving step {step} failed ({count}): {type(error).__name__}: {stored.short(error)}"
        _say(text)
        self._outcome = text

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _agree(self) -> None:
        """Takes up what the first process knows of the last save, and its clock.

        Raises:
          CheckpointError: too many failures in a row.
        """
        outcome, minutes = self._outcome, (time.monotonic() - self._saved_at) / 60
        time_is_up = 0 < self._config.every_minutes <= minutes
        known, failed, self._time_is_up = map(bool, _broadcast(outcome is not None, bool(outcome), time_is_up))
        if known:
            self._join()  # the others are as good as done: the first has all they had to say
            self._reason, self._outcome = self._outcome or "the first process says why", None
            self._failures = self._failures + 1 if failed else 0
            self._again = failed
            if failed:
                self._close_orbax()
                self._remove_unfinished()
        if self._failures >= self._config.retries:
            good = [s for s in steps(self._directory) if stored.is_marked(step_folder(self._directory, s))]
            raise CheckpointError(
                f"{self._failures} saves in a row failed; the last: {self._reason}. "
                f"Checkpoints go to {self._directory / 'checkpoints'}; the last good step there is "
                f"{good[-1] if good else 'none'}. See that it can be written and has room; the same command continues"
            )


def _broadcast(*values: int | bool) -> list[int]:
    """What the first process says. Waits for the devices when there are several processes, else costs nothing."""
    if jax.process_count() == 1:
        return list(values)
    return multihost_utils.broadcast_one_to_all(np.array(values, np.int32)).tolist()


def _await(path: epath.Path) -> epath.Path:
    """Waits until another process, perhaps on another machine, has written `path`."""
    start = time.monotonic()
    while not path.exists():
        if time.monotonic() - start > PATIENCE:
            raise TimeoutError(f"{path} did not appear within {PATIENCE // 60} minutes")
        time.sleep(0.1)
    return path


def _say(text: str) -> None:
    process = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"{process}{text}", file=sys.stderr, flush=True)


def fingerprints(tree: Any) -> dict[str, int]:
    """Fingerprint of every array by dotted path, computed where the shards are; equals that of `stored`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    place = leaves[0][1].sharding
    everywhere = sharding.replicated(place.mesh) if isinstance(place, jax.sharding.NamedSharding) else None
    values = _fingerprint_program(everywhere)([x for _, x in leaves])
    return dict(zip([path_string(path) for path, _ in leaves], np.asarray(values).tolist(), strict=True))


@functools.cache
def _fingerprint_program(everywhere: jax.sharding.Sharding | None):
    return jax.jit(lambda arrays: jnp.stack([_fingerprint(x) for x in arrays]), out_shardings=everywhere)


def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32 scalar of one array; see `stored`."""
    x = jax.device_put(x, jax.memory.Space.Device)  # moments may wait on the host
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    words = jax.lax.bitcast_convert_type(x, jnp.uint32 if size == 8 else f"uint{8 * size}").astype(jnp.uint32)
    for axis, n in enumerate(words.shape):
        places = stored.place(jnp.arange(n, dtype=jnp.uint32), axis)
        words = words + places.reshape([-1 if k == axis else 1 for k in range(words.ndim)])
    hashed = stored.scramble(words).reshape(1) if words.ndim == 0 else stored.scramble(words)
    # In two sums: XLA's CPU back end is three times as fast with them.
    return jnp.sum(jnp.sum(hashed, axis=-1, dtype=jnp.uint32), dtype=jnp.uint32)


def chunked(tree: Any) -> Any:
    """Stored in pieces cut along the first (the layers') axis, so that readers take one layer at a time."""
    whole = ocp.SaveArgs()
    cut = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,))
    return jax.tree.map(lambda x: cut if x.ndim else whole, tree)


def read_model_config(directory: str | epath.Path, kind: str) -> Any:
    """The model configuration of a model directory.

    Raises:
      CheckpointError: not a model directory, or one of another kind.
    """
    path = epath.Path(directory) / "assets" / "model.json"
    if not path.exists():
        raise CheckpointError(f"{directory} is not a model directory: {path} is missing")
    content = json.loads(path.read_text())
    if content["kind"] != kind:
        raise CheckpointError(f"{directory} holds a model of kind {content['kind']!r}, not {kind!r}")
    return from_dict(MODEL_CONFIGS[kind], content["config"], str(path))


def write_model_config(directory: str | epath.Path, kind: str, config: Any) -> None:
    """Writes `assets/model.json`."""
    assets = epath.Path(directory) / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    write_text(assets / "model.json", json.dumps({"kind": kind, "config": to_dict(config)}, indent=2))


def stored_shapes(directory: str | epath.Path, step: int) -> dict[str, tuple[int, ...]]:
    """Shape of every stored parameter by dotted path, without reading it. Raises CheckpointError."""
    arrays = stored.open_arrays(step_folder(directory, step) / "params")
    with _damage_told(directory, step):
        return {path: array.shape for path, array in arrays.items()}


@contextlib.contextmanager
def _damage_told(directory: str | epath.Path, step: int) -> Iterator[None]:
    """TensorStore's errors as CheckpointError."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"checkpoint {step} of {directory} cannot be read: {str(error).partition(' [tensorstore_spec')[0]}; "
            f"`rynnvla checkpoint verify {directory}` says which steps are intact"
        ) from error


def check_tree(stored: Mapping[str, tuple[int, ...]], wanted: Any, directory: Any, new: tuple[str, ...] = ()) -> None:
    """Compares stored shapes with a tree of arrays or ShapeDtypeStructs.

    Raises:
      CheckpointError: missing (and not in `new`), left over (and not in `new`) or of another shape; lists them.
    """
    shapes = {path_string(p): tuple(x.shape) for p, x in jax.tree_util.tree_leaves_with_path(wanted)}

    def is_new(key: str) -> bool:
        return any(fnmatch.fnmatch(key, pattern) for pattern in new)

    unused = [p for p in new if not any(fnmatch.fnmatch(k, p) for k in (*shapes, *stored))]
    problems = [f"init_from.new pattern {p!r} matches no parameter" for p in unused]
    problems += [f"{k} is missing" for k in shapes if k not in stored and not is_new(k)]
    problems += [f"{k} is left over" for k in stored if k not in shapes and not is_new(k)]
    problems += [
        f"{k} is {stored[k]} there and {shapes[k]} here"
        for k in shapes
        if k in stored and not is_new(k) and stored[k] != shapes[k]
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(
            f"checkpoint {directory} does not fit this model: {shown}. "
            "Use the model size it was trained with, or list what may start fresh in config.init_from.new"
        )


def load_params(
    directory: str | epath.Path, abstract: Any = None, *, step: int = -1, new: tuple[str, ...] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Reads parameters of a model directory.

    Args:
      abstract: nested dict of ShapeDtypeStructs (with shardings) to restore onto; None reads what is there
        onto the first device.
      new: globs of parameters that are not read.

    Returns:
      (nested dict of arrays without the fresh ones, dotted paths of the fresh ones).

    Raises:
      CheckpointError: no such step, it is damaged, or it does not fit `abstract`.
    """
    step = find_step(directory, step)
    path, shapes = step_folder(directory, step) / "params", stored_shapes(directory, step)
    if abstract is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        tree = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
        abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), dict(tree))
    check_tree(shapes, abstract, directory, new)
    flat = {path_string(p): p for p, _ in jax.tree_util.tree_leaves_with_path(abstract)}
    fresh = [k for k in flat if any(fnmatch.fnmatch(k, pattern) for pattern in new)]
    wanted = _without(abstract, set(fresh), ())
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    with _damage_told(directory, step):
        restored = ocp.PyTreeCheckpointer().restore(
            path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        )
    return restored, fresh


def _without(tree: Any, drop: set[str], path: tuple[str, ...]) -> Any:
    """The nested dict less the dotted paths in `drop`; empty groups vanish."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {
        k: _without(v, drop, (*path, k))
        for k, v in tree.items()
        if isinstance(v, Mapping) or ".".join((*path, k)) not in drop
    }
    return {k: v for k, v in kept.items() if not (isinstance(v, Mapping) and not v)}


def save_model(directory: str | epath.Path, kind: str, config: Any, params: Any, step: int = 0) -> None:
    """Writes a model directory with parameters only."""
    write_model_config(directory, kind, config)
    path = step_folder(directory, step) / "params"
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, params, save_args=chunked(params), force=True)
    checkpointer.wait_until_finished()


def copy_model(source: str | epath.Path, target: str | epath.Path) -> None:
    """Copies the newest parameters and the assets of a model directory; `model.json` comes last."""
    source, target = epath.Path(source), epath.Path(target)
    step = find_step(source)
    _copy_tree(source / "checkpoints" / str(step) / "params", target / "checkpoints" / str(step) / "params")
    target_assets = target / "assets"
    target_assets.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "statistics.json", "run.json"):
        if (source / "assets" / name).exists():
            (source / "assets" / name).copy(target_assets / name, overwrite=True)
    write_text(target_assets / "model.json", (source / "assets" / "model.json").read_text())


def _copy_tree(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for item in source.iterdir():
        if item.is_dir():
            _copy_tree(item, target / item.name)
        else:
            item.copy(target / item.name, overwrite=True)


def config_differences(old: Any, new: Any, path: str = "config") -> list[str]:
    """Readable lines for every value that differs between two dataclasses of one type."""
    lines = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            lines += config_differences(a, b, f"{path}.{f.name}")
        elif a != b:
            lines.append(f"{path}.{f.name}: {a!r} -> {b!r}")
    return lines
