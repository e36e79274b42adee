"""Tests, in folders like the rooms of the code that they test."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"  # recorded by the independent public PyTorch code
DATA = Path(__file__).parent / "data"
# Compiling is most of what a test of a tiny model does: no optimisation, and the emitters that compile fastest.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
