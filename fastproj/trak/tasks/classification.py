"""What image and text classification share: one class of a sample, or several labels at once."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastproj.checks import check_flag
from fastproj.trak.tasks.base import (
    Batch,
    BatchedModelOutput,
    Params,
    Terms,
    check_temperature,
)
from fastproj.trak.tasks.likelihood import class_terms, log_odds_terms
from fastproj.trak.tasks.margin import (
    check_labels,
    check_logits,
    check_multilabel,
    check_multilabel_logits,
    logits_of_classes,
    margins,
    yes_or_no,
)


class ClassificationModelOutput(BatchedModelOutput):
    """The log-odds of the labels, f, and Q; a subclass says what a batch is, by ``predict``.

    Parameters
    ----------
    temperature, multilabel : as in ``ImageClassificationModelOutput``.
    """

    name: ClassVar[str]  # for messages

    def __init__(self, temperature: float = 1.0, multilabel: bool = False) -> None:
        self.temperature = check_temperature(type(self).__name__, temperature)
        self.multilabel = check_flag(type(self).__name__, "multilabel", multilabel)

    @abstractmethod
    def predict(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """(what the model makes of the inputs, labels) of a batch."""

    @property
    def knows_likelihood(self) -> bool:
        """Unless there is a temperature, which is that of Q alone."""
        return self.temperature == 1

    @property
    def several_labels(self) -> bool:
        """With ``multilabel``."""
        return self.multilabel

    @property
    def learns_along_output(self) -> bool:
        """Unless the log-likelihoods of several labels are added up."""
        return not self.multilabel

    def check_labels(self, labels: object) -> None:
        """Raise TypeError or ValueError unless these can be the labels of a batch."""
        if self.multilabel:
            check_multilabel(self.name, labels)
        else:
            check_labels(self.name, labels, type(self).__name__)

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """The log-odds of the label, or the sum over all labels, [B]."""
        logits, labels = self.predict(model, weights, buffers, batch)
        if self.multilabel:
            check_multilabel_logits(self.name, logits, labels)
            return yes_or_no(logits, labels).sum(1)
        return margins(logits_of_classes(logits, labels), labels)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """1 - p of each sample, or the mean over its labels, [B].

        From the log-odds, so that it keeps its digits near p = 1.
        """
        with torch.no_grad():
            logits, labels = self.predict(model, weights, buffers, batch)
            logits = logits / self.temperature
            if self.multilabel:
                check_multilabel_logits(self.name, logits, labels)
                return torch.sigmoid(-yes_or_no(logits, labels)).mean(1)
            logits = logits_of_classes(logits, labels)
            check_logits(self.name, logits, labels)
            return torch.sigmoid(-margins(logits, labels))

    def num_predictions(self, batch: Batch) -> int:
        """One class, or as many as there are labels."""
        return int(self.labels_of(batch).shape[1]) if self.multilabel else 1

    @abstractmethod
    def labels_of(self, batch: Batch) -> Tensor:
        """The labels of a batch."""

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """Those of one class of each sample, or of the labels that it has and hasn't."""
        logits, labels = self.predict(model, weights, buffers, batch)
        if self.multilabel:
            check_multilabel_logits(self.name, logits, labels)
            return log_odds_terms(yes_or_no(logits, labels), noise)
        logits = logits_of_classes(logits, labels)
        if not torch.is_grad_enabled():  # values are looked at, once for each batch
            check_logits(self.name, logits, labels)
        return class_terms(logits, labels, noise)
