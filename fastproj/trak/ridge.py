"""``lambda_reg="auto"``: the regularisation of a checkpoint, from its features and Q alone.

A network trained with weight decay, or stopped early, weighs its samples like a ridge regression on
its gradients: with R = Q (1 - Q), the curvature of the logistic loss, the influence of the samples
is that of a Newton step (from which the paper derives TRAK, and then leaves R out)

    phi(z) (Phi^T R Phi + gamma I)^-1 Phi^T Q

for a training ridge gamma that nobody tells, but that shows in how far the network has fitted its
training set. docs/research/lambda.md derives the rule and compares it with others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.trak.features import Buffer
from fastproj.trak.files import Tensors
from fastproj.trak.solve import Gram, check_gram, in_range

LANCZOS_STEPS, MAX_STEPS = 20, 200
SETTLED = 1e-4  # change of the ridge, relative, over so many steps
TINY = 1e-12  # Q nearer to 0 or 1 counts as this near: a logit of 28
MARGIN = 1.5  # times the training ridge: too little costs more than too much
STEPS_PER_DECADE = 50  # of the ridges among which the likeliest is sought
LOWEST, HIGHEST = math.log(1e-8), math.log(1e8)  # log of ridge / mean eigenvalue of Phi^T R Phi;
SINGULAR = 1e-3  # where the lowest leaves this share of dimensions unused, the matrix is singular
LEAST, MOST = 1e-2, 1.0  # bounds of lambda, in units of a matrix's trace / n and of its trace


@dataclass(frozen=True)
class Choice:
    """A lambda, the matrix that it is added to, and what it was chosen by."""

    lambda_reg: float
    rule: str  # "training ridge" | "residuals and dimension" | "dimension"
    weighted: bool  # whether that is Phi^T R Phi instead of XtX
    relative: float  # lambda / mean eigenvalue of the matrix

    def summary(self) -> dict[str, Any]:
        """What is worth storing."""
        return asdict(self)


def are_probabilities(q: Tensor) -> bool:
    """Whether Q [n] can be 1 - p: all of it in 0..1, and not 1 throughout."""
    return bool(((q >= 0) & (q <= 1)).all()) and bool((q < 1).any())


def choose_lambda(gram: Gram, moments: Moments) -> Choice:
    """Choose the ridge that is added to a Gram matrix, Phi^T R Phi where Q are probabilities.

    There it is MARGIN times the training ridge (``fit``). Where features and Q show none, it leaves
    an effective dimension of ``sqrt(n')``, as many directions as n' samples let a linear expansion
    follow; n' = (sum |row|^2)^2 / sum |row|^4 of the rows of which the matrix is made. For other Q,
    the residuals of a regression, it is the geometric mean of that and of the ridge under which
    they are likeliest.

    Parameters
    ----------
    gram : of all n samples.
    moments : what was summed up beside it.
    """
    trace = check_gram(gram) * len(gram.xtx)
    ridge = fit(gram.xtx, moments) if moments.weighted else None
    if ridge is not None:
        rule, lam = "training ridge", MARGIN * ridge
    else:
        values, vectors = torch.linalg.eigh(gram.xtx)
        values = values.clamp(min=0)
        rule, lam = "dimension", dimension_ridge(values, trace**2 / float(moments.quartic))
        likeliest = None if moments.weighted else likeliest_ridge(values, vectors, gram.n, moments)
        if likeliest is not None:
            rule, lam = "residuals and dimension", math.sqrt(lam * likeliest)
    lam = min(max(lam, LEAST * trace / gram.n), MOST * trace)
    return Choice(lam, rule, moments.weighted, lam * len(gram.xtx) / trace)


class Moments:
    """What one pass over the samples adds up beside a Gram matrix; parts add up to the whole.

    weighted : whether the samples count by R, the curvature of their loss.
    """

    NAMES = ("quartic", "fitted", "explained")

    def __init__(self, proj_dim: int, weighted: bool) -> None:
        self.weighted = weighted
        self.quartic = torch.zeros((), dtype=torch.float64)  # sum of |row|^4
        self.fitted = torch.zeros(proj_dim, dtype=torch.float64)  # Phi^T (R f + Q), or Phi^T Q
        self.explained = torch.zeros((), dtype=torch.float64)  # f^T (R f + Q), or Q^T Q
        self._buffer = Buffer()

    def over(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Adds up (features [b, k], Q [b]); yields the rows whose Gram matrix is wanted.

        These are the features, times sqrt(R) where they are weighted; their memory is used again
        for the next ones.
        """
        for features, q in blocks:
            rows, q = features, q.double()
            if not self.weighted:
                self.fitted += product(features, q)
                self.explained += q @ q
            else:
                q = q.clamp(TINY, 1 - TINY)
                curvature = q * (1 - q)  # R
                logit = torch.log1p(-q) - q.log()  # f, for Q = 1 - sigmoid(f)
                target = curvature * logit + q  # R times the working response of a Newton step
                self.fitted += product(features, target)
                self.explained += logit @ target
                rows = self._buffer.take((len(q), features.shape[1]), features.dtype)
                torch.mul(features, curvature.sqrt().to(features).unsqueeze(1), out=rows)
            scaled, exponent = in_range(rows)
            norms = torch.linalg.vector_norm(scaled, dim=1).double() * math.ldexp(1.0, exponent)
            self.quartic += norms.pow(4).sum()
            yield rows

    def tensors(self) -> Tensors:
        """The sums, to be stored and added up by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    @classmethod
    def of(cls, tensors: Tensors, weighted: bool) -> Moments:
        """From what ``tensors`` gave."""
        made = cls(0, weighted)
        for name in cls.NAMES:
            setattr(made, name, tensors[name])
        return made


def product(features: Tensor, vector: Tensor) -> Tensor:
    """``features [b, k].T @ vector [b]``, float64 [k], of any magnitude; vector is float64."""
    scaled, exponent = in_range(features)
    size = max(float(vector.abs().max()), TINY) if len(vector) else 1.0
    return (scaled.mT @ (vector / size).to(scaled)).double() * math.ldexp(size, exponent)


def fit(weighted: Tensor, moments: Moments) -> float | None:
    """The ridge at which regression on the gradients fits the training set as the network does.

    One Newton step of logistic regression from the network's own outputs f, at ridge gamma, has the
    outputs ``f' = Phi (H + gamma I)^-1 u`` with ``H = Phi^T R Phi``, ``u = Phi^T (R f + Q)``. gamma
    is where f' agrees with f along the response: ``u^T (H + gamma I)^-1 u = f^T (R f + Q)``.

    That is the ridge of the k features. With d(gamma) = trace H (H + gamma I)^-1, ridge regression
    on all gradients fits alike at ``gamma / (1 - d(gamma) / k)``, which is returned. Where k
    features fit worse than the network at any gamma, its limit for gamma -> 0 is a lower bound,
    and returned.

    None where the network has fitted nothing, or H is singular and the features fit too badly.

    Parameters
    ----------
    weighted : H, float64 [k, k].
    """
    unit = float(weighted.trace()) / len(weighted)
    explained = float(moments.explained)
    if not explained > 0 or not unit > 0:
        return None
    log_ridge = math.inf
    for nodes, weights in quadratures(weighted, moments.fitted):
        before, log_ridge = log_ridge, crossing(nodes / unit, weights / unit, explained)
        if log_ridge > LOWEST and abs(log_ridge - before) < SETTLED:
            break
    if log_ridge >= HIGHEST:
        return None
    at_least, ridge = log_ridge <= LOWEST, math.exp(log_ridge) * unit
    unused = 1 - effective_dimension(weighted, ridge) / len(weighted)
    if unused <= 0 or (at_least and unused > SINGULAR):
        return None
    return ridge / unused


def crossing(nodes: Tensor, weights: Tensor, wanted: float) -> float:
    """log x where ``sum weights / (nodes + x)``, which falls with x, is ``wanted``.

    LOWEST or HIGHEST where it is so nowhere between them.
    """

    def excess(log_x: float) -> float:
        return float((weights / (nodes + math.exp(log_x))).sum()) - wanted

    low, high = LOWEST, HIGHEST
    if excess(low) <= 0 or excess(high) >= 0:
        return low if excess(low) <= 0 else high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def quadratures(matrix: Tensor, start: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(nodes, weights) with ``start^T g(matrix) start ~ sum weights g(nodes)``, ever more of them.

    matrix : float64 [k, k], positive semi-definite. Gauss quadrature by Lanczos' method: exact for
    polynomials g of degree below twice the number of nodes. Each step costs k^2; there is a result
    after every LANCZOS_STEPS of them, and the last one after MAX_STEPS, or when nothing is left.
    """
    steps = min(MAX_STEPS, len(start))
    norm = float(start.norm())
    basis = torch.zeros(steps, len(start), dtype=torch.float64)
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / norm if norm else start
    for step in range(steps):
        basis[step] = vector
        image = matrix @ vector
        diagonal.append(float(vector @ image))
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            image -= basis[: step + 1].mT @ (basis[: step + 1] @ image)
        size = float(image.norm())
        done = step + 1 == steps or size <= 1e-13 * max(map(abs, diagonal))
        if done or (step + 1) % LANCZOS_STEPS == 0:
            small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
            off = torch.tensor(beside, dtype=torch.float64)
            small += torch.diag(off, 1) + torch.diag(off, -1)
            nodes, vectors = torch.linalg.eigh(small)
            yield nodes.clamp(min=0), (norm * vectors[0]).square()
        if done:
            return
        beside.append(size)
        vector = image / size


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


def dimension_ridge(values: Tensor, samples: float) -> float:
    """The ridge at which a matrix has an effective dimension of ``sqrt(samples)``.

    Less where k is not many times that: the harmonic sum with k. values : eigenvalues, [k].
    """
    wanted = 1 / (1 / math.sqrt(samples) + 1 / len(values))
    low, high = math.log(1e-12), math.log(1e12)
    unit = float(values.mean())
    while high - low > 1e-9:
        middle = (low + high) / 2
        dimension = float((values / (values + math.exp(middle) * unit)).sum())
        low, high = (middle, high) if dimension > wanted else (low, middle)
    return math.exp(low) * unit


def likeliest_ridge(values: Tensor, vectors: Tensor, n: int, moments: Moments) -> float | None:
    """The ridge gamma under which the residuals Q of a regression on the features are likeliest.

    Of n values with covariance ``s (Phi Phi^T / gamma + I)``, ridge regression leaves residuals
    with covariance ``s gamma (Phi Phi^T + gamma I)^-1``; s is the likeliest for each gamma. None
    where the best gamma is none or any amount, and for Q = 1 throughout, the weight of a task that
    has no other.

    Parameters
    ----------
    values, vectors : eigenvalues [k] and eigenvectors [k, k] of Phi^T Phi.
    """
    total = float(moments.explained)
    if total == n or not total > 0:
        return None
    known = values > float(values[-1]) * 1e-12
    values = values[known]
    parts = (vectors[:, known].mT @ moments.fitted).square() / values  # of |Q|^2, in each direction
    rest = max(0.0, total - float(parts.sum()))
    unit = float(values.sum()) / len(vectors)
    count = 1 + round((HIGHEST - LOWEST) / math.log(10) * STEPS_PER_DECADE)
    ridges = torch.linspace(LOWEST, HIGHEST, count, dtype=torch.float64).exp().tolist()
    unlikely = []
    for ridge in ridges:
        shares = values / (ridge * unit) + 1
        scale = (float(parts @ shares) + rest) / total
        unlikely.append(n * math.log(scale) - float(shares.log().sum()))
    best = min(range(count), key=unlikely.__getitem__)
    return ridges[best] * unit if 0 < best < count - 1 else None
