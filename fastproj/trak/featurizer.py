"""Features: gradients under the checkpoint that is loaded, projected, scaled and kept."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fastproj.checks import listed
from fastproj.trak import batches
from fastproj.trak.callers import stack_to_caller
from fastproj.trak.checkpoints import load_state
from fastproj.trak.curvature import check_finite_terms, check_terms
from fastproj.trak.draws import Draws
from fastproj.trak.files import Indices
from fastproj.trak.gradients import AbstractGradientComputer
from fastproj.trak.gradients.memory import enough_memory
from fastproj.trak.gradients.running import norm, rounding_share
from fastproj.trak.inputs import check_finite, check_mode, in_eval_mode
from fastproj.trak.loaded import LoadedModel
from fastproj.trak.saver import Saver
from fastproj.trak.store.store import DRAWN
from fastproj.trak.tasks import Terms, TokenOutput, TrainingOutput

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
        self._token_computer: Any = None
        self._lists = batches.Lists()
        self._warned_autocast = False
        self._active: set[str] = set()  # modules in training mode, without effect on outputs

    # ---- the model ------------------------------------------------------------------------------

    def load(
        self, function: str, checkpoint: Mapping[str, Any], strict: bool, names: Collection[str]
    ) -> None:
        """Load a checkpoint into the model, which must then hold it until the next."""
        self.model.train()  # which takes apart what eval() has made of the last weights
        try:
            load_state(function, self.model, checkpoint, strict, names)
        finally:
            self.model.eval()
        self._active = set()
        self.loaded = LoadedModel(self.model)
        self._use_model()

    def _use_model(self) -> None:
        """Let the gradient computers take up what the model holds."""
        self.computer.load_model_params(self.model)
        if self.draws is not None:
            self.training_computer.load_model_params(self.model)
        self._token_computer = None

    def token_computer(self, batch: tuple[Any, ...]) -> Any:
        """The computer of the gradients by single labels of a batch, at ``task.places``.

        It is one for as long as the model stays as it is: what it has checked, it need not check
        again.
        """
        if self._token_computer is None:
            self._token_computer = self.computer.sibling(TokenOutput(self.task))
        self._token_computer.task.choose(batch)
        return self._token_computer

    def simulated_pairs(self) -> str | None:
        """A hash of the pairs that features depend on under this checkpoint, if the task has it."""
        found = getattr(self.task, "simulated_pairs", None)
        pairs: str | None = None if found is None else found(self.model)
        return pairs

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
            self._check_modes(function, prepared)
        return prepared, size

    def _check_modes(self, function: str, batch: tuple[Any, ...]) -> None:
        """Raise ValueError where modules have been put into training mode since the last batch, and
        outputs are others for that: any forward may ask for ``self.training``.
        """
        active = {name: m for name, m in self.model.named_modules() if m.training}
        if active.keys() == self._active:
            return
        if active and isinstance(self.computer, AbstractGradientComputer):
            with self.loaded.guarded(function, False), self.computing():
                now = self.computer.outputs_now(batch)
                with in_eval_mode(active.values()):
                    wanted = self.computer.outputs_now(batch)
            share = rounding_share(0.0, now.dtype, *(p.dtype for p in self.model.parameters()))
            finite = torch.isfinite(now) & torch.isfinite(wanted)  # others are refused later
            if norm((now - wanted)[finite]) > share * norm(wanted[finite]):
                names = listed(name or type(module).__name__ for name, module in active.items())
                raise ValueError(
                    f"{function}: received a model with {names} in training mode, which gives "
                    "other outputs than in eval mode; expected model.eval(), which load_checkpoint "
                    "calls"
                )
        self._active = set(active)

    @contextmanager
    def computing(self) -> Iterator[None]:
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

    # ---- of a batch -----------------------------------------------------------------------------

    def out_to_loss(self, batch: tuple[Any, ...]) -> Tensor:
        """Q of a batch, float32 [B]."""
        with self.computing():
            q: Tensor = self.computer.compute_loss_grad(batch).detach()
        size = batches.size(batch)
        if q.numel() != size:
            raise ValueError(
                f"featurize: the task's get_out_to_loss_grad returned {list(q.shape)} for a batch "
                f"of {size}; expected [{size}] or [{size}, 1]"
            )
        return q.reshape(-1).float()

    def features(
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
        computer = self.computer if drawn is None else self.training_computer
        self.trust(computer, model_id)
        with self.computing():
            if drawn is not None:
                chosen = torch.from_numpy(drawn).to(self.device)
                features, rows = computer.project_drawn(batch, chosen, self.projector, model_id)
                some = inds[drawn]
                return [self.scaled(features, inds), *(self.scaled(r, some) for r in rows)]
            if hasattr(computer, "project"):
                features = computer.project(batch, self.projector, model_id)
            else:  # a class with trak's methods
                grads = computer.compute_per_sample_grad(batch)
                features = self.projector.project(grads, model_id=model_id)
        return [self.scaled(features, inds)]

    def features_and_q(
        self, batch: tuple[Any, ...], model_id: int, inds: Indices
    ) -> tuple[Tensor, Tensor]:
        """Scaled features [B, k] and Q [B] of a batch. Those of a class with trak's methods come in
        trak's order, because it may keep Q from the forward of the gradients.
        """
        if hasattr(self.computer, "project"):
            q = self.out_to_loss(batch)
            (features,) = self.features(batch, model_id, inds)
        else:
            (features,) = self.features(batch, model_id, inds)
            q = self.out_to_loss(batch)
        return features, q

    def trust(self, computer: Any, model_id: int) -> None:
        """Let a computer rely on checks of other batches, unless one of this checkpoint failed."""
        if isinstance(computer, AbstractGradientComputer):
            computer.trusting = not self.saver.distrusted(model_id)
            computer.when_disproved = partial(self._distrust, model_id)

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
        some = torch.from_numpy(np.flatnonzero(new)).to(self.device)
        # Q of the whole batch: a task may compare its samples. Of targets for its checks alone:
        # labels that the model has no logits for.
        if hasattr(self.computer, "project"):
            with self.loaded.guarded(function, False):
                q = self.out_to_loss(batch)[some]
            batch = batch if new.all() else batches.select(batch, some)
            with self.loaded.guarded(function, True):
                (features,) = self.features(batch, model_id, inds[new])
        else:
            with self.loaded.guarded(function, True):
                features, q = self.features_and_q(batch, model_id, inds)
            features, q = features[some], q[some]
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
        predictions = self.task.num_predictions(batch)
        noise = draws.noise(model_id, inds, predictions, bool(chosen.any())).to(self.device)
        with self.loaded.guarded("featurize", False), self.computing():
            # Of the whole batch: a task may compare its samples.
            terms = self.training_computer.compute_terms((*batch, noise))
        check_terms(terms, len(inds), noise.shape[1], inds)
        every, samples, kept = inds, (*batch, noise), terms
        if not new.all():
            places = torch.from_numpy(np.flatnonzero(new)).to(self.device)
            samples = batches.select(samples, places)
            kept = Terms(*(values[places] for values in terms))
        inds, content = inds[new], content[new]
        some = chosen[new] & (kept.drawn.shape[1] > 0)
        with self.loaded.guarded("featurize", True):
            features, *rows = self.features(samples, model_id, inds, drawn=some)
        on_trust = self.training_computer.on_trust
        check_finite_terms(terms, every)
        if some.any():  # before the samples: what says that they are done
            self.saver.write_shard(
                model_id,
                draws.rows(inds[some]).reshape(-1),
                content[some].repeat(len(rows)),
                torch.stack(rows, 1).flatten(0, 1),
                kept.drawn[torch.from_numpy(some).to(self.device)].flatten(),
                DRAWN,
                on_trust,
            )
        columns = {
            "curvature": kept.curvature,
            "along": kept.along,
            "drawn": torch.from_numpy(some * float(len(rows))).float(),
        }
        self.saver.write_shard(
            model_id, inds, content, features, kept.slope, None, on_trust, columns
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
