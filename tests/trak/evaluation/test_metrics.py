"""Every metric against scipy, scikit-learn or a plain loop."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from fastproj.trak import lds, noise_ceiling
from fastproj.trak.evaluation import correlation, metrics
from fastproj.trak.evaluation.correlation import METHODS, WeightedRanks, rank_correlation, spearman
from fastproj.trak.evaluation.metrics import (
    brittleness,
    loo_correlation,
    mislabel_auc,
    most_helpful,
)
from fastproj.trak.store.scores import TopScores


def test_spearman_is_scipys_also_with_ties():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).round(1)
    y = (x + rng.normal(size=(40, 6))).round(1)
    x[:, 4] = rng.integers(0, 2, 40)
    ours = spearman(x, y)
    scipys = [stats.spearmanr(x[:, j], y[:, j]).statistic for j in range(6)]
    np.testing.assert_allclose(ours, scipys, atol=1e-12)


def test_a_constant_column_has_no_correlation():
    x = np.stack([np.arange(5.0), np.ones(5)], 1)
    np.testing.assert_array_equal(spearman(x, x), [1.0, np.nan])


def test_a_column_with_a_nan_has_no_correlation():
    x = np.arange(15.0).reshape(5, 3)
    found = [spearman(holed(x, (2, 0)), x), spearman(x, holed(x, (2, 1)))]
    np.testing.assert_array_equal(found, [[np.nan, 1, 1], [1, np.nan, 1]])


def test_weighted_ranks_are_the_ranks_of_repeated_rows():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 30, 4)).round(1)
    counts = rng.multinomial(30, np.full(30, 1 / 30))
    a, b = np.repeat(x, counts, 0), np.repeat(y, counts, 0)
    ranks = WeightedRanks(x).ranks(counts)
    np.testing.assert_allclose(np.repeat(ranks, counts, 0), stats.rankdata(a, axis=0), atol=1e-12)
    scipys = [stats.spearmanr(a[:, j], b[:, j]).statistic for j in range(4)]
    np.testing.assert_allclose(
        rank_correlation(ranks, WeightedRanks(y).ranks(counts), counts), scipys, atol=1e-12
    )


def example(noise, seed=0, n=50, m=8, subsets=80):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, m))
    masks = rng.random((subsets, n)) < 0.5
    outputs = masks @ scores + noise * rng.normal(size=(subsets, m))
    return scores, masks, outputs


def test_lds_is_the_mean_of_scipys_correlations():
    scores, masks, outputs = example(noise=5.0)
    result = lds(scores.astype(np.float32), masks, outputs)
    predicted = masks @ scores.astype(np.float32).astype(np.float64)
    scipys = [stats.spearmanr(predicted[:, j], outputs[:, j]).statistic for j in range(8)]
    np.testing.assert_allclose(result.per_target, scipys, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(scipys))
    assert result.low < result.mean < result.high
    assert (result.n_subsets, result.confidence) == (80, 0.95)
    assert f"LDS {result.mean:.3f} (95% CI" in str(result)


def test_perfect_scores_have_lds_one_and_random_ones_none():
    scores, masks, outputs = example(noise=0.0)
    assert lds(scores, masks, outputs).mean == pytest.approx(1.0)
    other = np.random.default_rng(9).normal(size=scores.shape)
    result = lds(other, masks, outputs)
    assert result.low < 0 < result.high


def test_interval_is_that_of_resampled_tables():
    """The same resamples, made with repeated rows and scipy."""
    scores, masks, outputs = example(noise=5.0, m=4, subsets=30)
    result = lds(scores, masks, outputs, n_boot=20, seed=3, confidence=0.8)
    rng = np.random.default_rng(3)
    predicted, means = masks @ scores, []
    for _ in range(20):
        rows = rng.integers(30, size=30)
        columns = rng.integers(4, size=4)
        means.append(
            np.mean(
                [stats.spearmanr(predicted[rows, j], outputs[rows, j]).statistic for j in columns]
            )
        )
    np.testing.assert_allclose([result.low, result.high], np.percentile(means, [10, 90]))


def test_ceiling_of_known_noise():
    """Pearson reliability of R noisy runs; normal data, so rank correlation is close to it."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(1, 4000, 3))
    runs = signal + rng.normal(size=(4, 4000, 3))
    r = 6 / np.pi * np.arcsin(0.5 / 2)  # Spearman's rho of a normal pair with correlation 0.5
    assert noise_ceiling(runs) == pytest.approx(np.sqrt(4 * r / (1 + 3 * r)), abs=0.02)
    assert noise_ceiling(np.broadcast_to(signal, (2, 4000, 3))) == pytest.approx(1.0)
    assert np.isnan(noise_ceiling(np.ones((2, 5, 3))))


