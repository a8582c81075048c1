"""trak 0.3.2: TRAKer.featurize with its BasicProjector, whole gradients by torch.func.

Compared: the same call as fastproj's, features of the same K, on disk. In float32: its float16 is
far slower on a CPU. One call counts, and none comes before it: the matrix of a model of this size
is drawn anew in each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.featurization.job import Job, Prepared
from bench.featurization.workloads import logits_of, losses_of
from fastproj.trak.gradients.attention import plain_attention


def prepare(job: Job) -> Prepared:
    """trak.TRAKer with a task for any of the workloads: log(p / (1 - p)), summed over tokens."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    names = list(job.first)

    class Margins(AbstractModelOutput):
        def __init__(self) -> None:
            """trak wants one."""

        @staticmethod
        def get_output(model: Any, weights: Any, buffers: Any, *sample: Tensor) -> Tensor:
            batch = {name: part.unsqueeze(0) for name, part in zip(names, sample, strict=True)}
            logits = torch.func.functional_call(Logits(model), rename(weights, buffers), (batch,))
            return margin(logits, batch["labels"])

        @staticmethod
        def get_out_to_loss_grad(model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            parts = dict(zip(names, batch, strict=True))
            return 1 - torch.exp(-losses_of(model, parts)).unsqueeze(-1)

    traker = TRAKer(
        model=job.model,
        task=Margins(),
        train_set_size=job.count,
        proj_dim=job.proj_dim,
        save_dir=job.folder,
        device="cpu",
        use_half_precision=False,
        logging_level="ERROR",
    )
    traker.load_checkpoint(job.model.state_dict(), model_id=0)

    def call(batch: dict[str, Tensor]) -> None:
        with plain_attention(job.model):  # what torch.func can follow
            traker.featurize(tuple(batch.values()), num_samples=len(batch["labels"]))

    return Prepared(call, job.proj_dim, warm_up=0, repeats=1)


class Logits(torch.nn.Module):
    """A model called on a dict, for functional_call."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return logits_of(self.model, batch)


def rename(*parts: Any) -> dict[str, Tensor]:
    """The tensors of a model, by their names in ``Logits``."""
    return {f"model.{name}": value for part in parts for name, value in part.items()}


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """trak's correct-class margin of one sample; of a sequence, the sum of its tokens'."""
    if labels.dim() > 1:
        logits, labels = logits[:, :-1], labels[:, 1:]
    own = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, labels.unsqueeze(-1), float("-inf"))
    return (own - others.logsumexp(-1)).sum()
