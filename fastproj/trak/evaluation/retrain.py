"""Ground truth for attribution: the outputs of models that were trained on other samples.

``train_subsets`` trains a model on each row of a mask, several at once, and keeps the outputs of
each in a directory as soon as it is finished:

    directory/
        retrain.json                      what all models share: n, seed, hash of the recipe
        models/<samples>-<run>.safetensors     outputs [m]; named by a hash of the training samples

A model's seed is made from the seed, its samples and the number of the retraining. So a subset
gives the same model whatever else is trained, and more subsets or retrainings add to what is there.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastproj.checks import check_flag, check_integer, listed
from fastproj.trak.evaluation.metrics import Mask, as_indices, as_mask, check_places
from fastproj.trak.evaluation.recipe import file_identity, recipe_identity
from fastproj.trak.evaluation.workers import Outcome, Task, WorkerError, run_here, run_in_workers
from fastproj.trak.files import (
    StoreError,
    StoreMismatchError,
    make_dir,
    read_json,
    read_safetensors,
    remove_stale,
    write_atomic,
    write_json,
    write_safetensors,
)
from fastproj.trak.progress import progress
from fastproj.trak.store.scores import NOT_ARRAYS

FORMAT = 1
GIVE_UP = 3  # failures in a row from the start, after which a recipe is taken to be broken
MAX_SEED = 1 << 63

Floats = npt.NDArray[np.float64]

logger = logging.getLogger("fastproj.trak")


class TrainingError(RuntimeError):
    """Some models could not be trained; the others are kept."""


@dataclass(frozen=True)
class GroundTruth:
    """Which samples models were trained on, and their outputs.

    masks : bool [S, n].
    outputs : float64 [runs, S, m], of several retrainings of each subset.
    rows : int64 [S], the place of each among the masks that were asked for.
    failed : by name, why those that are missing could not be trained.
    unused : how many models the directory holds beside these, from earlier calls that asked for
        more or for others.
    """

    masks: Mask
    outputs: Floats
    rows: npt.NDArray[np.int64]
    failed: Mapping[str, str] = field(default_factory=dict)
    unused: int = 0

    @property
    def mean(self) -> Floats:
        """Outputs averaged over retrainings, [S, m]."""
        return self.outputs.mean(0)

    def first(self, subsets: int | None, repeats: int | None) -> GroundTruth:
        """The first subsets and retrainings; None is all. Raises ValueError for more than these."""
        n_runs, n_subsets, _ = self.outputs.shape
        for what, wanted, there in (("subsets", subsets, n_subsets), ("repeats", repeats, n_runs)):
            if wanted is not None and not 1 <= wanted <= there:
                raise ValueError(
                    f"ground truth: received {what}={wanted}; expected 1 to {there}, which it holds"
                )
        return GroundTruth(
            self.masks[:subsets], self.outputs[:repeats, :subsets], self.rows[:subsets], self.failed
        )

    def holds(self, other: GroundTruth) -> bool:
        """Whether all of ``other`` is here too: the same subsets with the same outputs."""
        n_runs = len(other.outputs)
        places = {row: place for place, row in enumerate(self.rows.tolist())}
        if n_runs > len(self.outputs) or not set(other.rows.tolist()) <= set(places):
            return False
        own = [places[row] for row in other.rows.tolist()]
        return np.array_equal(self.masks[own], other.masks) and np.array_equal(
            self.outputs[:n_runs, own], other.outputs
        )

    def save(self, path: Path | str) -> None:
        """Write masks and outputs to a .npz file, in full or not at all."""
        size = self.masks.nbytes + self.outputs.nbytes + self.rows.nbytes
        write_atomic(
            Path(path),
            lambda file: np.savez_compressed(
                file, masks=self.masks, outputs=self.outputs, rows=self.rows
            ),
            size,
        )

    @classmethod
    def load(cls, path: Path | str) -> GroundTruth:
        """Read a .npz file with ``masks`` [S, n] and ``outputs`` [S, m] or [runs, S, m].

        A directory stands for the ``ground-truth.npz`` in it.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "ground-truth.npz"
            if not path.exists():
                raise StoreError(
                    f"ground truth: {path} is not there; expected a directory that `fastproj lds` "
                    "has finished (run it again to go on), or a .npz file"
                )
        try:
            file = np.load(path, mmap_mode="r")
            if isinstance(file, np.ndarray):
                raise StoreError(
                    f"ground truth: {path} is a .npy file of one array {list(file.shape)}; "
                    "expected a .npz file with masks [S, n] and outputs [S, m] or [runs, S, m]"
                )
            with file:
                parts = {name: file[name] for name in file.files}
        except (OSError, MemoryError, *NOT_ARRAYS) as error:
            # NumPy takes whatever it doesn't know for pickled data.
            why = "it holds no arrays of numbers" if "pickle" in str(error) else error
            raise StoreError(
                f"ground truth: can't read {path} ({why}); expected a .npz file"
            ) from error
        if not {"masks", "outputs"} <= set(parts):
            raise ValueError(
                f"ground truth: {path} holds {', '.join(parts) or 'nothing'}; expected masks "
                "[S, n] and outputs [S, m] or [runs, S, m]"
            )
        masks = as_mask("ground truth", "masks", parts["masks"])
        outputs = np.asarray(parts["outputs"], np.float64)
        outputs = outputs[None] if outputs.ndim == 2 else outputs
        if masks.ndim != 2 or outputs.ndim != 3 or outputs.shape[1] != len(masks):
            raise ValueError(
                f"ground truth: {path} holds masks {list(masks.shape)} and outputs "
                f"{list(parts['outputs'].shape)}; expected [S, n], and [S, m] or [runs, S, m]"
            )
        return cls(masks, outputs, parts.get("rows", np.arange(len(masks))))


