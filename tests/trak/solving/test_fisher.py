"""TRAKer with the Fisher matrix as the curvature, against the formula written out in float64."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastproj import TRAKer
from fastproj.trak import (
    AbstractModelOutput,
    CausalLMModelOutput,
    FunctionModelOutput,
    HookGradientComputer,
    ImageClassificationModelOutput,
    NotReadyError,
    ScoreComputer,
    SingularXtXWarning,
    StoreMismatchError,
)
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.files import read_json
from fastproj.trak.solving import finalizing, ridge
from fastproj.trak.solving.solve import Gram, Solution
from fastproj.trak.store.store import DRAWN
from fastproj.trak.tasks import Terms
from tests.trak import cases, modules

M = 5
SOFTENS = 1.5  # divides the logits of a causal language model in its likelihood


def data(n, seed=0):
    return cases.data(n, seed, torch.float64)


def networks(train):
    """Two checkpoints: one untrained, one that has fitted its samples."""
    single = train[0].float(), train[1]
    return [cases.net(0, torch.float64), cases.trained(1, single).double().eval()]


def solved(traker):
    return [traker.saver.systems.read_solve(i) for i in traker.saver.ids()]


def lambdas(traker):
    return [one["lambda_reg"] for one in solved(traker)]


def assert_close(found, exact, tolerance=1e-5):
    exact = np.asarray(exact)
    np.testing.assert_allclose(found, exact, rtol=0, atol=tolerance * np.abs(exact).max())


# ---- the formula --------------------------------------------------------------------------------

SIZES = {  # n, k, settings, form, rows
    "primal": (32, 8, Fisher(), "primal", 48),
    "dual": (12, 40, Fisher(), "dual", 24),
    "some drawn for": (40, 24, Fisher(samples=16), "primal", 56),
    "some drawn for, dual": (40, 64, Fisher(samples=16), "dual", 56),
    "several draws": (20, 16, Fisher(draws=3), "primal", 80),
    "sizes of parameters count": (32, 8, Fisher(size_power=0.5), "primal", 48),
    "sizes of parameters count, dual": (12, 40, Fisher(size_power=-0.25), "dual", 24),
    "several draws for some, dual": (40, 96, Fisher(samples=16, draws=3), "dual", 88),
}


@pytest.mark.parametrize("name", SIZES)
def test_scores_are_the_formula(tmp_path, monkeypatch, name):
    cases.small_blocks(monkeypatch.setattr)
    n, k, fisher, form, rows = SIZES[name]
    train, targets = data(n), data(M, seed=5)
    models = networks(train)
    options = {"proj_dim": k, "curvature": fisher}
    scores = np.array(cases.whole_run(tmp_path, models, train, targets, **options))
    traker = cases.make(models[0], tmp_path, n, **options)
    stored = traker.saver.systems.read_solve(1)
    assert (stored["curvature"], stored["form"], stored["n"]) == ("fisher", form, rows)
    files = {path.name for path in (tmp_path / "models" / "1").glob("*.safetensors")}
    file = "fisher" if form == "primal" else "fisher_kernel"
    made = {name for name in files if not name.startswith("train-")}
    step = set() if stored["halved"] is None else {"halving_step.safetensors"}
    assert made == {f"{file}.safetensors"} | step
    assert_close(scores, cases.explicit_fisher(models, train, targets, k, solved(traker), fisher))
    ridges = cases.ridges_of_mean(models, train, k, solved(traker), fisher)
    assert_close(traker.self_influence(), cases.explicit_own(models, train, k, ridges, fisher))
    top = traker.finalize_scores("test", top_k=3)
    np.testing.assert_array_equal(top.helpful_indices, np.argsort(-scores, 0)[:3].T)
    groups = [0, 1, 0, 2, 1]
    for model_id, model in enumerate(models):
        state = {name: t.clone() for name, t in model.state_dict().items()}
        traker.start_scoring_checkpoint("groups", state, model_id, M, groups=groups)
        traker.score(targets, num_samples=M)
    sums = [scores[:, np.array(groups) == g].sum(1) for g in range(3)]
    assert_close(traker.finalize_scores("groups"), np.stack(sums, 1))


class Primal(ScoreComputer):
    """With a step of k x k of its own: it isn't given the dual."""

    def solve(self, gram, lambda_reg):
        return super().solve(gram, lambda_reg)


@pytest.mark.parametrize("fisher", [Fisher(), Fisher(samples=16, draws=2)])
@pytest.mark.parametrize("task", ["image", "tokens"])
def test_lambda_and_scores_are_the_same_in_primal_and_dual(tmp_path, fisher, task):
    train, targets = data(24), data(M, seed=5)
    found = []
    for computer in (None, Primal):
        folder = tmp_path / str(computer)
        if task == "image":
            options = {"proj_dim": 90, "curvature": fisher, "score_computer": computer}
            scores = cases.whole_run(folder, networks(train), train, targets, **options)
            traker = cases.make(cases.net(), folder, 24, **options)
        else:
            traker = language(folder, 24, 90, fisher, score_computer=computer)
            scores = finished(traker)
        form = [traker.saver.systems.read_solve(i)["form"] for i in traker.saver.ids()]
        assert set(form) == {"primal" if computer else "dual"}
        rule = [traker.saver.systems.read_solve(i)["auto"]["rule"] for i in traker.saver.ids()]
        found.append((np.array(scores), lambdas(traker), rule, traker.self_influence()))
    (scores, values, rule, own), (others, other_values, other_rule, other_own) = found
    assert rule == other_rule
    assert rule[-1].startswith("training ridge")
    np.testing.assert_allclose(values, other_values, rtol=1e-5)
    assert_close(scores, others)
    assert_close(own, other_own)


def test_scores_of_samples_on_themselves_read_no_rows_in_the_dual(tmp_path, monkeypatch):
    """They are in the kernel. By rows it would be two passes over all of them for each block."""
    train, targets = data(24), data(M, seed=5)
    options = {"proj_dim": 90}
    cases.whole_run(tmp_path, networks(train), train, targets, **options)
    traker = cases.make(cases.net(), tmp_path, 24, **options)
    monkeypatch.setattr(Solution, "apply", None)
    assert (traker.self_influence() > 0).all()


def test_samples_whose_curvature_underflows_still_pull(tmp_path):
    """At log-odds of -200 a slope is 1 and its derivative 0 in float32."""
    x, y = data(24)
    x = x.float()
    task = FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0] - 200 * (batch[1] == 0),
        likelihood=lambda f, batch: F.logsigmoid(f),
    )
    found = []
    for computer in (None, Primal):
        options = {"proj_dim": 90, "score_computer": computer, "device": "cpu"}
        traker = TRAKer(cases.net(), task, 24, tmp_path / str(computer), **options)
        traker.load_checkpoint(cases.net().state_dict(), 0)
        traker.featurize((x, y), num_samples=24)
        assert float(traker.saver.column(0, "curvature").min()) == 0
        traker.finalize_features()
        systems = traker.saver.systems
        sums, _, _ = systems.read_gram(0, systems.read_system(0))
        solved = systems.read_solve(0)
        if computer is None:
            assert bool(torch.isfinite(sums["response"]).all())
        own = traker.self_influence()
        found.append((solved["form"], sums["fitted"], solved["lambda_reg"], own))
    assert [form for form, *_ in found] == ["dual", "primal"]
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)
    np.testing.assert_allclose(found[0][3], found[1][3], rtol=1e-4)


def test_rows_without_curvature_leave_the_ridge_its_digits_in_the_dual():
    """As of Huber's likelihood: the response along them is large, and a kernel has 1e-12 of it."""
    n, k = 40, 100
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(n, k, generator=generator).double() * torch.arange(1, k + 1) ** -3.0
    f = features @ torch.randn(k, generator=generator).double()
    error = 0.03 * torch.randn(n, generator=generator).double()
    linear = torch.arange(n) % 2 == 0
    weights = torch.where(linear, 1e-12, 1.0).double()
    share = ridge.Share(weights, f, torch.where(linear, 0.3 * error.sign(), error))
    found = []
    for dual in (False, True):
        moments = ridge.Moments(k, 1.0)
        (rows,) = moments.over([(features, share)])
        gram = Gram(rows @ rows.T if dual else rows.T @ rows, n, k, 2.0**-52, fisher=True)
        found.append(ridge.agreeing_ridge(gram, moments))
        assert ridge.is_found(gram, found[-1])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("task", ["image", "tokens"])
