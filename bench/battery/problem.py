"""A problem: training samples, targets, a model, its training, and what is asked of the model."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from fastproj.testbed.ensembles import Training, split
from fastproj.trak import (
    AbstractModelOutput,
    CLIPModelOutput,
    FunctionModelOutput,
    ImageClassificationModelOutput,
)
from fastproj.trak.tasks import margins

IGNORED = -100  # a label that does not count

Weights = Mapping[str, Tensor]
Batch = tuple[Tensor, ...]


class Question(ABC):
    """What a model is trained for and asked about, for batches of B samples.

    ``likelihood_differs``: whether scores are also held against the log-likelihood. Of one label
    it is a rising function of the output, and of a regression's prediction none at all.
    """

    likelihood_differs: bool = False

    @abstractmethod
    def output(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """f, [B]."""

    @abstractmethod
    def likelihood(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The log-likelihood of the labels, [B]."""

    def loss(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """What training minimises, a scalar."""
        return -self.likelihood(model, weights, batch).mean()

    @abstractmethod
    def task(self, base: type) -> Any:
        """What TRAKer takes, given fastproj's or trak's AbstractModelOutput."""

    def prepare(self, traker: Any, samples: Batch) -> None:  # noqa: B027
        """Called after each checkpoint that ``traker`` loads to featurize."""


class Classes(Question):
    """A label of C classes; of a sequence, one for each token, and -100 where none counts.

    A batch is the model's inputs and the labels. The output is the sum of log(p / (1 - p)).
    """

    def __init__(self, task: str, tokens: int = 1) -> None:
        self.name = task
        self.tokens = tokens  # the loss is per token of a sequence of this length
        self.likelihood_differs = tokens > 1

    def logits(
        self, model: nn.Module, weights: Weights, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [B, T, C], labels [B, T], which of them count [B, T]); T is 1 without tokens."""
        *inputs, labels = batch
        if self.name == "seq2seq":
            inputs.append(model.prepare_decoder_input_ids_from_labels(labels))  # type: ignore[operator]
        logits = functional_call(model, dict(weights), tuple(inputs))
        if self.name == "causal_lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if labels.dim() == 1:
            logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
        counts = labels != IGNORED
        return logits, labels.where(counts, 0), counts

    def output(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The sum of the tokens' margins, [B]."""
        logits, labels, counts = self.logits(model, weights, batch)
        return margins(logits, labels).where(counts, 0.0).sum(1)

    def likelihood(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The sum of log p, [B]."""
        logits, labels, counts = self.logits(model, weights, batch)
        found = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return found.where(counts, 0.0).sum(1)

    def loss(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Minus the mean log-likelihood, per token of a full sequence."""
        return -self.likelihood(model, weights, batch).mean() / self.tokens

    def task(self, base: type) -> Any:
        """The name."""
        return self.name


class Regression(Question):
    """A number: the output is the prediction, the loss half of the squared error."""

    def output(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The prediction, [B]."""
        return functional_call(model, dict(weights), batch[0]).squeeze(-1)

    def likelihood(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Minus half of the squared error, [B]."""
        return -(self.output(model, weights, batch) - batch[1]).square() / 2

    def task(self, base: type) -> Any:
        """The task whose loss is half of the squared error: Q is the residual."""
        if issubclass(AbstractModelOutput, base):
            return FunctionModelOutput(
                lambda model, batch: model(batch[0]).squeeze(-1),
                likelihood=lambda f, batch: -0.5 * (batch[1] - f) ** 2,
            )

        class SquaredError(base):
            def __init__(self) -> None:
                """trak wants one."""

            @staticmethod
            def get_output(model: Any, weights: Any, buffers: Any, x: Tensor, _: Tensor) -> Tensor:
                return functional_call(model, (weights, buffers), (x.unsqueeze(0),)).reshape(())

            @staticmethod
            def get_out_to_loss_grad(
                model: Any, weights: Any, buffers: Any, batch: Batch
            ) -> Tensor:
                predicted = functional_call(model, (weights, buffers), (batch[0],)).detach()
                return batch[1].unsqueeze(1) - predicted

        return SquaredError()


class Labels(Question):
    """Any of L labels at once, 0 or 1 each: the output is the sum of the right answers' log-odds.

    The loss is the mean over the labels, as ``torch.nn.BCEWithLogitsLoss`` has it.
    """

    likelihood_differs = True

    def log_odds(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Those of each right answer, [B, L]."""
        logits = functional_call(model, dict(weights), batch[0])
        return logits.where(batch[1] == 1, -logits)

    def output(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Their sum, [B]."""
        return self.log_odds(model, weights, batch).sum(1)

    def likelihood(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The sum of log p, [B]."""
        return -softplus(-self.log_odds(model, weights, batch)).sum(1)

    def loss(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Minus the mean log-likelihood of a label."""
        return -self.likelihood(model, weights, batch).mean() / batch[1].shape[1]

    def task(self, base: type) -> Any:
        """The task of images with any number of labels, which trak hasn't."""
        return ImageClassificationModelOutput(multilabel=True)


class Pairs(Question):
    """Images and texts that belong together, told apart from those of the pairs ``others``.

    The output and the choice of the others are those of ``fastproj.trak.CLIPModelOutput``. The
    model gives (image embeddings, text embeddings, scale).
    """

    likelihood_differs = True

    def __init__(self, samples: Batch, size: int) -> None:
        self.size = size
        chosen = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(0))[:size]
        self.others = tuple(part[chosen.sort().values] for part in samples)

    def distances(
        self, model: nn.Module, weights: Weights, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(other texts, other images: similarities less the pair's own, [B, S]; the scale)."""
        u, v, scale = functional_call(model, dict(weights), batch)
        other_u, other_v, _ = functional_call(model, dict(weights), self.others)
        own = (u * v).sum(1, keepdim=True)
        return u @ other_v.mT - own, v @ other_u.mT - own, scale

    def output(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """TRAK's output function of CLIP, [B]."""
        texts, images, _ = self.distances(model, weights, batch)
        return -texts.logsumexp(1) - images.logsumexp(1)

    def likelihood(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """The mean log-probability of the right text and of the right image, [B]."""
        texts, images, scale = self.distances(model, weights, batch)
        lost = [nn.functional.softplus((scale * d).logsumexp(1)) for d in (texts, images)]
        return -(lost[0] + lost[1]) / 2

    def loss(self, model: nn.Module, weights: Weights, batch: Batch) -> Tensor:
        """Cross-entropy of the pairs among those of the batch, both ways."""
        u, v, scale = functional_call(model, dict(weights), batch)
        logits = scale * u @ v.mT
        return -(logits.log_softmax(0) + logits.log_softmax(1)).diagonal().mean() / 2

    def task(self, base: type) -> Any:
        """fastproj's task."""
        return CLIPModelOutput(simulated_batch_size=self.size, seed=0)

    def prepare(self, traker: Any, samples: Batch) -> None:
        """Embed the others."""
        traker.task.get_embeddings(traker.model, [samples], size=len(samples[0]))


@dataclass(frozen=True)
class Problem:
    """Training samples and targets, the model, its training and the question.

    Attributes
    ----------
    samples, targets : the parts of a batch, each [n, ...] and [m, ...].
    held_out : no rule may be chosen by it.
    language : a language model, whose results are also summed apart.
    retrainings : of each random half, whose mean is the truth.
    wrong : bool [n], which labels are wrong.
    facts : bool [n, m], whether a training sample states the fact that a target asks for.
    words : the samples and the targets in words, for BM25.
    """

    name: str
    samples: Batch
    targets: Batch
    model: Callable[[], nn.Module]
    training: Training
    question: Question = field(default=Classes("image_classification"), repr=False)
    held_out: bool = False
    language: bool = False
    retrainings: int = 2
    wrong: Tensor | None = None
    facts: Tensor | None = None
    words: tuple[list[list[str]], list[list[str]]] | None = field(default=None, repr=False)

    @property
    def n(self) -> int:
        """The number of training samples."""
        return len(self.samples[0])

    @property
    def m(self) -> int:
        """The number of targets."""
        return len(self.targets[0])

    def with_training(self, **changes: float) -> Problem:
        """The same problem, trained differently."""
        return replace(self, training=replace(self.training, **changes))  # type: ignore[arg-type]

    def with_wrong_labels(self, share: float, classes: int) -> Problem:
        """The same problem with a share of the training labels changed to another class."""
        draw = torch.Generator().manual_seed(7)
        *inputs, y = self.samples
        wrong = torch.zeros(self.n, dtype=torch.bool)
        wrong[torch.randperm(self.n, generator=draw)[: round(share * self.n)]] = True
        other = (y + torch.randint(1, classes, y.shape, generator=draw)) % classes
        return replace(self, samples=(*inputs, y.where(~wrong, other)), wrong=wrong)

    def fingerprint(self) -> str:
        """Changes with the data, the size of the model and the training."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (*self.samples, *self.targets):
            digest.update(part.contiguous().numpy().tobytes())
        shapes = [[name, list(p.shape)] for name, p in self.model().named_parameters()]
        digest.update(json.dumps([self.name, shapes, asdict(self.training)]).encode())
        return digest.hexdigest()


def separate(x: Tensor, y: Tensor, n: int, targets: int, seed: int) -> tuple[Batch, Batch]:
    """(n random samples to train on, ``targets`` others): x and y of each."""
    train_x, train_y, target_x, target_y = split(x, y, n, targets, seed)
    return (train_x, train_y), (target_x, target_y)
