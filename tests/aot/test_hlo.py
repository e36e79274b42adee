"""The reader of compiled programs against programs whose traffic, products and values are known."""

from dataclasses import astuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rynnvla_jax.aot import hlo

HEADER = "HloModule test, is_scheduled=true, num_partitions=8\n"
SUM = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""
REDUCE = "all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum"
KB = 1024.0  # f32[16,16]
REDUCED = 2 * KB * 3 / 4  # what a device sends for an all-reduce of it among four


def entry(*lines: str, argument: str = "f32[16,16]") -> str:
    """An entry computation with an argument %x."""
    body = "\n".join(f"  {line}" for line in (f"%x = {argument} parameter(0)", *lines))
    return f"\nENTRY %main (x: {argument}) -> f32[] {{\n{body}\n}}\n"


def loop(
    *lines: str, start: int = 0, step: int = 1, limit: str = "8", test: str = "compare(%i, %n), direction=LT", tag=""
) -> tuple[str, str]:
    """A loop over (counter, %x, limit) with `lines` in its body: its computations, and the lines that run it."""
    carried = "(s32[], f32[16,16], s32[])"
    inside = "\n".join(f"  {line}" for line in lines)
    computations = f"""
%body{tag} (p: {carried}) -> {carried} {{
  %p = {carried} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[16,16] get-tuple-element(%p), index=1
  %n = s32[] get-tuple-element(%p), index=2
{inside}
  %by = s32[] constant({step})
  %next = s32[] add(%i, %by)
  ROOT %out = {carried} tuple(%next, %x, %n)
}}

%cond{tag} (p: {carried}) -> pred[] {{
  %p = {carried} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=2
  ROOT %less = pred[] {test}
}}
"""
    run = f"""%start{tag} = s32[] constant({start})
  %limit{tag} = s32[] {limit if "(" in limit else f"constant({limit})"}
  %first{tag} = {carried} tuple(%start{tag}, %x, %limit{tag})
  %loop{tag} = {carried} while(%first{tag}), condition=%cond{tag}, body=%body{tag}"""
    return computations, run


def test_nothing_without_collectives():
    found = hlo.collectives(HEADER + entry("ROOT %y = f32[16,16] add(%x, %x)"))
    assert (found.total, found.synchronous_total, found.dcn, found.by_kind) == (0, 0, 0, {})


@pytest.mark.parametrize(
    ("op", "sent"),
    [
        ("f32[16,16] all-reduce(%x), to_apply=%sum, replica_groups={{0,1,2,3},{4,5,6,7}}", 2 * KB * 3 / 4),
        ("f32[16,16] all-reduce(%x), to_apply=%sum, replica_groups={}", 2 * KB * 7 / 8),
        ("f32[16,16] all-reduce(%x), to_apply=%sum, replica_groups=[4,2]<=[2,4]T(1,0)", KB),
        ("f32[128,16] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", 8 * KB * 7 / 8),
        ("f32[64,16] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", 4 * KB * 3 / 4),
        ("f32[32,16] all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", 2 * KB / 2),
        ("f32[4,16] reduce-scatter(%x), to_apply=%sum, replica_groups={{0,1,2,3}}, dimensions={0}", KB * 3 / 4),
        ("f32[16,16] all-to-all(%x), replica_groups={{0,1},{2,3}}, dimensions={0}", KB / 2),
        ("f32[16,16] collective-permute(%x), source_target_pairs={{0,1},{1,0}}", KB),
        ("f32[16,16] collective-permute(%x), source_target_pairs={{0,0},{1,1}}", 0),
        ("f32[16,16] all-reduce(%x), to_apply=%sum, replica_groups={{0},{1}}", 0),
    ],
)
def test_bytes_on_the_wire(op, sent):
    found = hlo.collectives(HEADER + SUM + entry(f"ROOT %y = {op}"))
    assert found.total == found.synchronous_total == sent
    assert list(found.by_kind) == ([op.split("(")[0].split()[1]] if sent else [])