# ---- which samples to train on ------------------------------------------------------------------


def random_subsets(n: int, count: int, fraction: float = 0.5, seed: int = 0) -> Mask:
    """``count`` random subsets of ``round(fraction * n)`` of n samples, bool [count, n].

    Subset j depends on n, fraction, seed and j only: more subsets begin with the same ones.

    Raises TypeError or ValueError for numbers that can't work, such as a fraction that leaves
    nothing out.
    """
    function = "random_subsets"
    n = check_integer(function, "n", n, 2, 1 << 48)
    count = check_integer(function, "count", count, 1, 1 << 31)
    seed = check_integer(function, "seed", seed, 0, MAX_SEED)
    size = round(fraction * n) if 0 < fraction < 1 else 0
    if not 0 < size < n:
        raise ValueError(
            f"{function}: received fraction={fraction} of n={n}; expected 0 < fraction < 1 that "
            "keeps at least one sample and leaves at least one out"
        )
    masks = np.zeros((count, n), bool)
    for j in range(count):
        generator = np.random.default_rng([seed, j])
        masks[j, generator.choice(n, size, replace=False, shuffle=False)] = True
    return masks


def all_but(n: int, removed: Iterable[npt.ArrayLike]) -> Mask:
    """Masks that leave samples out, bool [S, n]: row j is all samples but ``removed[j]``.

    removed : for each row an index or several; ``np.empty(0, int)`` leaves out none.
    """
    rows = [np.atleast_1d(np.asarray(inds)) for inds in removed]
    masks = np.ones((len(rows), n), bool)
    for mask, inds in zip(masks, rows, strict=True):
        if len(inds):
            check_places("all_but", "removed", as_indices("all_but", "removed", inds), n)
            mask[inds] = False
    return masks


# ---- training -----------------------------------------------------------------------------------


