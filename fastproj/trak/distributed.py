"""One TRAK run in several processes: who does what, and what happens when one of them fails.

The processes share ``save_dir``. Only small facts go between them (which batch they hold, whether
they are done), over a gloo group of TRAKer's own. Features and XtX go through files.
"""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from fastproj.trak.files import Indices, digest

WAIT = datetime.timedelta(hours=24)  # for the slowest rank; a dead one is noticed at once

logger = logging.getLogger("fastproj.trak")

Value = TypeVar("Value")


class DistributedError(RuntimeError):
    """Another process of the run failed, is gone, or is in another step."""


class Ranks:
    """This process among those of a run; one process alone is ``Ranks()``.

    Parameters
    ----------
    rank, size : this process's number, and how many there are.
    group : a torch.distributed group for objects on the CPU, where size > 1.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        self.rank = rank
        self.size = size
        self.group = group

    @property
    def first(self) -> bool:
        """Whether this process does what only one of them must do."""
        return self.rank == 0

    def all_gather_steps(self, step: str, value: Value) -> list[tuple[str, Value]]:
        """Every rank's (step, value), by rank; all ranks must call it, wherever they are.

        Raises DistributedError where another process is gone.
        """
        if self.size == 1:
            return [(step, value)]
        every: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(every, (step, value), group=self.group)
        except RuntimeError as error:
            reason = str(error).strip().splitlines() or [""]
            raise DistributedError(
                f"{step}: another of the {self.size} processes is gone or doesn't answer (this is "
                f"rank {self.rank}; {reason[0][:200]}). See what it printed; run the same command "
                "again to go on: what was written is kept"
            ) from error
        return every

    def all_gather(self, step: str, value: Value) -> list[Value]:
        """The values of all ranks, by rank; all must be in the same step.

        Raises DistributedError where ranks are in different steps, or a process is gone.
        """
        every = self.all_gather_steps(step, value)
        other = [(rank, s) for rank, (s, _) in enumerate(every) if s != step]
        if other:
            raise DistributedError(
                f"{step}: rank {other[0][0]} is in {other[0][1]} while rank {self.rank} is in "
                f"{step}; expected the same calls in all processes (or TRAKer(distributed=False), "
                "where each works by itself)"
            )
        return [v for _, v in every]

    def broadcast(self, step: str, value: Value) -> Value:
        """Rank 0's value; all must be in the same step."""
        return self.all_gather(step, value)[0]

    def agree(self, step: str, facts: Any) -> bool:
        """Wait until all ranks are done with their batches. Return whether all call ``step``
        alike.
        """
        while True:
            every = self.all_gather_steps(step, facts)
            if all(s.startswith("finalize") for s, _ in every):
                return all(one == (step, facts) for one in every)

    @contextmanager
    def barrier(self, step: str) -> Iterator[None]:
        """Leave the block when all ranks do; where one fails inside, the others raise
        DistributedError, naming it.
        """
        try:
            yield
        except Exception as error:
            if not isinstance(error, DistributedError):
                with suppress(DistributedError):
                    self.all_gather(step, f"{type(error).__name__}: {error}")
            raise
        failures: list[str | None] = self.all_gather(step, None)
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise DistributedError(f"{step}: rank {rank} failed: {failure}")


