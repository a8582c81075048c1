"""``lambda_reg="auto"``: the ridge of a checkpoint, from its features and Q alone.

A network trained with weight decay, or stopped early, weighs its samples like a ridge regression on
its gradients: with R = Q (1 - Q), the curvature of the loss, the influence of the samples is

    phi(z) (Phi^T R Phi + gamma I)^-1 Phi^T Q

for a training ridge gamma that nobody tells, but that shows in how far the network has fitted its
training set. docs/trak.md derives the rule and compares it with others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastproj.trak.files import Indices

if TYPE_CHECKING:
    from fastproj.trak.solve import Gram, ScoreComputer

SAMPLE_ROWS = 8192  # rows that the choice looks at, at least;
SAMPLE_ROWS_PER_DIM = 4  # and so many times k
LANCZOS_STEPS = 200
TINY = 1e-12  # Q nearer to 0 or 1 counts as this near: a logit of 28
DIMENSION = 2.4  # times the root of the number of samples: what the rule without labels aims at
SMALLEST_RIDGE = 1e-8  # that is looked at, in units of the mean eigenvalue of Phi^T R Phi;
SINGULAR = 1e-3  # where it leaves this share of the dimensions unused, that matrix is singular
LEAST, MOST = 1e-2, 1.0  # bounds of lambda, in units of trace(XtX) / n and of trace(XtX)


@dataclass(frozen=True)
class Choice:
    """A lambda, and what it was chosen by."""

    lambda_reg: float
    rule: str  # "training ridge" | "dimension"
    relative: float  # lambda / mean eigenvalue of XtX
    training_ridge: float | None  # of all gradients, in the features' unit; None: not found
    rows: int  # samples that were looked at

    def summary(self) -> dict[str, Any]:
        """What is worth storing."""
        return asdict(self)


def sample_rows(n: int, proj_dim: int) -> Indices:
    """The training samples that the choice looks at, sorted: all, or a random part of many."""
    count = max(SAMPLE_ROWS, SAMPLE_ROWS_PER_DIM * proj_dim)
    if n <= count:
        return np.arange(n, dtype=np.int64)
    return np.sort(np.random.default_rng(0).choice(n, count, replace=False)).astype(np.int64)


def choose_lambda(
    computer: ScoreComputer, gram: Gram, blocks: Iterable[tuple[Tensor, Tensor]]
) -> Choice:
    """Choose the ridge for ``(XtX + lambda I)^-1`` from features and Q.

    Where all Q are probabilities, 1 - p of a fitted model, lambda makes TRAK's scores those of the
    influence at the model's own training ridge (``fit``). Otherwise, as for regression, whose
    residuals say nothing of what was fitted, lambda leaves an effective dimension of
    ``DIMENSION sqrt(n)``, as many directions as n samples let a linear expansion follow.

    Parameters
    ----------
    computer : whose ``gram`` sums up the products.
    gram : XtX of all n samples.
    blocks : (features [b, k], Q [b]) of the samples of ``sample_rows``.
    """
    sums = Sums(gram.xtx.shape[0])
    weighted = computer.gram(sums.over(blocks), gram.xtx.shape[0], gram.n)
    trace = float(gram.xtx.trace())
    found = fit(sums, weighted.xtx, gram.n) if sums.are_probabilities else None
    if found is None:
        rule, ridge = "dimension", None
        lam = dimension_ridge(gram, sums.effective_samples)
    else:
        rule, ridge = "training ridge", found.value
        lam = ridge / sums.mean_curvature
        if not found.at_least:
            # What the projection to k dimensions adds to the ridge, taken off (as in ``fit``).
            lam *= 1 - effective_dimension(gram.xtx, lam) / gram.xtx.shape[0]
    lam = min(max(lam, LEAST * trace / gram.n), MOST * trace)
    relative = lam * gram.xtx.shape[0] / trace
    return Choice(lam, rule, relative, ridge, sums.rows)


class Sums:
    """What one pass over the sampled rows adds up, beside Phi^T R Phi; all in float64."""

    def __init__(self, proj_dim: int) -> None:
        self.rows = 0
        self.fitted = torch.zeros(proj_dim, dtype=torch.float64)  # Phi^T (R f + Q)
        self.explained = 0.0  # sum of f (R f + Q)
        self.norms = 0.0  # sum of s = |phi|^2
        self.root_curvature = 0.0  # sum of sqrt(R) s
        self.weight, self.weight2 = 0.0, 0.0  # sums of s and s^2, the share of each sample
        self.smallest_q, self.largest_q = math.inf, -math.inf

    def over(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Adds up each block on its way; yields ``sqrt(R) features``, whose Gram is wanted."""
        for features, q in blocks:
            rows, q = features.detach().cpu().double(), q.detach().cpu().double()
            self.rows += len(rows)
            self.smallest_q = min(self.smallest_q, float(q.min()))
            self.largest_q = max(self.largest_q, float(q.max()))
            q = q.clamp(TINY, 1 - TINY)
            curvature = q * (1 - q)  # R, of a logistic loss
            logit = torch.log1p(-q) - q.log()  # f, for Q = 1 - sigmoid(f)
            target = curvature * logit + q  # R times the working response of a Newton step
            norms = rows.square().sum(1)
            self.fitted += rows.mT @ target
            self.explained += float(logit @ target)
            self.norms += float(norms.sum())
            self.root_curvature += float(curvature.sqrt() @ norms)
            self.weight += float(norms.sum())
            self.weight2 += float(norms @ norms)
            yield rows * curvature.sqrt().unsqueeze(1)

    @property
    def are_probabilities(self) -> bool:
        """Whether Q can be 1 - p: all of it in 0..1, and not one value throughout."""
        return self.smallest_q >= 0 and self.largest_q <= 1 and self.smallest_q < 1

    @property
    def mean_curvature(self) -> float:
        """R of the samples as one number, the power mean with exponent 1/2, weighted by |phi|^2."""
        return (self.root_curvature / self.norms) ** 2

    @property
    def effective_samples(self) -> float:
        """How many samples of equal norm would have the same spread of norms, at most ``rows``."""
        return self.weight**2 / self.weight2


