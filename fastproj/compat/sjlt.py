"""sjlt's ``SJLTProjection`` on kind "sjlt", for any size, dtype and device.

``install()`` replaces the class where sjlt is installed. Elsewhere it makes ``import sjlt`` and
``import sjlt.core`` give modules with sjlt's names, because sjlt itself needs nvcc at install. The
matrix is fastproj's, not sjlt's: docs/dropin.md.

Source: sjlt 0.1.7, https://github.com/TRAIS-Lab/sjlt, for names and meaning.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

import fastproj
from fastproj import checks
from fastproj.compat.patching import Patch
from fastproj.compat.pieces import block_below, project_pieces
from fastproj.spec import MAX_ROWS

__all__ = ["EXTENSION_AVAILABLE", "SJLTProjection", "get_cuda_info", "install", "uninstall"]

VERSION = "0.1.7"  # of the sjlt whose names these are

EXTENSION_AVAILABLE = True  # sjlt's callers ask for it; nothing here has to be compiled for a GPU


class SJLTProjection(nn.Module):
    """``x @ R * sqrt(block / proj_dim)``, R [original_dim, proj_dim] of kind "sjlt".

    ``block`` is the power of two at or below proj_dim / c, at least 16 and at most 65,536. A row of
    R has proj_dim / block entries, +1 or -1 in different columns (rounded up or down where that is
    no integer). Where proj_dim / c is a power of two in these bounds, that is c entries, and the
    scale is sjlt's 1 / sqrt(c). Elsewhere a row has another number of entries: fewer than c where
    proj_dim < 16 c (below proj_dim = 16 some rows have none), and otherwise more.

    Parameters
    ----------
    original_dim : P, the entries per sample, 1 <= P <= 2^56.
    proj_dim : K, 1 <= K <= 2^32.
    c : entries a row, 1 <= c <= K.
    threads, fixed_blocks : of sjlt's kernel, without effect.
    device : where inputs are moved to, and results lie.
    seed : names the matrix, 0 <= seed < 2^64. None draws one from torch's CPU generator, which
        ``torch.manual_seed`` sets. It is part of ``state_dict()``.

    Raises
    ------
    TypeError, ValueError
        For a configuration that can't work here.
    """

    def __init__(
        self,
        original_dim: SupportsIndex,
        proj_dim: SupportsIndex,
        c: SupportsIndex = 1,
        threads: object = 1024,
        fixed_blocks: object = 84,
        device: str | torch.device = "cuda",
        *,
        seed: SupportsIndex | None = None,
    ) -> None:
        super().__init__()
        name = "SJLTProjection"
        self.original_dim = checks.check_integer(
            name, "original_dim", original_dim, 1, MAX_ROWS + 1
        )
        self.proj_dim = checks.check_proj_dim(name, proj_dim)
        self.c = checks.check_integer(name, "c", c, 1, self.proj_dim + 1)
        self.threads, self.fixed_blocks = threads, fixed_blocks
        self.device = checks.check_device(name, device)
        if seed is None:
            seed = int(torch.randint(1 << 62, (), dtype=torch.int64, device="cpu"))
        self.seed = checks.check_integer(name, "seed", seed, 0, checks.MAX_SEED)
        self.block = block_below(self.proj_dim // self.c)
        self.normalization_factor = math.sqrt(self.block / self.proj_dim)

    def forward(self, x: Tensor) -> Tensor:
        """``project(x)``."""
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        """[B, original_dim] to [B, proj_dim] of the same dtype, without a gradient, as in sjlt.

        Sums are float32 (float64 for float64) and rounded once.

        Raises
        ------
        TypeError, ValueError
            For another shape, and a dtype other than float32, bfloat16, float16 and float64.
        """
        x = self._checked("project", "x", x, self.original_dim)
        y = project_pieces(
            "SJLTProjection.project",
            [x],
            self.proj_dim,
            self.seed,
            "sjlt",
            stream=0,
            scale="jl",
            block=self.block,
        )
        return y.to(x.dtype)

    def transpose(self, y: Tensor) -> Tensor:
        """The adjoint, ``y @ R.T * sqrt(block / proj_dim)``: [B, proj_dim] to [B, original_dim].

        Dtypes, gradients and errors as in ``project``.
        """
        y = self._checked("transpose", "y", y, self.proj_dim)
        x = fastproj.project_transpose(y, self.original_dim, self.seed, "sjlt", block=self.block)
        return x.to(y.dtype)

    def _checked(self, method: str, name: str, value: Tensor, width: int) -> Tensor:
        """``value`` [B, width], detached, on ``device``."""
        if not isinstance(value, Tensor):
            raise TypeError(
                f"SJLTProjection.{method}: received {name} {type(value).__name__}; "
                f"expected a Tensor [B, {width}]"
            )
        if value.dim() != 2 or value.shape[1] != width:
            raise ValueError(
                f"SJLTProjection.{method}: received {name} {checks.describe(value)}; "
                f"expected [B, {width}]"
            )
        value = checks.check_input(f"SJLTProjection.{method}", name, value)
        return value.detach().to(self.device)

    def get_compression_ratio(self) -> float:
        """original_dim / proj_dim."""
        return self.original_dim / self.proj_dim

    def get_sparsity_ratio(self) -> float:
        """The share of zeros in R (on average where proj_dim / block is no integer)."""
        return 1 - 1 / self.block

    def extra_repr(self) -> str:
        return (
            f"original_dim={self.original_dim}, proj_dim={self.proj_dim}, c={self.c}, "
            f"block={self.block}, seed={self.seed}, device={self.device}"
        )

    def get_extra_state(self) -> dict[str, int]:
        """What names the matrix, for ``state_dict``."""
        names = ("original_dim", "proj_dim", "block", "seed")
        return {name: getattr(self, name) for name in names}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """Take the seed of ``state``.

        Raises ValueError where its shape or block is another, and TypeError or ValueError for what
        is no state or no seed.
        """
        name, mine = "SJLTProjection", self.get_extra_state()
        if not isinstance(state, Mapping):
            raise TypeError(
                f"{name}: received the state {state!r:.80} ({type(state).__name__}); expected a "
                f"dict such as {mine}, which state_dict() holds"
            )
        mine["seed"] = state.get("seed", self.seed)
        if dict(state) != mine:
            raise ValueError(f"{name}: received the state {state}; expected {mine}")
        self.seed = checks.check_integer(name, "seed", mine["seed"], 0, checks.MAX_SEED)

    def __getattr__(self, name: str) -> Any:
        if name in ("rand_indices", "rand_signs"):
            raise AttributeError(
                f"SJLTProjection.{name}: received a request for a matrix that is not stored; "
                'expected seed= in its place. For "sjlt" of dattri and GraSS call '
                'fastproj.compat.dattri.install(); for "grass" fastproj.compat.sjlt.uninstall()'
            )
        return super().__getattr__(name)


def get_cuda_info() -> dict[str, Any]:
    """What torch says of CUDA, under sjlt's keys."""
    available = torch.cuda.is_available()
    found = {"cuda_available": available, "extension_available": EXTENSION_AVAILABLE}
    if not available:
        return found
    started = torch.cuda.is_initialized()
    return found | {
        "cuda_version": torch.version.cuda,
        "cudnn_version": torch.backends.cudnn.version(),
        "device_count": torch.cuda.device_count(),
        "current_device": torch.cuda.current_device() if started else None,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


_patch = Patch()
_stand_ins: dict[str, ModuleType] = {}  # by what imports them


def install() -> None:
    """Let ``from sjlt import SJLTProjection`` give ours, in this process and its forks.

    Where sjlt can be imported, its class is replaced in place, wherever loaded modules hold it, and
    ``sjlt.EXTENSION_AVAILABLE`` is True.
    """
    if _patch.active or _stands_in():
        return
    try:
        theirs = importlib.import_module("sjlt")
    except ImportError:
        _stand_ins.update(_make_stand_ins())
        sys.modules.update(_stand_ins)
    else:
        _patch.apply([(theirs.SJLTProjection, SJLTProjection)])
        _patch.set(theirs, "EXTENSION_AVAILABLE", EXTENSION_AVAILABLE)


def uninstall() -> None:
    """Undo ``install``: ``import sjlt`` finds what it would without fastproj."""
    _patch.undo()
    while _stand_ins:
        name, module = _stand_ins.popitem()
        if sys.modules.get(name) is module:
            del sys.modules[name]


def _stands_in() -> bool:
    return "sjlt" in _stand_ins and sys.modules.get("sjlt") is _stand_ins["sjlt"]


def _make_stand_ins() -> dict[str, ModuleType]:
    """The modules sjlt and sjlt.core, with what sjlt's own ones show."""
    package, core = (
        importlib.util.module_from_spec(ModuleSpec(name, None, is_package=name == "sjlt"))
        for name in ("sjlt", "sjlt.core")
    )
    shown = {
        "SJLTProjection": SJLTProjection,
        "CUDA_AVAILABLE": torch.cuda.is_available(),
        "EXTENSION_AVAILABLE": EXTENSION_AVAILABLE,
        "__version__": VERSION,
    }
    vars(package).update(shown, __all__=list(shown), get_cuda_info=get_cuda_info, core=core)
    vars(core).update(SJLTProjection=SJLTProjection)
    package.__doc__ = core.__doc__ = "fastproj in the place of sjlt: see fastproj.compat.sjlt."
    return {"sjlt": package, "sjlt.core": core}
