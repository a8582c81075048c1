"""What a TRAK run costs: bytes on disk, bytes in memory and operations, by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from fastproj.trak.draws import Draws, Fisher
from fastproj.trak.gradients.base import GRAD_BYTES
from fastproj.trak.solving.finalizing import (
    KERNEL_PART_BYTES,
    MAX_PARTS,
    PART_ROWS,
    PART_ROWS_PER_DIM,
)
from fastproj.trak.solving.scoring import TARGET_ROWS, WEIGHT_BYTES
from fastproj.trak.solving.solve import EXACT_FLOPS
from fastproj.trak.store.features import block_rows

# Beside the features of a row: its number and content, a row's exponent, Q; with the Fisher matrix
# also what a sample counts in it.
ROW_BYTES, COUNT_BYTES = 24, 12
BLOCKS = 8  # of features in memory: four being read, with their bytes, one weighed, one product
MATRICES = 2  # float64 matrices of the system's size: itself, and a factor of it
FACTORED = 4  # times that a system is factored: for lambda's dimension, its check, and scoring
SPREAD = 1  # time more where scores are a mean over two ridges
COMPARED = 2  # times more, at least, where checkpoints are compared
MOST_DRAWN = 1 << 30  # of more samples no more rows are drawn, and counting them takes memory
ASPECT = 64  # a transformer's width over its depth, as of GPT-2


@dataclass(frozen=True)
class Layers:
    """The layers that the factored gradients are assumed to be of: ``count`` of width x width."""

    count: float
    width: int
    tokens: int

    @classmethod
    def assumed(cls, parameters: int, width: int | None, tokens: int) -> Layers:
        """Those of a transformer with so many parameters, 12 d^2 a block, of width d.

        ``width`` None is a width of ASPECT times the depth.
        """
        if width is None:
            width = max(1, round((ASPECT * parameters / 12) ** (1 / 3)))
        return cls(parameters / width**2, width, tokens)

    def entries(self, rank: int) -> int:
        """The numbers of a sample's gradient after both sides are compressed to ``rank``."""
        side = min(rank, self.width)
        return max(1, round(self.count * side**2))

    def operations(self, rank: int) -> float:
        """Floating-point operations to compress one sample's gradient: 2 T (I r + O r + r^2)."""
        if rank >= self.width:
            return 2.0 * self.tokens * self.count * self.width**2  # it is formed as it is
        return 2.0 * self.tokens * self.count * (2 * self.width * rank + rank**2)


@dataclass(frozen=True)
class Run:
    """A TRAK run.

    parameters, samples, targets, checkpoints, proj_dim : P, n, m, M, k.
    fisher : whether the curvature is the Fisher matrix.
    half : whether features are stored as float16.
    batch : samples whose gradients are projected together.
    """

    parameters: int
    samples: int
    proj_dim: int
    targets: int
    checkpoints: int
    fisher: bool
    half: bool = True
    batch: int = 32

    @property
    def drawn(self) -> int:
        """Rows of the Fisher matrix that are drawn, for each checkpoint."""
        if not self.fisher:
            return 0
        return Draws(min(self.samples, MOST_DRAWN), self.proj_dim, Fisher(), 0).count

    @property
    def rows(self) -> int:
        """Rows that the system is made of."""
        return self.samples + self.drawn

    @property
    def size(self) -> int:
        """Of the square matrix that lambda is added to: rows, where they are fewer than k."""
        return min(self.rows, self.proj_dim)

    @property
    def gradients(self) -> int:
        """Per-sample gradients that are computed and projected, over all checkpoints."""
        return self.checkpoints * (self.rows + self.targets)

    def disk(self) -> dict[str, int]:
        """Bytes in save_dir, by what they are of."""
        row = self.proj_dim * (2 if self.half else 4) + ROW_BYTES
        counts = COUNT_BYTES if self.fisher else 0
        found = {"features": self.checkpoints * self.samples * (row + counts)}
        if self.fisher:
            found["drawn rows of the Fisher matrix"] = self.checkpoints * self.drawn * row
        step = 8 * self.proj_dim if self.fisher else 0  # by which slopes are moved
        found["matrices"] = self.checkpoints * (8 * self.size**2 + step)
        found["features of targets"] = self.checkpoints * self.targets * row
        found["scores"] = 4 * self.samples * self.targets
        return found

    def disk_while_finalising(self) -> int:
        """Bytes of the parts that a matrix is summed in, until it is whole."""
        if self.rows < self.proj_dim:
            part = max(1, KERNEL_PART_BYTES // (4 * self.proj_dim))
            return 8 * self.rows**2 if self.rows > part else 0
        part = max(-(-self.rows // MAX_PARTS), PART_ROWS, PART_ROWS_PER_DIM * self.proj_dim)
        parts = -(-self.rows // part)
        return 8 * self.size**2 * parts if parts > 1 else 0

    def memory(self) -> dict[str, int]:
        """Bytes of each step's arrays, without Python, torch and the model."""
        block = min(block_rows(self.proj_dim), self.rows)
        blocks = BLOCKS * 4 * block * self.proj_dim
        matrices = MATRICES * 8 * self.size**2
        most = WEIGHT_BYTES // (4 * self.proj_dim * self.checkpoints)
        step = max(1, min(self.targets, TARGET_ROWS, most))  # targets at once
        weights = 4 * step * self.proj_dim  # of a checkpoint
        copies = 5 if self.fisher else 3  # in float64; a sum is held while the next is made
        solving = matrices + (self.checkpoints + 2 * copies) * weights
        held = 0
        if self.rows < self.proj_dim:
            held = min(4 * self.rows * self.proj_dim, KERNEL_PART_BYTES)
            solving += blocks + 3 * 8 * self.rows * step
        return {
            "gradients of a batch, at most": min(
                4 * self.batch * self.parameters, max(GRAD_BYTES, 4 * self.parameters)
            ),
            "finalising": matrices + held + blocks,
            "scoring": max(solving, self.checkpoints * weights + blocks + 3 * 4 * block * step),
        }

    def gram_operations(self) -> float:
        """Floating-point operations of the products that the systems are made of."""
        other = max(self.rows, self.proj_dim)
        return float(self.checkpoints) * self.size**2 * other  # half of them: it is symmetric

    def gram_is_exact(self) -> bool:
        """Whether these are in float64 throughout."""
        return float(self.size) ** 2 * max(self.rows, self.proj_dim) <= EXACT_FLOPS

    def solve_operations(self) -> float:
        """float64 operations of the factors."""
        factors = FACTORED + (SPREAD if self.fisher else 0)
        factors += COMPARED if self.fisher and self.checkpoints > 1 else 0
        return self.checkpoints * factors * self.size**3 / 3

    def score_operations(self) -> float:
        """float32 operations of the scores."""
        return 2.0 * self.checkpoints * self.samples * self.targets * self.proj_dim

    def stored_matrix(self) -> int:
        """Bytes of R in float32, which is never stored."""
        return 4 * self.parameters * self.proj_dim
