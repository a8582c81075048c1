"""The interface of a task, and how a model is called with given weights."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fastproj.checks import as_float, describe
from fastproj.trak import batches

SMALL_BYTES = 1 << 16  # of a buffer that each call of a task gets a copy of
COPYING: ContextVar[bool] = ContextVar("COPYING", default=True)
LABELS_GO = " (labels go by name, as in {'input_ids': ..., 'labels': ...}, or after a mask)"
AT_LEAST = "1 for each token, 0 for padding alone"

Params = Mapping[str, Tensor]
Batch = tuple[Any, ...]


class Terms(NamedTuple):
    """The likelihood of the labels of a batch of training samples, with its curvature.

    The gradient of log p(y_i | x_i) is ``slope[i]`` times that of ``output[i]``. The curvature of
    the loss is made of outer products of gradients with themselves. It is the expectation of a sum:
    for each i, ``curvature[i]`` times the product of ``output[i]``, and for each j once that of
    ``drawn[i, j]``.

    Up to second order, outputs are linear in the logits z, with coefficients a that count as
    constants. ``along`` and ``drawn`` have the values a . z. A regression on the rows, with logits
    in place of labels, would be fitted to these values; lambda is chosen by them. Where all values
    are 0, they say nothing about the fit.

    output : [B], differentiable.
    slope, curvature, along : [B], constants; curvature is not below 0.
    drawn : [B, d], differentiable; d = 0 where ``curvature`` says all.
    """

    output: Tensor
    slope: Tensor
    curvature: Tensor
    along: Tensor
    drawn: Tensor


class AbstractModelOutput(ABC):
    """A task whose output is written for one sample, as in trak 0.3.2.

    Subclass it and pass an instance as ``TRAKer(task=...)``. ``weights`` and ``buffers`` are what
    ``torch.func.functional_call`` takes. Gradients come from ``torch.func.vmap`` or, where that
    can't, from a loop; a ``BatchedModelOutput`` can also have the faster module hooks.

    While one of the methods runs, ``model`` itself has these weights and buffers too: so
    ``model.encode(x)``, ``model.head.weight`` or ``model(x)`` are differentiated as well.

    ``q_are_probabilities`` says whether Q is 1 - p of a logistic loss, for lambda "auto"; None
    finds out from all Q of a checkpoint (``fastproj.trak.solving.ridge.meaning``).
    ``knows_likelihood`` says whether ``likelihood_terms`` is there, for the Fisher matrix of the
    labels' likelihood as the curvature (``TRAKer(curvature="fisher")``).
    ``learns_along_output`` says whether the terms have f and Q as they are, so that a number as
    lambda when finalising gives TRAK's scores. A subclass with other ``likelihood_terms`` doesn't
    inherit a True.
    ``several_labels`` says whether a sample's predictions are labels of one input, and not tokens
    of a sequence or a pair: lambda "auto" is larger then.
    ``size_power`` is the power of a parameter's size that its gradients count by, for
    ``curvature="fisher"`` (``fastproj.trak.Fisher``).
    ``model_holds_weights`` False leaves the model as it is: for tasks that need to see its own
    parameters, and call it by ``torch.func.functional_call`` alone.
    """

    q_are_probabilities: bool | None = None
    size_power: ClassVar[float] = 0.0
    model_holds_weights: ClassVar[bool] = True

    @abstractmethod
    def get_output(self, model: Any, weights: Params, buffers: Params, *sample: Any) -> Tensor:
        """f(z; theta) of one sample, a scalar.

        sample : the parts of the batch without their batch dimension, which the model needs back
            (``image.unsqueeze(0)``). Of a list by sample, the entry. Of an object that holds
            samples, one that holds this sample alone.

        This runs under ``torch.func.vmap``: no ``.item()``, no branching on values.
        """

    @abstractmethod
    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """Q of each sample, [B] or [B, 1]: minus the derivative of the loss by the output."""

    @property
    def knows_likelihood(self) -> bool:
        """Whether ``likelihood_terms`` is there."""
        return False

    @property
    def several_labels(self) -> bool:
        """Whether a sample's predictions are labels of one input."""
        return False

    @property
    def learns_along_output(self) -> bool:
        """Whether ``Terms.output`` is f itself and ``Terms.slope`` is Q: one prediction a sample.

        The training features are TRAK's then, and its formula can be had from them.
        """
        return False

    def check_batch(self, batch: Batch) -> None:  # noqa: B027
        """Raise TypeError or ValueError for a batch that this task can't take."""

    def num_predictions(self, batch: Batch) -> int:
        """T, the largest number of labels that are predicted for a sample of this batch."""
        return 1


class BatchedModelOutput(AbstractModelOutput):
    """A task whose output is written for a batch, without mixing its samples."""

    @abstractmethod
    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """f(z; theta) of each sample, [B]; entry i depends on sample i alone."""

    def get_output(
        self, model: Any, weights: Params | None, buffers: Params, *sample: Any
    ) -> Tensor:
        """f(z; theta) of one sample, a scalar: ``outputs`` of a batch of one.

        For weights None, f of each sample of a batch, which is what trak's loop asks of a task.
        """
        if weights is None:
            return self.outputs(model, {}, {}, sample)
        batch = batches.map_leaves(lambda t: t.unsqueeze(0), sample)
        return self.outputs(model, weights, buffers, batch).reshape(())

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """The terms of the samples, from one forward.

        noise : float32 [B, d, T, 3], by ``tasks.likelihood.UNIFORM``, ``OWN_SIGN`` and
            ``OTHER_SIGN``: numbers in 0..1 and two signs, for each of d rows to draw and each of T
            predictions of a sample. Number the predictions without padding, whose length is the
            batch's.
        """
        raise NotImplementedError(f"{type(self).__name__} says nothing of a likelihood")


