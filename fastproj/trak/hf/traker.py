"""HFTRAKer: from a transformers model, a tokenised data set and checkpoints to scores."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.checks import check_integer
from fastproj.memory import is_out_of_memory
from fastproj.trak.estimator import TRAKer
from fastproj.trak.gradients.base import REPEATED, TRAINABLE
from fastproj.trak.gradients.loop import IterativeGradientComputer
from fastproj.trak.hf.checkpoints import AS_IT_IS, kept_apart, numbered
from fastproj.trak.hf.collate import Collator
from fastproj.trak.hf.folders import Checkpoint, load_model, load_weights
from fastproj.trak.hf.heads import (
    check_adapters,
    has_adapters,
    kind_of_model,
    kind_of_task,
    task_for,
)
from fastproj.trak.hf.labels import labels_of
from fastproj.trak.hf.lengths import plan_batches
from fastproj.trak.hf.limits import positions_of
from fastproj.trak.hf.masking import Masking
from fastproj.trak.hf.samples import Samples
from fastproj.trak.inputs import MAX_BATCH
from fastproj.trak.precision import full_precision
from fastproj.trak.progress import progress
from fastproj.trak.store.store import check_exp_name
from fastproj.trak.tasks import resolve_task
from fastproj.trak.tasks.language import base_of

AUTO = "auto"
ROUNDING = 1000  # eps of an output may be rounding, where kernels add in another order

logger = logging.getLogger("fastproj.trak")


class HFTRAKer:
    """Scores of targets for a transformers model, its training set and its checkpoints.

        traker = HFTRAKer("run/checkpoint-300", train, ["run/checkpoint-100", "run/checkpoint-300"])
        scores = traker.score(targets)  # [n_train, n_targets]

    Samples are padded to few lengths and put into batches by length; scores are in the order of the
    data set. Everything is kept in ``save_dir``: a run that was stopped is repeated, and skips what
    is there. Processes of torchrun share the work (docs/running.md).

    Parameters
    ----------
    model : a transformers model, with or without peft's adapters, also one of ``torch.compile``
        (which runs as it was written), or the local folder of one. It is
        put into eval mode; its parameters become those of the checkpoint that was loaded last.
    train : the tokenised training set: a ``datasets.Dataset`` or another sequence of dicts, an
        iterable of dicts (which is read into memory), or what a tokenizer returns for a list of
        texts. A sample has "input_ids", and what else the model's forward takes; tokens at its ends
        that "attention_mask" hides are left out. "labels" (or "label") are the class; for language
        models the tokens to predict, with -100 where none counts. Without labels all tokens of a
        causal model count, and 15 % of the tokens of a masked one are hidden, for each sample the
        same each time.
    checkpoints : local folders of whole models or of adapters, or state_dicts, in a list (their
        model_ids are 0, 1, 2 ...) or in a dict by model_id; None is the model as it is. Tensors of
        a state_dict that are the model's own are copied.
    save_dir : where features and scores are kept.
    tokenizer : for the padding token, where the model's configuration has none, and the mask token.
    task : None is what the model's class is for: "causal_lm", "seq2seq", "text_classification",
        "token_classification", "masked_lm", or the regression of a classifier with one label.
        Otherwise as in ``TRAKer``: one of these with settings of its own, such as
        ``Seq2SeqModelOutput("mean")``, or another, whose batch is a dict of tensors and whose
        labels are of one shape in all samples, or one for each token.
    batch_size : samples at once.
    grad_wrt : as in ``TRAKer``; "auto" is "trainable" for a model with adapters, else all.
    options : other arguments of ``TRAKer``, such as proj_dim.

    Attributes
    ----------
    traker : the ``TRAKer``.

    Raises
    ------
    TypeError, ValueError, FileNotFoundError
        For a model, samples or folders that can't work.
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str],
        train: Any,
        checkpoints: Iterable[Checkpoint] | Mapping[int, Checkpoint] | None = None,
        save_dir: str | os.PathLike[str] = "./trak_results",
        *,
        tokenizer: Any = None,
        task: Any = None,
        batch_size: SupportsIndex = 16,
        grad_wrt: Iterable[str] | str | None = AUTO,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        logger.setLevel(options.get("logging_level", logging.INFO))
        self.batch_size = check_integer(name, "batch_size", batch_size, 1, MAX_BATCH)
        if not (task is None or isinstance(task, str)):
            task = resolve_task(task)
        self.kind = kind_of_task(task)
        model = getattr(model, "_orig_mod", model)  # inside of what torch.compile made
        self.model: Any = model if isinstance(model, nn.Module) else load_model(model, self.kind)
        check_adapters(name, self.model)
        self.checkpoints = kept_apart(name, self.model, numbered(name, checkpoints))
        self.tokenizer = tokenizer
        self.seed = options.get("projector_seed", 0)
        if task is None:
            self.kind = kind_of_model(name, self.model)
            task = task_for(name, self.model, self.kind)
        self.task = task
        self._pads_nothing = False
        self._train = self.collator("train", train)
        if grad_wrt == AUTO:
            grad_wrt = TRAINABLE if has_adapters(self.model) else None
        self.traker = TRAKer(
            self.model, task, len(self._train.samples), save_dir, grad_wrt=grad_wrt, **options
        )

    def featurize(self) -> None:
        """Featurize the training set under all checkpoints, and finalise; what is there is skipped.

        ``score`` does so too.
        """
        for model_id in self.checkpoints:
            self._featurize(model_id, self._weights(model_id))

    def score(
        self,
        targets: Any,
        exp_name: str = "targets",
        *,
        groups: Any = None,
        reduction: str = "sum",
        top_k: SupportsIndex | None = None,
    ) -> Any:
        """The scores of all training samples for each target; featurizes first what is not there.

        Parameters
        ----------
        targets : tokenised samples like those of the training set.
        exp_name : names this set of targets.
        groups, reduction : as in ``TRAKer.start_scoring_checkpoint``: one column for each group of
            targets.
        top_k : as in ``TRAKer.finalize_scores``: the extremes alone.

        Returns
        -------
        float32 [n_train, n_targets]: entry [i, j] > 0 where training sample i raises the output of
        target j. With ``top_k``: ``TopScores``.
        """
        check_exp_name(type(self).__name__, exp_name)
        collator = self.collator("targets", targets)
        for model_id in self.checkpoints:
            weights = self._weights(model_id)
            self._featurize(model_id, weights)
            self._score(model_id, weights, collator, exp_name, groups, reduction)
        return self.traker.finalize_scores(exp_name, list(self.checkpoints), top_k=top_k)

    def featurize_checkpoint(self, model_id: int, checkpoint: Checkpoint) -> None:
        """Featurize the training set under one checkpoint, and finalise its features.

        For checkpoints that come one by one. ``score_checkpoint`` does the same for targets, and
        ``traker.finalize_scores`` makes scores of all.
        """
        self._featurize(model_id, load_weights(self.model, checkpoint))

    def score_checkpoint(
        self,
        model_id: int,
        checkpoint: Checkpoint,
        targets: Any,
        exp_name: str = "targets",
        *,
        groups: Any = None,
        reduction: str = "sum",
    ) -> None:
        """Compute and keep the features of targets under one checkpoint that was featurized.

        targets : as in ``score``, or what ``collator`` made of them.
        exp_name, groups, reduction : as in ``score``.
        """
        collator = self.collator("targets", targets)
        weights = load_weights(self.model, checkpoint)
        self._score(model_id, weights, collator, exp_name, groups, reduction)

    def collator(self, name: str, data: Any) -> Collator:
        """What makes batches of a data set.

        name : "train" | "targets".
        data : samples; or a collator, which is returned.
        """
        if isinstance(data, Collator):
            return data
        samples = Samples(type(self).__name__, name, data)
        masking = None
        if self.kind == "masked_lm" and labels_of(samples[0]) is None:
            masking = Masking(self.tokenizer, name, seed=self.seed)
        return Collator(samples, self.model, self.kind, self.task, self.tokenizer, masking, name)

    def _featurize(self, model_id: int, weights: Mapping[str, Any]) -> None:
        self.traker.load_checkpoint(weights, model_id)
        self._settle_padding(self._train)
        shapes = self._train.shapes
        drawn = self.traker.has_drawn_rows(np.arange(len(shapes)))
        keys = [(*shape, int(own)) for shape, own in zip(shapes, drawn, strict=True)]
        what = f"featurizing model_id {model_id}"
        self._pass(self._train, keys, self.traker.featurize, what)
        self.traker.finalize_features([model_id])

    def _score(
        self,
        model_id: int,
        weights: Mapping[str, Any],
        collator: Collator,
        exp_name: str,
        groups: Any,
        reduction: str,
    ) -> None:
        self.traker.start_scoring_checkpoint(
            exp_name,
            weights,
            model_id,
            len(collator.samples),
            groups=groups,
            reduction=reduction,
        )
        self._settle_padding(collator)
        what = f"scoring model_id {model_id}"
        self._pass(collator, collator.shapes, self.traker.score, what)

    def _settle_padding(self, collator: Collator) -> None:
        """Pad nothing where padding changes the outputs of samples: some models take no mask, or
        read the class off the last token. This is looked at once, with the most padded samples.
        """
        if collator.settled:
            return
        collator.settled = True
        if self._pads_nothing:
            collator.pad_nothing()
            return
        indices = collator.most_padded(REPEATED)
        try:
            pairs = [
                (self._output(collator.batch([index])), self._output(collator.unpadded(index)))
                for index in indices
            ]
        except Exception as error:  # the pass says what is wrong
            if is_out_of_memory(error):
                raise
            return
        eps = max(
            torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point()
        )
        share = min(ROUNDING * max(eps, torch.finfo(torch.float32).eps), 0.1)
        largest = max(abs(f) for pair in pairs for f in pair)
        for index, (padded, own) in zip(indices, pairs, strict=True):
            if abs(padded - own) > share * largest:
                logger.warning(
                    "%s: padding changes what %s makes of a sample (the output of sample %d of %s "
                    "is %.6g with it, %.6g without), so no sample is padded: those of one length "
                    "alone share batches",
                    type(self).__name__,
                    type(base_of(self.model)).__name__,
                    index,
                    collator.name,
                    padded,
                    own,
                )
                self._pads_nothing = True
                collator.pad_nothing()
                return

    def _output(self, batch: Mapping[str, Tensor]) -> float:
        """f of the sample of a batch of one, under the weights that are loaded."""
        device = self.traker.device
        computer = IterativeGradientComputer(
            self.model, self.traker.task, device=device, grad_wrt=self.traker.gradient_names
        )
        parts = ({name: part.to(device) for name, part in batch.items()},)
        with torch.no_grad(), full_precision(), torch.autocast(device.type, enabled=False):
            return float(computer.output_alone(computer.chosen, parts))

    def _pass(
        self,
        collator: Collator,
        keys: list[tuple[int, ...]],
        use: Callable[..., object],
        what: str,
    ) -> None:
        """Give all batches to ``use``, which skips what is there or another process's turn, and
        warns where what is there was of other data.

        Every process gives the same ones: those of a training wait for each other elsewhere, too,
        so none may have to wait here for one that has nothing to do.
        """
        batches = plan_batches(keys, collator.lengths, self.batch_size)
        with progress(what, len(keys), "sample") as bar:
            for batch in batches:
                made = collator.batch(batch)
                try:
                    use(made, inds=batch)
                except (IndexError, RuntimeError) as error:
                    # Models differ in what PyTorch raises then; our own errors are of other types.
                    if type(error) in (IndexError, RuntimeError) and not is_out_of_memory(error):
                        self._say_if_too_long(collator, batch, error)
                    raise
                bar.update(len(batch))

    def _say_if_too_long(self, collator: Collator, batch: list[int], error: Exception) -> None:
        """Raise ValueError where a batch is padded to more tokens than the model has positions for.

        The sample that is so long may be in another batch: samples are padded to a few lengths.
        """
        most = positions_of(self.model)
        padded = max(max(collator.shapes[index]) for index in batch)
        if most is not None and padded > most:
            longest = max(range(len(collator.lengths)), key=lambda i: max(collator.lengths[i]))
            tokens = max(collator.lengths[longest])
            raise ValueError(
                f"{type(self).__name__}: sample {longest} of {collator.name} has {tokens} tokens, "
                f"for which the model has no positions; expected at most {most}: texts cut by "
                f"fastproj.trak.hf.tokenize(..., max_length={most}) (--max-length {most}), or "
                "tokenised samples that are shorter"
            ) from error

    def _weights(self, model_id: int) -> Mapping[str, Any]:
        """The state_dict of a checkpoint."""
        checkpoint = self.checkpoints[model_id]
        if checkpoint is AS_IT_IS:
            return self.model.state_dict()
        return load_weights(self.model, checkpoint)
