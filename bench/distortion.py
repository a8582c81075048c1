"""How much a projection distorts squared norms and inner products, beside what theory says.

For R of K columns, scaled so that E |a R|^2 = |a|^2, an estimate's error has mean 0. Its variance,
for vectors a, b and the parts a_t, b_t of them in tiles of ``block`` rows:

                  |a R|^2 / |a|^2                       (a R) . (b R) / (|a| |b|)
    gaussian      2 / K                                 (1 + c^2) / K
    rademacher    2 / K (1 - sum_i a_i^4 / |a|^4)       (1 + c^2 - 2 sum_i a_i^2 b_i^2 / n) / K
    sjlt          2 / K (1 - sum_t |a_t|^4 / |a|^4)     (1 + c^2 - sum_t (|a_t|^2 |b_t|^2
                                                             + (a_t . b_t)^2) / n) / K

with c = a . b / (|a| |b|) and n = |a|^2 |b|^2. Dense kinds: the fourth moments of the entries, 1
and 3 (that of fastproj's Gaussian table is 2.994). sjlt: inside a tile R's columns are a signed
permutation, which keeps norms; a column adds one entry from each tile, at uniform places with
independent signs, so that only products of entries of different tiles remain. Hence never more than
2 / K, at any block that divides K, and the less the larger the block. What a small number of
entries a row costs is in the tails: rarer, larger errors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from tqdm import tqdm

import fastproj
from bench.battery import images, training

ENTRIES = (1, 2, 4, 8, 16)  # a row of sjlt: the block is K over that
TAIL = 0.999
# Measured and theory may differ by so many standard errors of the measurement.
MOST_ERRORS = 6.0
LEAST_EVENTS = 100  # draws with an error, below which a standard error means nothing


@dataclass(frozen=True)
class Kind:
    """A kind of matrix, with its block where it has one."""

    kind: str
    block: int = 0
    entries: int = 0  # a row, of sjlt

    @property
    def name(self) -> str:
        """As in the table: "sjlt 4" has four entries a row."""
        return f"{self.kind} {self.entries}" if self.entries else self.kind


def kinds_of(cols: int) -> list[Kind]:
    """Every kind, sjlt with 1 to 16 entries a row where such a block exists."""
    sparse = [Kind("sjlt", cols // entries, entries) for entries in ENTRIES]
    usable = [k for k in sparse if 16 <= k.block <= 65536 and not k.block & (k.block - 1)]
    return [Kind("rademacher"), Kind("gaussian"), *usable]


# ---- theory -------------------------------------------------------------------------------------


def tiles(a: Tensor, block: int) -> Tensor:
    """[B, P] -> [B, tiles, block], the last one filled up with zeros."""
    return torch.nn.functional.pad(a, (0, -a.shape[1] % block)).unflatten(1, (-1, block))


def norm_variance(kind: Kind, cols: int, a: Tensor) -> Tensor:
    """Variance of |a R|^2 / |a|^2 for each row of a [B, P], float64 [B]."""
    return inner_variance(kind, cols, a, a)


def inner_variance(kind: Kind, cols: int, a: Tensor, b: Tensor) -> Tensor:
    """Variance of (a R) . (b R) / (|a| |b|) for rows of a, b [B, P], float64 [B].

    Raises ValueError for a kind without a formula here.
    """
    a, b = a.double(), b.double()
    a, b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
    total = 1 + (a * b).sum(1).square()
    if kind.kind == "rademacher":
        total = total - 2 * (a * b).square().sum(1)
    elif kind.kind == "sjlt":
        a_t, b_t = tiles(a, kind.block), tiles(b, kind.block)
        of_tile = a_t.square().sum(2) * b_t.square().sum(2) + (a_t * b_t).sum(2).square()
        total = total - of_tile.sum(1)
    elif kind.kind != "gaussian":
        raise ValueError(f"inner_variance: received kind={kind.kind!r}; expected a known one")
    return total / cols


# ---- vectors ------------------------------------------------------------------------------------


def nonzeros(count: int) -> Callable[[int, int, torch.Generator], Tensor]:
    """Normal numbers at ``count`` random places."""

    def make(batch: int, rows: int, generator: torch.Generator) -> Tensor:
        places = torch.rand(batch, rows, generator=generator).topk(count).indices
        values = torch.randn(batch, count, generator=generator)
        return torch.zeros(batch, rows).scatter_(1, places, values)

    return make


def normal(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(batch, rows, generator=generator)


def heavy_tailed(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """Normal numbers over u^(1 / 1.2), u uniform: no variance."""
    noise = torch.randn(batch, rows, generator=generator)
    return noise / torch.rand(batch, rows, generator=generator).clamp(min=1e-6) ** (1 / 1.2)


def two_chunks(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in two runs of 16 aligned rows, which sjlt moves as a whole."""
    places = torch.rand(batch, rows // 16, generator=generator).topk(2).indices
    values = torch.randn(batch, 2, 16, generator=generator)
    at = places[:, :, None].expand(-1, -1, 16)
    return torch.zeros(batch, rows // 16, 16).scatter_(1, at, values).flatten(1)


def linear_layer(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """g a^T of one token: half of the inputs a are zero, as after a ReLU."""
    side = int(rows**0.5)
    a = torch.randn(batch, side, generator=generator).relu()
    g = torch.randn(batch, side, generator=generator)
    return filled((g[:, :, None] * a[:, None, :]).flatten(1), rows)


def convolution(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """sum over 49 places of g a^T, a smooth 3 x 3 patches of 16 channels, most g zero."""
    patch = 9 * 16
    outputs = max(1, rows // patch)
    level = torch.randn(batch, 49, 16, 1, generator=generator)
    a = (level + 0.3 * torch.randn(batch, 49, 16, 9, generator=generator)).relu().flatten(2)
    g = torch.randn(batch, 49, outputs, generator=generator)
    g = g * (torch.rand(g.shape, generator=generator) < 0.2)
    if rows < patch:
        return (g.mT @ a).flatten(1)[:, :rows]
    return filled((g.mT @ a).flatten(1), rows)


def embedding(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in 12 rows of an embedding of width 32."""
    width = 32
    words = torch.rand(batch, rows // width, generator=generator)
    used = words >= words.topk(min(12, rows // width)).values[:, -1:]
    return (
        torch.randn(batch, rows // width, width, generator=generator) * used[..., None]
    ).flatten(1)


def filled(a: Tensor, rows: int) -> Tensor:
    """[B, p <= P] -> [B, P], zeros behind."""
    return torch.nn.functional.pad(a, (0, rows - a.shape[1]))


@dataclass(frozen=True)
class RealGradients:
    """Per-sample gradients of a trained model's loss, [n, p]."""

    grads: Tensor

    def __call__(self, batch: int, rows: int, generator: torch.Generator) -> Tensor:
        """Those of random samples."""
        chosen = torch.randint(len(self.grads), (batch,), generator=generator)
        return filled(self.grads[chosen, :rows], rows)


def real_gradients(*, epochs: int | None) -> RealGradients:
    """Of a CNN trained on scikit-learn's digits; 3,530 parameters."""
    problem = images.digits()
    if epochs is not None:
        problem = problem.with_training(epochs=epochs)
    with tempfile.TemporaryDirectory() as cache:
        (weights,) = training.checkpoints(problem, 1, Path(cache))
    model = problem.model()

    def loss(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        batch = tuple(part[None] for part in sample)
        return -problem.question.likelihood(model, params, batch).sum()

    found = vmap(grad(loss), (None, *(0 for _ in problem.samples)))(weights, *problem.samples)
    grads = torch.cat([part.flatten(1) for part in found.values()], 1)  # [n, p]
    return RealGradients(grads[grads.norm(dim=1) > 0])


Family = Callable[[int, int, torch.Generator], Tensor]

FAMILIES: dict[str, Family] = {
    "normal": normal,
    "1 nonzero": nonzeros(1),
    "2 nonzeros": nonzeros(2),
    "10 nonzeros": nonzeros(10),
    "heavy-tailed": heavy_tailed,
    "2 chunks of 16": two_chunks,
    "linear layer": linear_layer,
    "convolution": convolution,
    "embedding": embedding,
}


# ---- measurement --------------------------------------------------------------------------------


@dataclass
class Errors:
    """Errors of one kind on one family: of norms and inner products [draws, B], and theory."""

    norm: list[Tensor]
    inner: list[Tensor]
    norm_theory: list[Tensor]
    inner_theory: list[Tensor]


def measure(
    families: dict[str, Family], rows: int, cols: int, draws: int, batch: int, seed: int = 0
) -> list[dict[str, Any]]:
    """A row for each kind and family.

    Each draw has fresh vectors, ``batch`` of each family, and a matrix of its own for each kind.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = kinds_of(cols)
    errors = {(k, name): Errors([], [], [], []) for k in kinds for name in families}
    for draw in tqdm(range(draws), desc=f"K = {cols}", leave=False, disable=None):
        parts = [make(batch, rows, generator) for make in families.values()]
        grads = torch.cat(parts)  # [families B, P]
        others = torch.cat([part.roll(1, 0) for part in parts])
        exact = grads.double()
        lengths = exact.norm(dim=1)
        products = (exact * others.double()).sum(1)
        for kind in kinds:
            y = fastproj.project(
                grads, cols, seed, kind.kind, block=kind.block or None, stream=draw
            ).double()
            partner = y.unflatten(0, (-1, batch)).roll(1, 1).flatten(0, 1)
            scale = lengths * lengths.unflatten(0, (-1, batch)).roll(1, 1).flatten()
            found = (
                y.square().sum(1) / lengths.square() - 1,
                ((y * partner).sum(1) - products) / scale,
                norm_variance(kind, cols, grads),
                inner_variance(kind, cols, grads, others),
            )
            for name, *values in zip(
                families, *(part.unflatten(0, (-1, batch)) for part in found), strict=True
            ):
                into = errors[kind, name]
                for kept, value in zip(vars(into).values(), values, strict=True):
                    kept.append(value)
    return [summary(kind, name, rows, cols, errors[kind, name]) for kind, name in errors]


def summary(kind: Kind, family: str, rows: int, cols: int, errors: Errors) -> dict[str, Any]:
    """Variances over 2 / K (norms) and 1 / K (inner products), tails over their roots."""
    row: dict[str, Any] = {"kind": kind.name, "block": kind.block, "family": family}
    row |= {"rows": rows, "cols": cols}
    for what, unit in (("norm", 2 / cols), ("inner", 1 / cols)):
        squares = torch.stack(getattr(errors, what)).square() / unit  # [draws, B]
        theory = torch.stack(getattr(errors, f"{what}_theory")) / unit
        by_draw = (squares - theory).mean(1)
        row[what] = {
            "measured": float(squares.mean()),
            "standard_error": float(by_draw.std() / len(by_draw) ** 0.5),
            "theory": float(theory.mean()),
            "tail": float(squares.flatten().quantile(TAIL).sqrt()),
            "worst": float(squares.max().sqrt()),
            "events": int((squares > 1e-9).sum()),
        }
    return row


def disagrees(row: dict[str, Any]) -> list[str]:
    """Where a row's measured variance is not what theory says."""
    found = []
    for what in ("norm", "inner"):
        part = row[what]
        apart = abs(part["measured"] - part["theory"])
        rare = part["events"] < LEAST_EVENTS and part["theory"] > 1e-6
        allowed = MOST_ERRORS * part["standard_error"] + 1e-3  # the Gaussian table's moments
        if not rare and not apart <= allowed:
            found.append(
                f"{row['kind']} on {row['family']}, K = {row['cols']}: variance of the {what} "
                f"{part['measured']:.3f}, theory {part['theory']:.3f}, allowed {allowed:.3f} apart"
            )
    return found


def table_of(rows: list[dict[str, Any]], what: str) -> str:
    """Families down, kinds across: measured / theory variance, and the tail below."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    families = list(dict.fromkeys(row["family"] for row in rows))
    table = {(row["kind"], row["family"]): row[what] for row in rows}
    unit = "2 / K" if what == "norm" else "1 / K"
    title = "squared norms" if what == "norm" else "inner products"
    lines = [f"\n{title}, K = {rows[0]['cols']}, P = {rows[0]['rows']}: variance over {unit},"]
    lines[0] += f" measured | theory; {TAIL:.1%} of errors are below so many sqrt({unit})"
    lines.append(" " * 16 + "".join(f"{kind:>21}" for kind in kinds))
    for family in families:
        cells = [table[kind, family] for kind in kinds]
        text = "".join(
            f"{c['measured']:>8.3f} |{c['theory']:>5.3f}{c['tail']:>6.2f}" for c in cells
        )
        lines.append(f"{family:<16}{text}")
    return "\n".join(lines)
