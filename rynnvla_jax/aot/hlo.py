"""Analyses a compiled program for TPU or GPU from its schedule (`compiled.as_text()`): communicated bytes, how many of
them overlap with matrix products, the largest values, and the FLOPs of its matrix products.

`compiled.cost_analysis()` counts the body of a loop once; here every operation is counted as often as the loops around
it run. Custom kernels (Pallas) are opaque: each counts as one matrix product of zero FLOPs, and data that it sends by
itself is not counted. All branches of a conditional are counted.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rynnvla_jax.aot.hlo_parser import Frame, Op, Program, parse

# Bytes that a device sends, from the bytes `b` of its operands in a group of `n`. The text does not say which algorithm
# the runtime picks, so these are the lower bounds (rings reach them).
WIRE = {
    "all-gather": lambda b, n: b * (n - 1),
    "all-reduce": lambda b, n: 2 * b * (n - 1) / n,
    "reduce-scatter": lambda b, n: b * (n - 1) / n,
    "all-to-all": lambda b, n: b * (n - 1) / n,
    "ragged-all-to-all": lambda b, n: b * (n - 1) / n,
    "collective-permute": lambda b, n: b,
    "collective-broadcast": lambda b, n: b,
}
# The same between `n` TPU slices, from the bytes `r` that a device receives in the end.
DCN_WIRE = {
    "ALL_REDUCE": lambda r, n: 2 * r * (n - 1) / n,
    "REDUCE_SCATTER": lambda r, n: r * (n - 1),
    "ALL_GATHER": lambda r, n: r * (n - 1) / n,
    "ALL_TO_ALL": lambda r, n: r * (n - 1) / n,
    "ONE_TO_ONE": lambda r, n: r,
}
LOOKS_COLLECTIVE = re.compile(r"all-|ragged-all|collective-|reduce-scatter")
PRODUCT_CALLS = re.compile(
    r'custom_call_target="[^"]*(tpu_custom_call|gemm|matmul|conv|dot|cudnn|fmha|attention|triton)'
)
# They produce no value of their own: `largest_buffers` prefers to name the operation that really computed a buffer.
PASSIVE = {"parameter", "get-tuple-element", "tuple", "while", "bitcast", "copy", "copy-done", "broadcast", "constant"}


@dataclass(frozen=True)
class Transfer:
    """A collective. `wire`: bytes that a device sends per run; `group`: how many devices (or slices) take part;
    `times`: runs per step; `products`: how many matrix products (and custom kernels) are scheduled between its start
    and its end. `start` and `end` are positions in the schedule of its computation, and equal where it is synchronous;
    with an `end` before `start` it ends in the next turn of the loop around."""

    name: str
    kind: str
    shape: str
    wire: float
    group: int
    times: float
    products: float
    dcn: bool
    in_loop: bool
    source: str
    start: int
    end: int


@dataclass(frozen=True)
class Collectives:
    """Bytes sent per device and step, by kind, and how many operations run.

    With operands of b bytes in a group of n devices: all-gather b (n - 1), which is its output (n - 1) / n; all-reduce
    2 b (n - 1) / n; reduce-scatter and all-to-all b (n - 1) / n; collective-permute and -broadcast b. `synchronous` is
    the part that overlaps with no matrix product: it has no start and done, or no product between them. `dcn` is what
    leaves the slice, and is not in the other figures; for an all-reduce of b bytes it is 2 b (n - 1) / n with n slices.
    """

    by_kind: dict[str, float]
    synchronous: dict[str, float]
    counts: dict[str, float]
    dcn: float
    dcn_synchronous: float

    @property
    def total(self) -> float:
        return sum(self.by_kind.values())

    @property
    def synchronous_total(self) -> float:
        return sum(self.synchronous.values())


def collectives(text: str) -> Collectives:
    """The bytes that a device sends per step; see `Collectives` for the formulas.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    by_kind: dict[str, float] = defaultdict(float)
    synchronous: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    dcn = [0.0, 0.0]
    for t in transfers(text):
        sent, exposed = t.wire * t.times, 0.0 if t.products else t.wire * t.times
        if t.dcn:
            dcn = [dcn[0] + sent, dcn[1] + exposed]
        else:
            by_kind[t.kind] += sent
            counts[t.kind] += t.times
            synchronous[t.kind] += exposed
    return Collectives(dict(by_kind), {k: v for k, v in synchronous.items() if v}, dict(counts), *dcn)


