"""Runs functions in processes of their own, forked from one that has imported and warmed up torch.

    with Server() as server:
        codes = server.run("module:function", [arguments of process 0, arguments of process 1], log)

Started as a script it is that server: a line of JSON in, a line of JSON out.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class Server:
    """The warm process; one for many runs."""

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
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

        function : "module:name". log : what they print is appended to it.
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
        children = [fork(order, arguments) for arguments in order["arguments"]]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def warm_up() -> None:
    """Load and run once what every life needs; no thread is left running."""
    import tempfile

    import torch
    import torch.distributed

    torch.set_num_threads(1)
    cases = importlib.import_module("trak_cases")
    with tempfile.TemporaryDirectory() as folder:
        cases.whole_run(Path(folder), [cases.net()], cases.data(20), cases.data(3))


def fork(order: dict[str, Any], arguments: list[Any]) -> int:
    """A child that runs the function and ends without cleaning up after the server."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.alarm(600)  # a child that hangs ends, and its exit code says so
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        module, _, name = order["function"].partition(":")
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
