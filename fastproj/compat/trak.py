"""``trak.projectors`` on fastproj: the same classes, arguments and meaning.

Either pass one in, ``trak.TRAKer(projector=CudaProjector(...))``, or call ``install()`` once before
the TRAKer is made. The classes differ from TRAK's on purpose. Every class takes any device, batch
size and proj_dim. No matrix is kept, so ``free_memory`` has nothing to free. Checkpoints and chunks
never share a matrix: ``model_id`` is a stream of its own, not an offset to the seed.

Source: TRAK 0.3.2, https://github.com/MadryLab/trak, for names and meaning.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastproj
from fastproj import compat
from fastproj.compat.patching import Patch, needed
from fastproj.compat.pieces import as_pieces, check_batch, kind_of, project_pieces, width
from fastproj.projector import Projector

__all__ = [
    "AbstractProjector",
    "BasicProjector",
    "BasicSingleBlockProjector",
    "ChunkedCudaProjector",
    "CudaProjector",
    "NoOpProjector",
    "ProjectionType",
    "install",
    "uninstall",
]

Grads = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


class _ProjectionType(str, Enum):
    """What TRAK calls the two kinds of matrix, for where TRAK isn't installed."""

    normal = "normal"
    rademacher = "rademacher"


class _AbstractProjector(ABC):
    """TRAK's interface, for where TRAK isn't installed."""

    @abstractmethod
    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | _ProjectionType,
        device: str | torch.device,
    ) -> None:
        self.grad_dim = grad_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = device

    @abstractmethod
    def project(self, grads: Grads, model_id: int) -> Tensor:
        """The projection of ``grads`` with the matrix of ``model_id``."""

    def free_memory(self) -> None:  # noqa: B027 - TRAK's too is no abstract method
        """Free what the projector holds."""


if TYPE_CHECKING:
    AbstractProjector = _AbstractProjector
    ProjectionType = _ProjectionType
else:
    try:
        from trak.projectors import AbstractProjector, ProjectionType
    except ImportError:
        AbstractProjector, ProjectionType = _AbstractProjector, _ProjectionType


class NoOpProjector(AbstractProjector):
    """Gradients as they are; a dict of them side by side, [B, P]. They stay on their device."""

    def __init__(
        self,
        grad_dim: int = 0,
        proj_dim: int = 0,
        seed: int = 0,
        proj_type: str | ProjectionType = "na",
        device: str | torch.device = "cuda",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)

    def project(self, grads: Grads, model_id: int) -> Tensor:
        """``grads``, a Tensor [B, P] or a dict of [B, ...]."""
        if isinstance(grads, Tensor):
            return grads
        pieces = list(grads.values()) if isinstance(grads, Mapping) else list(grads)
        return torch.cat(
            [piece.detach().reshape(len(piece), width(piece)) for piece in pieces], dim=1
        )


def _pieces(projector: str, grads: Grads, device: torch.device | str) -> list[Tensor]:
    """``as_pieces``, after a check that a lone tensor is [B, P]: later checks don't see its
    shape.
    """
    if isinstance(grads, Tensor) and grads.dim() != 2:
        raise ValueError(
            f"{projector}.project: received grads {list(grads.shape)}; expected a Tensor [B, P] or "
            "a dict of [B, ...]"
        )
    return as_pieces(grads, device)


class _Projector(AbstractProjector):
    """What the projecting classes share: ``grads @ R``, unscaled, R a stream per model_id."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self._kind = kind_of(type(self).__name__, proj_type)
        self._check_configuration()

    def _check_configuration(self) -> None:
        """``fastproj.Projector``'s checks, now and not at first use."""
        Projector(self.grad_dim, self.proj_dim, self.seed, self._kind)

    def _projected(
        self,
        grads: Grads,
        model_id: int,
        grad_dim: int | None,
        *,
        row_offset: int = 0,
        wide: bool = False,
    ) -> Tensor:
        pieces = _pieces(type(self).__name__, grads, self.device)
        if wide:
            pieces = [piece.double() for piece in pieces]
        return project_pieces(
            f"{type(self).__name__}.project",
            pieces,
            self.proj_dim,
            self.seed,
            self._kind,
            stream=model_id,
            scale=None,
            row_offset=row_offset,
            grad_dim=grad_dim,
        )


class BasicSingleBlockProjector(_Projector):
    """``grads @ R`` rounded to ``dtype``.

    Parameters
    ----------
    grad_dim, proj_dim : P and K, any.
    seed : 0 <= seed < 2^64; NumPy's integers too.
    proj_type : "normal" or "rademacher", as a str or ProjectionType.
    device : where gradients are moved to, and results lie.
    dtype : of the results. Gradients are not rounded to it first.
    model_id : without effect, because ``project`` takes one.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.dtype = dtype
        self.model_id = model_id

    @property
    def proj_matrix(self) -> Tensor:
        """R [grad_dim, proj_dim] of the last model_id, made when asked for."""
        return fastproj.matrix(
            self.grad_dim,
            self.proj_dim,
            self.seed,
            self._kind,
            stream=self.model_id,
            device=self.device,
        ).to(self.dtype)

    def project(self, grads: Grads, model_id: int) -> Tensor:
        """``grads @ R``: [B, P] or a dict of [B, ...] to [B, K] of ``dtype``."""
        y = self._projected(grads, model_id, self.grad_dim, wide=self.dtype is torch.float64)
        self.model_id = model_id
        return y.to(self.dtype)


class BasicProjector(BasicSingleBlockProjector):
    """The same. ``block_size`` has no effect on the result, nor on memory."""

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype = torch.float32,
        model_id: int = 0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device, dtype, model_id)
        self.block_size = block_size


class CudaProjector(_Projector):
    """``grads @ R`` in float32 (float64 for float64 gradients), on any device.

    ``max_batch_size`` has no effect. As in TRAK, ``grad_dim`` is not compared with the gradients:
    a narrower gradient meets the first rows of the same matrix. ``grad_dim`` may be 0, because
    TRAK's chunks start with an empty one where the first parameter is larger than a chunk.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        max_batch_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        self.max_batch_size = max_batch_size

    def _check_configuration(self) -> None:
        Projector(self.grad_dim or 1, self.proj_dim, self.seed, self._kind)

    def project(self, grads: Grads, model_id: int) -> Tensor:
        """``grads @ R``: [B, P] or a dict of [B, ...] to [B, K]."""
        return self._projected(grads, model_id, None)


