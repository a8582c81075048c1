"""What ``import fast_jl`` finds after ``fastproj.compat.install()``."""

from fastproj.compat.fast_jl import (
    project_normal_8,
    project_normal_16,
    project_normal_32,
    project_rademacher_8,
    project_rademacher_16,
    project_rademacher_32,
)

__all__ = [
    "project_normal_8",
    "project_normal_16",
    "project_normal_32",
    "project_rademacher_8",
    "project_rademacher_16",
    "project_rademacher_32",
]
