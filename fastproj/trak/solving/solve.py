"""The system of TRAK, S^T S + lambda I, factored once and applied to targets.

S [n, k] are the features, each times the square root of its sample's weight. Where n >= k, the
system is k x k (primal). Where n < k, everything is done with S S^T, which is n x n (dual):

    (S^T S + lambda I)^-1 = (I - S^T (S S^T + lambda I)^-1 S) / lambda
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastproj.checks import as_float
from fastproj.trak.precision import full_precision

EXACT_FLOPS = 2e11  # below this many multiply-adds (seconds on a laptop) sums are plain float64
BLOCK_ROWS = 2048  # terms of a float32 product before it is folded into the float64 sum
GRAM_TILE = 512  # rows of XtX at once: by symmetry, half of the tiles are enough
GRAM_COLUMNS = 2048  # of a tile: its memory is used again
SAFE_EXPONENT = 32  # up to 2^32 and down to 2^-32, float32 holds squares and their small terms
POWER_STEPS = 12
COMMON_ROUNDING = 2.0  # over sqrt(k): share of float32's eps that is left of it in any sum
HALF_ROUNDING = 2.0**-11  # of features kept as float16, relative to each entry

KXK = ("gram", "solve")  # methods of ScoreComputer that take or give the k x k system

AUTO = "auto"
Lambda = float | str


class SingularXtXWarning(UserWarning):
    """XtX or F has no inverse at this lambda; what was done instead is in the message."""


@dataclass(frozen=True)
class System:
    """Which matrix lambda is added to.

    power : samples are weighted by W^power, W the curvature of their loss: 0 is XtX.
    dual : whether it is S S^T, [n, n], instead of S^T S, [k, k].
    fisher : whether it is the Fisher matrix, whose rows count what the task says.
    """

    power: float = 0.0
    dual: bool = False
    fisher: bool = False

    @property
    def weighted(self) -> bool:
        """Whether the samples have weights."""
        return self.power > 0


@dataclass(frozen=True)
class Gram:
    """S^T S [k, k], or S S^T [n, n] where n < k; float64, exact to about ``eps`` of its largest.

    ``rounding`` is how exactly each feature was stored, relative to itself. ``fisher`` says that it
    is the Fisher matrix, some of whose n rows are drawn.
    """

    matrix: Tensor
    n: int
    k: int
    eps: float
    rounding: float = 0.0
    fisher: bool = False

    @property
    def name(self) -> str:
        """The matrix as messages name it."""
        return "the Fisher matrix F" if self.fisher else "TRAK's XtX"

    @property
    def dual(self) -> bool:
        """Whether the matrix is S S^T."""
        return len(self.matrix) != self.k

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues, which is the same for both."""
        return float(self.matrix.trace())

    @property
    def spurious(self) -> float:
        """What the features' rounding adds to eigenvalues that are 0 without it, at most.

        Independent errors of ``rounding`` times the entries add a matrix of that share's square,
        with the largest eigenvalue of a Wishart matrix, (1 + sqrt(k / n))^2 times its diagonal.
        """
        own = len(self.matrix)
        other = max(self.k if self.dual else self.n, 1)
        spread = (1 + math.sqrt(own / other)) ** 2
        return self.rounding**2 * float(self.matrix.diagonal().max()) * spread


