"""The pages: their Python runs, and every path, name and link in them and in docstrings exists."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
import tokenize
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastproj
import fastproj.trak
from fastproj import cli
from tests import ROOT

DOCS = ROOT / "docs"
CODE = ("fastproj", "kernels", "csrc", "bench", "tests", "examples", "docs")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *(page for name in CODE[1:4] for page in sorted((ROOT / name).rglob("*.md"))),
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# ---- the Python of the pages -------------------------------------------------------------------


def blocks_of(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


BLOCKS = [(page, block) for page in sorted(DOCS.rglob("*.md")) for block in blocks_of(page)]
RECIPE = """
def train(indices, seed):
    return indices.sum()

def outputs(total):
    return [float(total), float(total % 7)]
"""

Scope = dict[str, Any]


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.randint(3, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=generator), labels)


def classifier(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))


def vision() -> Scope:
    model, train_set, targets = classifier(), images(12), images(5)
    return {
        "model": model,
        "train_set": train_set,
        "train_loader": DataLoader(train_set, batch_size=5),
        "targets": targets,
        "target_loader": DataLoader(targets, batch_size=5),
        "checkpoints": [classifier(seed).state_dict() for seed in range(2)],
    }


def own_task() -> Scope:
    return {
        "TRAKer": fastproj.TRAKer,
        "torch": torch,
        "model": torch.nn.Linear(4, 1),
        "n": 6,
        "log_odds": lambda model, batch: model(batch[0]).squeeze(1),
    }


def gpt2() -> Scope:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    stand_in = types.SimpleNamespace(
        from_pretrained=lambda name: transformers.GPT2LMHeadModel(config).eval()
    )
    ids = torch.randint(20, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {
        "AutoModelForCausalLM": stand_in,
        "TRAKer": fastproj.TRAKer,
        "texts": range(4),
        "loader": [batch],
    }


def hugging_face() -> Scope:
    """run/checkpoint-50 and -100 with a tokenizer, train.jsonl and dev.jsonl."""
    from tests.trak.hf import models

    for seed, step in enumerate((50, 100)):
        models.model_for("causal_lm", seed).save_pretrained(f"run/checkpoint-{step}")
        models.tokenizer().save_pretrained(f"run/checkpoint-{step}")
    for name, rows in (("train", 12), ("dev", 5)):
        lines = (f'{{"text": "w{row} w{row % 4}"}}\n' for row in range(rows))
        Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {}


def in_training() -> Scope:
    import transformers

    from tests.trak.hf import models, training

    samples = models.samples_for("causal_lm", 12)
    return {
        "train": samples,
        "targets": samples[:5],
        "model": models.model_for("causal_lm"),
        "Trainer": transformers.Trainer,
        "collate": training.collate,
        "arguments": transformers.TrainingArguments(
            "run", max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
    }


def stopped() -> Scope:
    train_set, model = images(70), classifier()
    traker = fastproj.TRAKer(model, "image_classification", train_set_size=70, save_dir="run")
    traker.load_checkpoint(model.state_dict(), model_id=0)
    return {"traker": traker, "train_set": train_set, "DataLoader": DataLoader}


def finished() -> Scope:
    scope = vision()
    exec(blocks_of(DOCS / "quickstart.md")[0], scope)
    return scope


def sharded() -> Scope:
    model = classifier()
    model(images(1).tensors[0]).sum().backward()
    return {"model": model, "projector": fastproj.Projector(16 * 3 + 3, 8)}


def retraining() -> Scope:
    Path("recipe.py").write_text(RECIPE, encoding="utf-8")
    return {"n": 20, "scores": np.random.default_rng(0).normal(size=(20, 2))}


def shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape)


def log_odds_slope(scope: Scope) -> bool:
    """Q of the page's loss is 1 - p, where the output is log(p / (1 - p))."""
    model = torch.nn.Linear(4, 1)
    batch = (torch.ones(2, 4),)
    p = model(*batch).squeeze(1).sigmoid()
    params = dict(model.named_parameters())
    return torch.allclose(scope["task"].get_out_to_loss_grad(model, params, {}, batch), 1 - p)


def projected(scope: Scope) -> bool:
    y, R = scope["y"], scope["R"]
    return (
        torch.allclose(scope["in_pieces"], y, atol=1e-3)
        and torch.allclose(scope["grads"] @ R / 512**0.5, y[:, :4], atol=1e-2)
        and shape(scope["back"]) == (8, 100_000)
        and not torch.equal(scope["features"][0], scope["features"][1])
    )


