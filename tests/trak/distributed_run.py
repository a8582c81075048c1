"""A small TRAK run as one of several processes, as torchrun would start it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from fastproj.trak.draws import Fisher
from tests.trak import cases

N, M = 33, 7


def launch(rank: int, size: int, port: int) -> None:
    """The environment that torchrun gives its processes."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def main(save_dir: str, log: str, rank: int, size: int, port: int, how: dict[str, Any]) -> None:
    """From features to scores of two checkpoints.

    how["feed"] : "plain" (num_samples), "inds", "remaining" (remaining_batches) or "sampler"
        (DistributedSampler; "sampler by number" with num_samples), "own checkpoints" (plain, but
        one checkpoint for each rank until all are finalised).
    how["die"] : [rank, stage] kills that rank as it computes its second batch of the stage.
    how["fail"] : [rank, method] lets a method of the score computer fail there.
    how["batch_size"] : one for each rank.
    how["backend"] : a process group of this backend is there before TRAKer is made.
    how["groups"] : of the targets.
    how["size_power"] : of fastproj.trak.Fisher.
    how["stream"] : a number of candidates, shared out in batches of 2, whose scores each rank keeps
        beside the log.
    how["idle"] : [rank, model_id] for which that rank has no batch of training samples.
    how["only"] : "featurize" lets each rank featurize every size-th batch of its, and no more.
    log : the computed batches are appended to it.
    """
    if size > 1:
        launch(rank, size, port)
    if "backend" in how:
        from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers "fake"

        store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
        dist.init_process_group(how["backend"], store=store, rank=rank, world_size=size)
    cases.small_blocks()
    feed, die = how.get("feed", "plain"), how.get("die")
    model = cases.net()
    train, targets = cases.data(N), cases.data(M, seed=5)
    # The first shows no training ridge, the second does: lambda is chosen by one rule and the other
    states = [net.state_dict() for net in (cases.net(0), cases.trained(1, train))]
    options = {"proj_dim": 6, **how.get("options", {})}
    if "size_power" in how:
        options["curvature"] = Fisher(size_power=how["size_power"])
    traker = cases.make(model, Path(save_dir), N, **options)
    features, computed = traker._featurizer.features, []

    def logged(batch: Any, model_id: int, inds: Any, **kind: Any) -> list[torch.Tensor]:
        stage = traker._pass.function
        computed.append(stage)
        if die == [rank, stage] and computed.count(stage) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with open(log, "a") as file:
            file.write(f"{rank} {stage} {model_id} {','.join(map(str, inds))}\n")
        return features(batch, model_id, inds, **kind)

    traker._featurizer.features = logged

    def go(call: Any, data: tuple[torch.Tensor, torch.Tensor], batch_size: int) -> None:
        numbers = torch.arange(len(data[0]))
        everything = TensorDataset(*data, numbers)
        if feed == "remaining":
            todo = traker.remaining_batches(batch_size)
            for inds, (*batch, _) in zip(
                todo, DataLoader(everything, batch_sampler=todo), strict=True
            ):
                call(batch, inds=inds)
            return
        loader = DataLoader(everything, batch_size)
        if feed.startswith("sampler") and size > 1:
            sampler = DistributedSampler(everything, shuffle=False, drop_last=False)
            loader = DataLoader(everything, batch_sampler=BatchSampler(sampler, batch_size, False))
        for number, (*batch, inds) in enumerate(loader):
            if how.get("only") and number % size != rank:
                continue
            if feed in ("plain", "sampler by number", "own checkpoints"):
                call(batch, num_samples=len(inds))
            else:
                call(batch, inds=inds)

    fail = how.get("fail")
    if fail and fail[0] == rank:

        def failing(*_: Any) -> None:
            raise OSError("no such luck")

        setattr(traker.score_computer, fail[1], failing)
    for model_id, state in enumerate(states):
        if feed == "own checkpoints" and model_id % size != rank:
            continue
        traker.load_checkpoint(state, model_id)
        if how.get("idle") != [rank, model_id]:
            go(traker.featurize, train, how.get("batch_size", [4] * size)[rank])
        if feed == "own checkpoints":
            traker.finalize_features(model_ids=[model_id])
    if how.get("only"):
        return
    traker.finalize_features()
    for model_id, state in enumerate(states):
        groups = how.get("groups")
        traker.start_scoring_checkpoint("test", state, model_id, M, groups=groups)
        go(traker.score, targets, 2)
        stream(traker, Path(log).parent, rank, size, how.get("stream", 0))
    scores = traker.finalize_scores("test")
    columns = 1 + max(how["groups"]) if "groups" in how else M
    assert scores.shape == (N, columns)
    assert traker.finalize_scores("test", top_k=3).helpful_indices.shape == (columns, 3)


def stream(traker: Any, folder: Path, rank: int, size: int, count: int) -> None:
    """The scores of this rank's candidates by the loaded checkpoint, a file for each batch."""
    candidates = cases.data(count, seed=9)
    batches = list(zip(*(part.split(2) for part in candidates), strict=True)) if count else []
    for number in range(rank, len(batches), size):
        scores = traker.score(batches[number], stream=True)
        np.save(folder / f"stream-{traker.saver.current_model_id}-{number}.npy", scores)
