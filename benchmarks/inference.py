"""Time from two camera frames to an action: VQ codes of both, one pass over text, codes and state, the action head.

    python -m benchmarks.inference [--edge 384] [--width 384] [--layers 6]

These implementations take turns, each in its own process, with the same weights, frames and words, and Chameleon's
vocabulary of 65,540 rows:

- `public_path` (the baseline): like the public code: one frame after the other through the VQGAN, the LM head on every
  position, sampling of a next token, then the action head; PyTorch with its default settings;
- `public_path_memory_kept`: the same in a process that keeps freed memory, as our runtime does (`deploy.memory`);
- `transformers`: the public path with Hugging Face's own Chameleon, where it is installed;
- `torch_policy`: this project's PyTorch runtime: channels last, no LM head, the last block for one position only;
- `torch_policy_compiled`: the same with torch.compile (`Policy.load(compiled=True)`);
- `torch_policy_compiled_bfloat16`: also with the transformer in bfloat16 (`dtype`); the VQGAN stays in float32;
- `jax_policy`: the same in JAX, compiled.

Prints one JSON line: the median and smallest number of seconds of each, how the baseline's time is divided, and the
speed-up of each over the baseline, which is computed in each round (a busy machine slows a whole round) and given as
the median over rounds.
"""

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from rynnvla_jax.config import TransformerConfig, VLAConfig, VQGANConfig
from rynnvla_jax.convert import vla, vqgan
from rynnvla_jax.convert.table import to_params
from rynnvla_jax.deploy import memory, torch_transformer, torch_vqgan
from rynnvla_jax.models import vla as jax_vla
from rynnvla_jax.models import vqgan as jax_vqgan

VQ = VQGANConfig(channels=32, multipliers=(1, 1, 1, 1, 2), num_res_blocks=1, z_channels=16, code_width=8)
WORDS = 12  # of the instruction
FIRST_CODE = 4  # the id of code 0
THREADS = 2


class Weights:
    """Random weights from a fixed seed, in PyTorch and in JAX."""

    def __init__(self, width: int, layers: int):
        transformer = TransformerConfig(
            width=width, num_layers=layers, num_heads=width // 64, num_kv_heads=width // 64, feed_forward=width * 8 // 3
        )
        self.config = VLAConfig(transformer=transformer)
        torch.manual_seed(0)
        self.vla = torch_transformer.VLA(self.config).eval().requires_grad_(False)
        for name, weight in self.vla.named_parameters():
            if "norm" not in name:
                torch.nn.init.normal_(weight, std=0.05)
        self.vqgan = torch_vqgan.VQGAN(VQ, with_decoder=False).eval().requires_grad_(False)

    def jax(self):
        """(VLA graph, its parameters, VQGAN graph, its parameters)."""
        parts = []
        for build, rows, model in (
            (lambda: jax_vla.VLA(self.config, rngs=nnx.Rngs(0)), vla.table(self.config), self.vla),
            (lambda: jax_vqgan.VQGAN(VQ, rngs=nnx.Rngs(0), decoder=False), vqgan.table(VQ, decoder=False), self.vqgan),
        ):
            graphdef, template = nnx.split(nnx.eval_shape(build))
            weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
            nnx.replace_by_pure_dict(
                template, jax.tree.map(jnp.asarray, to_params(rows, weights, nnx.to_pure_dict(template)))
            )
            parts += [graphdef, template]
        return parts


class Observation:
    """Two frames, an instruction and a state, and the prompt that their codes make."""

    def __init__(self, edge: int, config: VLAConfig):
        rng = np.random.default_rng(0)
        self.frames = rng.uniform(-1, 1, (2, edge, edge, 3)).astype(np.float32)
        self.state = rng.standard_normal((1, config.state_dim)).astype(np.float32)
        self.words = rng.integers(FIRST_CODE + 8192, 60_000, WORDS)
        self.end = np.array([config.transformer.vocab_size - 1])  # position of the state

    def prompt(self, codes: torch.Tensor) -> torch.Tensor:
        """int64 [1, P] of codes [2, h, w]."""
        words, end = torch.from_numpy(self.words), torch.from_numpy(self.end)
        return torch.cat([words, FIRST_CODE + codes.flatten(), end])[None]