@dataclass(frozen=True)
class Ridge:
    """A training ridge; ``at_least`` where k features show no more than that it is no smaller."""

    value: float
    at_least: bool


def fit(sums: Sums, weighted: Tensor, n: int) -> Ridge | None:
    """The ridge at which regression on the gradients fits the training set as the network does.

    One Newton step of logistic regression from the network's own outputs f, at ridge gamma, has the
    outputs ``f' = Phi (H + gamma I)^-1 u`` with ``H = Phi^T R Phi``, ``u = Phi^T (R f + Q)``. gamma
    is where f' agrees with f along the response: ``u^T (H + gamma I)^-1 u = f^T (R f + Q)``.

    That is the ridge of the k features. With d(gamma) = trace H (H + gamma I)^-1, ridge regression
    on all gradients fits alike at ``gamma / (1 - d(gamma) / k)``, which is returned. Where k
    features fit worse than the network at any gamma, its limit for gamma -> 0 is a lower bound.

    None where the network has fitted nothing, or H is singular and the features fit too badly.

    Parameters
    ----------
    weighted : H, float64 [k, k], of the rows of ``sums``.
    n : samples that the rows stand for.
    """
    unit = float(weighted.trace()) / len(weighted)
    if sums.explained <= 0 or not unit > 0:
        return None
    nodes, weights = quadrature(weighted, sums.fitted)

    def excess(log_ridge: float) -> float:
        return float((weights / (nodes + math.exp(log_ridge) * unit)).sum()) - sums.explained

    low, high = math.log(SMALLEST_RIDGE), math.log(1 / SMALLEST_RIDGE)
    if excess(high) >= 0:
        return None
    at_least = excess(low) <= 0
    while not at_least and high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    ridge = math.exp(low) * unit
    unused = 1 - effective_dimension(weighted, ridge) / len(weighted)
    if unused <= 0 or (at_least and unused > SINGULAR):
        return None
    return Ridge(n / sums.rows * ridge / unused, at_least)


def quadrature(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """(nodes, weights) with ``start^T g(matrix) start ~ sum weights g(nodes)``, by Lanczos.

    matrix : float64 [k, k], positive semi-definite. Gauss quadrature: exact for polynomials g of
    degree below twice the number of steps. Costs LANCZOS_STEPS k^2.
    """
    steps = min(LANCZOS_STEPS, len(start))
    norm = float(start.norm())
    basis = torch.zeros(steps, len(start), dtype=torch.float64)
    diagonal, beside = [], []
    vector = start / norm if norm else start
    for step in range(steps):
        basis[step] = vector
        image = matrix @ vector
        diagonal.append(float(vector @ image))
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        size = float(image.norm())
        if size <= 1e-13 * max(map(abs, diagonal)):
            break
        beside.append(size)
        vector = image / size
    count = len(diagonal)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: count - 1], dtype=torch.float64)
    small += torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(small)
    return nodes.clamp(min=0), (norm * vectors[0]).square()


def effective_dimension(matrix: Tensor, ridge: float) -> float:
    """``trace A (A + ridge I)^-1`` of a positive semi-definite A, float64 [k, k]."""
    k = len(matrix)
    shifted = matrix + ridge * torch.eye(k, dtype=matrix.dtype)
    factor, info = torch.linalg.cholesky_ex(shifted)
    if int(info):
        values = torch.linalg.eigvalsh(matrix).clamp(min=0)
        return float((values / (values + ridge)).sum())
    inverse = torch.linalg.solve_triangular(factor, torch.eye(k, dtype=matrix.dtype), upper=False)
    return max(0.0, k - ridge * float(inverse.square().sum()))


def dimension_ridge(gram: Gram, samples: float) -> float:
    """The ridge at which XtX has an effective dimension of ``DIMENSION sqrt(samples)``.

    Less where k is not many times that: the harmonic sum with k.
    """
    k = len(gram.xtx)
    values = torch.linalg.eigvalsh(gram.xtx).clamp(min=0)
    wanted = 1 / (1 / (DIMENSION * math.sqrt(samples)) + 1 / k)
    low, high = math.log(1e-12), math.log(1e12)
    unit = float(values.mean())
    while high - low > 1e-9:
        middle = (low + high) / 2
        dimension = float((values / (values + math.exp(middle) * unit)).sum())
        low, high = (middle, high) if dimension > wanted else (low, middle)
    return math.exp(low) * unit
