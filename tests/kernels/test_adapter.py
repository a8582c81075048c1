"""The adapter's reasons and messages, without a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fastproj.backends import triton as adapter


def test_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no GPU; install a CUDA or ROCm build" in (adapter.unavailable() or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert adapter.unavailable() is None
    monkeypatch.setattr(adapter, "_triton_version", lambda: "3.2.0")
    assert "Triton 3.2.0 is too old" in (adapter.unavailable() or "")
    assert "pip install 'triton>=3.3'" in (adapter.unavailable() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed; pip install 'triton>=3.3'" in (adapter.unavailable() or "")


def test_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "older than Ampere" in (adapter.unavailable() or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert adapter.unavailable() is None


def test_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert adapter.unsupported("cuda", torch.float32, "rademacher") is None
    assert adapter.unsupported("cuda", torch.float64, "gaussian") is None
    assert adapter.unsupported("cuda", torch.int8, "rademacher") is None
    assert adapter.unsupported("cuda", torch.int8, "sjlt") is None
    assert "int8" in (adapter.unsupported("cuda", torch.int8, "gaussian") or "")
    assert "cuda tensors here, not cpu" in (
        adapter.unsupported("cpu", torch.float32, "gaussian") or ""
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert adapter.unsupported("cpu", torch.float32, "gaussian") is None


def test_plan_of_the_sparse_kind() -> None:
    """The default block or the given one; nothing that only tensor cores have."""
    facts = adapter.plan(8, 10**7, 4096, torch.bfloat16, "sjlt")
    assert (facts["block"], facts["BLOCK_K"], facts["tiles per step"]) == ("1024", "4096", "4")
    assert "matrix unit" not in facts
    assert adapter.plan(8, 10**7, 4096, torch.bfloat16, "sjlt", block=64)["block"] == "64"
