"""What cut sums cost: the order in which each kernel adds, and the error that this gives.

The emulation is too slow for 10^6 rows. So it shows, bit for bit, that a kernel adds up as
``tensor_cores.project`` does, which is fast enough.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tensor_cores
from tests.cuda import emulation
from tests.dense import KINDS, blocked_matmul, normals, relative_error, stored
from tests.tensor_cores import AMPERE, HOPPER, Floats, Unit

UNITS = {"sm80": AMPERE, "sm90": HOPPER}


def fold_rows(variant: str, kind: str, terms: int) -> int:
    """Rows that one accumulator of this family adds up."""
    dtype = torch.float32 if terms > 1 else torch.bfloat16
    block = emulation.plan(16, 4096, 256, dtype, kind=kind, terms=terms, variant=variant).block_b
    return emulation.kernel_facts(variant, kind, "bf16", terms, block)["fold"]


def by_model(
    grads: torch.Tensor, r: Floats, terms: int, fold: int, unit: Unit, splits: int = 1
) -> Floats:
    """grads @ r as a kernel adds it: small terms first, ranges of panels, then their sum."""
    left = tensor_cores.terms_of(grads.float().numpy(), terms)[::-1]
    panels = -(-len(r) // 512)
    total = np.zeros((len(grads), r.shape[1]), dtype=np.float32)
    for split in range(splits):
        rows = slice(panels * split // splits * 512, panels * (split + 1) // splits * 512)
        total = total + tensor_cores.project([term[:, rows] for term in left], r[rows], fold, unit)
    return total


def entries(rows: int, cols: int, kind: str) -> Floats:
    block: Floats = stored(rows, cols, kind=kind, dtype=torch.float32).numpy()
    return block


def test_what_a_step_keeps() -> None:
    """Known answers: products below the last kept bit are lost, however many; sums are cut."""

    def step(c: float, product: float, unit: Unit) -> float:
        ones = np.ones((1, unit.products), dtype=np.float32)
        b = np.full((unit.products, 1), product, dtype=np.float32)
        return float(tensor_cores.multiply(ones, b, np.float32([[c]]), unit)[0, 0])

    assert step(1.0, 2.0**-24, AMPERE) == 1 + 8 * 2.0**-24
    assert step(1.0, 2.0**-25, AMPERE) == 1
    assert step(1.0, 2.0**-25, HOPPER) == 1 + 16 * 2.0**-25
    assert step(1.0, 2.0**-26, HOPPER) == 1
    assert step(1.0, -(2.0**-25), AMPERE) == 1  # toward zero: a sum of floors would be below 1
    assert step(-1.0, 1.5 * 2.0**-24, AMPERE) == -1 + 8 * 2.0**-24
    assert step(1.0, 2.0**-24 + 2.0**-27, HOPPER) == 1 + 16 * 2.0**-24
    assert step(2.0**24, 0.125, HOPPER) == 2.0**24  # 2 in all; 0.125 is below 2^(24 - 25)
    assert step(2.0**24, 0.625, HOPPER) == 2.0**24 + 8  # 16 times 0.5


@pytest.mark.parametrize("variant", UNITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("terms", "rows"), [(1, 2600), (2, 1100), (3, 700)])
def test_kernels_add_as_the_model_does(variant: str, kind: str, terms: int, rows: int) -> None:
    """Bit for bit: the steps of the unit, the order of the terms, the folds and the splits."""
    grads = normals((5, rows))
    if terms == 1:
        grads = grads.bfloat16()
    for multiprocessors in (1, 3):
        got, plan = emulation.project(
            grads, 20, kind=kind, terms=terms, variant=variant, multiprocessors=multiprocessors
        )
        assert (plan.splits > 1) == (multiprocessors > 1)
        fold = fold_rows(variant, kind, terms)
        model = by_model(grads, entries(rows, 20, kind), terms, fold, UNITS[variant], plan.splits)
        assert np.array_equal(got.numpy(), model)


@pytest.mark.slow
@pytest.mark.parametrize("variant", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_highest_keeps_its_promise_at_a_million_rows(variant: str, kind: str) -> None:
    """An error of at most twice that of a float32 matmul, and of a good one."""
    rows, proj_dim, cols = 10**6, 4096, 8
    grads = normals((4, rows))
    r = entries(rows, cols, kind)
    truth = grads.double() @ torch.from_numpy(r).double()
    splits = emulation.plan(4, rows, proj_dim, torch.float32, kind=kind, variant=variant).splits
    got = by_model(grads, r, 3, fold_rows(variant, kind, 3), UNITS[variant], splits)
    usual = relative_error(blocked_matmul(grads, torch.from_numpy(r)), truth)
    assert relative_error(torch.from_numpy(got), truth) <= 2 * usual


@pytest.mark.parametrize("variant", UNITS)
def test_without_folds_the_promise_would_break(variant: str) -> None:
    """One accumulator for all rows, of sums that grow: cuts add up, roundings cancel."""
    rows = 2**15
    grads = normals((4, rows))
    r = entries(rows, 4, "gaussian")
    truth = grads.double() @ torch.from_numpy(r).double()
    usual = relative_error(blocked_matmul(grads, torch.from_numpy(r)), truth)
    errors = [
        relative_error(torch.from_numpy(by_model(grads, r, 3, fold, UNITS[variant])), truth)
        for fold in (fold_rows(variant, "gaussian", 3), rows)
    ]
    assert errors[0] <= 2 * usual
    assert errors[1] > 10 * usual
