"""One small model of each family that TRAK is used on, from its configuration, with a batch.

Weights are random and at least as large as those of a trained model, so that gradients of all
layers are far from zero. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.trak import CausalLMModelOutput, CLIPModelOutput, Seq2SeqModelOutput
from fastproj.trak.tasks import TASKS

VOCABULARY = 40
SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


class Family(NamedTuple):
    """A model in eval mode, the task, and n samples as (function of n)."""

    model: nn.Module
    task: Any
    data: Callable[[int], Any]


class Block(nn.Module):
    """Two convolutions with batch norm and ReLU in place, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)), inplace=True)
        h = self.norm2(self.conv2(h))
        h += self.shortcut(x)
        return F.relu(h, inplace=True)


class ResNet(nn.Module):
    """Two residual blocks on images [B, 3, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, 4, 1), Block(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


def generator(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def images(n: int, size: int = 8) -> Tensor:
    return torch.randn(n, 3, size, size, generator=generator(n))


def ids(n: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=generator(n + seed))


def lengths_mask(n: int, length: int) -> Tensor:
    """1 for the first tokens, 0 for padding; another length for each sample."""
    return (torch.arange(length) < 2 + torch.arange(n).unsqueeze(1) % (length - 1)).long()


def classes(n: int) -> Tensor:
    return torch.randint(0, 5, (n,), generator=generator(n + 100))


def grown(model: nn.Module) -> nn.Module:
    """The model in eval mode, its weights random and not small, running statistics not initial."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            nn.init.normal_(p, std=0.25)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
        else:
            p.data += 0.1 * torch.randn_like(p)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(std=0.1)
        elif name.endswith("running_var"):
            b.uniform_(0.5, 1.5)
    return model.eval()


def resnet() -> Family:
    return Family(grown(ResNet()), "image_classification", lambda n: (images(n), classes(n)))


def vit() -> Family:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SHAPE, image_size=8, patch_size=4, num_labels=5)
    return Family(
        grown(ViTForImageClassification(config)),
        "image_classification",
        lambda n: {"pixel_values": images(n), "labels": classes(n)},
    )


def bert() -> Family:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=VOCABULARY, **SHAPE, max_position_embeddings=12, num_labels=5)

    def data(n: int) -> tuple[Tensor, ...]:
        mask = lengths_mask(n, 7)
        return ids(n, 7) * mask, (torch.arange(7) > 3).long().expand(n, 7), mask, classes(n)

    return Family(grown(BertForSequenceClassification(config)), "text_classification", data)


def clip() -> Family:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config={
            **SHAPE,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 12,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**SHAPE, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    model = grown(CLIPModel(config))

    def data(n: int) -> dict[str, Tensor]:
        mask = lengths_mask(n, 6)
        text = ids(n, 6).masked_fill(mask == 0, 2)
        text[torch.arange(n), mask.sum(1) - 1] = 2  # the end of each text
        return {"input_ids": text, "attention_mask": mask, "pixel_values": images(n)}

    task = CLIPModelOutput(simulated_batch_size=10)
    task.get_embeddings(model, [data(8), data(9)])
    return Family(model, task, data)


def mt5() -> Family:
    from transformers import MT5Config, MT5ForConditionalGeneration

    config = MT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )

    def data(n: int) -> dict[str, Tensor]:
        mask = lengths_mask(n, 7)
        labels = ids(n, 5, seed=1).masked_fill(lengths_mask(n, 5).flip(0) == 0, -100)
        return {"input_ids": ids(n, 7) * mask, "attention_mask": mask, "labels": labels}

    return Family(grown(MT5ForConditionalGeneration(config)), Seq2SeqModelOutput(), data)


def gpt2() -> Family:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=24,
        n_positions=12,
        bos_token_id=1,
        eos_token_id=1,
    )

    def data(n: int) -> tuple[Tensor, Tensor]:
        mask = lengths_mask(n, 7)
        return ids(n, 7) * mask, mask

    return Family(grown(GPT2LMHeadModel(config)), CausalLMModelOutput("mean"), data)


FAMILIES: dict[str, Callable[[], Family]] = {
    "resnet": resnet,
    "vit": vit,
    "bert": bert,
    "clip": clip,
    "mt5": mt5,
    "gpt2": gpt2,
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Family:
    """A family by name, in a dtype."""
    torch.manual_seed(0)  # grown() adds to some parameters
    family = FAMILIES[name]()
    family.model.to(dtype)
    task = TASKS[family.task]() if isinstance(family.task, str) else family.task

    def data(n: int) -> Any:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        batch = family.data(n)
        if isinstance(batch, dict):
            return {key: cast(t) for key, t in batch.items()}
        return tuple(cast(t) for t in batch)

    if isinstance(task, CLIPModelOutput):
        task.get_embeddings(family.model, [data(8), data(9)])
    return Family(family.model, task, data)
