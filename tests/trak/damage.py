"""Ways to damage a file's bytes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

FLIPS = 4  # bits anywhere in a file, one at a time; beside those of its first bytes
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
