"""The score file: an n x m array on disk, made block by block, there only when it is whole."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from fastproj.trak.files import Indices, remove_stale, sync_dir, temporary_path, write_error


class ScoresWriter:
    """Adds blocks to a float32 [n, m] array in a temporary file; leaving the block renames it.

    Raises StoreError where the disk has no room, before anything is computed.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        self.shape = shape

    def __enter__(self) -> ScoresWriter:
        remove_stale(self.path.parent)
        self.temporary = temporary_path(self.path)
        size = 4 * self.shape[0] * self.shape[1]
        try:
            self.array: npt.NDArray[np.float32] | None = np.lib.format.open_memmap(
                self.temporary, mode="w+", dtype=np.float32, shape=self.shape
            )
            # A sparse file on a full disk would end the process by a signal at the first write.
            with open(self.temporary, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            self.array = None
            self.temporary.unlink(missing_ok=True)
            raise write_error(self.path, size, error) from error
        return self

    def add(self, rows: Indices, columns: Indices, block: npt.NDArray[np.float32]) -> None:
        """``array[rows, columns] += block``; rows [b] and columns [m'] are distinct."""
        assert self.array is not None
        self.array[np.ix_(rows, columns)] += block

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and isinstance(self.array, np.memmap):
                self.array.flush()
                with open(self.temporary, "r+b") as file:
                    os.fsync(file.fileno())
                os.replace(self.temporary, self.path)
                sync_dir(self.path.parent)
        finally:
            self.array = None
            self.temporary.unlink(missing_ok=True)
