"""Stage 2: predicts frames and the human wrist trajectory (EgoDex). Arg: tiny, 1b, 7b, 34b."""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "tiny"):
    config = base("trajectory", arg)
    config.data.source = ""  # "egodex:DIR"
    config.init_from.new = ("state_projection.*", "action_head.*")  # stage 1 has neither
    config.sequence.update(use_wrist_frame=False, num_frames=4, length=4608)
    config.total_steps = 50_000
    config.batch_size = 256
    config.optimizer.update(peak_lr=2e-5, min_lr=2e-5, warmup_steps=500.0)
    if arg == "tiny":
        config.sequence.update(num_frames=3, frame_interval=5, length=320)
        config.total_steps = 60
        config.batch_size = 8
        config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup_steps=10.0)
    return config
