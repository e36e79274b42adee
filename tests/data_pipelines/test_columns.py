"""What columns mean: guessed from names and robots, overridden, paired, made relative and decoded again."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import statistics
from data_pipelines.checks import check_sources, check_statistics
from data_pipelines.column_guess import guess
from data_pipelines.columns import FILE, flat_names, questions, resolve, suspicions
from data_pipelines.episode import DataError, Episode, Episodes
from data_pipelines.sources import open_source
from rynnvla_jax import columns as columns_lib
from rynnvla_jax.actions import decode_chunk, normalize_actions
from rynnvla_jax.cli.data_source import data_config
from rynnvla_jax.columns import ActionColumn, Column, Columns, difference
from rynnvla_jax.config import ColumnsConfig, ConfigError, DataConfig, TrainConfig
from tests.hostile import attempt, examples, json_files

ARM = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
ALOHA = [[f"{side}_{name}" for side in ("left", "right") for name in ARM]]
STEPS = 12
EPISODES = 2


def write(root, names, widths, robot="arm", rows=None):
    """A v2.1 set without cameras: `names` and `widths` of state and action, `rows` (state, action) [24, width]."""
    draw = np.random.default_rng(0)
    state, action = rows or (draw.normal(0, 0.3, (STEPS * EPISODES, width)).cumsum(0) for width in widths)
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    features = {
        key: {"dtype": "float32", "shape": [width], "names": name}
        for key, width, name in zip(("observation.state", "action"), widths, names, strict=True)
    }
    info = {
        "codebase_version": "v2.1", "fps": 10, "robot_type": robot, "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }  # fmt: skip
    (root / "meta" / "info.json").write_text(json.dumps(info), encoding="utf-8")
    (root / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "lift"}\n', encoding="utf-8")
    lines = [json.dumps({"episode_index": i, "length": STEPS}) for i in range(EPISODES)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for i in range(EPISODES):
        part = slice(i * STEPS, (i + 1) * STEPS)
        table = {
            "observation.state": state[part].astype(np.float32).tolist(),
            "action": action[part].astype(np.float32).tolist(),
            "timestamp": (np.arange(STEPS) / 10).astype(np.float32),
            "frame_index": np.arange(STEPS),
            "index": np.arange(part.start, part.stop),
            "episode_index": np.full(STEPS, i),
            "task_index": np.zeros(STEPS, np.int64),
        }
        pq.write_table(pa.table(table), root / "data" / "chunk-000" / f"episode_{i:06d}.parquet")
    return f"lerobot:{root}"


def load(source, **keys):
    return open_source(source, DataConfig(columns=ColumnsConfig(**keys)), (), progress=False)


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.pos", "main_b", "c"], ("a", "b", "c")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ({"motors": [["a", "b", "c"]]}, ("a", "b", "c")),
        ({"left": ["arm", "gripper"], "right": ["gripper"]}, ("left_arm", "left_gripper", "right_gripper")),
        ({"delta_y": 1, "delta_x": 0, "gripper": 2}, ("delta_x", "delta_y", "gripper")),
        (["a", "a", "b"], ("a", "a (2)", "b")),
        (["actions"], ()),
        (None, ()),
        ([], ()),
    ],
)
def test_names_of_every_form_are_flattened(names, expected):
    assert flat_names(names, 3, "action", "info.json") == expected


def test_names_that_disagree_with_the_width_are_refused():
    with pytest.raises(DataError, match=r"info.json: feature action has 3 columns but 2 names \(a, b\); correct names"):
        flat_names(["a", "b"], 3, "action", "info.json")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "gripper") for name in ("gripper", "left_claw", "finger_width", "夹爪", "panda_finger_joint1", "jaw")),
        *((name, "joint") for name in ("shoulder_pan", "wrist_roll", "kLeftShoulderPitch", "left_waist", "joint_3")),
        *((name, "euler") for name in ("roll", "eef_yaw", "delta_pitch")),
        *((name, "position") for name in ("x", "eef_pos_x", "delta_z", "ee.y")),
        ("left_hand_index_0_joint", "joint"),
        ("current", "other"),
    ],
)
def test_the_kind_of_a_column_is_told_by_its_name(name, kind):
    assert guess("arm", [name], [name], (1, 1)).action[0].kind == kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["qx", "qy", "qz", "qw"], "quaternion"),
        ([f"eef_quat_{axis}" for axis in "xyzw"], "quaternion"),
        ([f"axis_angle_{axis}" for axis in "xyz"], "rotation_vector"),
        (["qx", "qy"], "other"),  # a part of a rotation cannot be turned
    ],
)
def test_rotations_are_whole(names, kind):
    assert {c.kind for c in guess("arm", names, names, (len(names),) * 2).state} == {kind}


@pytest.mark.parametrize(
    ("robot", "largest", "unit"),
    [
        ("lerobot:so100_follower", 99.0, "-100..100"),
        ("lerobot:so100_follower", 140.0, "degrees"),
        ("lerobot:so_follower", 99.0, "unknown"),  # LeRobot 0.4.3 and 0.4.4 record two units under this name
        ("lerobot:so_follower", 140.0, "degrees"),
        ("lerobot:so100", 99.0, "degrees"),
        ("lerobot:aloha", 1.0, "radians"),
        ("lerobot:my_arm", 1.0, "unknown"),
    ],
)
def test_the_unit_of_joints_is_told_by_robot_and_range(robot, largest, unit):
    names = ["shoulder_pan", "gripper"]
    found = guess(robot, names, names, (2, 2), np.array([largest, 100.0]))
    assert found.state[0].unit == found.action[0].unit == unit
    asks = [q for q in questions(found) if "unit of shoulder_pan is not stated" in q]
    assert bool(asks) == (unit == "unknown")


XARM = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


def guessed(names, largest=None, robot="arm"):
    found = guess(robot, names, names, (len(names),) * 2, None if largest is None else np.array(largest, float))
    return [(c.kind, c.unit) for c in found.action]


def test_the_size_of_values_corrects_what_names_tell():
    angle, length = ("euler", "degrees"), ("position", "unknown")
    assert guessed(XARM, [400, 300, 250, 180, 90, 179, 800]) == [length] * 3 + [angle] * 3 + [("gripper", "unknown")]
    assert guessed(XARM, [0.4, 0.3, 0.2, 3, 1, 3, 1])[:4] == [("position", "metres")] * 3 + [("euler", "radians")]
    assert guessed(["roll", "pitch", "yaw"], [1000] * 3) == [("other", "unknown")] * 3
    assert guessed(["joint_1"], [180], "xarm7") == [("joint", "unknown")]


def test_angles_beside_joints_are_joints():
    names = ["base", "shoulder", "elbow", "pitch", "roll", "gripper"]
    assert {kind for kind, _ in guessed(names)[:5]} == {"joint", "other"} and guessed(names)[3][0] == "joint"
    assert [k for k, _ in guessed(["left_thumb_yaw", "left_thumb_pitch", "left_index_0"])] == ["joint"] * 3
    assert [k for k, _ in guessed(["base_x", "base_y", "base_yaw"])] == ["position", "position", "euler"]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ([f"pose.orientation.{axis}" for axis in "xyzw"], ["quaternion"] * 4),
        (["q_x", "q_y", "q_z", "q_w"], ["quaternion"] * 4),
        (["rx", "ry", "rz"], ["other"] * 3),
        ([f"rot_{axis}" for axis in "xyz"], ["other"] * 3),
        # of two arms in turns: no four neighbours are one rotation
        ([f"{side}_q{axis}" for axis in "xyzw" for side in ("left", "right")], ["other"] * 8),
        ([f"angular_velocity_{axis}" for axis in "xyz"], ["other"] * 3),
        ([f"gripper_{axis}" for axis in "xyz"], ["position"] * 3),
        (["gripper_pos", "gripper_position", "robotiq_85", "suction", "left_hand"], ["gripper"] * 5),
        (["shoulder_pan_pos", "elbow_flex_pos"], ["joint"] * 2),
    ],
)
def test_kinds_of_whole_robots(names, kinds):
    assert [kind for kind, _ in guessed(names)] == kinds


def test_what_names_do_not_tell_is_asked():
    def asked(names, **said):
        found = guess("aloha", names, names, (len(names),) * 2)
        return questions(resolve(found, ColumnsConfig(**said), Path("nowhere")).columns)

    assert any("rx, ry, rz are a rotation" in q for q in asked(["rx", "ry", "rz"]))
    assert any("rx, ry, rz are a rotation" in q for q in asked(["rx", "ry", "rz"], unit="radians"))
    assert any("no gripper is found on the left" in q for q in asked(["left_joint", "right_joint", "right_gripper"]))
    unnamed = guess("aloha", [], [], (14, 14))
    assert any("the last one is taken for the only gripper" in q for q in questions(unnamed))
    partly = guess("aloha", ["joint1", "joint_2", "gripper"], ["joint_1", "joint_2", "gripper"], (3, 3))
    meaning = resolve(partly, ColumnsConfig(), Path("nowhere"))
    assert questions(meaning.columns) == [
        "no state column has the name of action joint_1, so it is kept as recorded; if it is a target of one, pair it "
        f"in {FILE}, which lists all columns to use"
    ]


@pytest.mark.parametrize("robot", ["bench1", "mg100", "ranch10"])
def test_a_robot_is_known_by_whole_words(robot):
    assert guessed(["joint_1"], robot=robot) == [("joint", "unknown")]


# --- data sets ---------------------------------------------------------------------------------------------------


def test_nested_names_of_two_arms(tmp_path):
    episodes = load(write(tmp_path / "set", (ALOHA, ALOHA), (14, 14), "aloha"))
    assert episodes.columns.kept == (6, 13) and not questions(episodes.columns)
    assert [c.name for c in episodes.columns.action][7] == "right_waist"


def test_deltas_beside_a_wider_state_stay_as_recorded(tmp_path):
    """LIBERO in openpi's layout: 8 state columns, 7 actions, one name for each."""
    episodes = load(write(tmp_path / "set", (["state"], ["actions"]), (8, 7)))
    assert episodes.columns.kept == tuple(range(7)) and (episodes.state_width, episodes.action_width) == (8, 7)
    np.testing.assert_array_equal(episodes[1].chunk(3, 4), episodes[1].action[3:7])
    assert any("kept as recorded" in q for q in questions(episodes.columns))


