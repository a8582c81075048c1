"""The kernels' own source, run on the host by emulator.hpp: the same R, exact integers, every path.

What these can't show is what only hardware can: timing, and that the instructions do what the PTX
ISA says of them. tests/cuda/test_gpu.py is for that.
"""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from fastproj.spec import MatrixKey, matrix_block
from tests.cuda import emulation
from tests.essential import essential, slow

KINDS = ["rademacher", "gaussian"]
VARIANTS = ["sm80", "sm90"]
# (dtype of G, terms): every operand type and split
INPUTS = [
    (torch.bfloat16, 1),
    (torch.float16, 1),
    (torch.float32, 1),
    (torch.float32, 2),
    (torch.float32, 3),
]
SEED, STREAM = 2**63 + 5, 2**31 - 1


def entries(kind: str, rows: slice, cols: int) -> torch.Tensor:
    """R[rows, :cols] from the NumPy truth, float64."""
    block = matrix_block(MatrixKey(kind, SEED, STREAM), rows.start, rows.stop, 0, cols)
    return torch.from_numpy(np.asarray(block, dtype=np.float64))


def integers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def check(grads: torch.Tensor, cols: int, kind: str, row_offset: int = 0, **options: object):
    """Project small integers and compare: equality (Rademacher) or rounding (Gaussian)."""
    got, plan = emulation.project(
        grads, cols, kind=kind, seed=SEED, stream=STREAM, row_offset=row_offset, **options
    )
    block = entries(kind, slice(row_offset, row_offset + grads.shape[1]), cols)
    expected = grads.double() @ block
    if kind == "rademacher":
        assert torch.equal(got.double(), expected)
    else:
        bound = 2.0**-22 * (grads.double().abs() @ block.abs()) + 1e-12
        assert ((got.double() - expected).abs() <= bound).all()
    return got, plan


# ----------------------------------------------------------------------------------- R, bit for bit


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "terms"), INPUTS)
def test_every_entry_of_whole_blocks(variant, kind, dtype, terms):
    """All rows of whole blocks. Powers of four in one sample tell the signs of 8 rows apart."""
    if kind == "rademacher":
        rows = 512
        grads = torch.zeros(64, rows, dtype=dtype)
        for row in range(rows):
            grads[row // 8, row] = 4.0 ** (row % 8)
    else:
        rows = 128
        grads = torch.eye(rows, dtype=dtype)
    got, _ = emulation.project(
        grads, 20, kind=kind, seed=SEED, stream=STREAM, terms=terms, variant=variant
    )
    expected = grads.double() @ entries(kind, slice(0, rows), 20)
    assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "row_offset",
    [1, slow(504), slow(2**30 - 40), 2**37 - 40, slow(2**41 - 40), 2**50 + 77],
    ids=["1", "504", "2^30", "2^37", "2^41", "2^50"],
)
def test_entries_at_any_row(variant, kind, row_offset):
    """Across the ends of blocks, launches and the low word of the block number."""
    rows = 60
    got, _ = emulation.project(
        torch.eye(rows), 270, kind=kind, seed=SEED, stream=STREAM, row_offset=row_offset,
        variant=variant,
    )  # fmt: skip
    assert torch.equal(got.double(), entries(kind, slice(row_offset, row_offset + rows), 270))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8]
)
def test_matrix(kind, dtype):
    if (kind, dtype) == ("gaussian", torch.int8):
        dtype = torch.float32
    for rows, cols, row_offset, col_offset in (
        (70, 130, 5, 3),
        (33, 1, 2**41 - 10, 2**32 - 65),
        (1025, 3, 511, 0),
    ):
        out = torch.full((cols, rows), 99, dtype=dtype).t()
        emulation.matrix(
            out, kind=kind, seed=SEED, stream=STREAM, row_offset=row_offset, col_offset=col_offset
        )
        block = matrix_block(
            MatrixKey(kind, SEED, STREAM),
            row_offset, row_offset + rows, col_offset, col_offset + cols,
        )  # fmt: skip
        assert torch.equal(out.double(), torch.from_numpy(block).double())


# ----------------------------------------------------------------------------------- whole products


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "terms"), essential(INPUTS, (INPUTS[0], INPUTS[-1])))
@pytest.mark.parametrize(
    ("batch", "rows", "cols", "row_offset"),
    [(1, 1, 1, 0), (17, 1100, 300, 77), (70, 600, 130, 508)],
    ids=str,
)
def test_ragged_shapes(variant, kind, dtype, terms, batch, rows, cols, row_offset):
    check(integers(batch, rows, dtype=dtype), cols, kind, row_offset, terms=terms, variant=variant)


