"""Runs exported policies in LeRobot's environment and writes the results to found.json, for `test_lerobot_plugin`.

    python inside_lerobot.py EXPORT ACT

ACT is the folder to which an untrained ACT policy is written.
"""

import json
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import grpc
import lerobot_policy_rynnvla  # noqa: F401  as LeRobot's programs import it
import numpy as np
import torch
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.configs.policies import PreTrainedConfig
from lerobot.configs.types import FeatureType, PolicyFeature, RTCAttentionSchedule
from lerobot.envs.factory import make_env
from lerobot.motors import Motor, MotorNormMode
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.act.modeling_act import ACTPolicy
from lerobot.policies.act.processor_act import make_act_pre_post_processors
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.utils import prepare_observation_for_inference
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import send_bytes_in_chunks
from lerobot_policy_rynnvla.configuration_rynnvla import without_type_beside_path
from lerobot_policy_rynnvla.environment import RynnvlaSo100Config
from lerobot_policy_rynnvla.modeling_rynnvla import robot_columns

from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.recording import Recording

try:
    from lerobot.utils.feature_utils import hw_to_dataset_features  # 0.6
except ImportError:
    from lerobot.datasets.utils import hw_to_dataset_features  # 0.4

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
TASK = "pick up the block"


def observation() -> tuple[np.ndarray, np.ndarray]:
    """A frame that is not square, and joint positions."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (48, 64, 3), np.uint8), np.arange(6, dtype=np.float32)


def policies(export: str) -> dict:
    config = PreTrainedConfig.from_pretrained(export, cli_overrides=["--n_action_steps=2", "--device=cpu"])
    policy = get_policy_class("rynnvla").from_pretrained(export, config=config)
    before, after = make_pre_post_processors(config, pretrained_path=export)
    made, _ = make_pre_post_processors(config)
    assert [type(s) for s in made.steps] == [type(s) for s in before.steps]
    frame, state = observation()

    def batch(change=0.0):
        values = {"observation.images.front": frame, "observation.state": state + np.float32(change)}
        return before(prepare_observation_for_inference(dict(values), torch.device("cpu"), TASK))

    def refusal(**changes):
        try:
            policy.reset()
            policy.select_action(batch(**changes))
        except PolicyError as error:
            return str(error)

    chunk = after(policy.predict_action_chunk(batch()))
    # A new look every 2 steps: 0 and 1 of the first chunk, then 0 and 1 of one that started elsewhere.
    steps = [after(policy.select_action(batch(change)))[0].tolist() for change in (0.0, 1.0, 2.0, 3.0)]
    real_time = real_time_chunks(policy, batch())
    out_of_range = refusal(change=1e6)
    rates = {f"{rate:g}": at_rate(policy, rate, batch()) for rate in (30.0, 10.0, 0.0)}
    policy.config.unit = "degrees"
    return {
        "rates": rates,
        "robots": robots(),
        "chunk": chunk[0].tolist(),
        "later": policy_chunk(policy, batch(2.0)),
        "steps": steps,
        "real_time": real_time,
        "without_type": [without_type_beside_path(a) for a in arguments(export)],
        "out_of_range": out_of_range,
        "unit": refusal(),
    }


def real_time_chunks(policy, batch) -> dict:
    """Chunks as LeRobot's real-time chunking asks for them, and what cannot work."""
    left = torch.full((3, 6), 1000.0)
    padded = torch.cat([left[:2], torch.zeros(2, 6)])  # as LeRobot 0.6 passes the last two targets

    def ask(delay, left_over):
        try:
            return policy.predict_action_chunk(batch, inference_delay=delay, prev_chunk_left_over=left_over).tolist()
        except PolicyError as error:
            return str(error)

    def setting(**changes):
        policy.config.rtc_config = SimpleNamespace(enabled=True, prefix_attention_schedule=RTCAttentionSchedule.LINEAR)
        vars(policy.config.rtc_config).update(changes)
        try:
            policy.init_rtc_processor()
        except PolicyError as error:
            return str(error)

    return {
        "first": ask(0, None),
        "frozen": ask(1, left),
        "padded": ask(1, padded),
        "empty": ask(2, torch.zeros(4, 6)),
        "width": ask(1, torch.zeros(4, 5)),
        "settings": [setting(), setting(enabled=False), setting(prefix_attention_schedule=RTCAttentionSchedule.EXP)],
    }


