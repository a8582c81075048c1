"""Fewer samples than dimensions: the n x n system gives what the k x k one would, and nothing is
made that is k x k.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastproj import TRAKer
from fastproj.trak import (
    FunctionModelOutput,
    ImageClassificationModelOutput,
    ScoreComputer,
    SingularXtXWarning,
)
from fastproj.trak.solving import solve as module
from fastproj.trak.solving.ridge import (
    Moments,
    choose_lambda,
    logistic_share,
    meaning,
    sample_weights,
)
from fastproj.trak.solving.scoring import rounding_growth
from fastproj.trak.solving.solve import Gram, Rows, System, solve
from fastproj.trak.store import features
from fastproj.trak.tasks.margin import margins
from tests.trak import cases

M = 5


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def primal(rows):
    return Gram(rows.T @ rows, *rows.shape, 2.0**-52)


def dual(rows):
    return Gram(rows @ rows.T, *rows.shape, 2.0**-52)


def solution(rows, lambda_reg):
    """That of the dual, with the rows in pieces and in another order."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))

    def read():
        for places in order.split(3):
            yield places, rows[places]

    made = solve(dual(rows), lambda_reg)
    return type(made)(**{**vars(made), "rows": Rows(len(rows), read)})


# ---- one system ---------------------------------------------------------------------------------


def test_the_pseudo_inverse_has_lambda_once():
    """S^T [(S S^T) (S S^T + lambda I)]^+ S; lambda is near the smallest value that is kept."""
    values = torch.tensor([1.0, 0.02], dtype=torch.float64)
    gram = Gram(values.diag(), 2, 16, 1e-3)
    with pytest.warns(SingularXtXWarning):
        inverse = solve(gram, 3e-3).factor
    torch.testing.assert_close(inverse, (1 / (values * (values + 3e-3))).diag())


@pytest.mark.parametrize("lambda_reg", [1e-3, 1.0])
def test_growth_of_rounding_is_the_size_of_the_terms_over_that_of_their_sum(lambda_reg):
    """Terms ``row[j] w[j]`` of independent entries, over sums that are ``row . w``."""
    rows, targets = random(7, 20), random(5, 20, seed=1)
    xtx = rows.mT @ rows
    eye = torch.eye(20, dtype=torch.float64)
    weights = torch.linalg.solve(xtx + lambda_reg * eye, targets.mT).mT
    terms = rows.square().mean() * weights.square().sum(1)  # mean square of a sum of them
    expected = (terms / (weights @ rows.mT).square().mean(1)).sqrt()
    found = rounding_growth(weights, weights @ xtx, float(xtx.trace()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("lambda_reg", [1e-6, 0.3, 1e4, "0.1*mean"])
def test_the_dual_is_the_inverse(lambda_reg):
    rows, targets = random(7, 20), random(5, 20, seed=1)
    xtx = rows.T @ rows
    lam = 0.1 * float(xtx.trace()) / 20 if isinstance(lambda_reg, str) else lambda_reg
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, wanted = solution(rows, lambda_reg), solve(primal(rows), lambda_reg)
    exact = targets @ torch.linalg.inv(xtx + lam * torch.eye(20).double())
    error = (found.apply(targets) - exact).abs().max() / exact.abs().max()
    assert error < 1e-14 * found.condition + 1e-14
    assert (found.method, found.rank) == (wanted.method, wanted.rank) == ("cholesky", 20)
    assert found.lambda_reg == pytest.approx(lam)
    assert found.condition == pytest.approx(wanted.condition, rel=0.2)
    own = torch.diagonal(rows @ torch.linalg.inv(xtx + lam * torch.eye(20).double()) @ rows.T)
    torch.testing.assert_close(found.on_own_rows(rows @ rows.T), own)


@pytest.mark.parametrize("lambda_reg", [0.0, 1e-18])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_singular_dual_is_the_pseudo_inverse(lambda_reg, repeated):
    rows, targets = random(7, 20), random(5, 20, seed=1)
    if repeated:
        rows[6] = rows[0] + rows[1]
    with pytest.warns(SingularXtXWarning, match=r"n=7 .*k=20 .*lambda_reg=.* condition"):
        found = solution(rows, lambda_reg)
    with pytest.warns(SingularXtXWarning):
        wanted = solve(primal(rows), lambda_reg)
    for name in ("method", "rank", "condition", "lambda_reg", "n"):
        assert getattr(found, name) == getattr(wanted, name)
    assert (found.method, found.rank) == ("pseudo-inverse", 6 if repeated else 7)
    inverse = torch.linalg.pinv(rows, rtol=1e-9)
    exact = targets @ inverse @ inverse.T
    torch.testing.assert_close(found.apply(targets), exact)
    own = torch.diagonal(rows @ inverse @ inverse.T @ rows.T)
    torch.testing.assert_close(found.on_own_rows(rows @ rows.T), own)


def test_rounding_of_the_features_counts_alike_in_both():
    half = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).half().double()
    made = [Gram(m, 40, 60, 2.0**-52, 2.0**-11) for m in (half.T @ half, half @ half.T)]
    assert [gram.dual for gram in made] == [False, True]
    assert made[0].spurious == pytest.approx(made[1].spurious, rel=0.5)
    assert made[0].trace == pytest.approx(made[1].trace)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(4, 9, dtype=torch.float64), "all 4 features are zero"),
        (torch.full((4, 9), torch.inf, dtype=torch.float64), "not finite"),
    ],
)
def test_hopeless_features_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        solve(dual(rows), 0.0)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])  # squares float32 hasn't
def test_kernel_of_blocks(monkeypatch, exact, scale):
    monkeypatch.setattr(module, "EXACT_FLOPS", math.inf if exact else 0)
    monkeypatch.setattr(module, "BLOCK_ROWS", 16)
    rows, others = (random(5, 100) * scale).float(), random(3, 100, seed=1).float()
    found = ScoreComputer().kernel(rows, others, 8)
    truth = rows.double() @ others.double().T
    error = float((found - truth).abs().max() / truth.abs().max())
    assert error < (1e-15 if exact else 16 * 2.0**-23)
    assert (1e-10 < error) is not exact


