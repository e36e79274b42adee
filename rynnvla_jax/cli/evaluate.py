"""`rynnvla evaluate`: success rates of a policy on the simulated arm, with videos and a page."""

import functools
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rynnvla_jax.cli import checks
from rynnvla_jax.cli.arguments import Step, parse, step_number
from rynnvla_jax.cli.main import UsageError
from rynnvla_jax.config import ConfigError
from rynnvla_jax.storage import bucket_cache, files, hub

if TYPE_CHECKING:
    from rynnvla_jax.deploy.observation import Acts
    from rynnvla_jax.recording import Recording


@dataclass(frozen=True)
class Evaluate:
    """Measures the success rates of a policy on the simulated arm, with 95 % intervals, videos and a page.

    The page is OUT/index.html. The same seed gives the same episodes. A try lasts --try-seconds for each target. When
    it fails, the arm returns to its rest position, the objects stay where they are, and the policy tries again. SR@1
    counts the episodes that succeed in the first try. The wordings of instructions occur in no recording, unless
    --instructions is seen. When a policy refuses an observation, that try has failed, and the reason is stored. When
    the connection to a server is lost, the evaluation ends. The same command continues after an interruption.

      rynnvla evaluate --policy EXPORT --out OUT
      rynnvla evaluate --policy ws://robot-server:8000 --task block,pen --scenario all --episodes 100 --out OUT
    """

    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")]
    """Export or work dir, also gs://... or hf://USER/NAME; ws(s)://host:port; lerobot:FOLDER; expert, random, hold."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder for episodes.jsonl, videos/ and index.html."""
    task: str = "block"
    """One of block, strawberry, pen; several with commas, or all."""
    scenario: str = "single"
    """One of single, multi, distractor; several with commas, or all."""
    episodes: int = 50
    """Episodes per task and scenario."""
    seed: int = 0
    """Another seed gives other episodes."""
    tries: int = 5
    """Tries per episode."""
    try_seconds: float = 15.0
    """Duration of a try, in simulated seconds per target."""
    replan: int = 10
    """Control steps of the arm between two calls of the policy."""
    ensemble: bool = False
    """Average the predictions of overlapping chunks, as ACT does."""
    instructions: Literal["held_out", "seen"] = "held_out"
    """Use instructions whose wording no recording has, or those of recordings."""
    size: int = 256
    """Height and width of the images of both cameras, in pixels."""
    fixed_look: bool = False
    """Keep colours, light and cameras the same in all episodes."""
    videos: int = 10
    """Episodes per task and scenario that are filmed."""
    weights: Literal["raw", "ema"] = "raw"
    """For a work dir: the weights as trained, or their average (optimizer.ema)."""
    step: Step = None
    """For a work dir: checkpoint step; by default the newest; "best": that of checkpoint.keep_best."""
    lerobot_python: Annotated[str | None, tyro.conf.arg(metavar="PYTHON")] = None
    """For lerobot:FOLDER: a Python with LeRobot and our plug-in; by default $RYNNVLA_LEROBOT_PYTHON."""
    workers: int | None = None
    """Number of simulator processes; by default one per core."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    a = parse(Evaluate, "rynnvla evaluate", argv)
    workers = checks.cores() if a.workers is None else a.workers
    checks.at_least(1, episodes=a.episodes, tries=a.tries, replan=a.replan, workers=workers)
    checks.at_least(0, seed=a.seed, videos=a.videos, try_seconds=a.try_seconds)
    if not a.try_seconds:
        raise UsageError("--try-seconds is 0; it must be positive")
    checks.edge("size", a.size)
    checks.folder("out", a.out)
    from rynnvla_jax.sim import drive, lerobot_process, tasks
    from rynnvla_jax.sim.evaluate import Case, Evaluation, evaluate

    folder = a.policy.removeprefix(lerobot_process.PREFIX)
    if not folder.startswith(drive.ADDRESSES):
        files.check(folder)
    policy = from_hub(a.policy, a.weights, a.step) if hub.is_name(a.policy) else a.policy
    step = None if a.step is None else step_of(policy, a.step)
    evaluation = Evaluation(
        policy=policy,
        seed=a.seed,
        tries=a.tries,
        try_seconds=a.try_seconds,
        replan=a.replan,
        ensemble=a.ensemble,
        size=a.size,
        held_out=a.instructions == "held_out",
        fixed_look=a.fixed_look,
        averaged=a.weights == "ema",
        step=step,
    )
    chosen = tasks.TASKS if a.task == "all" else tuple(dict.fromkeys(a.task.split(",")))
    scenarios = tasks.SCENARIOS if a.scenario == "all" else tuple(dict.fromkeys(a.scenario.split(",")))
    for task, scenario in itertools.product(chosen, scenarios):
        tasks.check(task, scenario)
    cases = [Case(t, s, i) for t in chosen for s in scenarios for i in range(a.episodes)]
    fit(policy, a.size)
    python = a.lerobot_python or os.environ.get(lerobot_process.PYTHON)
    try:
        opened = functools.partial(open_workdir, weights=a.weights, step=step)
        evaluate(evaluation, cases, a.out, workers, a.videos, python, opened)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command continues in {a.out}") from None
    return 0


def from_hub(policy: str, weights: str, step: Step) -> str:
    """The local folder of a name on the Hub, which is an export or a work dir."""
    if "assets/model.json" in hub.contents(policy):
        from rynnvla_jax.convert import starting_point

        return str(starting_point.model_dir(policy, step_number(step), weights))
    from rynnvla_jax.deploy import export_format

    return str(export_format.local(policy))


def fit(policy: str, size: int) -> None:
    """Compares how a policy's data were recorded with the simulated arm, before any episode.

    Says so when its steps are of another duration. Raises PolicyError for frames of another shape.
    """
    from rynnvla_jax.deploy.export_format import PolicyError
    from rynnvla_jax.sim.env import TableTop

    recording = recording_of(policy)
    if fault := recording.frame_fault("the simulator's", size, size):
        raise PolicyError(f"--policy {policy}: {fault}; the simulator's frames are square")
    if fault := recording.rate_fault(TableTop.fps):
        print(f"WARNING: --policy {policy}: {fault}; the simulated arm has no other rate", flush=True)


def recording_of(policy: str) -> "Recording":
    """How the data of a policy were recorded; nothing for one that does not say. Raises PolicyError."""
    from rynnvla_jax.deploy import export_format
    from rynnvla_jax.recording import Recording
    from rynnvla_jax.sim import drive, lerobot_process

    if policy in drive.BUILT_IN or policy.startswith(lerobot_process.PREFIX):
        return Recording()
    drive.check_policy(policy)
    if policy.startswith(drive.ADDRESSES):
        from rynnvla_jax.deploy.remote import RemotePolicy
        from rynnvla_jax.deploy.server import API_KEY

        remote = RemotePolicy(policy, os.environ.get(API_KEY), timeout=drive.PATIENCE)
        try:
            return remote.recording
        except export_format.ConnectionLost:  # perhaps there is nothing left to do; otherwise the first episode says so
            return Recording()
        finally:
            remote.close()
    if (files.place(policy) / "checkpoints").is_dir():
        from rynnvla_jax.checkpoint import provenance

        return provenance.recording(files.place(policy))
    return export_format.read_config(bucket_cache.copy(files.place(policy))).recording


def step_of(policy: str, step: Step) -> int:
    """The step of a work dir that --step names. Raises ConfigError for another policy, CheckpointError."""
    if not (files.place(policy) / "checkpoints").is_dir():
        raise ConfigError(f"--step is for a work dir of training, and --policy {policy} is none; leave it out")
    from rynnvla_jax.checkpoint import reader

    return reader.find_step(policy, step_number(step))


def open_workdir(policy: str, weights: str = "raw", step: int | None = None) -> "Acts":
    """A checkpoint of a work dir of training (None: the newest), or with "ema" its average of the weights: the
    simulator cannot open it, as it imports no JAX.

    Raises:
      PolicyError: it is not a model that acts.
    """
    from rynnvla_jax.checkpoint.reader import CheckpointError
    from rynnvla_jax.deploy.export_format import PolicyError
    from rynnvla_jax.inference.jax_policy import JaxPolicy

    try:
        return JaxPolicy(policy, step_number(step), weights)
    except (CheckpointError, ConfigError) as error:
        raise PolicyError(f"--policy {policy}: {error}; give a work dir of stage trajectory or robot") from error
