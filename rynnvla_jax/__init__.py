"""rynnvla_jax: train RynnVLA-001 (arXiv 2509.15212) in JAX; run it from PyTorch. Imports neither."""

__version__ = "0.1.0"
