"""A small run over each kind of store: for kills, full disks and damaged files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.trak import SingularXtXWarning, TRAKer
from fastproj.trak.draws import Fisher
from tests.trak import cases
from tests.trak.faults import Faults

N, M = 12, 4
TOP = 3
STAGES = ("featurize", "finalize", "score")
# Options of TRAKer: kinds of matrix, curvatures and forms of the system (k < n, and k > n: dual).
KINDS: Mapping[str, dict[str, Any]] = {
    "rademacher": {"proj_dim": 4, "kind": "rademacher", "curvature": "trak"},
    "gaussian-dual": {"proj_dim": 40, "kind": "gaussian", "curvature": "trak"},
    "sjlt-fisher": {"proj_dim": 16, "kind": "sjlt", "block": 16},
    "sjlt-dual": {"proj_dim": 32, "kind": "sjlt", "block": 16, "curvature": "trak"},
    "fisher-some": {"proj_dim": 4, "kind": "rademacher", "curvature": Fisher(5, 2, 0.5)},
    "fisher-dual": {"proj_dim": 40, "kind": "rademacher", "lambda_reg": "0.1*mean"},
    "factored": {"proj_dim": 16, "kind": "sjlt", "block": 16, "factored": 2, "curvature": "trak"},
    "factored-fisher": {"proj_dim": 4, "kind": "rademacher", "factored": 2},
    "half": {"proj_dim": 8, "kind": "rademacher", "use_half_precision": True},
    "lambda": {"proj_dim": 8, "kind": "gaussian", "curvature": "trak", "lambda_reg": 0.01},
}
# Those of `make test`, where each kind takes seconds.
ESSENTIAL = ("rademacher", "sjlt-fisher", "fisher-dual", "factored")


def net(seed: int) -> nn.Module:
    """Two layers, whose sides are above the rank of "factored"."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [n, 5] and labels [n] of 3 classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings of few samples nor lines of the log."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularXtXWarning)
        yield


class Run:
    """Two checkpoints over a training set, and an experiment, in one directory."""

    def __init__(self, folder: Path, kind: str, seed: int = 0) -> None:
        self.folder = folder
        self.train, self.targets = data(N, 1), data(M, 2)
        self.states = [net(3 + i).state_dict() for i in range(2)]
        settings = {"use_half_precision": False, **KINDS[kind]}
        self.traker = TRAKer(
            net(3),
            "image_classification",
            N,
            save_dir=folder,
            device="cpu",
            logging_level=logging.ERROR,
            projector_seed=seed,
            **settings,
        )

    def featurize(self) -> None:
        """Three batches of each checkpoint."""
        for model_id, state in enumerate(self.states):
            self.traker.load_checkpoint(state, model_id)
            for rows in torch.arange(N).split(5):
                batch = self.train[0][rows], self.train[1][rows]
                self.traker.featurize(batch, inds=rows.tolist())

    def finalize(self) -> None:
        self.traker.finalize_features()

    def score(self) -> list[np.ndarray]:
        """Two batches of targets for each checkpoint; all scores, and the extremes."""
        for model_id, state in enumerate(self.states):
            self.traker.start_scoring_checkpoint("test", state, model_id, M)
            for rows in torch.arange(M).split(3):
                batch = self.targets[0][rows], self.targets[1][rows]
                self.traker.score(batch, inds=rows.tolist())
        scores = np.array(self.traker.finalize_scores("test"))
        top = self.traker.finalize_scores("test", top_k=TOP)
        return [scores, *(v for v in vars(top).values() if isinstance(v, np.ndarray))]


def whole(
    folder: Path, kind: str, begin: Callable[[str], Any] = lambda _: None, seed: int = 0
) -> list[np.ndarray]:
    """From features to scores; ``begin`` is called with the name of each stage."""
    with quiet():
        begin("featurize")
        run = Run(folder, kind, seed)
        run.featurize()
        begin("finalize")
        run.finalize()
        begin("score")
        return run.score()


def names(folder: Path) -> list[str]:
    """All files but shards, which the batches of lives that end are merged into in other ways."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not path.name.startswith(("train-", "drawn-", "target-"))
    )


def same(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> bool:
    """Whether two runs gave the same bits."""
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(found, wanted, strict=True)
    )


def life(folder: str, kind: str, at: int, out: str) -> None:
    """A run that kills itself at the moment ``at`` (-1: never), or leaves its scores in ``out``.

    ``out`` gets the scores, and the stage and step of each moment.
    """
    cases.small_blocks()
    stages: list[str] = []
    moments: list[str] = []
    with Faults(folder, at) as faults:

        def begin(stage: str) -> None:
            moments.extend(f"{stages[-1]} {s}" for s in faults.steps[len(moments) :] if stages)
            stages.append(stage)

        scores = whole(Path(folder), kind, begin)
        begin("end")
    np.savez(out, *scores, moments=np.array(moments))
