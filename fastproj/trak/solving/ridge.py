"""``lambda_reg="auto"``: the regularisation of a checkpoint, from its features and Q alone.

A network trained with weight decay, or stopped early, weighs its samples like a ridge regression on
its gradients: with W = Q (1 - Q), the curvature of the logistic loss, the influence of the samples
is that of a Newton step (from which the paper derives TRAK, and then leaves W out)

    phi(z) (Phi^T W Phi + gamma I)^-1 Phi^T Q

for a training ridge gamma. It is not known, but the fit of the training set shows it.
docs/research/lambda.md derives the rule and compares it with others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastproj.trak.files import Tensors
from fastproj.trak.solving.solve import Gram, apply_factor, check_gram, cholesky, in_range
from fastproj.trak.store.features import Buffer

LANCZOS_STEPS, MAX_STEPS = 20, 200
SETTLED = 1e-9  # relative change of the ridge over LANCZOS_STEPS at which it is exact enough
TINY = 1e-12  # Q below it, or negative, counts as TINY: a logit of 28
CEILING = 1 - 1e-4  # Q above it counts as CEILING: a logit of -9
MARGIN = 1.5  # times the training ridge: too little costs more than too much
EXACT_MARGIN = 2.0  # the same, with a Fisher matrix of which no rows are drawn
LABELS_MARGIN = 5.0  # the same, where a sample's predictions are labels of one input
OWN_NOISE = 1.0  # of a checkpoint, in units of what all share
SPREAD = 30.0  # of the two ridges between which lambda is known
SPREAD_OWN_NOISE = 2.0  # OWN_NOISE, where there are two ridges
SPREAD_SHARE = 1 / 3  # of lambda, the geometric mean of the two ridges
STEPS_PER_DECADE = 50  # of the ridges among which the likeliest is sought
LOWEST, HIGHEST = math.log(1e-8), math.log(1e8)  # log of ridge / mean eigenvalue of Phi^T W Phi
SINGULAR = 1e-3  # A matrix is singular where LOWEST leaves this share of dimensions unused.
UNSURE, CONTRARY = 0.05, 0.25  # share of Q that are no probabilities: less is a few outliers
SATURATED = 1e-3  # Q this near to 1 says nothing about the curvature.
BLIND = 0.8  # Where more than this share of Q are so near to 1, none does.
FITTED = 0.1  # f^T (W f + Q) over the sizes of its terms, at which its ridge is trusted in full
TYPICAL = 0.5  # lambda, in units of trace / n, where rows and features say nothing
UNUSED = 0.05  # least share of rows left to fit; TYPICAL goes with its root
ROUNDED = 1e-6  # relative difference of two numbers of float32 that are the same
FAR = 80.0  # a change of log-odds that takes every slope to 0, and doesn't overflow
COLUMNS = 512  # of an inverse at once
LEAST, MOST = 1e-2, 1.0  # bounds of lambda, in units of a matrix's trace / n and of its trace


class Share(NamedTuple):
    """What some rows of features count, float64 [b] each.

    weights : what a row's outer product counts in S^T S; above 0.
    values : the network's own output along each row, counted from ``Meaning.offset``.
    slopes : Q, the derivative of the log-likelihood along it.
    residuals : Q where it may be that of another loss, outside 0..1 too; None where it can't.
    """

    weights: Tensor
    values: Tensor
    slopes: Tensor
    residuals: Tensor | None = None

    def target(self) -> Tensor:
        """What a Newton step from the network's outputs fits, times the weights."""
        return self.weights * self.values + self.slopes


@dataclass(frozen=True)
class Meaning:
    """What the Q of a checkpoint are. A single Q changes it by O(1 / n) at most.

    probability : 1 where Q are 1 - p of a logistic loss, 0 where they aren't; the curvature enters
        to this power.
    residual : 1 where Q scatter around 0, as the residuals of a regression do; 0 where they don't.
    offset : what the network's outputs are counted from: 0 but for a regression.
    """

    probability: float
    residual: float
    offset: float = 0.0


