"""The table-top: units, places, looks, what counts as success, and an expert that succeeds."""

import json

import mujoco
import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.sources import open_source
from rynnvla_jax.columns import difference
from rynnvla_jax.config import DataConfig
from rynnvla_jax.sim import arm, gl, ik, tasks
from rynnvla_jax.sim.arm import HOME, LIMITS, PAN_AXIS
from rynnvla_jax.sim.env import CAMERAS, TableTop
from rynnvla_jax.sim.expert import demonstrate
from rynnvla_jax.sim.tasks import SCENARIOS, TASKS
from tests.simulator import need_arm, need_eyes

EVERY = [(task, scenario) for task in TASKS for scenario in SCENARIOS]


@pytest.fixture(scope="module", autouse=True)
def model():
    need_arm()


@pytest.fixture(scope="module")
def eyes():
    need_eyes()


def table(task="block", scenario="single", seed=0, **options):
    env = TableTop(task, scenario, **{"size": 64, "fixed_look": True, **options})
    env.reset(seed)
    return env


def put(env, name, position, quaternion=(1.0, 0.0, 0.0, 0.0)):
    """Moves an object there and lets it come to rest."""
    joint = env.data.joint(name)
    joint.qpos[:], joint.qvel[:] = (*position, *quaternion), 0
    for _ in range(20):
        env.step(arm.to_unit(HOME))


def over(env, name, height=0.03):
    return (*env.position(name)[:2], height)


# Units


def test_unit_is_that_of_the_embedded_recordings():
    recorded = open_source(f"lerobot:{demo.path('so100')}", DataConfig(), (), progress=False)
    assert not difference(TableTop.columns, recorded.columns)
    info = json.loads((demo.path("so100") / "meta" / "info.json").read_text(encoding="utf-8"))
    assert list(arm.NAMES) == info["features"]["action"]["names"]
    for episode in recorded:  # all of them start from the same rest
        np.testing.assert_allclose(table().state, episode.state[0], atol=0.2)
        radians = arm.to_radians(episode.action)
        assert (radians >= LIMITS[:, 0] - 1e-3).all() and (radians <= LIMITS[:, 1] + 1e-3).all()


def test_unit_spans_the_joints():
    np.testing.assert_allclose(arm.to_unit(LIMITS[:, 0]), [-100] * 5 + [0])
    np.testing.assert_allclose(arm.to_unit(LIMITS[:, 1]), [100] * 6)
    values = np.random.default_rng(0).uniform(0, 90, (7, 6))
    np.testing.assert_allclose(arm.to_unit(arm.to_radians(values)), values)


# The arm


def test_follows_targets_and_stops_at_its_limits():
    env = table()
    target = arm.to_unit(HOME) + (20, 10, -10, 5, 30, 20)
    for _ in range(60):
        env.step(target)
    np.testing.assert_allclose(env.state, target, atol=2.0)
    for _ in range(60):
        env.step(target + (0, 0, 0, 0, 1000, 1000))
    assert env.state[4:] == pytest.approx([100, 100], abs=2)


@pytest.mark.parametrize("target", [np.zeros(5), np.full(6, np.nan), [0, 0, 0, 0, 0, np.inf]])
def test_refuses_what_is_no_target(target):
    env = table()
    before = env.state
    with pytest.raises(ValueError, match="six finite numbers"):
        env.step(target)
    np.testing.assert_array_equal(env.state, before)


def test_visual_meshes_are_small_and_collisions_exact():
    model = table().model
    faces = {model.mesh(i).name: int(model.mesh_facenum[i]) for i in range(model.nmesh)}
    small = {name: count for name, count in faces.items() if name.startswith("visual_")}
    assert 15_000 < sum(small.values()) < 22_000
    for geom in range(model.ngeom):
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            seen_only = model.geom_contype[geom] == 0
            assert model.mesh(model.geom_dataid[geom]).name.startswith("visual_") == bool(seen_only)


