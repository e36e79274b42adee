"""The scheduled program of an XLA compiler (`compiled.as_text()`) as data: computations, operations, turns of loops.

Text in, Python objects out; `hlo` measures them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

# They hand on their first operand: the value of an integer can be followed through them.
FORWARDS = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier"}
SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
OP = re.compile(r"\s+(ROOT )?%(\S+) = (.*)")
CLOSED = re.compile(r'\}(?:, execution_thread="[^"]*")?')  # the last line of a computation
# Parts of an op_name that every layer has: without them the interesting names are short enough for a table.
NOISE = {"", "while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "shard_map"}


@dataclass(frozen=True)
class Op:
    """One operation. `type` is its shape or tuple of shapes, `rest` what follows the operands."""

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    inner: str  # the operands as written: a constant's value, a parameter's number
    rest: str
    root: bool

    def __str__(self) -> str:
        return f"%{self.name} = {self.type} {self.opcode}({self.inner}){self.rest}"[:400]

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in what follows the operands."""
        found = re.search(pattern, self.rest)
        return found[1] if found else None

    def needed(self, pattern: str) -> str:
        """As `attribute`, for what every operation of this kind has.

        Raises:
          ValueError: it is missing.
        """
        found = self.attribute(pattern)
        if found is None:
            raise ValueError(f"{pattern!r} is not found in {self}")
        return found

    @cached_property
    def called(self) -> list[str]:
        """Computations that it runs: bodies, branches, fused ones; not the scalar functions of reductions."""
        names = re.findall(r"\b(?:body|condition|calls|true_computation|false_computation)=%([^\s,}]+)", self.rest)
        names += re.findall(r"%([^\s,}]+)", self.attribute(r"branch_computations=\{([^}]*)\}") or "")
        if self.opcode in ("call", "call-start"):  # of reductions and sorts, `to_apply` is the scalar function
            names += re.findall(r"to_apply=%([^\s,}]+)", self.rest)
        return names

    @cached_property
    def arrays(self) -> list[tuple[int, str, str]]:
        """(bytes, shape such as 'f32[8,128]', layout) of the value, or of each element of a tuple.

        Raises:
          ValueError: an element type that is not known.
        """
        found = []
        for dtype, dims, layout in SHAPE.findall(self.type):
            bits = re.match(r"(?:s|u|f|bf|c)(\d+)", dtype)
            if not bits and dtype not in ("pred", "token", "opaque"):
                raise ValueError(f"element type {dtype} is not known: {self}")
            width = int(bits[1]) if bits else 8 * (dtype == "pred")  # a boolean takes a byte, a token nothing
            count = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
            found.append((count * width // 8, f"{dtype}[{dims}]", layout))
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all elements, without the padding of tiles."""
        return sum(size for size, _, _ in self.arrays)

    @property
    def dims(self) -> list[int]:
        """Dimensions of an array, or of the first of a tuple."""
        _, dims, _ = SHAPE.findall(self.type)[0]
        return [int(d) for d in dims.split(",") if d]


@dataclass(frozen=True)
class Program:
    """Computations by name, their operations by name in the order in which they are scheduled."""

    computations: dict[str, dict[str, Op]]
    entry: str
    devices: int
    donated: list[tuple[int, int]]  # (output, argument whose memory it gets)
    functions: dict[str, str]  # stack frame -> functions of the source

    def root(self, computation: str) -> Op:
        return next(op for op in self.computations[computation].values() if op.root)

    def source(self, op: Op) -> str:
        """Where an operation comes from: named scopes, else functions, then primitive and pass:
        'Block.mlp/dot_general (backward)'; an argument's path: 'params/blocks/wq'."""
        while not (name := op.attribute(r'op_name="((?:[^"\\]|\\.)*)"')) and op.opcode == "fusion":
            op = self.root(op.called[0])
        path = (name or "").replace("\\'", "'")
        if op.opcode == "parameter":
            return re.sub(r"\['?([^']*?)'?\]", r"/\1", path)
        passes = {"recomputed": "rematted_computation", "backward": "transpose(", "forward": "jvp("}
        when = next((f" ({name})" for name, mark in passes.items() if mark in path), "")
        bare = re.sub(r"p?jit\([^()]*\)|\b(?:transpose|jvp|vmap)\(|\)", "", path)
        *scopes, primitive = [part for part in bare.split("/") if part not in NOISE] or [op.opcode]
        functions = self.functions.get(op.attribute(r"stack_frame_id=(\d+)") or "", "")
        return "/".join([*(scopes or [functions] * bool(functions)), primitive]) + when

    def frames(self) -> Iterator[tuple["Frame", float]]:
        """Every computation that is scheduled by itself (entry, bodies, branches, each of them) and how often it runs
        in a step; NaN in a loop whose number of turns does not follow from the program."""
        pending = [(Frame(self, self.entry), 1.0)]
        while pending:
            frame, times = pending.pop()
            yield frame, times
            for op in frame.ops.values():
                if op.opcode in ("while", "conditional", "call"):
                    turns = frame.turns(op)
                    runs = times * (math.nan if turns is None else turns)
                    pending += [(frame.into(name, op), runs) for name in op.called]


@dataclass(frozen=True)
class Frame:
    """A computation as one operation of another runs it: `caller` is that other one and its operation."""

    program: Program
    name: str
    caller: "tuple[Frame, Op] | None" = None

    @property
    def ops(self) -> dict[str, Op]:
        return self.program.computations[self.name]

    def callers(self) -> Iterator[tuple["Frame", Op]]:
        """The computations around this one, innermost first, each with the operation that runs it."""
        caller = self.caller
        while caller is not None:
            yield caller
            caller = caller[0].caller

    @property
    def in_loop(self) -> bool:
        return any(call.opcode == "while" for _, call in self.callers())

    def into(self, name: str, call: Op) -> "Frame":
        return Frame(self.program, name, (self, call))

    def turns(self, op: Op) -> int | None:
        """How often what `op` calls is run: for a `while` as the compiler notes it, else from start, step and limit of
        its counter, None when they are not constants; 1 for others."""
        if op.opcode != "while":
            return 1
        if known := op.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        body, test = self.into(_body(op), op), self.into(op.needed(r"condition=%([^\s,]+)"), op)
        root, last = self.program.root(test.name), self.program.root(body.name)
        if root.opcode == "fusion":  # even a single comparison may be fused
            test = test.into(root.called[0], root)
            root = self.program.root(test.name)
        if root.opcode != "compare" or last.opcode != "tuple":
            return None
        (left, right), direction = map(test.value, root.operands), root.needed(r"direction=(\w+)")
        if left is None or right is None:
            return None
        if left[0] is None:  # the limit is written first: 8 > i
            left, right, direction = right, left, direction.translate(str.maketrans("LG", "GL"))
        (carry, shift), (other, limit) = left, right
        if carry is None or other is not None:  # not one counter and one constant
            return None
        start, after = self._start(op, carry), body.value(last.operands[carry])
        if start is None or after is None or after[0] != carry or not after[1]:
            return None
        distance, step = limit - start - shift, after[1]
        if direction in ("GT", "GE") or (direction == "NE" and step < 0):
            distance, step = -distance, -step
        if direction in ("LE", "GE"):
            distance += 1
        if direction == "EQ" or step < 0 or (direction == "NE" and (distance < 0 or distance % step)):
            return None
        return max(0, -(-distance // step))

    def value(self, name: str) -> tuple[int | None, int] | None:
        """An integer: (None, constant), or (i, constant) for what the loop around carries at i plus a constant; None
        when it is neither."""
        op = self.ops[name]
        if op.opcode == "constant":
            return (None, int(op.inner)) if re.fullmatch(r"-?\d+", op.inner) else None
        if op.opcode in FORWARDS:
            return self.value(op.operands[0])
        if op.opcode in ("fusion", "call"):
            return self.into(op.called[0], op).value(self.program.root(op.called[0]).name)
        if op.opcode in ("add", "subtract"):
            left, right = (self.value(operand) for operand in op.operands)
            if left is None or right is None or (right[0] is not None and (left[0] is not None or op.opcode != "add")):
                return None
            index = right[0] if left[0] is None else left[0]
            return index, left[1] + (right[1] if op.opcode == "add" else -right[1])
        if self.caller is None:
            return None
        parent, call = self.caller
        if op.opcode == "parameter" and call.opcode in ("fusion", "call"):
            return parent.value(call.operands[int(op.inner)])
        carried = op.opcode == "get-tuple-element" and self.ops[op.operands[0]].opcode == "parameter"
        if not carried or call.opcode != "while":
            return None
        index, body = int(op.needed(r"index=(\d+)")), self.program.computations[_body(call)]
        last = self.program.root(_body(call))
        handed = body[last.operands[index]] if last.opcode == "tuple" else last
        same = handed.opcode == "get-tuple-element" and handed.attribute(r"index=(\d+)") == str(index)
        if not same or body[handed.operands[0]].opcode != "parameter":
            return index, 0
        start = parent._start(call, index)  # the body hands it on as it is: what it is before the loop
        return None if start is None else (None, start)

    def _start(self, loop: Op, index: int) -> int | None:
        """What a loop of this computation starts with at `index` of its tuple, if it is a constant."""
        start = self.ops[loop.operands[0]]
        value = self.value(start.operands[index]) if start.opcode == "tuple" else None
        return value[1] if value and value[0] is None else None


def _body(loop: Op) -> str:
    return loop.needed(r"body=%([^\s,]+)")


@lru_cache(maxsize=1)  # a 7B program is tens of MB of text, and every report above reads the same one
def parse(text: str) -> Program:
    """Raises ValueError when `text` is not a scheduled program, or names the line that it cannot read."""
    if not re.match(r"HloModule .*is_scheduled=true", text):
        raise ValueError("not a scheduled program; pass the text of `jax.jit(...).lower(...).compile().as_text()`")
    header, *lines = text.split("\n")
    computations: dict[str, dict[str, Op]] = {}
    tables: dict[str, dict[str, str]] = defaultdict(dict)
    entry = name = table = ""
    pending: list[str] | None = None  # the lines of the computation that is being read
    for line in lines:
        if pending is not None and CLOSED.fullmatch(line):
            computations[name] = {op.name: op for op in map(_op, pending)}
            pending = None
        elif pending is not None and line.startswith("  "):
            pending.append(line)
        elif pending:  # a kernel's description of itself may run over several lines
            pending[-1] += line
        elif opening := re.match(r"(ENTRY )?%(\S+) .*\{$", line):
            name, pending = opening[2], []
            entry = name if opening[1] else entry
        elif row := re.match(r"(\d+) (.*)", line):
            tables[table][row[1]] = row[2]
        else:
            table = line
    if not entry or pending is not None:
        raise ValueError("the program is cut off: it has no whole ENTRY computation")
    devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", header))
    donated = [(int(out or 0), int(arg)) for out, arg in re.findall(r"\{(\d*)\}: \((\d+), \{\}", header)]
    return Program(computations, entry, devices, donated, _functions(tables))


def _op(line: str) -> Op:
    found = OP.match(line)
    value = found[3] if found else ""  # type opcode(operands), attributes
    end = _close(value) if value.startswith("(") else value.find(" ")
    opcode = re.match(r" ?([\w\-]+)\(", value[end:]) if end > 0 else None
    if not found or not opcode:
        raise ValueError(f"not an operation: {line[:400]}")
    rest = value[end + opcode.end() - 1 :]
    close = _close(rest)
    if not close:
        raise ValueError(f"an operation that is cut off: {line[:400]}")
    inner = rest[1 : close - 1]
    operands = tuple(re.findall(r"%([^\s,)]+)", inner))
    return Op(found[2], opcode[1], value[:end], operands, inner, rest[close:], bool(found[1]))


def _close(text: str) -> int:
    """The position after the parenthesis that closes the first one; 0 when nothing does."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return 0


def _functions(tables: dict[str, dict[str, str]]) -> dict[str, str]:
    """Stack frame -> its innermost two functions that are not a library's, as 'outer/inner'."""
    frames = {k: [int(n) for n in re.findall(r"=(\d+)", row)] for k, row in tables["StackFrames"].items()}
    offset = frames["1"][1] if frames else 0  # parents count from 0 or from 1, by version; the first frame has none
    chains: dict[str, list[str]] = {"0": []}
    for frame, (location, parent) in frames.items():  # callers come first
        file, function = re.findall(r"=(\d+)", tables["FileLocations"][str(location)])[:2]
        name = tables["FunctionNames"][function].strip('"').split(".<locals>")[0]
        outer = chains[str(parent - offset)]
        skip = "site-packages" in tables["FileNames"][file] or outer[-1:] == [name]
        chains[frame] = outer if skip else [*outer, name]
    return {frame: "/".join(chain[-2:]) for frame, chain in chains.items()}
