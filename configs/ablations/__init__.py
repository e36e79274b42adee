"""The method's own ablations, as sweeps. They expect models under runs/ and data under data/, as each file says."""

from rynnvla_jax.configs import robot


def after_stage2(arg: str = "tiny"):
    """Stage 3 after stage 2 in runs/stage2, with the robot's ActionVAE in runs/vae_robot."""
    config = robot.get_config(arg)
    config.init_from.path = "runs/stage2"
    config.action_vae = "runs/vae_robot"
    return config
