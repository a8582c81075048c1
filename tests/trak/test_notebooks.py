"""The notebooks of examples/: as they are stored, and run again."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_BYTES = 300_000
# A path from the root: of a file of the machine that ran it.
MACHINE_PATH = re.compile(r"""(^|[\s"'(=])/[\w.-]+/|\b[A-Z]:\\""")


def read(path: Path) -> Any:
    """A valid notebook."""
    import nbformat  # here, for what runs on a GPU may lack it

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs_of(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def text_of(output: Any) -> str:
    return str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))


def test_all_notebooks_are_there() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "choosing_k",
        "first_steps_images",
        "language_model_facts",
        "wrong_labels",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_whole(path: Path) -> None:
    """Valid, small, run from top to bottom without errors or warnings, and of no machine."""
    notebook = read(path)
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert not [text_of(output) for output in outputs if output.get("name") == "stderr"]
    for text in (*(cell.source for cell in notebook.cells), *map(text_of, outputs)):
        assert not MACHINE_PATH.search(text)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert not any(cell.metadata for cell in notebook.cells)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert any(re.search(r"^assert ", cell.source, re.MULTILINE) for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    missing = [link for link in links if not (path.parent / link).is_file()]
    assert links
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_claims_hold(path: Path) -> None:
    """Its own asserts, without a warning; and it shows as much as it is stored with."""
    executed = runpy.run_path(str(ROOT / "docs" / "run_notebooks.py"))["executed"]
    found = outputs_of(executed(path))
    said = [text_of(output) for output in found if output.get("name") == "stderr"]
    assert not [text for text in said if "warning" in text.lower()]
    shown = [output.output_type for output in found if output.get("name") != "stderr"]
    assert shown == [output.output_type for output in outputs_of(read(path))]
