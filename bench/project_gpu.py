"""The benchmark on a GPU: which cases, what fits into its memory, tables, targets and results."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.project_sparse import COLS as SPARSE_COLS
from bench.project_sparse import growth_table_of, sparse_table_of
from bench.providers import DENSE_KINDS, Case, Provider
from bench.providers.ours_gpu import name_of
from bench.providers.stored import peak_name
from bench.record import write_result
from bench.targets import FAIL, Target, as_dicts, list_of
from bench.targets_gpu import memory_targets, rate_targets, sparse_targets
from bench.timing import GpuTimer, Row, table_of, time_case
from fastproj.backends import measured
from fastproj.spec import KINDS, default_block

BATCHES = (1, 8, 16, 32, 64, 128, 256, 512)
COLS = (512, 2048, 4096, 8192, 16384)
ROWS = (10**6, 10**7, 10**8)
DTYPES = ("bfloat16", "float32", "float16")
DEVICE = "cuda"
PEAKS = (peak_name("bf16"),)
SQUARE = 8192
# Gradients may take this much of the memory that is free: R, other providers' copies and the
# results need the rest.
SHARE_OF_GRADS = 0.4


@dataclass(frozen=True)
class Shape:
    """One case: grads [batch, rows] of dtype, cols columns; ``block`` is of kind sjlt, else 0."""

    kind: str
    dtype: str
    batch: int
    rows: int
    cols: int
    block: int = 0

    def __str__(self) -> str:
        block = f" block={self.block}" if self.block else ""
        return f"{self.kind} {self.dtype} B={self.batch} P={self.rows} K={self.cols}{block}"


def target_shapes() -> list[Shape]:
    """What the targets are about; P = 10^7, K = 4096."""
    batches = (8, 16, 32, 64, 128, 256, 512)
    shapes = [Shape("rademacher", "bfloat16", batch, 10**7, 4096) for batch in batches]
    shapes += [Shape("rademacher", "float32", batch, 10**7, 4096) for batch in (16, 64)]
    return shapes + [Shape("gaussian", "bfloat16", batch, 10**7, 4096) for batch in (64, 256)]


def sparse_shapes() -> list[Shape]:
    """What the targets of kind sjlt are about: B at K = 4096, then K at B = 8, default blocks.

    With one sample P is larger, or G would be read in the time that a launch takes.
    """
    shapes: list[Shape] = []
    for dtype in DTYPES[:2]:
        sizes = [(1, 10**8, 4096), (8, 10**7, 4096), (64, 10**7, 4096)]
        sizes += [(8, 10**7, cols) for cols in SPARSE_COLS]
        shapes += [Shape("sjlt", dtype, *size, default_block(size[2])) for size in sizes]
    return list(dict.fromkeys(shapes))


def sweep_shapes() -> list[Shape]:
    """B, K and P, one after the other, around B = 64, P = 10^7, K = 4096."""
    shapes: list[Shape] = []
    for dtype, kind in itertools.product(DTYPES, DENSE_KINDS):
        shapes += [Shape(kind, dtype, batch, 10**7, 4096) for batch in BATCHES]
        shapes += [Shape(kind, dtype, 64, 10**7, cols) for cols in COLS]
        shapes += [Shape(kind, dtype, 64, rows, 4096) for rows in ROWS]
    return shapes


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """The cases asked for, each once: what the options name, else the targets (and the sweeps)."""
    named = (options.kind, options.dtype, options.batch, options.rows, options.cols)
    if options.kind == ["sjlt"] and not any((*named[1:], options.block, options.full)):
        return sparse_shapes()
    if any(named) or options.full:
        lists = zip(named, (KINDS, DTYPES, BATCHES, ROWS, COLS), strict=True)
        if not options.full:
            lists = zip(named, (KINDS[:1], DTYPES[:1], (64,), (10**7,), (4096,)), strict=True)
        return [
            Shape(kind, dtype, batch, rows, cols, block)
            for kind, dtype, batch, rows, cols in itertools.product(
                *(some or all for some, all in lists)
            )
            for block in blocks_of(options, kind, cols)
        ]
    if options.ladder:
        return [Shape("rademacher", "bfloat16", 64, 10**7, 4096)]
    targets = [*target_shapes(), *sparse_shapes()]
    only = options.quick or options.acceptance
    return list(dict.fromkeys(targets if only else [*targets, *sweep_shapes()]))


def blocks_of(options: argparse.Namespace, kind: str, cols: int) -> Sequence[int]:
    """The blocks asked for, or the default of K; 0 for dense kinds."""
    if kind != "sjlt":
        return (0,)
    return options.block or (default_block(cols),)


def fitting_rows(shape: Shape, free_bytes: int) -> tuple[int, str]:
    """Rows of the shape whose gradients fit, and the reason where that is not all of them."""
    each = shape.batch * getattr(torch, shape.dtype).itemsize
    fits = int(SHARE_OF_GRADS * free_bytes) // each
    if fits >= shape.rows:
        return shape.rows, ""
    gib = each * shape.rows / 2**30
    return fits // 512 * 512, f"fewer rows: G [B, P] would take {gib:.3g} GiB"


def copy_bandwidth() -> float:
    """Bytes read and written in a second by a copy of 1 GiB on the current GPU."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    timer = GpuTimer()
    target.copy_(source)
    return 2 * source.numel() / median(timer(lambda: target.copy_(source)) for _ in range(10))


