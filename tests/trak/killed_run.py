"""A small TRAK run that kills itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import trak_cases as cases

N, M = 12, 4


def main(save_dir: Path, log: Path, die_at: int) -> None:
    """From features to scores, with SIGKILL at moment ``die_at`` (0: never).

    Moments are counted around writes: before a flush, before a rename, after it. ``log`` gets a
    line for each batch whose gradients are computed, and at the end the number of moments.
    """
    torch.set_num_threads(1)
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
    model = cases.net()
    traker = cases.make(model, save_dir, N, proj_dim=4)
    features = traker._features

    def logged(batch, model_id, inds):
        with open(log, "a") as file:
            file.write(f"{traker._loaded_for} {model_id} {inds[0]}\n")
        return features(batch, model_id, inds)

    traker._features = logged
    train, targets = cases.data(N), cases.data(M, seed=5)
    states = [{k: v.clone() for k, v in cases.net(seed).state_dict().items()} for seed in (0, 1)]
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        for rows in torch.arange(N).split(4):
            traker.featurize((train[0][rows], train[1][rows]), num_samples=len(rows))
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("test", state, model_id, M)
        for rows in torch.arange(M).split(2):
            traker.score((targets[0][rows], targets[1][rows]), num_samples=len(rows))
    traker.finalize_scores("test")
    with open(log, "a") as file:
        file.write(f"moments {moments}\n")
