"""Which backend runs, what is said about it, and what the package imports."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import build_native
import fastproj
from fastproj.backends import built, cpu, cuda, registry
from fastproj.commands.info import problems
from tests import ROOT

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    registry._choose.cache_clear()
    yield
    registry._choose.cache_clear()


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As on a machine where just these backends can run."""
    monkeypatch.setattr(
        registry, "unavailable", lambda name: None if name in names else f"no {name}; get one"
    )


@pytest.mark.parametrize(
    ("adapter", "reason"), [(cpu, cpu.unavailable), (cuda, cuda.not_built)], ids=["cpu", "cuda"]
)
def test_a_module_that_the_build_left_out_has_the_reason_and_fix_of_the_build(
    adapter: ModuleType, reason: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise ImportError("no such module")

    monkeypatch.setattr(adapter, "_module", absent)
    recorded = {adapter.NAME: {"built": False, "reason": "left out on request; reinstall"}}
    monkeypatch.setattr(built, "record", lambda: recorded)
    module = f"fastproj._{adapter.NAME}"
    assert reason() == f"{module} is not built: left out on request; reinstall"
    recorded[adapter.NAME] = {"built": True, "reason": ""}  # and was lost since
    assert str(reason()).startswith(f"{module} is not built: no such module; install ")


@pytest.mark.parametrize("adapter", [cpu, cuda], ids=["cpu", "cuda"])
def test_a_module_of_other_sources_than_the_checkout_has_is_warned_of(
    adapter: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if adapter.NAME not in compiled():
        pytest.skip(f"fastproj._{adapter.NAME} is not built here")
    source = tmp_path / "csrc" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text("int x;\n")
    recorded = {"csrc/kernel.cpp": str(built.digest_of(source))}
    monkeypatch.setattr(built, "record", lambda: {adapter.NAME: {"sources": recorded}})
    monkeypatch.setattr(built, "checkout", lambda: None)  # as in site-packages
    assert built.outdated(adapter.NAME) is None
    monkeypatch.setattr(built, "checkout", lambda: tmp_path)
    assert built.outdated(adapter.NAME) is None

    adapter._module.cache_clear()
    source.write_text("int y;\n")
    with pytest.warns(RuntimeWarning, match=f"_{adapter.NAME} was compiled from other sources"):
        adapter._module()
    assert any("`pip install -e .`" in str(problem) for problem in problems())
    source.unlink()
    assert built.outdated(adapter.NAME) is not None
    monkeypatch.setattr(built, "record", dict)  # of a build that kept nothing
    assert built.outdated(adapter.NAME) is None


def test_these_modules_are_of_these_sources() -> None:
    recorded = built.record()
    for name in compiled():
        assert recorded[name].get("sources") == build_native.source_digests(name)
        assert built.outdated(name) is None
    units = {path for name in ("cpu", "cuda") for path in build_native.source_digests(name)}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("[!.]*.*")}
    assert {path for path in files - units if not path.endswith((".md", "~"))} == set()


def compiled() -> list[str]:
    """The modules that this installation has."""
    return [name for name, module in built.record().items() if module["built"]]


def test_every_adapter_has_its_name_and_functions() -> None:
    for name in registry.available_backends():
        module = registry.load(name)
        assert name == module.NAME
        assert module.unavailable() is None
        described = module.describe()
        assert described
        assert all(isinstance(x, str) for pair in described.items() for x in pair)


def test_a_reason_says_what_is_missing() -> None:
    for name in registry.NAMES:
        reason = registry.unavailable(name)
        assert (reason is None) == (name in registry.available_backends())
        if reason is not None:
            assert len(reason) > 20
            assert "\n" not in reason


def test_reference_can_always_run_and_comes_last() -> None:
    assert registry.available_backends()[-1] == "reference"
    assert fastproj.available_backends() == registry.available_backends()


def test_the_first_that_can_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    first = registry.available_backends()
    on_cpu = [n for n in first if not registry.load(n).unsupported("cpu", FLOAT, "rademacher")]
    assert on_cpu[0] == registry.choose("cpu", FLOAT, "rademacher").NAME
    only(monkeypatch, "reference")
    registry._choose.cache_clear()
    assert registry.choose("cpu", FLOAT, "rademacher").NAME == "reference"


def test_cpu_tensors_do_not_start_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has started it can't fork workers that use it."""
    asked: list[str] = []

    def unavailable(name: str) -> str | None:
        asked.append(name)
        return None

    monkeypatch.setattr(registry, "unavailable", unavailable)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry._choose.cache_clear()
    assert registry.choose("cpu", FLOAT, "rademacher").NAME == "cpu"
    assert asked == ["cpu"]


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT, "abacus")
    assert registry.choose("cpu", FLOAT, "gaussian", "reference").NAME == "reference"
    with pytest.raises(ValueError, match="'abacus'; expected one of cuda, triton, cpu, reference"):
        registry.choose("cpu", FLOAT, "gaussian")
    monkeypatch.setenv(registry.ENVIRONMENT, "")
    assert registry.choose("cpu", FLOAT, "gaussian").NAME in registry.NAMES


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastproj"):
        for _ in range(3):
            registry.choose("cpu", FLOAT, "gaussian", "reference")
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["backend reference for gaussian with float32 on cpu (asked for)"]


def test_falling_back_to_the_slow_one_is_a_warning_that_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only(monkeypatch, "reference")
    with caplog.at_level(logging.WARNING, logger="fastproj"):
        registry.choose("cpu", FLOAT, "rademacher")
    (record,) = caplog.records
    assert "no cpu; get one" in record.getMessage()
    assert "slow" in record.getMessage()


def test_an_adapter_that_cannot_be_imported_is_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.load.cache_clear()
    registry.unavailable.cache_clear()
    monkeypatch.setitem(sys.modules, "fastproj.backends.cpu", None)
    try:
        assert "can't be imported" in (registry.unavailable("cpu") or "")
        assert "cpu" not in registry.available_backends()
    finally:
        registry.load.cache_clear()
        registry.unavailable.cache_clear()


def test_importing_fastproj_loads_neither_trak_nor_what_it_needs() -> None:
    code = (
        "import sys, fastproj\n"
        "assert fastproj.Projector(10, 4).grad_dim == 10\n"
        "heavy = {'fastproj.trak', 'sklearn', 'scipy', 'safetensors', 'triton'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'TRAKer' in dir(fastproj)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_names() -> None:
    assert set(fastproj.__all__) == {
        "SPEC_VERSION",
        "FactoredProjector",
        "Projector",
        "TRAKer",
        "__version__",
        "available_backends",
        "matrix",
        "project",
        "project_transpose",
    }
    with pytest.raises(AttributeError, match="no attribute 'projekt'"):
        _ = fastproj.projekt