# ---- lambda -------------------------------------------------------------------------------------


def summed(features, q, block=4):
    """(primal Gram, moments), (dual Gram, moments) as finalising makes them."""
    power = meaning(q).probability
    found = []
    for form in (primal, dual):
        moments = Moments(features.shape[1], power)
        blocks = zip(features.split(block), q.split(block), strict=True)
        shares = ((part, logistic_share(of_part, power)) for part, of_part in blocks)
        rows = torch.cat([part.clone() for part in moments.over(shares)])
        found.append((form(rows), moments))
    return found


QS = {
    "probabilities": lambda n: torch.linspace(0.02, 0.6, n).double(),
    "nearly all fitted": lambda n: torch.logspace(-9, -0.01, n).double(),
    "above 1 for one": lambda n: torch.cat([torch.linspace(0.02, 0.4, n - 1), torch.tensor([9.0])]),
    "unclear": lambda n: torch.linspace(-0.2, 1.2, n).double(),
    "nothing fitted": lambda n: torch.linspace(0.85, 0.95, n).double(),
    "residuals": lambda n: random(n, seed=3),
    "weights": lambda n: torch.ones(n).double(),
}


@pytest.mark.parametrize("n", [3, 20, 39])
@pytest.mark.parametrize("name", QS)
def test_lambda_is_the_same_by_both(n, name):
    q = QS[name](n).double()
    decay = torch.arange(1, 41, dtype=torch.float64) ** -0.7
    features = random(n, 40) * decay
    (by_k, moments), (by_n, dual_moments) = summed(features, q)
    wanted = choose_lambda(by_k, moments, meaning(q))
    found = choose_lambda(by_n, dual_moments, meaning(q))
    assert found.rule == wanted.rule
    assert found.lambda_reg == pytest.approx(wanted.lambda_reg, rel=1e-7)


# ---- in TRAKer ----------------------------------------------------------------------------------


