"""Per-sample gradients by ``torch.func``: one vectorised backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.func import grad, vmap

from fastproj.trak import batches
from fastproj.trak.gradients.attention import plain_attention
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads


class FunctionalGradientComputer(AbstractGradientComputer):
    """``torch.func.vmap``: any function of one sample, but memory for all gradients of a chunk."""

    def compute_per_sample_grad(self, batch: tuple[Any, ...]) -> Grads:
        """The gradients of all samples: name -> [B, *shape of the parameter]."""
        tensors, rebuild = batches.unpack(batch)

        def output(chosen: Grads, *sample: Tensor) -> Tensor:
            return self.output_alone(chosen, rebuild([t.unsqueeze(0) for t in sample]))

        gradient = grad(output)
        in_dims = (None, *(0 for _ in tensors))
        with plain_attention(self.model):
            grads: Grads = vmap(gradient, in_dims=in_dims, randomness="different")(
                self.chosen, *tensors
            )
        return {name: grads[name] for name in self.names}
