"""The ``fastproj`` command: runs the command that the first word names."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from fastproj.commands.arguments import INTERRUPTED

# The command fastproj.commands.<word>, imported when it is called -> what it is for
COMMANDS = {
    "info": "what this machine can do, and what it lacks",
    "demo": "TRAK on real data, from training to an HTML report",
    "trak": "scores of training samples for a Hugging Face model, from local files",
    "report": "an HTML page of finished scores",
    "lds": "how well scores predict models trained on random subsets",
    "loo": "how well scores predict leaving single samples out",
    "brittleness": "predictions that flip without what helps them most",
    "mislabel": "how well self-influence finds wrong labels",
    "bench": "time this machine against a stored matrix, in under a minute",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: sys.argv) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A path in letters that the terminal lacks must not end hours of work in an error.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        status = run(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\nfastproj: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) is gone: leave nothing for the interpreter to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def run(arguments: list[str]) -> int:
    """Call the command that ``arguments`` name."""
    if arguments and arguments[0] in COMMANDS:
        return call(arguments[0], arguments[1:])
    parser = build_parser()
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser for everything that is not a command: --help, --version and mistakes."""
    parser = argparse.ArgumentParser(
        prog="fastproj",
        description="Random projection with matrices made on the fly, and TRAK on top.",
    )
    parser.add_argument("--version", action="version", version=f"fastproj {version()}")
    words = parser.add_subparsers(title="commands", metavar="COMMAND")
    for word, purpose in COMMANDS.items():
        words.add_parser(word, help=purpose)
    return parser


def version() -> str:
    """Version of the installed package."""
    from fastproj import __version__

    return __version__


def call(command: str, arguments: list[str]) -> int:
    """Run a command and return its exit status. A missing package becomes a message."""
    try:
        module = importlib.import_module(f"fastproj.commands.{command}")
    except ModuleNotFoundError as error:
        missing = error.name or "a module"
        if missing.startswith("fastproj"):
            print(f"fastproj {command}: not part of this installation ({error})", file=sys.stderr)
        else:
            package = {"sklearn": "scikit-learn"}.get(missing, missing)
            print(f"fastproj {command}: needs {missing}; pip install {package}", file=sys.stderr)
        return 1
    entry: Callable[[list[str]], int | None] = module.main
    return entry(arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
