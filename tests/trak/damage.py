"""Ways to damage a file's bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastproj.trak import StoreError, StoreMismatchError

FLIPS = 4  # bits anywhere in a file, one at a time; beside those of its first bytes
# What a reader says of a file that it refuses.
REFUSED = (ValueError, OSError, StoreError, StoreMismatchError)
TEXTS = (b"{}", b"[]", b"null", b'"a"', b"1e999", b"9" * 5000, b"[" * 200_000, b"\xff\xfe{")


def damages(whole: bytes, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the bytes after it); None for a directory in the file's place."""
    size = len(whole)
    for length in sorted({0, 1, 7, 8, 9, size // 2, size - 1, rng.randrange(size)}):
        yield f"cut to {length}", whole[:length]
    yield "zeros", bytes(size)
    yield "ones", b"\xff" * size
    yield "a zero behind it", whole + b"\0"
    yield "junk behind it", whole + rng.randbytes(5000)
    yield "itself behind it", whole + whole
    yield "junk", rng.randbytes(size)
    for text in TEXTS:
        yield f"{text[:9]!r} ...", text
        yield f"a header of {text[:9]!r} ...", len(text).to_bytes(8, "little") + text
    yield "a key twice", whole.replace(b'"checksum"', b'"checksum": "", "checksum"', 1)
    for place in [*range(12), *(rng.randrange(size) for _ in range(FLIPS))]:
        bit = rng.randrange(8)
        flipped = bytearray(whole)
        flipped[place % size] ^= 1 << bit
        yield f"bit {bit} of byte {place % size}", bytes(flipped)
    yield "a directory", None


def put(path: Path, content: bytes | None) -> None:
    """Make ``path`` a file of these bytes, or a directory with a file."""
    remove(path)
    if content is None:
        path.mkdir()
        (path / "file").touch()
    else:
        path.write_bytes(content)


def remove(path: Path) -> None:
    """Remove what ``put`` made."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refusals(
    read: Callable[[], Any],
    path: Path,
    *,
    named: Path | None = None,
    right: Callable[[Any], bool] = lambda found: True,
) -> int:
    """Damage a file that ``read()`` reads in every way; how often it was refused.

    named : what a refusal must name; None: the file. right : of what is read of a damaged file.
    """
    whole = path.read_bytes()
    refused = 0
    for what, content in damages(whole, random.Random(path.name)):
        put(path, content)
        said = None
        try:
            found = read()
        except REFUSED as error:
            said = str(error)
        if said is None:
            assert content == whole or right(found), what
        else:
            refused += 1
            assert str(named or path) in said, (what, said)
    put(path, whole)
    return refused
