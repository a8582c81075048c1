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
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastproj.checks import check_integer
from fastproj.factored import FactoredProjector
from fastproj.projector import Projector
from fastproj.spec import SPEC_VERSION
from fastproj.trak import batches
from fastproj.trak.callers import stack_to_caller
from fastproj.trak.checkpoints import LoadedModel, load_state
from fastproj.trak.curvature import (
    Draws,
    Fisher,
    check_finite_terms,
    check_terms,
    resolve_curvature,
)
from fastproj.trak.distributed import Ranks, Turns, local_device, ranks_of_this_run
from fastproj.trak.files import Indices
from fastproj.trak.fingerprints import layout_fingerprint
from fastproj.trak.gradients import (
    AbstractGradientComputer,
    count_params,
    modules_of,
    parameter_names,
    project_modules,
    resolve_gradient_computer,
)
from fastproj.trak.gradients.memory import enough_memory
from fastproj.trak.inputs import (
    as_groups,
    as_indices,
    as_model_ids,
    check_finite,
    check_indices,
    check_mode,
    check_model,
    check_projector,
    default_kind,
    matrix_of,
    resolve_device,
    subclass_of,
)
from fastproj.trak.progress import progress
from fastproj.trak.saver import Saver
from fastproj.trak.solving.finalizing import finalize, solution_of
from fastproj.trak.solving.scoring import (
    scores_of_targets,
    self_scores,
    takes_own_q,
    target_chunks,
    target_weights,
    write_scores,
)
from fastproj.trak.solving.solve import AUTO, Lambda, ScoreComputer, Solution, check_lambda
from fastproj.trak.store.scores import (
    ScoresWriter,
    TopWriter,
    read_top_scores,
)
from fastproj.trak.store.store import DRAWN, NotReadyError
from fastproj.trak.tasks import TokenOutput, TrainingOutput, describe_task, resolve_task

