"""Benefit of the curriculum: success rate on the simulated arm for three initialisations of stage 3.

    python -m benchmarks.table_top DIR [--seeds 3] [--steps 6000] [--episodes 50] [--jobs 2] [--lerobot_python PYTHON]

Records an arm and a human hand moving a block (`rynnvla record`), trains VQGAN, ActionVAEs, stage 1 on the hand's video
and stage 2 on its video and wrist, then stage 3 on the arm from scratch, after stage 1 and after stage 2, with the same
number of steps and several seeds. Exports each and evaluates it on unseen seeds (`rynnvla evaluate`), together with the
policies `random` and `hold` and, with --lerobot_python, with ACT, trained by LeRobot on the same data for --act_steps
updates. Prints one JSON line per policy and draws DIR/success.png. Takes hours on two cores; the same command continues
after an interruption.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from rynnvla_jax.configs import table_top
from rynnvla_jax.sim.evaluate import share
from rynnvla_jax.sim.lerobot_process import PYTHON
from rynnvla_jax.sim.tasks import SCENARIOS, TASKS, phrasings
from rynnvla_jax.storage.files import read_lines
from rynnvla_jax.train import metrics
from rynnvla_jax.vocabulary import train_tokenizer

INITIALISATIONS = ("scratch", "stage1", "stage2")
# LeRobot's defaults suit a backbone trained on ImageNet, which needs a download: hence the higher learning rates.
ACT = (
    "--dataset.repo_id=local/arm",
    "--policy.type=act",
    "--policy.device=cpu",
    "--policy.push_to_hub=false",
    "--policy.pretrained_backbone_weights=null",
    "--policy.chunk_size=20",
    "--policy.n_action_steps=20",
    "--policy.dim_model=256",
    "--policy.dim_feedforward=1024",
    "--policy.optimizer_lr=1e-4",
    "--policy.optimizer_lr_backbone=1e-4",
    "--batch_size=8",
    "--num_workers=0",
    "--save_freq=1000",
    "--eval_freq=0",
    "--wandb.enable=false",
)
SCENE = ("--task", "block", "--scenario", "single", "--size", "128", "--fixed-look")


class Runner:
    """Runs each command once; finished commands are recorded in `out`/done."""

    def __init__(self, out: Path):
        self.out = out
        for name in ("done", "logs"):
            (out / name).mkdir(parents=True, exist_ok=True)

    def rynnvla(self, name: str, *arguments: object, cores: set[int] | None = None) -> float:
        """CPU seconds of `rynnvla ...`, run now or earlier; for an interrupted command, since it was continued.

        Raises RuntimeError when it failed, or when `name` was another command earlier.
        """
        return self.run(name, [sys.executable, "-m", "rynnvla_jax.cli", *map(str, arguments)], cores)

    def train(self, name: str, stage: str, *overrides: str, cores: set[int] | None = None) -> float:
        """`rynnvla train` of configs/table_top.py into `out`/NAME."""
        config = f"configs/table_top.py:{stage}"
        return self.rynnvla(name, "train", "--config", config, "--workdir", self.out / name, *overrides, cores=cores)

    def run(self, name: str, command: Sequence[str], cores: set[int] | None = None, again: Sequence[str] = ()) -> float:
        """Like `rynnvla`, for any command; `again` is the command that continues an interrupted one."""
        done = self.out / "done" / name
        words = [
            word.replace(str(self.out), "DIR") for word in command[1:]
        ]  # independent of the paths of DIR and the program
        if done.exists():
            before = json.loads(done.read_text(encoding="utf-8"))
            if before["command"] != words:
                raise RuntimeError(
                    f"{name} was done in {self.out} with another command; choose another DIR\n"
                    f"  before: {' '.join(before['command'])}\n  now:    {' '.join(words)}"
                )
            return before["seconds"]
        log = self.out / "logs" / f"{name}.log"
        print(f"{time.strftime('%H:%M:%S')} {name}   ({log})", file=sys.stderr, flush=True)
        with open(log, "a", encoding="utf-8") as file:
            environment = {"JAX_PLATFORMS": "cpu", **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(again or command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            if cores:
                os.sched_setaffinity(process.pid, cores)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"{name} failed; see {log}")
        seconds = usage.ru_utime + usage.ru_stime
        done.write_text(json.dumps({"seconds": round(seconds, 1), "command": words}) + "\n", encoding="utf-8")
        return seconds


def prepare(run: Runner, arm: str, hand: str) -> None:
    """Makes the data, tokenizer, VQGAN, ActionVAEs and corpora of codes."""
    out = run.out
    run.rynnvla("record_arm", "record", *SCENE, "--noise", 2, "--episodes", 250, "--out", out / "arm")
    run.rynnvla("record_hand", "record", "--human", *SCENE, "--episodes", 100, "--out", out / "hand")
    texts = {text for t in TASKS for s in SCENARIOS for held in (False, True) for text in phrasings(t, s, held)}
    codes = table_top.get_config("vqgan").vqgan_model.num_codes
    (out / "tokenizer.json").write_text(train_tokenizer(sorted(texts), codes), encoding="utf-8")
    mixture = f"--config.data.mixture=(('{arm}',0.5),('{hand}',0.5))"
    run.train("vqgan", "vqgan", mixture)
    run.train("vae_arm", "action_vae", f"--config.data.source={arm}")
    run.train("vae_hand", "action_vae", f"--config.data.source={hand}")
    for name, source in (("arm", arm), ("hand", hand)):
        tokenize = ("data", "tokenize", "--source", source, "--vqgan", out / "vqgan", "--stride", table_top.STRIDE)
        run.rynnvla(
            f"tokenize_{name}", *tokenize, "--out", out / f"{name}_codes", "--config.data.image.shortest_edge=128"
        )


def pretrain(run: Runner) -> None:
    """Trains stages 1 and 2 on the hand's clips."""
    source = f"--config.data.source=records:{run.out / 'hand_codes'}"
    tokens = f"--config.tokenizer={run.out / 'tokenizer.json'}", f"--config.vqgan={run.out / 'vqgan'}"
    run.train("stage1", "video", source, *tokens)
    vae = f"--config.action_vae={run.out / 'vae_hand'}"
    run.train("stage2", "trajectory", source, vae, f"--config.init_from.path={run.out / 'stage1'}")


