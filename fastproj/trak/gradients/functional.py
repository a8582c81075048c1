"""Per-sample gradients by ``torch.func``: one vectorised backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
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

        chosen, in_dims = self.chosen, None
        if any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in self.model.modules()):
            # A state that begins alike for all samples can't take up one for each in place, unless
            # the weights that it is multiplied by count as a sample's own.
            size, in_dims = batches.size(batch), 0
            chosen = {name: p.expand(size, *p.shape) for name, p in chosen.items()}
        gradient = vmap(
            grad(output), in_dims=(in_dims, *(0 for _ in tensors)), randomness="different"
        )
        with plain_attention(self.model):
            grads: Grads = gradient(chosen, *tensors)
        return {name: grads[name] for name in self.names}