@dataclass(frozen=True)
class Choice:
    """A lambda, the matrix that it is added to, and what it was chosen by."""

    lambda_reg: float
    rule: str  # of "training ridge", "residuals", "dimension"; several are averaged: "... and ..."
    power: float  # of W in Phi^T W^power Phi; 0 is XtX
    relative: float  # lambda / mean eigenvalue of the matrix

    def summary(self) -> dict[str, Any]:
        """What is worth storing."""
        return asdict(self)


def meaning(q: Tensor, probabilities: bool | None = None) -> Meaning:
    """What Q [n] are, as a continuous function of each of them.

    Residuals have both signs. Weights and sums over tokens exceed 1. So two numbers say how far Q
    is from 1 - p: the share of |Q| that is negative, and the mean excess over 1. Up to UNSURE these
    are outliers. From CONTRARY on, Q isn't 1 - p. No entry counts for more than the mean |Q| or for
    more than 1. A task without a loss has Q = 1 throughout, and no curvature either.

    probabilities : what the task says Q are; None leaves it to Q.
    """
    q = q.double()
    size = q.abs()
    cap = size.mean()
    total = float(size.clamp(max=cap).sum())
    negative = float((-q).clamp(min=0).clamp(max=cap).sum()) / total if total else 0.0
    excess = float((q - 1).clamp(0, 1).mean())
    blind = float((1 - (1 - q).abs() / SATURATED).clamp(min=0).mean())
    residual = between(negative, UNSURE, CONTRARY)
    if probabilities is not None:
        return Meaning(float(probabilities), residual)
    against = max(between(negative + excess, UNSURE, CONTRARY), between(blind, BLIND, 1.0))
    return Meaning(1 - against, residual)


def fisher_meaning(slopes: Tensor, curvature: Tensor, along: Tensor) -> Meaning:
    """What the slopes Q [n] of log-likelihoods are, with the other two columns of ``Terms``.

    The curvature tells a logistic likelihood: with p the probability of the right class, it is
    |Q| p for two classes, whatever a sample's weight in the loss and whichever class the log-odds
    are of, and |Q| for several classes, as where Q is 1. Others are those of a regression where Q
    have both signs, or where the curvature doesn't grow with |Q|: then residuals may have one sign.
    (That of a probit likelihood of the right class does.)

    The outputs of a regression are counted from their mean, weighted by the curvature: what a
    constant explains says nothing about how the network was regularised. So scores don't depend on
    where a label has its zero.
    """
    q, weights, values = (t.double() for t in (slopes, curvature, along))
    two_classes = q.abs() * torch.sigmoid(q.sign() * values)
    apart = min(share_apart(weights, logistic) for logistic in (two_classes, q.abs()))
    alike = correlation(weights, q.abs())
    scattered = max(meaning(slopes, True).residual, 1 - between(alike, UNSURE, CONTRARY))
    residual = min(scattered, between(apart, UNSURE, CONTRARY))
    total = float(weights.sum())
    offset = residual * float(weights @ values) / total if total > 0 else 0.0
    return Meaning(1.0, residual, offset)


def share_apart(a: Tensor, b: Tensor) -> float:
    """How far a and b [n], not below 0, differ: 0 where they are the same, 1 where one is 0."""
    larger = float(torch.maximum(a, b).sum())
    return float((a - b).abs().sum()) / larger if larger > 0 else 0.0


def correlation(a: Tensor, b: Tensor) -> float:
    """Of a and b [n]; 0 where one of them doesn't vary."""
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0


def moved_slopes(slopes: Tensor, curvature: Tensor, change: Tensor, residual: float) -> Tensor:
    """The slopes Q [n] of log-likelihoods whose outputs change by ``change`` [n].

    That is exact of a logistic likelihood, whatever a sample's weight w in the loss, and of a
    regression. |Q| is w (1 - p), and the curvature |Q| p. Of several classes it is |Q|, and w is 1.
    Where the output is the log-likelihood itself, as of sequences, Q is 1 and stays so.

    curvature : as in ``Terms``. residual : as in ``Meaning``.
    """
    size = slopes.abs()
    # Where w is 1, 1 - p is |Q| to all its digits: it may be a small part of what rounds to 1.
    several = curvature >= size * (1 - ROUNDED)
    unweighted = (curvature - size * (1 - size)).abs() <= ROUNDED * size
    missing = torch.where(several | unweighted, size, 1 - curvature / size).clamp(0, 1)  # 1 - p
    ahead = (slopes.sign() * change).clamp(max=FAR)  # of the log-odds
    logistic = slopes / (missing + (1 - missing) * ahead.exp())  # (1 - p) / p = exp(-log-odds)
    return torch.lerp(logistic, slopes - curvature * change, residual)


