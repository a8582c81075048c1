"""dattri's random projection on fastproj: the same calls, which keep lengths on average.

``install()`` replaces ``dattri.func.projection.make_random_projector``, by which everything in
dattri gets its projector. "normal", "rademacher" and "sjlt" are ours. "random_mask", "grass" and
"identity" stay dattri's. dattri makes a projector for each batch, which costs nothing here:
``proj_seed`` names the matrix, and nothing is drawn. GraSS has a copy of dattri, ``_dattri``, in
which the same is replaced.

Source: dattri 0.3.0, https://github.com/TRAIS-Lab/dattri, and
https://github.com/TRAIS-Lab/GraSS, for names and meaning.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastproj import projector as ours
from fastproj.compat.patching import Patch, needed, takes
from fastproj.compat.pieces import KINDS as DENSE
from fastproj.compat.pieces import as_pieces, block_below, kind_of, project_pieces

__all__ = ["Projector", "install", "make_random_projector", "random_project", "uninstall"]

Features = Tensor | Mapping[str, Tensor]

KINDS = DENSE | {"sjlt": "sjlt"}
PACKAGES = ("dattri", "_dattri")  # the second is GraSS's


class _AbstractProjector(ABC):
    """dattri's interface, for where dattri isn't installed."""

    @abstractmethod
    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: Any,
        device: str | torch.device,
    ) -> None:
        self.feature_dim = feature_dim
        self.proj_dim = proj_dim
        self.seed = seed
        self.proj_type = proj_type
        self.device = device

    @abstractmethod
    def project(self, features: Features, ensemble_id: int) -> Tensor:
        """The projection of ``features`` with the matrix of ``ensemble_id``."""

    @abstractmethod
    def free_memory(self) -> None:
        """Free what the projector holds."""


if TYPE_CHECKING:
    AbstractProjector = _AbstractProjector
else:
    try:
        from dattri.func.projection import AbstractProjector
    except ImportError:
        AbstractProjector = _AbstractProjector


class Projector(AbstractProjector):
    """``features @ R / sqrt(proj_dim)`` with the matrix of (seed, ensemble_id).

    For "sjlt", ``features @ R * sqrt(block / proj_dim)``: ``block`` is the power of two at or below
    proj_dim, at least 16 and at most 65,536, and a row has proj_dim / block entries. Where proj_dim
    is such a power of two, a row has one unscaled entry, as in dattri.

    Parameters
    ----------
    feature_dim, proj_dim : entries per sample before and after, any.
    seed : 0 <= seed < 2^64.
    proj_type : "normal", "rademacher" or "sjlt", as a str or dattri's ProjectionType.
    device : where features are moved to, and results lie.
    dtype : of the results. Features are not rounded to it first.
    """

    def __init__(
        self,
        feature_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: Any,
        device: str | torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(feature_dim, proj_dim, seed, proj_type, device)
        self.dtype = dtype
        self._kind = kind_of("dattri.Projector", proj_type, KINDS)
        ours.Projector(feature_dim, proj_dim, seed, self._kind)  # its checks, now
        self._block = block_below(int(proj_dim)) if self._kind == "sjlt" else None

    def project(self, features: Features, ensemble_id: int = 0) -> Tensor:
        """[B, feature_dim], or a dict of [B, ...], to [B, proj_dim] of ``dtype``."""
        pieces = as_pieces(features, self.device)
        if self.dtype is torch.float64:
            pieces = [piece.double() for piece in pieces]
        return project_pieces(
            "dattri.Projector.project",
            pieces,
            self.proj_dim,
            self.seed,
            self._kind,
            stream=ensemble_id,
            scale="jl",
            grad_dim=self.feature_dim,
            block=self._block,
        ).to(self.dtype)

    def free_memory(self) -> None:
        """There is nothing to free: no matrix is kept."""


def make_random_projector(
    param_shape_list: list[int],
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int,
    device: torch.device | str,
    proj_seed: int = 0,
    proj_type: Any = "sjlt",
    *,
    dtype: torch.dtype = torch.float32,
    theirs: Callable[..., Any] | None = None,
    **others: Any,
) -> Any:
    """dattri's factory: a ``Projector`` for the types that it takes, dattri's own for the others.

    ``feature_batch_size`` and ``proj_max_batch_size`` have no effect on a ``Projector``. ``theirs``
    is dattri's own factory, which ``install()`` names.

    Raises
    ------
    ValueError
        For one of the other types without ``theirs``.
    """
    if getattr(proj_type, "value", proj_type) in KINDS:
        return Projector(sum(param_shape_list), proj_dim, proj_seed, proj_type, device, dtype)
    if theirs is None:
        raise ValueError(
            f"make_random_projector: received proj_type={proj_type!r}; expected 'normal', "
            "'rademacher' or 'sjlt' (install() leaves the others to dattri)"
        )
    return theirs(
        param_shape_list,
        feature_batch_size,
        proj_dim,
        proj_max_batch_size,
        device,
        proj_seed,
        proj_type,
        dtype=dtype,
        **others,
    )


def random_project(
    feature: Features,
    feature_batch_size: Any,
    proj_dim: int | None = None,
    proj_max_batch_size: int | None = None,
    proj_seed: int = 0,
    proj_type: str = "normal",
    *,
    device: str | torch.device = "cpu",
) -> Callable[..., Tensor]:
    """dattri's ``random_project``: a function (feature, ensemble_id=0) -> [B, proj_dim].

    Parameters
    ----------
    feature : an example of what will be projected, for its width and dtype.
    feature_batch_size : its B; or, as in dattri's development version, an object with all of the
        arguments that follow as attributes (``RandomProjectionParams``).
    proj_max_batch_size : without effect.
    proj_type : "normal", "rademacher" or "sjlt".

    Raises
    ------
    TypeError, ValueError
        For no features, and for what ``make_random_projector`` refuses.
    """
    if hasattr(feature_batch_size, "proj_dim"):
        params = feature_batch_size
        return random_project(
            feature,
            params.feature_batch_size,
            params.proj_dim,
            params.proj_max_batch_size,
            params.proj_seed,
            params.proj_type,
            device=params.device,
        )
    if proj_dim is None:
        raise TypeError("random_project: received no proj_dim; expected an int")
    tensors = list(feature.values()) if isinstance(feature, Mapping) else [feature]
    if not tensors or feature_batch_size < 1:
        raise ValueError(
            f"random_project: received {len(tensors)} tensors, feature_batch_size="
            f"{feature_batch_size}; expected an example of at least one sample"
        )
    projector = make_random_projector(
        [tensor.numel() // feature_batch_size for tensor in tensors],
        feature_batch_size,
        proj_dim,
        proj_max_batch_size or 0,
        device,
        proj_seed,
        proj_type,
        dtype=tensors[0].dtype,
    )

    def project(feature: Features, ensemble_id: int = 0) -> Tensor:
        y: Tensor = projector.project(feature, ensemble_id)
        return y

    return project


_patch = Patch()


def install() -> None:
    """Replace dattri's ``make_random_projector`` in place, wherever loaded modules hold it.

    That of GraSS's copy too, where Python finds it: its folder is then on PYTHONPATH.

    Raises
    ------
    ImportError
        Where neither is found, or dattri is older than 0.3: its projections were unscaled.
    """
    if _patch.active:
        return
    there = [package for package in PACKAGES if importlib.util.find_spec(package)] or PACKAGES[:1]
    replacements = []
    for package in there:
        module = needed("dattri.install", f"{package}.func.projection", "dattri")
        factory = module.make_random_projector
        takes("dattri.install", factory, "proj_type", "dattri>=0.3")
        replacements.append((factory, partial(make_random_projector, theirs=factory)))
    _patch.apply(replacements)


def uninstall() -> None:
    """Put dattri's own factory back."""
    _patch.undo()
