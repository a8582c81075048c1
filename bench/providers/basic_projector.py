"""TRAK's BasicProjector (package `traker`) at its default block size."""

from __future__ import annotations

import importlib.metadata
from functools import partial

import torch
from torch import Tensor

from bench.providers.base import Case, Inputs, Prepared, Provider, relative_error

NAME = "TRAK BasicProjector"
TRAK_KINDS = {"rademacher": "rademacher", "gaussian": "normal"}


def providers() -> list[Provider]:
    """One."""
    return [Provider(NAME, prepare)]


def prepare(case: Case, inputs: Inputs) -> Prepared | str:
    """A projection of fewer rows: it is so slow that all of them would take minutes."""
    if case.dtype != torch.float32:
        return "timed in float32 only"
    if case.kind not in TRAK_KINDS:
        return "has dense matrices only"
    try:
        from trak.projectors import BasicProjector, ProjectionType
    except ImportError:
        return "not installed: pip install traker"
    rows = min(case.rows, case.trak_rows)
    grads = inputs.grads(rows)  # [B, p]
    kind = TRAK_KINDS[case.kind]
    projector = BasicProjector(rows, case.cols, 0, ProjectionType(kind), torch.device("cpu"))

    def error(result: Tensor) -> float:
        # Its matrix is its own: check the last block of columns, which the projector still holds.
        width = case.cols - (projector.num_blocks - 1) * projector.block_size
        matrix = projector.proj_matrix[:, :width].double()
        return relative_error(result[:, -width:], grads.double() @ matrix)

    version = importlib.metadata.version("traker")
    note = f"traker {version}, {kind}, block_size {projector.block_size}"
    call = partial(projector.project, grads, model_id=0)
    return Prepared(call, rows, case.flops(rows), error, 1e-5, note)
