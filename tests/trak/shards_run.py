"""A process that writes batches of one sample into a store, or reads while others do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import torch

from fastproj.trak.store import shards
from tests.trak import cases

SAMPLES = 60


def features(inds: np.ndarray) -> torch.Tensor:
    """Features [b, 4] that tell whose they are."""
    return torch.from_numpy(inds).float().unsqueeze(1) * torch.tensor([1.0, -1.0, 2.0, 0.5])


def write(save_dir: str, rank: int, size: int) -> None:
    """Samples ``rank``, ``rank + size``, ..., each a batch; files are merged by threes."""
    shards.FAN = 3
    store = cases.make(cases.net(), Path(save_dir), SAMPLES, proj_dim=4).saver
    store.register(0, "checkpoint")
    for i in range(rank, SAMPLES, size):
        inds = np.array([i])
        store.write_shard(0, inds, inds, features(inds), torch.ones(1))


def read(save_dir: str) -> None:
    """Look for samples until all are there; what is found is right, and is found for good."""
    shards.FAN = 3
    store = cases.make(cases.net(), Path(save_dir), SAMPLES, proj_dim=4).saver
    store.register(0, "checkpoint")
    before = np.zeros(SAMPLES, bool)
    while not before.all():
        reader = store.reader(0)
        done = reader.index.done
        assert not (before & ~done).any()
        inds = np.flatnonzero(done)
        for part in np.array_split(inds, 3):
            found, q = reader.read(part)
            assert torch.equal(found, features(part))
            assert q is None or bool((q == 1).all())
        before = done
        store.forget()


def main(what: str, *arguments: str) -> None:
    """``write`` or ``read``, with locks or on a file system that has none."""
    if os.environ["FASTPROJ_TEST_LOCKS"] == "0":
        shards.fcntl.flock = no_locks
    {"write": write, "read": read}[what](*arguments)


def no_locks(*_: object) -> None:
    """As some network file systems answer."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
