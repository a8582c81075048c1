"""The LDS against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fastproj.trak import lds, noise_ceiling
from fastproj.trak.correlation import WeightedRanks, rank_correlation, spearman


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


def test_bad_tables_are_refused():
    scores, masks, outputs = example(noise=1.0)
    with pytest.raises(ValueError, match=r"scores \[50, 8\], masks \[80, 49\]"):
        lds(scores, masks[:, 1:], outputs)
    with pytest.raises(ValueError, match="2 subsets"):
        lds(scores, masks[:2], outputs[:2])
    outputs[0, 0] = np.nan
    with pytest.raises(ValueError, match="outputs with NaN"):
        lds(scores, masks, outputs)
    with pytest.raises(ValueError, match="R >= 2"):
        noise_ceiling(outputs)