def formula(traker, models, train, targets, k):
    """Scores in float64 by k x k inverses, at the lambda and weights that were stored."""
    total, weight = torch.zeros(()), torch.zeros(())
    for model_id, model in enumerate(models):
        stored = traker.saver.systems.read_solve(model_id)
        phi = cases.projected(cases.gradients(model, train), k, model_id)
        of_targets = cases.projected(cases.gradients(model, targets), k, model_id)
        q = cases.q(model, train)
        matrix = (phi * sample_weights(q, stored["power"]).unsqueeze(1)).T @ phi
        if isinstance(stored["lambda"], str) and stored["lambda"] != "auto":
            lam = float(stored["lambda"].split("*")[0]) * float(matrix.trace()) / k
            assert stored["lambda_reg"] == pytest.approx(lam, rel=1e-4)
        matrix += stored["lambda_reg"] * torch.eye(k)
        total, weight = total + phi @ torch.linalg.solve(matrix, of_targets.T), weight + q
    return (total * weight.unsqueeze(1) / len(models) ** 2).numpy()


@pytest.mark.parametrize("n", [15, 24, 33])  # below, at and above k
@pytest.mark.parametrize("lambda_reg", ["auto", 0.05, "0.1*mean"])
def test_scores_are_the_formula(tmp_path, monkeypatch, n, lambda_reg):
    cases.small_blocks(monkeypatch.setattr)
    train, targets = cases.data(n), cases.data(M, seed=5)
    models = [cases.trained(seed, train) for seed in (0, 1)]
    options = {"proj_dim": 24, "lambda_reg": lambda_reg, "curvature": "trak"}
    scores = cases.whole_run(tmp_path, models, train, targets, **options)
    traker = cases.make(models[0], tmp_path, n, **options)
    stored = traker.saver.systems.read_solve(1)
    assert (stored["form"], stored["n"]) == ("dual" if n < 24 else "primal", n)
    assert stored["power"] == (1 if lambda_reg == "auto" else 0)
    name = ("kernel" if n < 24 else "") + ("weighted" if lambda_reg == "auto" else "")
    files = {path.name for path in (tmp_path / "models" / "1").glob("*.safetensors")}
    files = {file for file in files if not file.startswith("train-")}
    assert files == {
        {"kernelweighted": "kernel_weighted", "": "xtx"}.get(name, name) + ".safetensors"
    }
    exact = formula(traker, models, train, targets, 24)
    np.testing.assert_allclose(scores, exact, rtol=1e-3, atol=1e-4 * np.abs(exact).max())
    own = cases.whole_run(tmp_path / "own", models, train, train, **options)
    found = cases.make(models[0], tmp_path / "own", n, **options).self_influence()
    np.testing.assert_allclose(found, np.diag(own), rtol=1e-3, atol=1e-5 * np.abs(own).max())


@pytest.mark.parametrize("n", [15, 60])  # below and above k, of rank 15
@pytest.mark.parametrize("lambda_reg", ["1e-2*mean", "1e-5*mean", "1e-8*mean"])
def test_a_small_lambda_leaves_scores_their_digits(tmp_path, n, lambda_reg):
    """Most of what it makes of targets is outside the span of the features, whose scores are sums
    that cancel."""
    few, targets = cases.data(15), cases.data(M, seed=5)
    train = tuple(part.repeat(n // 15, *[1] * (part.dim() - 1)) for part in few)
    model = cases.trained(0, few)
    options = {"proj_dim": 24, "lambda_reg": lambda_reg, "curvature": "trak"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SingularXtXWarning)
        scores = cases.whole_run(tmp_path, [model], train, targets, **options)
    traker = cases.make(model, tmp_path, n, **options)
    phi = traker.saver.matrix(0).double()
    lam = traker.saver.systems.read_solve(0)["lambda_reg"] * torch.eye(n)
    shares = torch.linalg.solve(phi @ phi.T + lam, phi @ traker.saver.matrix(0, "test").double().T)
    exact = (shares * traker.saver.out_to_loss(0).double().unsqueeze(1)).numpy()
    np.testing.assert_allclose(scores, exact, rtol=0, atol=1e-4 * np.abs(exact).max())
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, M)
    again = traker.score((train[0][:7], train[1][:7]), stream=True)  # a batch of whole_run's
    np.testing.assert_allclose(again, exact[:7], rtol=0, atol=1e-4 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("n", "lambda_reg", "warned"),
    [(60, "1e-5*mean", True), (60, "0.1*mean", False), (15, "1e-5*mean", False)],
)
def test_scores_that_are_rounding_of_float16_are_told(tmp_path, n, lambda_reg, warned):
    """Of 24 dimensions the features have 15, but for rounding. In the dual they have no more."""
    few, targets = cases.data(15), cases.data(M, seed=5)
    number = torch.arange(n)
    train = few[0][number % 15], few[1][number % 15] + 10 * (number // 15)

    def output(model, batch):  # powers of 3, so that every repeat is rounded otherwise
        repeat = batch[1] // 10
        return margins(model(batch[0]), batch[1] % 10) * 3.0**-repeat

    model, found = cases.trained(0, few), []
    options = {"proj_dim": 24, "lambda_reg": lambda_reg, "task": FunctionModelOutput(output)}
    for half in (False, True):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            folder = tmp_path / str(half)
            options["use_half_precision"] = half
            found.append(cases.whole_run(folder, [model], train, targets, **options))
        said = [one for one in told if "are rounding errors of features" in str(one.message)]
        assert bool(said) is (half and warned)
        assert all(one.filename.endswith("cases.py") for one in said)  # the caller's line
    error = np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0])
    assert error > 0.5 if warned else error < 0.01


