"""``fastproj info --launch``: the tiles, stages, splits, grid and workspace of a projection by GPU.

Nothing is launched or timed. The same arguments always give the same plan. The functions are those
by which the backends choose.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from fastproj.backends import cuda, triton
from fastproj.checks import check_integer
from fastproj.commands.arguments import size
from fastproj.commands.block import resolve_block
from fastproj.commands.running import DONE, Outcome
from fastproj.spec import MAX_COLS, MAX_ROWS

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Gpu:
    """What a plan depends on: the architecture, such as "sm_90", and the multiprocessors."""

    name: str
    arch: str
    multiprocessors: int

    @property
    def label(self) -> str:
        """Such as "sm_90, 132 multiprocessors (H100 SXM)"."""
        return f"{self.arch}, {self.multiprocessors} multiprocessors ({self.name})"


# One of each architecture that is built for.
GPUS = (
    Gpu("A100", "sm_80", 108),
    Gpu("RTX 3090", "sm_86", 82),
    Gpu("L40S", "sm_89", 142),
    Gpu("H100 SXM", "sm_90", 132),
    Gpu("B200", "sm_100", 148),
    Gpu("RTX 5090", "sm_120", 170),
    Gpu("MI300X", "gfx942", 304),
)


@dataclass(frozen=True)
class Plan:
    """One backend on one GPU; ``facts`` is empty where ``reason`` says why there are none."""

    backend: str
    gpu: Gpu
    facts: dict[str, str]
    reason: str = ""


def gpus_here() -> list[Gpu]:
    """The GPUs of this machine, each sort once."""
    found: list[Gpu] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        arch = f"sm_{properties.major}{properties.minor}"
        if torch.version.hip:
            arch = properties.gcnArchName.split(":")[0]
        found.append(Gpu(properties.name, arch, properties.multi_processor_count))
    return list(dict.fromkeys(found))


def plans(
    batch: int,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    kind: str,
    precision: str,
    block: int,
) -> list[Plan]:
    """Plans for grads ``[batch, rows]`` to ``cols`` columns, dense and aligned, at row 0 of R.

    There is one for each GPU of GPUS and of this machine, cuda before triton. block : of kind sjlt
    alone, 0 for the others.
    """
    here = gpus_here()
    known = [
        gpu
        for gpu in GPUS
        if (gpu.arch, gpu.multiprocessors) not in {(g.arch, g.multiprocessors) for g in here}
    ]
    found: list[Plan] = []
    for gpu in [*here, *known]:
        if gpu.arch.startswith("sm_"):
            facts, reason = {}, cuda.not_built() or ""
            try:
                facts = {} if reason else cuda.plan(
                    batch, rows, cols, dtype, kind, precision, block=block,
                    arch=int(gpu.arch[3:]), multiprocessors=gpu.multiprocessors,
                )  # fmt: skip
            except ValueError as refusal:
                reason = in_words(refusal)
            found.append(Plan("cuda", gpu, facts, reason))
        facts = triton.plan(
            batch, rows, cols, dtype, kind, precision, block=block,
            arch=gpu.arch, multiprocessors=gpu.multiprocessors,
        )  # fmt: skip
        found.append(Plan("triton", gpu, facts))
    return found


def in_words(refusal: ValueError) -> str:
    """Why the cuda backend has no plan, without the library's arguments, which a command lacks."""
    said = str(refusal).removeprefix("the cuda backend: ").replace("proj_dim=", "K=")
    return said.partition(", or backend=")[0]


def plans_of(options: argparse.Namespace) -> list[Plan]:
    """The plans that ``--launch B P K DTYPE`` and its options ask for.

    Raises ValueError for a word that can't be.
    """
    batch, rows, cols = (size(text) for text in options.launch[:3])
    check_integer("info", "P", rows, 1, MAX_ROWS + 1)
    check_integer("info", "K", cols, 1, MAX_COLS + 1)
    name = options.launch[3]
    if name not in DTYPES:
        raise ValueError(f"received DTYPE {name!r}; expected {', '.join(DTYPES)}")
    kind, precision = options.kind, options.precision
    block = resolve_block(kind, options.block, cols)
    return plans(batch, rows, cols, DTYPES[name], kind, precision, block)


def print_plans(options: argparse.Namespace) -> Outcome:
    """Print a table for each backend, with a column for each GPU."""
    found: list[Plan] = options.found
    batch, rows, cols = (size(text) for text in options.launch[:3])
    dtype = DTYPES[options.launch[3]]
    if options.json:
        return DONE, {
            "launches": [
                {"backend": p.backend, **vars(p.gpu), "facts": p.facts, "reason": p.reason}
                for p in found
            ]
        }
    name = str(dtype).removeprefix("torch.")
    print(f"B = {batch}, P = {rows}, K = {cols}, {name}, {options.kind}, {options.precision};")
    print("dense rows that start at multiples of 16 bytes, at row 0 of R")
    for backend in dict.fromkeys(plan.backend for plan in found):
        mine = [plan for plan in found if plan.backend == backend]
        if mine[0].reason:
            print(f"\n{backend}: {mine[0].reason}")
            continue
        heads = [[plan.gpu.arch for plan in mine], [plan.gpu.name for plan in mine]]
        cells = [("", *heads[0]), (backend, *heads[1])]
        cells.append(("multiprocessors", *(str(plan.gpu.multiprocessors) for plan in mine)))
        facts = dict.fromkeys(fact for plan in mine for fact in plan.facts)
        cells += [(fact, *(plan.facts.get(fact, "-") for plan in mine)) for fact in facts]
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        print()
        for row in cells:
            line = "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
            print(line.rstrip())
    return DONE, {}
