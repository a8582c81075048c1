"""What tasks say of the likelihood of labels, against sums over all labels and signs, in float64.

The models here return their inputs as logits (or embeddings), so gradients by these are those that
the Fisher matrix is made of; chosen classes and signs are enumerated, so expectations are exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastproj import TRAKer
from fastproj.trak import (
    CausalLMModelOutput,
    CLIPModelOutput,
    FunctionModelOutput,
    ImageClassificationModelOutput,
    Seq2SeqModelOutput,
    TextClassificationModelOutput,
    TokenClassificationModelOutput,
)
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.tasks.base import Terms
from fastproj.trak.tasks.likelihood import log_sigmoid
from tests.trak import modules

IGNORED = -100
SCALE = 1.7  # of CLIP


@modules.of(unused=lambda: nn.Parameter(torch.zeros(1, dtype=torch.float64)))
def Echo(self, logits: Any = None, **inputs: Any) -> Any:
    """Returns the logits, or the embeddings, that it is given."""
    if "u" in inputs:
        return inputs["u"], inputs["v"], SCALE
    return logits


class Case(NamedTuple):
    """A task, one sample x [D], and what it predicts, written out.

    batch : of copies x [B, D], as the task takes it.
    predictions : of x, (weight, logits [C], label) of each prediction that counts.
    numbers : how many numbers the noise has for each row; the predictions take the first.
    temperature : of the likelihood by which training samples count.
    """

    task: Any
    x: Tensor
    batch: Callable[[Tensor], Any]
    predictions: Callable[[Tensor], list[tuple[float, Tensor, int]]]
    numbers: int = 1
    temperature: float = 1.0

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Of the labels under logits / temperature, times temperature."""
        t = self.temperature
        return sum(t * w * (z / t).log_softmax(0)[label] for w, z, label in self.predictions(x))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def image(classes: int, label: int) -> Case:
    return Case(
        ImageClassificationModelOutput(),
        numbers(classes),
        lambda x: (x, torch.full((len(x),), label)),
        lambda x: [(1.0, x, label)],
    )


def text(classes: int, label: int) -> Case:
    return Case(
        TextClassificationModelOutput(),
        numbers(classes, seed=1),
        lambda x: ({"logits": x, "labels": torch.full((len(x),), label)},),
        lambda x: [(1.0, x, label)],
    )


def one_logit(task: Any, label: int, squeezed: bool) -> Case:
    """The logit of class 1 of two: class 0 has 0."""

    def batch(x: Tensor) -> Any:
        logits, labels = x[:, 0] if squeezed else x, torch.full((len(x),), label)
        images = isinstance(task, ImageClassificationModelOutput)
        return (logits, labels) if images else ({"logits": logits, "labels": labels},)

    return Case(task, numbers(1), batch, lambda x: [(1.0, torch.cat([0 * x, x]), label)])


def multilabel(kind: Any, labels: list[float]) -> Case:
    """Each label is a prediction of two classes."""

    def batch(x: Tensor) -> Any:
        every = torch.tensor(labels).expand(len(x), -1)
        images = kind is ImageClassificationModelOutput
        return (x, every) if images else ({"logits": x, "labels": every},)

    def predictions(x: Tensor) -> list[tuple[float, Tensor, int]]:
        return [
            (1.0, torch.stack([torch.zeros_like(z), z]), int(label))
            for z, label in zip(x, labels, strict=True)
        ]

    count = len(labels)
    task = kind(multilabel=True)
    return Case(task, numbers(count), batch, predictions, count)


def causal(
    reduction: str, classes: int, labels: list[int], temperature: float | None = None
) -> Case:
    """Position t of the logits predicts label t + 1."""
    count = len(labels)
    there = [t for t in range(count - 1) if labels[t + 1] != IGNORED]
    weight = 1 / len(there) if reduction == "mean" else 1.0

    def batch(x: Tensor) -> Any:
        ids = torch.zeros(len(x), count, dtype=torch.long)
        logits = x.reshape(len(x), count, classes)
        every = torch.tensor(labels).expand(len(x), count)
        return ({"input_ids": ids, "logits": logits, "labels": every},)

    def predictions(x: Tensor) -> list[tuple[float, Tensor, int]]:
        return [(weight, x.reshape(count, classes)[t], labels[t + 1]) for t in there]

    task = CausalLMModelOutput(reduction, temperature)
    x = numbers(count * classes, seed=2)
    return Case(task, x, batch, predictions, count - 1, temperature or 1.5)


def seq2seq(reduction: str) -> Case:
    labels = [2, IGNORED, 0]
    weight = 0.5 if reduction == "mean" else 1.0

    def batch(x: Tensor) -> Any:
        ids = torch.zeros(len(x), 3, dtype=torch.long)
        every = torch.tensor(labels).expand(len(x), 3)
        logits = x.reshape(len(x), 3, 3)
        return ({"input_ids": ids, "decoder_input_ids": ids, "logits": logits, "labels": every},)

    def predictions(x: Tensor) -> list[tuple[float, Tensor, int]]:
        return [(weight, x.reshape(3, 3)[t], labels[t]) for t in (0, 2)]

    task = Seq2SeqModelOutput(reduction)
    return Case(task, numbers(9, seed=3), batch, predictions, 3)


