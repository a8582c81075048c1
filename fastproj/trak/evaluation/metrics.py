"""How good are scores? Their predictions against what retraining or known labels show.

    lds              outputs of models trained on random subsets     (arXiv 2303.14186, section 2.2)
    loo_correlation  outputs of models trained without one sample    (arXiv 1703.04730, section 4.1)
    brittleness      predictions that flip once what helped is gone  (arXiv 2202.00622, section 4.1)
    mislabel_auc     which training labels are wrong                 (arXiv 1703.04730, section 5.4)

``fastproj.trak.evaluation.retrain`` trains the models that the first three need. Scores may be
memory-mapped: they are read in blocks of rows, never as a whole.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastproj.trak.evaluation.correlation import (
    METHODS,
    Estimate,
    Floats,
    WeightedRanks,
    mean_correlation,
    mean_or_nan,
    percentiles,
    spearman,
)
from fastproj.trak.files import Indices
from fastproj.trak.progress import progress, tracked
from fastproj.trak.store.scores import TopScores

BLOCK_BYTES = 1 << 26  # of scores held at once, as float64

Mask = npt.NDArray[np.bool_]


# ---- linear datamodeling score ------------------------------------------------------------------


@dataclass(frozen=True)
class LDS(Estimate):
    """The mean rank correlation over targets, and its bootstrap interval.

    mean, low, high : the LDS, and the ends of its interval at ``confidence``.
    per_target : float64 [m]; NaN where the outputs or the predictions of a target are constant.
    n_subsets : S.
    """

    per_target: Floats
    n_subsets: int

    def __str__(self) -> str:
        return f"LDS {self.interval()}; {len(self.per_target)} targets, {self.n_subsets} subsets)"


def lds(
    scores: npt.ArrayLike | TopScores,
    masks: npt.ArrayLike,
    outputs: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> LDS:
    """Linear datamodeling score with a bootstrap interval over targets and subsets.

    ``mean over targets t of spearman_j(outputs[j, t], sum_i masks[j, i] scores[i, t])``
    (arXiv 2303.14186, definition 2.3).

    Parameters
    ----------
    scores : numbers [n, m], attribution of each of n training samples to each of m targets; or
        TopScores, where all other scores count as 0.
    masks : bool (or 0 and 1) [S, n], which samples each of S models was trained on.
    outputs : numbers [S, m], model output f of each target under each of these models; the mean
        over several retrainings of a subset where there are several.
    confidence : of the percentile interval.
    n_boot : resamples; each draws S subsets and m targets with replacement.
    seed : of the resampling.

    Raises
    ------
    TypeError, ValueError
        For shapes that don't fit, fewer than 3 subsets, masks that are none, or values that are not
        finite (the first one is named).
    """
    tau = scores if isinstance(scores, TopScores) else as_numbers("lds", "scores", scores)
    truth, member = as_numbers("lds", "outputs", outputs), as_mask("lds", "masks", masks)
    if (
        len(tau.shape) != 2
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
    check_sampling("lds", confidence, n_boot, seed)
    truth = truth.astype(np.float64)
    check_finite("lds", "outputs", truth, "subset")
    if isinstance(tau, TopScores):
        predicted = predict_top(tau, member)
    else:
        predicted = predict("lds", tau, member)
    estimate, per_target = mean_correlation(predicted, truth, "spearman", confidence, n_boot, seed)
    return LDS(**vars(estimate), per_target=per_target, n_subsets=len(member))


def predict(function: str, scores: npt.NDArray[Any], masks: Mask) -> Floats:
    """``masks @ scores``, float64 [S, m], reading the scores [n, m] in blocks of rows."""
    out = np.zeros((len(masks), scores.shape[1]))
    low, high = np.full(scores.shape[1], np.inf), np.full(scores.shape[1], -np.inf)
    for rows, block in row_blocks(function, scores):
        out += masks[:, rows].astype(np.float64) @ block
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    # Where all samples score alike, subsets of one size must tie: rounding would tell them apart.
    alike = low == high
    out[:, alike] = masks.sum(1)[:, None] * low[alike]
    return out


def predict_top(scores: TopScores, masks: Mask) -> Floats:
    """``masks @ scores``, float64 [S, m], with 0 for what is not among the extremes."""
    out = np.empty((len(masks), scores.shape[1]))
    for target in range(scores.shape[1]):
        inds = np.append(scores.helpful_indices[target], scores.harmful_indices[target])
        values = np.append(scores.helpful_scores[target], scores.harmful_scores[target])
        inds, first = np.unique(inds, return_index=True)  # of a few samples, some are in both
        out[:, target] = masks[:, inds].astype(np.float64) @ values[first].astype(np.float64)
    return out


def noise_ceiling(outputs: npt.ArrayLike) -> float:
    """The LDS that perfect predictions of the expected outputs would reach.

    ``sqrt(runs r / (1 + (runs - 1) r))`` with r the mean rank correlation between two retrainings
    of the same subsets. Under the root is the Spearman-Brown reliability of their mean. The root is
    there because the ideal prediction carries no noise of its own.

    outputs : numbers [runs, S, m], outputs of several retrainings (other seeds) on each of S
        subsets; runs >= 2, S >= 3.
    Returns a number from 0 to 1; NaN where no target's outputs differ between subsets.
    """
    runs = as_numbers("noise_ceiling", "outputs", outputs)
    if runs.ndim != 3 or runs.shape[0] < 2 or runs.shape[1] < 3 or runs.shape[2] < 1:
        raise ValueError(
            f"noise_ceiling: received outputs {list(runs.shape)}; expected [runs, S, m] with "
            "runs >= 2, S >= 3, m >= 1"
        )
    runs = runs.astype(np.float64)
    for run in runs:
        check_finite("noise_ceiling", "outputs", run, "subset")
    count = runs.shape[0]
    pairs = [
        mean_or_nan(spearman(runs[a], runs[b])) for a in range(count) for b in range(a + 1, count)
    ]
    r = float(np.maximum(0.0, mean_or_nan(np.array(pairs))))  # NaN stays
    return math.sqrt(count * r / (1 + (count - 1) * r))


# ---- leave one out ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LOO(Estimate):
    """The mean correlation over targets, and its bootstrap interval.

    mean, low, high : the correlation, and the ends of its interval at ``confidence``.
    method : "spearman" | "pearson" | "kendall".
    per_target : float64 [m]; NaN where the scores or the outputs of a target are constant.
    n_removed : L, how many samples were left out, each by itself.
    """

    method: str
    per_target: Floats
    n_removed: int

    def __str__(self) -> str:
        return (
            f"leave-one-out {self.method} correlation {self.interval()}; "
            f"{len(self.per_target)} targets, {self.n_removed} samples left out)"
        )


def loo_correlation(
    scores: npt.ArrayLike,
    removed: npt.ArrayLike,
    outputs: npt.ArrayLike,
    *,
    method: str = "spearman",
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> LOO:
    """Correlation between the scores of samples and what leaving each of them out does.

    ``mean over targets t of corr_l(scores[removed[l], t], f_t - outputs[l, t])``. The output f_t of
    the model trained on everything is the same for all l, so it drops out and is not needed (arXiv
    1703.04730, section 4.1, which takes Pearson's correlation).

    Parameters
    ----------
    scores : numbers [n, m].
    removed : integers [L], distinct training samples.
    outputs : numbers [L, m], model output of each target after training on all samples but
        ``removed[l]``; better the mean of several retrainings, because a seed changes more than one
        sample does.
    method : "spearman", "pearson" or "kendall" (tau-b).
    confidence, n_boot, seed : of the percentile interval; each resample draws L samples and m
        targets with replacement.

    Raises
    ------
    TypeError, ValueError
        For shapes that don't fit, fewer than 3 samples, repeated or unknown samples, or values that
        are not finite.
    """
    function = "loo_correlation"
    tau, truth = as_numbers(function, "scores", scores), as_numbers(function, "outputs", outputs)
    places = as_indices(function, "removed", removed)
    if (
        tau.ndim != 2
        or truth.ndim != 2
        or truth.shape != (len(places), tau.shape[1])
        or tau.shape[1] == 0
    ):
        raise ValueError(
            f"{function}: received scores {list(tau.shape)}, {len(places)} removed, outputs "
            f"{list(truth.shape)}; expected [n, m], L and [L, m]"
        )
    if len(places) < 3:
        raise ValueError(f"{function}: received {len(places)} removed samples; expected at least 3")
    check_places(function, "removed", places, len(tau))
    if method not in METHODS:
        raise ValueError(
            f"{function}: received method={method!r}; expected one of {', '.join(METHODS)}"
        )
    check_sampling(function, confidence, n_boot, seed)
    predicted = np.asarray(tau[places], np.float64)  # [L, m]
    check_finite(function, "scores", predicted, "sample", places)
    truth = truth.astype(np.float64)
    check_finite(function, "outputs", truth, "removed sample", places)
    estimate, per_target = mean_correlation(predicted, -truth, method, confidence, n_boot, seed)
    return LOO(**vars(estimate), method=method, per_target=per_target, n_removed=len(places))


# ---- brittleness --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brittleness:
    """For each number of removed samples: the share of predictions that flip, and its interval.

    removed : int64 [K], the numbers of samples.
    flipped : float64 [K], of the targets that are right with all samples.
    low, high : float64 [K], the ends of the interval at ``confidence``.
    per_target : float64 [K, m]: 1 flipped, 0 not; NaN for a target that was never right.
    n_targets : how many targets are right with all samples.
    """

    removed: Indices
    flipped: Floats
    low: Floats
    high: Floats
    confidence: float
    per_target: Floats
    n_targets: int

    def smallest(self) -> Floats:
        """The fewest removed samples that flip each target, [m]; inf where none does."""
        flips = self.per_target == 1
        first = self.removed[flips.argmax(0)].astype(np.float64)
        found = np.where(flips.any(0), first, np.inf)
        return np.where(np.isnan(self.per_target[0]), np.nan, found)

    def __str__(self) -> str:
        lines = [
            f"{count:>8} removed: {share:.1%} flipped ({self.confidence:.0%} CI {low:.1%} to "
            f"{high:.1%})"
            for count, share, low, high in zip(
                self.removed, self.flipped, self.low, self.high, strict=True
            )
        ]
        return "\n".join([f"brittleness of {self.n_targets} targets", *lines])


def brittleness(
    outputs: npt.ArrayLike,
    base: npt.ArrayLike,
    removed: npt.ArrayLike,
    *,
    confidence: float = 0.95,
) -> Brittleness:
    """Share of predictions that flip when the samples that help a target most are left out.

    A target counts if its mean output with all samples is positive; it is flipped if its mean
    output is not positive once the ``removed[k]`` most helpful samples *of this target* (see
    ``most_helpful``) are gone and the model is trained again. Outputs are margins: positive means
    right (arXiv 2202.00622, section 4.1). The interval, over targets, is Wilson's for a binomial
    share, which holds at 0 and 1 too.

    Parameters
    ----------
    outputs : numbers [K, m] or, with several retrainings, [runs, K, m]: outputs[k, t] is the output
        of target t, after training without the removed[k] most helpful samples of t.
    base : numbers [m] or [base runs, m], outputs of the model trained on all samples.
    removed : integers [K], ascending, at least 1.
    confidence : of the interval.

    Raises
    ------
    TypeError, ValueError
        For shapes that don't fit, numbers that are not ascending, values that are not finite, or no
        target that is right to begin with.
    """
    function = "brittleness"
    runs = as_numbers(function, "outputs", outputs).astype(np.float64)
    start = as_numbers(function, "base", base).astype(np.float64)
    counts = as_indices(function, "removed", removed)
    shapes = (list(runs.shape), list(start.shape))
    runs = runs[None] if runs.ndim == 2 else runs
    start = start[None] if start.ndim == 1 else start
    if (
        start.ndim != 2
        or 0 in (*runs.shape, *start.shape)
        or runs.shape[1:] != (len(counts), start.shape[1])
    ):
        raise ValueError(
            f"{function}: received outputs {shapes[0]}, base {shapes[1]}, {len(counts)} removed; "
            "expected [K, m] or [runs, K, m], [m] or [base runs, m], and K"
        )
    if counts.min() < 1 or (np.diff(counts) <= 0).any():
        raise ValueError(
            f"{function}: received removed={counts.tolist()}; expected ascending numbers from 1"
        )
    check_confidence(function, confidence)
    check_finite(function, "base", start, "retraining")
    for run in runs:
        check_finite(function, "outputs", run, "removal")
    right = start.mean(0) > 0  # [m]
    total = int(right.sum())
    if total == 0:
        raise ValueError(
            f"{function}: received base outputs that are all 0 or below: no target is right with "
            "all samples; expected margins, positive where the model is right"
        )
    flips = np.where(right, (runs.mean(0) <= 0).astype(np.float64), np.nan)  # [K, m]
    share = np.nansum(flips, 1) / total
    low, high = wilson(share, total, confidence)
    return Brittleness(counts, share, low, high, confidence, flips, total)


def wilson(share: Floats, total: int, confidence: float) -> tuple[Floats, Floats]:
    """Wilson's interval of a binomial share (J. Am. Stat. Assoc. 22, 1927, 209-212)."""
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / (1 + z * z / total)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def most_helpful(
    scores: npt.ArrayLike | TopScores, count: int, targets: npt.ArrayLike | None = None
) -> Indices:
    """The ``count`` training samples with the highest scores for each target, best first.

    scores : numbers [n, m], read in blocks of rows; or TopScores of at least ``count``.
    targets : integers [T]; None is all m.
    Returns int64 [T, count]; of samples with equal scores the lower index comes first.
    """
    function = "most_helpful"
    tau = scores if isinstance(scores, TopScores) else as_numbers(function, "scores", scores)
    if len(tau.shape) != 2:
        raise ValueError(f"{function}: received scores {list(tau.shape)}; expected [n, m]")
    n, m = tau.shape
    columns = np.arange(m) if targets is None else as_indices(function, "targets", targets)
    check_places(function, "targets", columns, m)
    if not 1 <= count <= n:
        raise ValueError(f"{function}: received count={count}; expected 1 <= count <= n = {n}")
    if isinstance(tau, TopScores):
        there = tau.helpful_indices.shape[1]
        if count > there:
            raise ValueError(
                f"{function}: received count={count} with the {there} highest scores of each "
                f"target; expected count <= {there} (finalize_scores with top_k={count} keeps more)"
            )
        return np.ascontiguousarray(tau.helpful_indices[columns, :count])
    best = np.empty((0, len(columns)), np.int64)
    values = np.empty((0, len(columns)))
    for rows, block in row_blocks(function, tau, columns):
        inds = np.arange(rows.start, rows.stop)[:, None].repeat(len(columns), 1)
        values, best = np.concatenate([values, block]), np.concatenate([best, inds])
        order = np.argsort(-values, axis=0, kind="stable")[:count]
        values = np.take_along_axis(values, order, 0)
        best = np.take_along_axis(best, order, 0)
    return np.ascontiguousarray(best.T)


# ---- mislabelled samples ------------------------------------------------------------------------


@dataclass(frozen=True)
class AUC(Estimate):
    """Area under the ROC curve, and its bootstrap interval.

    mean, low, high : the area, from 0 to 1, and the ends of its interval at ``confidence``.
    n_flipped, n : how many labels are wrong, of how many.
    """

    n_flipped: int
    n: int

    def __str__(self) -> str:
        return (
            f"mislabel-detection AUC {self.interval()}; {self.n_flipped} of {self.n} labels wrong)"
        )


def mislabel_auc(
    scores: npt.ArrayLike,
    flipped: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    n_boot: int = 500,
    seed: int = 0,
) -> AUC:
    """How well self-influence finds wrong labels: the area under the ROC curve.

    ``P(s of a mislabelled sample > s of a correct one)``, ties counting half, with s_i the score of
    training sample i on itself. Little but the sample itself supports a wrong label, so such a
    sample supports itself more than others do (arXiv 1703.04730, section 5.4).

    Parameters
    ----------
    scores : numbers [n], high where a label is suspicious; or [n, n], scores with the training
        samples themselves, in order, as targets, whose diagonal is taken.
    flipped : bool (or 0 and 1) [n], which labels are wrong.
    confidence, n_boot, seed : of the percentile interval; each resample draws as many wrong and as
        many correct ones as there are, with replacement.

    Raises
    ------
    TypeError, ValueError
        For shapes that don't fit, scores that are not finite, or labels all wrong or all correct.
    """
    function = "mislabel_auc"
    values, wrong = as_numbers(function, "scores", scores), as_mask(function, "flipped", flipped)
    shape = list(values.shape)
    if values.ndim == 2 and values.shape[0] == values.shape[1]:
        values = np.diagonal(values)
    if values.ndim != 1 or wrong.shape != values.shape:
        raise ValueError(
            f"{function}: received scores {shape}, flipped {list(wrong.shape)}; expected [n] or "
            "[n, n], and [n]"
        )
    values = values.astype(np.float64)[:, None]  # [n, 1]
    check_finite(function, "scores", values, "sample")
    bad, good = np.flatnonzero(wrong), np.flatnonzero(~wrong)
    if not len(bad) or not len(good):
        raise ValueError(
            f"{function}: received {len(bad)} wrong labels of {len(wrong)}; expected some wrong "
            "and some correct ones"
        )
    check_sampling(function, confidence, n_boot, seed)
    ranks, rng, n = WeightedRanks(values), np.random.default_rng(seed), len(values)

    def area(counts: npt.NDArray[np.int64]) -> float:
        of_bad = float(counts[bad] @ ranks.ranks(counts)[bad, 0])  # Mann-Whitney's rank sum
        return (of_bad / len(bad) - (len(bad) + 1) / 2) / len(good)

    means = np.empty(n_boot)
    for b in tracked(range(n_boot), "bootstrap", n_boot, "sample"):
        drawn = [group[rng.integers(len(group), size=len(group))] for group in (bad, good)]
        means[b] = area(np.bincount(np.concatenate(drawn), minlength=n))
    low, high = percentiles(means, confidence)
    return AUC(area(np.ones(n, np.int64)), low, high, confidence, len(bad), n)


# ---- what can be wrong with what is passed ------------------------------------------------------


def as_numbers(function: str, name: str, values: Any) -> npt.NDArray[Any]:
    """``values`` as a real array, memory-mapped ones unread. Raises TypeError."""
    if isinstance(values, TopScores):
        raise TypeError(
            f"{function}: received the extremes of each target only (TopScores); expected all "
            f"{name}: finalize_scores without top_k returns them"
        )
    if hasattr(values, "detach"):  # a torch tensor
        tensor = values.detach().cpu()
        values = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of unequal lengths
        raise ValueError(f"{function}: received {name} that make no array ({error})") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{function}: received {name} of dtype {array.dtype}; expected real numbers"
        )
    return array