def train_subsets(
    recipe: Any,
    masks: npt.ArrayLike,
    directory: str | os.PathLike[str],
    *,
    repeats: int = 1,
    jobs: int = 1,
    threads: int | None = None,
    seed: int = 0,
    depends: Sequence[str | os.PathLike[str]] = (),
    identity: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    n_targets: int | None = None,
    allow_failures: bool = False,
) -> GroundTruth:
    """Train a model on each subset, and return what all of them output.

    Models that ``directory`` already holds are not trained again. A stop at any moment loses only
    the models in training.

    Parameters
    ----------
    recipe : ``train(indices, seed) -> model`` and ``outputs(model) -> [m]``, in any of the forms
        that ``fastproj.trak.evaluation.recipe`` names.
    masks : bool [S, n], the samples to train each model on (``random_subsets``, ``all_but``).
    directory : where outputs are kept. One of another n, seed, recipe or identity is refused.
    repeats : how many models to train on each subset, from different seeds.
    jobs : how many to train at once. 1 trains in this process; more in worker processes, in which
        the environment variable FASTPROJ_JOB is 0 to jobs - 1 (for choosing a GPU).
    threads : torch threads of each job; None shares out this process's. Sums, and so the last
        digits of a model, may depend on it.
    seed : of everything random, 0 <= seed < 2^63.
    depends : other files that results depend on, such as data: a directory is refused after one of
        them, or the recipe's own file, has changed. What they import is not looked at.
    identity : further facts that the directory must agree with, text or numbers by name. Give the
        settings of an object that is the recipe: without them, only its class's source counts.
    names : of the subsets, for messages; None is "subset 0" and so on.
    n_targets : m, where it is known: a recipe that returns another number fails.
    allow_failures : return the subsets all of whose retrainings succeeded, instead of raising.

    Raises
    ------
    TrainingError
        After all others are trained, where some failed; the same call tries them again.
    WorkerError
        Where the recipe can't be loaded, or fails each time at first.
    StoreMismatchError
        Where the directory belongs to other settings; both values are named.
    StoreError
        For a directory that can't be written, a full disk, or a damaged file.
    TypeError, ValueError
        For arguments that can't work.
    """
    function = "train_subsets"
    member = as_mask(function, "masks", masks)
    if member.ndim != 2 or 0 in member.shape:
        raise ValueError(f"{function}: received masks {list(member.shape)}; expected [S, n]")
    empty = np.flatnonzero(~member.any(1))
    if len(empty):
        raise ValueError(f"{function}: received masks whose row {empty[0]} has no sample")
    repeats = check_integer(function, "repeats", repeats, 1, 1 << 20)
    jobs = check_integer(function, "jobs", jobs, 1, 1 << 12)
    seed = check_integer(function, "seed", seed, 0, MAX_SEED)
    allow_failures = check_flag(function, "allow_failures", allow_failures)
    if threads is None:
        threads = max(1, torch.get_num_threads() // jobs)
    threads = check_integer(function, "threads", threads, 1, 1 << 12)
    if names is not None and len(names) != len(member):
        raise ValueError(f"{function}: received {len(names)} names; expected {len(member)}")
    run = Run(
        Path(directory),
        {
            "train set size": member.shape[1],
            "seed": seed,
            "recipe": recipe_identity(recipe),
            "depends": " ".join(sorted(file_identity(Path(path)) for path in depends)),
            **(identity or {}),
        },
        n_targets,
    )
    run.train(recipe, run.tasks(member, names, repeats), jobs, threads)
    return run.collect(member, repeats, allow_failures)


class Run:
    """The files of one directory, and what is still to be trained for it."""

    def __init__(self, directory: Path, identity: Mapping[str, Any], n_targets: int | None) -> None:
        self.directory = directory
        self.models = directory / "models"
        self.identity = {"format": FORMAT, **identity}
        self.n_targets = n_targets
        self.seed = int(self.identity["seed"])
        self.failed: dict[str, str] = {}
        self.succeeded = 0
        make_dir(self.models)
        for folder in (directory, self.models):
            remove_stale(folder)
        path = directory / "retrain.json"
        if not path.exists() or not any(self.models.glob("*.safetensors")):
            write_json(path, self.identity)  # also over a recipe that never trained anything
        stored = read_json(path)
        wrong = [
            f"{key} {stored.get(key)!r} in the directory, {value!r} in this run"
            for key, value in self.identity.items()
            if stored.get(key) != value
        ]
        if wrong:
            raise StoreMismatchError(
                f"train_subsets: {directory} holds models of another run: {'; '.join(wrong)}",
                "use the same settings, or another directory",
            )

    def tasks(self, masks: Mask, names: Sequence[str] | None, repeats: int) -> list[Planned]:
        """All trainings, retraining by retraining; a subset that occurs twice is one."""
        planned: dict[str, Planned] = {}
        for run in range(repeats):
            for row, mask in enumerate(masks):
                what = f"subset {row}" if names is None else names[row]
                samples = samples_digest(mask)
                path = self.path(samples, run)
                if path.name not in planned:
                    planned[path.name] = Planned(f"{what}, retraining {run}", mask, samples, run)
        return list(planned.values())

    def path(self, samples: str, run: int) -> Path:
        """Where the outputs of a model are."""
        return self.models / f"{samples[:24]}-{run}.safetensors"

    def train(self, recipe: Any, planned: list[Planned], jobs: int, threads: int) -> None:
        """Train what is not there yet."""
        todo = {p.name: p for p in planned if not self.path(p.samples, p.run).exists()}
        if self.n_targets is None and len(todo) < len(planned):
            there = next(p for p in planned if p.name not in todo)
            self.n_targets = len(self.read(there.samples, there.run))
        with progress("training", len(planned), "model", len(planned) - len(todo)) as bar:

            def report(task: Task, outcome: Outcome) -> None:
                self.keep(todo[task.name], outcome)
                bar.update(1)

            tasks: Iterator[Task] = (
                Task(p.name, np.flatnonzero(p.mask), model_seed(self.seed, p.samples, p.run))
                for p in todo.values()
            )
            if jobs == 1:
                run_here(recipe, tasks, report, threads)
            else:
                run_in_workers(recipe, tasks, report, min(jobs, max(1, len(todo))), threads)

    def keep(self, planned: Planned, outcome: Outcome) -> None:
        """Write the outputs of a model, or note its failure."""
        outputs, error = outcome.outputs, outcome.error
        if outputs is not None and self.n_targets not in (None, len(outputs)):
            error = f"it returned {len(outputs)} outputs; expected {self.n_targets}"
        if error or outputs is None:
            self.failed[planned.name] = error.strip().splitlines()[-1]
            logger.error("%s failed: %s", planned.name, error)
            if not self.succeeded and len(self.failed) >= GIVE_UP:
                raise WorkerError(
                    f"the first {len(self.failed)} trainings all failed, the last with: "
                    f"{self.failed[planned.name]}"
                )
            return
        self.n_targets = len(outputs)
        self.succeeded += 1
        write_safetensors(
            self.path(planned.samples, planned.run),
            {"outputs": torch.from_numpy(outputs)},
            self.model_identity(planned.samples, planned.run),
        )

    def model_identity(self, samples: str, run: int) -> dict[str, str]:
        """What a model's file must say of itself."""
        identity = {key: str(value) for key, value in self.identity.items()}
        return {**identity, "samples": samples, "run": str(run)}

    def read(self, samples: str, run: int) -> Floats:
        """The outputs [m] of a model that is there."""
        path = self.path(samples, run)
        tensors, metadata = read_safetensors(path, None)
        for key, value in self.model_identity(samples, run).items():
            if metadata.get(key) != value:
                raise StoreMismatchError(
                    f"train_subsets: {path} was made with {key} {metadata.get(key)!r}; this run "
                    f"has {value!r}",
                    "use another directory",
                )
        return tensors["outputs"].numpy()

    def collect(self, masks: Mask, repeats: int, allow_failures: bool) -> GroundTruth:
        """The outputs of all models."""
        kept, rows = [], []
        for row, mask in enumerate(masks):
            samples = samples_digest(mask)
            if all(self.path(samples, run).exists() for run in range(repeats)):
                kept.append([self.read(samples, run) for run in range(repeats)])
                rows.append(row)
        if self.failed and not (allow_failures and rows):
            shown = listed((f"{name}: {why}" for name, why in self.failed.items()), 10)
            raise TrainingError(
                f"train_subsets: {len(self.failed)} trainings failed ({shown}). The others are "
                f"kept in {self.directory}; the same call tries only the failed ones again"
            )
        outputs = np.array(kept).swapaxes(0, 1)  # [runs, S, m]
        used = {
            self.path(samples_digest(masks[row]), run).name
            for row in rows
            for run in range(repeats)
        }
        unused = {path.name for path in self.models.glob("*.safetensors")} - used
        return GroundTruth(masks[rows], outputs, np.array(rows), self.failed, len(unused))


@dataclass(frozen=True)
class Planned:
    """A model to be trained: its name in messages, its samples [n] and which retraining it is."""

    name: str
    mask: Mask
    samples: str  # hash of the mask
    run: int


def samples_digest(mask: Mask) -> str:
    """Hash of a set of training samples, bool [n]."""
    h = hashlib.blake2b(f"{len(mask)} ".encode(), digest_size=16)
    h.update(np.packbits(mask).tobytes())
    return h.hexdigest()


def model_seed(seed: int, samples: str, run: int) -> int:
    """The seed, below 2^32, of retraining ``run`` of a model."""
    made = hashlib.blake2b(f"{seed} {samples} {run}".encode(), digest_size=4).digest()
    return int.from_bytes(made, "little")
