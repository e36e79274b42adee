"""From chunks to targets: which chunk a target comes from, and that errors end the motion."""

import threading

import numpy as np
import pytest

from benchmarks import chunking
from rynnvla_jax.columns import Columns
from rynnvla_jax.deploy.check import asynchronous
from rynnvla_jax.deploy.control import DECAY, Controller, blended
from rynnvla_jax.deploy.export_format import PolicyError
from rynnvla_jax.deploy.observation import Observation
from rynnvla_jax.recording import Recording

CHUNK = 6
COLUMNS = Columns("somewhere")
WAIT = 20  # seconds until a test gives up on a thread


def observation(step):
    """Its state tells which step it was taken at."""
    return Observation(np.zeros((2, 2, 3), np.uint8), None, np.array([step, 0.0]), "hold", COLUMNS)


def predicted(start, row):
    """What `Scripted` plans at step `start` for `row` steps later: both can be read off the target."""
    return np.array([100 * start + row, start**2 - 3 * row], np.float32)


class Scripted:
    """A policy whose chunk names the observation it answers."""

    def __init__(self):
        self.starts = []

    def act(self, front, wrist, state, instruction, columns=None):
        assert columns == COLUMNS and instruction == "hold"
        self.starts.append(int(state[0]))
        return np.stack([predicted(self.starts[-1], row) for row in range(CHUNK)])


class Gated(Scripted):
    """Waits in `act` until it is let through, once a `release`; tells when it entered."""

    def __init__(self):
        super().__init__()
        self.entered, self.gate = threading.Semaphore(0), threading.Semaphore(0)
        self.failure = None

    def act(self, *arguments, **named):
        chunk = super().act(*arguments, **named)
        self.entered.release()
        assert self.gate.acquire(timeout=WAIT)
        if self.failure:
            raise self.failure
        return chunk

    def let_through(self):
        self.gate.release()

    def wait_until_busy(self):
        assert self.entered.acquire(timeout=WAIT)


class Steps:
    """A control loop that counts its steps and the observations taken."""

    def __init__(self, controller):
        self.controller, self.step, self.observed = controller, 0, []

    def observe(self):
        self.observed.append(self.step)
        return observation(self.step)

    def __call__(self, count=1):
        targets = []
        for _ in range(count):
            targets.append(self.controller.target(self.observe))
            self.step += 1
        return np.array(targets)


