"""Every instruction set of the CPU backend: the same R, exact integers, accuracy, invariances."""

import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch

from fastproj.backends import cpu, reference
from fastproj.call import Call
from fastproj.spec import MatrixKey, matrix_block
from tests.dense import DTYPES, KINDS, SHAPES

# 2-norm of the error over that of the result, for float32 input: docs/projection.md's promises
PRECISION_BOUND = {"highest": 1e-6, "high": 2.0**-16, "medium": 2.0**-8}

pytestmark = pytest.mark.skipif(
    cpu.unavailable() is not None, reason=f"cpu backend: {cpu.unavailable()}"
)


def run(grads, proj_dim, key, *, row_offset=0, precision="highest", **kwargs):
    pieces = grads if isinstance(grads, list) else [grads]
    dtype = torch.float64 if pieces[0].dtype == torch.float64 else torch.float32
    out = kwargs.pop("out", None)
    if out is None:
        out = torch.full((pieces[0].shape[0], proj_dim), torch.nan, dtype=dtype)
    cpu.project(pieces, out, Call(key, row_offset, precision=precision, **kwargs))
    return out


def exact(grads, proj_dim, key, *, row_offset=0):
    """In float64 on the NumPy truth."""
    block = matrix_block(key, row_offset, row_offset + grads.shape[1], 0, proj_dim)
    return grads.double() @ torch.from_numpy(np.asarray(block, dtype=np.float64))


