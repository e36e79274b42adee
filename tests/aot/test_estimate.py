"""The time of a step from the text of a scheduled program: small programs whose parts are known."""

import pytest

from rynnvla_jax.aot import estimate as timing
from rynnvla_jax.aot import hlo, pods
from tests.aot.test_hlo import HEADER, SUM, entry, loop

CHIP = pods.CHIPS["v6e"]
PEAK = 918e12
WIDE = "f32[4096,4096]"
BYTES = 4 * 4096**2
PRODUCT = f"{WIDE} dot(%w, %w), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
START = "%s = (f32[16,16], f32[128,16]) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
DONE = "%g = f32[128,16] all-gather-done(%s)"
GATHER = 7 * 1024 * 8 / 7 / (2 * CHIP.link)  # seconds of it
CYCLES = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'


def estimated(*lines: str, computations: str = "", topology: str = "v6e:8x8", flops: float | None = None):
    text = HEADER + SUM + computations + entry(f"%w = {WIDE} parameter(1)", *lines)
    return timing.estimate(text, topology, flops)


def test_a_product_takes_the_compilers_cycles_or_a_share_of_the_peak():
    with_cycles = estimated(f"%d = {PRODUCT}, {CYCLES % 1_750_000}", flops=PEAK * 1e-4)
    assert with_cycles.parts["products"] == pytest.approx((1e-3, 1e-3))
    assert with_cycles.seconds == pytest.approx((1e-3, 1e-3)) and with_cycles.mfu == pytest.approx((0.1, 0.1))
    assert with_cycles.by_cycles == 1.0 and with_cycles.words == "compiler's estimate, not measured on a TPU"
    without = estimated(f"%d = {PRODUCT}")
    assert without.parts["products"] == pytest.approx((2 * 4096**3 / PEAK / CHIP.products,) * 2)
    assert without.by_cycles == 0.0 and without.mfu is None


def test_elementwise_work_takes_the_time_of_its_bytes_and_not_its_cycles():
    found = estimated(f"%e = {WIDE} add(%w, %w), {CYCLES % 10**9}").parts["elementwise"]
    assert found == pytest.approx((3 * BYTES / CHIP.hbm_rate, 3 * BYTES / CHIP.hbm_rate / 0.7))


def test_slices_and_updates_in_place_move_only_their_own_bytes():
    fused = f"""
%update (b: {WIDE}, i: s32[]) -> {WIDE} {{
  %b = {WIDE} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,4096] dynamic-slice(%b, %i, %i), dynamic_slice_sizes={{1,4096}}
  %twice = f32[1,4096] add(%row, %row)
  ROOT %u = {WIDE} dynamic-update-slice(%b, %twice, %i, %i)
}}
"""
    call = f"%f = {WIDE} fusion(%w, %i), kind=kLoop, calls=%update"
    found = estimated("%i = s32[] constant(0)", call, computations=fused)
    assert found.seconds[0] == pytest.approx((2 * 4096 * 4 + 4) / CHIP.hbm_rate, rel=0.01)
    vector = estimated(f"%v = {WIDE}{{1,0:T(8,128)S(1)}} negate(%w)")  # its result stays in vector memory
    assert vector.seconds[0] == pytest.approx(BYTES / CHIP.hbm_rate)


@pytest.mark.parametrize(
    ("block", "share"), [("s8[1,8,8]", 36 / 64), ("s8[1,4,8]", (2 + 4 + 6 + 8) / 32), ("s32[1,1,1]", 1.0)]
)
@pytest.mark.parametrize(
    ("kernel", "products"), [("fwd_residuals", 2), ("dq_no_residuals", 3), ("dkv_no_residuals", 4)]
)
def test_attention_is_the_blocks_below_the_diagonal_at_a_share_of_the_peak(block, share, kernel, products):
    q, k = "bf16[2,8,4096,128]", "bf16[2,2,4096,128]"
    found = estimated(
        f"%m = {block} parameter(2)",
        f"%q = {q} parameter(3)",
        f"%k = {k} parameter(4)",
        f'%splash_mha_{kernel}.1 = {q} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"',
    ).parts["attention"]
    flops = products * 2 * 2 * 8 * 4096**2 * 128 * share
    assert found == pytest.approx((flops / PEAK / 0.6, flops / PEAK / 0.4))


