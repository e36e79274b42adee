"""Stage 3 on frames of 256 and 384 pixels. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot.
"""

from rynnvla_jax.configs.ablations import after_stage2


def get_config(arg: str = "tiny"):
    return after_stage2(arg)


def get_hyper(h):
    # Four frames of two cameras and their text fit: 4 x (2 x 276 + 2) and 4 x (2 x 604 + 2) tokens without words.
    sizes = h.zipit([h.sweep("data.image.shortest_edge", [256, 384]), h.sweep("sequence.length", [2560, 5120])])
    return h.product([h.sweep("seed", range(3)), sizes])
