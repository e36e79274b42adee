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
    "TPU7x": 1153.5e12,  # a device is one of a chip's two cores; 2307e12 a chip: docs.cloud.google.com/tpu/docs/tpu7x
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,  # HGX B200 data sheet: 4.5 PFLOP/s with sparsity
    "NVIDIA GB200": 2500e12,  # GB200 NVL72 data sheet: 5 PFLOP/s with sparsity
}


def training_flops(config: TransformerConfig, tokens: float, pairs: float, frozen: bool = False) -> float:
    """FLOPs of one update over `tokens` tokens, in which `pairs` of a token and one that it attends to are computed.

    6 * tokens * (weights of every matrix product) + 12 * pairs * L * D: forward 2, backward 4 per multiply-add, and two
    products a pair. A causal sequence of S tokens has half the square, S * S / 2. The embedding look-up, norms and
    recomputation by rematerialisation are not counted. Where the weights are `frozen`, two of the six are not computed;
    the products of low-rank adapters are few, and not counted.
    """
    c = config
    attention = 2 * c.width * c.width + 2 * c.width * c.num_kv_heads * c.head_dim
    weights = c.num_layers * (attention + 3 * c.width * c.feed_forward) + c.width * c.vocab_size
    return (4.0 if frozen else 6.0) * tokens * weights + 12.0 * pairs * c.num_layers * c.width


def peak_flops(device_kind: str, configured: float = 0.0) -> float:
    """Peak FLOP/s of one device; 0.0 when neither the config nor the table knows it."""
    if configured:
        return configured
    return next((v for k, v in PEAK_FLOPS.items() if device_kind.startswith(k)), 0.0)
