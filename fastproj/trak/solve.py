"""The k x k system of TRAK: Phi^T Phi + lambda I, factored once and applied to targets."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXACT_FLOPS = 2e11  # below this many multiply-adds (seconds on a laptop) sums are plain float64
BLOCK_ROWS = 2048  # rows per float32 product before it is folded into the float64 sum
GRAM_TILE = 512  # columns of XtX at once: half of the products are those of the other half
SAFE_EXPONENT = 32  # up to 2^32 and down to 2^-32, squares and their small terms are float32's
POWER_STEPS = 12
HALF_ROUNDING = 2.0**-11  # of features kept as float16, relative to each entry

AUTO = "auto"
Lambda = float | str


class SingularXtXWarning(UserWarning):
    """XtX has no inverse at this lambda; what was done instead is in the message."""


@dataclass(frozen=True)
class Gram:
    """Phi^T Phi of ``n`` samples, float64 [k, k], exact to about ``eps`` of its largest entry.

    ``rounding`` is how exact each feature was before, relative to itself.
    """

    xtx: Tensor
    n: int
    eps: float
    rounding: float = 0.0

    @property
    def spurious(self) -> float:
        """What the features' rounding adds to eigenvalues of XtX that are 0 without it, at most.

        Independent errors of ``rounding`` times the entries add a matrix of that share's square,
        with the largest eigenvalue of a Wishart matrix, (1 + sqrt(k / n))^2 times its diagonal.
        """
        spread = (1 + math.sqrt(len(self.xtx) / max(self.n, 1))) ** 2
        return self.rounding**2 * float(self.xtx.diagonal().max()) * spread


@dataclass(frozen=True)
class Solution:
    """(XtX + lambda I)^-1, as a Cholesky factor or, where that is singular, a pseudo-inverse."""

    factor: Tensor  # float64 [k, k]: lower triangle of Cholesky, or the pseudo-inverse itself
    method: str  # "cholesky" | "pseudo-inverse"
    lambda_reg: float
    n: int
    rank: int
    condition: float

    def apply(self, targets: Tensor) -> Tensor:
        """``targets [m, k] @ (XtX + lambda I)^-1``, float64 [m, k]."""
        rows = targets.to(self.factor)
        if self.method == "cholesky":
            return torch.cholesky_solve(rows.mT, self.factor).mT
        return rows @ self.factor

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
        exact = float(n) * proj_dim * proj_dim <= EXACT_FLOPS
        dtype = torch.float64 if exact else torch.float32
        total = torch.zeros(proj_dim, proj_dim, dtype=torch.float64, device=self.device)  # [k, k]
        seen = 0
        with full_precision():
            for block in blocks:
                seen += len(block)
                for part in block.to(self.device, dtype).split(BLOCK_ROWS):  # [<= BLOCK_ROWS, k]
                    part, exponent = in_range(part)
                    for i in range(0, proj_dim, GRAM_TILE):
                        tile = part[:, i : i + GRAM_TILE].mT @ part[:, i:]
                        total[i : i + GRAM_TILE, i:].add_(tile, alpha=math.ldexp(1.0, 2 * exponent))
        total = total.triu_() + total.triu(1).mT
        eps = torch.finfo(torch.float64 if exact else torch.float32).eps
        return Gram(total.cpu(), seen, eps)

    def solve(self, gram: Gram, lambda_reg: Lambda) -> Solution:
        """Factor ``gram.xtx + lambda I``; see ``solve``."""
        return solve(gram, lambda_reg)

    def solve_again(self, gram: Gram, summary: Mapping[str, Any]) -> Solution:
        """What ``solve`` gave when ``Solution.summary`` was ``summary``, not judged again."""
        if summary["method"] == "cholesky" and type(self).solve is ScoreComputer.solve:
            factor, info = torch.linalg.cholesky_ex(shifted(gram.xtx, summary["lambda_reg"]))
            if int(info) == 0:
                return Solution(factor, **summary)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # solve has said it
            return self.solve(gram, summary["lambda_reg"])

    def scores(self, features: Tensor, weights: Tensor) -> Tensor:
        """``features [b, k] @ weights [m, k].T``, float32 [b, m]; weights from Solution.apply."""
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
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


def solve(gram: Gram, lambda_reg: Lambda) -> Solution:
    """Factor ``XtX + lambda I`` by Cholesky; where it is singular, warn and use a pseudo-inverse.

    The pseudo-inverse is the limit of lambda -> 0 for targets in the span of the features, so the
    scores are well defined (and the same everywhere) where plain inversion gives arbitrary ones.

    Parameters
    ----------
    gram : XtX and how exact it is.
    lambda_reg : see ``parse_lambda``.

    Raises
    ------
    ValueError
        For features that are zero or not finite, or a lambda that makes no sense.
    """
    xtx, k = gram.xtx, gram.xtx.shape[0]
    mean = check_gram(gram)
    lam = parse_lambda(lambda_reg, mean)
    system = shifted(xtx, lam)
    factor, info = torch.linalg.cholesky_ex(system)
    largest, smallest = extreme_eigenvalues(system, factor) if int(info) == 0 else (mean, 0.0)
    condition = largest / smallest if smallest > 0 else math.inf
    floor = 0.0 if lam > 0 else gram.spurious  # below it, an eigenvalue may be all rounding
    certain = lam > 0 or (gram.n >= k and smallest > floor)
    if certain and condition * gram.eps * math.sqrt(k) < 1:
        return Solution(factor, "cholesky", lam, gram.n, k, condition)

    values, vectors = torch.linalg.eigh(system)  # ascending
    kept = values > max(float(values[-1]) * gram.eps * k, floor)
    rank = int(kept.sum())
    scaled = vectors[:, kept] / values[kept].sqrt()
    condition = float(values[-1] / values[kept][0]) if rank == k else math.inf
    warnings.warn(
        f"TRAK's XtX is singular: n={gram.n} samples, k={k} dimensions, "
        f"lambda_reg={lam:.3g}, rank {rank}, condition estimate {condition:.1e}. "
        f"Scores use the pseudo-inverse, and are likely poor while n is near or below k. "
        f"Fix: lambda_reg='auto', or a number near {mean:.3g}, or proj_dim well below n",
        SingularXtXWarning,
        stacklevel=3,
    )
    return Solution(scaled @ scaled.mT, "pseudo-inverse", lam, gram.n, rank, condition)


def shifted(xtx: Tensor, lam: float) -> Tensor:
    """``XtX + lambda I``, [k, k]."""
    system = xtx.clone()
    system.diagonal().add_(lam)
    return system


def check_gram(gram: Gram) -> float:
    """The mean eigenvalue of XtX; raises ValueError where XtX is not finite, or zero."""
    if not bool(torch.isfinite(gram.xtx).all()):
        raise ValueError(
            f"solve: XtX of {gram.n} features has entries that are not finite; expected finite "
            "features (a feature that is inf or NaN, or near the largest float32)"
        )
    mean = float(gram.xtx.diagonal().mean())
    if mean == 0:
        raise ValueError(
            f"solve: all {gram.n} features are zero; expected gradients that are not all zero "
            "(are the parameters of grad_wrt used by the model?)"
        )
    return mean


def check_lambda(lambda_reg: Lambda) -> Lambda:
    """``"auto"``, or what ``parse_lambda`` takes; raises ValueError for anything else."""
    if not (isinstance(lambda_reg, str) and lambda_reg == AUTO):
        parse_lambda(lambda_reg)
    return lambda_reg


def parse_lambda(lambda_reg: Lambda, mean_eigenvalue: float = 1.0) -> float:
    """The ridge as a number >= 0.

    A number is what is added to the diagonal of XtX. ``"0.1*mean"`` is 0.1 times the mean
    eigenvalue of XtX, trace(XtX) / k: the same strength at any n, k and scale of gradients.
    """
    factor, unit = lambda_reg, 1.0
    if isinstance(lambda_reg, str):
        match = re.fullmatch(r"\s*([^*\s]+)\s*\*\s*mean\s*", lambda_reg)
        factor, unit = (match[1] if match else "nan"), mean_eigenvalue
    try:
        value = float(factor)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(lambda_reg, bool) or not 0 <= value < math.inf:
        raise ValueError(
            f"TRAKer: received lambda_reg={lambda_reg!r}; expected 'auto', a number >= 0, or a "
            "string such as '0.1*mean' for 0.1 times the mean eigenvalue of XtX"
        )
    return value * unit


def extreme_eigenvalues(matrix: Tensor, factor: Tensor) -> tuple[float, float]:
    """(largest, smallest) of a positive definite matrix by power iteration, each from inside.

    matrix : float64 [k, k]; factor : its Cholesky factor. Costs 4 POWER_STEPS k^2.
    """
    k = matrix.shape[0]
    start = torch.randn(k, 1, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    high, low = start, start
    for _ in range(POWER_STEPS):
        high = matrix @ (high / high.norm())
        low = torch.cholesky_solve(low / low.norm(), factor)
    return float(high.norm()), float(1 / low.norm())


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products without TF32 or bf16 inside, whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