@pytest.mark.parametrize("half", [False, True])
def test_float16_hides_no_singular_matrix(tmp_path, half):
    """Features have 3 of 8 dimensions. Their rounding alone has all, which is no inverse."""
    x = cases.data(40)[0].flatten(1)[:, :3]
    model = torch.nn.Linear(3, 1, bias=False)
    options = {
        "proj_dim": 8,
        "lambda_reg": 0.0,
        "use_half_precision": half,
        "task": FunctionModelOutput(lambda model, batch: model(batch[0]).squeeze(-1)),
    }
    with pytest.warns(SingularXtXWarning, match="rank 3"):
        cases.whole_run(tmp_path, [model], (x, x), (x[:M], x[:M]), **options)


def test_traks_arrays_are_there_in_the_dual(tmp_path):
    train = cases.data(15)
    traker = cases.make(cases.net(), tmp_path, 15, proj_dim=24, lambda_reg=0.1)
    cases.featurize(traker, cases.net(), 0, train)
    traker.finalize_features()
    store = traker.saver.current_store
    phi = torch.from_numpy(store["grads"]).double()
    exact = phi @ torch.linalg.inv(phi.T @ phi + 0.1 * torch.eye(24).double())
    torch.testing.assert_close(
        torch.from_numpy(store["features"]).double(), exact, rtol=1e-4, atol=1e-5
    )


class Seen(TorchDispatchMode):
    """The size of the largest tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // 8)
        return out


class Vectors(TorchFunctionMode):
    """The size of the largest matrix whose eigenvectors were made."""

    largest = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.linalg.eigh, torch.linalg.eig, torch.linalg.svd):
            self.largest = max(self.largest, len(args[0]))
        return func(*args, **(kwargs or {}))


def residual(model, batch):
    return model(batch[0]).sum(1) - batch[1]


TASKS = {
    "image_classification": "image_classification",
    "function": residual,
    "residuals": None,
}


class Residuals(ImageClassificationModelOutput):
    """A task whose Q have signs."""

    def get_out_to_loss_grad(self, *args):
        return super().get_out_to_loss_grad(*args) - 0.5


@pytest.mark.parametrize("lambda_reg", ["auto", 0.1, "1*mean"])
@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_as_large_as_k_x_k(tmp_path, lambda_reg, task):
    n, k = 20, 1500
    train = cases.data(n)
    model = cases.trained(0, train)
    made = TASKS[task] or Residuals()
    traker = TRAKer(model, made, n, tmp_path, proj_dim=k, lambda_reg=lambda_reg, device="cpu")
    cases.featurize(traker, model, 0, train)
    with Seen() as seen:
        traker.finalize_features()
    cases.score(traker, model, 0, cases.data(M, seed=5))
    with seen:
        traker.finalize_scores("test")
        traker.self_influence()
    assert 0 < seen.largest <= 4 * n * k < k * k / 10


@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize("task", TASKS)
def test_no_vectors_are_made_that_are_not_used(tmp_path, task, n):
    train = cases.data(n)
    model = cases.trained(0, train)
    traker = TRAKer(
        model,
        TASKS[task] or Residuals(),
        n,
        tmp_path,
        proj_dim=24,
        device="cpu",
        curvature="trak",
    )
    cases.featurize(traker, model, 0, train)
    with Vectors() as vectors:
        traker.finalize_features()
    chosen = traker.saver.systems.read_solve(0)["auto"]["rule"]
    if task == "image_classification":
        assert chosen == "training ridge"
        assert 0 < vectors.largest <= min(n, 24)  # of Lanczos' tridiagonal matrices
    else:
        assert "dimension" in chosen
        assert vectors.largest == 0


class OwnSolve(ScoreComputer):
    """A step of a user's own, of k x k matrices."""

    def solve(self, gram, lambda_reg):
        self.solved = gram.matrix.shape
        return super().solve(gram, lambda_reg)


