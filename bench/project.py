"""Times the projection: fastproj, torch.matmul with a stored R, and TRAK, side by side.

    python bench/project.py                  the whole table, P = 10^6, K = 4096
    python bench/project.py --quick          small sizes, under a minute
    python bench/project.py --acceptance     the project's targets, each PASS, FAIL or N-A

All providers of a case are prepared, checked against float64 and warmed up, then called in turns;
times are medians. No time is reported for a result that is wrong. GF/s = 2 B P K / time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from acceptance import FAIL, Target, as_dicts, run_acceptance
from fastproj.cli import positive
from measure import Row, print_table, time_case, write_result
from providers import Case, all_providers
from providers.stored import peak_name

PEAKS = (peak_name(torch.float32), peak_name(torch.bfloat16))
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--acceptance", action="store_true", help="measure the project's targets")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--batch", type=positive, nargs="+", metavar="B", help="8 32 64 128")
    parser.add_argument("--rows", type=positive, metavar="P", help="1e6")
    parser.add_argument("--cols", type=positive, metavar="K", help="4096")
    parser.add_argument("--kind", nargs="+", choices=["rademacher", "gaussian"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the gradients")
    parser.add_argument(
        "--provider", nargs="+", metavar="TEXT", help="only providers whose name contains a TEXT"
    )
    parser.add_argument("--list", action="store_true", help="print the providers' names and stop")
    parser.add_argument("--repeats", type=positive, help="timed calls of each provider: 5")
    parser.add_argument("--max-seconds", type=float, default=6.0, help="of one fastproj call")
    parser.add_argument("--stored-gib", type=float, default=2.0, help="memory of one stored R")
    parser.add_argument("--trak-rows", type=positive, help="P for TRAK's BasicProjector: 1e5")
    parser.add_argument("--square", type=positive, default=4096, help="size for torch's peak")
    parser.add_argument("--no-write", action="store_true", help="don't write bench/results/")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 when a result was wrong or a target was missed."""
    options = build_parser().parse_args(argv)
    quick = options.quick
    batches = options.batch or ([8, 32] if quick else [8, 32, 64, 128])
    rows = options.rows or (65536 if quick else 10**6)
    cols = options.cols or (1024 if quick else 4096)
    repeats = options.repeats or (3 if quick else 5)
    trak_rows = options.trak_rows or (8192 if quick else 10**5)
    kinds = options.kind or ["rademacher", "gaussian"]
    providers = all_providers()
    if options.list:
        print("\n".join(provider.name for provider in providers))
        return 0
    if options.provider:
        wanted = [text.lower() for text in options.provider]
        providers = [p for p in providers if any(text in p.name.lower() for text in wanted)]
        if not providers:
            print(f"--provider {' '.join(options.provider)}: none; see --list", file=sys.stderr)
            return 2

    def make_case(kind: str, batch: int) -> Case:
        return Case(
            batch=batch,
            rows=rows,
            cols=cols,
            kind=kind,
            dtype=DTYPES[options.dtype],
            stored_bytes=int(options.stored_gib * 2**30),
            trak_rows=trak_rows,
            max_seconds=options.max_seconds,
            square=options.square,
        )

    print(f"P = {rows}, {options.dtype} in, {torch.get_num_threads()} threads, {repeats} repeats")
    measured: list[Row] = []
    targets: list[Target] = []
    if options.acceptance:
        measured, targets = run_acceptance(make_case, repeats, small=quick)
    else:
        for kind in kinds:
            for batch in batches:
                found = time_case(make_case(kind, batch), providers, repeats)
                print_table(found, PEAKS)
                measured += found
    if not options.no_write:
        name = "project-acceptance" if options.acceptance else f"project-{options.dtype}"
        name += "-quick" if quick else ""
        content = {
            "options": {**vars(options), "batch": batches, "rows": rows, "cols": cols},
            "rows": [row.as_dict() for row in measured],
            "targets": as_dicts(targets),
        }
        print(f"\nwrote {write_result(name, content)}")
    wrong = any(row.wrong for row in measured)
    missed = any(target.verdict == FAIL for target in targets)
    return 1 if wrong or missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
