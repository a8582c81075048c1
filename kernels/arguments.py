"""What every launch passes to a kernel, in the form that a kernel takes it."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastproj.spec import MatrixKey

from .plan import signed32

MAX_GRID = 65535  # programs in the second dimension of a grid


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within it, the device of ``tensor`` is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def double_bits(value: float) -> int:
    """The bits of a float64 as an integer: Triton passes a float itself as float32."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def seeds(key: MatrixKey) -> dict[str, int]:
    """The Philox key, and the stream in its counter."""
    return {
        "stream_id": signed32(key.stream),
        "seed_low": signed32(key.seed),
        "seed_high": signed32(key.seed >> 32),
    }


def alignment(piece: Tensor, origin: int) -> int:
    """Bytes to which every row of ``piece`` is aligned at every panel's start: 16, 8, 4 or 1."""
    size = piece.element_size()
    address = piece.data_ptr() + origin * size
    stride = piece.stride(0) * size
    return next((n for n in (16, 8, 4) if address % n == 0 and stride % n == 0), 1)