def overlap(text: str, count: int = 20) -> list[str]:
    """Lines of text: the largest collectives inside loops and what is scheduled during them; identical ones in one
    line.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    alike: dict[tuple, list[Transfer]] = defaultdict(list)
    for t in transfers(text):
        if t.in_loop:
            alike[t.kind, t.shape, t.wire, t.times, t.products, t.dcn, t.source].append(t)
    lines = []
    for same in sorted(alike.values(), key=lambda same: -len(same) * same[0].wire * same[0].times)[:count]:
        t = same[0]
        plural = "" if t.products == 1 else "s"
        state = f"{t.products:g} product{plural} between start and done" if t.products else "synchronous"
        lines.append(
            f"{len(same)} x {t.kind}{' between slices' if t.dcn else ''} {t.shape}, {t.wire / 1e6:.1f} MB each, "
            f"{t.times:g} times, {len(same) * t.wire * t.times / 1e9:.2f} GB per step: {state}; {t.source}"
        )
    return lines


def transfers(text: str) -> list[Transfer]:
    """All collectives of a program, those in a group of one device left out.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    found = []
    for frame, times in parse(text).frames():
        mine = in_schedule(frame, times)
        _check(frame, times, bool(mine))
        found += mine
    return found


def _check(frame: Frame, times: float, matters: bool) -> None:
    # Loops without collectives or products, such as a random generator's, may have any number of turns.
    if matters and math.isnan(times):
        loop = next(op for f, op in frame.callers() if op.opcode == "while" and f.turns(op) is None)
        raise ValueError(f"the number of turns of a loop around this cannot be read: {loop}")


