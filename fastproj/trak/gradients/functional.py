"""Per-sample gradients by ``torch.func``: one vectorised backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap

from fastproj.memory import is_out_of_memory
from fastproj.trak import batches
from fastproj.trak.gradients.attention import plain_attention
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads
from fastproj.trak.gradients.layout import FuncError
from fastproj.trak.gradients.running import for_each_sample, wide_sums


class FunctionalGradientComputer(AbstractGradientComputer):
    """``torch.func.vmap``: any function of one sample, but memory for all gradients of a chunk.

    Parameters
    ----------
    model, task, grad_dim, dtype, device, grad_wrt : as in ``AbstractGradientComputer``.

    Raises
    ------
    FuncError
        For a model or task that ``torch.func`` can't follow.
    """

    def compute_rows(self, batch: tuple[Any, ...]) -> list[Grads]:
        """Of each output of a sample, name -> [B, *shape of the parameter].

        Raises FuncError where plain autograd can take the model and ``torch.func`` can't.
        """
        tensors, rebuild = batches.unpack(batch)

        def gradients(chosen: Grads, *sample: Tensor) -> list[Grads]:
            def output(chosen: Grads) -> Tensor:
                return self.output_alone(chosen, rebuild([t.unsqueeze(0) for t in sample]))

            made: Any = vjp(output, chosen)
            out, pull = made
            units = torch.eye(out.numel(), dtype=out.dtype, device=out.device)
            return [pull(unit.reshape(out.shape))[0] for unit in units]

        chosen, in_dims = for_each_sample(self.model, self.chosen, batches.size(batch))
        # A model that seeds its random numbers by itself draws the same for each sample alone.
        vectorised = vmap(gradients, in_dims=(in_dims, *(0 for _ in tensors)), randomness="same")
        try:
            with plain_attention(self.model), wide_sums(self.chosen.values()):
                rows: list[Grads] = vectorised(chosen, *tensors)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.gradients_of(batch, 0)  # which raises what the model itself does
            said = str(error).strip().partition("\n")[0]
            raise FuncError(
                f"func: torch.func can't follow {self.task_name} and this model "
                f'({type(error).__name__}: {said[:400]}); expected gradient_computer="auto", which '
                "finds another way"
            ) from error
        return [{name: grads[name] for name in self.names} for grads in rows]