def finetune(run: Runner, initialisation: str, seed: int, steps: int, episodes: int, cores: set[int]) -> float:
    """Trains, exports and evaluates one stage 3. Returns CPU seconds of its training."""
    out, name = run.out, f"{initialisation}_{seed}"
    start: tuple[str, ...] = (f"--config.init_from.path={out / initialisation}",)
    if initialisation == "scratch":
        start = f"--config.tokenizer={out / 'tokenizer.json'}", f"--config.vqgan={out / 'vqgan'}"
        start += ("--config.codes_like_codebook=True",)
    settings = f"--config.seed={seed}", f"--config.total_steps={steps}", f"--config.action_vae={out / 'vae_arm'}"
    data = f"--config.data.source=records:{out / 'arm_codes'}"
    seconds = run.train(name, "robot", data, *start, *settings, cores=cores)
    export = out / f"{name}_export"
    run.rynnvla(f"{name}_export", "convert", "export", out / name, export, cores=cores)
    evaluate(run, name, str(export), episodes, cores)
    return seconds


def evaluate(run: Runner, name: str, policy: str, episodes: int, cores: set[int]) -> None:
    """`rynnvla evaluate` on unseen seeds with the instructions of the recordings, into `out`/NAME_evaluation."""
    options = ("--episodes", episodes, "--instructions", "seen", "--videos", 3, "--workers", 1)
    where = ("--out", run.out / f"{name}_evaluation")
    run.rynnvla(f"{name}_evaluation", "evaluate", "--policy", policy, *SCENE, *options, *where, cores=cores)


def act(run: Runner, python: str, steps: int, episodes: int, cores: set[int]) -> float:
    """Trains ACT with LeRobot's own trainer, without ImageNet weights, which need a download. Returns CPU seconds."""
    out = run.out / "act"
    last = out / "checkpoints" / "last" / "pretrained_model"
    train = str(Path(python).with_name("lerobot-train"))
    command = [train, *ACT, f"--dataset.root={run.out / 'arm'}", f"--steps={steps}", f"--output_dir={out}"]
    again = [train, f"--config_path={last / 'train_config.json'}", "--resume=true", f"--steps={steps}"]
    if not (last / "train_config.json").exists():
        shutil.rmtree(out, ignore_errors=True)  # LeRobot refuses a folder that exists
        again = []
    seconds = run.run("act", command, cores, again)
    evaluate(run, "act", f"lerobot:{last}", episodes, cores)
    return seconds


