"""Counts what a process does to the files below a folder, and lets one such step go wrong.

    with Faults(folder, at=17, act=kill):
        ...  # the process ends at the 17th moment: before, half-way through or after a step

A moment is a state in which another process may find the disk: before a file is made, written,
flushed, renamed or removed, and half-way through what is written. With ``reads`` also one in which
another may change it: once it was asked whether a file is there, and before one is read.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

from fastproj.trak import files

# What takes a path or a descriptor first and changes a disk.
CALLS = ("fsync", "link", "replace", "rename", "mkdir", "posix_fallocate", "pwrite", "unlink")
# What asks whether a file is there, or opens it to read it.
READS = ((Path, "stat"), (Path, "read_bytes"), (os, "open"), (files, "safe_open"))


def kill(_: str) -> None:
    """End this process at once, as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(step: str) -> None:
    """What the system says when a disk is full; removing still works."""
    if step != "unlink":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """Counts moments in ``steps``, and calls ``act(step)`` at the moments ``at``.

    Parameters
    ----------
    folder : what happens elsewhere isn't counted.
    at : moments, from 0. act : gets the name of the step; it may raise.
    reads : count what looks at files, too.
    """

    def __init__(
        self,
        folder: Path | str,
        at: int | range = range(0),
        act: Callable[[str], Any] = kill,
        reads: bool = False,
    ) -> None:
        self.folder = os.path.realpath(folder)
        self.at = range(at, at + 1) if isinstance(at, int) else at
        self.act = act
        self.reads = reads
        self.steps: list[str] = []

    def moment(self, step: str) -> None:
        """Another process may look at the disk now."""
        self.steps.append(step)
        if len(self.steps) - 1 in self.at:
            self.act(step)

    def concerns(self, target: Any) -> bool:
        """Whether a path or a descriptor is of the folder."""
        if isinstance(target, int):
            target = os.readlink(f"/proc/self/fd/{target}")
        path = os.path.realpath(os.fspath(target))
        return path == self.folder or path.startswith(self.folder + os.sep)

    def __enter__(self) -> Faults:
        self._stack = ExitStack()
        for name in CALLS:
            wrapped = self._wrapped(name, getattr(os, name))
            self._stack.enter_context(mock.patch.object(os, name, wrapped))
        real = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not self.concerns(file):
                return real(file, mode, *args, **kwargs)
            self.moment("open")
            return Written(real(file, mode, *args, **kwargs), self)

        self._stack.enter_context(mock.patch.object(builtins, "open", opened))
        for holder, name in READS if self.reads else ():
            wrapped = self._looked(name, getattr(holder, name))
            self._stack.enter_context(mock.patch.object(holder, name, wrapped))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _looked(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.concerns(target):
                return real(target, *args, **kwargs)
            if name != "stat":
                self.moment(name)
                return real(target, *args, **kwargs)
            try:
                return real(target, *args, **kwargs)
            finally:
                self.moment(name)

        return call

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.concerns(target):
                return real(target, *args, **kwargs)
            self.moment(name)
            if name == "pwrite":
                data, place = memoryview(args[0]).cast("B"), args[1]
                done = real(target, data[: len(data) // 2], place)
                self.moment("pwrite")
                return done + real(target, data[done:], place + done)
            return real(target, *args, **kwargs)

        return call


class Written:
    """A file that is open for writing; each half of what is written reaches the disk at once."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file = file
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        """The first half, and then the second."""
        half = len(data) // 2
        self._faults.moment("write")
        self._file.write(data[:half])
        self._file.flush()
        self._faults.moment("write")
        self._file.write(data[half:])
        self._file.flush()
        return len(data)
