"""A small ground truth, trained by a process that kills itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from fastproj.trak.evaluation.retrain import random_subsets, train_subsets


def main(recipe: Path, directory: Path, log: Path, die_at: int) -> None:
    """Train it, with SIGKILL at moment ``die_at`` (0: never).

    Moments are counted around writes: before a flush, before a rename, after it. At the end,
    ``log`` gets the number of moments.
    """
    moments = 0

    def maybe_die() -> None:
        nonlocal moments
        moments += 1
        if moments == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync, replace = os.fsync, os.replace

    def dying_fsync(descriptor: int) -> None:
        maybe_die()
        fsync(descriptor)

    def dying_replace(source: Path, target: Path) -> None:
        maybe_die()
        replace(source, target)
        maybe_die()

    os.fsync, os.replace = dying_fsync, dying_replace
    truth = train_subsets(recipe, random_subsets(24, 8), directory, repeats=2)
    truth.save(directory.parent / "truth.npz")
    log.write_text(str(moments))
