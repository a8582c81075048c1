"""Passages of a report: texts in excerpts, with the tokens that matter marked."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Passage = str | Sequence[str]  # a text, or its tokens, which make the text one after another
Weights = npt.NDArray[np.float64]

EXCERPT_TOKENS = 60
EXCERPT_CHARACTERS = 300
WHOLE_CHARACTERS = 20_000  # of a passage behind its excerpt
LEVELS = 4  # shades of marked tokens
FAINTEST = 0.15  # share of the largest weight from which a token is marked
NAMED = 3  # tokens that are named below a passage


def render_passage(passage: Passage, weights: Weights | None = None, largest: float = 0.0) -> str:
    """A passage as HTML.

    weights : [tokens], what each token adds to the score; the passage must then be tokens.
    largest : the weight that has the darkest mark.
    """
    text = passage if isinstance(passage, str) else "".join(passage)
    if isinstance(passage, str) or weights is None or not largest > 0:
        shown, cut = excerpt_of_text(text)
        inner = html.escape(shown) + ("…" if cut else "")
        return paragraph(inner) + (whole(text) if cut else "")
    start, stop = excerpt_of_tokens(weights)
    inner = marked(passage[start:stop], weights[start:stop], largest)
    inner = ("…" if start else "") + inner + ("…" if stop < len(passage) else "")
    rest = whole(text) if stop - start < len(passage) else ""
    return paragraph(inner) + named(passage, weights) + rest


def paragraph(inner: str) -> str:
    """The element that passages stand in; a language's own direction."""
    return f'<p class="passage" dir="auto">{inner}</p>'


def excerpt_of_text(text: str) -> tuple[str, bool]:
    """The beginning of a text, up to a space, and whether anything is left out."""
    if len(text) <= EXCERPT_CHARACTERS:
        return text, False
    beginning = text[:EXCERPT_CHARACTERS]
    words = beginning.rsplit(None, 1)  # none of white space
    return words[0] if " " in beginning and words else beginning, True


def excerpt_of_tokens(weights: Weights) -> tuple[int, int]:
    """The run of EXCERPT_TOKENS tokens that matters most, the earliest of them."""
    if len(weights) <= EXCERPT_TOKENS:
        return 0, len(weights)
    sums = np.concatenate([[0.0], np.abs(weights).cumsum()])
    start = int(np.argmax(sums[EXCERPT_TOKENS:] - sums[:-EXCERPT_TOKENS]))
    return start, start + EXCERPT_TOKENS


def marked(tokens: Sequence[str], weights: Weights, largest: float) -> str:
    """Tokens, those that matter in <mark>: class h (helps) or d (harms) and a level."""
    parts = []
    for token, weight in zip(tokens, weights, strict=True):
        text = html.escape(token)
        share = abs(weight) / largest
        if share >= FAINTEST and token.strip():
            level = min(LEVELS, 1 + int(share * LEVELS))
            sign = "h" if weight > 0 else "d"
            space = text[: len(text) - len(text.lstrip())]
            mark = f'<mark class="{sign}{level}" title="{weight:+.3g}">{text.lstrip()}</mark>'
            text = space + mark
        parts.append(text)
    return "".join(parts)


def named(tokens: Sequence[str], weights: Weights) -> str:
    """The tokens that matter most, in words: marks are nothing to a screen reader."""
    order = [int(i) for i in np.argsort(-np.abs(weights), kind="stable") if tokens[i].strip()]
    most = [i for i in order[:NAMED] if weights[i]]
    if not most:
        return ""
    said = ", ".join(f"“{html.escape(tokens[i].strip())}” {weights[i]:+.3g}" for i in most)
    return f'<p class="soft">most: {said}</p>'


def whole(text: str) -> str:
    """All of a passage, to be opened."""
    cut = len(text) > WHOLE_CHARACTERS
    inner = html.escape(text[:WHOLE_CHARACTERS])
    note = f"… ({len(text):,} characters in all)" if cut else ""
    return f"<details><summary>whole passage</summary>{paragraph(inner + note)}</details>"
