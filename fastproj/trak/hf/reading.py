"""Files of samples: JSON lines, texts, parquet, and what the package datasets wrote."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastproj.trak.files import lines_of, named_once, parsed_json, read_text

FILES = ".jsonl (or .json), .txt, .parquet, or a folder of datasets' save_to_disk"

logger = logging.getLogger("fastproj.trak")


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
                    numbered.append((number, json.loads(line, object_pairs_hook=named_once)))
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
