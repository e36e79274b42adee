"""The curriculum on simulated data of 128 x 128 pixels, on two cores. Arg: vqgan, action_vae, video, trajectory, robot.

`python -m benchmarks.table_top` records the data, runs all stages and measures how often the arm succeeds.
"""

from rynnvla_jax.configs import action_vae, robot, trajectory, video, vqgan

STRIDE = 4  # steps between two frames of the corpora: at 30 Hz consecutive frames differ little


def get_config(arg: str = "robot"):
    """Raises ValueError for an unknown stage."""
    stages = {m.__name__.split(".")[-1]: m for m in (vqgan, action_vae, video, trajectory, robot)}
    if arg not in stages:
        raise ValueError(f"stage {arg!r} is unknown; choose one of {', '.join(stages)}")
    config = stages[arg].get_config("tiny")
    if arg == "vqgan":
        # Convolutions at full resolution are nearly all of the cost, and the tokens of 250 episodes must be made.
        config.vqgan_model.update(multipliers=(1, 1, 1, 1, 1), num_res_blocks=0, num_codes=512)
        config.batch_size, config.total_steps = 8, 1200
        config.checkpoint.every_steps = 300
        return config
    if arg == "action_vae":
        # With half the width, the first of a chunk's 20 steps, which corrects the arm's deviation, is not learnt.
        config.action_vae_model.update(width=128, feed_forward=512, dropout=0.0)
        config.total_steps = 4000
        config.optimizer.warmup_steps = 100.0
        config.checkpoint.every_steps = 500
        return config
    # The number of examples within the time budget matters most here: so the model is narrow and sequences are short.
    config.vla.transformer.update(width=128, feed_forward=384, dropout=0.0, init_std=0.07, rope_theta=100.0)
    config.remat = "none"
    config.sequence.update(num_frames=2, frame_interval=3, length=192)
    config.data.frame_codes = "ahead"  # a corpus of `rynnvla data tokenize --stride STRIDE`
    config.batch_size, config.total_steps = 32, 400
    config.optimizer.update(peak_lr=1e-3, min_lr=2e-5, warmup_steps=50.0)
    config.checkpoint.every_steps = 200
    config.codes_like_codebook = arg == "video"  # from scratch; stage 3, too, when it starts there
    if arg == "robot":
        # The policy acts on one frame: a second one doubles the cost and trains actions that are never used.
        config.sequence.update(num_frames=1, length=176)
        config.batch_size, config.total_steps = 8, 24_000
        config.optimizer.warmup_steps = 200.0
        config.checkpoint.every_steps = 1000
    return config
