"""Files that are there in full or not at all, and say when they are damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

Indices = npt.NDArray[np.int64]
Tensors = dict[str, Tensor]

# What finalize_features writes, by the beginnings of files' names.
FINALIZED = "xtx weighted kernel kernel_weighted fisher fisher_kernel part solve".split()
MAX_HEADER = 1 << 24  # bytes; ours have about a thousand
# What reading bytes as a header that others wrote may raise.
NOT_SAFETENSORS = (ValueError, LookupError, TypeError, AttributeError, OverflowError)
DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8  # of the data of a safetensors file, in bytes


class StoreError(RuntimeError):
    """The store can't be written, or a file of it is missing."""


class StoreCorruptError(StoreError):
    """A file is damaged.

    Attributes
    ----------
    found : which file, and how; the message goes on with what makes it again.
    """

    def __init__(self, found: str, remedy: str = "") -> None:
        super().__init__(f"{found}. {remedy}" if remedy else found)
        self.found = found


class StoreMismatchError(ValueError):
    """The store holds something else than this run would add to. Nothing was changed.

    The message says how to go on in arguments of the library. What has other words for them finds
    it in the attributes.

    Attributes
    ----------
    found : what the store holds, and what this run has.
    another : the argument that works with a value that is new: "save_dir", "exp_name", or "".
    same : or the arguments that work with these values, those in the store. Without any, all
        settings would have to be the same; None where that can't be had by arguments.
    """

    def __init__(
        self,
        found: str,
        remedy: str = "",
        another: str = "",
        same: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(f"{found}. Nothing was changed; {remedy}" if remedy else found)
        self.found = found
        self.another = another
        self.same = same


class GoneError(StoreError):
    """A file was removed while it was to be read."""


def write_atomic(path: Path, write: Callable[[Any], Any], size: int, replace: bool = True) -> None:
    """Make ``path`` with what ``write(file)`` writes, ``size`` bytes, in full or not at all.

    replace : False leaves a file that is there by then: of several processes, the first wins.
    """
    temporary = temporary_path(path)
    try:
        with refused(path, size):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if replace or not linked(temporary, path):
                os.replace(temporary, path)
            sync_dir(path.parent)
    finally:
        remove_quietly(temporary)


def linked(temporary: Path, path: Path) -> bool:
    """Give a file another name, unless that is taken; False where there are no hard links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


@contextmanager
def refused(path: Path, size: int) -> Iterator[None]:
    """StoreError where the disk refuses what makes ``path``, of ``size`` bytes."""
    try:
        yield
    except OSError as error:
        raise write_error(path, size, error) from error


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that says which process is writing it."""
    unique = f"{machine()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{unique}.tmp")


def machine() -> str:
    """Names the machine, or the container on it: where ids of processes are those seen here.

    A container may have the host's name. The name is short, because names of files are.
    """
    names = [socket.gethostname()]
    with suppress(OSError):  # Linux has such a file
        names.append(os.readlink("/proc/self/ns/pid"))
    return digest(" ".join(names).encode())[:12]


def write_error(path: Path, size: int, error: OSError) -> StoreError:
    """The error where the disk refuses ``path``."""
    fix = "nothing that was there is lost; mend this and run again to go on"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return StoreError(
            f"no room for {path} ({size} bytes; {free} bytes free on that disk); {fix}"
        )
    return StoreError(f"can't write {path} ({error.strerror or error}); {fix}")


def make_dir(path: Path) -> None:
    """Make the directory and its parents."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"can't make the directory {path} ({error.strerror}); expected one that "
            "this user may write to"
        ) from error


def sync_dir(path: Path) -> None:
    """Flush a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the rename itself is still atomic
        pass
    finally:
        os.close(descriptor)


