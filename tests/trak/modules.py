"""Small modules for tests, made of parts and a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def of(seed: int | None = None, **parts: Callable[[], Any]) -> Callable[[Any], type[nn.Module]]:
    """Makes the function below it the forward of a class of modules, which has the function's name.

        @modules.of(first=lambda: nn.Linear(4, 4))
        def Once(self, x):
            return torch.tanh(self.first(x))

    Each module calls ``parts`` for its own, in order; with ``seed``, they are the same each time.
    """

    def made(forward: Any) -> type[nn.Module]:
        class Module(nn.Module):
            __doc__ = forward.__doc__

            def __init__(self) -> None:
                super().__init__()
                if seed is not None:
                    torch.manual_seed(seed)
                for name, part in parts.items():
                    setattr(self, name, part())

        Module.forward = forward
        Module.__name__ = Module.__qualname__ = forward.__name__
        Module.__module__ = forward.__module__
        return Module

    return made
