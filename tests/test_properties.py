"""Drawn kinds, blocks, shapes, strides, offsets, dtypes and splits, on every backend against the
reference.

Where entries are integers, so are the sums of small integers, exactly in any order: the comparisons
are equalities. Under Gaussian they use the bound that holds for any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastproj
from fastproj.backends import cpu
from tests.dense import DTYPES, KINDS, integers, matmul_bound, stored

# Sizes around the blocks of spec and kernels: 1, 8, 16, 32, 64, 512, and what lies between.
SIZES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 511, 512, 513, 1025]))
BATCHES = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 65]))
OFFSETS = st.one_of(
    st.integers(0, 1100),
    st.integers(0, 2**40),
    st.sampled_from([2**31 - 1, 2**32 - 5, 2**37 - 3, 2**40]),
)


@dataclass(frozen=True)
class Key:
    """The arguments that name a matrix, and a first row."""

    seed: int
    kind: str
    stream: int
    row_offset: int
    block: int = 0  # of the sparse kind alone

    def named(self) -> dict[str, Any]:
        """The arguments that name the matrix."""
        how = {"seed": self.seed, "kind": self.kind, "stream": self.stream}
        return how | {"block": self.block} if self.block else how

    def kwargs(self) -> dict[str, Any]:
        return {**self.named(), "row_offset": self.row_offset}


BLOCKS = st.integers(4, 16).map(lambda log2: 1 << log2)


def keys(kind: st.SearchStrategy[str]) -> st.SearchStrategy[Key]:
    """Keys of drawn kinds; a block where the kind is sparse."""

    def of(kind: str) -> st.SearchStrategy[Key]:
        return st.builds(
            Key,
            seed=st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1)),
            kind=st.just(kind),
            stream=st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1)),
            row_offset=OFFSETS,
            block=BLOCKS if kind == "sjlt" else st.just(0),
        )

    return kind.flatmap(of)


KEYS = keys(st.sampled_from([*KINDS, "sjlt"]))
EXACT_KEYS = keys(st.sampled_from(["rademacher", "sjlt"]))


@st.composite
def strided(
    draw: st.DrawFn, batch: st.SearchStrategy[int] = BATCHES, dtype: torch.dtype | None = None
) -> Tensor:
    """A matrix [B, P] of small integers with drawn strides and storage offset."""
    b, p = draw(batch), draw(SIZES)
    dtype = draw(st.sampled_from(DTYPES)) if dtype is None else dtype
    seed = draw(st.integers(0, 5))
    layout = draw(
        st.sampled_from(["rows", "columns", "step", "offset", "expand_b", "expand_p", "windows"])
    )
    if layout == "columns":
        return integers((p, b), seed, dtype).T
    if layout == "step":
        step_b, step_p = draw(st.integers(1, 3)), draw(st.integers(1, 5))
        return integers((b * step_b, p * step_p), seed, dtype)[::step_b, ::step_p]
    if layout == "offset":
        row, column = draw(st.integers(0, 2)), draw(st.integers(0, 7))
        return integers((b + row, p + column + 1), seed, dtype)[row:, column : column + p]
    if layout == "expand_b":
        return integers((1, p), seed, dtype).expand(b, p)
    if layout == "expand_p":
        return integers((b, 1), seed, dtype).expand(b, p)
    if layout == "windows":  # rows that overlap in memory
        return integers((b + p,), seed, dtype).as_strided((b, p), (1, 1))
    return integers((b, p), seed, dtype)


@st.composite
def pieces(draw: st.DrawFn) -> list[Tensor]:
    """[B, ...] tensors of one batch size and dtype, of one to four dimensions."""
    b, dtype = draw(st.integers(0, 5)), draw(st.sampled_from(DTYPES))
    parts: list[Tensor] = []
    for seed in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            parts.append(draw(strided(st.just(b), dtype)))
            continue
        shape = draw(st.lists(st.integers(1, 6), min_size=0, max_size=3))
        order = draw(st.permutations(range(len(shape))))
        stored_shape = [shape[d] for d in order]
        t = integers((b, *stored_shape), seed, dtype)
        parts.append(t.permute(0, *[1 + order.index(d) for d in range(len(shape))]))
    return parts


def poisoned(shape: tuple[int, ...], like: Tensor, layout: str) -> Tensor:
    """NaN in the result dtype, in one of several layouts."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    nan = {"fill_value": torch.nan, "dtype": dtype, "device": like.device}
    if layout == "columns":
        return torch.full(shape[::-1], **nan).T
    if layout == "step":
        return torch.full((shape[0] * 2, shape[1] * 3), **nan)[::2, ::3]
    return torch.full(shape, **nan)


LAYOUTS = st.sampled_from(["rows", "columns", "step"])
ISAS = [name for name, reason in cpu.isas().items() if not reason]


def assert_same(got: Tensor, grads: Tensor, matrix: Tensor, kind: str) -> None:
    """``got`` is grads @ matrix: exactly, but under Gaussian within any-order rounding."""
    truth = grads.double() @ matrix
    if kind != "gaussian":
        assert torch.equal(got.cpu().double(), truth)
    else:
        unit = 2.0**-53 if grads.dtype == torch.float64 else 2.0**-24
        # The float64 truth is rounded too.
        bound = matmul_bound(grads, matrix, unit) + matmul_bound(grads, matrix, 2.0**-53)
        assert ((got.cpu().double() - truth).abs() <= bound).all()


