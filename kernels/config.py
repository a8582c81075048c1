"""Tile sizes for an architecture, dtype and shape: one deterministic function, no autotuner.

``choose`` has a rule and a reason for each case. ``pin`` or ``$FASTPROJ_TRITON_CONFIG`` overrides
it, for measurements. Results depend on the configuration by rounding only, and R doesn't depend on
it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace

from fastproj.spec import KINDS

from . import plan

ENVIRONMENT = "FASTPROJ_TRITON_CONFIG"

# Triton's default is about to change; nothing here depends on it beyond the last bit of a scale.
OPTIONS = {"enable_fp_fusion": True}

SJLT_SUMS = 4 * plan.SJLT_COLUMNS  # float32, of a program of kind sjlt

# With two stages, Triton asks for the next iteration's tiles of G at the end of an iteration, and
# waits for them at once. Programs that share a multiprocessor hide that. One that fills it alone
# asks for them an iteration earlier.
DEEP = 3


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled."""

    BLOCK_B: int  # rows of G in a tile
    BLOCK_K: int  # columns of R in a tile
    STEP_ROWS: int  # rows of R in one loop iteration; kind sjlt: tiles
    num_warps: int
    num_stages: int  # loop iterations for which tiles of G are on their way; kind sjlt: 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1 or (name != "num_stages" and value & (value - 1)):
                raise ValueError(f"Config: received {name}={value}; expected a power of two")

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))


_pinned: ContextVar[dict[str, int] | None] = ContextVar("fastproj_triton_config", default=None)


def parse(text: str) -> dict[str, int]:
    """``"BLOCK_K=128,num_warps=4"`` to a dict; any of Config's fields.

    Raises ValueError for an unknown field or a value that is not an integer.
    """
    values: dict[str, int] = {}
    known = [field.name for field in fields(Config)]
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name.strip() not in known or not value.strip().isdigit():
            raise ValueError(
                f"{ENVIRONMENT}: received {part!r}; expected name=integer with a name of "
                f"{', '.join(known)}"
            )
        values[name.strip()] = int(value)
    return values


@contextmanager
def pin(**values: int) -> Iterator[None]:
    """Within the block, kernels launched from this context take these values of Config.

    values : BLOCK_B, BLOCK_K, STEP_ROWS, num_warps or num_stages, each an integer.

    Raises ValueError for another name; at the launch, for a value that its kernel can't take.
    """
    token = _pinned.set(parse(",".join(f"{name}={value}" for name, value in values.items())))
    try:
        yield
    finally:
        _pinned.reset(token)


def unit(arch: str) -> str:
    """The matrix instruction of an architecture: wgmma, tcgen05, mma (mma.sync) or mfma."""
    if arch.startswith("gfx"):
        return "mfma"
    return {"sm_90": "wgmma", "sm_100": "tcgen05", "sm_103": "tcgen05"}.get(arch, "mma")


def batch_bucket(B: int) -> int:
    """B rounded up to 16, 32, 64 or 128."""
    return next((bucket for bucket in (16, 32, 64) if bucket >= B), 128)


def choose(
    arch: str, dtype: str, kind: str, terms: int, B: int, K: int, direct: bool = True
) -> Config:
    """The configuration of ``project`` for gradients of ``dtype`` as ``terms`` 16-bit terms.

    arch : "sm_90", "gfx942"; dtype : "float32", "bfloat16", "float16" or "float64".
    B, K : samples and columns.
    direct : G can be copied to shared memory as it is, 4 bytes or more at a time. Otherwise it
        passes through registers, of which fewer are left. For kind sjlt: loads need no mask.
        BLOCK_B is the same for both.

    Raises ValueError for another kind, and for values of ``pin`` that the kernel can't take.
    """
    if kind == "sjlt":
        config = _choose_sjlt(unit(arch), dtype, B, K, direct)
    elif kind in ("rademacher", "gaussian"):
        config = _choose(unit(arch), dtype, kind, terms, batch_bucket(B), K, direct)
    else:
        raise ValueError(f"config: received kind={kind!r}; expected one of {', '.join(KINDS)}")
    pinned = _pinned.get()
    if pinned is None:
        pinned = parse(os.environ.get(ENVIRONMENT, ""))
    config = replace(config, **pinned)
    if kind == "sjlt":
        _check_sjlt(config, K)
    return config


