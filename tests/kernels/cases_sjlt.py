"""What the sparse kind's kernels must give; collected and run as cases.py is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import fastproj
from fastproj.backends import registry
from fastproj.backends import triton as adapter
from fastproj.call import Call
from fastproj.kernels import config, launch, plan
from fastproj.spec import MatrixKey, sjlt_entries
from fastproj.trak.gradients.parts import Product, Workspace
from fastproj.trak.gradients.sinks import ProjectingSink
from tests.dense import integers, normals, relative_error, stored
from tests.essential import essential, slow
from tests.kernels.cases import DEVICE, FLOATS, INTERPRETED, MAX_SEED
from tests.kernels.cases import poisoned_memory as poisoned_memory  # a fixture for all tests here
from tests.known import Block, blocks, check_block, check_entry, entries

FAR = 2**32 - 1  # the last stream
# block, columns, rows, row offset: inside a tile, across tiles and the counter's high half, whole
# panels between two edges, columns beyond a program's, a tile that is larger than everything
SHAPES = [
    (16, 70, 300, 5),
    (32, 200, 150, (32 << 32) - 77),
    (64, 33, 1100, 2**45 + 63),
    (16, 300, 600, 37),
    (65536, 65, 3000, 65536 - 1000),
]
if not INTERPRETED:
    SHAPES += [
        (16, 64, 100_003, 7),
        (1024, 4096, 1_000_003, 511),
        (4096, 5000, 200_000, (4096 << 32) - 100_000),
        (16384, 70_000, 150_000, 3),
        (65536, 300_000, 400_000, 0),
    ]


def project(grads: Tensor | list[Tensor], columns: int, block: int, **options: object) -> Tensor:
    given = {"scale": None, "backend": "triton", "kind": "sjlt", "block": block, **options}
    return fastproj.project(grads, columns, **given)  # type: ignore[arg-type]


def of(rows: int, columns: int, block: int, **key: int) -> Tensor:
    return stored(rows, columns, kind="sjlt", block=block, device=DEVICE, **key)


def times(grads: Tensor, columns: int, block: int, **key: int) -> Tensor:
    """grads @ of(P, columns, block, ...), float64, from the places of the entries: R itself would
    take up to a terabyte.
    """
    P, offset = grads.shape[1], key.get("row_offset", 0)
    of_spec = MatrixKey("sjlt", key.get("seed", 0), key.get("stream", 0), block)
    k = np.arange(columns, dtype=np.uint64)
    total = torch.zeros((grads.shape[0], columns), dtype=torch.float64, device=grads.device)
    for tile in range(offset // block, -(-(offset + P) // block)):
        row, sign = sjlt_entries(of_spec, tile, k)
        at = row.astype(np.int64) + (tile * block - offset)
        sign = np.where((at >= 0) & (at < P), sign, np.int8(0))
        place, factor = (torch.from_numpy(x).to(grads.device) for x in (at.clip(0, P - 1), sign))
        total += grads[:, place].double() * factor
    return total


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_sjlt_truth_without_r(shape: tuple[int, int, int, int]) -> None:
    block, columns, rows, offset = shape
    grads = integers((3, rows)).to(DEVICE)
    key = {"seed": 7, "stream": FAR, "row_offset": offset}
    expected = grads.double() @ of(rows, columns, block, **key)
    assert torch.equal(times(grads, columns, block, **key), expected)


# ---- the matrix --------------------------------------------------------------------------------


def test_sjlt_known_entries() -> None:
    for known in entries("sjlt")[:: 17 if INTERPRETED else 1]:
        check_entry(known, device=DEVICE, backend="triton")


@pytest.mark.slow
def test_sjlt_all_known_entries() -> None:
    for known in entries("sjlt"):
        check_entry(known, device=DEVICE, backend="triton")


def ids(known: Block) -> str:
    return "-".join(map(str, known[1:]))


@pytest.mark.parametrize("known", blocks(sparse=True)[: 2 if INTERPRETED else None], ids=ids)
def test_sjlt_known_blocks(known: Block) -> None:
    check_block(known, device=DEVICE, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("known", blocks(sparse=True), ids=ids)
def test_sjlt_all_known_blocks(known: Block) -> None:
    check_block(known, device=DEVICE, backend="triton")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block", [16, 65536])
def test_sjlt_matrix_dtypes(block: int, dtype: torch.dtype) -> None:
    """Any dtype and strides; columns up to the last, rows across the counter's high half."""
    start, stop = (block << 32) - 20, (block << 32) + 10
    columns = slice(2**32 - 70, 2**32)
    out = fastproj.matrix(
        slice(start, stop), columns, MAX_SEED, "sjlt", block=block, stream=FAR, dtype=dtype,
        device=DEVICE, backend="triton",
    )  # fmt: skip
    key = MatrixKey("sjlt", MAX_SEED, FAR, block)
    truth = torch.from_numpy(
        fastproj.spec.matrix_block(key, start, stop, columns.start, columns.stop)
    )
    assert torch.equal(out, truth.to(DEVICE, dtype))
    transposed = torch.empty((70, 30), dtype=dtype, device=DEVICE).T
    adapter.matrix(transposed, Call(key, start), columns.start)
    assert torch.equal(transposed, truth.to(DEVICE, dtype))


