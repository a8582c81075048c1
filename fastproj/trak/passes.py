"""A pass over the samples of a checkpoint: which of a batch are new, and whose turn they are."""

from __future__ import annotations

from typing import Any, SupportsIndex

import numpy as np

from fastproj.checks import check_integer
from fastproj.trak import batches
from fastproj.trak.distributed import Ranks, Turns
from fastproj.trak.featurizer import Featurizer
from fastproj.trak.files import Indices
from fastproj.trak.inputs import MAX_SAMPLES, as_indices, check_indices
from fastproj.trak.mixing import ContentWatch


class Pass:
    """Training samples, or targets, under the checkpoint that a featurizer holds.

    Parameters
    ----------
    contents : warns of samples that are others than before.
    exp_name : the experiment whose targets they are; None for training samples.

    Attributes
    ----------
    function : "featurize" | "score", whose batches they are.
    next : the number of the next sample, for calls with num_samples.
    """

    def __init__(
        self,
        featurizer: Featurizer,
        contents: ContentWatch,
        ranks: Ranks,
        model_id: int,
        exp_name: str | None = None,
    ) -> None:
        self.function = "featurize" if exp_name is None else "score"
        self.featurizer, self.contents = featurizer, contents
        self.model_id, self.exp_name = model_id, exp_name
        self.next = 0
        self.index = featurizer.saver.index
        done = self.index(model_id, exp_name).done
        self._turns = Turns(ranks, done, (self.function, model_id, exp_name))

    def take(self, batch: Any, inds: Any, num_samples: SupportsIndex | None) -> None:
        """Compute and keep what is new of a batch, where it is this process's turn."""
        prepared, places = self._checked(batch, inds, num_samples)
        if self._is_mine(prepared, places, num_samples is not None):
            index = self.index(self.model_id, self.exp_name)
            content = batches.content_ids(prepared, len(places))
            there = index.done[places]
            if self.exp_name is None:
                self.contents.check_batch(self.model_id, places, content)
            else:
                there &= index.content[places] == content
            if not there.all():
                pairs = self.featurizer.simulated_pairs()
                if pairs is not None:
                    self.contents.check_pairs(self.model_id, self.exp_name, pairs)
                self.featurizer.keep(
                    self.model_id, prepared, places, content, ~there, self.exp_name
                )
        self._turns.passed(places)
        if num_samples is not None:
            self.next += len(places)

    def _checked(
        self, batch: Any, inds: Any, num_samples: SupportsIndex | None
    ) -> tuple[tuple[Any, ...], Indices]:
        """The batch on the device, and its samples' indices."""
        function = self.function
        if (inds is None) == (num_samples is None):
            raise ValueError(
                f"{function}: received {'neither inds nor' if inds is None else 'both inds and'} "
                "num_samples; expected exactly one of them"
            )
        if inds is None:
            count = check_integer(function, "num_samples", num_samples or 0, 0, MAX_SAMPLES)
            places = np.arange(self.next, self.next + count)
        else:
            places = as_indices(function, inds)
            count = len(places)
        prepared, size = self.featurizer.prepare(function, batch, count)
        if inds is None and count != size:
            raise ValueError(
                f"{function}: received num_samples={count} with a batch of {size} samples; "
                "expected the two to agree (the last batch of a loader is often smaller)"
            )
        total = len(self.index(self.model_id, self.exp_name).done)
        check_indices(function, places, size, total)
        return prepared, places

    def _is_mine(self, batch: tuple[Any, ...], inds: Indices, by_number: bool) -> bool:
        """Whether this process has anything to do with a batch."""
        if not len(inds):
            return False
        if self._turns.taking is None:
            content = batches.content_ids(batch, len(inds))
            self._turns.compare(self.function, inds, content, by_number)
        return self._turns.mine(inds)

    def meet(self, step: str) -> None:
        """Wait for the batches of all processes; see what they have written."""
        self._turns.meet(step)
        self.featurizer.saver.forget()

    def remaining(self, batch_size: int) -> list[list[int]]:
        """This process's share of the samples that are not there yet, in batches of numbers."""
        done = self.index(self.model_id, self.exp_name).done
        every = np.split(np.arange(len(done)), range(batch_size, len(done), batch_size))
        todo = [inds[~done[inds]] for inds in every if not done[inds].all()]
        return [inds.tolist() for inds in self._turns.deal("remaining_batches", todo)]
