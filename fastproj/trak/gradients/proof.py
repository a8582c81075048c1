"""What the hooks' gradients of a batch are compared with, and which batches are checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastproj.trak import batches
from fastproj.trak.gradients.base import AbstractGradientComputer, dense
from fastproj.trak.gradients.running import norm, wide_sums

MOST_APART = 8  # samples without a finite gradient that are sought in a batch
UNEVEN = 3e-3  # of the norm of all: the whole gradient of a smaller sample is near the tolerance
FAINT = 1e-6  # of the largest: smaller gradients may be rounding errors


@dataclass(frozen=True)
class Evened:
    """The factors of a sum in which no gradient is lost beside much larger ones."""

    shares: Tensor  # [rows, B], float64, at most 1
    noise: float

    @classmethod
    def of(cls, sizes: Tensor, counts: Tensor, eps: float) -> Evened | None:
        """The factors for gradients of these norms [rows, B], of the samples in ``counts``.

        None where a plain sum would show every gradient, or where rounding errors would hide some
        in this sum too. (A loss has slopes of p - 1. Their rounding errors don't shrink with them.)
        """
        seen = sizes[:, counts]
        largest = float(seen.max()) if seen.numel() else 0.0
        if not 0 < largest < float("inf") or not bool((seen < UNEVEN * norm(seen)).any()):
            return None
        noise = eps * largest * sizes.shape[1] ** 0.5
        floor = sizes.clamp(min=FAINT * largest)
        smallest = float(floor[:, counts].min())
        return cls((smallest / floor).nan_to_num(1.0), noise) if noise < smallest else None


@dataclass(frozen=True)
class Split:
    """A batch in random parts, each of which plain autograd differentiates by itself, and a random
    factor for the gradient of each sample.

    A gradient that is lost or doubled for any sample shows in the weighted sum of all. By the
    random weights, so does one that hooks ascribe to the wrong sample. An output that depends on
    what else is in the batch shows too, because the same samples are never together in a part.
    """

    weights: Tensor  # [B], float64, all different, of size 1/4 to 1
    parts: list[Tensor]  # of the numbers of samples
    evened: Evened | None = None

    @classmethod
    def of(
        cls, size: int, alone: int, seed: int, device: torch.device, evened: Evened | None = None
    ) -> Split:
        """A batch of ``size`` as ``alone`` single samples and two halves of the others."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
        weights = 0.25 + 0.75 * uniform
        weights *= torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1
        order = torch.randperm(size, generator=generator, device="cpu").to(device)
        parts = [rows for rows in (*order[:alone].split(1), *order[alone:].chunk(2)) if len(rows)]
        return cls(weights.to(device), parts, evened)

    def weights_of(self, row: int) -> Tensor:
        """The factors [B] of the gradients of output ``row``."""
        if self.evened is not None:
            return self.weights * self.evened.shares[row]
        return self.weights * shares_of(row + 1)[row]

    @property
    def noise(self) -> float:
        """The norm that rounding errors of the sum may have."""
        return 0.0 if self.evened is None else self.evened.noise


@dataclass(frozen=True)
class Known:
    """The gradient of ``sum weights[i] shares[r, i] f_r(z_i)``, by parameter that f depends on.

    The sum is over the samples in ``counts``. The others have gradients by the parameters
    ``infinite`` that are not finite. At most MOST_APART samples are left out for that. Where there
    are more, the sums are not finite.
    """

    sums: dict[str, Tensor]
    counts: Tensor  # [B], bool
    infinite: list[str]


Asked = Callable[[Tensor, Callable[[str, Tensor], None]], None]  # of some samples, see below


def asking(
    computer: AbstractGradientComputer, batch: tuple[Any, ...], split: Split, rows: slice
) -> Asked:
    """What passes on the weighted gradient of some samples of a batch, by plain autograd.

    rows : which outputs of a sample it is of.
    """

    def gradient_of(samples: Tensor, take: Callable[[str, Tensor], None]) -> None:
        evened = split.evened
        shares = None if evened is None else evened.shares[:, samples]
        weights = split.weights[samples]
        weighted_gradient(computer, batch, samples, weights, shares, rows, take)

    return gradient_of


def known_sums(split: Split, gradient_of: Asked, names: Iterable[str]) -> Known:
    """The sums by plain autograd, all at once; samples that are not finite are left out."""
    sums: dict[str, Tensor] = {}
    odd: set[str] = set()

    def add(name: str, g: Tensor) -> None:
        if name not in sums:
            sums[name] = torch.zeros(g.shape, dtype=wide(g), device=g.device)
        sums[name] += g
        if not is_finite(g):
            odd.add(name)

    for samples in split.parts:
        gradient_of(samples, add)
        if odd:
            break
    counts = torch.ones(len(split.weights), dtype=torch.bool, device=split.weights.device)
    infinite = find_infinite(split.parts, gradient_of, counts, sums) if odd else set()
    return Known({name: sums[name] for name in names if name in sums}, counts, sorted(infinite))


def find_infinite(
    parts: list[Tensor], gradient_of: Asked, counts: Tensor, sums: dict[str, Tensor]
) -> set[str]:
    """The parameters by which some sample's gradient isn't finite.

    ``counts`` is made False for these samples, and ``sums`` those of the others.
    """
    sums.clear()
    infinite: set[str] = set()
    parts = list(parts)
    while parts:
        rows = parts.pop(0)
        found: dict[str, Tensor] = {}
        gradient_of(rows, found.__setitem__)
        odd = {name for name, g in found.items() if not is_finite(g)}
        few = int((~counts).sum()) < MOST_APART
        if odd and few and len(rows) > 1:
            parts[:0] = rows.chunk(2)
            continue
        infinite |= odd
        if odd and few:
            counts[rows] = False
        for name in list(found):
            g = found.pop(name)  # let go of before the next part's
            if name not in sums:
                sums[name] = torch.zeros(g.shape, dtype=wide(g), device=g.device)
            if bool(counts[rows].all()):
                sums[name] += g
    return infinite


def weighted_gradient(
    computer: AbstractGradientComputer,
    batch: tuple[Any, ...],
    samples: Tensor,
    weights: Tensor,
    shares: Tensor | None,
    rows: slice,
    take: Callable[[str, Tensor], None],
) -> None:
    """Pass on the gradient of ``sum weights[i] shares[r, i] f_r(z_i)`` over some samples of a
    batch and the outputs ``rows``, all at once: ``take(name, g)`` of each parameter that it depends
    on, when it is found; nothing holds on to it. Shares of None are ``shares_of``.
    """
    part = batches.select(batch, samples)
    chosen = {name: p.detach().requires_grad_() for name, p in computer.chosen.items()}
    with torch.enable_grad():
        out = computer.outputs(chosen, part)  # [B], or [R, B] of ``SeveralOutputs``
    out = out.reshape(-1, len(samples))[rows]
    if not out.requires_grad:
        return
    if shares is None:
        shares = torch.tensor(shares_of(len(out)), device=out.device).double().unsqueeze(1)
    slopes = (shares * weights).to(out.dtype)

    def arrived(name: str, leaf: Tensor) -> None:
        g, leaf.grad = leaf.grad, None
        assert g is not None
        take(name, dense(g))

    for name, leaf in chosen.items():
        leaf.register_post_accumulate_grad_hook(partial(arrived, name))
    with wide_sums(chosen.values()):
        out.backward(slopes, inputs=list(chosen.values()))


def shares_of(rows: int) -> list[float]:
    """The factor of each of a sample's outputs in the sum that is checked."""
    return [(-1) ** r / (1 + r) for r in range(rows)]


def is_finite(t: Tensor) -> bool:
    """Whether all entries are; without a copy of them."""
    return not t.numel() or bool(torch.isfinite(torch.stack(t.aminmax())).all())


def wide(t: Tensor) -> torch.dtype:
    """A dtype to sum in: float32 for 16 bits."""
    return torch.promote_types(t.dtype, torch.float32)


def worth_a_proof(number: int) -> bool:
    """Whether to check batch ``number``, counted from 1, even if it is like one before: 1, 2, 4 ...

    Of two batches with the same structure, one may mix its samples because of its values.
    """
    return number & (number - 1) == 0