@pytest.mark.parametrize(
    ("loop_of", "turns"),
    [
        ({}, 8),
        ({"start": 2, "step": 4, "limit": "9"}, 2),
        ({"test": "compare(%n, %i), direction=GE"}, 9),
        ({"start": 10, "step": -3, "limit": "0", "test": "compare(%i, %n), direction=GT"}, 4),
        ({"limit": "2", "start": 5}, 0),
        ({"limit": "6", "step": 2, "test": "compare(%i, %n), direction=NE"}, 3),
    ],
)
def test_loops_multiply(loop_of, turns):
    computations, run = loop(f"%y = f32[16,16] {REDUCE}", **loop_of)
    found = hlo.collectives(HEADER + SUM + computations + entry(run))
    assert found.total == turns * REDUCED
    assert found.counts == {"all-reduce": turns}


def test_the_compilers_own_trip_count_counts():
    computations, run = loop(f"%y = f32[16,16] {REDUCE}", limit="get-tuple-element(%unknown), index=0")
    run += ', backend_config={"known_trip_count":{"n":"5"}}'
    unknown = '%unknown = (s32[], f32[16,16]) custom-call(%x), custom_call_target="limit"'
    assert hlo.collectives(HEADER + SUM + computations + entry(unknown, run)).total == 5 * REDUCED


def test_nested_loops_and_a_fusion_with_two_callers():
    inner, run_inner = loop(f"%y = f32[16,16] {REDUCE}", limit="3", tag="_in")
    product = """
%product (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16] parameter(0)
  ROOT %d = f32[16,16] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    fused = "f32[16,16] fusion(%x), kind=kOutput, calls=%product"
    outer, run = loop(run_inner, f"%f = {fused}", f"%y = f32[16,16] {REDUCE}", limit="4")
    text = HEADER + SUM + product + inner + outer + entry(run, f"%f = {fused}")
    assert hlo.collectives(text).total == (4 * 3 + 4) * REDUCED
    assert hlo.dot_flops(text) == (4 + 1) * 2 * 16**3


DOT = "%d = f32[16,16] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
KERNEL = '%d = f32[16,16] custom-call(%x), custom_call_target="tpu_custom_call"'
START = "%s = (f32[16,16], f32[64,16]) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}"
DONE = "%g = f32[64,16] all-gather-done(%s)"
ELEMENTWISE = "%e = f32[16,16] add(%x, %x)"


@pytest.mark.parametrize(
    ("schedule", "products"),
    [
        ([START, DONE, DOT], 0),
        ([START, ELEMENTWISE, DONE, DOT], 0),
        ([DOT, START, DONE], 0),
        ([START, DOT, DONE], 1),
        ([START, DOT, KERNEL.replace("%d ", "%k "), DONE], 2),
    ],
)
def test_a_start_and_done_hide_a_collective_only_behind_products(schedule, products):
    computations, run = loop(*schedule)
    text = HEADER + computations + entry(run)
    found = hlo.collectives(text)
    assert found.by_kind == {"all-gather": 8 * 3 * KB}
    assert found.synchronous == ({} if products else {"all-gather": 8 * 3 * KB})
    (line,) = hlo.overlap(text)
    assert "all-gather f32[64,16]" in line
    assert ("synchronous" in line) == (products == 0)
    assert not products or f"{products} product" in line


def test_a_collective_may_hide_behind_a_loop_and_in_an_async_computation():
    computations, run = loop(DOT, limit="3")
    wrapped = """
