"""`python -m rynnvla_jax.train`: the same as `rynnvla train`."""

import sys

from rynnvla_jax.cli.main import main

sys.exit(main(["train", *sys.argv[1:]]))
