"""A folder of golden data (manifest, tensors, integrity) and the report of one case."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

# Source: README.md of the golden data; None of these may grow to make a case pass.
ACTIVATIONS = 3e-5  # logits, hidden states, action predictions
LOSSES = 1e-5  # relative
GRADIENT, GRADIENT_SHARE = 1e-5, 1e-4  # absolute + share of the gradient's norm
TRAINING = 1e-3  # relative, six optimiser steps
VQGAN = 1e-4
ACTION_VAE = 2e-5
ACTIONS = 1e-5  # relative actions, statistics
RATES = 1e-6  # relative, learning rates
EXACT = 0.0

# How a large tensor is rebuilt from its seed.
SYNTHETIC_RULE = "(numpy.random.RandomState(seed).uniform(-1,1,size=shape)*scale).astype(float32)"


class GoldenError(ValueError):
    """A golden folder that cannot be used; the message names the file or key and the remedy."""


class Recorded(Mapping[str, np.ndarray]):
    """Tensors of a case's file; remembers which were read, so that nothing recorded is passed over in silence."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = dict(tensors)
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> np.ndarray:
        self._read.add(key)
        if key not in self._tensors:
            raise GoldenError(f"the case's io file lacks {key!r}; it has {', '.join(self._tensors)}")
        return self._tensors[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The tensor, or `default` where it was not recorded."""
        if key not in self:
            return default
        return self[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def unread(self) -> list[str]:
        """Keys that nothing has compared or used."""
        return [k for k in self._tensors if k not in self._read]


@dataclass
class CaseReport:
    """Largest differences of one case, quantity by quantity."""

    case: str
    kind: str
    differences: dict[str, float] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)  # of a quantity with many members: the worst member
    not_compared: list[str] = field(default_factory=list)
    error: str = ""
    skipped: str = ""

    def compare(
        self,
        quantity: str,
        ours: Any,
        golden: Any,
        tolerance: float,
        *,
        relative: bool = False,
        member: str | None = None,
    ) -> None:
        """Records the largest absolute (or relative) difference; a wrong shape or NaN is infinite.

        With `member` the quantity keeps the member that uses the largest share of its tolerance.
        """
        difference = _difference(ours, golden, relative)
        old = self.differences.get(quantity)
        if old is not None and member is None:
            raise AssertionError(f"{self.case}: {quantity} compared twice")
        if old is None or _share(difference, tolerance) > _share(old, self.tolerances[quantity]):
            self.differences[quantity], self.tolerances[quantity] = difference, tolerance
            if member is not None:
                self.worst[quantity] = member

    @property
    def failures(self) -> list[str]:
        """Quantities outside their tolerance."""
        return [q for q, d in self.differences.items() if not d <= self.tolerances[q]]

    @property
    def passed(self) -> bool:
        """Something was compared and everything agrees."""
        return not self.error and bool(self.differences) and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite difference is the string "inf"."""
        out: dict[str, Any] = {"case": self.case, "kind": self.kind}
        if self.skipped:
            return out | {"skipped": self.skipped}
        finite = {q: d if math.isfinite(d) else str(d) for q, d in self.differences.items()}
        out |= {"differences": finite, "tolerances": self.tolerances, "pass": self.passed}
        for name in ("worst", "not_compared", "failures", "error"):
            if value := getattr(self, name):
                out[name] = value
        return out


@dataclass(frozen=True)
class Case:
    """One entry of the manifest."""

    folder: Path
    name: str
    entry: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.entry.get("kind", "")

    @property
    def files(self) -> list[str]:
        return list(self.entry.get("files", ()))

    def need(self, key: str) -> Any:
        """An entry's value. Raises GoldenError when it is missing."""
        if key not in self.entry:
            raise GoldenError(f"{self.folder}/manifest.json: case {self.name} lacks {key!r}; it has {list(self.entry)}")
        return self.entry[key]

    def other(self, name: str) -> "Case":
        """Another case of the same folder, checked."""
        case = cases(self.folder, self.manifest, [name])[0]
        case.check_files()
        return case

    def check_files(self) -> None:
        """Raises GoldenError when a file is missing or is not the one the manifest was written for."""
        for file in self.files:
            path, wanted = self.folder / file, self.manifest.get("files", {}).get(file, {}).get("sha256")
            if not path.is_file():
                raise GoldenError(f"{path} is missing; copy the whole golden folder")
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if wanted is not None and found != wanted:
                raise GoldenError(
                    f"{path} has sha256 {found} but the manifest says {wanted}; copy the golden folder again"
                )

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """All tensors of the case's files whose name contains `part`, with the synthetic ones for "weights"."""
        out: dict[str, np.ndarray] = {}
        for file in self.files:
            if part in file and file.endswith(".safetensors"):
                try:
                    out.update(load_file(self.folder / file))
                except SafetensorError as error:
                    raise GoldenError(f"{self.folder / file} is not safetensors ({error}); copy it again") from None
        if part == "weights":
            out.update(self._synthetic())
        if not out:
            raise GoldenError(f"case {self.name} has no tensors in its {part!r} files {self.files}")
        return out

    def recorded(self) -> Recorded:
        """The case's inputs and outputs."""
        part = ".io." if any(".io." in f for f in self.files) else ".safetensors"
        return Recorded(self.tensors(part))

    def read_json(self) -> Any:
        """The case's only JSON file."""
        names = self.files or [f"{self.name}.json"]
        return json.loads((self.folder / names[0]).read_text(encoding="utf-8"))

    def _synthetic(self) -> dict[str, np.ndarray]:
        rule = self.entry.get("synthetic_weights_rule")
        specs = self.entry.get("synthetic_weights") or {}
        if specs and rule not in (None, SYNTHETIC_RULE):
            raise GoldenError(
                f"case {self.name}: synthetic_weights_rule {rule!r} is not known; expected {SYNTHETIC_RULE!r}"
            )
        out = {}
        for key, spec in specs.items():
            draw = np.random.RandomState(spec["randomstate_seed"])
            uniform = draw.uniform(spec.get("low", -1), spec.get("high", 1), size=spec["shape"])
            value = (uniform * spec["scale"]).astype(np.float32)
            found = hashlib.sha256(value.tobytes()).hexdigest()
            if spec.get("sha256", found) != found:
                raise GoldenError(
                    f"case {self.name}: {key} rebuilt from seed {spec['randomstate_seed']} has sha256 {found} but the "
                    f"manifest says {spec['sha256']}; its recipe and this numpy {np.__version__} disagree"
                )
            out[key] = value
        return out


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Raises GoldenError when the folder holds no usable manifest.json."""
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GoldenError(f"{path} does not exist; give a folder of golden data") from None
    except json.JSONDecodeError as error:
        raise GoldenError(f"{path} is not JSON ({error}); copy the golden folder again") from None
    if not isinstance(manifest, dict) or not manifest.get("cases"):
        raise GoldenError(f"{path} holds no cases; copy the golden folder again")
    return manifest


def cases(folder: str | Path, manifest: Mapping[str, Any], names: list[str] | None = None) -> list[Case]:
    """The manifest's cases, or those named. Raises GoldenError for a name it does not have."""
    known = manifest["cases"]
    if missing := [n for n in names or () if n not in known]:
        raise GoldenError(f"{folder}/manifest.json has no case {', '.join(missing)}; it has {', '.join(known)}")
    return [Case(Path(folder), name, known[name], manifest) for name in names or known]


def _difference(ours: Any, golden: Any, relative: bool) -> float:
    ours, golden = np.asarray(ours), np.asarray(golden)
    if ours.shape != golden.shape:
        return math.inf
    if golden.size == 0:
        return 0.0
    if golden.dtype.kind in "biu" and ours.dtype.kind in "biu":
        return float(np.abs(ours.astype(np.int64) - golden.astype(np.int64)).max())
    ours, golden = ours.astype(np.float64), golden.astype(np.float64)
    difference = np.where(ours == golden, 0.0, np.abs(ours - golden))
    if relative:
        difference = np.divide(difference, np.abs(golden), out=np.full_like(difference, math.inf), where=golden != 0)
        difference = np.where(ours == golden, 0.0, difference)
    largest = difference.max()
    return float(largest) if np.isfinite(largest) else math.inf


def _share(difference: float, tolerance: float) -> float:
    return difference / tolerance if tolerance else (math.inf if difference else 0.0)
