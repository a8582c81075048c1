"""Image classification: (images, labels)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastproj.trak.tasks.base import Batch, Params, call, describe_parts, logits_of
from fastproj.trak.tasks.classification import ClassificationModelOutput

NAME = "image_classification"


class ImageClassificationModelOutput(ClassificationModelOutput):
    """Multi-class margin; a batch is (images [B, ...], labels [B]), or a dict of the two.

    ``f(z; theta) = log(p / (1 - p)) = logit_y - logsumexp(other logits)`` and ``Q = 1 - p``, with
    ``p`` the softmax probability of the label (arXiv 2303.14186, section 3.3). The model takes the
    images as its first argument and returns logits [B, C], or an object with ``.logits``. In a
    dict, the labels are "labels" (or "label"), and the images the other entry.

    One logit z, [B] or [B, 1], is that of class 1 of two: p is its sigmoid for label 1, and 1 minus
    that for label 0. With ``multilabel``, f is the sum of the log-odds of all right answers, which
    are ``z_l`` for label 1 and ``-z_l`` for 0. Q is the mean of their 1 - p. The log-likelihood is
    the sum of theirs, which is minus the sum of the binary cross-entropies.

    Parameters
    ----------
    temperature : divides the logits inside the softmax of Q.
    multilabel : a sample has any number of L labels at once. The logits are [B, L], and the labels
        [B, L] are 1 where the sample has a label and 0 where it hasn't.
    """

    name: ClassVar[str] = NAME

    def check_batch(self, batch: Batch) -> None:
        """Images and labels."""
        parts = as_pair(batch)
        if len(parts) != 2 or not isinstance(parts[0], Tensor):
            raise ValueError(
                f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                "expected (images [B, ...], labels [B]) or a dict with labels and one more entry"
            )
        self.check_labels(parts[1])

    def predict(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The model of the images."""
        images, labels = as_pair(batch)
        return logits_of(NAME, call(model, weights, buffers, images)), labels

    def labels_of(self, batch: Batch) -> Tensor:
        """The second of the two."""
        labels: Tensor = as_pair(batch)[1]
        return labels


def as_pair(batch: Batch) -> Batch:
    """(images, labels) of a tuple or of a tuple of one dict; anything else as it is."""
    if len(batch) == 1 and isinstance(batch[0], Mapping):
        label = next((key for key in ("labels", "label") if key in batch[0]), None)
        images = [value for key, value in batch[0].items() if key != label]
        if label is not None and len(images) == 1:
            return images[0], batch[0][label]
    return batch
