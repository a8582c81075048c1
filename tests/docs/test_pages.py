"""The Python of docs/trak.md runs, each block on stand-ins for the names that its reader has."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastproj
from tests import ROOT

DOCS = ROOT / "docs"
TEXT = (DOCS / "trak.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
RECIPE = """
def train(indices, seed):
    return indices.sum()

def outputs(total):
    return [float(total), float(total % 7)]
"""

Scope = dict[str, Any]


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(3, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=generator), labels)


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))


def vision() -> Scope:
    model, train_set, targets = classifier(), images(12), images(5)
    return {
        "model": model,
        "train_set": train_set,
        "train_loader": DataLoader(train_set, batch_size=5),
        "targets": targets,
        "target_loader": DataLoader(targets, batch_size=5),
        "checkpoints": [model.state_dict(), classifier().state_dict()],
    }


def own_task() -> Scope:
    return {
        "TRAKer": fastproj.TRAKer,
        "torch": torch,
        "model": torch.nn.Linear(4, 1),
        "n": 6,
        "log_odds": lambda model, batch: model(batch[0]).squeeze(1),
    }


def gpt2() -> Scope:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    stand_in = types.SimpleNamespace(
        from_pretrained=lambda name: transformers.GPT2LMHeadModel(config).eval()
    )
    ids = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "AutoModelForCausalLM": stand_in,
        "TRAKer": fastproj.TRAKer,
        "texts": range(4),
        "loader": [batch],
    }


def stopped() -> Scope:
    train_set, model = images(70), classifier()
    traker = fastproj.TRAKer(model, "image_classification", train_set_size=70, save_dir="run")
    traker.load_checkpoint(model.state_dict(), model_id=0)
    return {"traker": traker, "train_set": train_set, "DataLoader": DataLoader}


def finished() -> Scope:
    scope = vision()
    exec(BLOCKS[0], scope)
    return scope


def sharded() -> Scope:
    model = classifier()
    model(images(1).tensors[0]).sum().backward()
    return {"model": model, "projector": fastproj.Projector(16 * 3 + 3, 8)}


def retraining() -> Scope:
    Path("recipe.py").write_text(RECIPE, encoding="utf-8")
    return {"n": 20, "scores": np.random.default_rng(0).normal(size=(20, 2))}


def shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)


# What a block needs, and whether it did what the text beside it says.
CASES: list[tuple[str, Callable[[], Scope], Callable[[Scope], bool]]] = [
    ("from fastproj import TRAKer", vision, lambda s: shape(s["scores"]) == (12, 5)),
    ("squared_error", own_task, lambda s: callable(s["task"].get_output)),
    ("AutoModelForCausalLM", gpt2, lambda s: s["traker"].remaining_batches(4) == []),
    ("remaining_batches", stopped, lambda s: s["traker"].remaining_batches(64) == []),
    ("top_k=", finished, lambda s: shape(s["top"].helpful_indices) == (5, 12)),
    ("project_sharded", sharded, lambda s: shape(s["features"]) == (1, 8)),
    ("def train(", dict, lambda s: callable(s["train"])),
    ("train_subsets", retraining, lambda s: s["truth"].masks.shape == (100, 20)),
]


def test_every_block_has_a_case() -> None:
    assert len(BLOCKS) == len(CASES)
    for block, (words, *_) in zip(BLOCKS, CASES, strict=True):
        assert words in block


@pytest.mark.parametrize("index", range(len(CASES)), ids=[words for words, *_ in CASES])
def test_block(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, prepare, holds = CASES[index]
    scope = prepare()
    exec(compile(BLOCKS[index], "docs/trak.md", "exec"), scope)
    assert holds(scope)


def test_links_lead_somewhere() -> None:
    for page in (DOCS.parent / "README.md", DOCS.parent / "CHANGELOG.md", *DOCS.glob("*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]
                assert anchor in slugs, f"{page.name}: {link}"
