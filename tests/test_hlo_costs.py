"""Costs of compiled programs: written by hand for what TPUs make of them, and counted for programs compiled here."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dgpo_jax.costs.hlo import Array, arrays_of, parse
from dgpo_jax.costs.hlo_costs import costs, trip_count
from dgpo_jax.sharding import make_mesh

# A loop that multiplies by a 4x4 matrix; ENTRY and CONDITION are filled in.
LOOP = """
%body (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[4,4]{1,0}) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %bound = s32[]{:T(128)} CONDITION
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %start = (s32[], f32[4,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,4]{1,0}) while(%start), condition=%condition, body=%body, NOTE
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%loop), index=1
}
"""
ONE_PRODUCT = 2 * 4 * 4 * 4


def loop(bound="constant(7)", start="0", note='metadata={op_name="jit(f)/while"}'):
    return parse(LOOP.replace("CONDITION", bound).replace("START", start).replace("NOTE", note))


def entry(*lines, more=""):
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"{more}\nENTRY %main (a: f32[8]) -> f32[8] {{\n{body}\n}}\n")


@pytest.mark.parametrize("module, products", [
    (loop(), 7),  # TPU: the bound stands in the condition
    (loop(start="2"), 5),  # two trips were peeled off
    (loop(bound="constant(1)", start="3"), 0),  # never runs
    (loop(note='backend_config={"known_trip_count":{"n":"9"}}'), 9),  # CPU and GPU: XLA notes it
    (loop(bound="parameter(1)"), 50),  # data: as often as the caller says
])
def test_what_is_in_a_loop_counts_as_often_as_the_loop_runs(module, products):
    assert costs(module, unknown_trips=50).products == products * ONE_PRODUCT


@pytest.mark.parametrize("step", [
    "%next = s32[] add(%i, %one), metadata={}\n  %one = s32[] constant(2)",  # unrolled twice: half the trips
    "%next = s32[] add(%half, %half.1)\n  %half = s32[] add(%i, %half.1)\n  %half.1 = s32[] constant(1)",
])
def test_an_unrolled_loop_has_fewer_trips(step):
    text = LOOP.replace("CONDITION", "constant(7)").replace("START", "0").replace("NOTE", "").replace("  %one = s32[] constant(1)\n", "")
    assert costs(parse(text.replace("%next = s32[] add(%i, %one)", step))).products == 4 * ONE_PRODUCT


def test_a_condition_within_a_fusion_is_read():
    text = LOOP.replace("START", "0").replace("NOTE", "").replace(
        "ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT",
        "ROOT %less = pred[] fusion(%bound, %i.1), kind=kLoop, calls=%compared",
    )
    compared = """
%compared (c: s32[], d: s32[]) -> pred[] {
  %c = s32[] parameter(0)
  %d = s32[] parameter(1)
  ROOT %less.1 = pred[] compare(%d, %c), direction=LT
}
"""
    assert costs(parse(compared + text.replace("CONDITION", "constant(6)"))).products == 6 * ONE_PRODUCT


def test_what_a_sparsecore_gathers_counts_by_its_rows_and_its_computation_ends_where_it_says():
    more = """
%async_computation (t: f32[1000,8], j: s32[4]) -> f32[4,8] {
  %t = f32[1000,8]{1,0} parameter(0)
  %j = s32[4]{0} parameter(1)
  ROOT %rows = f32[4,8]{1,0} custom-call(%t, %j), custom_call_target="offload", metadata={op_name="jit(f)/gather" stack_frame_id=1}
}, execution_thread="sparsecore"
"""
    module = entry(
        "%a = f32[1000,8]{1,0} parameter(0)", "%j.1 = s32[4]{0} parameter(1)",
        '%b = ((f32[1000,8], s32[4]), f32[4,8], u32[]) async-start(%a, %j.1), async_execution_thread="sparsecore", calls=%async_computation',
        "ROOT %c = f32[4,8]{1,0} async-done(%b)", more=more,
    )  # fmt: skip
    assert costs(module).bytes == 128 + 16 + 128  # four rows are read, their numbers too, and written


def test_a_loop_whose_length_is_data_is_reported():
    assert costs(loop(bound="parameter(1)")).unknown_loops == 1
    assert costs(loop()).unknown_loops == 0


def test_loops_in_loops_multiply():
    text = LOOP.replace("CONDITION", "constant(7)").replace("START", "0").replace("NOTE", "")
    text = text.replace("ENTRY %main", "%inner").replace("(a: f32[4,4])", "(q: (s32[], f32[4,4]))").replace("%a = f32[4,4]{1,0} parameter(0)", "%a = f32[4,4]{1,0} constant(0)")
    outer = """
