"""Text classifiers and language models on the names and sentences that Python ships."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeVar
from zoneinfo import available_timezones

import torch

from bench.battery.models import CausalLM, Recurrent, Seq2Seq, Tagger, TextClassifier
from bench.battery.problem import IGNORED, Classes, Problem
from bench.battery.sentences import (
    KINDS,
    MASK,
    PAD,
    SPECIAL,
    Fact,
    Sentence,
    Vocabulary,
    docstrings,
    facts,
    manual,
    numpy_docstrings,
    statements,
)
from fastproj.testbed.ensembles import Training

T = TypeVar("T")

LENGTH = 16  # words of a sentence, letters of a name
PARTS = ("Africa", "America", "Asia", "Europe", "Pacific")


def modules(n: int = 800, targets: int = 100, classes: int = 8) -> Problem:
    """Which module of Python's standard library a sentence of a docstring is from."""
    found = [(module, s) for module, s in docstrings() if 4 <= len(s) <= LENGTH]
    counts = Counter(module for module, _ in found)
    names = sorted(counts, key=lambda name: (-counts[name], name))[:classes]
    each = -(-(n + targets) // classes)
    chosen = [
        (number, sentence)
        for number, name in enumerate(names)
        for sentence in shuffled([s for module, s in found if module == name], 0)[:each]
    ]
    chosen = shuffled(chosen, 1)[: n + targets]
    labels = torch.tensor([label for label, _ in chosen])
    texts = [sentence for _, sentence in chosen]
    vocabulary = Vocabulary(texts, 400)
    ids = vocabulary.encode(texts, LENGTH)
    parts = (ids, (ids != PAD).long(), labels)
    return Problem(
        "modules",
        tuple(part[:n] for part in parts),
        tuple(part[n:] for part in parts),
        lambda: TextClassifier(len(vocabulary), LENGTH, classes),
        Training(epochs=20, batch=40, learning_rate=0.3, weight_decay=1e-2, clip=1.0),
        Classes("text_classification"),
        words=(texts[:n], texts[n:]),
    )


def zones(n: int = 340, targets: int = 60) -> Problem:
    """Which of 5 parts of the world a city of the time zone database is in, by its letters.

    12 % of the labels are wrong; a recurrent network reads.
    """
    cities: dict[str, int] = {}
    for zone in sorted(available_timezones()):
        part, _, city = zone.partition("/")
        if part in PARTS and city:
            cities.setdefault(city.rpartition("/")[2].lower(), PARTS.index(part))
    names = shuffled(list(cities), 2)[: n + targets]
    if len(names) < n + targets:
        raise ValueError(f"received {len(names)} cities; expected {n + targets}")
    # Letters as numbers from 1 on; the last ones of a name, after padding.
    ids = torch.tensor(
        [[0] * (LENGTH - len(name[-LENGTH:])) + [letter(c) for c in name[-LENGTH:]]
         for name in names]
    )  # fmt: skip
    labels = torch.tensor([cities[name] for name in names])
    problem = Problem(
        "zones",
        (ids[:n], labels[:n]),
        (ids[n:], labels[n:]),
        lambda: Recurrent(letters=28, classes=len(PARTS)),
        Training(epochs=12, batch=20, learning_rate=0.2, weight_decay=1e-3, clip=1.0),
        held_out=True,
    )
    return problem.with_wrong_labels(0.12, len(PARTS))


def letter(character: str) -> int:
    """1 to 26 for a letter, 27 for anything else."""
    return ord(character) - ord("a") + 1 if "a" <= character <= "z" else 27


# ---- language models ----------------------------------------------------------------------------


def causal(
    name: str, found: Sequence[Sentence], n: int, targets: int, words: int, held_out: bool
) -> Problem:
    """A causal language model on n sentences, some of which state facts."""
    samples, asked, stated, vocabulary = corpus(found, n, targets, words)

    def batch(texts: list[Sentence]) -> tuple[torch.Tensor, ...]:
        ids = vocabulary.encode(texts, LENGTH)
        return ids, (ids != PAD).long(), ids.masked_fill(ids == PAD, IGNORED)

    return Problem(
        name,
        batch(samples),
        batch(asked),
        lambda: CausalLM(len(vocabulary), LENGTH),
        Training(epochs=20, batch=25, learning_rate=0.5, weight_decay=1e-3, clip=1.0),
        Classes("causal_lm", LENGTH),
        held_out=held_out,
        language=True,
        facts=stated,
        words=(samples, asked),
    )


def seq2seq(
    name: str, found: Sequence[Sentence], n: int, targets: int, words: int, held_out: bool
) -> Problem:
    """A model that fills a gap of up to 3 words in n sentences, some of which state facts.

    A question's gap is its answer.
    """
    samples, asked, stated, vocabulary = corpus(found, n, targets, words)
    questions = {tuple(text) for text in asked[: len(asked) // 2]}
    draw = torch.Generator().manual_seed(3)

    def batch(texts: list[Sentence]) -> tuple[torch.Tensor, ...]:
        sources, gaps = [], []
        for text in (text[:LENGTH] for text in texts):
            question = tuple(text) in questions
            size = int(torch.randint(1, 4, (), generator=draw))
            size = 1 if question else size
            last = len(text) - size
            begin = int(torch.randint(0, last + 1, (), generator=draw))
            begin = last if question else begin
            sources.append([*text[:begin], SPECIAL[2], *text[begin + size :]])
            gaps.append(text[begin : begin + size])
        ids = vocabulary.encode(sources, LENGTH)
        return ids, (ids != PAD).long(), vocabulary.encode(gaps, 3, IGNORED)

    return Problem(
        name,
        batch(samples),
        batch(asked),
        lambda: Seq2Seq(len(vocabulary), LENGTH),
        Training(epochs=15, batch=25, learning_rate=0.5, weight_decay=1e-3, clip=1.0),
        Classes("seq2seq", 3),
        held_out=held_out,
        language=True,
        facts=stated,
        words=(samples, asked),
    )


def masked(
    name: str, found: Sequence[Sentence], n: int, targets: int, words: int, held_out: bool
) -> Problem:
    """A model that names the hidden words of n sentences, a quarter; of a question, its answer."""
    samples, asked, stated, vocabulary = corpus(found, n, targets, words)
    questions = {tuple(text) for text in asked[: len(asked) // 2]}
    draw = torch.Generator().manual_seed(4)

    def batch(texts: list[Sentence]) -> tuple[torch.Tensor, ...]:
        ids = vocabulary.encode(texts, LENGTH)
        hidden = (torch.rand(ids.shape, generator=draw) < 0.25) & (ids != PAD)
        hidden[:, 0] |= ~hidden.any(1)
        for row, text in enumerate(texts):
            if tuple(text) in questions:
                hidden[row] = torch.arange(LENGTH) == min(len(text), LENGTH) - 1
        return ids.masked_fill(hidden, MASK), (ids != PAD).long(), ids.masked_fill(~hidden, IGNORED)

    return Problem(
        name,
        batch(samples),
        batch(asked),
        lambda: Tagger(len(vocabulary), LENGTH, len(vocabulary), 24),
        Training(epochs=20, batch=25, learning_rate=0.5, weight_decay=1e-3, clip=1.0),
        Classes("masked_lm", 4),
        held_out=held_out,
        language=True,
        facts=stated,
        words=(samples, asked),
    )


def corpus(
    found: Sequence[Sentence], n: int, targets: int, words: int
) -> tuple[list[Sentence], list[Sentence], torch.Tensor, Vocabulary]:
    """n sentences, ``targets`` others, which of the n state what the others ask for, and the words.

    Half of the others are questions; the two sentences that state each fact are among the n.
    """
    known: list[Fact] = facts(targets // 2)
    statements = [sentence for fact in known for sentence in fact.stated]
    questions = [fact.asked for fact in known]
    fitting = [s for s in found if 6 <= len(s) <= LENGTH]
    plain = Vocabulary(fitting, words)
    fitting = shuffled([s for s in fitting if plain.known(s) >= 0.8], 0)
    wanted = n + targets - len(questions) - len(statements)
    if len(fitting) < wanted:
        raise ValueError(f"received {len(fitting)} sentences; expected {wanted}")
    others = targets - len(questions)
    order = shuffled(list(range(n)), 1)
    samples = [*statements, *fitting[others:wanted]]
    stated = torch.zeros(n, targets, dtype=torch.bool)
    for number in range(len(statements)):
        stated[number, number // 2] = True
    vocabulary = Vocabulary(fitting[:wanted], words, [*statements, *questions])
    asked = [*questions, *fitting[:others]]
    return [samples[i] for i in order], asked, stated[order], vocabulary


def source_tags(n: int = 600, targets: int = 100) -> Problem:
    """The kind of each token in statements of Python's source, three in ten of them hidden."""
    names = ("ast", "difflib", "inspect", "platform", "statistics", "uuid")
    found = [s for name in names for s in statements(name) if 5 <= len(s[0]) <= LENGTH]
    chosen = shuffled(found, 0)[: n + targets]
    texts, kinds = [text for text, _ in chosen], [kind for _, kind in chosen]
    vocabulary = Vocabulary(texts, 200)
    ids = vocabulary.encode(texts, LENGTH)
    labels = torch.tensor(
        [[*map(KINDS.index, row), *[IGNORED] * (LENGTH - len(row))] for row in kinds]
    )
    hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    parts = (ids.masked_fill(hidden & (ids != PAD), MASK), (ids != PAD).long(), labels)
    return Problem(
        "source_tags",
        tuple(part[:n] for part in parts),
        tuple(part[n:] for part in parts),
        lambda: Tagger(len(vocabulary), LENGTH, len(KINDS)),
        Training(epochs=12, batch=25, learning_rate=0.3, weight_decay=1e-3, clip=1.0),
        Classes("token_classification", LENGTH),
        words=(texts[:n], texts[n:]),
    )


def docstring_masks(n: int = 600, targets: int = 100) -> Problem:
    """A masked language model on docstrings of Python's standard library."""
    found = [sentence for _, sentence in docstrings()]
    return masked("docstring_masks", found, n, targets, 300, held_out=False)


def manual_masks(n: int = 600, targets: int = 100) -> Problem:
    """A masked language model on Python's language reference."""
    return masked("manual_masks", manual(), n, targets, 400, held_out=True)


def docstring_words(n: int = 600, targets: int = 100) -> Problem:
    """A causal language model on docstrings of Python's standard library."""
    found = [sentence for _, sentence in docstrings()]
    return causal("docstring_words", found, n, targets, 300, held_out=False)


def docstring_gaps(n: int = 600, targets: int = 100) -> Problem:
    """A sequence-to-sequence model on the same."""
    found = [sentence for _, sentence in docstrings()]
    return seq2seq("docstring_gaps", found, n, targets, 300, held_out=False)


def manual_words(n: int = 600, targets: int = 100) -> Problem:
    """A causal language model on Python's language reference."""
    return causal("manual_words", manual(), n, targets, 400, held_out=True)


def manual_gaps(n: int = 600, targets: int = 100) -> Problem:
    """A sequence-to-sequence model on the same."""
    return seq2seq("manual_gaps", manual(), n, targets, 400, held_out=True)


def numpy_words(n: int = 600, targets: int = 100) -> Problem:
    """A causal language model on sentences of NumPy's docstrings, with facts."""
    return causal("numpy_words", numpy_docstrings(), n, targets, 400, held_out=True)


def shuffled(items: list[T], seed: int) -> list[T]:
    """The items in a random order."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]