@pytest.mark.parametrize(("n", "k"), [(40, 8), (40, 96)])
def test_what_is_summed_up(tmp_path, monkeypatch, task, n, k):
    """u and what it is compared with, by ridge.fit, from all rows and their values."""
    cases.small_blocks(monkeypatch.setattr)
    fisher = Fisher(samples=16)
    if task == "image":
        model = networks(data(n))[1]
        traker = cases.make(model, tmp_path, n, proj_dim=k, curvature=fisher)
        cases.featurize(traker, model, 0, data(n))
    else:
        traker = language(tmp_path, n, k, fisher)
    traker.finalize_features()
    systems, store = traker.saver.systems, traker.saver
    sums, _, _ = systems.read_gram(0, systems.read_system(0))
    column = {name: store.column(0, name).double() for name in ("curvature", "along")}
    slopes = store.out_to_loss(0).double()
    some = torch.from_numpy(store.index(0, DRAWN).done)
    values, _ = store.reader(0, DRAWN).read(np.flatnonzero(some.numpy()))[::-1]
    values = values.double()
    assert len(values) in (8, 16)
    weight = n / len(values)
    own, drawn = store.matrix(0), store.matrix(0, DRAWN)[some]
    target = column["curvature"] * column["along"] + slopes
    u = own.T @ target + weight * drawn.T @ values
    explained = column["along"] @ target + weight * values @ values
    opposed = (-column["along"] * target).clamp(min=0).sum()
    scaled = [
        (column["curvature"].sqrt()[:, None] * own).norm(dim=1),
        weight**0.5 * drawn.norm(dim=1),
    ]
    torch.testing.assert_close(sums["fitted"], u)
    torch.testing.assert_close(sums["explained"], explained)
    torch.testing.assert_close(sums["opposed"], opposed)
    torch.testing.assert_close(sums["quartic"], torch.cat(scaled).pow(4).sum())


# ---- sequences ----------------------------------------------------------------------------------


@modules.of(seed=0, table=lambda: nn.Embedding(6, 5), head=lambda: nn.Linear(5, 6))
def Language(self, input_ids, attention_mask=None):
    """Logits of the next of 6 tokens from the last one; input_ids [B, T]."""
    return self.head(torch.tanh(self.table(input_ids)))


