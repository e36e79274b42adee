"""The printed report of an import."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class ImportReport:
    """One imported model; `parts` are the models that were imported with it."""

    kind: str
    source: str
    format: str
    tensors: int = 0
    weights: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)  # name -> tensors
    new: list[str] = field(default_factory=list)  # parameters, or rows of them, that start fresh
    ignored: dict[str, int] = field(default_factory=dict)  # prefix -> keys
    notes: list[str] = field(default_factory=list)
    parts: list["ImportReport"] = field(default_factory=list)

    def count(self, tensor: np.ndarray) -> None:
        self.tensors += 1
        self.dtypes[tensor.dtype.name] = self.dtypes.get(tensor.dtype.name, 0) + 1

    def __str__(self) -> str:
        dtypes = ", ".join(f"{n} {name}" for name, n in self.dtypes.items())
        lines = [f"{self.kind}: {self.tensors} tensors ({dtypes}), {self.weights:,} weights, from {self.source}"]
        lines.append(f"  format: {self.format}")
        lines += [f"  new: {line}" for line in self.new]
        lines += [f"  ignored: {n} keys {prefix}*" for prefix, n in self.ignored.items()]
        lines += [f"  note: {line}" for line in self.notes]
        return "\n".join([*lines, *(str(part) for part in self.parts)])