def test_attention_of_one_sequence_has_no_axis_for_the_batch():
    q = "bf16[8,4096,128]"
    call = f'%splash_mha_fwd.1 = {q} custom-call(%m, %q, %q, %q), custom_call_target="tpu_custom_call"'
    found = estimated("%m = s8[1,1,1] parameter(2)", f"%q = {q} parameter(3)", call).parts["attention"]
    assert found[0] == pytest.approx(2 * 2 * 8 * 4096**2 * 128 / PEAK / 0.6)


def test_other_kernels_take_the_products_that_they_state_or_their_bytes():
    kernel = f'%k = {WIDE} custom-call(%w), custom_call_target="tpu_custom_call"'
    stated = ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"918000000000","bytes":"1"}}}'
    assert estimated(kernel).parts["elementwise"][0] == pytest.approx(2 * BYTES / CHIP.hbm_rate)
    assert estimated(kernel + stated).parts["products"][0] == pytest.approx(1e-3 / CHIP.products)


def exposed(*lines: str, computations: str = "", part: str = "collectives") -> tuple[float, float]:
    return estimated(*lines, computations=computations).parts[part]


def test_only_what_the_schedule_leaves_exposed_of_a_collective_costs_time():
    synchronous = "%g = f32[128,16] all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"
    short, long = (f"%d = {PRODUCT}, {CYCLES % cycles}" for cycles in (GATHER / 4 * CHIP.clock, 1e6))
    assert exposed(synchronous, short) == pytest.approx((GATHER, GATHER))
    assert exposed(START, DONE, short) == pytest.approx((GATHER, GATHER))
    assert exposed(START, short, DONE) == pytest.approx((GATHER * 3 / 4,) * 2, rel=0.02)
    assert exposed(START, long, DONE) == (0.0, 0.0)


def test_collectives_at_the_same_time_share_the_wires_at_worst():
    second = (START.replace("%s ", "%t "), DONE.replace("%g", "%h").replace("%s", "%t"))
    assert exposed(START, second[0], DONE, second[1]) == pytest.approx((GATHER, 2 * GATHER))


def test_loops_run_all_their_turns_and_pipelined_collectives_end_in_the_next_one():
    """The body waits for the gather that the turn before started, and starts the next."""
    product = f"%d = {PRODUCT.replace('%w', '%x').replace(WIDE, 'f32[16,16]')}, {CYCLES % int(GATHER / 2 * CHIP.clock)}"
    inside, run = loop(DONE, START, product, limit="10")
    found = estimated(run, computations=inside)
    assert found.parts["products"][0] == pytest.approx(10 * GATHER / 2, rel=0.02)
    assert found.parts["collectives"][0] == pytest.approx(9 * GATHER / 2, rel=0.1)
    assert found.seconds[0] == pytest.approx(sum(low for low, _ in found.parts.values()))


def test_what_leaves_the_slice_takes_the_network_between_slices():
    note = (
        "channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        '"xla_megascale_runtime",_xla_megascale_target="{1}x{0:1}",_xla_megascale_transfer_type="ONE_TO_ONE"}'
    )
    lines = (
        f"%r = (f32[16,16], u32[], token[]) recv(%t), {note}",
        f"%rd = (f32[16,16], token[]) recv-done(%r), {note}",
    )
    assert exposed("%t = token[] after-all()", *lines, part="between slices")[0] == pytest.approx(1024 / CHIP.dcn)


@pytest.mark.parametrize(
    ("topology", "op", "group", "lanes"),
    [
        ("v6e:8x8", "all-gather", 64, 2),
        ("v6e:16x16", "all-gather", 256, 4),  # both rings
        ("v6e:16x16", "all-gather", 16, 2),
        ("v6e:8x8", "all-reduce", 64, 2),
        ("v6e:8x8", "all-reduce", 8, 1),
        ("v5p:4x4x4", "all-reduce", 64, 3),
        ("v5p:4x4x4", "all-reduce", 16, 2),
        ("v5e:4x4", "reduce-scatter", 4, 2),
    ],
)
def test_collectives_take_the_schedulers_time(topology, op, group, lanes):
    """The operands that libtpu's scheduler was seen to give its costs for."""
    operand = 1e9
    sent = hlo.WIRE[op](operand / group if op == "all-gather" else operand, group)
    transfer = hlo.Transfer("a", op, "f32[]", sent, group, 1, 0, False, False, "", 0, 0)
    whole = 2 * operand if op == "all-reduce" else operand
    link = pods.CHIPS[pods.kind(topology)].link
    assert timing.seconds(transfer, topology) == pytest.approx(whole / (lanes * link))
