"""What finalising leaves on disk for each checkpoint: a Gram matrix, and the lambda added to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastproj.trak.files import GoneError, Tensors, corrupt, read_json, remove_quietly, write_json
from fastproj.trak.solving.solve import System
from fastproj.trak.store.store import DRAWN, Store

FISHER, TRAK = "fisher", "trak"  # curvatures, in solve.json
SOLVED = (  # in solve.json
    *("curvature", "lambda", "weighted", "power", "form", "run"),
    *("method", "lambda_reg", "n", "rank", "condition"),
)
TRIES = 5  # to read what other processes are writing

# A part of a Gram matrix: which rows are in which parts, as a digest, and the number of this one.
GramPart = tuple[str, int]


class Systems:
    """The Gram matrices and lambdas of a store's checkpoints, beside their features.

    solved : by model_id, what ``read_solve`` gives whatever is on disk.
    multiples : of lambda, that ``peers.in_mean`` has found for means over checkpoints.
    """

    def __init__(self, store: Store, solved: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        self.store = store
        self.solved = dict(solved or {})
        self.multiples: dict[str, float] = {}

    def as_now(self, model_ids: Sequence[int]) -> Systems:
        """The same with the lambdas that these checkpoints have now, for all that is made of them:
        another process may finalise with others meanwhile.
        """
        found: dict[int, dict[str, Any]] = {}
        for _ in range(TRIES):  # until none was written while others were read
            before, found = found, {model_id: self.read_solve(model_id) for model_id in model_ids}
            if found == before:
                break
        return Systems(self.store, found)

    def is_finalized(self, model_id: int) -> bool:
        """Whether a lambda and its matrix, of the features that are there now, were stored."""
        if not self.solve_path(model_id).exists():
            return False
        found = self.read_solve(model_id)  # once: another process may write another
        system = system_of(found)
        if found.get("halved") is not None and not self.step_path(model_id).exists():
            return False
        # A process that was killed may have summed up other features since; older files lack it.
        content = self._content(model_id, system)
        return found.get("content", content) == content and self.has_gram(model_id, system)

    def gram_path(self, model_id: int, system: System, part: GramPart | None = None) -> Path:
        """The file of a Gram matrix, or of a part."""
        name = gram_name(system)
        if part is not None:
            layout, number = part
            name = f"part-{name}-{layout[:24]}-{number:04d}"
        return self.store.model_dir(model_id) / f"{name}.safetensors"

    def has_gram(self, model_id: int, system: System, part: GramPart | None = None) -> bool:
        """Whether a Gram matrix, or a part, of the features that are there now was stored."""
        path = self.gram_path(model_id, system, part)
        try:
            _, metadata = self.store.read(path, model_id, names=())
        except GoneError:  # never there, or removed by a process apart that has just finished
            return False
        wanted = self._content(model_id, system), repr(system.power)
        return (metadata.get("content"), metadata.get("power")) == wanted

    def _content(self, model_id: int, system: System) -> str:
        """What names the features that a Gram matrix is made of."""
        parts = (None, DRAWN) if system.fisher else (None,)
        return "/".join(self.store.index(model_id, part).content_digest() for part in parts)

    def write_gram(
        self,
        model_id: int,
        sums: Tensors,
        n: int,
        eps: float,
        system: System,
        part: GramPart | None = None,
    ) -> None:
        """Keep sums over n samples, float64: ``xtx`` [k, k], or of a dual system ``kernel`` [n, n]
        and ``order`` [n], the samples of its rows; and what belongs to them.
        """
        facts = {"n": str(n), "eps": repr(eps), "power": repr(system.power)}
        facts["content"] = self._content(model_id, system)
        path = self.gram_path(model_id, system, part)
        self.store.write(path, sums, model_id, facts=facts)

    def read_gram(
        self, model_id: int, system: System, part: GramPart | None = None
    ) -> tuple[Tensors, int, float]:
        """(sums, n, eps) as written."""
        path = self.gram_path(model_id, system, part)
        tensors, metadata = self.store.read(path, model_id)
        return tensors, int(metadata["n"]), float(metadata["eps"])

    def read_order(self, model_id: int, system: System) -> Tensor:
        """The numbers of the rows of a dual system, int64, without its matrix."""
        path = self.gram_path(model_id, system)
        return self.store.read(path, model_id, names=("order",))[0]["order"]

    def remove_parts(self, model_id: int, system: System) -> None:
        """Remove the parts of a Gram matrix, which is whole now."""
        for path in self.store.model_dir(model_id).glob(f"part-{gram_name(system)}-*.safetensors"):
            remove_quietly(path)

    def step_path(self, model_id: int) -> Path:
        """The file of ``ridge.halving_step``."""
        return self.store.model_dir(model_id) / "halving_step.safetensors"

    def write_step(self, model_id: int, step: Tensor | None) -> None:
        """Keep the step of a checkpoint, float64 [k]; None: it has none."""
        if step is None:
            remove_quietly(self.step_path(model_id))
        else:
            self.store.write(self.step_path(model_id), {"step": step}, model_id)

    def read_step(self, model_id: int) -> tuple[Tensor, float] | None:
        """(step [k], how far the slopes are residuals); None where finalising found no step."""
        residual = self.read_solve(model_id).get("halved")
        if residual is None:
            return None
        return self.store.read(self.step_path(model_id), model_id)[0]["step"], float(residual)

    def solve_path(self, model_id: int) -> Path:
        """The file of a lambda."""
        return self.store.model_dir(model_id) / "solve.json"

    def write_solve(self, model_id: int, summary: Mapping[str, Any]) -> None:
        """Keep what was solved: lambda and what it gave."""
        run = self.store.run_digest(model_id)
        content = self._content(model_id, system_of(summary))
        write_json(self.solve_path(model_id), {**summary, "run": run, "content": content})

    def read_solve(self, model_id: int) -> dict[str, Any]:
        """As written by ``write_solve``."""
        if model_id in self.solved:
            return dict(self.solved[model_id])
        path = self.solve_path(model_id)
        summary = read_json(path)
        missing = [name for name in SOLVED if name not in summary]
        if missing:
            raise corrupt(path, f"it lacks {', '.join(missing)}")
        if not are_ridges(summary.get("ridges", [[1.0, 1.0]])):
            raise corrupt(path, "its ridges are no list of pairs of numbers above 0")
        if summary["run"] != self.store.run_digest(model_id):
            raise corrupt(path, "its lambda was chosen for other features or another checkpoint")
        return summary

    def read_system(self, model_id: int) -> System:
        """Which matrix the lambda that is stored is added to."""
        return system_of(self.read_solve(model_id))


def system_of(summary: Mapping[str, Any]) -> System:
    """Which matrix the lambda of a ``solve.json`` is added to."""
    fisher = summary["curvature"] == FISHER
    return System(summary["power"], summary["form"] == "dual", fisher)


def are_ridges(found: Any) -> bool:
    """Whether an entry of ``solve.json`` is what ``ridge.spread_ridges`` gives."""
    return (
        isinstance(found, list)
        and len(found) > 0
        and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
        and all(isinstance(x, (int, float)) and 0 < x < math.inf for pair in found for x in pair)
    )


def gram_name(system: System) -> str:
    """What the file of a Gram matrix is called."""
    if system.fisher:
        return "fisher_kernel" if system.dual else "fisher"
    if system.dual:
        return "kernel_weighted" if system.weighted else "kernel"
    return "weighted" if system.weighted else "xtx"