def as_mask(function: str, name: str, values: npt.ArrayLike) -> Mask:
    """``values`` as booleans; 0 and 1 will do. Raises ValueError for anything else."""
    array = as_numbers(function, name, values)
    if array.dtype == bool:
        return array
    odd = (array != 0) & (array != 1)
    if odd.any():
        raise ValueError(
            f"{function}: received {name} with the value {array[odd].flat[0]}; expected bool, or 0 "
            "and 1 (not a list of indices)"
        )
    return array.astype(bool)


def as_indices(function: str, name: str, values: npt.ArrayLike) -> Indices:
    """``values`` as int64 [L]. Raises TypeError or ValueError."""
    array = as_numbers(function, name, values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"{function}: received {name} {list(array.shape)} of dtype {array.dtype}; expected "
            "integers in one dimension"
        )
    return array.astype(np.int64)


def check_places(function: str, name: str, places: Indices, total: int) -> None:
    """Raise ValueError unless ``places`` are some distinct indices below ``total``."""
    wrong = places[(places < 0) | (places >= total)]
    if len(wrong) or not len(places):
        found = f"{name} with {wrong[0]}" if len(wrong) else f"no {name}"
        raise ValueError(f"{function}: received {found}; expected indices from 0 to {total - 1}")
    values, counts = np.unique(places, return_counts=True)
    if len(values) != len(places):
        raise ValueError(
            f"{function}: received {name} with {values[counts > 1][0]} more than once; expected "
            "distinct indices"
        )


