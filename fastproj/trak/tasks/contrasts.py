"""What margins and likelihoods need of logits: a label against the mean of the others.

Logits of a vocabulary are the largest tensors of a language model: [B, T, C] of one batch take more
than many models' parameters. So none is kept but the logits themselves, from which the backward
makes the gradient in one tensor. All else is made block by block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 1024 * 1024  # of logits that are worked on at once: a cache's size
BLOCK_BYTES_GPU = 64 * 1024 * 1024  # where calls cost more than memory

Block = tuple[slice, slice]


class Contrasts(NamedTuple):
    """Of logits z [..., C] with labels y, where pi is the softmax without the label.

    In float32 or more. Differentiable by z, once; pi counts as a constant.

    own : [...], z_y.
    rest : [...], logsumexp of the others.
    mean : [...], pi . z.
    soft, soft_mean : as rest and mean of z / t, times the temperature t; soft_mean is a constant.
    drawn : [..., d], z_c of classes c that are drawn from pi.
    """

    own: Tensor
    rest: Tensor
    mean: Tensor
    soft: Tensor
    soft_mean: Tensor
    drawn: Tensor


def contrasts(
    logits: Tensor, labels: Tensor, uniform: Tensor | None = None, temperature: float = 1.0
) -> Contrasts:
    """A label's logit, and what it is compared with.

    logits : [..., C]. labels : integers [...]. uniform : [..., d], in 0..1; None is d = 0. A class
        is drawn by the inverse of the distribution. temperature : t.
    """
    shape, draws = labels.shape, 0 if uniform is None else uniform.shape[-1]
    two = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    if uniform is None:
        uniform = logits.new_zeros(0)
    found: Any = Compared.apply(
        logits.reshape(*two, logits.shape[-1]),
        labels.long().reshape(two),
        uniform.reshape(*two, draws),
        temperature,
    )
    *numbers, drawn, _ = found
    own, rest, mean, soft, soft_mean = (x.reshape(shape) for x in numbers)
    return Contrasts(own, rest, mean, soft, soft_mean, drawn.reshape(*shape, draws))


class Compared(torch.autograd.Function):
    """Contrasts of logits [B, R, C] by labels [B, R] and uniform [B, R, d], and the classes c."""

    @staticmethod
    def forward(
        z: Tensor, labels: Tensor, uniform: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        """[B, R] five times, and [B, R, d] twice."""
        wide = torch.promote_types(z.dtype, torch.float32)
        own = z.gather(-1, labels.unsqueeze(-1)).squeeze(-1).to(wide)
        rest, mean, soft, soft_mean = (torch.empty_like(own) for _ in range(4))
        classes = labels.new_empty(uniform.shape)
        for block in blocks(z, wide):
            others = z[block].to(wide, copy=True)
            others.scatter_(-1, labels[block].unsqueeze(-1), -torch.inf)
            top = others.amax(-1, keepdim=True)
            others.sub_(top)
            finite = z[block].to(wide).clamp(min=torch.finfo(wide).min)  # a logit may be -inf
            if temperature != 1:
                even = (others / temperature).exp_()
                total = even.sum(-1)
                soft[block] = total.log().mul_(temperature).add_(top.squeeze(-1))
                soft_mean[block] = even.mul_(finite).sum(-1).div_(total)
                del even
            others.exp_()  # pi, but for its sum
            total = others.sum(-1)
            rest[block] = total.log().add_(top.squeeze(-1))
            if uniform.shape[-1]:
                below = others.cumsum(-1)
                last = below[..., -1:]
                # Below the last: a class that can't be is never drawn.
                last = last.nextafter(torch.zeros_like(last))
                place = torch.minimum(uniform[block].to(wide) * below[..., -1:], last)
                found = torch.searchsorted(below, place.contiguous(), right=True)
                classes[block] = found.clamp_(max=z.shape[-1] - 1)
                del below
            mean[block] = finite.mul_(others).sum(-1).div_(total)
        if temperature == 1:
            soft.copy_(rest)
            soft_mean.copy_(mean)
        return own, rest, mean, soft, soft_mean, z.gather(-1, classes).to(wide), classes

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """The backward needs the logits, and a few numbers for each row."""
        z, labels, _, ctx.temperature = inputs
        _, rest, _, soft, soft_mean, _, classes = output
        ctx.mark_non_differentiable(soft_mean, classes)
        ctx.save_for_backward(z, labels, rest, soft, classes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """By the logits."""
        own, rest, mean, soft, _, drawn, _ = grads
        slope: Any = ComparedSlope.apply(
            *ctx.saved_tensors, own, rest + mean, soft, drawn, ctx.temperature
        )
        return slope, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[Any, Any]:
        """As one larger batch."""
        return merged(Compared, info.batch_size, in_dims, given)


class ComparedSlope(torch.autograd.Function):
    """The gradient by logits [B, R, C] from those by what is made of them.

    That is ``own``, ``rest`` and ``mean`` together, ``soft``, and ``drawn``.
    """

    @staticmethod
    def forward(
        z: Tensor,
        labels: Tensor,
        rest: Tensor,
        soft: Tensor,
        classes: Tensor,
        by_own: Tensor,
        by_pi: Tensor,
        by_soft: Tensor,
        by_drawn: Tensor,
        temperature: float,
    ) -> Tensor:
        """[B, R, C], in the dtype of the logits."""
        slope = torch.empty_like(z, memory_format=torch.contiguous_format)
        if temperature == 1:
            by_pi = by_pi + by_soft
        for block in blocks(z, rest.dtype):
            part = z[block].to(rest.dtype, copy=True)
            part.sub_(rest[block].unsqueeze(-1)).exp_().mul_(by_pi[block].unsqueeze(-1))
            if temperature != 1:
                even = z[block].to(rest.dtype, copy=True)
                even.sub_(soft[block].unsqueeze(-1)).div_(temperature).exp_()
                part.addcmul_(even, by_soft[block].unsqueeze(-1))
            part.scatter_(-1, labels[block].unsqueeze(-1), by_own[block].unsqueeze(-1))
            part.scatter_add_(-1, classes[block], by_drawn[block])
            slope[block] = part
        return slope

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """There is no second derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[Any, Any]:
        """As one larger batch."""
        return merged(ComparedSlope, info.batch_size, in_dims, given)


def merged(function: Any, size: int, in_dims: Any, given: tuple[Any, ...]) -> tuple[Any, Any]:
    """A function of [B, R, ...] and, at last, a number, for ``size`` of each.

    And the dimensions of the results.
    """
    parts = [
        (t.expand(size, *t.shape) if where is None else t.movedim(where, 0)).flatten(0, 1)
        for t, where in zip(given[:-1], in_dims[:-1], strict=True)
    ]
    found = function.apply(*parts, given[-1])
    if isinstance(found, Tensor):
        return found.unflatten(0, (size, -1)), 0
    return tuple(t.unflatten(0, (size, -1)) for t in found), tuple(0 for _ in found)


def blocks(z: Tensor, dtype: torch.dtype) -> Iterator[Block]:
    """Parts of [B, R, C] that BLOCK_BYTES hold: of several b, or of the rows of one."""
    most = BLOCK_BYTES if z.device.type == "cpu" else BLOCK_BYTES_GPU
    size, rows, classes = z.shape
    fit = max(1, most // max(1, classes * dtype.itemsize))  # rows
    step = min(fit, max(rows, 1))
    several = max(1, fit // max(rows, 1))
    for b in range(0, size, several):
        for r in range(0, rows, step):
            yield slice(b, b + several), slice(r, r + step)
