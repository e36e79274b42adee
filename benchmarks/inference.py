"""Seconds until an action: one forward pass over a 1230-token prompt (two 384 x 384 frames, text, state).

    python -m benchmarks.inference

Contestants take turns in one process, on the same weights and the same prompt:

- `torch_full_logits` (the peer): the LM head on every position, then the action head, as the public code does;
- `transformers`: Hugging Face's own Chameleon, same work, where it is installed;
- `torch_action_latent`: this project's PyTorch runtime, no LM head, last block for one position only;
- `jax_action_latent`: this project's JAX model, jitted, no LM head.

Prints one JSON line: median and fastest seconds of each, and the median over rounds of how many times faster
than the peer it was in that round (a busy machine slows a whole round).
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from rynnvla_jax.config import TransformerConfig, VLAConfig
from rynnvla_jax.convert.table import to_params
from rynnvla_jax.convert.vla import table
from rynnvla_jax.deploy import torch_transformer
from rynnvla_jax.models import vla as jax_vla

CONFIG = VLAConfig(
    transformer=TransformerConfig(
        vocab_size=8192 + 4, width=384, num_layers=6, num_heads=6, num_kv_heads=6, feed_forward=1024
    )
)  # 17M weights


def torch_model() -> torch_transformer.VLA:
    """Random weights from a fixed seed."""
    torch.manual_seed(0)
    model = torch_transformer.VLA(CONFIG).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def jax_contestant(model: torch_transformer.VLA, prompt: np.ndarray, state: np.ndarray):
    """The JAX model with the same weights, compiled for this prompt's length."""
    graphdef, template = nnx.split(nnx.eval_shape(lambda: jax_vla.VLA(CONFIG, rngs=nnx.Rngs(0))))
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    params = jax.tree.map(jnp.asarray, to_params(table(CONFIG), weights, nnx.to_pure_dict(template)))

    @jax.jit
    def run(params, tokens, lengths, state, positions):
        nnx.replace_by_pure_dict(template, params)
        return nnx.merge(graphdef, template).action_latent(tokens, lengths, state, positions)

    inputs = jnp.asarray(prompt), jnp.array([prompt.shape[1]]), jnp.asarray(state)[:, None]
    positions = jnp.array([[prompt.shape[1] - 1]])
    return lambda: np.asarray(run(params, *inputs, positions))


def hugging_face_contestant(model: torch_transformer.VLA, prompt: torch.Tensor, state: torch.Tensor):
    """`transformers`' Chameleon with the same weights, the action head on its hidden states; None if not installed."""
    try:
        from transformers import ChameleonConfig, ChameleonForConditionalGeneration
    except ImportError:
        return None
    t = CONFIG.transformer
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
    weights = model.state_dict()
    for name in [name for name in weights if name.split(".")[-2] in ("q_norm", "k_norm")]:
        weights[name] = weights[name].expand(t.num_heads, -1)  # there, one row a head
    hf.load_state_dict(weights, strict=False)

    @torch.inference_mode()
    def run():
        output = hf(inputs_embeds=model.embed(prompt, state), output_hidden_states=True, use_cache=False)
        return model.action_head(output.hidden_states[-1])[:, -1].numpy()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=1230, help="tokens")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 8192, (1, options.prompt)).astype(np.int32)
    prompt[0, -1] = CONFIG.transformer.vocab_size - 1
    state = rng.standard_normal((1, CONFIG.state_dim)).astype(np.float32)
    model = torch_model()
    tokens, torch_state = torch.from_numpy(prompt.astype(np.int64)), torch.from_numpy(state)

    @torch.inference_mode()
    def full_logits():
        return model(tokens, torch_state).action[:, -1].numpy()

    contestants = {
        "torch_full_logits": full_logits,
        "transformers": hugging_face_contestant(model, tokens, torch_state),
        "torch_action_latent": lambda: model.action_latent(tokens, torch_state).numpy(),
        "jax_action_latent": jax_contestant(model, prompt, state),
    }
    contestants = {name: run for name, run in contestants.items() if run is not None}
    expected = full_logits()
    for name, run in contestants.items():  # also compiles and warms up
        np.testing.assert_allclose(run(), expected, atol=1e-3, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(options.rounds):
        order = order[1:] + order[:1]
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    peer = seconds["torch_full_logits"]
    ratios = {
        name: statistics.median(p / t for p, t in zip(peer, times, strict=True))
        for name, times in seconds.items()
        if times is not peer
    }
    print(
        json.dumps(
            {
                "benchmark": "inference",
                "prompt_tokens": options.prompt,
                "parameters": sum(p.numel() for p in model.parameters()),
                "rounds": options.rounds,
                "torch_threads": torch.get_num_threads(),
                "median_seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
                "fastest_seconds": {name: round(min(times), 4) for name, times in seconds.items()},
                "median_speedup_over_torch_full_logits": {name: round(ratio, 2) for name, ratio in ratios.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