def texts(n, seed=0):
    """input_ids [n, 5] and a mask that ends after 2 to 5 tokens; every token suggests the next."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (n, 5), generator=generator)
    for t in range(1, 5):
        ids[:, t] = torch.where(ids[:, t] < 4, (ids[:, t - 1] + 1) % 6, ids[:, t])
    return ids, (torch.arange(5) < 2 + torch.arange(n).unsqueeze(1) % 4).long()


def trained_language():
    """One that has learnt these texts: lambda is found from its fit."""
    model = Language().double()
    ids = texts(40)[0]
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(40):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def language(folder, n, k, curvature, reduction="sum", **options):
    model = trained_language()
    task = CausalLMModelOutput(reduction)
    settings = {"use_half_precision": False, "device": "cpu", "proj_dim": k, **options}
    traker = TRAKer(model, task, n, folder, curvature=curvature, **settings)
    traker.load_checkpoint(model.state_dict(), 0)
    for rows in torch.arange(n).split(7):
        traker.featurize(tuple(part[rows] for part in texts(n)), num_samples=len(rows))
    return traker


def finished(traker, **how):
    traker.finalize_features(**how)
    traker.start_scoring_checkpoint("test", traker.model.state_dict(), 0, M)
    traker.score(texts(M, seed=5), num_samples=M)
    return np.array(traker.finalize_scores("test"))


def rows_of_texts(model, ids, mask, noise, weigh):
    """(gradient of the log-likelihood [P], drawn rows [d, P]) of one text, token by token."""
    params = list(model.parameters())

    def gradient(value):
        parts = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
        pairs = zip(parts, params, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])

    length = int(mask.sum())
    logits = model(ids[None, :length])[0]
    weight = 1 / (length - 1) if weigh else 1.0
    total, drawn = 0.0, [0.0] * len(noise)
    for t in range(length - 1):
        z, label = logits[t], int(ids[t + 1])
        p = z.detach().softmax(0)
        pi = p.clone()
        pi[label] = 0
        q = pi.sum()
        pi = pi / q
        total = total + weight * SOFTENS * (z / SOFTENS).log_softmax(0)[label]
        for j, numbers in enumerate(noise[:, t].double()):
            other = int((pi.cumsum(0) <= float(numbers[0])).sum())
            own = (weight * p[label] * q).sqrt() * numbers[1] * (z[label] - pi @ z)
            rest = (weight * q).sqrt() * numbers[2] * (z[other] - pi @ z)
            drawn[j] = drawn[j] + (own + rest) / len(noise) ** 0.5
    return gradient(total), torch.stack([gradient(row) for row in drawn])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("n", "k", "fisher", "form"),
    [
        (30, 8, Fisher(), "primal"),
        (20, 48, Fisher(), "dual"),
        (40, 20, Fisher(samples=16, draws=2), "primal"),
    ],
)
def test_scores_of_texts_are_the_formula(tmp_path, reduction, n, k, fisher, form):
    traker = language(tmp_path, n, k, fisher, reduction)
    scores = finished(traker)
    assert traker.saver.systems.read_solve(0)["form"] == form
    model, draws = traker.model, Draws(n, k, fisher, 0)
    noise = draws.noise(0, np.arange(n), 4)
    train = texts(n)
    made = [
        rows_of_texts(model, ids, mask, numbers, reduction == "mean")
        for ids, mask, numbers in zip(*train, noise, strict=True)
    ]
    chosen = draws.chosen(np.arange(n))
    metric = traker.fisher
    phi = torch.stack([own for own, _ in made])
    phi = cases.projected(cases.in_metric(model, phi, metric), k, 0)
    drawn = torch.cat([rows for (_, rows), some in zip(made, chosen, strict=True) if some])
    drawn = cases.projected(cases.in_metric(model, drawn, metric), k, 0)
    system = n / chosen.sum() * drawn.T @ drawn + phi.T @ phi
    system += lambdas(traker)[0] * torch.eye(k)  # whatever the number of checkpoints
    # Targets are asked about by the task's own output, the margins of their tokens.
    parts = []
    for ids, mask in zip(*texts(M, seed=5), strict=True):
        length = int(mask.sum())
        p = model(ids[None, :length])[0].softmax(-1)[torch.arange(length - 1), ids[1:length]]
        f = (p / (1 - p)).log().sum() / (length - 1 if reduction == "mean" else 1)
        grads = torch.autograd.grad(f, list(model.parameters()))
        parts.append(torch.cat([g.reshape(-1) for g in grads]))
    of_targets = cases.projected(cases.in_metric(model, torch.stack(parts), metric), k, 0)
    assert_close(scores, phi @ torch.linalg.solve(system, of_targets.T))


def test_a_regression_has_nothing_to_draw(tmp_path):
    """F is Phi^T Phi, and Q are the residuals."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    y = model(x)[:, 0].detach()  # it has been fitted
    y += 0.1 * torch.randn(40, generator=generator, dtype=torch.float64)
    task = FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0],
        likelihood=lambda f, batch: -0.5 * (batch[1] - f) ** 2,
    )
    traker = TRAKer(
        model,
        task,
        40,
        tmp_path,
        proj_dim=8,
        use_half_precision=False,
        lambda_reg=0.3,
        curvature="fisher",
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((x, y), num_samples=40)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, M)
    traker.score((x[:M], y[:M]), num_samples=M)
    rows = []
    for one in x:
        grads = torch.autograd.grad(model(one[None])[0, 0], list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    phi = cases.projected(torch.stack(rows), 8, 0)
    f = model(x)[:, 0].detach()
    gram, gamma = phi.T @ phi, solved(traker)[0]["training_ridge"]
    assert solved(traker)[0]["halved"] == 1.0
    fitted = phi.T @ (f - f.mean() + y - f)
    whole, half = (torch.linalg.solve(gram + r * torch.eye(8), fitted) for r in (gamma, 2 * gamma))
    residual = y - f - phi @ (half - whole)
    system = gram + 0.3 * torch.eye(8)
    exact = (phi * residual[:, None]) @ torch.linalg.solve(system, phi[:M].T)
    assert_close(traker.finalize_scores("test"), exact)
    assert not traker.saver.index(0, DRAWN).done.any()
    assert not list(tmp_path.rglob("drawn-*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_regression_of_a_model_in_16_bits(tmp_path, dtype):
    """Its slopes come in 16 bits, too."""
    x, y, model = numbers_to_predict(40)
    task = FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0],
        likelihood=lambda f, batch: -0.5 * (batch[1] - f) ** 2,
    )
    found = []
    for one in (torch.float64, dtype):
        train = x.to(one), y.to(one)
        targets = tuple(part[:M] for part in train)
        found.append(scored(tmp_path / str(one), model.to(one), task, train, targets, 8)[0])
    share = torch.finfo(dtype).eps * 40
    assert np.linalg.norm(found[1] - found[0]) < share * np.linalg.norm(found[0])


# ---- what ought to make no difference -----------------------------------------------------------


def numbers_to_predict(n):
    """(x [n, 6], y [n]) with noise, and a network that has fitted them; float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    y = x[:, 0] - x[:, 1] * x[:, 2] + 0.3 * torch.randn(n, generator=generator, dtype=x.dtype)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(150):
        optimizer.zero_grad()
        (model(x)[:, 0] - y).square().mean().backward()
        optimizer.step()
    return x, y, model.eval()


def scored(folder, model, task, train, targets, k, **options):
    """(scores, lambda) of one checkpoint."""
    n, m = len(train[0]), len(targets[0])
    settings = {"use_half_precision": False, "device": "cpu", "proj_dim": k, **options}
    traker = TRAKer(model, task, n, folder, **settings)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(train, num_samples=n)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, m)
    traker.score(targets, num_samples=m)
    return np.array(traker.finalize_scores("test")), lambdas(traker)[0]


def chosen_lambda(features, share, samples):
    """Of rows [N, k] of the Fisher matrix, by the primal."""
    moments = ridge.Moments(features.shape[1], 1.0)
    blocks = zip(features.split(11), *(part.split(11) for part in share), strict=True)
    stream = moments.over((rows, ridge.Share(*parts)) for rows, *parts in blocks)
    gram = ScoreComputer().gram(stream, features.shape[1], len(features))
    gamma = ridge.agreeing_ridge(gram, moments)
    return ridge.choose_fisher_lambda(gram, moments, samples, gamma).lambda_reg


@pytest.mark.parametrize("likelihood", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("gradients", [1e-6, 1.0, 1e6])
def test_lambda_has_the_scale_of_the_matrix(gradients, likelihood):
    """c times the gradients give c^2 times F and lambda, and w times all likelihoods w times."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 12, generator=generator, dtype=torch.float64)
    f = 2 * x[:, 0] + x[:, 1] + 0.1 * torch.randn(80, generator=generator, dtype=x.dtype)
    q = torch.sigmoid(-f)
    share = (q * (1 - q), f, q)
    usual = chosen_lambda(x, share, 80)
    assert usual > 1.01 * ridge.LEAST * float((share[0] * x.square().sum(1)).sum()) / 80
    scaled = (likelihood * share[0], f, likelihood * q)
    wanted = gradients**2 * likelihood * usual
    assert chosen_lambda(gradients * x, scaled, 80) == pytest.approx(wanted, rel=1e-6)
    order = torch.randperm(80, generator=generator)
    mixed = tuple(part[order] for part in share)
    assert chosen_lambda(x[order], mixed, 80) == pytest.approx(usual, rel=1e-6)
    turned = torch.where(torch.arange(80) % 3 == 0, -1.0, 1.0).double()  # another sign of f
    signed = (share[0], turned * f, turned * q)
    assert chosen_lambda(turned[:, None] * x, signed, 80) == pytest.approx(usual, rel=1e-6)


@pytest.mark.parametrize("k", [8, 90])
@pytest.mark.parametrize("below", [False, True])
def test_a_regression_doesnt_ask_where_its_labels_have_their_zero(tmp_path, k, below):
    """Also where the network is below all of them, as one that was stopped early may be."""
    x, y, model = numbers_to_predict(60)
    if below:
        f = model(x)[:, 0].detach()
        y = f + (y - f).abs() + 0.1
    found = []
    for zero in (0.0, 100.0):
        task = FunctionModelOutput(
            lambda model, batch, zero=zero: model(batch[0])[:, 0] + zero,
            likelihood=lambda f, batch: -0.5 * (batch[1] - f) ** 2,
        )
        labels = y + zero
        found.append(scored(tmp_path / str(zero), model, task, (x, labels), (x[:M], labels[:M]), k))
    (scores, lam), (others, other) = found
    assert other == pytest.approx(lam, rel=1e-4)
    assert_close(others, scores, 1e-3)  # 100 and a residual have fewer digits in float32


@pytest.mark.parametrize("k", [8, 90])
@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_regression_doesnt_ask_for_the_unit_of_its_labels(tmp_path, k, unit):
    """Nor for that of the likelihood: a curvature of 1e-18 is as good as one of 1."""
    x, y, model = numbers_to_predict(60)
    found = []
    for one in (1.0, unit):
        task = FunctionModelOutput(
            lambda model, batch, one=one: model(batch[0])[:, 0] * one,
            likelihood=lambda f, batch, one=one: -0.5 * ((batch[1] - f) / one) ** 2,
        )
        labels = y * one
        folder = tmp_path / str(one)
        found.append(scored(folder, model, task, (x, labels), (x[:M], labels[:M]), k))
    (scores, lam), (others, other) = found
    assert other == pytest.approx(lam, rel=1e-4)
    assert_close(others / unit, scores)


@pytest.mark.parametrize("k", [8, 90])
def test_two_classes_may_be_said_by_the_log_odds_of_either(tmp_path, k):
    """By the right one's, as the task for images does, or by that of class 1 for all."""
    x, y, model = numbers_to_predict(60)
    y = (y > 0).long()
    by_class = FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0],
        likelihood=lambda f, batch: batch[1] * f - F.softplus(f),
    )
    found = [
        scored(tmp_path / str(place), model, task, (x, y), (x[:M], y[:M]), k)
        for place, task in enumerate(("image_classification", by_class))
    ]
    (scores, lam), (others, other) = found
    assert other == pytest.approx(lam, rel=1e-5)
    assert_close(others * (2 * y[:M].numpy() - 1), scores)


def weighted(weight, right):
    """Two classes whose log-likelihoods count ``weight(label)``, by the log-odds of the right one,
    or by those of class 1.
    """
    if right:
        return FunctionModelOutput(
            lambda model, batch: (2 * batch[1] - 1) * model(batch[0])[:, 0],
            likelihood=lambda f, batch: weight(batch[1]) * F.logsigmoid(f),
        )
    return FunctionModelOutput(
        lambda model, batch: model(batch[0])[:, 0],
        likelihood=lambda f, batch: weight(batch[1]) * (batch[1] * f - F.softplus(f)),
    )


