"""torch computes on the device that policies would run on. Answers [device, name of the GPU or ""]."""

import torch

from rynnvla_jax.cli.probes import answer

device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
assert float(torch.arange(8.0, device=device).sum()) == 28.0, "a sum on the device came out wrong"
answer([device, torch.cuda.get_device_name() if device == "cuda" else ""])
