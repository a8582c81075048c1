"""Which GPU backend comes first: the faster where measured, in order where not. Needs no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastproj.backends import measured, registry

BF16, FP32 = torch.bfloat16, torch.float32


def row(batch: int, cols: int, cuda: float, triton: float, **other: Any) -> dict[str, Any]:
    plain = {"kind": "rademacher", "dtype": "bfloat16", "terms": 1, **other}
    return {**plain, "batch": batch, "cols": cols, "rates": {"cuda": cuda, "triton": triton}}


CONTENT = {
    "version": 1,
    "architectures": {
        "sm_90": {
            "rows": [
                row(16, 4096, 100.0, 150.0),
                row(64, 4096, 500.0, 400.0),
                row(256, 4096, 410.0, 400.0),
                row(64, 512, 300.0, 310.0),
                row(16, 4096, 90.0, 60.0, dtype="float32", terms=3),
            ]
        }
    },
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A machine with an H100, both backends, and the measurements above."""
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(measured, "table", lambda: measured.parse(CONTENT))
    monkeypatch.setattr(measured, "arch_of", lambda index: "sm_90")
    monkeypatch.setattr(registry, "unavailable", lambda name: None)
    registry._choose.cache_clear()
    yield monkeypatch
    registry._choose.cache_clear()


def chosen(batch: int, cols: int, dtype: torch.dtype = BF16, kind: str = "rademacher", **options):
    return registry.choose("cuda", dtype, kind, shape=(batch, cols), index=0, **options).NAME


def test_the_committed_table_is_readable() -> None:
    content = json.loads(measured.TABLE.read_text())
    assert measured.parse(content) == measured.table()


@pytest.mark.parametrize(
    ("batch", "cols", "first"),
    [
        (16, 4096, "triton"),
        (8, 4096, "triton"),
        (20, 3000, "triton"),
        (64, 4096, "cuda"),
        (90, 8192, "cuda"),
        (256, 4096, "triton"),  # slower by less than a tenth, and faster over all batches
        (64, 600, "triton"),
        (2, 4096, "cuda"),  # out of reach: the order
        (4096, 4096, "cuda"),
    ],
)
def test_the_nearest_measurement_decides(
    gpu: pytest.MonkeyPatch, batch: int, cols: int, first: str
) -> None:
    assert chosen(batch, cols) == first


def test_only_a_measurement_of_the_same_sort_counts(gpu: pytest.MonkeyPatch) -> None:
    assert chosen(16, 4096, FP32) == "cuda"
    assert chosen(16, 4096, torch.float16) == "cuda"
    assert chosen(16, 4096, kind="gaussian") == "cuda"
    look_up = measured.look_up("sm_90", FP32, "rademacher", "highest", 16, 4096)
    assert look_up.reason.startswith("measured on sm_90 at B = 16, K = 4096: relative speed cuda 1")
    assert measured.look_up("sm_90", FP32, "rademacher", "high", 16, 4096).backend is None
    assert measured.look_up("sm_80", BF16, "rademacher", "high", 16, 4096).backend is None


def test_what_was_asked_for_wins(gpu: pytest.MonkeyPatch) -> None:
    assert chosen(16, 4096, backend="cuda") == "cuda"
    gpu.setenv(registry.ENVIRONMENT, "reference")
    assert chosen(16, 4096) == "reference"


def test_the_fallback_is_cuda_triton_reference(gpu: pytest.MonkeyPatch) -> None:
    def only(*names: str) -> None:
        registry._choose.cache_clear()
        gpu.setattr(registry, "unavailable", lambda name: None if name in names else f"no {name}")

    only("cuda", "cpu", "reference")  # triton is faster there, and missing
    assert chosen(16, 4096) == "cuda"
    only("triton", "cpu", "reference")
    assert chosen(64, 4096) == "triton"
    only("cpu", "reference")
    assert chosen(64, 4096) == "reference"


def test_the_choice_is_logged_once_for_a_measurement(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fastproj"):
        for batch in (16, 17, 10, 12):
            chosen(batch, 4096)
        chosen(3000, 4096)
        chosen(4000, 4096)
    assert [record.getMessage() for record in caplog.records] == [
        "backend triton for rademacher with bfloat16 on cuda (measured on sm_90 at B = 16, "
        "K = 4096: relative speed triton 1.00, cuda 0.67)",
        "backend cuda for rademacher with bfloat16 on cuda (first in order; nothing like it was "
        "measured on sm_90)",
    ]


def test_an_unmeasured_architecture_says_so(
    gpu: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.setattr(measured, "arch_of", lambda index: "sm_120")
    with caplog.at_level(logging.INFO, logger="fastproj"):
        assert chosen(16, 4096) == "cuda"
    assert "(first in order; not measured on sm_120)" in caplog.text


def test_a_table_that_means_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="version 2; expected 1"):
        measured.parse({"version": 2})
    content = {"version": 1, "architectures": {"sm_90": {"rows": [row(1, 1, 1.0, 1.0)]}}}
    content["architectures"]["sm_90"]["rows"][0]["rates"] = {"cuda": 1.0, "abacus": 2.0}
    with pytest.raises(ValueError, match=r"received rates of \['abacus', 'cuda'\]"):
        measured.parse(content)