def test_columns_are_paired_by_name_whatever_their_order(tmp_path):
    state, action = [*ARM, "current"], [ARM[i] for i in (5, 4, 3, 2, 1, 6)]
    episodes = load(write(tmp_path / "set", (state, action), (8, 6)))
    assert [c.pair for c in episodes.columns.action] == [5, 4, 3, 2, 1, None]
    e = episodes[0]
    np.testing.assert_allclose(e.chunk(2, 3)[0, :5], e.action[2, :5] - e.state[2, [5, 4, 3, 2, 1]], atol=1e-6)
    np.testing.assert_array_equal(e.chunk(2, 3)[:, 5], e.action[2:5, 5])


def test_poses_beside_joints_are_not_paired(tmp_path):
    poses = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
    episodes = load(write(tmp_path / "set", (ARM, poses), (7, 7)))
    assert episodes.columns.kept == tuple(range(7)) and episodes.columns.action[3].kind == "euler"


def test_columns_are_chosen_by_name_or_number(tmp_path):
    source = write(tmp_path / "set", (ARM, ARM), (7, 7))
    whole, some = load(source), load(source, state=("elbow", "0"), action=("waist", "elbow"), grippers=("elbow",))
    assert [c.name for c in some.columns.state] == ["elbow", "waist"]
    assert [(c.name, c.pair) for c in some.columns.action] == [("waist", 1), ("elbow", None)]
    np.testing.assert_array_equal(some[1].state, whole[1].state[:, [2, 0]])
    np.testing.assert_array_equal(some[1].action, whole[1].action[:, [0, 2]])
    with pytest.raises(ConfigError, match=r"data.columns.state: there is no column 'elbows'; .* Did you mean elbow"):
        load(source, state=("elbows",))
    with pytest.raises(ConfigError, match="data.columns.action names a column twice: waist, waist"):
        load(source, action=("waist", "waist"))


