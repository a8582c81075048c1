"""``lambda_reg="auto"``: the rule against known answers, its invariances, and its LDS."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastproj
from fastproj.trak import (
    ImageClassificationModelOutput,
    ScoreComputer,
    SingularXtXWarning,
    StoreCorruptError,
)
from fastproj.trak.files import read_json, write_json
from fastproj.trak.solving import ridge as module
from fastproj.trak.solving.finalizing import tell_without_q
from fastproj.trak.solving.inverse import ridges_of
from fastproj.trak.solving.ridge import (
    MARGIN,
    Moments,
    choose_lambda,
    effective_dimension,
    fit,
    likeliest_ridge,
    logistic_share,
    meaning,
    quadratures,
)
from fastproj.trak.solving.solve import HALF_ROUNDING, Gram, solve
from tests import ROOT
from tests.essential import essential, slow
from tests.trak import cases


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


def sums(phi, q, block=64):
    """(Gram, Moments) as finalising makes them."""
    power = meaning(q).probability
    moments = Moments(phi.shape[1], power)
    blocks = zip(phi.split(block), q.split(block), strict=True)
    shares = ((part, logistic_share(of_part, power)) for part, of_part in blocks)
    return ScoreComputer().gram(moments.over(shares), phi.shape[1], len(phi)), moments


def choose(phi, q):
    return choose_lambda(*sums(phi, q), meaning(q))


def weighted(phi, q):
    """Phi^T R Phi."""
    return (phi * (q * (1 - q)).unsqueeze(1)).T @ phi


def training_ridge(phi, q):
    choice = choose(phi, q)
    assert (choice.rule, choice.power) == ("training ridge", 1)
    return choice.lambda_reg / MARGIN


@pytest.mark.parametrize("ridge", [0.03, 0.3, 3.0])
def test_the_training_ridge_is_found(ridge):
    grads, q = trained(gradients(300, 40), ridge)
    found = training_ridge(torch.cat([grads, torch.zeros(300, 1000)], 1), q)  # k far above the rank
    # d(gamma) of 1040 dimensions is at most 40
    assert ridge * (1 - 1e-6) <= found <= ridge / (1 - 40 / 1040)


@pytest.mark.parametrize("k", [60, 200])
def test_the_training_ridge_is_found_through_a_projection(k):
    grads, q = trained(gradients(200, 300), 1.0)
    matrix = fastproj.matrix(300, k, 0, stream=0, dtype=torch.float64)
    assert 0.5 < training_ridge(grads @ matrix / math.sqrt(k), q) < 2


def test_the_fit_is_the_root_of_its_equation():
    phi, q = trained(gradients(500, 300), 0.3)
    gram, moments = sums(phi, q)
    values, vectors = torch.linalg.eigh(gram.matrix)
    parts = (vectors.T @ moments.fitted).square()
    found = fit(gram, moments)  # gamma / (1 - d(gamma) / k), of which gamma solves the equation
    low, high = 1e-9, 1e9
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        too_low = float((parts / (values + middle)).sum()) > float(moments.explained)
        low, high = (middle, high) if too_low else (low, middle)
    exact = low / (1 - float((values / (values + low)).sum()) / 300)
    assert found == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("relative", [1e-2, 1.0, 1e2])
def test_the_fit_is_found_where_eigenvalues_span_eight_decades(relative):
    size = 400
    vectors, _ = torch.linalg.qr(gradients(size, size, decay=0))
    values = torch.logspace(0, -8, size, dtype=torch.float64)
    matrix = (vectors * values) @ vectors.T
    parts = gradients(1, size, seed=2, decay=0)[0] * values**0.3
    ridge = relative * float(values.mean())
    moments = Moments(size, 1)
    moments.fitted = vectors @ parts
    moments.explained = (parts.square() / (values + ridge)).sum()
    exact = ridge / (1 - float((values / (values + ridge)).sum()) / size)
    gram = Gram((matrix + matrix.T) / 2, size, size, 2.0**-52)
    assert fit(gram, moments) == pytest.approx(exact, rel=1e-4)


def test_fewer_samples_than_dimensions_that_fit_worse_than_the_network_show_no_ridge():
    phi, q = trained(gradients(30, 60), 0.3)
    gram, moments = sums(phi, q)
    moments.explained = moments.explained * 1e6
    assert fit(gram, moments) is None


def test_where_features_fit_worse_than_the_network_the_limit_is_used():
    grads, q = trained(gradients(300, 200, decay=0.1), 1e-4)
    phi = grads @ fastproj.matrix(200, 20, 0, stream=0, dtype=torch.float64)
    gram, moments = sums(phi, q)
    start = moments.fitted
    assert float(start @ torch.linalg.solve(gram.matrix, start)) < float(moments.explained)
    limit = 20 / float(torch.linalg.inv(gram.matrix).trace())  # of ridge / (1 - d(ridge) / k)
    assert fit(gram, moments) == pytest.approx(limit, rel=1e-5)


def test_what_is_summed_up():
    phi, q = trained(gradients(150, 12), 0.5)
    gram, moments = sums(phi, q)
    f = torch.log((1 - q) / q)
    target = q * (1 - q) * f + q
    torch.testing.assert_close(gram.matrix, weighted(phi, q))
    torch.testing.assert_close(moments.fitted, phi.T @ target)
    torch.testing.assert_close(moments.explained, f @ target)
    rows = phi * (q * (1 - q)).sqrt().unsqueeze(1)
    torch.testing.assert_close(moments.quartic, rows.square().sum(1).square().sum())
    residuals = q - q.mean()
    gram, moments = sums(phi, residuals)
    torch.testing.assert_close(gram.matrix, phi.T @ phi)
    torch.testing.assert_close(moments.quartic, phi.square().sum(1).square().sum())
    torch.testing.assert_close(moments.correlated, phi.T @ residuals)
    torch.testing.assert_close(moments.squares, residuals @ residuals)


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sums_of_float32_leave_no_range(regression, scale):
    phi, q = example(regression)
    q = (q * 1e6 if regression else q).float()
    exact, moments = sums(phi.double() * scale, q)
    gram, found = sums((phi * scale).float(), q)
    torch.testing.assert_close(
        gram.matrix, exact.matrix, rtol=1e-5, atol=1e-5 * float(exact.matrix.max())
    )
    for name, wanted in moments.tensors().items():
        atol = 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(found.tensors()[name], wanted, rtol=1e-5, atol=atol)
    assert choose_lambda(gram, found, meaning(q)).lambda_reg == pytest.approx(
        choose_lambda(exact, moments, meaning(q)).lambda_reg, rel=1e-3
    )


def test_scores_are_the_influence_of_a_logistic_regression():
    """That of leaving a sample out, to first order, at the ridge that it was trained with."""
    ridge = 0.3
    phi, q = trained(gradients(300, 60), ridge)
    truth = phi @ torch.linalg.solve(weighted(phi, q) + ridge * torch.eye(60), phi.T)

    def agreement(matrix, lam):
        scores = phi @ torch.linalg.solve(matrix + lam * torch.eye(60), phi.T)
        scores, exact = scores * q.unsqueeze(1), truth * q.unsqueeze(1)
        scores, exact = scores - scores.mean(0), exact - exact.mean(0)
        return float(torch.cosine_similarity(scores, exact, 0).mean())

    chosen = agreement(weighted(phi, q), choose(phi, q).lambda_reg)
    mean = float(phi.square().sum()) / 60
    plain = [agreement(phi.T @ phi, mean * s) for s in torch.logspace(-4, 4, 33).tolist()]
    assert chosen > 0.98 > max(plain)


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
    assert choose_lambda(*sums(phi, q, block=7), meaning(q)).lambda_reg == pytest.approx(lam)
    assert choose(phi, q) == choose(phi, q)


def test_every_sample_twice_is_twice_the_lambda():
    phi, q = example(regression=False)
    twice = choose(torch.cat([phi, phi]), torch.cat([q, q]))
    assert twice.lambda_reg == pytest.approx(2 * choose(phi, q).lambda_reg)


def test_weights_of_one_set_the_dimension():
    phi, _ = example(regression=True)
    choice = choose(phi, torch.ones(len(phi)))
    norms = phi.square().sum(1)
    samples = float(norms.sum() ** 2 / norms.square().sum())
    wanted = 1 / (1 / math.sqrt(samples) + 1 / 30)
    assert (choice.rule, choice.power) == ("dimension", 0)
    assert effective_dimension(phi.T @ phi, choice.lambda_reg) == pytest.approx(wanted)
    assert 0 < wanted < 30


def regression_residuals(phi, ridge, seed=4):
    """Residuals of ridge regression on labels that a normal prior of that ridge makes."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(phi.shape[1], generator=generator, dtype=torch.float64) / ridge**0.5
    labels = phi @ truth + torch.randn(len(phi), generator=generator, dtype=torch.float64)
    gram = phi.T @ phi + ridge * torch.eye(phi.shape[1])
    return labels - phi @ torch.linalg.solve(gram, phi.T @ labels)