@pytest.mark.parametrize("k", [8, 90])
def test_weights_of_classes_may_be_said_by_either_log_odds(tmp_path, k):
    """And a weight that all samples have changes nothing."""
    x, y, model = numbers_to_predict(60)
    y = (y > 0).long()

    def found(number, weight, right):
        task = weighted(weight, right)
        scores, lam = scored(tmp_path / number, model, task, (x, y), (x[:M], y[:M]), k)
        return (scores if right else scores * (2 * y[:M].numpy() - 1)), lam

    usual, lam = found("usual", lambda y: 1.0, True)
    for number, (weight, right) in enumerate(
        [(0.01, True), (0.01, False), (50, True), (50, False)]
    ):
        scores, other = found(str(number), lambda y, weight=weight: weight, right)
        assert other == pytest.approx(weight * lam, rel=1e-4)
        assert_close(scores, usual, 1e-4)
    by_class = [found(f"of{right}", lambda y: 1 + 4 * y, right) for right in (True, False)]
    assert by_class[0][1] == pytest.approx(by_class[1][1], rel=1e-5)
    assert_close(by_class[1][0], by_class[0][0])
    assert np.abs(by_class[0][0] - usual).max() > 0.01 * np.abs(usual).max()


def test_slopes_of_weighted_classes_follow_the_output():
    f, change = torch.tensor([[-3.0, 0.5, 4.0], [2.0, -1.0, 0.3]], dtype=torch.float64)
    weight, side = torch.tensor([[0.1, 7.0, 2.0], [1, -1, 1]], dtype=torch.float64)
    p = torch.sigmoid(side * f)
    found = ridge.moved_slopes(side * weight * (1 - p), weight * p * (1 - p), change, 0.0)
    torch.testing.assert_close(found, side * weight * torch.sigmoid(-side * (f + change)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_of_samples_that_are_known_for_certain_move_as_far_as_they_can(dtype):
    """What is 0 beside 1 counts where the output moves that far."""
    f, change = torch.tensor([[20.0, 30.0, 80.0, 5.0], [-40.0, -60.0, -120.0, 60.0]]).to(dtype)
    q, p = torch.sigmoid(-f), torch.sigmoid(f)
    for curvature in (q * p, q):  # of two classes, and of several
        found = ridge.moved_slopes(q, curvature, change, 0.0)
        torch.testing.assert_close(found, torch.sigmoid(-f - change), rtol=1e-5, atol=0)
    one = torch.ones(1, dtype=dtype)  # 1 - p has no digits left: it stays, and overflows nothing
    torch.testing.assert_close(ridge.moved_slopes(one, one, 300 * one, 0.0), one)


LINEAR = {
    r"without curvature .* not one that is linear in the output": lambda f, batch: batch[1] * f,
    r"slope by the output is 0 .* all scores would be 0": lambda f, batch: 0 * f * f,
    r"fit all of its labels exactly \(.* a regression without residuals\)": (
        lambda f, batch: -0.5 * (f - f.detach()) ** 2
    ),
}


@pytest.mark.parametrize("told", LINEAR)
def test_likelihoods_without_a_fisher_matrix_are_refused(tmp_path, told):
    x, y, model = numbers_to_predict(20)
    task = FunctionModelOutput(lambda model, batch: model(batch[0])[:, 0], likelihood=LINEAR[told])
    with pytest.raises(ValueError, match=told):
        scored(tmp_path, model, task, (x, y), (x[:M], y[:M]), 8)


def test_two_classes_that_are_certain_and_wrong_have_no_fisher_matrix(tmp_path):
    x, _, _ = numbers_to_predict(20)
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.mul_(1e9)
    y = torch.arange(20) % 2
    with pytest.raises(ValueError, match=r"without curvature .* each label the probability 0 or 1"):
        scored(tmp_path, model, "image_classification", (x, y), (x[:M], y[:M]), 8)


def test_slopes_of_a_regression_and_of_classes_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    f = 3 * torch.randn(400, generator=generator)
    noise = torch.randn(400, generator=generator)
    counts, sure = torch.poisson(f.exp(), generator=generator), torch.sigmoid(f)
    labels = (torch.rand(400, generator=generator) < sure).float()
    probit = (-f.square() / 2 - torch.special.log_ndtr(f)).exp() / (2 * math.pi) ** 0.5
    for slopes, curvature, residual in (
        (noise, torch.ones(400), 1.0),
        (100 * noise, torch.full((400,), 100.0), 1.0),
        (counts - f.exp(), f.exp(), 1.0),
        (noise.abs(), torch.ones(400), 1.0),  # of a network below all labels
        (noise.tanh().abs(), 1 - noise.tanh() ** 2, 1.0),
        (probit, probit * (probit + f), 0.0),  # of the right class
        (labels - sure, sure * (1 - sure), 0.0),
        (1 - sure, sure * (1 - sure), 0.0),
        ((1 + 4 * labels) * (labels - sure), (1 + 4 * labels) * sure * (1 - sure), 0.0),
        (torch.ones(400), torch.ones(400), 0.0),  # of several predictions
        (torch.zeros(400), torch.zeros(400), 0.0),
    ):
        found = ridge.fisher_meaning(slopes, curvature, f)
        assert found.residual == residual
        weighted = float((curvature.double() * f.double()).sum() / curvature.double().sum())
        assert found.offset == pytest.approx(weighted if residual else 0.0)


# ---- networks that know everything --------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "told"), [(98, "larger than float32"), (1000, "all 24 rows of F")]
)
def test_texts_that_are_known_for_certain_have_no_scores(tmp_path, least, told):
    """The gradients of their log-likelihoods are 0, or so small that F is 0 beside the targets'."""
    ids = texts(20)[0]
    model = trained_language()
    labels = model(ids).argmax(-1)
    with torch.no_grad():
        margin = model(ids).topk(2).values.diff().abs().min()
        for p in model.head.parameters():
            p.mul_(least / margin)
    batch = (ids, torch.ones_like(ids), labels)
    traker = TRAKer(model, "masked_lm", 20, tmp_path, proj_dim=8, device="cpu")
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch, num_samples=20)

    def scores():
        traker.finalize_features()
        traker.start_scoring_checkpoint("test", model.state_dict(), 0, M)
        traker.score(tuple(part[:M] for part in batch), num_samples=M)
        return traker.finalize_scores("test")

    with pytest.raises(ValueError, match=told):
        scores()


# ---- batches, stops, and files ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "labels", "margin"),
    [(10**6, False, 2.0), (500, False, 1.5), (10**6, True, 5.0), (500, True, 5.0)],
)
def test_the_margin_is_larger_where_no_rows_are_drawn_and_for_several_labels(
    samples, labels, margin
):
    """Where nothing puts gamma in doubt: small beside k and N, and above what is typical."""
    sure = SimpleNamespace(fit_share=lambda: 1.0)
    gram = Gram(torch.eye(500, dtype=torch.float64), 10**6, 500, 1e-12)
    dimension = ridge.effective_dimension(gram.matrix, 40.0)
    free = (1 - dimension / 500) * (1 - dimension / 10**6)
    choice = ridge.choose_fisher_lambda(gram, sure, samples, 40.0, labels)
    assert choice.lambda_reg == pytest.approx(margin * 40.0 / free)


@pytest.mark.parametrize(("n", "k"), [(30, 8), (12, 40)])
def test_lambda_of_several_labels_is_larger_than_of_tokens(tmp_path, monkeypatch, n, k):
    """And larger the fewer checkpoints are averaged, as of single predictions."""
    generator = torch.Generator().manual_seed(0)
    train, targets = (
        (data(size, seed)[0], torch.randint(0, 2, (size, 4), generator=generator))
        for size, seed in ((n, 0), (M, 5))
    )
    models = networks(data(n))
    task = ImageClassificationModelOutput(multilabel=True)
    options = {"task": task, "curvature": "fisher", "proj_dim": k}
    scores = cases.whole_run(tmp_path, models, train, targets, **options)
    traker = cases.make(models[0], tmp_path, n, **options)
    chosen = lambdas(traker)
    with monkeypatch.context() as as_tokens:
        as_tokens.setattr(type(task), "several_labels", False)
        traker.finalize_features()
        assert chosen[0] > lambdas(traker)[0]
    for model_id in range(2):
        traker.finalize_features([model_id], lambda_reg=1.5 * chosen[model_id])
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


