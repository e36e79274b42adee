"""Stage 3 that predicts the ActionVAE's embedding, compared with one that predicts the chunk. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot.
"""

from rynnvla_jax.configs import robot


def get_config(arg: str = "tiny"):
    config = robot.get_config(arg)
    config.init_from.path = "runs/stage2"
    return config


def get_hyper(h):
    embedding = h.product([h.fixed("vla.actions", "embedding"), h.fixed("action_vae", "runs/vae_robot")])
    raw = h.fixed("vla.actions", "raw")
    return h.product([h.sweep("seed", range(3)), h.chainit([h.named("embedding", embedding), h.named("raw", raw)])])
