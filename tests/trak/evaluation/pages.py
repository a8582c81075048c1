"""Reports of every kind, with made-up samples, for the tests of what they say and how they look."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fastproj.trak import lds
from fastproj.trak.evaluation.report import Page

N, M = 40, 6
FACTS = (
    "The heron stands in the shallow water and waits for small fish.",
    "A lighthouse keeper writes the weather into a ledger every morning.",
    "Copper turns green where rain and salt reach it for many years.",
    "She sold the bicycle, bought a kayak & never looked back <at> the road.",
)


def tokens(text: str) -> list[str]:
    """A text as a tokenizer cuts it: white space belongs to the token behind it."""
    return re.findall(r"\s*\w+|\s*[^\w\s]", text)


def passage(number: int) -> str:
    """A passage; every fifth is much longer than an excerpt."""
    return " ".join(FACTS[(number + i) % 4] for i in range(12 if number % 5 == 0 else 1))


def images(*, colour: bool = False, count: int = N) -> np.ndarray:
    shape = (count, 32, 48, 3) if colour else (count, 8, 8)
    return np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)


def scores() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, M)).astype(np.float32)


def image_page(**options: Any) -> Page:
    """Images with labels, notes, an LDS and facts: everything that the demo's page has."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(N, M)).astype(np.float32)
    masks = rng.random((30, N)) < 0.5
    measured = masks @ values + rng.normal(size=(30, M))
    return Page(
        **{
            "title": "A & B <c>",
            "scores": values,
            "targets": [4, 1],
            "top": 3,
            "train_images": rng.integers(0, 256, (N, 8, 8)).astype(np.uint8),
            "target_images": rng.random((M, 3, 5, 7)),
            "train_labels": [f"<{i}>" for i in range(N)],
            "target_labels": list(range(M)),
            "target_notes": ["a note & more"] * M,
            "lds": lds(values, masks, measured),
            "ceiling": 0.87,
            "facts": {"seed": 0, "model": "<net>"},
            "scatters": [("target 1", measured[:, 1], (masks @ values)[:, 1])],
            **options,
        }
    )


def text_page(**options: Any) -> Page:
    """Passages of tokens, with what each token adds."""
    rng = np.random.default_rng(2)
    texts = [tokens(passage(i)) for i in range(N)]
    weights = rng.normal(size=(M, N, max(map(len, texts)))) ** 3
    return Page(
        **{
            "title": "What a language model knows from where",
            "scores": scores(),
            "targets": [0, 3],
            "top": 4,
            "train_texts": texts,
            "target_texts": [f"Question {j}: {passage(j)}" for j in range(M)],
            "token_scores": weights,
            **options,
        }
    )


def pair_page(**options: Any) -> Page:
    """Image-text pairs."""
    return Page(
        **{
            "title": "Pairs",
            "intro": "Which captioned pictures make a model match this pair?",
            "scores": scores(),
            "targets": [2, 5, 0],
            "top": 3,
            "train_images": images(colour=True),
            "target_images": images(colour=True, count=M),
            "train_texts": [passage(i) for i in range(N)],
            "target_texts": [FACTS[j % 4] for j in range(M)],
            **options,
        }
    )


def table_page(**options: Any) -> Page:
    """Rows of a table wider than a phone."""
    rng = np.random.default_rng(3)
    columns = ["cylinders", "displacement", "horsepower", "weight", "acceleration", "year", "made"]
    rows = [[*map(float, rng.normal(100, 40, 6)), "<Kyoto>"] for _ in range(N + M)]
    return Page(
        **{
            "title": "Cars",
            "scores": scores(),
            "targets": [1, 2],
            "top": 3,
            "train_rows": rows[:N],
            "target_rows": rows[N:],
            "columns": columns,
            "train_labels": [f"{v:.0f} mpg" for v in rng.normal(25, 5, N)],
            **options,
        }
    )


PAGES = {"images": image_page, "text": text_page, "pairs": pair_page, "table": table_page}