@pytest.mark.parametrize("k", [100, 700])
@pytest.mark.parametrize("ridge", [0.3, 3.0, 30.0])
def test_the_ridge_of_a_regression_is_found_from_its_residuals(k, ridge):
    phi = gradients(500, k, decay=0.5)
    q = regression_residuals(phi, ridge)
    gram, moments = sums(phi, q)
    values = torch.linalg.eigvalsh(gram.matrix).clamp(min=0)
    found = likeliest_ridge(values, gram, moments)
    assert ridge / 2 < found < ridge * 2

    def unlikely(gamma):  # -2 log likelihood of q, by its n x n covariance
        covariance = torch.linalg.inv(phi @ phi.T / gamma + torch.eye(500))
        scale = q @ torch.linalg.solve(covariance, q) / 500
        return float(500 * scale.log() + torch.logdet(covariance))

    assert unlikely(found) <= min(unlikely(found * 0.95), unlikely(found * 1.05))
    choice = choose(phi, q)
    alone = choose(phi, torch.ones(500)).lambda_reg
    assert (choice.rule, choice.power) == ("residuals and dimension", 0)
    assert choice.lambda_reg == pytest.approx(math.sqrt(found * alone))


def test_residuals_that_tell_no_ridge_leave_the_dimension():
    phi = gradients(200, 30)
    q = phi @ torch.ones(30, dtype=torch.float64)  # all left that the features explain: any amount
    choice = choose(phi, q)
    assert choice.rule == "dimension"
    assert choice.lambda_reg == pytest.approx(choose(phi, torch.ones(200)).lambda_reg)


