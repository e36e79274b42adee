"""Serves any LeRobot policy (act, smolvla, pi0, groot, ...) with the protocol of `rynnvla serve`.

    python -m lerobot_policy_rynnvla.policy_process FOLDER

Prints one line, the ws:// address, once it is ready; everything else goes to stderr. It ends when its standard input is
closed, so that it does not outlive `rynnvla evaluate`. An answer depends on its observation alone: no history is kept,
and random numbers start from the same seed each time.
"""

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from lerobot.configs.policies import PreTrainedConfig
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from lerobot_policy_rynnvla.configuration_rynnvla import ROBOT, UNIT
from rynnvla_jax.columns import Columns
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import KEYS, NO_VIEWS, Observation, check_columns
from rynnvla_jax.deploy.server import PolicyServer

_FRONT, _WRIST = f"{OBS_IMAGES}.front", f"{OBS_IMAGES}.wrist"
_RESIZES = ("resize_imgs_with_padding", "image_resolution", "image_size")  # configs whose policy takes any frame
_SEED = 0
_JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
_COLUMNS = Columns.of_joints(ROBOT, _JOINTS, UNIT, "0..100")  # of the robots whose policies are served


class ProcessPolicy:
    """A LeRobot policy with its pre- and post-processors as `deploy.observation.Acts`."""

    def __init__(self, folder: str | Path, device: str = "cpu"):
        """`folder`: the `pretrained_model` that LeRobot's trainer saved. Raises PolicyError when it cannot be run."""
        config = PreTrainedConfig.from_pretrained(folder)
        config.pretrained_path, config.device = Path(folder), device
        if config.n_obs_steps != 1:
            raise PolicyError(f"{folder} is a {config.type} policy that reads {config.n_obs_steps} past observations; "
                              "only policies that read one observation can be served")  # fmt: skip
        self.config = config
        self.policy = get_policy_class(config.type).from_pretrained(folder, config=config).eval()
        self._before, self._after = make_pre_post_processors(
            config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": device}}
        )
        self._names: dict[str, str] = {}  # camera of ours -> the policy's key
        for step in self._before.steps:
            self._names.update(getattr(step, "rename_map", {}))
        known = {camera: self._feature(camera) for camera in (_FRONT, _WRIST)}
        self.cameras = [camera for camera, feature in known.items() if feature is not None]
        if config.image_features and not self.cameras:
            raise PolicyError(
                f"{folder} reads {', '.join(config.image_features)}, but this simulator has "
                f"{_FRONT} and {_WRIST}; train "
                "with --rename_map, which LeRobot keeps in policy_preprocessor.json"
            )

    @torch.no_grad()
    def act(
        self,
        front: np.ndarray,
        wrist: np.ndarray | None,
        state: np.ndarray | None,
        instruction: str,
        columns: Columns | None = None,
        extra_views: Mapping[str, np.ndarray] = NO_VIEWS,
    ) -> np.ndarray:
        """Absolute targets float32[C, A]. Raises PolicyError for another robot or an untrained frame size."""
        check_columns(_COLUMNS, columns)
        if state is None:
            raise PolicyError("state is missing; give the robot's joints")
        batch = {OBS_STATE: torch.tensor(np.asarray(state, np.float32)[None]), "task": [instruction]}
        for camera, frame in ((_FRONT, front), (_WRIST, wrist)):
            if camera in self.cameras:
                if frame is None:
                    raise PolicyError(
                        f"{camera} is missing, but this policy was trained with it; add it to the observation"
                    )
                batch[camera] = self._picture(camera, frame)
        torch.manual_seed(_SEED)
        self.policy.reset()
        chunk = self.policy.predict_action_chunk(self._before(batch))
        dim = self.config.output_features[ACTION].shape[0]
        steps = [self._after(chunk[:, k]) for k in range(chunk.shape[1])]
        return torch.cat(steps)[:, :dim].float().cpu().numpy()

    def example(self) -> Observation:
        """An example observation for warming up."""
        frames = {}
        for camera in (_FRONT, _WRIST):
            _, height, width = self._feature(camera).shape if camera in self.cameras else (3, 64, 64)
            frames[camera] = np.zeros((height, width, 3), np.uint8)
        wrist = frames[_WRIST] if _WRIST in self.cameras else None
        state = np.zeros(self.config.robot_state_feature.shape, np.float32)
        return Observation(frames[_FRONT], wrist, state, "pick up the block", _COLUMNS)

    def metadata(self) -> dict:
        """Metadata that clients receive."""
        keys = [key for name, key in KEYS.items() if name != "wrist" or _WRIST in self.cameras]
        return {"policy": self.config.type, "keys": keys, "columns": _COLUMNS.to_json()}

    def _feature(self, camera: str):
        return self.config.image_features.get(self._names.get(camera, camera))

    def _picture(self, camera: str, frame: np.ndarray) -> torch.Tensor:
        """float [1, 3, H, W] in 0..1"""
        wanted = tuple(self._feature(camera).shape[1:])
        if frame.shape[:2] != wanted and not any(hasattr(self.config, name) for name in _RESIZES):
            raise PolicyError(
                f"{camera} is {frame.shape[0]} x {frame.shape[1]}, this {self.config.type} policy was trained on "
                f"{wanted[0]} x {wanted[1]}; evaluate with --size {wanted[0]}"
            )
        return torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 255


def main(argv: list[str] | None = None) -> int:
    """Serves until SIGTERM, SIGINT or the end of standard input. On an error prints one line and returns 2."""
    options = _parser().parse_args(argv)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LeRobot prints while it loads
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # sums in another order would make other episodes
    try:
        policy = ProcessPolicy(options.folder, options.device)
        server = PolicyServer(policy, policy.example(), policy.metadata(), port=options.port)
        asyncio.run(_serve(server, answer))
    except PolicyError as error:
        print(f"policy process: {error}", file=sys.stderr)
        return 2
    return 0


async def _serve(server: PolicyServer, answer) -> None:
    loop, port = asyncio.get_running_loop(), 0
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, server.stop)

    def listening(number: int) -> None:
        nonlocal port
        port = number

    await server.run(listening, lambda _: print(f"ws://{server.host}:{port}", file=answer, flush=True))


def _stop_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lerobot_policy_rynnvla.policy_process", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", help="a LeRobot policy: config.json, model.safetensors and its processors")
    parser.add_argument("--device", default="cpu", help="torch device; default: cpu")
    parser.add_argument("--port", type=int, default=0, help="default: a free port")
    return parser


if __name__ == "__main__":
    sys.exit(main())
