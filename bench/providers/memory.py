"""Reading and copying the gradients: what the memory allows a projection that reads them once."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from bench.providers.base import Case, Inputs, Prepared, Provider, relative_error

READ, COPY = "read G", "copy G"
# Of torch's one float32 sum of 2^25 squares, 2e-3. It shows that all was read, no more.
ALL_READ = 1e-2
PIECE = 1 << 24  # entries that are converted to float64 at once


def providers() -> list[Provider]:
    """Two."""
    return [Provider(READ, prepare_read), Provider(COPY, prepare_copy)]


def prepare_read(case: Case, inputs: Inputs) -> Prepared | str:
    """The 2-norm of the gradients: of torch's reductions, the one that memory bounds on a CPU.

    16-bit gradients are read as float32, two at a time: the conversion would cost more.
    """
    flat = inputs.grads(case.rows).view(-1)  # [B P]
    if case.dtype.itemsize == 2:
        flat = flat[: flat.numel() // 2 * 2].view(torch.float32)
    squares = [float(part.double().square().sum()) for part in flat.split(PIECE)]
    exact = torch.tensor(math.sqrt(math.fsum(squares)), dtype=torch.float64)

    def error(result: Tensor) -> float:
        return relative_error(result.cpu(), exact)

    call = partial(torch.linalg.vector_norm, flat)
    read = 1.0 * flat.numel() * flat.element_size()
    note = "torch.linalg.vector_norm"
    return Prepared(call, case.rows, 0.0, error, ALL_READ, note, moved_bytes=read)


def prepare_copy(case: Case, inputs: Inputs) -> Prepared | str:
    """The gradients copied to another place; bytes read and bytes written count."""
    grads = inputs.grads(case.rows)
    target = torch.empty_like(grads)

    def error(result: Tensor) -> float:
        return 0.0 if torch.equal(result, grads) else float("inf")

    moved = 2 * case.read_bytes(case.rows)
    call = partial(target.copy_, grads)
    return Prepared(call, case.rows, 0.0, error, 0.0, "torch.Tensor.copy_", moved_bytes=moved)
