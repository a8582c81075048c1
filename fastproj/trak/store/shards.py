"""Which file holds each sample's features, and how small files are merged while others read.

A batch is written to a file of its own, and is durable then. Once there are FAN files of similar
size, their batches are copied into one file, and the FAN files are removed. Each sample stays in
its batch, so the order in which features are read doesn't change. Any process may merge at any
time:

- A file is removed only after a *greater* file holds all of its batches. The greater of two files
  has more batches, or the later name where both have equally many. So of the files that hold a
  batch, the greatest is never removed.
- So a process that is killed may leave batches twice, but loses none, and the next process removes
  the lesser file. A process that reads may find that a file is gone, and looks again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastproj.trak.files import Indices, Tensors, tensor_digest, unreadable

if sys.platform != "win32":
    import fcntl

FAN = 16  # files that are merged into one
LARGE = 1 << 22  # bytes of a file that stays as it is
ON_TRUST = "on_trust"  # in a file's metadata: its gradients rest on checks of some batches
MOST_BATCHES = 1 << 14  # in a file: their names are in its header


@dataclass(frozen=True)
class ShardFile:
    """A file, and the batches in it: their keys, which sort in their order, and numbers of rows."""

    path: Path
    keys: tuple[str, ...]
    sizes: tuple[int, ...]
    bytes: int
    on_trust: bool = False  # see Store.distrust

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, str], size: int) -> ShardFile:
        """From a file's metadata."""
        batches = [batch.split(":") for batch in metadata["batches"].split(",")]
        keys, sizes = tuple(key for key, _ in batches), tuple(int(n) for _, n in batches)
        return cls(path, keys, sizes, size, ON_TRUST in metadata)

    @property
    def facts(self) -> dict[str, str]:
        """What the file's metadata say of it."""
        pairs = zip(self.keys, self.sizes, strict=True)
        facts = {"batches": ",".join(f"{key}:{n}" for key, n in pairs)}
        return facts | {ON_TRUST: "True"} if self.on_trust else facts

    @property
    def rank(self) -> tuple[int, str]:
        """What makes a file greater than another."""
        return len(self.keys), self.path.name

    @property
    def level(self) -> tuple[bool, int]:
        """Files of one level are merged."""
        return self.on_trust, int(np.emath.logn(FAN, len(self.keys)) + 1e-9)

    @property
    def large(self) -> bool:
        """Whether the file is too large to be worth copying again."""
        return self.bytes >= LARGE or len(self.keys) >= MOST_BATCHES


