"""BM25: how many rare words a training text shares with a target (Robertson et al., TREC-3)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from bench.battery.providers.job import Floats, Found, Job, Unsupported
from bench.battery.sentences import Sentence

SATURATION, LENGTH_SHARE = 1.5, 0.75  # k1 and b, at their usual values


def scores(job: Job) -> Iterator[Found]:
    """The same for any number of checkpoints, for it looks at none."""
    if job.problem.words is None:
        raise Unsupported("bm25: no words")
    found = bm25(*job.problem.words)
    for count in job.counts:
        for _ in job.groups(count):
            yield Found("bm25", count, found)


def bm25(texts: list[Sentence], targets: list[Sentence]) -> Floats:
    """Scores [n, m] of n texts for m targets.

    ``sum over words w of a target: log(1 + (n - n_w + 0.5) / (n_w + 0.5)) * c (k1 + 1) / (c + k1
    (1 - b + b L / mean L))``, with c the number of times that w is in a text of L words, and n_w
    the number of texts that have it.
    """
    counts = [Counter(text) for text in texts]
    having = Counter(word for count in counts for word in count)
    mean = sum(map(len, texts)) / len(texts)
    found = np.zeros((len(texts), len(targets)))
    for row, (text, count) in enumerate(zip(texts, counts, strict=True)):
        damped = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * len(text) / mean)
        for column, target in enumerate(targets):
            for word in target:
                if c := count[word]:
                    rare = math.log1p((len(texts) - having[word] + 0.5) / (having[word] + 0.5))
                    found[row, column] += rare * c * (SATURATION + 1) / (c + damped)
    return found
