"""EK-FAC without projection, by kronfluence, where it is installed (arXiv 2308.03296)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import TensorDataset

from bench.battery.problem import Batch, Classes, Labels, Regression
from bench.battery.providers.job import Floats, Found, Job, Unsupported

SWEEP = (None, 1e-8, 1e-6, 1e-4, 1e-2)  # damping; None is kronfluence's own, 0.1 of the mean


def scores(job: Job) -> Iterator[Found]:
    """ "ekfac" with kronfluence's damping and "ekfac_sweep" over others.

    It sees linear layers only: embeddings, norms and places have no say.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError as error:
        raise Unsupported(f"ekfac: {error}") from error
    problem = job.problem
    warnings.simplefilter("ignore", FutureWarning)  # kronfluence's, of torch.cuda.amp
    torch.manual_seed(0)  # of the labels that are drawn
    task = make_task(job)
    train, targets = TensorDataset(*problem.samples), TensorDataset(*problem.targets)

    def arrays(number: int) -> list[Floats]:
        model = problem.model().eval()
        model.load_state_dict(job.checkpoints[number])
        analyzer = Analyzer(
            f"checkpoint{number}",
            prepare_model(model, task),
            task,
            cpu=True,
            output_dir=job.folder,
            disable_tqdm=True,
            log_level=40,
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
        analyzer.fit_all_factors(
            "factors",
            train,
            per_device_batch_size=100,
            factor_args=FactorArguments("ekfac"),
            overwrite_output_dir=True,
        )
        made = []
        for place, damping in enumerate(SWEEP):
            arguments = ScoreArguments(damping_factor=damping)
            analyzer.compute_pairwise_scores(
                f"scores{place}",
                "factors",
                targets,
                train,
                per_device_query_batch_size=50,
                per_device_train_batch_size=100,
                score_args=arguments,
                overwrite_output_dir=True,
            )
            found = analyzer.load_pairwise_scores(f"scores{place}")["all_modules"]
            # It pairs with the gradient of the loss, minus that of the log-likelihood.
            made.append(-found.double().numpy().T)
        analyzer.compute_self_scores(
            "own", "factors", train, per_device_train_batch_size=100, overwrite_output_dir=True
        )
        return [analyzer.load_self_scores("own")["all_modules"].double().numpy(), *made]

    for count, (own, *made) in job.means(map(arrays, range(len(job.checkpoints)))):
        yield Found("ekfac", count, made[SWEEP.index(None)], own)
        for damping, found in zip(SWEEP, made, strict=True):
            yield Found("ekfac_sweep", count, found, setting=damping or 0.0)


def make_task(job: Job) -> Any:
    """kronfluence's view of the question: summed losses, drawn labels, the output."""
    from kronfluence.task import Task

    question = job.problem.question
    if not isinstance(question, Classes | Labels | Regression):
        raise Unsupported("ekfac: here it takes classes, labels and regression only")
    known: Classes | Labels | Regression = question

    class Asked(Task):
        def compute_train_loss(
            self, batch: Batch, model: nn.Module, sample: bool = False
        ) -> Tensor:
            return summed_loss(known, model, tuple(batch), sample)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return known.output(model, {}, tuple(batch)).sum()

    return Asked()


def summed_loss(
    question: Classes | Labels | Regression, model: nn.Module, batch: Batch, drawn: bool
) -> Tensor:
    """The loss of a batch, a scalar; with labels drawn from the model where ``drawn``."""
    if isinstance(question, Regression):
        predicted = question.output(model, {}, batch)
        labels = torch.normal(predicted.detach(), 1.0) if drawn else batch[1]
        return (predicted - labels).square().sum() / 2
    if isinstance(question, Labels):
        if drawn:
            logits = functional_call(model, {}, batch[0]).detach()
            batch = (batch[0], torch.bernoulli(logits.sigmoid()))
        return -question.likelihood(model, {}, batch).sum()
    logits, labels, counts = question.logits(model, {}, batch)
    if drawn:
        labels = torch.distributions.Categorical(logits=logits.detach()).sample()
    logs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -logs.where(counts, 0.0).sum()
