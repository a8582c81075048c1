"""``lambda_reg="auto"``: the rule against known answers, its invariances, and its LDS."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import trak_cases as cases

import fastproj
from fastproj.trak import ScoreComputer, SingularXtXWarning
from fastproj.trak import ridge as module
from fastproj.trak.ridge import (
    DIMENSION,
    choose_lambda,
    effective_dimension,
    quadrature,
    sample_rows,
)
from fastproj.trak.solve import HALF_ROUNDING, Gram, solve

BENCH = Path(__file__).parents[2] / "bench" / "lds.py"


def gradients(n, size, seed=0, decay=0.7):
    """Gradients [n, size] whose j-th dimension has standard deviation (j + 1)^-decay."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    return torch.randn(n, size, generator=generator, dtype=torch.float64) * spread


def trained(grads, ridge):
    """Q of logistic regression with labels 1 and this ridge, by Newton's method to the end."""
    grads = grads + 0.5 * grads.std(0)  # the classes differ
    weights = torch.zeros(grads.shape[1], dtype=torch.float64)
    for _ in range(100):
        q = torch.sigmoid(-(grads @ weights))
        hessian = (grads * (q * (1 - q)).unsqueeze(1)).T @ grads
        hessian.diagonal().add_(ridge)
        step = torch.linalg.solve(hessian, grads.T @ q - ridge * weights)
        weights = weights + step * min(1.0, 5 / float((grads @ step).abs().max()))
    assert step.norm() < 1e-9 * weights.norm()
    return grads, torch.sigmoid(-(grads @ weights))


def choose(phi, q):
    gram = Gram(phi.T @ phi, len(phi), 2.0**-52)
    return choose_lambda(ScoreComputer(), gram, zip(phi.split(64), q.split(64), strict=True))


@pytest.mark.parametrize("ridge", [0.03, 0.3, 3.0])
def test_the_training_ridge_is_found(ridge):
    grads, q = trained(gradients(300, 40), ridge)
    choice = choose(torch.cat([grads, torch.zeros(300, 1000)], 1), q)  # k far above the rank
    assert choice.rule == "training ridge"
    # d(gamma) of 1040 dimensions is at most 40
    assert ridge * (1 - 1e-6) <= choice.training_ridge <= ridge / (1 - 40 / 1040)


@pytest.mark.parametrize("k", [60, 200])
def test_the_training_ridge_is_found_through_a_projection(k):
    grads, q = trained(gradients(200, 300), 1.0)
    matrix = fastproj.matrix(300, k, 0, stream=0, dtype=torch.float64)
    choice = choose(grads @ matrix / math.sqrt(k), q)
    assert choice.rule == "training ridge"
    assert 0.5 < choice.training_ridge < 2


@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_lambda_gives_nearly_the_best_approximation_of_the_influence(ridge):
    phi, q = trained(gradients(300, 60), ridge)
    curvature = (q * (1 - q)).unsqueeze(1)
    truth = phi @ torch.linalg.solve((phi * curvature).T @ phi + ridge * torch.eye(60), phi.T)

    def agreement(lam):
        scores = phi @ torch.linalg.solve(phi.T @ phi + lam * torch.eye(60), phi.T)
        scores, exact = scores * q.unsqueeze(1), truth * q.unsqueeze(1)
        scores, exact = scores - scores.mean(0), exact - exact.mean(0)
        return float(torch.cosine_similarity(scores, exact, 0).mean())

    mean = float(phi.square().sum()) / 60
    best = max(agreement(mean * share) for share in torch.logspace(-4, 4, 33).tolist())
    assert agreement(choose(phi, q).lambda_reg) > best - 0.02
    assert agreement(1e-4 * mean) < best - 0.02 or agreement(1e2 * mean) < best - 0.1


def example(regression):
    phi, q = trained(gradients(200, 30), 0.5)
    return phi, (q - q.mean() if regression else q)


