"""Where scores are written: an n x m array on disk, or the extremes of each target."""

from __future__ import annotations

import json
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.trak.distributed import Ranks
from fastproj.trak.files import (
    Indices,
    StoreCorruptError,
    StoreError,
    corrupt,
    digest,
    read_safetensors,
    refused,
    remove_quietly,
    remove_stale,
    sync_dir,
    temporary_path,
    unreadable,
    write_safetensors,
)

STRIPE_BYTES = 1 << 24  # of the array under one checksum
FOOTER = struct.Struct("<Q8s")  # length of the JSON before it, FOOTER_MARK
FOOTER_MARK = b"FPSCORES"
TOP_COLUMNS = 1024  # targets sorted at once
MAX_NUMBER = (1 << 32) - 1  # of a training sample among extremes: key = value and number in 64 bits

# What numpy.load may raise for bytes that are no array, beside OSError and MemoryError.
NOT_ARRAYS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, SyntaxError),
    *(RecursionError, NotImplementedError, struct.error, tokenize.TokenError),
    *(zipfile.BadZipFile, zlib.error),
)

Scores = npt.NDArray[np.float32]


class Sink(Protocol):
    """Takes blocks of scores from several ranks; ``finish`` is called by all, after the last."""

    def add(self, rows: Indices, columns: range, block: Scores) -> None:
        """Scores [b, m'] of training samples ``rows`` [b] and targets ``columns``."""

    def finish(self) -> None:
        """Make the result appear."""


