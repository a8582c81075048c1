"""Runs notebooks, each in a kernel of its own and in an empty folder, and stores their outputs.

    python docs/run_notebooks.py examples/*.ipynb

A notebook is written only after all of its cells have run. What differs from run to run, such as
times of execution, is left out of it. Needs `pip install ".[notebooks]"`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

CELL_SECONDS = 300  # after which a cell counts as hung


def executed(path: Path) -> Any:
    """The notebook with the outputs of its cells; raises CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    notebook.metadata["language_info"] = {"name": "python"}  # not this machine's version
    nbformat.validate(notebook)
    return notebook


def main() -> None:
    """Run those that are named, and write them in place."""
    if not sys.argv[1:]:
        sys.exit("usage: python docs/run_notebooks.py NOTEBOOK...")
    for path in map(Path, sys.argv[1:]):
        began = time.perf_counter()
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"{path}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
