"""Stage 3 with the front camera alone, and with front and wrist cameras. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot.
"""

from rynnvla_jax.configs.ablations import after_stage2


def get_config(arg: str = "tiny"):
    return after_stage2(arg)


def get_hyper(h):
    views = [
        h.named("front", h.fixed("sequence.use_wrist_frame", False)),
        h.named("front_and_wrist", h.fixed("sequence.use_wrist_frame", True)),
    ]
    return h.product([h.sweep("seed", range(3)), h.chainit(views)])