%wrapped (p: f32[16,16]) -> f32[16,16] {
  %p = f32[16,16] parameter(0)
  ROOT %r = f32[16,16] all-to-all(%p), replica_groups={{0,1}}, dimensions={0}
}
"""
    start = "%s = ((f32[16,16]), f32[16,16], u32[]) async-start(%x), calls=%wrapped"
    update = "%u = ((f32[16,16]), f32[16,16], u32[]) async-update(%s)"
    text = HEADER + computations + wrapped + entry(start, run, update, "%r = f32[16,16] async-done(%u)")
    (found,) = hlo.transfers(text)
    assert (found.kind, found.wire, found.products) == ("all-to-all", KB / 2, 3)
    assert hlo.overlap(text) == []  # it is in no loop itself


def test_a_collective_of_a_sparsecore_is_counted_behind_its_calls():
    """As libtpu 0.0.42 writes a reduce-scatter that SparseCores run beside the products."""
    scatter = """
%called (p: f32[16,16], t: token[]) -> f32[4,16] {
  %t = token[] parameter(1)
  %p = f32[16,16] parameter(0)
  ROOT %r = f32[4,16] reduce-scatter(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%sum
}, execution_thread="sparsecore"
"""
    wrapped = """
%wrapped (p: f32[16,16], t: token[]) -> f32[4,16] {
  %t = token[] parameter(1)
  %p = f32[16,16] parameter(0)
  ROOT %c = f32[4,16] call(%p, %t), to_apply=%called
}, execution_thread="sparsecore"
"""
    start = "%s = ((f32[16,16], token[]), f32[4,16]) "
    token = "%t = token[] after-all()"
    behind = 'async-start(%x, %t), async_execution_thread="sparsecore", calls=%wrapped'
    direct = 'call-start(%x, %t), async_execution_thread="sparsecore", to_apply=%called'
    for call, done in ((behind, "async-done"), (direct, "call-done")):
        computations, run = loop(token, start + call, DOT, f"%e = f32[4,16] {done}(%s)", limit="3")
        text = HEADER + SUM + scatter + wrapped + computations + entry(run)
        (found,) = hlo.transfers(text)
        assert (found.kind, found.wire, found.times, found.products) == ("reduce-scatter", KB * 3 / 4, 3, 1)
        assert hlo.dot_flops(text) == 3 * 2 * 16**3


def test_a_tpu_collective_spread_over_fusions_counts_once():
    def part(name: str, target: str | None) -> str:
        call = f'custom-call(%g), custom_call_target="{target}"' if target else "add(%d, %d)"
        return f"""
%{name} (x: f32[16,16]) -> f32[64,16] {{
  %x = f32[16,16] parameter(0)
  {ELEMENTWISE if target else DOT}
  %g = f32[64,16] all-gather(%x), channel_id=7, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, \
backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}
  ROOT %r = f32[64,16] {call}
}}
"""

    parts = part("begin", "AsyncCollectiveStart") + part("compute", None) + part("end", "AsyncCollectiveDone")
    runs = [f"%{name}.0 = f32[64,16] fusion(%x), kind=kOutput, calls=%{name}" for name in ("begin", "compute", "end")]
    computations, run = loop(*runs, limit="2")
    (found,) = hlo.transfers(HEADER + parts + computations + entry(run))
    assert (found.kind, found.wire, found.times, found.products) == ("all-gather", 3 * KB, 2, 1)
    with pytest.raises(ValueError, match="nothing starts.*channel_id=7"):
        hlo.transfers(HEADER + part("compute", None) + entry(runs[1]))


def test_a_tpu_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    fused = """
%all-reduce-scatter (x: f32[16,16], i: s32[]) -> f32[4,16] {
  %x = f32[16,16] parameter(0)
  %i = s32[] parameter(1)
  %r = f32[16,16] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %s = f32[4,16] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,16}
}
"""
    run = "%y = f32[4,16] fusion(%x, %i), kind=kCustom, calls=%all-reduce-scatter"
    found = hlo.collectives(HEADER + SUM + fused + entry("%i = s32[] constant(0)", run))
    assert found.by_kind == found.synchronous == {"reduce-scatter": KB * 3 / 4}


@pytest.mark.parametrize(("between", "exposed"), [(DOT, 0.0), (ELEMENTWISE, 2 * KB * 2 / 3)])
def test_what_leaves_the_slice_is_counted_apart(between, exposed):
    note = (
        "channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
        '"xla_megascale_runtime",_xla_megascale_target="{1,2,3}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = HEADER + entry(
        "%t = token[] after-all()",
        f"%s = (f32[16,16], u32[], token[]) send(%x, %t), {note}",
        f"%r = (f32[16,16], u32[], token[]) recv(%t), {note}",
        between,
        f"%sd = token[] send-done(%s), {note}",
        f"%rd = (f32[16,16], token[]) recv-done(%r), {note}",
        # What goes to the host of the device is on no wire.
        "%h = (f32[16,16], u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true",
    )
    found = hlo.collectives(text)
    assert (found.dcn, found.dcn_synchronous) == (2 * KB * 2 / 3, exposed)
    assert found.total == 0
    with pytest.raises(ValueError, match="between slices.*GOSSIP"):
        hlo.collectives(text.replace("ALL_REDUCE", "GOSSIP"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("%y = q7[16] all-gather(%z), replica_groups={{0,1}}", "element type q7 .*%z = q7"),
        ("%y = f32[16] all-shuffle(%x), replica_groups={{0,1}}", "not known: %y = .*all-shuffle"),
        ("%y = f32[16,16] all-reduce(%x), replica_groups=circle", "replica groups.*circle"),
        ("%y = f32[16] add(%x", "cut off: .*%y = "),
        ("a line of another language", "not an operation: .*another language"),
    ],
)
def test_what_cannot_be_read_is_named(line, message):
    with pytest.raises(ValueError, match=message):
        hlo.collectives(HEADER + entry("%z = q7[16] custom-call()", line))


def test_a_loop_of_unknown_length_matters_only_with_traffic_in_it():
    limit = "get-tuple-element(%pair), index=0"
    pair = '%pair = (s32[], f32[16,16]) custom-call(%x), custom_call_target="limit"'
    quiet, run = loop(ELEMENTWISE, limit=limit)
    assert hlo.collectives(HEADER + quiet + entry(pair, run)).total == 0
    loud, run = loop(f"%y = f32[16,16] {REDUCE}", limit=limit)
    with pytest.raises(ValueError, match="turns.*%loop = "):
        hlo.collectives(HEADER + SUM + loud + entry(pair, run))


def test_only_whole_schedules_are_read():
    with pytest.raises(ValueError, match="as_text"):
        hlo.collectives("HloModule test\n" + entry())
    with pytest.raises(ValueError, match="cut off"):
        hlo.collectives(HEADER + entry().rstrip("}\n"))


def test_values_that_share_memory_are_one():
    carried = "(s32[], f32[64,16])"
    body = f"""