class Turns:
    """Which rank computes which batch, in one pass over the data of a checkpoint.

    The ranks compare the first batch that each is given. If all hold the same batch, they go
    through the same loader and take turns. If they hold different samples, given by ``inds``, the
    data are shared out already, and each computes what it is given.

    Parameters
    ----------
    ranks : the processes.
    done : [n], which samples are there before the pass.
    pass_of : names the pass: (stage, model_id, experiment).
    """

    def __init__(self, ranks: Ranks, done: npt.NDArray[np.bool_], pass_of: tuple[Any, ...]) -> None:
        self.ranks = ranks
        self.pass_of = pass_of
        self.taking: bool | None = None if ranks.size > 1 else False
        self.met = False  # whether no batch has come since all ranks were waited for
        self._done = done.copy() if ranks.size > 1 else done
        self._count = 0

    def compare(self, step: str, inds: Indices, content: Indices, by_number: bool) -> None:
        """Decide whether to take turns, by the first batch; all ranks call it.

        Raises ValueError where ranks were given other data as the same samples.
        """
        batch = (hash_of(inds), hash_of(content))
        facts = (self.pass_of, by_number, *batch, hash_of(self._done))
        every = self.ranks.all_gather_steps(step, facts)
        same_pass = all(s == step and f[:2] == facts[:2] for s, f in every)
        if not same_pass:
            self.taking = False
            return
        others = [rank for rank, (_, f) in enumerate(every) if f[2:4] != batch]
        if others and by_number:
            raise ValueError(
                f"{step}: rank {others[0]} was given other data than rank {self.ranks.rank} as the "
                "first num_samples samples; expected the same loader in all processes (fastproj "
                "shares its batches out; no shuffling, and random augmentation seeded alike), or "
                "inds= with the samples' numbers where a sampler has shared them out"
            )
        self.taking = not others
        if any(f[4] != facts[4] for _, f in every):  # someone else is writing: count all batches
            self._done[:] = False

    def mine(self, inds: Indices) -> bool:
        """Whether the batch of these samples is this rank's."""
        if not self.taking:
            return True
        if self._done[inds].all():
            return self.ranks.first  # who looks whether the data are still the same
        return self._count % self.ranks.size == self.ranks.rank

    def passed(self, inds: Indices) -> None:
        """The batch is done, here or elsewhere."""
        self.met = False
        if self.taking and not self._done[inds].all():
            self._count += 1

    def meet(self, step: str) -> None:
        """Wait until every rank is in this step too, or past this pass, so that the batches of all
        are done. A rank may never call it: what it does next shows that it is past.
        """
        while not self.met:
            every = self.ranks.all_gather_steps(step, (self.pass_of,))
            behind = [s for s, facts in every if s != step and self._is_of_this_pass(facts)]
            self.met = not behind

    def _is_of_this_pass(self, facts: Any) -> bool:
        return isinstance(facts, tuple) and facts[:1] == (self.pass_of,)

    def deal(self, step: str, batches: list[Indices]) -> list[Indices]:
        """This rank's share of ``batches``, which all ranks must have alike; all ranks call it."""
        facts = (self.pass_of, hash_of(np.concatenate([*batches, np.empty(0, np.int64)])))
        alike = all(one == (step, facts) for one in self.ranks.all_gather_steps(step, facts))
        self.taking = False
        return batches[self.ranks.rank :: self.ranks.size] if alike else batches


def hash_of(array: npt.NDArray[Any]) -> str:
    """Equal for equal arrays only."""
    return digest(np.ascontiguousarray(array).tobytes())


def ranks_of_this_run(distributed: bool | None) -> Ranks:
    """The processes of this run, as torch.distributed or torchrun's environment has them.

    distributed : None joins where there are several; True insists on it; False stays alone.

    Raises ValueError for True without other processes to find.
    """
    if distributed is False or not dist.is_available():
        return Ranks()
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    if not dist.is_initialized():
        if not launched:
            if distributed:
                raise ValueError(
                    "TRAKer: received distributed=True, but torch.distributed is not initialised "
                    "and this process was not started by torchrun; expected `torchrun "
                    "--nproc-per-node N script.py`, or init_process_group(...) before"
                )
            return Ranks()
        if int(os.environ["WORLD_SIZE"]) == 1:
            return Ranks()
        dist.init_process_group("gloo", timeout=WAIT)
        atexit.register(leave)
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return Ranks()
    logger.info(
        "rank %d of %d: the work is shared out, once all ranks have made their TRAKer "
        "(distributed=False works alone)",
        rank,
        size,
    )
    group = dist.new_group(backend="gloo", timeout=WAIT)
    return Ranks(rank, size, group)


def leave() -> None:
    """End the process group that was begun here. Left to the interpreter's end, it may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: torch.device, ranks: Ranks) -> torch.device:
    """``cuda`` without a number is this rank's GPU: torchrun starts a process for each."""
    local = os.environ.get("LOCAL_RANK")
    if str(device) != "cuda" or ranks.size == 1 or local is None:
        return device
    return torch.device("cuda", int(local) % max(1, torch.cuda.device_count()))