def test_inverse_kinematics_reach_what_is_in_reach():
    rng = np.random.default_rng(0)
    model = arm.spec().compile()
    data = mujoco.MjData(model)
    for _ in range(30):
        radius, angle = rng.uniform(0.15, 0.28), rng.uniform(-0.9, 0.9)
        position = np.array([*(PAN_AXIS + radius * np.array([np.cos(angle), np.sin(angle)])), rng.uniform(0.01, 0.015)])
        rotation = ik.grasp_rotation(position, 0.0, rng.uniform(-1, 1))
        assert np.linalg.det(rotation) == pytest.approx(1)
        data.qpos[:5] = ik.solve(position, rotation, np.array([angle, -1.5, 1.5, 1.4, 0.0]))
        mujoco.mj_forward(model, data)
        site = data.site("grasp")
        np.testing.assert_allclose(site.xpos, position, atol=2e-3)
        assert -site.xmat.reshape(3, 3)[:, 1] @ (0, 0, -1) > 0.99  # points down


# Places and instructions


@pytest.mark.parametrize(("task", "scenario"), EVERY)
def test_things_lie_apart_in_reach_and_are_the_right_ones(task, scenario):
    counts = set()
    for seed in range(100):
        layout = tasks.layout(task, scenario, np.random.default_rng(seed))
        spots = np.array([thing.position[:2] for thing in layout.things])
        apart = np.linalg.norm(spots[:, None] - spots, axis=-1) + np.eye(len(spots))
        assert apart.min() > 0.07
        assert (np.linalg.norm(spots - PAN_AXIS, axis=1) < 0.34).all()
        kinds = [layout[name].kind for name in layout.targets]
        assert set(kinds) == {task} and layout[layout.goal].kind == ("holder" if task == "pen" else "plate")
        others = [t for t in layout.things if t.name not in (*layout.targets, layout.goal)]
        assert not [t for t in others if (t.kind, t.color) == (task, layout["target0"].color)]
        counts.add((len(layout.targets), len(others)))
    expected = {"single": {(1, 0)}, "distractor": {(1, 2), (1, 3)}, "multi": {(2, 0), (3, 0)}}[scenario]
    assert counts == (expected if (task, scenario) != ("pen", "multi") else {(2, 0)})


def test_distractors_vary_in_shape_and_colour():
    drawn = [tasks.layout("block", "distractor", np.random.default_rng(seed)).things[2:] for seed in range(60)]
    assert {thing.kind for things in drawn for thing in things} == {"block", "can", "lemon", "strawberry"}
    assert len({thing.color for things in drawn for thing in things}) >= 5


@pytest.mark.parametrize("task", TASKS)
def test_the_front_camera_sees_everything(task):
    for seed in range(8):
        env = table(task, "distractor", seed, fixed_look=False)
        camera = env.data.camera("front")
        for thing in env.layout.things:
            x, y, z = camera.xmat.reshape(3, 3).T @ (env.position(thing.name) - camera.xpos)
            half = np.tan(np.radians(env.model.camera("front").fovy[0] / 2))
            assert max(abs(x), abs(y)) < 0.97 * -z * half, (seed, thing)


@pytest.mark.parametrize(("task", "scenario"), EVERY)
def test_held_out_phrasings_are_never_recorded(task, scenario):
    seen, unseen = (tasks.phrasings(task, scenario, held_out) for held_out in (False, True))
    assert len(seen) >= 5 and len(unseen) >= 3 and not set(seen) & set(unseen)
    assert len({*seen, *unseen}) == len(seen) + len(unseen)
    assert not any("{" in text for text in (*seen, *unseen))


def test_instructions_follow_the_seed():
    env = TableTop("pen", "multi", fixed_look=True)
    said = {}
    for held_out in (False, True):
        for seed in range(12):
            env.reset(seed, held_out=held_out)
            said.setdefault(held_out, []).append(env.instruction)
        assert set(said[held_out]) <= set(tasks.phrasings("pen", "multi", held_out))
        assert len(set(said[held_out])) > 1
    assert all("pens" in text for text in said[False] + said[True])


