"""What one of several processes does: HFTRAKer, or a Trainer with the callback."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch

from fastproj.trak.hf import HFTRAKer, TRAKCallback
from tests.trak.hf import models
from tests.trak.hf.training import SAMPLES, state_of, train

OPTIONS = {"proj_dim": 16, "logging_level": logging.ERROR, "batch_size": 4}


def main(what: str, folder: Path) -> None:
    """Writes scores, the samples that this process computed, and the trained weights."""
    torch.set_num_threads(1)
    samples = models.samples_for("causal_lm", SAMPLES)
    if what == "traker":
        states = [models.model_for("causal_lm", seed).state_dict() for seed in (1, 2)]
        traker = HFTRAKer(
            models.model_for("causal_lm"), samples, states, folder / "trak", **OPTIONS
        )
        computed = noted(traker)
        scores = traker.score(samples[:3])
    else:
        callback = TRAKCallback(samples, folder / "trak", samples[:3], **OPTIONS)
        trainer = train(
            folder / "run", [callback] if what == "callback" else [], ddp_backend="gloo"
        )
        if trainer.is_world_process_zero():
            torch.save(state_of(trainer), folder / "state.pt")
        if what != "callback":
            return
        assert callback.traker is not None
        traker, computed, scores = callback.traker, [], callback.scores
    rank = traker.traker.ranks.rank
    np.save(folder / f"scores-{rank}.npy", scores)
    (folder / f"computed-{rank}.json").write_text(json.dumps(computed))


def noted(traker: HFTRAKer) -> list[int]:
    """The training samples whose features are computed from here on."""
    computed: list[int] = []
    featurizer = traker.traker._featurizer
    features = featurizer.features

    def noting(batch, model_id, inds, drawn=None):
        computed.extend([] if drawn is None else inds.tolist())
        return features(batch, model_id, inds, drawn)

    featurizer.features = noting  # type: ignore[method-assign]
    return computed


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
