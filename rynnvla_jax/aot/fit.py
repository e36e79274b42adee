"""Searches for the mesh, the batch and the remat policy with the shortest estimated step per token on a pod."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from rynnvla_jax.aot.compile import CompileReport, compile_report
from rynnvla_jax.aot.pods import pod
from rynnvla_jax.config import ConfigError, MeshConfig, TrainConfig
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train import compiler_options

POLICIES = ("projections", "attention", "full")  # from the one that keeps most; "offload" only if none of them fits
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # per chip and micro-batch
ENOUGH = 0.99  # a larger batch must take at most this share of the time per token
FINALISTS = 3

Tried = Callable[[CompileReport], None]


def search(
    config: TrainConfig, topology: str, slices: int, options: dict[str, str | bool], tried: Tried
) -> list[CompileReport]:
    """The best settings of a config for a pod, best first; the first `FINALISTS` of the search, compiled whole.

    The search compiles only as far as the schedule. Each policy is tried with batch 1 per chip, doubled while it fits
    and the estimated time per token falls; then the best of them on other meshes. A mesh that is set in the config is
    kept. Which products are slow is known only after the whole compilation, so the order may change there. Compiler
    options do just that to products: they are tried there too, on the best setting, and so is leaving out those that
    every run has.

    Args:
      options: of the compiler, to try together on the best setting.
      tried: called with the report of every attempt.

    Raises:
      ConfigError: nothing fits.
    """
    devices = pod(topology, slices)
    chips, device = len(devices), devices[0]

    def attempt(setting: TrainConfig, whole: bool = False, options: dict[str, str | bool] | None = None):
        report, _ = compile_report(setting, topology, slices, options, whole)
        tried(report)
        return report

    transformer = STAGES[config.stage].model == "vla"  # the other models have nothing to recompute, and fit a chip
    found: list[tuple[CompileReport, TrainConfig]] = []
    for policy in (*POLICIES, "offload") if transformer else (config.remat,):
        if policy == "offload" and found:
            break
        found += _growing(dataclasses.replace(config, remat=policy), BATCHES, chips, attempt)
    if not found:
        raise ConfigError(
            f"nothing fits {topology}: use more chips, mesh.sequence or mesh.tensor, or shorter sequences"
        )
    found.sort(key=_order)
    _, best = found[0]
    for mesh in other_meshes() if transformer and config.mesh == MeshConfig() else ():
        per_chip = [b for b in BATCHES if b * chips * config.optimizer.accumulation >= best.batch_size]
        try:
            found += _growing(dataclasses.replace(best, mesh=mesh), per_chip, chips, attempt)
        except ConfigError:  # it does not divide the model, the batch or the pod
            continue
    found.sort(key=_order)
    finalists = [(attempt(setting, whole=True), setting) for _, setting in found[:FINALISTS]]
    finalists = [final for final in finalists if final[0].fits]
    if not finalists:  # the code of a program needs memory too
        raise ConfigError(f"the best {FINALISTS} settings do not fit {topology} after all: use more chips")
    finalists.sort(key=_order)
    reports = [report for report, _ in finalists]
    _, best = finalists[0]
    changed = [attempt(best, whole=True, options=options)] if options else []
    if compiler_options.options(best, device) and best.compiler_options != "none":
        changed.append(attempt(dataclasses.replace(best, compiler_options="none"), whole=True))
    reports += [report for report in changed if report.fits]
    return sorted(reports, key=lambda report: report.seconds_per_token)


def other_meshes() -> list[MeshConfig]:
    """Those that a search tries beside the default, which cuts weights and batch over all chips of a slice."""
    return [
        *(MeshConfig(data=n) for n in (2, 4)),
        *(MeshConfig(tensor=n) for n in (2, 4)),
        *(MeshConfig(sequence=n) for n in (2, 4)),
    ]


def _growing(
    config: TrainConfig,
    batches: Sequence[int],
    chips: int,
    attempt: Callable[[TrainConfig], CompileReport],
) -> Iterator[tuple[CompileReport, TrainConfig]]:
    """What fits of growing batches per chip, until a larger one does not help."""
    before = None
    for batch in batches:
        setting = dataclasses.replace(config, batch_size=batch * chips * config.optimizer.accumulation)
        report = attempt(setting)
        if not report.fits:
            return
        yield report, setting
        if before and report.seconds_per_token > ENOUGH * before.seconds_per_token:
            return
        before = report


def _order(found: tuple[CompileReport, TrainConfig]) -> float:
    return found[0].seconds_per_token