def test_the_embedded_instructions_are_among_ours():
    recorded = open_source(f"lerobot:{demo.path('so100')}", DataConfig(), (), progress=False)
    assert set(recorded.texts) <= {tasks.phrasings(task, "single")[0] for task in TASKS}


@pytest.mark.parametrize("wrong", [("cube", "single"), ("block", "many")])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="does not exist; choose one of"):
        TableTop(*wrong)


# Determinism and looks


def test_same_seed_same_bytes(eyes):
    runs = []
    for seed in (3, 3, 4):
        env = table("strawberry", "distractor", seed, fixed_look=False)
        for command in list(zip(range(15), demonstrate(env, seed), strict=False)):
            env.step(command[1].executed)
        runs.append((env.state.tobytes(), env.instruction, *(env.render(camera).tobytes() for camera in CAMERAS)))
        env.close()
    assert runs[0] == runs[1]
    assert runs[0][2] != runs[2][2] and runs[0][3] != runs[2][3]


def test_reset_forgets_the_episode_before(eyes):
    env = table(seed=1)
    first = env.render("front")
    for _ in range(10):
        env.step(np.zeros(6))
    assert (env.render("front") != first).any()
    env.reset(1)
    np.testing.assert_array_equal(env.render("front"), first)


def test_look_is_drawn_or_fixed_and_places_do_not_depend_on_it():
    def look(env):
        model = env.model
        return [a.tobytes() for a in (model.cam_pos, model.cam_fovy, model.light_dir, model.tex_data, model.mat_rgba)]

    fixed, other, varied = table(seed=1), table(seed=2), table(seed=1, fixed_look=False)
    assert [a == b for a, b in zip(look(fixed), look(varied), strict=True)] == [False] * 5
    assert look(fixed)[1:3] + look(fixed)[4:] == look(other)[1:3] + look(other)[4:]
    assert fixed.layout == varied.layout and fixed.layout != other.layout


def test_cameras_see_the_target(eyes):
    """A green block is where the front camera looks, and fills the wrist camera's view when the hand is over it."""
    env = table("block", "single", 2, size=128)

    def greens(camera):
        red, green, blue = np.moveaxis(env.render(camera).astype(int), -1, 0)
        return int(((green > 1.5 * red) & (green > 1.5 * blue)).sum())

    assert greens("front") >= 20
    most = 0
    for _, command in zip(range(100), demonstrate(env, 2), strict=False):
        env.step(command.executed)
    most = greens("wrist")
    assert most > 6 * greens("front")  # which is framed on what the arm reaches
    with pytest.raises(ValueError, match="choose one of front, wrist"):
        env.render("top")


# Success


def test_nothing_done_is_no_success():
    for task, scenario in EVERY:
        assert not table(task, scenario).success()


def test_all_targets_must_lie_on_the_plate():
    env = table("strawberry", "multi", 1)
    goal = env.position("plate")[:2]
    names = env.layout.targets
    for i, name in enumerate(names):
        assert not env.success()
        put(env, name, (*(goal + 0.028 * np.array([np.cos(2 * i), np.sin(2 * i)])), 0.025), (0.7071, 0, 0.7071, 0))
    for _ in range(30):
        env.step(arm.to_unit(HOME))
    assert env.success()
    put(env, names[0], (goal[0], goal[1] + 0.12, 0.02))
    assert not env.success()


def test_a_distractor_on_the_plate_is_no_success():
    env = table("block", "distractor", 1)
    put(env, "target0", over(env, "plate"))
    assert env.success()
    x, y, z = over(env, "plate")
    put(env, "distractor0", (x + 0.032, y, z))
    assert not env.success()