%fill (b: f32[64,16], i: s32[]) -> f32[64,16] {{
  %b = f32[64,16] parameter(0)
  %i = s32[] parameter(1)
  %zero = f32[1,16] constant({{...}})
  ROOT %u = f32[64,16] dynamic-update-slice(%b, %zero, %i, %i), metadata={{op_name="jit(f)/jvp(mlp)/while/body/set"}}
}}

%body (p: {carried}) -> {carried} {{
  %p = {carried} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %b = f32[64,16] get-tuple-element(%p), index=1
  %filled = f32[64,16] fusion(%b, %i), kind=kLoop, calls=%fill
  %vmem = f32[999,16]{{1,0:T(8,128)S(1)}} custom-call(), custom_call_target="scratch"
  ROOT %out = {carried} tuple(%i, %filled)
}}

%cond (p: {carried}) -> pred[] {{
  %p = {carried} parameter(0)
  ROOT %yes = pred[] constant(true)
}}
"""
    argument = """%w = f32[32,16] parameter(1), metadata={op_name="params[\\'mlp\\'][\\'w\\']"}"""
    text = (
        HEADER
        + body
        + entry(
            argument,
            "%i = s32[] constant(0)",
            "%empty = f32[64,16] broadcast(%i), dimensions={}",
            f"%first = {carried} tuple(%i, %empty)",
            f"%loop = {carried} while(%first), condition=%cond, body=%body",
            "%b = f32[64,16] get-tuple-element(%loop), index=1",
            '%y = f32[32,16] negate(%w), metadata={op_name="jit(f)/transpose(jvp(mlp))/neg"}',
            "ROOT %both = (f32[64,16], f32[32,16]) tuple(%b, %y)",
        )
    )
    text = text.replace("num_partitions", "input_output_alias={ {1}: (1, {}, may-alias) }, num_partitions")
    first, second, third, *_ = hlo.largest_buffers(text)
    assert astuple(first)[:5] == (4096, "f32[64,16]", "filled", "mlp/set (forward)", False)
    assert astuple(second)[:5] == (2048, "f32[32,16]", "w", "params/mlp/w", True)
    assert third.bytes == 1024
    assert hlo.largest_buffers(text, 1) == [first]


@pytest.fixture(scope="module")
def compiled() -> str:
    """Five layers of every kind of collective on a mesh of two by four, as XLA compiles them for the CPU."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def layers(w, x):
        def layer(x, w):
            with jax.named_scope("mlp"):
                y = x @ jax.lax.all_gather(w, "b", axis=0, tiled=True)
            y = jax.lax.ppermute(jax.lax.psum(y, "a"), "b", [(i, (i + 1) % 4) for i in range(4)])
            parts = jax.lax.psum_scatter(y, "b", scatter_dimension=0, tiled=True)
            return jnp.sin(y) * parts.sum() + jax.lax.all_to_all(y, "b", 0, 1, tiled=True).sum(), None

        return jax.lax.scan(layer, x, w)[0]

    mapped = jax.shard_map(layers, mesh=mesh, in_specs=(P(None, "b"), P("a")), out_specs=P("a"), check_vma=False)
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, P(None, "b")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    return jax.jit(mapped).lower(w, x).compile().as_text()