@pytest.mark.parametrize("regression", [False, True])
def test_invariances(regression):
    phi, q = example(regression)
    lam = choose(phi, q).lambda_reg
    assert choose(phi * 1e3, q).lambda_reg == pytest.approx(lam * 1e6)
    assert choose(phi * 1e-20, q).lambda_reg == pytest.approx(lam * 1e-40)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert choose(phi[order], q[order]).lambda_reg == pytest.approx(lam)
    rotation, _ = torch.linalg.qr(gradients(30, 30, seed=1))
    assert choose(phi @ rotation, q).lambda_reg == pytest.approx(lam)
    assert choose(phi, q) == choose(phi, q)


def test_every_sample_twice_is_twice_the_lambda():
    phi, q = example(regression=False)
    twice = choose(torch.cat([phi, phi]), torch.cat([q, q]))
    assert twice.lambda_reg == pytest.approx(2 * choose(phi, q).lambda_reg)


def test_without_probabilities_the_dimension_is_set():
    phi, q = example(regression=True)
    choice = choose(phi, q)
    norms = phi.square().sum(1)
    samples = float(norms.sum() ** 2 / norms.square().sum())
    wanted = 1 / (1 / (DIMENSION * math.sqrt(samples)) + 1 / 30)
    assert (choice.rule, choice.training_ridge) == ("dimension", None)
    assert effective_dimension(phi.T @ phi, choice.lambda_reg) == pytest.approx(wanted)
    assert 0 < wanted < 30


def test_effective_dimension_and_quadrature():
    phi = gradients(50, 20)
    matrix, start = phi.T @ phi, gradients(1, 20, seed=3)[0]
    values = torch.linalg.eigvalsh(matrix)
    exact = float((values / (values + 0.7)).sum())
    assert effective_dimension(matrix, 0.7) == pytest.approx(exact)
    nodes, weights = quadrature(matrix, start)
    quadratic = start @ torch.linalg.solve(matrix + 0.7 * torch.eye(20), start)
    assert float((weights / (nodes + 0.7)).sum()) == pytest.approx(float(quadratic))
    low_rank = phi[:3].T @ phi[:3]
    nodes, weights = quadrature(low_rank, low_rank @ start)
    assert len(nodes) <= 5
    assert float(weights.sum()) == pytest.approx(float((low_rank @ start).square().sum()))


SAME = torch.ones(9, 4).double()