def in_schedule(frame: Frame, times: float = 1.0) -> list[Transfer]:
    """The collectives that one computation schedules itself, those in a group of one device left out.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    return [t for t in _transfers(frame, times) if t.wire]


def _transfers(frame: Frame, times: float) -> Iterator[Transfer]:
    """The collectives of one schedule."""
    ops = list(frame.ops.values())
    products = [_products(frame, op) for op in ops]
    # An asynchronous pair is two operations; the second one names the first as its operand. A chain of updates may lie
    # between them.
    after = {op.operands[0]: i for i, op in enumerate(ops) if re.search("-(done|update)$", op.opcode) and op.operands}
    chains: dict[str, list[tuple[int, str, str, Frame, Op]]] = defaultdict(list)

    def transfer(
        op: Op, kind: str, sent: tuple[float, int], start: int, end: int, own: float = 0.0, dcn: bool = False
    ) -> Transfer:
        source, shape, hidden = frame.program.source(op), max(op.arrays)[1], own + during(start, end)
        return Transfer(op.name, kind, shape, *sent, times, hidden, dcn, frame.in_loop, source, start, end)

    def during(start: int, end: int) -> float:
        """Products after `start` and before `end`, which may lie in the next turn of the loop."""
        # Software pipelining: a loop's body may start a transfer at its end and wait for it early in the next turn.
        return sum(products[start + 1 : end]) if end >= start else sum(products[start + 1 :]) + sum(products[:end])

    def done(start: int) -> int:
        """Where what starts at `start` ends: there when it is synchronous, in the next turn when nothing waits."""
        if not ops[start].opcode.endswith("-start") and ops[start].opcode != "recv":
            return start
        end = after.get(ops[start].name)
        while end is not None and ops[end].name in after:
            end = after[ops[end].name]
        return end or 0

    for i, op in enumerate(ops):
        if kind := _kind(op):
            yield transfer(op, kind, _wire(frame, op, kind), i, done(i))
        # Transfers between slices are send/recv pairs of a host library (Megascale). Only the recv is counted: it has
        # the shape of the result, and with both ends the bytes would be counted twice.
        elif op.opcode == "recv" and "xla_megascale_runtime" in op.rest:
            kind = op.attribute(r'_xla_megascale_transfer_type="(\w+)"') or ""
            slices = _count(op.attribute(r'_xla_megascale_target="\{([^}]*)\}') or "")
            if kind not in DCN_WIRE or not slices:
                raise ValueError(f"a transfer between slices that is not known: {op}")
            sent = float(DCN_WIRE[kind](op.arrays[0][0], slices)), slices
            yield transfer(op, kind.lower().replace("_", "-"), sent, i, done(i), dcn=True)
        elif op.opcode == "recv" and "is_host_transfer=true" not in op.rest:
            yield transfer(op, "send-recv", (float(op.arrays[0][0]), 2), i, done(i))
        elif op.opcode == "fusion" or op.opcode.endswith("-start"):
            for inner in _within(frame, op):
                for part in inner.ops.values():
                    if not (kind := _kind(part)):
                        continue
                    if "async_collective_fusion_config" in part.rest:
                        chains[_channel(part)].append((i, _role(inner.ops), kind, inner, part))
                        continue
                    if any(o.opcode == "dynamic-slice" and o.operands[0] == part.name for o in inner.ops.values()):
                        kind = {"all-reduce": "reduce-scatter"}.get(kind, kind)  # TPU's way to write one
                    yield transfer(part, kind, _wire(inner, part, kind), i, done(i), products[i])
    # The TPU compiler spreads an asynchronous collective over fusions that share its channel: one starts it, others
    # compute meanwhile, one ends it. Only the start is counted.
    for channel, steps in chains.items():
        ends = [i for i, role, _, _, _ in steps if role == "Done"]
        for i, role, kind, inner, part in steps:
            if role == "Start":
                end = next((e for e in ends if e > i), ends[0] if ends else 0)
                yield transfer(part, kind, _wire(inner, part, kind), i, end)
        if not any(_role(c) == "Start" and _on(c, channel) for c in frame.program.computations.values()):
            raise ValueError(f"a part of a collective that nothing starts: {steps[0][-1]}")


def _within(frame: Frame, op: Op) -> Iterator[Frame]:
    """The computations that an operation runs as a part of itself: what is fused, and what is called asynchronously,
    for example by a SparseCore."""
    for name in op.called:
        inner = frame.into(name, op)
        yield inner
        for part in inner.ops.values():
            if part.opcode == "call":
                yield from _within(inner, part)


def _role(ops: dict[str, Op]) -> str:
    """'Start' or 'Done' for the fusion that starts or ends an asynchronous collective, else ''."""
    return next((o.attribute(r'custom_call_target="AsyncCollective(\w+)"') or "" for o in ops.values() if o.root), "")


def _on(ops: dict[str, Op], channel: str) -> bool:
    return any(_kind(op) and _channel(op) == channel for op in ops.values())


def _channel(op: Op) -> str:
    """What the parts of one collective have in common."""
    return op.attribute(r"channel_id=(\d+)") or ""


def _count(ranges: str) -> int:
    """How many numbers '1,2' or '0:3,7' are."""
    bounds = [[int(n) for n in part.split(":")] for part in ranges.split(",") if part]
    return sum(b[-1] - b[0] + 1 for b in bounds)


def communicates(frame: Frame, op: Op) -> bool:
    """Whether an operation of a schedule is or starts a collective, or holds one or a part of one."""
    if op.opcode == "fusion" or (op.opcode.endswith("-start") and op.called):
        return any(_kind(part) for inner in _within(frame, op) for part in inner.ops.values())
    return _kind(op) is not None


def _kind(op: Op) -> str | None:
    """The kind of collective that an operation is or starts.

    Raises:
      ValueError: it looks like a collective but is none that is known here.
    """
    kind = op.opcode.removesuffix("-start")
    if kind in WIRE:
        return kind
    if LOOKS_COLLECTIVE.match(kind) and not kind.endswith(("-done", "-update")):
        raise ValueError(f"a collective that is not known: {op}")
    return None


def _wire(frame: Frame, op: Op, kind: str) -> tuple[float, int]:
    """Bytes that a device sends in one run of a collective, and how many devices take part."""
    if kind == "collective-permute":
        pairs = op.attribute(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}") or ""
        group = 1 + any(a != b for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs))
    else:
        group = _group(frame.program, op)
    operands = op.operands[:1] if kind == "ragged-all-to-all" else op.operands
    sent = float(WIRE[kind](sum(frame.ops[name].bytes for name in operands), group)) if group > 1 else 0.0
    return sent, group


def _group(program: Program, op: Op) -> int:
    """How many devices take part together."""
    # Three notations: {{0,1},{2,3}}, [groups,size]<=[...] (iota) and a mesh with the axes that take part.
    if "replica_groups={}" in op.rest or "replica_groups=" not in op.rest:
        return program.devices
    if listed := op.attribute(r"replica_groups=\{(\{[\d,{}]*\})\}"):
        return max(len(group.split(",")) for group in listed.split("},{"))
    if size := op.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(size)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.rest)
    if not mesh:
        raise ValueError(f"replica groups that are not known: {op}")
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])  # an 'axis', or a part of it: 'axis':(before)size
    return math.prod(int(part or sizes[axis]) for axis, part in axes)


def _is_product(op: Op) -> bool:
    return op.opcode in ("dot", "convolution") or (op.opcode == "custom-call" and bool(PRODUCT_CALLS.search(op.rest)))


def _products(frame: Frame, op: Op) -> float:
    """Matrix products in one operation of a schedule: a fusion has one or none, a loop those of all its turns."""
    inner = [frame.into(name, op) for name in op.called]
    found = sum(_products(f, o) for f in inner for o in f.ops.values()) + _is_product(op)
    return float(bool(found)) if op.opcode == "fusion" else found * (frame.turns(op) or 1)


@dataclass(frozen=True)
class Buffer:
    """A value in main memory; `source` is the argument that it is or what computes it, `count` how many are alike."""

    bytes: int
    shape: str
    name: str
    source: str
    argument: bool
    count: int


def largest_buffers(text: str, count: int = 12) -> list[Buffer]:
    """The largest single values of a program, largest first: arguments, what loops carry, temporaries.

    They do not all live at the same time, so their sum is meaningless; `memory_analysis()` has the peak. Values that
    share memory count as one: what a loop carries from turn to turn, a donated argument and its result, an array and
    its update in place. Values in a TPU's vector memory or on the host are left out.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    program, same = parse(text), _Aliases()
    names = list(dict.fromkeys(frame.name for frame, _ in program.frames()))
    for name in names:
        for op in program.computations[name].values():
            _join(program, name, op, same)
    ops = program.computations[program.entry]
    arguments = {int(op.inner): op.name for op in ops.values() if op.opcode == "parameter"}
    for output, argument in program.donated:
        same.join((program.entry, program.root(program.entry).name, output), (program.entry, arguments[argument], 0))
    best: dict[tuple, tuple[tuple, Buffer]] = {}
    for name in names:
        ops = program.computations[name]
        for op in ops.values():
            if op.opcode.endswith("-start") or op.opcode in ("send", "recv"):
                continue  # memory of the operand, and of what comes out in the end
            argument, maker = op.opcode == "parameter" and name == program.entry, op
            while maker.opcode in ("copy", "copy-done", "copy-start") and "op_name=" not in maker.rest:
                maker = ops[maker.operands[0]]
            rank = (argument, op.opcode not in PASSIVE and "AllocateBuffer" not in op.rest, "op_name=" in op.rest)
            for i, (size, shape, layout) in enumerate(op.arrays):
                key = same.find((name, op.name, i))
                # S(1) and above in a layout are other memory spaces than the device's main memory.
                if not re.search(r"S\([1-9]", layout) and (key not in best or best[key][0] < rank):
                    best[key] = rank, Buffer(size, shape, op.name, program.source(maker), argument, 1)
    alike: dict[tuple, Buffer] = {}
    for _, b in best.values():
        known = alike.get((b.shape, b.source, b.argument))
        alike[b.shape, b.source, b.argument] = replace(known or b, count=known.count + 1 if known else 1)
    return sorted(alike.values(), key=lambda b: -b.bytes)[:count]