class ScoresWriter:
    """A float32 [n, m] array in a temporary file; ``finish`` adds checksums and renames it.

    The file is NumPy's format, with checksums behind the array, where ``numpy.load`` doesn't look.
    Raises StoreError where the disk has no room, before anything is computed.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        ranks: Ranks,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.shape = shape
        self.size = 4 * shape[0] * shape[1]  # bytes of the array
        self.ranks = ranks
        self.facts = dict(facts or {})
        self.temporary: Path | None = None

    def __enter__(self) -> ScoresWriter:
        with self.ranks.barrier("finalize_scores"):
            if self.ranks.first:
                remove_stale(self.path.parent)
                self.temporary = temporary_path(self.path)
                self._create(self.temporary)
        self.temporary = self.ranks.broadcast("finalize_scores", self.temporary)
        assert self.temporary is not None
        with refused(self.path, self.size):
            self.file = os.open(self.temporary, os.O_RDWR)
        return self

    def _create(self, path: Path) -> None:
        try:
            # Readable, too: where a file system can't reserve room, glibc reads and writes bytes.
            with refused(self.path, self.size), open(path, "w+b") as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                # A sparse file would fill the disk only after hours of work.
                if hasattr(os, "posix_fallocate"):
                    file.flush()
                    os.posix_fallocate(file.fileno(), 0, file.tell() + self.size)
                else:
                    file.truncate(file.tell() + self.size)
        except BaseException:  # an interrupt, too
            remove_quietly(path)
            raise

    @property
    def _start(self) -> int:
        (length,) = struct.unpack("<H", os.pread(self.file, 2, 8))  # NumPy's format 1.0
        return 10 + int(length)

    def add(self, rows: Indices, columns: range, block: Scores) -> None:
        """``array[rows, columns] = block``; rows [b] are distinct."""
        start, width = self._start, self.shape[1]
        whole = len(columns) == width
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1 if whole else np.arange(1, len(rows))
        edges = [0, *breaks.tolist(), len(rows)]
        block = np.ascontiguousarray(block, np.float32)
        for begin, end in pairwise(edges):
            place = start + 4 * (int(rows[begin]) * width + columns.start)
            self._write(block[begin:end].data.cast("B"), place)

    def _write(self, data: memoryview, place: int) -> None:
        with refused(self.path, self.size):
            while data:
                done = os.pwrite(self.file, data, place)
                data, place = data[done:], place + done

    def finish(self) -> None:
        """Flush, add the checksums and rename; by all ranks."""
        assert self.temporary is not None
        with self.ranks.barrier("finalize_scores"), refused(self.path, self.size):
            os.fsync(self.file)
        step, count = stripes(self.shape)
        mine = range(self.ranks.rank, count, self.ranks.size)
        sums = {i: stripe_checksum(self.file, self._start, self.shape, i, step) for i in mine}
        every = {
            i: s for part in self.ranks.all_gather("finalize_scores", sums) for i, s in part.items()
        }
        with self.ranks.barrier("finalize_scores"), refused(self.path, self.size):
            if self.ranks.first:
                footer = {
                    **self.facts,
                    "shape": self.shape,
                    "head": zlib.crc32(os.pread(self.file, self._start, 0)),
                    "stripe_rows": step,
                    "crc32": [every[i] for i in range(count)],
                }
                body = json.dumps(footer, sort_keys=True)
                footer["checksum"] = digest(body.encode())
                data = json.dumps(footer, sort_keys=True).encode()
                data += FOOTER.pack(len(data), FOOTER_MARK)
                self._write(memoryview(data), self._start + self.size)
                os.fsync(self.file)
                os.replace(self.temporary, self.path)
                sync_dir(self.path.parent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.file)
        if self.temporary is not None and self.ranks.first:
            remove_quietly(self.temporary)


def stripes(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows of the array under one checksum, and how many such stripes it has."""
    step = max(1, STRIPE_BYTES // max(1, 4 * shape[1]))
    return step, -(-shape[0] // step)


def stripe_checksum(file: int, start: int, shape: tuple[int, int], number: int, step: int) -> int:
    """CRC-32 of a stripe of the array that begins at ``start`` in the file."""
    begin = number * step
    size = 4 * shape[1] * (min(begin + step, shape[0]) - begin)
    place = start + 4 * shape[1] * begin
    crc = 0
    while size:
        data = os.pread(file, min(size, STRIPE_BYTES), place)
        if not data:
            raise EOFError("the file ends inside the array")
        crc = zlib.crc32(data, crc)
        size, place = size - len(data), place + len(data)
    return crc


def read_scores(path: Path | str) -> Scores:
    """Scores as ``finalize_scores`` wrote them, [n, m], mapped; checked against their checksums.

    Writing to the array doesn't change the file. Raises StoreCorruptError, naming the file, or
    ValueError for a file of others.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            end = file.tell() - FOOTER.size
            file.seek(max(end, 0))
            length, mark = FOOTER.unpack(file.read(FOOTER.size))
            if mark != FOOTER_MARK or length > end:
                raise ValueError("it doesn't end in checksums")
            file.seek(end - length)
            footer = json.loads(file.read(length))
            stored = footer.pop("checksum")
            if digest(json.dumps(footer, sort_keys=True).encode()) != stored:
                raise ValueError("the checksum of its end is another")
            shape = (int(footer["shape"][0]), int(footer["shape"][1]))
            start = end - length - 4 * shape[0] * shape[1]
            if start < 0 or zlib.crc32(os.pread(file.fileno(), start, 0)) != footer["head"]:
                raise ValueError("the checksum of its beginning is another")
            array: Scores = np.load(path, mmap_mode="c")
            for number, crc in enumerate(footer["crc32"]):
                step = footer["stripe_rows"]
                if stripe_checksum(file.fileno(), start, shape, number, step) != crc:
                    first = number * footer["stripe_rows"]
                    raise ValueError(f"the checksum of the rows from {first} on is another")
    except FileNotFoundError as error:
        raise StoreError(f"TRAKer: there are no scores at {path}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except NOT_ARRAYS as error:
        if path.suffix != ".mmap":  # it may be anybody's: nothing to delete
            raise ValueError(
                f"can't read scores from {path} ({error}); expected <exp_name>.mmap "
                "(read_top_scores reads <exp_name>.top.safetensors, numpy.load a .npy file)"
            ) from error
        raise corrupt(path, f"{error}") from error
    return array


# ---- extremes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopScores:
    """The highest and the lowest scores of each of m targets, the most extreme first.

    helpful_indices, helpful_scores : int64 and float32 [m, t], the training samples with the
        highest scores and those scores, descending.
    harmful_indices, harmful_scores : [m, t], the lowest, ascending.
    train_set_size : n.

    Among equal scores the sample with the lower number comes first.
    """

    helpful_indices: Indices
    helpful_scores: Scores
    harmful_indices: Indices
    harmful_scores: Scores
    train_set_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """[n, m] of the scores that these are the extremes of."""
        return self.train_set_size, len(self.helpful_indices)


TOP_TENSORS = {field.name for field in fields(TopScores)} - {"train_set_size"}


class TopWriter:
    """Keeps the ``top_k`` highest and lowest scores of each target; ``finish`` writes them."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        top_k: int,
        ranks: Ranks,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if shape[0] > MAX_NUMBER + 1:
            raise ValueError(
                f"finalize_scores: received top_k with {shape[0]} training samples; expected at "
                "most 2^32"
            )
        self.path = path
        self.shape = shape
        self.top_k = min(top_k, shape[0])
        self.ranks = ranks
        self.facts = dict(facts or {})
        lowest = torch.iinfo(torch.int64).min
        self.keys = torch.full((2, shape[1], self.top_k), lowest, device="cpu")  # helpful, harmful

    def __enter__(self) -> TopWriter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def add(self, rows: Indices, columns: range, block: Scores) -> None:
        """Keep of a block [b, m'] of scores what is more extreme than what is kept."""
        numbers = torch.from_numpy(rows)
        for begin in range(0, len(columns), TOP_COLUMNS):
            part = torch.from_numpy(block[:, begin : begin + TOP_COLUMNS])
            start = columns.start + begin
            kept = self.keys[:, start : start + part.shape[1]]
            for side, values in zip(kept, (part, -part), strict=True):
                worst = scores_of(side[:, -1])
                hopeful = (values >= worst).any(1) | (side[:, -1] == lowest_key()).any()
                keys = sort_keys(values[hopeful].mT, numbers[hopeful])
                side.copy_(torch.cat([side, keys], 1).topk(self.top_k, sorted=True).values)

    def finish(self) -> None:
        """Merge what the ranks have and write it; by all ranks."""
        parts = self.ranks.all_gather("finalize_scores", self.keys.numpy())
        with self.ranks.barrier("finalize_scores"):
            if self.ranks.first:
                every = torch.cat([torch.from_numpy(part) for part in parts], 2)
                helpful, harmful = every.topk(self.top_k, sorted=True).values
                tensors = {
                    "helpful_indices": numbers_of(helpful),
                    "helpful_scores": scores_of(helpful),
                    "harmful_indices": numbers_of(harmful),
                    "harmful_scores": -scores_of(harmful),
                }
                facts = {**self.facts, "train_set_size": self.shape[0]}
                write_safetensors(self.path, tensors, {k: str(v) for k, v in facts.items()})


def lowest_key() -> int:
    """The key that stands where nothing is kept yet."""
    return torch.iinfo(torch.int64).min


def sort_keys(values: Tensor, numbers: Tensor) -> Tensor:
    """int64 keys that sort by float32 value [m, b]; among equal ones, lower numbers [b] win."""
    bits = (values.contiguous() + 0.0).view(torch.int32)  # + 0.0: there is one zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (MAX_NUMBER - numbers)


def scores_of(keys: Tensor) -> Tensor:
    """The values that ``sort_keys`` was given."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def numbers_of(keys: Tensor) -> Tensor:
    """The numbers that ``sort_keys`` was given."""
    return MAX_NUMBER - (keys & MAX_NUMBER)


def read_top_scores(path: Path | str) -> TopScores:
    """What ``finalize_scores(..., top_k=)`` wrote; raises StoreCorruptError, naming the file, or
    ValueError for another of TRAKer's files or one of others.
    """
    expected = "<exp_name>.top.safetensors (read_scores reads <exp_name>.mmap)"
    return read_extremes(Path(path), expected)


def read_extremes(path: Path, expected: str) -> TopScores:
    """``read_top_scores``. expected : what would work, for the message."""
    try:
        tensors, metadata = read_safetensors(path, None)
    except StoreCorruptError as error:
        if path.name.endswith(".top.safetensors"):
            raise
        # It may be anybody's, such as a model: nothing to delete.
        raise ValueError(f"can't read scores from {path}; expected {expected}") from error
    if tensors.keys() != TOP_TENSORS:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors))}; expected <exp_name>.top.safetensors, with "
            f"{', '.join(sorted(TOP_TENSORS))}"
        )
    return TopScores(
        **{name: t.numpy().copy() for name, t in tensors.items()},
        train_set_size=int(metadata["train_set_size"]),
    )


def load_scores(path: Path | str) -> npt.NDArray[Any] | TopScores:
    """Scores from a file: ``<exp_name>.mmap``, ``<exp_name>.top.safetensors``, or any .npy [n, m].

    Arrays are mapped, not read; where the file has checksums, they are verified first. Raises
    StoreError (StoreCorruptError for damage) or ValueError, naming the file.
    """
    path = Path(path)
    expected = "<exp_name>.mmap, <exp_name>.top.safetensors or a .npy file"
    if path.suffix == ".safetensors":
        return read_extremes(path, expected)
    scores = load_array(path, "read scores from", expected)
    if scores.ndim != 2 or scores.dtype.kind not in "fiu" or 0 in scores.shape:
        raise ValueError(
            f"{path} holds {list(scores.shape)} {scores.dtype}; expected scores [n, m]"
        )
    return scores


def load_array(
    path: Path | str, what: str = "read", expected: str = "a .npy file"
) -> npt.NDArray[Any]:
    """The array of a .npy file or of ``<exp_name>.mmap``, mapped; checksums are verified first.

    what, expected : what is being done, and what would work; for messages. Raises StoreCorruptError
        for damage to a file of TRAKer's, other StoreErrors and ValueErrors for what can't be read.
    """
    path = Path(path)
    own = path.suffix == ".mmap"
    try:
        with open(path, "rb") as file:
            file.seek(-min(FOOTER.size, os.fstat(file.fileno()).st_size), os.SEEK_END)
            if file.read().endswith(FOOTER_MARK):
                return read_scores(path)
        array: Any = np.load(path, mmap_mode="r")
        if isinstance(array, np.memmap) and array.offset + array.nbytes != path.stat().st_size:
            raise corrupt(path, "the bytes behind the array are no checksums")
    except OSError as error:
        raise StoreError(f"can't {what} {path} ({error.strerror or error})") from error
    except NOT_ARRAYS as error:
        if own:
            raise corrupt(path, f"it doesn't hold the whole array ({error})") from error
        # NumPy takes whatever it doesn't know for pickled data, and advises to load it unsafely.
        why = "it holds no array of numbers" if "pickle" in str(error) else error
        raise ValueError(f"can't {what} {path} ({why}); expected {expected}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(
            f"{path} is a zip archive, as numpy.savez and torch.save write it; expected {expected} "
            "(numpy.save writes one)"
        )
    return array
