"""How long a step takes by the TPU compiler's own numbers: a comparison of settings, not a measurement.

The schedule of a compiled program is played through: computation in its order, collectives beside it on the wires.

- A matrix product takes the cycles that the compiler estimates for it (`estimated_cycles`, in the text of a finished
  compilation). Where there are none (a program that is only scheduled) it runs at `Chip.products` of the peak.
- Everything elementwise takes the time of its bytes at the published rate of the main memory (HBM). The compiler's
  cycles for it are three to four times as many.
- The attention kernel is opaque. Its products, of the blocks that the causal mask leaves, run at a share of the peak
  that is assumed. So do those of other kernels that state their FLOPs; the rest are taken as elementwise.
- A collective takes the time that the compiler's scheduler gives it (`seconds`), and costs the step what the schedule
  leaves exposed: all of it when it is synchronous, else what is left when its result is needed.

Copies between main and vector memory, which run beside the computation, cost nothing.
"""

import math
import re
from dataclasses import dataclass, field, replace

from rynnvla_jax.aot import hlo, pods
from rynnvla_jax.aot.hlo_parser import Frame, Op, parse
from rynnvla_jax.train import flops

WORDS = "compiler's estimate, not measured on a TPU"
# They take no time of their own: names for values, and what runs other computations.
FREE = re.compile(
    r"parameter|get-tuple-element|tuple|constant|bitcast|after-all|add-dependency|optimization-barrier|partition-id|"
    r"replica-id|custom-call|while|conditional|call"
)
SLICES = {"dynamic-slice", "slice", "gather"}  # they read no more than they return
OP_NAME = r'op_name="([^"]*)"'
KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclass(frozen=True)
class Assumed:
    """What the compiler does not say. `hbm` and `attention` are shares of the published rates; `queue`: collectives
    that run at the same time share the wires, one after the other."""

    hbm: float
    attention: float
    queue: bool

    def __str__(self) -> str:
        wires = "share the wires" if self.queue else "do not slow each other"
        return f"HBM at {self.hbm:.0%} and attention at {self.attention:.0%} of peak, concurrent collectives {wires}"


FAST, SLOW = Assumed(1.0, 0.6, queue=False), Assumed(0.7, 0.4, queue=True)
PARTS = ("products", "elementwise", "attention", "collectives", "between slices")


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and of its parts, each from `FAST` to `SLOW`; of collectives and the network between slices
    only what the schedule leaves exposed. `mfu` is None when the stage has no formula of its FLOPs."""

    seconds: tuple[float, float]
    parts: dict[str, tuple[float, float]]
    mfu: tuple[float, float] | None
    by_cycles: float  # share of the products' FLOPs whose time is the compiler's own
    assumed: tuple[str, str] = (str(FAST), str(SLOW))
    words: str = WORDS


def estimate(text: str, topology: str, model_flops: float | None = None) -> Estimate:
    """The time of a step.

    Args:
      text: the scheduled program, of a finished compilation or of `schedule.schedule`.
      topology: the pod, for example v6e:8x8.
      model_flops: per chip and step, by formula, for the MFU.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    frame = Frame(parse(text), parse(text).entry)
    fast, slow = (_Clock(topology, assumed) for assumed in (FAST, SLOW))
    for clock in (fast, slow):
        clock.run(frame)
    seconds = fast.now, slow.now
    peak = flops.PEAK_FLOPS[pods.CHIPS[pods.kind(topology)].peak]
    return Estimate(
        seconds,
        {part: (fast.parts[part], slow.parts[part]) for part in PARTS},
        None if model_flops is None else (model_flops / peak / seconds[1], model_flops / peak / seconds[0]),
        fast.cycled / fast.flops if fast.flops else 0.0,
    )