def test_a_network_that_has_fitted_nothing_gets_the_dimension_of_its_weighted_matrix():
    phi, _ = example(regression=False)
    q = torch.linspace(0.3, 0.95, len(phi)).double()
    choice = choose(phi, q)
    assert choice.relative == pytest.approx(choice.lambda_reg * 30 / weighted(phi, q).trace())
    assert (choice.rule, choice.power) == ("dimension", 1)
    squares = phi.square().sum(1) * q * (1 - q)
    wanted = math.sqrt(float(squares.sum() ** 2 / squares.square().sum()))
    found = effective_dimension(weighted(phi, q), choice.lambda_reg)
    assert found == pytest.approx(1 / (1 / wanted + 1 / 30))


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_mean_over_tokens_weighs_like_their_sum(tokens):
    """Language models: f is a sum over T tokens, Q = -dL/df their mean, and R is Q (1 - Q) / T.

    The solution with T left out is the same one, times T: no score changes its rank.
    """
    phi, q = trained(gradients(300, 60), 0.3)
    gram, moments = sums(phi, q)
    longer = Moments(60, 1)
    longer.fitted, longer.explained = moments.fitted, moments.explained * tokens
    exact = fit(replace(gram, matrix=gram.matrix / tokens), longer)
    torch.testing.assert_close(
        torch.linalg.inv(gram.matrix / tokens + exact * torch.eye(60)),
        tokens * torch.linalg.inv(gram.matrix + fit(gram, moments) * torch.eye(60)),
    )


