"""Batches as TRAK sees them: nests of tensors with one first dimension, and parts that are no
tensors.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastproj.checks import describe

SHARED = (str, bytes, int, float, complex, bool, type(None), np.generic)  # the same for all samples

COLLATE = " (a list of samples becomes a batch by torch.utils.data.default_collate)"
OTHER_PARTS = (
    " (a number that all samples share goes in as int or float, a tensor [1, ...] that they share "
    "as t.expand(B, *t.shape[1:]); a batch of graphs as an object that gives samples out, as "
    "torch_geometric.data.Batch does)"
)


class SampleList(list[Any]):
    """A list with one entry for each sample of a batch: strings, or tensors of unequal lengths."""


class SampleTuple(tuple[Any, ...]):
    """The same where the batch has a tuple."""


# ---- nests --------------------------------------------------------------------------------------


def children(tree: Any) -> list[tuple[Any, Any]] | None:
    """(key, value) of what a tuple, list, dict or dataclass holds; None for anything else."""
    if isinstance(tree, SampleList | SampleTuple):
        return None
    if isinstance(tree, Mapping):
        return list(tree.items())
    if isinstance(tree, list | tuple):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type) and not is_object(tree):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None


def with_children(tree: Any, values: list[Any]) -> Any:
    """A nest of the same type (namedtuple, dataclass, ...) that holds other values."""
    if type(tree) in (tuple, list):
        return type(tree)(values)
    if isinstance(tree, Mapping):
        pairs = dict(zip(tree, values, strict=True))
        if type(tree) is dict or not isinstance(tree, MutableMapping):
            return pairs
        other = copy.copy(tree)
        for key, value in pairs.items():
            other[key] = value
        return other
    if hasattr(tree, "_make"):  # a namedtuple
        return tree._make(values)
    if isinstance(tree, list | tuple):
        return type(tree)(values)
    other = copy.copy(tree)
    for field, value in zip(dataclasses.fields(tree), values, strict=True):
        object.__setattr__(other, field.name, value)  # of frozen ones too
    return other


def map_leaves(
    function: Callable[[Tensor], Any],
    tree: Any,
    others: Callable[[Any], Any] = lambda part: part,
) -> Any:
    """``tree`` with ``function`` applied to its tensors, ``others`` to its other leaves."""
    if isinstance(tree, Tensor):
        return function(tree)
    inside = children(tree)
    if inside is None:
        return others(tree)
    return with_children(tree, [map_leaves(function, value, others) for _, value in inside])


def parts(tree: Any) -> Iterator[Any]:
    """All leaves of a nest, in order: tensors and others."""
    inside = children(tree)
    if inside is None:
        yield tree
    else:
        for _, value in inside:
            yield from parts(value)


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors [B, ...] of a prepared batch, in order."""
    return (part for part in parts(tree) if isinstance(part, Tensor))


# ---- objects that hold a batch ------------------------------------------------------------------


def is_object(part: Any) -> bool:
    """Whether a part is an object that holds samples: it has ``select`` and a length, or it is a
    batch of graphs as PyTorch Geometric makes it.
    """
    return not isinstance(part, Tensor | Mapping | type) and (
        is_graphs(part) or (hasattr(part, "select") and hasattr(part, "__len__"))
    )


def is_graphs(part: Any) -> bool:
    """Whether a part is a ``torch_geometric.data.Batch``."""
    return all(hasattr(part, name) for name in ("num_graphs", "to_data_list", "from_data_list"))


def count_of(part: Any) -> int:
    """How many samples an object holds."""
    return int(part.num_graphs) if is_graphs(part) else len(part)


def taken(part: Any, rows: list[int]) -> Any:
    """The samples ``rows`` of a part that is no tensor: an object, or one entry for each sample."""
    if isinstance(part, SampleList | SampleTuple):
        return type(part)(part[row] for row in rows)
    if is_graphs(part):
        samples = part.to_data_list()
        return type(part).from_data_list([samples[row] for row in rows])
    return part.select(rows)


# ---- batches ------------------------------------------------------------------------------------