def remove_stale(folder: Path) -> None:
    """Remove temporary files that processes of this ``machine`` left when they were killed."""
    for path in folder.glob(".*.tmp"):
        name, pid, *unique = path.name.rsplit(".", 3)
        ours = len(unique) == 2 and pid.isdigit() and name.endswith(f".{machine()}")
        if ours and not alive(int(pid)):
            remove_quietly(path)


def remove_quietly(path: Path) -> None:
    """Remove a file that nothing depends on; on a read-only disk it stays."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process with this id exists here."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_json(path: Path, content: Mapping[str, Any], replace: bool = True) -> None:
    """A JSON object with its own checksum; ``replace`` as for ``write_atomic``."""
    body = json.dumps(dict(content), sort_keys=True)
    text = json.dumps({**content, "checksum": digest(body.encode())}, indent=1, sort_keys=True)
    write_atomic(path, lambda file: file.write(text.encode()), len(text), replace)


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote; raises StoreCorruptError if it is not that."""
    try:
        content = json.loads(path.read_bytes())
        stored = content.pop("checksum")
        made = digest(json.dumps(content, sort_keys=True).encode())
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise corrupt(path, f"it is not JSON with a checksum ({error})") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if made != stored:
        raise corrupt(path, f"its checksum is {made}, the file says {stored}")
    return dict(content)


