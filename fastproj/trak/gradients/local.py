"""Per-sample gradients of one module of any kind, by running it again sample by sample."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from fastproj.memory import is_out_of_memory
from fastproj.trak.gradients.base import dense
from fastproj.trak.gradients.layout import SHARED, BatchDim, HooksError
from fastproj.trak.gradients.parts import Piece
from fastproj.trak.gradients.running import for_each_sample, forgetful, vectorised, wide_sums

logger = logging.getLogger("fastproj.trak")


def local_gradients(
    module: nn.Module,
    names: set[str],
    arguments: list[Any],
    dims: list[BatchDim | None],
    spec: Any,
    places: list[int],
    grads: list[Tensor | None],
    size: int,
    warned: set[str],
) -> Iterator[tuple[str, Piece]]:
    """The gradients of a module's parameters ``names`` from those by its outputs.

    Parameters
    ----------
    arguments : the leaves of (args, kwargs); tensors that have a batch dimension with it first.
    dims : where it is in what the module takes; SHARED for the other leaves.
    spec : of the tree of (args, kwargs).
    places, grads : which leaves of the output the gradients [B, ...] belong to; None is zero.
    warned : what has been said already.

    Yields (name, Piece) for each parameter. ``torch.func.vmap`` does it, or a loop where it can't.
    Raises HooksError where the module can't take one sample, as a bag with the offsets of a batch.
    """
    params = {name: module.get_parameter(name).detach() for name in sorted(names)}
    batched = [i for i, where in enumerate(dims) if where is not SHARED]
    wanted = [place for place, g in zip(places, grads, strict=True) if g is not None]
    given = [g for g in grads if g is not None]

    def outputs(own: dict[str, Tensor], inputs: list[Tensor]) -> list[Tensor]:
        leaves = [a.detach().clone() if isinstance(a, Tensor) else a for a in arguments]
        for i, x in zip(batched, inputs, strict=True):
            leaves[i] = alone(x, dims[i]).clone()  # which the module may write to
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with forgetful(module.modules()):
            made = functional_call(module, own, args, kwargs, tie_weights=False)
        found = pytree.tree_leaves(made)
        return [found[place] for place in wanted]

    def vectorised_gradient(
        params: dict[str, Tensor], inputs: list[Tensor], slopes: list[Tensor]
    ) -> dict[str, Tensor]:
        made, pull, *_ = vjp(lambda own: outputs(own, inputs), params)
        (result,) = pull([s.reshape(y.shape) for s, y in zip(slopes, made, strict=True)])
        return dict(result)

    def gradient(inputs: list[Tensor], slopes: list[Tensor]) -> dict[str, Tensor]:
        own = {name: p.detach().requires_grad_() for name, p in params.items()}
        with torch.enable_grad():
            pairs = zip(outputs(own, inputs), slopes, strict=True)
            made = [(y, s.reshape(y.shape)) for y, s in pairs if y.requires_grad]
        if not made:
            return {name: torch.zeros_like(p) for name, p in params.items()}
        results, cotangents = zip(*made, strict=True)
        found = torch.autograd.grad(results, list(own.values()), cotangents, allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else dense(g)
            for (name, p), g in zip(own.items(), found, strict=True)
        }

    inputs = [arguments[i].detach() for i in batched]
    own, dim = for_each_sample(module, params, size)
    # Without gradients but for those by the parameters, which vjp sees to.
    with vectorised(module), wide_sums(params.values()), torch.no_grad():
        try:
            found = vmap(vectorised_gradient, in_dims=(dim, 0, 0))(own, inputs, given)
        except (RuntimeError, ValueError) as error:  # e.g. it branches on values
            if is_out_of_memory(error):
                raise
            try:
                rows = [
                    gradient([x[b] for x in inputs], [g[b] for g in given]) for b in range(size)
                ]
            except (RuntimeError, ValueError, IndexError) as alone_too:
                if is_out_of_memory(alone_too):
                    raise
                raise HooksError(
                    f"hooks: {type(module).__name__} can't take what belongs to one sample of its "
                    f"inputs: {first_line(alone_too)} (expected a module whose inputs hold the "
                    "samples apart; gradient_computer='func' runs the whole model for each)"
                ) from alone_too
            warn_loop(warned, type(module).__name__, error)
            found = {name: torch.stack([row[name] for row in rows]) for name in params}
    for name, g in found.items():
        yield name, Piece(0, g.detach().reshape(size, -1))


def warn_loop(warned: set[str], what: str, error: Exception) -> None:
    """Say once that a part of the gradient comes from a loop over samples."""
    if what not in warned:
        warned.add(what)
        logger.warning(
            "hooks: torch.func.vmap can't take %s, a loop over the samples does: %s",
            what,
            first_line(error),
        )


def first_line(error: Exception) -> str:
    """What an error says first, for a message of our own."""
    return str(error).partition("\n")[0][:200]


def alone(x: Tensor, where: BatchDim | None) -> Tensor:
    """One sample's part of an input as the module would see it in a batch of one."""
    assert where is not None
    return x.movedim(0, where.dim) if where.folded else x.unsqueeze(where.dim)