# The page of a block, words in it, what it needs, and whether it did what the page says.
CASES: list[tuple[str, str, Callable[[], Scope], Callable[[Scope], bool]]] = [
    ("evaluation.md", "def train(", dict, lambda s: callable(s["train"])),
    ("evaluation.md", "train_subsets", retraining, lambda s: s["truth"].masks.shape == (100, 20)),
    ("huggingface.md", "HFTRAKer", hugging_face, lambda s: shape(s["scores"]) == (12, 5)),
    ("huggingface.md", "TRAKCallback", in_training, lambda s: shape(s["scores"]) == (12, 5)),
    ("projection.md", "project_transpose", dict, projected),
    ("quickstart.md", "import TRAKer", vision, lambda s: shape(s["scores"]) == (12, 5)),
    ("running.md", "remaining_batches", stopped, lambda s: not s["traker"].remaining_batches(64)),
    ("running.md", "top_k=", finished, lambda s: shape(s["top"].helpful_indices) == (5, 12)),
    ("running.md", "project_sharded", sharded, lambda s: shape(s["features"]) == (1, 8)),
    ("tasks.md", "AutoModelForCausalLM", gpt2, lambda s: not s["traker"].remaining_batches(4)),
    ("tasks.md", "squared_error", own_task, log_odds_slope),
]