def _choose_sjlt(unit: str, dtype: str, B: int, K: int, direct: bool) -> Config:
    """The sparse kind: no matrix unit, no operand in shared memory."""
    columns = plan.sjlt_columns(K)
    # Rows of G share a program's hashing and signs, while their sums fit: 32 floats to a thread
    # leave a multiprocessor's registers for 16 warps; rows beyond 16 would save little.
    words = 2 if dtype == "float64" else 1  # and as many again for G and signs
    most = max(1, SJLT_SUMS // (words * words * columns))
    rows = min(next((n for n in (1, 2, 4, 8) if n >= B), 16), most)
    threads = 32 * (2 if unit == "mfma" else 1)
    # One Philox call of each sort to a thread, or 32 sums: what takes more threads.
    calls = columns // 64 * plan.PANEL_TILES
    warps = max(calls // threads, words * rows * columns // (32 * threads), 1)
    if not direct:  # masks take registers
        columns = max(64, columns // 2)
    return Config(rows, columns, plan.PANEL_TILES, min(warps, 512 // threads), 1)


def _check_sjlt(config: Config, K: int) -> None:
    """Raise ValueError for a pinned configuration that the kernel or the workspace can't have."""
    columns = plan.sjlt_columns(K)
    if not 64 <= config.BLOCK_K <= columns or config.STEP_ROWS != plan.PANEL_TILES:
        raise ValueError(
            f"config: received {config} for kind sjlt at K={K}; expected BLOCK_K from 64 to "
            f"{columns} and STEP_ROWS={plan.PANEL_TILES}"
        )


def _choose(
    unit: str, dtype: str, kind: str, terms: int, bucket: int, K: int, direct: bool
) -> Config:
    if dtype == "float64":  # sums of products in registers: few entries at a time
        if kind == "gaussian":
            return Config(2, 64, 128, 4, 2)
        return Config(2, 64, 256, 8 if unit == "wgmma" else 4, 2)
    narrow = 64 if K <= 64 else 128
    if kind == "gaussian":
        # Making entries is the limit: the widest batch that two accumulators leave room for.
        # A loop iteration takes 128 rows, or the code grows beyond the instruction cache.
        if bucket <= 32 or narrow == 64:
            return Config(min(bucket, 64), narrow, 128, 4, 2)
        # On sm_90 two programs with 64 rows of 16 bits fit; with a third stage one would.
        alone = unit == "mma" or (unit == "wgmma" and (bucket == 128 or dtype == "float32"))
        return Config(
            bucket if unit == "wgmma" else 64, 128, 128, 8, DEEP if alone and direct else 2
        )
    if bucket == 16:
        if unit == "wgmma" and dtype != "float32" and narrow == 128:
            # Making entries is the limit; 256 rows leave registers for four programs at once.
            return Config(16, 128, 256, 4, 3)
        return Config(16, narrow, 512, 4, 2)
    if terms > 1 and unit != "wgmma":
        # Each warp reads all terms of G to registers: fewer rows of G leave room for them.
        return Config(32, narrow, 256, 4, 2)
    rows = 512 if bucket == 32 else 256  # 512 rows of 64 in flight are 128 KiB of shared memory
    if narrow == 64:
        return Config(min(bucket, 64), 64, rows, 4, 2)
    if not direct and bucket > 32:
        return Config(64, 128, rows, 8, 2)
    if unit == "wgmma" and K > 128:
        # 256 columns read G half as often as 128; two accumulators of 64 rows fill the registers.
        # Three terms of 64 rows would spill one of them in the loop with a third stage.
        spills = terms == 3 and bucket > 32
        return Config(min(bucket, 64), 256, rows, 8, DEEP if direct and not spills else 2)
    return Config(min(bucket, 64), 128, rows, 4, 2)


def choose_transpose(dtype: str, kind: str, B: int) -> tuple[int, int, int]:
    """BLOCK_B, BLOCK_K and warps of ``project_transpose``: tiles of 512 (Gaussian 64) rows of R.

    Of the dense kinds; raises ValueError for others.
    """
    if kind not in ("rademacher", "gaussian"):
        raise ValueError(f"config: received kind={kind!r}; expected rademacher or gaussian")
    if dtype == "float64":
        return (1, 64, 4) if kind == "gaussian" else (1, 16, 8)
    if kind == "gaussian":
        return min(batch_bucket(B), 32), 64, 4
    return 16, 32, 8


def choose_transpose_sjlt(dtype: str, B: int, block: int) -> tuple[int, int, int]:
    """BLOCK_B, rows of R to a program, and warps of the sparse ``project_transpose``.

    The rows of a program lie in one tile, whose words they share. Its samples share places and
    signs.
    """
    rows = min(block, 1024)
    most = 4 if dtype == "float64" else 8
    samples = min(next((n for n in (1, 2, 4) if n >= B), 8), most)
    return samples, rows, max(1, rows // 128)


def choose_matrix_sjlt(block: int) -> tuple[int, int]:
    """Rows of R to a program (of 64 columns), and warps, of the sparse ``matrix``."""
    return min(block, 256), 8
