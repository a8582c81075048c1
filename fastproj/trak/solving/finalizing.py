"""Finalising: the Gram matrix of a checkpoint's features, and the lambda that is added to it."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastproj.trak.callers import stack_to_caller
from fastproj.trak.distributed import Ranks
from fastproj.trak.files import GoneError, Indices, StoreError, Tensors, digest
from fastproj.trak.inputs import IF_STORED, check_finite
from fastproj.trak.precision import full_precision
from fastproj.trak.progress import progress
from fastproj.trak.solving.ridge import (
    OWN_NOISE,
    SPREAD_OWN_NOISE,
    TINY,
    Meaning,
    Moments,
    Share,
    agreeing_ridge,
    choose_fisher_lambda,
    choose_lambda,
    fisher_meaning,
    halving_step,
    logistic_share,
    meaning,
    sample_weights,
    spread_ridges,
    weigh,
)
from fastproj.trak.solving.solve import (
    AUTO,
    HALF_ROUNDING,
    Gram,
    Lambda,
    Rows,
    ScoreComputer,
    Solution,
    System,
    eps_of_sum,
    sum_dtype,
)
from fastproj.trak.solving.systems import FISHER, TRAK, GramPart, Systems
from fastproj.trak.store.features import (
    Buffer,
    FeatureReader,
    block_rows,
    read_features,
    sample_blocks,
)
from fastproj.trak.store.store import DRAWN, Store

STEP = "finalize_features"
ONE_RIDGE = [(1.0, 1.0)]  # (multiple of lambda, weight), as of ``spread_ridges``
TRIES = 5  # where another process removes the parts that are being summed
MAX_PARTS = 16  # A Gram matrix is kept in at most so many parts until it is whole.
PART_ROWS = 4096  # A part is of at least so many samples,
PART_ROWS_PER_DIM = 8  # and so many times k: its 8 k^2 bytes are then fewer than the features'.
KERNEL_PART_BYTES = 1 << 28  # of a part's features in the dual, which stay in memory
OUTSIDE = 1e-5  # how far rounding may put a probability outside 0..1

logger = logging.getLogger("fastproj.trak")


@full_precision()
def finalize(
    systems: Systems,
    computer: ScoreComputer,
    model_ids: Sequence[int],
    lambda_reg: Lambda,
    ranks: Ranks,
    probabilities: bool | None = None,
    fisher: bool = False,
    labels: bool = False,
) -> None:
    """Sum up the matrix that lambda is added to, choose lambda where it is "auto", and keep both.

    With ``fisher`` that is the Fisher matrix. Without, it is Phi^T W Phi for "auto" where Q are
    probabilities, and XtX otherwise. ``probabilities`` says whether Q are; None looks at them.
    Where there are fewer rows than dimensions, the matrix of the dual system takes its place.
    """
    store = systems.store
    meanings: dict[int, Meaning] = {}
    counts = dict.fromkeys(model_ids, store.train_set_size)
    with ranks.barrier(STEP):
        if ranks.first and fisher:
            counts = {i: count_rows(store, i) for i in model_ids}
            meanings = {i: slope_meaning(store, i) for i in model_ids}
        elif ranks.first:
            tell_without_q(store, model_ids)
            if lambda_reg == AUTO:
                meanings = {i: q_meaning(i, store.out_to_loss(i), probabilities) for i in model_ids}
    meanings, counts = ranks.broadcast(STEP, (meanings, counts))
    power = {i: meanings[i].probability if i in meanings else 0.0 for i in model_ids}
    system = {
        i: System(power[i], computer.forms_dual(counts[i], store.proj_dim), fisher)
        for i in model_ids
    }
    missing = [i for i in model_ids if not systems.has_gram(i, system[i])]
    # Rank 0's list: it may be writing while others still look.
    todo = ranks.broadcast(STEP, missing)
    mine = sum(counts[i] for i in todo) // ranks.size
    with progress("finalising features", mine, "row") as bar:
        for model_id in todo:
            offset = meanings[model_id].offset if fisher else 0.0
            sum_gram(systems, computer, model_id, system[model_id], ranks, bar.update, offset)
    with ranks.barrier(STEP):
        for model_id in model_ids if ranks.first else ():
            q = meanings.get(model_id)
            keep_lambda(systems, computer, model_id, system[model_id], lambda_reg, q, labels)
            # Not where they were summed up: a process killed there would leave them for good.
            systems.remove_parts(model_id, system[model_id])


def count_rows(store: Store, model_id: int) -> int:
    """How many rows the Fisher matrix of a checkpoint is made of; all of them must be there."""
    drawn = int(store.index(model_id, DRAWN).done.sum())
    wanted = int(store.column(model_id, "drawn").sum())
    if drawn != wanted:
        raise StoreError(
            f"{STEP}: model_id {model_id} has {drawn} of {wanted} drawn rows of its Fisher matrix "
            f"in {store.shard_dir(model_id, DRAWN)}; expected all of them (is another "
            "program removing files?). Run this again: it makes those that are gone"
        )
    return drawn + store.train_set_size


def slope_meaning(store: Store, model_id: int) -> Meaning:
    """What the slopes of the log-likelihoods of a checkpoint's samples are.

    Raises ValueError where all slopes or all curvatures are 0: scores would be 0, or without a
    scale.
    """
    slopes, curvature, along = (
        store.column(model_id, name) for name in ("out_to_loss", "curvature", "along")
    )
    if not slopes.any():
        raise ValueError(
            f"{STEP}: model_id {model_id} has log-likelihoods whose slope by the output is 0 for "
            "all training samples, so all scores would be 0; expected a likelihood that depends on "
            "the output (was it detached?), and a network that doesn't fit all of its labels "
            "exactly (classes with probability 1, a regression without residuals)"
        )
    if not curvature.any() and not store.column(model_id, "drawn").any():
        raise ValueError(
            f"{STEP}: model_id {model_id} has log-likelihoods without curvature at its outputs, of "
            "which there is no Fisher matrix; expected a likelihood with one (-0.5 * (y - f) ** 2 "
            "of a regression; not one that is linear in the output), a network that doesn't give "
            "each label the probability 0 or 1, or TRAKer(curvature='trak') with another save_dir"
        )
    return fisher_meaning(slopes, curvature, along)


def tell_without_q(store: Store, model_ids: Sequence[int]) -> None:
    """Warn of checkpoints whose Q are all 0: scores are times the mean of Q over checkpoints."""
    for model_id in model_ids:
        if not store.out_to_loss(model_id).any():
            warnings.warn(
                f"{STEP}: model_id {model_id} has Q = 0 for all training samples: it gives each of "
                "its labels the probability 1, or its task's get_out_to_loss_grad returns 0. By "
                "itself it gives scores of 0. Fix: a checkpoint from earlier in the training",
                stacklevel=stack_to_caller(),
            )


def q_meaning(model_id: int, q: Tensor, probabilities: bool | None) -> Meaning:
    """What Q [n] are; ValueError where the task says probabilities and they can't be."""
    low, high = float(q.min()), float(q.max())
    if probabilities and not -OUTSIDE <= low <= high <= 1 + OUTSIDE:
        raise ValueError(
            f"{STEP}: model_id {model_id} has Q from {low:g} to {high:g}; expected 0..1, since the "
            "task's q_are_probabilities is True (None finds out; False takes Q for residuals)"
        )
    return meaning(q, probabilities)