class _Aliases:
    """Which values, each (computation, operation, element of its tuple), are the same memory (a union-find)."""

    def __init__(self):
        self.of: dict[tuple, tuple] = {}

    def find(self, key: tuple) -> tuple:
        while key in self.of:
            key = self.of[key]
        return key

    def join(self, a: tuple, b: tuple) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self.of[a] = b


def _join(program: Program, name: str, op: Op, same: _Aliases) -> None:
    """Notes which values of an operation are the same memory as others."""

    def whole(inside: str, a: Op, b: str) -> None:
        for i in range(len(a.arrays)):
            same.join((inside, a.name, i), (name, b, i))

    if op.opcode == "get-tuple-element":
        same.join((name, op.name, 0), (name, op.operands[0], int(op.needed(r"index=(\d+)"))))
    elif op.opcode == "tuple":
        for i, operand in enumerate(op.operands):
            same.join((name, op.name, i), (name, operand, 0))
    elif op.opcode in ("bitcast", "optimization-barrier", "dynamic-update-slice"):
        whole(name, op, op.operands[0])
    elif op.opcode == "fusion":
        for output, operand in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", op.rest.split("metadata=")[0]):
            same.join((name, op.name, int(output or 0)), (name, op.operands[int(operand)], 0))
    elif op.opcode in ("while", "call"):
        if op.opcode == "while":
            whole(name, op, op.operands[0])
        for called in op.called:
            if f"condition=%{called}" not in op.rest:
                whole(called, program.root(called), op.name)
            for inner in program.computations[called].values():
                if inner.opcode == "parameter":
                    whole(called, inner, op.operands[int(inner.inner)])