def tags() -> Case:
    labels = [2, IGNORED, 0]

    def batch(x: Tensor) -> Any:
        ids = torch.zeros(len(x), 3, dtype=torch.long)
        every = torch.tensor(labels).expand(len(x), 3)
        return ({"input_ids": ids, "logits": x.reshape(len(x), 3, 3), "labels": every},)

    def predictions(x: Tensor) -> list[tuple[float, Tensor, int]]:
        return [(1.0, x.reshape(3, 3)[t], labels[t]) for t in (0, 2)]

    return Case(TokenClassificationModelOutput(), numbers(9, seed=4), batch, predictions, 3, 2.0)


def clip(temperature: float | None, own: float | None = None) -> Case:
    """x is (u, v); the right partner is class 0 of both predictions."""
    others = numbers(2, 3, seed=5), numbers(2, 3, seed=6)
    task = CLIPModelOutput(temperature, simulated_batch_size=2, likelihood_temperature=own)
    task.get_embeddings(Echo(), [{"u": others[0], "v": others[1]}])
    scale = SCALE if temperature is None else temperature
    scale = scale**0.5 if own is None else scale / own

    def batch(x: Tensor) -> Any:
        return ({"u": x[:, :3], "v": x[:, 3:]},)

    def predictions(x: Tensor) -> list[tuple[float, Tensor, int]]:
        found = task._embeddings(Echo())
        u, v = x[:3], x[3:]
        own = (u @ v).reshape(1)
        to_texts = scale * torch.cat([own, found.texts @ u])
        to_images = scale * torch.cat([own, found.images @ v])
        return [(0.5, to_texts, 0), (0.5, to_images, 0)]

    return Case(task, numbers(6, seed=4) / 2, batch, predictions, 2)


