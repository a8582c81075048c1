"""Model outputs: what TRAK attributes. A task gives f(z; theta) of a sample, and Q = -dL/df.

The output function and its weight follow arXiv 2303.14186, sections 3.2 to 3.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fastproj.checks import describe

Params = Mapping[str, Tensor]


class AbstractModelOutput(ABC):
    """A task. Subclass it and pass an instance as ``TRAKer(task=...)``.

    ``weights`` and ``buffers`` are what ``torch.func.functional_call`` takes.
    """

    @abstractmethod
    def get_output(self, model: Any, weights: Params, buffers: Params, *sample: Any) -> Tensor:
        """f(z; theta) of one sample, a scalar.

        sample : the parts of the batch without their batch dimension; the model wants it back
            (``image.unsqueeze(0)``). Runs under ``torch.func.vmap``: no ``.item()``, no branching
            on values.
        """

    @abstractmethod
    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: tuple[Any, ...]
    ) -> Tensor:
        """Q of each sample, [B] or [B, 1]: minus the derivative of the loss by the output."""

    def check_batch(self, batch: tuple[Any, ...]) -> None:  # noqa: B027
        """Raise TypeError or ValueError for a batch that this task can't take."""


class ImageClassificationModelOutput(AbstractModelOutput):
    """Multi-class margin; a batch is (images [B, ...], labels [B]).

    ``f(z; theta) = log(p / (1 - p)) = logit_y - logsumexp(other logits)`` and ``Q = 1 - p``, with
    ``p`` the softmax probability of the label (arXiv 2303.14186, section 3).

    Parameters
    ----------
    temperature : divides the logits inside the softmax of Q.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(
                f"ImageClassificationModelOutput: received temperature={temperature}; "
                "expected a positive number"
            )
        self.temperature = temperature

    def check_batch(self, batch: tuple[Any, ...]) -> None:
        """Images and integer labels [B]."""
        if len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
            parts = ", ".join(
                describe(part) if isinstance(part, Tensor) else type(part).__name__
                for part in batch
            )
            raise ValueError(
                f"image_classification: received a batch of {len(batch)} parts ({parts}); "
                "expected (images [B, ...], labels [B])"
            )
        labels = batch[1]
        if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(
                f"image_classification: received labels {describe(labels)}; expected [B] class "
                "numbers, int64 (argmax(1) turns one-hot rows into them)"
            )

    def get_output(self, model: Any, weights: Params, buffers: Params, *sample: Any) -> Tensor:
        """The margin of one image and its label."""
        image, label = sample
        logits = functional_call(model, (dict(weights), dict(buffers)), (image.unsqueeze(0),))
        return margins(logits, label.unsqueeze(0)).sum()

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: tuple[Any, ...]
    ) -> Tensor:
        """1 - p of each sample, [B]; computed from the margin, so that it is exact near p = 1."""
        images, labels = batch
        with torch.no_grad():
            logits = functional_call(model, (dict(weights), dict(buffers)), (images,))
            check_logits(logits, labels)
            return torch.sigmoid(-margins(logits / self.temperature, labels))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """``logits[b, labels[b]] - logsumexp(the other logits)``, [B], of logits [B, C]."""
    chosen = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)  # [B, C]
    correct = torch.where(chosen, logits, 0.0).sum(-1)
    return correct - logits.masked_fill(chosen, -torch.inf).logsumexp(-1)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless ``logits`` are [B, C >= 2] and every label is a class of theirs."""
    if logits.dim() != 2 or logits.shape[0] != labels.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"image_classification: the model returned {describe(logits)} for {len(labels)} "
            "images; expected logits [B, C] with C >= 2"
        )
    bad = ((labels < 0) | (labels >= logits.shape[1])).nonzero()
    if len(bad):
        first = int(bad[0])
        raise ValueError(
            f"image_classification: received label {int(labels[first])} at row {first} of the "
            f"batch; expected classes 0..{logits.shape[1] - 1}, as many as the model has logits"
        )


TASKS: dict[str, type[AbstractModelOutput]] = {
    "image_classification": ImageClassificationModelOutput,
    "iterative_image_classification": ImageClassificationModelOutput,  # TRAK's name for its loop
}


def resolve_task(task: Any) -> Any:
    """The task that ``task`` names or is: a name of TASKS, a class, or an instance.

    Anything with ``get_output`` and ``get_out_to_loss_grad`` will do, so a subclass of
    ``trak.modelout_functions.AbstractModelOutput`` works as it is.
    """
    if isinstance(task, str):
        if task not in TASKS:
            raise ValueError(
                f"TRAKer: received task={task!r}; expected one of {', '.join(TASKS)}, or an "
                "instance of a fastproj.trak.AbstractModelOutput subclass"
            )
        return TASKS[task]()
    missing = [n for n in ("get_output", "get_out_to_loss_grad") if not hasattr(task, n)]
    if missing:
        raise TypeError(
            f"TRAKer: received task={task!r:.80} without {' and '.join(missing)}; expected one of "
            f"{', '.join(TASKS)}, or an instance of a fastproj.trak.AbstractModelOutput subclass"
        )
    return task() if isinstance(task, type) else task