class ChunkedCudaProjector:
    """The sum of the projections of consecutive chunks, each with its projector's seed.

    A chunk's rows start where the last one's end, so chunks whose seeds happen to be equal (TRAK
    draws them from 0 .. 499) still meet different rows. Nothing is copied into a buffer.

    Parameters
    ----------
    projector_per_chunk : one projector of this module for each chunk, of one proj_dim.
    params_per_chunk : entries per sample of each chunk, zero or more. Gradients may end before the
        last chunk does: TRAKer cuts chunks for all parameters, whatever ``grad_wrt`` names.
    dtype : of the results.
    max_chunk_size, feat_bs : without effect: any batch size is projected whole.
    """

    def __init__(
        self,
        projector_per_chunk: list[_Projector],
        max_chunk_size: int,
        params_per_chunk: list[int],
        feat_bs: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        if len(projector_per_chunk) != len(params_per_chunk) or not projector_per_chunk:
            raise ValueError(
                f"ChunkedCudaProjector: received {len(projector_per_chunk)} projectors for "
                f"{len(params_per_chunk)} chunks; expected one for each, and at least one"
            )
        for projector in projector_per_chunk:
            if not isinstance(projector, _Projector):
                raise TypeError(
                    f"ChunkedCudaProjector: received a {type(projector).__module__}."
                    f"{type(projector).__name__}; expected projectors of fastproj.compat.trak"
                )
        dimensions = [projector.proj_dim for projector in projector_per_chunk]
        if len(set(dimensions)) > 1:
            raise ValueError(
                f"ChunkedCudaProjector: received projectors of proj_dim {dimensions}; "
                "expected one proj_dim for all"
            )
        self.projector_per_chunk = projector_per_chunk
        self.proj_dim = projector_per_chunk[0].proj_dim
        self.proj_type = projector_per_chunk[0].proj_type
        self.params_per_chunk = params_per_chunk
        self.max_chunk_size = max_chunk_size
        self.feat_bs = feat_bs
        self.device = device
        self.dtype = dtype

    def allocate_input(self) -> None:
        """There is nothing to allocate."""

    def free_memory(self) -> None:
        """There is nothing to free."""

    def project(self, grads: Grads, model_id: int) -> Tensor:
        """``grads``, a dict of [B, ...] or a Tensor [B, P], to [B, K] of ``dtype``."""
        y: Tensor | None = None
        row = 0
        pieces = _pieces("ChunkedCudaProjector", grads, self.device)
        check_batch("ChunkedCudaProjector.project", pieces)
        chunks = self._chunks(pieces)
        for projector, chunk in zip(self.projector_per_chunk, chunks, strict=True):
            if chunk:
                part = projector._projected(chunk, model_id, None, row_offset=row)
                y = part if y is None else y + part
            row += sum(piece.shape[1] for piece in chunk)
        if y is None:
            raise ValueError(
                "ChunkedCudaProjector.project: received gradients of 0 entries per sample; "
                "expected at least one"
            )
        return y.to(self.dtype)

    def _chunks(self, pieces: list[Tensor]) -> list[list[Tensor]]:
        """Views of ``pieces``, cut where chunks end; the last ones may be short or missing."""
        pieces = [piece.reshape(len(piece), width(piece)) for piece in pieces if width(piece)]
        total = sum(piece.shape[1] for piece in pieces)
        limit = sum(int(size) for size in self.params_per_chunk)
        if total > limit:
            raise ValueError(
                f"ChunkedCudaProjector.project: received gradients of {total} entries per sample; "
                f"expected at most {limit}, the sum of params_per_chunk"
            )
        pieces.reverse()
        chunks: list[list[Tensor]] = []
        for size in self.params_per_chunk:
            chunk: list[Tensor] = []
            left = int(size)
            while left > 0 and pieces:
                piece = pieces.pop()
                if piece.shape[1] > left:
                    pieces.append(piece[:, left:])
                    piece = piece[:, :left]
                chunk.append(piece)
                left -= piece.shape[1]
            chunks.append(chunk)
        return chunks


_patch = Patch()


def install() -> None:
    """Replace the classes of ``trak.projectors`` in place, wherever loaded modules hold them.

    That includes ``trak.traker`` and modules that imported the classes by name. ``import fast_jl``
    works afterwards too, because TRAKer tries it before it takes a CudaProjector.

    Raises
    ------
    ImportError
        Where ``trak`` isn't installed.
    """
    theirs = needed("trak.install", "trak.projectors", "traker")
    if not _patch.active:
        ours = sys.modules[__name__].__dict__
        names = [name for name in _REPLACED if hasattr(theirs, name)]  # 0.2 has no chunks
        _patch.apply([(getattr(theirs, name), ours[name]) for name in names])
    compat.install()


def uninstall() -> None:
    """Put TRAK's own classes back. ``fastproj.compat.uninstall()`` does the same for fast_jl."""
    _patch.undo()


_REPLACED = (
    "BasicProjector",
    "BasicSingleBlockProjector",
    "ChunkedCudaProjector",
    "CudaProjector",
    "NoOpProjector",
)
