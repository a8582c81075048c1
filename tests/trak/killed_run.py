"""A small TRAK run that kills itself at a given moment of a given stage."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import fastproj.trak.estimator
from tests.trak import cases

N, M = 12, 4
STAGES = ("featurizing", "finalising", "scoring")
KINDS = ("any", "file")
FILE_CALLS = {"open", "write", "flush", "fsync", "replace", "unlink", "mkdir", "rename", "pwrite"}
SOURCES = str(Path(fastproj.trak.estimator.__file__).parent)


class Moments:
    """Counts what fastproj.trak does: calls and returns of its functions, and those on files."""

    def __init__(self, stage: str, kind: str, die_at: int) -> None:
        self.die = (stage, kind, die_at)
        self.start("")

    def start(self, stage: str) -> None:
        """Count from 0 again."""
        self.stage = stage
        self.counts = dict.fromkeys(KINDS, 0)

    def __call__(self, frame: FrameType, event: str, called: Any) -> None:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return
        on_file = event in ("c_call", "c_return") and called.__name__ in FILE_CALLS
        for kind in KINDS if on_file else KINDS[:1]:
            self.counts[kind] += 1
            if self.die == (self.stage, kind, self.counts[kind]):
                os.kill(os.getpid(), signal.SIGKILL)


def main(save_dir: str, log: str, stage: str, kind: str, die_at: int) -> None:
    """From features to scores; SIGKILL at the moment ``die_at`` of a kind in ``stage`` ("": never).

    ``log`` gets a line as each stage begins and ends (with its numbers of moments), and as each
    batch is computed.
    """
    cases.small_blocks()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    moments = Moments(stage, kind, die_at)

    def note(*words: Any) -> None:
        os.write(out, (" ".join(map(str, words)) + "\n").encode())

    def begin(name: str) -> None:
        moments.start(name)
        note("begin", name)

    def end() -> None:
        note("end", moments.stage, *moments.counts.values())

    model = cases.net()
    train, targets = cases.data(N), cases.data(M, seed=5)
    # The first shows no training ridge, the second does: lambda is chosen by one rule and the other
    states = [net.state_dict() for net in (cases.net(0), cases.trained(1, train))]
    sys.setprofile(moments)
    begin("featurizing")
    traker = cases.make(model, Path(save_dir), N, proj_dim=4)
    features = traker._featurizer.features

    def logged(batch, model_id, inds, **kind):
        note("compute", traker._pass.function, model_id, inds[0])
        return features(batch, model_id, inds, **kind)

    traker._featurizer.features = logged
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        for rows in cases.torch.arange(N).split(4):
            traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))
    end()
    begin("finalising")
    traker.finalize_features()
    end()
    begin("scoring")
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, M)
        for rows in cases.torch.arange(M).split(2):
            traker.score((targets[0][rows], targets[1][rows]), num_samples=len(rows))
    traker.finalize_scores("test")
    traker.finalize_scores("test", top_k=3)
    end()
