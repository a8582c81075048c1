"""Features: gradients under the checkpoint that is loaded, projected, scaled and kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastproj.checks import listed
from fastproj.trak import batches
from fastproj.trak.callers import stack_to_caller
from fastproj.trak.checkpoints import LoadedModel, load_state
from fastproj.trak.curvature import Draws, check_finite_terms, check_terms
from fastproj.trak.files import Indices
from fastproj.trak.gradients import AbstractGradientComputer
from fastproj.trak.inputs import check_finite, check_mode
from fastproj.trak.saver import Saver
from fastproj.trak.store.store import DRAWN
from fastproj.trak.tasks import TrainingOutput

logger = logging.getLogger("fastproj.trak")


class Featurizer:
    """Makes the features of batches under the checkpoint that is loaded.

    Parameters
    ----------
    model : the module that checkpoints are loaded into, on ``device``.
    task, computer, projector, saver : as TRAKer has them.
    scale : what features are divided by.
    draws : which rows of the Fisher matrix are drawn; None without that curvature.

    Attributes
    ----------
    loaded : the model as it was loaded.
    training_computer : gives the gradients of the labels' likelihood, with ``draws``.
    """

    loaded: LoadedModel

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        task: Any,
        computer: Any,
        projector: Any,
        saver: Saver,
        scale: float,
        draws: Draws | None,
    ) -> None:
        self.model, self.device, self.task = model, device, task
        self.computer, self.projector, self.saver = computer, projector, saver
        self.scale, self.draws = scale, draws
        self.training_computer: Any = None
        if draws is not None:
            self.training_computer = computer.sibling(TrainingOutput(task))
        self._lists = batches.Lists()
        self._warned_autocast = False

    # ---- the model ------------------------------------------------------------------------------

    def load(
        self, function: str, checkpoint: Mapping[str, Any], strict: bool, names: Collection[str]
    ) -> None:
        """Load a checkpoint into the model, which must then hold it until the next."""
        load_state(function, self.model, checkpoint, strict, names)
        self.model.eval()
        self.loaded = LoadedModel(self.model)
        self._use_model()

    def _use_model(self) -> None:
        """Let the gradient computers take up what the model holds."""
        self.computer.load_model_params(self.model)
        if self.draws is not None:
            self.training_computer.load_model_params(self.model)

    def prepare(self, function: str, batch: Any, count: int | None) -> tuple[tuple[Any, ...], int]:
        """The batch on the device, checked, and its size."""
        check_mode(function, self.model)
        prepared, size = batches.prepare(function, batch, self.device, count, self._lists)
        if hasattr(self.task, "check_batch"):
            self.task.check_batch(prepared)
        if size:
            self.loaded.check(function, lambda: self.out_to_loss(prepared))
            if self.loaded.moved():
                self._use_model()
        return prepared, size

    def own_dtype(self) -> torch.autocast:
        """A context without the caller's autocast, which a log line mentions: gradients have the
        model's dtype.
        """
        if torch.is_autocast_enabled(self.device.type) and not self._warned_autocast:
            self._warned_autocast = True
            logger.warning(
                "TRAKer: torch.autocast is off while gradients are computed, in the model's own "
                "dtype; load a model in bfloat16 for gradients in bfloat16"
            )
        return torch.autocast(self.device.type, enabled=False)

    # ---- of a batch -----------------------------------------------------------------------------

    def out_to_loss(self, batch: tuple[Any, ...]) -> Tensor:
        """Q of a batch, float32 [B]."""
        with self.own_dtype():
            q: Tensor = self.computer.compute_loss_grad(batch).detach()
        size = batches.size(batch)
        if q.numel() != size:
            raise ValueError(
                f"featurize: the task's get_out_to_loss_grad returned {list(q.shape)} for a batch "
                f"of {size}; expected [{size}] or [{size}, 1]"
            )
        return q.reshape(-1).float()

    def features(
        self, batch: tuple[Any, ...], model_id: int, inds: Indices, training: bool = False
    ) -> list[Tensor]:
        """Scaled features of each output of a batch, [B, k]; the gradients are projected in chunks.

        training : whether the outputs are those of the likelihood.
        """
        computer = self.training_computer if training else self.computer
        if isinstance(computer, AbstractGradientComputer):
            computer.trusting = not self.saver.distrusted(model_id)
            computer.when_disproved = partial(self._distrust, model_id)
        with self.own_dtype():
            if training:
                rows = computer.project_rows(batch, self.projector, model_id)
            elif hasattr(computer, "project"):
                rows = [computer.project(batch, self.projector, model_id)]
            else:  # a class with trak's methods
                grads = computer.compute_per_sample_grad(batch)
                rows = [self.projector.project(grads, model_id=model_id)]
        return [self.scaled(features, inds) for features in rows]

    def scaled(self, features: Tensor, inds: Indices) -> Tensor:
        """Features [B, k] over ``scale``, checked."""
        expected = len(inds), self.saver.proj_dim
        if features.shape != expected:
            raise ValueError(
                f"TRAKer: the projector returned {list(features.shape)} for {len(inds)} samples; "
                f"expected {list(expected)}"
            )
        features = features.detach()
        features = (features if features.dtype == torch.float64 else features.float()) / self.scale
        check_finite("TRAKer", "features", features, inds)
        return features

    # ---- and kept -------------------------------------------------------------------------------

    def keep(
        self,
        model_id: int,
        batch: tuple[Any, ...],
        inds: Indices,
        content: Indices,
        new: npt.NDArray[np.bool_],
        exp_name: str | None = None,
    ) -> None:
        """Compute and keep the features, and Q of training samples, of the ``new`` ones in a batch.

        exp_name : None for training samples.
        """
        function = "featurize" if exp_name is None else "score"
        if exp_name is None and self.draws is not None:
            self._keep_with_rows(self.draws, model_id, batch, inds, content, new)
            return
        with self.loaded.guarded(function, False):
            # Of the whole batch: a task may compare its samples. Of targets for its checks alone:
            # labels that the model has no logits for.
            q = self.out_to_loss(batch)
        if not new.all():
            rows = torch.from_numpy(np.flatnonzero(new)).to(self.device)
            batch, q = batches.select(batch, rows), q[rows]
        with self.loaded.guarded(function, True):
            (features,) = self.features(batch, model_id, inds[new])
        if exp_name is None:
            check_finite(function, "Q", q, inds[new])
        on_trust = bool(getattr(self.computer, "on_trust", False))
        kept = q if exp_name is None else None
        self.saver.write_shard(
            model_id, inds[new], content[new], features, kept, exp_name, on_trust
        )

    def _keep_with_rows(
        self,
        draws: Draws,
        model_id: int,
        batch: tuple[Any, ...],
        inds: Indices,
        content: Indices,
        new: npt.NDArray[np.bool_],
    ) -> None:
        """The same for the Fisher matrix: features and terms of training samples, drawn rows."""
        chosen = draws.chosen(inds) & new
        noise = draws.noise(model_id, inds, self.task.num_predictions(batch)).to(self.device)
        if not chosen.any():
            noise = noise[:, :0]
        with self.loaded.guarded("featurize", False), self.own_dtype():
            # Of the whole batch: a task may compare its samples.
            terms = self.training_computer.compute_terms((*batch, noise))
        check_terms(terms, len(inds), inds)
        some = chosen if terms.drawn.shape[1] else np.zeros(len(inds), np.bool_)
        parts = [part for part in (new & some, new & ~some) if part.any()]
        if new.all() and 2 * some.sum() >= len(inds):
            # Rows of the others, for nothing, cost no more than running parts of the batch again.
            parts = [new]
        made = []
        for part in parts:
            own = bool((part & some).any())
            places = torch.from_numpy(np.flatnonzero(part)).to(self.device)
            samples = *batch, noise if own or not terms.drawn.shape[1] else noise[:, :0]
            if not part.all():  # else it is the batch that the terms are of
                samples = batches.select(samples, places)
            with self.loaded.guarded("featurize", part is parts[-1]):
                features, *rows = self.features(samples, model_id, inds[part], training=True)
            made.append((part, places, features, rows, self.training_computer.on_trust))
        check_finite_terms(terms, inds)
        for part, places, features, rows, on_trust in made:
            drawn = part & some
            if drawn.any():  # before the samples: what says that they are done
                kept = torch.from_numpy(some[part]).to(self.device)
                self.saver.write_shard(
                    model_id,
                    draws.rows(inds[drawn]).reshape(-1),
                    content[drawn].repeat(len(rows)),
                    torch.stack(rows, 1)[kept].flatten(0, 1),
                    terms.drawn[places[kept]].flatten(),
                    DRAWN,
                    on_trust,
                )
            columns = {
                "curvature": terms.curvature[places],
                "along": terms.along[places],
                "drawn": torch.from_numpy(some[part] * float(len(rows))).float(),
            }
            slope = terms.slope[places]
            self.saver.write_shard(
                model_id, inds[part], content[part], features, slope, None, on_trust, columns
            )

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
                    f"({listed(lost, 10)}) were computed by module hooks, and a check has just "
                    "found such gradients to be wrong for another batch. They count as not "
                    f"computed now: call {'featurize' if name is None else 'score'} for them again "
                    "after this pass, or run the script again",
                    stacklevel=stack_to_caller(),
                )
