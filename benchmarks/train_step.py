"""Training step of a 17M-parameter model (all losses), compared with `transformers`' Chameleon with torch's AdamW.

    python -m benchmarks.train_step [--repeats 7]

Both run in this process, float32, sequence 1024, batch 2, in turns; prints one JSON line. The baseline
computes cross-entropy only; our step also computes state projection, action regression and z-loss.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from rynnvla_jax.config import MeshConfig, OptimizerConfig, TrainConfig, TransformerConfig, VLAConfig
from rynnvla_jax.distributed import mesh as mesh_lib
from rynnvla_jax.models import params as params_lib
from rynnvla_jax.models.vla import VLA
from rynnvla_jax.train.optimizer import make_optimizer
from rynnvla_jax.train.stages import OBJECTIVES, Frozen
from rynnvla_jax.train.step import TrainState, make_now, make_step

B, S, V = 2, 1024, 8192
SIZE: dict[str, Any] = {"width": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6, "feed_forward": 1024}


THREADS = 2


def ours():
    config = TrainConfig(
        stage="robot",
        batch_size=B,
        compute_dtype="float32",
        remat="none",
        vla=VLAConfig(transformer=TransformerConfig(vocab_size=V, dropout=0.0, **SIZE)),
        optimizer=OptimizerConfig(peak_lr=1e-4, min_lr=1e-4, warmup_steps=1.0),
    )
    graphdef, params = params_lib.split(VLA(config.vla, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(config.optimizer, 1000)
    mesh = mesh_lib.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        params = jax.device_put(params, mesh_lib.replicated(mesh))
        opt_state = jax.device_put(optimizer.init(params), mesh_lib.replicated(mesh))
        step = make_step(config, OBJECTIVES[config.stage], graphdef, optimizer, TrainState(params, opt_state, 0))
    now = make_now(config, mesh)
    rng = np.random.default_rng(0)
    # The frozen models' work is not part of the baseline's step: action targets come with the batch.
    batch = {
        "tokens": rng.integers(0, V, (B, S)).astype(np.int32),
        "loss_mask": np.ones((B, S), bool),
        "state": rng.normal(size=(B, 4, 6)).astype(np.float32),
        "state_positions": np.tile(np.array([[250, 500, 750, 1000]], np.int32), (B, 1)),
        "action_positions": np.tile(np.array([[251, 501, 751, 1001]], np.int32), (B, 1)),
        "action_targets": rng.normal(size=(B, 4, 64)).astype(np.float32),
    }
    batch = jax.device_put(batch, mesh_lib.replicated(mesh))
    state = [params, opt_state, 0]

    def run():
        with jax.set_mesh(mesh):
            state[0], state[1], metrics = step(state[0], state[1], now(np.int32(state[2])), Frozen(), batch)
        state[2] += 1
        return float(metrics["loss"])

    return run, params_lib.count(params)


def baseline():
    torch.set_num_threads(THREADS)
    config = ChameleonConfig(
        vocab_size=V,
        hidden_size=SIZE["width"],
        intermediate_size=SIZE["feed_forward"],
        num_hidden_layers=SIZE["num_layers"],
        num_attention_heads=SIZE["num_heads"],
        num_key_value_heads=SIZE["num_kv_heads"],
        max_position_embeddings=S,
        vocabulary_map={"<image>": 4, "IMGIMGAZ": 5},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32},
    )
    model = ChameleonForConditionalGeneration(config).train()
    weights = [p for n, p in model.named_parameters() if "vqmodel" not in n]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(10, V, (B, S))

    def run():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 4.0)
        optimizer.step()
        return float(loss.detach())

    return run, sum(p.numel() for p in weights)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    # Before either library starts its threads.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    contestants = {"jax": ours(), "torch": baseline()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run, _ in contestants.values():
        run(), run()
    for _ in range(repeats):
        for name, (run, _) in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(times["jax"], times["torch"], strict=True)]
    report = {
        "benchmark": "train_step",
        "speed_up_over_torch": round(statistics.median(ratios), 3),
        "seconds": {n: round(statistics.median(t), 3) for n, t in times.items()},
        "parameters": {n: c for n, (_, c) in contestants.items()},
        "threads": THREADS,
        "repeats": repeats,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
