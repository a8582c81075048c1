"""``python -m fastproj.compat -- script.py args...``: run a script that imports fast_jl.

``--help`` shows the rest.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from fastproj import compat

PATCHES = ("trak", "dattri", "bergson", "sjlt")
START_UP_FILE = "fastproj_as_fast_jl.pth"


def main(argv: Sequence[str] | None = None) -> int:
    """Do what ``argv`` (default: sys.argv) says and return the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    program = options.program[1:] if options.program[:1] == ["--"] else options.program
    if options.path:
        print(compat.FAST_JL_PATH)
        return 0
    if options.enable or options.disable:
        return change_start_up(options.enable)
    if not program:
        parser.print_usage(sys.stderr)
        return 2
    check_program(parser, program)
    run(program, shadow=options.shadow, patches=options.patch)
    return 0


def check_program(parser: argparse.ArgumentParser, program: list[str]) -> None:
    """Exit with the status of ``python`` and a message where ``program`` can't be run."""
    if program[0] == "-m":
        if len(program) < 2:
            parser.error("received -m alone; expected -m module")
    elif not os.path.exists(program[0]):
        parser.error(f"received {program[0]!r}, which is no file; expected script.py or -m module")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastproj.compat",
        description="Run a Python program that imports fast_jl on fastproj instead.",
        usage="python -m fastproj.compat [options] -- (script.py | -m module) [args...]",
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--shadow", action="store_true", help="go before a real fast_jl")
    parser.add_argument(
        "--patch",
        action="append",
        choices=PATCHES,
        default=[],
        help="also replace this package's projection in place (may be repeated)",
    )
    parser.add_argument(
        "--path",
        action="store_true",
        help="print the folder that, on PYTHONPATH, makes `import fast_jl` find fastproj",
    )
    parser.add_argument(
        "--enable",
        action="store_true",
        help=f"let {compat.ENVIRONMENT}=1 work in this environment for programs that never "
        f"import fastproj: writes {START_UP_FILE} to site-packages",
    )
    parser.add_argument("--disable", action="store_true", help="undo --enable")
    return parser


def run(program: list[str], *, shadow: bool = False, patches: Sequence[str] = ()) -> None:
    """Run ``[script, *args]`` or ``["-m", module, *args]`` as ``python`` would.

    Programs that it starts find fast_jl through PYTHONPATH, unless a real one is there to be found.
    """
    module = program[0] == "-m"
    sys.argv = program[1:] if module else program
    if not getattr(sys.flags, "safe_path", False):  # of Python 3.11: sys.path has no such entry
        sys.path[0] = os.getcwd() if module else str(Path(program[0]).resolve().parent)
    if compat.install(shadow=shadow):
        inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        paths = [compat.FAST_JL_PATH, *inherited] if shadow else [*inherited, compat.FAST_JL_PATH]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ[compat.ENVIRONMENT] = "1"
    for name in patches:
        importlib.import_module(f"fastproj.compat.{name}").install()
    if module:
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program[0], run_name="__main__")


def change_start_up(enable: bool) -> int:
    """Write or remove the file by which an interpreter's start honours FASTPROJ_AS_FAST_JL.

    It puts one folder at the end of sys.path where the variable is 1, and imports nothing more.
    """
    file = Path(sysconfig.get_path("purelib")) / START_UP_FILE
    if enable:
        # The path as bytes, so that the line is ASCII: an interpreter whose locale cannot decode it
        # does not start.
        file.write_text(
            f"import os, sys; os.environ.get({compat.ENVIRONMENT!r}) == '1' "
            f"and sys.path.append(os.fsdecode({os.fsencode(compat.FAST_JL_PATH)!r}))\n"
        )
        print(f"wrote {file}; {compat.ENVIRONMENT}=1 now makes `import fast_jl` find fastproj")
    else:
        file.unlink(missing_ok=True)
        print(f"removed {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
