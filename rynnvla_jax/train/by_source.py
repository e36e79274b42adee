"""What a run has seen of each source of a mixture: losses, examples and epochs.

One batch may have no row of a source, so losses are means over the last `log_every` steps. Sums are saved with every
checkpoint: a run that is continued logs what one without a break does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.loader import Loader
from data_pipelines.sources import short_names
from rynnvla_jax.checkpoint import reader
from rynnvla_jax.distributed import multihost

Totals = dict[str, dict[str, float]]  # by source, then by name of what is added

KEY = "by_source"  # in a step's metrics, and in the `data` item of a checkpoint
SEEN = "seen"  # rows since the start of the run


class BySource:
    """Adds up the `by_source` of each step's metrics (`stages.by_source`); nothing where a run has one source."""

    def __init__(
        self,
        names: Sequence[str],
        epochs: Sequence[tuple[int, int]],
        every: int,
        kept: int,
        step: int = 0,
        totals: Totals | None = None,
    ):
        """Continues after `step`, whose totals are `totals`.

        Args:
          names: of the sources; `epochs`: as `Loader.epochs`.
          every: steps between two lines of metrics.
          kept: of how many of the newest steps `data` must be known.
        """
        self._names, self._epochs, self._every, self._kept = names, epochs, every, kept
        self._after = {step: totals or {}}  # number of finished steps: totals

    @classmethod
    def resumed(cls, loader: Loader, workdir: Path, step: int) -> "BySource":
        """Of a run that continues after `step`, whose checkpoint is in `workdir`; step 0 is a fresh start."""
        config = loader.config
        saved = (reader.read_json(reader.step_folder(workdir, step), "data") or {}) if step else {}
        names = short_names(config.data) if len(config.data.mixture) > 1 else ()
        if names and step and KEY not in saved:
            multihost.say(f"examples by source are counted from step {step} on: its checkpoint does not contain them")
        kept = config.max_skipped_in_a_row + 1
        return cls(names, loader.epochs, config.log_every, kept, step, saved.get(KEY))

    def data(self, step: int) -> dict[str, Any]:
        """For the `data` item of a checkpoint of step `step`, one of the newest."""
        return {KEY: self._after[step]} if self._names else {}

    def finished(self, step: int, found: Mapping[str, Any], trained: bool) -> None:
        """Step `step` (from 0 on) has finished; `found` are its values [sources] by name. An update that was not
        applied counts for nothing."""
        before, new = self._after[step], step % self._every == 0
        totals: Totals = {}
        for i, source in enumerate(self._names):
            old = before.get(source, {})
            old = {name: x for name, x in old.items() if not new or name == SEEN}
            added = {SEEN if name == "rows" else name: float(x[i]) for name, x in found.items()} if trained else {}
            totals[source] = {name: old.get(name, 0.0) + added.get(name, 0.0) for name in sorted(old | added)}
        self._after[step + 1] = totals
        self._after.pop(step - self._kept, None)

    def read(self, done: int) -> dict[str, float]:
        """What is logged after `done` steps: `source/NAME/...`. A loss is missing where no example was seen."""
        values = {}
        for source, (examples, each) in zip(self._names, self._epochs, strict=bool(self._names)):
            totals = self._after[done][source]
            for name in (name.removesuffix("/sum") for name in totals if name.endswith("/sum")):
                if count := totals[f"{name}/count"]:
                    values[f"source/{source}/{name}"] = totals[f"{name}/sum"] / count
            seen = totals.get(SEEN, 0.0) * each
            values |= {f"source/{source}/examples": seen, f"source/{source}/epochs": seen / examples}
        return values
