"""Code that runs on a robot: PyTorch and numpy, without JAX. Start with `policy.Policy`."""
