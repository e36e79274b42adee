"""ActionVAEs for chunks of 10, 20 and 40 steps, needed by chunk.py. Arg: tiny, full."""

from rynnvla_jax.configs import action_vae

CHUNKS = (10, 20, 40)


def get_config(arg: str = "full"):
    return action_vae.get_config(arg)


def get_hyper(h):
    return h.chainit(h.named(f"{n}_steps", h.fixed("data.chunk", n)) for n in CHUNKS)