CASES = {
    "image, 2 classes": lambda: image(2, 1),
    "image, 3 classes": lambda: image(3, 0),
    "image, 5 classes": lambda: image(5, 4),
    "text, 2 classes": lambda: text(2, 0),
    "text, 4 classes": lambda: text(4, 2),
    "image, one logit, 1": lambda: one_logit(ImageClassificationModelOutput(), 1, False),
    "image, one logit, 0": lambda: one_logit(ImageClassificationModelOutput(), 0, True),
    "text, one logit": lambda: one_logit(TextClassificationModelOutput(), 0, False),
    "image, three labels": lambda: multilabel(ImageClassificationModelOutput, [1, 0, 1]),
    "image, one of one label": lambda: multilabel(ImageClassificationModelOutput, [1]),
    "text, two labels": lambda: multilabel(TextClassificationModelOutput, [0.0, 1.0]),
    "causal, sum": lambda: causal("sum", 3, [0, 2, IGNORED, 1]),
    "causal, mean": lambda: causal("mean", 3, [0, 2, IGNORED, 1]),
    "causal, two tokens": lambda: causal("sum", 2, [1, 0, 1]),
    "causal, one prediction": lambda: causal("sum", 4, [1, 3]),
    "causal, not softened": lambda: causal("sum", 3, [0, 2, 1], 1.0),
    "causal, sharpened": lambda: causal("mean", 3, [0, 2, 1], 0.5),
    "seq2seq, sum": lambda: seq2seq("sum"),
    "seq2seq, mean": lambda: seq2seq("mean"),
    "tags": tags,
    "clip": lambda: clip(None),
    "clip, temperature": lambda: clip(2.0),
    "clip, as it was trained": lambda: clip(2.0, 1.0),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> Case:
    return CASES[request.param]()


def terms_of(case: Case, x: Tensor, noise: Tensor) -> Terms:
    model = nn.Identity() if isinstance(case.task, ImageClassificationModelOutput) else Echo()
    return case.task.likelihood_terms(model, {}, {}, case.batch(x), noise)


def others_of(logits: Tensor, label: int) -> Tensor:
    """pi: probabilities of the classes, given that it isn't the label."""
    return logits.detach().index_fill(0, torch.tensor([label]), -torch.inf).softmax(0)


def every_draw(case: Case) -> tuple[Tensor, Tensor]:
    """Noise [E, 1, T, 3] of all choices of classes and signs, and their probabilities [E]."""
    options = []
    for _, logits, label in case.predictions(case.x):
        pi = others_of(logits, label)
        top = pi.cumsum(0)
        middles = top - pi / 2
        options.append(
            [
                (middles[c], own, other, pi[c] / 4)
                for c in range(len(pi))
                if c != label
                for own, other in itertools.product((1.0, -1.0), repeat=2)
            ]
        )
    draws = list(itertools.product(*options))
    noise = torch.full((len(draws), 1, case.numbers, 3), 0.5, dtype=torch.float64)
    chance = torch.ones(len(draws), dtype=torch.float64)
    for number, draw in enumerate(draws):
        for place, (u, own, other, p) in enumerate(draw):
            noise[number, 0, place] = torch.tensor([u, own, other])
            chance[number] *= p
    torch.testing.assert_close(chance.sum(), torch.ones((), dtype=torch.float64))
    return noise, chance


def by_x(values: Tensor, x: Tensor) -> Tensor:
    """The gradient of each of values [B] by its row of x, [B, D]."""
    if not values.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(values.sum(), x, retain_graph=True)[0]


def copies(case: Case, count: int) -> Tensor:
    return case.x.expand(count, -1).clone().requires_grad_()


def jacobian(case: Case, number: int) -> Tensor:
    """Of the logits of a prediction by x, [C, D]."""
    return torch.autograd.functional.jacobian(lambda x: case.predictions(x)[number][1], case.x)


def fisher(case: Case) -> Tensor:
    """J^T (diag p - p p^T) J of all predictions, times their weights, [D, D].

    Where rows are drawn, plus the outer product of the log-likelihood's gradient with itself.
    """
    total = torch.zeros(len(case.x), len(case.x), dtype=torch.float64)
    for number, (weight, logits, _) in enumerate(case.predictions(case.x)):
        p = logits.softmax(0)
        j = jacobian(case, number)
        total += weight * j.T @ (torch.diag(p) - torch.outer(p, p)) @ j
    made = terms_of(case, case.x[None], torch.full((1, 1, case.numbers, 3), 0.5))
    if made.drawn.shape[1]:
        y = case.x.clone().requires_grad_()
        total += outer(torch.autograd.grad(case.log_likelihood(y), y)[0])
    return total


def outer(rows: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * rows.unsqueeze(-2)


# ---- the gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [0, 1])
def test_slope_times_the_gradient_is_that_of_the_log_likelihood(case, draws):
    x = copies(case, 1)
    made = terms_of(case, x, torch.full((1, draws, case.numbers, 3), 0.5))
    found = made.slope * by_x(made.output, x)
    y = case.x.clone().requires_grad_()
    torch.testing.assert_close(found[0], torch.autograd.grad(case.log_likelihood(y), y)[0])
    assert not made.slope.requires_grad
    assert not made.curvature.requires_grad
    assert not made.along.requires_grad


def test_the_output_is_the_tasks_own_where_that_has_the_same_direction(case):
    """So that lambda as a number is TRAK's formula on the features that are there."""
    model = nn.Identity() if isinstance(case.task, ImageClassificationModelOutput) else Echo()
    made = terms_of(case, case.x[None], torch.full((1, 1, case.numbers, 3), 0.5))
    if case.task.learns_along_output:
        batch = case.batch(case.x[None])
        torch.testing.assert_close(made.output, case.task.outputs(model, {}, {}, batch))
        q = case.task.get_out_to_loss_grad(model, {}, {}, batch)
        torch.testing.assert_close(made.slope, q)
    else:
        several = isinstance(case.task, CausalLMModelOutput) or getattr(
            case.task, "multilabel", False
        )
        assert several or case.numbers > 1


def test_a_sample_has_so_many_predictions(case):
    assert case.task.num_predictions(case.batch(case.x[None])) == case.numbers


def test_labels_of_texts_may_be_called_label():
    case = text(4, 2)
    (batch,) = case.batch(case.x[None])
    other = {"logits": batch["logits"], "label": batch["labels"]}
    for found in ("outputs", "get_out_to_loss_grad"):
        method = getattr(case.task, found)
        torch.testing.assert_close(
            method(Echo(), {}, {}, (other,)), method(Echo(), {}, {}, (batch,))
        )
    assert "label" in other  # the caller's own


# ---- the matrix ---------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
def test_the_expectation_is_the_fisher_matrix(case, draws):
    """Summed over all choices and signs; several draws are alike here, and share the weight."""
    noise, chance = every_draw(case)
    x = copies(case, len(noise))
    made = terms_of(case, x, noise.expand(-1, draws, -1, -1))
    assert made.drawn.shape[1] in (0, draws)
    exact = made.curvature.detach()[:, None, None] * outer(by_x(made.output, x))
    drawn = sum(outer(by_x(made.drawn[:, j], x)) for j in range(made.drawn.shape[1]))
    found = (chance[:, None, None] * (exact + drawn)).sum(0)
    torch.testing.assert_close(found, fisher(case))


def variance(case: Case) -> Tensor:
    """Of each entry of the outer product of one drawn row, [D, D], from the probabilities alone.

    A row is a sum of independent x_j, each with a random sign, and E x_j x_j^T = M_j. So the
    variance of (row row^T)[a, b] is

        sum_j (E x_ja^2 x_jb^2 - M_j[a, b]^2)
        + sum_{j != k} (M_j[a, a] M_k[b, b] + M_j[a, b] M_k[a, b])
    """
    moments, fourths = [], []
    for number, (weight, logits, label) in enumerate(case.predictions(case.x)):
        j = jacobian(case, number)
        pi, p = others_of(logits, label), logits.softmax(0)[label]
        unit = torch.eye(len(pi), dtype=torch.float64)
        own = (weight * p * (1 - p)).sqrt() * (unit[label] - pi) @ j
        if not case.task.learns_along_output:  # otherwise it is no part of what is drawn
            moments.append(outer(own))
            fourths.append(outer(own) ** 2)
        others = (weight * (1 - p)).sqrt() * (unit - pi) @ j  # [C, D]
        moments.append((pi[:, None, None] * outer(others)).sum(0))
        fourths.append((pi[:, None, None] * outer(others) ** 2).sum(0))
    total = sum(fourth - m**2 for fourth, m in zip(fourths, moments, strict=True))
    for one, other in itertools.permutations(moments, 2):
        total = total + one.diagonal()[:, None] * other.diagonal() + one * other
    return total


def test_the_variance_of_a_draw_is_what_the_formula_says(case):
    noise, chance = every_draw(case)
    x = copies(case, len(noise))
    made = terms_of(case, x, noise)
    if not made.drawn.shape[1]:
        assert float(variance(case).abs().max()) < 1e-25  # two classes: nothing is left to chance
        return
    products = outer(by_x(made.drawn[:, 0], x))
    mean = (chance[:, None, None] * products).sum(0)
    found = (chance[:, None, None] * (products - mean) ** 2).sum(0)
    torch.testing.assert_close(found, variance(case))


@pytest.mark.parametrize("name", ["image, 5 classes", "causal, mean", "clip"])
def test_draws_are_unbiased(name):
    """By TRAKer's random numbers: 40,000 draws, each entry within 5.5 standard errors.

    A false alarm has a chance below 1e-5 in all: 4e-8 for each of at most 144 entries, if normal.
    """
    case, count = CASES[name](), 40_000
    draws = Draws(count, 8, Fisher(count), seed=3)
    noise = draws.noise(1, np.arange(count), case.numbers)
    x = copies(case, count)
    made = terms_of(case, x, noise)
    exact = made.curvature.detach()[:, None, None] * outer(by_x(made.output, x))
    found = (exact + outer(by_x(made.drawn[:, 0], x))).mean(0)
    error = 5.5 * (variance(case) / count).sqrt()
    assert bool(((found - fisher(case)).abs() <= error + 1e-12).all())
    assert float(error.max()) < 0.05 * float(fisher(case).abs().max())


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if "clip" not in name])
def test_along_and_drawn_have_the_values_of_their_rows_times_the_logits(name):
    case = CASES[name]()  # whose x are the logits
    noise, _ = every_draw(case)
    x = copies(case, len(noise))
    made = terms_of(case, x, noise)
    torch.testing.assert_close(
        made.along,
        (made.slope[:, None] * by_x(made.output, x) * x).sum(1)
        / (made.slope if float(made.curvature[0]) > 0 else 1.0),
    )
    for j in range(made.drawn.shape[1]):
        values = made.drawn[:, j]
        torch.testing.assert_close(values.detach(), (by_x(values, x) * x).sum(1).detach())