def public_path(weights: Weights, seen: Observation):
    """The baseline. Like the others, a pair: frames to codes [2, h, w], codes to an action's embedding [1, 64]."""
    state = torch.from_numpy(seen.state)

    @torch.inference_mode()
    def act(codes):
        output = weights.vla(seen.prompt(codes), state)
        torch.multinomial(output.logits[:, -1].softmax(-1), 1)
        return output.action[:, -1].numpy()

    return one_by_one(weights, seen), act


def torch_policy(weights: Weights, seen: Observation, compiled: bool = False, dtype: torch.dtype = torch.float32):
    """The program that `deploy.policy.Policy` runs on a CPU."""
    memory.keep()
    vla = weights.vla.to(dtype)
    vqgan = cast(Any, weights.vqgan).to(memory_format=torch.channels_last)  # which torch's types do not know
    if compiled:
        vla.model.compile(dynamic=True)
        vqgan.encoder.compile()
    frames, state = torch.from_numpy(seen.frames).permute(0, 3, 1, 2), torch.from_numpy(seen.state)
    return (
        lambda: torch.cat([vqgan.codes(frame) for frame in frames.split(1)]),
        lambda codes: vla.action_latent(seen.prompt(codes), state).float().numpy(),
    )


def one_by_one(weights: Weights, seen: Observation):
    """Codes of the frames as the public code finds them."""
    pixels = torch.from_numpy(seen.frames.transpose(0, 3, 1, 2).copy())

    @torch.inference_mode()
    def encode():
        return torch.stack([publicly_quantised(weights.vqgan, frame[None]) for frame in pixels])

    return encode


def publicly_quantised(vqgan: torch_vqgan.VQGAN, frame: torch.Tensor) -> torch.Tensor:
    """Codes int64 [h, w] of one frame, from the matrix of all distances, as taming-transformers finds them."""
    z, table = vqgan.encode(frame).movedim(1, -1), vqgan.quantize.embedding.weight
    flat = z.flatten(0, -2)
    distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
    return distance.argmin(1).view(z.shape[1:3])


def jax_policy(weights: Weights, seen: Observation):
    """The program that `rynnvla_jax.inference.jax_policy` compiles."""
    vla_graph, vla_params, vq_graph, vq_params = weights.jax()
    state, words, end = (jnp.asarray(x) for x in (seen.state[:, None], seen.words, seen.end))

    @jax.jit
    def encode(params, frames):
        return nnx.merge(vq_graph, params).codes(frames)

    @jax.jit
    def latent(params, codes):
        prompt = jnp.concatenate([words, FIRST_CODE + codes.reshape(-1), end])[None]
        last = jnp.array([[prompt.shape[1] - 1]])
        return nnx.merge(vla_graph, params).action_latent(prompt, last[0] + 1, state, last)

    frames = jnp.asarray(seen.frames)
    return lambda: encode(vq_params, frames).block_until_ready(), lambda codes: np.asarray(latent(vla_params, codes))