def test_a_file_beside_the_data_set_says_what_columns_mean(tmp_path):
    source = write(tmp_path / "set", (None, ["actions"]), (8, 7))
    entries = {
        "robot": "franka",
        "state": [{"name": name, "column": i, "unit": "metres", "kind": "position"} for i, name in enumerate("xyz")],
        "action": [
            {"name": "to_x", "column": 0, "unit": "metres", "kind": "position", "pair": "x"},
            {"name": "open", "column": 6, "unit": "0..1", "kind": "gripper"},
        ],
    }
    file = tmp_path / "set" / FILE
    file.write_text(json.dumps(entries), encoding="utf-8")
    columns = load(source).columns
    assert columns.robot == "franka" and [c.name for c in columns.state] == ["x", "y", "z"]
    assert [(c.name, c.unit, c.pair) for c in columns.action] == [("to_x", "metres", 0), ("open", "0..1", None)]
    for change, message in (
        ({"pair": "w"}, f"{FILE}: action 'to_x' has the pair 'w', which is no state column; set one of x, y, z"),
        ({"column": 7}, f"{FILE}: action: there is no column '7'"),
        ({"kind": "joint"}, "action 'to_x' is of kind joint, but the state 'x' of kind position; state the same kind"),
        ({"delta": True}, "action 'to_x' is a difference and is kept as recorded; take its pair 'x' out"),
        ({"column": "x"}, f"{FILE}: action.0.: column|{FILE}: action"),
    ):
        file.write_text(json.dumps(entries | {"action": [entries["action"][0] | change]}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load(source)


def test_grippers_are_named_for_state_and_action_alike(tmp_path):
    source = write(tmp_path / "set", (None, None), (7, 7))
    columns = load(source, grippers=("0",)).columns
    assert columns.kept == (0,) and columns.state[0].kind == columns.action[0].kind == "gripper"
    assert columns.state[6].kind == columns.action[6].kind != "gripper"
    numbered = write(tmp_path / "numbered", ([*"123456", "gripper"],) * 2, (7, 7))
    assert load(numbered, grippers=("6",)).columns.kept == (5,)  # a name before a number


def test_a_unit_reaches_angles_and_is_spelt_in_one_way(tmp_path):
    source = write(tmp_path / "set", (XARM, XARM), (7, 7))
    assert [c.unit for c in load(source, unit="deg").columns.action[3:6]] == ["degrees"] * 3
    (tmp_path / "set" / FILE).write_text('{"unit": "rad", "robot": "xarm"}', encoding="utf-8")
    assert load(source).columns.robot == "xarm" and load(source).columns.action[3].unit == "radians"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"state": [{"name": "waist", "unit": "degrees"}]},
            "'waist' is in radians, but the state 'waist' in deg",
        ),
        (
            {"action": [{"name": "waist", "kind": "euler"}]},
            "kind euler, but the state 'waist' of kind joint; state",
        ),
        ({"action": []}, "action is an empty list; leave it out to use all columns"),
        ({"action": [{"name": "a", "column": 0}, {"name": "b", "column": 0}]}, "two entries are of recorded column 0"),
        ({"action": [{"name": "gripper", "pair": "gripper"}]}, "is a gripper and is kept as recorded; take its pair"),
    ],
)
def test_contradictions_in_the_file_are_refused(tmp_path, entries, message):
    source = write(tmp_path / "set", (ARM, ARM), (7, 7), "aloha")
    (tmp_path / "set" / FILE).write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(DataError, match=f"{FILE}.*{message}"):
        load(source)


