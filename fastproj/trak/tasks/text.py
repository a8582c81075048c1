"""Text classification: token ids, masks and labels."""

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

NAME = "text_classification"
TUPLES = {
    3: ("input_ids", "attention_mask", "labels"),
    4: ("input_ids", "token_type_ids", "attention_mask", "labels"),  # trak's
}


class TextClassificationModelOutput(BatchedModelOutput):
    """Multi-class margin of a text classifier, as for images; a Hugging Face batch.

    ``f(z; theta) = log(p / (1 - p))`` and ``Q = 1 - p``, with ``p`` the softmax probability of the
    label (arXiv 2303.14186, sections 3.3 and 4). A batch is (input_ids, token_type_ids,
    attention_mask, labels) as in trak, (input_ids, attention_mask, labels), or a dict with "labels"
    whose other entries are the model's keyword arguments.

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
        """Model inputs and integer labels [B]."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels", None)
        if labels is None or not inputs:
            raise ValueError(
                f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                "expected (input_ids, token_type_ids, attention_mask, labels), (input_ids, "
                "attention_mask, labels), or a dict with labels and the model's inputs"
            )
        check_labels(NAME, labels)

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """The margins of a batch, [B]."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels")
        return margins(logits_of(NAME, call(model, weights, buffers, **inputs)), labels)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """1 - p of each sample, [B]."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = logits_of(NAME, call(model, weights, buffers, **inputs))
            return classification_q(NAME, logits, labels, self.temperature)

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """Those of one class of each sample."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels")
        logits = logits_of(NAME, call(model, weights, buffers, **inputs))
        if not torch.is_grad_enabled():  # values are looked at, once for each batch
            check_logits(NAME, logits, labels)
        return class_terms(logits, labels, noise)


def as_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments and labels of a batch; empty for one that is neither tuple nor dict."""
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        inputs = dict(batch[0])
        if "labels" not in inputs and "label" in inputs:
            inputs["labels"] = inputs.pop("label")
        return inputs
    names = TUPLES.get(len(batch), ())
    return dict(zip(names, batch, strict=True)) if names else {}