@dataclass
class ShardIndex:
    """Where each of n samples is: its place in ``shards``, or -1, and the row there."""

    shard: npt.NDArray[np.int32]  # [n]
    row: npt.NDArray[np.int32]  # [n], which of the shard's rows
    batch: npt.NDArray[np.int32]  # [n], place in ``keys`` of the batch that it was computed in
    content: Indices  # [n], content ids (batches.content_ids)
    shards: list[ShardFile] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    small: dict[tuple[bool, int], list[int]] = field(
        default_factory=dict
    )  # places of files, by level
    redundant: list[Path] = field(default_factory=list)  # files with nothing of their own
    distrusted: bool = False  # whether files on trust were left out: see Store.distrust

    @classmethod
    def empty(cls, n: int) -> ShardIndex:
        """An index of n samples, none of them there."""
        none = np.full(n, -1, np.int32)
        return cls(none, np.zeros(n, np.int32), none.copy(), np.zeros(n, np.int64))

    @classmethod
    def of(
        cls, n: int, found: Iterable[tuple[ShardFile, Indices, Indices]], replace: bool
    ) -> ShardIndex:
        """Of files with the numbers (-1: doesn't count) and content ids of their rows; ``replace``
        as for ``add``.
        """
        index = cls.empty(n)
        found = sorted(found, key=lambda item: item[0].rank)
        greatest = {key: file for file, _, _ in found for key in file.keys}
        where = {}
        for file, inds, content in found:
            holders = {greatest[key].path for key in file.keys}
            if len(holders) == 1 and file.path not in holders:
                index.redundant.append(file.path)
                continue
            number = index._append(file)
            starts = np.cumsum([0, *file.sizes]).tolist()
            for key, start, stop in zip(file.keys, starts[:-1], starts[1:], strict=True):
                where[key] = (number, start, inds[start:stop], content[start:stop])
        for key in sorted(where):
            index._enter(key, *where[key], replace)
        return index

    @property
    def done(self) -> npt.NDArray[np.bool_]:
        """Which samples are there, [n]."""
        return self.shard >= 0

    def order(self) -> npt.NDArray[np.int32]:
        """The batch of each sample, [n], numbered in the order of their keys; -1: not there."""
        places = np.empty(len(self.keys) + 1, np.int32)
        places[np.argsort(np.array(self.keys, dtype=str), kind="stable")] = range(len(self.keys))
        places[-1] = -1
        return places[self.batch]

    def next_place(self) -> int:
        """A number for the next batch's key that sorts behind those that are there."""
        return 1 + max((int(key.split("-")[0]) for key in self.keys), default=-1)

    def content_digest(self) -> str:
        """Hash of what all samples contain: features of other data have another.

        So have features of the same data that took the place of features on trust.
        """
        content = tensor_digest(torch.from_numpy(self.content))
        return f"{content}-distrusted" if self.distrusted else content

    def add(self, file: ShardFile, inds: Indices, content: Indices, replace: bool) -> None:
        """Enter a file of one batch; ``replace`` says whether it wins over what is there."""
        self._enter(file.keys[0], self._append(file), 0, inds, content, replace)

    def _append(self, file: ShardFile) -> int:
        """Add a file; its place in ``shards``."""
        self.shards.append(file)
        if not file.large:
            self.small.setdefault(file.level, []).append(len(self.shards) - 1)
        return len(self.shards) - 1

    def _enter(
        self, key: str, number: int, start: int, inds: Indices, content: Indices, replace: bool
    ) -> None:
        new = np.flatnonzero((inds >= 0) & (replace | (self.shard[inds] < 0)))
        self.shard[inds[new]] = number
        self.row[inds[new]] = start + new
        self.batch[inds[new]] = len(self.keys)
        self.content[inds[new]] = content[new]
        self.keys.append(key)

    def mergeable(self) -> list[int]:
        """The places of FAN files of one level, in the order of their first batches; or none."""
        for numbers in self.small.values():
            if len(numbers) >= FAN:
                return sorted(numbers, key=lambda number: self.shards[number].keys[0])[:FAN]
        return []

    def leave_alone(self, numbers: Iterable[int]) -> None:
        """Don't merge these files any more."""
        for number in numbers:
            self.small[self.shards[number].level].remove(number)

    def moved(self, numbers: list[int], merged: ShardFile) -> None:
        """The files ``numbers`` were merged into one, in this order."""
        self.leave_alone(numbers)
        start, place = 0, self._append(merged)
        for number in numbers:
            mine = self.shard == number
            self.row[mine] += start
            self.shard[mine] = place
            start += sum(self.shards[number].sizes)


def joined(parts: list[Tensors]) -> Tensors | None:
    """The rows of several files one after the other; None where dtypes or shapes differ."""
    kinds = [{name: (t.dtype, t.shape[1:]) for name, t in part.items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        return None
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def scan(folder: Path, role: str, read: Callable[[Path], None]) -> None:
    """``read`` each file of a folder once; ``read`` must ignore a file that is gone.

    It looks again until it finds no new file, because batches may move into a file that it has
    passed.
    """
    seen: set[str] = set()
    while True:
        names = {name for name in listing(folder) if fnmatch(name, f"{role}-*.safetensors")}
        if names <= seen:
            return
        for name in sorted(names - seen):
            read(folder / name)
        seen |= names


def listing(folder: Path) -> list[str]:
    """The names in a folder, none where it isn't there; StoreError where it can't be read.

    ``Path.glob`` finds nothing in such a folder, as if its features had not been computed.
    """
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no other process is merging files of this folder now. It saves work, not data."""
    if sys.platform == "win32":  # without locks; two processes may do the same work
        yield True
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    finally:
        with suppress(OSError):
            os.close(descriptor)
