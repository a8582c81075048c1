"""Threads that use one model wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locking = threading.Lock()  # of ``_locks``


def one_at_a_time(method: Method) -> Method:
    """A method that waits while another thread is in such a method of an object of the same model.

    While gradients are computed, hooks are on the model or its parameters are replaced. What
    another thread computes with it then would be mixed with them.
    """

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock_of(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, call)


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model; it goes with the model."""
    with _locking:
        return _locks.setdefault(model, threading.RLock())
