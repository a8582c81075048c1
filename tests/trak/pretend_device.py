"""A device "pretend" for machines without a GPU: its tensors are computed on the CPU, but an
operation that mixes them with the CPU's raises, as CUDA would. An import registers it, for good.

Values come back by ``.cpu()``, ``.item()`` and copies alone, and an index may stay on the CPU. The
autograd engine runs such nodes in a thread of the device's, as for a GPU. What torch's guard for
Python devices has no streams for is ``torch.autograd.grad`` by tensors outside of ``torch.func``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = ("aten._to_copy", "aten.copy_")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")


class Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=Module())


class Pretend(Tensor):
    """A tensor of the device; its values are those of ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        out: Pretend = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("pretend", 0),
            requires_grad=held.requires_grad,
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, args, kwargs or {})


def compute(op: Any, args: Any, kwargs: Any) -> Any:
    """Carry out ``op`` on the CPU, where its operands may be used together."""
    leaves = tree_leaves((args, kwargs))
    ours = {id(t.held): t for t in leaves if isinstance(t, Pretend)}
    there = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, Pretend) and t.dim()]
    if str(op).startswith(INDEXING):
        there = [t for t in there if all(t is not index for index in args[1])]
    if ours and there and not str(op).startswith(COPIES):
        shapes = [list(t.shape) for t in ours.values()], [list(t.shape) for t in there]
        raise RuntimeError(f"{op}: tensors {shapes[0]} of device pretend, {shapes[1]} of the CPU")

    def down(value: Any) -> Any:
        if isinstance(value, Pretend):
            return value.held
        return torch.device("cpu") if is_pretend(value) else value

    def up(value: Any) -> Any:
        new = isinstance(value, Tensor) and not isinstance(value, Pretend)
        return ours.get(id(value), Pretend(value)) if new else value

    result = op(*tree_map(down, args), **tree_map(down, kwargs))
    device = kwargs.get("device")
    stays = is_pretend(device) if device is not None else bool(ours)
    if str(op).startswith("aten.copy_"):
        stays = isinstance(args[0], Pretend)
    return tree_map(up, result) if stays else result


def is_pretend(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "pretend"


class PretendDevice(TorchDispatchMode):
    """Tensors can be made on the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_pretend(kwargs.get("device")) or any(
            isinstance(leaf, Pretend) for leaf in tree_leaves((args, kwargs))
        ):
            return compute(op, args, kwargs)
        return op(*args, **kwargs)
