"""Stage 3 with the front camera alone, and with the wrist's. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot.
"""

from configs import robot


def get_config(arg: str = "tiny"):
    config = robot.get_config(arg)
    config.init_from.path = "runs/stage2"
    config.action_vae = "runs/vae_robot"
    return config


def get_hyper(h):
    views = [
        h.named("front", h.fixed("sequence.use_wrist_frame", False)),
        h.named("front_and_wrist", h.fixed("sequence.use_wrist_frame", True)),
    ]
    return h.product([h.sweep("seed", range(3)), h.chainit(views)])
