"""Tiny untrained assets and configs of every stage on the demo data, for tests."""

from pathlib import Path

from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import demo
from data_pipelines.loader import Loader
from rynnvla_jax.checkpoint import model_dir
from rynnvla_jax.config import TrainConfig, from_dict
from rynnvla_jax.configs import action_vae, robot, trajectory, video, vqgan
from rynnvla_jax.models.params import split
from rynnvla_jax.stage import STAGES
from rynnvla_jax.train.loop import train
from rynnvla_jax.train.stages import OBJECTIVES
from rynnvla_jax.vocabulary import train_tokenizer

EGODEX = f"egodex:{demo.path('egodex')}"
SO100 = f"lerobot:{demo.path('so100')}"
TEXTS = ("pick up the green block and place it on the plate", "put the pen into the holder")
FILES = {"action_vae": action_vae, "vqgan": vqgan, "video": video, "trajectory": trajectory, "robot": robot}


def get_config(arg: str) -> ConfigDict:
    """For commands, `--config=tests/tiny.py:STAGE`, with the robot's demo data."""
    return config(arg, SO100)


def config(stage: str, source: str, **overrides) -> ConfigDict:
    """The stage's tiny config, made even smaller: one layer, 64-pixel frames, few steps. Dotted overrides come last."""
    c = FILES[stage].get_config("tiny")
    c.data.source = source
    c.data.image.shortest_edge = 64
    c.data.chunk = 5
    c.vla.transformer.update(width=32, num_layers=2, num_heads=4, num_kv_heads=2, feed_forward=64)
    c.action_vae_model.update(width=16, feed_forward=32, num_heads=2, encoder_layers=1, decoder_layers=1)
    c.vqgan_model.update(
        channels=32, multipliers=(1, 1, 1, 1, 1), num_res_blocks=1, z_channels=8, code_width=8, num_codes=32
    )
    c.sequence.update(length=192, num_frames=2)
    c.update(batch_size=8, total_steps=6, log_every=1, loss_chunk=64)
    c.checkpoint.every_steps = 3
    c.update_from_flattened_dict(overrides)
    return c


def typed(c: ConfigDict) -> TrainConfig:
    return from_dict(TrainConfig, c.to_dict())


def paths(directory: Path) -> dict[str, str]:
    """The paths to which `assets` writes."""
    return {n: str(directory / n) for n in ("tokenizer.json", "vqgan", "vae_hand", "vae_robot")}


def assets(directory: Path) -> dict[str, str]:
    """Writes tokenizer.json and untrained vqgan/, vae_hand/, vae_robot/ model directories; returns their paths."""
    tokenizer = directory / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(TEXTS, num_codes=32, num_text=40), encoding="utf-8")
    for name, stage, source in (
        ("vqgan", "vqgan", SO100),
        ("vae_hand", "action_vae", EGODEX),
        ("vae_robot", "action_vae", SO100),
    ):
        c = typed(config(stage, source))
        model = OBJECTIVES[stage].build(c, nnx.Rngs(0))
        model_dir.save_model(directory / name, STAGES[stage].model, STAGES[stage].model_config(c), split(model)[1])
        if stage == "action_vae":
            Loader(c, progress=False).statistics.to_json(directory / name / "assets" / "statistics.json")
    return paths(directory)


def curriculum(directory: Path, assets: dict[str, str]) -> None:
    """Trains video/, then trajectory/ from it with learning rate 0, then robot/ from that, two steps each."""
    start = {"total_steps": 2, "tokenizer": assets["tokenizer.json"], "vqgan": assets["vqgan"]}
    train(typed(config("video", EGODEX, **start)), directory / "video")
    inherit = {"total_steps": 2, "init_from.path": str(directory / "video"), "action_vae": assets["vae_hand"]}
    inherit |= {"optimizer.peak_lr": 0.0, "optimizer.min_lr": 0.0}
    train(typed(config("trajectory", EGODEX, **inherit)), directory / "trajectory")
    inherit = {"total_steps": 2, "init_from.path": str(directory / "trajectory"), "action_vae": assets["vae_robot"]}
    train(typed(config("robot", SO100, **inherit)), directory / "robot")
