"""The held-out loss: what the model makes of examples that it is never trained on, always the same ones.

Examples are read, and their frames encoded, once, at the start; they stay on the devices. An evaluation is a forward
pass over them, without dropout, jitter and noise, with the weights as they are: it changes nothing and draws nothing,
so a run with evaluation trains bit for bit like one without.

Actions are judged as a robot gets them: the chunk that the model predicts at an example's first frame, decoded and
brought into the data's unit, against the recorded one. Beside it stand two policies that need no learning: holding
still, and repeating the motion of the step before.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from data_pipelines.episode import DataError, Episodes
from data_pipelines.held_out import Split
from data_pipelines.loader import CodesOf, Loader
from data_pipelines.sources import mixture, open_source
from data_pipelines.sources.exclude import kind_and_path
from data_pipelines.transforms import RECORDED
from rynnvla_jax.actions import Statistics, absolute, unnormalize_actions
from rynnvla_jax.columns import Columns, distance
from rynnvla_jax.config import ConfigError, EvaluationConfig, TrainConfig, check_choice
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.distributed import multihost
from rynnvla_jax.errors import listing
from rynnvla_jax.metric import EVAL, of_held_out
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.frozen import Frozen, frames_to_tokens
from rynnvla_jax.sequence import PATCH
from rynnvla_jax.stage import STAGES, start_counts
from rynnvla_jax.train import assets as assets_lib
from rynnvla_jax.train import lowering
from rynnvla_jax.train.assets import Assets
from rynnvla_jax.train.optimizer import ema_params
from rynnvla_jax.train.pictures import Shown, codes_of_rows
from rynnvla_jax.train.stages import Objective
from rynnvla_jax.train.step import TrainState

Weighted = list[tuple[Episodes, float]]
EMA = "ema/"  # begins the names of metrics of the average of the weights
ERROR, STILL, REPEATED = "action_error", "hold_still_error", "repeat_motion_error"


def open_evaluated(config: TrainConfig, splits: Sequence[Split]) -> Weighted:
    """The data to evaluate on, with weights: the held-out parts of the run's sources (`splits`), or
    `evaluation.sources`.

    Raises:
      ConfigError: one of them is trained on.
      DataError: one of them cannot be opened.
    """
    if splits:
        weights = [weight for _, weight in mixture(config.data)]
        return [(p.held_out, w) for p, w in zip(splits, weights, strict=True) if p.held_out is not None]
    trained = {kind_and_path(source) for source, _ in mixture(config.data)}
    for name in config.evaluation.sources:
        if kind_and_path(name) in trained:
            raise ConfigError(
                f"config.evaluation.sources names {name}, which the run trains on; set config.evaluation.share "
                "instead, which holds episodes of it out"
            )
    return open_others(config)


def open_others(config: TrainConfig) -> Weighted:
    """`evaluation.sources`, all of one weight. Raises ConfigError, DataError."""
    views = STAGES[config.stage].views(config)
    return [(open_source(name, config.data, views, multihost.primary()), 1.0) for name in config.evaluation.sources]


def make_loader(
    config: TrainConfig,
    assets: Assets,
    mesh: jax.sharding.Mesh,
    data: Weighted,
    stores: Sequence[tuple[Episodes, CodesOf | None]] = (),
) -> Loader:
    """The loader of the examples, in batches of at most a micro-batch; `stores` are the codes made ahead, each with its
    whole source. A collective call. Raises as `Loader` does."""
    data = _long_enough(config, data)
    wholes = [source if source.whole is None else source.whole for source, _ in data]
    codes = [next((codes for other, codes in stores if other is whole), None) for whole in wholes]
    shards = mesh_lib.batch_shards(mesh)
    most = -(-config.evaluation.examples // shards) * shards
    config = dataclasses.replace(
        config,
        batch_size=min(config.batch_size // config.optimizer.accumulation, most),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        evaluation=EvaluationConfig(),
        data=dataclasses.replace(
            config.data,
            source="",
            mixture=tuple((source.source, weight) for source, weight in data),
            image=dataclasses.replace(config.data.image, jitter=0.0),
            num_workers=0,
        ),
    )
    return assets_lib.make_loader(config, assets, mesh, [source for source, _ in data], codes, evaluates=True)


def names(
    config: TrainConfig, objective: Objective, graphdef: nnx.GraphDef, abstract: TrainState, mesh: jax.sharding.Mesh
) -> list[str]:
    """The means that an evaluation logs, as "eval/NAME", found by tracing; those of columns and steps ahead are not
    among them. [] where nothing is evaluated."""
    measure = objective.measure
    if measure is None or not config.evaluation.on:
        return []
    batch = lowering.abstract_batch(config, mesh)
    rows = next(iter(batch.values())).shape[0]

    def run(params, frozen, batch):
        model = nnx.merge(graphdef, params_lib.joined(params, frozen.base))
        return measure(model, frozen, frames_to_tokens(batch, frozen, config), config)

    batch["real"] = jax.ShapeDtypeStruct((rows,), np.bool_)
    with jax.set_mesh(mesh):
        found = jax.eval_shape(run, abstract.params, lowering.abstract_frozen(config, mesh), batch)
    known = [*found.means, *(["perplexity"] if found.codes is not None else [])]
    return [f"{EVAL}{name}" for name in [*known, *([ERROR, STILL, REPEATED] if found.chunks is not None else [])]]


def check_keep_best(
    config: TrainConfig, objective: Objective, graphdef: nnx.GraphDef, abstract: TrainState, mesh: jax.sharding.Mesh
) -> None:
    """Raises ConfigError when `checkpoint.keep_best` is no metric of this run that can be best."""
    wanted = config.checkpoint.keep_best
    if wanted and not config.evaluation.on:
        raise ConfigError(
            f"config.checkpoint.keep_best is {wanted!r}, but nothing is evaluated; set config.evaluation.share (or "
            "sources) and evaluation.every_steps, or leave keep_best out"
        )
    if wanted:
        known = of_held_out(names(config, objective, graphdef, abstract, mesh))
        check_choice("config.checkpoint.keep_best", wanted, known)


def describe(config: EvaluationConfig, loader: Loader) -> str:
    """A line for the start-up message."""
    more = ", the weights and their average (twice the time)" if loader.config.optimizer.ema else ""
    more += f", pictures of {config.pictures}" if config.pictures else ""
    return f"every {config.every_steps} steps and at the end, {extent(config, loader)}{more}"


def extent(config: EvaluationConfig, loader: Loader) -> str:
    """The examples that are evaluated, in words."""
    number = loader.num_examples
    return (
        f"on {min(config.examples, number)} of {number} examples of "
        f"{listing([f'{len(source)} episodes of {source.source}' for source in loader.sources], 5)}"
    )


def _long_enough(config: TrainConfig, data: Weighted) -> Weighted:
    """Without sources whose episodes are all too short for an example; says which. Raises DataError when all are."""
    span, after = STAGES[config.stage].window(config, published=True)
    good = [(s, w) for s, w in data if s.corpus is not None or start_counts(s.lengths, span, after).any()]
    short = [source for source, _ in data if all(source is not other for other, _ in good)]
    if short and not good:
        longest = max(int(source.lengths.max()) for source in short)
        raise DataError(
            f"{listing([source.source for source in short], 3)}: no episode to evaluate on is long enough (the longest "
            f"has {longest} steps) for stage {config.stage}, whose examples need {span + after} steps; set another "
            "evaluation.share or evaluation.seed, or evaluation.sources with longer episodes"
        )
    for source in short:
        multihost.say(
            f"{source.source}: not evaluated: its {len(source)} episodes to evaluate on are too short for an example"
        )
    return good


class Evaluator:
    """Evaluates weights on the examples of a loader that `make_loader` made; all processes make and call it alike."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        mesh: jax.sharding.Mesh,
        graphdef: nnx.GraphDef,
        frozen: Frozen,
        loader: Loader,
    ):
        """Reads the examples, at most `config.evaluation.examples` of them.

        Raises:
          ConfigError: the stage cannot be evaluated.
          DataError: too many examples cannot be read.
        """
        if objective.measure is None:
            raise ConfigError(
                f"stage {config.stage} has no `measure` in its Objective, so it cannot be evaluated; set "
                "config.evaluation.every_steps=0"
            )
        measure, sharding, whole = objective.measure, mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

        def prepare(frozen, batch):
            told = {key: batch[key] for key in RECORDED if key in batch}
            batch = {key: value for key, value in batch.items() if key not in told}
            return frames_to_tokens(batch, frozen, config), told

        def run(params, frozen, batch):
            model = nnx.merge(graphdef, params_lib.joined(params, frozen.base))
            return measure(model, frozen, batch, config)

        prepare = jax.jit(prepare, out_shardings=(sharding, whole))
        # Whole on every device, so every process adds the same numbers in the same order.
        self._run = jax.jit(run, out_shardings=whole)
        predict, pictures, sequence = objective.predict_codes, config.evaluation.pictures, config.sequence
        self._predict = self._grid = None
        if predict is not None and sequence.num_frames > 1 and pictures and loader.frame_size:
            height, width = loader.frame_size
            self._grid = sequence.num_frames, len(sequence.views), height // PATCH, width // PATCH

            def codes(params, frozen, batch):
                count = min(pictures, len(batch["tokens"]))
                model = nnx.merge(graphdef, params_lib.joined(params, frozen.base))
                found = predict(model, frozen, batch, count)
                return found, batch["tokens"][:count], batch["real"][:count]

            self._predict = jax.jit(codes, out_shardings=whole)
        self._pictures = pictures
        self._frozen, self._averages = frozen, bool(config.optimizer.ema)
        self._batches: list[tuple[dict[str, jax.Array], dict[str, np.ndarray]]] = []
        for local in _together(loader.fixed(config.evaluation.examples)):
            size = loader.config.batch_size
            batch, told = prepare(frozen, multihost.global_batch(local, sharding, loader.rows, size))
            self._batches.append((batch, jax.tree.map(np.asarray, told)))
        self._actions = None
        if loader.statistics is not None:
            self._actions = loader.statistics, config.data.normalization

    def of_state(self, params: Any, opt_state: Any) -> dict[str, float]:
        """The metrics of the weights; as `ema/...` those of their average, if the optimizer keeps one."""
        values = self(params)
        if self._averages:
            values |= {f"{EMA}{name}": value for name, value in self(ema_params(opt_state, params)).items()}
        return values

    def show(self, params: Any) -> Shown:
        """What pictures show of the first `evaluation.pictures` examples; costs two forward passes of one batch. All
        processes call it alike."""
        if not self._pictures:
            return Shown()
        batch, told = self._batches[0]
        codes = chunks = None
        if self._predict and self._grid:
            predicted, tokens, real = jax.device_get(self._predict(params, self._frozen, batch))
            recorded, places = codes_of_rows(tokens[real], np.asarray(self._frozen.code_to_token), self._grid)
            found = np.take_along_axis(predicted[real], places.reshape(len(places), -1), axis=1)
            codes = recorded, found.reshape(recorded.shape)
        if self._actions:
            found = jax.device_get(self._run(params, self._frozen, batch))
            statistics, mode = self._actions
            first = np.flatnonzero(found.present[:, 0])[: self._pictures]
            recorded, origin = (told[key][first, 0] for key in RECORDED[:2])
            predicted = unnormalize_actions(found.chunks[first, 0], statistics, mode)
            columns = statistics.columns
            chunks = absolute(recorded, origin, columns), absolute(predicted, origin, columns)
        return Shown(codes, chunks)

    def __call__(self, params: Any) -> dict[str, float]:
        """The metrics by name, of all examples together; what has no example, or no number, is left out."""
        means: dict[str, np.ndarray] = {}
        codes = np.zeros(0)
        errors = ActionErrors(*self._actions) if self._actions else None
        for batch, told in self._batches:
            found = jax.device_get(self._run(params, self._frozen, batch))
            for name, pair in found.means.items():
                means[name] = means.get(name, 0.0) + np.asarray(pair, np.float64)
            if found.codes is not None:
                used = np.asarray(found.codes, np.float64)
                codes = codes + used if codes.size else used
            if errors and found.chunks is not None:
                errors.add(found.chunks[found.present], *(told[key][found.present] for key in RECORDED))
        values = {name: float(total / number) for name, (total, number) in means.items() if number}
        if codes.size:
            share = codes / codes.sum()
            values["perplexity"] = math.exp(-float((share[share > 0] * np.log(share[share > 0])).sum()))
        return values | (errors.read() if errors else {})


