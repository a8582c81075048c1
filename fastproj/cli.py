"""The ``fastproj`` command: runs the command that the first word names."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType, ModuleType
from typing import NoReturn

from fastproj.commands.arguments import filled
from fastproj.commands.running import DONE, EXIT_STATUS, FAILED, MISUSED, interrupted

# The command fastproj.commands.<word>, imported when it is called -> what it is for
COMMANDS = {
    "info": "what this machine can do, and what it lacks",
    "demo": "TRAK on real data, from training to an HTML report",
    "bench": "time this machine against a stored matrix, in under a minute",
    "plan": "disk, memory and time that a TRAK run will take here",
    "trak": "scores of training samples for a Hugging Face model, from local files",
    "lds": "how well scores predict models trained on random subsets",
    "loo": "how well scores predict leaving single samples out",
    "brittleness": "predictions that flip without what helps them most",
    "mislabel": "how well self-influence finds wrong labels",
    "report": "an HTML page of finished scores",
}
DESCRIPTION = """Random projection with matrices made on the fly, and TRAK on top: which training
samples raise a model's output, and which lower it.

Begin with `fastproj info`, then `fastproj demo`. `fastproj COMMAND --help` has examples."""
SHELLS = ("bash", "zsh", "tcsh")
COMPLETION = """completion by tab, for bash (in zsh: as _fastproj in a folder of $fpath):
  fastproj --print-completion bash > ~/.local/share/bash-completion/completions/fastproj"""
PACKAGES = {"sklearn": "scikit-learn"}  # where they are not called as their module is


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: sys.argv) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    word = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    prepare_output()
    pressed: list[int] = []
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, partial(note_and_interrupt, pressed))
    try:
        status = run_and_flush(arguments)
    except (KeyboardInterrupt, ImportError) as error:
        # NumPy's compiled modules make an ImportError of a Ctrl-C that comes while they load.
        if isinstance(error, ImportError) and not pressed:
            raise
        if argv is None:  # nothing is left for another Ctrl-C to stop
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        status = interrupted(word)
    except OSError as error:  # of the output: commands catch those of files
        status = unwritten(word, error)
    if argv is None:  # the process ends here: Ctrl-C has nothing left to stop, and would show it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def note_and_interrupt(pressed: list[int], signal_number: int, frame: FrameType | None) -> NoReturn:
    """What Python does at a signal, which is noted: what is raised may be caught on its way."""
    pressed.append(signal_number)
    raise KeyboardInterrupt


def prepare_output() -> None:
    """Let nothing that is printed end hours of work in an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # whoever started this process had closed it (`>&-`)
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
        # A path may have letters that the terminal lacks. "surrogateescape" is of the locale C.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def run_and_flush(arguments: list[str]) -> int:
    """``run``, with all that it printed out; also where it ends with argparse's help or mistake."""
    try:
        return run(arguments)
    finally:
        sys.stdout.flush()


def unwritten(word: str, error: OSError) -> int:
    """Say why the output could not be written; returns the exit status."""
    if not isinstance(error, BrokenPipeError):  # the reader (`| head`) is gone, and knows it
        said = f"can't write to standard output ({error.strerror})"
        print(f"fastproj {word}".rstrip() + f": {said}", file=sys.stderr)
    # Leave nothing for the interpreter to flush at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAILED


def run(arguments: list[str]) -> int:
    """Call the command that ``arguments`` name."""
    if arguments and arguments[0] in COMMANDS:
        return call(arguments[0], arguments[1:])
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.print_completion:
        return print_completion(options.print_completion)
    parser.print_help(sys.stderr)
    return MISUSED


def build_parser(whole: bool = False) -> argparse.ArgumentParser:
    """The parser for --help, --version and mistakes; with ``whole``, also for every command."""
    parser = argparse.ArgumentParser(
        prog="fastproj",
        description=filled(DESCRIPTION),
        epilog=f"{EXIT_STATUS}\n\n{COMPLETION}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastproj {version()}")
    parser.add_argument(
        "--print-completion",
        choices=SHELLS,
        metavar="SHELL",
        help=f"print a script that completes words by tab in {', '.join(SHELLS)} (needs shtab)",
    )
    words = parser.add_subparsers(title="commands", metavar="COMMAND")
    for word, purpose in COMMANDS.items():
        parents = [load(word).build_parser()] if whole else []
        words.add_parser(word, help=purpose, parents=parents, add_help=not whole)
    return parser


def version() -> str:
    """Version of the installed package."""
    from fastproj import __version__

    return __version__


def load(command: str) -> ModuleType:
    """The module of a command: it has ``build_parser()`` and ``main(argv)``."""
    return importlib.import_module(f"fastproj.commands.{command}")


def call(command: str, arguments: list[str]) -> int:
    """Run a command and return its exit status. A missing package becomes a message."""
    try:
        entry: Callable[[list[str]], int | None] = load(command).main
        with warnings.catch_warnings():
            warnings.showwarning = partial(show_warning, command)
            return entry(arguments) or DONE
    except ModuleNotFoundError as error:  # of its module, or what it imports when it needs it
        return missing_package(f"fastproj {command}", error)


def show_warning(command: str, message: Warning | str, *where: object) -> None:
    """Print a warning as what a command says, without the line of code that it comes from."""
    print(f"fastproj {command}: warning: {message}", file=sys.stderr)


def missing_package(program: str, error: ModuleNotFoundError) -> int:
    """Say what to install; returns the exit status."""
    missing = error.name or "fastproj"
    if missing.startswith("fastproj"):
        from fastproj.backends.built import among_sources

        advice = among_sources()
        said = f"not part of this installation ({error})" + (f"; {advice}" if advice else "")
        print(f"{program}: {said}", file=sys.stderr)
    else:
        package = PACKAGES.get(missing, missing)
        print(f"{program}: needs {missing}; pip install {package}", file=sys.stderr)
    return FAILED


def print_completion(shell: str) -> int:
    """Print a shell's completion script, as shtab writes it from the parsers."""
    try:
        from fastproj.commands.completion import script

        print(script(build_parser(whole=True), shell), end="")
    except ModuleNotFoundError as error:
        return missing_package("fastproj --print-completion", error)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