# ---- projection --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", essential(FLOATS[:2] if INTERPRETED else FLOATS, FLOATS[:1]))
def test_sjlt_project(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    block, columns, rows, offset = shape
    grads = integers((3, rows), dtype=dtype).to(DEVICE)
    key = {"seed": MAX_SEED - 7, "stream": FAR, "row_offset": offset}
    result = project(grads, columns, block, **key)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.double(), times(grads, columns, block, **key))


@pytest.mark.parametrize("dtype", FLOATS)
def test_sjlt_project_dtypes(dtype: torch.dtype) -> None:
    """Every sum is of at most 20 entries: at most 20 roundings in the dtype of the sums."""
    grads = normals((2, 320)).to(DEVICE, dtype)
    r = of(320, 66, 16)
    result = project(grads, 66, 16)
    double = dtype == torch.float64
    assert result.dtype == (torch.float64 if double else torch.float32)
    bound = 20 * (2.0**-53 if double else 2.0**-24) * (grads.double().abs() @ r.abs())
    assert ((result.double() - grads.double() @ r).abs() <= bound).all()


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
def test_sjlt_every_block(block: int) -> None:
    grads = integers((1, 500)).to(DEVICE)
    truth = grads.double() @ of(500, 129, block, row_offset=7 * block - 100)
    assert torch.equal(project(grads, 129, block, row_offset=7 * block - 100).double(), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sjlt_pairs(dtype: torch.dtype) -> None:
    """Aligned rows of 16 bits are read by twos, and give bit for bit what single ones give."""
    flat = normals((3, 257)).to(DEVICE, dtype)
    grads = flat[:, 1:].contiguous()  # [3, 256], aligned: whole panels, no masks
    by_pairs = project(grads, 130, 32)
    assert torch.equal(by_pairs, project(flat[:, 1:], 130, 32))
    truth = grads.double() @ of(256, 130, 32)
    assert relative_error(by_pairs, truth) < 2.0**-21


def test_sjlt_strides() -> None:
    """Any strides in, any out; adding to what is there; a scale."""
    flat = integers((7, 2704)).to(DEVICE, torch.bfloat16)
    views = {
        "every other row": flat[::2, :600],
        "from an odd column": flat[:3, 5:605],
        "every third column": flat[:, ::3],
        "transposed": flat[:, :600].T.contiguous().T,
        "one row for all": flat[:1, :600].expand(4, -1),
    }
    for name, grads in views.items():
        truth = grads.double() @ of(grads.shape[1], 33, 16, row_offset=43)
        out = torch.full((33, grads.shape[0]), 3.0, device=DEVICE).T
        project(grads, 33, 16, row_offset=43, out=out, accumulate=True, scale=0.5)
        assert torch.equal(out.double(), 3 + 0.5 * truth), name


def test_sjlt_pieces() -> None:
    """Pieces that end inside a tile, empty ones and single rows are their concatenation."""
    pieces = [integers((3, size), seed=size).to(DEVICE) for size in (1, 513, 0, 300, 3)]
    whole = torch.cat(pieces, 1)
    truth = whole.double() @ of(817, 40, 64, row_offset=300)
    assert torch.equal(project(pieces, 40, 64, row_offset=300).double(), truth)


def test_sjlt_nothing_to_add() -> None:
    out = torch.empty((2, 5), device=DEVICE)
    call = Call(MatrixKey("sjlt", 0, 0, 16))
    adapter.project([torch.empty((2, 0), device=DEVICE)], out, call)
    assert torch.equal(out, torch.zeros_like(out))


def test_sjlt_many_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, columns and partial sums beyond one launch and one workspace; tiles in the middle of
    one another's columns.
    """
    monkeypatch.setattr(plan, "MAX_BATCH", 8)
    monkeypatch.setattr(plan, "MAX_COLUMNS", 64)  # 128 of kind sjlt
    monkeypatch.setattr(plan, "WORKSPACE_BYTES", 8 * 128 * 4 * 3)  # three slots
    pieces = [integers((9, size), seed=size).to(DEVICE) for size in (100, 1500, 30)]
    truth = torch.cat(pieces, 1).double() @ of(1630, 200, 256)
    launch.cached_plan.cache_clear()
    try:
        assert torch.equal(project(pieces, 200, 256).double(), truth)
    finally:
        launch.cached_plan.cache_clear()


@pytest.mark.slow
def test_sjlt_pinned_configurations_agree() -> None:
    """Tiles change nothing, nor does the batch: the same sums in the same order."""
    grads = normals((5, 1000 if INTERPRETED else 100_000)).to(DEVICE)
    expected = project(grads, 250, 128)
    for pins in ({"BLOCK_B": 1}, {"BLOCK_K": 64}, {"BLOCK_B": 8, "num_warps": 2}):
        with config.pin(**pins):
            assert torch.equal(project(grads, 250, 128), expected), pins
    for rows in (slice(0, 1), slice(1, 4)):
        assert torch.equal(project(grads[rows], 250, 128), expected[rows])


def test_sjlt_rejects_pins_that_it_cannot_take() -> None:
    grads = integers((1, 100)).to(DEVICE)
    for pins in ({"BLOCK_K": 8192}, {"BLOCK_K": 32}, {"STEP_ROWS": 512}):
        with pytest.raises(ValueError, match="expected BLOCK_K from 64 to 128"), config.pin(**pins):
            project(grads, 128, 16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_sjlt_not_finite(dtype: torch.dtype) -> None:
    """NaN and infinities reach the columns where their row has an entry, and no others."""
    grads = integers((4, 200), dtype=dtype).to(DEVICE)
    grads[0, 3], grads[1, 150] = float("nan"), float("inf")
    grads[2, 5], grads[2, 6] = float("inf"), float("-inf")
    result = project(grads, 100, 16, row_offset=3)
    r = of(200, 100, 16, row_offset=3)
    products = torch.where(r == 0, 0.0, grads.double()[:, :, None] * r)
    truth = products.sum(1).to(result.dtype)
    torch.testing.assert_close(result, truth, rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(result[0]).sum() == (r[3] != 0).sum() < 100


@pytest.mark.skipif(INTERPRETED, reason="long")
def test_sjlt_long_sums() -> None:
    """The error of sums of 10^5 terms of one sign is at most twice that of a float32 matmul."""
    rows, step = 1_600_000, 2**16
    grads = torch.rand((2, rows), device=DEVICE)
    truth = torch.zeros((2, 16), dtype=torch.float64, device=DEVICE)
    usual = torch.zeros((2, 16), device=DEVICE)
    for start in range(0, rows, step):
        part = grads[:, start : start + step]
        r = of(part.shape[1], 16, 16, row_offset=start)
        part *= torch.where(r[:, :8].sum(1) == 0, 1.0, r[:, :8].sum(1)).float()
        truth += part.double() @ r
        usual += part @ r.float()
    error = relative_error(project(grads, 16, 16), truth)
    assert error <= 2 * relative_error(usual, truth)


# ---- products, sketched as they form -----------------------------------------------------------

# B, T, m, n, K, block, row offset: whole tiles, stretches across tiles, beyond a stretch, few rows
PRODUCTS = [
    (2, 5, 3, 64, 130, 64, 0),
    (1, 33, 17, 70, 64, 64, 37),
    (1, 3, 2, 130, 200, 128, 2**45 + 63),
    (1, 1, 2, 600, 1000, 1024, 1000),
]
if not INTERPRETED:
    PRODUCTS += [(8, 128, 768, 768, 4096, 1024, 12345), (33, 70, 1000, 3072, 5000, 512, 0)]


def factors(B: int, T: int, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low = torch.finfo(dtype).bits == 16  # products of 4 bits each are exact in it
    left, right = integers((B, T, m)), integers((B, T, n), seed=1)
    return tuple((t % 5 if low else t % 33).to(DEVICE, dtype) for t in (left, right))  # type: ignore[return-value]


def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.PRODUCTS["triton"], "1")


def projector(K: int, block: int, rows: int, **options: object) -> fastproj.Projector:
    given = {"seed": 2**63 + 5, "kind": "sjlt", "block": block, "scale": 0.5, "backend": "triton"}
    return fastproj.Projector(rows, K, **given | options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.float32) for shape in PRODUCTS),
        *((shape, torch.bfloat16) for shape in PRODUCTS[:1] + PRODUCTS[4:]),
        (PRODUCTS[0], torch.float16),
    ],
    ids=str,
)
def test_sjlt_products(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added to what is there, equal to the projection of the products, whatever the batch."""
    asked(monkeypatch)
    B, T, m, n, K, block, offset = shape
    left, right = factors(B, T, m, n, dtype)
    ours = projector(K, block, offset + m * n)
    out = torch.ones((B, K), device=DEVICE)
    assert ours.add_product(left, right, 3, row_offset=offset, out=out)
    products = torch.einsum("btm,btn->bmn", left.double(), right.double()).flatten(1)
    truth = times(products, K, block, seed=2**63 + 5, stream=3, row_offset=offset)
    assert torch.equal(out.double(), 1 + 0.5 * truth)
    some = torch.ones((1, K), device=DEVICE)
    assert ours.add_product(left[-1:], right[-1:], 3, row_offset=offset, out=some)
    assert torch.equal(some[0], out[-1])


def test_sjlt_products_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN reaches the columns where its rows have entries, and no others: padding has none."""
    asked(monkeypatch)
    left, right = factors(1, 2, 3, 70, torch.float32)
    right[0, 1, 5] = float("nan")
    out = torch.zeros((1, 256), device=DEVICE)
    assert projector(256, 256, 210).add_product(left, right, row_offset=0, out=out)
    r = of(210, 256, 256, seed=2**63 + 5)
    reached = (r[5::70] != 0).any(0)
    assert torch.equal(torch.isnan(out[0]), reached)


def test_sjlt_products_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = factors(2, 2, 3, 64, torch.float32)
    out = torch.full((2, 64), 7.0, device=DEVICE)
    ours = projector(64, 64, 192)
    assert not ours.add_product(left, right, row_offset=0, out=out)  # nobody asked for it
    asked(monkeypatch)
    strided = left.transpose(1, 2).contiguous().transpose(1, 2)
    far = (64 << 32) - 100
    for factor, where, other in [
        (strided, 0, ours),
        (left.bfloat16(), 0, ours),
        (left.double(), 0, ours),
        (left, far, projector(64, 64, far + 192)),
        (left, 0, projector(64, 16, 192)),
        (left, 0, projector(64, 2048, 192)),
        (left, 0, projector(64, 64, 192, backend="reference")),
    ]:
        same = right.double() if factor.dtype == torch.float64 else right
        assert not other.add_product(factor, same, row_offset=where, out=out)
    assert torch.equal(out, torch.full_like(out, 7.0))


@pytest.mark.parametrize(
    ("left", "right", "offset", "out", "said"),
    [
        ((2, 3, 4), (2, 5, 6), 0, (2, 64), r"left \[2, 3, 4\] and right \[2, 5, 6\]"),
        ((2, 4), (2, 6), 0, (2, 64), "expected"),
        ((2, 3, 4), (2, 3, 6), 1, (2, 64), "row_offset \\+ P <= grad_dim = 24"),
        ((2, 3, 4), (2, 3, 6), 0, (2, 63), r"out \[2, 63\]"),
        ((2, 3, 4), (2, 3, 6), 0, (1, 64), r"expected out \[2, 64\]"),
    ],
)
def test_sjlt_products_that_make_no_sense(
    left: tuple[int, ...],
    right: tuple[int, ...],
    offset: int,
    out: tuple[int, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked(monkeypatch)
    given = (torch.zeros(shape, device=DEVICE) for shape in (left, right))
    with pytest.raises(ValueError, match=said):
        projector(64, 64, 24).add_product(
            *given, row_offset=offset, out=torch.zeros(out, device=DEVICE)
        )


@pytest.mark.parametrize("name", ["left", "right", "out"])
def test_sjlt_products_of_no_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked(monkeypatch)
    given: dict[str, object] = {
        "left": torch.zeros(2, 3, 4, device=DEVICE),
        "right": torch.zeros(2, 3, 5, device=DEVICE),
        "out": torch.zeros(2, 64, device=DEVICE),
    }
    with pytest.raises(TypeError, match=rf"add_product: received {name} of type list"):
        projector(64, 64, 24).add_product(**{**given, name: [1]}, row_offset=0)  # type: ignore[arg-type]


class Halved(fastproj.Projector):
    """A projector with a ``project`` of its own."""

    def project(self, grads: Tensor, *args: object, **options: object) -> Tensor:  # type: ignore[override]
        return super().project(grads / 2, *args, **options)  # type: ignore[arg-type]


def test_sjlt_products_are_not_for_projectors_that_override_project(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked(monkeypatch)
    left, right = factors(2, 3, 5, 64, torch.float32)
    params = {"weight": torch.zeros(5, 64)}
    found = []
    for kind in (Halved, fastproj.Projector):
        ours = kind(320, 64, 1, "sjlt", block=64, backend="triton")
        sink = ProjectingSink(params, 2, ours, 0, {})
        sink.out = sink.out.to(DEVICE)
        sink.add("weight", Product(left, right, Workspace()))
        sink.flush()
        found.append(sink.out)
    assert torch.equal(found[0], found[1] / 2)
    assert found[0].abs().sum() > 0


def test_sjlt_products_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient's sink asks for the kernel, and what it can't take goes by pieces."""
    left, right = factors(2, 3, 5, 64, torch.float32)
    params = {"bias": torch.zeros(5), "weight": torch.zeros(5, 64), "other": torch.zeros(64, 5)}
    found = []
    for value in ("0", "1"):
        monkeypatch.setenv(registry.PRODUCTS["triton"], value)
        sink = ProjectingSink(params, 2, projector(100, 64, 645), 0, {})
        sink.out = sink.out.to(DEVICE)
        sink.add("weight", Product(left, right, Workspace()))
        sink.add("other", Product(right, left.mT.contiguous().mT, Workspace()))
        sink.flush()
        found.append(sink.out)
    assert torch.equal(found[0], found[1])
    assert found[0].abs().sum() > 0


# ---- the adjoint -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (16, torch.float32),
        *(slow((16, dtype)) for dtype in FLOATS[1:]),
        (64, torch.float32),
        (4096, torch.bfloat16),
    ],
    ids=str,
)
def test_sjlt_project_transpose(block: int, dtype: torch.dtype) -> None:
    shapes = [(3, 70, slice(3, 60)), (1, 33, slice((block << 32) - 30, (block << 32) + 50))]
    if not INTERPRETED:
        shapes += [(33, 5000, slice(1000, 20_001)), (130, 64, slice(0, 512))]
    for B, K, rows in shapes:
        y = integers((B, K), dtype=dtype).to(DEVICE)
        result = fastproj.project_transpose(
            y, rows, 3, "sjlt", block=block, stream=1, scale=None, backend="triton"
        )
        r = of(rows.stop - rows.start, K, block, seed=3, stream=1, row_offset=rows.start)
        assert torch.equal(result.double(), y.double() @ r.T), (B, K, rows)


def test_sjlt_project_transpose_strides() -> None:
    y = integers((40, 3)).to(DEVICE).T
    out = torch.empty((300, 3), device=DEVICE).T
    fastproj.project_transpose(y, 300, 3, "sjlt", block=32, scale=0.25, out=out, backend="triton")
    assert torch.equal(out.double(), 0.25 * y.double() @ of(300, 40, 32, seed=3).T)
