"""Model FLOPs by formula and peak rates by device, for the utilisation metric."""

from rynnvla_jax.config import TransformerConfig

# Dense bf16 FLOP/s of one device as the vendors state it; keys are prefixes of jax's `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops(config: TransformerConfig, tokens: int, length: int) -> float:
    """FLOPs of one update over `tokens` tokens in sequences of `length`.

    6 * tokens * (weights of every matrix product) + 6 * tokens * L * length * D: forward 2, backward 4 per
    multiply-add; causal attention is counted at half the square. The embedding look-up, norms and recomputation
    by rematerialisation are not counted.
    """
    c = config
    attention = 2 * c.width * c.width + 2 * c.width * c.num_kv_heads * c.head_dim
    weights = c.num_layers * (attention + 3 * c.width * c.feed_forward) + c.width * c.vocab_size
    return 6.0 * tokens * (weights + c.num_layers * length * c.width)


def peak_flops(device_kind: str, configured: float = 0.0) -> float:
    """Peak FLOP/s of one device; 0.0 when neither the config nor the table knows it."""
    if configured:
        return configured
    return next((v for k, v in PEAK_FLOPS.items() if device_kind.startswith(k)), 0.0)
