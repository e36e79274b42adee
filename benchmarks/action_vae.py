"""One training step of the ActionVAE at the published size, batch 128: this project's JAX model against PyTorch.

    python -m benchmarks.action_vae

Both models take turns in one process, with two threads each, dropout and AdamW, starting from the same weights. The
baseline is `deploy/torch_action_vae.py`: `nn.MultiheadAttention` (fused attention), `nn.Linear`, `torch.optim.AdamW`
(fused). Prints one JSON line: the median and smallest number of seconds of each, and the speed-up of JAX, which is
computed in each round (a busy machine slows both models of a round) and given as the median over rounds.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
import optax
import torch
from flax import nnx

from rynnvla_jax.config import ActionVAEConfig
from rynnvla_jax.convert.action_vae import constants, table
from rynnvla_jax.convert.table import to_params
from rynnvla_jax.deploy import torch_action_vae
from rynnvla_jax.models.action_vae import ActionVAE

CONFIG = ActionVAEConfig()
LEARNING_RATE, DECAY = 1e-5, 1e-4


def torch_step(model, actions, is_pad):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=DECAY, fused=True)
    actions, is_pad = torch.from_numpy(actions), torch.from_numpy(is_pad)
    model.train()

    def step():
        optimizer.zero_grad(set_to_none=True)
        total, _, _ = model.losses(actions, is_pad, torch.randn(len(actions), CONFIG.latent))
        total.backward()
        optimizer.step()
        return total.item()

    return step


def jax_step(weights, actions, is_pad):
    graphdef, template = nnx.split(nnx.eval_shape(lambda: ActionVAE(CONFIG, rngs=nnx.Rngs(0))))
    params = jax.device_put(to_params(table(CONFIG), weights, nnx.to_pure_dict(template), tuple(constants(CONFIG))))
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=DECAY)

    @jax.jit(donate_argnums=(0, 1))
    def train(params, state, key):
        noise_key, dropout_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, (len(actions), CONFIG.latent))
        loss = lambda p: nnx.merge(graphdef, p).loss(actions, is_pad, noise, dropout_key)[0]  # noqa: E731
        total, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, total

    carry = [params, jax.jit(optimizer.init)(params), jax.random.key(0)]

    def step():
        params, state, total = train(*carry)
        carry[:] = [params, state, jax.random.fold_in(carry[2], 1)]
        return float(total)

    return step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(args.batch, CONFIG.chunk, CONFIG.action_dim)).astype(np.float32)
    is_pad = np.arange(CONFIG.chunk) >= rng.integers(1, CONFIG.chunk + 1, size=(args.batch, 1))
    baseline = torch_action_vae.ActionVAE(CONFIG)
    weights = {name: value.numpy().copy() for name, value in baseline.state_dict().items()}
    implementations = {
        "jax": jax_step(weights, actions, is_pad),
        "torch": torch_step(baseline, actions, is_pad),
    }
    seconds: dict[str, list[float]] = {name: [] for name in implementations}
    losses = {name: step() for name, step in implementations.items()}  # compiles, warms up
    for _ in range(args.rounds):
        for name, step in implementations.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(t / j for t, j in zip(seconds["torch"], seconds["jax"], strict=True))
    report = {
        "benchmark": "action_vae_training_step",
        "batch": args.batch,
        "first_loss": losses,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "fastest_seconds": {name: min(values) for name, values in seconds.items()},
        "times_faster_than_torch": ratio,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
