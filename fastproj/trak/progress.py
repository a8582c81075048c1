"""The progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0

logger = logging.getLogger("fastproj.trak")

Item = TypeVar("Item")


class ProgressLines:
    """What ``tqdm`` does, as lines a minute apart: of the logger "fastproj.trak", or on standard
    error where logging is not set up.

    Work that takes less than a minute writes no line.

    Parameters
    ----------
    what : the work, such as "scoring".
    total : how many units it has.
    unit : of what is counted, in the singular.
    initial : how many are done already.
    """

    def __init__(self, what: str, total: int, unit: str, initial: int = 0) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.n = self.initial = initial
        self._start = self._said = time.monotonic()

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.n += count
        now = time.monotonic()
        if now - self._said < SECONDS_BETWEEN_LINES:
            return
        self._said = now
        spent = now - self._start
        left = spent * max(self.total - self.n, 0) / max(self.n - self.initial, 1)
        line = (
            f"{self.what}: {self.n:,} of {self.total:,} {self.unit}s after "
            f"{tqdm.format_interval(spent)}, about {tqdm.format_interval(left)} left"
        )
        if logger.hasHandlers():
            logger.info(line)
        elif logger.isEnabledFor(logging.INFO):
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing is left to do."""


def progress(what: str, total: int, unit: str, initial: int = 0) -> Any:
    """A progress bar where standard error is a terminal, lines in the log elsewhere.

    It has ``update(count)``, and is a context.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return tqdm(
            desc=what, total=total, initial=initial, unit=unit, unit_scale=True, leave=False
        )
    return ProgressLines(what, total, unit, initial)


def tracked(items: Iterable[Item], what: str, total: int, unit: str) -> Iterator[Item]:
    """The items, with their progress."""
    with progress(what, total, unit) as bar:
        for item in items:
            yield item
            bar.update(1)
