"""The outputs of a model's calls, for a second look at them without running the model again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Replay:
    """What a model returned for which arguments, call by call.

    Within ``recording`` calls are noted; within ``playing`` a call with the arguments of the next
    one that was noted returns what that one did, without gradients. Other calls run the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._run: Callable[..., Any] = model.forward
        self._calls: list[tuple[list[Any], Any, Any]] = []

    @contextmanager
    def recording(self, first: Callable[[], None]) -> Iterator[None]:
        """Note calls; ``first`` is called after the first of them, before the caller sees it."""
        self._calls = []
        run = self._run = self._model.forward

        @wraps(run)  # tasks look at the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            before = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            output = run(*args, **kwargs)
            self._calls.append((before, spec, output))
            if len(self._calls) == 1:
                first()
            return output

        with replaced(self._model, forward):
            yield

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Return what was noted."""
        run = self._run
        left = list(self._calls)

        @wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if left:
                before, spec, output = left[0]
                leaves, now = pytree.tree_flatten((args, kwargs))
                if now == spec and all(map(same, leaves, before)):
                    left.pop(0)
                    return pytree.tree_map(without_graph, output)
            left.clear()
            return run(*args, **kwargs)

        with replaced(self._model, forward):
            yield


@contextmanager
def replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block, ``forward`` is the model's."""
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = own


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal; False where that can't be told."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return alike and torch.equal(a, b)
    return a is b or (type(a) is type(b) and isinstance(a, str | int | float) and a == b)


def without_graph(leaf: Any) -> Any:
    """A copy of a tensor, which the caller may write to; other leaves as they are."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