def test_a_file_beside_a_known_format_is_refused(tmp_path):
    (tmp_path / FILE).write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{FILE} does not hold for calvin:, whose columns are known; remove"):
        open_source(f"calvin:{tmp_path}", DataConfig(), ())


def test_a_damaged_file_beside_the_data_set_is_refused_in_one_line(tmp_path):
    source = write(tmp_path / "set", (ARM, ARM), (7, 7))
    entries = {
        "robot": "arm",
        "state": [{"name": name, "column": i, "unit": "radians", "kind": "joint"} for i, name in enumerate(ARM[:3])],
        "action": [{"name": "waist", "delta": False, "pair": "waist"}, {"name": "gripper", "kind": "gripper"}],
    }

    @examples(60)
    @given(json_files(entries))
    def try_it(content):
        (tmp_path / "set" / FILE).write_bytes(content)
        attempt(load, source)

    try_it()


@pytest.mark.parametrize("name", ["a\nb", "x" * 301, "\ud800"])
def test_names_that_no_line_can_show_are_refused(name):
    with pytest.raises(DataError, match="info.json: feature action has a column called .*; give it a short name"):
        flat_names([name, "b"], 2, "action", "info.json")


def test_degrees_and_range_in_one_mixture_are_refused(tmp_path):
    arm = ["shoulder_pan", "gripper"]
    draw = np.random.default_rng(0)
    wide, narrow = (draw.uniform(-span, span, (24, 2)) for span in (170, 90))
    sets = [
        load(write(tmp_path / str(i), (arm, arm), (2, 2), "so_follower", (rows, rows)))
        for i, rows in enumerate((wide, narrow))
    ]
    config = TrainConfig(stage="action_vae")
    with pytest.raises(DataError, match="state column 0 .shoulder_pan. in degrees and in unknown; mix only"):
        check_sources(sets, config)
    sets[1] = load(sets[1].source, unit="degrees")
    with pytest.raises(ConfigError, match="action_vae_model.action_dim"):  # the columns agree
        check_sources(sets, config)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("lerobot", f"or say what its columns mean in {FILE} beside it"),
        ("records", f"or say what its columns mean in {FILE} beside the data that it is made from, and make it again"),
        ("calvin", "no file changes it"),
    ],
)
def test_statistics_of_other_columns(kind, remedy, tmp_path):
    names = ["shoulder_pan", "gripper"]
    sets = [load(write(tmp_path / robot, (names, names), (2, 2), robot)) for robot in ("so100_follower", "other_arm")]
    learnt = statistics.compute(sets[:1], 5, progress=False)
    check_statistics(learnt, sets[0], TrainConfig(stage="action_vae"))
    other = replace(sets[1], source=f"{kind}:{tmp_path}")
    with pytest.raises(DataError, match=r"differ in what columns mean: robot .*; set config.action_vae to") as error:
        check_statistics(learnt, other, TrainConfig(stage="action_vae"))
    assert remedy in str(error.value) and (FILE in str(error.value)) == (kind != "calvin")