class Lists:
    """What the lists inside a loader's batches are: parts of the batch, or one entry for each
    sample.

    A list of B tensors with B rows each could be either; other batches of the loader say which.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bool] = {}  # whether they are one entry a sample
        self._assumed: dict[tuple[Any, ...], int] = {}  # batch sizes at which that was not clear

    def count(self, path: tuple[Any, ...], tree: Any) -> int:
        """How many samples a list is of, where nothing else in the batch says it."""
        firsts = {t.shape[:1] for t in parts(tree) if isinstance(t, Tensor)}
        as_parts = len(firsts) == 1 and () not in firsts and not self._known.get(path)
        return int(firsts.pop()[0]) if as_parts else len(tree)

    def by_sample(self, function: str, path: tuple[Any, ...], tree: Any, size: int) -> bool:
        """Whether a list has an entry for each sample. Raises ValueError where it can't be used."""
        tensors = [part for part in parts(tree) if isinstance(part, Tensor)]
        as_parts = bool(tensors) and all(t.dim() and t.shape[0] == size for t in tensors)
        as_samples = len(tree) == size
        if as_parts and as_samples:
            if path not in self._known:
                self._assumed.setdefault(path, size)
            return self._known.get(path, False)
        name = "".join(f"[{key!r}]" for key in path)
        if not as_parts and not as_samples:
            cure = COLLATE if tensors else "; what all samples share belongs into the task itself"
            raise ValueError(
                f"{function}: received batch{name}, a {type(tree).__name__} of {len(tree)}, in a "
                f"batch of {size} samples; expected {size} entries, one for each sample, or "
                f"tensors [{size}, ...]{cure}"
            )
        if as_samples and path in self._assumed:
            raise ValueError(
                f"{function}: received batch{name}, a list with one entry for each sample. In an "
                f"earlier batch of {self._assumed[path]} it could as well hold parts of the whole "
                "batch, and was taken for that: what was computed from it may be of mixed samples. "
                "Expected load_from_save_dir=False and a first batch in which the number of "
                "samples isn't the number of rows of every entry"
            )
        self._known[path] = as_samples
        return as_samples


def prepare(
    function: str,
    batch: Any,
    device: torch.device,
    count: int | None = None,
    lists: Lists | None = None,
) -> tuple[tuple[Any, ...], int]:
    """``batch`` as a tuple on ``device``, and its size B.

    A dict, a dataclass or an object that holds samples becomes a tuple of one; a namedtuple stays
    one. Tensors are [B, ...]. Strings and numbers are passed as they are. A list inside of the
    batch is a part of it where its tensors are [B, ...], otherwise it has one entry for each
    sample.

    B is the first dimension of the first tensor outside of such lists, else what an object says,
    else ``count``, else what the first list says.

    Raises TypeError or ValueError, naming ``function``, for what can't be a batch.
    """
    if not isinstance(batch, tuple) and (isinstance(batch, Mapping) or holds_samples(batch)):
        batch = (batch,)
    if not isinstance(batch, Sequence) or isinstance(batch, str | bytes):
        one = isinstance(batch, Tensor)
        received = describe(batch) if one else f"a batch of type {type(batch).__name__}"
        raise TypeError(
            f"{function}: received {received}; expected a tuple or list such as "
            "(images, labels), or a dict; a single input goes in as (input,)"
        )
    if not isinstance(batch, tuple):
        batch = tuple(batch)
    lists = Lists() if lists is None else lists
    size = size_of(function, batch, count, lists)
    return place(function, batch, size, device, lists, ()), size


def holds_samples(batch: Any) -> bool:
    """Whether an object is a batch by itself: a dataclass, or one that gives samples out."""
    if isinstance(batch, Tensor | list | type):
        return False
    return is_object(batch) or dataclasses.is_dataclass(batch)


def size_of(function: str, batch: tuple[Any, ...], count: int | None, lists: Lists) -> int:
    """B of a batch that is not prepared yet."""
    tensors = [part for part in outer(batch) if isinstance(part, Tensor)]
    samples = len(batch) > 1 and all(children(part) is not None for part in batch)
    check_shapes(function, tensors, COLLATE if samples else "")
    if tensors:
        return int(tensors[0].shape[0])
    for part in outer(batch):
        if is_object(part):
            return count_of(part)
    if count is not None and any(children(part) is not None for part in batch):
        return count
    for part in parts(batch):
        if not isinstance(part, (Tensor, *SHARED)) and children(part) is None:
            raise refused(function, part)
    for path, tree in inner_lists(batch):
        return lists.count(path, tree)
    raise ValueError(
        f"{function}: received an empty batch ({len(batch)} parts, none of them a tensor, a list "
        "with an entry for each sample, or an object that holds samples); expected at least one"
    )


def outer(tree: Any, top: bool = True) -> Iterator[Any]:
    """The leaves of the batch that lie in no list or plain tuple inside it."""
    inside = children(tree)
    if inside is None:
        yield tree
    elif top or not is_list(tree):
        for _, value in inside:
            yield from outer(value, False)


