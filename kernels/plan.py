"""Which rows of R a launch covers, how P is split, and how large the workspace is. No Triton.

R's rows are cut into panels of 512, at multiples of 512 in R, not in G, so that a panel of
Rademacher entries is one spec block. Everything here depends on the row range, K and the number of
multiprocessors; nothing depends on B, so a row's result does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastproj.spec import KINDS

PANEL = 512  # rows of R
BLOCK_ROWS = {"rademacher": 512, "gaussian": 32}  # rows that share a spec block number

WORKSPACE_BYTES = 56 << 20  # for partial sums, at any shape
MAX_BATCH = 128  # rows of G in one launch; larger batches take several
MAX_COLUMNS = 32768  # columns of R in one launch
TILES_PER_MULTIPROCESSOR = 3  # programs wanted in flight or queued for each multiprocessor
MIN_PANELS_PER_SPLIT = 4
FEW_PANELS = 4  # up to so many, one masked launch is cheaper than two


@dataclass(frozen=True)
class Counter:
    """Where a launch starts in the counter: the ``block`` and ``tag`` arguments of the kernels."""

    block: int  # low 32 bits of the block number, as a signed 32-bit integer
    tag: int  # (block >> 32) << 8 | kind << 2

    @classmethod
    def at(cls, kind: str, row: int) -> Counter:
        block = row // BLOCK_ROWS[kind]
        return cls(signed32(block), (block >> 32) << 8 | KINDS.index(kind) << 2)


@dataclass(frozen=True)
class Launch:
    """One launch over panels ``panel + i * step``, i < count, of R and one piece of G."""

    piece: int
    panel: int  # number of the first panel in R
    count: int
    step: int
    masked: bool  # the panels reach outside of the piece
    origin: int  # the piece's column at the first row of the first panel; can be negative
    per_split: int  # panels to a program
    splits: int
    slot: int  # of the first split in the workspace


def signed32(value: int) -> int:
    """The low 32 bits of a non-negative integer, as a signed 32-bit integer."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def whole_counters(kind: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut rows start .. stop where the high half of the block number changes."""
    period = BLOCK_ROWS[kind] << 32
    while start < stop:
        cut = min(stop, (start // period + 1) * period)
        yield start, cut
        start = cut


def max_slots(columns: int, item_size: int) -> int:
    """How many partial results fit into the workspace."""
    padded = -(-columns // 256) * 256
    return max(1, WORKSPACE_BYTES // (MAX_BATCH * padded * item_size))


def split_panels(count: int, columns: int, multiprocessors: int, slots: int) -> tuple[int, int]:
    """Panels to a split, and how many splits."""
    tiles = -(-columns // 256)
    if slots >= 16:  # leave room for the partial panels at both ends, or they take a group
        slots -= 2
    most = max(1, TILES_PER_MULTIPROCESSOR * multiprocessors // tiles)
    most = min(most, slots, -(-count // MIN_PANELS_PER_SPLIT))

    def busy(splits: int) -> float:
        """Share of the multiprocessors that have work, over the rounds that the programs take."""
        rounds = -(-splits * tiles // multiprocessors)
        return splits * tiles / (rounds * multiprocessors)

    splits = max(range(most, most // 2, -1), key=busy)
    per_split = -(-count // splits)
    return per_split, -(-count // per_split)


def cut_piece(kind: str, start: int, stop: int) -> Iterator[tuple[int, int, int, bool]]:
    """(panel, count, step, masked) covering rows start .. stop of R."""
    for first_row, last_row in whole_counters(kind, start, stop):
        first, last = first_row // PANEL, -(-last_row // PANEL)
        whole, whole_end = -(-first_row // PANEL), last_row // PANEL
        if (whole, whole_end) == (first, last):
            yield first, last - first, 1, False
        elif last - first <= FEW_PANELS:
            yield first, last - first, 1, True
        else:
            yield whole, whole_end - whole, 1, False
            edges = [first] * (whole > first) + [last - 1] * (whole_end < last)
            yield edges[0], len(edges), edges[-1] - edges[0], True


def plan(
    sizes: list[int],
    row_offset: int,
    columns: int,
    kind: str,
    multiprocessors: int,
    item_size: int,
) -> list[list[Launch]]:
    """Launches for pieces of ``sizes`` rows, the first at row ``row_offset`` of R.

    Returns groups: the launches of a group fill the workspace, which is then added to the output.
    There is always one group, if an empty one.
    """
    slots = max_slots(columns, item_size)
    groups: list[list[Launch]] = [[]]
    used = 0
    row = row_offset
    for piece, size in enumerate(sizes):
        for panel, count, step, masked in cut_piece(kind, row, row + size):
            per_split, splits = split_panels(count, columns, multiprocessors, slots)
            if step != 1:
                per_split, splits = (1, count) if count <= slots else (count, 1)
            if used + splits > slots:
                groups.append([])
                used = 0
            origin = panel * PANEL - row
            groups[-1].append(
                Launch(piece, panel, count, step, masked, origin, per_split, splits, used)
            )
            used += splits
        row += size
    return groups
