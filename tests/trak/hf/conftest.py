"""These tests need what the extra [hf] brings; without it they are left out, not errors."""

from __future__ import annotations

from importlib.util import find_spec

if any(find_spec(name) is None for name in ("accelerate", "datasets", "peft", "transformers")):
    collect_ignore_glob = ["*.py"]
