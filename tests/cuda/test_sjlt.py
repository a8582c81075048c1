"""Kind sjlt on the host: the kernels' own source against the NumPy truth, bit for bit."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastproj.spec import MatrixKey, default_block, matrix_block
from tests import known
from tests.cuda import emulation
from tests.dense import DTYPES
from tests.essential import slow

SEED, STREAM = 2**63 + 5, 2**31 - 1


def entries(rows: slice, cols: int, block: int) -> torch.Tensor:
    """R[rows, :cols] from the NumPy truth, float64."""
    key = MatrixKey("sjlt", SEED, STREAM, block)
    truth = matrix_block(key, rows.start, rows.stop, 0, cols)
    return torch.from_numpy(np.asarray(truth, dtype=np.float64))


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).to(dtype)


def project(grads, cols, block, row_offset=0, **options):
    return emulation.project(
        grads, cols, kind="sjlt", block=block, seed=SEED, stream=STREAM, row_offset=row_offset,
        **options,
    )  # fmt: skip


def check(grads, cols, block, row_offset=0, **options) -> emulation.Plan:
    """Small integers: the sums are exact."""
    got, plan = project(grads, cols, block, row_offset, **options)
    rows = slice(row_offset, row_offset + grads.shape[1])
    assert torch.equal(got.double(), grads.double() @ entries(rows, cols, block))
    return plan


# ---- the matrix --------------------------------------------------------------------------------


def matrix(seed, stream, block, row, rows, column, cols, dtype=torch.int8):
    out = torch.full((rows, cols), 99, dtype=dtype)
    return emulation.matrix(
        out, kind="sjlt", seed=seed, stream=stream - 2**32 if stream >= 2**31 else stream,
        row_offset=row, col_offset=column, block=block,
    )  # fmt: skip


def test_known_entries():
    answers = known.entries("sjlt")
    assert len(answers) == 440
    for _, seed, stream, block, row, column, value in answers[::44]:  # each is a launch
        assert matrix(seed, stream, block, row, 1, column, 1).item() == value


def test_known_blocks():
    for _, *numbers, digest in known.blocks(sparse=True):
        got = matrix(*numbers)
        assert hashlib.sha256(got.numpy().tobytes()).hexdigest() == digest


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_matrix_in_every_dtype(dtype):
    got = matrix(SEED, STREAM, 32, 5, 70, 3, 130, dtype)
    truth = matrix_block(MatrixKey("sjlt", SEED, STREAM, 32), 5, 75, 3, 133)
    assert torch.equal(got.double(), torch.from_numpy(truth).double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [2**w for w in range(4, 17)])
def test_every_block(block, dtype):
    """One row in 37 is not zero, so that the truth stays small."""
    rows, cols = 2 * block + 40, 150
    grads = torch.zeros(3, rows, dtype=dtype)
    at = torch.arange(5, rows, 37 if block > 64 else 1)
    grads[:, at] = integers(3, len(at), dtype=dtype)
    got, plan = project(grads, cols, block, 3 * block - 7)
    expected = torch.zeros(3, cols, dtype=torch.float64)
    key = MatrixKey("sjlt", SEED, STREAM, block)
    first = 3 * block - 7
    for start in range(0, rows, 1 << 14):
        stop = min(rows, start + (1 << 14))
        truth = torch.from_numpy(matrix_block(key, first + start, first + stop, 0, cols))
        expected += grads[:, start:stop].double() @ truth.double()
    assert torch.equal(got.double(), expected)
    assert plan.staged == (2 * block * grads.element_size() <= 210 * 1024)


@pytest.mark.parametrize("row_offset", [1, 2**30 - 40, 2**36 - 40, 2**41 - 40, 2**50 + 77], ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_entries_at_any_row(row_offset, block):
    """Across the ends of tiles, of launches, and of the low word of the tile's number."""
    got, _ = project(torch.eye(70), 270, block, row_offset)
    assert torch.equal(got.double(), entries(slice(row_offset, row_offset + 70), 270, block))


def test_columns_beyond_one_launch():
    """2^20 columns are one launch; here the last of them and the first of the next."""
    cols, block = 2**20 + 70, 2**16
    grads = integers(1, 33)
    got, _ = project(grads, cols, block, 5)
    truth = matrix_block(MatrixKey("sjlt", SEED, STREAM, block), 5, 38, 2**20 - 64, cols)
    assert torch.equal(
        got[:, 2**20 - 64 :].double(), grads.double() @ torch.from_numpy(truth).double()
    )
    assert got.isfinite().all()


