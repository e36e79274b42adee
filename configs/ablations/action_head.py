"""Stage 3 with an action head of one layer, and one of five layers (`MLP`). Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2 and the robot's ActionVAE in runs/vae_robot.
"""

from rynnvla_jax.configs.ablations import after_stage2


def get_config(arg: str = "tiny"):
    return after_stage2(arg)


def get_hyper(h):
    return h.product([h.sweep("seed", range(3)), h.sweep("vla.action_head", ["one_layer", "MLP"])])
