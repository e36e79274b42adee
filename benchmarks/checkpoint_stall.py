"""Time that saving a checkpoint stops the training loop, as a share of the default time between saves, for 1 GB.

    python -m benchmarks.checkpoint_stall DIR [--saves 5]

The state is 84M float32 parameters and Adam's two moments, on one CPU device; checkpoints go to a new folder in DIR,
which is deleted afterwards. Measures the time inside `Checkpointer.save`: computing fingerprints on the device and
copying to the host, after which the arrays may be donated. Writing, commit and reading back happen in the background.
They slow a step that computes on the same processor (on a pod, other processors do this work), and are reported
separately. Prints one JSON line; the exit status is 1 when the slowest save, including the first with its compilation,
stops the loop for 1 % of the interval or more.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from absl import logging

from rynnvla_jax.checkpoint.manager import Checkpointer
from rynnvla_jax.config import CheckpointConfig

LAYERS, WIDTH = 20, 1024  # 41.9M of each of two arrays
SHAPES = {"wq": (LAYERS, WIDTH, 2 * WIDTH), "w_up": (LAYERS, WIDTH, 2 * WIDTH)}
LIMIT = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", help="a folder with 4 GB of free space")
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    config = CheckpointConfig()
    folder = tempfile.mkdtemp(prefix="checkpoint_stall_", dir=args.directory)

    @jax.jit
    def draw(step):
        names = [("params", 0), ("mu", 1), ("nu", 2)]
        keys = {name: jax.random.fold_in(jax.random.key(step), i) for name, i in names}
        return {n: {k: jax.random.normal(key, s, jnp.float32) for k, s in SHAPES.items()} for n, key in keys.items()}

    blocked, background, ok = [], [], True
    checkpointer = Checkpointer(folder, config)
    try:
        for step in range(1, args.saves + 1):
            state = jax.block_until_ready(draw(step))
            start = time.perf_counter()
            moments = {"mu": state["mu"], "nu": state["nu"]}
            checkpointer.save(step, state["params"], moments, {"step": step, "skipped": []})
            blocked.append(time.perf_counter() - start)
            ok &= checkpointer.wait()
            background.append(time.perf_counter() - start - blocked[-1])
    finally:
        checkpointer.close()
        shutil.rmtree(folder)
    interval = config.every_minutes * 60
    report = {
        "benchmark": "checkpoint_stall",
        "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
        "interval_seconds": interval,
        "blocked_seconds": {"first": blocked[0], "median": statistics.median(blocked), "worst": max(blocked)},
        "blocked_share": {"median": statistics.median(blocked) / interval, "worst": max(blocked) / interval},
        "background_seconds": {"median": statistics.median(background), "worst": max(background)},
        "all_verified": ok,
    }
    print(json.dumps(report))
    return 0 if ok and max(blocked) < LIMIT * interval else 1


if __name__ == "__main__":
    sys.exit(main())
