"""A pytest plugin: tests of the CUDA backend that are written for a GPU, run on the emulation.

`cuda` tensors are CPU tensors, the backend's three functions are those of emulation.py. So the
tests themselves are known to be right before they meet a GPU: test_gpu_tests.py runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastproj.backends import cuda, registry
from fastproj.call import TERMS, Call
from tests.cuda import emulation


class OnCpu(TorchFunctionMode):
    """Every `cuda` that a torch function gets reads `cpu`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        def moved(value: Any) -> Any:
            names = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
            return "cpu" if names else value

        kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
        return function(*map(moved, args), **kwargs)


def settings(call: Call) -> dict[str, Any]:
    """What the emulation's functions call the parts of a call."""
    return {**call.key.__dict__, "row_offset": call.row_offset}


def product(call: Call) -> dict[str, Any]:
    terms = TERMS[call.precision]
    return {**settings(call), "scale": call.scale, "terms": terms, "variant": cuda._variant()}


def project(pieces: list[Tensor], out: Tensor, call: Call) -> None:
    """The adapter's project, on the emulation."""
    for piece in pieces:
        emulation.project(piece, out.shape[1], out=out, accumulate=call.accumulate, **product(call))
        call = call._replace(row_offset=call.row_offset + piece.shape[1], accumulate=True)


def project_transpose(y: Tensor, out: Tensor, call: Call) -> None:
    """The adapter's project_transpose, on the emulation."""
    emulation.project_transpose(y, out.shape[1], out=out, **product(call))


def matrix(out: Tensor, call: Call, col_offset: int) -> None:
    """The adapter's matrix, on the emulation."""
    emulation.matrix(out, col_offset=col_offset, **settings(call))


# Before test modules are imported: they ask for the GPU then.
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.mem_get_info = lambda *_: (1 << 30, 1 << 30)
torch.cuda.synchronize = lambda *_: None
cuda.unavailable = lambda: None
cuda.unsupported = lambda *_: None
cuda.project, cuda.project_transpose, cuda.matrix = project, project_transpose, matrix
registry.unavailable = lambda name: None if name == "cuda" else f"{name} is not what is tested"


@pytest.fixture(autouse=True)
def cpu_for_cuda() -> Iterator[None]:
    with OnCpu():
        yield