@pytest.mark.parametrize("k", [4, 50])
def test_at_half_of_the_data_a_ridge_regression_has_the_residuals_of_twice_the_ridge(k):
    """In the primal and in the dual: (A + 2 gamma)^-1 u less (A + gamma)^-1 u, along each row."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, k, generator=generator, dtype=torch.float64)
    y = rows[:, 0] + torch.randn(20, generator=generator, dtype=torch.float64)
    whole, half = (
        y - rows @ torch.linalg.solve(rows.T @ rows + r * torch.eye(k), rows.T @ y)
        for r in (3.0, 6.0)
    )
    moments = ridge.Moments(k, 1.0)
    share = ridge.Share(torch.ones(20, dtype=torch.float64), y - whole, whole)
    list(moments.over([(rows, share)]))
    dual = k > 20
    matrix = rows @ rows.T if dual else rows.T @ rows
    gram = Gram(matrix, 20, k, 1e-12)
    gamma = ridge.agreeing_ridge(gram, moments)
    assert gamma == pytest.approx(3.0)
    step = ridge.halving_step(gram, moments, gamma)
    step = rows.T @ step if dual else step
    torch.testing.assert_close(whole - rows @ step, half)
    assert ridge.halving_step(gram, moments, None) is None
    assert ridge.halving_step(gram, moments, 1e-12 * gamma) is None  # it says nothing


@pytest.mark.parametrize("k", [16, 64])
def test_a_step_that_is_gone_is_made_again(tmp_path, k):
    train, targets = data(20), data(M, seed=5)
    models = networks(train)
    options = {"proj_dim": k, "curvature": Fisher(draws=3)}
    scores = np.array(cases.whole_run(tmp_path, models, train, targets, **options))
    traker = cases.make(models[0], tmp_path, 20, **options)
    assert traker.saver.systems.is_finalized(1)
    (tmp_path / "models/1/halving_step.safetensors").unlink()
    assert not traker.saver.systems.is_finalized(1)
    traker.finalize_features()
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


def test_slopes_move_alike_in_streams_and_in_parts_of_scores(tmp_path):
    train, targets = data(20), data(M, seed=5)
    model = networks(train)[1]
    traker = cases.make(model, tmp_path, 20, proj_dim=64)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    traker.load_checkpoint(state, 0)
    traker.featurize(train, num_samples=20)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", state, 0, M)
    traker.score(targets, num_samples=M)
    scores = np.array(traker.finalize_scores("test"))
    assert solved(traker)[0]["halved"] == 0.0
    some = tuple(part[3:9] for part in train)
    assert_close(traker.score(some, stream=True), scores[3:9])
    assert_close(traker.score(targets, per="module").sum(2), scores)


def test_where_no_slope_moves_there_is_no_step(tmp_path):
    """Nor its cost: two more Cholesky factors."""
    traker = language(tmp_path, 20, 64, "auto")
    finished(traker)
    found = solved(traker)[0]
    assert (found["halved"], found["training_ridge"] > 0) == (None, True)
    assert not (tmp_path / "models/0/halving_step.safetensors").exists()


@pytest.mark.parametrize(("q", "joint"), [([1.0, 1.0], True), ([1.0, 0.3], False)])
def test_samples_are_sequences_where_all_q_are_1(q, joint):
    store = SimpleNamespace(out_to_loss=lambda _: torch.tensor(q))
    assert finalizing.has_joint_outputs(store, 0) is joint


def test_slopes_follow_the_output():
    q = torch.tensor([0.1, 0.9, 1.0, -0.3, 0.0], dtype=torch.float64)
    change = torch.tensor([-1.0, 2.0, -5.0, 0.5, 3.0], dtype=torch.float64)
    curvature = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    odds = q.abs() / (1 - q.abs()) * torch.exp(-change * q.sign())  # of the wrong answer
    logistic = torch.where(q == 1, q, q.sign() * odds / (1 + odds))
    torch.testing.assert_close(ridge.moved_slopes(q, curvature, change, 0.0), logistic)
    linear = q - curvature * change
    torch.testing.assert_close(ridge.moved_slopes(q, curvature, change, 1.0), linear)
    between = ridge.moved_slopes(q, curvature, change, 0.25)
    torch.testing.assert_close(between, 0.75 * logistic + 0.25 * linear)


@pytest.mark.parametrize("fitted", [0.0, 0.5, 1.0])
def test_the_fewer_rows_are_left_to_fit_the_smaller_is_what_is_typical(fitted):
    values = torch.tensor([1.0] * 200 + [1e-6] * 300, dtype=torch.float64)
    gram = Gram(torch.diag(values), 500, 1000, 1e-12)  # the dual's, of 500 rows
    known = SimpleNamespace(fit_share=lambda: fitted)
    unit = float(values.sum()) / 500
    dimension = ridge.effective_dimension(gram.matrix, 1e-4)  # 200 and a little
    typical = ridge.TYPICAL * unit * (1 - dimension / 500) ** (fitted / 2)
    free = (1 - dimension / 500) * (1 - dimension / 1000)
    gamma = ridge.EXACT_MARGIN * 1e-4 / free
    wanted = typical ** (1 - free * fitted) * gamma ** (free * fitted)
    found = ridge.choose_fisher_lambda(gram, known, 500, 1e-4).lambda_reg
    assert found == pytest.approx(max(wanted, ridge.LEAST * unit))
    # Rows that fit at no ridge leave none.
    found = ridge.choose_fisher_lambda(gram, known, 500, 1e-30).lambda_reg
    assert found == pytest.approx(ridge.TYPICAL * unit * ridge.UNUSED ** (fitted / 2))


@pytest.mark.parametrize("computer", ["loop", "hooks"])
def test_rows_dont_depend_on_batches(tmp_path, computer):
    train, made = data(40), []
    model = cases.net(0, torch.float64)
    for size in (1, 7, 40):
        options = {"gradient_computer": computer, "proj_dim": 8}
        traker = cases.make(model, tmp_path / str(size), 40, **options)
        cases.featurize(traker, model, 0, train, batch=size)
        chosen = traker._featurizer.draws.chosen(np.arange(40))
        np.testing.assert_array_equal(traker.saver.index(0, DRAWN).done, chosen)
        drawn = traker.saver.matrix(0, DRAWN)[torch.from_numpy(chosen)]
        columns = [traker.saver.column(0, name) for name in ("curvature", "along", "drawn")]
        made.append((traker.saver.matrix(0), drawn, *columns, traker.saver.out_to_loss(0)))
    for found in made[1:]:
        for part, wanted in zip(found, made[0], strict=True):
            torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["f" * 12, "0" * 12])
@pytest.mark.parametrize("changed", [False, True])
def test_a_stop_between_drawn_rows_and_their_samples(tmp_path, monkeypatch, name, changed):
    """Rows that were left of data that have changed since don't count, whatever their file's name.

    name : the part of it that is random.
    """
    train, targets = data(20), data(M, seed=5)
    model = cases.net(0, torch.float64)
    whole = np.array(cases.whole_run(tmp_path / "whole", [model], train, targets, proj_dim=16))
    traker = cases.make(model, tmp_path / "parts", 20, proj_dim=16)
    write = traker.saver.write_shard

    def stopped(model_id, inds, content, features, q, exp_name, *more):
        if exp_name != DRAWN and inds[0] >= 7:
            raise KeyboardInterrupt
        write(model_id, inds, content, features, q, exp_name, *more)

    monkeypatch.setattr(traker.saver, "write_shard", stopped)
    before = train[0].clone()
    before[7:] *= 1 + changed
    with monkeypatch.context() as patch:
        patch.setattr("uuid.uuid4", lambda: SimpleNamespace(hex=name))
        with pytest.raises(KeyboardInterrupt):
            cases.featurize(traker, model, 0, (before, train[1]))
    again = cases.make(model, tmp_path / "parts", 20, proj_dim=16)
    assert (again.saver.index(0, DRAWN).done.sum(), again.saver.index(0).done.sum()) == (14, 7)
    cases.featurize(again, model, 0, train)
    for saver in (again.saver, cases.make(model, tmp_path / "parts", 20, proj_dim=16).saver):
        rows = saver.matrix(0, DRAWN)
        wanted = cases.make(model, tmp_path / "whole", 20, proj_dim=16).saver.matrix(0, DRAWN)
        np.testing.assert_array_equal(rows, wanted)
    again = cases.whole_run(tmp_path / "parts", [model], train, targets, proj_dim=16)
    np.testing.assert_array_equal(again, whole)


def test_samples_whose_drawn_rows_are_gone_are_featurized_again(tmp_path):
    train, targets = data(20), data(M, seed=5)
    model = cases.net(0, torch.float64)
    scores = np.array(cases.whole_run(tmp_path, [model], train, targets, proj_dim=16))
    first = sorted(tmp_path.rglob("drawn-*"))[0]
    first.unlink()
    traker = cases.make(model, tmp_path, 20, proj_dim=16)
    with pytest.raises(NotReadyError, match=r"lacks 7 of 20 .* \(the first: 0\); call featurize"):
        traker.finalize_features()
    traker.load_checkpoint(model.state_dict(), 0)
    assert traker.remaining_batches(20) == [list(range(7))]
    traker.featurize(train, inds=range(20))
    traker.finalize_features()
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


# ---- lambda as a number -------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(30, 8), (12, 40)])
def test_a_lambda_that_is_chosen_is_larger_the_fewer_checkpoints_are_averaged(tmp_path, n, k):
    """As 3 * lambda for one, and 2 * lambda for two, times what ``peers`` says. Sequences stay as
    they are: ``test_scores_of_texts_are_the_formula``.
    """
    train, targets = data(n), data(M, seed=5)
    models = networks(train)
    both = np.array(cases.whole_run(tmp_path, models, train, targets, proj_dim=k))
    traker = cases.make(models[0], tmp_path, n, proj_dim=k, curvature="fisher")
    chosen, own = lambdas(traker), traker.self_influence()
    alone, own_alone = np.array(traker.finalize_scores("test", [1])), traker.self_influence([1])
    ridges = cases.ridges_of_mean(models, train, k, solved(traker), Fisher())
    matrix, _, _ = cases.fisher_of(models[1], 1, train, k, Fisher())
    phi = cases.projected(cases.gradients(models[1], train), k, 1)
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    parts, streams = [], []
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, M)
        traker.score(targets, num_samples=M)
        parts.append(traker.score(targets, per="module").sum(2))
        streams.append(traker.score(train, stream=True))
    inverted = np.array(traker.saver.current_store["features"])
    assert_close(inverted, phi @ cases.averaged_inverse(matrix, ridges[1]))
    assert_close(np.mean(parts, 0), both)
    assert_close(np.mean(streams, 0), both)

    (multiple,) = traker.saver.systems.multiples.values()
    stored = solved(traker)

    def with_lambda(model_id, lambda_reg):
        alike = {"lambda_reg": lambda_reg, "own_noise": 0.0, "peers": False}
        traker.saver.systems.write_solve(model_id, {**stored[model_id], **alike})

    for model_id in range(2):
        with_lambda(model_id, 2 * (chosen[model_id] * multiple))
    np.testing.assert_array_equal(traker.finalize_scores("test"), both)
    np.testing.assert_array_equal(traker.self_influence(), own)
    np.testing.assert_array_equal(traker.saver.current_store["features"], inverted)
    with_lambda(1, 3 * chosen[1])
    np.testing.assert_array_equal(traker.finalize_scores("test", [1]), alone)
    np.testing.assert_array_equal(traker.self_influence([1]), own_alone)


@pytest.mark.parametrize(("n", "k"), [(30, 8), (12, 40)])
def test_a_lambda_of_before_there_were_two_ridges_is_one(tmp_path, n, k):
    """Scores of a store that an earlier version finalised stay as they are."""
    train, targets = data(n), data(M, seed=5)
    model = networks(train)[0]
    cases.whole_run(tmp_path, [model], train, targets, proj_dim=k)
    traker = cases.make(model, tmp_path, n, proj_dim=k, curvature="fisher")
    systems, (stored,) = traker.saver.systems, solved(traker)
    assert len(stored["ridges"]) == 2
    del stored["ridges"]
    systems.write_solve(0, {**stored, "own_noise": 1.0})
    scores, own = np.array(traker.finalize_scores("test")), traker.self_influence()
    traker.finalize_features(lambda_reg=2 * stored["lambda_reg"])
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)
    np.testing.assert_array_equal(traker.self_influence(), own)


class Inverting(ScoreComputer):
    """Solves by an inverse, and says so."""

    def solve(self, gram, lambda_reg):
        inverse = torch.linalg.inv(gram.matrix + lambda_reg * torch.eye(len(gram.matrix)).double())
        k = len(gram.matrix)
        return Solution(inverse, "inverse", lambda_reg, gram.n, k, 10.0)


def test_a_solve_of_ones_own_has_two_ridges(tmp_path):
    train, targets = data(30), data(M, seed=5)
    models = networks(train)
    scores = cases.whole_run(tmp_path, models, train, targets, proj_dim=8, score_computer=Inverting)
    found = solved(cases.make(models[0], tmp_path, 30, proj_dim=8))
    assert_close(scores, cases.explicit_fisher(models, train, targets, 8, found))


@pytest.mark.parametrize("digits", [0.01, 0.2, 5])
def test_a_matrix_too_inexact_for_the_smaller_ridge_has_one(tmp_path, monkeypatch, digits):
    """The smaller one is 1/16 of lambda, and its system 16 times as hard to solve, at most."""
    n, k = 30, 8
    train = data(n)
    traker = cases.featurized(networks(train)[0], tmp_path, train, proj_dim=k)
    traker.finalize_features()
    (exact,) = solved(traker)
    assert [by for by, _ in exact["ridges"]] == pytest.approx([0.0609, 1.826], rel=1e-3)
    read = finalizing.gram_of
    eps = digits / (exact["condition"] * k**0.5)
    monkeypatch.setattr(finalizing, "gram_of", lambda *args: replace(read(*args), eps=eps))
    with pytest.warns(SingularXtXWarning) if digits > 1 else nullcontext():
        traker.finalize_features()
    (found,) = solved(traker)
    assert found["method"] == ("pseudo-inverse" if digits > 1 else "cholesky")
    two = digits < 0.06
    assert (len(found["ridges"]), found["own_noise"]) == ((2, 2.0) if two else (1, 1.0))
    assert found["lambda_reg"] == exact["lambda_reg"]


@pytest.mark.parametrize("lambda_reg", [0.7, "0.3*mean"])
@pytest.mark.parametrize(("n", "k"), [(30, 8), (12, 40)])
def test_a_number_where_fisher_is_asked_for_is_added_to_it(tmp_path, lambda_reg, n, k):
    train, targets = data(n), data(M, seed=5)
    models = networks(train)
    options = {"lambda_reg": lambda_reg, "curvature": "fisher", "proj_dim": k}
    scores = cases.whole_run(tmp_path, models, train, targets, **options)
    found = lambdas(cases.make(models[0], tmp_path, n, **options))
    traces = [
        float(cases.fisher_of(model, i, train, k, Fisher())[0].trace())
        for i, model in enumerate(models)
    ]
    wanted = [0.7] * 2 if lambda_reg == 0.7 else [0.3 * trace / k for trace in traces]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    ridges = solved(cases.make(models[0], tmp_path, n, **options))
    exact = [one | {"lambda_reg": lam} for one, lam in zip(ridges, wanted, strict=True)]
    assert_close(scores, cases.explicit_fisher(models, train, targets, k, exact))


def test_a_singular_fisher_matrix_is_told_by_its_rows(tmp_path):
    options = {"lambda_reg": 0, "curvature": "fisher", "proj_dim": 64}
    traker = cases.make(cases.net(), tmp_path, 16, **options)
    cases.featurize(traker, traker.model, 0, cases.data(16))
    told = (
        r"the Fisher matrix F is singular: 32 rows .*, k=64 .* proj_dim well below the number of r"
    )
    with pytest.warns(SingularXtXWarning, match=told):
        traker.finalize_features()


@pytest.mark.parametrize(("n", "k"), [(30, 8), (12, 40)])
def test_a_number_when_finalising_is_traks_formula_to_the_digit(tmp_path, n, k):
    train, targets = data(n), data(M, seed=5)
    found = []
    for curvature in ("auto", "trak"):
        models = networks(train)
        options = {"proj_dim": k, "curvature": curvature, "lambda_reg": "auto"}
        traker = cases.make(models[0], tmp_path / curvature, n, **options)
        states = [{name: t.clone() for name, t in m.state_dict().items()} for m in models]
        for model_id, state in enumerate(states):
            traker.load_checkpoint(state, model_id)
            traker.featurize(train, num_samples=n)
        traker.finalize_features(lambda_reg=0.2)
        for model_id, state in enumerate(states):
            traker.start_scoring_checkpoint("test", state, model_id, M)
            traker.score(targets, num_samples=M)
        found.append(np.array(traker.finalize_scores("test")))
        assert {traker.saver.systems.read_solve(i)["curvature"] for i in (0, 1)} == {"trak"}
    np.testing.assert_array_equal(*found)
    assert_close(found[0], cases.explicit_trak(networks(train), train, targets, k, 0.2))


def test_checkpoints_with_either_matrix_have_no_mean(tmp_path):
    train, targets = data(20), data(M, seed=5)
    models = networks(train)
    scores = np.array(cases.whole_run(tmp_path, models, train, targets, proj_dim=8))
    traker = cases.make(models[0], tmp_path, 20, proj_dim=8)
    traker.finalize_features([1], lambda_reg=0.2)
    told = r"model_ids 0 were finalised with the Fisher matrix and 1 with TRAK's formula; expected"
    with pytest.raises(ValueError, match=told):
        traker.finalize_scores("test")
    with pytest.raises(ValueError, match=told):
        traker.self_influence()
    traker.finalize_scores("test", [1])
    traker.finalize_features()
    np.testing.assert_array_equal(traker.finalize_scores("test"), scores)


def test_a_number_alone_is_traks_store(tmp_path):
    traker = cases.make(cases.net(), tmp_path, 20, lambda_reg=0.1)
    assert traker.fisher is None
    with pytest.raises(StoreMismatchError, match="curvature 'trak' in the directory, 'fisher, 1"):
        cases.make(cases.net(), tmp_path, 20)
    cases.make(cases.net(), tmp_path, 20, curvature="trak")


def test_features_in_another_metric_have_no_traks_formula_when_finalising(tmp_path):
    class Weighted(ImageClassificationModelOutput):
        size_power = 0.5

    model, train = cases.net(), cases.data(20)
    traker = TRAKer(model, Weighted(), 20, tmp_path, proj_dim=8, device="cpu")
    assert traker.fisher == Fisher(size_power=0.5)
    cases.featurize(traker, model, 0, train)
    with pytest.raises(ValueError, match=r"lambda_reg=0.5, which is TRAK's formula.*Weighted"):
        traker.finalize_features(lambda_reg=0.5)
    traker.finalize_features()


class Same(ImageClassificationModelOutput):
    """The same terms, of which it says whether they have f and Q."""

    def likelihood_terms(self, *arguments):
        return super().likelihood_terms(*arguments)


class Says(Same):
    learns_along_output = True


class Doubled(Says):
    """Terms of another output, under a class that has f."""

    def likelihood_terms(self, *arguments):
        terms = super().likelihood_terms(*arguments)
        return terms._replace(output=2 * terms.output, slope=terms.slope / 2)


def test_terms_of_ones_own_are_of_another_output_unless_it_is_said(tmp_path):
    model, train = cases.net(), cases.data(20)
    for task in (Told, Same, Doubled):
        folder = tmp_path / task.__name__
        traker = TRAKer(model, task(), 20, folder, proj_dim=8, device="cpu")
        cases.featurize(traker, model, 0, train)
        with pytest.raises(
            ValueError, match=rf"is TRAK's formula, .* features of {task.__name__} "
        ):
            traker.finalize_features(lambda_reg=0.5)
        traker.finalize_features()
    function = FunctionModelOutput(margin, likelihood=lambda f, batch: F.logsigmoid(f))
    for number, task in enumerate((Says(), Renamed(), function)):
        traker = TRAKer(model, task, 20, tmp_path / str(number), proj_dim=8, device="cpu")
        cases.featurize(traker, model, 0, train)
        traker.finalize_features(lambda_reg=np.float32(0.5))


def test_several_labels_have_no_traks_formula_when_finalising(tmp_path):
    """Their training features are gradients of the log-likelihood, not of f."""
    x, y = data(12)
    task = ImageClassificationModelOutput(multilabel=True)
    traker = cases.make(cases.net(0, torch.float64), tmp_path, 12, task)
    cases.featurize(traker, cases.net(0, torch.float64), 0, (x, F.one_hot(y, 4)))
    with pytest.raises(ValueError, match=r"lambda_reg=0.5, which is TRAK's formula"):
        traker.finalize_features(lambda_reg=0.5)


@pytest.mark.parametrize("k", [8, 40])
def test_one_label_has_the_lambda_of_two_classes(tmp_path, k):
    x, found = data(30)[0], []
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 1)).double()
    y = (model(x)[:, 0] > 0).long()  # which it fits
    for labels in (y, y.unsqueeze(1)):
        several = labels.dim() == 2
        task = ImageClassificationModelOutput(multilabel=several)
        traker = cases.make(model, tmp_path / str(several), 30, task, proj_dim=k)
        cases.featurize(traker, model, 0, (x, labels))
        traker.finalize_features()
        found += lambdas(traker)
    assert found[1] == pytest.approx(found[0])


def test_texts_have_no_traks_formula_when_finalising(tmp_path):
    traker = language(tmp_path, 20, 8, "auto")
    with pytest.raises(ValueError, match=r"lambda_reg=0.5, which is TRAK's formula.*CausalLM") as e:
        traker.finalize_features(lambda_reg=0.5)
    assert 'expected lambda_reg="auto", or TRAKer(..., curvature="fisher")' in str(e.value)
    assert not traker.saver.systems.is_finalized(0)
    scores = finished(traker)
    asked = language(tmp_path, 20, 8, "fisher")  # goes on with the same features
    (value,) = lambdas(asked)
    np.testing.assert_array_equal(finished(asked, lambda_reg=value), scores)


# ---- who has it ---------------------------------------------------------------------------------


def test_it_is_said_and_stored(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fastproj.trak"):
        traker = cases.make(cases.net(), tmp_path, 48)
    assert traker.fisher == Fisher(size_power=0)
    said = "fisher, 1 row(s) drawn for 16 of 48 samples"
    assert f"curvature: {said}" in caplog.text
    assert read_json(tmp_path / "metadata.json")["curvature"] == said
    cases.make(cases.net(), tmp_path, 48, curvature="fisher")


def test_other_settings_are_refused_with_both_named(tmp_path):
    cases.make(cases.net(), tmp_path, 40, curvature=Fisher(samples=40))
    one = r"curvature 'fisher, 1 row\(s\) drawn for 40 of 40 samples' in the directory"
    two = r"'fisher, 2 row\(s\) drawn for 40 of 40 samples' in this run"
    with pytest.raises(StoreMismatchError, match=f"{one}, {two}"):
        cases.make(cases.net(), tmp_path, 40, curvature=Fisher(samples=40, draws=2))
    for options in ({"curvature": "trak"}, {"lambda_reg": 0.1}):
        with pytest.raises(StoreMismatchError, match=f"{one}, 'trak' in this run"):
            cases.make(cases.net(), tmp_path, 40, **options)
    cases.make(cases.net(), tmp_path / "trak", 40, curvature="trak")
    with pytest.raises(StoreMismatchError, match="use curvature='trak'"):
        cases.make(cases.net(), tmp_path / "trak", 40)


OF_STORES = [
    Fisher(),
    Fisher(draws=2),
    Fisher(size_power=0.5),
    *(Fisher(samples=count) for count in (1, 40, 350, 351, 1000, 1023, 1024, 4001)),
]


@pytest.mark.parametrize("fisher", OF_STORES)
@pytest.mark.parametrize("n", [1030, 1024, 4001])
def test_the_curvature_of_a_store_is_named_and_goes_on_with_it(tmp_path, fisher, n):
    cases.make(cases.net(), tmp_path, n, curvature=fisher)
    others = {"curvature": "trak"}, {"lambda_reg": 0.1}, {"curvature": Fisher(samples=9, draws=3)}
    for options in others:
        with pytest.raises(StoreMismatchError, match=r"use curvature=fastproj\.") as error:
            cases.make(cases.net(), tmp_path, n, **options)
        told = str(error.value).split("use curvature=fastproj.trak.")[1].split(", to whose")[0]
        named = eval(told, {"Fisher": Fisher})
        cases.make(cases.net(), tmp_path, n, **options | {"curvature": named})


class Alone(AbstractModelOutput):
    """f and Q of one sample, as trak's classes are."""

    def get_output(self, model, weights, buffers, image, label):
        logits = torch.func.functional_call(model, (weights, buffers), image.unsqueeze(0))
        return F.log_softmax(logits, 1)[0].gather(0, label.reshape(1))[0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]))


