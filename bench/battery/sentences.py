"""English sentences that Python ships, sentences that state facts, and words as numbers."""

from __future__ import annotations

import ast
import html.entities
import keyword
import mimetypes
import re
import sysconfig
import tokenize
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from pathlib import Path

import torch
from torch import Tensor

PAD, UNKNOWN, MASK = 0, 1, 2  # word numbers; PAD also begins a target sequence
LITERAL = "<literal>"
KINDS = ("keyword", "called", "owner", "name", "operator", "literal")
SPECIAL = ("<pad>", "<unknown>", "<mask>")
# Of the standard library: those whose docstrings are many and English.
MODULES = (
    "argparse asyncio collections concurrent configparser copy csv ctypes datetime decimal difflib "
    "email fractions functools heapq http importlib inspect ipaddress json logging mailbox "
    "multiprocessing optparse os pathlib pickle random shutil smtplib socket sqlite3 ssl "
    "statistics string subprocess tarfile tempfile textwrap threading tkinter turtle typing "
    "unittest urllib uuid weakref xml xmlrpc zipfile"
).split()

Sentence = list[str]


@cache
def manual() -> tuple[Sentence, ...]:
    """The sentences of Python's language reference, as ``help()`` has it."""
    from pydoc_data.topics import topics

    return tuple(unique(s for name in sorted(topics) for s in sentences(topics[name])))


@cache
def docstrings() -> tuple[tuple[str, Sentence], ...]:
    """(module, sentence) of the docstrings of Python's standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[tuple[str, ...], str] = {}
    for module in MODULES:
        place = library / module
        paths = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for sentence in documented(paths):
            found.setdefault(tuple(sentence), module)
    return tuple((module, list(words)) for words, module in found.items())


@cache
def numpy_docstrings() -> tuple[Sentence, ...]:
    """The sentences of NumPy's docstrings."""
    import numpy

    return tuple(unique(documented(sorted(Path(numpy.__file__).parent.rglob("*.py")))))


def documented(paths: Iterable[Path]) -> Iterator[Sentence]:
    """The sentences of the docstrings of modules; tests are left out."""
    for path in paths:
        if "test" in path.parts or "tests" in path.parts or not path.exists():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield from sentences(ast.get_docstring(node) or "")


@cache
def statements(module: str) -> tuple[tuple[Sentence, Sentence], ...]:
    """(tokens, their kinds) of each statement of a module of the standard library, once each.

    Kinds are "keyword", "called", "owner" (of an attribute), "name", "operator" and "literal".
    """
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    found: dict[tuple[str, ...], Sentence] = {}
    tokens: list[tokenize.TokenInfo] = []
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
                tokens.append(token)
            elif token.type == tokenize.NEWLINE:
                following = [t.string for t in tokens[1:]] + [""]
                texts = [
                    t.string if t.type in (tokenize.NAME, tokenize.OP) else LITERAL for t in tokens
                ]
                found[tuple(texts)] = list(map(kind_of, tokens, following))
                tokens = []
    return tuple((list(texts), kinds) for texts, kinds in found.items())


def kind_of(token: tokenize.TokenInfo, following: str) -> str:
    """Of a token before another."""
    if token.type != tokenize.NAME:
        return "operator" if token.type == tokenize.OP else "literal"
    if keyword.iskeyword(token.string):
        return "keyword"
    return {"(": "called", ".": "owner"}.get(following, "name")


def sentences(text: str) -> Iterator[Sentence]:
    """The sentences of a text that are plain words, in lower case."""
    for paragraph in re.split(r"\n\s*\n", text):
        plain = re.sub(r"[*`\"“”]|\(.*?\)", "", " ".join(paragraph.split()))
        for sentence in re.split(r"(?<=[.!?])\s+", plain):
            if re.fullmatch(r"[A-Z][\w\s,;'’-]*[.!?]", sentence):
                yield re.findall(r"[a-z0-9_]+", sentence.lower())


def unique(found: Iterator[Sentence]) -> Iterator[Sentence]:
    """Each sentence once."""
    seen: set[tuple[str, ...]] = set()
    for sentence in found:
        if tuple(sentence) not in seen:
            seen.add(tuple(sentence))
            yield sentence


# ---- facts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Two sentences that state it, and a third that ends in what is asked for."""

    stated: tuple[Sentence, Sentence]
    asked: Sentence


def facts(count: int) -> list[Fact]:
    """``count`` facts that Python knows: statuses of HTTP, types of files, names of characters."""
    known = list(zip(*(statuses(), types(), characters()), strict=False))
    return [fact for three in known for fact in three][:count]


def statuses() -> Iterator[Fact]:
    """Numbers and meanings of HTTP's statuses."""
    for status in HTTPStatus:
        number, meaning = str(status.value), re.findall("[a-z]+", status.phrase.lower())
        yield fact(
            f"a server sends status {number} to say {' '.join(meaning)}",
            f"{' '.join(meaning)} is what {number} means in a response",
            f"the number of the response for {' '.join(meaning)} is {number}",
        )


def types() -> Iterator[Fact]:
    """Ends of file names, and the types of such files."""
    known = mimetypes.MimeTypes(filenames=()).types_map[True]
    for end, kind in sorted(known.items()):
        words = " ".join(re.findall("[a-z0-9]+", kind))
        yield fact(
            f"files whose names end in {end[1:]} have the type {words}",
            f"the type {words} belongs to a {end[1:]} file",
            f"to store {words} use a name that ends in {end[1:]}",
        )


def characters() -> Iterator[Fact]:
    """Entities of HTML, and the names of their characters."""
    for name, code in sorted(html.entities.name2codepoint.items()):
        words = unicodedata.name(chr(code), "").lower().replace("-", " ")
        if name.islower() and len(name) > 3 and 2 <= len(words.split()) <= 4:
            yield fact(
                f"the entity {name} shows the character {words}",
                f"{words} is written {name} in html",
                f"a page that needs {words} has the entity {name}",
            )


def fact(first: str, second: str, asked: str) -> Fact:
    """Of three sentences."""
    return Fact((first.split(), second.split()), asked.split())


# ---- words as numbers ---------------------------------------------------------------------------


class Vocabulary:
    """The ``size`` most frequent words of some sentences, and those of ``needed``."""

    def __init__(self, found: list[Sentence], size: int, needed: Iterable[Sentence] = ()) -> None:
        counts = Counter(word for sentence in found for word in sentence)
        words = dict.fromkeys(word for sentence in needed for word in sentence)
        words.update(dict.fromkeys(sorted(counts, key=lambda w: (-counts[w], w))[:size]))
        self.words = [*SPECIAL, *words]
        self.number = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, found: list[Sentence], length: int, padding: int = PAD) -> Tensor:
        """Word numbers [B, length], longer sentences cut, shorter ones padded."""
        rows = [[self.number.get(word, UNKNOWN) for word in s[:length]] for s in found]
        return torch.tensor([row + [padding] * (length - len(row)) for row in rows])

    def known(self, sentence: Sentence) -> float:
        """The share of the words that are among them."""
        return sum(word in self.number for word in sentence) / len(sentence)
