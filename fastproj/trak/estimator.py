"""TRAKer: attribution of model outputs to training samples (TRAK, arXiv 2303.14186).

For checkpoints c = 1..M with projection matrices P_c and features phi_c(z) = P_c^T grad f(z), the
influence of training sample i on the output f of a target z is, by one Newton step,

    tau(z)_i = 1/M sum_c phi_c(z)^T (F_c + lambda_c I)^-1 P_c^T grad log p(y_i | x_i)

with F the Fisher matrix of the labels' likelihood, projected. TRAK is

    tau(z) = (1/M sum_c phi_c(z) (Phi_c^T Phi_c + lambda I)^-1 Phi_c^T) * (1/M sum_c Q_c)

which is the same for labels of two classes and no fit. docs/research/lambda.md compares the two.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastproj.checks import check_flag, check_integer, listed
from fastproj.spec import SPEC_VERSION
from fastproj.trak.checkpoints import COPIES, Origin, is_own
from fastproj.trak.curvature import resolve_curvature
from fastproj.trak.distributed import Ranks, local_device, ranks_of_this_run
from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.featurizer import Featurizer
from fastproj.trak.fingerprints import layout_fingerprint
from fastproj.trak.gradients import modules_of, parameter_names, resolve_gradient_computer
from fastproj.trak.gradients.scales import ScaledProjector, size_factors
from fastproj.trak.immediate import Stream, scores_in_parts
from fastproj.trak.inputs import (
    MAX_SAMPLES,
    as_groups,
    as_indices,
    as_model_ids,
    check_model,
    check_projector,
    check_range,
    default_proj_dim,
    make_projector,
    matrix_of,
    resolve_device,
    subclass_of,
)
from fastproj.trak.mixing import ContentWatch
from fastproj.trak.passes import Pass
from fastproj.trak.readiness import (
    finalized_ids,
    known_ids,
    require_all,
    require_finalized,
    require_outputs,
    scored_ids,
)
from fastproj.trak.saver import Saver
from fastproj.trak.solving.finalizing import finalize
from fastproj.trak.solving.inverse import apply_inverse
from fastproj.trak.solving.peers import in_mean
from fastproj.trak.solving.scoring import self_scores, write_scores
from fastproj.trak.solving.solve import AUTO, Lambda, ScoreComputer, check_lambda
from fastproj.trak.store.identity import GIVEN, describe_task
from fastproj.trak.store.scores import ScoresWriter, TopScores, TopWriter, read_top_scores
from fastproj.trak.store.store import NotReadyError
from fastproj.trak.tasks import resolve_task
from fastproj.trak.threads import one_at_a_time

logger = logging.getLogger("fastproj.trak")


class TRAKer:
    """TRAK scores of a set of targets, for an ensemble of checkpoints of one model.

    The calls are those of ``trak.TRAKer`` 0.3.2, in the same order: for each checkpoint
    ``load_checkpoint`` and ``featurize`` over the training set; ``finalize_features``; for each
    checkpoint ``start_scoring_checkpoint`` and ``score`` over the targets; ``finalize_scores``.
    Everything is kept in ``save_dir``. Start a stopped run again from its beginning: it skips what
    is there.

    Parameters
    ----------
    model : the module whose checkpoints are loaded. It is put into eval mode, on ``device``.
    task : "image_classification", "text_classification", "clip", "seq2seq", "causal_lm",
        "masked_lm", "token_classification", an instance of an ``AbstractModelOutput`` subclass, or
        a function ``f(model, batch)`` that returns the outputs [B].
    train_set_size : n, the number of training samples.
    save_dir : where features and scores are kept. One that holds another model, task, seed, kind,
        proj_dim or n is refused.
    load_from_save_dir : True goes on with what is there; any number of processes may. False
        starts afresh: checkpoints of an earlier run are not used. What is there for a model_id is
        renamed when ``load_checkpoint`` is called with it.
    device : where to compute; None is where the model is.
    gradient_computer : "hooks" | "func" | "loop"; "auto" is the first of them that works for the
        model and task, and warns where it isn't "hooks". Or a class with ``load_model_params``,
        ``compute_per_sample_grad`` and ``compute_loss_grad``, built with model, task, grad_dim,
        dtype, device, grad_wrt.
    projector : an object with ``proj_dim`` (0: the gradients as they are) and
        ``project(grads, model_id=)``; None is ``fastproj.Projector`` of scale 1, of kind "sjlt"
        sqrt(block). Features are its results over ``normalize_factor``, the square root of the
        number of parameters.
    saver : a subclass of ``fastproj.trak.Saver``, or None.
    score_computer : a subclass of ``fastproj.trak.ScoreComputer``, or None.
    proj_dim : k, the dimension of the features, where ``projector`` is None. The store has n k
        numbers, and finalising solves a system of size min(n, k). None is 4096. For at most 2048
        samples (fewer with more draws), whose system is n x n, kind "sjlt" then has more: the least
        power of two that is no less than the number of parameters, up to 16384. trak's default is
        2048.
    logging_level : of the logger "fastproj.trak".
    use_half_precision : store features as float16 with a scale per row (half the disk space; no
        overflow or underflow). Gradients, projection and solution keep their precision.
    proj_max_batch_size : accepted for TRAK's sake; any batch size works.
    projector_seed : 0 <= seed < 2^64, where ``projector`` is None.
    grad_wrt : names of the parameters to take gradients by; "trainable" is those that have
        ``requires_grad``, None all.
    lambda_reg : the ridge. "auto" chooses one for each checkpoint from its features (see
        ``fastproj.trak.solving.ridge``). With ``curvature="fisher"``, for samples of one
        prediction, it is multiplied by 1 + 1/M where the scores of M checkpoints are averaged, and
        by what these say of each other (see ``fastproj.trak.solving.peers``); for one of three
        classes or more, two ridges around it take its place, whose inverses are averaged. A number
        is added to the diagonal of XtX, as in TRAK; "0.1*mean" is 0.1 times its mean eigenvalue.
        With ``curvature="fisher"`` it is added to the Fisher matrix instead.
    kind, block : of the matrix, where ``projector`` is None: as in ``fastproj.project``. kind None
        is "sjlt", which costs a few additions an entry of the gradient (dense kinds: proj_dim
        multiply-adds) for scores that are as good (docs/projection.md). Where proj_dim < 16, rows
        of "sjlt" would be empty: there None is "rademacher", unless a block is given.
    factored : None, or r, where ``projector`` is None: gradients are compressed to r dimensions on
        both sides of each parameter, before they are formed where possible, and then projected
        (``fastproj.FactoredProjector``). Much cheaper for large models, at some cost in quality
        (docs/gradients.md).
    curvature : the matrix that is inverted. "fisher": the Fisher matrix of the labels' likelihood,
        which is the Gauss-Newton matrix of the loss. Training samples then count by the gradient of
        their log-likelihood. Some of its rows are drawn at random, at the cost of a second backward
        for about 2 k samples (``fastproj.trak.Fisher`` has settings). "trak": TRAK's Phi^T Phi,
        with weights Q (1 - Q) where lambda is "auto". "auto" is "fisher" where ``lambda_reg`` is
        "auto" and the task knows its likelihood. Of fastproj's tasks, plain functions and
        classification with ``temperature=`` don't.
    distributed : whether the processes of torch.distributed or torchrun share the work; None is
        True where there are several. With False, this process works by itself.

    Raises
    ------
    TypeError, ValueError
        For arguments that can't work; StoreMismatchError (a ValueError) for a save_dir of another
        run.
    """

    scores: npt.NDArray[np.float32] | None = None
    _pass: Pass | None = None  # of the checkpoint that is loaded
    _stream: Stream | None = None

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        train_set_size: SupportsIndex,
        save_dir: str | os.PathLike[str] = "./trak_results",
        load_from_save_dir: bool = True,
        device: str | torch.device | None = None,
        gradient_computer: Any = "auto",
        projector: Any = None,
        saver: type[Saver] | None = None,
        score_computer: type[ScoreComputer] | None = None,
        proj_dim: SupportsIndex | None = None,
        logging_level: int | str = logging.INFO,
        use_half_precision: bool = True,
        proj_max_batch_size: int = 32,
        projector_seed: SupportsIndex = 0,
        grad_wrt: Iterable[str] | str | None = None,
        lambda_reg: Lambda = AUTO,
        *,
        kind: str | None = None,
        block: SupportsIndex | None = None,
        factored: SupportsIndex | None = None,
        curvature: str | Fisher = AUTO,
        distributed: bool | None = None,
    ) -> None:
        load_from_save_dir = check_flag("TRAKer", "load_from_save_dir", load_from_save_dir)
        use_half_precision = check_flag("TRAKer", "use_half_precision", use_half_precision)
        if distributed is not None:
            distributed = check_flag("TRAKer", "distributed", distributed)
        logger.setLevel(logging_level)
        check_model(model)
        self.task = resolve_task(task)
        self.train_set_size = check_integer(
            "TRAKer", "train_set_size", train_set_size, 1, MAX_SAMPLES
        )
        self.lambda_reg = check_lambda(lambda_reg)
        self.gradient_names = parameter_names(model, grad_wrt)
        self.grad_wrt = None if grad_wrt is None else self.gradient_names
        params = dict(model.named_parameters())
        shapes = {name: params[name].shape for name in self.gradient_names}
        self.num_params_for_grad = sum(map(math.prod, shapes.values()))
        self.normalize_factor = math.sqrt(self.num_params_for_grad)
        device = resolve_device(device, model)
        self.ranks = ranks_of_this_run(distributed)
        self.device = local_device(device, self.ranks)
        self.model = model.to(self.device)
        self.dtype = torch.float16 if use_half_precision else torch.float32
        self.score_computer = subclass_of("score_computer", score_computer, ScoreComputer)(
            self.device
        )
        if projector is None:
            if proj_dim is None:
                proj_dim = default_proj_dim(
                    self.train_set_size,
                    self.num_params_for_grad,
                    kind,
                    curvature.draws if isinstance(curvature, Fisher) else 1,
                    self.score_computer.forms_dual(0, 1),  # whether it takes n x n at all
                )
                logger.info("proj_dim: %d", proj_dim)
            self._projector: Any = make_projector(
                shapes, proj_dim, projector_seed, kind, block, factored
            )
        else:
            self._projector = check_projector(projector, shapes, kind, block, factored)
        self.proj_dim = int(self._projector.proj_dim) or self.num_params_for_grad
        self.gradient_computer = resolve_gradient_computer(gradient_computer)(
            model=self.model,
            task=self.task,
            grad_dim=self.num_params_for_grad,
            dtype=self.dtype,
            device=self.device,
            grad_wrt=self.grad_wrt,
        )
        self.fisher = resolve_curvature(
            curvature, self.lambda_reg, self.task, self.gradient_computer
        )
        self._takes_lambda = curvature != AUTO  # of a number, too
        draws, projecting = None, self._projector
        if self.fisher is not None:
            seed = int(getattr(self._projector, "seed", 0))
            draws = Draws(self.train_set_size, self.proj_dim, self.fisher, seed)
            logger.info("curvature: %s", draws.describe())
            if self._size_power:
                sizes = {name: shape.numel() for name, shape in shapes.items()}
                projecting = ScaledProjector(self._projector, size_factors(sizes, self._size_power))
                logger.info("curvature: gradients times (their entries)^%g", self._size_power)
        self.saver: Saver = subclass_of("saver", saver, Saver)(
            save_dir,
            self._identity(draws, projector is not None),
            self.train_set_size,
            self.proj_dim,
            load_from_save_dir,
            use_half_precision,
            1 if self.fisher is None else self.fisher.draws,
        )
        if not load_from_save_dir:  # before any rank can add a checkpoint of this run
            self.saver.earlier = self.ranks.broadcast("TRAKer", self.saver.earlier)
            if self.saver.earlier:
                logger.info(
                    "load_from_save_dir=False: what is there of model_ids %s is not used",
                    listed(sorted(self.saver.earlier), 10),
                )
        self.saver.features_of = self._finalized_features
        self.save_dir = self.saver.save_dir
        self._featurizer = Featurizer(
            self.model,
            self.device,
            self.task,
            self.gradient_computer,
            projecting,
            self.saver,
            self.normalize_factor,
            draws,
        )
        self._origin: Origin | None = None  # of what the model holds
        self._contents = ContentWatch(self.saver)

    def _identity(self, draws: Draws | None, given: bool) -> dict[str, Any]:
        """What all features in a save_dir share; ``given`` says whether a projector was."""
        return {
            "spec_version": SPEC_VERSION,
            "seed": int(getattr(self._projector, "seed", 0)),
            **matrix_of(self._projector),
            GIVEN: given,
            "proj_dim": self.proj_dim,
            "num_params": self.num_params_for_grad,
            "parameter_layout": layout_fingerprint(self.model, self.gradient_names),
            "task": describe_task(self.task),
            "train_set_size": self.train_set_size,
            **({} if draws is None else {"curvature": draws.describe()}),
            **({"size_power": self._size_power} if self._size_power else {}),
        }

    @property
    def projector(self) -> Any:
        """What projects the gradients."""
        return self._projector

    @projector.setter
    def projector(self, projector: Any) -> None:
        raise AttributeError(
            f"TRAKer: received projector = {type(projector).__name__} for a TRAKer that has one; "
            "expected TRAKer(..., projector=...)"
        )

    @property
    def _size_power(self) -> float:
        """The power of their size that gradients by parameters count by; 0 for TRAK's."""
        return 0.0 if self.fisher is None else self.fisher.size_power or 0.0

    # ---- featurizing ----------------------------------------------------------------------------

    @one_at_a_time
    def load_checkpoint(
        self,
        checkpoint: Mapping[str, Any],
        model_id: SupportsIndex,
        _allow_featurizing_already_registered: bool = False,
        *,
        strict: bool = True,
    ) -> None:
        """Load a state_dict into the model, and make ``model_id`` the one that is featurized.

        ``num_samples`` counts from 0 again.

        Parameters
        ----------
        checkpoint : state_dict of the model.
        model_id : 0 <= model_id < 2^32, the number of this checkpoint in the ensemble; it selects
            the projection matrix.
        _allow_featurizing_already_registered : accepted for TRAK's sake, and without effect, as in
            trak 0.3.2: a model_id that is there is continued.
        strict : False takes a checkpoint that lacks parameters, such as the adapters that peft's
            ``save_pretrained`` writes. Missing ones keep the values that the model has now, and a
            log line names them. The parameters of ``grad_wrt`` must be there.

        Raises
        ------
        ValueError
            Where the checkpoint's keys or shapes don't fit the model; StoreMismatchError where
            ``model_id`` was featurized from another checkpoint.
        """
        strict = check_flag("load_checkpoint", "strict", strict)
        model_id = self._load("load_checkpoint", checkpoint, model_id, strict)
        self._register(model_id)
        done = self.saver.index(model_id).done
        if done.any():
            logger.info(
                "model_id %d: %d of %d samples are featurized already and will be skipped",
                model_id,
                int(done.sum()),
                len(done),
            )
        self._contents.beside = None
        self._pass = Pass(self._featurizer, self._contents, self.ranks, model_id)

    def _register(self, model_id: int) -> None:
        """Enter a checkpoint into the store."""
        checkpoint = self._featurizer.loaded.digest
        twin = self.saver.twin(model_id, checkpoint)
        if twin is not None and self._origin is not None and self._origin.own:
            logger.warning(
                "load_checkpoint: model_id %d has the weights of model_id %d; scores count them "
                "twice, with two projections. Where they should be others, pass %s",
                model_id,
                twin,
                COPIES,
            )
        self.saver.register(model_id, checkpoint)

    def _load(
        self, function: str, checkpoint: Mapping[str, Any], model_id: SupportsIndex, strict: bool
    ) -> int:
        """Check and load a checkpoint; returns the model_id."""
        model_id = check_integer(function, "model_id", model_id, 0, 1 << 32)
        self._pass = self._stream = None
        own = isinstance(checkpoint, Mapping) and is_own(self.model, checkpoint)
        self._featurizer.load(function, checkpoint, strict, self.gradient_names)
        origin = Origin(model_id, self._featurizer.loaded.digest, own)
        origin.check(function, self._origin)
        self._origin = origin
        return model_id

    @one_at_a_time
    @torch.inference_mode(False)
    @torch.enable_grad()
    def featurize(
        self,
        batch: Any,
        inds: Any = None,
        num_samples: SupportsIndex | None = None,
    ) -> None:
        """Compute and keep the features and Q of a batch of training samples.

        ``phi(z) = P^T grad f(z; theta) / normalize_factor``. Samples that are there are skipped.
        With curvature "fisher", the log-likelihood of the labels takes the place of f where their
        gradients have different directions. Drawn rows of the Fisher matrix are kept too.
        When ``featurize`` returns, the batch is on disk. Where several processes see the same
        batches, each computes its share and skips the rest.

        Parameters
        ----------
        batch : what a loader gives: a tuple, list, namedtuple, dict or dataclass of tensors
            [B, ...], as the task takes it, or nests of these. Beside them there may be lists with
            one entry for each sample (strings, tensors of unequal lengths), strings and numbers
            that all samples share, and objects that hold the batch's samples: batches of PyTorch
            Geometric, or any with a length and ``select(rows)``. B is the first dimension of the
            first tensor. Without a tensor, it is the length of an object, or the number of inds,
            or num_samples.
        inds : integers [B], the samples' places in the training set; or
        num_samples : B, for samples that follow those of the last call.

        Raises
        ------
        NotReadyError
            Before ``load_checkpoint``.
        TypeError, ValueError
            For a batch or indices that can't be right, or features that are not finite; nothing of
            the batch is kept then.
        """
        if self._pass is None or self._pass.exp_name is not None:
            raise NotReadyError(
                "featurize: no checkpoint is loaded for featurizing; call "
                "load_checkpoint(checkpoint, model_id) first"
            )
        self._pass.take(batch, inds, num_samples)

    def remaining_batches(self, batch_size: SupportsIndex) -> list[list[int]]:
        """This process's share of the samples that are not there yet, in batches of numbers.

        For loaders that needn't read what is skipped, after a restart or in several processes:

            todo = traker.remaining_batches(64)
            for inds, batch in zip(todo, DataLoader(train_set, batch_sampler=todo)):
                traker.featurize(batch, inds=inds)

        After ``load_checkpoint`` they are training samples, after ``start_scoring_checkpoint``
        targets. Batches are cut from 0, 1, 2 ... in order.

        Raises NotReadyError before either; ValueError for a batch_size below 1.
        """
        batch_size = check_integer("remaining_batches", "batch_size", batch_size, 1, MAX_SAMPLES)
        if self._pass is None:
            raise NotReadyError(
                "remaining_batches: no checkpoint is loaded; call load_checkpoint or "
                "start_scoring_checkpoint first"
            )
        return self._pass.remaining(batch_size)

    def has_drawn_rows(self, inds: Any) -> npt.NDArray[np.bool_]:
        """Which training samples rows of the Fisher matrix are drawn for, bool [b].

        ``featurize`` computes those of a batch by themselves. Loaders that choose what shares a
        batch may keep the two kinds apart.

        inds : integers [b], the samples' places in the training set.

        Raises TypeError or ValueError for what is no such place.
        """
        places = as_indices("has_drawn_rows", inds)
        check_range("has_drawn_rows", places, self.train_set_size)
        draws = self._featurizer.draws
        return np.zeros(len(places), np.bool_) if draws is None else draws.chosen(places)

    @one_at_a_time
    def finalize_features(
        self,
        model_ids: Iterable[int] | None = None,
        del_grads: bool = False,
        lambda_reg: Lambda | None = None,
    ) -> None:
        """Sum up the Gram matrix of each checkpoint, choose its lambda, and check that it solves.

        The matrix itself is stored (k x k; n x n where n < k): the Fisher matrix, XtX, or
        Phi^T W Phi for "auto". Its inverse is applied to the targets when scoring. So another
        ``lambda_reg`` needs no new gradients: call this again with it.

        Parameters
        ----------
        model_ids : which checkpoints; None is all in ``save_dir``.
        del_grads : accepted for TRAK's sake, and without effect: there is only one n x k array, the
            features, and scores are made of them.
        lambda_reg : None is the constructor's.

        Raises
        ------
        NotReadyError
            For a checkpoint that is not fully featurized.
        """
        function = "finalize_features"
        del_grads = check_flag(function, "del_grads", del_grads)
        model_ids = as_model_ids(function, model_ids)
        ranks = self.ranks if self.ranks.agree(function, model_ids) else Ranks()
        self.saver.forget()
        ids = known_ids(self.saver, function, model_ids)
        ids = ranks.broadcast(function, ids)  # a process apart may be adding some
        for model_id in ids:
            require_all(self.saver, function, model_id, processes=ranks.size)
        if del_grads:
            logger.info("finalize_features: del_grads has nothing to delete")
        if lambda_reg is None:
            lambda_reg = self.lambda_reg
        lambda_reg = check_lambda(lambda_reg)
        for rank, other in enumerate(ranks.all_gather(function, lambda_reg)):
            if other != lambda_reg:
                raise ValueError(
                    f"{function}: rank {ranks.rank} received lambda_reg={lambda_reg!r} and rank "
                    f"{rank} {other!r}; expected one for all processes"
                )
        probabilities = getattr(self.task, "q_are_probabilities", None)
        if ranks.first:
            self._contents.compare(function, ids)
        fisher = self.fisher is not None and (lambda_reg == AUTO or self._takes_lambda)
        if self.fisher is not None and not fisher:
            require_outputs(self.task, function, lambda_reg, self._size_power != 0)
        finalize(
            self.saver.systems,
            self.score_computer,
            ids,
            lambda_reg,
            ranks,
            probabilities,
            fisher,
            getattr(self.task, "several_labels", False),
        )
        self._stream = None  # it holds the targets times the inverse of before
        if self._pass is not None:
            self._pass.next = 0

    # ---- scoring --------------------------------------------------------------------------------

    @one_at_a_time
    def start_scoring_checkpoint(
        self,
        exp_name: str,
        checkpoint: Mapping[str, Any],
        model_id: SupportsIndex,
        num_targets: SupportsIndex,
        *,
        groups: Any = None,
        reduction: str = "sum",
        strict: bool = True,
    ) -> None:
        """Load a checkpoint to compute features of targets with; ``num_samples`` counts from 0.

        With ``groups``, ``finalize_scores`` gives one score for each set of targets instead of one
        for each target:

            tau(g)_i = sum of tau(z_j)_i over the targets j with groups[j] == g

        Parameters
        ----------
        exp_name : names this set of targets.
        checkpoint : state_dict, the one that ``model_id`` was featurized with.
        model_id : the number of the checkpoint.
        num_targets : m, the number of targets.
        groups : None, or integers [m]: the group 0..G-1 that each target is in, at least one in
            each. The same for all checkpoints of an experiment.
        reduction : "sum", or "mean": divided by the number of targets in the group.
        strict : as for ``load_checkpoint``.

        Raises
        ------
        NotReadyError
            Before ``finalize_features`` of this checkpoint.
        ValueError
            For another checkpoint than the one that was featurized, another number of targets or
            other groups than the experiment has, or a name that can't name files.
        """
        function = "start_scoring_checkpoint"
        strict = check_flag(function, "strict", strict)
        num_targets = check_integer(function, "num_targets", num_targets, 1, MAX_SAMPLES)
        grouping = as_groups(function, groups, reduction, num_targets)
        self.saver.experiment_path(exp_name)
        model_id = check_integer(function, "model_id", model_id, 0, 1 << 32)
        self.saver.forget()
        require_finalized(self.saver, function, model_id)
        self._load(function, checkpoint, model_id, strict)
        expected = "expected the checkpoint, or the model_id, that was featurized"
        self.saver.check_checkpoint(model_id, self._featurizer.loaded.digest, expected)
        self.saver.start_experiment(exp_name, model_id, num_targets, grouping)
        self._pass = Pass(self._featurizer, self._contents, self.ranks, model_id, exp_name)

    @one_at_a_time
    @torch.inference_mode(False)
    @torch.enable_grad()
    def score(
        self,
        batch: Any,
        inds: Any = None,
        num_samples: SupportsIndex | None = None,
        *,
        per: str | None = None,
        stream: bool = False,
    ) -> npt.NDArray[np.float32] | None:
        """Compute and keep the features of a batch of targets.

        Targets that are there are skipped, unless the batch holds other data for them than before:
        then the new ones count.

        With ``per`` or ``stream`` nothing is kept. The scores by the checkpoint that is loaded are
        returned, as one of those that are finalised. Their mean is what ``finalize_scores`` gives
        for all of these, but for curvature "trak", where it averages Q by itself.

        Parameters
        ----------
        batch, inds, num_samples : as in ``featurize``, with the targets' numbers. With ``per`` or
            ``stream`` they have none.
        per : "module", or "token" for tasks of tokens: the scores of the targets in ``batch``, in
            parts that add up to them. A module's part comes from the gradient by its own
            parameters; parts are in the order of ``modules``. A token's part comes from the margin
            of its label, and takes a backward.
        stream : ``batch`` holds other training samples, such as candidates for the training set.
            Their scores on all targets of this experiment are returned, and their features are not
            kept. All targets must have been given before. With several processes, the first such
            call after targets waits until all have scored theirs.

        Returns
        -------
        None; or float32 [train_set_size, B, parts] with ``per``, [B, num_targets] (or groups) with
        ``stream``.

        Raises
        ------
        NotReadyError
            Before ``start_scoring_checkpoint``; with ``stream``, before all targets.
        TypeError, ValueError
            As ``featurize``.
        """
        stream = check_flag("score", "stream", stream)
        scoring = self._pass
        if scoring is None or scoring.exp_name is None:
            raise NotReadyError(
                "score: no checkpoint is loaded for scoring; call start_scoring_checkpoint("
                "exp_name, checkpoint, model_id, num_targets) first, after finalize_features"
            )
        if per is not None or stream:
            if inds is not None or num_samples is not None or (per is not None and stream):
                raise ValueError(
                    "score: received per or stream with inds, num_samples or each other; expected "
                    "one of per and stream, and the batch alone: nothing of it is kept"
                )
            prepared, size = self._featurizer.prepare("score", batch, None)
            held = self._featurizer, self.score_computer, scoring.model_id
            if per is not None:
                return scores_in_parts(*held, prepared, size, per)
            if self._stream is None:
                scoring.meet("score(stream=True)")
                self._stream = Stream(*held, scoring.exp_name)
            return self._stream.scores(prepared, size)
        self._stream = None  # it holds the targets that were there
        scoring.take(batch, inds, num_samples)
        return None

    @property
    def modules(self) -> list[str]:
        """The modules whose own parameters gradients are taken by, for ``score(per="module")``."""
        return modules_of(self.gradient_names)

    @overload
    def finalize_scores(
        self,
        exp_name: str,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
        top_k: None = None,
    ) -> npt.NDArray[np.float32]: ...

    @overload
    def finalize_scores(
        self,
        exp_name: str,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
        top_k: SupportsIndex = ...,
    ) -> TopScores: ...

    @one_at_a_time
    def finalize_scores(
        self,
        exp_name: str,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
        top_k: SupportsIndex | None = None,
    ) -> npt.NDArray[np.float32] | TopScores:
        """The TRAK scores of an experiment, averaged over checkpoints.

        Parameters
        ----------
        exp_name : as given to ``start_scoring_checkpoint``.
        model_ids : which checkpoints; None is all in ``save_dir``.
        allow_skip : warn about checkpoints that are not finalised or not fully scored, and average
            over the others, instead of raising.
        top_k : None, or how many of the highest and of the lowest scores of each target to return
            instead of all; then the n_train x n_targets scores are never made.

        Returns
        -------
        float32 [n_train, n_targets], memory-mapped from ``save_dir/scores/<exp_name>.mmap`` (which
        ``numpy.load`` reads). Entry [i, j] > 0: training sample i raises the output of target j,
        or, where ``start_scoring_checkpoint`` was given groups, the outputs of group j together.
        With ``top_k``: ``TopScores``, kept in ``save_dir/scores/<exp_name>.top.safetensors``.

        Raises
        ------
        NotReadyError
            Where something is missing and ``allow_skip`` is False, or nothing is left.
        """
        function = "finalize_scores"
        allow_skip = check_flag(function, "allow_skip", allow_skip)
        if top_k is not None:
            top_k = check_integer(function, "top_k", top_k, 1, MAX_SAMPLES)
        model_ids = as_model_ids(function, model_ids)
        facts_given = (exp_name, model_ids, allow_skip, top_k)
        ranks = self.ranks if self.ranks.agree(function, facts_given) else Ranks()
        self.saver.forget()
        shape = (self.train_set_size, self.saver.num_columns(exp_name))
        ids = scored_ids(self.saver, function, exp_name, model_ids, allow_skip)
        first = ranks.broadcast(function, ids)  # a process apart may be finishing some
        if ids != first:
            ids = first
            self.saver.forget()
        if ranks.first:
            self._contents.compare(function, ids, exp_name)
            self._contents.compare(function, ids)
        facts = {"exp_name": exp_name, "model_ids": ids}
        path = self.saver.scores_path(exp_name)
        sink: ScoresWriter | TopWriter = ScoresWriter(path, shape, ranks, facts)
        if top_k is not None:
            path = self.saver.top_path(exp_name)
            sink = TopWriter(path, shape, top_k, ranks, facts)
        with sink:
            write_scores(self.saver.systems, self.score_computer, exp_name, ids, sink, ranks)
        if self._pass is not None:
            self._pass.next = 0
        logger.info("scores of %r are in %s", exp_name, path)
        if top_k is not None:
            return read_top_scores(path)
        self.scores: npt.NDArray[np.float32] = np.load(path, mmap_mode="c")
        return self.scores

    @one_at_a_time
    def self_influence(self, model_ids: Iterable[int] | None = None) -> npt.NDArray[np.float32]:
        """The score of each training sample on itself, for ``fastproj.trak.mislabel_auc``.

        With ``curvature="fisher"`` it is on the sample's own log-likelihood, ``g (F + lambda I)^-1
        g`` with g the gradient of it: how well the label is known without the sample is what a
        wrong one shows. With ``"trak"`` it is on the output, as in TRAK: the diagonal of the n x n
        scores that the training set has as targets. Either is made from the features that are
        there, without the other scores.

        Parameters
        ----------
        model_ids : which checkpoints; None is all in ``save_dir``.

        Returns
        -------
        float32 [n_train], in memory. High where little else but the sample supports its label.

        Raises
        ------
        NotReadyError
            For a checkpoint that is not finalised.
        """
        function = "self_influence"
        self.saver.forget()
        ids = known_ids(self.saver, function, as_model_ids(function, model_ids))
        for model_id in ids:
            require_finalized(self.saver, function, model_id)
        return self_scores(self.saver.systems, self.score_computer, ids).float().numpy()

    def _finalized_features(self, model_id: int) -> Tensor:
        """TRAK's "features": all features times the inverse of XtX, [n, k] in memory."""
        require_finalized(self.saver, "current_store", model_id)
        features = self.saver.matrix(model_id)
        systems = in_mean(self.saver.systems, self.score_computer, finalized_ids(self.saver))
        inverse = apply_inverse(systems, self.score_computer, model_id, features)
        return inverse.to(features.dtype)