def test_every_block_has_a_case() -> None:
    assert len(BLOCKS) == len(CASES)
    for (page, block), (name, words, *_) in zip(BLOCKS, CASES, strict=True):
        assert (page.name, words in block) == (name, True), words


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_block(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, _, prepare, holds = CASES[index]
    page, block = BLOCKS[index]
    scope = prepare()
    exec(compile(block, name_of(page), "exec"), scope)
    assert holds(scope)


# ---- what is in the repository -----------------------------------------------------------------


@cache
def sources() -> list[Path]:
    """The text files of the project, but for what is built."""
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in (*CODE, ".ci", ".github"):
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    other = re.compile(r"__pycache__|_build_info\.py$|\.(?:so|png|pyc|safetensors|npz|npy)$")
    return sorted(path for path in found if not other.search(path.as_posix()))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def comments(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.string
    elif path.suffix in (".cpp", ".hpp", ".cu", ".cuh"):
        yield from re.findall(r"//.*", text)
    elif path.suffix in (".yml", ".yaml", ".toml") or path.name in ("Makefile", "run"):
        yield from re.findall(r"(?:^|\s)#.*", text)


@cache
def prose() -> list[tuple[str, str]]:
    """Everything that is written for a reader, and where: pages, docstrings, comments."""
    found = [(name_of(page), page.read_text(encoding="utf-8")) for page in PAGES]
    for path in sources():
        if path.suffix == ".py":
            found += [(name_of(path), text) for text in docstrings(path)]
        if path.suffix != ".md":
            found += [(name_of(path), text) for text in comments(path)]
    return found


# ---- paths -------------------------------------------------------------------------------------

FILE = re.compile(
    r"(?<![\w./~>*-])((?:[\w.][\w.-]*/)*\w[\w-]*\.(?:py|md|cpp|hpp|cu|cuh|txt|json|toml))\b"
)
PLACE = re.compile(rf"(?<![\w./-])((?:{'|'.join(CODE)}|\.ci|\.github)/[\w./*<>-]*)")
# Files that a reader writes, a command makes, or another package has.
ELSEWHERE = {
    "recipe.py", "script.py", "train.py", "trouble.py", "log.txt",
    "passages.txt", "questions.txt", "captions.txt", "tokens.json",
    "checkpoint.json", "metadata.json", "solve.json", "results.json", "retrain.json",
    "retrained.json", "distrusted.json", "simulated_pairs.json", "preflight.json",
    "fastproj/_build_info.py",
    "bench/results/<day>-<commit>-project-gpu.json",
    "bench/results/<file>-project-gpu.json",
    "_dattri/func/projection.py", "less/data_selection/collect_grad_reps.py", "trak/traker.py",
}  # fmt: skip


def test_paths_exist() -> None:
    names = {name_of(path) for path in sources()}
    ends = {"/".join(name.split("/")[n:]) for name in names for n in range(name.count("/") + 1)}
    missing = set()
    for where, text in prose():
        text = re.sub(r"\]\([^)]*\)", "]", text)  # links have a test of their own
        for path in set(FILE.findall(text)) - ends - ELSEWHERE:
            if not path.startswith("build/"):
                missing.add(f"{where}: {path}")
        for path in {found.rstrip("./") for found in PLACE.findall(text)} - names - ELSEWHERE:
            if not any(ROOT.glob(re.sub(r"<\w+>", "*", path))):
                missing.add(f"{where}: {path}")
    assert not missing, "\n".join(sorted(missing))


def test_no_page_refers_to_a_document_that_is_not_there() -> None:
    cited = re.compile(r"\b([A-Z]{4,})(?:'s|\.md)?,? (?:§|sections?\b|chapters?\b)|\bDESIGN\b")
    found = [f"{where}: {m[0]}" for where, text in prose() for m in cited.finditer(text)]
    assert not found, "\n".join(found)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    targets |= set(re.search(r"^GPU_CALLS := (.*)$", makefile, re.MULTILINE)[1].split())
    for where, text in prose():
        for command in re.findall(r"`(?:\w+=\S+ )*make ([a-z-]+)[ `]", text):
            assert command in targets, f"{where}: make {command}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{name_of(page)}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in heads]
                assert anchor in slugs, f"{name_of(page)}: {link}"


def test_every_page_is_in_the_site_and_reachable_from_the_readme() -> None:
    conf = (DOCS / "conf.py").read_text(encoding="utf-8")
    for page in PAGES:
        assert page == ROOT / "README.md" or f'"{name_of(page)[:-3]}"' in conf, name_of(page)


@pytest.mark.slow
def test_make_docs_installs_what_the_reference_imports() -> None:
    """Its modules are imported without the packages that `make docs` doesn't install."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11, as for `make`
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    installed = set(re.findall(r"sphinx .*packages_of,(\w+)\)", makefile)) | {"trak"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = {
        extra: {re.split(r"[^\w.-]", package)[0].lower() for package in wanted}
        for extra, wanted in project["optional-dependencies"].items()
    }
    others = set().union(*packages.values()).difference(*(packages[extra] for extra in installed))
    others.discard(project["name"])
    absent = {
        module: None
        for module, names in importlib.metadata.packages_distributions().items()
        if others & {name.lower() for name in names} and module.isidentifier()
    }
    assert {"matplotlib", "triton"} <= set(absent)
    documented = [
        name
        for page in sorted((DOCS / "api").glob("*.md"))
        for name in re.findall(r"\.\. auto\w+:: (\S+)", page.read_text(encoding="utf-8"))
    ]
    program = f"import pkgutil, sys; sys.modules.update({absent!r})\n"
    program += "for name in sys.argv[1:]: pkgutil.resolve_name(name)"
    command = [sys.executable, "-c", program, *documented]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_check_of_the_site_finds_dead_links(tmp_path: Path) -> None:
    check = [sys.executable, str(DOCS / "check_links.py"), str(tmp_path)]
    good = '<a href="b.html#here">b</a><a href="https://example.org/x">elsewhere</a>'
    (tmp_path / "b.html").write_text('<p id="here"></p>', encoding="utf-8")
    for link, dead in ((good, False), ('<a href="c.html">', True), ('<a href="b.html#x">', True)):
        (tmp_path / "a.html").write_text(link, encoding="utf-8")
        done = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, "a.html: " in done.stdout) == (int(dead), dead)


# ---- commands ----------------------------------------------------------------------------------


def command_lines() -> Iterator[tuple[str, str]]:
    """(where, what follows `fastproj`) of each line of pages, docstrings and help that is one."""
    helps = [
        (f"fastproj {word} --help", cli.load(word).build_parser().epilog) for word in cli.COMMANDS
    ]
    words = "|".join(cli.COMMANDS)
    line = re.compile(rf"^ *(?:\S+ .* -m )?fastproj ((?:{words})(?: [^`\n]*)?)$", re.MULTILINE)
    for where, text in [*prose(), *helps]:
        for found in line.findall(text.replace("\\\n", " ")):
            yield where, found


def test_command_lines_are_understood(capsys: pytest.CaptureFixture[str]) -> None:
    wrong, count = set(), 0
    for where, line in command_lines():
        word, *arguments = shlex.split(line.split(" > ")[0], comments=True)
        count += 1
        try:
            cli.load(word).build_parser().parse_args(arguments)
        except SystemExit:
            wrong.add(f"{where}: fastproj {line}\n  {capsys.readouterr().err.splitlines()[-1]}")
    assert count > 40
    assert not wrong, "\n".join(sorted(wrong))


# ---- names -------------------------------------------------------------------------------------


def resolve(dotted: str) -> Any:
    """What a dotted name from ``fastproj`` on names; raises ImportError or AttributeError."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


def test_dotted_names_exist() -> None:
    missing = []
    compiled = {  # which of them is built depends on the machine
        f"fastproj.{name}"
        for path in (ROOT / "csrc").glob("*/bindings.cpp")
        for name in re.findall(r"PYBIND11_MODULE\((\w+)", path.read_text(encoding="utf-8"))
    }
    for where, text in prose():
        found = set(re.findall(r"(?<![\w./`\"-])`*(fastproj(?:\.[A-Za-z_]\w*)+)", text))
        for dotted in found - compiled:
            try:
                resolve(dotted)
            except (ImportError, AttributeError):
                missing.append(f"{where}: {dotted}")
    assert not missing, "\n".join(missing)


@cache
def words_of_the_code() -> set[str]:
    """Identifiers, argument names and texts of all sources, without comments and docstrings."""
    words: set[str] = set()
    for path in sources():
        if path.suffix == ".py":
            texts = {id(s.value) for s in ast.walk(tree(path)) if isinstance(s, ast.Expr)}
            for node in ast.walk(tree(path)):
                for name in ("name", "id", "attr", "arg", "asname", "module"):
                    words.update(re.findall(r"\w+", str(getattr(node, name, None) or "")))
                if isinstance(node, ast.Constant) and id(node) not in texts:
                    words.update(re.findall(r"\w+", str(node.value)))
        elif path.suffix in (".cpp", ".hpp", ".cu", ".cuh"):
            code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            words.update(re.findall(r"\w+", code))
        elif path.suffix in (".toml", ".in", ".yml", "") or path.name == "constraints.txt":
            words.update(re.findall(r"\w+", path.read_text(encoding="utf-8", errors="ignore")))
        words.update(re.findall(r"\w+", name_of(path)))
    return words


# Names of other projects, of instructions and of tools, that no code here spells.
FOREIGN = {
    "GaussianRandomProjection", "SparseRandomProjection", "RandomProjectionParams",
    "TracInCPFastRandProj", "data_selection", "get_info", "p_image", "p_text", "save_pretrained",
}  # fmt: skip


def test_names_in_pages_and_docstrings_exist() -> None:
    """Whatever stands between backquotes and looks like a name is one that the code has."""
    named = re.compile(r"[a-z]\w*_\w\w+|_\w\w+|[A-Z][a-z]+[A-Z]\w*|[A-Z]+_[A-Z_]+")
    missing = set()
    for where, text in prose():
        text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"``([^`]+)``|`([^`\n]+)`", text):
            for word in re.findall(r"\w+", "".join(span)):
                if named.fullmatch(word) and word not in words_of_the_code() | FOREIGN:
                    missing.add(f"{where}: {word}")
    assert not missing, "\n".join(sorted(missing))


def test_names_are_in_the_file_that_a_page_gives() -> None:
    pair = re.compile(r"`(\w+)`(?: \([^)]*\))? (?:in|of|from) `([\w/.]+\.\w+)`")
    for page in PAGES:
        for name, path in pair.findall(page.read_text(encoding="utf-8")):
            found = ROOT / path if (ROOT / path).exists() else page.parent / path
            if found.exists():  # test_paths_exist has the rest
                text = found.read_text(encoding="utf-8")
                assert re.search(rf"\b{name}\b", text), f"{name_of(page)}: {name} in {path}"


@cache
def members() -> dict[str, set[str]]:
    """The names inside of every class of the project, its bases' included."""
    own: dict[str, set[str]] = {}
    bases: dict[str, set[str]] = {}
    for path in (path for path in sources() if path.suffix == ".py"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                names = [n for base in node.bases for n in ast.walk(base)]
                bases.setdefault(node.name, set()).update(getattr(n, "id", "") for n in names)
                for n in ast.walk(node):
                    found = (getattr(n, key, None) for key in ("name", "attr", "id"))
                    own.setdefault(node.name, set()).update(filter(None, found))
    for _ in range(4):  # deeper than any class here
        for name, above in bases.items():
            own[name].update(*(own.get(base, set()) for base in above))
    return own


def test_methods_that_pages_name_exist() -> None:
    for where, text in prose():
        for name, member in re.findall(r"`([A-Z]\w+)\.([a-z_]\w*)(?:\([^`]*\))?`", text):
            if name in members():
                assert member in members()[name], f"{where}: {name}.{member}"


def test_the_api_reference_has_every_exported_name() -> None:
    listed = []
    for page in sorted((DOCS / "api").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        listed += re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert all(resolve(dotted) is not None for dotted in listed)
    for module in (fastproj, fastproj.trak):
        exported = {f"{module.__name__}.{name}" for name in module.__all__}
        exported -= {"fastproj.__version__", "fastproj.TRAKer"}  # the latter under fastproj.trak
        assert exported <= set(listed), exported - set(listed)
