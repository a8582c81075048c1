"""Samples of texts as tokenised samples."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastproj.checks import check_integer
from fastproj.trak.hf.labels import LABELS, OF_CLASSES, label_entry, labels_of
from fastproj.trak.tasks.language import IGNORE_INDEX

# What samples have, by task: several forms, each with the entries that it must have.
FORMS = {
    "causal_lm": (("text",), ("prompt", "completion")),
    "masked_lm": (("text",),),
    "seq2seq": (("source", "target"),),
    "text_classification": (("text", "label"),),
    "token_classification": (),
}

logger = logging.getLogger("fastproj.trak")


def tokenize(
    samples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    task: str,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    label2id: Mapping[str, int] | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Samples of texts as samples of tokens, as ``HFTRAKer`` takes them.

    Parameters
    ----------
    samples : dicts. "causal_lm": "text", or "prompt" and "completion", of which the completion is
        predicted; "masked_lm": "text"; "seq2seq": "source" and "target"; "text_classification":
        "text" and "label", and "text_pair" where there are two texts. A sample with "input_ids" is
        tokenised already and stays as it is, but for its labels where ``columns`` or ``label2id``
        are of them.
    tokenizer : of the model. Texts get the special tokens that it puts around them by itself.
    task : see ``samples``.
    max_length : tokens of a sample; longer texts are cut, and a log line says how many. Longer
        samples that are tokenised already are an error. None: no limit.
    columns : other names of these entries, such as {"text": "review"}; of a tokenised sample, of
        "labels" alone ("label" for "text_classification").
    label2id : numbers of labels that are names; a model's ``config.label2id``.
    name : of the data set, such as its file's, for messages.

    Raises
    ------
    TypeError, ValueError
        For samples without these entries, labels without a number, tokenised samples that are too
        long, or a ``max_length`` that leaves nothing to predict.
    """
    if task not in FORMS:
        raise ValueError(
            f"tokenize: received task={task!r}; expected one of {', '.join(map(repr, FORMS))}"
        )
    check_length(task, max_length)
    named = dict(columns or {})
    known = {*names_of(task), *names_of(task, tokenised=True)}
    unknown = sorted(set(named) - known)
    if unknown:
        raise ValueError(
            f"tokenize: received columns for {', '.join(map(repr, unknown))}, which {task} doesn't "
            f"take; expected {', '.join(map(repr, sorted(known)))}"
        )
    of = "" if name is None else f" of {name}"
    found: list[dict[str, Any]] = []
    cut = 0
    given: Iterable[Any] = samples
    for index, sample in enumerate(given):
        where = f"tokenize: sample {index}{of}"
        if not isinstance(sample, Mapping):
            cure = "data.to_dict('records')" if hasattr(samples, "iloc") else "{'text': ...}"
            raise TypeError(
                f"{where} is of type {type(sample).__name__}; expected dicts, such as {cure}"
            )
        check_columns(where, sample, task, named)
        if "input_ids" in sample:
            found.append(of_tokenised(where, sample, task, named, label2id))
            check_tokens(where, found[-1], task, max_length)
            continue
        parts = parts_of(where, sample, task, named)
        tokens = MAKERS[task](tokenizer, parts, truncation=False)
        if max_length is not None and is_longer(tokens, max_length):
            # A tokenizer keeps its special tokens, and shares the length out over a pair. For a
            # causal model no end token may stand where a text goes on.
            if task != "causal_lm":
                limit = {"truncation": True, "max_length": max_length}
                tokens = MAKERS[task](tokenizer, parts, **limit)
            shorten(where, tokens, max_length)
            cut += 1
        if "label" in parts:
            tokens["labels"] = number_of(where, parts["label"], label2id)
        found.append(tokens)
    if cut:
        logger.warning(
            "tokenize: %d of %d samples%s were cut to %d tokens", cut, len(found), of, max_length
        )
    return found