def test_effective_dimension_and_quadrature():
    phi = gradients(50, 20)
    matrix, start = phi.T @ phi, gradients(1, 20, seed=3)[0]
    values = torch.linalg.eigvalsh(matrix)
    exact = float((values / (values + 0.7)).sum())
    assert effective_dimension(matrix, 0.7) == pytest.approx(exact)
    *_, (nodes, weights) = quadratures(matrix, start)
    quadratic = start @ torch.linalg.solve(matrix + 0.7 * torch.eye(20), start)
    assert float((weights / (nodes + 0.7)).sum()) == pytest.approx(float(quadratic))
    low_rank = phi[:3].T @ phi[:3]
    *_, (nodes, weights) = quadratures(low_rank, low_rank @ start)
    assert len(nodes) <= 5
    assert float(weights.sum()) == pytest.approx(float((low_rank @ start).square().sum()))


@pytest.mark.parametrize("columns", [1, 6, 7, 19])
def test_the_effective_dimension_by_blocks(columns, monkeypatch):
    phi = gradients(50, 20)
    values = torch.linalg.eigvalsh(phi.T @ phi)
    monkeypatch.setattr(module, "COLUMNS", columns)
    exact = float((values / (values + 0.7)).sum())
    assert effective_dimension(phi.T @ phi, 0.7) == pytest.approx(exact)


def test_rounding_may_leave_a_matrix_an_eigenvalue_below_0():
    vectors = torch.linalg.qr(gradients(20, 20)).Q
    values = torch.logspace(-6, 0, 20, dtype=torch.float64)
    start = gradients(1, 20, seed=3)[0]
    exact = values * (torch.arange(20) > 0)
    values[0] = -1e-6
    matrix = vectors @ values.diag() @ vectors.T
    assert effective_dimension(matrix, 1e-7) == pytest.approx(float((exact / (exact + 1e-7)).sum()))
    wanted = vectors @ ((vectors.T @ start) / (exact + 1e-7))
    torch.testing.assert_close(module.regularised(matrix, 1e-7, start), wanted)


# ---- what Q are ---------------------------------------------------------------------------------


def scores_of(phi, q, probabilities=None):
    """Scores of all samples on all others, [n, n], as finalising and scoring make them."""
    made = meaning(q, probabilities)
    moments = Moments(phi.shape[1], made.probability)
    share = logistic_share(q, made.probability)
    rows = torch.cat([part.clone() for part in moments.over([(phi, share)])])
    gram = Gram(rows.T @ rows, *phi.shape, 2.0**-52)
    solution = solve(gram, choose_lambda(gram, moments, made).lambda_reg)
    return phi @ solution.apply(phi).T * q.unsqueeze(1)


def rank_correlation(one, other):
    """The mean over targets of Spearman's correlation."""
    ranks = [torch.argsort(torch.argsort(s, 0), 0).double() for s in (one, other)]
    ranks = [r - r.mean(0) for r in ranks]
    return float(torch.cosine_similarity(*ranks, 0).mean())


def jumps(phi, qs):
    """1 minus the rank correlation of scores between neighbours of a path of Q."""
    made = [scores_of(phi, q) for q in qs]
    return [1 - rank_correlation(*pair) for pair in pairwise(made)]


PATHS = {
    "one text grows longer": lambda q, t: torch.cat([q[:-1], q[-1:] * 10 ** (2 * t)]),
    "one is mislabelled": lambda q, t: torch.cat([q[:-1], 1.001 * t * torch.ones(1)]),
    "one is negative": lambda q, t: torch.cat([q[:-1], (1 - 2 * t) * torch.ones(1) * 1e-3]),
    "one rounds below zero": lambda q, t: torch.cat([q[:-1], (1 - 2 * t) * torch.ones(1) * 1e-7]),
    "all grow": lambda q, t: q * 10 ** (2 * t),
    "all shift": lambda q, t: q - t * 2 * q.mean(),
    "weights of 1, and one of a loss": lambda q, t: torch.cat(
        [torch.ones(len(q) - 1), 1 - t * torch.ones(1)]
    ),
    "weights grow beyond 1": lambda q, t: torch.ones(len(q)) * (1 + t * q),
}


