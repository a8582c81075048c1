"""What gives scores: one file each.

A provider is a function of a ``Job`` that yields ``Found``: for each group of checkpoints, scores
[n, m] of the training samples for the targets and, where it has one, the score of each sample on
itself. One that has a parameter yields the scores at each value of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.battery.providers import bm25, cosine, ekfac, traker, trakpkg
from bench.battery.providers.job import Found, Job

Provider = Callable[[Job], Iterator[Found]]

# name -> (the provider, whether proj_dim matters to it)
PROVIDERS: dict[str, tuple[Provider, bool]] = {
    "default": (traker.default, True),
    "trak_rule": (traker.rule, True),
    "trak": (trakpkg.scores, True),
    "ekfac": (ekfac.scores, False),
    "cosine": (cosine.scores, False),
    "bm25": (bm25.scores, False),
}