def test_a_block_in_the_hand_is_no_success():
    env = table("block", "single", 0)
    for command in demonstrate(env, 0):
        env.step(command.executed)
        if env.touched("target0") and env.position("target0")[2] > 0.06:
            break
    put_plate = env.data.joint("plate")
    put_plate.qpos[:2] = env.position("target0")[:2]
    mujoco.mj_forward(env.model, env.data)
    assert not env.placed("target0")


def test_a_pen_must_stand_in_the_holder():
    env = table("pen", "single", 3)
    put(env, "target0", over(env, "holder", 0.075))
    assert env.success()
    x, y, _ = env.position("holder")
    put(env, "target0", (x - 0.07, y, 0.01), (0.5, -0.5, 0.5, 0.5))
    assert not env.success()


# The expert


@pytest.mark.parametrize(("task", "scenario"), EVERY)
def test_the_expert_succeeds(task, scenario):
    assert successes(task, scenario, range(1), 0.0) == 1


def successes(task, scenario, seeds, noise):
    env = TableTop(task, scenario, size=64)
    done = 0
    for seed in seeds:
        env.reset(seed)
        for command in demonstrate(env, seed, noise):
            env.step(command.executed)
        done += env.success()
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("task", "scenario"), EVERY)
def test_the_expert_succeeds_in_95_of_100(task, scenario):
    assert successes(task, scenario, range(100), 0.0) >= 95


def test_the_expert_tries_again():
    env = table("block", "single", 4)
    moved = False
    for command in demonstrate(env, 4):
        if not moved and env.grasp_point()[2] < 0.05:  # snatched away just before it closes its jaws
            x, y, z = env.position("target0")
            env.data.joint("target0").qpos[:3] = (x - 0.02, y + 0.06 * (1 if y < 0 else -1), z)
            moved = True
        env.step(command.executed)
    assert moved and env.success()


def test_commands_are_smooth_and_within_the_limits():
    env = table("pen", "single", 5)
    targets = []
    for command in demonstrate(env, 5):
        targets.append(command.target)
        np.testing.assert_array_equal(command.target, command.executed)
        env.step(command.executed)
    targets = np.array(targets)
    assert 200 < len(targets) < 500
    assert (targets >= [-100] * 5 + [0]).all() and (targets <= 100).all()
    assert np.abs(np.diff(arm.to_radians(targets), axis=0))[:, :5].max() < 0.25  # radians in 1/30 s


def test_noise_leads_off_the_way_and_the_expert_back():
    env = table("block", "single", 6)
    low, high, jaw = [], [], []
    for command in demonstrate(env, 6, noise=3.0):
        off = np.abs(command.executed - command.target)
        (low if env.grasp_point()[2] < 0.025 else high).append(off[:5].max())
        jaw.append(off[5])
        env.step(command.executed)
    assert env.success()
    assert max(high) > 3 > 1.5 > max(low) and max(jaw) == 0


# OpenGL


def test_what_draws_is_chosen(monkeypatch):
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "_found", gl._found.__wrapped__)  # it remembers
    for egl, osmesa, expected in ((1, True, "egl"), (0, True, "osmesa"), (0, False, None)):
        monkeypatch.setattr(gl, "_egl_devices", lambda count=egl: count)
        monkeypatch.setattr(gl, "_osmesa", lambda there=osmesa: there)
        if expected:
            assert gl.backend() == expected
            continue
        with pytest.raises(gl.RenderingError, match="apt-get install"):
            gl.backend()
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # the user's word counts
    assert gl.backend() == "glfw"
    monkeypatch.setenv("MUJOCO_GL", "paper")
    with pytest.raises(gl.RenderingError, match="MUJOCO_GL is paper; set it to egl or osmesa"):
        gl.backend()


def test_without_opengl_physics_goes_on_and_the_packages_are_named(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl, "_found", lambda: "")
    env = table()
    env.step(arm.to_unit(HOME))
    with pytest.raises(gl.RenderingError, match="apt-get install .*libegl1.*libosmesa6"):
        env.render("front")
