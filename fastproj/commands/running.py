"""How a command ends: its exit status, its messages, and the JSON object that it prints."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

DONE, FAILED, MISUSED = 0, 1, 2
INTERRUPTED = 130  # what a shell reports for Ctrl-C

EXIT_STATUS = """exit status:
  0    done
  1    not done, or done and the result is not good; a message says why
  2    the command line was not understood
  130  stopped by Ctrl-C; what was finished is kept"""

# What a command's function returns: the exit status, and the object that --json prints; None for a
# process among several that leaves this to another.
Outcome = tuple[int, dict[str, Any] | None]


def execute(
    command: str,
    options: argparse.Namespace,
    run: Callable[[argparse.Namespace], Outcome],
    mendable: tuple[type[Exception], ...] = (ValueError, OSError),
    kept: str = "",
    worded: Callable[[Exception], str] = str,
) -> int:
    """Run a command and return its exit status.

    Errors of the types ``mendable`` become a message, and so does a want of memory. ``kept`` says
    what an interrupted command leaves. ``worded`` says an error in the command's own words.
    """
    try:
        with messages_on_stderr(options.json):
            status, content = run(options)
    except KeyboardInterrupt:
        return interrupted(command, kept)
    except BrokenPipeError:  # an OSError, and nobody is left to read of it: cli.main ends
        raise
    except mendable as error:
        print(f"fastproj {command}: {worded(error)}", file=sys.stderr)
        return FAILED
    except (MemoryError, RuntimeError) as error:
        from fastproj.memory import is_out_of_memory  # with torch: Ctrl-C is to be met before that

        if not is_out_of_memory(error):
            raise
        print(f"fastproj {command}: not enough memory ({in_a_line(error)})", file=sys.stderr)
        return FAILED
    if options.json and content is not None:
        from fastproj import __version__

        print(json.dumps(plain({"fastproj": __version__, **content}), indent=1))
    return status


def in_a_line(error: Exception) -> str:
    """What an error says, without where in C++ it was noticed."""
    said = re.sub(r"^\[enforce fail at [^]]*\] [\w =]*\. ", "", str(error))
    return " ".join(said.partition("\n")[0].split()) or type(error).__name__


def interrupted(command: str, kept: str = "") -> int:
    """Say in one line that Ctrl-C stopped a command; returns the exit status."""
    said = f"stopped. {kept}" if kept else "stopped"
    start = "\n" if sys.stderr.isatty() else ""  # the terminal has just shown ^C
    print(f"{start}fastproj {command}".rstrip(" ") + f": {said}", file=sys.stderr)
    return INTERRUPTED


@contextmanager
def messages_on_stderr(wanted: bool) -> Iterator[None]:
    """Within, what is printed goes to standard error, that of child processes included."""
    if not wanted:
        yield
        return
    sys.stdout.flush()
    try:
        out, err = sys.stdout.fileno(), sys.stderr.fileno()
    except (OSError, ValueError):  # they are not files: something in this process reads them
        with redirect_stdout(sys.stderr):
            yield
        return
    saved = os.dup(out)
    os.dup2(err, out)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, out)
        os.close(saved)


def plain(value: Any) -> Any:
    """Values that JSON has: lists for arrays, null for what is not finite."""
    import numpy as np  # which takes a while, and Ctrl-C is to be met before that

    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
