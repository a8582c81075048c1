"""Texts in files as tokenised samples."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastproj.trak.files import lines_of, parsed_json, read_text
from fastproj.trak.tasks.language import IGNORE_INDEX

FILES = ".jsonl (or .json), .txt, .parquet, or a folder of datasets' save_to_disk"
# What samples have, by task: several forms, each with the entries that it must have.
FORMS = {
    "causal_lm": (("text",), ("prompt", "completion")),
    "masked_lm": (("text",),),
    "seq2seq": (("source", "target"),),
    "text_classification": (("text", "label"),),
    "token_classification": (),
}

logger = logging.getLogger("fastproj.trak")


# ---- files --------------------------------------------------------------------------------------


def read_samples(path: str | os.PathLike[str]) -> Any:
    """The samples in a local file or folder, a sequence of dicts.

    Parameters
    ----------
    path : ``.jsonl`` (an object a line; ``.json`` may also be one list of objects), ``.txt`` (a
        text a line, without empty lines: {"text": line}), ``.parquet``, or the folder of a
        ``datasets.Dataset.save_to_disk``. The last two need the package datasets.

    Raises
    ------
    FileNotFoundError, ValueError
        For a path that isn't there or holds something else.
    """
    given, path = str(path), Path(path).expanduser()
    if given and path.is_dir():  # Path("") is the working directory
        return read_dataset(path)
    if not (given and path.exists()):
        raise FileNotFoundError(
            f"received {given!r}, which is not here; expected a local path: {FILES}"
        )
    readers = {
        ".jsonl": read_json_lines,
        ".ndjson": read_json_lines,
        ".json": read_json_lines,
        ".txt": read_lines,
        ".parquet": read_parquet,
    }
    if path.suffix not in readers:
        raise ValueError(f"received {str(path)!r}; expected {FILES}")
    samples = readers[path.suffix](path)
    if not len(samples):
        raise ValueError(f"received {str(path)!r} without a sample; expected at least one")
    return samples


def read_lines(path: Path) -> list[dict[str, str]]:
    """A text a line."""
    lines = lines_of(read_text(path))
    texts = [line for line in lines if line.strip()]
    if len(texts) < len(lines):
        logger.info(
            "%s: %d of %d lines are empty; samples are the others, numbered from 0",
            path,
            len(lines) - len(texts),
            len(lines),
        )
    return [{"text": text} for text in texts]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """An object a line, or one list of objects."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        numbered = list(enumerate(parsed_json(path, text)))
        what = "entry"
    else:
        numbered, what = [], "line"
        for number, line in enumerate(lines_of(text), 1):
            if line.strip():
                try:
                    numbered.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{path}, line {number}: no JSON ({error.msg} at column {error.colno}); "
                        "expected one object a line"
                    ) from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
    for number, sample in numbered:
        if not isinstance(sample, dict):
            raise ValueError(
                f"{path}, {what} {number}: a {type(sample).__name__}; expected an object such as "
                '{"text": "..."}'
            )
    return [sample for _, sample in numbered]


def read_parquet(path: Path) -> Any:
    """The rows of a parquet file."""
    datasets = import_datasets(path)
    import pyarrow.parquet

    with damage_named(path, "no parquet file that can be read"):
        table = pyarrow.parquet.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
        return datasets.Dataset(table)


def read_dataset(folder: Path) -> Any:
    """What ``save_to_disk`` wrote into a folder."""
    if not any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(
            f"received the folder {str(folder)!r}, which holds no data set; expected {FILES}"
        )
    datasets = import_datasets(folder)
    with damage_named(folder, "no data set that can be read"):
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.Dataset):
            found.data.validate(full=True)
    if isinstance(found, Mapping):
        splits = ", ".join(str(folder / name) for name in found)
        raise ValueError(
            f"received the folder {str(folder)!r} with several splits; expected one of: {splits}"
        )
    return found


@contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """ValueError with the path for whatever other packages raise where they can't read bytes."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {what} ({said:.300})") from error


def import_datasets(path: Path) -> Any:
    """The package datasets, or an error that says how to get it."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ModuleNotFoundError(
            f"{path} needs datasets to be read: pip install 'torch-fastproj[hf]'", name="datasets"
        ) from None
    return datasets


# ---- tokens -------------------------------------------------------------------------------------


