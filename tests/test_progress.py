"""Progress without a terminal: plain lines, not too many, and a time left that is right."""

import sys

import pytest

from rynnvla_jax import progress
from rynnvla_jax.progress import Lines, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_lines_come_now_and_then_and_at_the_end(clock, capsys):
    with Lines(desc="robot", total=120, initial=20, unit="step", clock=clock) as shown:
        for step in range(21, 121):
            clock.now += 1.5
            shown.set_postfix(loss=f"{1 / step:.4f}")
            shown.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "robot: step 27/120, loss 0.0370, 1.5 s/step, 140 s left".replace("140 s", "2 min")
    assert lines[-1] == "robot: step 120/120, loss 0.0083, 1.5 s/step"
    assert 10 <= len(lines) <= 15 and all("\r" not in line for line in lines)


def test_a_long_run_does_not_fill_the_log(clock, capsys):
    with Lines(desc="x", total=10**5, unit="step", clock=clock) as shown:
        for _ in range(86_400):  # a day
            clock.now += 1
            shown.update()
    assert 1440 <= len(capsys.readouterr().err.splitlines()) < 1700


def test_the_time_left_of_few_long_units_counts_all_since_the_start(clock, capsys):
    """A sweep asks for a new line all the time; a bar that looked at the time since the last line was 20 times off."""
    shown = Lines(desc="sweep", total=10, unit="point", clock=clock)
    for second in range(1, 401):
        clock.now += 1
        if second % 200 == 0:
            shown.update()
        shown.refresh()
    assert shown.line(clock.now) == "sweep: point 2/10, 200.0 s/point, 27 min left"
    capsys.readouterr()


def test_the_first_unit_may_be_left_out(clock):
    shown = Lines(desc="x", total=11, unit="step", skip_first=True, clock=clock)
    for seconds in (300, *[2] * 5):
        clock.now += seconds
        shown.update()
    assert shown.line(clock.now) == "x: step 6/11, 2.0 s/step, 10 s left"


def test_an_iterable_is_counted_and_fast_units_are_a_rate(clock, capsys):
    for _ in Lines(range(50), desc="codes", unit="frame", clock=clock):
        clock.now += 0.04
    assert capsys.readouterr().err == "codes: frame 50/50, 25 frame/s\n"
    for _ in Lines(range(50), desc="codes", unit="frame", clock=clock):
        clock.now += 0.01
    assert capsys.readouterr().err == ""  # too short to speak of
    with Lines(desc="step 5", total=2_500_000_000, unit="B", scale=True, clock=clock) as shown:
        clock.now += 1
        shown.update(1_250_000_000)
    assert capsys.readouterr().err == "step 5: B 1.25G/2.50G, 1.25G B/s, 1 s left\n"


def test_who_is_to_be_quiet_is_quiet(clock, capsys):
    for _ in progress.progress_bar(range(3), desc="x", show=False):
        pass
    assert not sys.stderr.isatty() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(5, "5 s"), (89, "89 s"), (95, "2 min"), (5000, "83 min"), (7800, "2 h 10 min"), (3e5, "3 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