@pytest.mark.parametrize(
    "name", essential(PATHS, [name for name in PATHS if name.startswith(("one", "all"))])
)
def test_scores_change_by_no_jump(name):
    """Along a path of Q rules pass over into each other: the finer the steps, the less in each."""
    phi, q = trained(gradients(120, 30), 0.5)
    path = torch.linspace(0, 1, 201).tolist()
    for _ in range(2):  # the steep part again, in finer steps
        found = jumps(phi, [PATHS[name](q, t).double() for t in path])
        steepest = found.index(max(found))
        low, high = path[steepest : steepest + 2]
        path = torch.linspace(low, high, 41, dtype=torch.float64).tolist()
    assert max(jumps(phi, [PATHS[name](q, t).double() for t in path])) < 1e-3


@pytest.mark.parametrize("largest", [1.0, 1.001, 3.0, 1e3, 1e6])
def test_one_long_text_leaves_the_others_their_scores(largest):
    phi, q = trained(gradients(200, 30), 0.5)
    q[7] = 0.999
    other = q.clone()
    other[7] = largest
    others = torch.arange(200) != 7
    exact, found = scores_of(phi, q)[others], scores_of(phi, other)[others]
    assert rank_correlation(exact, found) > 0.99
    assert meaning(other) == module.Meaning(1.0, 0.0)


@pytest.mark.parametrize(
    ("q", "probability", "residual"),
    [
        (torch.linspace(0, 1, 50), 1, 0),
        (torch.linspace(-1e-7, 0.2, 50), 1, 0),
        (
            torch.full((50,), 1 - 2.0**-24, dtype=torch.float64),
            0,
            0,
        ),  # a network that has fitted nothing
        (torch.cat([torch.ones(30), torch.linspace(0, 0.9, 20)]), 1, 0),  # and one with outliers
        (torch.ones(50), 0, 0),
        (torch.full((50,), 2.5), 0, 0),
        (torch.linspace(1, 40, 50), 0, 0),
        (torch.linspace(-1, 1, 50), 0, 1),
        (torch.linspace(-1, 1, 50) * 1e-6, 0, 1),
        (torch.linspace(-1, 1, 50) * 1e6, 0, 1),
        (torch.zeros(50), 1, 0),
    ],
)
def test_what_q_are(q, probability, residual):
    made = meaning(q)
    assert (made.probability, made.residual) == (pytest.approx(probability, abs=1e-3), residual)
    assert meaning(q, False) == module.Meaning(0.0, residual)
    assert meaning(q, True) == module.Meaning(1.0, residual)