def check_length(task: str, max_length: Any) -> None:
    """Raise TypeError or ValueError unless something can be predicted of so many tokens."""
    if max_length is None:
        return
    if check_integer("tokenize", "max_length", max_length, 1, 1 << 31) == 1 and task == "causal_lm":
        raise ValueError(
            "tokenize: received max_length=1 (--max-length) for causal_lm, where nothing comes "
            "before the one token to predict it; expected at least 2"
        )


def check_columns(
    where: str, sample: Mapping[str, Any], task: str, columns: Mapping[str, str]
) -> None:
    """Raise ValueError for columns that a sample, by texts or tokenised, has no use for."""
    tokenised = "input_ids" in sample
    takes = names_of(task, tokenised)
    others = [name for name in columns if name not in takes]
    if takes and others:
        raise ValueError(
            f"{where} has {'' if tokenised else 'no '}'input_ids', so columns= (--column) takes no "
            f"{', '.join(map(repr, others))} of it; expected {', '.join(map(repr, takes))} alone"
        )


def names_of(task: str, tokenised: bool = False) -> list[str]:
    """All entries that a task takes of a sample of texts; or those of a tokenised sample that may
    have other names.
    """
    if tokenised:
        return [label_entry(task)]
    names = [name for form in FORMS[task] for name in form]
    return [*names, "text_pair"] if task == "text_classification" else names


def of_tokenised(
    where: str,
    sample: Mapping[str, Any],
    task: str,
    columns: Mapping[str, str],
    label2id: Mapping[str, int] | None,
) -> dict[str, Any]:
    """A tokenised sample, with its labels under their own name, and as numbers."""
    column = columns.get(label_entry(task))
    tokens = dict(sample)
    if column is not None:
        if sample.get(column) is None:
            raise ValueError(
                f"{where} has {', '.join(map(repr, sample))}; expected its labels as {column!r}, "
                "as columns= (--column) says"
            )
        tokens = {key: part for key, part in sample.items() if key not in (*LABELS, column)}
        tokens["labels"] = sample[column]
    if task in OF_CLASSES:
        for key in tokens.keys() & set(LABELS):
            tokens[key] = number_of(where, tokens[key], label2id)
    return tokens


def check_tokens(where: str, sample: Mapping[str, Any], task: str, max_length: int | None) -> None:
    """Raise ValueError for a tokenised sample that is too long, without the padding at its ends.

    It isn't cut: nothing here knows which special tokens must stay.
    """
    if max_length is None:
        return
    sizes = [shown_tokens(sample["input_ids"], sample.get("attention_mask"))]
    labels = labels_of(sample)
    if task == "seq2seq" and hasattr(labels, "__len__"):
        sizes.append(shown_tokens(labels, [int(label != IGNORE_INDEX) for label in labels]))
    if max(sizes) > max_length:
        raise ValueError(
            f"{where} is tokenised already, and has {max(sizes)} tokens; expected at most "
            f"{max_length}, to which texts alone are cut, or a larger max_length (--max-length)"
        )


def shown_tokens(tokens: Any, mask: Any) -> int:
    """How many tokens there are between the first and the last one that a mask shows."""
    size = len(tokens) if hasattr(tokens, "__len__") else 0  # HFTRAKer refuses what is no list
    if not hasattr(mask, "__len__") or len(mask) != size:
        return size
    shown = [place for place, seen in enumerate(mask) if seen]
    return shown[-1] - shown[0] + 1 if shown else size


