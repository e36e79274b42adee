"""An exported policy as LeRobot's `PreTrainedPolicy`: raw states in, raw targets out, in the policy's unit."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import OBS_STATE
from torch import Tensor

from lerobot_policy_rynnvla.configuration_rynnvla import RynnvlaConfig
from rynnvla_jax.columns import Columns
from rynnvla_jax.deploy.control import Controller, blended, check_rate
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.deploy.policy import DTYPES, Policy

log = logging.getLogger(__name__)


class RynnvlaPolicy(PreTrainedPolicy):
    """`select_action` runs one `deploy.control.Controller` per environment; `predict_action_chunk` keeps no state.

    Both raise PolicyError as `deploy.policy.Policy.act` does, so that an invalid observation causes no motion.
    """

    config_class = RynnvlaConfig
    name = "rynnvla"

    def __init__(self, config: RynnvlaConfig, policy: Policy | None = None, **kwargs: Any):
        """Use `from_pretrained`; LeRobot calls this directly when no folder was given."""
        super().__init__(config)
        if policy is None:
            raise PolicyError("there is no policy to run; give --policy.path=EXPORT, made by `rynnvla convert export`")
        self._policy = policy
        # As submodules they follow `to` and count among `parameters`.
        self.vla, self.vqgan, self.action_vae = policy.vla, policy.vqgan, policy.action_vae
        self._controllers: list[Controller] = []

    @classmethod
    def from_pretrained(
        cls, pretrained_name_or_path: str | Path, *, config: RynnvlaConfig | None = None, **kwargs: Any
    ) -> "RynnvlaPolicy":
        """Reads an export folder. Raises ExportError."""
        config = config or RynnvlaConfig.of_export(pretrained_name_or_path)
        policy = Policy.load(
            pretrained_name_or_path, config.device, DTYPES[config.dtype], config.compile, keep_memory=True
        )
        return cls(config, policy).eval()

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: dict[str, Any],
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Absolute targets float32[B, C, A] for the next C steps of each environment.

        LeRobot's real-time chunking gives the targets that the robot has yet to execute, float[P, A], and how many of
        them it will have executed by the time of the answer: those are kept, and the others lead to the new targets
        (`deploy.control.blended`).
        """
        self._check_rate()
        observations = [self._observation(batch, i) for i in range(self._environments(batch))]
        chunks = self._policy.act_batch(observations)
        if prev_chunk_left_over is not None:
            previous = _left_over(prev_chunk_left_over, chunks)
            delay = inference_delay or 0
            if delay >= (horizon := prev_chunk_left_over.shape[-2]):
                log.warning(
                    "The policy takes %d steps to answer, and real-time chunking covers %d, so that the arm changes to "
                    "the new chunk in one step; increase --inference.rtc.execution_horizon",
                    delay,
                    horizon,
                )
            chunks = blended(previous, chunks[0], delay, max(0, horizon - delay))[None]
        return torch.from_numpy(chunks).to(batch[self._leading()].device)

    def supports_rtc(self) -> bool:
        """LeRobot 0.6 asks before it runs a policy with real-time chunking."""
        return True

    def init_rtc_processor(self) -> None:
        """LeRobot calls this with `config.rtc_config` set, before it connects the robot.

        Raises PolicyError for a setting that would have no effect.
        """
        rtc = getattr(self.config, "rtc_config", None)
        if rtc is None:
            return
        if not rtc.enabled:
            raise PolicyError(
                "with --inference.rtc.enabled=false LeRobot would run chunks one after the other, each out of date by "
                "then; leave it out, or use --inference.type=sync"
            )
        if rtc.prefix_attention_schedule.value != "LINEAR":
            raise PolicyError(
                f"--inference.rtc.prefix_attention_schedule is {rtc.prefix_attention_schedule.value}, but this policy "
                "leads from one chunk to the next with linear weights; choose LINEAR"
            )

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Absolute targets float32[B, A] of the next control step; the policy observes every `n_action_steps` steps."""
        number = self._environments(batch)
        if number != len(self._controllers):
            self._start(number)
        targets = [c.target(partial(self._observation, batch, i)) for i, c in enumerate(self._controllers)]
        return torch.from_numpy(np.stack(targets)).to(batch[self._leading()].device)

    def reset(self) -> None:
        """Starts episodes: discards everything that was planned before."""
        for controller in self._controllers:
            controller.reset()

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict | None]:
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")

    def get_optim_params(self) -> dict:
        raise NotImplementedError("this policy is trained by `rynnvla train`, not by LeRobot")

    def _save_pretrained(self, save_directory: Path) -> None:
        raise NotImplementedError(f"copy the export folder instead: {self.config.pretrained_path}")

    def _apply(self, fn, recurse: bool = True) -> "RynnvlaPolicy":
        super()._apply(fn, recurse)
        self._policy.device = self.vla.lm_head.weight.device
        return self

    def _check_rate(self) -> None:
        """Raises PolicyError before the first motion when the loop runs at another rate than the recordings."""
        try:
            check_rate(self._policy, self.config.fps or None)
        except PolicyError as error:
            raise PolicyError(
                f"{error} (LeRobot: --dataset.fps, --fps or --env.fps), and say so with --policy.fps"
            ) from None

    def _start(self, number: int) -> None:
        config = self.config
        self._check_rate()
        if config.asynchronous and number > 1:
            raise PolicyError(f"asynchronous control drives one robot, not {number} environments; use a batch of one")
        for controller in self._controllers:
            controller.close()
        self._controllers = [
            Controller(self._policy, config.n_action_steps, config.ensemble, config.asynchronous, blend=config.blend)
            for _ in range(number)
        ]

    def _leading(self) -> str:
        """The part of an observation that tells the number of environments: the state, or else the front camera."""
        config = self._policy.config
        return OBS_STATE if config.vla.state_dim else config.cameras.front

    def _environments(self, batch: dict[str, Any]) -> int:
        key = self._leading()
        part, shape = batch.get(key), "joints" if key == OBS_STATE else "3, H, W"
        if not isinstance(part, Tensor) or part.ndim != shape.count(",") + 2:
            what = f"shape {list(part.shape)}" if isinstance(part, Tensor) else "missing"
            raise PolicyError(f"{key} is {what}, expected [environments, {shape}]; apply the pre-processor first")
        return len(part)

    def _observation(self, batch: dict[str, Any], i: int) -> Observation:
        config = self._policy.config
        task = batch.get("task")
        if not isinstance(task, list | tuple) or len(task) <= i:
            raise PolicyError("the batch has no 'task'; set it to an instruction in the words of the training data")
        frames = {v: _picture(batch, key, i) for v, key in config.cameras.by_view(config.sequence).items()}
        front, wrist = frames.pop("front"), frames.pop("wrist", None)
        state = batch[OBS_STATE][i].float().cpu().numpy() if config.vla.state_dim else None
        robot = self._policy.statistics.columns.with_joints(self.config.robot, self.config.unit)
        return Observation(front, wrist, state, task[i], robot, frames)


def _left_over(targets: Tensor, chunks: np.ndarray) -> np.ndarray:
    """float32[P, A] of LeRobot's float[P, A] or [1, P, A], without the rows of zeros that it pads with.

    LeRobot (0.6.1, `rollout/inference/rtc.py`) pads what is shorter than the execution horizon. Its own policies take
    normalised zeros for a mean; as joint targets they would be a motion.

    Raises PolicyError for several robots, and for another number of columns than `chunks`.
    """
    rows = targets.detach().float().cpu().numpy()
    rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
    if len(chunks) != 1 or rows.ndim != 2 or rows.shape[1] != chunks.shape[2]:
        raise PolicyError(
            f"prev_chunk_left_over is {list(targets.shape)} for {len(chunks)} observations and {chunks.shape[2]} "
            "columns; real-time chunking drives one robot, and needs [steps, columns]"
        )
    (kept,) = np.nonzero(rows.any(axis=1))
    return rows[: kept[-1] + 1 if len(kept) else 0]


def robot_columns(robot: Any) -> Columns:
    """What state and targets of a LeRobot robot mean, by the norm modes of its motors. Raises PolicyError.

    Give it to `Policy.act`, or compare it with a policy's `statistics.columns`, before the first motion.
    """
    units = {"range_m100_100": "-100..100", "range_0_100": "0..100", "degrees": "degrees"}
    if not hasattr(robot, "bus"):
        raise PolicyError(f"{robot.name} has no motor bus of its own; describe its columns with `Columns.of_joints`")
    found = {}
    for name, motor in robot.bus.motors.items():
        mode = getattr(motor.norm_mode, "value", str(motor.norm_mode))
        if mode not in units:
            raise PolicyError(f"motor {name} of {robot.name} has norm_mode {mode!r}; known are {', '.join(units)}")
        found[name] = units[mode]
    joints = {unit for name, unit in found.items() if "gripper" not in name}
    if len(joints) != 1:
        raise PolicyError(f"the joints of {robot.name} have several units ({', '.join(sorted(joints))}); use one")
    gripper = next((unit for name, unit in found.items() if "gripper" in name), "")
    return Columns.of_joints(f"lerobot:{robot.name}", list(found), joints.pop(), gripper)


def _picture(batch: dict[str, Any], camera: str, i: int) -> np.ndarray:
    """uint8 [H, W, 3] of LeRobot's float [B, 3, H, W] in 0..1. Raises PolicyError."""
    images = batch.get(camera)
    if not isinstance(images, Tensor):
        there = ", ".join(k for k in batch if k.startswith("observation.image")) or "none"
        raise PolicyError(
            f"{camera} is missing, the observation has: {there}; rename one of its cameras with --rename_map"
        )
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise PolicyError(f"{camera} is {images.dtype} {list(images.shape)}, expected float [environments, 3, H, W]")
    image = images[i].float()
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise PolicyError(f"{camera} has values outside 0..1; LeRobot must not normalise the images for this policy")
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
