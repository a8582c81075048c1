"""What ``import fast_jl`` finds after ``fastproj.compat.install()``."""

from fastproj.compat.fast_jl import *  # noqa: F403
from fastproj.compat.fast_jl import __all__  # noqa: F401
