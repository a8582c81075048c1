"""Times the projection: fastproj, torch.matmul with a stored R, and TRAK, side by side.

    python -m bench.project                  the whole table, P = 10^6, K = 4096
    python -m bench.project --quick          small sizes, under a minute
    python -m bench.project --kind sjlt      the sparse kind, beside reading and copying G
    python -m bench.project --acceptance     the project's targets, each PASS, FAIL or N-A
    python -m bench.project --device cuda    on a GPU: the targets, then B, K and P around them
    python -m bench.project --device cuda --quick            the targets alone, minutes
    python -m bench.project --device cuda --full             every B, K, P, dtype and kind, hours
    python -m bench.project --device cuda --ladder           the families of CUDA kernels

All providers of a case are prepared, checked against float64 and warmed up, then called in turns;
times are medians. No time is reported for a result that is wrong. GF/s = 2 B P K / time. Of kind
sjlt the rate is in entries and bytes of G, beside those of reading and copying it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bench import project_gpu
from bench.project_sparse import (
    SparseShape,
    acceptance_shapes,
    growth_table_of,
    sparse_table_of,
    sparse_targets,
)
from bench.project_sparse import shapes_of as sparse_shapes
from bench.providers import DENSE_KINDS, Case, Provider, all_providers
from bench.providers.ours import name_of, usable_isas
from bench.providers.stored import peak_name
from bench.record import end_with, write_result
from bench.targets import FAIL, Target, as_dicts, list_of, run_acceptance
from bench.timing import Row, table_of, time_case
from fastproj.checks import check_block
from fastproj.commands.arguments import positive
from fastproj.spec import KINDS

PEAKS = (peak_name("fp32"), peak_name("bf16"))
DTYPES = ("float32", "float64", "bfloat16", "float16")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cpu")
    parser.add_argument("--acceptance", action="store_true", help="measure the project's targets")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--batch", type=positive, nargs="+", metavar="B", help="8 32 64 128")
    parser.add_argument("--rows", type=positive, nargs="+", metavar="P", help="10^6")
    parser.add_argument("--cols", type=positive, nargs="+", metavar="K", help="4096")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="all")
    parser.add_argument(
        "--block", type=positive, nargs="+", metavar="W", help="of kind sjlt: the default of each K"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="of the gradients: float32")
    parser.add_argument(
        "--provider", nargs="+", metavar="TEXT", help="only providers whose name contains a TEXT"
    )
    parser.add_argument("--list", action="store_true", help="print the providers' names and stop")
    parser.add_argument("--repeats", type=positive, help="timed calls of each provider: 5")
    parser.add_argument(
        "--max-seconds", type=float, default=6.0, help="of a call of fastproj or torch"
    )
    parser.add_argument("--stored-gib", type=float, help="memory of one stored R: 2, on a GPU 16")
    parser.add_argument("--trak-rows", type=positive, help="P for TRAK's BasicProjector: 1e5")
    parser.add_argument("--square", type=positive, help="for torch's peak: 4096, on a GPU 8192")
    gpu_only = parser.add_argument_group("with --device cuda")
    gpu_only.add_argument("--full", action="store_true", help="every B, K, P, dtype and kind")
    gpu_only.add_argument("--ladder", action="store_true", help="the families of CUDA kernels")
    gpu_only.add_argument(
        "--budget", type=float, default=86400.0, metavar="SECONDS", help="starts no case after that"
    )
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a result was wrong or a target was missed."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for block in options.block or []:
        try:
            for kind in options.kind or DENSE_KINDS:
                check_block("--block", kind, block, None)
        except ValueError as error:
            parser.error(f"{error}; with --kind sjlt")
    kinds = options.kind or list(KINDS)
    of_kind = {kind: all_providers(options.device, options.ladder, kind) for kind in kinds}
    if options.list:
        names = [provider.name for providers in of_kind.values() for provider in providers]
        print("\n".join(dict.fromkeys(names)))
        return 0
    if options.provider:
        wanted = [text.lower() for text in options.provider]
        of_kind = {
            kind: [p for p in providers if any(text in p.name.lower() for text in wanted)]
            for kind, providers in of_kind.items()
        }
        if not any(of_kind.values()):
            print(f"--provider {' '.join(options.provider)}: none; see --list", file=sys.stderr)
            return 2
    run = project_gpu.run if options.device == "cuda" else run_on_cpu
    return run(options, of_kind)


@dataclass(frozen=True)
class Sizes:
    """What a run on a CPU goes through: what the options name, or defaults."""

    batches: list[int]
    rows: list[int]
    cols: list[int]
    dtypes: list[str]
    repeats: int

    @classmethod
    def of(cls, options: argparse.Namespace) -> Sizes:
        """Those of the command line."""
        quick = options.quick
        return cls(
            options.batch or ([8, 32] if quick else [8, 32, 64, 128]),
            options.rows or [65536 if quick else 10**6],
            options.cols or [1024 if quick else 4096],
            options.dtype or ["float32"],
            options.repeats or (3 if quick else 5),
        )


def make_case(
    options: argparse.Namespace,
    kind: str,
    batch: int,
    rows: int | None = None,
    cols: int | None = None,
    dtype: str | None = None,
    block: int = 0,
) -> Case:
    """A case on a CPU; what is not given is the first of the run's sizes."""
    sizes = Sizes.of(options)
    return Case(
        batch=batch,
        rows=rows or sizes.rows[0],
        cols=cols or sizes.cols[0],
        kind=kind,
        dtype=getattr(torch, dtype or sizes.dtypes[0]),
        stored_bytes=int((options.stored_gib or 2.0) * 2**30),
        trak_rows=options.trak_rows or (8192 if options.quick else 10**5),
        max_seconds=options.max_seconds,
        square=options.square or 4096,
        block=block,
    )


