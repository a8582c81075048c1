"""Fixtures for all tests: the backends usable here, and what to do without a GPU.

A test that takes ``backend`` runs once for every backend that can run on this machine, on every
device that the backend takes; ``device`` is the matching device. Cases on a GPU carry the mark
``gpu``. A test marked ``gpu`` is skipped, and counted, where there is none.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fastproj.backends import registry

DATA = Path(__file__).parent / "data"

# Derandomised: a run's verdict depends on the code alone. Deadlines would be timing.
settings.register_profile("fastproj", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("fastproj")


@dataclass(frozen=True)
class Target:
    """A backend and a device that it takes."""

    backend: str
    device: str


def _targets() -> list[Target]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [
        Target(name, device)
        for name in registry.available_backends()
        for device in devices
        if registry.load(name).unsupported(device, torch.float32, "rademacher") is None
    ]


TARGETS = [
    pytest.param(
        target,
        id=f"{target.backend}-{target.device}",
        marks=[pytest.mark.gpu] if target.device == "cuda" else [],
    )
    for target in _targets()
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the network fails the test."""

    def refused(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.fixture(params=TARGETS, scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture(scope="session")
def backend(target: Target) -> str:
    return target.backend


@pytest.fixture(scope="session")
def device(target: Target) -> str:
    return target.device


@pytest.fixture
def data() -> Path:
    """The folder of known answers."""
    return DATA


def pytest_report_header() -> list[str]:
    reasons = {name: registry.unavailable(name) for name in registry.NAMES}
    tested = ", ".join(param.id for param in TARGETS)
    missing = [f"not tested here: {name}: {reason}" for name, reason in reasons.items() if reason]
    return [f"fastproj backends tested: {tested}", *missing]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def level_of_the_log() -> None:
    """A TRAKer sets the level of its logger for the whole process, one of a fixture that serves a
    module too; each test starts with it unset.
    """
    logging.getLogger("fastproj.trak").setLevel(logging.NOTSET)
