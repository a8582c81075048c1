"""The k x k system against explicit linear algebra in float64."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from fastproj.trak import ScoreComputer, SingularXtXWarning
from fastproj.trak.solving import finalizing, ridge
from fastproj.trak.solving import solve as module
from fastproj.trak.solving.solve import (
    Gram,
    check_lambda,
    extreme_eigenvalues,
    parse_lambda,
    solve,
)


def features(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator, dtype=torch.float64)


def gram(phi):
    return Gram(phi.T @ phi, *phi.shape, 2.0**-52)


@pytest.mark.parametrize("lambda_reg", [0.0, 0.3, "0.1*mean"])
def test_solution_is_the_inverse(lambda_reg):
    phi, targets = features(60, 12), features(5, 12, seed=1)
    xtx = phi.T @ phi
    lam = 0.1 * float(xtx.trace()) / 12 if isinstance(lambda_reg, str) else lambda_reg
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(gram(phi), lambda_reg)
    assert solution.method == "cholesky"
    assert solution.lambda_reg == pytest.approx(lam)
    exact = targets @ torch.linalg.inv(xtx + lam * torch.eye(12).double())
    torch.testing.assert_close(solution.apply(targets), exact)


def test_fewer_samples_than_dimensions_warns_and_takes_the_pseudo_inverse():
    phi, targets = features(7, 20), features(3, 20, seed=1)
    with pytest.warns(SingularXtXWarning, match=r"n=7 .*k=20 .*lambda_reg=0.* condition") as caught:
        solution = solve(gram(phi), 0.0)
    assert "proj_dim" in str(caught[0].message)
    assert (solution.method, solution.rank, solution.condition) == ("pseudo-inverse", 7, math.inf)
    exact = targets @ torch.linalg.pinv(phi) @ torch.linalg.pinv(phi).T
    torch.testing.assert_close(solution.apply(targets), exact)


def test_pseudo_inverse_is_the_limit_of_small_lambda():
    phi = features(7, 20)
    with pytest.warns(SingularXtXWarning):
        limit = solve(gram(phi), 0.0)
    small = solve(gram(phi), 1e-6)
    targets = features(4, 7, seed=2) @ phi  # in the span of the features
    torch.testing.assert_close(limit.apply(targets), small.apply(targets), rtol=1e-5, atol=1e-6)


def test_repeated_dimensions_are_noticed_with_enough_samples():
    phi = features(50, 6)
    phi[:, 5] = phi[:, 0] + phi[:, 1]
    with pytest.warns(SingularXtXWarning, match="rank 5"):
        solution = solve(gram(phi), 0.0)
    exact = torch.linalg.pinv(phi.T @ phi, hermitian=True, rtol=1e-12)
    torch.testing.assert_close(solution.apply(torch.eye(6).double()), exact, rtol=1e-6, atol=1e-9)


def test_what_was_singular_is_solved_again_as_it_was():
    """Where lambda is next to nothing, and there is a Cholesky factor all the same."""
    phi = features(50, 6)
    phi[:, 5] = phi[:, 0] + phi[:, 1]
    rounded = replace(gram(phi), eps=2.0**-23)  # of products in float32
    with pytest.warns(SingularXtXWarning):
        solution = solve(rounded, 1e-6)
    again = ScoreComputer().solve_again(rounded, solution.summary())
    assert (again.method, again.rank) == ("pseudo-inverse", 5)
    torch.testing.assert_close(again.factor, solution.factor)


def test_a_ridge_makes_few_samples_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert solve(gram(features(7, 20)), "1e-3*mean").method == "cholesky"


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_condition_estimate(spread):
    q, _ = torch.linalg.qr(features(30, 30))
    values = torch.logspace(0, math.log10(spread), 30, dtype=torch.float64)
    values[-1] = spread * 3  # a gap, so that power iteration converges
    matrix = q @ torch.diag(values) @ q.T
    matrix = (matrix + matrix.T) / 2
    state = torch.get_rng_state()
    largest, smallest = extreme_eigenvalues(matrix, torch.linalg.cholesky(matrix))
    assert torch.equal(torch.get_rng_state(), state)
    estimate = largest / smallest
    exact = float(torch.linalg.cond(matrix))
    assert 0.8 * exact <= estimate <= exact * (1 + 1e-6)


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (torch.zeros(9, 4, dtype=torch.float64), "all 9 features are zero"),
        (torch.full((9, 4), torch.inf, dtype=torch.float64), "not finite"),
    ],
)
def test_hopeless_features_are_refused(phi, message):
    with pytest.raises(ValueError, match=message):
        solve(gram(phi), 0.0)


def test_lambda_is_a_number_or_a_share_of_the_mean_eigenvalue():
    assert parse_lambda(0.25) == 0.25
    assert parse_lambda(3) == 3.0
    assert parse_lambda("0.5*mean", 4.0) == 2.0
    assert parse_lambda(" 1e-2 * mean ", 4.0) == pytest.approx(0.04)


@pytest.mark.parametrize(
    "bad",
    [
        *(-1.0, math.nan, math.inf, "0.5", "mean", "-1*mean", "x*mean", None, True, [1], b"1"),
        *(np.True_, np.float32(-1), np.zeros(2), torch.tensor(True), torch.zeros(2), 10**400),
    ],
)
def test_other_lambdas_are_refused(bad):
    with pytest.raises(ValueError, match="lambda_reg"):
        check_lambda(bad)


@pytest.mark.parametrize("number", [2, np.float32(2), np.int64(2), torch.tensor(2.0)])
def test_a_lambda_of_any_library_becomes_a_float(number):
    assert (check_lambda(number), type(check_lambda(number))) == (2.0, float)
    assert [check_lambda(word) for word in ("auto", "0.1*mean")] == ["auto", "0.1*mean"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e30])  # squares float32 hasn't
def test_gram_of_blocks(monkeypatch, exact, scale):
    monkeypatch.setattr(module, "EXACT_FLOPS", math.inf if exact else 0)
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    monkeypatch.setattr(module, "GRAM_TILE", 3)
    monkeypatch.setattr(module, "GRAM_COLUMNS", 5)
    phi = (features(100, 8) * scale).float()
    phi[3] *= 1e4
    result = ScoreComputer().gram(phi.split(37), 8, 100)
    truth = phi.double().T @ phi.double()
    assert (result.n, result.matrix.dtype) == (100, torch.float64)
    assert torch.equal(result.matrix, result.matrix.T)
    error = float((result.matrix - truth).abs().max() / truth.abs().max())
    assert error < (1e-15 if exact else 16 * result.eps)
    if exact:
        assert result.eps == 2.0**-52
    else:  # that of one block, whose row 3 is nearly all
        assert result.eps == pytest.approx(2.0**-23, rel=1e-6)
        assert result.eps <= 2.0**-23


@pytest.mark.parametrize("parts", [1, 5])
def test_many_products_of_float32_leave_a_healthy_matrix_its_lambda(monkeypatch, tmp_path, parts):
    """Of 200 blocks, rounding is a small part of that of one: lambda is far above it."""
    monkeypatch.setattr(module, "EXACT_FLOPS", 0)
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    phi = features(3200, 64) * torch.arange(1, 65) ** -2.0
    phi = (phi + 2 * features(3200, 1, seed=1).abs() * features(1, 64, seed=2)).float()
    lam = 3e-7 * float(phi.double().square().sum())
    made = [ScoreComputer().gram(part.split(16), 64, 3200) for part in phi.chunk(parts)]
    pieces = {("", i): ({"xtx": gram.matrix}, gram.n, gram.eps) for i, gram in enumerate(made)}
    systems = SimpleNamespace(
        read_gram=lambda _, __, key: pieces[key], store=SimpleNamespace(proj_dim=64)
    )
    sums, n, eps = finalizing.add_parts(systems, 0, module.System(), list(pieces))
    with warnings.catch_warnings():
        warnings.simplefilter("error", SingularXtXWarning)
        solution = solve(Gram(sums["xtx"], n, 64, eps), lam)
    assert (solution.method, n) == ("cholesky", 3200)
    exact = phi.double().T @ phi.double()
    assert float(torch.linalg.eigvalsh(sums["xtx"] - exact).abs().max()) < eps * float(
        torch.linalg.eigvalsh(exact).max()
    )
    wanted = torch.linalg.solve(exact + lam * torch.eye(64), phi.double().T).T
    found = solution.apply(phi.double())
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("seed", range(6))
def test_products_of_float32_of_the_same_samples_hide_no_singular_matrix(monkeypatch, seed):
    """What rounding they share doesn't shrink."""
    monkeypatch.setattr(module, "EXACT_FLOPS", 0)
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)
    few = features(64, 7, seed) @ features(7, 8, seed + 100)
    result = ScoreComputer().gram(few.float().repeat(3000, 1).split(64), 8, 64 * 3000)
    with pytest.warns(SingularXtXWarning, match="rank 7"):
        assert solve(result, 0.0).rank == 7


