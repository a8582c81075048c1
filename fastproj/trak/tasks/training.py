"""Tasks with several outputs of a sample: the terms of a training sample's likelihood, and the
tokens of a sequence one by one.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from fastproj.trak.tasks.base import Batch, BatchedModelOutput, Params, Terms, definer, run

OWN = ("outputs", "get_output", "get_out_to_loss_grad")  # methods that a likelihood belongs to


class SeveralOutputs(BatchedModelOutput):
    """A task whose ``outputs`` are [rows, B]: several of each sample, which share a forward."""

    model_holds_weights = False  # ``run`` sees to it

    def __init__(self, task: Any) -> None:
        self.task = task

    @abstractmethod
    def rows_at_most(self, batch: Batch) -> int:
        """How many outputs a sample of a batch has, at most."""


class TokenOutput(SeveralOutputs):
    """The margin of each label of a sequence by itself, [T, B]: f is their sum.

    A place at which no sample of a batch has a label costs nothing, once ``choose`` knows the
    batch. Parts of a batch, which chunks and checks take, have the places of the whole.

    Attributes
    ----------
    places : the numbers [t] of the places that ``outputs`` has; None is all T.
    """

    places: Tensor | None = None

    def choose(self, batch: Batch) -> None:
        """Leave out the places at which no sample of this batch has a label.

        A subclass of a task of ours that changes what tokens add to f, and not ``targets``, keeps
        all: the two need not belong together.
        """
        of_targets = definer(self.task, "targets")
        known = hasattr(self.task, "counted_places") and all(
            of_targets <= definer(self.task, name) for name in ("predictions", "token_outputs")
        )
        self.places = self.task.counted_places(batch) if known else None

    def rows_at_most(self, batch: Batch) -> int:
        """How many places ``outputs`` has."""
        if self.places is not None:
            return len(self.places)
        return int(self.task.num_predictions(batch))

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """[t, B]; 0 where a label does not count."""
        method = self.task.token_outputs
        by_sample: Tensor = run(method, model, weights, buffers, batch)
        by_place = by_sample.T
        return by_place if self.places is None else by_place.index_select(0, self.places)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """Q of the whole sequence."""
        q: Tensor = run(self.task.get_out_to_loss_grad, model, weights, buffers, batch)
        return q


class TrainingOutput(SeveralOutputs):
    """The outputs whose gradients training samples have: ``Terms.output``, and the drawn rows.

    A batch is that of ``task`` with the noise of ``likelihood_terms`` as one more part.
    """

    def rows_at_most(self, batch: Batch) -> int:
        """How many outputs a sample of a batch has, at most."""
        return 1 + int(batch[-1].shape[1])

    def terms(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Terms:
        """The terms of a batch."""
        *parts, noise = batch
        terms: Terms = run(self.task.likelihood_terms, model, weights, buffers, tuple(parts), noise)
        return terms

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """[1 + d, B]: the output of each sample, and its drawn rows."""
        terms = self.terms(model, weights, buffers, batch)
        own = terms.output.unsqueeze(0)
        if terms.drawn.shape[-1] == 0:  # of most batches: their graph is then as small as f's
            return own
        return torch.cat([own, terms.drawn.mT])

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """The slope of each sample, [B]."""
        with torch.no_grad():
            return self.terms(model, weights, buffers, batch).slope


def has_likelihood(task: Any) -> bool:
    """Whether a task says what the likelihood of its labels is.

    A subclass of a task of ours that changes outputs or Q, and not the likelihood, doesn't: the two
    need not belong together.
    """
    return bool(getattr(task, "knows_likelihood", False)) and belongs_together(task)


def belongs_together(task: Any) -> bool:
    """Whether a task's likelihood is said where its outputs and Q are, or below."""
    place = definer(task, "likelihood_terms")
    return all(place <= definer(task, name) for name in OWN)


def learns_along_output(task: Any) -> bool:
    """Whether the training features of a task with a likelihood are the gradients of f, as TRAK's.

    A subclass that changes the likelihood has to say so again: its terms may be of another output.
    """
    return bool(getattr(task, "learns_along_output", False)) and definer(
        task, "learns_along_output"
    ) <= definer(task, "likelihood_terms")