def test_a_program_of_xla(compiled):
    found = hlo.collectives(compiled)
    x = 8 * 64 * 4  # bytes of a device's rows
    assert found.by_kind == {
        "all-gather": 5 * 64 * 64 * 4 * 3 / 4,
        "all-reduce": 5 * 2 * x / 2,
        "collective-permute": 5 * x,
        "reduce-scatter": 5 * x * 3 / 4,
        "all-to-all": 5 * x * 3 / 4,
    }
    assert found.counts == dict.fromkeys(found.by_kind, 5)
    assert hlo.dot_flops(compiled) == 5 * 2 * 8 * 64 * 64


def test_sources_are_scopes_or_functions(compiled):
    sources = {t.kind: t.source for t in hlo.transfers(compiled)}
    assert sources["all-gather"] == "mlp/all_gather"
    assert sources["collective-permute"].endswith("compiled/ppermute")  # the function around


def test_arguments_lead_the_largest_values(compiled):
    weights, *others = hlo.largest_buffers(compiled)
    assert (weights.bytes, weights.source, weights.argument) == (5 * 16 * 64 * 4, "w", True)
    gathered = next(b for b in others if b.source == "mlp/all_gather")
    assert gathered.shape == "f32[64,64]" and not gathered.argument


@pytest.mark.parametrize(
    "settings", [{}, {"window_strides": (2, 3)}, {"lhs_dilation": (3, 2)}, {"rhs_dilation": (2, 2)}]
)
def test_products_of_convolutions(settings):
    """Padding and holes are no work: a convolution of ones counts the products that are."""
    settings = {"window_strides": (1, 1), **settings}

    def convolve(x, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, padding=((2, 1), (0, 3)), dimension_numbers=numbers, **settings)

    x, w = jnp.ones((2, 9, 7, 4)), jnp.ones((3, 5, 4, 6))
    wanted = 2 * float(np.asarray(convolve(x, w)).sum())
    assert hlo.dot_flops(jax.jit(convolve).lower(x, w).compile().as_text()) == wanted
