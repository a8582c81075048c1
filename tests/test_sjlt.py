"""The sparse kind: known answers, promises and refusals, on every backend that runs here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.backends import cpu
from fastproj.spec import MatrixKey, default_block, matrix_block, sjlt_entries
from tests.dense import DTYPES, integers, normals, relative_error, stored
from tests.essential import essential
from tests.known import blocks, check_block, check_entry, entries

ISAS = [name for name, reason in cpu.isas().items() if not reason]
WAYS = [*ISAS, "reference"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; for the CPU, with one of its instruction sets in force."""
    if request.param == "reference":
        yield "reference"
    else:
        with cpu.force_isa(request.param):
            yield "cpu"


# ---- the matrix --------------------------------------------------------------------------------


def test_known_entries(way: str) -> None:
    assert len(entries("sjlt")) == 440
    for known in entries("sjlt"):
        check_entry(known, backend=way)


def test_known_blocks(way: str) -> None:
    assert len(blocks(sparse=True)) == 5
    for known in blocks(sparse=True):
        check_block(known, backend=way)


@given(
    log2=st.integers(4, 16),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
    row=st.integers(0, 2**56 - 1),
    column=st.integers(0, 2**26 - 1),
)
def test_every_tile_is_a_signed_permutation(
    log2: int, seed: int, stream: int, row: int, column: int
) -> None:
    block = 1 << log2
    tile, c = row // block, column // block
    k = np.arange(c * block, (c + 1) * block, dtype=np.uint64)
    rows, signs = sjlt_entries(MatrixKey("sjlt", seed, stream, block), tile, k)
    assert np.array_equal(np.sort(rows), np.arange(block))
    assert np.array_equal(np.unique(np.abs(signs)), [1])


def test_signs_and_places_are_spread_evenly() -> None:
    """Each bound fails by chance once in 10^9 draws of a matrix (Bernstein; Hoeffding)."""
    block, tiles = 64, 512
    k = np.arange(256, dtype=np.uint64)
    found = [sjlt_entries(MatrixKey("sjlt", 3, 1, block), t, k) for t in range(tiles)]
    rows = np.stack([row for row, _ in found]).astype(np.int64)  # [tile, column]
    signs = np.stack([sign for _, sign in found]).astype(np.int64)
    bound = math.sqrt(2 * tiles * 256 * math.log(2 / 1e-9))
    assert abs(signs.sum()) < bound
    for distance in (1, 2, 4, 16, 64, 128):  # neighbours in a chunk, a quad, a tile
        assert abs((signs[:, distance:] * signs[:, :-distance]).sum()) < bound
    assert abs((signs[1:] * signs[:-1]).sum()) < bound
    for column in range(0, 256, 37):  # where a column's entry lies, over the tiles
        counts = np.bincount(rows[:, column], minlength=block)
        limit = math.sqrt(2 * tiles / block * math.log(2 * block / 1e-9)) + math.log(2 / 1e-9) / 3
        assert np.abs(counts - tiles / block).max() < limit


def test_seeds_streams_blocks_and_tiles_differ() -> None:
    def places(seed: int, stream: int, block: int, tile: int, c: int = 0) -> np.ndarray:
        k = np.arange(c * block, c * block + 256, dtype=np.uint64)
        row, sign = sjlt_entries(MatrixKey("sjlt", seed, stream, block), tile, k)
        return np.where(sign > 0, row, row + block)

    samples = [
        places(0, 0, 256, 0),
        places(1, 0, 256, 0),
        places(1 << 32, 0, 256, 0),
        places(0, 1, 256, 0),
        places(0, 1 << 31, 256, 0),
        places(0, 0, 256, 1),
        places(0, 0, 256, 1 << 32),
        places(0, 0, 256, 0, c=1),
        places(0, 0, 512, 0),
    ]
    for i, one in enumerate(samples):
        for other in samples[:i]:
            assert (one == other).mean() < 0.2


def test_the_default_block_leaves_four_to_eight_entries_a_row() -> None:
    for proj_dim in (64, 65, 127, 128, 1000, 4095, 4096, 5000, 65536, 2**18):
        block = default_block(proj_dim)
        assert block & (block - 1) == 0
        assert 4 <= proj_dim / block < 8
    assert default_block(1) == default_block(63) == 16
    assert default_block(2**18) == default_block(2**30) == 65536
    assert fastproj.Projector(10, 4096, kind="sjlt").block == 1024
    assert fastproj.Projector(10, 4096).block is None


# ---- products ----------------------------------------------------------------------------------