def read_text(path: Path, newline: str | None = None) -> str:
    """The text of a file in UTF-8, without the mark that spreadsheets write first.

    newline : as for ``open``. Raises ValueError, by name, for other bytes.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); expected one") from None


def lines_of(text: str) -> list[str]:
    """The lines of what ``read_text`` gave; str.splitlines also ends them at U+2028 and others."""
    return text.removesuffix("\n").split("\n")


def parsed_json(path: Path, text: str) -> Any:
    """What a text from ``path`` says; ValueError, by name, where it isn't JSON."""
    try:
        return json.loads(text, object_pairs_hook=named_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: no JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # numbers too long, or lists in lists in lists
        raise ValueError(f"{path}: no JSON that can be read ({error})") from None


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of JSON's pairs; ValueError for a name that comes twice, one of which is lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} more than once in an object")
    return found


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Tensors with string metadata, a checksum for each tensor and one for the metadata."""
    whole = {name: t.contiguous() for name, t in tensors.items()}
    sums = {f"checksum.{name}": tensor_checksum(t) for name, t in whole.items()}
    described = dict(sorted({**metadata, **sums}.items()))
    described["checksum"] = digest(json.dumps(described, sort_keys=True).encode())
    order = sorted(whole, key=lambda name: (-whole[name].element_size(), name))  # aligned
    header: dict[str, Any] = {"__metadata__": described}
    end = 0
    for name in order:
        t = whole[name]
        place = [end, end := end + t.nbytes]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)

    def write(file: Any) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:  # each as it lies in memory: a matrix may be most of that
            file.write(tensor_bytes(whole[name]))

    write_atomic(path, write, 8 + len(text) + end)


def read_safetensors(
    path: Path, names: Iterable[str] | None, check: bool = True
) -> tuple[Tensors, dict[str, str]]:
    """Tensors ``names`` (None: all) and the metadata; raises StoreCorruptError, naming the file.

    All tensors are mapped. Chosen ones are read alone, since mapping a file makes the system read
    all of it. ``check=False`` leaves out the checksums of the tensors, for a reader of a few rows
    that has checked them before. The header's checksum is always checked.
    """
    try:
        if names is not None:
            tensors, metadata = read_chosen(path, names)
        else:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, RuntimeError) as error:  # torch's, where safe_open opens it again
        if path.exists() and not isinstance(error, FileNotFoundError):
            raise unreadable(path, error) from error
        raise GoneError(f"{path} is gone; expected nobody to delete it during the run") from error
    except (SafetensorError, *NOT_SAFETENSORS) as error:
        try:
            os.fsencode(path).decode()
        except UnicodeDecodeError:
            cure = "rename the folder, and run again to go on"
            raise StoreError(f"can't read {path} (a name in UTF-8 is needed); {cure}") from error
        raise corrupt(path, f"it is not a whole safetensors file ({error})") from error
    stored = metadata.pop("checksum", "")
    made = digest(json.dumps(dict(sorted(metadata.items())), sort_keys=True).encode())
    if made != stored:
        raise corrupt(path, f"the checksum of its header is {made}, the file says {stored!r}")
    for name, t in tensors.items() if check else ():
        made, said = tensor_checksum(t), metadata.get(f"checksum.{name}")
        if made != said:
            raise corrupt(path, f"the checksum of {name!r} is {made}, the file says {said!r}")
    return tensors, metadata


def read_chosen(path: Path, names: Iterable[str]) -> tuple[Tensors, dict[str, str]]:
    """Tensors ``names`` and the metadata of a safetensors file, and nothing else of it.

    Raises one of NOT_SAFETENSORS for a file that isn't one.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        header = json.loads(os.pread(descriptor, min(length, MAX_HEADER), 8))
        metadata = dict(header.pop("__metadata__"))
        start = 8 + length
        end = start + max((spec["data_offsets"][1] for spec in header.values()), default=0)
        if end != os.fstat(descriptor).st_size:
            raise ValueError(f"it has {os.fstat(descriptor).st_size} bytes, its header says {end}")
        tensors = {}
        for name in names:
            begin, stop = header[name]["data_offsets"]
            data = bytearray(os.pread(descriptor, stop - begin, start + begin))
            shape = header[name]["shape"]
            dtype = DTYPES[header[name]["dtype"]]
            empty = torch.empty(0, dtype=dtype, device="cpu")
            whole = torch.frombuffer(data, dtype=dtype) if data else empty
            tensors[name] = whole.reshape(shape)
        return tensors, metadata
    # torch's, for shapes and bytes that don't fit; and json's, for what is nested too deeply
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    finally:
        os.close(descriptor)


def unreadable(path: Path, error: OSError | RuntimeError) -> StoreError:
    """The error where the system doesn't let ``path`` be read, for want of memory or a right.

    Only a place in the file that can't be says that the file is damaged.
    """
    if getattr(error, "errno", None) == errno.EINVAL:
        return corrupt(path, str(error))
    return StoreError(f"can't read {path} ({getattr(error, 'strerror', None) or error})")


def corrupt(path: Path, reason: str) -> StoreCorruptError:
    """The error for a damaged file, with what to do about it."""
    redo = "run the same calls again"
    kind = re.split(r"[-.]", path.name)[0]
    if kind in ("train", "drawn", "target"):
        again = "score the same targets" if kind == "target" else "featurize the same data"
        redo = f"{again} again: only what the file held is computed again"
    elif kind in FINALIZED:
        redo = "call finalize_features again"
    if path.parent.name == "scores" or path.suffix == ".mmap":
        redo = "call finalize_scores again"
    return StoreCorruptError(f"{path} is damaged: {reason}", f"Delete the file and {redo}")


def digest(data: bytes) -> str:
    """128 bits of BLAKE2b, in hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def tensor_digest(t: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes: equal for equal tensors only."""
    h = hashlib.blake2b(f"{t.dtype}{list(t.shape)}".encode(), digest_size=16)
    h.update(tensor_bytes(t))
    return h.hexdigest()


def tensor_checksum(t: Tensor) -> str:
    """CRC-32 of a tensor's dtype, shape and bytes: finds damage at several GB/s."""
    return f"{zlib.crc32(tensor_bytes(t), zlib.crc32(f'{t.dtype}{list(t.shape)}'.encode())):08x}"


def tensor_bytes(t: Tensor) -> memoryview:
    """The bytes of a tensor."""
    if not t.numel():
        return memoryview(b"")
    places = t.detach().cpu().contiguous().unsqueeze(-1)  # a single entry may have any stride
    return places.view(torch.uint8).reshape(-1).numpy().data
