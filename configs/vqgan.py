"""A small image tokenizer, for use without a public VQGAN. Arg: `tiny` or `full` (Chameleon's architecture)."""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "tiny"):
    if arg not in ("tiny", "full"):
        raise ValueError(f"size {arg!r} is unknown; choose tiny or full")
    config = base("vqgan", "tiny" if arg == "tiny" else "7b")
    config.compute_dtype = "float32"
    config.total_steps = 100_000
    config.batch_size = 64
    config.optimizer.update(peak_lr=1e-4, min_lr=1e-5, warmup_steps=1000.0, weight_decay=0.0, clip_norm=1.0)
    if arg == "tiny":
        config.vqgan_model.update(
            channels=32, multipliers=(1, 1, 1, 1, 2), num_res_blocks=1, z_channels=16, code_width=8, num_codes=256
        )
        config.total_steps = 160
        config.batch_size = 4
        config.optimizer.update(peak_lr=2e-3, min_lr=2e-4, warmup_steps=5.0, clip_norm=0.0)
        config.checkpoint.every_steps = 80
    return config