def time_dense(options: argparse.Namespace, of_kind: Mapping[str, Sequence[Provider]]) -> list[Row]:
    """Times the dense kinds at all sizes, and prints a table of each case."""
    sizes, measured = Sizes.of(options), []
    shapes = itertools.product(of_kind, sizes.batches, sizes.rows, sizes.cols, sizes.dtypes)
    for kind, batch, rows, cols, dtype in shapes:
        if kind == "sjlt" or not of_kind[kind]:
            continue
        case = make_case(options, kind, batch, rows, cols, dtype)
        found = time_case(case, of_kind[kind], sizes.repeats)
        print(table_of(found, PEAKS), flush=True)
        measured += found
    return measured


def time_sparse(
    options: argparse.Namespace, shapes: Sequence[SparseShape], providers: Sequence[Provider]
) -> list[Row]:
    """Times kind sjlt, and prints a table of each case and one of the growth with K."""
    measured: list[Row] = []
    for s in shapes:
        case = make_case(options, "sjlt", s.batch, s.rows, s.cols, s.dtype, s.block)
        measured += (rows := time_case(case, providers, Sizes.of(options).repeats))
        print(sparse_table_of(rows), flush=True)
    ours = name_of("highest", usable_isas()[-1])
    if any(row.provider == ours and row.seconds for row in measured):
        print(growth_table_of(measured, ours), flush=True)
    return measured


def run_on_cpu(options: argparse.Namespace, of_kind: Mapping[str, Sequence[Provider]]) -> int:
    """`python -m bench.project`; 1 for a wrong result or a missed target."""
    sizes, quick = Sizes.of(options), options.quick
    print(f"{torch.get_num_threads()} threads, {sizes.repeats} repeats")
    measured: list[Row] = []
    targets: list[Target] = []
    if options.acceptance:
        if set(of_kind) & set(DENSE_KINDS):
            dense = partial(make_case, options)
            measured, targets = run_acceptance(dense, sizes.repeats, small=quick)
        if "sjlt" in of_kind:
            sparse = time_sparse(options, acceptance_shapes(quick=quick), of_kind["sjlt"])
            of_sparse = sparse_targets(sparse, usable_isas())
            print(list_of(of_sparse))
            measured, targets = measured + sparse, targets + of_sparse
    else:
        measured = time_dense(options, of_kind)
        if of_kind.get("sjlt"):
            measured += time_sparse(options, sparse_shapes(options, quick=quick), of_kind["sjlt"])
    if not options.no_write:
        print(f"\nwrote {write(options, list(of_kind), measured, targets)}")
    wrong = any(row.wrong for row in measured)
    missed = any(target.verdict == FAIL for target in targets)
    return 1 if wrong or missed else 0


def write(
    options: argparse.Namespace,
    kinds: Sequence[str],
    measured: Sequence[Row],
    targets: Sequence[Target],
) -> Path:
    """Keep the result of a run on a CPU; its path."""
    sizes, alone = Sizes.of(options), kinds == ["sjlt"]
    name = "project-acceptance" if options.acceptance else f"project-{'-'.join(sizes.dtypes)}"
    if alone:
        name = "project-acceptance-sjlt" if options.acceptance else "project-sjlt"
    shape = {"batch": sizes.batches, "rows": sizes.rows, "cols": sizes.cols}
    content = {
        "options": vars(options) if alone else {**vars(options), **shape},
        "rows": [row.as_dict() for row in measured],
        "targets": as_dicts(targets),
    }
    return write_result(name + "-quick" * options.quick, content)


if __name__ == "__main__":
    end_with(main)
