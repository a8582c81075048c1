"""``fastproj bench``: this machine against a stored matrix, in under a minute."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fastproj
from fastproj.backends import registry
from fastproj.commands.arguments import add_json, add_option, command_parser, positive
from fastproj.commands.block import read_block, resolve_block
from fastproj.commands.running import DONE, FAILED, Outcome, execute
from fastproj.spec import KINDS


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj bench``."""
    parser = command_parser(
        "bench",
        "Times fastproj against torch.matmul with the matrix in memory. Every row is checked "
        "against float64 first; a wrong result gets no time and the exit status 1. The full "
        "benchmark is `python -m bench.project` in the sources.",
        """
        fastproj bench
        fastproj bench --batch 1 64 --rows 1e6 --cols 512 --kind sjlt
        fastproj bench --json > rates.json
        """,
    )
    add_option(parser, "--batch", [8, 32], "B", "samples", positive, nargs="+")
    add_option(parser, "--rows", 65536, "P", "parameters", positive)
    add_option(parser, "--cols", 1024, "K", "dimensions to project to", positive)
    parser.add_argument(
        "--kind", choices=KINDS, default="rademacher", help="of random matrix (default: rademacher)"
    )
    parser.add_argument(
        "--block", type=read_block, metavar="W", help="of kind sjlt (default: by --cols)"
    )
    add_option(parser, "--repeats", 5, "N", "timed calls", positive)
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """``fastproj bench``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        resolve_block(options.kind, options.block, options.cols)
        options.shape = fastproj.Projector(
            options.rows, options.cols, kind=options.kind, block=options.block
        )
    except ValueError as refusal:
        parser.error(str(refusal))
    needed, memory = 12 * options.rows * options.cols, total_memory()
    if needed > memory:
        parser.error(
            f"--rows, --cols: the matrix in float32 and float64 takes {needed:.2g} bytes; expected "
            f"at most the {memory:.2g} of this machine"
        )
    return execute("bench", options, run)


def total_memory() -> float:
    """Bytes of memory that this machine has; inf where the system doesn't say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return float("inf")


def run(options: argparse.Namespace) -> Outcome:
    """Check and time every batch; FAILED where a result is wrong."""
    rows, cols, kind = options.rows, options.cols, options.kind
    used = registry.choose("cpu", torch.float32, kind).NAME
    shape: fastproj.Projector = options.shape
    stored = shape.matrix()  # [P, K]
    print(
        f"P = {rows}, K = {cols}, {kind}{f' with block {shape.block}' if shape.block else ''}, "
        f"float32 in, backend {used}, "
        f"{torch.get_num_threads()} threads, median of {options.repeats}\n"
        "GF/s: 2 B P K / time, as if R were dense; GB/s: the bytes of G / time\n"
        f"{'':<28}{'B':>5}{'ms':>10}{'GF/s':>9}{'GB/s':>9}{'against float64':>18}"
    )
    found: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    for batch in options.batch:
        grads = torch.randn(batch, rows, generator=generator, device="cpu")  # [B, P]
        exact = grads.double() @ stored.double()  # [B, K]

        project = partial(
            fastproj.project, grads, cols, kind=kind, block=shape.block, scale=None, backend=used
        )
        providers: list[tuple[str, Callable[[], Tensor], float]] = [
            ("torch.matmul, stored matrix", partial(torch.matmul, grads, stored), 1e-4),
            ("fastproj highest", partial(project, precision="highest"), 1e-5),
            ("fastproj high", partial(project, precision="high"), 1e-3),
            ("fastproj medium", partial(project, precision="medium"), 3e-2),
        ]
        for name, call, bound in providers:
            scale = exact.norm() or 1.0  # a sparse R of few columns may have no entry in these rows
            error = float((call().double() - exact).norm() / scale)
            if not error <= bound:
                print(f"{name:<28}{batch:>5}   WRONG: error {error:.1e}, allowed {bound:.0e}")
                found.append({"provider": name, "batch": batch, "error": error, "wrong": True})
                continue
            seconds = []
            for _ in range(options.repeats):
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            rate = 2e-9 * batch * rows * cols / median(seconds)
            read = 4e-9 * batch * rows / median(seconds)
            print(
                f"{name:<28}{batch:>5}{1e3 * median(seconds):>10.2f}{rate:>9.0f}{read:>9.2f}"
                f"{error:>18.1e}"
            )
            found.append(
                {
                    "provider": name,
                    "batch": batch,
                    "error": error,
                    "wrong": False,
                    "seconds": seconds,
                    "gflops": rate,
                    "gigabytes_per_second": read,
                }
            )
    facts = {"rows": rows, "cols": cols, "kind": kind, "block": shape.block, "backend": used}
    status = FAILED if any(row["wrong"] for row in found) else DONE
    return status, {**facts, "threads": torch.get_num_threads(), "results": found}
