"""``python -m fastproj``: the same as the ``fastproj`` command."""

from __future__ import annotations

import sys

import fastproj
from fastproj import namesake

if not hasattr(fastproj, "__version__"):  # the other package's __init__.py is in our place
    sys.exit(f"fastproj: {namesake.problem()}")

from fastproj.cli import main

sys.exit(main())