def between(x: float, low: float, high: float) -> float:
    """0 up to ``low``, 1 from ``high`` on, linear in between."""
    return min(max((x - low) / (high - low), 0.0), 1.0)


def sample_weights(q: Tensor, power: float) -> Tensor:
    """The diagonal of W, ``(Q (1 - Q))^power``, float64 [n]; Q is brought into 0..1 first."""
    q = q.double().clamp(TINY, CEILING)
    return (q * (1 - q)).pow(power)


def logistic_share(q: Tensor, power: float) -> Share:
    """The share of samples with Q = 1 - p of a logistic loss; ``power`` is as in ``System``."""
    slopes = q.double().clamp(TINY, CEILING)
    values = torch.log1p(-slopes) - slopes.log()  # Q = 1 - sigmoid(f)
    return Share(sample_weights(q, power), values, slopes, q.double())


def choose_lambda(gram: Gram, moments: Moments, q: Meaning) -> Choice:
    """Choose the ridge that is added to a Gram matrix, Phi^T W Phi where Q are probabilities.

    Three rules give a ridge:

    - the training ridge: for Q that are probabilities, MARGIN times what ``fit`` finds;
    - the dimension: for other Q, and where ``fit`` finds none, the ridge that leaves an effective
      dimension of ``sqrt(n')``. A linear expansion can follow so many directions with n' samples,
      n' = (sum |row|^2)^2 / sum |row|^4 for the rows of the matrix;
    - the residuals: for residuals of a regression, the geometric mean of the dimension's ridge and
      the ridge under which the residuals are likeliest.

    Where it isn't clear what Q are, or whether the network has fitted anything, the result is a
    weighted geometric mean of these. So no sample changes it by a jump.

    Parameters
    ----------
    gram : of all n samples.
    moments : the other sums over the samples.
    q : what Q are.
    """
    trace = check_gram(gram) * gram.k
    least, most = LEAST * trace / gram.n, MOST * trace
    ridge = fit(gram, moments) if q.probability > 0 else None
    trust = 0.0 if ridge is None else q.probability * moments.fit_share()
    shares = {"training ridge": trust}
    log_lambda = trust * math.log(min(max(MARGIN * (ridge or 1.0), least), most))
    rest = 1 - shares["training ridge"]
    if rest > 0:
        values = torch.linalg.eigvalsh(gram.matrix).clamp(min=0)
        samples = trace**2 / float(moments.quartic)
        dimension = math.log(dimension_ridge(values, samples, gram.k))
        signed = q.residual * (1 - q.probability)
        likeliest = likeliest_ridge(values, gram, moments) if signed > 0 else None
        shares["residuals"] = 0.0 if likeliest is None else signed / 2
        shares["dimension"] = rest - shares["residuals"]
        log_lambda += shares["dimension"] * dimension
        log_lambda += shares["residuals"] * math.log(likeliest or 1.0)
    lam = min(max(math.exp(log_lambda), least), most)
    rule = " and ".join(name for name, share in shares.items() if share > 0)
    return Choice(lam, rule, q.probability, lam * gram.k / trace)