def inner_lists(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(keys that lead to it, list) of the outermost lists and plain tuples inside a batch."""
    for key, value in children(tree) or ():
        if is_list(value):
            yield (*path, key), value
        else:
            yield from inner_lists(value, (*path, key))


def is_list(tree: Any) -> bool:
    """Whether what a nest holds may be its samples."""
    return isinstance(tree, list | tuple) and not hasattr(tree, "_make")


def check_shapes(function: str, tensors: list[Tensor], cure: str) -> None:
    """Raise TypeError or ValueError unless these tensors are dense, of one first dimension."""
    for t in tensors:
        check_layout(function, t)
        if t.dim() == 0 or t.shape[0] != (tensors[0].shape[0] if tensors[0].dim() else -1):
            more = f" and {len(tensors) - 4} more" if len(tensors) > 4 else ""
            raise ValueError(
                f"{function}: received a batch of {', '.join(map(describe, tensors[:4]))}{more}; "
                "expected tensors that share their first dimension, the batch size"
                f"{cure or OTHER_PARTS}"
            )


def check_layout(function: str, t: Tensor) -> None:
    """Raise TypeError unless a tensor is dense."""
    if t.is_nested:
        raise TypeError(
            f"{function}: received a batch with a nested tensor; expected a list with one tensor "
            "for each sample (list(t.unbind()))"
        )
    if t.layout != torch.strided:
        raise TypeError(
            f"{function}: received a batch with a tensor of layout {t.layout}; expected "
            "dense tensors (to_dense() makes one of a sparse one)"
        )


def place(
    function: str,
    tree: Any,
    size: int,
    device: torch.device,
    lists: Lists,
    path: tuple[Any, ...],
) -> Any:
    """A part of a batch of ``size`` samples, moved to ``device``, with lists by sample marked as
    such.
    """
    if isinstance(tree, Tensor):
        check_layout(function, tree)
        return constant(tree, device)
    if is_object(tree):
        if count_of(tree) != size:
            raise ValueError(
                f"{function}: received a {type(tree).__name__} that holds {count_of(tree)} samples "
                f"in a batch of {size}; expected one number of samples in all parts"
            )
        return tree.to(device) if hasattr(tree, "to") else tree
    marked = isinstance(tree, SampleList | SampleTuple)
    if path and is_list(tree) and (marked or lists.by_sample(function, path, tree, size)):
        moved = [map_leaves(lambda t: constant(t, device), entry) for entry in tree]
        return SampleList(moved) if isinstance(tree, list) else SampleTuple(moved)
    inside = children(tree)
    if inside is not None:
        if path and not inside and size:
            raise ValueError(
                f"{function}: received an empty {type(tree).__name__} inside the batch; expected "
                "tensors, or an entry for each sample"
            )
        return with_children(
            tree,
            [place(function, value, size, device, lists, (*path, key)) for key, value in inside],
        )
    if isinstance(tree, SHARED):
        return tree
    raise refused(function, tree)


def refused(function: str, part: Any) -> TypeError:
    """What to say of a part that no batch can have."""
    array = hasattr(part, "shape") and hasattr(part, "dtype")
    content = f"{list(part.shape)} {part.dtype}" if array else f"{part!r:.60}"
    expected = (
        "tensors, lists with an entry for each sample, strings, numbers, or an object with "
        "select(rows) and a length"
    )
    if array:
        expected = (
            "tensors (torch.as_tensor(numpy.asarray(it)) is one)"
            if getattr(part.dtype, "kind", "f") in "biufc"
            else "a list with an entry for each sample (it.tolist())"
        )
    return TypeError(
        f"{function}: received {type(part).__name__} {content} inside the batch; "
        f"expected {expected}"
    )


def constant(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``, detached. A tensor of inference mode becomes an ordinary one."""
    t = t.detach().to(device)
    return t.clone() if t.is_inference() else t


def size(batch: Any) -> int:
    """B, the number of samples of a prepared batch."""
    found = list(parts(batch))
    for part in found:
        if isinstance(part, Tensor):
            return int(part.shape[0])
    for part in found:
        if isinstance(part, SampleList | SampleTuple):
            return len(part)
        if is_object(part):
            return count_of(part)
    raise ValueError("received a batch without a part that says how many samples it holds")


def select(batch: Any, rows: Any) -> Any:
    """The samples ``rows`` (a slice, mask, list or index) of a prepared batch.

    An index takes the batch dimension off. A list by sample becomes its entry. An object keeps its
    type, and holds one sample.
    """

    def part_of(part: Any) -> Any:
        if isinstance(part, SHARED):
            return part
        if isinstance(rows, int):
            one = taken(part, [rows])
            return one[0] if isinstance(part, SampleList | SampleTuple) else one
        if isinstance(rows, slice):
            return taken(part, list(range(size([part])))[rows])
        return taken(part, np.arange(size([part]))[np.asarray(as_list(rows))].tolist())

    return map_leaves(lambda t: t[rows], batch, part_of)


def as_list(rows: Any) -> Any:
    """Rows given as a tensor, off the device."""
    return rows.tolist() if isinstance(rows, Tensor) else rows


def unpack(batch: tuple[Any, ...]) -> tuple[list[Tensor], Callable[[Sequence[Any]], Any]]:
    """The tensors of a prepared batch, and what puts others in their place.

    Raises TypeError for a batch whose single samples can't be had by indexing tensors.
    """
    for part in parts(batch):
        if not isinstance(part, Tensor) and not isinstance(part, SHARED):
            raise TypeError(
                f"received a batch with a {kind_of(part)}, which can't be vectorised over; "
                'expected tensors, strings and numbers (gradient_computer="loop" takes all)'
            )

    def rebuild(tensors: Sequence[Any]) -> Any:
        given = iter(tensors)
        return map_leaves(lambda _: next(given), batch)

    return list(leaves(batch)), rebuild


def kind_of(part: Any) -> str:
    """A part that is no tensor, in words."""
    if isinstance(part, SampleList | SampleTuple):
        return f"list of {type(part[0]).__name__} by sample" if part else "list by sample"
    return type(part).__name__


def structure(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Equal for batches whose samples have equal shapes. Parts that are no tensors count by
    content.
    """
    found: list[Any] = []
    for part in parts(batch):
        if isinstance(part, Tensor):
            found.append((tuple(part.shape[1:]), part.dtype))
        else:
            h = hashlib.blake2b(digest_size=8)
            update(h, part)
            found.append(h.hexdigest())
    return tuple(found)


# ---- content ------------------------------------------------------------------------------------


def content_ids(batch: tuple[Any, ...], batch_size: int) -> npt.NDArray[np.int64]:
    """64 bits of a hash of each sample's content, int64 [B]: equal inputs have equal ids.

    The hash takes a sample's bytes from a tensor, its entry from a list by sample, and from an
    object what the object gives out for it. Strings and numbers that all samples share are in every
    sample's hash.
    """
    digests = [hashlib.blake2b(digest_size=8) for _ in range(batch_size)]
    for part in parts(batch):
        if isinstance(part, Tensor):
            kind = f"{part.dtype}{list(part.shape[1:])}".encode()
            for digest, row in zip(digests, byte_rows(part), strict=True):
                digest.update(kind)
                digest.update(row)
            continue
        shared = isinstance(part, SHARED)
        graphs = part.to_data_list() if is_graphs(part) else None
        for i, digest in enumerate(digests):
            update(digest, part if shared else graphs[i] if graphs else select([part], i)[0])
    return np.frombuffer(b"".join(d.digest() for d in digests), dtype=np.int64)


def byte_rows(t: Tensor) -> npt.NDArray[np.uint8]:
    """The bytes of ``t`` [B, ...], uint8 [B, bytes per sample]."""
    if not t.numel():
        return np.zeros((t.shape[0], 0), dtype=np.uint8)
    places = t.detach().cpu().contiguous().unsqueeze(-1)  # a single entry may have any stride
    return places.view(torch.uint8).reshape(t.shape[0], -1).numpy()


def update(digest: Any, part: Any, within: tuple[int, ...] = ()) -> None:
    """Add the content of anything to a hash: what is equal adds the same bytes."""
    if isinstance(part, Tensor | np.ndarray):
        array = part if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part))
        digest.update(f"{array.dtype}{list(array.shape)}".encode())
        digest.update(byte_rows(array.unsqueeze(0))[0])
    elif isinstance(part, SHARED):
        digest.update(f"{type(part).__name__}:{part!r};".encode())
    elif (inside := contents(part)) is not None and id(part) not in within:
        digest.update(f"{type(part).__name__}{len(inside)}".encode())
        for key, value in inside:
            update(digest, key, (*within, id(part)))
            update(digest, value, (*within, id(part)))
    elif inside is None:
        digest.update(pickled(part))


def contents(part: Any) -> list[tuple[Any, Any]] | None:
    """(key, value) of what a thing holds; None where that can't be seen."""
    if isinstance(part, SampleList | SampleTuple):
        return list(enumerate(part))
    if hasattr(part, "to_dict"):  # a graph
        return list(part.to_dict().items())
    inside = children(part)
    if inside is None and is_object(part):
        inside = list(getattr(part, "__dict__", {}).items()) or None
    return inside


def pickled(part: Any) -> bytes:
    """What a thing is made of, as bytes. Raises TypeError for one that has none."""
    try:
        return pickle.dumps(part, protocol=4)
    except Exception as error:
        raise TypeError(
            f"received a {type(part).__name__} inside the batch, whose content can't be read "
            f"({error}); expected tensors, arrays, strings, numbers, or nests of them"
        ) from error
