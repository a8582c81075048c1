"""Correlations of columns, with intervals by a bootstrap that changes how often each row counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastproj.trak.progress import progress

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

BLOCK_BYTES = 1 << 28  # of the tables of one block of columns


@dataclass(frozen=True)
class Estimate:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float
    confidence: float

    def interval(self) -> str:
        """As text: ``0.512 (95% CI 0.480 to 0.540``, without the closing bracket."""
        return f"{self.mean:.3f} ({self.confidence:.0%} CI {self.low:.3f} to {self.high:.3f}"


class Pairs(Protocol):
    """Pairs of columns, whose correlation can be taken with rows counted several times."""

    def __init__(self, x: Floats, y: Floats) -> None: ...

    def at(self, counts: Counts) -> Floats:
        """Correlation [m] of columns [S, m] whose row j stands ``counts[j]`` times."""
        ...


class Spearman:
    """Spearman's rho: Pearson's correlation of ranks, ties averaged."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x, self.y = WeightedRanks(x), WeightedRanks(y)

    def at(self, counts: Counts) -> Floats:
        """rho [m]; NaN where a column is constant."""
        return rank_correlation(self.x.ranks(counts), self.y.ranks(counts), counts)


class Pearson:
    """Pearson's r."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x, self.y = x - x.mean(0), y - y.mean(0)

    def at(self, counts: Counts) -> Floats:
        """r [m]; NaN where a column is constant."""
        there = counts > 0
        x, y, weights = self.x[there], self.y[there], counts[there, None] / counts.sum()
        varies = (np.ptp(x, axis=0) > 0) & (np.ptp(y, axis=0) > 0)
        dx, dy = x - (weights * x).sum(0), y - (weights * y).sum(0)
        variance = (weights * dx * dx).sum(0) * (weights * dy * dy).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(varies, (weights * dx * dy).sum(0) / np.sqrt(variance), np.nan)


class Kendall:
    """Kendall's tau-b: concordant minus discordant pairs over pairs that are not tied."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x, self.y = x, y

    def at(self, counts: Counts) -> Floats:
        """tau [m]; NaN where a column is constant."""
        there = np.flatnonzero(counts)
        weights = counts[there].astype(np.float64)
        out = np.empty(self.x.shape[1])
        for column in range(len(out)):
            a, b = self.x[there, column], self.y[there, column]
            x, y = np.sign(np.subtract.outer(a, a)), np.sign(np.subtract.outer(b, b))
            untied = (weights @ (x * x) @ weights) * (weights @ (y * y) @ weights)
            out[column] = weights @ (x * y) @ weights / math.sqrt(untied) if untied else np.nan
        return out


METHODS: dict[str, type[Pairs]] = {"spearman": Spearman, "pearson": Pearson, "kendall": Kendall}


def mean_correlation(
    x: Floats,
    y: Floats,
    method: str,
    confidence: float,
    n_boot: int,
    seed: int,
) -> tuple[Estimate, Floats]:
    """The mean over columns of the correlation of x and y [S, m], and that of each column, [m].

    Each of ``n_boot`` resamples draws S rows and m columns with replacement; the interval is the
    percentiles of their means (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
    Columns without a correlation are left out of the means.
    """
    size, width = y.shape
    rng = np.random.default_rng(seed)
    rows = np.empty((n_boot, size), np.int32)  # how often each row was drawn
    columns = np.empty((n_boot, width), np.int32)
    for b in range(n_boot):
        rows[b] = np.bincount(rng.integers(size, size=size), minlength=size)
        columns[b] = np.bincount(rng.integers(width, size=width), minlength=width)
    per_column = np.empty(width)
    total, weight = np.zeros(n_boot), np.zeros(n_boot)
    step = max(1, BLOCK_BYTES // (100 * size))
    with progress("bootstrap", width * n_boot, "correlation") as bar:
        for begin in range(0, width, step):
            part = slice(begin, begin + step)
            pairs = METHODS[method](x[:, part], y[:, part])
            per_column[part] = pairs.at(np.ones(size, np.int64))
            for b in range(n_boot):
                found = pairs.at(rows[b].astype(np.int64))
                finite = np.isfinite(found)
                total[b] += columns[b, part][finite] @ found[finite]
                weight[b] += columns[b, part][finite].sum()
                bar.update(len(found))
    with np.errstate(invalid="ignore"):
        low, high = percentiles(total / weight, confidence)
    return Estimate(mean_or_nan(per_column), low, high, confidence), per_column


def percentiles(values: Floats, confidence: float) -> tuple[float, float]:
    """The central interval that holds ``confidence`` of the finite values; NaN if there is none."""
    if not np.isfinite(values).any():
        return math.nan, math.nan
    tail = 100 * (1 - confidence) / 2
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return float(low), float(high)


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> Floats:
    """Spearman's rank correlation of each column of x and y [S, m], ties averaged; float64 [m].

    NaN where a column is constant or holds a NaN.
    """
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    found = Spearman(a, b).at(np.ones(len(a), np.int64))
    found[np.isnan(a).any(0) | np.isnan(b).any(0)] = np.nan
    return found


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

    def ranks(self, counts: Counts) -> Floats:
        """float64 [S, m], 1-based. Ranks of rows with count 0 mean nothing."""
        total = np.concatenate(
            [np.zeros((1, self.order.shape[1])), np.cumsum(counts[self.order], axis=0)]
        )
        columns = np.arange(self.order.shape[1])
        ordered = (total[self.begin, columns] + total[self.end + 1, columns] + 1) / 2
        out = np.empty_like(ordered)
        np.put_along_axis(out, self.order, ordered, axis=0)
        return out


def rank_correlation(x: Floats, y: Floats, counts: Counts) -> Floats:
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
