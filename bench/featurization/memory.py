"""The largest resident set of this process, of a part of its life."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LEFT = 0.9  # of the machine's free memory, that a process may take


def begin() -> None:
    """Give free memory back, and let the peak start again from the present size."""
    gc.collect()
    with suppress(AttributeError, OSError):  # where it isn't glibc
        ctypes.CDLL(None).malloc_trim(0)
    if CLEAR.exists():
        CLEAR.write_text("5")


def peak_mib() -> float:
    """The peak since ``begin``; where Linux isn't, that of the process's life."""
    if not CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def bounded() -> None:
    """From now on, what would take the machine's last memory fails in this process alone."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(LEFT * free * 1024), most))