ENTRY %main (a.1: f32[4,4]) -> f32[4,4] {
  %a.1 = f32[4,4]{1,0} parameter(0)
  %zero.1 = s32[] constant(0)
  %start.1 = (s32[], f32[4,4]{1,0}) tuple(%zero.1, %a.1)
  ROOT %loop.1 = (s32[], f32[4,4]{1,0}) while(%start.1), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}
"""
    assert costs(parse(text + outer)).products == 3 * 7 * ONE_PRODUCT


@pytest.mark.parametrize("line, flops", [
    # A plain product of [10, 6] and [6, 5], as a convolution without a window.
    ("%y = bf16[10,5] convolution(%l, %r), dim_labels=bf_io->bf", 2 * 10 * 6 * 5),
    # btd,dkh->btkh: two heads as a window of size 2, of which padding lets one meet each number.
    ("%y = bf16[10,2,5] convolution(%l3, %r3), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f", 2 * 10 * 6 * 2 * 5),
    # A real one: 4 numbers, a window of 3, 1 of padding at both ends: 2 + 3 + 3 + 2 products.
    ("%y = f32[1,1,4] convolution(%s, %w), window={size=3 pad=1_1}, dim_labels=bf0_oi0->bf0", 2 * 10),
    # Without padding 2 outputs of 3 products each.
    ("%y = f32[1,1,2] convolution(%s, %w), window={size=3}, dim_labels=bf0_oi0->bf0", 2 * 6),
    # Holes between the numbers (0 1 2 3 at places 0 2 4 6): windows of 3 at 0..4 meet 2, 1, 2, 1, 2.
    ("%y = f32[1,1,5] convolution(%s, %w), window={size=3 lhs_dilate=2}, dim_labels=bf0_oi0->bf0", 2 * 8),
    # Strides: windows at 0 and 1 of places 0..3 with stride 1, only at 0 with stride 2 and one output.
    ("%y = f32[1,1,1] convolution(%s, %w), window={size=3 stride=2}, dim_labels=bf0_oi0->bf0", 2 * 3),
    ("%y = f32[10,5] dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 10 * 6 * 5),
    ('%y = f32[10,5] custom-call(%l, %r), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}', 2 * 10 * 6 * 5),
])
def test_products_of_matrices_are_counted_in_every_form(line, flops):
    module = entry(
        "%l = bf16[10,6]{1,0:T(8,128)(2,1)} parameter(0)", "%r = bf16[6,5]{1,0} parameter(1)",
        "%l3 = bf16[10,6,1]{1,0,2} parameter(2)", "%r3 = bf16[6,2,5]{2,1,0} parameter(3)",
        "%s = f32[1,1,4]{2,1,0} parameter(4)", "%w = f32[1,1,3]{2,1,0} parameter(5)", f"ROOT {line}",
    )  # fmt: skip
    assert costs(module).products == flops


def test_a_splash_kernel_is_counted_by_formula_though_its_attributes_span_lines():
    kernel = (
        "  %splash_mha_fwd_residuals.1 = (f32[4,4]{1,0}, bf16[12,1024,128]{2,1,0}) custom-call(%t, %q, %k, %k),"
        ' custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"block_q": 512\n}}, metadata={op_name="x"}'
    )
    text = (
        "ENTRY %main (t: s8[1]) -> f32[4,4] {\n  %t = s8[1,2,2]{2,1,0} parameter(0)\n  %q = bf16[12,1024,128]{2,1,0} parameter(1)\n"
        f"  %k = bf16[2,2048,128]{{2,1,0}} parameter(2)\n{kernel}\n  ROOT %y = f32[4,4]{{1,0}} dot(%z, %z), lhs_contracting_dims={{1}}\n"
        "  %z = f32[4,4]{1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=0\n}\n"
    )
    module = parse(text)
    whole = 2 * 2 * 12 * 1024 * 2048 * 128 / 2  # two products, half of the scores
    assert costs(module).kernels == whole
    assert costs(module, attended=0.25).kernels == whole / 4  # four sequences in a row
    assert costs(parse(text.replace("%splash_mha_fwd_residuals.1", "%closed_call.1").replace('op_name="x"', 'op_name="a/splash_mha_fwd/b"'))).kernels == whole
    buffer = text.replace("%splash_mha_fwd_residuals.1 =", "%buffer = f32[4] custom-call(), custom_call_target=\"AllocateBuffer\", op_name=\"splash_mha_fwd\"\n  %splash_mha_fwd_residuals.1 =")
    assert costs(parse(buffer)).kernels == whole  # not every call with the name is the kernel
    assert costs(module).products == ONE_PRODUCT  # what comes behind those lines is read too


@pytest.mark.parametrize("name, share, flops, moved", [
    # 3 rows, 2 key heads, 6 queries each, 128 wide; a cache of 28 layers, 4 rows, 256 slots.
    ("decode_attention", 1.0, 2 * 2 * 3 * 2 * 6 * 128 * 256, 2 * (3 * 2 * 256 * 128 * 2) + 2 * (3 * 2 * 6 * 128 * 2)),
    ("decode_attention", 0.5, 2 * 2 * 3 * 2 * 6 * 128 * 128, 2 * (3 * 2 * 128 * 128 * 2) + 2 * (3 * 2 * 6 * 128 * 2)),
    ("write_to_cache", 0.5, 0, 2 * 2 * (3 * 2 * 16 * 128 * 2)),  # keys and values, read and written, 16 slots each
    ("something_else", 1.0, 0, None),  # nothing is known: all that goes in and comes out
])
def test_kernels_of_decoding_count_what_they_touch_of_the_cache(name, share, flops, moved):
    lines = [
        "%place = s32[4]{0:T(128)S(1)} parameter(0)", "%new = bf16[3,2,128]{2,1,0} parameter(1)",
        "%query = bf16[3,2,6,128]{3,2,1,0} parameter(2)", "%cache = bf16[28,4,2,256,128]{4,3,2,1,0} parameter(3)",
    ]  # fmt: skip
    operands = "%place, %new, %cache" if name == "write_to_cache" else "%place, %query, %cache, %cache"
    call = f'ROOT %y = bf16[3,2,6,128]{{3,2,1,0}} custom-call({operands}), custom_call_target="tpu_custom_call", metadata={{op_name="jit(f)/{name}/x"}}'
    found = costs(entry(*lines, call), attended=share)
    whole = 2 * (28 * 4 * 2 * 256 * 128 * 2) + 2 * (3 * 2 * 6 * 128 * 2)
    assert (found.kernels, found.bytes) == (flops, whole if moved is None else moved)


@pytest.mark.parametrize("line, kind, received", [
    ("all-gather(%a), replica_groups={{0,1},{2,3}}, dimensions={0}", "all-gather", 32),  # one other's 8 floats
    ("all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 3 * 32),
    ("all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}", "all-gather", 3 * 32),
    ("all-gather(%a), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", "all-gather", 7 * 32),
    ("all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 2 * 32 * 3 / 4),
    ("all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add", "all-reduce", 2 * 32 * 3 / 4),
    ("reduce-scatter(%a), replica_groups={{0,1,2,3}}, dimensions={0}", "reduce-scatter", 32 * 3 / 4),
    ("all-to-all(%a), replica_groups={{0,1,2,3}}, dimensions={0}", "all-to-all", 32 * 3 / 4),
    ("collective-permute(%a), source_target_pairs={{0,1},{1,0}}", "collective-permute", 32),
])
def test_a_collective_counts_what_a_device_receives(line, kind, received):
    more = "%add (x: f32[], y: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n  %y = f32[] parameter(1)\n  ROOT %s = f32[] add(%x, %y)\n}\n"
    module = entry("%a = f32[8]{0} parameter(0)", f"ROOT %g = f32[8]{{0}} {line}", more=more)
    assert costs(module).collectives == {kind: received}


def test_an_asynchronous_gather_of_a_tpu_counts_once_and_a_fused_reduce_scatter_as_one():
    config = 'replica_groups={{0,1}}, dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}'
    more = f"""