@pytest.mark.parametrize("name", [name for name in CASES if "clip" in name])
def test_the_values_of_pairs_are_0(name):
    case = CASES[name]()
    noise, _ = every_draw(case)
    made = terms_of(case, copies(case, len(noise)), noise)
    for values in (made.along, made.drawn):
        torch.testing.assert_close(values.detach(), torch.zeros_like(values))


@pytest.mark.parametrize("name", [name for name in CASES if "clip" not in name])
def test_rows_and_values_are_what_a_newton_step_fits(name):
    """In expectation, u = J^T v and z . v, with v = (diag p - p p^T) z + e_y - p: see ridge.fit.

    The last p is that of the likelihood's temperature.
    """
    case = CASES[name]()
    noise, chance = every_draw(case)
    x = copies(case, len(noise))
    made = terms_of(case, x, noise)
    target = made.curvature.detach() * made.along + made.slope
    u = target[:, None] * by_x(made.output, x)
    values = made.drawn.detach()
    for j in range(values.shape[1]):
        u = u + values[:, j, None] * by_x(made.drawn[:, j], x)
    explained = made.along * target + values.square().sum(1)
    exact_u, exact = torch.zeros_like(case.x), torch.zeros((), dtype=torch.float64)
    for number, (weight, z, label) in enumerate(case.predictions(case.x)):
        p, t = z.softmax(0), case.temperature
        v = p * z - p * (p @ z) - (z / t).softmax(0)
        v[label] += 1
        exact_u += weight * v @ jacobian(case, number)
        exact += weight * z @ v
    if made.drawn.shape[1]:  # the empirical part is along the gradient of the log-likelihood
        value = (made.slope * made.along)[0]
        exact_u += value * made.slope[0] * by_x(made.output, x)[0]
        exact += value**2
    torch.testing.assert_close(chance @ u, exact_u)
    torch.testing.assert_close(chance @ explained, exact)


def test_they_dont_change_where_all_logits_of_a_prediction_do():
    case = causal("sum", 3, [0, 2, IGNORED, 1])
    noise, _ = every_draw(case)
    shift = torch.tensor([3.0, -2.0, 5.0, 1.0]).double().repeat_interleave(3)
    one, other = (terms_of(case, x.expand(len(noise), -1), noise) for x in (case.x, case.x + shift))
    for name in Terms._fields:
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


# ---- batches and padding ------------------------------------------------------------------------