def check_sampling(function: str, confidence: float, n_boot: int, seed: int) -> None:
    """Raise ValueError for a bootstrap that can't be."""
    check_confidence(function, confidence)
    for name, value, least in (("n_boot", n_boot, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise ValueError(
                f"{function}: received {name}={value!r}; expected an integer of at least {least}"
            )


def check_confidence(function: str, confidence: float) -> None:
    """Raise ValueError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(
            f"{function}: received confidence={confidence}; expected 0 < confidence < 1"
        )


def check_finite(
    function: str, name: str, values: Floats, row: str, rows: Indices | None = None
) -> None:
    """Raise ValueError, naming the place, unless all of ``values`` [a, b] are finite."""
    finite = np.isfinite(values)
    if not finite.all():
        a, target = np.argwhere(~finite)[0]
        place = f"{row} {a if rows is None else rows[a]}"
        where = f"{place}, target {target}" if values.shape[1] > 1 else place
        raise ValueError(
            f"{function}: received {name} with NaN or inf ({values[a, target]} at {where}; "
            f"{int((~finite).sum())} here); expected finite values"
        )


def row_blocks(
    function: str, scores: npt.NDArray[Any], columns: Indices | None = None
) -> Iterator[tuple[slice, Floats]]:
    """(rows, scores[rows] or its ``columns`` as float64), some BLOCK_BYTES at a time, finite."""
    n, m = scores.shape
    step = max(1, BLOCK_BYTES // (8 * max(1, m)))
    with progress("reading scores", n, "sample") as bar:
        for begin in range(0, n, step):
            rows = slice(begin, min(begin + step, n))
            part = scores[rows] if columns is None else scores[rows][:, columns]
            block = np.asarray(part, np.float64)
            check_finite(function, "scores", block, "sample", np.arange(rows.start, rows.stop))
            yield rows, block
            bar.update(len(block))
