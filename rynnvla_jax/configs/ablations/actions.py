"""Stage 3 that predicts the ActionVAE's embedding, against one that predicts the chunk itself. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot; a robot of six joints.
"""

from rynnvla_jax.configs import robot

JOINTS = 6


def get_config(arg: str = "tiny"):
    config = robot.get_config(arg)
    config.init_from.path = "runs/stage2"
    config.data.chunk = 20
    return config


def get_hyper(h):
    embedding = h.product([h.fixed("vla.actions", "embedding"), h.fixed("action_vae", "runs/vae_robot")])
    raw = h.product([h.fixed("vla.actions", "raw"), h.fixed("vla.action_outputs", 20 * JOINTS)])
    return h.product([h.sweep("seed", range(3)), h.chainit([h.named("embedding", embedding), h.named("raw", raw)])])
