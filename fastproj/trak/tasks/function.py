"""Any function of a model and a batch as a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak import batches
from fastproj.trak.tasks.base import Batch, BatchedModelOutput, Params, holding


@dataclass(frozen=True)
class FunctionModelOutput(BatchedModelOutput):
    """The task of a function of your own.

    Parameters
    ----------
    output : ``output(model, batch) -> Tensor [B]``, f of each sample. ``model`` is TRAKer's, with
        the weights in question: all of its methods, submodules and parameters may be used.
        ``batch`` is what ``featurize`` got (a list as a tuple). Samples must not be mixed.
    loss : ``loss(f) -> Tensor [B]``, the training loss as a function of the outputs [B], for
        Q = -dL/df; for a log-odds it is ``lambda f: torch.nn.functional.softplus(-f)``. None is the
        loss -f: Q = 1.

    ``TRAKer(task=function)`` is the same as ``TRAKer(task=FunctionModelOutput(function))``.
    """

    output: Callable[[Any, Any], Tensor]
    loss: Callable[[Tensor], Tensor] | None = None

    model_holds_weights: ClassVar[bool] = False  # ``outputs`` itself sees to it

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """The function of a batch, [B]."""
        given = batch
        if len(batch) == 1 and (isinstance(batch[0], Mapping) or batches.holds_samples(batch[0])):
            given = batch[0]
        out = holding(model, weights, buffers, self.output, model, given)
        size = batches.size(batch)
        if not isinstance(out, Tensor) or out.shape not in ((size,), (size, 1)):
            received = describe(out) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"task {getattr(self.output, '__name__', self.output)!r}: it returned {received} "
                f"for a batch of {size}; expected one output for each sample, [{size}]"
            )
        return out.reshape(size)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """-dL/df of each sample, [B]."""
        with torch.no_grad():
            out = self.outputs(model, weights, buffers, batch).detach()
        if self.loss is None:
            return torch.ones_like(out)
        with torch.enable_grad():
            out.requires_grad_()
            losses = self.loss(out)
            if losses.shape != out.shape:
                raise ValueError(
                    f"FunctionModelOutput: loss returned {list(losses.shape)} for outputs "
                    f"{list(out.shape)}; expected one loss for each"
                )
            (slope,) = torch.autograd.grad(losses.sum(), out)
        return -slope