class Told(Alone):
    """One that also says what its likelihood is."""

    knows_likelihood = True

    def likelihood_terms(self, model, weights, buffers, batch, noise):
        logits = torch.func.functional_call(model, (weights, buffers), batch[0])
        f = F.log_softmax(logits, 1).gather(1, batch[1][:, None])[:, 0]
        one = torch.ones_like(f)
        return Terms(f, one, one, 0 * one, f.new_zeros(len(f), 0))


class OwnOutputs(ImageClassificationModelOutput):
    def outputs(self, *arguments):
        return 2 * super().outputs(*arguments)


class OwnQ(ImageClassificationModelOutput):
    def get_out_to_loss_grad(self, *arguments):
        return super().get_out_to_loss_grad(*arguments) / 2


class OwnEverything(OwnOutputs):
    def likelihood_terms(self, *arguments):
        return super().likelihood_terms(*arguments)


class Renamed(ImageClassificationModelOutput):
    """Nothing of its own that the likelihood depends on."""

    def check_batch(self, batch):
        super().check_batch(batch)


def margin(model, batch):
    return model(batch[0])[:, 0]


WITHOUT = {
    "one sample": Alone,
    "own outputs": OwnOutputs,
    "own Q": OwnQ,
    "temperature": lambda: ImageClassificationModelOutput(temperature=2.0),
    "temperature and own outputs": lambda: OwnOutputs(temperature=2.0),
    "function": lambda: margin,
    "function with a loss": lambda: FunctionModelOutput(margin, loss=lambda f: F.softplus(-f)),
}
WITH = {
    "name": lambda: "image_classification",
    "own everything": OwnEverything,
    "renamed": Renamed,
    "one sample and a likelihood": Told,
    "likelihood": lambda: FunctionModelOutput(margin, likelihood=lambda f, batch: F.logsigmoid(f)),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_tasks_that_know_no_likelihood_keep_traks(tmp_path, name):
    model, train = cases.net(), cases.data(20)
    settings = {"proj_dim": 8, "device": "cpu"}
    traker = TRAKer(model, WITHOUT[name](), 20, tmp_path / "auto", **settings)
    assert traker.fisher is None
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    assert traker.saver.systems.read_solve(0)["curvature"] == "trak"
    assert not list(tmp_path.rglob("drawn*"))
    warm = name == "temperature"
    why, cure = (" with temperature=2", "temperature=1") if warm else ("", "a task of fastproj's")
    told = rf"received curvature=.*which{why} doesn't say .*; expected {cure}, "
    for curvature in ("fisher", Fisher(draws=2)):
        with pytest.raises(ValueError, match=told) as error:
            TRAKer(model, WITHOUT[name](), 20, tmp_path / "no", curvature=curvature, **settings)
        assert 'likelihood_terms of its own, or curvature="trak"' in str(error.value)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", WITH)
def test_tasks_that_know_one_have_it(tmp_path, name):
    model, train = cases.net(), cases.data(20)
    traker = TRAKer(model, WITH[name](), 20, tmp_path, proj_dim=8, device="cpu")
    assert traker.fisher == Fisher(size_power=0)
    cases.featurize(traker, model, 0, train)
    traker.finalize_features()
    assert traker.saver.systems.read_solve(0)["curvature"] == "fisher"


class One(HookGradientComputer):
    def compute_per_sample_grad(self, batch):
        return super().compute_per_sample_grad(batch)


class Plain:
    """trak's methods alone."""

    def __init__(self, model, task, **_):
        self.model, self.task = model, task

    def load_model_params(self, model): ...

    def compute_per_sample_grad(self, batch): ...

    def compute_loss_grad(self, batch): ...


@pytest.mark.parametrize("computer", [One, Plain])
def test_computers_of_one_output_keep_traks(tmp_path, computer):
    assert cases.make(cases.net(), tmp_path, 20, gradient_computer=computer).fisher is None
    with pytest.raises(ValueError, match="takes the gradients of one output only; expected"):
        cases.make(cases.net(), tmp_path, 20, gradient_computer=computer, curvature="fisher")


@pytest.mark.parametrize(
    "wrong", ["Fisher", "gauss-newton", None, 1, True, Fisher, np.array(["fisher", "trak"])]
)
def test_another_curvature_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"TRAKer: received curvature=.*'auto', 'fisher', 'trak'"):
        cases.make(cases.net(), tmp_path / "no", 20, curvature=wrong)
    assert not (tmp_path / "no").exists()


