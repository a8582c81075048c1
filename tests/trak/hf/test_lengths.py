"""Which samples share a batch, and how long they are padded."""

from __future__ import annotations

import numpy as np
import pytest

from fastproj.trak.hf.lengths import LEAST, padded_lengths, padded_shapes, plan_batches, rounded


def test_lengths_are_rounded_to_two_an_octave():
    found = sorted({rounded(length) for length in range(1, 513)})
    assert found == [8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    for length in range(1, 3000):
        assert rounded(length) >= length
        assert rounded(length) <= max(1.5 * length, 16)
        assert rounded(rounded(length)) == rounded(length)


def test_no_sample_is_padded_longer_than_the_longest():
    """A model may have no positions for more."""
    assert padded_lengths([3, 10, 10]) == [10, 10, 10]
    assert max(padded_lengths(list(range(1, 514)))) == 513


def test_rare_lengths_are_joined_with_the_next():
    lengths = [5] * LEAST + [12] * (LEAST - 1) + [20] * 3 + [60] * LEAST
    found = padded_lengths(lengths)
    assert found == [8] * LEAST + [24] * (LEAST - 1 + 3) + [60] * LEAST


def test_two_lengths_are_padded_by_the_first():
    draw = np.random.default_rng(0)
    lengths = list(zip(draw.integers(1, 200, 900), draw.integers(1, 50, 900), strict=True))
    shapes = padded_shapes(lengths)
    assert all(a <= x and b <= y for (a, b), (x, y) in zip(lengths, shapes, strict=True))
    assert len(set(shapes)) <= len(lengths) / LEAST + len({x for x, _ in shapes})


@pytest.mark.parametrize("batch_size", [1, 7, 16])
def test_every_sample_is_in_one_batch_of_its_shape(batch_size):
    draw = np.random.default_rng(0)
    lengths = [(int(n),) for n in draw.integers(1, 100, 500)]
    shapes = padded_shapes(lengths)
    planned = plan_batches(shapes, lengths, batch_size)
    assert sorted(index for batch in planned for index in batch) == list(range(500))
    assert all(len({shapes[index] for index in batch}) == 1 for batch in planned)
    assert max(map(len, planned)) <= batch_size
    sizes = {(shapes[batch[0]], len(batch)) for batch in planned}
    assert len(sizes) <= 2 * len(set(shapes))  # full batches, and the last of a shape
    longest = [shapes[batch[0]] for batch in planned]
    assert longest == sorted(longest, reverse=True)
    for batch in planned:  # what the hooks try has padding where any has
        assert lengths[batch[0]] == min(lengths[index] for index in batch)
