"""Stage 3: predicts frames of two cameras and robot actions (LeRobot). Arg: tiny, 1b, 7b, 34b."""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "tiny"):
    config = base("robot", arg)
    config.data.source = ""  # "lerobot:DIR"
    # The robot's state and its ActionVAE's latent space are not the human wrist's.
    config.init_from.new = ("state_projection.*", "action_head.*")
    config.sequence.update(num_frames=4, length=7168)
    config.total_steps = 20_000
    config.batch_size = 32
    config.optimizer.update(peak_lr=2e-5, min_lr=2e-5, warmup_steps=100.0)
    if arg == "tiny":
        config.sequence.update(num_frames=2, frame_interval=5, length=384)
        config.total_steps = 90
        config.batch_size = 8
        config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup_steps=10.0)
    return config