# ---- what a task says ---------------------------------------------------------------------------


class Wrong(ImageClassificationModelOutput):
    """Terms with something amiss."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def likelihood_terms(self, *arguments):
        return self.change(super().likelihood_terms(*arguments))


def test_terms_that_cant_be_right_are_refused(tmp_path):
    changes = {
        r"slope \[1, 4\]": lambda t: t._replace(slope=t.slope[None]),
        r"drawn \[4\]": lambda t: t._replace(drawn=t.drawn[:, 0]),
        r"drawn \[4, 2\] .* noise for 1 row": lambda t: t._replace(drawn=t.drawn.repeat(1, 2)),
        "returned tuple; expected fastproj.trak.tasks.Terms": tuple,
        "returned output float 1.0; expected a tensor": lambda t: t._replace(output=1.0),
        r"returned along list \[": lambda t: t._replace(along=t.along.tolist()),
        "returned curvature ndarray": lambda t: t._replace(curvature=t.curvature.numpy()),
        r"returned slope \[4\] complex64": lambda t: t._replace(slope=t.slope * 1j),
        "returned drawn NoneType None": lambda t: t._replace(drawn=None),
        "sample 0 has the curvature -1": lambda t: t._replace(curvature=t.curvature * 0 - 1),
        r"along of samples 0, 1, 2, 3 ": lambda t: t._replace(along=t.along / 0),
    }
    for number, (message, change) in enumerate(changes.items()):
        traker = TRAKer(
            cases.net(), Wrong(change), 4, tmp_path / str(number), proj_dim=8, device="cpu"
        )
        traker.load_checkpoint(cases.net().state_dict(), 0)
        with pytest.raises((TypeError, ValueError), match=message):
            traker.featurize(cases.data(4), num_samples=4)
        assert not traker.saver.index(0).done.any()


def test_a_likelihood_that_is_not_concave_goes_with_traks_curvature(tmp_path):
    """As the error says: that of outliers has no Fisher matrix of this kind."""

    def cauchy(f, batch):
        return -torch.log1p((f - batch[1]) ** 2)

    task = FunctionModelOutput(lambda model, batch: model(batch[0])[:, 0], likelihood=cauchy)
    images, labels = cases.data(8)
    batch = images, 10.0 * labels
    traker = cases.loaded(cases.net(), tmp_path / "fisher", 8, task=task)
    with pytest.raises(ValueError, match=r"curvature='trak'\) and another save_dir"):
        traker.featurize(batch, num_samples=8)
    traker = cases.loaded(cases.net(), tmp_path / "trak", 8, task=task, curvature="trak")
    traker.featurize(batch, num_samples=8)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", cases.net().state_dict(), 0, 8)
    traker.score(batch, num_samples=8)
    assert np.isfinite(traker.finalize_scores("test")).all()