def test_memory_mapped_scores_are_read_in_blocks(tmp_path, monkeypatch):
    """A file of 16 MB, read with less than a quarter of that; the result is the in-memory one."""
    rng = np.random.default_rng(0)
    n, m = 100_000, 40
    path = tmp_path / "scores.npy"
    np.save(path, rng.normal(size=(n, m)).astype(np.float32))
    masks = rng.random((5, n)) < 0.5
    outputs = rng.normal(size=(5, m))
    expected = lds(np.load(path), masks, outputs, n_boot=5)
    best = np.argsort(-np.load(path), axis=0, kind="stable")[:7].T
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 1 << 19)
    mapped = np.load(path, mmap_mode="r")
    tracemalloc.start()
    try:
        found = lds(mapped, masks, outputs, n_boot=5)
        helpful = most_helpful(mapped, 7)
        assert tracemalloc.get_traced_memory()[1] < mapped.nbytes / 4
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found.per_target, expected.per_target)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    np.testing.assert_array_equal(helpful, best)


def test_interval_does_not_depend_on_blocks_of_targets(monkeypatch):
    scores, masks, outputs = example(noise=5.0)
    expected = lds(scores, masks, outputs, n_boot=30)
    monkeypatch.setattr(correlation, "BLOCK_BYTES", 3 * 100 * 80)
    found = lds(scores, masks, outputs, n_boot=30)
    np.testing.assert_array_equal(found.per_target, expected.per_target)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_targets_without_a_correlation_are_left_out():
    """Equal scores predict the same for all subsets of one size, whatever rounding makes of it."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(1000, 8))
    masks = np.stack([rng.permutation(np.arange(1000) < 500) for _ in range(40)])
    outputs = masks @ scores + rng.normal(size=(40, 8))
    scores[:, 0], outputs[:, 1] = 0.1, 3.0
    result = lds(scores, masks, outputs)
    assert np.isnan(result.per_target).tolist() == [True, True] + 6 * [False]
    assert result.mean == pytest.approx(result.per_target[2:].mean())
    assert np.isfinite([result.low, result.high]).all()
    nothing = lds(scores[:, :2], masks, outputs[:, :2])
    assert np.isnan([nothing.mean, nothing.low, nothing.high]).all()


def test_masks_and_scores_in_any_reasonable_dress():
    scores, masks, outputs = example(noise=5.0)
    expected = lds(scores.astype(np.float32), masks, outputs, n_boot=3)
    dressed = lds(
        torch.tensor(scores, requires_grad=True).float(),
        masks.astype(int).tolist(),
        torch.tensor(outputs),
        n_boot=3,
    )
    np.testing.assert_array_equal(dressed.per_target, expected.per_target)
    rounded = torch.tensor(scores).bfloat16()
    np.testing.assert_array_equal(
        lds(rounded, masks, outputs, n_boot=3).per_target,
        lds(rounded.float().numpy(), masks, outputs, n_boot=3).per_target,
    )


# ---- leave one out ------------------------------------------------------------------------------

SCIPYS = {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}


@pytest.mark.parametrize("method", METHODS)
def test_correlations_are_scipys_of_repeated_rows(method):
    """With ties, a constant column, and a resample in which another one becomes constant."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 30, 5)).round(1)
    x[:, 3], y[:29, 4] = 0.3, 0.7
    counts = rng.multinomial(30, np.append(np.full(29, 1 / 29), 0))
    ours = METHODS[method](x, y).at(counts)
    a, b = np.repeat(x, counts, 0), np.repeat(y, counts, 0)
    scipys = [SCIPYS[method](a[:, j], b[:, j]).statistic for j in range(3)]
    np.testing.assert_allclose(ours[:3], scipys, atol=1e-12)
    assert np.isnan(ours[3:]).all()