def tokenize(
    samples: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    task: str,
    *,
    max_length: int | None = None,
    columns: Mapping[str, str] | None = None,
    label2id: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Samples of texts as samples of tokens, as ``HFTRAKer`` takes them.

    Parameters
    ----------
    samples : dicts. "causal_lm": "text", or "prompt" and "completion", of which the completion is
        predicted; "masked_lm": "text"; "seq2seq": "source" and "target"; "text_classification":
        "text" and "label", and "text_pair" where there are two texts. A sample with "input_ids" is
        tokenised already and stays as it is.
    tokenizer : of the model. Texts get the special tokens that it puts around them by itself.
    task : see ``samples``.
    max_length : tokens of a sample; longer ones are cut, and a log line says how many. None: no
        limit.
    columns : other names of these entries, such as {"text": "review"}.
    label2id : numbers of labels that are names; a model's ``config.label2id``.

    Raises
    ------
    ValueError
        For samples without these entries, or labels without a number.
    """
    if task not in FORMS:
        raise ValueError(
            f"tokenize: received task={task!r}; expected one of {', '.join(map(repr, FORMS))}"
        )
    named = dict(columns or {})
    known = names_of(task)
    unknown = sorted(set(named) - set(known))
    if unknown:
        raise ValueError(
            f"tokenize: received columns for {', '.join(map(repr, unknown))}, which {task} doesn't "
            f"take; expected {', '.join(map(repr, sorted(known)))}"
        )
    found: list[dict[str, Any]] = []
    cut = 0
    for index, sample in enumerate(samples):
        if "input_ids" in sample:
            found.append(dict(sample))
            continue
        parts = parts_of(index, sample, task, named)
        tokens = MAKERS[task](tokenizer, parts, truncation=False)
        if max_length is not None and is_longer(tokens, max_length):
            # A tokenizer keeps its special tokens, and shares the length out over a pair. For a
            # causal model no end token may stand where a text goes on.
            if task != "causal_lm":
                limit = {"truncation": True, "max_length": max_length}
                tokens = MAKERS[task](tokenizer, parts, **limit)
            shorten(index, tokens, max_length)
            cut += 1
        if "label" in parts:
            tokens["labels"] = number_of(index, parts["label"], label2id)
        found.append(tokens)
    if cut:
        logger.warning(
            "tokenize: %d of %d samples were cut to %d tokens", cut, len(found), max_length
        )
    return found


def names_of(task: str) -> list[str]:
    """All entries that a task takes of a sample of texts."""
    names = [name for form in FORMS[task] for name in form]
    return [*names, "text_pair"] if task == "text_classification" else names


def parts_of(
    index: int, sample: Mapping[str, Any], task: str, columns: Mapping[str, str]
) -> dict[str, Any]:
    """What a task takes of a sample, under the task's names."""
    parts = {
        name: sample[columns.get(name, name)]
        for name in names_of(task)
        if sample.get(columns.get(name, name)) is not None
    }
    if not any(all(name in parts for name in form) for form in FORMS[task]):
        forms = " or ".join(
            " and ".join(repr(columns.get(name, name)) for name in form) for form in FORMS[task]
        )
        raise ValueError(
            f"tokenize: sample {index} has {', '.join(map(repr, sample)) or 'nothing'}; expected "
            + (f"{forms} for {task}, or " if forms else "")
            + "'input_ids' of a sample that is tokenised (columns= or --column says where an entry "
            "has another name)"
        )
    for name, part in parts.items():
        if name != "label" and not isinstance(part, str):
            raise ValueError(
                f"tokenize: sample {index} has {columns.get(name, name)!r} of type "
                f"{type(part).__name__}; expected a string"
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


def shorten(index: int, tokens: dict[str, Any], length: int) -> None:
    """Cut what the tokenizer has not; ValueError where nothing to predict is left."""
    for name, part in tokens.items():
        if isinstance(part, list):
            tokens[name] = part[:length]
    labels = tokens.get("labels")
    if isinstance(labels, list) and all(label == IGNORE_INDEX for label in labels):
        raise ValueError(
            f"tokenize: sample {index} has no token of its completion within {length} tokens; "
            "expected a shorter prompt, or a larger max_length (--max-length)"
        )


def number_of(index: int, label: Any, label2id: Mapping[str, int] | None) -> Any:
    """The number of a label, or the label where it is one."""
    if not isinstance(label, str):
        return label
    if label2id and label in label2id:
        return label2id[label]
    names = ", ".join(map(repr, label2id or ())) or "none"
    raise ValueError(
        f"tokenize: sample {index} has the label {label!r}; expected a number, or a name that "
        f"the model's config.label2id has ({names})"
    )
