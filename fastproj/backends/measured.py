"""Which GPU backend is faster for a shape: looked up in ``measured.json``, never guessed.

``bench/measured_table.py`` writes that file from a benchmark's result. A shape without a
measurement near it keeps the registry's order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastproj.call import terms_of

TABLE = Path(__file__).with_name("measured.json")
VERSION = 1
BACKENDS = ("cuda", "triton")  # those for GPUs
# A measurement speaks for shapes up to this far from its own, in batch and in columns.
REACH = 4.0
# Backends sum in different orders, so a row's last bits depend on the backend. To let the backend
# depend on the batch must be worth it.
WORTH = 1.1


@dataclass(frozen=True)
class Hint:
    """The backend that comes first, and why; ``backend`` is None where nothing was measured."""

    backend: str | None
    reason: str


@dataclass(frozen=True)
class Measurement:
    """Rates (any unit) of the backends that were timed on one shape; terms: see docs/triton.md."""

    kind: str
    dtype: str
    terms: int
    batch: int
    cols: int
    rates: tuple[tuple[str, float], ...]

    def distance(self, batch: int, cols: int) -> float:
        """Octaves between the shapes; inf when out of reach."""
        apart = abs(math.log2(batch / self.batch)), abs(math.log2(cols / self.cols))
        return sum(apart) if max(apart) <= math.log2(REACH) else math.inf

    def hint(self, arch: str, usual: str) -> Hint:
        """``usual``, or the other backend if that is faster by more than WORTH."""
        ranked = sorted(self.rates, key=lambda each: -each[1])
        best, top = ranked[0]
        said = ", ".join(f"{name} {rate / top:.2f}" for name, rate in ranked)
        shape = f"B = {self.batch}, K = {self.cols}"
        chosen = best if top > WORTH * dict(self.rates)[usual] else usual
        kept = "" if chosen == best else f"; {usual} is kept for all batches"
        return Hint(chosen, f"measured on {arch} at {shape}: relative speed {said}{kept}")


def usual_backend(rows: Sequence[Measurement]) -> str:
    """The backend with the larger geometric mean of rates."""
    means = {
        name: math.prod(dict(row.rates)[name] ** (1 / len(rows)) for row in rows)
        for name in BACKENDS
    }
    return max(means, key=lambda name: means[name])


def parse(content: dict[str, Any]) -> dict[str, list[Measurement]]:
    """Measurements by architecture.

    Raises ValueError for another version, or a backend that is none of BACKENDS.
    """
    if content.get("version") != VERSION:
        raise ValueError(
            f"measured.json: received version {content.get('version')!r}; expected {VERSION}"
        )
    table: dict[str, list[Measurement]] = {}
    for arch, measured in content["architectures"].items():
        table[arch] = []
        for row in measured["rows"]:
            unknown = set(row["rates"]) - set(BACKENDS)
            if unknown or len(row["rates"]) < 2:
                raise ValueError(
                    f"measured.json: received rates of {sorted(row['rates'])}; "
                    f"expected those of {' and '.join(BACKENDS)}"
                )
            facts = (row["kind"], row["dtype"], row["terms"], row["batch"], row["cols"])
            table[arch].append(Measurement(*facts, tuple(row["rates"].items())))
    return table


@cache
def table() -> dict[str, list[Measurement]]:
    """The committed measurements."""
    return parse(json.loads(TABLE.read_text(encoding="utf-8")))


@cache
def arch_of(index: int) -> str:
    """Such as "sm_90" or "gfx942"."""
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def look_up(
    arch: str, dtype: torch.dtype, kind: str, precision: str, batch: int, cols: int
) -> Hint:
    """What the nearest measurement of the same architecture, kind, dtype and terms says."""
    measured = table().get(arch)
    if not measured:
        return Hint(None, f"not measured on {arch}")
    wanted = (kind, str(dtype).removeprefix("torch."), terms_of(dtype, precision))
    alike = [row for row in measured if (row.kind, row.dtype, row.terms) == wanted]
    nearest = min(alike, key=lambda row: row.distance(batch, cols), default=None)
    if nearest is None or nearest.distance(batch, cols) == math.inf:
        return Hint(None, f"nothing like it was measured on {arch}")
    return nearest.hint(arch, usual_backend([row for row in alike if row.cols == nearest.cols]))