def test_a_wrong_word_for_how_actions_are_recorded_is_refused():
    with pytest.raises(ConfigError, match="data.columns.actions is 'delta'; choose one of targets, differences"):
        ColumnsConfig(actions="delta")


def test_data_columns_does_not_hold_for_formats_that_are_known(tmp_path):
    with pytest.raises(ConfigError, match=r"data.columns does not hold for egodex:"):
        open_source(f"egodex:{tmp_path}", DataConfig(columns=ColumnsConfig(unit="degrees")), ())


def test_differences_recorded_as_targets_are_suspected(tmp_path):
    walk = np.random.default_rng(1).normal(size=(24, 2)).cumsum(0) * 3 + 100
    moves = np.diff(walk, axis=0, append=walk[-1:])
    names = ["shoulder_pan", "elbow"]
    deltas = load(write(tmp_path / "deltas", (names, names), (2, 2), rows=(walk, moves)))
    (said,) = suspicions(deltas)
    assert said.startswith("action shoulder_pan, elbow does not follow the state")
    assert suspicions(load(deltas.source, actions="differences")) == []
    assert load(deltas.source, actions="differences").columns.kept == (0, 1)
    noisy = np.random.default_rng(2).normal(size=(24, 2))  # as fast as it is large
    walk = np.concatenate([np.zeros((1, 2)), noisy[:-1]]).cumsum(0)
    assert suspicions(load(write(tmp_path / "noisy", (names, names), (2, 2), rows=(walk, noisy))))
    assert suspicions(load(write(tmp_path / "targets", (names, names), (2, 2), rows=(walk, walk + moves)))) == []


# --- relative actions and back -----------------------------------------------------------------------------------


def rotations(draw, steps):
    """A smooth path of rotation matrices [steps, 3, 3]."""
    from scipy.spatial.transform import Rotation

    path = [Rotation.random(random_state=draw)]
    for _ in range(steps - 1):
        path.append(Rotation.from_rotvec(draw.normal(0, 0.15, 3)) * path[-1])
    return Rotation.concatenate(path)


