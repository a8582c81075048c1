"""Any function of a model and a batch as a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastproj.checks import describe
from fastproj.trak import batches
from fastproj.trak.tasks.base import Batch, BatchedModelOutput, Params, Terms, holding

# What each function is called with.
ARGUMENTS = {"output": ("model", "batch"), "loss": ("f",), "likelihood": ("f", "batch")}
NEIGHBOURS = 96  # outputs beside one whose curvature may be below 0 by rounding


@dataclass(frozen=True)
class FunctionModelOutput(BatchedModelOutput):
    """The task of a function of your own.

    Parameters
    ----------
    output : ``output(model, batch) -> Tensor [B]``, f of each sample. ``model`` is TRAKer's, with
        the weights in question: all of its methods, submodules and parameters may be used.
        ``batch`` is what ``featurize`` got (a list as a tuple). Samples must not be mixed.
    loss : ``loss(f) -> Tensor [B]``, the training loss of each sample by its own output, for
        Q = -dL/df; for a log-odds it is ``lambda f: torch.nn.functional.softplus(-f)``. None is the
        loss -f: Q = 1. Of a model in 16 bits, it gets f in float32.
    likelihood : ``likelihood(f, batch) -> Tensor [B]``, the log-likelihood of each sample's label
        up to a constant, a concave function of its output f. For a regression it is
        ``lambda f, batch: -0.5 * (batch[1] - f) ** 2``, for counts
        ``lambda f, batch: batch[1] * f - f.exp()``. With it the curvature of the loss is known
        exactly (see ``TRAKer(curvature=...)``), and Q is its slope. Then ``loss`` is not given.
        Where the curvature is below 0 by rounding alone, it counts as 0: it must be 0 or more for
        some output that is as good as the same, to half of the digits that outputs have. Of a model
        in 16 bits, f and the tensors of the batch are in float32.

    ``TRAKer(task=function)`` is the same as ``TRAKer(task=FunctionModelOutput(function))``.
    """

    output: Callable[[Any, Any], Tensor]
    loss: Callable[[Tensor], Tensor] | None = None
    likelihood: Callable[[Tensor, Any], Tensor] | None = None

    model_holds_weights: ClassVar[bool] = False  # ``outputs`` itself sees to it
    learns_along_output = True

    def __post_init__(self) -> None:
        for name, arguments in ARGUMENTS.items():
            check_function(name, getattr(self, name), arguments)
        if self.loss is not None and self.likelihood is not None:
            raise ValueError(
                "FunctionModelOutput: received both loss and likelihood; expected one of them "
                "(Q is the slope of the likelihood)"
            )

    @property
    def knows_likelihood(self) -> bool:
        """Whether ``likelihood`` was given."""
        return self.likelihood is not None

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """The function of a batch, [B]."""
        out = holding(model, weights, buffers, self.output, model, as_given(batch))
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
            out = self.outputs(model, weights, buffers, batch)
        out, batch = in_single(out, batch)
        if self.likelihood is not None:
            slope = self._slope(out, batch)
            check_alone("likelihood", self._slope, slope, out, batch)
            return slope
        if self.loss is None:
            return torch.ones_like(out)
        loss = self.loss
        q = -derivative("loss", loss, out)
        check_alone("loss", lambda f, _: -derivative("loss", loss, f), q, out, batch)
        return q

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """One row of each sample, its output's, with minus the second derivative as its weight."""
        out = self.outputs(model, weights, buffers, batch)
        f, batch = in_single(out, batch)
        slope, curvature = self._derivatives(f, batch)
        if not torch.is_grad_enabled():  # values are looked at, once for each batch
            check_alone("likelihood", self._slope, slope, f, batch)
            curvature = self._without_rounding(curvature, f, batch)
        return Terms(out, slope, curvature, f, out.new_zeros(len(out), 0))

    def _derivatives(self, f: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The slope of the log-likelihood by the outputs and minus the second derivative, [B]."""
        made: Any = torch.func.vjp(lambda f: self._slope(f, batch), f)
        slope, pull = made
        (second,) = pull(torch.ones_like(slope))
        return slope, -second

    def _without_rounding(self, curvature: Tensor, f: Tensor, batch: Batch) -> Tensor:
        """``curvature`` at outputs f [B], with 0 where it is below 0 by rounding alone.

        Large terms of it may cancel, as in 1 - tanh^2, and how large they are isn't seen. So
        rounding is told by chance: of outputs that differ from f by eps to sqrt(eps) of it, some
        have a curvature of 0 or more. That of a convex likelihood is below 0 for all of them.
        """
        below = curvature < 0
        eps = torch.finfo(f.dtype).eps
        size = torch.maximum(f.abs(), f.abs().nanmedian())  # f near 0 may be beside large labels
        for number in range(NEIGHBOURS if below.any() else 0):
            step = (-1) ** number * eps ** (1 - number / (2 * NEIGHBOURS))
            below = below & ~(self._derivatives(f + step * size, batch)[1] >= 0)
            if not below.any():
                break
        return torch.where(below, curvature, curvature.clamp(min=0))

    def _slope(self, out: Tensor, batch: Batch) -> Tensor:
        """The derivative of the log-likelihood by the outputs, [B]."""
        assert self.likelihood is not None
        likelihood, given = self.likelihood, as_given(batch)
        return derivative("likelihood", lambda f: likelihood(f, given), out)


def in_single(out: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
    """Outputs as constants, and their batch, for a likelihood or loss: in float32 where the model
    has 16 bits. A slope such as label - p, of a p near it, would have next to no digits there.
    """

    def wide(t: Tensor) -> Tensor:
        return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t

    f = wide(out.detach())
    if f.dtype != out.dtype:  # of one dtype, as some of PyTorch's losses need it
        batch = batches.map_leaves(wide, batch)
    return f, batch


def check_alone(
    name: str,
    slope_of: Callable[[Tensor, Batch], Tensor],
    slopes: Tensor,
    f: Tensor,
    batch: Batch,
) -> None:
    """Raise ValueError where the slopes of the first or last of B samples depend on the others.

    slope_of : gives them, [B], from the outputs f [B] and a batch.
    """
    size = len(f)
    if size < 2:
        return
    ends = [slice(0, 1), slice(size - 1, size)]
    alone = torch.cat([slope_of(f[one], batches.select(batch, one)) for one in ends])
    found = torch.cat([slopes[one] for one in ends])
    near = torch.finfo(slopes.dtype).eps ** 0.5 * slopes.abs().max()
    apart = (found - alone).abs() > near  # not where one of them is NaN, which is said elsewhere
    if apart.any():
        end = int(apart.int().argmax())
        raise ValueError(
            f"FunctionModelOutput: received a {name} that mixes the samples of a batch, or draws "
            f"random numbers: its derivative by the output of sample {ends[end].start} is "
            f"{float(found[end]):.6g} in a batch of {size}, and {float(alone[end]):.6g} for that "
            "sample alone; expected one of each sample by itself (without means over the batch; "
            "what the samples share, such as a risk set, and noise can be a part of the batch)"
        )


def as_given(batch: Batch) -> Any:
    """A batch as ``featurize`` got it: a dict or an object that holds samples stands alone."""
    if len(batch) == 1 and (isinstance(batch[0], Mapping) or batches.holds_samples(batch[0])):
        return batch[0]
    return batch


def check_function(name: str, function: Any, arguments: Sequence[str]) -> None:
    """Raise TypeError unless a function takes these arguments, or is None and may be."""
    if function is None and name != "output":
        return
    expected = f"expected a function of ({', '.join(arguments)})"
    if not callable(function):
        raise TypeError(f"FunctionModelOutput: received {name}={function!r:.80}; {expected}")
    try:
        taken = inspect.signature(function, follow_wrapped=False)
    except ValueError:  # some built-in functions have none
        return
    try:
        taken.bind(*arguments)
    except TypeError as error:
        raise TypeError(
            f"FunctionModelOutput: received {name} that takes {taken} ({error}); {expected}"
        ) from None


def derivative(name: str, function: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
    """The derivative of a function of each output by itself, [B]."""

    def checked(f: Tensor) -> Tensor:
        values = function(f)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(
                f"FunctionModelOutput: {name} returned {describe(values)} for outputs "
                f"{list(f.shape)}; expected a tensor of floating-point numbers, one for each"
            )
        if values.shape != f.shape:
            raise ValueError(
                f"FunctionModelOutput: {name} returned {list(values.shape)} for outputs "
                f"{list(f.shape)}; expected one for each"
            )
        return values

    made: Any = torch.func.vjp(checked, f)
    values, pull = made
    slope: Tensor = pull(torch.ones_like(values))[0]
    return slope