# ---- shapes and layouts ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "rows", "cols", "block", "row_offset"),
    [
        (1, 1, 1, 16, 0),
        (1, 700, 1100, 256, 9),
        (2, 5000, 1030, 128, 77),
        (5, 3000, 2100, 512, 2**41 - 700),
        (9, 700, 300, 64, 0),
        (1, 2100, 9000, 1024, 1),
        (2, 2100, 9000, 2048, 16),
        (3, 1100, 26000, 4096, 5),
    ],
    ids=str,
)
def test_small_integers_are_exact(dtype, batch, rows, cols, block, row_offset):
    check(integers(batch, rows, dtype=dtype), cols, block, row_offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_configuration_is_reached(dtype):
    """Over shapes; each gives the bits of the others (test_rows_do_not_depend_on_the_batch)."""
    found = set()
    for batch in (1, 2, 4, 64):
        for cols in (64, 1024, 4096, 8192, 16384, 24576, 65536, 2**20):
            for block in (16, default_block(cols), 2**16):
                plan = emulation.plan(batch, 10**7, cols, dtype, kind="sjlt", block=block)
                found.add((plan.groups, plan.samples, plan.staged))
                assert plan.shared_bytes <= 227 * 1024
                assert plan.workspace_bytes <= 48 << 20
    header = (emulation.ROOT / "csrc" / "cuda" / "sjlt.hpp").read_text()
    name = "FASTPROJ_SJLT_F64(X" if dtype == torch.float64 else "FASTPROJ_SJLT(X"
    listed = header.split(f"#define {name}")[1].split("\n\n")[0].split("// clang")[0]
    for line in listed.splitlines()[1:]:
        _, groups, samples, staged = line.split("(")[1].split(")")[0].split(", ")
        assert (int(groups), int(samples), int(staged == "true")) in found


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shared_memory_fits_every_architecture(arch, dtype):
    limit = {80: 163, 90: 227, 100: 227}.get(arch, 99) * 1024
    for batch in (1, 64):
        for cols in (16, 1024, 4096, 65536, 2**20):
            for block in (2**w for w in range(4, 17)):
                plan = emulation.plan(
                    batch, 10**7, cols, dtype, kind="sjlt", block=block, arch=arch
                )
                assert 0 < plan.shared_bytes <= limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_loaders(dtype):
    base = integers(6, 1040, dtype=dtype)
    seen = set()
    for grads in (
        base[:, :1024],
        base[:, 1:900],
        base[:, 2:900],
        base[:, 8:999],
        integers(6, 901, dtype=dtype),
        integers(901, 6, dtype=dtype).t(),
        base[:, ::3],
        base[::2],
        base[:1].expand(6, -1),
        base[0].as_strided((6, 500), (16, 1)),
        base.flip(0)[:1, :999],
    ):
        for row_offset in (0, 8, 77):
            seen.add(check(grads, 130, 64, row_offset).loader)
            seen.add(check(grads, 130, 2**16, row_offset).loader)
    words = {"words", "scalar"} if dtype in (torch.bfloat16, torch.float16) else {"words"}
    assert seen >= {"cp.async", "scalar", *words}


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_beside_g_is_not_touched(dtype):
    """NaN before and after every row of G; guards around the result."""
    room = torch.full((4, 1000), torch.nan, dtype=dtype)
    room[:, 100:-100] = integers(4, 800, dtype=dtype)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for start in (100, 101, 104):
        grads = room[:, start:-100]
        out = torch.full((8, 300), 7.0, dtype=kept)
        got, _ = project(grads, 130, 64, 77, out=out[2:6, 50:180])
        expected = grads.double() @ entries(slice(77, 77 + grads.shape[1]), 130, 64)
        assert torch.equal(got.double(), expected)
        out[2:6, 50:180] = 7
        assert (out == 7).all()


def test_scale_accumulate_and_strides_of_the_result():
    grads = integers(5, 700)
    room = torch.full((600, 10), 7.0)
    out = room[::2, ::2].t()
    project(grads, 300, 64, 3, out=out, scale=0.25, accumulate=True)
    assert torch.equal(out.double(), 7 + 0.25 * grads.double() @ entries(slice(3, 703), 300, 64))
    room[::2, ::2] = 7
    assert (room == 7).all()


def test_pieces_that_start_inside_a_tile():
    grads = integers(3, 3000)
    whole, _ = project(grads, 200, 128, 5)
    out = torch.full((3, 200), torch.nan)
    at = 0
    for size in (1, 7, 500, 12, 2480):
        project(grads[:, at : at + size], 200, 128, 5 + at, out=out, accumulate=at > 0)
        at += size
    assert torch.equal(out, whole)


# ---- promises ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cols", [150, slow(1100)])
def test_rows_do_not_depend_on_the_batch(dtype, cols):
    """Whatever kernel and loader the batch selects; with splits and folds."""
    rows = 80_000 if cols == 150 else 60_000
    grads = torch.randn(9, rows, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole, plan = project(grads, cols, 16, 5, multiprocessors=2)
    assert plan.splits > 1
    assert (rows / 16 / plan.splits > 256) == (cols == 1100)  # folds
    for part in (slice(0, 1), slice(3, 5), slice(2, 8)):
        got, _ = project(grads[part], cols, 16, 5, multiprocessors=2, order=3)
        assert torch.equal(got, whole[part])
    moved = torch.zeros(9, rows + 1, dtype=dtype)[:, 1:]
    moved.copy_(grads)
    assert torch.equal(project(moved, cols, 16, 5, multiprocessors=2)[0], whole)


def test_error_against_float64():
    """At most twice that of the same sum by torch in fp32, with folds."""
    grads = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(1)) + 0.1
    got, _ = project(grads, 64, 16, multiprocessors=1)
    truth = entries(slice(0, grads.shape[1]), 64, 16)
    expected = grads.double() @ truth
    error = (got.double() - expected).norm()
    assert error <= 2 * ((grads @ truth.float()).double() - expected).norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_their_columns_alone(dtype):
    rows, cols, block = 200, 300, 64
    grads = torch.zeros(4, rows, dtype=dtype)
    grads[0, 5], grads[1, 199], grads[2, 77] = torch.nan, torch.inf, -torch.inf
    for address in (0, 1):  # both loaders
        room = torch.zeros(4, rows + 8 + address, dtype=dtype)[:, address : rows + address]
        room.copy_(grads)
        got, _ = project(room, cols, block, 3)
        truth = entries(slice(3, 3 + rows), cols, block)
        assert torch.equal(got[0].isnan(), truth[5] != 0)
        for sample, row, sign in ((1, 199, 1), (2, 77, -1)):
            reached = truth[row] != 0
            assert torch.equal(
                got[sample][reached].double(), torch.inf * sign * truth[row][reached]
            )
            assert (got[sample][~reached] == 0).all()
        assert (got[3] == 0).all()


# ---- the adjoint -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "cols", "rows", "block", "row_offset"),
    [
        (1, 1, 1, 16, 0),
        (5, 130, 700, 16, 2**41 - 300),
        (3, 1000, 2100, 32, 77),
        (6, 700, 900, 64, 5),
        (2, 3000, 1500, 1024, 511),
        (1, 300, 2000, 2**16, 2**16 - 900),
    ],
    ids=str,
)
def test_project_transpose(dtype, batch, cols, rows, block, row_offset):
    y = integers(batch, 2 * cols, dtype=dtype)[:, ::2]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.full((rows, batch), torch.nan, dtype=kept).t()
    emulation.project_transpose(
        y, rows, kind="sjlt", block=block, seed=SEED, stream=STREAM, row_offset=row_offset,
        scale=0.5, out=out,
    )  # fmt: skip
    truth = entries(slice(row_offset, row_offset + rows), cols, block)
    assert torch.equal(out.double(), 0.5 * y.double() @ truth.t())


# ---- that these can fail -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("far ? raw[1] : raw[0]", "far ? raw[0] : raw[1]"),
        ("tables.make(batch + 1);", "tables.make(batch);"),
        ("folded = true;", "folded = false;"),
    ],
)
def test_changed_kernels_are_caught(tmp_path, old, new):
    wrong = (AssertionError, emulation.EmulationError)  # sums, or rows that no tile has
    with emulation.changed_source(tmp_path, "sjlt.cuh", old, new), pytest.raises(wrong):
        check(integers(2, 20_000, dtype=torch.bfloat16), 600, 16, 5)
