"""Which rows of R a launch covers, how P is split, and how large the workspace is. No Triton.

R's rows are cut into panels. A panel starts at a multiple of its height, counted in R and not in G.
A panel of a dense kind has 512 rows, so that a panel of Rademacher entries is one spec block. A
panel of kind sjlt is four tiles of rows.

Everything here depends on the row range, K and the number of multiprocessors. Nothing depends on B,
so a sample's result does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastproj.spec import KINDS

PANEL = 512  # rows of R, of the dense kinds
PANEL_TILES = 4  # of kind sjlt
BLOCK_ROWS = {"rademacher": 512, "gaussian": 32}  # rows that share a spec block number

WORKSPACE_BYTES = 56 << 20  # for partial sums, at any shape
MAX_BATCH = 128  # rows of G in one launch; larger batches take several
MAX_COLUMNS = 32768  # columns of R in one launch; of kind sjlt twice as many
TILES_PER_MULTIPROCESSOR = 3  # programs wanted in flight or queued for each multiprocessor
MIN_PANELS_PER_SPLIT = 4
SJLT_COLUMNS = 4096  # of kind sjlt, to a program: where registers end
FEW_PANELS = 4  # up to so many, one masked launch is cheaper than two


@dataclass(frozen=True)
class Counter:
    """Where a launch starts in the counter: arguments of the kernels."""

    block: int  # low 32 bits of the number of the block (sjlt: tile), as a signed 32-bit integer
    tag: int  # high bits << 8 | kind << 2; of kind sjlt also log2(block) - 4 << 4

    @classmethod
    def at(cls, kind: str, row: int, block: int = 0) -> Counter:
        number = row // counter_rows(kind, block)
        size = block.bit_length() - 5 << 4 if block else 0
        return cls(signed32(number), (number >> 32) << 8 | size | KINDS.index(kind) << 2)


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


def counter_rows(kind: str, block: int = 0) -> int:
    """Rows of R that share a number in the counter; ``block`` is of kind sjlt alone.

    Raises ValueError for another kind.
    """
    if kind == "sjlt":
        return block
    if kind in BLOCK_ROWS:
        return BLOCK_ROWS[kind]
    raise ValueError(f"plan: received kind={kind!r}; expected one of {', '.join(KINDS)}")


def panel_rows(kind: str, block: int) -> int:
    """Rows of R in a panel."""
    return PANEL_TILES * block if kind == "sjlt" else PANEL


def whole_counters(kind: str, start: int, stop: int, block: int = 0) -> Iterator[tuple[int, int]]:
    """Cut rows start .. stop where the high half of the block number changes, and half way: kernels
    count blocks from a launch's first one in signed 32 bits.
    """
    period = counter_rows(kind, block) << 31
    while start < stop:
        cut = min(stop, (start // period + 1) * period)
        yield start, cut
        start = cut


def max_columns(kind: str) -> int:
    """Columns of R in one launch. A launch of kind sjlt is bound by reading G, not by columns."""
    return 2 * MAX_COLUMNS if kind == "sjlt" else MAX_COLUMNS


def sjlt_columns(columns: int) -> int:
    """Columns of R that a program of kind sjlt takes: the most that leave few of them unused."""
    size = SJLT_COLUMNS
    while size > 64 and 8 * padded(columns, size) > 9 * columns:
        size //= 2
    return size


def padded(columns: int, size: int) -> int:
    """``columns`` rounded up to a multiple of ``size``."""
    return -(-columns // size) * size


@dataclass(frozen=True)
class Room:
    """How a launch over ``columns`` columns shares the device and the workspace."""

    batch: int  # rows of G in one launch; larger batches take several
    width: int  # columns of a partial result in the workspace
    slots: int  # partial results that the workspace holds
    programs: int  # wanted for each split: tiles of columns
    most_splits: int  # that the device needs, if each has a program for each tile of columns
    least_panels: int  # to a split


def room(kind: str, columns: int, multiprocessors: int, item_size: int, block: int = 0) -> Room:
    """The room for ``columns`` columns of R (at most max_columns), sums of ``item_size`` bytes.

    A program of kind sjlt takes so many columns that even a single row of G needs splits of P to
    fill the device. A launch of that kind has fewer rows, so that the partial results of these
    splits fit into the workspace.
    """
    if kind == "sjlt":
        size = sjlt_columns(columns)
        width = padded(columns, size)
        tiles = width // size
        # Two programs of 4096 columns fill a multiprocessor's registers.
        most = max(1, min(8, 2 * SJLT_COLUMNS // size) * multiprocessors // tiles)
        fits = max(1, WORKSPACE_BYTES // (most * width * item_size))
        batch = min(MAX_BATCH, max(8, 1 << fits.bit_length() - 1))
        # Writing and reading a partial result is to cost a fraction of reading the split's G.
        least = min(64, max(MIN_PANELS_PER_SPLIT, 4 * columns // block))
    else:
        counter_rows(kind)  # raises for what is no kind
        width, batch, least = padded(columns, 256), MAX_BATCH, MIN_PANELS_PER_SPLIT
        tiles = width // 256
        most = max(1, TILES_PER_MULTIPROCESSOR * multiprocessors // tiles)
    slots = max(1, WORKSPACE_BYTES // (batch * width * item_size))
    return Room(batch, width, slots, tiles, most, least)


def split_panels(count: int, multiprocessors: int, room: Room) -> tuple[int, int]:
    """Panels to a split, and how many splits."""
    tiles, slots = room.programs, room.slots
    if slots >= 16:  # leave room for the partial panels at both ends, or they take a group
        slots -= 2
    most = min(room.most_splits, slots, -(-count // room.least_panels))

    def busy(splits: int) -> float:
        """Share of the multiprocessors that have work, over the rounds that the programs take."""
        rounds = -(-splits * tiles // multiprocessors)
        return splits * tiles / (rounds * multiprocessors)

    splits = max(range(most, most // 2, -1), key=busy)
    per_split = -(-count // splits)
    return per_split, -(-count // per_split)


def cut_piece(kind: str, start: int, stop: int, block: int) -> Iterator[tuple[int, int, int, bool]]:
    """(panel, count, step, masked) covering rows start .. stop of R."""
    rows = panel_rows(kind, block)
    for first_row, last_row in whole_counters(kind, start, stop, block):
        first, last = first_row // rows, -(-last_row // rows)
        whole, whole_end = -(-first_row // rows), last_row // rows
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
    block: int = 0,
) -> list[list[Launch]]:
    """Launches for pieces of ``sizes`` rows, the first at row ``row_offset`` of R.

    block : of kind sjlt alone.

    Returns groups: the launches of a group fill the workspace, which is then added to the output.
    There is always at least one group, which may be empty.
    """
    shared = room(kind, columns, multiprocessors, item_size, block)
    slots = shared.slots
    groups: list[list[Launch]] = [[]]
    used = 0
    row = row_offset
    for piece, size in enumerate(sizes):
        for panel, count, step, masked in cut_piece(kind, row, row + size, block):
            per_split, splits = split_panels(count, multiprocessors, shared)
            if step != 1:
                per_split, splits = (1, count) if count <= slots else (count, 1)
            if used + splits > slots:
                groups.append([])
                used = 0
            origin = panel * panel_rows(kind, block) - row
            groups[-1].append(
                Launch(piece, panel, count, step, masked, origin, per_split, splits, used)
            )
            used += splits
        row += size
    return groups
