"""Scoring: the pass over all features that gives the scores of targets."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.checks import listed
from fastproj.trak.callers import stack_to_caller
from fastproj.trak.distributed import Ranks, hash_of
from fastproj.trak.files import Indices
from fastproj.trak.precision import full_precision
from fastproj.trak.progress import progress
from fastproj.trak.solving.inverse import own_scores, ridges_of, with_image
from fastproj.trak.solving.peers import in_mean
from fastproj.trak.solving.ridge import moved_slopes
from fastproj.trak.solving.solve import ScoreComputer
from fastproj.trak.solving.systems import Systems
from fastproj.trak.store.features import block_rows, read_features, sample_blocks
from fastproj.trak.store.scores import Sink
from fastproj.trak.store.store import Store

STEP = "finalize_scores"
TARGET_ROWS = 8192  # targets held at once while scoring
WEIGHT_BYTES = 1 << 28  # of all checkpoints' targets held at once
PRECISE = 1e-4  # relative error of scores by rounding from which on float64 takes float32's place
HALF_ERROR = 2.0**-12.4  # root mean square of float16's rounding, over that of what is rounded
NOISE = 0.5  # share of scores that rounding is, from which on there is a warning


@full_precision()
def write_scores(
    systems: Systems,
    computer: ScoreComputer,
    exp_name: str,
    model_ids: Sequence[int],
    sink: Sink,
    ranks: Ranks,
) -> None:
    """The scores, block by block, into ``sink``; blocks are shared out over ranks.

    ``mean over checkpoints of (features @ weights.T) * mean over checkpoints of Q``, or, where each
    takes its own Q, ``mean over checkpoints of ((features @ weights.T) * Q)``, Q as in ``Halved``.
    Lambdas, and the order of training samples, are those that rank 0 finds at the beginning.
    """
    with ranks.barrier(STEP):
        found = in_mean(systems, computer, model_ids).solved if ranks.first else {}
    systems = Systems(systems.store, ranks.broadcast(STEP, found))
    store, own_q, count = systems.store, takes_own_q(systems, model_ids), len(model_ids)
    readers = [store.reader(model_id) for model_id in model_ids]
    order = readers[0].index.order()
    if len(set(ranks.all_gather(STEP, hash_of(order)))) > 1:  # a process apart has just added some
        order = ranks.broadcast(STEP, order)
    blocks = sample_blocks(order, block_rows(store.proj_dim))[ranks.rank :: ranks.size]
    chunks = target_chunks(store, exp_name, count)
    passes = len(chunks) * store.train_set_size // ranks.size
    halved = [Halved.of(systems, model_id) for model_id in model_ids]
    with ranks.barrier(STEP), progress("scoring", passes, "sample") as bar:
        total = q_total = torch.empty(0, device="cpu")
        for columns in chunks:
            weights = []  # one checkpoint's system is held at a time
            for model_id in model_ids:
                targets = target_features(store, model_id, exp_name, columns)
                weights.append(target_weights(systems, computer, model_id, targets))
            for rows, place, features, q in read_features(readers, blocks):
                assert q is not None  # training shards have it
                product = computer.scores(features, weights[place])  # [b, m]
                if own_q:
                    q = halved[place].slopes_of(rows, computer, features, q)
                    product.mul_(q.unsqueeze(1))
                    q = torch.ones_like(q)
                check_scores(systems, model_ids[place], product)
                if place == 0:
                    total, q_total = product, q
                else:
                    total, q_total = total.add_(product), q_total + q
                if place == len(readers) - 1:
                    share = q_total / len(readers) ** 2
                    sink.add(rows, columns, total.mul_(share.unsqueeze(1)).numpy())
                    bar.update(len(rows))
    sink.finish()


@full_precision()
def scores_of_targets(
    systems: Systems,
    computer: ScoreComputer,
    model_id: int,
    targets: Tensor,
    model_ids: Sequence[int],
) -> npt.NDArray[np.float32]:
    """The scores of all training samples by one checkpoint, [n, m], of target features [m, k].

    model_ids : the checkpoints whose scores are averaged, this one among them.
    """
    store, systems = systems.store, in_mean(systems, computer, model_ids)
    weights = target_weights(systems, computer, model_id, targets)
    scores = np.empty((store.train_set_size, len(targets)), np.float32)
    reader = store.reader(model_id)
    blocks = sample_blocks(reader.index.order(), block_rows(store.proj_dim))
    halved = Halved.of(systems, model_id)
    for rows, _, features, q in read_features([reader], blocks):
        assert q is not None  # training shards have it
        q = halved.slopes_of(rows, computer, features, q)
        product = computer.scores(features, weights).mul_(q.unsqueeze(1))
        check_scores(systems, model_id, product)
        scores[rows] = product.numpy()
    return scores


@dataclass(frozen=True)
class Halved:
    """Q of training samples, as it is where only half of them are trained on.

    Scores say what training without some samples would change. Their slopes matter then, not those
    of a network that was fitted to all. One Newton step moves a sample's output by ``phi . step``:
    see docs/research/lambda.md.

    step : ``ridge.halving_step``, [k]; None: Q stays as it is, as with TRAK's formula.
    residual : as in ``ridge.Meaning``.
    curvature : of the training samples, [n].
    """

    step: Tensor | None = None
    residual: float = 0.0
    curvature: Tensor | None = None

    @classmethod
    def of(cls, systems: Systems, model_id: int) -> Halved:
        """As a checkpoint was finalised."""
        found = systems.read_step(model_id)
        if found is None:
            return cls()
        return cls(*found, systems.store.column(model_id, "curvature"))

    def slopes_of(
        self, rows: Indices, computer: ScoreComputer, features: Tensor, q: Tensor
    ) -> Tensor:
        """``slopes`` of the training samples ``rows`` [b]."""
        if self.curvature is None:
            return q
        return self.slopes(computer, features, q, self.curvature[torch.from_numpy(rows)])

    def slopes(
        self, computer: ScoreComputer, features: Tensor, q: Tensor, curvature: Tensor
    ) -> Tensor:
        """Q [b] of samples with features [b, k], and the Q and curvature [b] that they have now."""
        if self.step is None:
            return q
        step = self.step.to(features.dtype).unsqueeze(0)
        change = computer.scores(features, step).squeeze(1)
        return moved_slopes(q, curvature.to(q), change, self.residual)


@full_precision()
def self_scores(systems: Systems, computer: ScoreComputer, model_ids: Sequence[int]) -> Tensor:
    """The score of each training sample on itself, float64 [n].

    By TRAK's formula that is the diagonal that scores of the training set as targets would have.
    With the Fisher matrix it is on the sample's log-likelihood: g (F + lambda I)^-1 g, with g its
    gradient.
    """
    store, systems = systems.store, in_mean(systems, computer, model_ids)
    total = torch.zeros(store.train_set_size, dtype=torch.float64, device="cpu")
    q_total = torch.zeros_like(total)
    own_q = takes_own_q(systems, model_ids)
    passes = sum(len(ridges_of(systems, model_id)) for model_id in model_ids)
    with progress("self-influence", passes * len(total), "sample") as bar:
        for model_id in model_ids:
            q = store.out_to_loss(model_id).double()
            q_total += torch.ones_like(q) if own_q else q
            own = own_scores(systems, computer, model_id, bar.update)
            total += own * q.square() if own_q else own
    return total * q_total / len(model_ids) ** 2


def takes_own_q(systems: Systems, model_ids: Sequence[int]) -> bool:
    """Whether each checkpoint's scores take its own Q: with the Fisher matrix, as derived. TRAK
    averages Q over checkpoints by itself.

    Raises ValueError where some checkpoints have one matrix and some the other.
    """
    fisher = [model_id for model_id in model_ids if systems.read_system(model_id).fisher]
    others = [model_id for model_id in model_ids if model_id not in fisher]
    if fisher and others:
        raise ValueError(
            f"TRAKer: model_ids {listed(fisher, 10)} were finalised with the Fisher matrix and "
            f"{listed(others, 10)} with TRAK's formula; expected one of the two, for their scores "
            "have no mean (call finalize_features without model_ids)"
        )
    return bool(fisher)


def check_scores(systems: Systems, model_id: int, scores: Tensor) -> None:
    """Raise ValueError unless scores by a checkpoint are finite; its features are."""
    if not bool(torch.isfinite(scores).all()):
        lam = float(systems.read_solve(model_id)["lambda_reg"])
        raise ValueError(
            f"TRAKer: scores by model_id {model_id} are larger than float32 holds: its lambda is "
            f"{lam:.3g}, for the gradients of its training samples are next to 0; expected a "
            "checkpoint that doesn't give each label the probability 1, or a larger lambda_reg "
            "when finalising"
        )


def target_chunks(store: Store, exp_name: str, checkpoints: int) -> list[range]:
    """The targets (or groups of them) in pieces whose features, under all checkpoints, fit into
    WEIGHT_BYTES.
    """
    n_targets = store.num_columns(exp_name)
    step = WEIGHT_BYTES // (4 * store.proj_dim * checkpoints)
    step = max(1, min(step, TARGET_ROWS))
    return [range(low, min(low + step, n_targets)) for low in range(0, n_targets, step)]


@full_precision()
def target_weights(
    systems: Systems, computer: ScoreComputer, model_id: int, targets: Tensor
) -> Tensor:
    """Targets' features times the inverse, [m, k], where scores are computed: in their dtype, or in
    float64 where float32 would round scores away.

    Warns where float16 has: of features that are kept in half precision. Not in the dual, where
    no rounding is along what rows have nothing of.
    """
    weights, image, trace = with_image(systems, computer, model_id, targets)
    grown = rounding_growth(weights, image, trace)
    dual = systems.read_system(model_id).dual
    if systems.store.half and not dual and float(grown.median()) * HALF_ERROR > NOISE:
        lam = float(systems.read_solve(model_id)["lambda_reg"])
        warnings.warn(
            f"TRAKer: scores of most targets by model_id {model_id} are rounding errors of "
            f"features, which are kept as float16: its lambda is {lam:.3g}, and "
            "most of what these targets have is not in the features of training samples. Fix: "
            "lambda_reg='auto', a larger number, or use_half_precision=False with another save_dir",
            stacklevel=stack_to_caller(),
        )
    if not bool((grown * 2.0**-24 > PRECISE).any()):
        weights = weights.to(targets.dtype)
    return weights.to(computer.device)


def rounding_growth(weights: Tensor, image: Tensor, trace: float) -> Tensor:
    """How much larger rounding errors of entries are in scores, relative to both, [m]; 0 where a
    target is 0.

    Where lambda is small, what a target has outside the span of the rows is most of its weights w.
    No row has anything along it, so ``row . w`` is a sum that cancels. Its mean square, over that
    of its terms, is ``w^T S^T S w k / (|w|^2 trace)``.

    weights : targets times the inverse, float64 [m, k]. image : S^T S times them, likewise.
    trace : of S^T S.
    """
    squares = weights.square().sum(1)
    fitted = (weights * image).sum(1)
    terms = trace / weights.shape[1] * squares
    return torch.where(terms > 0, terms / fitted.clamp(min=0), 0.0).sqrt()


def target_features(store: Store, model_id: int, exp_name: str, columns: range) -> Tensor:
    """The features of targets, or their sums or means over the groups ``columns``, [m', k]."""
    reader = store.reader(model_id, exp_name)
    grouping = store.grouping(exp_name)
    if grouping is None:
        return reader.read(np.arange(columns.start, columns.stop))[0]
    groups = np.asarray(grouping[0], np.int64) - columns.start
    members = np.flatnonzero((groups >= 0) & (groups < len(columns)))
    step = max(1, min(WEIGHT_BYTES // (8 * store.proj_dim), TARGET_ROWS))
    total = torch.zeros(len(columns), store.proj_dim, dtype=torch.float64, device="cpu")
    dtype = torch.float32
    for rows in np.split(members, range(step, len(members), step)):
        features, _ = reader.read(rows)
        dtype = features.dtype
        total.index_add_(0, torch.from_numpy(groups[rows]), features.double())
    if grouping[1] == "mean":
        total /= torch.from_numpy(np.bincount(groups[members], minlength=len(columns))).unsqueeze(1)
    return total.to(dtype)