def keep_lambda(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    system: System,
    lambda_reg: Lambda,
    q: Meaning | None,
    labels: bool,
) -> None:
    """Choose a checkpoint's lambda where it is "auto", check that it solves, and store it.

    With the Fisher matrix, the step that gives slopes at half of the samples is kept beside it.
    """
    gram, moments = read_gram(systems, model_id, system)
    value, spread = lambda_reg, False
    facts: dict[str, Any] = {
        "curvature": FISHER if system.fisher else TRAK,
        "lambda": lambda_reg,
        "weighted": system.weighted,
        "power": system.power,
        "form": "dual" if system.dual else "primal",
        "ridges": ONE_RIDGE,
    }
    ridge = agreeing_ridge(gram, moments) if system.fisher else None
    if q is not None and lambda_reg == AUTO:
        if system.fisher:
            n = systems.store.train_set_size
            joint = has_joint_outputs(systems.store, model_id)
            choice = choose_fisher_lambda(gram, moments, n, ridge, labels and joint)
            facts["own_noise"] = OWN_NOISE if labels or not joint else 0.0
            facts["peers"] = not joint
            spread = not joint and gram.n > n  # several classes
        else:
            choice = choose_lambda(gram, moments, q)
        value, facts["auto"] = choice.lambda_reg, choice.summary()
        logger.info(
            "model_id %d: lambda %.3g (%.3g * mean) chosen by %s",
            model_id,
            choice.lambda_reg,
            choice.relative,
            choice.rule,
        )
    if q is not None and system.fisher:  # before there is a factor: two such matrices are enough
        step = step_of(systems, model_id, system, gram, moments, ridge)
        systems.write_step(model_id, step)
        facts["training_ridge"] = ridge
        facts["halved"] = None if step is None else q.residual
    solution = computer.solve(gram, value)
    if spread and solves_smaller(solution, gram, min(by for by, _ in spread_ridges())):
        facts["own_noise"], facts["ridges"] = SPREAD_OWN_NOISE, spread_ridges()
    systems.write_solve(model_id, {**facts, **solution.summary()})
    logger.info(
        "model_id %d: lambda %.3g, condition estimate %.1e (%s)",
        model_id,
        solution.lambda_reg,
        solution.condition,
        f"{len(gram.matrix)} x {len(gram.matrix)}, {facts['form']}",
    )