@pytest.mark.parametrize("replan_every", [1, 4, CHUNK])
def test_replans_at_fixed_intervals_and_looks_only_then(replan_every):
    policy = Scripted()
    steps = Steps(Controller(policy, replan_every))
    targets = steps(14)
    starts = [t // replan_every * replan_every for t in range(14)]
    assert policy.starts == steps.observed == sorted(set(starts))
    np.testing.assert_array_equal(targets, [predicted(s, t - s) for t, s in enumerate(starts)])
    assert targets.dtype == np.float32


@pytest.mark.parametrize("replan_every", [1, 2, 4, CHUNK])
def test_ensembling_equals_a_direct_computation(replan_every):
    targets = Steps(Controller(Scripted(), replan_every, ensemble=True))(20)
    for t, target in enumerate(targets):
        starts = [s for s in range(0, t + 1, replan_every) if t - s < CHUNK]  # oldest first
        weights = [np.exp(-DECAY * i) for i in range(len(starts))]
        mean = sum(w * predicted(s, t - s).astype(np.float64) for w, s in zip(weights, starts, strict=True))
        np.testing.assert_allclose(target, mean / sum(weights), rtol=1e-6, atol=1e-4)


def test_the_oldest_prediction_weighs_most():
    targets = Steps(Controller(Scripted(), 1, ensemble=True))(2)
    older, newer = predicted(0, 1)[0], predicted(1, 0)[0]
    assert older < targets[1][0] < (older + newer) / 2


def test_reset_forgets_the_plan():
    policy = Scripted()
    controller = Controller(policy, CHUNK, ensemble=True)
    Steps(controller)(3)
    controller.reset()
    np.testing.assert_array_equal(controller.target(lambda: observation(50)), predicted(50, 0))
    assert policy.starts == [0, 50]


@pytest.mark.parametrize(
    "failure, message",
    [(PolicyError("state is not finite"), "state is not finite"), (RuntimeError("out of memory"), "out of memory")],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_of_the_policy_ends_the_motion(failure, message, asynchronous):
    policy = Gated()
    policy.let_through()
    with Controller(policy, 2, asynchronous=asynchronous) as controller:
        steps = Steps(controller)
        steps(2)
        policy.failure = failure
        policy.let_through()
        with pytest.raises(PolicyError, match=message):  # though the first chunk has rows left
            steps(CHUNK)
            pytest.fail("moved on to the end of the chunk")
        for _ in range(3):
            with pytest.raises(PolicyError, match=f"stopped after: .*{message}.*call reset"):
                steps()
        policy.failure = None
        policy.let_through()
        controller.reset()
        start = steps.step = 40
        np.testing.assert_array_equal(steps(), [predicted(start, 0)])


def test_an_error_of_the_camera_passes_through_and_ends_the_motion():
    controller = Controller(Scripted(), 2)
    Steps(controller)(2)

    def unplugged():
        raise OSError("camera is gone")

    with pytest.raises(OSError, match="camera is gone"):
        controller.target(unplugged)
    with pytest.raises(PolicyError, match="stopped after: camera is gone"):
        controller.target(lambda: observation(3))


@pytest.mark.parametrize(
    "chunk, message",
    [
        (np.zeros(6), r"returned float64 \[6\]"),
        (np.zeros((0, 2)), r"\[0, 2\]"),
        (np.array([["a", "b"]] * 4), "expected numbers"),
        (np.array([[0.0, 1.0]] * 4 + [[np.nan, 0.0]]), "not finite"),
        (None, "returned object"),
        (np.zeros((1, 6, 2)), r"\[1, 6, 2\]"),
        (np.full((6, 2), 1e300), "not finite"),  # in float32
    ],
)
def test_chunks_that_cannot_be_executed_are_refused(chunk, message):
    class Broken:
        def act(self, *arguments):
            return chunk

    with pytest.raises(PolicyError, match=message):
        Controller(Broken(), 4).target(lambda: observation(0))


def test_replan_interval_is_checked():
    with pytest.raises(ValueError, match="replan_every is 0"):
        Controller(Scripted(), 0)
    with pytest.raises(ValueError, match=f"but a chunk has {CHUNK} steps") as error:
        Controller(Scripted(), CHUNK + 1).target(lambda: observation(0))
    assert not isinstance(error.value, PolicyError)  # another observation would not help


def test_inference_beside_the_loop_does_not_delay_it_and_skips_what_it_overtook():
    policy = Gated()
    with Controller(policy, 2, asynchronous=True) as controller:
        steps = Steps(controller)
        policy.let_through()
        np.testing.assert_array_equal(steps(2), [predicted(0, 0), predicted(0, 1)])
        policy.wait_until_busy()
        np.testing.assert_array_equal(steps(), [predicted(0, 2)])  # step 2: a new chunk is due and asked for
        policy.wait_until_busy()  # and the policy is at it
        np.testing.assert_array_equal(steps(2), [predicted(0, 3), predicted(0, 4)])  # the loop goes on meanwhile
        policy.let_through()
        policy.wait_until_busy()  # it has finished, and begun with the observation that waited
        np.testing.assert_array_equal(steps(), [predicted(2, 3)])  # step 5: three rows of that chunk are over


def test_latest_observation_wins():
    policy = Gated()
    with Controller(policy, 1, asynchronous=True) as controller:
        steps = Steps(controller)
        policy.let_through()
        steps()
        policy.wait_until_busy()
        steps()  # step 1 is asked for
        policy.wait_until_busy()  # and being answered
        steps(3)  # 2, 3 and 4 wait, each in place of the one before
        assert policy.starts == [0, 1] and steps.observed == [0, 1, 2, 3, 4]
        policy.let_through()
        policy.wait_until_busy()
        assert policy.starts == [0, 1, 4]


def test_no_chunk_is_continued_beyond_its_end():
    policy = Gated()
    with Controller(policy, 2, asynchronous=True) as controller:
        steps = Steps(controller)
        policy.let_through()
        steps(3)
        policy.wait_until_busy()
        policy.wait_until_busy()  # with the observation of step 2; it hangs
        steps(CHUNK - 3)  # the first chunk is used up
        waiting = threading.Event()
        rest = []

        def go_on():
            waiting.set()
            rest.extend(steps())

        thread = threading.Thread(target=go_on)
        thread.start()
        assert waiting.wait(WAIT)
        thread.join(0.2)
        assert thread.is_alive() and not rest  # no target without a plan
        policy.let_through()
        thread.join(WAIT)
        np.testing.assert_array_equal(rest, [predicted(2, CHUNK - 2)])


def test_a_policy_that_hangs_ends_the_motion():
    policy = Gated()
    with Controller(policy, 2, asynchronous=True, patience=0.05) as controller:
        with pytest.raises(PolicyError, match="no actions within 0.05 s"):
            Steps(controller)()
        with pytest.raises(PolicyError, match="stopped after"):
            Steps(controller)()
        policy.let_through()


def test_what_an_earlier_episode_asked_for_is_dropped():
    policy = Gated()
    with Controller(policy, 2, asynchronous=True) as controller:
        steps = Steps(controller)
        policy.let_through()
        steps(3)
        policy.wait_until_busy()
        policy.wait_until_busy()  # with the observation of step 2
        controller.reset()
        steps.step = 70
        policy.let_through()
        policy.let_through()
        np.testing.assert_array_equal(steps(), [predicted(70, 0)])
        assert policy.starts == [0, 2, 70]


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    controller = Controller(Scripted(), 2, asynchronous=True)
    Steps(controller)(3)
    (thread,) = set(threading.enumerate()) - before
    controller.close()
    thread.join(WAIT)
    assert not thread.is_alive()


def test_another_rate_than_that_of_the_recordings_is_refused_before_any_motion():
    policy = Scripted()
    policy.recording = Recording(rates=(10.0,))
    with pytest.raises(PolicyError, match=r"at 10 Hz but is controlled at 30 Hz.*3 times.*control it at 10 Hz"):
        Controller(policy, 2, rate=30)
    for rate in (10, 10.2, None):  # None: the caller vouches for it
        Controller(policy, 2, rate=rate).target(lambda: observation(0))
    Controller(Scripted(), 2, rate=30)  # a policy that does not know


def test_blending_keeps_what_is_executed_and_leads_to_the_new_plan():
    previous, chunk = np.full((4, 2), 10.0), np.arange(14.0).reshape(7, 2)
    out = blended(previous, chunk, 2, 3)
    np.testing.assert_array_equal(out[:2], previous[:2])
    np.testing.assert_allclose(out[2:4], [0.75 * previous[0] + 0.25 * chunk[2], 0.5 * previous[0] + 0.5 * chunk[3]])
    np.testing.assert_allclose(out[4], chunk[4] + 0.25 * (previous[3] - chunk[3]))  # beyond its end, in parallel
    np.testing.assert_array_equal(out[5:], chunk[5:])
    assert out.dtype == np.float32
    np.testing.assert_array_equal(blended(previous[:0], chunk, 2, 3), chunk)
    np.testing.assert_array_equal(blended(previous, chunk, 0, 0), chunk)
    np.testing.assert_array_equal(blended(np.zeros((9, 2)), chunk, 8, 3), np.zeros((7, 2)))  # late by more than a chunk


def test_blending_moves_to_a_new_chunk_in_several_steps():
    targets = Steps(Controller(Scripted(), 3, blend=2))(6)
    np.testing.assert_array_equal(targets[:3], [predicted(0, row) for row in range(3)])
    third, fourth = (2 * predicted(0, 3) + predicted(3, 0)) / 3, (predicted(0, 4) + 2 * predicted(3, 1)) / 3
    np.testing.assert_allclose(targets[3:], [third, fourth, predicted(3, 2)], rtol=1e-6)


def test_an_asynchronous_controller_blends_from_the_step_at_which_the_answer_comes():
    policy = Gated()
    with Controller(policy, 2, asynchronous=True, blend=1) as controller:
        steps = Steps(controller)
        policy.let_through()
        steps(3)
        policy.wait_until_busy()
        policy.wait_until_busy()  # with the observation of step 2
        np.testing.assert_array_equal(steps(2), [predicted(0, 3), predicted(0, 4)])
        policy.let_through()
        policy.wait_until_busy()  # it has finished, and begun with the observation that waited
        np.testing.assert_allclose(steps(1), [(predicted(0, 5) + predicted(2, 3)) / 2])
        np.testing.assert_array_equal(steps(1), [predicted(2, 4)])
        policy.let_through()
        assert controller.statistics.longest_delay == 3 and controller.statistics.waits == 0


def test_blend_is_checked():
    with pytest.raises(ValueError, match="blend is -1"):
        Controller(Scripted(), 2, blend=-1)
    with pytest.raises(ValueError, match="choose one"):
        Controller(Scripted(), 2, ensemble=True, blend=2)


@pytest.mark.parametrize("replan_every", [1, 8, 10, 11, chunking.CHUNK])
def test_the_arm_waits_exactly_where_the_check_of_a_policy_says_so(replan_every):
    for delay in range(1, 13):
        says = asynchronous(delay / 30, 30, chunking.CHUNK)
        assert says["delay_steps"] == delay
        expected = says["fits"] and replan_every <= says["largest_replan_every"]
        did = chunking.run(chunking.Wavering(2.0, 0), delay, 90, replan_every=replan_every)
        assert (did["waits"] == 0) == expected, (delay, did)


def test_blending_jumps_less_at_every_latency():
    results = chunking.measure([50, 400], blend=8, degrees=2.0, steps=600, seed=0)
    for row in results["latencies"]:
        assert row["ratios"]["blend"]["largest_step"] < 0.5
    fast, slow = results["latencies"]
    assert fast["plain"]["waits"] == 0 < slow["plain"]["waits"] == slow["blend"]["waits"]
