"""Stage 3 from scratch, from the public weights, after stage 1 and after stage 2. Arg: tiny, 1b, 7b, 34b.

Expects the model directories runs/base, runs/stage1 and runs/stage2, and the robot's ActionVAE in runs/vae_robot.
"""

from rynnvla_jax.configs import robot


def get_config(arg: str = "tiny"):
    config = robot.get_config(arg)
    config.action_vae = "runs/vae_robot"
    return config


def get_hyper(h):
    scratch = h.zipit(
        [h.fixed("tokenizer", "runs/base/assets/tokenizer.json"), h.fixed("vqgan", "runs/base/assets/vqgan")]
    )
    starts = [h.named(name, h.fixed("init_from.path", f"runs/{name}")) for name in ("base", "stage1", "stage2")]
    return h.product([h.sweep("seed", range(3)), h.chainit([h.named("scratch", scratch), *starts])])
