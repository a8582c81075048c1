"""A small training by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.trak.hf import models

SAMPLES = 24
BATCH = 4
STEPS = 6  # an epoch


def collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    lists = [torch.tensor(sample["input_ids"]) for sample in samples]
    ids = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=models.PAD)
    mask = (ids != models.PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train(
    folder: Path,
    callbacks: list[Any],
    resume: Path | None = None,
    seed: int = 0,
    adapters: bool = False,
    **settings: Any,
) -> Any:
    """The Trainer after two epochs; checkpoints are saved at steps 4, 8 and 12.

    There is dropout, so the training depends on random numbers and on modes of modules.
    """
    model = models.model_for("causal_lm", seed)
    assert model.config.resid_pdrop > 0
    if adapters:
        model = models.with_adapters(model, seed)
    chosen = {
        "per_device_train_batch_size": BATCH,
        "save_steps": 4,
        "max_steps": 2 * STEPS,
        **settings,
    }
    arguments = tf.TrainingArguments(
        str(folder),
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **chosen,
    )
    trainer = tf.Trainer(
        model,
        arguments,
        train_dataset=models.samples_for("causal_lm", SAMPLES),
        data_collator=collate,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, and what the optimizer keeps."""
    kept = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for number, entries in trainer.optimizer.state_dict()["state"].items():
        kept.update({f"{number}.{name}": torch.as_tensor(t) for name, t in entries.items()})
    return kept
