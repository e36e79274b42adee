"""The model against the mathematics that the papers describe, written anew in plain NumPy with loops.

Nothing of the package takes part in the expected values; the names of the weights are those of public checkpoints.
Source: Chameleon (arXiv 2405.09818) and Llama for the decoder, RynnVLA-001 (arXiv 2509.15212) for the heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rynnvla_jax.config import TransformerConfig, VLAConfig
from rynnvla_jax.convert import vla as convert
from rynnvla_jax.convert.table import to_params
from rynnvla_jax.models.params import split
from rynnvla_jax.models.vla import VLA, loss_counts

WIDTH, HEADS, HEAD, FEED, VOCAB, LAYERS, STATE, LATENT = 16, 4, 4, 24, 40, 2, 3, 6
STATE_ID, ACTION_ID = 39, 36
OPTIONS = {
    "all heads have keys": {},
    "grouped queries": {"num_kv_heads": 2},
    "one key head (MQA)": {"num_kv_heads": 1},
    "norms behind, as in 34B": {"swin_norm": True, "num_kv_heads": 2, "q_norm_rows": 2, "k_norm_rows": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "other angles and eps": {"rope_theta": 100.0, "norm_eps": 0.01},
    "MLP head": {"action_head": "MLP"},
    "no z-loss": {"z_weight": 0.0},
}


def weights_of(config: VLAConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A public checkpoint with random weights of every tensor; linear layers are [out, in]."""
    c, kv = config.transformer, config.transformer.num_kv_heads * HEAD
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for name, out, inner in (("q", WIDTH, WIDTH), ("k", kv, WIDTH), ("v", kv, WIDTH), ("o", WIDTH, WIDTH)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (out, inner)
            if c.attention_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (out,)
        for name, out, inner in (("gate", FEED, WIDTH), ("up", FEED, WIDTH), ("down", WIDTH, FEED)):
            shapes[f"{layer}mlp.{name}_proj.weight"] = (out, inner)
            if c.mlp_bias:
                shapes[f"{layer}mlp.{name}_proj.bias"] = (out,)
        for name, rows in (("q", c.q_norm_rows), ("k", c.k_norm_rows)):
            shapes[f"{layer}self_attn.{name}_norm.weight"] = shapes[f"{layer}self_attn.{name}_norm.bias"] = (rows, HEAD)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (WIDTH,)
    widths = [WIDTH, *([2048, 1024, 512, 256] if config.action_head == "MLP" else []), LATENT]
    for i, (inner, out) in enumerate(zip(widths, widths[1:], strict=False)):
        head = f"action_head.{2 * i}" if config.action_head == "MLP" else "action_head"
        shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (out, inner), (out,)
    shapes["state_projection.weight"], shapes["state_projection.bias"] = (WIDTH, STATE), (WIDTH,)

    def draw(name, shape):
        scale = 0.3 if len(shape) < 2 else 1.5 * shape[-1] ** -0.5
        return (rng.normal(size=shape) * scale + name.endswith("norm.weight")).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes.items()}