def recorded(kind, unit, draw, steps=30):
    """State and action [steps, columns] as robots record them, with all their jumps."""
    if kind == "quaternion":
        path = rotations(draw, steps).as_quat()
        return (path * draw.choice([-1, 1], (steps, 1)) for _ in range(2))
    if kind == "rotation_vector":
        vectors = rotations(draw, steps + 1).as_rotvec(degrees=unit == "degrees")
        return vectors[:-1], vectors[1:]
    path = draw.normal(0, 0.3, (steps + 1, 1)).cumsum(0) + draw.uniform(-3, 3)
    if kind == "euler":
        turn = columns_lib.TURNS[unit]
        path = path / (2 * np.pi) * turn
        path = (path + turn / 2) % turn - turn / 2
    return path[:-1], path[1:]


KINDS = [
    *(("euler", unit) for unit in ("degrees", "radians")),
    *(("rotation_vector", unit) for unit in ("degrees", "radians")),
    ("quaternion", "1"),
    *(
        (kind, unit)
        for kind in ("joint", "position", "other", "gripper")
        for unit in ("degrees", "metres", "-100..100")
    ),
]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    delta=st.booleans(),
    mode=st.sampled_from(["mean_std", "min_max"]),
    seed=st.integers(0, 999),
)
def test_what_is_read_is_what_is_decoded(kind, delta, mode, seed):
    """Made relative, normalised and decoded again, every kind and unit is the recording; rotations as rotations."""
    kind, unit = kind
    state, action = recorded(kind, unit, np.random.default_rng(seed))
    size = state.shape[1]
    kept = delta or kind == "gripper"
    columns = Columns(
        "robot",
        tuple(Column(f"c{i}", unit, kind) for i in range(size)),
        tuple(
            ActionColumn(f"c{i}", unit, kind, delta=delta and kind != "gripper", pair=None if kept else i)
            for i in range(size)
        ),
    )
    numbers = np.zeros(len(state), np.int32)
    e = Episode("e", ("go",), numbers, 10.0, state.astype(np.float32), action.astype(np.float32), columns)
    known = statistics.compute([Episodes.of([e], "here")], 5, progress=False)
    for start in (0, 7, 28):
        rows = e.chunk(start, 5)
        decoded = decode_chunk(normalize_actions(rows, known, mode), e.state[start], known, mode)
        expected = e.action[start : start + 5]
        if kept:
            np.testing.assert_array_equal(rows, expected)
        elif kind in ("euler", "rotation_vector"):
            turn = columns_lib.TURNS[unit]
            assert np.abs(rows).max() < turn * 0.4  # no jump is learnt
            assert np.abs(decoded).max() <= turn / 2 * (1 + 1e-6)
        elif kind == "quaternion":
            assert np.abs(rows).max() < 1
        assert same(decoded, expected, kind, unit)


def same(a, b, kind, unit):
    if kind == "euler":
        turn = columns_lib.TURNS[unit]
        return np.allclose((a - b + turn / 2) % turn, turn / 2, atol=1e-3)
    if kind == "quaternion":
        return np.allclose(np.abs((a * b).sum(1)), 1, atol=1e-4)
    if kind == "rotation_vector":
        from scipy.spatial.transform import Rotation

        rotation = [Rotation.from_rotvec(x, degrees=unit == "degrees") for x in (a, b)]
        return (rotation[0] * rotation[1].inv()).magnitude().max() < 1e-3
    return np.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_joints_without_names_are_compared_with_a_robot():
    unnamed = Columns.unstated("so", 2, 2, (1,))
    policy = replace(unnamed, state=(Column("0", "degrees", "other"), Column("1", "0..100", "gripper")))
    assert difference(policy, policy.with_joints("so", "-100..100")) == "state column 0 (0) in degrees and in -100..100"


# --- meanings ----------------------------------------------------------------------------------------------------

