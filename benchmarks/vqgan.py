"""Encoding 384 x 384 frames to codes with Chameleon's VQGAN at its true size: this project's JAX model against PyTorch.

    python -m benchmarks.vqgan

The models take turns in one process, with two threads each, in float32, with the same random weights and images, and
their codes must agree. The baselines are `deploy/torch_vqgan.py` in PyTorch's default layout and in channels_last.
Prints one JSON line: the median and smallest number of seconds of each, and the speed-up of JAX over the faster
baseline, which is computed in each round (a busy machine slows a whole round) and given as the median over rounds.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
import torch
from flax import nnx

from rynnvla_jax.config import VQGANConfig
from rynnvla_jax.convert.table import to_params
from rynnvla_jax.convert.vqgan import table
from rynnvla_jax.deploy import torch_vqgan
from rynnvla_jax.models.vqgan import VQGAN

CONFIG = VQGANConfig()


def jax_encoder(weights, images):
    graphdef, template = nnx.split(nnx.eval_shape(lambda: VQGAN(CONFIG, rngs=nnx.Rngs(0), decoder=False)))
    params = jax.device_put(to_params(table(CONFIG, decoder=False), weights, nnx.to_pure_dict(template)))
    encode = jax.jit(lambda params, images: nnx.merge(graphdef, params).codes(images))
    return lambda: np.asarray(encode(params, images))


def torch_encoder(model, images, layout):
    model = model.to(memory_format=layout)
    images = torch.from_numpy(images).movedim(-1, 1).contiguous(memory_format=layout)
    return lambda: model.codes(images).numpy()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=384, help="edge of the images, in pixels")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    images = np.random.default_rng(0).uniform(-1, 1, size=(args.batch, args.size, args.size, 3)).astype(np.float32)
    baseline = torch_vqgan.VQGAN(CONFIG, with_decoder=False).eval().requires_grad_(False)
    weights = {name: value.numpy().copy() for name, value in baseline.state_dict().items()}
    other = torch_vqgan.VQGAN(CONFIG, with_decoder=False).eval().requires_grad_(False)
    other.load_state_dict(baseline.state_dict())
    implementations = {
        "jax": jax_encoder(weights, images),
        "torch": torch_encoder(baseline, images, torch.contiguous_format),
        "torch_channels_last": torch_encoder(other, images, torch.channels_last),
    }
    codes = {name: encode() for name, encode in implementations.items()}  # compiles, warms up
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    for _ in range(args.rounds):
        for name, encode in implementations.items():
            start = time.perf_counter()
            encode()
            seconds[name].append(time.perf_counter() - start)
    rounds = zip(seconds["torch"], seconds["torch_channels_last"], seconds["jax"], strict=True)
    report = {
        "benchmark": "vqgan_encode",
        "images": list(images.shape),
        "codes_equal": float((codes["jax"] == codes["torch"]).mean()),
        "distinct_codes": len(np.unique(codes["jax"])),
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "fastest_seconds": {name: min(values) for name, values in seconds.items()},
        "times_faster_than_torch": statistics.median(min(a, b) / c for a, b, c in rounds),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
