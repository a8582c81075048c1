"""Text classification: token ids, masks and labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastproj.trak.tasks.base import (
    AT_LEAST,
    Batch,
    Params,
    call,
    check_masks,
    describe_parts,
    logits_of,
)
from fastproj.trak.tasks.classification import ClassificationModelOutput
from fastproj.trak.tasks.language import without_cache

NAME = "text_classification"
TUPLES = {
    3: ("input_ids", "attention_mask", "labels"),
    4: ("input_ids", "token_type_ids", "attention_mask", "labels"),  # trak's
}


class TextClassificationModelOutput(ClassificationModelOutput):
    """Multi-class margin of a text classifier, as for images; a Hugging Face batch.

    ``f(z; theta) = log(p / (1 - p))`` and ``Q = 1 - p``, with ``p`` the softmax probability of the
    label (arXiv 2303.14186, sections 3.3 and 4). A batch is (input_ids, token_type_ids,
    attention_mask, labels) as in trak, (input_ids, attention_mask, labels), or a dict with "labels"
    whose other entries are the model's keyword arguments. One logit, and ``multilabel``, mean what
    they do in ``ImageClassificationModelOutput``.

    Parameters
    ----------
    temperature, multilabel : as in ``ImageClassificationModelOutput``.
    """

    name: ClassVar[str] = NAME

    def check_batch(self, batch: Batch) -> None:
        """Model inputs and labels."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels", None)
        if labels is None or not inputs:
            raise ValueError(
                f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                "expected (input_ids, token_type_ids, attention_mask, labels), (input_ids, "
                "attention_mask, labels), or a dict with labels and the model's inputs"
            )
        names = ", ".join(TUPLES.get(len(batch), ()))
        check_masks(NAME, inputs, least=AT_LEAST + f" (a tuple is ({names}))" * bool(names))
        self.check_labels(labels)

    def predict(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The model of everything but the labels."""
        inputs = as_inputs(batch)
        labels = inputs.pop("labels")
        inputs = {**without_cache(model), **inputs}
        return logits_of(NAME, call(model, weights, buffers, **inputs)), labels

    def labels_of(self, batch: Batch) -> Tensor:
        """The entry of this name."""
        labels: Tensor = as_inputs(batch)["labels"]
        return labels


def as_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments and labels of a batch; empty for one that is neither tuple nor dict."""
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        inputs = dict(batch[0])
        if "labels" not in inputs and "label" in inputs:
            inputs["labels"] = inputs.pop("label")
        return inputs
    names = TUPLES.get(len(batch), ())
    return dict(zip(names, batch, strict=True)) if names else {}
