"""Which samples share a batch, and how long they are padded.

The hooks check the first batch of every shape (docs/gradients.md), so there are few lengths. How
long a sample is padded depends on the data set alone, not on the batch: what a sample holds stays
the same with another batch size, after a restart and in several processes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

LEAST = 64  # samples of a length; fewer are padded to the next
SHORTEST = 8  # tokens


def rounded(length: int) -> int:
    """The next of 8, 16, 24, 32, 48, 64, 96, 128, 192 ...: from 16 on, two lengths an octave."""
    if length <= 2 * SHORTEST:
        return SHORTEST if length <= SHORTEST else 2 * SHORTEST
    quarter = 1 << (math.ceil(math.log2(length)) - 2)
    return 3 * quarter if length <= 3 * quarter else 4 * quarter


def padded_lengths(lengths: Sequence[int]) -> list[int]:
    """How long each sample of a data set is padded; none longer than the longest sample.

    Lengths that fewer than LEAST samples have are joined with the next longer one.
    """
    longest = max(lengths)
    counts = Counter(min(rounded(length), longest) for length in lengths)
    edges, waiting = [], 0
    for edge in sorted(counts):
        waiting += counts[edge]
        if waiting >= LEAST or edge == max(counts):
            edges.append(edge)
            waiting = 0
    return [edges[bisect_left(edges, length)] for length in lengths]


def padded_shapes(lengths: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The same of samples with several lengths, such as a source's and a target's: the second is
    that of the samples that are alike in the first.
    """
    if not lengths or not lengths[0]:
        return [()] * len(lengths)
    firsts = padded_lengths([length[0] for length in lengths])
    shapes: list[tuple[int, ...]] = [()] * len(lengths)
    for first in set(firsts):
        alike = [index for index, other in enumerate(firsts) if other == first]
        rest = padded_shapes([lengths[index][1:] for index in alike])
        for index, others in zip(alike, rest, strict=True):
            shapes[index] = (first, *others)
    return shapes


def plan_batches(
    shapes: Sequence[tuple[int, ...]], lengths: Sequence[tuple[int, ...]], batch_size: int
) -> list[list[int]]:
    """The numbers of the samples of each batch; all of a batch are padded alike.

    The longest come first: memory that doesn't suffice shows at once. Within a batch the shortest
    come first: the hooks try the first sample by itself, and transformers leaves out the mask of
    samples without padding, so that sample must have padding if any has.
    """
    order = sorted(range(len(shapes)), key=lambda i: ([-n for n in shapes[i]], lengths[i], i))
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else []
        if not last or len(last) == batch_size or shapes[last[0]] != shapes[index]:
            batches.append([index])
        else:
            last.append(index)
    return batches
