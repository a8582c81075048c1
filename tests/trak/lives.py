"""Runs functions in processes of their own, forked from one that has imported and warmed up torch.

    with Server() as server:
        codes = server.run("module:function", [arguments of process 0, arguments of process 1], log)

Started as a program it is that server: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from tests import ROOT


class Server:
    """The warm process; one for many runs."""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, function: str, arguments: list[list[Any]], log: Path) -> list[int]:
        """Run ``function(*arguments[i])`` for all i at once; exit codes, or minus the signal.

        function : "module:name". log : what they print is appended to it, one after the other.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"function": function, "arguments": arguments, "log": str(log)}
        print(json.dumps(order, default=str), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def serve() -> None:
    """Fork for each line until the input ends."""
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        with ExitStack() as stack, Path(order["log"]).open("ab") as log:
            printed = [stack.enter_context(TemporaryFile()) for _ in order["arguments"]]
            children = [
                fork(order["function"], arguments, out.fileno())
                for arguments, out in zip(order["arguments"], printed, strict=True)
            ]
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            for out in printed:
                out.seek(0)
                log.write(out.read())
        print(json.dumps(codes), flush=True)


def warm_up() -> None:
    """Load and run once what every life needs; no thread is left running."""
    import tempfile

    import torch
    import torch.distributed

    torch.set_num_threads(1)
    cases = importlib.import_module("tests.trak.cases")
    with tempfile.TemporaryDirectory() as folder:
        cases.whole_run(Path(folder), [cases.net()], cases.data(20), cases.data(3))


def fork(function: str, arguments: list[Any], out: int) -> int:
    """A child that runs the function, prints to ``out`` and doesn't clean up after the server."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(600)  # a child that hangs ends, and its exit code says so
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        module, _, name = function.partition(":")
        getattr(importlib.import_module(module), name)(*arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
