"""Bounds for random projections, each with the probability that a correct one breaks it.

Entries of R are independent with mean 0 and variance 1, and their even moments are at most a
Gaussian's (Rademacher: 1; ours Gaussian: root mean squares of bins of |z|, so by Jensen). For
such R and one vector u (Achlioptas 2003, lemma 5.1)

    P(| |u R|^2 / K - |u|^2 | > eps |u|^2) <= 2 exp(-K (eps^2/4 - eps^3/6)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def jl_epsilon(vectors: int, proj_dim: int, failure: float = 1e-9) -> float:
    """eps such that all inner products of ``vectors`` unit vectors are off by at most eps.

    <u, v> = (|u + v|^2 - |u - v|^2) / 4 is off by at most eps (|u + v|^2 + |u - v|^2) / 4 = eps
    where both squares keep within eps; there are vectors^2 such squares, counting |u|^2.
    """
    needed = math.log(2 * vectors**2 / failure) / proj_dim
    low, high = 0.0, 1.0  # eps^2/4 - eps^3/6 rises up to eps = 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle**2 / 4 - middle**3 / 6 < needed else (low, middle)
    assert high < 0.999, "proj_dim is too small for this many vectors"
    return high


def assert_keeps_inner_products(vectors: Tensor, projected: Tensor, proj_dim: int) -> None:
    """``projected`` [n, K], unscaled, has the inner products of ``vectors`` [n, P]."""
    u = vectors.double()
    norms = u.norm(dim=1)
    exact = u @ u.T
    got = projected.double() @ projected.double().T / proj_dim
    # 1e-3: the variance of our Gaussian entries is 0.9999, and results are float32.
    eps = jl_epsilon(len(u), proj_dim) + 1e-3
    worst = ((got - exact).abs() / (norms[:, None] * norms)).max().item()
    assert worst <= eps, f"inner products are off by {worst}, allowed {eps}"


def rows_differ(a: Tensor, b: Tensor, failure: float = 1e-9) -> bool:
    """Whether two matrices of signs look independent: about half of their entries agree.

    Hoeffding: n fair coins are further than sqrt(n ln(2/failure) / 2) from n/2 with probability
    at most ``failure``.
    """
    n = a.numel()
    agree = int((a == b).sum())
    return abs(agree - n / 2) <= math.sqrt(n * math.log(2 / failure) / 2)


def score_sine(c2: float, proj_dim: int, failure: float) -> float:
    """sine with P(|S' - S|^2 > sine^2 |S|^2) <= failure; S' scores through a projection, S without.

    S = X_t (H + lam)^-1 X^T with H = X^T X. A projection puts I + D for I, D = R R^T / K - I, and
    to first order in D changes entry (i, j) by lam x_i D z_j, where x_i and z_j are rows of
    X_t (H + lam)^-1 and X (H + lam)^-1. (The next order is smaller by D on the data's span, about
    the square root of its rank over K.) With e = x_i D z_j / (|x_i| |z_j|) the bound above gives
    P(|e| > t) <= 4 exp(-K t^2/4 (1 - 2t/3)), so E e^(2q) <= 4 q! (4.8/K)^q (up to what lies beyond
    t = 1/4: e^-50 at K = 4096). By Minkowski the q-norm of sum |S' - S|^2 is at most the sum of the
    entries' q-norms; by Markov P <= 4 q! (4.8 c2 / (K sine^2))^q with
    c2 = lam^2 |x|^2 |z|^2 / |S|^2. Here P = failure, at the best q.
    """
    factor = min((4 * math.factorial(q) / failure) ** (1 / q) for q in range(1, 60))
    return math.sqrt(4.8 * c2 / proj_dim * factor)


def exact_scores(
    train: Tensor, targets: Tensor, strength: float, proj_dim: int, failure: float = 1e-6
) -> tuple[Tensor, float, float]:
    """Scores without a projection, their lam, and the angle that a projection keeps to them.

    ``train`` [n, P] and ``targets`` [m, P] are gradients, float64; lam = strength |H|. Of two
    projections, one leaves that angle (of centred scores) with probability ``failure`` at most.
    Otherwise either's correlation with the exact scores is at least its cosine, and theirs with
    each other that of twice the angle.
    """
    h = train.T @ train
    lam = strength * torch.linalg.matrix_norm(h, 2)
    inverse = torch.linalg.inv(h + lam * torch.eye(len(h), dtype=h.dtype))
    x, z = targets @ inverse, train @ inverse
    s = z @ targets.T  # [n, m]
    c2 = lam**2 * x.square().sum() * z.square().sum() / (s - s.mean()).square().sum()
    return s, float(lam), math.asin(score_sine(float(c2), proj_dim, failure / 2))


def assert_scores_agree(s: Tensor, angle: float, *scores: Tensor) -> None:
    """Through a projection each, ``scores`` are those of ``exact_scores``, and above 0.95 alike."""
    assert math.cos(2 * angle) > 0.95, "lam is too small, or the gradients have little in common"
    for a in scores:
        assert correlation(a, s) > math.cos(angle)
        assert all(correlation(a, b) > math.cos(2 * angle) for b in scores)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1].item()
