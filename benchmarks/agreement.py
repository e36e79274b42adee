"""Difference between the exported PyTorch policy and the JAX policy of the same work dir, on recorded observations.

    python -m benchmarks.agreement WORKDIR EXPORT --data lerobot:DIR [--observations 500]

Both get the same frames, states and instructions of the simulated arm, at evenly spaced steps of the data. Prints one
JSON line: the largest and the mean difference of the joint targets, in the data's unit, and the number of targets that
a servo would round to a different position. To compare them in closed loop, run `rynnvla evaluate` with both, and
again with `benchmarks.float64`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines.sources import open_source
from rynnvla_jax.columns import describe
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.inference.jax_policy import JaxPolicy
from rynnvla_jax.sim import arm


def positions(targets: np.ndarray) -> np.ndarray:
    """[..., 6] in the arm's unit -> position steps of its servos."""
    return np.round(arm.to_radians(targets) / arm.SERVO_STEP)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("--data", required=True, help="data set with frames, as KIND:PATH")
    parser.add_argument("--observations", type=int, default=500)
    a = parser.parse_args()
    ours, theirs = JaxPolicy(a.workdir), Policy.load(a.export)
    views = ours.config.sequence.views
    source = open_source(a.data, ours.config.data, views)
    ends, differences, parted = np.cumsum(source.lengths), [], 0
    for step in tqdm(np.linspace(0, ends[-1] - 1, a.observations).astype(int), unit="observation"):
        number = int(np.searchsorted(ends, step, side="right"))
        episode, start = source[number], int(step - (ends[number] - source.lengths[number]))
        frames = {view: episode.frames(view, [start])[0] for view in views}
        front, wrist = frames.pop("front"), frames.pop("wrist", None)
        observation = front, wrist, episode.state[start], episode.text(start), episode.columns, frames
        one, other = ours.act(*observation), theirs.act(*observation)
        differences.append(np.abs(one - other))
        parted += int((positions(one) != positions(other)).sum())
    report = {
        "benchmark": "agreement",
        "observations": len(differences),
        "largest_difference": float(np.max(differences)),
        "mean_difference": float(np.mean(differences)),
        "columns": describe(source.columns.action),
        "targets": int(np.size(differences)),
        "servo_positions_that_differ": parted,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
