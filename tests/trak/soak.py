"""Runs over every kind of store for minutes, while memory and disk run out and processes die.

    python -m tests.trak.soak --minutes 10

Each run is begun again and again, with another fault each time, and at last without: then its
scores must have the bits of an undisturbed run, with nothing left behind. A life may end in its
scores, by SIGKILL, or in an error that says what ran out. Prints how many ended how.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fastproj.trak import StoreCorruptError, StoreError
from tests.trak import cases, kinds
from tests.trak.faults import Faults, kill, no_room
from tests.trak.lives import Server

LIVES = 5  # with a fault, of each run
DISK = 4 << 20  # bytes of the disk
MEMORY = 24 << 20  # bytes that a life may map beyond those that its process begins with, at most
FAULTS = ("kill", "full", "filled", "memory", "memory and kill", "filled and kill")
LOADER = 127  # exit code of glibc's loader, where it has no memory for a thread's variables
# What numpy, torch and the system say where there is no memory.
NO_MEMORY = ("alloc", "memory", "can't start new thread")


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small file system on ``folder``; whether that may be done."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def live(folder: str, kind: str, fault: str, at: int, room: int, out: str) -> None:
    """One life, which writes how it ended to ``out``; its scores go to ``out`` with .npz.

    at : the moment of a kill, or from which on the disk is full. room : bytes of memory.
    """
    cases.small_blocks()
    if "memory" in fault:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    moments = at if "kill" in fault else range(at, 10**6 if fault == "full" else at)
    faults = Faults(folder, moments, no_room if fault == "full" else kill)
    said = None
    try:
        with faults:
            scores = kinds.whole(Path(folder), kind)
    except (StoreError, MemoryError, RuntimeError, OSError) as error:
        said = error
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    if said is None:
        np.savez(f"{out}.npz", *scores)
        end = "finished"
    else:
        end = ending(said, fault)
    Path(out).write_text(json.dumps([end, len(faults.steps)]))


def ending(error: Exception, fault: str) -> str:
    """What an error is called; fails unless it says what ran out."""
    text = f"{type(error).__name__}: {error}"
    assert not isinstance(error, StoreCorruptError), text  # a good file would be deleted
    of_memory = isinstance(error, MemoryError) or any(word in text for word in NO_MEMORY)
    if "memory" in fault:
        assert of_memory, text
        return "no memory"
    assert isinstance(error, StoreError), text
    assert "no room for" in text or "No space left" in text, text
    return "no room"


class Soak:
    """The runs in a folder, and how their lives ended."""

    def __init__(self, folder: Path, disk: Path | None, server: Server, rng: random.Random) -> None:
        self.folder = folder
        self.stores = disk or folder / "stores"
        self.full = disk is not None
        self.server = server
        self.rng = rng
        self.ends: Counter[str] = Counter()
        self.wanted: dict[str, tuple[list[np.ndarray], list[str], int]] = {}

    def life(
        self, name: str, kind: str, fault: str = "", at: int = 0, room: int = 0
    ) -> tuple[str, int]:
        """How a life ended, and how many moments it had."""
        out, log = self.folder / "out", self.folder / "log"
        for path in (out, log):
            path.unlink(missing_ok=True)
        order = [[self.stores / name, kind, fault, at, room, out]]
        (code,) = self.server.run("tests.trak.soak:live", order, log)
        said = log.read_text()
        if code == -signal.SIGKILL and "kill" in fault:
            return "killed", at
        if code < 0 or code == LOADER:  # Rust, C++ and the loader end a process without memory
            assert "memory" in fault, (code, said)
            assert "alloc" in said, (code, said)
            return "aborted without memory", at
        assert code == 0, f"{kind}, {fault} at {at}: {said}"
        end, steps = json.loads(out.read_text())
        return end, steps

    def scores(self) -> list[np.ndarray]:
        """What the last life left."""
        with np.load(self.folder / "out.npz") as file:
            return [file[name] for name in file.files]

    def run(self, kind: str) -> None:
        """A run over a kind, disturbed several times."""
        if kind not in self.wanted:
            _, steps = self.life("whole", kind)
            self.wanted[kind] = self.scores(), kinds.names(self.stores / "whole"), steps
            shutil.rmtree(self.stores / "whole")
        wanted, files, steps = self.wanted[kind]
        fill = self.stores / "fill"
        for _ in range(LIVES):
            fault = self.rng.choice(FAULTS)
            if "filled" in fault and self.full:
                free = shutil.disk_usage(self.stores).free
                fill.write_bytes(bytes(max(0, free - self.rng.randrange(200_000))))
            at, room = self.rng.randrange(steps), self.rng.randrange(MEMORY)
            end, _ = self.life("run", kind, fault, at, room)
            fill.unlink(missing_ok=True)
            self.ends[f"{fault}: {end}"] += 1
            if end == "finished":
                assert kinds.same(self.scores(), wanted), (kind, fault, at)
        assert self.life("run", kind)[0] == "finished"
        assert kinds.same(self.scores(), wanted), kind
        assert kinds.names(self.stores / "run") == files, kind
        shutil.rmtree(self.stores / "run")
        self.ends["runs with the right scores"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    with TemporaryDirectory() as name, Server() as server:
        folder = Path(name)
        disk = folder / "stores"
        disk.mkdir()
        with small_disk(disk) as mounted:
            soak = Soak(folder, disk if mounted else None, server, random.Random(options.seed))
            print("a full disk:", "mounted" if mounted else "only errors that say so", flush=True)
            while time.monotonic() < end:
                soak.run(soak.rng.choice(list(kinds.KINDS)))
                if soak.ends["runs with the right scores"] % 10 == 0:
                    print(dict(soak.ends), flush=True)
    print(json.dumps(dict(sorted(soak.ends.items())), indent=1))


if __name__ == "__main__":
    sys.exit(main())
