"""Stage 3 with chunks of 10, 20 and 40 steps. Arg: tiny, 1b, 7b, 34b.

Expects stage 2 in runs/stage2, and one ActionVAE per length in runs/chunk_vae/<point>, trained with chunk_vae.py:

    rynnvla sweep --config configs/ablations/chunk_vae.py:full --out runs/chunk_vae --config.data.source=lerobot:DATA
"""

from rynnvla_jax.configs import robot
from rynnvla_jax.configs.ablations import chunk_vae


def get_config(arg: str = "tiny"):
    config = robot.get_config(arg)
    config.init_from.path = "runs/stage2"
    return config


def get_hyper(h):
    vaes = [f"runs/chunk_vae/{i:03d}_{chunk}_steps" for i, chunk in enumerate(chunk_vae.CHUNKS)]
    chunks = h.zipit([h.sweep("data.chunk", chunk_vae.CHUNKS), h.sweep("action_vae", vaes)])
    return h.product([h.sweep("seed", range(3)), chunks])