def solves_smaller(solution: Solution, gram: Gram, by: float) -> bool:
    """Whether ``by`` times the lambda of a solution would solve its system to some digits, too."""
    rounding = gram.eps * math.sqrt(gram.k)  # as ``solve.solve`` judges it
    return solution.condition / by * rounding < 1


def step_of(
    systems: Systems,
    model_id: int,
    system: System,
    gram: Gram,
    moments: Moments,
    ridge: float | None,
) -> Tensor | None:
    """``halving_step`` as float64 [k]; None also where it moves no slope, as of sequences."""
    if has_joint_outputs(systems.store, model_id):
        return None
    step = halving_step(gram, moments, ridge)
    if step is None or not system.dual:
        return step
    return sum_of_rows(systems, model_id, system, step.unsqueeze(1)).squeeze(1)


def sum_of_rows(systems: Systems, model_id: int, system: System, factors: Tensor) -> Tensor:
    """``S^T factors``, float64 [k, c], of a dual system; factors [N, c] in its rows' order."""
    order = systems.read_order(model_id, system).numpy()
    total = factors.new_zeros(systems.store.proj_dim, factors.shape[1])
    for places, rows in stored_rows(systems.store, model_id, system, order).read():
        total += rows.double().mT @ factors[places]
    return total


def has_joint_outputs(store: Store, model_id: int) -> bool:
    """Whether samples are sequences, pairs or sets of labels, whose rows are gradients of whole
    log-likelihoods: then all Q are 1.
    """
    return bool((store.out_to_loss(model_id) == 1).all())


def weights_of(store: Store, model_id: int, system: System) -> Tensor:
    """What the outer product of each training sample's features counts, float64 [n]; above 0."""
    if not system.fisher:
        return sample_weights(store.out_to_loss(model_id), system.power)
    weights = store.column(model_id, "curvature").double()
    # TINY, so that what u has along a row is in the span of the rows; a likelihood has any scale
    return weights.clamp_(min=TINY * (float(weights.max()) or 1.0))


