"""How `make docs` builds the site: the pages of all folders, and the API reference.

The sources are the whole repository, so that the links of the pages are the same here and there.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python -m sphinx` elsewhere than in the checkout

import fastproj  # noqa: E402

project = "fastproj"
copyright = "fastproj contributors"
release = version = fastproj.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/**/*.md", "csrc/*/README.md",
                    "kernels/*.md", "bench/README.md"]  # fmt: skip
exclude_patterns = [".*", "build", "dist", "tests", "fastproj", "**/.*"]
myst_heading_anchors = 3
source_suffix = {".md": "markdown"}
highlight_language = "none"  # an indented block is a formula or a command

# The order of the pages, in one place: the pages themselves are plain Markdown.
CONTENTS = {
    "TRAK": ["docs/quickstart", "docs/tasks", "docs/huggingface", "docs/gradients", "docs/running",
             "docs/evaluation", "docs/command-line", "docs/from-trak", "docs/research/lambda"],
    "Projection": ["docs/projection", "docs/install", "docs/dropin"],
    "API": ["docs/api/projection", "docs/api/trak", "docs/api/compat"],
    "Inside": ["docs/architecture", "docs/glossary", "csrc/cpu/README", "csrc/cuda/README",
               "docs/triton", "kernels/RESOURCES", "bench/README", "CONTRIBUTING", "CHANGELOG"],
}  # fmt: skip

html_theme = "furo"
html_title = f"fastproj {version}"
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80

_ARGUMENT = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*) : (.*)")
_LITERAL = re.compile(r"(``.*?``)")


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """The table of contents, which only the site has."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            listed = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def plain(text: str) -> str:
    """``text`` with stars and bars that mean themselves (``[B, *shape]``, ``"a" | "b"``)."""
    parts = _LITERAL.split(text)
    parts[::2] = [re.sub(r"([*|\\])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def as_rst(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """A docstring of this project as reStructuredText.

    Sections get rubrics, ``name : text`` becomes a definition, and an indented block after a colon
    stays as it is.
    """
    result: list[str] = []
    literal = defining = False
    for number, line in enumerate(lines):
        below, after = [*lines[number + 1 : number + 3], "", ""][:2]
        indented = line.startswith("    ")
        literal = literal and (indented or not line)
        argument = None if literal else _ARGUMENT.fullmatch(line)
        if literal:
            result.append(line)
        elif line and set(line) == {"-"}:
            continue
        elif line and below and set(below) == {"-"}:
            result += ["", f".. rubric:: {line}", ""]
        elif argument:
            result += [] if defining else [""]
            result += [f"**{plain(argument[1])}**", f"    {plain(argument[2])}"]
        else:
            result += [""] if defining and not indented else []
            literal = line.endswith(":") and not below and after.startswith("    ")
            result.append(plain(line) + ":" * (literal and not line.endswith("::")))
        defining = bool(argument) or (defining and indented)
    lines[:] = [*result, ""]


def add_index(app: Any, error: Exception | None) -> None:
    """index.html is the README, for who opens the folder."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("build-finished", add_index)