class Described:
    """One sequence through the decoder, in float64, position by position."""

    def __init__(self, config: VLAConfig, weights: dict[str, np.ndarray]):
        self.config, self.weights = config, {k: v.astype(np.float64) for k, v in weights.items()}

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def rms_norm(self, x, name):
        mean_square = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.transformer.norm_eps) * self.weights[f"{name}.weight"]

    def head_norm(self, x, name, head, heads):
        """LayerNorm over one head's numbers; neighbouring heads share a row of scales."""
        scale, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        row = head * len(scale) // heads
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale[row] + bias[row]

    def rotated(self, x, position):
        """Components i and i + half are a point of the plane that turns by position * theta^(-2 i / head)."""
        half, out = HEAD // 2, np.empty_like(x)
        for i in range(half):
            angle = position * self.config.transformer.rope_theta ** (-2 * i / HEAD)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    def attention(self, x, name):
        groups = HEADS // self.config.transformer.num_kv_heads
        q, k, v = (self.linear(x, f"{name}.{part}_proj").reshape(len(x), -1, HEAD) for part in "qkv")
        out = np.zeros_like(q)
        for head in range(HEADS):
            pair = head // groups
            for t in range(len(x)):
                query = self.rotated(self.head_norm(q[t, head], f"{name}.q_norm", head, HEADS), t)
                scores = np.array(
                    [
                        query @ self.rotated(self.head_norm(k[s, pair], f"{name}.k_norm", pair, HEADS // groups), s)
                        for s in range(t + 1)
                    ]
                ) / np.sqrt(HEAD)
                share = np.exp(scores - scores.max())
                out[t, head] = share @ v[: t + 1, pair] / share.sum()
        return self.linear(out.reshape(len(x), -1), f"{name}.o_proj")

    def mlp(self, x, name):
        gate = self.linear(x, f"{name}.gate_proj")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def hidden(self, tokens, state):
        x = self.weights["model.embed_tokens.weight"][tokens]
        x[tokens == STATE_ID] = self.linear(state, "state_projection")
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            before, after = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
            if self.config.transformer.swin_norm:
                x = x + self.rms_norm(self.attention(x, f"{layer}.self_attn"), before)
                x = x + self.rms_norm(self.mlp(x, f"{layer}.mlp"), after)
            else:
                x = x + self.attention(self.rms_norm(x, before), f"{layer}.self_attn")
                x = x + self.mlp(self.rms_norm(x, after), f"{layer}.mlp")
        return self.rms_norm(x, "model.norm")

    def action(self, x):
        if self.config.action_head == "one_layer":
            return self.linear(x, "action_head")
        for i in range(5):
            x = self.linear(x if i == 0 else np.maximum(x, 0), f"action_head.{2 * i}")
        return x

    def losses(self, tokens, trained, state, target, z_weight):
        """Cross-entropy, L1 of the action embedding, squared log-partition, and their weighted sum."""
        hidden = self.hidden(tokens, state)
        logits = hidden @ self.weights["lm_head.weight"].T
        entropies, squares = [], []
        for t in range(1, len(tokens)):
            if trained[t]:
                partition = np.log(np.exp(logits[t - 1]).sum())
                entropies.append(partition - logits[t - 1, tokens[t]])
                squares.append(partition**2)
        before = np.flatnonzero(tokens == ACTION_ID) - 1
        action = np.abs(self.action(hidden[before]) - target).mean()
        entropy, z = np.mean(entropies), np.mean(squares)
        return entropy, action, z, entropy + action + z_weight * z


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_decoder_computes_what_is_described(options):
    own = {"action_head", "z_weight"}
    settings = {"num_kv_heads": HEADS, **{k: v for k, v in options.items() if k not in own}}
    transformer = TransformerConfig(
        vocab_size=VOCAB, width=WIDTH, num_layers=LAYERS, num_heads=HEADS, feed_forward=FEED, dropout=0.0, **settings
    )
    head, z_weight = options.get("action_head", "one_layer"), options.get("z_weight", 1e-2)
    config = VLAConfig(transformer=transformer, state_dim=STATE, action_head=head, action_outputs=LATENT)
    rng = np.random.default_rng(5)
    weights = weights_of(config, rng)
    graphdef, template = split(nnx.eval_shape(lambda: VLA(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(jnp.asarray, to_params(convert.table(config), weights, template)))
    tokens = np.array([0, 20, 21, 4, 5, 6, STATE_ID, ACTION_ID, 22, 7, 8, STATE_ID, ACTION_ID])
    state = rng.normal(size=(2, STATE)).astype(np.float32)
    target = rng.normal(size=(2, LATENT)).astype(np.float32)
    trained = np.arange(len(tokens)) > 5
    batch = {
        "tokens": tokens[None].astype(np.int32),
        "loss_mask": trained[None],
        "state": state[None],
        "state_positions": np.array([[6, 11]], np.int32),
        "action_positions": np.array([[7, 12]], np.int32),
        "action_targets": target[None],
    }
    described = Described(config, weights)
    batch = jax.tree.map(jnp.asarray, batch)
    hidden = model.hidden(batch)
    np.testing.assert_allclose(hidden[0], described.hidden(tokens, state), atol=3e-5)
    total, parts = model.loss(batch, loss_counts(batch), chunk=16, z_loss_weight=z_weight)
    found = parts["cross_entropy"], parts["action_l1"], parts["z_loss"], total
    np.testing.assert_allclose(found, described.losses(tokens, trained, state, target, z_weight), rtol=1e-5)
