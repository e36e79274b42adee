"""Batches with a non-finite loss or gradient: counted when an update is skipped, left out when many occur in a row.

The stream of batches is numbered from 0 on. Step s trains on the s-th position that is not left out, with the random
key of step s, so a run is a function of (seed, positions left out). `WORKDIR/skipped.json` stores every decision
immediately; the `data` item of a checkpoint stores which positions were left out when it was saved.

An update that is not applied changes nothing but the optimizer's step counts. A checkpoint inside a row of skipped
updates is therefore saved as the one before them (`LeftOutBatches.saved_step`), and the newest one is always the last
good one.
"""

from pathlib import Path
from typing import Any

from data_pipelines import stream
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import shorten
from rynnvla_jax.storage import files

RESTORES = 2  # times that the same step is tried again with other batches


class BadBatches(Exception):
    """Too many updates in a row were skipped; leave out their batches with `LeftOutBatches.leave_out`."""


def _are_decisions(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(d, dict) and isinstance(d.get("step"), int) and isinstance(d.get("positions"), list) for d in content
    )


class LeftOutBatches:
    """The batches that were left out in a work dir; the same on every process."""

    def __init__(self, workdir: Path, limit: int, batch_size: int = 1):
        """`limit`: skipped updates in a row after which their batches are left out; `batch_size`: of this start."""
        self.file, self.limit, self._batch_size = workdir / "skipped.json", limit, batch_size
        self.spans: list[stream.Span] = [(0, 0, batch_size)]  # so that another batch size skips and repeats nothing
        # The checkpoints also store which batches were left out, so a damaged file loses nothing.
        self.decisions: list[dict] = files.read_status(self.file, [], _are_decisions)
        self.not_applied = 0  # updates before the current step whose batches are not left out
        self._row: list[tuple[int, int]] = []  # (step, stream position) of the skipped updates since the last good one

    @property
    def positions(self) -> tuple[int, ...]:
        """Stream positions that are left out, ascending."""
        return tuple(sorted(p for d in self.decisions for p in d["positions"]))

    def position(self, step: int) -> int:
        """The stream position that step `step` (from 0 on) trains on."""
        return stream.position(step, self.positions)

    def resume(self, data: dict) -> None:
        """Continues from the `data` item of a checkpoint; {} is a fresh start."""
        self.not_applied, self._row = data.get("not_applied", 0), []
        if unknown := sorted(set(data.get("skipped", ())) - set(self.positions)):  # skipped.json was removed
            self.decisions.append({"step": data["step"], "positions": unknown})
        self._span(data)

    def _span(self, data: dict) -> None:
        """Sets `spans` for a run that continues from the `data` item of a checkpoint."""
        step = data.get("step", 0)
        before = self._batch_size
        if step and "batches" not in data:  # all batches had the size that the checkpoint's config has
            config = reader.read_json(reader.step_folder(self.file.parent, step), "config") or {}
            before = config.get("batch_size", before)
        self.spans = [(int(a), int(b), int(c)) for a, b, c in data.get("batches", [(0, 0, before)])]
        if self.spans[-1][2] != self._batch_size:
            here = self.position(step)
            example = stream.first_example(here, self.spans)
            self.spans = [span for span in self.spans if span[0] < here] + [(here, example, self._batch_size)]

    def data(self, step: int) -> dict:
        """The `data` item of a checkpoint of step `step`."""
        later = sum(s >= step for s, _ in self._row)
        content = {"step": step, "skipped": list(self.positions), "not_applied": self.not_applied - later}
        return content | ({"batches": [list(span) for span in self.spans]} if len(self.spans) > 1 else {})

    def saved_step(self, done: int) -> int:
        """The label of a checkpoint that is made when `done` steps have finished."""
        return done - len(self._row)

    def total(self, step: int) -> int:
        """Number of batches up to step `step` that did not train the model, for any reason."""
        here = self.position(step)
        return self.not_applied + sum(p < here for p in self.positions)

    def finished(self, step: int, metrics: dict[str, float]) -> None:
        """Records the outcome of step `step` (from 0 on).

        Raises:
          BadBatches: the limit of skipped updates in a row is reached.
        """
        if not metrics["skipped"]:
            self._row.clear()
            return
        position = self.position(step)
        self._row.append((step, position))
        self.not_applied += 1
        multihost.say(
            f"step {step + 1}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}: update not "
            f"applied, {len(self._row)} in a row (stream position {position})"
        )
        if len(self._row) >= self.limit:
            raise BadBatches

    def leave_out(self) -> None:
        """Leaves out the batches of the skipped updates, permanently and on all processes.

        Raises:
          FloatingPointError: this was done before, `RESTORES` times, at the same step.
        """
        step, positions = self._row[0][0], [p for _, p in self._row]
        tried = [d for d in self.decisions if d["step"] == step]
        if len(tried) >= RESTORES:
            # It did not help, so the batches are not at fault: a later run with other settings trains on them.
            self.decisions = [d for d in self.decisions if d["step"] != step]
            multihost.first(self._store)
            left = sorted(p for d in tried for p in d["positions"])
            raise FloatingPointError(
                f"loss or gradient is not finite in {self.limit} steps in a row from step {step + 1} on, even after "
                f"{RESTORES} restores without the batches at stream positions {left}, which are therefore read again "
                f"from now on ({self.file}); the last checkpoint is intact: lower config.optimizer.peak_lr or check "
                "the data"
            )
        self.decisions.append({"step": step, "positions": positions})
        multihost.first(self._store)
        multihost.say(
            f"{self.limit} updates in a row were not applied: going back to the last checkpoint before step "
            f"{step + 1} and leaving out the batches at stream positions {positions} (see {self.file})"
        )

    def _store(self) -> None:
        try:
            files.write_json(self.file, self.decisions)
        except OSError as error:  # nothing is lost: a start from the last checkpoint comes to the same decision
            multihost.say(f"{self.file} cannot be written ({shorten(error)}); the next checkpoint stores the decision")
