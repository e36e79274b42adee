"""The reports of `compile` as JSON and as text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rynnvla_jax.aot.compile import CompileReport
from rynnvla_jax.aot.estimate import PARTS, Estimate
from rynnvla_jax.aot.profile import Measured
from rynnvla_jax.train.lowering import GIB

GB = 1e9


def as_json(report: CompileReport) -> dict:
    """Totals under the plain names, and the values by kind under `*_by_kind`."""
    values = dataclasses.asdict(report)
    for name in ("collective_bytes", "synchronous_collective_bytes"):
        kinds = values[name]
        values[f"{name}_by_kind"] = kinds
        values[name] = None if kinds is None else sum(kinds.values())
    return values


def line(report: CompileReport) -> str:
    """One attempt as one line of text."""
    r = report
    setting = f"mesh {_mesh(r)}, batch {r.per_chip_batch:g} per chip, remat {r.remat}"
    if r.peak_bytes is None or r.estimate is None:
        return f"{setting}: does not fit ({r.compile_seconds:.0f} s)"
    how = "" if r.whole else "scheduled in "
    return (
        f"{setting}: {r.peak_bytes / GIB:.2f} of {r.capacity_bytes / GIB:.2f} GiB, step {_span(r.estimate.seconds)} s, "
        f"{r.seconds_per_token * 1e6:.3g} us per token ({how}{r.compile_seconds:.0f} s)"
    )


def table(report: CompileReport) -> str:
    """The report as a text table."""
    r = report
    pod = f"{r.slices} x {r.topology}" if r.slices > 1 else r.topology
    trained = "" if r.trained == r.parameters else f", of which {r.trained / 1e6:.1f} M train"
    chips = f"{r.chips} chip{'s' * (r.chips > 1)}"
    lines = [
        f"stage {r.stage}, {r.parameters / 1e9:.2f} G parameters{trained}, {pod} = {chips}, mesh {_mesh(r)}",
        f"  batch        {r.batch_size} ({r.per_chip_batch:g} per chip) of {r.sequence} tokens, remat {r.remat}",
    ]
    if r.fits is None:
        assert r.argument_bytes is not None, "known of what is lowered"
        held = (
            f"{r.argument_bytes / GIB:.2f} of {r.capacity_bytes / GIB:.0f} GiB for weights, optimizer state and batch"
        )
        return "\n".join([*lines, f"  lowered      for CUDA, not compiled: {held}, plus activations and gradients"])
    assert r.peak_bytes is not None, "the compiler says it also of what does not fit"
    lines.append(
        f"  HBM per chip {r.peak_bytes / GIB:.2f} of {r.capacity_bytes / GIB:.2f} GiB: "
        + ("fits" if r.fits else "DOES NOT FIT; use a smaller batch, --remat full or offload, or more chips")
    )
    if not r.fits:
        return "\n".join(lines)
    if r.argument_bytes is not None and r.temp_bytes is not None:
        lines[-1] += f" (arguments {r.argument_bytes / GIB:.2f}, temporaries {r.temp_bytes / GIB:.2f})"
    if r.host_bytes:
        lines.append(f"  host RAM     {r.host_bytes / GIB:.2f} GiB per chip")
    if r.options:
        lines.append(f"  options      {_options(r)}")
    lines.append(f"  {'compiled' if r.whole else 'scheduled'} in {r.compile_seconds:>3.0f} s")
    if not r.whole:
        lines[-1] += ": the peak is exact to 0.3 GiB"
    if r.estimate:
        lines += times(r.estimate)
    if r.model_flops:
        lines.append(f"  model FLOPs  {r.model_flops / 1e12:.1f} T per chip and update, by formula")
    kinds, waited = r.collective_bytes or {}, r.synchronous_collective_bytes or {}
    lines.append(f"  collectives  {'GB per chip and update':<22}{'sent':>9}{'synchronous':>13}")
    for name, sent in sorted(kinds.items(), key=lambda item: -item[1]):
        lines.append(f"               {name:<22}{sent / GB:>9.2f}{waited.get(name, 0.0) / GB:>13.2f}")
    total, exposed = sum(kinds.values()), sum(waited.values())
    share = f" ({exposed / total:.1%})" if total else ""
    lines.append(f"               {'total':<22}{total / GB:>9.2f}{exposed / GB:>13.2f}{share}")
    if r.slices > 1 and r.dcn_bytes is not None:
        lines.append(f"               {'between slices':<22}{r.dcn_bytes / GB:>9.2f}")
    lines += ["  overlap      the largest collectives in loops:", *(f"    {text}" for text in r.overlap)]
    lines.append("  buffers      the largest single values:")
    for b in r.largest_buffers:
        count = f"{b['count']} x " if b["count"] > 1 else ""
        role = "argument" if b["argument"] else "value"
        lines.append(f"    {count}{b['bytes'] / GIB:.3f} GiB {b['shape']} {role}: {b['source']}")
    return "\n".join(lines)


def times(estimate: Estimate) -> list[str]:
    """An estimate as lines of the table."""
    mfu = f", MFU {estimate.mfu[0]:.1%} to {estimate.mfu[1]:.1%}" if estimate.mfu else ""
    fast, slow = estimate.assumed
    indent = " " * 15
    parts = [f"{part} {_span(estimate.parts[part])} s" for part in PARTS if max(estimate.parts[part])]
    lines = [
        f"  time         {_span(estimate.seconds)} s per step{mfu}: {estimate.words}",
        f"{indent}{', '.join(parts)}; of collectives what the schedule leaves exposed",
        f"{indent}fastest: {fast}",
        f"{indent}slowest: {slow}",
    ]
    if estimate.by_cycles < 0.99:
        lines.append(f"{indent}{1 - estimate.by_cycles:.0%} of the products' FLOPs are timed by a share of the peak")
    return lines


def side_by_side(left: CompileReport, right: CompileReport) -> str:
    """Two settings as a text table, with how many times the left one's value the right one's is."""
    both = (left, right)
    rows: list[tuple[str, ...]] = [
        ("", "this", "other", "other / this"),
        ("stage", *(r.stage for r in both), ""),
        ("pod", *((f"{r.slices} x " if r.slices > 1 else "") + r.topology for r in both), ""),
        ("mesh", *map(_mesh, both), ""),
        ("batch per chip", *(f"{r.per_chip_batch:g} of {r.sequence} tokens" for r in both), ""),
        ("remat", *(r.remat for r in both), ""),
        ("options", *map(_options, both), ""),
        ("fits", *("yes" if r.fits else "no" for r in both), ""),
    ]

    def row(name: str, value: Callable[[CompileReport], Any], form: str = ".3g") -> None:
        values = [value(r) for r in both]
        spans = [v if v is None or isinstance(v, tuple) else (v, v) for v in values]
        low, high = (None if s is None else sum(s) / 2 for s in spans)
        rows.append(
            (
                name,
                *("-" if s is None else _span(s, form) for s in spans),
                f"{high / low:.2f} x" if low and high is not None else "",
            )
        )

    row("HBM per chip, GiB", lambda r: r.peak_bytes and r.peak_bytes / GIB, ".2f")
    row("sent, GB per step", lambda r: _total(r.collective_bytes), ".1f")
    row("synchronous, GB", lambda r: _total(r.synchronous_collective_bytes), ".1f")
    if max(left.slices, right.slices) > 1:
        row("between slices, GB", lambda r: r.dcn_bytes and r.dcn_bytes / GB, ".1f")
    for part in PARTS:

        def seconds(r: CompileReport, part: str = part) -> tuple[float, float] | None:
            return r.estimate.parts[part] if r.estimate else None

        if any(max(seconds(r) or (0.0,)) for r in both):
            row(f"{part}, s", seconds)
    row("step, s", lambda r: r.estimate and r.estimate.seconds)
    row("MFU, %", lambda r: r.estimate and r.estimate.mfu and tuple(100 * share for share in r.estimate.mfu), ".1f")
    row("us per token and chip", lambda r: r.estimate and r.seconds_per_token * 1e6)
    return "\n".join([aligned(rows), *_words(both)])


def against(estimate: Estimate, measured: Measured) -> str:
    """The estimate beside a measurement, by part."""
    rows = [("", "estimate, s", "measured, s", "measured / estimate")]

    def row(name: str, low_high: tuple[float, float] | None, seconds: float | None) -> None:
        middle = sum(low_high) / 2 if low_high else 0.0
        rows.append(
            (
                name,
                _span(low_high) if low_high else "-",
                "-" if seconds is None else f"{seconds:.3g}",
                f"{seconds / middle:.2f} x" if middle and seconds is not None else "",
            )
        )

    for part, seconds in measured.parts.items():
        span = estimate.parts.get(part)
        if seconds >= 5e-4 or (span and max(span)):
            row(part, span, seconds)
    row("step", estimate.seconds, measured.seconds)
    row("between steps", None, measured.between)
    plural = "s" if measured.chips > 1 else ""
    return "\n".join(
        [
            aligned(rows),
            f"estimate: {estimate.words}",
            f"measured: the mean of {measured.steps} steps on {measured.chips} chip{plural}; {measured.known:.0%} of "
            "the time is in operations of the compiled program, the rest is sorted by its text",
        ]
    )


def ranking(reports: list[CompileReport]) -> str:
    """The best settings, one line each, best first."""
    rows = [("mesh", "batch per chip", "remat", "options", "GiB", "GB sent", "synchronous", "step, s", "us per token")]
    for r in reports:
        assert r.peak_bytes is not None and r.estimate is not None, "only what fits is ranked"
        sent, exposed = (sum((kinds or {}).values()) for kinds in (r.collective_bytes, r.synchronous_collective_bytes))
        rows.append(
            (
                _mesh(r),
                f"{r.per_chip_batch:g}",
                r.remat,
                _options(r),
                f"{r.peak_bytes / GIB:.2f}",
                f"{sent / GB:.1f}",
                f"{exposed / sent:.0%}" if sent else "-",
                _span(r.estimate.seconds),
                f"{r.seconds_per_token * 1e6:.3g}",
            )
        )
    return "\n".join([aligned(rows), *_words(reports)])


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equally many cells, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _words(reports: Sequence[CompileReport]) -> list[str]:
    """What estimates are, and what they assume; nothing without any."""
    estimate = next((r.estimate for r in reports if r.estimate), None)
    if estimate is None:
        return []
    fast, slow = estimate.assumed
    lines = [f"times: {estimate.words}", f"  fastest: {fast}", f"  slowest: {slow}"]
    if not all(r.whole for r in reports):
        lines.append("only scheduled: products timed by a share of the peak, memory exact to 0.3 GiB")
    return lines


def _total(kinds: dict[str, float] | None) -> float | None:
    """GB of all kinds."""
    return None if kinds is None else sum(kinds.values()) / GB


def _mesh(report: CompileReport) -> str:
    return " ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"


def _options(report: CompileReport) -> str:
    without = ["compiler_options=none"] * (report.compiler_options == "none")
    return " ".join([*without, *(f"{name}={value}" for name, value in report.options.items())]) or "-"


def _span(values: tuple[float, float], form: str = ".3g") -> str:
    """'2.51 to 2.75', or one number where both are the same."""
    low, high = (format(value, form) for value in values)
    return low if low == high else f"{low} to {high}"