def choose_fisher_lambda(
    gram: Gram, moments: Moments, samples: int, ridge: float | None, labels: bool = False
) -> Choice:
    """Choose the ridge that is added to the Fisher matrix.

    It is ``MARGIN gamma / ((1 - d / k) (1 - d / N))``. gamma is the ridge at which one Newton step
    from the network's outputs agrees with them, and d the effective dimension there. The two
    factors are needed because k dimensions, and N rows of which most are drawn, fit more easily
    than the whole network fits all its labels. Where no rows are drawn, of two classes or a
    regression, EXACT_MARGIN takes the place of MARGIN, and of several labels LABELS_MARGIN: see
    docs/research/lambda.md.

    The nearer d comes to k or N, the less gamma says. ``TYPICAL sqrt(1 - d / N) trace / n`` is best
    in the mean of many problems. So a ridge below it is averaged with it, geometrically: the ridge
    counts to the power of the two factors, the typical value to the power of the rest. A ridge
    above it counts in full, because too little would cost more than too much. As far as the network
    has not fitted its samples (``Moments.fit_share``), the typical value counts instead.

    Parameters
    ----------
    gram : of all N rows.
    samples : n.
    ridge : gamma, as ``agreeing_ridge`` finds it.
    labels : whether a sample's predictions are several labels of one input.
    """
    trace = check_gram(gram) * gram.k
    least, most = LEAST * trace / samples, MOST * trace
    log_lambda, trust = math.log(TYPICAL * trace / samples), 0.0
    if ridge is not None:
        dimension = effective_dimension(gram.matrix, ridge)
        left = 1 - dimension / gram.n
        log_lambda += moments.fit_share() * math.log(max(left, UNUSED)) / 2
        free = max(1 - dimension / gram.k, 0.0) * max(left, 0.0)
        trust = free * moments.fit_share() if is_found(gram, ridge) else 0.0
        if trust > 0:
            margin = MARGIN if gram.n > samples else EXACT_MARGIN
            margin = LABELS_MARGIN if labels else margin
            above = math.log(margin * ridge / free) - log_lambda
            trust = max(trust, moments.fit_share()) if above > 0 else trust
            log_lambda += trust * above
    lam = min(max(math.exp(log_lambda), least), most)
    rule = f"training ridge, to the power of {trust:.2f}"
    return Choice(lam, rule, 1.0, lam * gram.k / trace)


