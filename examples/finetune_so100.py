"""Fine-tune on your LeRobot data set, export the policy, and compare a predicted chunk with the recorded one.

python examples/finetune_so100.py --out OUT              # included demo data, tiny models from scratch, on a CPU
python examples/finetune_so100.py --out OUT --data DATA --init MODEL --size 7b     # from an imported model or stage 2
"""

import argparse
from pathlib import Path

from data_pipelines import demo
from data_pipelines.sources import open_source
from rynnvla_jax.checkpoint.reader import find_step
from rynnvla_jax.cli.main import main as rynnvla
from rynnvla_jax.config import DataConfig, TrainConfig, from_dict
from rynnvla_jax.configs import action_vae, robot, vqgan
from rynnvla_jax.deploy.policy import Policy
from rynnvla_jax.train.loop import train
from rynnvla_jax.vocabulary import train_tokenizer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, default=demo.path("so100"), help="LeRobot data set, v3.0 or v2.1")
parser.add_argument("--out", type=Path, required=True, help="folder for all output; repeat to continue")
parser.add_argument("--init", help="model directory to start from; default: from scratch")
parser.add_argument("--size", default="tiny", help="tiny, 1b, 7b or 34b; with --init, the size of that model")
parser.add_argument("--steps", type=int, help="training steps of every model; default: the configs' values")
for view in ("front", "wrist"):
    parser.add_argument(f"--{view}", default=f"observation.images.{view}", help="camera key of the data set")


def fit(args: argparse.Namespace, folder: Path, config, **values) -> TrainConfig:
    """Trains one model in `folder`; `values` are config keys."""
    config.data.update(source=f"lerobot:{args.data}", front=args.front, wrist=args.wrist)
    config.update(values, total_steps=args.steps or config.total_steps)
    train(typed := from_dict(TrainConfig, config.to_dict()), folder)
    return typed


if __name__ == "__main__":
    args = parser.parse_args()
    small, policy = "tiny" if args.size == "tiny" else "full", args.out / "policy"
    parts: dict = {"init_from": {"path": args.init}}  # weights, text tokenizer and VQGAN
    if not args.init:
        parts = {"tokenizer": str(args.out / "tokenizer.json"), "vqgan": str(args.out / "vqgan")}
        codes = fit(args, args.out / "vqgan", vqgan.get_config(small)).vqgan_model.num_codes
        data = open_source(f"lerobot:{args.data}", DataConfig(), views=())
        Path(parts["tokenizer"]).write_text(train_tokenizer(data.texts, codes), encoding="utf-8")
    fit(args, args.out / "action_vae", action_vae.get_config(small))
    config = fit(args, policy, robot.get_config(args.size), action_vae=str(args.out / "action_vae"), **parts)
    export = args.out / f"export_{find_step(policy)}"  # with more --steps, another
    if not export.exists() and rynnvla(["convert", "export", str(policy), str(export)]):  # also compares it with JAX
        raise SystemExit(1)
    step = len(episode := open_source(config.data.source, config.data)[0]) // 2
    front, wrist = (episode.frames(view, [step])[0] for view in ("front", "wrist"))
    predicted = Policy.load(export).act(front, wrist, episode.state[step], episode.text(step), episode.columns)
    recorded = episode.action[step : step + len(predicted)]
    print(f"{episode.name}, step {step}: {episode.text(step)!r} ({episode.columns.robot})")
    for ahead in range(0, len(recorded), 5):
        print(f"  +{ahead:<2} predicted {predicted[ahead].round(1)}  recorded {recorded[ahead].round(1)}")
    print(f"mean difference per joint: {abs(predicted[: len(recorded)] - recorded).mean():.2f}")
