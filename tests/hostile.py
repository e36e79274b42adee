"""Hostile inputs: mutations of sound files. A reader either reads them or raises one of our errors, in one line.

`make test-slow` sets `RYNNVLA_HOSTILE`: the factor by which every test tries more inputs.
"""

import json
import os
from collections import Counter
from copy import deepcopy

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from data_pipelines.episode import DataError
from rynnvla_jax.checkpoint.reader import CheckpointError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.convert import ConversionError
from rynnvla_jax.deploy.export_format import PolicyError

OURS = (DataError, ConfigError, CheckpointError, ConversionError, PolicyError)
FACTOR = int(os.environ.get("RYNNVLA_HOSTILE", "1"))
tried: Counter[str] = Counter()  # of this process, by what became of them: "read" or "refused"


def examples(number):
    """Settings of a test that tries `number` inputs, the same ones in each run; with `FACTOR`, more."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    phases = (Phase.explicit, Phase.generate)  # a damaged file is small enough; shrinking takes minutes
    return settings(
        max_examples=number * FACTOR, derandomize=True, database=None, deadline=None, suppress_health_check=checks,
        phases=phases,
    )  # fmt: skip


def attempt(read, *arguments, allowed=OURS):
    """What `read` returns, or None where it refuses its input with one of our errors. Any other error passes."""
    try:
        found = read(*arguments)
    except allowed as error:
        tried["refused"] += 1
        text = str(error)
        assert text.strip() and "\n" not in text and len(text) < 5000, f"{type(error).__name__}: {text!r}"
        return None
    tried["read"] += 1
    return found


def _nested(depth=300):
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


DEEP = _nested()

VALUES = (
    *(None, True, False, "", " ", "x", "{x}", "{", "1", "/dev/zero", "../../x", "a\0b", "\ud800", "\n", "x" * 5000),
    *(0, 1, -1, 2, 3, 7, 1000, 2**31, 2**63, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.0, 4.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *([], {}, [None], [-2, -2], [4.0], [1] * 100, ["a", 1], {"": None}, {"a": {"b": []}}, DEEP),
)  # fmt: skip


def places(value, path=()):
    """The path of every value in nested lists and dicts."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(document):
    """`document` (of JSON's kinds) with one to three values replaced, left out, doubled or moved."""
    paths = list(places(document))
    actions = st.one_of(
        st.tuples(st.just("set"), st.sampled_from(VALUES)),
        st.tuples(st.just("copy"), st.sampled_from(paths)),
        st.tuples(st.sampled_from(["remove", "double", "negate", "text", "wrap"]), st.none()),
    )
    changes = st.lists(st.tuples(st.sampled_from(paths), actions), min_size=1, max_size=3)
    return changes.map(lambda found: _apply(deepcopy(document), found, document))


def _apply(value, changes, original):
    for path, (action, argument) in changes:
        root = {"": value}
        parent, key = root, ""
        try:
            for step in path:
                parent, key = parent[key], step
            old = parent[key]
        except (KeyError, IndexError, TypeError):
            continue  # a change before this one has removed it
        if not isinstance(parent, dict | list):
            continue
        if action == "remove" and path:
            del parent[key]
        elif action == "double" and isinstance(parent, list):
            parent.append(old)
        elif action == "negate" and isinstance(old, int | float):
            parent[key] = -old - 1
        elif action == "text":
            parent[key] = str(old)[:2000] if _shallow(old) else "deep"
        elif action == "wrap":
            parent[key] = [old]
        elif action == "copy":
            other = original
            for step in argument:
                other = other[step]
            parent[key] = deepcopy(other)
        elif action == "set":
            # A copy: a change after this one would else change VALUES for all inputs to come, in the end in a circle.
            parent[key] = _nested() if argument is DEEP else deepcopy(argument)
        value = root[""]
    return value


def _shallow(value, depth=20):
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_shallow(v, depth - 1) for v in inner)


BROKEN_JSON = (b"", b"{", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{", b"\x00", b"5", b"[]", b"null", b'"x"', b"{}")


def json_files(document):
    """Bytes of a JSON file: `document` changed, or its bytes damaged."""
    sound = json.dumps(document).encode()
    return st.one_of(
        changed(document).map(lambda value: json.dumps(value).encode()),
        changed(document).map(lambda value: json.dumps(value).encode()),
        damaged(sound),
        st.sampled_from(BROKEN_JSON),
    )


def damaged(data, spread=None):
    """`data` cut short, with changed or doubled bytes; changes begin in the first `spread` bytes (None: anywhere)."""
    at = st.integers(0, max(0, min(len(data), spread or len(data)) - 1))
    flip = st.tuples(st.just("flip"), at, st.integers(1, 255))
    block = st.tuples(st.sampled_from(["zeros", "ones", "cut out", "again"]), at, st.integers(1, 64))
    cut = st.tuples(st.just("cut off"), at, st.just(0))
    changes = st.lists(st.one_of(flip, flip, block, cut), min_size=1, max_size=4)
    return changes.map(lambda found: _damage(data, found))


def _damage(data, changes):
    out = bytearray(data)
    for action, at, amount in changes:
        if action == "flip" and at < len(out):
            out[at] ^= amount
        elif action == "cut off":
            del out[at:]
        elif action == "cut out":
            del out[at : at + amount]
        elif action == "again":
            out[at:at] = out[at : at + amount]
        else:
            part = len(out[at : at + amount])
            out[at : at + part] = bytes([255 * (action == "ones")]) * part
    return bytes(out)
