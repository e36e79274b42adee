"""`rynnvla demo`: the whole curriculum with tiny models on data it records itself, then export, check and report."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data_pipelines import demo as demo_data
from data_pipelines.sources import open_source
from rynnvla_jax import children
from rynnvla_jax.cli.arguments import parse
from rynnvla_jax.cli.main import quiet_libraries
from rynnvla_jax.config import DataConfig, TrainConfig, from_dict
from rynnvla_jax.configs import action_vae, robot, trajectory, video, vqgan
from rynnvla_jax.stage import STAGES
from rynnvla_jax.storage import files
from rynnvla_jax.vocabulary import train_tokenizer

# What is trained on where nothing can be simulated.
EMBEDDED = (f"egodex:{demo_data.path('egodex')}", f"lerobot:{demo_data.path('so100')}")
EPISODES = 8  # of the hand, and of the arm
SIZE = 128  # pixels a side


class DemoError(RuntimeError):
    """A command that the demo ran failed; the message contains its output."""


@dataclass(frozen=True)
class Demo:
    """Trains the whole curriculum with tiny models on data that it records itself: minutes on two CPU cores.

    It records a simulated hand and a simulated arm, and trains a VQGAN and a text tokenizer in place of the public
    ones, the ActionVAEs, stage 1 (video), stage 2 (video and wrist trajectory) and stage 3 (video and robot actions).
    It exports the last one to PyTorch, and runs the exported policy without JAX on one observation and in the
    simulator. A report shows the results. The same command continues after an interruption.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/demo")
    """Folder for everything that the demo writes."""


def stages(out: Path, hand: str, arm: str) -> list[tuple[str, TrainConfig]]:
    """(work dir name, config) of every stage, in order; `hand` and `arm` are the sources."""
    configs = {
        "1_vqgan": vqgan.get_config("tiny"),
        "2_action_vae_hand": action_vae.get_config("tiny"),
        "3_action_vae_robot": action_vae.get_config("tiny"),
        "4_video": video.get_config("tiny"),
        "5_trajectory": trajectory.get_config("tiny"),
        "6_robot": robot.get_config("tiny"),
    }
    configs["1_vqgan"].data.mixture = ((hand, 0.5), (arm, 0.5))
    for config, source in zip(configs.values(), ("", hand, arm, hand, hand, arm), strict=True):
        config.data.source = source
        if STAGES[config.stage].tokens:
            config.data.frame_codes = "ahead"
    configs["4_video"].update(tokenizer=str(out / "tokenizer.json"), vqgan=str(out / "1_vqgan"))
    configs["5_trajectory"].init_from.path = str(out / "4_video")
    configs["5_trajectory"].action_vae = str(out / "2_action_vae_hand")
    configs["6_robot"].init_from.path = str(out / "5_trajectory")
    configs["6_robot"].action_vae = str(out / "3_action_vae_robot")
    return [(name, from_dict(TrainConfig, config.to_dict())) for name, config in configs.items()]


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    out = parse(Demo, "rynnvla demo", argv).out.absolute()
    quiet_libraries()
    print(
        f"The whole curriculum with tiny models, on {EPISODES} clips of a simulated hand and {EPISODES} of an arm.\n"
        f"It takes minutes on two CPU cores and writes to {out}. The same command continues after an interruption.",
        flush=True,
    )
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    simulator = can_simulate()
    hand, arm = record_data(out) if simulator else EMBEDDED
    write_tokenizer(out, (hand, arm), num_codes=vqgan.get_config("tiny").vqgan_model.num_codes)

    import jax

    from rynnvla_jax.train.loop import train

    jax.config.update("jax_compilation_cache_dir", str(out / "compiled"))  # stages share programs
    work: list[Path] = []
    for name, config in stages(out, hand, arm):
        print(f"\n[{len(work) + 1}/6] {name}", flush=True)
        train(config, out / name)
        work.append(out / name)
    print("\nexport to PyTorch", flush=True)
    notes = export(work[-1], out / "export")
    if simulator:
        notes.append(try_out(out))

    from rynnvla_jax.report.page import write_report

    notes.append(("wall time of this command", f"{(time.monotonic() - started) / 60:.1f} minutes"))
    page = write_report(work, out / "report.html", title="RynnVLA-001 curriculum, tiny models", notes=notes)
    print(f"\nPolicy for a robot (PyTorch, no JAX): {out / 'export'}\nReport: {page}", flush=True)
    return 0


def can_simulate() -> bool:
    """Whether the arm can be simulated and rendered here; if not, prints what is used instead."""
    from rynnvla_jax.sim import gl
    from rynnvla_jax.storage import fetch

    try:
        fetch.fetch("so100")
        gl.check()
    except (OSError, gl.RenderingError) as error:
        print(f"The simulator does not run here: {error}\nUsing the recordings that come with the package: {EMBEDDED}")
        return False
    return True


def record_data(out: Path) -> tuple[str, str]:
    """Records the hand and the arm into `out`; the two sources. Raises RecordError."""
    from rynnvla_jax.sim.record import record
    from rynnvla_jax.sim.recordings import ArmRecording, HumanRecording

    scene, workers = ("block", "single", 0, SIZE), os.cpu_count() or 1
    record(HumanRecording(*scene, fixed_look=True), EPISODES, out / "hand", workers)
    record(ArmRecording(*scene, noise=0.0, fixed_look=True), EPISODES, out / "arm", workers)
    return f"egodex:{out / 'hand'}", f"lerobot:{out / 'arm'}"


def write_tokenizer(out: Path, sources: tuple[str, str], num_codes: int) -> None:
    """`out`/tokenizer.json: a small BPE over the instructions of both data sets."""
    opened = [open_source(source, DataConfig(), (), progress=False) for source in sources]
    texts = sorted({text for source in opened for text in source.texts})
    files.write_text(out / "tokenizer.json", train_tokenizer(texts, num_codes))


def export(workdir: Path, folder: Path) -> list[tuple[str, str]]:
    """Exports the policy, runs it in a separate process, and returns notes for the report.

    Raises:
      DemoError: export or policy failed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    verified = call("convert", "export", str(workdir), str(folder))
    print(verified, flush=True)
    answer = json.loads(call("deploy", "check", str(folder)))
    low, high = ([round(v, 1) for v in answer[k]] for k in ("action_min", "action_max"))
    unit = answer["columns"]["action"][0]["unit"]
    print(
        f"the exported policy answers in PyTorch: {answer['chunk']} joint targets between {low} and {high} "
        f"({unit}) in {1000 * answer['act_seconds']:.0f} ms",
        flush=True,
    )
    return [
        ("exported policy, one action in PyTorch", f"{1000 * answer['act_seconds']:.0f} ms"),
        ("exported policy, chunk", f"{answer['chunk']} x {answer['action_dim']}, {unit}"),
    ]


def try_out(out: Path) -> tuple[str, str]:
    """The exported policy in the simulator, filmed."""
    episodes, folder = 2, out / "evaluation"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier export
    options = f"--episodes {episodes} --tries 1 --instructions seen --size {SIZE} --fixed-look".split()
    print(call("evaluate", "--policy", str(out / "export"), *options, "--out", str(folder)), flush=True)
    done = files.read_lines(folder / "episodes.jsonl")
    return "closed loop in the simulator", f"{sum(d['success'] for d in done)} of {episodes}, filmed: {folder.name}/"


def call(*arguments: str) -> str:
    """Runs `rynnvla ...` in its own process and returns what it printed. Raises DemoError."""
    done = subprocess.run([*children.module("rynnvla_jax.cli"), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise DemoError(f"rynnvla {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()
