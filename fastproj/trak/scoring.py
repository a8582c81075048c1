"""The two passes over all features of a run: XtX, and the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.trak.distributed import Ranks
from fastproj.trak.features import Buffer, FeatureReader, read_ahead, sample_blocks
from fastproj.trak.files import Indices, StoreError
from fastproj.trak.inputs import IF_STORED, check_finite
from fastproj.trak.solve import Gram, ScoreComputer, Solution
from fastproj.trak.store import Store
from fastproj.trak.writer import Sink

BLOCK_ROWS = 2048  # training samples held at once while finalising and scoring
TARGET_ROWS = 8192  # targets held at once while scoring
BLOCKS_EXPECTED = 2  # that the system is told to start reading
WEIGHT_BYTES = 1 << 28  # of all checkpoints' targets held at once
MAX_PARTS = 16  # that XtX is kept in until it is whole
PART_ROWS = 4096  # samples in a part, at least;
PART_ROWS_PER_DIM = 8  # and so many times k, for a part (8 k^2 bytes) to be smaller than they are


def feature_stream(
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


# ---- XtX ----------------------------------------------------------------------------------------


def sum_xtx(
    store: Store,
    computer: ScoreComputer,
    model_id: int,
    ranks: Ranks,
    advance: Callable[[int], Any],
) -> None:
    """Sum up and store Phi^T Phi of a checkpoint, shared out over ranks.

    The parts that it is summed from, and their order, depend on the shards alone: so the sum is
    the same, bit for bit, for any number of ranks, and whether or not it was interrupted.
    """
    parts = xtx_parts(sample_blocks(store.index(model_id).shard, BLOCK_ROWS), store.proj_dim)
    reader = FeatureReader(store, model_id)

    def gram(blocks: Sequence[Indices]) -> Gram:
        features = counted(feature_stream([reader], blocks), advance)
        return computer.gram(features, store.proj_dim, store.train_set_size)

    with ranks.together("finalize_features"):
        if len(parts) == 1:
            if ranks.first:
                whole = gram(parts[0])
                store.write_xtx(model_id, whole.xtx, whole.n, whole.eps)
            return
        for number in range(ranks.rank, len(parts), ranks.size):
            if not store.has_part(model_id, number):
                part = gram(parts[number])
                store.write_part(model_id, number, part.xtx, part.eps)
    with ranks.together("finalize_features"):
        if ranks.first and not store.has_xtx(model_id):  # a process apart may have been faster
            try:
                total, eps = add_parts(store, model_id, len(parts))
            except StoreError:
                if not store.has_xtx(model_id):
                    raise
            else:
                store.write_xtx(model_id, total, store.train_set_size, eps)
        if ranks.first:
            store.remove_parts(model_id)


def add_parts(store: Store, model_id: int, count: int) -> tuple[Tensor, float]:
    """The sum of XtX's parts, in order, and how exact it is."""
    first, eps = store.read_part(model_id, 0)
    total = first.clone()
    for number in range(1, count):
        total += store.read_part(model_id, number)[0]
    return total, eps


def counted(
    stream: Iterator[tuple[Indices, int, Tensor, Tensor | None]], advance: Callable[[int], Any]
) -> Iterator[Tensor]:
    """The features of a stream, checked to be finite and told to the progress bar."""
    for rows, _, features, _ in stream:
        check_finite("finalize_features", "stored features", features, rows, IF_STORED)
        yield features
        advance(len(rows))


def xtx_parts(blocks: Sequence[Indices], proj_dim: int) -> list[list[Indices]]:
    """The blocks in at most MAX_PARTS runs: what XtX is shared out and kept by."""
    total = sum(len(rows) for rows in blocks)
    size = max(-(-total // MAX_PARTS), PART_ROWS, PART_ROWS_PER_DIM * proj_dim)
    parts: list[list[Indices]] = [[]]
    for rows in blocks:
        if sum(len(r) for r in parts[-1]) >= size:
            parts.append([])
        parts[-1].append(rows)
    return parts


# ---- scores -------------------------------------------------------------------------------------


def write_scores(
    store: Store,
    computer: ScoreComputer,
    exp_name: str,
    model_ids: Sequence[int],
    solution_of: Callable[[int], Solution],
    sink: Sink,
    ranks: Ranks,
    advance: Callable[[int], Any],
) -> None:
    """The scores, block by block, into ``sink``; blocks are shared out over ranks.

    ``mean over checkpoints of (features @ weights.T) * mean over checkpoints of Q``

    Parameters
    ----------
    solution_of : makes the factored system of a checkpoint; one is held at a time.
    advance : told the number of training samples done, for each chunk of targets.
    """
    readers = [FeatureReader(store, model_id) for model_id in model_ids]
    blocks = sample_blocks(readers[0].index.shard, BLOCK_ROWS)[ranks.rank :: ranks.size]
    with ranks.together("finalize_scores"):
        total = q_total = torch.empty(0)
        for columns in target_chunks(store, exp_name, len(model_ids)):
            weights = [
                target_weights(store, model_id, exp_name, columns, solution_of).to(computer.device)
                for model_id in model_ids
            ]
            for rows, place, features, q in feature_stream(readers, blocks):
                assert q is not None  # training shards have it
                product = computer.scores(features, weights[place])  # [b, m]
                if place == 0:
                    total, q_total = product, q
                else:
                    total, q_total = total.add_(product), q_total + q
                if place == len(readers) - 1:
                    share = q_total / len(readers) ** 2
                    sink.add(rows, columns, total.mul_(share.unsqueeze(1)).numpy())
                    advance(len(rows))
    sink.finish()


def self_scores(
    store: Store,
    model_ids: Sequence[int],
    solution_of: Callable[[int], Solution],
    advance: Callable[[int], Any],
) -> Tensor:
    """The score of each training sample on itself, float64 [n]: the diagonal that scores of the
    training set as targets would have.
    """
    total = torch.zeros(store.train_set_size, dtype=torch.float64)
    q_total = torch.zeros_like(total)
    for model_id in model_ids:
        solution = solution_of(model_id)
        reader = FeatureReader(store, model_id)
        blocks = sample_blocks(reader.index.shard, BLOCK_ROWS)
        for rows, _, features, q in feature_stream([reader], blocks):
            assert q is not None  # training shards have it
            inds = torch.from_numpy(rows)
            total[inds] += (solution.apply(features) * features.double()).sum(1).cpu()
            q_total[inds] += q.double()
            advance(len(rows))
    return total * q_total / len(model_ids) ** 2


def target_chunks(store: Store, exp_name: str, checkpoints: int) -> list[range]:
    """The targets in pieces whose features, under all checkpoints, fit into WEIGHT_BYTES."""
    n_targets = store.num_targets(exp_name)
    step = WEIGHT_BYTES // (4 * store.proj_dim * checkpoints)
    step = max(1, min(step, TARGET_ROWS))
    return [range(low, min(low + step, n_targets)) for low in range(0, n_targets, step)]


def target_weights(
    store: Store,
    model_id: int,
    exp_name: str,
    columns: range,
    solution_of: Callable[[int], Solution],
) -> Tensor:
    """The targets' features times (XtX + lambda I)^-1, [m', k], in the features' dtype."""
    targets, _ = FeatureReader(store, model_id, exp_name).read(
        np.arange(columns.start, columns.stop)
    )
    return solution_of(model_id).apply(targets).to(targets.dtype)
