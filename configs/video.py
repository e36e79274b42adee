"""Stage 1, image-to-video: predicts the next frames from one frame and the instruction. Arg: tiny, 1b, 7b, 34b."""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "tiny"):
    config = base("video", arg)
    config.data.source = ""  # "egodex:DIR" or "lerobot:DIR"
    config.vla.state_dim = 0
    config.sequence.update(use_wrist_frame=False, num_frames=4, length=4608)
    config.total_steps = 100_000
    config.batch_size = 512
    config.optimizer.update(peak_lr=2e-5, min_lr=2e-5, warmup_steps=500.0)
    if arg == "tiny":
        config.sequence.update(num_frames=3, frame_interval=5, length=320)
        config.total_steps = 80
        config.batch_size = 8
        config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup_steps=10.0)
    return config