def test_terms_depend_on_the_sample_alone():
    """Not on padding on either side, the order or the other samples of a batch: draws are by
    number.
    """
    task, classes, inds = CausalLMModelOutput(), 5, np.array([7, 2, 100_003])
    draws = Draws(200_000, 8, Fisher(draws=2), seed=9)
    logits = numbers(3, 6, classes)
    labels = torch.tensor([[1, 2, 3, 4, 0, 1], [1, 2, *[IGNORED] * 4], [0, 1, 4, *[IGNORED] * 3]])

    def terms(rows: list[int], length: int, left: int = 0) -> Terms:
        noise = draws.noise(5, inds[rows], left + length - 1)
        own = nn.functional.pad(labels[rows, :length], (left, 0), value=IGNORED)
        own[:, left] = IGNORED  # the first has no prediction
        given = {"input_ids": own.clamp(min=0), "labels": own}
        batch = ({**given, "logits": nn.functional.pad(logits[rows, :length], (0, 0, left, 0))},)
        assert task.num_predictions(batch) == left + length - 1
        return task.likelihood_terms(Echo(), {}, {}, batch, noise)

    whole = terms([0, 1, 2], 6)
    assert whole.drawn.shape == (3, 2)
    assert whole.drawn.unique().numel() == 6
    for rows, length, left in (
        ([1], 2, 0),
        ([2], 3, 0),
        ([2, 0], 6, 0),
        ([1, 2], 4, 0),
        ([1], 2, 1),
        ([2, 0], 6, 3),
    ):
        part = terms(rows, length, left)
        for name in Terms._fields:
            found, wanted = getattr(part, name), getattr(whole, name)[rows]
            torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_what_is_drawn_stays_the_same():
    """Of one version and the next: rows that a store has go with those that are added."""
    draws = Draws(1000, 8, Fisher(40, draws=2), seed=2**40 + 1)
    chosen = [*range(285, 301), *range(621, 637), *range(949, 965)]
    assert np.flatnonzero(draws.chosen(np.arange(1000))).tolist() == chosen
    noise = draws.noise(3, np.array([2**33 + 7]), 2)[0]
    uniform = torch.tensor([[15403987, 14698859], [8937211, 3658533]]) / 2**24
    torch.testing.assert_close(noise[..., 0], uniform, rtol=0, atol=0)
    assert noise[..., 1:].tolist() == [[[1, -1], [1, 1]], [[1, 1], [-1, 1]]]


def test_noise_is_of_a_sample_a_draw_a_prediction_and_a_checkpoint():
    inds = np.array([3, 0, 2**33 + 3, 19])
    draws = Draws(100, 8, Fisher(draws=3), seed=2**40 + 1)
    noise = draws.noise(0, inds, 4)
    assert noise.shape == (4, 3, 4, 3)
    assert noise.dtype == torch.float32
    assert noise[..., 0].unique().numel() == 48
    assert bool(((noise[..., 0] > 0) & (noise[..., 0] < 1)).all())
    assert set(noise[..., 1:].unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(draws.noise(0, inds[::-1].copy(), 2), noise.flip(0)[:, :, :2])
    one = Draws(100, 8, Fisher(draws=1), seed=2**40 + 1)
    torch.testing.assert_close(one.noise(0, inds, 4), noise[:, :1])
    assert draws.noise(0, inds, 4, some=False).shape == (4, 0, 4, 3)
    for other in (
        draws.noise(1, inds, 4),
        Draws(100, 8, Fisher(draws=3), seed=2**40 + 2).noise(0, inds, 4),
        Draws(100, 8, Fisher(draws=3), seed=2**41 + 1).noise(0, inds, 4),
    ):
        assert not bool((other[..., 0] == noise[..., 0]).any())


# ---- which samples ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "samples", "count"),
    [
        (1, 8, None, {1}),
        (15, 8, None, {15}),
        (16, 8, None, {16}),
        (100, 8, None, {16, 4}),  # a run of 16; the last one is shorter
        (1000, 64, None, {128, 120}),
        (1000, 8, 40, {48, 40}),
        (1000, 8, 5000, {1000}),
    ],
)
def test_how_many_samples_are_chosen(n, k, samples, count):
    draws = Draws(n, k, Fisher(samples, draws=2), seed=1)
    chosen = draws.chosen(np.arange(n))
    assert draws.count == chosen.sum()
    assert draws.count in count
    some = ", 16 at a time" if draws.count < n and (samples or n % 16) else ""
    assert draws.describe() == f"fisher, 2 row(s) drawn for {draws.count} of {n} samples{some}"
    order = np.random.default_rng(0).permutation(n)
    np.testing.assert_array_equal(draws.chosen(order), chosen[order])
    again = Draws(n, k, Fisher(samples, draws=2), seed=1)
    np.testing.assert_array_equal(again.chosen(np.arange(n)), chosen)
    rows = draws.rows(np.array([0, n - 1]))
    np.testing.assert_array_equal(rows, [[0, 1], [2 * n - 2, 2 * n - 1]])


