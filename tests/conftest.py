"""Eight virtual devices for every test process; full float32 products, so that comparisons mean something.

A run of the tests compiles a program once: workers and the commands that tests start share a cache of XLA's programs,
which is removed at the end, because such programs are bound to this very machine.
"""

import os
import shutil
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="rynnvla-tests-")
if CACHE:  # workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

jax.config.update("jax_default_matmul_precision", "highest")


def pytest_unconfigure():
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)