BLOCKS = {
    ("sm90", "rademacher", 1): [16, 32, 64],
    ("sm90", "rademacher", 2): [16, 32, 64],
    ("sm90", "rademacher", 3): [16, 32],
    ("sm90", "gaussian", 1): [32, 128],
    ("sm90", "gaussian", 2): [64],
    ("sm90", "gaussian", 3): [64],
    ("sm80", "rademacher", 1): [16, 32, 64],
    ("sm80", "rademacher", 2): [32],
    ("sm80", "rademacher", 3): [16, 32],
    ("sm80", "gaussian", 1): [32, 64],
    ("sm80", "gaussian", 2): [32],
    ("sm80", "gaussian", 3): [32],
}
# Two terms lie between one and three: slow.
INSTANTIATIONS = [pytest.param(*key, marks=[pytest.mark.slow] * (key[2] == 2)) for key in BLOCKS]


def batch_for_each_tile(variant, kind, terms, dtype) -> dict[int, int]:
    """BLOCK_B -> the smallest odd batch (of several) that selects it: its last tile is ragged."""
    options = {"kind": kind, "terms": terms, "variant": variant}
    found: dict[int, int] = {}
    for batch in range(3, 600, 2):
        found.setdefault(emulation.plan(batch, 10**6, 4096, dtype, **options).block_b, batch)
    return found


