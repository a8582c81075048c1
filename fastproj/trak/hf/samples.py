"""Tokenised samples: any data set as a sequence of dicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import IterableDataset

Sample = Mapping[str, Any]

EXPECTED = (
    "expected a datasets.Dataset, a sequence or iterable of dicts such as "
    "{'input_ids': [5, 9, 2]}, "
    "or what a tokenizer returns for a list of texts"
)


class Samples(Sequence[Sample]):
    """The samples of a data set, numbered as they come.

    Parameters
    ----------
    function, name : of the argument, for messages.
    data : a ``datasets.Dataset`` or another sequence of dicts; an iterable of dicts, which is read
        into memory once; or a dict of columns, as a tokenizer returns it. Entries are what a
        tokenizer makes of one text: lists, arrays or tensors of numbers.

    Raises
    ------
    TypeError, ValueError
        For anything else, and for no samples.
    """

    def __init__(self, function: str, name: str, data: Any) -> None:
        self._where = f"{function}: received {name}"
        self._rows = self._sequence(data)
        if not len(self):
            raise ValueError(f"{self._where} without a sample; {EXPECTED}")
        self[0]  # is checked

    def _sequence(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            if data and all(hasattr(part, "column_names") for part in data.values()):
                raise TypeError(
                    f"{self._where} as a dict of data sets ({', '.join(map(repr, data))}); "
                    f"expected one of them, such as data[{next(iter(data))!r}]"
                )
            return Columns(self._where, data)
        if hasattr(data, "iloc"):
            raise TypeError(
                f"{self._where} of type {type(data).__name__}; expected a sequence of dicts, as "
                "datasets.Dataset.from_pandas(data) or data.to_dict('records') makes of it"
            )
        if isinstance(data, str | bytes) or not (
            isinstance(data, Iterable) or hasattr(data, "__getitem__")
        ):
            raise TypeError(f"{self._where} of type {type(data).__name__}; {EXPECTED}")
        # PyTorch's iterable data sets have a __getitem__ that raises.
        numbered = hasattr(data, "__getitem__") and not isinstance(data, IterableDataset)
        if hasattr(data, "__len__") and numbered:
            return data
        return list(data)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        sample = self._rows[index]
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"{self._where} with sample {index} of type {type(sample).__name__}; {EXPECTED}"
            )
        if "input_ids" not in sample:
            raise ValueError(
                f"{self._where} with sample {index} that has "
                f"{', '.join(map(repr, sample)) or 'no entries'}; expected tokenised samples with "
                "'input_ids' (fastproj.trak.hf.tokenize makes them of texts)"
            )
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class Columns(Sequence[Sample]):
    """A dict of columns as a sequence of samples."""

    def __init__(self, where: str, columns: Mapping[str, Any]) -> None:
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name!r}: {size}" for name, size in sizes.items())
            raise ValueError(
                f"{where} as columns of unequal lengths ({listed}); expected one entry of each "
                "column for each sample"
            )
        # Of a Series, [i] is what has the name i in its index.
        self._columns = {name: getattr(c, "iloc", c) for name, c in columns.items()}
        self._size = next(iter(sizes.values()), 0)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        return {name: column[index] for name, column in self._columns.items()}
