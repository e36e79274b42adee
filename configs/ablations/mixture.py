"""Stage 1 on human and robot video, mixed in several proportions. Arg: tiny, 1b, 7b, 34b.

Expects EgoDex in data/egodex, LeRobot recordings in data/robot and the public weights in runs/base.
"""

from rynnvla_jax.configs import video


def get_config(arg: str = "tiny"):
    config = video.get_config(arg)
    config.init_from.path = "runs/base"
    config.data.image.fit = "square"  # the two have frames of different shapes
    # Imported RynnVLA weights have these parameters, stage 1 does not.
    config.init_from.new = ("state_projection.*", "action_head.*")
    if arg == "tiny":
        config.sequence.length = 384  # square frames take more tokens
    return config


def get_hyper(h):
    def mixture(human: int):
        return (("egodex:data/egodex", human / 100), ("lerobot:data/robot", 1 - human / 100))

    mixtures = [h.named(f"human_{human}", h.fixed("data.mixture", mixture(human))) for human in (50, 75, 90)]
    return h.product([h.sweep("seed", range(3)), h.chainit(mixtures)])