@dataclass
class _Clock:
    """Plays a schedule through; `now` is in seconds since the start of the step."""

    topology: str
    assumed: Assumed
    now: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    free: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})  # wires, network between slices
    flops: float = 0.0
    cycled: float = 0.0  # of those, with cycles

    def run(self, frame: Frame, pending: dict[str, tuple[float, bool]] | None = None) -> None:
        """One turn of a computation. `pending`: when the collectives are done that the last turn left running."""
        pending = {} if pending is None else pending
        starts: dict[int, list[hlo.Transfer]] = {}
        ends: dict[int, list[hlo.Transfer]] = {}
        for t in hlo.in_schedule(frame):
            starts.setdefault(t.start, []).append(t)
            ends.setdefault(t.end, []).append(t)
        for i, op in enumerate(frame.ops.values()):
            for t in ends.get(i, []):
                if t.start != i and t.name in pending:
                    self._wait(*pending.pop(t.name))
            self._compute(frame, op)
            for t in starts.get(i, []):
                takes = seconds(t, self.topology)
                begin = max(self.now, self.free[t.dcn]) if self.assumed.queue else self.now
                self.free[t.dcn] = max(self.free[t.dcn], begin + takes)
                if t.end == i:
                    self._wait(begin + takes, t.dcn)
                else:
                    pending[t.name] = begin + takes, t.dcn

    def _wait(self, until: float, dcn: bool) -> None:
        exposed = max(0.0, until - self.now)
        self.parts["between slices" if dcn else "collectives"] += exposed
        self.now += exposed

    def _compute(self, frame: Frame, op: Op) -> None:
        if op.opcode == "while":
            self._loop(frame, op)
        elif op.opcode in ("conditional", "call"):
            for name in op.called:
                self.run(frame.into(name, op))
        else:
            part, takes = self._work(frame, op)
            self.parts[part] += takes
            self.now += takes

    def _loop(self, frame: Frame, op: Op) -> None:
        """Two turns; those that follow are like the second."""
        turns = frame.turns(op)
        turns = 1 if turns is None else turns
        pending: dict[str, tuple[float, bool]] = {}
        before = self
        for _ in range(min(turns, 2)):
            before = replace(self, parts=dict(self.parts), free=dict(self.free))
            for name in op.called:
                if f"condition=%{name}" not in op.rest:
                    self.run(frame.into(name, op), pending)
        more = turns - 2
        if more > 0:
            passed = (self.now - before.now) * more
            self.parts = {part: s + (s - before.parts[part]) * more for part, s in self.parts.items()}
            self.free = {dcn: at + passed for dcn, at in self.free.items()}
            self.flops += (self.flops - before.flops) * more
            self.cycled += (self.cycled - before.cycled) * more
            self.now += passed

    def _work(self, frame: Frame, op: Op) -> tuple[str, float]:
        """The part of the step that an operation belongs to, and its seconds, without waiting for others."""
        chip, part = pods.CHIPS[pods.kind(self.topology)], part_of(frame, op)
        peak = flops.PEAK_FLOPS[chip.peak]
        if part == "attention":
            return part, attention_flops(frame, op) / (peak * self.assumed.attention)
        if part == "elementwise":
            return part, _traffic(frame, op) / (chip.hbm_rate * self.assumed.hbm)
        if part != "products":
            return "elementwise", 0.0
        multiplied = hlo.op_flops(frame, op) or _stated_flops(op)
        self.flops += multiplied
        if cycles := op.attribute(r'"estimated_cycles":"(\d+)"'):
            self.cycled += multiplied
            return part, int(cycles) / chip.clock
        return part, multiplied / (peak * chip.products)