def relative(error, of):
    return (error.norm() / of.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_matrix_equals_reference(isa, kind, dtype):
    if (kind, dtype) == ("gaussian", torch.int8):
        dtype = torch.float32
    key = MatrixKey(kind, 2**63 + 5, 77)
    for rows, cols, row_offset, col_offset in (
        (700, 130, 5, 3),
        (33, 1, 2**41 - 10, 2**32 - 65),
        (1025, 64, 511, 0),
    ):
        got = torch.full((rows, cols), 99, dtype=dtype)
        expected = got.clone()
        cpu.matrix(got, Call(key, row_offset), col_offset)
        reference.matrix(expected, Call(key, row_offset), col_offset)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_integers_are_exact(isa, shape, dtype):
    batch, rows, proj_dim, row_offset = shape
    key = MatrixKey("rademacher", 3, 2**32 - 1)
    generator = torch.Generator().manual_seed(rows)
    grads = torch.randint(-8, 9, (batch, rows), generator=generator).to(dtype)
    expected = exact(grads, proj_dim, key, row_offset=row_offset)
    for precision in PRECISION_BOUND:
        got = run(grads, proj_dim, key, row_offset=row_offset, precision=precision)
        assert torch.equal(got.double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integers_are_exact_at_every_tiling_of_the_batch(isa, dtype):
    """1, 2 or 3 rows of AMX tiles to a row of the batch: blocks of every size, full and ragged."""
    key = MatrixKey("rademacher", 6, 0)
    grads = torch.randint(-8, 9, (64, 600), generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = exact(grads, 70, key)
    for batch in (*range(4, 64, 5), 16, 17, 32, 33, 40, 48, 56, 64):
        assert torch.equal(run(grads[:batch], 70, key).double(), expected[:batch])


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_gaussian_accuracy(isa, shape):
    batch, rows, proj_dim, row_offset = shape
    key = MatrixKey("gaussian", 2**40, 1)
    grads = torch.randn(batch, rows, generator=torch.Generator().manual_seed(rows))
    expected = exact(grads, proj_dim, key, row_offset=row_offset)
    for precision, bound in PRECISION_BOUND.items():
        got = run(grads, proj_dim, key, row_offset=row_offset, precision=precision)
        assert relative(got - expected, expected) < bound
    for dtype in (torch.bfloat16, torch.float16):
        halves = grads.to(dtype)
        expected = exact(halves, proj_dim, key, row_offset=row_offset)
        for precision in PRECISION_BOUND:  # half-precision input is exact in any
            got = run(halves, proj_dim, key, row_offset=row_offset, precision=precision)
            assert relative(got - expected, expected) < PRECISION_BOUND["highest"]
    doubles = grads.double() + 1e-9
    expected = exact(doubles, proj_dim, key, row_offset=row_offset)
    got = run(doubles, proj_dim, key, row_offset=row_offset)
    assert relative(got - expected, expected) < 1e-14


def wide(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(4, 20000, generator=generator)
    return {
        "normal": normal,
        "mean one": normal * 0.01 + 1,
        "heavy tails": normal / torch.randn(4, 20000, generator=generator),
        "60 orders": normal * 10 ** (torch.rand(4, 20000, generator=generator) * 60 - 30),
        "one spike": torch.cat([normal[:, :-1] * 1e-6, torch.full((4, 1), 1e3)], dim=1),
        "tiny": normal * 1e-36,
        "subnormal": normal * 1e-40,
        "near the largest": normal.sign() * torch.finfo(torch.float32).max * 1e-5,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "data",
    [
        "normal",
        "mean one",
        "heavy tails",
        "60 orders",
        "one spike",
        "tiny",
        "subnormal",
        "near the largest",
    ],
)
def test_highest_is_at_most_twice_the_error_of_a_float32_matmul(isa, kind, data):
    key = MatrixKey(kind, 11, 0)
    grads = wide(data)
    block = matrix_block(key, 0, grads.shape[1], 0, 128)
    expected = exact(grads, 128, key)
    of_torch = relative(grads @ torch.from_numpy(block).float() - expected, expected)
    error = relative(run(grads, 128, key) - expected, expected)
    assert error <= 2 * of_torch


@pytest.mark.parametrize("precision", PRECISION_BOUND)
def test_the_largest_float_is_not_rounded_to_infinity(isa, precision):
    largest = torch.finfo(torch.float32).max
    got = run(
        torch.tensor([[largest, 1.0], [2.0, -largest]]),
        5,
        MatrixKey("rademacher", 3, 0),
        precision=precision,
    )
    assert ((got.abs() / largest - 1).abs() <= PRECISION_BOUND[precision]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(isa, kind):
    key = MatrixKey(kind, 5, 6)
    grads = torch.randn(37, 2100, generator=torch.Generator().manual_seed(2))
    for precision in PRECISION_BOUND:
        whole = run(grads, 130, key, precision=precision)
        for rows in (slice(0, 1), slice(5, 7), slice(20, 37), slice(0, 6)):
            part = run(grads[rows], 130, key, precision=precision)
            assert torch.equal(part, whole[rows])


def test_amx_leaves_signs_of_float32_to_avx512(amx_emulator, monkeypatch):
    """Precision "highest": the AVX-512 tables are the faster, so both sets give the same bits."""
    grads = torch.randn(5, 1500, generator=torch.Generator().manual_seed(6))
    key, found = MatrixKey("rademacher", 3, 0), {}
    for name in ("avx512", "amx"):
        monkeypatch.setattr(cpu, "_isa", partial(list(cpu.isas()).index, name))
        found[name] = run(grads, 200, key)
    assert torch.equal(found["amx"], found["avx512"])


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_a_prefix(isa, kind):
    key = MatrixKey(kind, 5, 6)
    grads = torch.randint(-3, 4, (3, 1000)).float()
    whole = run(grads, 300, key)
    for proj_dim in (1, 63, 64, 129):
        part = run(grads, proj_dim, key)
        if kind == "rademacher":
            assert torch.equal(part, whole[:, :proj_dim])
        assert torch.allclose(part, whole[:, :proj_dim], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 11])
@pytest.mark.parametrize("row_offset", [0, 1, 127, 128, 300, 511])
def test_few_columns_and_parts_of_panels_have_the_bits_of_whole_ones(isa, batch, row_offset):
    """Vectors of columns, and 128 rows of a panel, that nobody asked for are left out."""
    key = MatrixKey("rademacher", 5, 6)
    for rows in (1, 100, 650):
        grads = torch.randn(batch, rows, generator=torch.Generator().manual_seed(rows))
        panels = torch.zeros(batch, 1536)
        panels[:, row_offset : row_offset + rows] = grads
        whole = run(panels, 130, key)
        for proj_dim in (1, 8, 9, 16, 17, 32, 33, 64, 65, 130):
            part = run(grads, proj_dim, key, row_offset=row_offset)
            assert torch.equal(part, whole[:, :proj_dim])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_equal_their_concatenation_bit_for_bit(isa, dtype):
    key = MatrixKey("rademacher", 8, 9)
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(5, 4000, generator=generator).to(dtype)
    sizes = [1, 511, 0, 700, 1300, 488, 1000]
    pieces = [piece.clone() for piece in grads.split(sizes, dim=1)]
    pieces[4] = torch.empty(1300, 5, dtype=dtype).t().copy_(pieces[4])  # another stride
    assert torch.equal(run(pieces, 70, key, row_offset=77), run(grads, 70, key, row_offset=77))


def test_strides(isa):
    key = MatrixKey("rademacher", 8, 9)
    base = torch.randint(-5, 6, (6, 40, 30)).float()
    for grads in (
        base[:, 3, :],
        base[:, :, 4],
        base.permute(1, 2, 0)[:, :, 2],
        base[::2, ::3, 0],
        base[:, :1, 0].expand(6, 33),
    ):
        wide_out = torch.full((grads.shape[0], 3, 20), torch.nan)
        out = wide_out[:, 1, ::2]
        run(grads, 10, key, out=out)
        assert torch.equal(out.double(), exact(grads, 10, key))
        assert wide_out[:, 0].isnan().all()
        assert wide_out[:, 1, 1::2].isnan().all()


def test_scale_and_accumulate(isa):
    key = MatrixKey("rademacher", 8, 9)
    grads = torch.randint(-5, 6, (3, 777)).float()
    out = torch.arange(30.0).reshape(3, 10)
    expected = out + 0.5 * exact(grads, 10, key)
    run(grads, 10, key, out=out, accumulate=True, scale=0.5)
    assert torch.equal(out.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_stay_in_their_row(isa, dtype, value):
    key = MatrixKey("rademacher", 8, 9)
    grads = torch.randint(-5, 6, (5, 600)).to(dtype)
    expected = run(grads, 70, key)
    grads[2, 300] = value
    for precision in PRECISION_BOUND:
        got = run(grads, 70, key, precision=precision)
        signs = torch.from_numpy(matrix_block(key, 300, 301, 0, 70)).to(got.dtype)[0]
        assert torch.equal(got[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])
        torch.testing.assert_close(got[2], signs * value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transpose(isa, kind, dtype):
    key = MatrixKey(kind, 8, 9)
    for batch, rows, proj_dim, row_offset in SHAPES[:5]:
        y = torch.randint(-8, 9, (batch, proj_dim)).to(dtype) + 0.5
        out = torch.full((batch, rows), torch.nan, dtype=dtype)
        cpu.project_transpose(y, out, Call(key, row_offset))
        block = matrix_block(key, row_offset, row_offset + rows, 0, proj_dim)
        expected = y.double() @ torch.from_numpy(np.asarray(block, dtype=np.float64)).T
        if kind == "rademacher":
            assert torch.equal(out.double(), expected)
        else:
            bound = PRECISION_BOUND["highest"] if dtype == torch.float32 else 1e-14
            assert relative(out - expected, expected) < bound


@pytest.mark.parametrize(
    ("shape", "proj_dim"),
    [
        ((3, 60000), 2100),  # threads share the rows of R and slabs of its columns
        ((1333, 700), 64),  # and here the batch, in parts of 64
        ((2049, 4100), 33),
    ],
)
def test_number_of_threads_changes_nothing(isa, shape, proj_dim):
    if isa == "amx":
        pytest.skip("too large for the emulator; the split into tasks is shared by all sets")
    key = MatrixKey("rademacher", 1, 0)
    grads = torch.randn(shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(grads, proj_dim, key))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    some = torch.tensor([0, 1, shape[0] - 1])  # whatever the batch
    assert torch.equal(results[0][some], run(grads[some], proj_dim, key))


def test_calls_from_several_threads_at_once():
    key = MatrixKey("gaussian", 1, 0)
    grads = [torch.randn(4, 20000 + i) for i in range(6)]
    expected = [run(g, 200, key) for g in grads]
    results: list[torch.Tensor | None] = [None] * len(grads)

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = run(grads[i], 200, key)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(grads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got, want) for got, want in zip(results, expected, strict=True))


def test_a_fork_of_a_process_whose_threads_have_run_projects_too():
    done = subprocess.run([sys.executable, "-c", FORK], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


FORK = """
import os
import torch
import fastproj

torch.set_num_threads(2)
grads = torch.randn(32, 20000)
expected = fastproj.project(grads, 512, seed=0)
torch.randn(1 << 20).sum()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(fastproj.project(grads, 512, seed=0), expected) else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_all_threads_treat_denormal_numbers_as_the_calling_one_does():
    key = MatrixKey("rademacher", 1, 0)
    grads = 1e-39 * torch.randint(1, 9, (64, 200_000)).float()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        kept = run(grads, 512, key)  # the pool's threads exist from here on
        assert kept.count_nonzero() > 0.9 * kept.numel()
        if not torch.set_flush_denormal(True):
            pytest.skip("torch can't flush denormal numbers on this processor")
        assert not run(grads, 512, key).count_nonzero()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert torch.equal(run(grads, 512, key), kept)


def test_more_columns_than_the_workspace_takes_at_once():
    key = MatrixKey("rademacher", 1, 0)
    grads = torch.randint(-8, 9, (1, 3)).float()
    got = run(grads, 70_001, key)
    assert torch.equal(got.double(), exact(grads, 70_001, key))


def test_unknown_and_missing_isa_are_refused_by_name(monkeypatch):
    key = MatrixKey("rademacher", 1, 0)
    missing = [name for name, reason in cpu.isas().items() if reason]
    for name in ["sse9", *missing]:
        monkeypatch.setenv(cpu.ISA_VARIABLE, name)
        with pytest.raises(ValueError, match=rf"{name}.*usable on this machine: portable"):
            run(torch.ones(1, 1), 1, key)
        with pytest.raises(ValueError, match=name), cpu.force_isa(name):
            pass


def test_force_isa_holds_within_its_block():
    with cpu.force_isa("portable"):
        assert cpu.describe()["isa"] == "portable"
    best = [name for name, reason in cpu.isas().items() if not reason][-1]
    assert cpu.describe()["isa"] == best
