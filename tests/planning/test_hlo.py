"""Costs read from a compiled program's text: from texts written here, and from one that the TPU
compiler writes."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P
from support.tpu import libtpu

from clipx.errors import HloError
from clipx.parallel.chips import parse
from clipx.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from clipx.planning import hlo
from clipx.planning.hlo_text import size

CONFIG = 'backend_config={"window_config":{"estimated_cycles":"%d"}}'
KERNEL = (
    'custom-call(%%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attend"}, '
    'backend_config={"custom_call_config":{"body":"(((",%s"needs_layout_passes":true}}'
)
ESTIMATE = '"cost_estimate":{"flops":"%d","transcendentals":"%d","bytes_accessed":"%d"},'


def program(entry: str, rest: str = "") -> hlo.Program:
    """A program whose entry computation has a parameter x: f32[8,128] and these lines. rest: other
    computations."""
    lines = "\n".join(f"  {line}" for line in entry.strip().splitlines())
    head = "ENTRY %main (x: f32[8,128]) -> f32[8,128] {\n  %x = f32[8,128]{1,0} parameter(0)\n"
    return hlo.read(f"HloModule m, is_scheduled=true\n\n{rest}\n\n{head}{lines}\n}}\n")


def loop(start: int, stop: str, step: int = 1, compare: str = "LT", body: str = "") -> str:
    """The condition and body of a loop whose state is (counter, x, bound)."""
    state = "(s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)S(1)}, /*index=2*/s32[])"
    return f"""
%body (p.1: (s32[], f32[8,128], s32[])) -> (s32[], f32[8,128], s32[]) {{
  %p.1 = {state} parameter(0)
  %one = s32[] constant({step})
  %i = s32[] get-tuple-element(%p.1), index=0
  %i.copy = s32[] copy(%i)
  %y = f32[8,128]{{1,0}} get-tuple-element(%p.1), index=1
  %bound = s32[] get-tuple-element(%p.1), index=2
  %next = s32[] add(%i.copy, %one)
  {body or "%z = f32[8,128] negate(%y), " + CONFIG % 10}
  ROOT %out = {state} tuple(%next, %z, %bound)
}}

%cond (p.2: (s32[], f32[8,128], s32[])) -> pred[] {{
  %p.2 = {state} parameter(0)
  %stop = s32[] {stop}
  %j = s32[] get-tuple-element(%p.2), index=0
  ROOT %less = pred[] compare(%j, %stop), direction={compare}
}}
"""


WHILE = """
%zero = s32[] constant({0})
%nine = s32[] constant(9)
%data = s32[] reduce(%x)
%t = (s32[], f32[8,128], s32[]) tuple(%zero, %x, %nine)
ROOT %w = (s32[], f32[8,128], s32[]) while(%t), condition=%cond, body=%body{1}
"""


@pytest.mark.parametrize(
    "start, stop, known, trips",
    [
        (0, "constant(7)", "", 7),
        (2, "constant(7)", "", 5),
        (0, "constant(7)", ', backend_config={"known_trip_count":{"n":"4"}}', 4),
        (2, "get-tuple-element(%p.2), index=2", "", 7),  # an element that no iteration changes
    ],
)
def test_loops(start, stop, known, trips):
    found = program(WHILE.format(start, known), loop(start, stop))
    assert (found.compiler_cycles, found.open_loops) == (10 * trips, ())


def test_loops_that_do_not_count_one_by_one_are_open():
    for kind in ({"step": 2}, {"compare": "GT"}):
        found = program(WHILE.format(0, ""), loop(0, "constant(7)", **kind))
        assert found.open_loops == ("w",)


def test_loops_whose_length_the_data_tell_count_once():
    entry = WHILE.format(0, "").replace("%nine)", "%data)")
    found = program(entry, loop(0, "get-tuple-element(%p.2), index=2"))
    assert (found.compiler_cycles, found.open_loops) == (10, ("w",))


def test_a_counter_that_is_copied_counts():
    """The compiler may move the counter to other memory and back, before the loop and inside it."""
    entry = WHILE.format(0, "").replace("tuple(%zero", "tuple(%zero.done")
    copies = "  %{0}.start = (s32[], s32[], u32[]) copy-start(%{0})\n"
    copies += "  %{0}.done = s32[] copy-done(%{0}.start)\n"
    entry = entry.replace("%nine =", copies.format("zero") + "%nine =")
    copying = loop(0, "constant(7)").replace("tuple(%next", "tuple(%next.done")
    copying = copying.replace("  ROOT %out", copies.format("next") + "  ROOT %out")
    found = program(entry, copying)
    assert (found.compiler_cycles, found.open_loops) == (70, ())


def test_nested_loops_multiply():
    inner = WHILE.format(0, ', backend_config={"known_trip_count":{"n":"3"}}').strip()
    inner = inner.replace("ROOT ", "").replace("%x", "%y").replace("%body", "%leaf")
    inner = inner.replace("\n", "\n  ") + "\n  %z = f32[8,128] get-tuple-element(%w), index=1"
    leaf = "\n%leaf (q: f32[8,128]) -> f32[8,128] {\n  %q = f32[8,128] parameter(0)\n"
    leaf += "  ROOT %n = f32[8,128] negate(%q), " + CONFIG % 10 + "\n}\n"
    found = program(WHILE.format(0, ""), leaf + loop(0, "constant(7)", body=inner))
    assert found.compiler_cycles == 3 * 7 * 10


CALLED = f"""
%small (q: f32[8,128]) -> f32[8,128] {{
  %q = f32[8,128] parameter(0)
  ROOT %n = f32[8,128] negate(%q), {CONFIG % 10}
}}