@pytest.mark.parametrize("method", METHODS)
def test_leave_one_out_correlation(method):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 6)).round(1).astype(np.float32)
    removed = rng.permutation(40)[:15]
    outputs = 3.0 - scores[removed] + 0.5 * rng.normal(size=(15, 6))
    result = loo_correlation(scores, removed, outputs, method=method, n_boot=40, seed=2)
    effect = 3.0 - outputs  # of having the sample
    naive = [
        SCIPYS[method](scores[removed, t].astype(float), effect[:, t]).statistic for t in range(6)
    ]
    np.testing.assert_allclose(result.per_target, naive, atol=1e-12)
    assert result.mean == pytest.approx(np.mean(naive))
    assert result.low < result.mean < result.high
    assert f"leave-one-out {method} correlation {result.mean:.3f} (95% CI" in str(result)
    assert result.n_removed == 15


def test_leaving_one_out_is_an_lds_of_such_subsets():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 4))
    outputs = -scores + 0.5 * rng.normal(size=(20, 4))
    found = loo_correlation(scores, np.arange(20), outputs, n_boot=30, seed=1)
    same = lds(scores, ~np.eye(20, dtype=bool), outputs, n_boot=30, seed=1)
    np.testing.assert_allclose(found.per_target, same.per_target, atol=1e-12)
    assert (found.low, found.high) == pytest.approx((same.low, same.high))


# ---- brittleness --------------------------------------------------------------------------------


def test_brittleness_is_a_count_of_flips():
    rng = np.random.default_rng(0)
    outputs, base = rng.normal(size=(3, 4, 30)), rng.normal(size=(2, 30)) + 0.5
    outputs[:, 0, 0], base[:, 0] = 0.0, 1.0  # 0 is not positive
    removed = [1, 5, 10, 20]
    result = brittleness(outputs, base, removed, confidence=0.9)
    right = [t for t in range(30) if (base[0, t] + base[1, t]) / 2 > 0]
    for k in range(4):
        flips = sum(outputs[:, k, t].mean() <= 0 for t in right)
        assert result.flipped[k] == pytest.approx(flips / len(right))
        interval = stats.binomtest(flips, len(right)).proportion_ci(0.9, method="wilson")
        assert (result.low[k], result.high[k]) == pytest.approx((interval.low, interval.high))
    assert result.n_targets == len(right) < 30
    smallest = result.smallest()
    for t in range(30):
        flips = [count for k, count in enumerate(removed) if outputs[:, k, t].mean() <= 0]
        if t in right:
            assert smallest[t] == min(flips, default=np.inf)
        else:
            assert np.isnan(smallest[t])
    assert f"5 removed: {result.flipped[1]:.1%} flipped (90% CI" in str(result)
    once = brittleness(outputs[0], base[0], removed)
    np.testing.assert_array_equal(once.per_target[:, base[0] > 0], outputs[0][:, base[0] > 0] <= 0)


