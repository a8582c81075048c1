"""How good are the scores? The linear datamodeling score (LDS) and its uncertainty.

LDS: draw subsets S_j of the training set, train a model on each, and rank-correlate the outputs
f(z; theta(S_j)) with the scores' prediction, the sum of tau(z)_i over i in S_j
(arXiv 2303.14186, section 2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LDS:
    """The mean rank correlation over targets, and its bootstrap interval."""

    mean: float
    low: float
    high: float
    confidence: float
    per_target: Floats  # [m]; NaN where the outputs or the predictions of a target are constant
    n_subsets: int

    def __str__(self) -> str:
        return (
            f"LDS {self.mean:.3f} ({self.confidence:.0%} CI {self.low:.3f} to {self.high:.3f}; "
            f"{len(self.per_target)} targets, {self.n_subsets} subsets)"
        )


def lds(
    scores: npt.ArrayLike,
    masks: npt.ArrayLike,
    outputs: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> LDS:
    """Linear datamodeling score with a bootstrap interval over targets and subsets.

    ``mean over targets t of spearman_j(outputs[j, t], sum_i masks[j, i] scores[i, t])``

    Parameters
    ----------
    scores : [n, m], attribution of each of n training samples to each of m targets.
    masks : [S, n] bool, which samples each of S models was trained on.
    outputs : [S, m], model output f of each target under each of these models.
    confidence : of the percentile interval.
    n_boot : resamples; each draws S subsets and m targets with replacement.
    seed : of the resampling.

    Raises
    ------
    ValueError
        For shapes that don't fit, fewer than 3 subsets, or values that are not finite.
    """
    tau, member, truth = (
        np.asarray(scores, np.float64),
        np.asarray(masks, np.float64),
        np.asarray(outputs, np.float64),
    )
    if (
        tau.ndim != 2
        or member.ndim != 2
        or truth.ndim != 2
        or (member.shape[1], truth.shape) != (tau.shape[0], (member.shape[0], tau.shape[1]))
        or tau.shape[1] == 0
    ):
        raise ValueError(
            f"lds: received scores {list(tau.shape)}, masks {list(member.shape)}, outputs "
            f"{list(truth.shape)}; expected [n, m], [S, n] and [S, m]"
        )
    if len(member) < 3:
        raise ValueError(f"lds: received {len(member)} subsets; expected at least 3")
    for name, values in (("scores", tau), ("outputs", truth)):
        if not np.isfinite(values).all():
            raise ValueError(f"lds: received {name} with NaN or inf; expected finite values")
    if not 0 < confidence < 1:
        raise ValueError(f"lds: received confidence={confidence}; expected 0 < confidence < 1")
    predicted = member @ tau  # [S, m]
    per_target = spearman(predicted, truth)
    rng = np.random.default_rng(seed)
    x, y = WeightedRanks(predicted), WeightedRanks(truth)
    n_subsets, n_targets = truth.shape
    means = np.empty(n_boot)
    for b in range(n_boot):
        counts = np.bincount(rng.integers(n_subsets, size=n_subsets), minlength=n_subsets)
        chosen = rng.integers(n_targets, size=n_targets)
        means[b] = mean_or_nan(rank_correlation(x.ranks(counts), y.ranks(counts), counts)[chosen])
    tail = 100 * (1 - confidence) / 2
    low, high = (
        (float(v) for v in np.nanpercentile(means, [tail, 100 - tail]))
        if np.isfinite(means).any()
        else (math.nan, math.nan)
    )
    return LDS(mean_or_nan(per_target), low, high, confidence, per_target, n_subsets)


def noise_ceiling(outputs: npt.ArrayLike) -> float:
    """The LDS that perfect predictions of the expected outputs would reach.

    ``sqrt(R r / (1 + (R - 1) r))`` with r the mean rank correlation between two retrainings of the
    same subsets: the Spearman-Brown reliability of their mean, and the root because the ideal
    prediction carries no noise of its own.

    outputs : [R, S, m], outputs of R retrainings (other seeds) on each of S subsets; R >= 2.
    """
    runs = np.asarray(outputs, np.float64)
    if runs.ndim != 3 or runs.shape[0] < 2:
        raise ValueError(
            f"noise_ceiling: received outputs {list(runs.shape)}; expected [R, S, m] with R >= 2"
        )
    count = runs.shape[0]
    pairs = [
        mean_or_nan(spearman(runs[a], runs[b])) for a in range(count) for b in range(a + 1, count)
    ]
    r = max(0.0, mean_or_nan(np.array(pairs)))
    return math.sqrt(count * r / (1 + (count - 1) * r))


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
    """Spearman's rank correlation of each column of x and y [S, m], ties averaged; float64 [m]."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    ones = np.ones(len(a), np.int64)
    return rank_correlation(WeightedRanks(a).ranks(ones), WeightedRanks(b).ranks(ones), ones)


class WeightedRanks:
    """Average ranks of the columns of ``values`` [S, m] when row j stands ``counts[j]`` times.

    Sorting once serves every bootstrap resample: a resample only changes the counts.
    """

    def __init__(self, values: Floats) -> None:
        self.order = np.argsort(values, axis=0, kind="stable")  # [S, m]
        ordered = np.take_along_axis(values, self.order, axis=0)
        size = len(values)
        first = np.ones(ordered.shape, bool)
        first[1:] = ordered[1:] != ordered[:-1]
        places = np.arange(size)[:, None]
        # The tie group of a place runs from `begin` to `end`, both included.
        self.begin = np.maximum.accumulate(np.where(first, places, 0), axis=0)
        last = np.ones(ordered.shape, bool)
        last[:-1] = first[1:]
        self.end = np.minimum.accumulate(np.where(last, places, size - 1)[::-1], axis=0)[::-1]

    def ranks(self, counts: npt.NDArray[np.int64]) -> Floats:
        """float64 [S, m], 1-based; rows with count 0 get a rank that nobody reads."""
        total = np.concatenate(
            [np.zeros((1, self.order.shape[1])), np.cumsum(counts[self.order], axis=0)]
        )
        columns = np.arange(self.order.shape[1])
        ordered = (total[self.begin, columns] + total[self.end + 1, columns] + 1) / 2
        out = np.empty_like(ordered)
        np.put_along_axis(out, self.order, ordered, axis=0)
        return out


def rank_correlation(x: Floats, y: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    """Correlation of ranks x and y [S, m] of rows that stand ``counts`` times; NaN if constant."""
    weights = counts[:, None] / counts.sum()
    middle = (counts.sum() + 1) / 2  # the mean rank, exactly, so that a constant column gives 0
    dx, dy = x - middle, y - middle
    variance = (weights * dx * dx).sum(0) * (weights * dy * dy).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(variance > 0, (weights * dx * dy).sum(0) / np.sqrt(variance), np.nan)


def mean_or_nan(values: Floats) -> float:
    """The mean of the finite values; NaN if there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