@pytest.mark.parametrize(("variant", "kind", "terms"), INSTANTIATIONS)
def test_every_instantiation(variant, kind, terms):
    """Some batch size selects each compiled tile and no other; it is right with ragged edges."""
    dtypes = [torch.float32] if terms > 1 else [torch.float32, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        batches = batch_for_each_tile(variant, kind, terms, dtype)
        assert sorted(batches) == BLOCKS[variant, kind, terms]
        for block_b, batch in batches.items():
            # The second row stride is no multiple of 16 bytes.
            for rows in (600, 597):
                grads = integers(batch, rows, dtype=dtype)
                _, plan = check(grads, 270, kind, 77 * 8, terms=terms, variant=variant)
                slow = plan.loader in ("scalar", "elements")
                assert (plan.block_b, slow) == (block_b, rows == 597)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_several_folds_splits_and_items(variant, kind):
    """Rows beyond one fold, several splits, more items than blocks."""
    grads = integers(40, 6000, dtype=torch.bfloat16)
    _, plan = check(grads, 300, kind, 8, variant=variant, multiprocessors=2)
    assert plan.loader in ("tma", "cp.async")
    grads = integers(20, 5000)
    _, plan = check(grads, 200, kind, 3, variant=variant, multiprocessors=2)
    assert plan.splits > 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layouts(variant, dtype):
    """Each loader, and every layout that chooses it."""
    slow = {"sm80": "scalar", "sm90": "elements"}[variant]
    fast = "tma" if variant == "sm90" else "cp.async" if dtype == torch.bfloat16 else "vector"
    batch, rows = 9, 700
    dense = integers(batch, 704, dtype=dtype)
    wide = integers(batch, 3 * 704, dtype=dtype)
    layouts = {
        "dense": (dense, fast),
        "narrowed": (dense[:, :rows], fast),
        "moved by 16 bytes": (dense[:, 16 // dtype.itemsize :][:, :600], fast),
        "moved by one": (dense[:, 1:], slow),
        "odd row": (integers(batch, 701, dtype=dtype), slow),
        "transposed": (integers(rows, batch, dtype=dtype).t(), slow),
        "every third": (wide[:, ::3], slow),
        "every second sample": (integers(2 * batch, 704, dtype=dtype)[::2], fast),
        "one sample for all": (dense[:1].expand(batch, -1), slow),
        "rows that overlap": (
            integers(1, 2000, dtype=dtype)[0].as_strided((batch, rows), (64, 1)),
            slow if fast == "tma" else fast,
        ),
        "one sample": (integers(1, 701, dtype=dtype), fast),
    }
    for name, (grads, loader) in layouts.items():
        _, plan = check(grads, 40, "rademacher", terms=2, variant=variant)
        assert (name, plan.loader) == (name, loader)
    # Aligned with R, though where it begins is not an aligned address.
    _, plan = check(dense[:, 513:], 40, "rademacher", row_offset=513, terms=2, variant=variant)
    assert plan.loader == (slow if fast == "tma" else fast)


@pytest.mark.parametrize(("variant", "kind", "terms"), BLOCKS)
def test_fp32_comes_in_whole_sectors_and_goes_without_bank_conflicts(variant, kind, terms):
    """Each sector of G is touched by one instruction, once, or by the copy engine; shared memory is
    written and read without an extra wavefront.
    """
    rows = 1024
    for batch in batch_for_each_tile(variant, kind, terms, torch.float32).values():
        grads = integers(batch, rows)
        with emulation.traffic() as moved:
            _, plan = emulation.project(grads, 100, kind=kind, terms=terms, variant=variant)
        chunks = -(-batch // plan.block_b) * plan.block_b * rows // 8
        if variant == "sm90":  # 8 chunks are 16 reads of 8 lanes
            assert moved.loads == 0
            assert moved.read_wavefronts == moved.reads == 2 * chunks // 8
        else:
            assert moved.loads == batch * rows // 32
            assert moved.sectors == 4 * moved.loads
        assert moved.store_wavefronts == moved.stores >= 2 * terms * (batch * rows // 8) // 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unaligned_elements_at_the_end_of_memory(dtype):
    """The word of the last element may end beyond the tensor: its other half is not read."""
    page = mmap.PAGESIZE
    for rows, cut in ((200, 0), (199, 2), (130, 0)):
        memory = mmap.mmap(-1, 2 * page)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        assert emulation.protect(whole.data_ptr() + page, page) == 0
        first = (page - cut) // dtype.itemsize * dtype.itemsize - 5 * rows * dtype.itemsize
        grads = whole[first : first + 5 * rows * dtype.itemsize].view(dtype).view(5, rows)
        grads.copy_(integers(5, rows, dtype=dtype))
        for given in (grads, grads[:, 1:], grads[:, ::3], grads[-1:, -1:].expand(5, 9)):
            for variant in VARIANTS:
                check(given, 20, "rademacher", 3, variant=variant, terms=1)
        got = emulation.project_transpose(grads, 100, kind="rademacher", terms=1, seed=SEED)
        assert got.isfinite().all()


@pytest.mark.parametrize("order", range(6))
def test_cluster_in_any_order(order):
    """Two blocks share tiles by multicast; threads and copies come in different orders."""
    grads = integers(20, 2104, dtype=torch.float16)[:, :2090]
    _, plan = check(grads, 512, "rademacher", 3, variant="sm90", order=order, multiprocessors=4)
    assert (plan.loader, plan.cluster) == ("tma", 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_result_is_bitwise_reproducible(variant):
    """Whatever the order of threads and copies."""
    grads = torch.randn(20, 1500, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        results = [
            emulation.project(
                grads[:, :1496].to(dtype), 300, kind="gaussian", variant=variant, order=order,
                multiprocessors=2,
            )[0]
            for order in range(3)
        ]  # fmt: skip
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("variant", "kind", "terms"), INSTANTIATIONS)
def test_batch_invariance(variant, kind, terms):
    """A row's result does not depend on the rest of the batch, whatever tile the batch selects."""
    dtypes = [torch.float32] if terms > 1 else [torch.float32, torch.bfloat16, torch.float16]
    options = {"kind": kind, "variant": variant, "terms": terms, "multiprocessors": 1}
    rows = 1200 if terms > 1 else 2200  # beyond one fold
    for dtype in dtypes:
        batches = batch_for_each_tile(variant, kind, terms, dtype)
        most = max(batches.values())
        grads = torch.randn(most, rows, generator=torch.Generator().manual_seed(1)).to(dtype)
        grads[most - 1, 700] = torch.inf
        grads[most - 3, 5] = torch.nan
        whole, plan = emulation.project(grads, 100, **options)
        assert whole[: most - 3].isfinite().all()
        for block_b, batch in batches.items():
            got, other = emulation.project(grads[most - batch :], 100, **options)
            assert torch.equal(got.view(torch.int32), whole[most - batch :].view(torch.int32))
            assert (other.block_b, other.splits) == (block_b, plan.splits)


def test_scale_accumulate_and_strides():
    grads = integers(5, 1500)
    block = entries("rademacher", slice(0, 1500), 30)
    for variant in ("simple", *VARIANTS):
        for multiprocessors in (1, 4):  # without and with a workspace
            room = torch.full((60, 10), 7.0)
            out = room[::2, ::2].t()
            emulation.project(
                grads, 30, kind="rademacher", seed=SEED, stream=STREAM, scale=0.25, out=out,
                accumulate=True, variant=variant, multiprocessors=multiprocessors,
            )  # fmt: skip
            assert torch.equal(out.double(), 7 + 0.25 * (grads.double() @ block))
            room[::2, ::2] = 7.0
            assert (room == 7.0).all()


def test_pieces_at_their_offsets():
    grads = integers(6, 1300)
    whole, _ = emulation.project(grads, 50, kind="rademacher")
    for variant in VARIANTS:
        out = torch.zeros(6, 50)
        start = 0
        for width in (1, 7, 500, 12, 780):
            emulation.project(
                grads[:, start : start + width], 50, kind="rademacher", row_offset=start,
                out=out, accumulate=True, variant=variant,
            )  # fmt: skip
            start += width
        assert torch.equal(out, whole)


def test_batches_beyond_the_workspace():
    """The batch is cut so that partial sums stay under the limit."""
    plan = emulation.plan(4096, 10**7, 4096, torch.bfloat16)
    assert plan.splits > 1
    assert plan.batch_chunk < 4096
    assert plan.workspace_bytes <= 48 << 20


def test_an_empty_batch_has_a_plan():
    for dtype in (torch.bfloat16, torch.float64):
        assert emulation.plan(0, 10**6, 4096, dtype).batch_chunk == 0


# --------------------------------------------------------------------------------- float64, adjoint


@pytest.mark.parametrize("kind", KINDS)
def test_float64(kind):
    grads = torch.randn(11, 1100, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    got, plan = emulation.project(
        grads, 70, kind=kind, seed=SEED, stream=STREAM, row_offset=2**41 - 600
    )
    expected = grads @ entries(kind, slice(2**41 - 600, 2**41 + 500), 70)
    assert plan.variant == "simple"
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_float64_beyond_one_range_of_columns():
    grads = integers(2, 9, dtype=torch.float64)
    got, _ = emulation.project(grads, 2**16 + 70, kind="rademacher", seed=SEED, stream=STREAM)
    block = entries("rademacher", slice(0, 9), 2**16 + 70)
    assert torch.equal(got, grads @ block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "terms"), [*INPUTS, (torch.float64, 3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize(
    ("batch", "cols", "rows", "row_offset"),
    [(1, 1, 1, 0), (35, 130, 700, 2**41 - 300), (3, 64, 1100, 77)],
    ids=str,
)
def test_project_transpose(kind, dtype, terms, batch, cols, rows, row_offset):
    y = integers(batch, cols, dtype=dtype)
    room = torch.full((rows, 2 * batch), torch.nan, dtype=torch.float64)
    room = room.to(torch.float64 if dtype == torch.float64 else torch.float32)
    got = emulation.project_transpose(
        y, rows, kind=kind, seed=SEED, stream=STREAM, row_offset=row_offset, scale=0.5, terms=terms,
        out=room[:, ::2].t(),
    )  # fmt: skip
    block = entries(kind, slice(row_offset, row_offset + rows), cols)
    expected = 0.5 * (y.double() @ block.t())
    if kind == "rademacher":
        assert torch.equal(got.double(), expected)
    else:
        bound = 2.0**-22 * (y.double().abs() @ block.abs().t()) + 1e-12
        assert ((got.double() - expected).abs() <= bound).all()
    assert room[:, 1::2].isnan().all()


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [64, 3000])
def test_precision(variant, kind, rows):
    """Even with sums cut as tensor cores cut them: fp32 within 2x of torch, terms as documented."""
    grads = torch.randn(16, rows, generator=torch.Generator().manual_seed(3))
    block = entries(kind, slice(0, rows), 128)
    expected = grads.double() @ block

    def error(value: torch.Tensor) -> float:
        return ((value.double() - expected).norm() / expected.norm()).item()

    def projected(terms: int) -> torch.Tensor:
        options = {"kind": kind, "seed": SEED, "stream": STREAM, "variant": variant}
        return emulation.project(grads, 128, terms=terms, multiprocessors=1, **options)[0]

    assert error(projected(3)) < 2 * error(grads @ block.float())
    assert error(projected(2)) < 2.0**-16
    assert error(projected(1)) < 2.0**-8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_values_of_every_size(variant, terms):
    """Single values survive: three terms exactly, two to 2^-16, one to 2^-8; none becomes inf."""
    largest = torch.finfo(torch.float32).max
    values = torch.tensor(
        [1.0, 1 / 3, -1e30, 1e-30, largest, -largest, 65505.0, 1e-8, 1.1754944e-38, 0.0]
    )
    grads = torch.diag(values)
    got, _ = emulation.project(
        grads, 30, kind="rademacher", seed=SEED, stream=STREAM, terms=terms, variant=variant
    )
    expected = grads.double() @ entries("rademacher", slice(0, len(values)), 30)
    if terms == 3:
        assert torch.equal(got.double(), expected)
    else:
        assert got.isfinite().all()
        error = (got.double() - expected).abs()
        assert (error <= 2.0 ** (-8 * terms) * expected.abs() + 1e-43).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inf_and_nan_pass_through(variant, terms, dtype):
    """As in a matmul: inf with R's sign, NaN for NaN of any payload and for inf - inf."""
    grads = integers(5, 600).to(dtype)
    grads[1, 3] = torch.inf
    grads[2, 599] = torch.nan
    grads[3, 10], grads[3, 500] = torch.inf, -torch.inf
    if dtype == torch.float32:
        grads.view(torch.int32)[4, 77] = 0x7F800001  # a NaN whose upper half reads as inf
    got, _ = emulation.project(
        grads, 30, kind="rademacher", seed=SEED, stream=STREAM, terms=terms, variant=variant
    )
    block = entries("rademacher", slice(0, 600), 30)
    assert torch.equal(got[0].double(), grads[0].double() @ block)
    assert torch.equal(got[1].double(), torch.inf * block[3])
    assert got[2].isnan().all()
    same = block[10] == block[500]
    assert got[3][same].isnan().all()
    assert torch.equal(got[3][~same].double(), torch.inf * block[10][~same])
    if dtype == torch.float32:
        assert got[4].isnan().all()


# ----------------------------------------------------------------------------------------- the plan


def test_splits_depend_on_rows_and_columns_only():
    for rows, cols in ((10**6, 512), (10**7, 4096), (10**8, 16384)):
        for dtype, terms in INPUTS:
            plans = {
                emulation.plan(b, rows, cols, dtype, terms=terms).splits
                for b in (1, 8, 16, 64, 200, 4096)
            }
            assert len(plans) == 1


@pytest.mark.parametrize("rows", [1, 512, 10**6, 10**8, 10**10])
@pytest.mark.parametrize("cols", [1, 64, 4096, 10**6, 10**8])
def test_workspace_is_bounded(rows, cols):
    for batch in (1, 64, 10**5):
        for kind in KINDS:
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                plan = emulation.plan(batch, rows, cols, dtype, kind=kind)
                assert plan.workspace_bytes <= 48 << 20


def test_unknown_kernel_is_refused():
    assert emulation.kernel_facts("sm90", "rademacher", "bf16", 1, 48)["shared"] == 0
    assert emulation.kernel_facts("sm90", "rademacher", "bf16", 1, 64)["shared"] > 0


# -------------------------------------------------------------------------------------- the machine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fence_proxy_async();", ""),
        ("release(last, true);", ""),
        ("barrier_arrive(full + ring.place * 8);", "static_cast<void>(full);"),
        ("wgmma_wait<0>();\n            fold(", "fold("),
        ("barrier_wait(full + stage * 8, ring.parity);", "static_cast<void>(full);"),
        ("barrier_wait(empty + ring.place * 8, ring.parity ^ 1);", "static_cast<void>(empty);"),
        ("barrier_wait(raw_full + read.place * 8, read.parity);", ""),
        ("barrier_wait(raw_empty + filled.place * 8, filled.parity ^ 1);", ""),
        ("copy_async_wait<C::kRawStages - 1>();", "copy_async_wait<C::kRawStages>();"),
        ("__syncwarp();  // a warp reads", "// a warp reads"),
        ("release(last, !first);", "release(last, true);"),
        ("generator.fragments(key, m, group & 1,", "generator.fragments(key, m, 0,"),
        ("2 * (lane & 3) + (i & 1);", "2 * (lane & 3) + 1 - (i & 1);"),
    ],
    ids=(
        "fence release arrive wait full empty raw_full raw_empty raw_wait raw_warp twice half "
        "epilogue"
    ).split(),
)
def test_the_emulation_sees_a_broken_pipeline(tmp_path, old, new):
    """Each guard of the sm_90a pipeline, taken out of a copy of the source, makes a run fail."""

    def run() -> None:
        for order in range(4):
            check(integers(40, 6000, dtype=torch.bfloat16), 300, "rademacher", 8, order=order)
            check(integers(20, 2500), 300, "gaussian", 8, order=order)
            check(integers(20, 2500), 300, "rademacher", 8, order=order)
            check(integers(20, 2501), 300, "rademacher", 8, order=order)

    folder = emulation.ROOT / "csrc" / "cuda"
    (file,) = (f for f in folder.glob("*_sm90.cuh") if old in f.read_text())
    broken = emulation.changed_source(tmp_path, file.name, old, new)
    with broken, pytest.raises((AssertionError, emulation.EmulationError)):
        run()
