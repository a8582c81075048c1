"""What a provider is given, and what it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.battery.problem import Batch, Problem
from bench.battery.training import Checkpoint

Floats = npt.NDArray[np.floating[Any]]

BATCH = 250  # training samples at once


class Unsupported(Exception):
    """This provider can't take this problem, or isn't installed; the message says which."""


@dataclass(frozen=True)
class Job:
    """Scores that are wanted: of each M checkpoints in a row, for each M of ``counts``.

    proj_dim, kind : of the random matrix, for providers that project.
    folder : an empty one.
    """

    problem: Problem
    checkpoints: Sequence[Checkpoint]
    counts: Sequence[int]
    proj_dim: int
    kind: str
    folder: str

    def batches(self) -> Iterator[Batch]:
        """The training samples in order, BATCH at a time."""
        samples = self.problem.samples
        for start in range(0, self.problem.n, BATCH):
            yield tuple(part[start : start + BATCH] for part in samples)

    def groups(self, count: int) -> Iterator[range]:
        """The checkpoints of each group of ``count``; what is left over is in none."""
        for start in range(0, len(self.checkpoints) - count + 1, count):
            yield range(start, start + count)

    def means(self, values: Iterable[list[Floats]]) -> Iterator[tuple[int, list[Floats]]]:
        """(M, means over a group of M) of the arrays that each checkpoint has, in order."""
        sums: dict[int, list[Floats]] = {}
        for done, arrays in enumerate(values, start=1):
            for count in self.counts:
                before = sums.pop(count, None)
                total = arrays if before is None else list(map(np.add, before, arrays))
                if done % count:
                    sums[count] = total
                else:
                    yield count, [array / count for array in total]


@dataclass(frozen=True)
class Found:
    """Scores of a provider with a group of ``checkpoints`` checkpoints.

    provider : its name in the tables; those of a sweep share one.
    setting : the value of its parameter, where it has one.
    scores : [n, m]; NaN or inf where it has none.
    own : [n], the score of each training sample on itself; None where it says nothing.
    details : for the result file.
    """

    provider: str
    checkpoints: int
    scores: Floats
    own: Floats | None = None
    setting: float | None = None
    details: dict[str, Any] | None = None
