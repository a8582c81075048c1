"""Per-sample gradients by a loop of ordinary backwards."""

from __future__ import annotations

from typing import Any

from fastproj.trak import batches
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads


class IterativeGradientComputer(AbstractGradientComputer):
    """A loop of ordinary backwards: slow, for models that nothing else can take."""

    def compute_per_sample_grad(self, batch: tuple[Any, ...]) -> Grads:
        """The gradients of all samples: name -> [B, *shape of the parameter]."""
        size = batches.size(batch)
        grads = {name: p.new_empty(size, *p.shape) for name, p in self.chosen.items()}
        for row in range(size):
            for name, g in self.gradient_of(batch, row).items():
                grads[name][row] = 0.0 if g is None else g
        return grads