class Moments:
    """The sums beside a Gram matrix, from the same pass over the samples. Parts can be added up.

    power : of the curvature Q (1 - Q) in W, by which the samples count.
    """

    NAMES = ("quartic", "fitted", "explained", "opposed", "correlated", "squares")

    def __init__(self, proj_dim: int, power: float) -> None:
        self.power = power
        zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")
        self.quartic = zeros(())  # sum of |row|^4
        self.fitted = zeros(proj_dim)  # Phi^T (W f + Q)
        self.explained = zeros(())  # f^T (W f + Q)
        self.opposed = zeros(())  # minus the negative terms of that
        self.correlated = zeros(proj_dim)  # Phi^T Q
        self.squares = zeros(())  # Q^T Q
        self.response = zeros(0)  # [n]: fitted = S^T response, in order
        self._buffer = Buffer()

    def over(self, blocks: Iterable[tuple[Tensor, Share]]) -> Iterator[Tensor]:
        """Adds up (features [b, k], their share); yields the rows of which a Gram matrix is wanted.

        These are the features times the square roots of their weights. Their memory is used again
        for the next ones.
        """
        for features, share in blocks:
            if self.power < 1 and share.residuals is not None:
                self.correlated += product(features, share.residuals)
                self.squares += share.residuals @ share.residuals
            if self.power > 0:
                target = share.target()
                self.fitted += product(features, target)
                self.explained += share.values @ target
                self.opposed += (-share.values * target).clamp(min=0).sum()
                self.response = torch.cat([self.response, target / share.weights.sqrt()])
            rows = weigh(features, share.weights, self.power, self._buffer)
            scaled, exponent = in_range(rows)
            norms = torch.linalg.vector_norm(scaled, dim=1).double() * math.ldexp(1.0, exponent)
            self.quartic += norms.pow(4).sum()
            yield rows

    def fit_share(self) -> float:
        """1 where the network has fitted its samples, on the whole; 0 where it has not."""
        explained = float(self.explained)
        size = explained + 2 * float(self.opposed)  # of all terms
        return between(explained / size, 0.0, FITTED) if explained > 0 else 0.0

    def tensors(self) -> Tensors:
        """The sums, to be stored and added up by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    @classmethod
    def of(cls, tensors: Tensors, power: float) -> Moments:
        """From what ``tensors`` gave, and in the dual ``response``."""
        made = cls(0, power)
        for name in cls.NAMES:
            setattr(made, name, tensors[name])
        made.response = tensors.get("response", made.response)
        return made


def weigh(features: Tensor, weights: Tensor, power: float, buffer: Buffer) -> Tensor:
    """The rows of S: ``features [b, k]`` times the square roots of ``weights``, in ``buffer``."""
    if power == 0:
        return features
    rows = buffer.take((len(weights), features.shape[1]), features.dtype)
    return torch.mul(features, weights.sqrt().to(features).unsqueeze(1), out=rows)


def product(features: Tensor, vector: Tensor) -> Tensor:
    """``features [b, k].T @ vector [b]``, float64 [k], of any magnitude; vector is float64."""
    scaled, exponent = in_range(features)
    size = max(float(vector.abs().max()), TINY) if len(vector) else 1.0
    return (scaled.mT @ (vector / size).to(scaled)).double() * math.ldexp(size, exponent)


def fit(gram: Gram, moments: Moments) -> float | None:
    """The ridge at which regression on the gradients fits the training set as the network does.

    One Newton step of logistic regression from the network's own outputs f, at ridge gamma, has the
    outputs ``f' = Phi (H + gamma I)^-1 u`` with ``H = Phi^T W Phi``, ``u = Phi^T (W f + Q)``. gamma
    is where f' agrees with f along the response: ``u^T (H + gamma I)^-1 u = f^T (W f + Q)``.

    That gamma is the ridge of the k features. Ridge regression on the whole gradients fits equally
    well at ``gamma / (1 - d(gamma) / k)``, with d(gamma) = trace H (H + gamma I)^-1. That ridge is
    returned. Where the k features fit worse than the network at every gamma, the limit for
    gamma -> 0 is returned, which is a lower bound.

    None where the network has fitted nothing, or H is singular and the features fit too badly.

    Parameters
    ----------
    gram : H [k, k], or its dual.
    """
    unit = gram.trace / gram.k
    ridge = agreeing_ridge(gram, moments)
    if ridge is None or math.log(ridge / unit) >= HIGHEST:
        return None
    at_least = math.log(ridge / unit) <= LOWEST
    unused = 1 - effective_dimension(gram.matrix, ridge) / gram.k
    if unused <= 0 or (at_least and unused > SINGULAR):
        return None
    return ridge / unused


def agreeing_ridge(gram: Gram, moments: Moments) -> float | None:
    """The gamma of ``fit``, of k features; None where the network has fitted nothing.

    Without an agreement between them, it is e to LOWEST or HIGHEST, times the mean eigenvalue.
    """
    unit = gram.trace / gram.k
    explained = float(moments.explained)
    if not explained > 0 or not unit > 0:
        return None
    log_ridge = math.inf
    for agreement in agreements(gram, moments):
        before = log_ridge
        log_ridge = crossing(lambda ridge, f=agreement: f(ridge * unit), explained)  # type: ignore
        if log_ridge > LOWEST and abs(log_ridge - before) < SETTLED:
            break
    return math.exp(log_ridge) * unit


def spread_ridges() -> list[tuple[float, float]]:
    """(multiple of lambda, weight) of two ridges, whose inverses are averaged.

    Lambda is known to a factor only, and ``sum weight / (s + ridge)`` depends less on it than
    ``1 / (s + lambda)``. With weights that go with the root of the ridge, it is that of the
    geometric mean where the eigenvalue s is small or large. See docs/research/lambda.md.
    """
    by = [SPREAD_SHARE * SPREAD**power for power in (-0.5, 0.5)]
    total = sum(math.sqrt(multiple) for multiple in by)
    return [(multiple, math.sqrt(multiple) / total) for multiple in by]


def for_mean(lambda_reg: float, own_noise: float, checkpoints: int) -> float:
    """A lambda where the scores of so many checkpoints are averaged.

    The noisier scores are, the larger is their best ridge. Their mean keeps the noise that all
    checkpoints share, and of each one's own a share of ``1 / checkpoints``. ``own_noise`` is in
    units of the noise that they share: OWN_NOISE, or SPREAD_OWN_NOISE, where lambda was chosen for
    the Fisher matrix of single predictions, otherwise 0. See docs/research/lambda.md.
    """
    return lambda_reg * (1 + own_noise / checkpoints)


def halving_step(gram: Gram, moments: Moments, ridge: float | None) -> Tensor | None:
    """How far the parameters of k features move where only half of the samples are trained on.

    With theta(r) = (F + r I)^-1 u it is ``theta(2 gamma) - theta(gamma)``: random halves of the
    samples have F / 2 and u / 2 in expectation, and the same training ridge gamma. In the dual it
    is x [N] of ``S^T x``. None where gamma is not known.

    ridge : gamma, as ``agreeing_ridge`` finds it.
    """
    if ridge is None or not is_found(gram, ridge):
        return None
    start = moments.response if gram.dual else moments.fitted
    whole = regularised(gram.matrix, ridge, start)
    return -ridge * regularised(gram.matrix, 2 * ridge, whole)


def is_found(gram: Gram, ridge: float) -> bool:
    """Whether a ridge isn't at the ends of where it was sought, where it says nothing."""
    return LOWEST < math.log(ridge * gram.k / gram.trace) < HIGHEST