class ActionErrors:
    """Mean distances of predicted actions and of two baselines from the recorded ones, in the data's unit."""

    def __init__(self, statistics: Statistics, mode: str):
        self._statistics, self._mode, self._count = statistics, mode, 0
        self._sums: dict[str, np.ndarray] = {}  # [C, A]

    def add(self, chunks: np.ndarray, recorded: np.ndarray, origin: np.ndarray, last: np.ndarray) -> None:
        """Normalised predicted chunks [n, C, A], and of the same examples what `transforms.Recorded` gives."""
        columns = self._statistics.columns
        still, repeated = baselines(recorded.shape[1], last, columns)
        true = absolute(recorded, origin, columns)
        for name, relative in (
            (ERROR, unnormalize_actions(chunks, self._statistics, self._mode)),
            (STILL, still),
            (REPEATED, repeated),
        ):
            apart = distance(absolute(relative, origin, columns), true, columns.action)
            self._sums[name] = self._sums.get(name, 0.0) + apart.sum(0)
        self._count += len(chunks)

    def read(self) -> dict[str, float]:
        """Of each the mean over everything, by column and by step ahead."""
        if not self._count:
            return {}
        values = {}
        names = [c.name.replace("/", "_") or str(i) for i, c in enumerate(self._statistics.columns.action)]
        for key, sums in self._sums.items():
            mean = sums / self._count
            values[key] = float(mean.mean())
            values |= {f"{key}/{name}": float(x) for name, x in zip(names, mean.mean(0), strict=True)}
            width = len(str(len(mean)))
            values |= {f"{key}/ahead_{i:0{width}d}": float(x) for i, x in enumerate(mean.mean(1), 1)}
        return values


def baselines(chunk: int, last: np.ndarray, columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Relative chunks [n, C, A] of holding still and of repeating the motion `last` [n, A] of the step before. A column
    that is kept stays at its last target; a recorded difference is 0, or the last one."""
    held = [i for i in columns.kept if not columns.action[i].delta]
    still = np.zeros_like(last)
    still[:, held] = last[:, held]
    return tuple(np.repeat(motion[:, None], chunk, axis=1) for motion in (still, last))  # type: ignore[return-value]


def line(values: dict[str, float]) -> str:
    """For people: the mean values, and what the baselines reach."""
    parts = [
        f"{name} {value:.4g}" for name, value in values.items() if "/" not in name and name not in (STILL, REPEATED)
    ]
    if STILL in values:
        parts[-1] += f" (holding still {values[STILL]:.4g}, repeating the last motion {values[REPEATED]:.4g})"
    average = {name.removeprefix(EMA): value for name, value in values.items() if name.startswith(EMA)}
    return ", ".join(parts) + (f"; their average {line(average)}" if average else "")


def _together(batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """The batches; when one process cannot read its own, all raise."""
    while (batch := multihost.together(lambda: next(batches, None))) is not None:
        yield batch
