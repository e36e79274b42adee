"""`rynnvla record`: demonstrations in simulation as a data set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rynnvla_jax.cli import checks
from rynnvla_jax.cli.arguments import parse
from rynnvla_jax.cli.main import UsageError


@dataclass(frozen=True)
class Record:
    """Records demonstrations of one task in simulation, as a LeRobot v3.0 data set; with --human in EgoDex's layout.

    A scripted expert, which knows all positions, moves the arm. With --human, a person's right hand does the same task
    in the same scenes. Failed episodes are counted and left out.

    The same arguments give the same data set, bit for bit, for any --workers; attempt i of --seed S is episode seed
    S * 1000000 + i of the simulator. The same command continues after an interruption. meta/recording.json in the data
    set stores the settings.

      rynnvla record --task block --episodes 250 --out DATA
      rynnvla record --human --task pen --scenario multi --episodes 50 --out HANDS
    """

    task: Literal["block", "strawberry", "pen"]
    """Task: move blocks or strawberries to a plate, or pens into a holder."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")]
    """How many successful episodes to record."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the data set."""
    human: bool = False
    """Record a person's hands, filmed by a head camera, instead of the arm."""
    scenario: Literal["single", "multi", "distractor"] = "single"
    """One target, several targets, or other objects around the target."""
    seed: int = 0
    """Another seed gives other episodes."""
    size: int = 256
    """Height and width of the frames, in pixels."""
    noise: float | None = None
    """Disturb the arm by about this much, in joint units (-100 to 100; 3 is a lot), for recovery data; by default 0."""
    fixed_look: bool = False
    """Keep colours, light and cameras the same in all episodes."""
    workers: int | None = None
    """Number of recording processes; by default one per core."""


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    a = parse(Record, "rynnvla record", argv)
    if a.human and a.noise is not None:
        raise UsageError("--noise disturbs the arm; leave it out with --human")
    workers = checks.cores() if a.workers is None else a.workers
    checks.at_least(1, episodes=a.episodes, workers=workers)
    checks.at_least(0, seed=a.seed, noise=a.noise or 0.0)
    checks.edge("size", a.size)
    checks.folder("out", a.out)
    from rynnvla_jax.sim.record import record
    from rynnvla_jax.sim.recordings import ArmRecording, HumanRecording, Recording

    recording: Recording = (
        HumanRecording(a.task, a.scenario, a.seed, a.size, a.fixed_look)
        if a.human
        else ArmRecording(a.task, a.scenario, a.seed, a.size, a.noise or 0.0, a.fixed_look)
    )
    try:
        record(recording, a.episodes, a.out, workers)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command continues in {a.out}") from None
    return 0