def parts_of(
    where: str, sample: Mapping[str, Any], task: str, columns: Mapping[str, str]
) -> dict[str, Any]:
    """What a task takes of a sample, under the task's names."""
    parts = {
        name: sample[columns.get(name, name)]
        for name in names_of(task)
        if sample.get(columns.get(name, name)) is not None
    }
    whole = [form for form in FORMS[task] if all(name in parts for name in form)]
    written = {
        form: " and ".join(repr(columns.get(name, name)) for name in form) for form in FORMS[task]
    }
    if not whole:
        names = [columns.get(name, name) for form in FORMS[task] for name in form]
        null = [repr(name) for name in names if name in sample and sample[name] is None]
        if null:
            raise ValueError(
                f"{where} has no value (null) for {', '.join(null)}; expected one for "
                f"{' or '.join(written.values())}, or a data set without this sample"
            )
        raise ValueError(
            f"{where} has {', '.join(map(repr, sample)) or 'nothing'}; expected "
            + (f"{' or '.join(written.values())} for {task}, or " if written else "")
            + "'input_ids' of a sample that is tokenised (columns= or --column says where an entry "
            "has another name)"
        )
    if len(whole) > 1:
        raise ValueError(
            f"{where} has {' as well as '.join(written[form] for form in whole)}; expected one of "
            "them: of a text all is predicted, of a prompt nothing"
        )
    for name, part in parts.items():
        if name != "label" and not isinstance(part, str):
            raise ValueError(
                f"{where} has {columns.get(name, name)!r} of type {type(part).__name__}; expected "
                "a string"
            )
    return parts


def of_text(tokenizer: Any, parts: Mapping[str, Any], **limit: Any) -> dict[str, Any]:
    """The tokens of one text, or of two. ``limit`` says whether the tokenizer cuts, and where."""
    return dict(tokenizer(parts["text"], parts.get("text_pair"), **limit))


def of_causal(tokenizer: Any, parts: Mapping[str, Any], **limit: Any) -> dict[str, Any]:
    """The tokens of a text, or of a prompt and its completion, which alone is predicted."""
    if "text" in parts:
        return dict(tokenizer(parts["text"], **limit))
    prompt, completion = parts["prompt"], parts["completion"]
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenize: received a tokenizer of class {type(tokenizer).__name__}, which doesn't "
            "say where in a text its tokens are; expected a fast tokenizer (tokenizer.json), "
            "samples with 'text', or tokenised ones with 'input_ids' and 'labels'"
        )
    tokens = dict(tokenizer(prompt + completion, return_offsets_mapping=True, **limit))
    ends = [end for _, end in tokens.pop("offset_mapping")]
    first = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
    ids = tokens["input_ids"]
    tokens["labels"] = [IGNORE_INDEX] * first + ids[first:]
    return tokens


def of_pair(tokenizer: Any, parts: Mapping[str, Any], **limit: Any) -> dict[str, Any]:
    """The tokens of a source, and those of its target as labels."""
    tokens = dict(tokenizer(parts["source"], **limit))
    tokens["labels"] = tokenizer(text_target=parts["target"], **limit)["input_ids"]
    return tokens


MAKERS = {
    "causal_lm": of_causal,
    "masked_lm": of_text,
    "seq2seq": of_pair,
    "text_classification": of_text,
}


def is_longer(tokens: Mapping[str, Any], length: int) -> bool:
    """Whether a sample has more than ``length`` tokens."""
    return any(isinstance(part, list) and len(part) > length for part in tokens.values())


def shorten(where: str, tokens: dict[str, Any], length: int) -> None:
    """Cut what the tokenizer has not; ValueError where nothing to predict is left."""
    for name, part in tokens.items():
        if isinstance(part, list):
            tokens[name] = part[:length]
    labels = tokens.get("labels")
    if isinstance(labels, list) and all(label == IGNORE_INDEX for label in labels):
        raise ValueError(
            f"{where} has no token of its completion within {length} tokens; expected a shorter "
            "prompt, or a larger max_length (--max-length)"
        )


def number_of(where: str, label: Any, label2id: Mapping[str, int] | None) -> Any:
    """The number of a label, or the label where it is one; of several labels a list."""
    if isinstance(label, list | tuple | np.ndarray) and any(isinstance(p, str) for p in label):
        return [number_of(where, part, label2id) for part in label]
    if not isinstance(label, str):
        return label
    if label2id and label in label2id:
        return label2id[label]
    names = ", ".join(map(repr, label2id or ())) or "none"
    raise ValueError(
        f"{where} has the label {label!r}; expected a number, or a name that the model's "
        f"config.label2id has ({names})"
    )
