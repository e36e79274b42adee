"""ActionVAE over wrist trajectories or robot actions. Arg: `tiny` or `full` (the published size and recipe)."""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "full"):
    if arg not in ("tiny", "full"):
        raise ValueError(f"size {arg!r} is unknown; choose tiny or full")
    config = base("action_vae", "tiny" if arg == "tiny" else "7b")
    config.compute_dtype = "float32"
    config.data.source = ""  # "egodex:DIR" for stage 2, "lerobot:DIR" for stage 3: one ActionVAE per domain
    config.total_steps = 300_000
    config.batch_size = 128
    config.optimizer.update(
        schedule="action_vae",
        peak_lr=1e-5,
        min_lr=1e-6,
        warmup_lr=1e-6,
        warmup_steps=100.0,
        beta2=0.999,
        weight_decay=1e-4,
        clip_norm=0.0,
    )
    config.checkpoint.every_steps = 5000
    if arg == "tiny":
        config.action_vae_model.update(width=64, feed_forward=256, num_heads=4, encoder_layers=2, decoder_layers=2)
        config.total_steps = 250
        config.batch_size = 64
        config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup_steps=20.0)
        config.checkpoint.every_steps = 100
        config.log_every = 10
    return config
