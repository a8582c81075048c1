"""What the command lines of all commands share: their help, and the values that they read."""

from __future__ import annotations

import argparse
import math
import shutil
import textwrap
from collections.abc import Callable
from typing import Any


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


def positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    try:
        return size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def size(text: str) -> int:
    """ "4096", "1e7" or "10**8" as an integer of at least 1. Raises ValueError."""
    base, power, exponent = text.partition("**")
    try:
        value = float(base) ** int(exponent) if power else float(text) if "e" in text else int(text)
    except (ValueError, OverflowError):
        value = 0
    if not 1 <= value < math.inf or value != int(value):
        raise ValueError(f"received {text!r}; expected an integer of at least 1")
    return int(value)
