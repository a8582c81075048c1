"""The tests, a package: they import each other's helpers by full name, and the repository's root
comes last on sys.path."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
