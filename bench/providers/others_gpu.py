"""Packages that project on a GPU, where they can be imported: fast_jl, sjlt, fast-hadamard.

Their matrices are their own, so what is checked is that lengths are kept: the mean over the batch
of |y|^2 / |g|^2, within six standard deviations of a random projection to K columns.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.providers.base import Case, Inputs, Prepared, Provider

FAST_JL = "fast_jl"
SJLT = "sjlt"
HADAMARD = "fast_hadamard_transform"
HADAMARD_ROWS = 1 << 15  # the longest transform that it has
FAST_JL_KINDS = {"rademacher": "rademacher", "gaussian": "normal"}


def providers() -> list[Provider]:
    """Two."""
    return [Provider(FAST_JL, prepare_fast_jl), Provider(SJLT, prepare_sjlt)]


def sparse_providers() -> list[Provider]:
    """Those that are as cheap as kind sjlt."""
    return [Provider(SJLT, prepare_sjlt), Provider(HADAMARD, prepare_hadamard)]


def module(name: str) -> Any:
    """The package, or why it can't be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: built for another torch
        return f"not importable: {error}"


def length_error(grads: Tensor, squared_scale: float) -> Callable[[Tensor], float]:
    """|mean of |y|^2 / |g|^2 - 1|, where |y|^2 is to be multiplied by ``squared_scale``."""
    lengths = grads.double().square().sum(1)

    def measure(result: Tensor) -> float:
        ratios = result.double().square().sum(1) * squared_scale / lengths
        return float((ratios.mean() - 1).abs())

    return measure


def length_bound(case: Case) -> float:
    """Six standard deviations of that mean for a random projection: 2 / (B K) is its variance."""
    return 6 * (2 / (case.batch * case.cols)) ** 0.5


def prepare_fast_jl(case: Case, inputs: Inputs) -> Prepared | str:
    """Takes fp32 and fp16, K a multiple of 512, and batches of 8, 16 or 32 rows."""
    fast_jl = module(FAST_JL)
    if isinstance(fast_jl, str):
        return fast_jl
    if case.kind not in FAST_JL_KINDS:
        return "has dense matrices only"
    if case.dtype == torch.bfloat16:
        dtype, note = torch.float16, "takes no bfloat16: timed with float16; "
    else:
        dtype, note = case.dtype, ""
    if case.cols % 512 or case.batch % 8:
        return "takes K in multiples of 512 and batches in multiples of 8"
    tile = next(n for n in (32, 16, 8) if case.batch % n == 0)
    function = getattr(fast_jl, f"project_{FAST_JL_KINDS[case.kind]}_{tile}")
    rows = min(case.rows, (2**31 - 1) // case.batch)  # its offsets have 32 bits
    grads = inputs.grads(rows).to(dtype)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    call = partial(function, grads, case.cols, 0, multiprocessors)
    error = length_error(grads, 1 / case.cols)
    note += f"{tile} samples at a time; lengths checked"
    return Prepared(call, rows, case.flops(rows), error, length_bound(case), note)


def prepare_sjlt(case: Case, inputs: Inputs) -> Prepared | str:
    """Its sparse matrix: beside kind sjlt with as many entries a row, beside dense kinds with one.

    Beside dense kinds its rate is in their terms.
    """
    sjlt = module(SJLT)
    if isinstance(sjlt, str):
        return sjlt
    grads = inputs.grads(case.rows)
    entries = max(1, case.cols // case.block) if case.block else 1
    projection = sjlt.SJLTProjection(original_dim=case.rows, proj_dim=case.cols, c=entries)
    error = length_error(grads, 1.0)
    note = f"another matrix: {entries} a row; lengths checked"
    if not case.block:
        note = "another matrix: one entry a row; GF/s as if it were dense; lengths checked"
    call = partial(projection, grads)
    return Prepared(call, case.rows, case.flops(case.rows), error, length_bound(case), note)


def prepare_hadamard(case: Case, inputs: Inputs) -> Prepared | str:
    """A block SRHT: signs, a Hadamard transform of each 32,768 entries, K of them at random, sums.

    Each block has signs and places of its own. K is at most 32,768, and the rows are whole blocks.
    """
    hadamard = module(HADAMARD)
    if isinstance(hadamard, str):
        return hadamard
    length = HADAMARD_ROWS
    blocks = case.rows // length
    if case.cols > length or not blocks:
        return f"its transforms have {length} entries: takes K <= {length} <= P"
    rows = blocks * length
    grads = inputs.grads(rows).view(case.batch, blocks, length)
    generator = torch.Generator(case.device).manual_seed(0)
    bits = torch.randint(2, (blocks, length), generator=generator, device=case.device)
    signs = (1 - 2 * bits).to(case.dtype)
    order = torch.rand(blocks, length, generator=generator, device=case.device).argsort(1)
    places = order[:, : case.cols].expand(case.batch, blocks, case.cols)

    def project() -> Tensor:
        mixed = hadamard.hadamard_transform(grads * signs)  # [B, blocks, 32768]
        return mixed.gather(2, places).sum(1, dtype=torch.float32)  # [B, K]

    error = length_error(grads.flatten(1), 1 / case.cols)
    note = f"block SRHT, {blocks} transforms; lengths checked"
    return Prepared(project, rows, case.flops(rows), error, length_bound(case), note)