def arguments(export: str) -> list[list[str]]:
    """Command lines with a type beside a path, of an export and of another policy."""
    joined = ["--policy.type=rynnvla", f"--policy.path={export}", "--env.type=pusht"]
    apart = ["--policy.path", export, "--policy.type", "rynnvla", "--env.type=pusht"]
    return [joined, apart, ["--policy.path=ELSEWHERE", "--policy.type=rynnvla"], ["--policy.type", "act"]]


def robots() -> dict[str, list[str]]:
    """What columns of LeRobot's motors mean, by their norm mode: robot, and the units of its columns."""
    found = {}
    for mode in (MotorNormMode.RANGE_M100_100, MotorNormMode.DEGREES):
        modes = [*[mode] * 5, MotorNormMode.RANGE_0_100]
        motors = {name: Motor(i, "sts3215", mode) for i, (name, mode) in enumerate(zip(JOINTS, modes, strict=True))}
        columns = robot_columns(SimpleNamespace(name="so_follower", bus=SimpleNamespace(motors=motors)))
        found[mode.value] = [columns.robot, *(c.unit for c in columns.state)]
    return found


def at_rate(policy, rate: float, batch) -> str | None:
    """What a policy that was recorded at 10 Hz says to a loop of `rate`."""
    known, policy._policy.recording, policy.config.fps = policy._policy.recording, Recording(rates=(10.0,)), rate
    try:
        policy.predict_action_chunk(batch)
    except PolicyError as error:
        return str(error)
    finally:
        policy._policy.recording = known


def policy_chunk(policy, batch) -> list:
    unit, policy.config.unit = policy.config.unit, "-100..100"
    chunk = policy.predict_action_chunk(batch)[0].tolist()
    policy.config.unit = unit
    return chunk


def over_grpc(export: str) -> list:
    """The chunk with which LeRobot's asynchronous server answers a robot."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "lerobot_policy_rynnvla.policy_server", "--host=127.0.0.1", f"--port={port}"],
        stdout=sys.stderr,
    )
    try:
        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        grpc.channel_ready_future(channel).result(timeout=300)
        stub = services_pb2_grpc.AsyncInferenceStub(channel)
        stub.Ready(services_pb2.Empty())
        frame, state = observation()
        robot = {f"{name}.pos": float for name in JOINTS} | {"front": frame.shape}
        features = hw_to_dataset_features(robot, "observation", use_video=False)
        wanted = RemotePolicyConfig("rynnvla", export, features, actions_per_chunk=4, device="cpu")
        stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(wanted)))
        values = {f"{name}.pos": float(x) for name, x in zip(JOINTS, state, strict=True)}
        seen = TimedObservation(time.time(), 0, {**values, "front": frame, "task": TASK}, must_go=True)
        stub.SendObservations(send_bytes_in_chunks(pickle.dumps(seen), services_pb2.Observation))
        answer = stub.GetActions(services_pb2.Empty())
        return [step.action.tolist() for step in pickle.loads(answer.data)]
    finally:
        server.terminate()
        server.wait()


def first_observation() -> dict:
    """The observation of the episode that LeRobot starts with seed 7."""
    env = make_env(RynnvlaSo100Config(size=32))["rynnvla_so100"][0]
    seen, _ = env.reset(seed=7)
    instruction = env.call("task_description")[0]
    env.close()
    return {
        "state": seen["agent_pos"][0].tolist(),
        "instruction": instruction,
        "front": int(seen["pixels"]["front"].sum()),
    }


def write_act(folder: str) -> None:
    torch.manual_seed(0)
    config = ACTConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
            "observation.images.front": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
            "observation.images.wrist": PolicyFeature(FeatureType.VISUAL, (3, 64, 64)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (6,))},
        chunk_size=20, n_action_steps=20, dim_model=32, dim_feedforward=64, n_heads=2, n_encoder_layers=1,
        pretrained_backbone_weights=None, device="cpu", push_to_hub=False,
    )  # fmt: skip
    spread = {"mean": torch.zeros(6), "std": torch.full((6,), 50.0)}
    picture = {"mean": torch.full((3, 1, 1), 0.5), "std": torch.full((3, 1, 1), 0.25)}
    stats = {key: picture if "images" in key else spread for key in (*config.input_features, "action")}
    ACTPolicy(config).save_pretrained(folder)
    for processor in make_act_pre_post_processors(config, stats):
        processor.save_pretrained(folder)


if __name__ == "__main__":
    export, act = sys.argv[1:]
    write_act(act)
    found = policies(export) | {"over_grpc": over_grpc(export), "first": first_observation()}
    Path("found.json").write_text(json.dumps(found), encoding="utf-8")