%large (q: f32[8,128]) -> f32[8,128] {{
  %q = f32[8,128] parameter(0)
  ROOT %n = f32[8,128] negate(%q), {CONFIG % 30}
}}
"""


@pytest.mark.parametrize(
    "line, cycles",
    [
        ("negate(%x), " + CONFIG % 5, 5),
        ("fusion(%x), kind=kLoop, calls=%large, " + CONFIG % 5, 5),  # %large is not added
        ("fusion(%x), kind=kCustom, calls=%large", 30),
        ("call(%x), to_apply=%large", 30),
        ("conditional(%p, %x, %x), branch_computations={%small, %large}", 30),
        ("conditional(%p, %x, %x), true_computation=%large, false_computation=%small", 30),
        ("negate(%x)", 0),
    ],
)
def test_calls(line, cycles):
    assert program(f"ROOT %y = f32[8,128] {line}", CALLED).compiler_cycles == cycles


def test_what_sparse_cores_do_is_listed_and_not_timed():
    start = 'async-start(%x), async_execution_thread="sparsecore", calls=%large'
    found = program(
        f"%a = ((f32[8,128]), f32[8,128]) {start}\nROOT %y = f32[8,128] copy(%x)", CALLED
    )
    assert [o.name for o in found.beside] == ["a"] and found.compiler_cycles == 0


def test_kernels_are_charged_what_takes_longer():
    """FLOPs at half of the peak, or bytes at full bandwidth; at least the bytes of operands and
    results."""
    chip = {"peak": 200.0, "bandwidth": 4.0}
    moved = 2 * 8 * 128 * 4
    for flops, declared, seconds in (
        (10**6, 0, 10**6 / 100),
        (1, 10**5, 10**5 / 4),
        (1, 0, moved / 4),
    ):
        line = "ROOT %k = f32[8,128]{1,0} " + KERNEL % (ESTIMATE % (flops, 0, declared))
        found = program(line)
        (kernel,) = found.kernels
        assert kernel.source == "jit(f)/attend"
        assert found.charged_seconds(**chip) == pytest.approx(seconds)
        assert found.seconds(**chip, clock=1.0) == pytest.approx(seconds)


def test_a_kernel_that_declares_nothing_is_an_error():
    with pytest.raises(HloError, match=r"%k \(jit\(f\)/attend\) declares no FLOPs"):
        program("ROOT %k = f32[8,128]{1,0} " + KERNEL % "")


@pytest.mark.parametrize(
    "type_, expected",
    [
        ("f32[8,128]{1,0:T(8,128)}", 4096),
        ("bf16[2,197,64]{2,1,0:T(8,128)(2,1)}", 2 * 200 * 128 * 2),
        ("bf16[2,197,64]{1,2,0:T(8,128)(2,1)S(1)}", 2 * 256 * 64 * 2),
        ("(f32[3]{0:T(128)}, /*index=1*/pred[]{:T(512)}, s4[16])", 512 + 1 + 8),
        ("f32[3,5]", 60),
        ("token[]", 0),
    ],
)
def test_size_pads_tiles(type_, expected):
    assert size(type_) == expected


@pytest.mark.parametrize(
    "line, kind, group, size",
    [
        ("f32[8,128] all-reduce(%x), replica_groups={{0,1},{2,3}}", "all-reduce", 2, 4096),
        ("f32[32,128] all-gather(%x), replica_groups=[2,4]<=[8]", "all-gather", 4, 4 * 4096),
        (
            "(f32[8,128], f32[16,128]) all-gather-start(%x), replica_groups={{0,1}}",
            *("all-gather", 2, 2 * 4096),
        ),
        (
            "f32[2,128] reduce-scatter(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}",
            *("reduce-scatter", 4, 4096),
        ),
        (
            "(f32[8,128], f32[8,128], u32[]) collective-permute-start(%x), "
            "source_target_pairs={{0,1},{1,0}}",
            *("collective-permute", 2, 4096),
        ),
        ("(f32[8,128], u32[], token[]) send(%x), channel_id=2", "send", 1, 4096),
    ],
)
def test_collectives(line, kind, group, size):
    type_, _, rest = line.partition(f" {kind}")
    found = program(f"%c = {type_} {kind}{rest}\n%d = f32[8,128] {kind}-done(%c)")
    assert found.traffic() == {(kind, group): (1, size)}


def test_collectives_in_loops_and_fusions():
    inside = "%z = f32[8,128] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, " + CONFIG % 10
    called = """