def hugging_face(weights: Weights, seen: Observation):
    """`transformers`' Chameleon, the action head on its hidden states."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    t, model, state = weights.config.transformer, weights.vla, torch.from_numpy(seen.state)
    hf = ChameleonForConditionalGeneration(
        ChameleonConfig(
            vocab_size=t.vocab_size,
            hidden_size=t.width,
            intermediate_size=t.feed_forward,
            num_hidden_layers=t.num_layers,
            num_attention_heads=t.num_heads,
            num_key_value_heads=t.num_kv_heads,
            vocabulary_map={"<image>": 7, "IMGIMGAZ": 8, "IMGIMGBZ": 9},
            vq_config={
                "embed_dim": 8, "num_embeddings": 2, "latent_channels": 8, "base_channels": 32,
                "channel_multiplier": [1], "num_res_blocks": 1, "resolution": 32,
            },
        )
    ).eval()  # fmt: skip
    tensors = model.state_dict()
    for name in [name for name in tensors if name.split(".")[-2] in ("q_norm", "k_norm")]:
        tensors[name] = tensors[name].expand(t.num_heads, -1)  # transformers has one row per head
    hf.load_state_dict(tensors, strict=False)

    @torch.inference_mode()
    def act(codes):
        output = hf(inputs_embeds=model.embed(seen.prompt(codes), state), output_hidden_states=True, use_cache=False)
        torch.multinomial(output.logits[:, -1].softmax(-1), 1)
        return model.action_head(output.hidden_states[-1])[:, -1].numpy()

    return one_by_one(weights, seen), act


def memory_kept(weights: Weights, seen: Observation):
    memory.keep()
    return public_path(weights, seen)


def compiled(weights: Weights, seen: Observation):
    return torch_policy(weights, seen, compiled=True)


def compiled_bfloat16(weights: Weights, seen: Observation):
    return torch_policy(weights, seen, compiled=True, dtype=torch.bfloat16)


CONTESTANTS = {
    "public_path": public_path,
    "public_path_memory_kept": memory_kept,
    "torch_policy": torch_policy,
    "torch_policy_compiled": compiled,
    "torch_policy_compiled_bfloat16": compiled_bfloat16,
    "jax_policy": jax_policy,
    "transformers": hugging_face,
}


def contest(build: Callable, options: argparse.Namespace, pipe: Connection) -> None:
    """Runs in its own process: sends (codes, latent, sizes), then the seconds of both halves for each True received."""
    torch.set_num_threads(THREADS)
    weights = Weights(options.width, options.layers)
    seen = Observation(options.edge, weights.config)
    sizes = {
        "parameters": sum(p.numel() for p in weights.vla.parameters()),
        "vqgan_encoder_parameters": sum(p.numel() for p in weights.vqgan.parameters()),
    }
    encode, act = build(weights, seen)
    codes = encode()  # also compiles and warms up
    pipe.send((np.asarray(codes), act(codes), sizes))
    while pipe.recv():
        start = time.perf_counter()
        found = encode()
        encoded = time.perf_counter()
        act(found)
        pipe.send((encoded - start, time.perf_counter() - encoded))


def started(name: str, options: argparse.Namespace) -> Connection:
    """Starts one implementation in its own process and returns the connection to it."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    spawn.Process(target=contest, args=(CONTESTANTS[name], options, theirs), daemon=True).start()
    theirs.close()
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", type=int, default=384, help="height and width of a frame, in pixels")
    parser.add_argument("--width", type=int, default=384, help="width of the transformer")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    names = [n for n in CONTESTANTS if n != "transformers" or importlib.util.find_spec(n)]
    pipes = {name: started(name, options) for name in names}
    answers = {name: pipe.recv() for name, pipe in pipes.items()}
    codes, latent, sizes = answers["public_path"]
    flipped = {name: float((found != codes).mean()) for name, (found, _, _) in answers.items()}
    for name, (_, found, _) in answers.items():
        if not flipped[name] and "bfloat16" not in name:
            np.testing.assert_allclose(found, latent, atol=1e-3, err_msg=name)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(options.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            pipes[name].send(True)
            seconds[name].append(pipes[name].recv())
    totals = {name: [sum(parts) for parts in rounds] for name, rounds in seconds.items()}
    baseline = totals["public_path"]
    ratios = {
        name: round(statistics.median(p / t for p, t in zip(baseline, times, strict=True)), 2)
        for name, times in totals.items()
        if times is not baseline
    }
    print(
        json.dumps(
            {
                "benchmark": "inference",
                "prompt_tokens": 2 * (options.edge // 16) ** 2 + WORDS + 1,
                **sizes,
                "rounds": options.rounds,
                "torch_threads": THREADS,
                "median_seconds": {name: round(statistics.median(times), 4) for name, times in totals.items()},
                "fastest_seconds": {name: round(min(times), 4) for name, times in totals.items()},
                "median_seconds_of_vqgan": {
                    name: round(statistics.median(e for e, _ in rounds), 4) for name, rounds in seconds.items()
                },
                "codes_that_differ": flipped,
                "median_speedup_over_public_path": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
