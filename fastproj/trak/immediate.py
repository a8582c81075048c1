"""Scores that are returned at once and not kept: in parts, or of other training samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastproj.trak.curvature import check_finite_terms, check_terms
from fastproj.trak.featurizer import Featurizer
from fastproj.trak.gradients import AbstractGradientComputer, modules_of, project_modules
from fastproj.trak.gradients.scales import projects_pieces, unscaled
from fastproj.trak.readiness import finalized_ids, require_all, require_finalized
from fastproj.trak.solving.peers import in_mean
from fastproj.trak.solving.scoring import (
    Halved,
    check_scores,
    scores_of_targets,
    target_features,
    target_weights,
)
from fastproj.trak.solving.solve import ScoreComputer
from fastproj.trak.store.scores import Scores
from fastproj.trak.tasks.names import TASKS


def scores_in_parts(
    made_by: Featurizer,
    score_computer: ScoreComputer,
    model_id: int,
    batch: tuple[Any, ...],
    size: int,
    per: str,
) -> Scores:
    """The scores of the targets in a batch by each module or token, [n, B, parts]."""
    computer, projector, task = made_by.computer, made_by.projector, made_by.task
    if not isinstance(computer, AbstractGradientComputer) or not computer.gives_rows():
        raise ValueError(
            f"score: received per={per!r} with a gradient_computer of another kind; expected "
            '"auto", "hooks", "func" or "loop"'
        )
    if per == "module" and not projects_pieces(projector):
        raise ValueError(
            f'score: received per="module" with a {type(unscaled(projector)[0]).__name__}, which '
            "can't project parts of a gradient; expected fastproj.Projector, or "
            "fastproj.FactoredProjector whose project is not overridden"
        )
    if per == "token" and not hasattr(task, "token_outputs"):
        names = ", ".join(name for name, kind in TASKS.items() if hasattr(kind, "token_outputs"))
        raise ValueError(
            f'score: received per="token" with the task {type(task).__name__}; expected {names}, '
            "or a task with token_outputs"
        )
    if per not in ("module", "token"):
        raise ValueError(f"score: received per={per!r}; expected 'module' or 'token'")
    if not size:
        parts_of_each = (
            len(modules_of(computer.names)) if per == "module" else task.num_predictions(batch)
        )
        return np.empty((made_by.saver.train_set_size, 0, parts_of_each), np.float32)
    by_module = per == "module"
    computer = computer if by_module else made_by.token_computer(batch)
    made_by.trust(computer, model_id)
    with made_by.loaded.guarded("score", True), made_by.computing():
        computer.compute_loss_grad(batch)  # which checks labels
        if by_module:
            parts = project_modules(computer, batch, projector, model_id)
        else:
            parts = computer.project_rows(batch, projector, model_id)
    made_by.saver.forget()  # a check may have failed, here or elsewhere: see Store.distrust
    require_finalized(made_by.saver, "score", model_id)
    rows = [made_by.scaled(part, np.arange(size)) for part in parts]
    targets = torch.stack(rows, 1).flatten(0, 1)
    ids = finalized_ids(made_by.saver)
    scores = scores_of_targets(made_by.saver.systems, score_computer, model_id, targets, ids)
    scores = scores.reshape(len(scores), size, len(rows))
    if by_module or computer.task.places is None:
        return scores
    every = np.zeros((len(scores), size, task.num_predictions(batch)), np.float32)
    every[..., computer.task.places.cpu().numpy()] = scores
    return every


class Stream:
    """The scores of other training samples on all targets of an experiment, by one checkpoint.

    Raises NotReadyError unless all targets were given; also where a check of gradients has failed
    since, so that features that they are made of no longer count.
    """

    def __init__(
        self, made_by: Featurizer, score_computer: ScoreComputer, model_id: int, exp_name: str
    ) -> None:
        self.made_by, self.score_computer = made_by, score_computer
        self.model_id, self.exp_name = model_id, exp_name
        self._solve()

    def _solve(self) -> None:
        """Take the targets and the lambda that are there."""
        saver, model_id = self.made_by.saver, self.model_id
        distrusted = saver.distrusted(model_id)
        saver.forget()
        require_finalized(saver, "score", model_id)
        require_all(saver, "score", model_id, self.exp_name)
        columns = range(saver.num_columns(self.exp_name))
        targets = target_features(saver, model_id, self.exp_name, columns)
        computer = self.score_computer
        self.systems = systems = in_mean(saver.systems, computer, finalized_ids(saver))
        self.weights = target_weights(systems, computer, model_id, targets)
        self.halved = Halved.of(systems, model_id)
        self.distrusted = distrusted

    def scores(self, batch: tuple[Any, ...], size: int) -> Scores:
        """Those of the samples in a batch, [B, m]."""
        if not size:
            return np.empty((0, len(self.weights)), np.float32)
        made_by, model_id, inds = self.made_by, self.model_id, np.arange(size)
        with made_by.loaded.guarded("score", True), made_by.computing():
            if made_by.draws is None:
                features, q = made_by.features_and_q(batch, model_id, inds)
            else:
                predictions = made_by.task.num_predictions(batch)
                noise = made_by.draws.noise(model_id, inds, predictions, some=False)
                samples = *batch, noise.to(made_by.device)
                terms = made_by.training_computer.compute_terms(samples)
                check_terms(terms, size, 0, inds)
                check_finite_terms(terms, inds)
                q = terms.slope.float()
                nothing = np.zeros(size, np.bool_)
                (features,) = made_by.features(samples, model_id, inds, drawn=nothing)
        if made_by.saver.distrusted(model_id) != self.distrusted:
            self._solve()
        features, q = features.cpu(), q.cpu()
        if made_by.draws is not None:
            q = self.halved.slopes(self.score_computer, features, q, terms.curvature.cpu())
        product = self.score_computer.scores(features, self.weights)
        product.mul_(q.unsqueeze(1))
        check_scores(self.systems, model_id, product)
        scores: Scores = product.numpy()
        return scores
