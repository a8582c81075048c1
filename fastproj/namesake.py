"""The unrelated package called `fastproj` on PyPI, which installs into the same folder as this one.

This distribution is called `torch-fastproj`. pip doesn't notice that two distributions own the
same files: whichever was installed last has overwritten the other's.
"""

from __future__ import annotations

from pathlib import Path

_REPAIR = (
    "run `pip uninstall -y fastproj` and then `pip install --force-reinstall --no-deps "
    "torch-fastproj` (from a checkout: `.` instead of the name)"
)


def problem() -> str | None:
    """What is wrong and what to do where the other package lies in this one's folder, else None."""
    folder = Path(__file__).parent
    if not (folder / "main.py").is_file():  # a file of the other package, none of this one
        return None
    return (
        f"two packages share the folder {folder}: this one (torch-fastproj) and the unrelated "
        "`fastproj` from PyPI; whichever was installed last has overwritten files of the other, "
        f"and removing one breaks the other. To keep this one, {_REPAIR}"
    )
