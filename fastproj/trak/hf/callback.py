"""A callback of transformers' Trainer that featurizes while it trains."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastproj.trak.files import StoreMismatchError, make_dir, read_json, write_json
from fastproj.trak.fingerprints import model_digest
from fastproj.trak.hf.traker import HFTRAKer
from fastproj.trak.hf.undisturbed import undisturbed
from fastproj.trak.inputs import sharded_by
from fastproj.trak.loaded import settle_norms
from fastproj.trak.store.store import NotReadyError, check_exp_name, names_aside

STEPS = "trainer.json"  # in save_dir: the steps that this training was featurized at
WHEN = ("save", "epoch")

logger = logging.getLogger("fastproj.trak")


class TRAKCallback(TrainerCallback):
    """Featurizes the training set, and scores targets, at checkpoints of a ``Trainer``.

        callback = TRAKCallback(train, save_dir="trak", targets=targets)
        trainer = Trainer(model, args, train_dataset=train, callbacks=[callback])
        trainer.train()
        callback.scores  # [n_train, n_targets]

    The training is what it would be without the callback, bit for bit: weights, random numbers,
    modes of modules and gradients are as before when it returns. Scores need no checkpoint to be
    kept. A checkpoint's model_id is its step, ``trainer.state.global_step``.

    A training that was stopped, and goes on by ``resume_from_checkpoint``, goes on here, too: what
    the checkpoint lacks is featurized first. Features of steps that the training takes again, to
    other weights, are set aside. An error, as of a full disk, ends the training; with when="save"
    it goes on from the checkpoint that was saved just before.

    Processes of DDP share the work. FSDP, DeepSpeed and tensor parallelism are refused, because no
    process holds the whole model: give ``HFTRAKer`` the saved checkpoints instead.

    Gradients are in the dtype of the parameters, also where the training uses autocast.

    Parameters
    ----------
    train : the tokenised training set in its own order, as for ``HFTRAKer``; it need not be all
        that the trainer has. A generator, here or as targets, is read at once.
    save_dir : where features and scores are kept.
    targets : tokenised samples to score, or None: ``HFTRAKer.score`` can do so later for steps
        whose checkpoints the trainer keeps.
    when : "save" (after the trainer saved a checkpoint) | "epoch" (at the end of each epoch).
    exp_name : names the targets.
    options : other arguments of ``HFTRAKer``: tokenizer (None is the trainer's processing_class),
        task, batch_size, proj_dim ...

    Attributes
    ----------
    scores : float32 [n_train, n_targets] when the training has ended; None without targets.
    traker : the ``HFTRAKer``, when the training has begun.
    steps : the steps that were featurized.
    """

    def __init__(
        self,
        train: Any,
        save_dir: str | os.PathLike[str] = "./trak_results",
        targets: Any = None,
        *,
        when: str = "save",
        exp_name: str = "targets",
        **options: Any,
    ) -> None:
        if when not in WHEN:
            raise ValueError(
                f"TRAKCallback: received when={when!r}; expected {' or '.join(map(repr, WHEN))}"
            )
        check_exp_name("TRAKCallback", exp_name)
        # A training may begin more than once.
        self.train, self.targets = (
            list(data) if isinstance(data, Iterator) else data for data in (train, targets)
        )
        self.save_dir = Path(save_dir).absolute()
        self.when, self.exp_name, self.options = when, exp_name, options
        self.traker: HFTRAKer | None = None
        self.steps: list[int] = []
        self.scores: Any = None
        self._targets: Any = None  # as batches of the model that is trained

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the model and the samples before any training; finish what a stopped one began."""
        model = given["model"]
        check_whole(args, model)
        smoothing = getattr(args, "label_smoothing_factor", 0)
        if smoothing:
            logger.warning(
                "TRAKCallback: the training smooths its labels (label_smoothing_factor=%g); "
                "scores are by the likelihood of the labels as they are",
                smoothing,
            )
        with undisturbed(model):
            options = {"tokenizer": given.get("processing_class"), **self.options}
            self.traker = HFTRAKer(model, self.train, None, self.save_dir, **options)
            if self.targets is not None:
                self._targets = self.traker.collator("targets", self.targets)
                saver = self.traker.traker.saver
                saver.check_experiment(self.exp_name, len(self._targets.samples))
        self.scores = None
        there = self._steps_on_disk()
        self.steps = [step for step in there if step <= state.global_step]
        if self.steps != there:  # those of an abandoned training, which this one may yet pass
            self._write_steps()
        resumed = state.global_step > 0
        if resumed and (self.when == "save" or state.global_step in self.steps):
            self._featurize(model, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Featurize the checkpoint that was just saved."""
        if self.when == "save":
            self._featurize(given["model"], state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Featurize the model at the end of an epoch."""
        if self.when == "epoch":
            self._featurize(given["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Make scores of what was kept."""
        if not self.steps:
            logger.warning(
                "TRAKCallback: nothing was featurized, because the training ended without %s",
                "saving a checkpoint (TrainingArguments(save_strategy=...))"
                if self.when == "save"
                else "the end of an epoch",
            )
        elif self._targets is not None:
            try:
                self.scores = self._begun().traker.finalize_scores(
                    self.exp_name, self.steps, allow_skip=True
                )
            except NotReadyError as error:  # the training itself is done, and to be kept
                logger.warning("TRAKCallback: no scores were made: %s", error)

    def _featurize(self, model: nn.Module, step: int) -> None:
        """Features, and those of the targets, of the model as it is now."""
        traker = self._begun()
        if step not in self.steps:
            self.steps.append(step)
        self._write_steps()
        with undisturbed(model):
            settle_norms(model)  # as the weights of a checkpoint that is there are
            weights = model.state_dict()
            saver = traker.traker.saver
            aside = self._to_set_aside(model, step)
            if aside:
                logger.warning(
                    "TRAKCallback: %s holds step %d of a training that came to other weights; it "
                    "is set aside, and featurized anew",
                    self.save_dir,
                    step,
                )
                saver.earlier.update(aside)
            traker.featurize_checkpoint(step, weights)
            if self._targets is not None:
                traker.score_checkpoint(step, weights, self._targets, self.exp_name)

    def _to_set_aside(self, model: nn.Module, step: int) -> dict[int, str]:
        """A step that save_dir has with other weights, of a training that was abandoned, and a new
        name for it; or nothing.
        """
        saver, other = self._begun().traker.saver, False
        if step in saver.ids():
            try:
                saver.check_checkpoint(step, model_digest(model))
            except StoreMismatchError:
                other = True
        # All must know before one of them sets anything aside.
        facts = other, names_aside([step])
        every = self._begun().traker.ranks.all_gather("TRAKCallback", facts)
        return every[0][1] if any(found for found, _ in every) else {}

    def _write_steps(self) -> None:
        """Say in save_dir which steps the training was featurized at."""
        if self._begun().traker.ranks.first:
            make_dir(self.save_dir)
            write_json(self.save_dir / STEPS, {"steps": self.steps})

    def _steps_on_disk(self) -> list[int]:
        """The steps that save_dir says a training was featurized at."""
        path = self.save_dir / STEPS
        return list(read_json(path)["steps"]) if path.exists() else []

    def _begun(self) -> HFTRAKer:
        if self.traker is None:
            raise NotReadyError(
                "TRAKCallback: the training has not begun; expected Trainer(..., callbacks=[...]) "
                "with this callback, and trainer.train()"
            )
        return self.traker


def check_whole(args: Any, model: nn.Module) -> None:
    """Raise ValueError where processes hold shards of the model."""
    of = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    of += sharded_by(model)
    if of:
        raise ValueError(
            f"TRAKCallback: received a training with {of[0]}, where no process holds the whole "
            "model; expected DDP or one process, or, after the training, HFTRAKer(model, train, "
            "checkpoints=...) with the checkpoints that it saved"
        )