def make_case(options: argparse.Namespace, shape: Shape, free_bytes: int) -> Case:
    """The case of a shape, with as many rows as fit."""
    rows, cut = fitting_rows(shape, free_bytes)
    return Case(
        batch=shape.batch,
        rows=rows,
        cols=shape.cols,
        kind=shape.kind,
        dtype=getattr(torch, shape.dtype),
        stored_bytes=int((options.stored_gib or 16.0) * 2**30),
        trak_rows=0,
        max_seconds=options.max_seconds,
        square=options.square or SQUARE,
        device=DEVICE,
        cut=cut,
        block=shape.block,
    )


def run(options: argparse.Namespace, of_kind: Mapping[str, Sequence[Provider]]) -> int:
    """`python -m bench.project --device cuda`; 1 for a wrong result or a missed target."""
    if not torch.cuda.is_available():
        print("bench: this torch finds no GPU; --device cpu needs none")
        return 2
    said: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        said.append(text)

    begun = time.monotonic()
    arch = measured.arch_of(torch.cuda.current_device())
    bandwidth = copy_bandwidth()
    say(f"{torch.cuda.get_device_name()}, {arch}; a copy moves {bandwidth / 1e12:.2f} TB/s")
    rows: list[Row] = []
    not_run: list[str] = []
    stopped = ""

    def write(targets: Sequence[Target] = ()) -> Path | None:
        """After every case, because a kernel that hangs leaves nothing but what was saved."""
        if options.no_write:
            return None
        name = "project-gpu" + "-quick" * options.quick + "-ladder" * options.ladder
        content: dict[str, Any] = {
            "options": vars(options),
            "copy_bytes_per_second": bandwidth,
            "rows": [row.as_dict() for row in rows],
            "targets": as_dicts(targets),
            "not_run": not_run,
            "stopped": stopped,
        }
        return write_result(name, content, "\n".join(said))

    def stop(where: str, error: BaseException) -> None:
        nonlocal stopped
        stopped = f"{where}: {' '.join(str(error).split())[:300] or type(error).__name__}"
        say(f"\nSTOPPED at {stopped}")

    for shape in shapes_of(options):
        if time.monotonic() - begun > options.budget:
            not_run.append(str(shape))
            continue
        try:
            torch.cuda.empty_cache()
            case = make_case(options, shape, torch.cuda.mem_get_info()[0])
            found = time_case(case, of_kind[shape.kind], options.repeats or 10)
        except (Exception, KeyboardInterrupt) as error:
            stop(str(shape), error)  # CUDA takes no more calls after a kernel that failed
            break
        if found:
            say(sparse_table_of(found) if shape.block else table_of(found, PEAKS))
        rows += found
        write()
    for backend in measured.BACKENDS:
        if any(row.block and row.provider == name_of(backend) and row.seconds for row in rows):
            say(growth_table_of(rows, name_of(backend)))
    targets = [*rate_targets(rows, arch), *sparse_targets(rows, arch)]
    if not options.ladder and not stopped:
        try:
            targets += memory_targets()
        except (Exception, KeyboardInterrupt) as error:
            stop("the targets of memory", error)
    say(list_of(targets))
    if not_run:
        say(f"\nnot run, --budget {options.budget:g} s was used up: {'; '.join(not_run)}")
    path = write(targets)
    if path is not None:
        print(f"\nwrote {path}")
    wrong = bool(stopped) or any(row.wrong for row in rows)
    return 1 if wrong or any(target.verdict == FAIL for target in targets) else 0
