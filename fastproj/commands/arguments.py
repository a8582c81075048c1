"""What the command lines of all commands share: their help, and the values that they read."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

LIMIT = 1 << 63  # of sizes


def command_parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The parser of ``fastproj command``, whose help ends with examples."""
    lines = textwrap.dedent(examples).strip().splitlines()
    return argparse.ArgumentParser(
        prog=f"fastproj {command}",
        description=filled(description),
        epilog="\n".join(["examples:", *(f"  {line}".rstrip() for line in lines)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def filled(text: str) -> str:
    """Paragraphs, as wide as argparse makes the rest."""
    width = max(shutil.get_terminal_size().columns - 2, 11)
    paragraphs = text.strip().split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(p.split()), width) for p in paragraphs)


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json, which means the same everywhere."""
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object on standard output, and everything else on standard error",
    )


def add_option(
    parser: Any,
    name: str,
    default: Any,
    metavar: str,
    what: str,
    read: Callable[[str], Any] = int,
    nargs: str | None = None,
) -> None:
    """An option that isn't required; its help says what it is, and what it is by default."""
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    what = f"{what} (default: {shown})"
    parser.add_argument(name, type=read, default=default, metavar=metavar, help=what, nargs=nargs)


def local_path(text: str) -> Path:
    """An argument that is a path, which "" is not: Path("") is the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("received ''; expected a path, such as . for this folder")
    return Path(text)


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """ "4096", "1e7" or "10**8" as an integer of at least 1, below 2^63. Raises ValueError."""
    base, power, exponent = text.partition("**")
    try:
        value = Decimal(base) ** int(exponent) if power else Decimal(text)
        if 1 <= value < LIMIT and value == int(value):
            return int(value)
    except (ArithmeticError, ValueError):
        value = Decimal(0)
    large = value.is_finite() and value >= LIMIT
    expected = "an integer below 2^63" if large else "an integer of at least 1"
    raise ValueError(f"received {text!r}; expected {expected}")