ONE = Columns.of_joints("so100", ["pan", "gripper"], "degrees", "0..100")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (ONE, ""),
        (Columns.from_json(ONE.to_json(), "here"), ""),
        (Columns.unstated("", 2, 2, (1,)), ""),  # what is not stated is not compared
        (replace(ONE, robot="so101"), "robot 'so100' and 'so101'"),
        (ONE.with_joints("", "-100..100"), "state column 0 (pan) in degrees and in -100..100"),
        (Columns.of_joints("so100", ["lift", "gripper"], "degrees", "0..100"), "state column 0 'pan' and 'lift'"),
        (
            Columns.unstated("so100", 2, 2, ()),
            "action column 1 (gripper) kept as recorded and relative to state column 1",
        ),
        (Columns.unstated("so100", 3, 2, ()), "2 and 3 columns of state"),
        (
            replace(ONE, action=(replace(ONE.action[0], delta=True, pair=None), ONE.action[1])),
            "action column 0 (pan) as a target and as a difference",
        ),
        (
            replace(ONE, state=(replace(ONE.state[0], kind="position"), ONE.state[1])),
            "state column 0 (pan) of kind joint and position",
        ),
    ],
)
def test_the_first_difference_of_two_meanings_is_named(other, expected):
    assert difference(ONE, other) == expected


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (
            [{"kind": "quaternion"}] * 3,
            "columns.action: 3 columns from number 0 on are of kind quaternion, which needs 4",
        ),
        ([{"kind": "euler"}], "is euler but its unit is ''; set the unit to degrees or radians"),
        ([{"kind": "claw"}], "is 'claw'; choose one of joint, position, "),
        ([{"pair": 1}], "is paired with state column 1 of 1; correct it"),
        ([{"pair": 0, "delta": True}], "is a difference and has a pair; set its pair to null"),
        ([{"kind": "quaternion", "pair": p} for p in (0, 0, 0, 0)], "pair them with as many state columns"),
        ([{"unit": 5}], "here"),
        ([{"name": "x"}, {"name": "x"}], "columns.action: two columns are called 'x'; give each its own name"),
    ],
)
def test_descriptions_that_contradict_themselves_are_refused(action, message):
    with pytest.raises(ConfigError, match=message):
        Columns.from_json({"state": [{}], "action": action}, "here")


def test_grippers_that_are_named_are_asked_for_no_more():
    """The question writes the key as the config reads it."""
    unnamed = guess("arm", (), (), (3, 3))
    (asked,) = [q for q in questions(unnamed) if "last one" in q]
    key = asked.partition("data.columns.")[2].partition(",)")[0] + ",)"
    config = data_config([f"--config.data.columns.{key}"]).columns
    assert not [q for q in questions(resolve(unnamed, config, Path("nowhere")).columns) if "last one" in q]


def test_what_a_corpus_leaves_open_is_answered_where_it_is_made():
    """data.columns and the file beside the data are refused there."""
    for question in questions(guess("arm", (), (), (3, 3)), stored=True):
        assert question.endswith("(of the data that the corpus is made from; then make it again)")


@pytest.mark.parametrize("value", ["gripper", "5"])
def test_one_name_that_is_no_list_is_refused_with_the_list(value):
    with pytest.raises(ConfigError) as refused:
        data_config([f"--config.data.columns.grippers={value}"])
    remedy = str(refused.value).partition("write ")[2]
    assert data_config([f"--{remedy}"]).columns.grippers == (value,)


def test_a_column_that_its_user_keeps_is_asked_for_no_more(tmp_path):
    found = guess("aloha", ["joint_1", "gripper"], ["joint_2", "gripper"], (2, 2))
    assert [q for q in questions(resolve(found, ColumnsConfig(), tmp_path).columns) if "kept as recorded" in q]
    (tmp_path / FILE).write_text(
        json.dumps({"action": [{"name": "joint_2", "pair": ""}, {"name": "gripper"}]}), encoding="utf-8"
    )
    assert not questions(resolve(found, ColumnsConfig(), tmp_path).columns)


@pytest.mark.parametrize(
    "content, named",
    [
        ({"units": "rad"}, "unknown key 'units'.*Did you mean unit"),
        ({"action": [{"name": "joint_1", "kidn": "euler"}]}, r"action\[0\] has the unknown key 'kidn'.*kind"),
    ],
)
def test_a_key_that_nothing_reads_is_refused(content, named, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=named):
        resolve(guess("aloha", ["joint_1"], ["joint_1"], (1, 1)), ColumnsConfig(), tmp_path)
