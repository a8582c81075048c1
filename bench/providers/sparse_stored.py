"""Products with a sparse R in memory: torch.sparse (cuSPARSE on a GPU), scipy and scikit-learn.

The first two multiply by fastproj's own matrix; scikit-learn draws its own, of equal density.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.providers.base import Case, Inputs, Prepared, Provider, relative_error
from fastproj.spec import MatrixKey, sjlt_entries

NAMES = {"cpu": "torch.sparse CSR", "cuda": "torch.sparse CSR (cuSPARSE)"}
SCIPY, SKLEARN = "scipy.sparse CSR", "SparseRandomProjection"
ENTRY_BYTES = 12  # a float32 value and a 64-bit index
MOST_ENTRIES = 1 << 24  # enough for a rate: making R takes far longer than multiplying
BOUND = 1e-5  # float32 sums in an order of their own
BOUND_16_BIT = 1.6e-2


def providers(device: str) -> list[Provider]:
    """Those for a device."""
    found = [Provider(NAMES[device], prepare_torch)]
    if device == "cpu":
        found += [Provider(SCIPY, prepare_scipy), Provider(SKLEARN, prepare_sklearn)]
    return found


def stored_rows(case: Case) -> tuple[int, str]:
    """Rows of R that are stored, and why they are not all: whole tiles of sjlt."""
    entries = min(MOST_ENTRIES, case.stored_bytes // ENTRY_BYTES)
    rows = entries * case.block // case.cols
    if rows >= case.rows:
        return case.rows, ""
    gib = ENTRY_BYTES * case.rows * case.cols / case.block / 2**30
    return max(1, rows), f"fewer rows: all of R would take {gib:.3g} GiB"


def transposed(case: Case, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """R[:rows].T of kind sjlt as CSR: offsets [K + 1], rows and float32 signs of the entries."""
    key = MatrixKey("sjlt", 0, 0, case.block)
    columns = np.arange(case.cols, dtype=np.uint64)
    places, signs = [], []
    for tile in range(-(-rows // case.block)):
        row, sign = sjlt_entries(key, tile, columns)
        places.append(row.astype(np.int64) + tile * case.block)
        signs.append(sign)
    at, sign = np.stack(places, 1), np.stack(signs, 1)  # [K, tiles], rows ascending
    inside = at < rows
    offsets = np.concatenate([[0], inside.sum(1).cumsum()])
    return (
        torch.from_numpy(offsets),
        torch.from_numpy(at[inside]),
        torch.from_numpy(sign[inside].astype(np.float32)),
    )


def prepare_torch(case: Case, inputs: Inputs) -> Prepared | str:
    """(R.T @ G.T).T with R.T in CSR; in the dtype of the gradients."""
    if case.device == "cpu" and case.dtype.itemsize == 2:
        return "has no 16-bit numbers on a CPU"
    rows, note = stored_rows(case)
    offsets, at, signs = transposed(case, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of beta state
        matrix = torch.sparse_csr_tensor(offsets, at, signs.to(case.dtype), (case.cols, rows))
    matrix = matrix.to(case.device)
    grads = inputs.grads(rows)  # [B, p]
    call = partial(times_torch, matrix, grads)
    bound = BOUND if case.dtype.itemsize > 2 else BOUND_16_BIT
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), bound, note)


def times_torch(matrix: Tensor, grads: Tensor) -> Tensor:
    """[B, K]"""
    return (matrix @ grads.mT).mT


def prepare_scipy(case: Case, inputs: Inputs) -> Prepared | str:
    """The same product by scipy, on one thread."""
    try:
        from scipy.sparse import csr_matrix
    except ImportError:
        return "not installed: pip install scipy"
    if case.dtype.itemsize == 2:
        return "has no 16-bit numbers"
    rows, note = stored_rows(case)
    offsets, at, signs = (part.numpy() for part in transposed(case, rows))
    grads = inputs.grads(rows)
    matrix = csr_matrix((signs.astype(grads.numpy().dtype), at, offsets), (case.cols, rows))
    call = partial(times_scipy, matrix, grads.numpy())
    return Prepared(call, rows, case.flops(rows), inputs.error(rows), BOUND, note)


def times_scipy(matrix: Any, grads: Any) -> Tensor:
    """[B, K]"""
    return torch.from_numpy((matrix @ grads.T).T)


def prepare_sklearn(case: Case, inputs: Inputs) -> Prepared | str:
    """scikit-learn's transformer with as many entries as sjlt has, at random places."""
    try:
        from sklearn.random_projection import SparseRandomProjection
    except ImportError:
        return "not installed: pip install scikit-learn"
    if case.dtype.itemsize == 2:
        return "has no 16-bit numbers"
    rows, note = stored_rows(case)
    grads = inputs.grads(rows)
    shape = SparseRandomProjection(case.cols, density=1 / case.block, random_state=0)
    shape.fit(grads[:1].numpy())
    check = shape.components_[: min(16, case.cols)].astype(np.float64)

    def error(result: Tensor) -> float:
        exact = torch.from_numpy((check @ grads.double().numpy().T).T)
        return relative_error(result[:, : exact.shape[1]], exact)

    def call() -> Tensor:
        return torch.from_numpy(np.asarray(shape.transform(grads.numpy())))

    note = "; ".join(filter(None, (f"draws its own R, density 1/{case.block}", note)))
    return Prepared(call, rows, case.flops(rows), error, BOUND, note)
