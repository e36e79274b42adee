"""The tasks: object positions and instructions from a seed. Metres; z is up; the arm reaches along +x."""

import math
from dataclasses import dataclass

import numpy as np

from rynnvla_jax.config import ConfigError
from rynnvla_jax.sim.arm import PAN_AXIS

TASKS = ("block", "strawberry", "pen")
SCENARIOS = ("single", "multi", "distractor")
COLORS = {
    "green": (0.13, 0.62, 0.22),
    "red": (0.80, 0.12, 0.12),
    "blue": (0.12, 0.25, 0.75),
    "yellow": (0.92, 0.78, 0.12),
    "purple": (0.45, 0.18, 0.60),
    "orange": (0.95, 0.50, 0.10),
}

# {it}: the target, {them}: it or them. The first is what the embedded data says.
_PLATE = (
    "pick up {it} and place {them} on the plate",
    "put {it} on the plate",
    "move {it} onto the plate",
    "grab {it} and set {them} down on the plate",
    "place {it} on the white plate",
    "take {it} and lay {them} on the plate",
)
_PLATE_HELD_OUT = (
    "could you get {it} onto the plate",
    "the plate is where {it} should go",
    "pick {it} up, then drop {them} off on the plate",
)
_HOLDER = (
    "put {it} into the holder",
    "pick up {it} and place {them} in the holder",
    "drop {it} into the pen holder",
    "stand {it} up in the holder",
    "grab {it} and put {them} into the cup",
    "move {it} into the pen holder",
)
_HOLDER_HELD_OUT = (
    "could you get {it} into the pen holder",
    "the holder is where {it} should go",
    "pick {it} up, then slide {them} into the holder",
)
_TARGETS = {
    "block": ("the green block", "the green blocks"),
    "strawberry": ("the strawberry", "the strawberries"),
    "pen": ("the pen", "the pens"),
}

# Of each kind: radius of the free disc around it on the table, height of its middle at rest.
_ROOM = {"block": 0.036, "can": 0.036, "lemon": 0.036, "strawberry": 0.036, "pen": 0.07, "plate": 0.062, "holder": 0.06}
_REST = {"block": 0.013, "can": 0.0155, "lemon": 0.0155, "strawberry": 0.0145, "pen": 0.0065, "plate": 0.001}
# Distance from the arm's pan axis, and greatest angle to either side (radians): in reach, and seen by the front camera.
_REACH = {"plate": (0.17, 0.27, 0.85), "holder": (0.27, 0.33, 0.5), "pen": (0.15, 0.25, 0.85)}
_DEFAULT_REACH = (0.15, 0.28, 0.85)
_LYING = ("strawberry", "pen", "lemon")  # their long axis is the body's z


@dataclass(frozen=True)
class Thing:
    """One object: `name` of its body, where it starts, and which way (unit quaternion w x y z)."""

    name: str
    kind: str
    color: str
    position: tuple[float, float, float]
    quaternion: tuple[float, float, float, float]


@dataclass(frozen=True)
class ObjectPositions:
    """All objects on the table; the names of the targets and of the goal."""

    things: tuple[Thing, ...]
    targets: tuple[str, ...]
    goal: str

    def __getitem__(self, name: str) -> Thing:
        return next(thing for thing in self.things if thing.name == name)


def check(task: str, scenario: str) -> None:
    """Raises ConfigError for a task or a scenario that does not exist."""
    for what, value, known in (("task", task, TASKS), ("scenario", scenario, SCENARIOS)):
        if value not in known:
            raise ConfigError(f"{what} {value!r} does not exist; choose one of {', '.join(known)}")


def phrasings(task: str, scenario: str, held_out: bool = False) -> tuple[str, ...]:
    """Instructions that mean the same; those held out are for evaluation only."""
    check(task, scenario)
    seen, unseen = (_HOLDER, _HOLDER_HELD_OUT) if task == "pen" else (_PLATE, _PLATE_HELD_OUT)
    several = scenario == "multi"
    words = {"it": _TARGETS[task][several], "them": "them" if several else "it"}
    return tuple(form.format(**words) for form in (unseen if held_out else seen))


def layout(task: str, scenario: str, rng: np.random.Generator) -> ObjectPositions:
    """Places the goal, the targets (two or three in `multi`; two pens) and two or three distractors."""
    check(task, scenario)
    goal = "holder" if task == "pen" else "plate"
    color = {"block": "green", "strawberry": "red", "pen": "blue"}[task]
    count = 1 if scenario != "multi" else 2 if task == "pen" else int(rng.integers(2, 4))
    wanted = [(goal, goal, "white"), *((f"target{i}", task, color) for i in range(count))]
    if scenario == "distractor":
        others = _others(task)
        chosen = rng.choice(len(others), size=int(rng.integers(2, 4)), replace=False)
        wanted += [(f"distractor{i}", *others[k]) for i, k in enumerate(chosen)]
    for _ in range(1000):
        if (spots := _spots([kind for _, kind, _ in wanted], rng)) is not None:
            break
    else:
        raise RuntimeError(f"no room for {[name for name, *_ in wanted]}")  # cannot be: it takes a few tries
    things = tuple(
        Thing(name, kind, color, (*spot, _REST.get(kind, 0.001)), _turned(kind, rng))
        for (name, kind, color), spot in zip(wanted, spots, strict=True)
    )
    return ObjectPositions(things, tuple(f"target{i}" for i in range(count)), goal)


def _others(task: str) -> list[tuple[str, str]]:
    """(kind, color) of possible distractors, which are not similar to the target."""
    blocks = [("block", color) for color in COLORS if color != "green"]
    cans = [("can", color) for color in ("red", "blue", "purple")]
    fruit = [("lemon", "yellow"), *([("strawberry", "red")] if task != "strawberry" else [])]
    return blocks + cans + fruit


def _spots(kinds: list[str], rng: np.random.Generator) -> list[tuple[float, float]] | None:
    """One position per kind, without overlap; None if there was no room for all."""
    placed: list[tuple[np.ndarray, float]] = []
    for kind in kinds:
        near, far, angle = _REACH.get(kind, _DEFAULT_REACH)
        for _ in range(200):
            r, a = rng.uniform(near, far), rng.uniform(-angle, angle)
            spot = PAN_AXIS + r * np.array([math.cos(a), math.sin(a)])
            if all(np.linalg.norm(spot - other) > _ROOM[kind] + room for other, room in placed):
                placed.append((spot, _ROOM[kind]))
                break
        else:
            return None
    return [(float(spot[0]), float(spot[1])) for spot, _ in placed]


def _turned(kind: str, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """Any way round; what lies has its z axis in the table's plane."""
    half = rng.uniform(-math.pi, math.pi) / 2
    c, s = math.cos(half), math.sin(half)
    if kind not in _LYING:
        return (c, 0.0, 0.0, s)
    q = math.sqrt(0.5)  # turned about the vertical after a quarter about y
    return (q * c, -q * s, q * c, q * s)
