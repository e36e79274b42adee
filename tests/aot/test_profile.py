"""A profile as TPUs write it, made from text, beside the program that it is of; and a real one of a CPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from rynnvla_jax.aot import estimate, profile, tables
from rynnvla_jax.config import ConfigError
from tests.aot.test_estimate import PRODUCT, WIDE
from tests.aot.test_hlo import DONE, HEADER, START, entry, loop

KERNEL = f'%splash_mha_fwd.1 = {WIDE} custom-call(%w, %w), custom_call_target="tpu_custom_call"'
COMPUTATIONS, RUN = loop(START, f"%e = {WIDE} add(%x, %x)", DONE, limit="3")
TEXT = HEADER + COMPUTATIONS + entry(f"%w = {WIDE} parameter(1)", f"%d = {PRODUCT}", RUN)
# Of one step: when an operation begins, how long it takes (us), and its text in the profile.
STEP = (
    (0, 40, f"%d = {WIDE} dot({WIDE} %w, {WIDE} %w), lhs_contracting_dims={{1}}"),
    (40, 50, "%loop = (s32[], f32[16,16]) while((s32[], f32[16,16]) %first), condition=%cond, body=%body"),
    (41, 1, "%s = (f32[16,16], f32[64,16]) all-gather-start(f32[16,16] %x)"),
    (42, 20, f"%e = {WIDE} add({WIDE} %x, {WIDE} %x)"),
    (62, 15, "%g = f32[64,16] all-gather-done((f32[16,16], f32[64,16]) %s)"),
    (90, 2, f"%another.7 = {WIDE} fusion({WIDE} %w), kind=kOutput, calls=%fused"),
    (92, 4, f"%splash_mha_dq.2 = {WIDE} custom-call({WIDE} %w)"),
    (96, 1, f"%copy-done.3 = {WIDE} copy-done({WIDE} %c)"),
)


def space(planes: dict[str, int], program: str = "jit_update(42)", steps: int = 2) -> bytes:
    """A serialised profile; `planes`: name -> how many us a step takes there."""
    said: list[str] = []
    for plane, takes in planes.items():
        names = [program, *(text for _, _, text in STEP)]
        modules = "".join(_event(1, 150 * n, takes) for n in range(steps))
        ops = "".join(
            _event(2 + i, 150 * n + at, length) for n in range(steps) for i, (at, length, _) in enumerate(STEP)
        )
        known = "".join(
            f"event_metadata {{ key: {i} value {{ id: {i} name: '{name}' }} }}" for i, name in enumerate(names, 1)
        )
        lines = "".join(
            f"lines {{ name: '{line}' timestamp_ns: 5000 {events} }}"
            for line, events in (("XLA Modules", modules), ("XLA Ops", ops))
        )
        said.append(f"planes {{ name: '{plane}' {lines} {known} }}")
    return ProfileData.text_proto_to_serialized_xspace("\n".join(said))


def _event(metadata: int, at: int, takes: int) -> str:
    return f"events {{ metadata_id: {metadata} offset_ps: {at * 10**6} duration_ps: {takes * 10**6} }}"


def test_a_measured_step_is_sorted_into_the_parts_of_the_estimate(tmp_path):
    folder = tmp_path / "profile" / "plugins" / "profile" / "2026_01_01"
    folder.mkdir(parents=True)
    folder.joinpath("host.xplane.pb").write_bytes(space({"/host:CPU": 1, "/device:TPU:0": 100, "/device:TPU:1": 104}))
    found = profile.measured(profile.opened(tmp_path / "profile"), TEXT)
    us = {part: round(seconds * 1e6, 3) for part, seconds in found.parts.items() if seconds}
    # Of the loop's 50 us 36 are its body's; of the step's 102 (on average) 97 are in operations.
    assert us == {"products": 42, "elementwise": 20, "attention": 4, "collectives": 16, "copies": 1, "other": 19}
    assert (found.steps, found.chips, found.seconds) == (2, 2, pytest.approx(102e-6))
    assert found.between == pytest.approx(48e-6)
    assert found.known == pytest.approx(90 / 97)  # two operations and a copy are of another program
    text = tables.against(estimate.estimate(TEXT, "v6e:8x8"), found)
    assert "measured / estimate" in text and "not measured on a TPU" in text and "2 steps on 2 chips" in text


def test_the_newest_profile_counts(tmp_path):
    for name, takes in (("old", 100), ("new", 120)):
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "host.xplane.pb").write_bytes(space({"/device:TPU:0": takes}, steps=1))
    found = profile.measured(profile.opened(tmp_path), TEXT)
    assert found.seconds == pytest.approx(120e-6) and found.between is None


def test_a_profile_of_something_else_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no \\*.xplane.pb; give WORKDIR/profile of a run with --config.profile"):
        profile.opened(tmp_path)
    file = tmp_path / "host.xplane.pb"
    file.write_bytes(space({"/device:TPU:0": 100}, program="jit_other"))
    with pytest.raises(ConfigError, match="no train step .* on a TPU; it has programs jit_other. Profile a run"):
        profile.opened(tmp_path)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="host.xplane.pb cannot be read"):
        profile.opened(tmp_path)


def test_a_real_profile_of_a_cpu_is_refused(tmp_path):
    with jax.profiler.trace(tmp_path):
        jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).block_until_ready()
    with pytest.raises(ConfigError, match="it has planes .*CPU"):
        profile.opened(tmp_path)