%begin (b: f32[8]) -> f32[16] {{
  %b = f32[8]{{0}} parameter(0)
  %g.0 = f32[16]{{0}} all-gather(%b), {config}
  ROOT %c.0 = f32[16]{{0}} custom-call(%g.0), custom_call_target="AsyncCollectiveStart"
}}

%end (e: f32[8]) -> f32[16] {{
  %e = f32[8]{{0}} parameter(0)
  %g.1 = f32[16]{{0}} all-gather(%e), {config}
  ROOT %c.1 = f32[16]{{0}} custom-call(%g.1), custom_call_target="AsyncCollectiveDone"
}}

%all-reduce-scatter.1 (f: f32[8]) -> f32[4] {{
  %f = f32[8]{{0}} parameter(0)
  %r = f32[8]{{0}} all-reduce(%f), replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %d = f32[4]{{0}} dynamic-slice(%r, %r), dynamic_slice_sizes={{4}}
}}
"""
    module = entry(
        "%a = f32[8]{0} parameter(0)", "%s = f32[16]{0} fusion(%a), kind=kCustom, calls=%begin",
        "%t = f32[16]{0} fusion(%a), kind=kCustom, calls=%end",
        "ROOT %u = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1", more=more,
    )  # fmt: skip
    assert costs(module).collectives == {"all-gather": 32, "reduce-scatter": 16}


def test_of_a_conditional_the_costliest_branch_counts():
    branch = "%{name} (p.{n}: f32[{n},{n}]) -> f32[{n},{n}] {{\n  %p.{n} = f32[{n},{n}] parameter(0)\n  ROOT %d.{n} = f32[{n},{n}] dot(%p.{n}, %p.{n}), lhs_contracting_dims={{1}}\n}}\n"
    module = entry(
        "%a = f32[8] parameter(0)", "%i = s32[] parameter(1)",
        "ROOT %c = f32[8] conditional(%i, %a, %a), branch_computations={%small, %large}",
        more=branch.format(name="small", n=2) + branch.format(name="large", n=4),
    )  # fmt: skip
    assert costs(module).products == ONE_PRODUCT


FUSIONS = """
%slicing (s: f32[28,100]) -> f32[100] {
  %s = f32[28,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %one = f32[1,100]{1,0} dynamic-slice(%s, %at, %at), dynamic_slice_sizes={1,100}
}

%updating (u: f32[28,100]) -> f32[28,100] {
  %u = f32[28,100]{1,0} parameter(0)
  %new = f32[1,100]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %whole = f32[28,100]{1,0} dynamic-update-slice(%u, %new, %at.1, %at.1)
}
"""


@pytest.mark.parametrize("line, moved", [
    ("fusion(%stack, %i), kind=kLoop, calls=%slicing", (400, 400 + 4)),  # a layer of 28 is read, and written; the index
    ("fusion(%stack, %layer, %i), kind=kLoop, calls=%updating", (400, 400 + 4)),  # a layer is read, and written in place
    ("dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,100}", (400, 400 + 8)),
    ("add(%layer, %layer)", (400, 800)),
    ("copy(%chip)", (0, 400)),  # from the chip's own memory: only the write
    ("bitcast(%stack)", (0, 0)),
])
def test_memory_counts_slices_of_what_is_sliced_and_nothing_of_what_stays_on_the_chip(line, moved):
    shape = "f32[28,100]{1,0}" if "updating" in line or "bitcast" in line else "f32[1,100]{1,0}"
    module = entry(
        "%stack = f32[28,100]{1,0} parameter(0)", "%layer = f32[1,100]{1,0} parameter(1)", "%i = s32[] parameter(2)",
        "%chip = f32[1,100]{1,0:T(1,128)S(1)} parameter(3)", f"ROOT %y = {shape} {line}", more=FUSIONS,
    )  # fmt: skip
    assert costs(module).bytes == sum(moved)


def test_shapes_are_read_with_layouts_tuples_and_small_types():
    assert arrays_of("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/s4[5]{0}, pred[])") == (
        Array("bf16", (2, 3), 1), Array("s4", (5,)), Array("pred", ()),
    )  # fmt: skip
    assert [array.bytes for array in arrays_of("(bf16[2,3], s4[5], pred[], f8e4m3fn[7])")] == [12, 2.5, 1, 7]
    with pytest.raises(ValueError, match="'what' is unknown"):
        arrays_of("what[2]")[0].bytes  # noqa: B018 -- asking is what fails


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule nothing")


def compiled_costs(function, *arguments):
    return costs(parse(jax.jit(function).lower(*arguments).compile().as_text()))


def test_a_scan_of_products_compiled_here_is_counted_exactly():
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x, weights = jnp.ones((16, 32)), jnp.ones((11, 32, 32))
    once = 11 * 2 * 16 * 32 * 32
    assert compiled_costs(layers, x, weights).products == once
    # Backward, each product gives two: for its input and its weight.
    assert compiled_costs(jax.grad(lambda w: layers(x, w).sum()), weights).products == pytest.approx(3 * once, rel=0.1)
    assert compiled_costs(jax.grad(lambda x, w: layers(x, w).sum(), argnums=(0, 1)), x, weights).products == 3 * once


def test_scans_within_scans_compiled_here_are_counted_exactly():
    def twice(x, weights):
        return jax.lax.scan(lambda x, ws: (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], None), x, weights)[0]

    assert compiled_costs(twice, jnp.ones((16, 32)), jnp.ones((5, 7, 32, 32))).products == 5 * 7 * 2 * 16 * 32 * 32


def test_a_gather_in_a_scan_compiled_here_counts_at_every_trip():
    mesh = make_mesh(1, 8, 1)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec(None, "fsdp")), out_specs=PartitionSpec(), check_vma=False)
    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", tiled=True)), None), x, weights)[0]

    found = compiled_costs(layers, jnp.ones((16, 32)), jnp.ones((9, 32, 32)))
    assert found.collectives == {"all-gather": 9 * 7 * (4 * 32 * 4)}  # of seven others, four rows of 32 floats
    assert found.products == 9 * 2 * 16 * 32 * 32


def test_a_loop_over_data_is_not_guessed():
    module = parse(jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, jnp.ones((8, 8)))).lower(3).compile().as_text())
    loops = [(c, i) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"]
    assert [trip_count(module, *found) for found in loops] == [None]
