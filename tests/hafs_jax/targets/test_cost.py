"""Bytes, products, loops and sorts read from the text of compiled programs: written by hand, and by XLA for a CPU."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from hafs_jax.base.errors import UserError
from hafs_jax.targets.cost import Branch, Kernel, Loop, Schedule, schedule
from hafs_jax.targets.gpus import GPUS, Gpu, gpu, total
from hafs_jax.targets.hlo import Shape, parse
from hafs_jax.targets.rules import Limits, facts, problems, reads

SMALL = (Path(__file__).parent / "small.hlo").read_text()
_PRECISE = "rhs_contracting_dims={0}, operand_precision={highest,highest}"
H100 = GPUS["h100"]


@pytest.fixture(scope="module")
def small() -> Schedule:
    return schedule(parse(SMALL))


def kernel(found: Schedule, name: str) -> Kernel:
    (one,) = {kernel.name: kernel for kernel, _ in found.kernels() if kernel.name == name}.values()
    return one


def test_lines_are_read_with_tuples_and_attributes() -> None:
    main = parse(SMALL).computations["main"]
    assert main.root.branches == ["nothing", "something"]
    assert main.instructions["sorted"].shapes == (Shape("f32", (4, 6)), Shape("s32", (4, 6)))
    assert main.instructions["loop"].trips == 3 and main.instructions["wild"].trips is None
    assert main.instructions["pre"].source == "jit(f)/dot_general"
    assert [user.name for user, _ in main.users["pre"]] == ["sorted", "sorted", "flat"]
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("error: nothing compiled")


def test_a_kernel_moves_what_it_reads_and_writes(small: Schedule) -> None:
    rows, ids, product = 5 * 8 * 4, 5 * 4, kernel(small, "pre")
    assert (product.read, product.written) == (2 * (4 * 8 + 8 * 6), 4 * 4 * 6)
    assert (kernel(small, "near").read, kernel(small, "near").written) == (rows + ids, rows)
    assert (kernel(small, "put").read, kernel(small, "put").written) == (8 * 4 + 4, 8 * 4)  # in place
    added = kernel(small, "added")
    assert (added.read, added.written) == (ids + rows + rows, rows)  # read, add, write
    assert {name for name in ("first", "again", "m.2") if kernel(small, name)} == {"first", "again", "m.2"}
    cached = schedule(parse(SMALL.replace("s32[5]", "s32[500]").replace("f32[5,8]", "f32[500,8]")), cache=100 * 8 * 4)
    assert kernel(cached, "near").read == 100 * 8 * 4 + 500 * 4  # the table fits into the cache


def test_products_are_counted_with_the_rate_of_their_factors(small: Schedule) -> None:
    (products,) = kernel(small, "pre").products
    assert products.flops == 2 * 4 * 8 * 6 and H100.rate(products) == H100.bfloat16
    plain = parse(SMALL.replace("bf16", "f32"))
    precise = parse(SMALL.replace("bf16", "f32").replace("rhs_contracting_dims={0}", _PRECISE))
    rates = [H100.rate(kernel(schedule(program), "pre").products[0]) for program in (plain, precise)]
    assert rates == [H100.tf32, H100.float32]
    dims = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    call = f'custom-call(%x.1, %w.1), custom_call_target="__cublas$gemm", backend_config={dims}'
    library = f"  %pre = (f32[4,6]{{1,0}}, s8[64]{{0}}) {call}"
    text = "\n".join(library if line.startswith("  %pre =") else line for line in SMALL.splitlines())
    assert kernel(schedule(parse(text)), "pre").flops == 2 * 4 * 8 * 6


def test_a_schedule_is_summed_over_known_loops_and_the_cheapest_branch(small: Schedule) -> None:
    assert [(loop.name, loop.trips) for loop in small.loops()] == [("loop", 3), ("wild", None), ("turns", None)]
    assert [branch.name for branch in small.branches()] == ["end"]
    whole = total(small.parts, H100)
    outside = sum(part.bytes for part in small.parts if isinstance(part, Kernel))
    assert whole.bytes == outside + 3 * 2 * 4 * 6 * 4
    assert whole.launches == 7 + 3
    (end,) = small.branches()
    assert total((end,), H100).bytes == 0
    with_work = Branch("both", "", (small.parts[:1], small.parts[:2]))
    assert total((with_work,), H100) == total(small.parts[:1], H100)
    assert total((Loop("l", "", 4, small.parts),), H100).bytes == 4 * whole.bytes


def test_facts_name_what_a_fast_step_has_not(small: Schedule) -> None:
    found = facts(small, H100, 7 * 10**9, rows_by_latents=24)
    assert (found.widest_sort, found.temporary) == (6, 7.0)
    assert found.most_reads == 3  # by the copy in the body that the three loops share
    assert reads(small, 24)["main", "pre", 0] == 2  # by `sorted`, and as `flat` by `again`
    assert reads(small, 25) == {("main", "near", 0): 1}  # `t.1` is only read in part
    assert found.open_loops == ("jit(f)/while",)  # that of the dead latents' branch may be
    assert found.milliseconds == pytest.approx(1e3 * total(small.parts, H100).seconds)


def test_what_is_against_the_rules_is_said(small: Schedule) -> None:
    wide = schedule(
        parse(
            SMALL.replace("f32[4,6]", "f32[4,2000]")
            .replace("f32[24]", "f32[8000]")
            .replace("bf16[8,6]", "bf16[8,2000]")
        )
    )
    ptx = ".entry pre(.param .u64 p)\n{ atom.relaxed.sys.global.cas.b32 %r; atom.global.add.f32 %f; }\n"
    found = facts(wide, H100, 10**9, 8000, ptx, spilled=17)
    said = "; ".join(problems(found, Limits(gigabytes=0.0, temporary=2.0, milliseconds=1.0, reads=1)))
    for words in (
        "rows of 2,000",
        "1 compare-and-swap",
        "jit(f)/while",
        "17 bytes of registers",
        "moves",
        "times; expected at most 1",
    ):
        assert words in said
    assert "temporary" not in said and "roofline" not in said
    clean = facts(
        schedule(
            parse(SMALL.replace('metadata={op_name="jit(f)/while"}', 'backend_config={"known_trip_count":{"n":"2"}}'))
        ),
        H100,
        0,
        24,
    )
    assert problems(clean, None) == []
    assert problems(clean, Limits(1, 1, 1, 3)) == []


KERNEL = """
ENTRY %main (starts: s32[10], ends: s32[10], weights: f32[50], from: s32[50], table: bf16[20,8]) -> f32[10,8] {
  %starts = s32[10]{0} parameter(0)
  %ends = s32[10]{0} parameter(1)
  %weights = f32[50]{0} parameter(2)
  %from = s32[50]{0} parameter(3)
  %table = bf16[20,8]{1,0} parameter(4)
  ROOT %out = f32[10,8]{1,0} custom-call(%starts, %ends, %weights, %from, %table), KERNEL
}
"""
KERNEL = KERNEL.replace(
    "KERNEL",
    'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/hafs_segment_sums/pallas_call"}, '
    'backend_config={module = "(\\00{"}',
)


def test_a_kernel_of_ours_is_charged_for_the_rows_that_it_takes() -> None:
    lists = 4 * (10 + 10 + 50 + 50)

    def read(text: str, cache: int) -> int:
        (kernel,) = schedule(parse(text), cache).parts
        assert isinstance(kernel, Kernel) and kernel.written == 4 * 10 * 8
        return kernel.read

    assert read(KERNEL, cache=0) == lists + 50 * 2 * 8  # each entry's row
    assert read(KERNEL, cache=2 * 20 * 8) == lists + 2 * 20 * 8  # the table once: it stays in the cache
    assert read(KERNEL.replace("segment_sums", "segment_pieces"), cache=0) == lists
    assert read(KERNEL.replace("segment_sums", "adam_of_rows"), cache=0) == lists + 2 * 20 * 8  # all rows, once


def test_atomics_that_add_in_any_order_are_against_the_rules_of_kernels() -> None:
    clean = "atom.relaxed.sys.global.add.u32 %r, [%p], 1; ld.shared.f32 %f; red.shared.add.s32 [%p], 1;"
    for ptx, count in (
        (clean, 0),
        ("red.global.add.f32 [%p], %f;", 1),
        ("atom.global.v4.f32.add {%f}, [%p], {%f};", 1),
        ("atom.relaxed.sys.global.add.noftz.f16x2 %r; red.global.add.bf16x2 [%p], %r;", 2),
    ):
        found = facts(schedule(parse(KERNEL)), H100, 0, 10**9, clean + ptx)
        assert found.unordered == count
        assert problems(found, None) == []
        assert len(problems(found, None, any_order=False)) == (count > 0)


def test_a_large_product_without_matrix_units_is_named() -> None:
    text = (
        SMALL.replace("bf16[4,8]", "bf16[4096,8192]")
        .replace("bf16[8,6]", "bf16[8192,6]")
        .replace("f32[4,6]", "f32[4096,6]")
        .replace("f32[24]", "f32[24576]")
    )
    text = (
        text.replace("bf16[8192,6]", "bf16[8192,4096]")
        .replace("f32[4096,6]", "f32[4096,4096]")
        .replace("f32[24576]", "f32[16777216]")
    )
    for instruction, named in (("fma.rn.f32", ("pre",)), ("wgmma.mma_async.sync", ()), ("mma.sync.aligned", ())):
        ptx = f".visible .entry pre(\n.param .u64 p\n)\n{{ {instruction} %r; }}\n.visible .entry other()\n{{ ret; }}\n"
        assert facts(schedule(parse(text)), H100, 0, 1, ptx).without_matrix_units == named


@pytest.mark.parametrize("name", GPUS)
def test_a_gpus_numbers_stand_in_its_file(name: str) -> None:
    found = gpu(name)
    assert 10**12 < found.bandwidth < 10**13 and found.memory == 80 << 30 and found.cache % (1 << 20) == 0
    numbers = [line for line in found.target_config.splitlines() if ":" in line.split("#")[0] and line.startswith("  ")]
    assert len(numbers) > 18 and all("[" in line.split("#")[1] for line in numbers if "capability" not in line)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match=r"target 'h1000': expected one of h100, a100; did you mean 'h100'"):
        gpu("h1000")


def test_programs_compiled_for_a_cpu_are_read() -> None:
    """A scan of products and a top-k: the same products as XLA's own analysis counts, and the loop's trips."""

    def program(x_BD: jax.Array, w_DF: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return carry + x_BD @ w_DF, None

        total_BF, _ = jax.lax.scan(body, jnp.zeros((24, 320)), None, length=5)
        return jax.lax.top_k(total_BF, 4)[0]

    x_BD, w_DF = jnp.ones((24, 40)), jnp.ones((40, 320))
    found = schedule(parse(jax.jit(program).lower(x_BD, w_DF).compile().as_text()))
    per_product = 2 * 24 * 40 * 320
    assert total(found.parts, H100).flops in (per_product, 5 * per_product)  # XLA may hoist it out of the loop
    assert 5 in [loop.trips for loop in found.loops()]
    assert 320 in [one.sorted for one, _ in found.kernels()]


def test_a_gpu_is_its_rates() -> None:
    assert isinstance(H100, Gpu) and H100.bfloat16 == 2 * H100.tf32
