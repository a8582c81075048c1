"""The known answers, asked of the fastproj that is installed: `python known_answers.py [cpu ...]`.

Needs torch and NumPy and nothing else of the tests but tests/data. Every backend and every
instruction set that the machine has is asked: known entries and blocks of R, projections of small
integers (which are exact), the adjoint, autograd and vmap. Exits with 1 where anything differs, or
where a backend that the command line names can't be asked.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastproj

DATA = Path(__file__).resolve().parents[1] / "data"
KINDS = ("rademacher", "gaussian", "sjlt")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fields(name: str) -> list[list[str]]:
    """The words of every line of a file of known answers that is not a comment."""
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


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
        known = [line for line in fields(f"{kind}_v1.txt") if line[0] != "block-hash"][::8]
        assert len(known) >= 55
        for line in known:
            seed, stream = int(line[0]), int(line[1])
            block = int(line[2]) if kind == "sjlt" else None
            k, p = (line[4], line[5]) if kind == "sjlt" else (line[3], line[2])
            row, column = int(p), int(k)
            got = fastproj.matrix(
                slice(row, row + 1),
                slice(column, column + 1),
                seed,
                kind,
                block=block,
                stream=stream,
                device=device,
                backend=backend,
            )
            assert got.item() == float(line[-1]), (kind, line)


def known_blocks(backend: str, device: str) -> None:
    """Checksums of blocks of R."""
    known = [(line[0], line[1:3], None, line[3:]) for line in fields("blocks_v1.txt")]
    known += [
        ("sjlt", line[1:3], int(line[3]), line[4:])
        for line in fields("sjlt_v1.txt")
        if line[0] == "block-hash"
    ]
    assert len(known) == 11
    for kind, (seed, stream), block, (*numbers, sha256) in known:
        row0, rows, col0, cols = map(int, numbers)
        entries = fastproj.matrix(
            slice(row0, row0 + rows),
            slice(col0, col0 + cols),
            int(seed),
            kind,
            block=block,
            stream=int(stream),
            dtype=torch.float32 if kind == "gaussian" else torch.int8,
            device=device,
            backend=backend,
        )
        found = hashlib.sha256(entries.cpu().numpy().tobytes()).hexdigest()
        assert found == sha256, (kind, numbers)


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