def row(run: Runner, policy: str, names: Sequence[str], cpu_seconds: float | None = None) -> dict:
    """One line of the table: all episodes of all seeds of a policy, with Wilson's 95 % interval.

    `action_l1` is the final training error of each seed, for policies of this project.
    """
    files = [run.out / f"{name}_evaluation" / "episodes.jsonl" for name in names]
    results = [read_lines(file) for file in files]
    logged = [metrics.read(run.out / name) for name in names]
    flat = [r for each in results for r in each]
    success, first = (share(sum(r["success"] and r["tries"] <= tries for r in flat), len(flat)) for tries in (5, 1))
    return {
        "policy": policy,
        "episodes": len(flat),
        "success": round(success.value, 3),
        "interval": [round(success.low, 3), round(success.high, 3)],
        "first_try": round(first.value, 3),
        "by_seed": [round(sum(r["success"] for r in each) / len(each), 3) for each in results],
        "action_l1": [round(metrics.final([m["action_l1"] for m in lines]), 4) for lines in logged if lines],
        "training_cpu_minutes": cpu_seconds and round(cpu_seconds / 60, 1),
    }


def picture(rows: Sequence[dict], path: Path) -> None:
    """Draws success rates with their intervals: one bar per policy, one point per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 + 1.1 * len(rows), 3.6), layout="constrained")
    axes = figure.subplots()
    for x, each in enumerate(rows):
        low, high = each["interval"]
        axes.bar(x, each["success"], color="#9db7d5", width=0.6)
        axes.plot([x, x], [low, high], color="#1f3a5f", linewidth=1.5)
        if len(each["by_seed"]) > 1:
            axes.plot([x] * len(each["by_seed"]), each["by_seed"], "o", color="#1f3a5f", markersize=4)
    axes.set_xticks(range(len(rows)), [r["policy"] for r in rows])
    axes.set_ylim(0, 1)
    axes.set_ylabel("success in up to five tries")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for all output")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=6000, help="training steps of stage 3; configs/table_top.py has 24000"
    )
    parser.add_argument("--episodes", type=int, default=50, help="evaluated episodes per seed")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="number of parallel runs, one core each"
    )
    parser.add_argument(
        "--lerobot_python", default="", help="the python of an environment with LeRobot and our plug-in: adds ACT"
    )
    parser.add_argument("--act_steps", type=int, default=3000)
    a = parser.parse_args()
    os.environ[PYTHON] = a.lerobot_python
    run = Runner(a.out.absolute())
    prepare(run, f"lerobot:{run.out / 'arm'}", f"egodex:{run.out / 'hand'}")
    pretrain(run)
    free: queue.Queue[set[int]] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0))[: a.jobs]:
        free.put({core})

    def alone(job):
        cores = free.get()
        try:
            return job(cores)
        finally:
            free.put(cores)

    runs = [(i, s) for s in range(a.seeds) for i in INITIALISATIONS]
    with ThreadPoolExecutor(a.jobs) as pool:
        jobs: dict[tuple[str, int] | str, Future] = {
            (i, s): pool.submit(alone, lambda cores, i=i, s=s: finetune(run, i, s, a.steps, a.episodes, cores))
            for i, s in runs
        }
        for name in ("random", "hold"):
            jobs[name] = pool.submit(alone, lambda cores, name=name: evaluate(run, name, name, a.episodes, cores))
        baseline = a.lerobot_python and pool.submit(
            alone, lambda cores: act(run, a.lerobot_python, a.act_steps, a.episodes, cores)
        )
        seconds = {key: job.result() for key, job in jobs.items()}
    rows = [row(run, name, [name]) for name in ("random", "hold")]
    if baseline:
        rows.append(row(run, "ACT", ["act"], baseline.result()))
    for name in INITIALISATIONS:
        spent = [seconds[name, s] for s in range(a.seeds)]
        rows.append(row(run, name, [f"{name}_{s}" for s in range(a.seeds)], sum(spent) / len(spent)))
    for each in rows:
        print(json.dumps(each), flush=True)
    picture(rows, run.out / "success.png")


if __name__ == "__main__":
    main()
