"""fastproj info: what it prints, as text and as JSON, and the plans."""

from __future__ import annotations

import json

import pytest

import fastproj
from fastproj import cli
from fastproj.backends import cuda, registry
from fastproj.spec import KINDS
from tests import ROOT


def test_info_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastproj.__version__ in out
    for name in registry.NAMES:
        assert name in out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spec_version"] == fastproj.SPEC_VERSION
    usable = [name for name, backend in found["backends"].items() if backend["usable"]]
    assert usable == fastproj.available_backends()
    for backend in found["backends"].values():
        assert backend["usable"] == (backend["reason"] == "")


def test_launch_is_a_table_for_each_gpu_backend(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["info", "--launch", "64", "1e7", "4096", "bf16"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "B = 64, P = 10000000, K = 4096, bfloat16, rademacher, highest" in out
    for name in ("sm_80", "sm_90", "sm_120", "gfx942", "BLOCK_B", "grid", "stages", "splits of P"):
        assert name in out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == out


def test_launch_as_json_holds_what_the_kernels_choose(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--json", "--kind", "gaussian", "--precision", "high"]
    assert cli.main(["info", "--launch", "33", "10**6", "512", "fp32", *words]) == 0
    plans = json.loads(capsys.readouterr().out)["launches"]
    for plan in plans:
        facts = plan["facts"]
        if plan["backend"] == "cuda" and cuda.not_built():
            assert "fastproj._cuda is not built" in plan["reason"]
            continue
        assert facts["terms"] == "2"
        assert int(facts["workspace bytes"]) <= 64 << 20
        assert facts["grid"]
    (hopper,) = [p for p in plans if p["backend"] == "triton" and p["arch"] == "sm_90"][:1]
    assert hopper["facts"]["matrix unit"] == "wgmma"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["0", "10", "10", "fp32"], "received '0'; expected an integer of at least 1"),
        (["1", "1.5e0", "10", "fp32"], "received '1.5e0'"),
        (["1", "ten", "10", "fp32"], "received 'ten'; expected an integer of at least 1"),
        (["1.5", "10", "10", "fp32"], "received '1.5'; expected"),
        (["1", "1e400", "10", "fp32"], "received '1e400'; expected"),
        (["1", "10", "10**400", "fp32"], "received '10**400'; expected"),
        (["1", "1e18", "10", "fp32"], "received P=1000000000000000000; expected 1 <= P < "),
        (["1", "10", "1e10", "fp32"], "received K=10000000000; expected 1 <= K < "),
        (["1", "10", "10", "int8"], "received DTYPE 'int8'; expected float32, fp32"),
    ],
)
def test_launch_names_a_wrong_word(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", "--launch", *words])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_launch_of_the_sparse_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """Its block is passed on to both backends; one that can't be is refused."""
    shape = ["info", "--json", "--launch", "8", "10**6", "4096", "bf16", "--kind", "sjlt"]
    assert cli.main(shape) == 0
    default = json.loads(capsys.readouterr().out)["launches"]
    assert cli.main([*shape, "--block", "64"]) == 0
    other = json.loads(capsys.readouterr().out)["launches"]
    for backend in ("cuda", "triton"):
        facts = [
            [plan["facts"] for plan in plans if plan["backend"] == backend and not plan["reason"]]
            for plans in (default, other)
        ]
        assert facts[0] != facts[1] or not facts[0], backend
    for words, said in (
        ([*shape, "--block", "48"], "error: --block: received W=48; expected a power of two"),
        (
            [*shape[:-1], "gaussian", "--block", "64"],
            "error: --block: received W=64 with --kind gaussian; expected --kind sjlt",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


MOST = 2**31 - 1024  # columns of the cuda backend
REFUSED = "the cuda backend: received proj_dim=", "; expected at most ", ', or backend="triton"'


def refuse_columns(batch: int, rows: int, cols: int, *others: object, **options: object) -> None:
    """As the compiled module's ``check_columns``."""
    raise ValueError(f"{REFUSED[0]}{cols}{REFUSED[1]}{MOST}{REFUSED[2]}")


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_cuda_lacks_leave_tritons_plan(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if cuda.not_built():
        monkeypatch.setattr(cuda, "not_built", lambda: None)
        monkeypatch.setattr(cuda, "plan", refuse_columns)
    words = ["info", "--launch", "1", "1e5", "4294967296", "fp32", "--kind", kind]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert f"\ncuda: received K=4294967296; expected at most {MOST}\n" in out
    assert "backend=" not in out
    assert "\ntriton   " in out
    assert cli.main([*words, "--json"]) == 0
    launches = json.loads(capsys.readouterr().out)["launches"]
    assert {(p["backend"], bool(p["facts"]), bool(p["reason"])) for p in launches} == {
        ("cuda", False, True),
        ("triton", True, False),
    }


def test_the_refusal_of_columns_is_the_compiled_modules() -> None:
    source = (ROOT / "csrc" / "cuda" / "plan.hpp").read_text(encoding="utf-8")
    for part in REFUSED:
        assert part.replace('"', '\\"') in source


@pytest.mark.parametrize(
    "words", [["--block", "1024"], ["--kind", "sjlt"], ["--precision", "high"]], ids=str
)
def test_options_of_launch_are_not_dropped_without_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["info", *words])
    assert caught.value.code == 2
    assert f"received {words[0]} without --launch" in capsys.readouterr().err
