"""Per-sample gradients by a loop of ordinary backwards."""

from __future__ import annotations

from typing import Any

from fastproj.trak import batches
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads


class IterativeGradientComputer(AbstractGradientComputer):
    """A loop of ordinary backwards: slow, for models that nothing else can take.

    Parameters
    ----------
    model, task, grad_dim, dtype, device, grad_wrt : as in ``AbstractGradientComputer``.
    """

    def compute_rows(self, batch: tuple[Any, ...]) -> list[Grads]:
        """Of each output of a sample, name -> [B, *shape of the parameter]."""
        size = batches.size(batch)
        rows: list[Grads] = []
        for i in range(size):
            gradients = self.gradients_of(batch, i)
            if not rows:
                rows = [
                    {name: p.new_zeros(size, *p.shape) for name, p in self.chosen.items()}
                    for _ in gradients
                ]
            for grads, gradient in zip(rows, gradients, strict=True):
                for name, g in gradient.items():
                    if g is not None:
                        grads[name][i] = g
        return rows
