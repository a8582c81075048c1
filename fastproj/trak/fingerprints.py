"""Hashes of a model: which checkpoint it holds, and how its gradients are laid out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.trak.files import digest, tensor_digest

JOINED_BYTES = 1 << 16  # tensors up to this size are summed together
WORD = 8  # bytes
ROWS = 8  # of words that are summed before they are weighted
PART_BYTES = 1 << 27  # summed at once: an eighth of it is held
WEIGHTS = 4099  # a prime, so that no row or column of a matrix has the same weight throughout

Sums = dict[tuple[str, ...], int]


def model_digest(model: nn.Module) -> str:
    """Hash of all parameters and buffers of a model, with their names."""
    return combined_digest(model_digests(model))


def model_digests(model: nn.Module) -> dict[str, str]:
    """The hash of each parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor_digest(t) for name, t in named}


def combined_digest(digests: Mapping[str, str]) -> str:
    """Hash of several hashes and their names, in whatever order: a forward may register anew."""
    h = hashlib.blake2b(digest_size=16)
    for name, value in sorted(digests.items()):
        h.update(f"{name}:{value};".encode())
    return h.hexdigest()


def layout_fingerprint(model: nn.Module, names: Iterable[str]) -> str:
    """Hash of the names and shapes of the parameters in order: what decides a gradient's layout."""
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    return digest(json.dumps([[name, shapes[name]] for name in names]).encode())


# ---- a hash for every batch ---------------------------------------------------------------------


def quick_sums(tensors: Mapping[str, Tensor]) -> Sums:
    """A 64-bit checksum of each large tensor and of all small ones of a kind, by their names.

    Equal tensors in the same layout have equal sums, and where a tensor is written to they differ,
    but for chance. It takes little more than reading them once, where a digest takes 30 times that.
    """
    groups: dict[Any, list[str]] = {}
    for name, t in tensors.items():
        small = t.nbytes <= JOINED_BYTES
        groups.setdefault((t.device, t.dtype) if small else name, []).append(name)
    sums: dict[torch.device, list[Tensor]] = {}
    names: dict[torch.device, list[tuple[str, ...]]] = {}
    for group in groups.values():
        flats = [in_memory_order(tensors[name].detach()) for name in group]
        flat = flats[0] if len(flats) == 1 else torch.cat(flats)
        sums.setdefault(flat.device, []).append(weighted_sum(flat))
        names.setdefault(flat.device, []).append(tuple(group))
    found: Sums = {}
    for device, values in sums.items():
        found.update(zip(names[device], torch.stack(values).cpu().tolist(), strict=True))
    return found


def in_memory_order(t: Tensor) -> Tensor:
    """The entries of a tensor in one row; a view where they lie side by side."""
    t = t.permute(sorted(range(t.dim()), key=t.stride, reverse=True))
    return t.contiguous().view(-1)


def weighted_sum(flat: Tensor) -> Tensor:
    """A checksum of the bytes of ``flat`` [n] that depends on their places; int64, 0-dimensional.

    Of each PART_BYTES, 64-bit words w[r, j] in ROWS rows are summed as
    ``sum_j a[j % WEIGHTS] sum_r w[r, j]`` modulo 2^64, with random odd a. The sums of several parts
    are summed in the same way.
    """
    data = flat.unsqueeze(-1).view(torch.uint8).view(-1)  # a single entry may have any stride
    weights = weights_on(flat.device)
    lead = min(-data.storage_offset() % WORD, len(data))
    end = lead + (len(data) - lead) // (WORD * ROWS) * (WORD * ROWS)
    sums = []
    if lead or end < len(data):
        sums.append(torch.cat([data[:lead], data[end:]]).long())  # fewer than 72
    for part in data[lead:end].split(PART_BYTES) if end > lead else ():
        words = part.view(torch.int64).view(ROWS, -1).sum(0)
        whole = len(words) // WEIGHTS * WEIGHTS
        sums += [w for w in (words[:whole].view(-1, WEIGHTS), words[whole:]) if w.numel()]
    totals = [(w * weights[: w.shape[-1]]).sum() for w in sums]
    if len(totals) == 1:
        return totals[0]
    places = torch.arange(len(totals), device=flat.device) % WEIGHTS
    return (torch.stack(totals) * weights[places]).sum() if totals else weights.new_zeros(())


@cache
def weights_on(device: torch.device) -> Tensor:
    """WEIGHTS random odd numbers, int64."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(1 << 62), 1 << 62, (WEIGHTS,), generator=generator, device="cpu")
    return (2 * numbers + 1).to(device)
