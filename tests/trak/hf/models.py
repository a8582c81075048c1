"""Tiny transformers models, tokenizers and samples, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors

VOCABULARY = 64
WORDS = [f"w{i}" for i in range(VOCABULARY - 5)]
PAD, BOS, EOS, MASK, UNKNOWN = range(5)
LONGEST = 40
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": LONGEST,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": LONGEST,
    "pad_token_id": PAD,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": PAD,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
}


def tokenizer() -> Any:
    """Words "w0" ... by themselves, with an end after each text."""
    special = ["<pad>", "<s>", "</s>", "<mask>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


def token_lists(n: int, shortest: int = 4, longest: int = 30, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(shortest, longest + 1, n)
    return [draw.integers(5, VOCABULARY, length).tolist() for length in lengths]


def samples_for(kind: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Samples that go with a model of this kind."""
    draw = np.random.default_rng(seed + 1)
    samples: list[dict[str, Any]] = [{"input_ids": ids} for ids in token_lists(n, seed=seed)]
    targets = token_lists(n, 2, 9, seed + 2)
    for sample, target in zip(samples, targets, strict=True):
        if kind == "seq2seq":
            sample["labels"] = target
        elif kind == "text_classification":
            sample["label"] = int(draw.integers(3))
        elif kind == "regression":
            sample["label"] = float(draw.normal())
        elif kind == "token_classification":
            sample["labels"] = draw.integers(0, 4, len(sample["input_ids"])).tolist()
    return samples


def model_for(kind: str, seed: int = 0) -> Any:
    """A model in eval mode with random weights."""
    torch.manual_seed(seed)
    made = {
        "causal_lm": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
        "masked_lm": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
        "seq2seq": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "text_classification": lambda: tf.BertForSequenceClassification(
            tf.BertConfig(**BERT, num_labels=3)
        ),
        "regression": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_labels=1)),
        "token_classification": lambda: tf.BertForTokenClassification(
            tf.BertConfig(**BERT, num_labels=4)
        ),
    }
    return made[kind]().eval()


def with_adapters(model: Any, seed: int = 0, task_type: str = "CAUSAL_LM") -> Any:
    """LoRA adapters whose gradients are not zero."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type=task_type)
    adapted = get_peft_model(model, lora)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return adapted.eval()


def save_adapters(model: Any, seed: int, folder: Path) -> Path:
    """Other weights in the adapters of a model, saved; the model has them, too."""
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder)
    return folder
