"""Features on disk and in memory: packed as float16, and read back in blocks, ahead of use."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastproj.trak.files import GoneError, Indices, Tensors
from fastproj.trak.store.shards import ShardIndex

HALF_EXPONENT = 15  # half-precision rows are scaled so that their largest entry is in [2^14, 2^15)
EXACT_EXPONENT = 126  # up to here, 2^exponent is a normal float32
BLOCK_ROWS = 2048  # samples held at once while finalising and scoring,
BLOCK_BYTES = 1 << 26  # unless their features are more than this
TRIES = 100  # to read what other processes keep moving
BLOCKS_EXPECTED = 2  # that the system is told to start reading
SERIAL_ENTRIES = 32768  # up to here, torch's elementwise operations stay in their thread

Item = TypeVar("Item")


def pack_half(features: Tensor) -> Tensors:
    """float16 with an exponent per row: ``features[i] = grads[i] * 2^exponent[i]``.

    A row keeps 11 significant bits for entries down to 2^-29 of its largest, at any magnitude:
    unlike plain float16, nothing of the size of a gradient overflows or vanishes.
    """
    rows = features.double()
    _, exponent = torch.frexp(rows.abs().amax(1))  # largest entry = m * 2^e, 1/2 <= m < 1
    exponent = (exponent - HALF_EXPONENT).clamp(-1000, 1000)  # 2^exponent must be a float64
    scale = torch.exp2(-exponent.double()).unsqueeze(1)  # [b, 1]
    return {"grads": (rows * scale).half(), "exponent": exponent.to(torch.int32)}


def unpack(tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """Features [b, k] as stored: float32 for half-precision shards, otherwise as they are.

    ``out`` [b, k] is written to where it is given; float32, or float64 for float64 shards.
    """
    grads = tensors["grads"]
    if out is None:
        out = grads.new_empty(grads.shape, dtype=unpacked_dtype(grads))
    if "exponent" not in tensors:
        return out.copy_(grads)
    exponent = tensors["exponent"]
    if bool((exponent.abs() > EXACT_EXPONENT).any()):
        return out.copy_(grads.double() * torch.exp2(exponent.double()).unsqueeze(1))
    scale = torch.exp2(exponent.to(out.dtype)).unsqueeze(1)
    # Pieces that torch doesn't hand to its threads: those are busy with the last block's product.
    step = max(1, SERIAL_ENTRIES // max(1, grads.shape[1]))
    for part, half, factor in zip(
        out.split(step), grads.split(step), scale.split(step), strict=True
    ):
        part.copy_(half).mul_(factor)
    return out


def unpacked_dtype(grads: Tensor) -> torch.dtype:
    """The dtype in which stored features are computed with."""
    return torch.float64 if grads.dtype == torch.float64 else torch.float32


def block_rows(proj_dim: int) -> int:
    """How many samples of so many dimensions are held at once."""
    return max(1, min(BLOCK_ROWS, BLOCK_BYTES // (4 * proj_dim)))


def sample_blocks(batch: np.ndarray[Any, Any], rows: int) -> list[Indices]:
    """The samples that are there in blocks of whole batches, each of ``rows`` samples or just more.

    batch : [n], which batch each sample was computed in, or -1. The blocks depend on nothing else.
        A block of twice ``rows`` or more, as one large batch makes it, is cut evenly.
    """
    order = np.argsort(batch, kind="stable").astype(np.int64)
    order = order[np.searchsorted(batch[order], 0) :]
    sizes = np.unique(batch[order], return_counts=True)[1]
    ends, size, end = [], 0, 0
    for count in sizes.tolist():
        size, end = size + count, end + count
        if size >= rows:
            ends.append(end)
            size = 0
    if size:
        ends.append(end)
    blocks = np.split(order, ends[:-1]) if ends else []
    return [part for b in blocks for part in np.array_split(b, max(1, len(b) // rows))]


class FeatureReader:
    """Rows of one checkpoint's features by sample number.

    A shard's checksums are verified once, when it is first read.

    Parameters
    ----------
    look : ``look()`` gives the index of the samples; ``look(again=True)`` reads it from disk again.
    read_shard : ``read_shard(path, names=None, check=True)`` gives a shard's tensors (None: all).
    proj_dim : k.
    """

    def __init__(
        self, look: Callable[..., ShardIndex], read_shard: Callable[..., Tensors], proj_dim: int
    ) -> None:
        self.index = look()
        self.proj_dim = proj_dim
        self._look = look
        self._read_shard = read_shard
        self._checked: set[Path] = set()
        self._expected: set[Path] = set()

    def read(self, inds: Indices, buffer: Buffer | None = None) -> tuple[Tensor, Tensor | None]:
        """Features [b, k] and Q [b] (None for targets) of the samples ``inds`` [b], in order.

        The features are in ``buffer`` where one is given, until its next use. Where another process
        has merged shards meanwhile, ``read`` looks again for the samples.
        """
        return self._again(lambda: self._read(inds, buffer), inds)

    def read_column(self, inds: Indices, name: str) -> Tensor:
        """A number of each of the samples ``inds`` [b], float32 [b]; the features aren't read."""
        return self._again(lambda: self._read_column(inds, name), inds)

    def _again(self, read: Callable[[], Item], inds: Indices) -> Item:
        """What ``read`` gives, tried again where its files were merged away meanwhile."""
        for _ in range(TRIES):
            try:
                return read()
            except GoneError:
                before = self.index
                self.index = self._look(again=True)
                same = self.index.content[inds] == before.content[inds]
                if not (same & self.index.done[inds]).all():
                    raise
        return read()

    def _read_column(self, inds: Indices, name: str) -> Tensor:
        out = torch.empty(len(inds), dtype=torch.float32, device="cpu")
        for number, places in self._by_shard(inds):
            stored = self._read_shard(self.index.shards[number].path, (name,))
            rows = torch.from_numpy(self.index.row[inds[places]].astype(np.int64))
            out[torch.from_numpy(places)] = stored[name][rows].float()
        return out

    def _by_shard(self, inds: Indices) -> Iterator[tuple[int, Indices]]:
        """(number of a shard, places among ``inds`` of what is in it), shard by shard."""
        shards = self.index.shard[inds]
        order = np.argsort(shards, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(places):
                yield int(shards[places[0]]), places

    def _read(self, inds: Indices, buffer: Buffer | None) -> tuple[Tensor, Tensor | None]:
        features: Tensor | None = None
        q: Tensor | None = None
        for number, places in self._by_shard(inds):
            tensors = self._rows(number, self.index.row[inds[places]])
            dtype = unpacked_dtype(tensors["grads"])
            if features is None:
                shape = (len(inds), tensors["grads"].shape[1])
                features = (buffer or Buffer()).take(shape, dtype)
            elif dtype == torch.float64 and features.dtype != dtype:
                features = features.double()
            if places[-1] - places[0] == len(places) - 1:  # one run of rows, as nearly always
                unpack(tensors, features[int(places[0]) : int(places[-1]) + 1])
            else:
                features[torch.from_numpy(places)] = unpack(tensors).to(features.dtype)
            if "out_to_loss" in tensors:
                stored = tensors["out_to_loss"].float()
                q = stored.new_full((len(inds),), torch.nan) if q is None else q
                q[torch.from_numpy(places)] = stored
        if features is None:
            features = torch.empty(0, self.proj_dim, dtype=torch.float32, device="cpu")
        return features, q

    def expect(self, inds: Indices) -> None:
        """Let the system start reading the shards of ``inds``, for which ``read`` will be
        called.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        for number in np.unique(self.index.shard[inds]).tolist():
            path = self.index.shards[number].path
            if path in self._expected:
                continue
            self._expected.add(path)
            with suppress(OSError):  # ``read`` will say what is wrong
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)

    def _rows(self, number: int, rows: np.ndarray[Any, Any]) -> Tensors:
        """The given rows of a shard; only their pages are read once the shard is checked."""
        path = self.index.shards[number].path
        check = path not in self._checked
        tensors = self._read_shard(path, check=check)
        self._checked.add(path)
        if len(rows) and (np.diff(rows) == 1).all():
            run = slice(int(rows[0]), int(rows[-1]) + 1)
            return {name: t[run] for name, t in tensors.items()}
        chosen = torch.from_numpy(rows.astype(np.int64))
        return {name: t[chosen] for name, t in tensors.items()}


class Buffer:
    """Memory that is used again, because fresh memory costs more than what is done with it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, device="cpu")

    def take(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """A tensor of unspecified content on the same memory as the last one."""
        size = shape[0] * shape[1]
        if self._memory.numel() < size or self._memory.dtype != dtype:
            self._memory = torch.empty(size, dtype=dtype, device="cpu")
        return self._memory[:size].view(shape)


def read_ahead(items: Iterable[Item], depth: int = 1) -> Iterator[Item]:
    """The same items, made by a thread that is up to ``depth`` + 1 items ahead of the caller."""
    made: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: Item | None, error: BaseException | None) -> None:
        while not stop.is_set():
            try:
                made.put((item, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put(item, None)
                if stop.is_set():
                    return
        except BaseException as error:  # goes to the caller, whatever it is
            put(None, error)
        else:
            put(None, StopIteration())

    thread = threading.Thread(target=make, name="fastproj-read-ahead", daemon=True)
    try:
        thread.start()  # an interrupt within leaves it running
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def read_features(
    readers: Sequence[FeatureReader], blocks: Sequence[Indices]
) -> Iterator[tuple[Indices, int, Tensor, Tensor | None]]:
    """(samples [b], place of the reader, features [b, k], Q [b]): every reader's, block by block.

    A thread reads ahead; the features' memory is used again two items later.
    """
    buffers = cycle([Buffer() for _ in range(3)])

    def items() -> Iterator[tuple[Indices, int, Tensor, Tensor | None]]:
        for number, rows in enumerate(blocks):
            for place, reader in enumerate(readers):
                for later in blocks[number + 1 : number + 1 + BLOCKS_EXPECTED]:
                    reader.expect(later)
                yield rows, place, *reader.read(rows, next(buffers))

    return read_ahead(items())