@dataclass(frozen=True)
class Rows:
    """The n rows of S, fewer than its dimensions, on disk.

    count : n.
    read : begins a pass over them: (places [b] among the n, rows [b, k]), each row once.
    """

    count: int
    read: Callable[[], Iterator[tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Solution:
    """(S^T S + lambda I)^-1, as a Cholesky factor or, where that is singular, a pseudo-inverse.

    factor : float64, the lower triangle of Cholesky, or what stands between the rows and targets:
        the pseudo-inverse itself [k, k]; in the dual (S S^T)^+ (S S^T + lambda I)^+, [n, n].
    rows : S, which the dual needs to be applied.
    """

    factor: Tensor
    method: str  # "cholesky" | "pseudo-inverse"
    lambda_reg: float
    n: int
    rank: int
    condition: float
    dual: bool = False
    rows: Rows | None = None

    def apply(self, targets: Tensor) -> Tensor:
        """``targets [m, k] @ (S^T S + lambda I)^-1``, float64 [m, k].

        The dual goes twice over the rows and holds nothing larger than the targets, [n, m] and
        [n, n].
        """
        targets = targets.to(self.factor)
        if self.dual:
            return self._apply_dual(targets)
        if self.method == "cholesky":
            return apply_factor(self.factor, targets.mT).mT
        return targets @ self.factor

    def _apply_dual(self, targets: Tensor) -> Tensor:
        assert self.rows is not None
        products = self.factor.new_empty(self.rows.count, len(targets))  # S T^T, [n, m]
        for places, rows in self.rows.read():
            products[places] = rows.to(targets) @ targets.mT
        if self.method == "cholesky":
            shares, out = -apply_factor(self.factor, products), targets.clone()
        else:
            shares, out = self.factor @ products, torch.zeros_like(targets)
        for places, rows in self.rows.read():
            out.addmm_(shares[places].mT, rows.to(targets))
        return out.div_(self.lambda_reg) if self.method == "cholesky" else out

    def on_own_rows(self, kernel: Tensor) -> Tensor:
        """``s (S^T S + lambda I)^-1 s`` of each row s of S, float64 [n], in the dual.

        kernel : S S^T, [n, n]. No term is lost to cancellation, however small a row's weight.
        """
        if self.method == "cholesky":
            return (kernel * torch.cholesky_inverse(self.factor)).sum(1)
        return ((kernel @ self.factor) * kernel).sum(1)

    def summary(self) -> dict[str, Any]:
        """What is worth storing beside the result."""
        return {
            "method": self.method,
            "lambda_reg": self.lambda_reg,
            "n": self.n,
            "rank": self.rank,
            "condition": self.condition,
        }


class ScoreComputer:
    """The arithmetic between stored features and scores; subclass it to change a step.

    Parameters
    ----------
    device : where the products are done.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def gram(self, blocks: Iterable[Tensor], proj_dim: int, n: int) -> Gram:
        """``sum of block.T @ block``; blocks [b, k] of any dtype, n rows in all.

        float64 throughout where that is cheap; otherwise float32 products of at most BLOCK_ROWS
        rows, added up in float64. Only the upper triangle is computed, in tiles.
        """
        dtype = sum_dtype(float(n) * proj_dim * proj_dim)
        total = torch.zeros(proj_dim, proj_dim, dtype=torch.float64, device=self.device)  # [k, k]
        high, wide = GRAM_TILE, GRAM_COLUMNS
        memory = torch.empty(high * wide, dtype=dtype, device=self.device)
        eps, seen = torch.finfo(dtype).eps, 0
        terms: list[tuple[float, float]] = []
        with full_precision():
            for block in blocks:
                seen += len(block)
                for part in block.to(self.device, dtype).split(BLOCK_ROWS):  # [<= BLOCK_ROWS, k]
                    part, exponent = in_range(part)
                    if dtype == torch.float32:
                        norm = math.ldexp(float(torch.linalg.vector_norm(part)), exponent)
                        terms.append((eps, norm * norm))
                    for i in range(0, proj_dim, high):
                        left = part[:, i : i + high].mT
                        for j in range(i, proj_dim, wide):
                            right = part[:, j : j + wide]
                            tile = memory[: len(left) * right.shape[1]].view(len(left), -1)
                            torch.matmul(left, right, out=tile)
                            place = total[i : i + high, j : j + wide]
                            place.add_(tile, alpha=math.ldexp(1.0, 2 * exponent))
        for i in range(0, proj_dim, high):  # in place: k x k may be most of the memory
            rows = total[i : i + high]
            own = rows[:, i : i + high]
            own.copy_(own.triu() + own.triu(1).mT)
            total[i + high :, i : i + high] = rows[:, i + high :].mT
        return Gram(total.cpu(), seen, proj_dim, eps_of_sum(eps, terms, proj_dim))

    def forms_dual(self, n: int, proj_dim: int) -> bool:
        """Whether ``kernel`` [n, n] is used instead of ``gram`` [k, k]: where n < k.

        Not where a subclass has a ``gram`` or ``solve`` of its own, which take k x k.
        """
        own = any(getattr(type(self), name) is not getattr(ScoreComputer, name) for name in KXK)
        return n < proj_dim and not own

    def kernel(self, rows: Tensor, others: Tensor, n: int) -> Tensor:
        """``rows [b, k] @ others [p, k].T``, float64 [b, p], a part of S S^T [n, n].

        float64 throughout where S S^T is cheap; otherwise float32 products over BLOCK_ROWS
        dimensions, added up in float64.
        """
        dtype = sum_dtype(float(n) * n * rows.shape[1])
        rows, exponent = in_range(rows)
        others, others_exponent = in_range(others)
        total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=self.device)
        with full_precision():
            pieces = (t.split(BLOCK_ROWS, 1) for t in (rows, others))  # of [b, k] and [p, k]
            for left, right in zip(*pieces, strict=True):
                total += left.to(self.device, dtype) @ right.to(self.device, dtype).mT
        return (total * math.ldexp(1.0, exponent) * math.ldexp(1.0, others_exponent)).cpu()

    def solve(self, gram: Gram, lambda_reg: Lambda) -> Solution:
        """Factor ``gram.matrix + lambda I``; see ``solve``."""
        return solve(gram, lambda_reg)

    def solve_again(self, gram: Gram, summary: Mapping[str, Any]) -> Solution:
        """What ``solve`` gave when ``Solution.summary`` was ``summary``, not judged again."""
        if summary["method"] == "cholesky" and type(self).solve is ScoreComputer.solve:
            factor = cholesky(gram.matrix, summary["lambda_reg"])
            if factor is not None:
                return Solution(factor, **summary, dual=gram.dual)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # solve has said it
            return self.solve(gram, summary["lambda_reg"])

    def scores(self, features: Tensor, weights: Tensor) -> Tensor:
        """``features [b, k] @ weights [m, k].T``, float32 [b, m]; weights from Solution.apply.

        In float64 where one of them is.
        """
        double = torch.float64 in (features.dtype, weights.dtype)
        dtype = torch.float64 if double else torch.float32
        with full_precision():
            product = features.to(self.device, dtype) @ weights.to(self.device, dtype).mT
        return product.float().cpu()


def in_range(block: Tensor) -> tuple[Tensor, int]:
    """``(scaled, e)``: ``block = scaled * 2^e``, and scaled's products don't leave float32's range.

    Gradients may be 1e-25 or 1e25, whose squares float32 doesn't have.
    """
    if block.dtype == torch.float64 or block.numel() == 0:
        return block, 0
    low, high = torch.aminmax(block)
    exponent = math.frexp(max(-float(low), float(high)))[1]
    if abs(exponent) <= SAFE_EXPONENT:
        return block, 0
    return (block.double() * math.ldexp(1.0, -exponent)).float(), exponent


def sum_dtype(flops: float) -> torch.dtype:
    """What a Gram matrix of so many multiply-adds is computed in."""
    return torch.float64 if flops <= EXACT_FLOPS else torch.float32


def eps_of_sum(eps: float, terms: Sequence[tuple[float, float]], k: int) -> float:
    """How exact a Gram matrix [k, k] is whose products have ``eps`` and are added up in float64.

    Products are rounded independently: so the more there are, the less is left of it. Not where the
    same samples are in all of them: what is left is COMMON_ROUNDING at least, by which ``solve``
    still tells a singular matrix.

    terms : (how exact, trace) of what is added.
    """
    total = sum(size for _, size in terms)
    if eps < torch.finfo(torch.float32).eps or not 0 < total < math.inf:
        return eps
    left = math.hypot(*(exact * (size / total) for exact, size in terms))
    return min(max(left, eps * COMMON_ROUNDING / math.sqrt(k)), eps)


def solve(gram: Gram, lambda_reg: Lambda) -> Solution:
    """Factor ``S^T S + lambda I`` by Cholesky; where it is singular, warn and use a pseudo-inverse.

    The pseudo-inverse is the limit of lambda -> 0 for targets in the span of the features, so the
    scores are well defined (and the same everywhere) where plain inversion gives arbitrary ones.
    In the dual, what is factored is ``S S^T + lambda I``; rank and condition are those of the k x k
    system all the same.

    Parameters
    ----------
    gram : S^T S or S S^T, and how exact it is.
    lambda_reg : see ``parse_lambda``.

    Raises
    ------
    ValueError
        For features that are zero or not finite, or a lambda that makes no sense.
    """
    matrix, k = gram.matrix, gram.k
    mean = check_gram(gram)
    lam = parse_lambda(lambda_reg, mean)
    floor = 0.0 if lam > 0 else gram.spurious  # below it, an eigenvalue may be all rounding
    factor = cholesky(matrix, lam) if lam > 0 or gram.n >= k else None
    if factor is not None:
        largest, smallest = extreme_eigenvalues(matrix, factor, lam)
        if gram.dual and smallest > 0:
            smallest = lam  # of k - n dimensions
        condition = largest / smallest if smallest > 0 else math.inf
        certain = lam > 0 or smallest > floor
        if certain and condition * gram.eps * math.sqrt(k) < 1:
            return Solution(factor, "cholesky", lam, gram.n, k, condition, gram.dual)

    values, vectors = torch.linalg.eigh(shifted(matrix, lam))  # ascending
    kept = values > max(float(values[-1]) * gram.eps * k, floor)
    rank = int(kept.sum())
    divisors = values[kept]
    if gram.dual:  # S^T [(S S^T) (S S^T + lambda I)]^+ S; lambda alone is too small to be kept
        divisors = divisors * (divisors - lam)
    scaled = vectors[:, kept] / divisors.sqrt()
    condition = float(values[-1] / values[kept][0]) if rank == k else math.inf
    rows = f"{gram.n} rows (samples and drawn ones)" if gram.fisher else f"n={gram.n} samples"
    few = "the number of rows" if gram.fisher else "n"
    warnings.warn(
        f"{gram.name} is singular: {rows}, k={k} dimensions, "
        f"lambda_reg={lam:.3g}, rank {rank}, condition estimate {condition:.1e}. "
        f"Scores use the pseudo-inverse, and are likely poor while {few} is near or below k. "
        f"Fix: lambda_reg='auto', or a number near {mean:.3g}, or proj_dim well below {few}",
        SingularXtXWarning,
        stacklevel=3,
    )
    inverse = scaled @ scaled.mT
    return Solution(inverse, "pseudo-inverse", lam, gram.n, rank, condition, gram.dual)


def shifted(matrix: Tensor, lam: float) -> Tensor:
    """``matrix + lambda I``, of a square matrix."""
    system = matrix.clone()
    system.diagonal().add_(lam)
    return system


def cholesky(matrix: Tensor, lam: float) -> Tensor | None:
    """The Cholesky factor of ``matrix + lambda I``, or None where it isn't positive definite.

    It is made in place of a copy: there are never more than two such matrices. For that the copy
    has to lie column by column, as LAPACK's do.
    """
    system = shifted(matrix, lam).mT
    info = torch.empty((), dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(system, out=(system, info))
    return system if int(info) == 0 else None


def apply_factor(factor: Tensor, rhs: Tensor) -> Tensor:
    """``(L L^T)^-1 rhs``, without the copy of L that PyTorch makes for both halves at once.

    factor : L [r, r], whole; rhs : [r, m].
    """
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def check_gram(gram: Gram) -> float:
    """The mean of the k eigenvalues of S^T S; ValueError where it is not finite, or zero."""
    rows = "rows" if gram.fisher else "features"
    if not all(bool(torch.isfinite(tile).all()) for tile in gram.matrix.split(GRAM_TILE)):
        raise ValueError(
            f"solve: {gram.name} of {gram.n} {rows} has entries that are not finite; expected "
            "finite features (a feature that is inf or NaN, or near the largest float32)"
        )
    mean = gram.trace / gram.k
    if mean == 0:
        raise ValueError(
            f"solve: all {gram.n} {rows}{' of F' if gram.fisher else ''} are zero; expected "
            "gradients that are not all zero (are the parameters of grad_wrt used by the model? "
            "does it give each label the probability 1?)"
        )
    return mean


def check_lambda(lambda_reg: Lambda) -> Lambda:
    """A number as a float, ``"auto"`` or "x*mean" as it is; raises ValueError for anything else."""
    if isinstance(lambda_reg, str) and lambda_reg == AUTO:
        return lambda_reg
    value = parse_lambda(lambda_reg)
    return lambda_reg if isinstance(lambda_reg, str) else value


def parse_lambda(lambda_reg: Lambda, mean_eigenvalue: float = 1.0) -> float:
    """The ridge as a number >= 0.

    A number is what is added to the diagonal of XtX. ``"0.1*mean"`` is 0.1 times the mean
    eigenvalue of XtX, trace(XtX) / k: the same strength at any n, k and scale of gradients.
    """
    value, unit = math.nan, 1.0
    if not isinstance(lambda_reg, str):
        number = as_float(lambda_reg)
        value = math.nan if number is None else number
    elif match := re.fullmatch(r"\s*([^*\s]+)\s*\*\s*mean\s*", lambda_reg):
        unit = mean_eigenvalue
        with suppress(ValueError):
            value = float(match[1])
    if not 0 <= value < math.inf:
        raise ValueError(
            f"TRAKer: received lambda_reg={lambda_reg!r:.80}; expected 'auto', a number >= 0, or a "
            "string such as '0.1*mean' for 0.1 times the mean eigenvalue of XtX"
        )
    return value * unit


def extreme_eigenvalues(matrix: Tensor, factor: Tensor, lam: float = 0.0) -> tuple[float, float]:
    """(largest, smallest) of a positive definite ``matrix + lam I`` by power iteration, each from
    inside.

    matrix : float64 [k, k]; factor : the Cholesky factor of the sum. Costs 4 POWER_STEPS k^2.
    """
    k = matrix.shape[0]
    generator = torch.Generator().manual_seed(0)
    high = low = torch.randn(k, 1, dtype=matrix.dtype, generator=generator, device="cpu")
    for _ in range(POWER_STEPS):
        high = high / high.norm()
        high = matrix @ high + lam * high
        low = apply_factor(factor, low / low.norm())
    return float(high.norm()), float(1 / low.norm())
