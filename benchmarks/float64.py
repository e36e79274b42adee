"""`rynnvla evaluate` of an export or a work dir with float64 wherever the code says float32, in PyTorch and in JAX.

    python -m benchmarks.float64 evaluate --policy EXPORT|WORKDIR --task block --out DIR

For one question: where an exported policy and the JAX policy part ways in closed loop, was it the last bits of float32
or a fault of the conversion? With 29 more bits only a fault remains.
"""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch


class Wide:
    """A module of arrays, whose float32 is float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)

    def dtype(self, name):
        return self.module.dtype("float64" if name == "float32" else name)


# All this stands at the top because every worker imports this file first. Defaults of arguments are read at import, the
# rest when it runs; PyTorch's own float32 must come back, since safetensors reads files by it.
jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64
torch.Tensor.float = torch.Tensor.double
with mock.patch.object(torch, "float32", torch.float64):
    from rynnvla_jax import actions, cli, images, policy, stages
    from rynnvla_jax.deploy import policy as deployed
    from rynnvla_jax.deploy import torch_transformer
    from rynnvla_jax.models import action_vae, transformer
torch_transformer.torch, stages.jnp = Wide(torch), Wide(jnp)
for ours in (actions, images, policy, deployed, action_vae, transformer):
    ours.np = Wide(np)

if __name__ == "__main__":
    sys.exit(cli.main())
