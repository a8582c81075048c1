"""``python -m fastproj``: the same as the ``fastproj`` command."""

from __future__ import annotations

import sys

from fastproj.cli import main

sys.exit(main())