class PrecisionOfProducts(TorchFunctionMode):
    """Notes the matmul precision in force at each matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul):
            self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


def test_products_ignore_a_lowered_matmul_precision():
    phi, weights = features(64, 32).float(), features(16, 32, seed=1).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with PrecisionOfProducts() as noted:
            out = ScoreComputer().scores(phi, weights)
            ScoreComputer().gram([phi], 32, 64)
            ScoreComputer().kernel(phi, phi, 64)
        assert noted.seen == ["highest"] * 3
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(
        out.double(), phi.double() @ weights.double().T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("columns", [16, 64, 512])
def test_factors_are_used_without_copies(columns, monkeypatch):
    """One that lies as LAPACK wants it is made in place, and applied whole or by blocks."""
    rows = torch.randn(90, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = rows.mT @ rows
    factor = module.cholesky(matrix, 2.0)
    assert factor.mT.is_contiguous()
    whole = matrix + 2 * torch.eye(70, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.mT, whole)
    torch.testing.assert_close(
        module.apply_factor(factor, rows.mT), torch.linalg.solve(whole, rows.mT)
    )
    monkeypatch.setattr(ridge, "COLUMNS", columns)
    values = torch.linalg.eigvalsh(matrix)
    exact = float((values / (values + 2)).sum())
    assert ridge.effective_dimension(matrix, 2.0) == pytest.approx(exact, rel=1e-10)
