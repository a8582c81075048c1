"""Commands, copies of the sources and empty environments for the packaging tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

NOT_SOURCE = (
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "_build_info.py", "__pycache__",
    ".*_cache", ".hypothesis", "results",
)  # fmt: skip


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would change a build or an import.

    `_cuda` is left out: it takes minutes, and `make test` has just built it.
    """
    dropped = ("FASTPROJ_", "PYTHON", "CXX", "LDFLAGS", "MAX_JOBS", "LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**kept, "FASTPROJ_CUDA": "0", **changes}


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output and error of a command that must succeed."""
    done = attempt(*command, cwd=cwd, env=env)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


def attempt(
    *command: str | Path, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command's status, with both of its outputs in `stdout`."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment() if env is None else env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def copy_sources(target: Path) -> Path:
    """The source tree at ``target``, without anything built."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return target


@dataclass(frozen=True)
class Built:
    """An sdist, the tree it unpacks to (where the wheel was built), and the wheel."""

    sdist: Path
    tree: Path
    wheel: Path


def pip_wheel(tree: Path, target: Path, env: dict[str, str] | None = None) -> Path:
    """The wheel of ``tree``, built with this environment's build tools."""
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, "-w", target, tree, cwd=target.parent, env=env)
    (wheel,) = target.glob("*.whl")
    return wheel


class Venv:
    """An empty environment that sees this one's torch and NumPy, but not its fastproj."""

    def __init__(self, folder: Path, python: str = sys.executable) -> None:
        run(python, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def see_this_environment(self) -> None:
        """Put this environment's packages on the path, last; their .pth files stay unread."""
        site = Path(self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
        paths = sysconfig.get_paths()
        lines = dict.fromkeys((paths["purelib"], paths["platlib"]))
        (site / "this_environment.pth").write_text("\n".join(lines) + "\n")

    def install(self, *what: str | Path, env: dict[str, str] | None = None) -> str:
        """pip's output of installing ``what`` without dependencies."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps")
        return run(*pip, *what, cwd=self.elsewhere, env=env)

    def uninstall(self, name: str) -> str:
        """pip's output of removing a distribution."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "uninstall", "-y")
        return run(*pip, name, cwd=self.elsewhere)

    def run(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        """Output of this environment's Python, run far from the sources."""
        return run(self.python, *arguments, cwd=self.elsewhere, env=env).strip()