def dot_flops(text: str) -> float:
    """FLOPs of the matrix products and convolutions that a device runs per step, two for each multiplication. Those in
    custom kernels (Pallas) and in library calls are not counted.

    Raises:
      ValueError: the program cannot be read; names the line.
    """
    total = 0.0
    for frame, times in parse(text).frames():
        flops = sum(op_flops(frame, op) for op in frame.ops.values())
        _check(frame, times, bool(flops))
        total += times * flops if flops else 0.0
    return total


def op_flops(frame: Frame, op: Op) -> float:
    """FLOPs of the matrix products and convolutions in one operation of a schedule, without those that a loop runs."""
    if op.opcode in ("dot", "convolution"):
        return _flops(frame.ops, op)
    if op.opcode not in ("fusion", "async-start", "call-start"):
        return 0.0
    return sum(op_flops(inner, part) for inner in _within(frame, op) for part in inner.ops.values())


def _flops(ops: dict[str, Op], op: Op) -> int:
    left, right, out = ops[op.operands[0]].dims, ops[op.operands[1]].dims, op.dims
    if op.opcode == "dot":
        contracted = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    # A convolution: the TPU compiler writes most matrix products as one. With padding and dilation there are positions
    # where kernel and input do not meet, which cost nothing, so the meeting pairs are counted axis by axis.
    a, b, c = (op.needed(r"dim_labels=" + labels) for labels in (r"(\w+)_\w+->", r"\w+_(\w+)->", r"\w+_\w+->(\w+)"))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", op.attribute(r"window=\{([^}]*)\}") or ""))
    taps = 1  # pairs of an output and an input position that meet, over the spatial axes
    for axis in range(sum(x.isdigit() for x in a)):
        setting = {key: int(value.split("x")[axis].split("_")[0]) for key, value in window.items()}
        offsets = [k * setting.get("rhs_dilate", 1) - setting.get("pad", 0) for k in range(right[b.index(str(axis))])]
        positions = (left[a.index(str(axis))], setting.get("lhs_dilate", 1))
        taps *= sum(_hits(offset, setting.get("stride", 1), out[c.index(str(axis))], *positions) for offset in offsets)
    groups = int(op.attribute(r"batch_group_count=(\d+)") or 1)
    return 2 * taps * right[b.index("i")] * out[c.index("f")] * (left[a.index("b")] // groups)


def _hits(offset: int, stride: int, outputs: int, size: int, spread: int) -> int:
    """How many of `outputs` find an input at o * stride + offset, of `size` inputs that lie `spread` apart."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, ((size - 1) * spread - offset) // stride)
    if spread == 1:
        return max(0, last - first + 1)
    return sum((o * stride + offset) % spread == 0 for o in range(first, last + 1))