def regularised(matrix: Tensor, ridge: float, vector: Tensor) -> Tensor:
    """``(A + ridge I)^-1 vector`` of a positive semi-definite A, float64 [r, r]."""
    factor = cholesky(matrix, ridge)
    if factor is not None:
        return apply_factor(factor, vector.unsqueeze(1)).squeeze(1)
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ ((vectors.mT @ vector) / (values.clamp(min=0) + ridge))


def agreements(gram: Gram, moments: Moments) -> Iterator[Callable[[float], float]]:
    """``u^T (H + ridge I)^-1 u`` as a function of the ridge, ever more exact; u: moments.fitted.

    In the dual it is ``b^T K (K + ridge I)^-1 b``, with K = S S^T and u = S^T b, b the response.
    """
    start = moments.response if gram.dual else moments.fitted
    for nodes, weights in quadratures(gram.matrix, start, gram.dual):

        def agreement(ridge: float, nodes: Tensor = nodes, weights: Tensor = weights) -> float:
            return float((weights / (nodes + ridge)).sum())

        yield agreement


def crossing(function: Callable[[float], float], wanted: float) -> float:
    """log x where ``function(x)``, which falls with x, is ``wanted``.

    LOWEST or HIGHEST where it is so nowhere between them.
    """

    def excess(log_x: float) -> float:
        return function(math.exp(log_x)) - wanted

    low, high = LOWEST, HIGHEST
    if excess(low) <= 0 or excess(high) >= 0:
        return low if excess(low) <= 0 else high
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def quadratures(
    matrix: Tensor, start: Tensor, dual: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """(nodes, weights) with ``start^T g(matrix) start ~ sum weights g(nodes)``, ever more of them.

    Gauss quadrature by Lanczos' method: exact for polynomials g of degree below twice the number of
    nodes. Each step costs k^2. There is a result after every LANCZOS_STEPS steps. The last comes
    after MAX_STEPS, or when nothing is left.

    matrix : float64 [k, k], positive semi-definite.
    dual : it is S S^T, and what is found is of S^T S and ``S^T start``. A vector x stands for S^T x
        then: inner products are by the matrix. So rows of next to no weight, on which start is
        large, lose no digits.
    """
    steps = min(MAX_STEPS, len(start))
    basis = start.new_zeros(steps, len(start))
    images = torch.zeros_like(basis) if dual else basis  # inner products are with these
    diagonal: list[float] = []
    beside: list[float] = []
    vector, image = start, matrix @ start
    norm = size = math.sqrt(max(float(vector @ (image if dual else vector)), 0.0))
    for step in range(steps):
        if size:
            vector, image = vector / size, image / size
        basis[step] = vector
        if dual:
            images[step] = image
        diagonal.append(float(image @ (image if dual else vector)))
        for _ in range(2):  # twice is enough to keep the basis orthogonal
            image = image - basis[: step + 1].mT @ (images[: step + 1] @ image)
        vector, image = image, matrix @ image
        size = math.sqrt(max(float(vector @ (image if dual else vector)), 0.0))
        done = step + 1 == steps or size <= 1e-13 * max(map(abs, diagonal))
        if done or (step + 1) % LANCZOS_STEPS == 0:
            small = torch.diag(start.new_tensor(diagonal))
            off = start.new_tensor(beside)
            small += torch.diag(off, 1) + torch.diag(off, -1)
            nodes, vectors = torch.linalg.eigh(small)
            yield nodes.clamp(min=0), (norm * vectors[0]).square()
        if done:
            return
        beside.append(size)


def effective_dimension(matrix: Tensor, ridge: float) -> float:
    """``trace A (A + ridge I)^-1`` of a positive semi-definite A, float64 [r, r]."""
    size = len(matrix)
    factor = cholesky(matrix, ridge)
    if factor is None:
        values = torch.linalg.eigvalsh(matrix).clamp(min=0)
        return float((values / (values + ridge)).sum())
    inverse = 0.0  # squared norm of the factor's inverse, a few columns at a time
    for first in range(0, size, COLUMNS):
        count = min(COLUMNS, size - first)
        columns = matrix.new_zeros(size - first, count)  # above, they are zero
        columns[:count] = torch.eye(count, dtype=matrix.dtype, device=matrix.device)
        for row in range(first, size, COLUMNS):  # by blocks: no copy of the factor is made
            rows, done = slice(row, row + COLUMNS), row - first
            block = columns[done : done + COLUMNS]
            block -= factor[rows, first:row] @ columns[:done]
            block.copy_(torch.linalg.solve_triangular(factor[rows, rows], block, upper=False))
        inverse += float(columns.square().sum())
    return max(0.0, size - ridge * inverse)


def dimension_ridge(values: Tensor, samples: float, k: int) -> float:
    """The ridge at which a k x k matrix has an effective dimension of ``sqrt(samples)``.

    Where k is not many times that, the dimension is the harmonic sum of the two.

    values : the eigenvalues, in any order; those that are zero may be left out.
    """
    wanted = 1 / (1 / math.sqrt(samples) + 1 / k)
    low, high = math.log(1e-12), math.log(1e12)
    unit = float(values.sum()) / k
    while high - low > 1e-9:
        middle = (low + high) / 2
        dimension = float((values / (values + math.exp(middle) * unit)).sum())
        low, high = (middle, high) if dimension > wanted else (low, middle)
    return math.exp(low) * unit


def likeliest_ridge(values: Tensor, gram: Gram, moments: Moments) -> float | None:
    """The ridge gamma under which the residuals Q of a regression on the features are likeliest.

    Of n values with covariance ``s (Phi Phi^T / gamma + I)``, ridge regression leaves residuals
    with covariance ``s gamma (Phi Phi^T + gamma I)^-1``; s is the likeliest for each gamma. So
    ``-2 log likelihood = n log(Q^T Q + |Phi^T Q|^2 / gamma) - log det(Phi Phi^T / gamma + I)``, up
    to a constant. Of the matrix, that needs the eigenvalues alone. None where the best gamma is 0
    or infinite.

    Parameters
    ----------
    values : eigenvalues of Phi^T Phi, in any order; those that are zero may be left out.
    """
    unit = float(values.sum()) / gram.k
    values = values[values > float(values.max()) * 1e-12] / unit
    correlated = float(moments.correlated.square().sum() / moments.squares) / unit
    count = 1 + round((HIGHEST - LOWEST) / math.log(10) * STEPS_PER_DECADE)
    logarithms = torch.linspace(LOWEST, HIGHEST, count, dtype=torch.float64, device="cpu")
    ridges = logarithms.exp().tolist()
    unlikely = [
        gram.n * math.log1p(correlated / ridge) - float((values / ridge).log1p().sum())
        for ridge in ridges
    ]
    best = min(range(count), key=unlikely.__getitem__)
    return ridges[best] * unit if 0 < best < count - 1 else None
