"""kronfluence 1.0: EK-FAC scores of a batch for one target.

Compared: Analyzer.compute_pairwise_scores of the batch and one query, with factors that were fitted
before on a batch: it keeps no features, so that each set of targets costs a pass like this one.
Linear layers and convolutions only, without the output layer of a language model, for which it
would need a matrix of words by words; its own examples leave that out, too.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.featurization.job import Job, Prepared
from bench.featurization.providers.layers import output_layer, samples_of, with_linear_layers
from bench.featurization.workloads import logits_of


def prepare(job: Job) -> Prepared:
    """An analyzer with its defaults."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    warnings.simplefilter("ignore", FutureWarning)

    copied = with_linear_layers(job.model)
    head = output_layer(copied)
    layers = [
        name
        for name, layer in copied.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer is not head
    ]

    class Asked(Task):
        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def compute_train_loss(
            self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            logits, labels = logits_of(model, batch), batch["labels"]
            if labels.dim() > 1:  # a token's prediction is of the next one
                logits, labels = logits[:, :-1], labels[:, 1:]
            if sample:
                labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Asked()
    model = prepare_model(copied, task)
    analyzer = Analyzer(
        "bench", model, task, cpu=True, output_dir=job.folder, disable_tqdm=True, log_level=40
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
    size = len(job.first["labels"])
    analyzer.fit_all_factors("factors", samples_of(job.first), per_device_batch_size=size)
    query = samples_of(job.first)[:1]

    def call(batch: dict[str, Tensor]) -> None:
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query,
            samples_of(batch),
            per_device_query_batch_size=1,
            per_device_train_batch_size=size,
            overwrite_output_dir=True,
        )

    return Prepared(call, 0, warm_up=1)