def test_a_computer_with_steps_of_its_own_is_given_what_it_takes(tmp_path):
    """Of 30 rows and 40 dimensions, too."""
    train = cases.data(15)
    traker = cases.make(cases.net(), tmp_path, 15, proj_dim=40, score_computer=OwnSolve)
    cases.featurize(traker, cases.net(), 0, train)
    traker.finalize_features()
    assert traker.score_computer.solved == (40, 40)
    assert traker.saver.systems.read_solve(0)["form"] == "primal"
    assert not traker.saver.systems.gram_path(0, System(1.0, True, True)).exists()


@pytest.mark.parametrize("lambda_reg", ["auto", 0.5])
def test_a_store_that_was_finalised_in_the_primal(tmp_path, lambda_reg):
    """Its k x k matrix and lambda are used as they are, until it is finalised again."""
    train, targets = cases.data(15), cases.data(M, seed=5)
    model = cases.trained(0, train)
    options = {"proj_dim": 24, "lambda_reg": lambda_reg, "curvature": "trak"}
    cases.whole_run(tmp_path, [model], train, targets, score_computer=OwnSolve, **options)
    traker = cases.make(model, tmp_path, 15, **options)
    assert traker.saver.systems.is_finalized(0)
    first = np.array(traker.finalize_scores("test"))
    traker.finalize_features()
    assert traker.saver.systems.read_solve(0)["form"] == "dual"
    again = traker.finalize_scores("test")
    np.testing.assert_allclose(again, first, rtol=1e-4, atol=1e-5 * np.abs(first).max())


def test_rows_in_half_precision_and_in_float64(tmp_path, monkeypatch):
    """Of a store that was gone on with in the other: those read last keep their digits."""
    monkeypatch.setattr(features, "BLOCK_ROWS", 5)
    phi = random(10, 24)
    for rows, half in ((np.arange(5), True), (np.arange(5, 10), False)):
        model = cases.net(dtype=torch.float64)
        options = {"proj_dim": 24, "curvature": "trak", "use_half_precision": half}
        made = cases.loaded(model, tmp_path, 10, **options)
        made.saver.write_shard(0, rows, rows, phi[rows], torch.ones(5))
    made.finalize_features(lambda_reg=1.0)
    systems = made.saver.systems
    kernel = systems.read_gram(0, systems.read_system(0))[0]["kernel"]
    torch.testing.assert_close(kernel[5:, 5:], phi[5:] @ phi[5:].T)


def test_stored_features_that_are_not_finite_are_named(tmp_path):
    made = cases.make(cases.net(), tmp_path, 10, proj_dim=24, curvature="trak")
    made.load_checkpoint(cases.net().state_dict(), 0)
    features = torch.ones(10, 24)
    features[3, 2], features[7, 0] = torch.nan, torch.inf
    rows = np.arange(10)
    made.saver.write_shard(0, rows, rows, features, torch.ones(10))
    with pytest.raises(ValueError, match="stored features of samples 3, 7 are not finite"):
        made.finalize_features()
    assert not made.saver.systems.is_finalized(0)
