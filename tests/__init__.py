"""Tests, in folders like the rooms of the code that they test."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"  # recorded by the independent public PyTorch code
DATA = Path(__file__).parent / "data"
