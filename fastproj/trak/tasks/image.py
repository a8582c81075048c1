"""Image classification: (images, labels)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastproj.trak.tasks.base import (
    Batch,
    BatchedModelOutput,
    Params,
    Terms,
    call,
    check_temperature,
    describe_parts,
    logits_of,
)
from fastproj.trak.tasks.likelihood import class_terms
from fastproj.trak.tasks.margin import check_labels, check_logits, classification_q, margins

NAME = "image_classification"


class ImageClassificationModelOutput(BatchedModelOutput):
    """Multi-class margin; a batch is (images [B, ...], labels [B]), or a dict of the two.

    ``f(z; theta) = log(p / (1 - p)) = logit_y - logsumexp(other logits)`` and ``Q = 1 - p``, with
    ``p`` the softmax probability of the label (arXiv 2303.14186, section 3.3). The model takes the
    images as its first argument and returns logits [B, C], or an object with ``.logits``. In a
    dict, the labels are "labels" (or "label"), and the images the other entry.

    Parameters
    ----------
    temperature : divides the logits inside the softmax of Q.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = check_temperature(type(self).__name__, temperature)

    @property
    def knows_likelihood(self) -> bool:
        """Not of a temperature, which is that of Q alone."""
        return self.temperature == 1

    def check_batch(self, batch: Batch) -> None:
        """Images and integer labels [B]."""
        parts = as_pair(batch)
        if len(parts) != 2 or not isinstance(parts[0], Tensor):
            raise ValueError(
                f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                "expected (images [B, ...], labels [B]) or a dict with labels and one more entry"
            )
        check_labels(NAME, parts[1])

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """The margins of a batch, [B]."""
        images, labels = as_pair(batch)
        return margins(logits_of(NAME, call(model, weights, buffers, images)), labels)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """1 - p of each sample, [B]."""
        images, labels = as_pair(batch)
        with torch.no_grad():
            logits = logits_of(NAME, call(model, weights, buffers, images))
            return classification_q(NAME, logits, labels, self.temperature)

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """Those of one class of each sample."""
        images, labels = as_pair(batch)
        logits = logits_of(NAME, call(model, weights, buffers, images))
        if not torch.is_grad_enabled():  # values are looked at, once for each batch
            check_logits(NAME, logits, labels)
        return class_terms(logits, labels, noise)


def as_pair(batch: Batch) -> Batch:
    """(images, labels) of a tuple or of a tuple of one dict; anything else as it is."""
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        label = next((key for key in ("labels", "label") if key in batch[0]), None)
        images = [value for key, value in batch[0].items() if key != label]
        if label is not None and len(images) == 1:
            return images[0], batch[0][label]
    return batch