def definer(owner: Any, name: str) -> int:
    """How far up among the ancestors of a class, or of an object's class, the method ``name`` is
    defined; -1: in the object itself.
    """
    kind = owner if isinstance(owner, type) else type(owner)
    if owner is not kind and name in getattr(owner, "__dict__", {}):
        return -1
    return next((i for i, base in enumerate(kind.__mro__) if name in vars(base)), len(kind.__mro__))


def has_batched_outputs(task: Any) -> bool:
    """Whether a task's ``outputs`` give f: not where a subclass changes ``get_output`` alone."""
    return hasattr(task, "outputs") and definer(task, "outputs") <= definer(task, "get_output")


def call(model: Any, weights: Params, buffers: Params, *args: Any, **kwargs: Any) -> Any:
    """``model(*args, **kwargs)`` with the given weights and buffers in place of its own."""
    return called(model, {**(weights or {}), **(buffers or {})}, args, kwargs)


def called(module: nn.Module, tensors: Params, args: Any, kwargs: Any = None) -> Any:
    """``functional_call``, also of a module that takes gradients itself, as of an energy by
    positions, where they are off: it is called with them then, and what it returns is detached.
    """
    try:
        return functional_call(module, dict(tensors), args, kwargs)
    except RuntimeError as error:
        if torch.is_grad_enabled() or "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        made = functional_call(module, dict(tensors), args, kwargs)
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, made)


class Holder(nn.Module):
    """A function of a model as a module around it, for ``functional_call``."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *args: Any) -> Any:
        """The function's result."""
        return self.function(*args)


def holding(
    model: nn.Module, weights: Params, buffers: Params, function: Callable[..., Any], *args: Any
) -> Any:
    """``function(*args)`` while the model has the given weights and buffers in place of its own."""
    tensors = {f"model.{name}": t for name, t in {**weights, **buffers}.items()}
    return called(Holder(model, function), tensors, args)


def run(
    method: Callable[..., Any], model: nn.Module, weights: Params, buffers: Params, *args: Any
) -> Any:
    """``method(model, weights, buffers, *args)`` of a task, with the weights in the model too.

    Small buffers are copies: what the model writes to them is gone afterwards, and each call begins
    with those of the checkpoint.
    """
    task = getattr(method, "__self__", None)
    if COPYING.get():
        buffers = {n: t.clone() if t.nbytes <= SMALL_BYTES else t for n, t in buffers.items()}
    if not getattr(task, "model_holds_weights", True):
        return method(model, weights, buffers, *args)
    return holding(model, weights, buffers, method, model, weights, buffers, *args)


def logits_of(task: str, output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, its ``logits``, or the first of a tuple."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{task}: the model returned {type(output).__name__}; expected logits: a tensor, an "
            "object with .logits, or a tuple that starts with them"
        )
    return output


def describe_parts(batch: Batch) -> str:
    """The parts of a batch, for messages."""
    return ", ".join(
        describe(part)
        if isinstance(part, Tensor)
        else f"dict of {', '.join(map(str, part))}"
        if isinstance(part, Mapping)
        else f"list of {type(part[0]).__name__}"
        if isinstance(part, batches.SampleList | batches.SampleTuple)
        else type(part).__name__
        for part in batch
    )


def is_index(t: Any) -> bool:
    """Whether ``t`` is a tensor of integers."""
    return (
        isinstance(t, Tensor)
        and not t.dtype.is_floating_point
        and not t.dtype.is_complex
        and str(t.dtype) != "torch.bool"
    )


def check_temperature(name: str, temperature: float, argument: str = "temperature") -> float:
    """``temperature`` as a float; raises ValueError unless it is positive and finite."""
    value = as_float(temperature)
    if value is None or not 0 < value < math.inf:
        raise ValueError(
            f"{name}: received {argument}={temperature!r:.80}; expected a positive number"
        )
    return value


def check_masks(
    task: str, inputs: Mapping[str, Any], cure: str = LABELS_GO, least: str = AT_LEAST
) -> None:
    """Raise ValueError unless masks of tokens, [B, T], are 1 and 0, with a 1 for each sample: what
    else a model makes of one may be no error, and wrong.

    Masks of pairs of tokens, [B, ..., T, T], may also be what is added to the logits of attention.

    cure : where else what is no mask may belong, for the message.
    least : what is expected where a mask hides a sample as a whole.
    """
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            continue
        bad = ((mask != 0) & (mask != 1)).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"{task}: received {name} with the value {mask[row, column].item()} at row {row} "
                f"of the batch; expected 1 for a token and 0 for padding{cure}"
            )
        empty = (~(mask != 0).any(1)).nonzero()
        if len(empty):
            raise ValueError(
                f"{task}: received {name} without a 1 at row {int(empty[0])} of the batch; "
                f"expected {least}"
            )