MAX_SAMPLES = 1 << 48

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
        starts each model_id afresh: what an earlier run left for it is renamed, not used.
    device : where to compute; None is where the model is.
    gradient_computer : "hooks" | "func" | "loop"; "auto" is the first of them that works for the
        model and task, and warns where it isn't "hooks". Or a class with ``load_model_params``,
        ``compute_per_sample_grad`` and ``compute_loss_grad``, built with model, task, grad_dim,
        dtype, device, grad_wrt.
    projector : an object with ``proj_dim`` (0: the gradients as they are) and
        ``project(grads, model_id=)``; None is ``fastproj.Projector``. Give it unscaled: features
        are divided by ``normalize_factor``, the square root of the number of parameters.
    saver : a subclass of ``fastproj.trak.Saver``, or None.
    score_computer : a subclass of ``fastproj.trak.ScoreComputer``, or None.
    proj_dim : k, the dimension of the features, where ``projector`` is None. The store has n k
        numbers, and finalising solves a system of size min(n, k); trak's default is 2048.
    logging_level : of the logger "fastproj.trak".
    use_half_precision : store features as float16 with a scale per row (half the disk space; no
        overflow or underflow). Gradients, projection and solution keep their precision.
    proj_max_batch_size : accepted for TRAK's sake; any batch size works.
    projector_seed : 0 <= seed < 2^64, where ``projector`` is None.
    grad_wrt : names of the parameters to take gradients by; "trainable" is those that have
        ``requires_grad``, None all.
    lambda_reg : the ridge. "auto" chooses one for each checkpoint from its features (see
        ``fastproj.trak.solving.ridge``). A number is added to the diagonal of XtX, as in TRAK;
        "0.1*mean" is 0.1 times its mean eigenvalue. With ``curvature="fisher"`` it is added to the
        Fisher matrix instead.
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
        for at most 2 k samples (``fastproj.trak.Fisher`` has settings). "trak": TRAK's Phi^T Phi,
        with weights Q (1 - Q) where lambda is "auto". "auto" is "fisher" where ``lambda_reg`` is
        "auto" and the task knows its likelihood. All of fastproj's tasks do but plain functions.
    distributed : whether the processes of torch.distributed or torchrun share the work; None is
        True where there are several. With False, this process works by itself.

    Raises
    ------
    TypeError, ValueError
        For arguments that can't work; StoreMismatchError (a ValueError) for a save_dir of another
        run.
    """

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
        proj_dim: SupportsIndex = 4096,
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
        logger.setLevel(logging_level)
        check_model(model)
        self.task = resolve_task(task)
        self.train_set_size = check_integer(
            "TRAKer", "train_set_size", train_set_size, 1, MAX_SAMPLES
        )
        self.lambda_reg = check_lambda(lambda_reg)
        names = self.gradient_names = parameter_names(model, grad_wrt)
        self.grad_wrt = None if grad_wrt is None else names
        self.num_params_for_grad = count_params(model, names)
        device = resolve_device(device, model)
        self.ranks = ranks_of_this_run(distributed)
        self.device = local_device(device, self.ranks)
        self.model = model.to(self.device)
        self.dtype = torch.float16 if use_half_precision else torch.float32
        self.normalize_factor = math.sqrt(self.num_params_for_grad)

        if projector is None:
            if kind is None:
                kind = default_kind(proj_dim, block)
            projector = self._projector(proj_dim, projector_seed, kind, block, factored)
        elif factored is not None:
            raise ValueError(
                f"TRAKer: received factored={factored!r} and a projector; expected one of them "
                "(fastproj.FactoredProjector is such a projector)"
            )
        self.projector = check_projector(projector)
        self.proj_dim = int(projector.proj_dim) or self.num_params_for_grad
        self.gradient_computer = resolve_gradient_computer(gradient_computer)(
            model=self.model,
            task=self.task,
            grad_dim=self.num_params_for_grad,
            dtype=self.dtype,
            device=self.device,
            grad_wrt=self.grad_wrt,
        )
        seed = int(getattr(projector, "seed", 0))
        self.fisher = resolve_curvature(
            curvature, self.lambda_reg, self.task, self.gradient_computer
        )
        self._takes_lambda = curvature != AUTO  # of a number, too
        self._draws: Draws | None = None
        identity_of_curvature = {}
        if self.fisher is not None:
            self._draws = Draws(self.train_set_size, self.proj_dim, self.fisher, seed)
            self._training_computer = self.gradient_computer.sibling(TrainingOutput(self.task))
            identity_of_curvature = {"curvature": self._draws.describe()}
            logger.info("curvature: %s", self._draws.describe())
        self.score_computer = subclass_of("score_computer", score_computer, ScoreComputer)(
            self.device
        )
        self.saver: Saver = subclass_of("saver", saver, Saver)(
            save_dir,
            {
                "spec_version": SPEC_VERSION,
                "seed": seed,
                **matrix_of(projector),
                "proj_dim": self.proj_dim,
                "num_params": self.num_params_for_grad,
                "parameter_layout": layout_fingerprint(model, names),
                "task": describe_task(self.task),
                "train_set_size": self.train_set_size,
                **identity_of_curvature,
            },
            self.train_set_size,
            self.proj_dim,
            load_from_save_dir,
            use_half_precision,
            1 if self.fisher is None else self.fisher.draws,
        )
        self.saver.features_of = self._finalized_features
        self.save_dir = self.saver.save_dir
        self.scores: npt.NDArray[np.float32] | None = None
        self._exp_name: str | None = None
        self._loaded_for: str | None = None  # "featurize" | "score"
        self._last_ind = 0
        self._warned: set[int] = set()
        self._warned_autocast = False
        self._warned_mixed: set[str | None] = set()  # of the training set (None) or an experiment
        self._lists = batches.Lists()
        self._target_weights: tuple[tuple[int, str], Tensor] | None = None  # for a stream

    def _projector(
        self,
        proj_dim: SupportsIndex,
        seed: SupportsIndex,
        kind: str,
        block: SupportsIndex | None,
        factored: SupportsIndex | None,
    ) -> Projector | FactoredProjector:
        """The projector that the arguments ask for, unscaled."""
        made: Projector | FactoredProjector
        if factored is None:
            made = outer = Projector(
                self.num_params_for_grad, proj_dim, seed, kind, block=block, scale=None
            )
        else:
            params = dict(self.model.named_parameters())
            shapes = {name: params[name].shape for name in self.gradient_names}
            made = FactoredProjector(
                shapes, factored, proj_dim, seed, kind, block=block, scale=None
            )
            outer = made.outer
        if outer.block:  # lambda_reg means the same for all kinds: E |g R|^2 = k |g|^2
            outer.scale = math.sqrt(outer.block)
        return made

    # ---- featurizing ----------------------------------------------------------------------------

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
        self._turns = Turns(self.ranks, done, ("featurize", model_id, None))
        self._loaded_for = "featurize"
        self._beside: int | None = None  # another checkpoint that content is compared with

    def _register(self, model_id: int) -> None:
        """Enter a checkpoint into the store. Only rank 0 sets old features aside, once."""
        checkpoint = self._loaded.digest
        every = [("load_checkpoint", model_id)]
        if not self.saver.load_from_save_dir:
            every = self.ranks.all_gather_steps("load_checkpoint", model_id)
        alike = len(every) > 1 and all(one == ("load_checkpoint", model_id) for one in every)
        if alike:
            with self.ranks.barrier("load_checkpoint"):
                if self.ranks.first:
                    self.saver.register(model_id, checkpoint)
        self.saver.register(model_id, checkpoint, afresh=not alike)

    def _load(
        self, function: str, checkpoint: Mapping[str, Any], model_id: SupportsIndex, strict: bool
    ) -> int:
        """Check and load a checkpoint; returns the model_id."""
        model_id = check_integer(function, "model_id", model_id, 0, 1 << 32)
        self._loaded_for = None
        load_state(function, self.model, checkpoint, strict, self.gradient_names)
        self.model.eval()
        self._loaded = LoadedModel(self.model)
        self._use_model()
        self._last_ind = 0
        return model_id

    def _use_model(self) -> None:
        """Let the gradient computers take up what the model holds."""
        self.gradient_computer.load_model_params(self.model)
        if self.fisher is not None:
            self._training_computer.load_model_params(self.model)

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
        model_id = self.saver.current_model_id
        if self._loaded_for != "featurize" or model_id is None:
            raise NotReadyError(
                "featurize: no checkpoint is loaded for featurizing; call "
                "load_checkpoint(checkpoint, model_id) first"
            )
        batch, inds = self._check_batch("featurize", batch, inds, num_samples, self.train_set_size)
        if not self._is_mine("featurize", batch, inds, num_samples):
            self._advance(num_samples, inds)
            return
        index = self.saver.index(model_id)
        content = batches.content_ids(batch, len(inds))
        done = index.done[inds]
        self._check_content(model_id, inds[done], index.content[inds[done]], content[done])
        self._compare_batch(model_id, inds, content)
        new = ~done
        if new.any() and self._draws is not None:
            self._featurize_fisher(self._draws, model_id, batch, inds, content, new)
        elif new.any():
            with self._loaded.guarded("featurize", False):
                q = self._out_to_loss(batch)  # of the whole batch: a task may compare its samples
            if done.any():
                rows = torch.from_numpy(np.flatnonzero(new)).to(self.device)
                batch, q = batches.select(batch, rows), q[rows]
            with self._loaded.guarded("featurize", True):
                (features,) = self._features(batch, model_id, inds[new])
            check_finite("featurize", "Q", q, inds[new])
            self._write(model_id, inds[new], content[new], features, q)
        self._advance(num_samples, inds)

    def _featurize_fisher(
        self,
        draws: Draws,
        model_id: int,
        batch: tuple[Any, ...],
        inds: Indices,
        content: Indices,
        new: npt.NDArray[np.bool_],
    ) -> None:
        """Compute and keep the features and terms of the ``new`` samples of a batch."""
        chosen = draws.chosen(inds) & new
        predictions = self.task.num_predictions(batch)
        noise = draws.noise(model_id, inds, predictions, bool(chosen.any())).to(self.device)
        with self._loaded.guarded("featurize", False), self._computing():
            # Of the whole batch: a task may compare its samples.
            terms = self._training_computer.compute_terms((*batch, noise))
        check_terms(terms, len(inds), inds)
        places = torch.from_numpy(np.flatnonzero(new)).to(self.device)
        samples = *batch, noise
        if not new.all():  # else it is the batch that the terms are of
            samples = batches.select(samples, places)
        every, inds, content = inds, inds[new], content[new]
        some = chosen[new] & (terms.drawn.shape[1] > 0)
        with self._loaded.guarded("featurize", True):
            features, *rows = self._features(samples, model_id, inds, drawn=some)
        on_trust = self._training_computer.on_trust
        check_finite_terms(terms, every)
        if some.any():  # before the samples: what says that they are done
            self.saver.write_shard(
                model_id,
                draws.rows(inds[some]).reshape(-1),
                content[some].repeat(len(rows)),
                torch.stack(rows, 1).flatten(0, 1),
                terms.drawn[places[torch.from_numpy(some).to(self.device)]].flatten(),
                DRAWN,
                on_trust,
            )
        columns = {
            "curvature": terms.curvature[places],
            "along": terms.along[places],
            "drawn": torch.from_numpy(some * float(len(rows))).float(),
        }
        slope = terms.slope[places]
        self.saver.write_shard(model_id, inds, content, features, slope, None, on_trust, columns)

    def _is_mine(
        self, function: str, batch: tuple[Any, ...], inds: Indices, num_samples: Any
    ) -> bool:
        """Whether this process has anything to do with a batch."""
        if not len(inds):
            return False
        if self._turns.taking is None:
            content = batches.content_ids(batch, len(inds))
            self._turns.compare(function, inds, content, num_samples is not None)
        return self._turns.mine(inds)

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
        model_id = self.saver.current_model_id
        if self._loaded_for is None or model_id is None:
            raise NotReadyError(
                "remaining_batches: no checkpoint is loaded; call load_checkpoint or "
                "start_scoring_checkpoint first"
            )
        exp_name = self._exp_name if self._loaded_for == "score" else None
        done = self.saver.index(model_id, exp_name).done
        every = np.split(np.arange(len(done)), range(batch_size, len(done), batch_size))
        todo = [inds[~done[inds]] for inds in every if not done[inds].all()]
        return [inds.tolist() for inds in self._turns.deal("remaining_batches", todo)]

    def has_drawn_rows(self, inds: Any) -> npt.NDArray[np.bool_]:
        """Which training samples rows of the Fisher matrix are drawn for, bool [b].

        ``featurize`` computes those of a batch by themselves. Loaders that choose what shares a
        batch may keep the two kinds apart.

        inds : integers [b], the samples' places in the training set.
        """
        places = as_indices("has_drawn_rows", inds)
        if self._draws is None:
            return np.zeros(len(places), np.bool_)
        return self._draws.chosen(places)

    def _check_batch(
        self, function: str, batch: Any, inds: Any, num_samples: SupportsIndex | None, total: int
    ) -> tuple[tuple[Any, ...], Indices]:
        """The batch on the device, and its samples' indices."""
        if (inds is None) == (num_samples is None):
            raise ValueError(
                f"{function}: received {'neither' if inds is None else 'both'} inds and "
                "num_samples; expected exactly one of them"
            )
        if inds is None:
            count = check_integer(function, "num_samples", num_samples or 0, 0, MAX_SAMPLES)
            places = np.arange(self._last_ind, self._last_ind + count)
        else:
            places = as_indices(function, inds)
            count = len(places)
        prepared, size = self._prepare(function, batch, count)
        if inds is None and count != size:
            raise ValueError(
                f"{function}: received num_samples={count} with a batch of {size} samples; "
                "expected the two to agree (the last batch of a loader is often smaller)"
            )
        check_indices(function, places, size, total)
        return prepared, places

    def _prepare(self, function: str, batch: Any, count: int | None) -> tuple[tuple[Any, ...], int]:
        """The batch on the device, checked, and its size."""
        check_mode(function, self.model)
        prepared, size = batches.prepare(function, batch, self.device, count, self._lists)
        if hasattr(self.task, "check_batch"):
            self.task.check_batch(prepared)
        if size:
            self._loaded.check(function, lambda: self._out_to_loss(prepared))
            if self._loaded.moved():
                self._use_model()
        return prepared, size

    def _check_content(
        self, model_id: int, inds: Indices, stored: Indices, received: Indices
    ) -> None:
        """Warn, once for a checkpoint, where a sample to be skipped is not what was featurized."""
        other = stored != received
        if other.any() and model_id not in self._warned:
            self._warned.add(model_id)
            warnings.warn(
                f"featurize: sample {inds[other][0]} of model_id {model_id} was featurized from "
                "other data than this batch holds. What is in save_dir is kept: fine if the loader "
                "augments at random; if it shuffles, or the data set has changed, samples are "
                "mixed up: use shuffle=False, or inds= with the samples' numbers in the data set, "
                "and load_from_save_dir=False or a new save_dir",
                stacklevel=3,
            )

    def _advance(self, num_samples: SupportsIndex | None, inds: Indices) -> None:
        """Count on: samples for calls with num_samples, batches for taking turns."""
        self._turns.passed(inds)
        if num_samples is not None:
            self._last_ind += len(inds)

    def _out_to_loss(self, batch: tuple[Any, ...]) -> Tensor:
        """Q of a batch, float32 [B]."""
        with self._computing():
            q: Tensor = self.gradient_computer.compute_loss_grad(batch).detach()
        size = batches.size(batch)
        if q.numel() != size:
            raise ValueError(
                f"featurize: the task's get_out_to_loss_grad returned {list(q.shape)} for a batch "
                f"of {size}; expected [{size}] or [{size}, 1]"
            )
        return q.reshape(-1).float()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the block gradients of a batch are computed, in the model's dtype: without the
        caller's autocast, which a log line mentions.
        """
        if torch.is_autocast_enabled(self.device.type) and not self._warned_autocast:
            self._warned_autocast = True
            logger.warning(
                "TRAKer: torch.autocast is off while gradients are computed, in the model's own "
                "dtype; load a model in bfloat16 for gradients in bfloat16"
            )
        with torch.autocast(self.device.type, enabled=False), enough_memory():
            yield

    def _features(
        self,
        batch: tuple[Any, ...],
        model_id: int,
        inds: Indices,
        drawn: npt.NDArray[np.bool_] | None = None,
    ) -> list[Tensor]:
        """Scaled features of each output of a batch, [B, k]; the gradients are projected in chunks.

        drawn : None, or the outputs are those of the likelihood, and this says which samples [B]
            have drawn ones. These are [b, k].
        """
        training = drawn is not None
        computer = self._training_computer if training else self.gradient_computer
        if isinstance(computer, AbstractGradientComputer):
            computer.trusting = not self.saver.distrusted(model_id)
            computer.when_disproved = partial(self._distrust, model_id)
        with self._computing():
            if drawn is not None:
                chosen = torch.from_numpy(drawn).to(self.device)
                features, rows = computer.project_drawn(batch, chosen, self.projector, model_id)
                some = inds[drawn]
                return [self._scaled(features, inds), *(self._scaled(r, some) for r in rows)]
            if hasattr(computer, "project"):
                features = computer.project(batch, self.projector, model_id).detach()
            else:  # a class with trak's methods
                grads = computer.compute_per_sample_grad(batch)
                features = self.projector.project(grads, model_id=model_id).detach()
        return [self._scaled(features, inds)]

    def _scaled(self, features: Tensor, inds: Indices) -> Tensor:
        """Features [B, k] over ``normalize_factor``, checked."""
        if features.shape != (len(inds), self.proj_dim):
            raise ValueError(
                f"TRAKer: the projector returned {list(features.shape)} for {len(inds)} samples; "
                f"expected [{len(inds)}, {self.proj_dim}]"
            )
        features = (features if features.dtype == torch.float64 else features.float()).div(
            self.normalize_factor
        )
        check_finite("TRAKer", "features", features, inds)
        return features

    def _write(
        self,
        model_id: int,
        inds: Indices,
        content: Indices,
        features: Tensor,
        q: Tensor | None = None,
        exp_name: str | None = None,
    ) -> None:
        """Keep the features that were computed last, and whether they were taken on trust."""
        on_trust = bool(getattr(self.gradient_computer, "on_trust", False))
        self.saver.write_shard(model_id, inds, content, features, q, exp_name, on_trust)

    def _distrust(self, model_id: int) -> None:
        """Let features on trust no longer count: a check has found such gradients to be wrong."""
        names = [None, DRAWN, *self.saver.experiments]
        before = [self.saver.index(model_id, name).done for name in names]
        self.saver.distrust(model_id, "hooks: gradients that were not plain autograd's")
        for name, done in zip(names, before, strict=True):
            lost = np.flatnonzero(done & ~self.saver.index(model_id, name).done)
            if len(lost) and name != DRAWN:  # whose samples are lost, too
                warnings.warn(
                    f"TRAKer: {len(lost)} {'training samples' if name is None else 'targets'} of "
                    f"model_id {model_id}{'' if name is None else f' in {name!r}'} "
                    f"({', '.join(map(str, lost[:10]))}{' ...' if len(lost) > 10 else ''}) were "
                    "computed by module hooks, and a check has just found such gradients to be "
                    "wrong for another batch. They count as not computed now: call "
                    f"{'featurize' if name is None else 'score'} for them again after this pass, "
                    "or run the script again",
                    stacklevel=stack_to_caller(),
                )

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
        model_ids = as_model_ids(function, model_ids)
        ranks = self.ranks if self.ranks.agree(function, model_ids) else Ranks()
        self.saver.forget()
        ids = self._model_ids(function, model_ids)
        for model_id in ids:
            self._require_features(function, model_id)
        if del_grads:
            logger.info("finalize_features: del_grads has nothing to delete")
        if lambda_reg is None:
            lambda_reg = self.lambda_reg
        check_lambda(lambda_reg)
        probabilities = getattr(self.task, "q_are_probabilities", None)
        if ranks.first:
            self._compare_content(function, ids)
        fisher = self.fisher is not None and (lambda_reg == AUTO or self._takes_lambda)
        if self.fisher is not None and not fisher:
            self._require_outputs(function, lambda_reg)
        finalize(
            self.saver.systems, self.score_computer, ids, lambda_reg, ranks, probabilities, fisher
        )
        self._last_ind = 0

    # ---- scoring --------------------------------------------------------------------------------

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
        num_targets = check_integer(function, "num_targets", num_targets, 1, MAX_SAMPLES)
        grouping = as_groups(function, groups, reduction, num_targets)
        self.saver.experiment_path(exp_name)
        model_id = check_integer(function, "model_id", model_id, 0, 1 << 32)
        self.saver.forget()
        self._require_finalized(function, model_id)
        self._load(function, checkpoint, model_id, strict)
        expected = "expected the checkpoint, or the model_id, that was featurized"
        self.saver.check_checkpoint(model_id, self._loaded.digest, expected)
        self.saver.start_experiment(exp_name, model_id, num_targets, grouping)
        done = self.saver.index(model_id, exp_name).done
        self._turns = Turns(self.ranks, done, ("score", model_id, exp_name))
        self._exp_name = exp_name
        self._loaded_for = "score"
        self._target_weights = None

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
        returned; ``finalize_scores`` would average such scores over checkpoints.

        Parameters
        ----------
        batch, inds, num_samples : as in ``featurize``, with the targets' numbers. With ``per`` or
            ``stream`` they have none.
        per : "module", or "token" for language models: the scores of the targets in ``batch``, in
            parts that add up to them. A module's part comes from the gradient by its own
            parameters; parts are in the order of ``modules``. A token's part comes from the margin
            of its label, and takes a backward.
        stream : ``batch`` holds other training samples, such as candidates for the training set.
            Their scores on all targets of this experiment are returned, and their features are not
            kept. All targets must have been given before.

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
        model_id, exp_name = self.saver.current_model_id, self._exp_name
        if self._loaded_for != "score" or model_id is None or exp_name is None:
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
            prepared, size = self._prepare("score", batch, None)
            if stream:
                return self._stream(prepared, size, model_id, exp_name)
            return self._scores_in_parts(prepared, size, model_id, per)
        index = self.saver.index(model_id, exp_name)
        batch, inds = self._check_batch("score", batch, inds, num_samples, len(index.shard))
        if not self._is_mine("score", batch, inds, num_samples):
            self._advance(num_samples, inds)
            return None
        content = batches.content_ids(batch, len(inds))
        new = ~(index.done[inds] & (index.content[inds] == content))
        if new.any():
            if not new.all():
                rows = torch.from_numpy(np.flatnonzero(new)).to(self.device)
                batch = batches.select(batch, rows)
            with self._loaded.guarded("score", False):
                self._out_to_loss(batch)  # for its checks: labels that the model has no logits for
            with self._loaded.guarded("score", True):
                (features,) = self._features(batch, model_id, inds[new])
            self._write(model_id, inds[new], content[new], features, exp_name=exp_name)
        self._advance(num_samples, inds)
        return None

    @property
    def modules(self) -> list[str]:
        """The modules whose own parameters gradients are taken by, for ``score(per="module")``."""
        return modules_of(self.gradient_names)

    def _scores_in_parts(
        self, batch: tuple[Any, ...], size: int, model_id: int, per: str | None
    ) -> npt.NDArray[np.float32]:
        """The scores of the targets in a batch, [n, B, parts]."""
        computer = self.gradient_computer
        if not isinstance(computer, AbstractGradientComputer) or not computer.gives_rows():
            raise ValueError(
                f"score: received per={per!r} with a gradient_computer of another kind; expected "
                '"auto", "hooks", "func" or "loop"'
            )
        if per == "module" and not isinstance(self.projector, Projector | FactoredProjector):
            raise ValueError(
                f'score: received per="module" with a {type(self.projector).__name__}, which '
                "can't project parts of a gradient; expected fastproj.Projector or "
                "fastproj.FactoredProjector"
            )
        if per == "token" and not hasattr(self.task, "token_outputs"):
            raise ValueError(
                f'score: received per="token" with the task {type(self.task).__name__}; expected '
                "causal_lm or seq2seq, or a task with token_outputs"
            )
        if per not in ("module", "token"):
            raise ValueError(f"score: received per={per!r}; expected 'module' or 'token'")
        with self._loaded.guarded("score", True), self._computing():
            self._out_to_loss(batch)
            if per == "module":
                parts = project_modules(computer, batch, self.projector, model_id)
            else:
                tokens = computer.sibling(TokenOutput(self.task))
                parts = tokens.project_rows(batch, self.projector, model_id)
        rows = [self._scaled(part.detach(), np.arange(size)) for part in parts]
        scores = scores_of_targets(
            self.saver.systems, self.score_computer, model_id, torch.stack(rows, 1).flatten(0, 1)
        )
        return scores.reshape(len(scores), size, len(rows))

    def _stream(
        self, batch: tuple[Any, ...], size: int, model_id: int, exp_name: str
    ) -> npt.NDArray[np.float32]:
        """The scores of samples on all targets of an experiment, [B, m], by this checkpoint."""
        key = model_id, exp_name
        if self._target_weights is None or self._target_weights[0] != key:
            self._require_targets(exp_name, model_id)
            columns = range(self.saver.num_columns(exp_name))
            weights = target_weights(self.saver, model_id, exp_name, columns, self._solution)
            self._target_weights = key, weights.to(self.score_computer.device)
        inds = np.arange(size)
        with self._loaded.guarded("score", True), self._computing():
            if self._draws is None:
                q = self._out_to_loss(batch)
                (features,) = self._features(batch, model_id, inds)
            else:
                predictions = self.task.num_predictions(batch)
                noise = self._draws.noise(model_id, inds, predictions, some=False)
                samples = *batch, noise.to(self.device)
                terms = self._training_computer.compute_terms(samples)
                check_terms(terms, size, inds)
                check_finite_terms(terms, inds)
                q = terms.slope.float()
                nothing = np.zeros(size, np.bool_)
                (features,) = self._features(samples, model_id, inds, drawn=nothing)
        product = self.score_computer.scores(features.float().cpu(), self._target_weights[1])
        scores: npt.NDArray[np.float32] = product.mul_(q.cpu().unsqueeze(1)).numpy()
        return scores

    def finalize_scores(
        self,
        exp_name: str,
        model_ids: Iterable[int] | None = None,
        allow_skip: bool = False,
        top_k: SupportsIndex | None = None,
    ) -> Any:
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
        if top_k is not None:
            top_k = check_integer(function, "top_k", top_k, 1, MAX_SAMPLES)
        model_ids = as_model_ids(function, model_ids)
        facts_given = (exp_name, model_ids, allow_skip, top_k)
        ranks = self.ranks if self.ranks.agree(function, facts_given) else Ranks()
        self.saver.forget()
        n_columns = self.saver.num_columns(exp_name)
        ids = []
        for model_id in self._model_ids("finalize_scores", model_ids):
            try:
                self._require_finalized("finalize_scores", model_id)
                self._require_targets(exp_name, model_id)
                ids.append(model_id)
            except NotReadyError as error:
                if not allow_skip:
                    raise
                warnings.warn(f"{error}; skipped", stacklevel=2)
        if not ids:
            raise NotReadyError(
                f"finalize_scores: no checkpoint in {self.save_dir} is ready for {exp_name!r}"
            )
        if ranks.first:
            self._compare_content(function, ids, exp_name)
            self._compare_content(function, ids)
        shape = (self.train_set_size, n_columns)
        facts = {"exp_name": exp_name, "model_ids": ids}
        path = self.saver.scores_path(exp_name)
        sink: ScoresWriter | TopWriter = ScoresWriter(path, shape, ranks, facts)
        if top_k is not None:
            path = self.saver.top_path(exp_name)
            sink = TopWriter(path, shape, top_k, ranks, facts)
        passes = len(target_chunks(self.saver, exp_name, len(ids)))
        with sink, progress("scoring", passes * shape[0] // ranks.size, "sample") as bar:
            write_scores(
                self.saver,
                self.score_computer,
                exp_name,
                ids,
                self._solution,
                sink,
                ranks,
                bar.update,
                takes_own_q(self.saver.systems, ids),
            )
        self._last_ind = 0
        logger.info("scores of %r are in %s", exp_name, path)
        if top_k is not None:
            return read_top_scores(path)
        self.scores = np.load(path, mmap_mode="c")
        return self.scores

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
        ids = self._model_ids(function, as_model_ids(function, model_ids))
        for model_id in ids:
            self._require_finalized(function, model_id)
        with progress("self-influence", len(ids) * self.train_set_size, "sample") as bar:
            scores = self_scores(self.saver.systems, self.score_computer, ids, bar.update)
            return scores.float().numpy()

    def _solution(self, model_id: int) -> Solution:
        """The factored system of a finalised checkpoint."""
        return solution_of(self.saver.systems, self.score_computer, model_id)

    def _finalized_features(self, model_id: int) -> Tensor:
        """TRAK's "features": all features times the inverse of XtX, [n, k] in memory."""
        self._require_finalized("current_store", model_id)
        features = self.saver.matrix(model_id)
        return self._solution(model_id).apply(features).to(features.dtype)

    # ---- what must be there ---------------------------------------------------------------------

    def _model_ids(self, function: str, model_ids: Iterable[int] | None) -> list[int]:
        """The given model_ids, or all; each must be in the store."""
        known = self.saver.ids()
        ids = known if model_ids is None else list(model_ids)
        missing = [model_id for model_id in ids if model_id not in known]
        if missing or not ids:
            raise NotReadyError(
                f"{function}: received model_ids {missing or ids}; {self.save_dir} has "
                f"{known or 'none'}. Call load_checkpoint and featurize first"
            )
        return ids

    def _require_features(self, function: str, model_id: int) -> None:
        """Raise NotReadyError unless all training samples are featurized."""
        done = self.saver.index(model_id).done
        if not done.all():
            missing = np.flatnonzero(~done)
            raise NotReadyError(
                f"{function}: model_id {model_id} lacks {len(missing)} of {len(done)} training "
                f"samples (the first: {missing[0]}); call featurize for them"
            )

    def _require_outputs(self, function: str, lambda_reg: Lambda) -> None:
        """Raise ValueError unless the training features are gradients of f, as TRAK's are."""
        if not getattr(self.task, "learns_along_output", True):
            raise ValueError(
                f"{function}: received lambda_reg={lambda_reg!r}, which is TRAK's formula, where "
                f"the features of {type(self.task).__name__} were made for the Fisher matrix; "
                'expected lambda_reg="auto", or TRAKer(..., curvature="fisher") to add it to that '
                'matrix, or TRAKer(..., curvature="trak") with another save_dir, and featurize'
            )

    def _require_finalized(self, function: str, model_id: int) -> None:
        """Raise NotReadyError unless a checkpoint is featurized and finalised."""
        self._model_ids(function, [model_id])
        self._require_features(function, model_id)
        if not self.saver.systems.is_finalized(model_id):
            raise NotReadyError(
                f"{function}: model_id {model_id} is not finalised; call finalize_features first"
            )

    def _require_targets(self, exp_name: str, model_id: int) -> None:
        """Raise NotReadyError unless all targets are scored under a checkpoint."""
        done = self.saver.index(model_id, exp_name).done
        if not done.all():
            missing = np.flatnonzero(~done)
            raise NotReadyError(
                f"finalize_scores: model_id {model_id} lacks {len(missing)} of {len(done)} targets "
                f"of {exp_name!r} (the first: {missing[0]}); call start_scoring_checkpoint and "
                "score for them, or pass allow_skip=True"
            )

    def _compare_content(self, function: str, ids: list[int], exp_name: str | None = None) -> None:
        """Warn, once, where a sample or target held other data under another checkpoint."""
        first = self.saver.index(ids[0], exp_name)
        for model_id in ids[1:]:
            index = self.saver.index(model_id, exp_name)
            both = np.flatnonzero(first.done & index.done)
            other = both[first.content[both] != index.content[both]]
            self._warn_mixed(function, other, len(both), (model_id, ids[0]), exp_name)

    def _compare_batch(self, model_id: int, inds: Indices, content: Indices) -> None:
        """The same for the batch at hand, against a checkpoint that is there already."""
        if self._beside is None:
            others = (i for i in self.saver.ids() if i != model_id and self.saver.is_registered(i))
            self._beside = next((i for i in others if self.saver.index(i).done.any()), model_id)
        if self._beside != model_id:
            index = self.saver.index(self._beside)
            both = index.done[inds]
            other = inds[both][index.content[inds[both]] != content[both]]
            ids = (model_id, self._beside)
            self._warn_mixed("featurize", other, int(both.sum()), ids, None)

    def _warn_mixed(
        self, function: str, other: Indices, of: int, ids: tuple[int, int], exp_name: str | None
    ) -> None:
        if not len(other) or exp_name in self._warned_mixed:
            return
        self._warned_mixed.add(exp_name)
        what = "sample" if exp_name is None else "target"
        inside = "" if exp_name is None else f" of {exp_name!r}"
        again = (
            "load_from_save_dir=False, load_checkpoint and featurize again for all checkpoints"
            if exp_name is None
            else "score again under all checkpoints"
        )
        warnings.warn(
            f"{function}: {what} {other[0]}{inside} held other data under model_id {ids[0]} than "
            f"under {ids[1]}, as {len(other)} of {of} {what}s did; their scores are averaged as if "
            f"they were the same. If the loader shuffles, {what}s are mixed up: use shuffle=False, "
            f"or inds= with the {what}s' numbers in the data set, and {again}. If it augments at "
            f"random, the {what}s are the same and nothing is wrong",
            stacklevel=4,
        )
