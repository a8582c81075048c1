"""Data selection for a language model: which training texts are worth training on, for a task?

    python examples/data_selection.py

In the manner of LESS (arXiv 2402.04333): train LoRA adapters on a few texts of a mixed pool, score
every text of the pool by a handful of examples of the task, train new adapters on those with the
highest scores, and compare with a random choice of as many. LESS compares gradients of adapters by
their cosine, after Adam's scaling; here the scores are TRAK's, a Newton step to the mean of the
examples. docs/huggingface.md says what differs.

The texts are what Python ships: sentences of its manual and of docstrings, names of characters,
and lines of code. The task is code. Needs transformers and peft, and no network.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import random
import re
import statistics
import sysconfig
import tempfile
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastproj.trak.hf import HFTRAKer

LENGTH = 24  # words of a text, at most
PAD, EDGE, UNKNOWN = 0, 1, 2  # token numbers
WORDS = 1000  # that have a number
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

Samples = list[dict[str, list[int]]]


# ---- texts --------------------------------------------------------------------------------------


def prose() -> list[str]:
    """Sentences of docstrings of Python's standard library."""
    found = []
    for path in sorted(LIBRARY.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                for sentence in re.split(r"(?<=[.!?])\s+", text):
                    if re.fullmatch(r"[A-Z][\w\s,;'-]*[.!?]", sentence):
                        found.append(" ".join(re.findall(r"\w+|[^\w\s]", sentence.lower())))
    return found


def characters() -> list[str]:
    """Names of characters, such as "greek small letter alpha with tonos"."""
    names = (unicodedata.name(chr(code), "") for code in range(0x80, 0x2000))
    return [" ".join(re.findall(r"\w+", name.lower())) for name in names if name]


def code() -> list[str]:
    """Lines of the standard library's code, as tokens."""
    found = []
    for name in ("argparse", "inspect", "statistics", "subprocess", "tarfile"):
        with tokenize.open(LIBRARY / f"{name}.py") as file:
            words: list[str] = []
            for token in tokenize.generate_tokens(file.readline):
                if token.type in (tokenize.NEWLINE, tokenize.NL):
                    found.append(" ".join(words).lower())
                    words = []
                elif token.type not in (tokenize.COMMENT, tokenize.STRING):
                    words += token.string.split()
    return found


def few(texts: Iterable[str], count: int, seed: int = 0) -> list[str]:
    """``count`` different texts of 4 to LENGTH words."""
    fitting = [text for text in dict.fromkeys(texts) if 4 <= len(text.split()) <= LENGTH]
    return random.Random(seed).sample(fitting, count)


def numbered(texts: list[str], vocabulary: dict[str, int]) -> Samples:
    """Texts as samples of token numbers."""
    return [
        {"input_ids": [EDGE, *(vocabulary.get(word, UNKNOWN) for word in text.split()), EDGE]}
        for text in texts
    ]


# ---- models -------------------------------------------------------------------------------------


def batch_of(samples: Samples) -> dict[str, Tensor]:
    """Samples padded on the right, as the model takes them."""
    length = max(len(sample["input_ids"]) for sample in samples)
    ids = torch.full((len(samples), length), PAD)
    for row, sample in zip(ids, samples, strict=True):
        row[: len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
    mask = ids != PAD
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


def train(
    model: Any, samples: Samples, epochs: int, learning_rate: float, seed: int
) -> list[dict[str, Tensor]]:
    """Train what has requires_grad; returns the state after each half of the epochs."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate)
    model.train()
    states = []
    for epoch in range(epochs):
        for rows in torch.randperm(len(samples), generator=generator).split(16):
            loss = model(**batch_of([samples[i] for i in rows])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch + 1 in (epochs // 2, epochs):
            states.append({name: t.clone() for name, t in model.state_dict().items()})
    return states


def make_base(vocabulary_size: int) -> GPT2LMHeadModel:
    """A GPT-2 of about 150,000 parameters."""
    config = GPT2Config(
        vocab_size=vocabulary_size,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=LENGTH + 2,
        bos_token_id=EDGE,
        eos_token_id=EDGE,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


def with_adapters(base: GPT2LMHeadModel, seed: int) -> Any:
    """A copy of the base model with new LoRA adapters, which alone are trained."""
    model = GPT2LMHeadModel(base.config)
    model.load_state_dict(base.state_dict())
    torch.manual_seed(seed)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def loss_after(base: GPT2LMHeadModel, chosen: Samples, test: Samples, seed: int) -> float:
    """The loss on ``test`` after training adapters on ``chosen``."""
    model = with_adapters(base, seed)
    train(model, chosen, epochs=8, learning_rate=3e-3, seed=seed)
    model.eval()
    with torch.no_grad():
        return float(model(**batch_of(test)).loss)


def main() -> None:
    """Warm up, score, select, train again, compare."""
    parser = argparse.ArgumentParser(description="Data selection in the manner of LESS.")
    parser.add_argument("--out", default=None, help="keep features and scores here")
    parser.add_argument("--pool", type=int, default=800, help="texts to select from")
    parser.add_argument("--share", type=float, default=0.05, help="of the pool to select")
    parser.add_argument("--epochs", type=int, default=4, help="of the base model and the warm-up")
    parser.add_argument("--seeds", type=int, default=4, help="trainings on each selection")
    parser.add_argument("--proj-dim", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)  # for tensors as small as these, waiting for others takes longer

    # The task: ten examples to select by, and texts to test on.
    lines = few(code(), 10 + 100 + 100 + options.pool // 20)
    examples, test, known, hidden = cut(lines, 10, 100, 100)
    known_prose, other_prose = cut(few(prose(), 200 + options.pool // 2), 200)
    known_names, other_names = cut(few(characters(), 200 + options.pool // 2), 200)
    pool = [*hidden, *other_prose, *other_names][: options.pool]
    random.Random(0).shuffle(pool)
    is_code = np.array([text in set(hidden) for text in pool])
    known = [*known, *known_prose, *known_names]
    counts = Counter(word for text in (*known, *pool) for word in text.split())
    vocabulary = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS), UNKNOWN + 1)}

    # A base model that knows a little of everything, and adapters warmed up on a tenth of the pool.
    base = make_base(len(vocabulary) + UNKNOWN + 1)
    train(base, numbered(known, vocabulary), 2 * options.epochs, 3e-3, seed=0)
    samples, tests = numbered(pool, vocabulary), numbered(test, vocabulary)
    model = with_adapters(base, seed=0)
    some = random.Random(1).sample(samples, max(len(samples) // 10, 1))
    checkpoints = train(model, some, options.epochs, 3e-3, seed=0)

    # Scores of the pool, for the mean of the examples: one column.
    traker = HFTRAKer(
        model,
        samples,
        checkpoints,
        save_dir=options.out or tempfile.mkdtemp(),
        proj_dim=options.proj_dim,
        batch_size=32,
    )
    targets = numbered(examples, vocabulary)
    groups = [0] * len(targets)
    scores = traker.score(targets, "examples", groups=groups, reduction="mean")[:, 0]
    print(f"scores [{len(scores)}, 1]; the most helpful texts of the pool:")
    order = np.argsort(-scores)
    for row in order[:5]:
        print(f"  {scores[row]:+8.3f}  {pool[row]!r}")

    size = max(int(options.share * len(pool)), 1)
    draw = [np.random.default_rng(seed).permutation(len(pool)) for seed in range(options.seeds)]
    by_cosine = np.argsort(-cosines(traker, len(checkpoints), "examples"))
    compare = {
        "selected": [order[:size]] * options.seeds,
        "cosine": [by_cosine[:size]] * options.seeds,
        "random": [rows[:size] for rows in draw],
    }
    print(f"loss on {len(test)} lines of code after training on {size} texts of {len(pool)}:")
    for name, selections in compare.items():
        losses = [
            loss_after(base, [samples[i] for i in rows], tests, seed)
            for seed, rows in enumerate(selections)
        ]
        share = np.mean([is_code[rows].mean() for rows in selections])
        print(
            f"  {name:9s}{statistics.mean(losses):.3f} (from {min(losses):.3f} to "
            f"{max(losses):.3f} with {options.seeds} seeds); {share:.0%} of the texts are code"
        )
    everything = loss_after(base, samples, tests, seed=0)
    print(f"  all      {everything:.3f}; {is_code.mean():.0%} of the texts are code")


def cosines(traker: HFTRAKer, checkpoints: int, exp_name: str) -> np.ndarray:
    """LESS's score but for Adam's scaling: the cosine of a text's features with the mean of the
    examples', averaged over checkpoints, [n].
    """
    total = np.zeros(traker.traker.train_set_size)
    for model_id in range(checkpoints):
        features = traker.traker.saver.matrix(model_id).float().numpy()  # [n, k]
        mean = traker.traker.saver.matrix(model_id, exp_name).float().numpy().mean(0)  # [k]
        total += features @ mean / np.linalg.norm(features, axis=1) / np.linalg.norm(mean)
    return total / checkpoints


def cut(texts: list[str], *sizes: int) -> list[list[str]]:
    """Parts of a list: of these sizes, and the rest."""
    places = [0, *np.cumsum(sizes).tolist(), len(texts)]
    return [texts[a:b] for a, b in itertools.pairwise(places)]


if __name__ == "__main__":
    main()
