"""Training runs in worker processes. One that dies loses no other's work."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastproj.trak.evaluation.recipe import Recipe, RecipeError, load_recipe
from fastproj.trak.files import Indices

GRACE = 10.0  # seconds that a worker may take to leave
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(RuntimeError):
    """No worker can work: the recipe can't be loaded, or each training fails."""


@dataclass(frozen=True)
class Task:
    """One training run."""

    name: str
    indices: Indices
    seed: int


@dataclass
class Outcome:
    """What a worker reports: outputs [m], or why there are none."""

    outputs: npt.NDArray[np.float64] | None
    error: str = ""


Report = Callable[[Task, Outcome], None]


def run_here(reference: Any, tasks: Iterator[Task], report: Report, threads: int) -> None:
    """Do ``tasks`` in this process with ``threads`` torch threads, one after the other."""
    with state_kept():
        torch.set_num_threads(threads)
        recipe = load(reference)
        for task in tasks:
            report(task, attempt(recipe, task))


def load(reference: Any) -> Recipe:
    """The recipe; raises WorkerError with all that is known where it can't be loaded."""
    try:
        return load_recipe(reference)
    except RecipeError as error:
        raise WorkerError(str(error)) from error
    except (Exception, SystemExit) as error:
        raise WorkerError(
            f"recipe {reference}: can't be loaded\n{traceback.format_exc()}"
        ) from error


def attempt(recipe: Recipe, task: Task) -> Outcome:
    """Run a task; an exception is an outcome too."""
    try:
        return Outcome(recipe.run(task.indices, task.seed))
    except Exception:
        return Outcome(None, traceback.format_exc())
    except SystemExit as error:
        return Outcome(None, f"SystemExit: the recipe called exit({error.code!r})")


@contextmanager
def state_kept() -> Iterator[None]:
    """Put the global generators, torch's number of threads and sys.path back where they were."""
    plain, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    threads, path = torch.get_num_threads(), list(sys.path)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            sys.path[:] = path
            random.setstate(plain)
            np.random.set_state(numpys)  # noqa: NPY002


# ---- in worker processes ------------------------------------------------------------------------


@dataclass
class Worker:
    """A process, the pipe to it, and what it is doing."""

    process: Any
    pipe: Connection
    number: int
    task: Task | None = None


def run_in_workers(
    reference: Any, tasks: Iterator[Task], report: Report, jobs: int, threads: int
) -> None:
    """Do ``tasks`` in ``jobs`` processes with ``threads`` torch threads each.

    A worker that dies is replaced, and its task is reported as failed. However this function is
    left, all workers end. They end by themselves when this process is killed.

    Raises
    ------
    WorkerError
        Where a worker can't even load the recipe.
    """
    workers: list[Worker] = []
    leaving: list[Worker] = []
    upcoming = next(tasks, None)
    try:
        for number in range(jobs if upcoming else 0):
            workers.append(start(reference, number, threads))
        while workers:
            for worker in wait_for_any(workers):
                message = receive(worker)
                if message is None:
                    fail_dead(worker, report)
                    workers.remove(worker)
                    if upcoming is not None:
                        workers.append(start(reference, worker.number, threads))
                    continue
                if isinstance(message, str):
                    raise WorkerError(message)
                if worker.task is not None:
                    report(worker.task, message)
                worker.task, upcoming = upcoming, next(tasks, None)
                if worker.task is not None:
                    with suppress(OSError):  # of a worker that has just died: the next wait sees it
                        worker.pipe.send(worker.task)
                else:
                    workers.remove(worker)
                    worker.pipe.close()  # which it takes as a sign to leave
                    leaving.append(worker)
        for worker in leaving:
            worker.process.join(GRACE)
    finally:
        for worker in [*workers, *leaving]:
            end(worker)


def wait_for_any(workers: list[Worker]) -> list[Worker]:
    """The workers that have something to say or are dead."""
    events = set(wait([event for w in workers for event in (w.pipe, w.process.sentinel)]))
    return [w for w in workers if w.pipe in events or w.process.sentinel in events]


def receive(worker: Worker) -> Any:
    """The worker's message; None if it died before sending one."""
    try:
        return worker.pipe.recv() if worker.pipe.poll() else None
    except (EOFError, OSError, pickle.UnpicklingError):
        return None


def fail_dead(worker: Worker, report: Report) -> None:
    """Report the task of a dead worker; raise WorkerError if it never got one."""
    worker.process.join()
    code = worker.process.exitcode
    how = f"exit code {code}"
    if code < 0:
        how = f"signal {-code} ({signal.Signals(-code).name})"
        if -code == signal.SIGKILL:
            how += ": was the memory full?"
    if worker.task is None:
        raise WorkerError(
            f"a worker process ended with {how} before it began; what it said is above. A script "
            'that trains with several jobs needs its calls under if __name__ == "__main__"'
        )
    report(worker.task, Outcome(None, f"the worker process ended with {how}"))


def start(reference: Any, number: int, threads: int) -> Worker:
    """Start a worker process; it reports when it has loaded the recipe."""
    context = multiprocessing.get_context("spawn")  # forking breaks threads and CUDA
    ours, theirs = context.Pipe()
    process = context.Process(
        target=work, args=(theirs, reference, threads), name=f"fastproj-job-{number}"
    )
    try:
        with environment(number, threads), interrupts_blocked():
            process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"train_subsets: received a recipe that can't be sent to worker processes ({error}); "
            "expected a path, a module's name, or a function at a module's top level (jobs=1 "
            "trains in this process and takes any)"
        ) from error
    finally:
        theirs.close()
    return Worker(process, ours, number)


def end(worker: Worker) -> None:
    """End a worker process, at once."""
    worker.process.terminate()
    worker.process.join(GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.pipe.close()


@contextmanager
def environment(number: int, threads: int) -> Iterator[None]:
    """What a worker's libraries read when they are loaded: how many threads, and FASTPROJ_JOB."""
    wanted = {**dict.fromkeys(THREAD_VARIABLES, str(threads)), "FASTPROJ_JOB": str(number)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Children started here don't see Ctrl-C: this process ends them, without their tracebacks."""
    resource_tracker.ensure_running()  # which the first child needs, and which unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(pipe: Connection, reference: Any, threads: int) -> None:
    """A worker process: load the recipe, then do the tasks that come."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError):  # nobody is left to report to
        serve(pipe, reference)


def serve(pipe: Connection, reference: Any) -> None:
    """Report that the recipe is loaded, and then each outcome, until no more tasks come."""
    try:
        recipe = load(reference)
    except WorkerError as error:
        pipe.send(str(error))
        return
    pipe.send(True)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        outcome = attempt(recipe, task)
        sys.stdout.flush()
        pipe.send(outcome)


def end_with_parent() -> None:
    """End this process when the one that started it is gone, even in the middle of a training."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