%all-reduce-scatter.1 (q: f32[8,128]) -> f32[4,128] {
  %q = f32[8,128] parameter(0)
  %r = f32[8,128] all-reduce(%q), replica_groups={{0,1}}
  ROOT %s = f32[4,128] dynamic-slice(%r)
}
"""
    found = program(WHILE.format(0, ""), called + loop(0, "constant(7)", body=inside))
    assert found.traffic() == {("reduce-scatter", 2): (7, 7 * 4096)}
    assert found.compiler_cycles == 70


def test_a_collective_that_fusions_carry_along_is_one():
    """Each fusion holds a copy of the collective, and has an estimate of its own."""
    gather = "all-gather(%q), replica_groups={{0,1}}, channel_id=1"
    chain = 'frontend_attributes={chain_id="%d"}'
    called, lines = "", []
    for i, place in enumerate((0, 0, 1, 0)):
        called += f"""
%part.{i} (q: f32[8,128]) -> f32[16,128] {{
  %q = f32[8,128] parameter(0)
  ROOT %g = f32[16,128] {gather}, {chain % place}
}}
"""
        fusion = f"fusion(%x), kind=kCustom, calls=%part.{i}"
        lines.append(f"%f.{i} = f32[16,128] {fusion}, {CONFIG % 10}")
    found = program("\n".join(lines), called)
    assert found.traffic() == {("all-gather", 2): (2, 2 * 16 * 128 * 4)}
    assert found.compiler_cycles == 40


def test_a_collective_that_overlaps_with_a_loop_is_one():
    """The collective begins before the loop, continues in a fusion of the loop's body, and ends
    after the loop."""
    gather = "%g = f32[16,128] all-gather(%q), replica_groups={{0,1}}, channel_id=1, "
    gather += 'frontend_attributes={chain_id="0"}'
    parts = "".join(
        f"%{name} (q: f32[8,128]) -> f32[16,128] {{\n  %q = f32[8,128] parameter(0)\n  {gather}\n"
        f'  ROOT %r = f32[16,128] custom-call(%g), custom_call_target="{target}"\n}}\n\n'
        for name, target in (
            *(("first", "AsyncCollectiveStart"), ("among", "Other")),
            ("last", "AsyncCollectiveDone"),
        )
    )
    body = "%z = f32[8,128] fusion(%y), kind=kCustom, calls=%among, " + CONFIG % 10
    entry = "%a = f32[16,128] fusion(%x), kind=kCustom, calls=%first" + WHILE.format(0, "")
    entry += "%b = f32[16,128] fusion(%x), kind=kCustom, calls=%last"
    found = program(entry, parts + loop(0, "constant(7)", body=body))
    assert found.traffic() == {("all-gather", 2): (1, 2 * 4096)}
    assert found.compiler_cycles == 70


def test_no_program():
    with pytest.raises(HloError, match="no ENTRY"):
        hlo.read("nothing of the kind")


@libtpu
def test_what_the_compiler_writes():
    """A kernel in a loop of three iterations on a mesh, and the all-reduce of a sum over rows."""
    mesh = make_mesh(MeshConfig(), parse("v5e:2x2").devices())

    def double(x, y):
        y[...] = 2 * x[...]

    def kernel(x):
        cost = pl.CostEstimate(flops=x.size, bytes_accessed=0, transcendentals=0)
        return pl.pallas_call(double, jax.typeof(x), cost_estimate=cost)(x)

    def fn(x):
        def local(x):
            return jax.lax.scan(lambda x, _: (jnp.tanh(kernel(x)), None), x, length=3)[0]

        rows = P("data")
        x = jax.shard_map(local, in_specs=rows, out_specs=rows, check_vma=False)(x)
        return jnp.sum(x, axis=0)

    x = jax.ShapeDtypeStruct((4 * 512, 256), jnp.float32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = hlo.read(jax.jit(fn).lower(x).compile().as_text())
    assert [(k.times, k.flops, k.bytes) for k in found.kernels] == [
        (3, 512 * 256, 2 * 512 * 256 * 4)
    ]
    assert found.traffic() == {("all-reduce", 4): (1, 256 * 4)}
    tanh = [o for o in found.operations if "tanh" in o.source]
    assert [o.times for o in tanh] == [3] and tanh[0].cycles > 1000
    assert not found.open_loops
