"""The known answers, asked of the fastproj that is installed: `python known_answers.py [cpu ...]`.

Needs torch and NumPy, and of the tests known.py and data alone. Every backend and every instruction
set that the machine has is asked: known entries and blocks of R, projections of small integers
(which are exact), the adjoint, autograd and vmap. Exits with 1 where anything differs, or where a
backend that the command line names can't be asked.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastproj

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from known import blocks, check_block, check_entry, entries

KINDS = ("rademacher", "gaussian", "sjlt")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def places() -> Iterator[tuple[str, str, str | None]]:
    """(backend, device, instruction set) of everything usable here."""
    from fastproj.backends import cpu, registry

    for name in registry.NAMES:
        reason = registry.unavailable(name)
        if reason:
            print(f"not asked: {name}: {reason}")
        elif name == "cpu":
            for isa, missing in cpu.isas().items():
                if missing:
                    print(f"not asked: cpu {isa}: {missing}")
                else:
                    yield name, "cpu", isa
        elif name == "reference":
            yield name, "cpu", None
        elif torch.cuda.is_available():
            yield name, "cuda", None


def known_entries(backend: str, device: str) -> None:
    """Single entries of R, every eighth: each is a call of its own."""
    for kind in KINDS:
        some = entries(kind)[::8]
        assert len(some) >= 55
        for known in some:
            check_entry(known, device=device, backend=backend)


def known_blocks(backend: str, device: str) -> None:
    """Checksums of blocks of R."""
    every = [*blocks(sparse=False), *blocks(sparse=True)]
    assert len(every) == 11
    for known in every:
        check_block(known, device=device, backend=backend)


def projections(backend: str, device: str) -> None:
    """Small integers are exact; pieces equal their concatenation; the adjoint is the adjoint."""
    for kind in ("rademacher", "sjlt"):
        block = 16 if kind == "sjlt" else None
        R = fastproj.matrix(slice(0, 1500), slice(0, 77), 3, kind, block=block, dtype=torch.float64)
        options = {"seed": 3, "kind": kind, "block": block, "scale": None, "backend": backend}
        for dtype in DTYPES:
            grads = (torch.arange(5 * 1500).reshape(5, 1500) % 17 - 8).to(dtype)  # [B, P]
            exact = grads.double() @ R  # [B, K]
            moved = grads.to(device)
            for given in (moved, [moved[:, :600], moved[:, 600:]]):
                y = fastproj.project(given, 77, **options)
                assert torch.equal(y.double().cpu(), exact), (kind, dtype)
        y = torch.arange(2 * 77.0, device=device).reshape(2, 77) % 5 - 2
        back = fastproj.project_transpose(y, slice(0, 1500), **options)
        assert torch.equal(back.double().cpu(), y.double().cpu() @ R.T), kind


def transforms(backend: str, device: str) -> None:
    """Autograd and vmap: torch's custom operators differ from version to version."""
    options = {"seed": 3, "scale": None, "backend": backend}
    R = fastproj.matrix(slice(0, 700), slice(0, 33), 3, "rademacher", dtype=torch.float64)
    grads = (torch.arange(2 * 700.0, device=device).reshape(2, 700) % 17 - 8).requires_grad_()
    fastproj.project(grads, 33, **options).sum().backward()
    assert grads.grad is not None
    assert torch.equal(grads.grad.double().cpu(), R.sum(1).expand(2, 700))
    stacked = grads.detach().reshape(2, 1, 700)
    y = torch.func.vmap(lambda g: fastproj.project(g, 33, **options))(stacked)
    assert torch.equal(y.double().cpu()[:, 0], grads.detach().double().cpu() @ R)


def main() -> int:
    """Ask everything; returns the exit status."""
    questions: tuple[Callable[[str, str], None], ...] = (
        known_entries,
        known_blocks,
        projections,
        transforms,
    )
    passed = failed = 0
    lacking = set(sys.argv[1:])
    for backend, device, isa in places():
        lacking.discard(backend)
        if isa is not None:
            os.environ["FASTPROJ_CPU_ISA"] = isa
        for question in questions:
            name = " ".join(filter(None, (backend, isa, question.__name__)))
            try:
                question(backend, device)
            except Exception as error:
                failed += 1
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
            else:
                passed += 1
                print(f"{name}: ok", flush=True)
    for backend in sorted(lacking):
        failed += 1
        print(f"{backend}: it can't be asked here")
    print(f"fastproj {fastproj.__version__} of {Path(fastproj.__file__).parent}")
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
