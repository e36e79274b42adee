"""`rynnvla evaluate` of an export or a work dir with float64 wherever the code uses float32, in PyTorch and in JAX.

    python -m benchmarks.float64 evaluate --policy EXPORT|WORKDIR --task block --out DIR

It answers one question: where an exported policy and the JAX policy differ in closed loop, is the cause the rounding of
float32 or a fault of the conversion? With 29 more bits only a fault remains visible.
"""

import argparse
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch


class Wide:
    """A module such as numpy or torch, whose float32 is replaced by float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)

    def dtype(self, name):
        return self.module.dtype("float64" if name == "float32" else name)


def widen() -> None:
    """Replaces float32 for the rest of this process. Call it before our modules are imported, which fixes defaults."""
    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    mock.patch.object(torch.Tensor, "float", torch.Tensor.double).start()
    with mock.patch.object(torch, "float32", torch.float64):  # for a while: safetensors reads files by it
        from rynnvla_jax import actions, images
        from rynnvla_jax.deploy import policy as deployed
        from rynnvla_jax.deploy import torch_transformer
        from rynnvla_jax.inference import jax_policy
        from rynnvla_jax.models import action_vae, transformer, vla
    mock.patch.object(torch_transformer, "torch", Wide(torch)).start()
    mock.patch.object(vla, "jnp", Wide(jnp)).start()
    for ours in (actions, images, jax_policy, deployed, action_vae, transformer):
        mock.patch.object(ours, "np", Wide(np)).start()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the word evaluate and its options")
    command = parser.parse_args().command
    widen()
    from rynnvla_jax.cli import main as cli

    return cli.main(command)


if __name__ == "__mp_main__":  # a worker, which imports this file first
    widen()
if __name__ == "__main__":
    sys.exit(main())