def test_between_two_rules_lies_their_mean():
    phi, _ = trained(gradients(200, 30), 0.5)
    q = torch.linspace(-0.15, 0.5, 200).double()
    made = meaning(q)
    assert 0 < made.probability < 1
    choice = choose(phi, q)
    assert choice.power == made.probability
    assert choice.rule.startswith("training ridge and ")
    gram, moments = sums(phi, q)
    rows = phi * (q.clamp(0, 1) * (1 - q.clamp(0, 1))).pow(made.probability / 2).unsqueeze(1)
    torch.testing.assert_close(gram.matrix, rows.T @ rows, rtol=1e-3, atol=1e-3)
    alone = [
        choose_lambda(gram, moments, module.Meaning(p, made.residual)).lambda_reg
        for p in (0.0, 1.0)
    ]
    assert min(alone) < choice.lambda_reg < max(alone)


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
    gram, moments = sums(phi, q)
    choice = choose_lambda(gram, moments, meaning(q))
    trace = float(gram.matrix.trace())
    least = module.LEAST * trace / len(phi)
    assert least * (1 - 1e-9) <= choice.lambda_reg <= trace * (1 + 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(gram, choice.lambda_reg)
    assert solution.method == "cholesky"


# ---- in TRAKer ----------------------------------------------------------------------------------


@pytest.fixture
def traker(tmp_path):
    made = cases.make(cases.net(), tmp_path, 30, curvature="trak")
    cases.featurize(made, cases.trained(0, cases.data(30)), 0, cases.data(30))
    return made


def test_auto_is_the_default_stored_and_told(traker, caplog):
    traker.logger = logging.getLogger("fastproj.trak")
    with caplog.at_level(logging.INFO, "fastproj.trak"):
        traker.finalize_features()
    assert traker.lambda_reg == "auto"
    stored = traker.saver.systems.read_solve(0)
    assert stored["lambda"] == "auto"
    assert stored["lambda_reg"] == stored["auto"]["lambda_reg"] > 0
    assert f"lambda {stored['lambda_reg']:.3g}" in caplog.text
    assert stored["auto"]["rule"] in caplog.text


def test_auto_is_the_rule_on_the_stored_features(traker):
    traker.finalize_features()
    choice = choose(traker.saver.matrix(0).double(), traker.saver.out_to_loss(0).double())
    stored = traker.saver.systems.read_solve(0)
    assert stored["lambda_reg"] == pytest.approx(choice.lambda_reg)
    assert (stored["weighted"], stored["auto"]["rule"]) == (True, "training ridge")


def test_scores_are_the_formula_with_the_curvature(tmp_path):
    train, targets = cases.data(30), cases.data(5, seed=5)
    models = [cases.trained(seed, train) for seed in (0, 1)]
    scores = cases.whole_run(tmp_path, models, train, targets, curvature="trak")
    made = cases.make(models[0], tmp_path, 30, curvature="trak")
    total, weight = torch.zeros(()), torch.zeros(())
    for model_id, model in enumerate(models):
        phi = cases.projected(cases.gradients(model, train), 8, model_id)
        of_targets = cases.projected(cases.gradients(model, targets), 8, model_id)
        q = cases.q(model, train)
        matrix = weighted(phi, q) + made.saver.systems.read_solve(model_id)[
            "lambda_reg"
        ] * torch.eye(8)
        total, weight = total + phi @ torch.linalg.solve(matrix, of_targets.T), weight + q
    exact = (total * weight.unsqueeze(1) / 4).numpy()
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    own = cases.whole_run(tmp_path / "own", models, train, train, curvature="trak")
    made = cases.make(models[0], tmp_path / "own", 30, curvature="trak")
    np.testing.assert_allclose(made.self_influence(), np.diag(own), rtol=1e-4, atol=1e-6)
    made.load_checkpoint(models[1].state_dict(), 1)
    solved = torch.linalg.solve(matrix, phi.T).T.numpy()
    found = made.saver.current_store["features"]
    np.testing.assert_allclose(found, solved, rtol=1e-3, atol=1e-4 * np.abs(solved).max())


class Scaled(ImageClassificationModelOutput):
    """Q times a factor."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def get_out_to_loss_grad(self, *args):
        return self.factor * super().get_out_to_loss_grad(*args)


@pytest.mark.parametrize("lambda_reg", ["auto", 0.5])
def test_a_checkpoint_whose_q_are_0_is_told_of(tmp_path, lambda_reg):
    train, targets = cases.data(30), cases.data(5, seed=5)
    model = cases.net()
    made = fastproj.TRAKer(model, Scaled(0.0), 30, tmp_path, proj_dim=8, lambda_reg=lambda_reg)
    cases.featurize(made, model, 0, train)
    with pytest.warns(UserWarning, match="model_id 0 has Q = 0 .* Fix: a checkpoint") as told:
        made.finalize_features()
    assert told[0].filename == __file__
    cases.score(made, model, 0, targets)
    assert not np.any(made.finalize_scores("test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = SimpleNamespace(out_to_loss=lambda _: torch.tensor([0.0, 0.5]))
        tell_without_q(some, [0])


def test_a_checkpoint_whose_largest_q_passes_1(tmp_path):
    """Of a task whose Q are probabilities times a factor, as a sum over tokens is."""
    train, targets = cases.data(60), cases.data(5, seed=5)
    model = cases.trained(0, train, steps=10)
    largest = float(cases.q(model, train).max())

    found = []
    for size in (0.999, 1.001):
        made = fastproj.TRAKer(model, Scaled(size / largest), 60, tmp_path / str(size), proj_dim=20)
        cases.featurize(made, model, 0, train)
        made.finalize_features()
        cases.score(made, model, 0, targets)
        found.append(torch.from_numpy(np.array(made.finalize_scores("test"))))
    assert rank_correlation(*found) > 0.99


@pytest.mark.parametrize("declared", [None, True, False])
def test_a_task_may_say_what_q_is(tmp_path, declared):
    made = cases.make(cases.net(), tmp_path, 30, curvature="trak")
    made.task.q_are_probabilities = declared
    cases.featurize(made, cases.trained(0, cases.data(30)), 0, cases.data(30))
    made.finalize_features()
    assert made.saver.systems.read_solve(0)["weighted"] is (declared is not False)


@pytest.mark.parametrize("missing", ["weighted", "xtx"])
def test_the_matrix_of_the_lambda_must_be_there(traker, missing):
    traker.finalize_features(lambda_reg="auto" if missing == "weighted" else 1)
    assert traker.saver.systems.is_finalized(0)
    (traker.save_dir / "models" / "0" / f"{missing}.safetensors").unlink()
    assert not traker.saver.systems.is_finalized(0)
    traker.finalize_features()
    assert traker.saver.systems.is_finalized(0)


def test_a_solution_of_a_later_version_or_without_its_numbers(traker):
    traker.finalize_features()
    stored = traker.saver.systems.read_solve(0)
    traker.saver.systems.write_solve(0, {**stored, "more": 1})
    assert ridges_of(traker.saver.systems, 0) == [(stored["lambda_reg"], 1.0)]
    del stored["rank"]
    traker.saver.systems.write_solve(0, stored)
    with pytest.raises(StoreCorruptError, match=r"solve.json is damaged: it lacks rank.*finalize"):
        ridges_of(traker.saver.systems, 0)


@pytest.mark.parametrize("ridges", [[], None, 1.0, [1.0, 1.0], [[1.0]], [[-1.0, 1.0]], [["a", 1]]])
def test_ridges_that_are_none(traker, ridges):
    """Without any, scores would be 0."""
    traker.finalize_features()
    path = traker.saver.systems.solve_path(0)
    write_json(path, {**read_json(path), "ridges": ridges})
    with pytest.raises(StoreCorruptError, match=r"solve.json is damaged: its ridges are no list"):
        traker.self_influence()


def test_a_solution_of_another_run(traker):
    traker.finalize_features()
    path = traker.saver.systems.solve_path(0)
    write_json(path, {**read_json(path), "run": "another"})
    with pytest.raises(StoreCorruptError, match="its lambda was chosen for other features"):
        ridges_of(traker.saver.systems, 0)


def test_a_solution_of_features_that_others_took_the_place_of(traker, monkeypatch):
    """Their matrix is there, and whoever summed it up was stopped before lambda was chosen."""
    traker.finalize_features()
    old = traker.saver.systems.read_solve(0)["lambda_reg"]
    for path in traker.saver.model_dir(0).glob("train-*.safetensors"):
        path.unlink()
    cases.featurize(traker, cases.trained(0, cases.data(30)), 0, cases.data(30, seed=1))
    systems = traker.saver.systems

    def stop(*_):
        assert systems.has_gram(0, systems.read_system(0))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastproj.trak.solving.finalizing.keep_lambda", stop)
        with pytest.raises(KeyboardInterrupt):
            traker.finalize_features()
    assert not systems.is_finalized(0)
    traker.finalize_features()
    assert systems.is_finalized(0)
    assert systems.read_solve(0)["lambda_reg"] != old


def test_a_solution_of_before_it_named_its_features(traker):
    traker.finalize_features()
    path = traker.saver.systems.solve_path(0)
    write_json(path, {name: value for name, value in read_json(path).items() if name != "content"})
    assert traker.saver.systems.is_finalized(0)


def test_q_that_a_task_calls_probabilities_must_be_that(traker):
    weights = torch.linspace(-0.5, 1.5, 30)
    read, traker.saver.out_to_loss = traker.saver.out_to_loss, lambda _: weights
    traker.task.q_are_probabilities = True
    with pytest.raises(ValueError, match=r"model_id 0 has Q from -0.5 to 1.5; expected 0..1"):
        traker.finalize_features()
    traker.saver.out_to_loss = read
    traker.finalize_features()
    assert traker.saver.systems.read_solve(0)["weighted"]


def test_other_lambdas_and_back_without_featurizing(traker):
    traker.finalize_features()
    first = traker.saver.systems.read_solve(0)
    traker.finalize_features(lambda_reg=1)
    traker.featurize = traker.score_computer.gram = None  # would fail if called
    for lambda_reg, value in ((0.5, 0.5), ("2*mean", None)):
        traker.finalize_features(lambda_reg=lambda_reg)
        again = traker.saver.systems.read_solve(0)
        assert again["lambda"] == lambda_reg
        assert value is None or again["lambda_reg"] == value
        assert "auto" not in again
        assert not again["weighted"]
    traker.finalize_features(lambda_reg="auto")
    assert traker.saver.systems.read_solve(0) == first


def test_stored_features_that_are_not_finite_are_named(tmp_path):
    made = cases.make(cases.net(), tmp_path, 30, use_half_precision=False, curvature="trak")
    cases.featurize(made, cases.net(), 0, tuple(part[:20] for part in cases.data(30)))
    features = torch.ones(10, 8)
    features[3, 2], features[7, 0] = torch.nan, torch.inf
    rows = np.arange(20, 30)
    made.saver.write_shard(0, rows, rows, features, torch.ones(10))
    with pytest.raises(ValueError, match="stored features of samples 23, 27 are not finite"):
        made.finalize_features()
    assert not made.saver.systems.is_finalized(0)


def test_rounding_to_half_precision_is_no_rank():
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(500, 6, generator=generator)
    phi[:, 5] = phi[:, 0] + phi[:, 1]
    half = phi.half().double()
    gram = Gram(half.T @ half, 500, 6, 2.0**-52, HALF_ROUNDING)
    with pytest.warns(SingularXtXWarning, match="rank 5"):
        solution = solve(gram, 0.0)
    exact = torch.linalg.pinv(phi.double().T @ phi.double(), hermitian=True, rtol=1e-9)
    torch.testing.assert_close(solution.apply(torch.eye(6)), exact, rtol=0.02, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = torch.randn(500, 6, generator=generator) * torch.logspace(0, -3, 6)
        half = full.half().double()
        well = solve(Gram(half.T @ half, 500, 6, 2.0**-52), 0.0)
    assert (well.method, well.rank) == ("cholesky", 6)


# ---- what it is for -----------------------------------------------------------------------------


def run_bench(tmp_path, *options):
    command = [
        sys.executable,
        "-m",
        "bench.lds",
        "--no-write",
        "--providers",
        "default",
        "trak_rule",
        "--cache",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("problem", ["breast_cancer", slow("auto_mpg")])
def test_the_lds_is_near_the_best(tmp_path, problem):
    sizes = ("--dims", "64", "512", "--subsets", "40", "--checkpoints", "2", "--retrainings", "1")
    table = run_bench(tmp_path, "--only", problem, *sizes)
    assert table.count(f"{problem} ") == 6  # three providers at two k
    assert "MISSED" not in table


@pytest.mark.slow
def test_the_lds_is_near_the_best_on_digits(tmp_path):
    table = run_bench(tmp_path, "--only", "digits")
    assert "MISSED" not in table