SHAPES = [  # B, P, K, row offset, block
    (1, 1, 1, 0, 16),
    (3, 17, 5, 11, 16),
    (2, 5000, 100, 7, 32),
    (1, 3000, 4096, (1 << 40) + 5, 1024),
    (5, 9000, 1000, 3, 4096),
    (40, 700, 70, 0, 64),
    (2, 70000, 130, 65535, 65536),
    (1, 2000, 300000, 1, 256),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_exact(way: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, P, K, offset, block = shape
    if way == "reference" and K > 10000:
        K = 1000
    g = integers((B, P), dtype=dtype)
    y = fastproj.project(
        g, K, 5, "sjlt", block=block, stream=2, row_offset=offset, scale=None, backend=way
    )
    r = stored(P, min(K, 5000), 5, "sjlt", 2, offset, block=block)
    assert torch.equal(y[:, :5000].double(), g.double() @ r)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    "shape", [(1, 1000, 32769, 16), (3, 9000, 65600, 32), (4, 9000, 131073, 128)], ids=str
)
@pytest.mark.parametrize("isa", ISAS)
def test_a_last_slab_of_columns_that_is_narrower(
    isa: str, threads: int, shape: tuple[int, ...]
) -> None:
    """A narrow slab would have the tables of more tiles at once than a wide one."""
    B, P, K, block = shape
    g = integers((B, P), dtype=torch.float32)
    how: dict[str, Any] = {"kind": "sjlt", "block": block, "scale": None, "backend": "cpu"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with cpu.force_isa(isa):
            y = fastproj.project(g, K, 5, **how)
            ones = fastproj.project_transpose(torch.ones(1, K), P, 5, **how)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y.double().sum(1, keepdim=True), g.double() @ ones.double().T)
    r = stored(P, 5000, 5, "sjlt", 0, 0, block=block)
    assert torch.equal(y[:, :5000].double(), g.double() @ r)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.half, torch.int8], ids=str
)
def test_each_dtype_holds_the_entries_exactly(way: str, dtype: torch.dtype) -> None:
    how: dict[str, Any] = {"kind": "sjlt", "block": 32, "dtype": dtype, "backend": way}
    page = stored(777, 100, 5, "sjlt", 0, 0, block=32)
    found = fastproj.matrix(777, 100, 5, **how)
    assert found.dtype == dtype
    assert torch.equal(found.double(), page)
    rows = torch.tensor([776, 0, 31, 32, 0])
    assert torch.equal(fastproj.matrix(rows, slice(7, 90), 5, **how).double(), page[rows, 7:90])


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adjoint_is_exact_on_integers(
    way: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    B, n, K, offset, block = shape
    y = integers((B, K), dtype=dtype)
    g = fastproj.project_transpose(
        y, slice(offset, offset + n), 5, "sjlt", block=block, stream=2, scale=None, backend=way
    )
    assert torch.equal(g.double(), y.double() @ stored(n, K, 5, "sjlt", 2, offset, block=block).T)


def test_pieces_strides_threads_and_batches_change_no_bit(way: str) -> None:
    g = normals((9, 6000))
    how = {"kind": "sjlt", "block": 256, "row_offset": 100, "backend": way}
    y = fastproj.project(g, 600, **how)
    wide = torch.zeros(9, 2, 6000)
    wide[:, 1] = g
    apart = torch.zeros(6000, 18)
    apart[:, ::2] = g.T
    for same in (
        [g[:, :1], g[:, 1:777], g[:, 777:777], g[:, 777:]],
        {"a": g[:, :3000].reshape(9, 30, 100), "b": g[:, 3000:].T.contiguous().T},
        wide[:, 1],
        apart[:, ::2].T,
        torch.cat([torch.zeros(9, 3), g], 1)[:, 3:],  # rows that start at odd addresses
    ):
        assert torch.equal(fastproj.project(same, 600, **how), y)
    for rows in (slice(0, 1), slice(4, 9)):
        assert torch.equal(fastproj.project(g[rows], 600, **how), y[rows])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(fastproj.project(g, 600, **how), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_segments_of_rows_are_added_in_order(isa: str, dtype: torch.dtype) -> None:
    """32 segments of P, whichever thread is first; batch tiles of 32, pairs of samples and one."""
    g = normals((35, 40_000)).to(dtype)
    how = {"kind": "sjlt", "block": 16, "row_offset": 7, "backend": "cpu"}
    threads = torch.get_num_threads()
    try:
        with cpu.force_isa(isa):
            torch.set_num_threads(1)
            y = fastproj.project(g, 64, **how)
            assert torch.equal(fastproj.project(g[:1], 64, **how), y[:1])
            for count in (2, 5):
                torch.set_num_threads(count)
                assert torch.equal(fastproj.project(g, 64, **how), y)
        with cpu.force_isa("portable"):
            assert torch.equal(fastproj.project(g, 64, **how), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone can tell")
def test_the_adjoint_of_many_samples_packs_a_few_at_a_time() -> None:
    """All of y packed would be 256 MiB."""
    y = torch.ones(1, 4096).expand(16384, 4096)

    def peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) >> 10

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    fastproj.project_transpose(y, 16, kind="sjlt", block=16, backend="cpu")
    assert peak() - before < 64


def test_parts_of_rows_add_up(way: str) -> None:
    g = integers((2, 3000))
    how = {"kind": "sjlt", "block": 128, "scale": None, "backend": way}
    out = torch.full((2, 500), float("nan"))
    fastproj.project(g[:, :1001], 500, out=out, **how)
    fastproj.project(g[:, 1001:], 500, row_offset=1001, out=out, accumulate=True, **how)
    assert torch.equal(out, fastproj.project(g, 500, **how))


def test_columns_are_a_prefix_for_one_block(way: str) -> None:
    g = integers((2, 3000))
    wide = fastproj.project(g, 700, kind="sjlt", block=64, scale=None, backend=way)
    narrow = fastproj.project(g, 133, kind="sjlt", block=64, scale=None, backend=way)
    assert torch.equal(narrow, wide[:, :133])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_its_row_has_entries(way: str, bad: float) -> None:
    g = torch.ones(3, 2000)
    g[1, 1234] = bad
    how = {"kind": "sjlt", "block": 256, "backend": way}
    y = fastproj.project(g, 1024, **how)
    reached = stored(2000, 1024, kind="sjlt", block=256)[1234] != 0
    assert reached.sum() == 4
    assert torch.equal(
        ~y.isfinite(), torch.stack([torch.zeros(1024), reached, torch.zeros(1024)]) > 0
    )
    assert torch.equal(y[1, ~reached], y[0, ~reached])
    y = torch.ones(1, 1024)
    y[0, 77] = bad
    back = fastproj.project_transpose(y, 2000, kind="sjlt", block=256, backend=way)
    assert torch.equal(~back[0].isfinite(), stored(2000, 1024, kind="sjlt", block=256)[:, 77] != 0)


@pytest.mark.parametrize(
    "way", essential(WAYS, [way for way in WAYS if way != "reference"]), indirect=True
)
def test_long_sums_do_not_drift(way: str) -> None:
    """The error of 2^18 additions of a constant and noise, against float64."""
    g = normals((1, 1 << 18)) + 1.0
    y = fastproj.project(g, 16, kind="sjlt", block=16, scale=None, backend=way)
    truth = fastproj.project(g.double(), 16, kind="sjlt", block=16, scale=None, backend=way)
    assert relative_error(y, truth) < 1e-6  # one accumulator alone: about 1e-5


def test_norms_are_kept_on_average() -> None:
    """scale="jl": E |y|^2 = |g|^2, for any block; 2000 draws, standard error below 0.03."""
    g = normals((1, 300), seed=4)
    for K, block in ((64, 16), (40, 64), (64, 64)):
        norms = [
            float(fastproj.project(g, K, seed, "sjlt", block=block).square().sum())
            for seed in range(2000)
        ]
        ratio = np.mean(norms) / float(g.square().sum())
        error = np.std(norms) / float(g.square().sum()) / math.sqrt(len(norms))
        assert error < 0.03
        assert abs(ratio - 1) < 6 * error


# ---- derivatives and transforms ----------------------------------------------------------------


def test_gradients() -> None:
    g = normals((2, 50), dtype=torch.float64).requires_grad_()
    y = normals((2, 40), dtype=torch.float64).requires_grad_()
    how = {"kind": "sjlt", "block": 16}
    assert torch.autograd.gradcheck(lambda g: fastproj.project(g, 40, **how), (g,))
    assert torch.autograd.gradcheck(lambda y: fastproj.project_transpose(y, 50, **how), (y,))
    assert torch.autograd.gradgradcheck(lambda g: fastproj.project(g, 40, **how), (g,))


def test_vmap_and_compile() -> None:
    g = integers((4, 3, 500))
    how = {"kind": "sjlt", "block": 32, "scale": None}

    def project(g: Tensor) -> Tensor:
        return fastproj.project(g, 200, **how)

    expected = torch.stack([project(one) for one in g])
    assert torch.equal(torch.vmap(project)(g), expected)
    compiled = torch.compile(project, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(g[0]), expected[0])
    torch.library.opcheck(
        torch.ops.fastproj.project,
        ([g[0]], 200, 0, 1.0, ",", "sjlt,32", 0, 0),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_of_projectors_with_blocks_of_their_own(dynamic: bool | None) -> None:
    def run(projector: fastproj.Projector, g: Tensor) -> tuple[Tensor, Tensor]:
        y = projector.project(g)
        return projector.project_transpose(y), projector.matrix(cols=7)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    g = integers((3, 50))
    for seed, proj_dim in ((0, 40), (1, 130), (2, 300)):
        projector = fastproj.Projector(50, proj_dim, seed, "sjlt", scale=None)
        for got, expected in zip(compiled(projector, g), run(projector, g), strict=True):
            assert torch.equal(got, expected), projector


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "rademacher", "block": 16}, ValueError, "only kind='sjlt' has a block"),
        ({"kind": "gaussian", "block": 1024}, ValueError, "expected None"),
        ({"kind": "sjlt", "block": 0}, ValueError, "a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": 8}, ValueError, "=8; expected a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": 1 << 17}, ValueError, "a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": 1 << 70}, ValueError, "a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": 48}, ValueError, "a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": 32.0}, TypeError, "a power of two from 16 to 65536"),
        ({"kind": "sjlt", "block": True}, TypeError, "a power of two from 16 to 65536"),
        ({"kind": "SJLT"}, ValueError, "rademacher, gaussian, sjlt"),
    ],
)
def test_bad_blocks_are_refused(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    g = torch.ones(2, 100)
    for call in (
        lambda: fastproj.project(g, 64, **options),  # type: ignore[arg-type]
        lambda: fastproj.project_transpose(g, 64, **options),  # type: ignore[arg-type]
        lambda: fastproj.matrix(100, 64, **options),  # type: ignore[arg-type]
        lambda: fastproj.Projector(100, 64, **options),  # type: ignore[arg-type]
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("word", ["sjlt,0", "sjlt,8", "sjlt,24", "sjlt,131072", "sjlt,-16"])
def test_the_ops_refuse_a_block_that_no_kernel_has(word: str) -> None:
    """A kernel would shift by a negative number, or take another block than the one named."""
    g, y = torch.ones(2, 100), torch.ones(2, 64)
    how = (0, 1.0, ",", word, 0, 0)
    fastproj.project(g, 64)  # which registers the ops
    ops = torch.ops.fastproj
    for call in (
        lambda: ops.project([g], 64, *how),
        lambda: ops.project_into([g], y, False, *how),
        lambda: ops.project_transpose(y, 100, *how),
        lambda: ops.matrix(100, 64, 0, torch.float32, torch.device("cpu"), *how),
    ):
        with pytest.raises(ValueError, match="a power of two from 16 to 65536"):
            call()
    with pytest.raises(ValueError, match="only kind='sjlt' has a block"):
        ops.project([g], 64, 0, 1.0, ",", "rademacher,16", 0, 0)


def test_a_block_of_the_matrix_needs_its_block_named() -> None:
    with pytest.raises(ValueError, match=r"received kind='sjlt' without block=.*power of two"):
        fastproj.matrix(10, 10, kind="sjlt")


def test_the_projector_uses_one_block_throughout() -> None:
    projector = fastproj.Projector(3000, 500, 3, "sjlt")
    assert projector.block == 64
    g = integers((2, 3000))
    r = projector.matrix(model_id=4, dtype=torch.float64)
    assert torch.equal(r, stored(3000, 500, 3, "sjlt", 4, block=64))
    y = projector.project(g, 4)
    torch.testing.assert_close(y.double(), g.double() @ r * math.sqrt(64 / 500))
    back = projector.project_transpose(y, 4, rows=slice(10, 900))
    torch.testing.assert_close(
        back.double(), y.double() @ r[10:900].T * math.sqrt(64 / 500), rtol=1e-5, atol=1e-4
    )
    assert "block=64" in repr(projector)
    # So do the functions, without a projector.
    assert torch.equal(fastproj.project(g, 500, 3, "sjlt", stream=4), y)
    assert torch.equal(fastproj.project_transpose(y, slice(10, 900), 3, "sjlt", stream=4), back)


def test_the_page_of_blocks_of_any_place() -> None:
    key = MatrixKey("sjlt", 9, 1, 64)
    whole = matrix_block(key, 0, 400, 0, 200)
    assert np.array_equal(matrix_block(key, 65, 333, 17, 190), whole[65:333, 17:190])
    assert (np.abs(whole).reshape(400, -1)[:384].sum(1) >= 3).all()  # 200 / 64 entries a row
