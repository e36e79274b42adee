"""`python -m rynnvla_jax.cli`: the same as `rynnvla`."""

import sys

from rynnvla_jax.cli.main import main

sys.exit(main())
