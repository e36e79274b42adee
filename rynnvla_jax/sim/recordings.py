"""The kinds of recordings: the arm as a LeRobot v3.0 data set, human hands in EgoDex's layout.

Each has the settings of its data (without the number of episodes), runs one attempt, and joins the successful ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import mujoco

from rynnvla_jax.columns import describe
from rynnvla_jax.sim import arm, egodex_writer, lerobot_writer
from rynnvla_jax.sim.egodex_writer import ClipWriter
from rynnvla_jax.sim.env import CAMERAS, TableTop
from rynnvla_jax.sim.expert import demonstrate
from rynnvla_jax.sim.human import HOLDS, HandTable
from rynnvla_jax.sim.lerobot_writer import EpisodeWriter, Robot
from rynnvla_jax.sim.reach import demonstrate as demonstrate_by_hand

_OBJECTS = {"block": ("green block", "plate"), "strawberry": ("strawberry", "plate"), "pen": ("pen", "holder")}


class Recording(Protocol):
    """A frozen dataclass whose fields are stored; a different value of any field means a different data set."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    title: ClassVar[str]  # what is recorded
    unit: ClassVar[str]
    fps: ClassVar[int]
    remedy: ClassVar[str]  # when nearly all attempts fail
    notes: ClassVar[dict]  # what else meta/recording.json says

    # Properties, because a protocol's plain attributes could be assigned to, and a frozen dataclass's cannot.
    @property
    def task(self) -> str: ...
    @property
    def scenario(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def fixed_look(self) -> bool: ...

    def describe(self) -> str:
        """The settings of this kind, for the first printed line."""
        ...

    def prepare(self) -> None:
        """Raises FetchError when a required file is not on this machine."""
        ...

    def attempt(self, seed: int, folder: Path) -> dict:
        """Episode `seed` into an empty folder: success, frames, instruction."""
        ...

    def assemble(self, folders: Sequence[Path], texts: Sequence[str], out: Path) -> None:
        """The data set of the episodes in `folders`, with their instructions; may be repeated."""
        ...


@dataclass(frozen=True)
class ArmRecording:
    """The expert's demonstrations."""

    task: str
    scenario: str
    seed: int
    size: int
    noise: float
    fixed_look: bool
    mujoco: str = mujoco.__version__

    title: ClassVar[str] = "expert demonstrations"
    unit: ClassVar[str] = describe(arm.COLUMNS.action)
    fps: ClassVar[int] = TableTop.fps
    remedy: ClassVar[str] = "lower --noise"
    notes: ClassVar[dict] = {}

    def describe(self) -> str:
        return f", noise {self.noise:g}"

    def prepare(self) -> None:
        arm.spec()

    def attempt(self, seed: int, folder: Path) -> dict:
        env = TableTop(self.task, self.scenario, size=self.size, fixed_look=self.fixed_look)
        env.reset(seed)
        with EpisodeWriter(folder, self.robot()) as writer:
            for command in demonstrate(env, seed, self.noise):
                writer.add(env.state, command.target, {camera: env.render(camera) for camera in CAMERAS})
                env.step(command.executed)
        env.close()
        return {"success": env.success(), "frames": len(writer), "instruction": env.instruction}

    def assemble(self, folders: Sequence[Path], texts: Sequence[str], out: Path) -> None:
        lerobot_writer.assemble(folders, texts, out, self.robot())

    def robot(self) -> Robot:
        kind = arm.ROBOT.removeprefix("lerobot:")  # readers take the meaning of the columns from there
        return Robot(kind, arm.NAMES, CAMERAS, self.size, TableTop.fps)


@dataclass(frozen=True)
class HumanRecording:
    """Clips of a person's hands, from the head."""

    task: str
    scenario: str
    seed: int
    size: int
    fixed_look: bool
    human: bool = True
    mujoco: str = mujoco.__version__

    title: ClassVar[str] = "human hand clips"
    unit: ClassVar[str] = "metres"
    fps: ClassVar[int] = HandTable.fps
    remedy: ClassVar[str] = "choose another --seed, and report it"
    notes: ClassVar[dict] = {
        "grasp": f"friction does not hold the objects: one is attached to the hand while the tips of thumb and index "
        f"finger are within {1000 * HOLDS:.0f} mm of it, and falls when it is let go of",
        "hands": "the right hand acts, the left one lies on the table and leans along by 2 to 5 % of its way; "
        "frames of joints have x along the bone",
        "confidences": "1 where a joint is inside the picture, 0 elsewhere",
    }

    def describe(self) -> str:
        return ""

    def prepare(self) -> None:
        """Nothing is fetched for hands."""

    def attempt(self, seed: int, folder: Path) -> dict:
        env = HandTable(self.task, self.scenario, size=self.size, fixed_look=self.fixed_look)
        env.reset(seed)
        with ClipWriter(folder, self.size, env.fps, env.intrinsic(), self._attributes(env.instruction)) as writer:
            writer.add(env.poses(), env.render())
            for command in demonstrate_by_hand(env, seed):
                env.step(command)
                writer.add(env.poses(), env.render())
        env.close()
        return {"success": env.success(), "frames": len(writer), "instruction": env.instruction}

    def assemble(self, folders: Sequence[Path], texts: Sequence[str], out: Path) -> None:
        egodex_writer.assemble(folders, out / f"{self.task}_{self.scenario}")

    def _attributes(self, instruction: str) -> dict[str, str]:
        return {
            "llm_description": instruction,
            "llm_description2": "",
            "which_llm_description": "1",
            "llm_type": "single",
            "task": f"{self.task}_{self.scenario}",
            "environment": "simulated table",
            "object": ", ".join(_OBJECTS[self.task]),
        }