def read_gram(systems: Systems, model_id: int, system: System) -> tuple[Gram, Moments]:
    """The Gram matrix of a checkpoint, and what was summed up beside it."""
    sums, n, eps = systems.read_gram(model_id, system)
    return gram_of(systems.store, system, sums, n, eps), Moments.of(sums, system.power)


def gram_of(store: Store, system: System, sums: Tensors, n: int, eps: float) -> Gram:
    """A Gram matrix as it was stored."""
    rounding = HALF_ROUNDING if store.half else 0.0
    matrix = sums["kernel" if system.dual else "xtx"]
    return Gram(matrix, n, store.proj_dim, eps, rounding, system.fisher)


def stored_rows(store: Store, model_id: int, system: System, order: Indices) -> Rows:
    """The rows of a dual system: stored features, weighted, read again at each pass."""
    sources = sources_of(store, model_id, system)
    blocks = blocks_of(sources, store.proj_dim)
    places = np.empty(1 + int(order.max()), np.int64)
    places[order] = np.arange(len(order))

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        buffer = Buffer()
        for source, inds, features, share in read_rows(sources, blocks):
            rows = weigh(features, share.weights, system.power, buffer)
            yield torch.from_numpy(places[source.first + inds]), rows

    return Rows(len(order), read)


# ---- what a matrix is made of -------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Rows of features, and what they count.

    first : the number of its first row among all that a store can have.
    share : takes (samples or rows [b], Q [b] as stored).
    """

    reader: FeatureReader
    first: int
    share: Callable[[Indices, Tensor], Share]


Block = tuple[int, Indices]  # number of the source, samples or rows


def sources_of(store: Store, model_id: int, system: System, offset: float = 0.0) -> list[Source]:
    """The training samples; of the Fisher matrix also the rows that were drawn.

    offset : what the values of samples are counted from.
    """
    training = store.reader(model_id)
    if not system.fisher:
        return [Source(training, 0, lambda _, q: logistic_share(q, system.power))]
    values, drawn = (store.column(model_id, name).double() for name in ("along", "drawn"))
    weights = weights_of(store, model_id, system)
    values -= offset

    def of_samples(inds: Indices, q: Tensor) -> Share:
        rows = torch.from_numpy(inds)
        return Share(weights[rows], values[rows], q.double())

    chosen = int((drawn > 0).sum())
    weight = store.train_set_size / max(chosen, 1)

    def of_rows(inds: Indices, q: Tensor) -> Share:
        values = q.double()
        return Share(torch.full_like(values, weight), values, torch.zeros_like(values))

    sources = [Source(training, 0, of_samples)]
    if chosen:
        sources.append(Source(store.reader(model_id, DRAWN), store.train_set_size, of_rows))
    return sources


def blocks_of(sources: Sequence[Source], proj_dim: int) -> list[Block]:
    """All that the sources have, in blocks of whole batches."""
    return [
        (number, inds)
        for number, source in enumerate(sources)
        for inds in sample_blocks(source.reader.index.order(), block_rows(proj_dim))
    ]


def read_rows(
    sources: Sequence[Source],
    blocks: Sequence[Block],
    advance: Callable[[int], Any] = lambda _: None,
) -> Iterator[tuple[Source, Indices, Tensor, Share]]:
    """(source, samples or rows [b], features [b, k], what they count) of some blocks, checked."""
    for number, run in groupby(blocks, key=lambda block: block[0]):
        source = sources[number]
        for inds, _, features, q in read_features([source.reader], [inds for _, inds in run]):
            assert q is not None  # all but targets have it
            check_finite(STEP, "stored features", features, inds, IF_STORED)
            yield source, inds, features, source.share(inds, q)
            advance(len(inds))


def numbers_of(sources: Sequence[Source], blocks: Sequence[Block]) -> Indices:
    """The numbers of the rows of S in some blocks, in order."""
    parts = [sources[i].first + inds for i, inds in blocks]
    return np.concatenate([np.zeros(0, np.int64), *parts])


# ---- sums over all samples ----------------------------------------------------------------------


def sum_gram(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    system: System,
    ranks: Ranks,
    advance: Callable[[int], Any],
    offset: float,
) -> None:
    """Sum up and store the Gram matrix of a checkpoint, shared out over ranks.

    offset : as ``sources_of`` takes it.

    Its parts and their order depend on the batches alone. So it is the same, bit for bit, for any
    number of ranks, and whether or not it was interrupted.
    """
    store = systems.store
    sources = sources_of(store, model_id, system, offset)
    blocks = blocks_of(sources, store.proj_dim)
    parts = (kernel_parts if system.dual else gram_parts)(blocks, store.proj_dim)
    # Processes apart may see other batches of the same samples, and so have other parts.
    layout = layout_of(blocks)

    def write(number: int, part: GramPart | None) -> None:
        if system.dual:
            before = [block for blocks in parts[:number] for block in blocks]
            made = kernel_part(sources, computer, system, before, parts[number], advance)
        else:
            made = gram_part(sources, computer, system, parts[number], advance)
        systems.write_gram(model_id, *made, system, part)

    with ranks.barrier(STEP):
        if len(parts) == 1:
            if ranks.first:
                write(0, None)
            return
        for number in range(ranks.rank, len(parts), ranks.size):
            if not systems.has_gram(model_id, system, (layout, number)):
                write(number, (layout, number))
    with ranks.barrier(STEP):
        join = join_parts if system.dual else add_parts
        keys = [(layout, number) for number in range(len(parts))]
        tries = 0
        while ranks.first and not systems.has_gram(model_id, system):
            try:
                systems.write_gram(model_id, *join(systems, model_id, system, keys), system)
            except GoneError:  # a process apart has just finished, and removed the parts
                tries += 1
                if tries == TRIES:
                    raise
                for key in keys:
                    if not systems.has_gram(model_id, system, key):
                        write(key[1], key)
            except StoreError:
                if not systems.has_gram(model_id, system):
                    raise


def gram_part(
    sources: Sequence[Source],
    computer: ScoreComputer,
    system: System,
    blocks: Sequence[Block],
    advance: Callable[[int], Any],
) -> tuple[Tensors, int, float]:
    """The sums over the rows of some blocks, their number, and how exact they are."""
    n, k = rows_in_all(sources), sources[0].reader.proj_dim
    moments = Moments(k, system.power)
    gram = computer.gram(moments.over(shares(read_rows(sources, blocks, advance))), k, n)
    return {"xtx": gram.matrix, **moments.tensors()}, gram.n, gram.eps


def shares(
    rows: Iterator[tuple[Source, Indices, Tensor, Share]],
) -> Iterator[tuple[Tensor, Share]]:
    """What ``Moments.over`` takes."""
    return ((features, share) for _, _, features, share in rows)


def rows_in_all(sources: Sequence[Source]) -> int:
    """The number of rows of S."""
    return sum(int(source.reader.index.done.sum()) for source in sources)


def add_parts(
    systems: Systems, model_id: int, system: System, keys: Sequence[GramPart]
) -> tuple[Tensors, int, float]:
    """The sums of all parts, in order, how many samples they are of, and how exact."""
    total, n, eps = systems.read_gram(model_id, system, keys[0])
    total = {name: t.clone() for name, t in total.items()}
    terms = [(eps, float(total["xtx"].trace()))]
    for key in keys[1:]:
        part, rows, eps = systems.read_gram(model_id, system, key)
        terms.append((eps, float(part["xtx"].trace())))
        n += rows
        for name, t in part.items():
            total[name] += t
    k = systems.store.proj_dim
    return total, n, eps_of_sum(torch.finfo(sum_dtype(float(n) * k * k)).eps, terms, k)


def kernel_part(
    sources: Sequence[Source],
    computer: ScoreComputer,
    system: System,
    before: Sequence[Block],
    blocks: Sequence[Block],
    advance: Callable[[int], Any],
) -> tuple[Tensors, int, float]:
    """The columns of S S^T of the rows of some blocks, down from its first row to theirs.

    The rows of ``blocks`` are held in memory, while those of the blocks ``before`` pass by.
    """
    n, k = rows_in_all(sources), sources[0].reader.proj_dim
    order = numbers_of(sources, blocks)
    moments = Moments(k, system.power)
    held = torch.empty(0, device="cpu")
    end = 0
    for rows in moments.over(shares(read_rows(sources, blocks, advance))):
        if not len(held):
            held = rows.new_empty(len(order), k)
        elif rows.dtype == torch.float64 and held.dtype != rows.dtype:
            held = held.double()
        held[end : end + len(rows)] = rows
        end += len(rows)
    start = len(numbers_of(sources, before))
    columns = torch.empty(start + len(order), len(order), dtype=torch.float64, device="cpu")
    buffer = Buffer()
    end = 0
    for _, _, features, share in read_rows(sources, before if len(order) else []):
        rows = weigh(features, share.weights, system.power, buffer)
        columns[end : end + len(rows)] = computer.kernel(rows, held, n)
        end += len(rows)
    for low in range(0, len(order), block_rows(k)):
        rows = held[low : low + block_rows(k)]
        columns[end : end + len(rows)] = computer.kernel(rows, held, n)
        end += len(rows)
    own = columns[start:]  # rounding may differ on both sides of its diagonal
    own.copy_((own + own.mT).div_(2))
    sums = {
        "kernel": columns,
        "order": torch.from_numpy(order),
        "response": moments.response,
        **moments.tensors(),
    }
    return sums, len(order), torch.finfo(sum_dtype(float(n) * n * k)).eps


def join_parts(
    systems: Systems, model_id: int, system: System, keys: Sequence[GramPart]
) -> tuple[Tensors, int, float]:
    """S S^T of the columns that all parts hold, and what belongs to it, as ``add_parts``."""
    size = rows_in_all(sources_of(systems.store, model_id, system))
    kernel = torch.empty(size, size, dtype=torch.float64, device="cpu")
    total: Tensors = {}
    eps, end = 0.0, 0
    for key in keys:
        part, n, eps = systems.read_gram(model_id, system, key)
        columns = part.pop("kernel")
        kernel[: end + n, end : end + n] = columns
        kernel[end : end + n, :end] = columns[:end].mT
        end += n
        for name, t in part.items():
            if name not in total:
                total[name] = t.clone()
            elif name in ("order", "response"):
                total[name] = torch.cat([total[name], t])
            else:
                total[name] += t
    return {"kernel": kernel, **total}, end, eps


def gram_parts(blocks: Sequence[Block], proj_dim: int) -> list[list[Block]]:
    """The blocks in at most MAX_PARTS runs, one for each part of a Gram matrix."""
    total = sum(len(inds) for _, inds in blocks)
    return runs(blocks, max(-(-total // MAX_PARTS), PART_ROWS, PART_ROWS_PER_DIM * proj_dim))


def kernel_parts(blocks: Sequence[Block], proj_dim: int) -> list[list[Block]]:
    """The blocks in runs of KERNEL_PART_BYTES, for the matrix of a dual system."""
    return runs(blocks, max(1, KERNEL_PART_BYTES // (4 * proj_dim)))


def layout_of(blocks: Sequence[Block]) -> str:
    """Hash of the rows in each block, in order: parts of equal layouts are of the same rows."""
    return digest(b"".join(b"%d %d " % (i, len(inds)) + inds.tobytes() for i, inds in blocks))


def runs(blocks: Sequence[Block], size: int) -> list[list[Block]]:
    """The blocks in runs of ``size`` samples, or just more."""
    parts: list[list[Block]] = [[]]
    for block in blocks:
        if sum(len(inds) for _, inds in parts[-1]) >= size:
            parts.append([])
        parts[-1].append(block)
    return parts
