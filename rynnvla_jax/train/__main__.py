"""`python -m rynnvla_jax.train`: the same as `rynnvla train`."""

import sys

from rynnvla_jax.cli.train import command_line

command_line(sys.argv[1:])