@pytest.mark.parametrize(("n", "fisher"), [(97, Fisher(samples=16)), (130, Fisher())])
def test_rows_count_one_in_expectation_whatever_the_last_run(n, fisher):
    """Also where a run is shorter than the others: the same samples may not always be in it."""
    every = np.arange(n)
    chosen = np.array([Draws(n, 16, fisher, seed).chosen(every) for seed in range(3000)])
    weights = chosen * n / chosen.sum(1, keepdims=True)
    error = weights.std(0) / len(weights) ** 0.5
    assert (np.abs(weights.mean(0) - 1) < 5 * error).all()


def test_selections_of_as_many_samples_are_told_apart():
    one, other = (Draws(4000, 256, Fisher(samples=count), 0) for count in (1000, 1024))
    assert one.count == other.count == 1024
    assert one.describe() != other.describe()
    assert (one.chosen(np.arange(4000)) != other.chosen(np.arange(4000))).any()
    default = Draws(4096, 256, Fisher(), 0)  # as stores have it that were made before
    assert default.describe() == "fisher, 1 row(s) drawn for 512 of 4096 samples"


def test_every_sample_is_chosen_as_often():
    """Over 2000 seeds, 4 of 20 runs: each within 6 standard errors (1e-7 for 20 of them)."""
    runs = np.arange(0, 320, 16)
    seen = sum(Draws(320, 8, Fisher(64), seed).chosen(runs) for seed in range(2000))
    assert np.abs(seen - 400).max() < 6 * (2000 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("n", "k", "run"), [(1600, 8, 16), (10_000, 255, 16), (10_000, 256, 32), (100_001, 700, 64)]
)
def test_runs_are_spread_evenly(n, k, run):
    """Samples may be sorted by class; and few batches have both kinds of samples."""
    draws = Draws(n, k, Fisher(), seed=5)
    assert (draws.first == 0) == (n % run == 0)
    chosen = np.roll(draws.chosen(np.arange(n)), -draws.first)
    starts = np.flatnonzero(chosen & ~np.concatenate([[False], chosen[:-1]]))
    assert (starts % run == 0).all()
    assert chosen.reshape(-1)[: n // run * run].reshape(-1, run).std(1).max() == 0
    picked = np.flatnonzero(chosen[::run])
    step = -(-n // run) / len(picked)
    assert len(picked) == -(-2 * k // run)
    assert set(np.diff(picked)) <= {math.floor(step), math.ceil(step)}
    others = {Draws(n, k, Fisher(), seed).chosen(np.arange(n)).tobytes() for seed in range(9)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, r"samples=0; expected 1 <= samples < 2\^48"),
        ({"samples": 1.5}, r"samples=1.5 \(float\); expected an integer, or None"),
        ({"draws": 0}, r"draws=0; expected 1 <= draws < 2\^16"),
        ({"draws": 1 << 16}, "draws=65536"),
        ({"draws": True}, "draws=True; expected an integer"),
        ({"draws": None}, "draws=None"),
        ({"size_power": 2}, "size_power=2; expected a number from -1 to 1"),
        ({"size_power": True}, "size_power=True"),
        ({"size_power": float("nan")}, "size_power=nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises((TypeError, ValueError), match=f"Fisher: received {message}"):
        Fisher(**wrong)


def test_integers_of_any_library_are_kept_as_int():
    made = Fisher(np.int64(20), np.uint8(200))
    assert made == Fisher(20, 200)
    assert {type(made.samples), type(made.draws)} == {int}
    assert int(Draws(300, 8, made, 0).rows(np.array([299])).max()) == 300 * 200 - 1


# ---- logits of all sorts ------------------------------------------------------------------------


def test_a_class_that_is_impossible_is_never_drawn():
    logits = torch.tensor([[0.5, -torch.inf, 1.0, 0.2]], dtype=torch.float64).expand(4000, 4)
    x = logits.clone().requires_grad_()
    noise = Draws(4000, 8, Fisher(4000), seed=0).noise(0, np.arange(4000), 1)
    labels = torch.zeros(4000, dtype=torch.long)
    made = ImageClassificationModelOutput().likelihood_terms(
        nn.Identity(), {}, {}, (x, labels), noise
    )
    rows = by_x(made.drawn[:, 0], x)
    for values in (*made, rows, by_x(made.output, x)):
        assert bool(torch.isfinite(values).all())
    assert float(rows[:, 1].abs().max()) == 0
    assert bool((rows[:, 2] > 0).any())
    assert bool((rows[:, 3] > 0).any())
    tokens = x.detach().reshape(4000, 1, 4).expand(-1, 2, -1).clone().requires_grad_()
    ids = torch.zeros(4000, 2, dtype=torch.long)
    batch = ({"input_ids": ids, "labels": ids, "logits": tokens},)
    made = CausalLMModelOutput().likelihood_terms(Echo(), {}, {}, batch, noise)
    rows = by_x(made.drawn[:, 0], tokens)
    for values in (*made, rows, by_x(made.output, tokens)):
        assert bool(torch.isfinite(values).all())
    assert float(rows[..., 1].abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["image, 5 classes", "image, three labels", "causal, mean"])
def test_sums_of_16_bit_logits_are_made_in_float32(name, dtype):
    case = CASES[name]()
    x = case.x[None].to(dtype)
    noise = torch.full((1, 1, case.numbers, 3), 0.4)
    found, exact = terms_of(case, x, noise), terms_of(case, x.double(), noise)
    for name in Terms._fields:
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(
            getattr(found, name).double(), getattr(exact, name), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("logit", [40.0, -40.0, 90.0])
def test_logits_far_apart_leave_finite_terms(logit):
    z = torch.tensor([[logit, 0.0, 1.0]]).requires_grad_()
    noise = torch.full((1, 1, 1, 3), 0.5)
    made = ImageClassificationModelOutput().likelihood_terms(
        nn.Identity(), {}, {}, (z, torch.tensor([0])), noise
    )
    for values in (*made, by_x(made.drawn[:, 0], z), by_x(made.output, z)):
        assert bool(torch.isfinite(values).all())
    q = torch.sigmoid(-(torch.tensor(logit).double() - torch.tensor([0.0, 1.0]).logsumexp(0)))
    torch.testing.assert_close(made.slope.double()[0], q, rtol=1e-5, atol=0)


@pytest.mark.parametrize("f", [-60.0, -30.0, 0.0, 30.0])
def test_a_log_sigmoid_has_the_digits_of_float64(f):
    f = torch.tensor(f, dtype=torch.float64, requires_grad=True)
    found, exact = log_sigmoid(f), torch.nn.functional.logsigmoid(f)
    torch.testing.assert_close(found, exact, rtol=1e-14, atol=0)
    slopes = (torch.autograd.grad(out, f)[0] for out in (found, exact))
    torch.testing.assert_close(*slopes, rtol=1e-14, atol=0)


# ---- one output ---------------------------------------------------------------------------------


LIKELIHOODS = {
    "regression": (lambda f, batch: -0.5 * (batch[1] - f) ** 2, lambda f, y: (y - f, 1 + 0 * f)),
    "counts": (lambda f, batch: batch[1] * f - f.exp(), lambda f, y: (y - f.exp(), f.exp())),
    "yes or no": (
        lambda f, batch: torch.nn.functional.logsigmoid(f),
        lambda f, y: (torch.sigmoid(-f), torch.sigmoid(f) * torch.sigmoid(-f)),
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_function_with_a_likelihood(name):
    """The Gauss-Newton matrix has one row of a sample: nothing is drawn."""
    likelihood, formula = LIKELIHOODS[name]
    task = FunctionModelOutput(lambda model, batch: model(batch[0])[:, 0], likelihood=likelihood)
    model = nn.Linear(3, 1).double()
    batch = numbers(4, 3), torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    made = task.likelihood_terms(model, {}, {}, batch, torch.empty(4, 2, 1, 3))
    f = model(batch[0])[:, 0].detach()
    slope, curvature = formula(f, batch[1])
    assert made.drawn.shape == (4, 0)
    torch.testing.assert_close(made.output, f)
    torch.testing.assert_close(made.along, f)
    torch.testing.assert_close(made.slope, slope)
    torch.testing.assert_close(made.curvature, curvature)
    torch.testing.assert_close(task.get_out_to_loss_grad(model, {}, {}, batch), slope)


FITTED = lambda model, batch: model(batch[0])[:, 0]  # noqa: E731
ROUNDED = {
    "log cosh": lambda f, batch: -torch.log(torch.cosh(batch[1] - f)),
    "log(1 + exp)": lambda f, batch: batch[1] * f - (1 + f.exp()).log(),
    "log sigmoid": lambda f, batch: torch.log(torch.sigmoid(-f)),
}
CONVEX = {
    "square": lambda f, batch: f**2,
    "small": lambda f, batch: 1e-12 * f**2,
    "exponential": lambda f, batch: (f / 30).exp(),
    "heavy tails": lambda f, batch: -torch.log1p((60 + f) ** 2),
}


def terms_at(likelihood, f, dtype, labels):
    """Those of one output f [B], without gradients."""
    model = nn.Identity()
    task = FunctionModelOutput(FITTED, likelihood=likelihood)
    batch = f.to(dtype)[:, None], torch.full((len(f),), labels, dtype=dtype)
    with torch.no_grad():
        return task.likelihood_terms(model, {}, {}, batch, torch.empty(len(f), 0, 1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_curvature_that_is_below_0_by_rounding_counts_as_0(name, dtype):
    """Far out, where it is the difference of two numbers near 1; for each sample alone, too."""
    f = torch.linspace(20, 40, 2001)
    task = FunctionModelOutput(FITTED, likelihood=ROUNDED[name])
    batch = f.to(dtype)[:, None], torch.ones(len(f), dtype=dtype)
    raw = task.likelihood_terms(nn.Identity(), {}, {}, batch, torch.empty(len(f), 0, 1, 3))
    below = raw.curvature < 0
    assert below.any()
    made = terms_at(ROUNDED[name], f, dtype, 1.0)
    assert (made.curvature[below] == 0).all()
    assert (made.curvature[~below] == raw.curvature[~below]).all()
    for one in f[below][:20]:
        assert terms_at(ROUNDED[name], one[None], dtype, 1.0).curvature >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVEX)
def test_a_convex_likelihood_has_a_curvature_below_0(name, dtype):
    f = torch.linspace(-40, 45, 2001)
    assert (terms_at(CONVEX[name], f, dtype, 1.0).curvature < 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("as_dict", [False, True])
def test_likelihoods_and_losses_of_16_bit_outputs_keep_their_digits(dtype, as_dict):
    """PyTorch's own have p - label as their slope, which 16 bits round to 0 where p is near it."""
    f, labels = torch.tensor([7.0, 12.0, -12.0, -3.0]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    part = "labels" if as_dict else 1
    batch: Any = (f.to(dtype), labels.to(dtype))
    batch = ({"f": batch[0], "labels": batch[1]},) if as_dict else batch

    def output(model, batch):
        return batch["f" if as_dict else 0]

    def binary(f, batch):
        assert f.dtype == batch[part].dtype == torch.float32
        return -nn.functional.binary_cross_entropy_with_logits(f, batch[part], reduction="none")

    task = FunctionModelOutput(output, likelihood=binary)
    with torch.no_grad():
        made = task.likelihood_terms(nn.Identity(), {}, {}, batch, torch.empty(4, 0, 1, 3))
    q = task.get_out_to_loss_grad(nn.Identity(), {}, {}, batch)
    p = f.double().sigmoid()
    for slope in (made.slope, q):
        torch.testing.assert_close(slope.double(), labels - p, rtol=0.02, atol=0)
    torch.testing.assert_close(made.curvature.double(), p * (1 - p), rtol=0.02, atol=0)
    by_loss = FunctionModelOutput(output, loss=lambda f: (1 + f.neg().exp()).log())
    found = by_loss.get_out_to_loss_grad(nn.Identity(), {}, {}, batch)
    torch.testing.assert_close(found.double(), 1 - p, rtol=0.02, atol=1e-7)


WRONG_FUNCTIONS = [
    ({"likelihood": 5}, r"received likelihood=5; expected a function of \(f, batch\)"),
    (
        {"likelihood": lambda f: -(f**2)},
        r"received likelihood that takes \(f\) .*; expected a function of",
    ),
    ({"loss": "softplus"}, r"received loss='softplus'; expected a function of \(f\)"),
    (
        {"output": lambda model: model},
        r"received output that takes \(model\) .* of \(model, batch\)",
    ),
    ({"output": None}, "received output=None"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_FUNCTIONS)
def test_what_is_no_function_of_the_arguments_is_refused(wrong, message):
    with pytest.raises(TypeError, match=f"FunctionModelOutput: {message}"):
        FunctionModelOutput(**{"output": FITTED, **wrong})


@pytest.mark.parametrize(
    ("likelihood", "message"),
    [
        (lambda f, batch: None, "returned NoneType None for outputs .4.; expected a tensor of fl"),
        (lambda f, batch: 1.0, "returned float 1.0"),
        (lambda f, batch: f > 0, r"returned \[4\] bool"),
        (lambda f, batch: f.mean(), r"returned \[\] for outputs \[4\]; expected one for each"),
    ],
)
def test_a_likelihood_that_returns_something_else_is_refused(likelihood, message):
    with pytest.raises((TypeError, ValueError), match=f"FunctionModelOutput: likelihood {message}"):
        terms_at(likelihood, torch.ones(4), torch.float32, 1.0)


MIXING = {
    "Cox": {"likelihood": lambda f, batch: f - f.flip(0).logcumsumexp(0).flip(0)},
    "labels": {"likelihood": lambda f, batch: -0.5 * (batch[1] - batch[1].mean() - f) ** 2},
    "softmax": {"loss": lambda f: f.logsumexp(0) - f},
    "means": {"likelihood": lambda f, batch: -((batch[1] - f.unsqueeze(1)) ** 2).mean(1)},
    "places": {"likelihood": lambda f, batch: -(1.0 + torch.arange(len(f))) * f**2},
    "random": {"likelihood": lambda f, batch: -(torch.rand(len(f)) + 1.0) * f**2},
    "small": {"likelihood": lambda f, batch: -1e-6 * (batch[1] - batch[1].mean() - f) ** 2},
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("curvature", ["auto", "trak"])
def test_likelihoods_and_losses_that_mix_samples_are_refused(name, curvature, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(6, 4)
    task = FunctionModelOutput(lambda model, batch: model(batch[0])[:, 0], **MIXING[name])
    traker = TRAKer(model, task, 12, tmp_path, proj_dim=8, curvature=curvature)
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize((x[:1], torch.ones(1)), inds=[6])  # alone, nothing is mixed
    kind = next(iter(MIXING[name]))
    said = (
        rf"FunctionModelOutput: received a {kind} that mixes .*, or draws random numbers: .* "
        r"sample \d .*in a batch of 6, and "
    )
    with pytest.raises(ValueError, match=said):
        traker.featurize((x, torch.arange(6.0)), inds=range(6))
    assert traker.saver.index(0).done.sum() == 1


def test_a_function_has_a_loss_or_a_likelihood():
    function = LIKELIHOODS["counts"][0]
    with pytest.raises(ValueError, match="received both loss and likelihood; expected one"):
        FunctionModelOutput(lambda *_: None, loss=torch.exp, likelihood=function)
