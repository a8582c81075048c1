"""Writes fastproj/backends/measured.json from a result of `python -m bench.project --device cuda`.

    python -m bench.measured_table bench/results/<day>-<commit>-project-gpu.json

The file holds what the choice between the GPU backends knows; the rows of the result's
architecture are replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.providers.base import DENSE_KINDS
from bench.providers.ours_gpu import PRECISIONS, name_of
from fastproj.backends import measured
from fastproj.call import terms_of


def measurements(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rates of every shape on which all backends were timed, at the largest P of each."""
    sides = {name_of(b, p): (b, p) for b in measured.BACKENDS for p in PRECISIONS}
    found: dict[tuple[Any, ...], dict[int, dict[str, float]]]
    found = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["provider"] in sides and row["gflops"] > 0 and row["kind"] in DENSE_KINDS:
            backend, precision = sides[row["provider"]]
            terms = terms_of(getattr(torch, row["dtype"]), precision)
            shape = (row["kind"], row["dtype"], terms, row["batch"], row["cols"])
            found[shape][row["case_rows"]][backend] = round(row["gflops"], 1)
    result = []
    for shape, by_rows in sorted(found.items()):
        complete = [r for r, rates in by_rows.items() if set(rates) == set(measured.BACKENDS)]
        if complete:
            names = ("kind", "dtype", "terms", "batch", "cols")
            plain = dict(zip(names, shape, strict=True))
            result.append({**plain, "rows": max(complete), "rates": by_rows[max(complete)]})
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Replace one architecture's measurements; 1 when the result has none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="a JSON file in bench/results/")
    parser.add_argument("--table", type=Path, default=measured.TABLE, help="the file to change")
    options = parser.parse_args(argv)
    content = json.loads(options.result.read_text())
    rows = measurements(content.get("rows", []))
    gpu = content.get("gpu") or {}
    if not rows or "arch" not in gpu:
        print(
            f"{options.result}: no shape on which {' and '.join(measured.BACKENDS)} were both "
            "timed on a GPU; make one with `python -m bench.project --device cuda`",
            file=sys.stderr,
        )
        return 1
    table = json.loads(options.table.read_text())
    entry = {"gpu": gpu["name"], "commit": content["commit"], "source": options.result.name}
    table["architectures"][gpu["arch"]] = {**entry, "rows": rows}
    measured.parse(table)
    options.table.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{options.table}: {gpu['arch']} ({gpu['name']}), {len(rows)} shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
