"""fast_jl's six functions, for any size, dtype and device.

fast_jl: https://pypi.org/project/fast_jl, the projection behind TRAK's ``CudaProjector``. The
number in a name was the batch size that its kernel was written for, and ``num_feature_tiles``
(callers pass the number of multiprocessors) its split of the work, which changed the matrix. Here
neither changes anything. The matrix is fastproj's, not fast_jl's: docs/dropin.md.
"""

from __future__ import annotations

from typing import SupportsIndex

from torch import Tensor

from fastproj import checks, ops
from fastproj.call import Call

__all__ = [
    "project_normal_8",
    "project_normal_16",
    "project_normal_32",
    "project_rademacher_8",
    "project_rademacher_16",
    "project_rademacher_32",
]


def _project(
    function: str, kind: str, input: Tensor, N: SupportsIndex, seed: SupportsIndex
) -> Tensor:
    """``input @ R[:F, :N]``, unscaled.

    Parameters
    ----------
    input : Tensor [B, F], float32, bfloat16, float16 or float64, on the CPU or a GPU.
    N : columns of the result, N >= 1.
    seed : names the matrix, 0 <= seed < 2^64.

    Returns
    -------
    Tensor [B, N] on the device of ``input``: float64 for float64, float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        For anything it can't take.
    """
    name = f"fast_jl.{function}"
    if not isinstance(input, Tensor) or input.dim() != 2:
        got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"{name}: received input {got}; expected a Tensor [B, F]")
    call = Call(checks.check_key(name, seed, kind, 0), precision="")
    return ops.project_call(name, input.detach(), checks.check_proj_dim(name, N), call)


def project_rademacher_8(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """``input @ R``, R [F, N] of ±1; ``num_feature_tiles`` has no effect. See ``_project``."""
    return _project("project_rademacher_8", "rademacher", input, N, seed)


def project_rademacher_16(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """The same as ``project_rademacher_8``."""
    return _project("project_rademacher_16", "rademacher", input, N, seed)


def project_rademacher_32(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """The same as ``project_rademacher_8``."""
    return _project("project_rademacher_32", "rademacher", input, N, seed)


def project_normal_8(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """``input @ R``, R [F, N] of N(0, 1); ``num_feature_tiles`` has no effect. See ``_project``."""
    return _project("project_normal_8", "gaussian", input, N, seed)


def project_normal_16(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """The same as ``project_normal_8``."""
    return _project("project_normal_16", "gaussian", input, N, seed)


def project_normal_32(
    input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
) -> Tensor:
    """The same as ``project_normal_8``."""
    return _project("project_normal_32", "gaussian", input, N, seed)
