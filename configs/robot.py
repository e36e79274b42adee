"""Stage 3: predicts frames of two cameras and robot actions (LeRobot). Arg: tiny, 1b, 7b, 34b, tiny_lora, 1b_lora,
7b_lora or 34b_lora. With _lora low-rank adapters, heads and the last norm train, on one card.
"""

from rynnvla_jax.configs.sizes import base


def get_config(arg: str = "tiny"):
    size = arg.removesuffix("_lora")
    config = base("robot", size)
    config.data.source = ""  # "lerobot:DIR"
    # The robot's state and its ActionVAE's latent space are not the human wrist's.
    config.init_from.new = ("state_projection.*", "action_head.*")
    config.sequence.update(num_frames=4, length=7168)
    config.total_steps = 20_000
    config.batch_size = 32
    config.optimizer.update(peak_lr=2e-5, min_lr=2e-5, warmup_steps=100.0)
    if size == "tiny":
        config.sequence.update(num_frames=2, frame_interval=5, length=384)
        config.total_steps = 90
        config.batch_size = 8
        config.optimizer.update(peak_lr=1e-3, min_lr=1e-4, warmup_steps=10.0)
    if size != arg:
        config.finetune.train = (*config.init_from.new, "transformer.final_norm")
        config.finetune.lora.rank = 16
        if size == "tiny":
            config.finetune.base_dtype = "float32"
        else:  # one example at a time, of three frames, fits a card of 24 GiB
            config.sequence.update(num_frames=3, length=5120)
            config.batch_size = config.optimizer.accumulation = 8
            config.optimizer.update(peak_lr=2e-4, min_lr=2e-5, schedule="cosine")
    return config
