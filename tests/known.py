"""The known answers in tests/data, and how anything that gives R is asked for them.

Needs torch and fastproj alone: packaging/known_answers.py runs without the other tests.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

import fastproj

DATA = Path(__file__).resolve().parent / "data"


def fields(name: str) -> list[list[str]]:
    """The words of every line of a file that is not a comment."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    found = [line.split() for line in lines if line and not line.startswith("#")]
    assert found
    return found


class Entry(NamedTuple):
    """R[row, column] of a matrix; ``block`` is of kind sjlt alone."""

    kind: str
    seed: int
    stream: int
    block: int | None
    row: int
    column: int
    value: float


class Block(NamedTuple):
    """SHA-256 of a block of R, int8 or, of a Gaussian one, float32."""

    kind: str
    seed: int
    stream: int
    block: int | None
    row: int
    rows: int
    column: int
    columns: int
    sha256: str


def entries(kind: str) -> list[Entry]:
    """The single entries of a kind."""
    found = []
    for line in fields(f"{kind}_v1.txt"):
        if kind != "sjlt":
            seed, stream, row, column = map(int, line[:4])
            found.append(Entry(kind, seed, stream, None, row, column, float(line[-1])))
        elif line[0] != "block-hash":
            seed, stream, block, tile, column, row = map(int, line[:6])
            assert row // block == tile
            found.append(Entry(kind, seed, stream, block, row, column, float(line[-1])))
    return found


def blocks(sparse: bool) -> list[Block]:
    """The blocks of the sparse kind, or of the others."""
    if not sparse:
        lines = fields("blocks_v1.txt")
        return [Block(k, int(seed), int(s), None, *map(int, at), h) for k, seed, s, *at, h in lines]
    lines = [line[1:] for line in fields("sjlt_v1.txt") if line[0] == "block-hash"]
    return [Block("sjlt", *map(int, line[:-1]), line[-1]) for line in lines]


def check_entry(known: Entry, **place: str) -> None:
    """Ask ``fastproj.matrix`` with these options for an entry."""
    kind, seed, stream, block, row, column, value = known
    at, across = slice(row, row + 1), slice(column, column + 1)
    got = fastproj.matrix(at, across, seed, kind, block=block, stream=stream, **place)
    assert got.item() == value, known


def check_block(known: Block, **place: str) -> None:
    """Ask for a block."""
    kind, seed, stream, block, row, rows, column, columns, sha256 = known
    dtype = torch.float32 if kind == "gaussian" else torch.int8
    at, across = slice(row, row + rows), slice(column, column + columns)
    got = fastproj.matrix(at, across, seed, kind, block=block, stream=stream, dtype=dtype, **place)
    assert hashlib.sha256(got.cpu().numpy().tobytes()).hexdigest() == sha256, known