def parts_of(text: str) -> dict[str, str]:
    """Operation -> the part of the step that its time belongs to: one of `PARTS`, "copies" or "other".

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    return {op.name: part_of(frame, op) for frame, _ in parse(text).frames() for op in frame.ops.values()}


def part_of(frame: Frame, op: Op) -> str:
    """As in `parts_of`. Waiting for an asynchronous operation belongs to what it waits for."""
    if op.opcode == "custom-call" and KERNEL in op.rest:
        return "attention" if attention_flops(frame, op) else "products" if _stated_flops(op) else "elementwise"
    if hlo.op_flops(frame, op):
        return "products"
    if hlo.communicates(frame, op):
        return "collectives"
    if op.opcode in ("send", "recv"):
        return "between slices" if "xla_megascale_runtime" in op.rest else "collectives"
    if op.opcode.endswith(("-done", "-update")):
        return part_of(frame, frame.ops[op.operands[0]])
    if op.opcode.endswith("-start"):
        return "copies"
    return "other" if FREE.fullmatch(op.opcode) else "elementwise"


def _stated_flops(op: Op) -> float:
    """FLOPs that a kernel says it has; 0 when it does not."""
    return float(op.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)


def seconds(transfer: hlo.Transfer, topology: str) -> float:
    """How long a collective takes when nothing else is on the wires.

    Source: the costs that libtpu 0.0.42's scheduler gives collectives of a known size ("Wasted cycles for ..." with
    TPU_VMODULE=latency_hiding_scheduler=1; v4:4x4x4, v5e:4x4, v5e:16x16, v5p:4x4x4, v6e:8x8 and v6e:16x16). With
    `Chip.link` for one direction of one link: an all-gather and a reduce-scatter fill both directions of one axis, an
    all-reduce one direction of each axis that it goes along, a permutation one link. An all-gather along both rings of
    a v6e fills both. All-to-alls have no cost there and are taken like all-gathers. Between slices: the rate that
    Google publishes for a chip's share of its host's network.
    """
    name, _, shape = topology.partition(":")
    chip = pods.CHIPS[name]
    if transfer.dcn:
        return transfer.wire / chip.dcn
    sides = [int(side) for side in shape.split("x")]
    if transfer.kind in ("collective-permute", "send-recv"):
        return transfer.wire / chip.link
    lanes = 2
    axes = _axes(sides, transfer.group)
    if transfer.kind == "all-reduce":
        lanes = axes
    elif transfer.kind == "all-gather" and name == "v6e" and axes == 2 and all(pods.wrap(name, sides)[:2]):
        lanes = 4
    # The scheduler counts whole operands, not the part of them that leaves the chip.
    return transfer.wire * transfer.group / (transfer.group - 1) / (lanes * chip.link)


def _axes(sides: list[int], group: int) -> int:
    """Along how many axes of a torus a group of devices lies at least."""
    reached = [math.prod(sorted(sides, reverse=True)[:count]) for count in range(1, len(sides) + 1)]
    return next((count for count, size in enumerate(reached, 1) if size >= group), len(sides))


def attention_flops(frame: Frame, op: Op) -> float:
    """FLOPs of the products in a splash-attention kernel, of the blocks that a causal mask does not leave out; 0 for
    another kernel.

    Per head, block of queries and block of keys: two products forward, three for the queries' gradient, four for that
    of keys and values, five for all three in one kernel.
    """
    name = re.search(r"splash_\w*?_(fwd|dq|dkv)", f"{op.name} {op.attribute(OP_NAME)}")
    operands = [frame.ops[operand] for operand in op.operands]
    wide = [operand.dims for operand in operands if re.match(r"(bf|f)\d+\[\d+,\d+,\d", operand.type)]
    if name is None or not wide:
        return 0.0
    fused = re.search(r"use_fused_bwd_kernel\W+true", op.rest)
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[name[1]]
    *heads, length, head_dim = max(wide, key=math.prod)  # of the queries: (batch,) heads, length, head_dim
    grid = next((x.dims for x in operands if re.match(r"s\d+\[\d+,\d+,\d+\]", x.type)), [1, length, length])
    queries, keys = grid[1:]
    blocks = sum(-(-(row + 1) * keys // queries) for row in range(queries))  # at or below the diagonal
    return products * 2.0 * math.prod(heads) * length**2 * head_dim * blocks / (queries * keys)


def _traffic(frame: Frame, op: Op) -> float:
    """Bytes that an operation reads from and writes to main memory."""
    read = sum(_read(frame, op, i) for i in range(len(op.operands)))
    return read + _written(frame, op)


def _read(frame: Frame, op: Op, index: int) -> float:
    """Bytes of an operand that an operation reads: of an array from which it takes a slice, the slice."""
    operand = frame.ops[op.operands[index]]
    whole = _in_memory(operand)
    if op.opcode in SLICES and index == 0:
        return min(whole, op.bytes)
    if op.opcode == "dynamic-update-slice" and index == 0:
        return 0.0
    if op.opcode != "fusion" or not whole:
        return whole
    inner = frame.into(op.called[0], op)
    parameter = next(x.name for x in inner.ops.values() if x.opcode == "parameter" and int(x.inner) == index)
    return min(whole, _used(inner, parameter))


def _used(frame: Frame, name: str) -> float:
    """Bytes of a value that its users in a fused computation read."""
    total = 0.0
    for user in frame.ops.values():
        for index in (i for i, operand in enumerate(user.operands) if operand == name):
            total += _used(frame, user.name) if user.opcode == "bitcast" else _read(frame, user, index)
    return total


def _written(frame: Frame, op: Op) -> float:
    """Bytes that an operation writes: of an array that it updates in place, the update."""
    if op.opcode == "fusion":
        inner = frame.into(op.called[0], op)
        root = inner.program.root(inner.name)
        values = [inner.ops[name] for name in root.operands] if root.opcode == "tuple" else [root]
        return min(_in_memory(op), sum(_written(inner, value) for value in values))
    if op.opcode == "dynamic-update-slice":
        return frame.ops[op.operands[1]].bytes
    if op.opcode == "bitcast":
        return _written(frame, frame.ops[op.operands[0]])
    return _in_memory(op)


def _in_memory(op: Op) -> float:
    """Bytes of a value in main memory; other memory spaces are S(1) and above in a layout."""
    return sum(size for size, _, layout in op.arrays if not re.search(r"S\([1-9]", layout))