@given(
    grads=strided(),
    cols=SIZES,
    key=KEYS,
    layout=LAYOUTS,
    precision=st.sampled_from(["highest", "high", "medium"]),
)
@settings(max_examples=100)
def test_project(
    backend: str,
    device: str,
    grads: Tensor,
    cols: int,
    key: Key,
    layout: str,
    precision: str,
) -> None:
    moved = grads.to(device)
    out = poisoned((len(grads), cols), moved, layout)
    how = {"scale": None, "precision": precision, "backend": backend, **key.kwargs()}
    assert fastproj.project(moved, cols, out=out, **how) is out
    # Small integers fit in one term, so the precision changes nothing.
    matrix = stored(grads.shape[1], cols, **key.kwargs())
    assert_same(out, grads, matrix, key.kind)
    assert torch.equal(fastproj.project(moved, cols, **how), out)
    reference = fastproj.project(grads, cols, **{**how, "backend": "reference"})
    assert_same(reference, grads, matrix, key.kind)


@pytest.mark.parametrize("isa", ISAS)
@given(grads=strided(), cols=SIZES, key=EXACT_KEYS)
@settings(max_examples=50)
def test_instruction_sets(isa: str, grads: Tensor, cols: int, key: Key) -> None:
    how = {"scale": None, "backend": "cpu", **key.kwargs()}
    matrix = stored(grads.shape[1], cols, **key.kwargs())
    with cpu.force_isa(isa):
        assert_same(fastproj.project(grads, cols, **how), grads, matrix, key.kind)
        out = poisoned((len(grads), grads.shape[1]), grads, "rows")
        span = slice(key.row_offset, key.row_offset + grads.shape[1])
        how.pop("row_offset")
        y = integers((len(grads), cols), 1, grads.dtype)
        fastproj.project_transpose(y, span, out=out, **how)
        assert_same(out, y, matrix.T, key.kind)


@given(parts=pieces(), cols=SIZES, key=KEYS, layout=LAYOUTS)
@settings(max_examples=100)
def test_project_of_pieces(
    backend: str, device: str, parts: list[Tensor], cols: int, key: Key, layout: str
) -> None:
    flat = torch.cat([t.flatten(1) if t.dim() > 1 else t[:, None] for t in parts], dim=1)
    how = {"scale": None, "backend": backend, **key.kwargs()}
    matrix = stored(flat.shape[1], cols, **key.kwargs())
    moved = [t.to(device) for t in parts]
    out = poisoned((len(flat), cols), moved[0], layout)
    fastproj.project(dict(enumerate(moved)), cols, out=out, **how)
    assert_same(out, flat, matrix, key.kind)

    total = torch.ones_like(out)
    row = key.row_offset
    for t in moved:
        how["row_offset"] = row
        fastproj.project([t], cols, out=total, accumulate=True, **how)
        row += t[:1].numel() if len(t) else 0
    if key.kind != "gaussian" and len(flat):
        assert torch.equal(total, out + 1)


@given(
    grads=strided(BATCHES.filter(lambda b: b >= 2)),
    cols=SIZES.filter(lambda k: k >= 2),
    key=EXACT_KEYS,
    data=st.data(),
)
@settings(max_examples=80)
def test_splits_of_batch_rows_and_columns(
    backend: str, device: str, grads: Tensor, cols: int, key: Key, data: st.DataObject
) -> None:
    moved = grads.to(device)
    how = {"scale": None, "backend": backend, **key.kwargs()}
    whole = fastproj.project(moved, cols, **how)
    b = data.draw(st.integers(1, len(grads) - 1), "batch split")
    parts = [fastproj.project(part, cols, **how) for part in (moved[:b], moved[b:])]
    assert torch.equal(torch.cat(parts), whole)
    fewer = data.draw(st.integers(1, cols - 1), "columns")
    assert torch.equal(fastproj.project(moved, fewer, **how), whole[:, :fewer])
    p = data.draw(st.integers(0, grads.shape[1]), "row split")
    if 0 < p < grads.shape[1]:
        out = fastproj.project(moved[:, :p], cols, **how)
        how["row_offset"] += p
        fastproj.project(moved[:, p:], cols, out=out, accumulate=True, **how)
        assert torch.equal(out, whole)


@given(y=strided(), rows=SIZES, key=KEYS, layout=LAYOUTS)
@settings(max_examples=80)
def test_project_transpose(
    backend: str, device: str, y: Tensor, rows: int, key: Key, layout: str
) -> None:
    moved = y.to(device)
    span = slice(key.row_offset, key.row_offset + rows)
    out = poisoned((len(y), rows), moved, layout)
    how = {"scale": None, "backend": backend, **key.named()}
    fastproj.project_transpose(moved, span, out=out, **how)
    assert_same(out, y, stored(rows, y.shape[1], **key.kwargs()).T, key.kind)
    assert torch.equal(fastproj.project_transpose(moved, span, **how), out)


@given(
    rows=st.tuples(OFFSETS, SIZES),
    cols=st.tuples(st.one_of(st.integers(0, 600), st.integers(0, 2**32 - 1026)), SIZES),
    key=KEYS,
)
@settings(max_examples=100)
def test_matrix(
    backend: str, device: str, rows: tuple[int, int], cols: tuple[int, int], key: Key
) -> None:
    row, col = slice(rows[0], sum(rows)), slice(cols[0], sum(cols))
    how = key.named()
    got = fastproj.matrix(row, col, **how, device=device, backend=backend)
    assert torch.equal(
        got.cpu(), fastproj.matrix(row, col, **how, device="cpu", backend="reference")
    )
