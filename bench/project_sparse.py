"""Kind sjlt: which cases, its table against the memory's bandwidth, and its targets on a CPU.

A call reads G once and adds each entry to K / block columns. So its rate is in entries of G and in
bytes of G, beside reading and copying the same G; GF/s of a dense product would mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.providers.memory import COPY, READ
from bench.providers.ours import DENSE, name_of
from bench.targets import Target
from bench.timing import Row
from fastproj.spec import default_block

ENTRIES = 1 << 25  # of G at every B: 128 MiB of float32, more than a cache holds
BATCHES = (1, 8, 32)
COLS = (1024, 4096, 16384, 65536)
DTYPES = ("float32", "bfloat16")
CENTRE_BATCH, CENTRE_COLS = 8, 4096
# "The cost doesn't grow with K": by no more than what two runs, and one level of cache, differ by.
GROWTH = 1.5


@dataclass(frozen=True)
class SparseShape:
    """One case of kind sjlt: grads [batch, rows] of dtype, cols columns."""

    dtype: str
    batch: int
    rows: int
    cols: int
    block: int


def shapes_of(options: argparse.Namespace, *, quick: bool = False) -> list[SparseShape]:
    """The cases asked for, each once: the product of what is named, else B and K in turn.

    Where ``--rows`` is not named, P is what makes G equally large at every B. Where ``--block`` is
    not named, it is the default of each K: four entries a row at a power of two.
    """
    named = (options.dtype, options.batch, options.cols)
    words: Iterable[tuple[str, int, int]]
    if any(named):
        centre = (("float32",), (CENTRE_BATCH,), (CENTRE_COLS,))
        words = itertools.product(*(some or one for some, one in zip(named, centre, strict=True)))
    else:
        around = [
            *((batch, CENTRE_COLS) for batch in BATCHES),
            *((CENTRE_BATCH, cols) for cols in COLS),
        ]
        words = [(dtype, *pair) for dtype in DTYPES for pair in around]
    entries = ENTRIES >> 6 if quick else ENTRIES
    found = [
        SparseShape(dtype, batch, rows, cols, block or default_block(cols))
        for dtype, batch, cols in words
        for rows in options.rows or [max(1, entries // batch)]
        for block in options.block or [0]
    ]
    return list(dict.fromkeys(found))


def acceptance_shapes(*, quick: bool) -> list[SparseShape]:
    """What the targets are about: float32, default block; B at K = 4096, then K at B = 8."""
    options = argparse.Namespace(dtype=None, batch=None, cols=None, rows=None, block=None)
    return [s for s in shapes_of(options, quick=quick) if s.dtype == "float32"]


def sparse_table_of(rows: Sequence[Row]) -> str:
    """The rows of one case, with shares of the bandwidths measured in the same turns."""
    first = rows[0]
    known = {row.provider: row for row in rows if row.seconds}
    dense = next((row for name, row in known.items() if name.endswith(DENSE)), None)
    read, copy = (known[name].bandwidth if name in known else 0.0 for name in (READ, COPY))
    lines = [
        f"\nsjlt, block {first.block} ({first.cols / first.block:g} a row), {first.dtype}, "
        f"B = {first.batch}, K = {first.cols}",
        f"{'':<36}{'P':>10}{'ms':>10}{'10^9/s':>9}{'GB/s':>8}{'x read':>8}{'x copy':>8}"
        f"{'x dense':>9}{'rel. error':>12}",
    ]
    for row in rows:
        if not row.seconds:
            lines.append(f"{row.provider:<36}{row.note}")
            continue
        shares = [f"{row.bandwidth / rate:.2f}" if rate else "-" for rate in (read, copy)]
        entries = row.entries_per_second
        faster = f"{entries / dense.entries_per_second:.1f}" if dense else "-"
        if row.provider in (READ, COPY):
            faster = "-"
        lines.append(
            f"{row.provider:<36}{row.rows:>10}{1e3 * median(row.seconds):>10.2f}"
            f"{1e-9 * entries:>9.3g}{1e-9 * row.bandwidth:>8.2f}{shares[0]:>8}{shares[1]:>8}"
            f"{faster:>9}{row.error:>12.1e}  {row.note}".rstrip()
        )
    return "\n".join(lines)


def growth_table_of(rows: Sequence[Row], provider: str) -> str:
    """Nanoseconds an entry of G over K at each number of entries a row, of one provider."""
    found = [row for row in rows if row.provider == provider and row.seconds and row.block]
    lines = [f"\n{provider}: nanoseconds an entry of G", f"{'':<32}{'K':>7}{'block':>7}{'ns':>9}"]
    for row in sorted(found, key=lambda row: (row.dtype, row.batch, row.cols, row.block)):
        what = f"{row.dtype}, B = {row.batch}, {row.cols / row.block:g} a row"
        lines.append(f"{what:<32}{row.cols:>7}{row.block:>7}{1e9 / row.entries_per_second:>9.3f}")
    return "\n".join(lines)


def sparse_targets(rows: Sequence[Row], isas: Sequence[str]) -> list[Target]:
    """Ratios of one run, for two cores: shares of read bandwidth, the dense kernel, growth with K.

    ``isas`` : instruction sets of this machine, the best one last.
    """
    ours = name_of("highest", isas[-1])
    table = {
        (row.batch, row.cols, row.provider): row
        for row in rows
        if row.kind == "sjlt"
        and row.dtype == "float32"
        and row.seconds
        and row.block == default_block(row.cols)
    }

    def find(batch: int, provider: str, cols: int = CENTRE_COLS) -> Row | None:
        return table.get((batch, cols, provider))

    targets: list[Target] = []
    for batch, bound in zip(BATCHES, (0.35, 0.6, 0.6), strict=True):
        mine, read = find(batch, ours), find(batch, READ)
        figure = mine.bandwidth / read.bandwidth if mine and read else None
        what = f"sjlt, share of read bandwidth, K = 4096, B = {batch}"
        targets.append(Target(what, figure, bound, at_least=True, note="two cores"))
    sparse, dense = (find(32, name_of("highest", "avx512") + end) for end in ("", DENSE))
    figure = sparse.entries_per_second / dense.entries_per_second if sparse and dense else None
    note = "" if figure is not None else f"needs avx512 as the best; here {isas[-1]}"
    what = "sjlt against dense Rademacher, avx512, K = 4096, B = 32"
    targets.append(Target(what, figure, 30.0, at_least=True, note=note))
    over_k = [find(CENTRE_BATCH, ours, cols) for cols in COLS]
    seconds = [1 / row.entries_per_second for row in over_k if row]
    figure = max(seconds) / seconds[0] if len(seconds) == len(COLS) else None
    what = "sjlt, 4 entries a row, slowest K of 1024 .. 65536 over 1024"
    note = f"B = {CENTRE_BATCH}"
    targets.append(Target(what, figure, GROWTH, at_least=False, note=note))
    return targets
