"""What runs on a robot: PyTorch and numpy, never jax. `policy.Policy` is the door."""
