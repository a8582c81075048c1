"""fast_jl's six functions, for any size, dtype and device.

fast_jl: https://pypi.org/project/fast_jl, the projection behind TRAK's ``CudaProjector``. The
number in a name was the batch size that its kernel was written for, and ``num_feature_tiles``
(callers pass the number of multiprocessors) its split of the work, which changed the matrix. Here
neither changes anything. The matrix is fastproj's, not fast_jl's: docs/dropin.md.
"""

from __future__ import annotations

from collections.abc import Callable
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


Function = Callable[[Tensor, SupportsIndex, SupportsIndex, object], Tensor]


def _projecting(name: str, kind: str, entries: str) -> Function:
    """One of the six: ``name``, for a matrix of ``kind``."""

    def project(
        input: Tensor, N: SupportsIndex, seed: SupportsIndex, num_feature_tiles: object
    ) -> Tensor:
        function = f"fast_jl.{name}"
        if not isinstance(input, Tensor) or input.dim() != 2:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"{function}: received input {got}; expected a Tensor [B, F]")
        call = Call(checks.check_key(function, seed, kind, 0), precision="")
        proj_dim = checks.check_proj_dim(function, N)
        return ops.project_call(function, input.detach(), proj_dim, call)

    project.__name__ = project.__qualname__ = name
    project.__doc__ = f"""``input @ R[:F, :N]``, unscaled, R of {entries}.

    Parameters
    ----------
    input : Tensor [B, F], float32, bfloat16, float16 or float64, on the CPU or a GPU.
    N : columns of the result, N >= 1.
    seed : names the matrix, 0 <= seed < 2^64.
    num_feature_tiles : without effect.

    Returns
    -------
    Tensor [B, N] on the device of ``input``: float64 for float64, float32 otherwise.

    Raises
    ------
    TypeError, ValueError
        For anything it can't take.
    """
    return project


project_rademacher_8, project_rademacher_16, project_rademacher_32 = (
    _projecting(f"project_rademacher_{n}", "rademacher", "+1 and -1") for n in (8, 16, 32)
)
project_normal_8, project_normal_16, project_normal_32 = (
    _projecting(f"project_normal_{n}", "gaussian", "N(0, 1)") for n in (8, 16, 32)
)