@pytest.mark.parametrize("block", [8, 800, 1 << 20])
def test_most_helpful_samples_in_order(monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", block)
    rng = np.random.default_rng(0)
    scores = rng.integers(-5, 5, (60, 6)).astype(np.float32)  # many ties
    expected = np.argsort(-scores, axis=0, kind="stable")[:9].T
    np.testing.assert_array_equal(most_helpful(scores, 9), expected)
    np.testing.assert_array_equal(most_helpful(scores, 9, [4, 1]), expected[[4, 1]])


# ---- the extremes of each target ----------------------------------------------------------------


def top_scores(scores, count):
    order = np.argsort(-scores, axis=0, kind="stable").T
    sides = {"helpful": order[:, :count], "harmful": order[:, ::-1][:, :count]}
    return TopScores(
        **{f"{side}_indices": inds for side, inds in sides.items()},
        **{f"{side}_scores": np.take_along_axis(scores.T, inds, 1) for side, inds in sides.items()},
        train_set_size=len(scores),
    )


@pytest.mark.parametrize("count", [5, 25, 30, 50])
def test_lds_of_extremes_counts_the_others_as_zero(count):
    """From 26 on, helpful and harmful ones overlap; none may count twice."""
    scores, masks, outputs = example(noise=5.0)
    kept = np.zeros_like(scores)
    for t, column in enumerate(scores.T):
        order = np.argsort(column)
        for i in {*order[:count], *order[-count:]}:
            kept[i, t] = column[i]
    found = lds(top_scores(scores, count), masks, outputs, n_boot=20)
    expected = lds(kept, masks, outputs, n_boot=20)
    np.testing.assert_allclose(found.per_target, expected.per_target, atol=1e-12)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_most_helpful_of_extremes():
    top = top_scores(SCORES, 7)
    np.testing.assert_array_equal(most_helpful(top, 4, [6, 0]), most_helpful(SCORES, 4, [6, 0]))
    with pytest.raises(ValueError, match=r"count=8 with the 7 highest.*top_k=8"):
        most_helpful(top, 8)
    with pytest.raises(ValueError, match="targets with 8"):
        most_helpful(top, 2, [8])


def test_extremes_are_not_enough_for_the_rest():
    top = top_scores(SCORES, 5)
    for call in (
        lambda: loo_correlation(top, [1, 2, 3], OUTPUTS[:3]),
        lambda: mislabel_auc(top, MASKS[0]),
    ):
        with pytest.raises(TypeError, match=r"extremes of each target only .* without top_k"):
            call()
    with pytest.raises(ValueError, match=r"scores \[50, 8\], masks \[80, 49\]"):
        lds(top, MASKS[:, 1:], OUTPUTS)


# ---- mislabelled samples ------------------------------------------------------------------------


def test_mislabel_auc_is_sklearns_also_with_ties():
    rng = np.random.default_rng(0)
    flipped = rng.random(200) < 0.2
    scores = (rng.normal(size=200) + flipped).round(1)
    result = mislabel_auc(scores, flipped, n_boot=30, seed=5, confidence=0.8)
    assert result.mean == pytest.approx(roc_auc_score(flipped, scores))
    rng = np.random.default_rng(5)
    bad, good = np.flatnonzero(flipped), np.flatnonzero(~flipped)
    areas = []
    for _ in range(30):
        rows = [group[rng.integers(len(group), size=len(group))] for group in (bad, good)]
        chosen = np.concatenate(rows)
        areas.append(roc_auc_score(flipped[chosen], scores[chosen]))
    np.testing.assert_allclose([result.low, result.high], np.percentile(areas, [10, 90]))
    assert str(result).endswith(f"; {len(bad)} of 200 labels wrong)")


def test_mislabel_auc_of_a_square_of_scores_is_that_of_its_diagonal(tmp_path):
    rng = np.random.default_rng(0)
    square, flipped = rng.normal(size=(50, 50)).astype(np.float32), rng.random(50) < 0.3
    np.save(tmp_path / "square.npy", square)
    mapped = np.load(tmp_path / "square.npy", mmap_mode="r")
    assert mislabel_auc(mapped, flipped, n_boot=3) == mislabel_auc(
        np.diag(square), flipped.astype(int), n_boot=3
    )


# ---- bad input ----------------------------------------------------------------------------------

SCORES, MASKS, OUTPUTS = example(noise=1.0)


def holed(values, place, value=np.nan):
    values = values.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lds(SCORES, MASKS[:, 1:], OUTPUTS), r"scores \[50, 8\], masks \[80, 49\]"),
        (lambda: lds(SCORES[:, 0], MASKS, OUTPUTS), r"scores \[50\]"),
        (lambda: lds(SCORES[:, :0], MASKS, OUTPUTS[:, :0]), r"scores \[50, 0\]"),
        (lambda: lds(SCORES, MASKS[:2], OUTPUTS[:2]), "2 subsets; expected at least 3"),
        (
            lambda: lds(SCORES, MASKS, holed(OUTPUTS, (3, 2))),
            "outputs with NaN.*subset 3, target 2",
        ),
        (lambda: lds(holed(SCORES, (7, 1), np.inf), MASKS, OUTPUTS), "inf at sample 7, target 1"),
        (lambda: lds(SCORES, 2 * MASKS, OUTPUTS), "masks with the value 2; expected bool"),
        (lambda: lds(SCORES, MASKS * np.nan, OUTPUTS), "masks with the value nan"),
        (lambda: lds(SCORES + 1j, MASKS, OUTPUTS), "scores of dtype complex128"),
        (lambda: lds([["a"]], MASKS, OUTPUTS), "scores of dtype <U1"),
        (lambda: lds([[1, 2], [3]], MASKS, OUTPUTS), "scores that make no array"),
        (lambda: lds(SCORES, MASKS, OUTPUTS, confidence=95), "confidence=95; expected 0 <"),
        (lambda: lds(SCORES, MASKS, OUTPUTS, n_boot=0), "n_boot=0"),
        (lambda: lds(SCORES, MASKS, OUTPUTS, n_boot=1.5), "n_boot=1.5"),
        (lambda: lds(SCORES, MASKS, OUTPUTS, seed=-1), "seed=-1"),
        (lambda: noise_ceiling(OUTPUTS), "runs >= 2"),
        (lambda: noise_ceiling(OUTPUTS[None].repeat(2, 0)[:, :2]), r"\[2, 2, 8\]; expected"),
        (lambda: noise_ceiling(holed(OUTPUTS[None].repeat(2, 0), (1, 4, 0))), "subset 4, target 0"),
        (lambda: loo_correlation(SCORES, [1, 2, 3], OUTPUTS), r"3 removed, outputs \[80, 8\]"),
        (lambda: loo_correlation(SCORES, [1, 2], OUTPUTS[:2]), "2 removed samples"),
        (lambda: loo_correlation(SCORES, [1, 2, 1], OUTPUTS[:3]), "removed with 1 more than once"),
        (lambda: loo_correlation(SCORES, [1, 2, 50], OUTPUTS[:3]), "removed with 50; expected"),
        (lambda: loo_correlation(SCORES, [1, 2, -1], OUTPUTS[:3]), "removed with -1"),
        (lambda: loo_correlation(SCORES, [1.0, 2, 3], OUTPUTS[:3]), "removed .* float64"),
        (lambda: loo_correlation(SCORES, MASKS[0], OUTPUTS[:3]), "removed .* bool"),
        (
            lambda: loo_correlation(holed(SCORES, (2, 5)), [9, 2, 3], OUTPUTS[:3]),
            "sample 2, target 5",
        ),
        (
            lambda: loo_correlation(SCORES, [9, 2, 3], holed(OUTPUTS[:3], (1, 5))),
            "outputs .* removed sample 2, target 5",
        ),
        (
            lambda: loo_correlation(SCORES, [1, 2, 3], OUTPUTS[:3], method="cosine"),
            "method='cosine'; expected one of spearman, pearson, kendall",
        ),
        (lambda: brittleness(OUTPUTS, OUTPUTS[0], [1, 2]), r"outputs \[80, 8\], base \[8\], 2"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[0, :5], [1, 2]), r"base \[5\]"),
        (lambda: brittleness(OUTPUTS[0], OUTPUTS[0], [1]), r"outputs \[8\]"),
        (lambda: brittleness(OUTPUTS[:0], OUTPUTS[0], []), "expected"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[:0], [1, 2]), r"base \[0, 8\]"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[None, :8], [1, 2]), r"base \[1, 8, 8\]"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[0], [1, 1]), r"removed=\[1, 1\]"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[0], [2, 1]), r"removed=\[2, 1\]; expected asc"),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[0], [0, 1]), r"removed=\[0, 1\]"),
        (lambda: brittleness(OUTPUTS[:2], -abs(OUTPUTS[0]), [1, 2]), "no target is right"),
        (
            lambda: brittleness(holed(OUTPUTS[:2], (1, 3)), OUTPUTS[0], [1, 2]),
            "removal 1, target 3",
        ),
        (lambda: brittleness(OUTPUTS[:2], OUTPUTS[0], [1, 2], confidence=0), "confidence=0"),
        (lambda: most_helpful(SCORES, 51), "count=51; expected 1 <= count <= n = 50"),
        (lambda: most_helpful(SCORES, 0), "count=0"),
        (lambda: most_helpful(SCORES[0], 1), r"scores \[8\]"),
        (lambda: most_helpful(SCORES, 1, [8]), "targets with 8; expected indices from 0 to 7"),
        (lambda: most_helpful(SCORES, 1, []), "no targets"),
        (lambda: most_helpful(holed(SCORES, (7, 1)), 2), "sample 7, target 1"),
        (lambda: mislabel_auc(SCORES, MASKS[0]), r"scores \[50, 8\], flipped \[50\]"),
        (lambda: mislabel_auc(SCORES[:, 0], MASKS[0, 1:]), r"flipped \[49\]"),
        (lambda: mislabel_auc(SCORES[:, 0], np.zeros(50, bool)), "0 wrong labels of 50"),
        (lambda: mislabel_auc(SCORES[:, 0], np.ones(50, bool)), "50 wrong labels of 50"),
        (lambda: mislabel_auc(holed(SCORES[:, 0], 7), MASKS[0]), r"nan at sample 7;"),
        (lambda: mislabel_auc(SCORES[:, 0], np.arange(50)), "flipped with the value 2"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
