"""JAX starts, finds devices and computes on one. Answers [number of devices, kind, platform]."""

import jax

from rynnvla_jax.cli.probes import answer

devices = jax.devices()
assert float(jax.numpy.arange(8.0).sum()) == 28.0, "a sum on the device came out wrong"
answer([len(devices), devices[0].device_kind, devices[0].platform])