@pytest.mark.parametrize(
    ("phi", "q"),
    [
        (SAME, torch.full((9,), 0.1)),
        (SAME, torch.full((9,), 0.9)),
        (SAME[:1], torch.tensor([0.3])),
        (SAME[:, :1], torch.linspace(0.1, 0.2, 9)),
        (gradients(9, 1), torch.linspace(-1, 1, 9)),
        (gradients(1, 1), torch.tensor([-2.0])),
        (gradients(9, 4), torch.zeros(9)),
        (gradients(9, 4), torch.ones(9)),
        (gradients(9, 4), torch.tensor([0.0, 1.0] * 4 + [0.0])),
        (gradients(9, 4), torch.full((9,), 1e-30)),
        (gradients(9, 40), torch.linspace(0.6, 0.99, 9)),
        (gradients(9, 4) * torch.tensor([1e8, 1, 1, 1e-8]), torch.linspace(0.01, 0.1, 9)),
        (torch.cat([SAME[:8] * 1e-6, SAME[:1]]), torch.linspace(0.01, 0.1, 9)),
    ],
)
def test_extreme_features_get_a_lambda_that_solves(phi, q):
    choice = choose(phi, q)
    trace = float(phi.square().sum())
    least = module.LEAST * trace / len(phi)
    assert least * (1 - 1e-9) <= choice.lambda_reg <= trace * (1 + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(Gram(phi.T @ phi, len(phi), 2.0**-52), choice.lambda_reg)
    assert solution.method == "cholesky"


def test_many_samples_are_sampled():
    assert sample_rows(8192, 4).tolist() == list(range(8192))
    rows = sample_rows(100_000, 3000)
    assert len(rows) == 12_000
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(rows, sample_rows(100_000, 3000))


def test_a_part_of_the_samples_gives_about_the_same_lambda():
    phi, q = trained(gradients(4000, 20), 2.0)
    gram = Gram(phi.T @ phi, 4000, 2.0**-52)
    part = choose_lambda(ScoreComputer(), gram, [(phi[::4], q[::4])])
    assert part.rows == 1000
    assert part.lambda_reg == pytest.approx(choose(phi, q).lambda_reg, rel=0.25)


# ---- in TRAKer ----------------------------------------------------------------------------------


@pytest.fixture
def traker(tmp_path):
    made = cases.make(cases.net(), tmp_path, 30)
    cases.featurize(made, cases.net(), 0, cases.data(30))
    return made


def test_auto_is_the_default_stored_and_told(traker, caplog):
    traker.logger = logging.getLogger("fastproj.trak")
    with caplog.at_level(logging.INFO, "fastproj.trak"):
        traker.finalize_features()
    assert traker.lambda_reg == "auto"
    stored = traker.saver.read_solve(0)
    assert stored["lambda"] == "auto"
    assert stored["lambda_reg"] == stored["auto"]["lambda_reg"] > 0
    assert f"lambda {stored['lambda_reg']:.3g}" in caplog.text
    assert stored["auto"]["rule"] in caplog.text


def test_auto_is_the_rule_on_the_stored_features(traker):
    traker.finalize_features()
    choice = choose(traker.saver.matrix(0).double(), traker.saver.out_to_loss(0).double())
    assert traker.saver.read_solve(0)["lambda_reg"] == pytest.approx(choice.lambda_reg)


def test_other_lambdas_and_back_without_featurizing(traker):
    traker.finalize_features()
    first = traker.saver.read_solve(0)
    traker.featurize = traker.score_computer.gram = None  # would fail if called
    for lambda_reg, value in ((0.5, 0.5), ("2*mean", None)):
        traker.finalize_features(lambda_reg=lambda_reg)
        again = traker.saver.read_solve(0)
        assert again["lambda"] == lambda_reg
        assert value is None or again["lambda_reg"] == value
        assert "auto" not in again
    del traker.score_computer.gram
    traker.finalize_features(lambda_reg="auto")
    assert traker.saver.read_solve(0) == first


def test_stored_features_that_are_not_finite_are_named(tmp_path):
    made = cases.make(cases.net(), tmp_path, 30, use_half_precision=False)
    cases.featurize(made, cases.net(), 0, tuple(part[:20] for part in cases.data(30)))
    features = torch.ones(10, 8)
    features[3, 2], features[7, 0] = torch.nan, torch.inf
    rows = np.arange(20, 30)
    made.saver.write_shard(0, rows, rows, features, torch.ones(10))
    with pytest.raises(ValueError, match="stored features of samples 23, 27 are not finite"):
        made.finalize_features()
    assert not made.saver.has_xtx(0)


def test_rounding_to_half_precision_is_no_rank():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(500, 6, generator=generator)
    phi[:, 5] = phi[:, 0] + phi[:, 1]
    half = phi.half().double()
    gram = Gram(half.T @ half, 500, 2.0**-52, HALF_ROUNDING)
    with pytest.warns(SingularXtXWarning, match="rank 5"):
        solution = solve(gram, 0.0)
    exact = torch.linalg.pinv(phi.double().T @ phi.double(), hermitian=True, rtol=1e-9)
    torch.testing.assert_close(solution.apply(torch.eye(6)), exact, rtol=0.02, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = torch.randn(500, 6, generator=generator) * torch.logspace(0, -3, 6)
        half = full.half().double()
        well = solve(Gram(half.T @ half, 500, 2.0**-52), 0.0)
    assert (well.method, well.rank) == ("cholesky", 6)


# ---- what it is for -----------------------------------------------------------------------------


def run_bench(tmp_path, *options):
    command = [sys.executable, str(BENCH), "--no-write", "--no-trak", "--cache", str(tmp_path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_the_lds_is_near_the_best(tmp_path):
    sizes = ("--dims", "64", "512", "--subsets", "40", "--checkpoints", "2")
    table = run_bench(tmp_path, "--problem", "breast_cancer", *sizes)
    assert table.count("breast_cancer") == 4
    assert "MISSED" not in table


@pytest.mark.slow
def test_the_lds_is_near_the_best_on_digits(tmp_path):
    table = run_bench(tmp_path, "--problem", "digits")
    assert "MISSED" not in table
