"""Which rows of the Fisher matrix are drawn, and by which random numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.checks import check_integer
from fastproj.spec import philox4x32_10
from fastproj.trak.files import Indices
from fastproj.trak.inputs import MAX_SAMPLES

RUNS = 16, 64  # neighbouring samples get their rows together, in runs: few batches are split.
LEAST_RUNS = 16  # There are at least so many runs before they get longer.
PER_DIM = 2  # samples that rows are drawn for, for each dimension of the features
MAX_DRAWS = 1 << 16  # of a sample: what the counter of their random numbers has room for
MOST_POWER = 1.0  # of sizes: beyond, one parameter would be all
DESCRIBED = re.compile(
    r"fisher, (\d+) row\(s\) drawn for (\d+) of (\d+) samples(?:, (\d+) at a time)?"
)
SALT = 0x46697368  # of random numbers for drawing: not those of the projection
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Fisher:
    """The Fisher matrix of the labels' likelihood as the curvature: how many rows of it are drawn.

    Parameters
    ----------
    samples : m, the number of training samples that get drawn rows, rounded up to whole runs of 16
        to 64 neighbours (one run is shorter where n is no multiple); None is ``min(n, 2 k)``. All n
        samples have a row that isn't drawn.
    draws : d, the number of rows drawn for each of these m.
    size_power : a, -1 <= a <= 1; gradients by a parameter of P entries are multiplied by
        ``(P / largest P)^a`` before they are projected, so that inner products are taken in this
        metric. None is the task's ``size_power``.
    """

    samples: int | None = None
    draws: int = 1
    size_power: float | None = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            self._set("samples", MAX_SAMPLES, "an integer, or None")
        self._set("draws", MAX_DRAWS, "an integer")
        power = self.size_power
        if power is not None and not (is_number(power) and abs(power) <= MOST_POWER):
            raise ValueError(
                f"Fisher: received size_power={power!r}; expected a number from {-MOST_POWER:g} to "
                f"{MOST_POWER:g} (0: gradients as they are), or None"
            )

    def _set(self, name: str, high: int, expected: str) -> None:
        """Check an integer and keep it as an int: NumPy's overflow, and have no bit_length."""
        value = check_integer("Fisher", name, getattr(self, name), 1, high, expected)
        object.__setattr__(self, name, value)

    def of(self, task: Any) -> Fisher:
        """With the size_power of the task, where none was given."""
        power = getattr(task, "size_power", 0.0) if self.size_power is None else self.size_power
        return replace(self, size_power=float(power))


def is_number(value: Any) -> bool:
    """Whether it is a number, but for True and False."""
    return isinstance(value, float | int | np.number) and not isinstance(value, bool)


class Draws:
    """Which rows of the Fisher matrix are drawn: a function of the seed and the sample alone.

    Parameters
    ----------
    n : the number of training samples.
    proj_dim : k.
    fisher : what was asked for.
    seed : 0 <= seed < 2^64.
    """

    def __init__(self, n: int, proj_dim: int, fisher: Fisher, seed: int) -> None:
        self.n = n
        self.draws = fisher.draws
        self.key = (seed & MASK) ^ SALT, seed >> 32
        wanted = min(n, PER_DIM * proj_dim if fisher.samples is None else fisher.samples)
        least, most = RUNS
        self.run = min(max(1 << (wanted // LEAST_RUNS).bit_length() >> 1, least), most)
        runs, count = -(-n // self.run), -(-wanted // self.run)
        self._chosen = np.ones(runs, np.bool_)
        self.first, rest = 0, n % self.run
        if count < runs:  # at equal distances, for samples may be sorted; the first one at random
            zero = np.zeros(1, np.uint64)
            (word, other, *_) = philox4x32_10((zero, zero, zero + MASK, zero + MASK), self.key)
            places = (np.arange(count) + float(word[0]) * 2.0**-32) * runs / count
            self._chosen[:] = False
            self._chosen[places.astype(np.int64)] = True
            if rest:  # one run is shorter: any, or the same samples would count more for every seed
                self.first = int(float(other[0]) * 2.0**-32 * n)
        sizes = np.full(runs, self.run)
        sizes[-1] = rest or self.run
        self.count = int(sizes[self._chosen].sum())
        # What the count doesn't tell. (Of defaults with whole runs it does.)
        some = count < runs and (fisher.samples is not None or rest > 0)
        self._runs = f", {self.run} at a time" if some else ""

    def describe(self) -> str:
        """Its text in the store and in the log."""
        of = f"{self.count} of {self.n} samples{self._runs}"
        return f"fisher, {self.draws} row(s) drawn for {of}"

    def chosen(self, inds: Indices) -> npt.NDArray[np.bool_]:
        """Which of the samples ``inds`` [b] rows are drawn for."""
        return self._chosen[(inds - self.first) % self.n // self.run]

    def rows(self, inds: Indices) -> Indices:
        """The numbers of the rows of samples ``inds`` [b], int64 [b, d]."""
        return inds[:, None] * self.draws + np.arange(self.draws)

    def noise(self, model_id: int, inds: Indices, predictions: int, some: bool = True) -> Tensor:
        """The random numbers of ``likelihood_terms`` for samples ``inds`` [b]: [b, d, T, 3].

        Those of a prediction depend on its number, and on nothing else in the batch. ``some``
        False: d is 0.
        """
        draws = self.draws if some else 0
        if not draws:
            return torch.empty(len(inds), 0, predictions, 3, dtype=torch.float32, device="cpu")
        numbers = inds.astype(np.uint64)[:, None, None]
        place = np.arange(predictions, dtype=np.uint64)
        draw = np.arange(draws, dtype=np.uint64)[:, None]
        high = (numbers >> np.uint64(32) << np.uint64(16)) | draw
        words = philox4x32_10((numbers & MASK, place, high, np.uint64(model_id)), self.key)
        noise = np.empty((*words.shape[1:], 3), np.float32)
        noise[..., 0] = ((words[0] >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
        for place_of_sign in (1, 2):
            noise[..., place_of_sign] = 1.0 - 2.0 * (words[place_of_sign] & np.uint64(1))
        return torch.from_numpy(noise)


def settings_of(stored: Mapping[str, Any]) -> Fisher | None:
    """What ``Draws`` was made with that a store's metadata are of; None where that isn't known."""
    found = DESCRIBED.fullmatch(str(stored["curvature"]))
    if found is None:
        return None
    draws, count, n = map(int, found.groups()[:3])
    run = int(found[4] or 1)
    runs = -(-count // run)
    # The length of runs grows with the number of samples: one of the ends has that of the others.
    for samples in (None, count, (runs - 1) * run + 1, runs * run):
        fisher = Fisher(samples, draws, stored["size_power"])
        made = Draws(n, stored["proj_dim"], fisher, stored["seed"])
        if made.describe() == stored["curvature"]:
            return fisher
    return None
