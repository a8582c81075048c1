"""The project's targets on a GPU: ratios of rates of one run, and memory.

They are about an H100-class GPU (sm_90); on another one the figures show and judge nothing. Rows
count where K = 4096 and P >= 10^7.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

import fastproj
from bench.providers import generated
from bench.providers.memory import COPY
from bench.providers.others_gpu import FAST_JL, HADAMARD, SJLT
from bench.providers.ours_gpu import name_of
from bench.providers.sparse_stored import NAMES as SPARSE_NAMES
from bench.providers.stored import peak_name, stored_name
from bench.targets import Target
from bench.timing import Row
from fastproj.backends import measured, registry

JUDGED_ARCH = "sm_90"
COLS, LEAST_ROWS = 4096, 10**7
PEAK, STORED, TF32 = peak_name("bf16"), stored_name("bf16"), stored_name("tf32")
CUDA, TRITON = name_of("cuda"), name_of("triton")
# "Equal": within what two runs differ by.
EQUAL = 0.95
COPY_SHARE = 0.8
SPARSE_PEERS = (SJLT, HADAMARD, SPARSE_NAMES["cuda"])
MEMORY_SHAPES = ((64, 10**6, 4096), (512, 500_000, 16384), (1, 10**6, 100_000))


def rate_targets(rows: Sequence[Row], arch: str) -> list[Target]:
    """Every target that is a ratio; without a figure where the run lacks a side of it."""
    table = {
        (row.kind, row.dtype, row.batch, row.provider): row
        for row in rows
        if row.cols == COLS and row.case_rows >= LEAST_ROWS and row.seconds
    }
    targets: list[Target] = []

    def find(kind: str, dtype: str, batch: int, provider: str) -> Row | None:
        return table.get((kind, dtype, batch, provider))

    def add(what: str, ours: Row | None, other: Row | None, bound: float) -> None:
        figure = ours.rate / other.rate if ours and other else None
        judged = arch == JUDGED_ARCH
        note = "" if judged else f"for {JUDGED_ARCH}; this is {arch}"
        targets.append(Target(what, figure, bound, at_least=True, judged=judged, note=note))

    def bf16(batch: int, provider: str, kind: str = "rademacher") -> Row | None:
        return find(kind, "bfloat16", batch, provider)

    for batch in (8, 16, 32):
        ours = bf16(batch, CUDA)
        add(f"cuda against stored R, B = {batch}", ours, bf16(batch, STORED), 3.0)
        add(f"cuda against fast_jl, B = {batch}", ours, bf16(batch, FAST_JL), 20.0)
    for batch in (64, 128):
        ours = bf16(batch, CUDA)
        add(f"cuda against stored R, B = {batch}", ours, bf16(batch, STORED), 1.0)
        add(f"cuda against the bf16 peak, B = {batch}", ours, bf16(batch, PEAK), 0.75)
    for batch in (256, 512):
        add(f"cuda against stored R, B = {batch}", bf16(batch, CUDA), bf16(batch, STORED), 0.9)
    for batch in (16, 64):
        tf32 = find("rademacher", "float32", batch, TF32)
        for precision, bound in (("high", 0.45), ("highest", 0.3)):
            ours = find("rademacher", "float32", batch, name_of("cuda", precision))
            what = f"cuda float32 {precision}"
            add(f"{what} against bf16, B = {batch}", ours, bf16(batch, CUDA), bound)
            add(f"{what} against a TF32 matmul, B = {batch}", ours, tf32, 1.0)
            ratio = ours.error / tf32.error if ours and tf32 and tf32.error else None
            better = f"{what}, error over that of TF32, B = {batch}"
            targets.append(Target(better, ratio, 1.0, at_least=False))
    for batch, bound in ((64, 1 / 3), (256, EQUAL)):
        gaussian = bf16(batch, CUDA, "gaussian")
        add(f"cuda Gaussian against Rademacher, B = {batch}", gaussian, bf16(batch, CUDA), bound)

    # On tensor cores without wgmma both backends use the same instructions.
    share = 0.6 if arch == JUDGED_ARCH else 0.9
    for kind, dtype, batch in sorted({key[:3] for key in table if key[3] == TRITON}):
        ours, what = find(kind, dtype, batch, TRITON), f"triton {kind} {dtype}"
        add(f"{what} against cuda, B = {batch}", ours, find(kind, dtype, batch, CUDA), share)
        blocks = find(kind, dtype, batch, generated.NAME)
        add(f"{what} against R in blocks, B = {batch}", ours, blocks, 1.0)
        for target in targets[-2:]:  # these are for every GPU
            target.judged, target.note = True, ""
    return targets


def sparse_targets(rows: Sequence[Row], arch: str) -> list[Target]:
    """Kind sjlt: each case's share of copy bandwidth, and the cuda backend against each peer."""
    cases: dict[tuple[str, int, int, int], dict[str, Row]] = {}
    for row in rows:
        if row.kind == "sjlt" and row.case_rows >= LEAST_ROWS and row.seconds:
            cases.setdefault((row.dtype, row.batch, row.cols, row.block), {})[row.provider] = row
    targets: list[Target] = []
    judged = arch == JUDGED_ARCH
    note = "" if judged else f"for {JUDGED_ARCH}; this is {arch}"

    def add(what: str, figure: float, bound: float) -> None:
        targets.append(Target(what, figure, bound, at_least=True, judged=judged, note=note))

    for (dtype, batch, cols, block), case in cases.items():
        where = f"{dtype}, B = {batch}, K = {cols}, block {block}"
        for backend in measured.BACKENDS:
            ours = case.get(name_of(backend))
            if ours is None:
                continue
            if COPY in case:
                share = ours.bandwidth / case[COPY].bandwidth
                add(f"{backend} sjlt, share of copy bandwidth, {where}", share, COPY_SHARE)
            for peer in SPARSE_PEERS if backend == "cuda" else ():
                if peer in case:
                    ahead = ours.entries_per_second / case[peer].entries_per_second
                    add(f"{backend} sjlt against {peer}, {where}", ahead, 1.0)
    return targets


def extra_memory(backend: str, kind: str, batch: int, rows: int, cols: int) -> float:
    """MiB that torch's allocator gives to a call beyond its input and output."""
    grads = torch.zeros((batch, rows), dtype=torch.bfloat16, device="cuda")
    out = torch.empty((batch, cols), device="cuda")
    fastproj.project(grads[:1, :512], 16, kind=kind, backend=backend)  # tables that stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastproj.project(grads, cols, kind=kind, out=out, backend=backend)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory_targets() -> list[Target]:
    """Under 64 MiB, at any size."""
    return [
        Target(
            f"{backend} {kind}, extra memory, MiB, B = {batch}, K = {cols}",
            extra_memory(backend, kind, batch, rows, cols),
            64.0,
            at_least=False,
        )
        for backend in measured.BACKENDS
        if registry.unavailable(backend) is None
        for kind in ("rademacher", "sjlt")
        for batch, rows, cols in MEMORY_SHAPES
    ]
