"""``fastproj --print-completion``: a shell's script that completes commands, options and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab

from fastproj.commands.arguments import local_path


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script of ``shell`` for a parser with all its commands.

    It is complete in itself: a tab starts no Python.
    """
    for action in actions(parser):
        if action.type in (Path, local_path) or action.metavar == "RECIPE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell))


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments of a parser and of its commands."""
    for action in parser._actions:  # argparse has no public way, and shtab reads these too
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
