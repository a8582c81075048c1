"""Processes in one save_dir that know nothing of each other: at any moment of one, another does all
of the work there. Both end with the bits of a process that is alone.
"""

from __future__ import annotations

import random
import shutil
from itertools import product

import numpy as np
import pytest
import torch

from fastproj.trak.solving.scoring import scores_of_targets
from fastproj.trak.store.store import Store
from tests.essential import essential, slow
from tests.trak import cases, kinds
from tests.trak.faults import Faults

FOREVER = 10**6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cases.small_blocks(monkeypatch.setattr)


class StoppedError(Exception):
    """Ends a run where it is."""


def stop(_):
    raise StoppedError


def parts(folder):
    """The number of parts of Gram matrices."""
    return len(list(folder.glob("models/*/part-*.safetensors")))


def leave(folder, kind, at):
    """What a process leaves that ends at a moment."""
    with pytest.raises(StoppedError), Faults(folder, range(at, FOREVER), stop):
        kinds.whole(folder, kind)


def moments_with_parts(folder, kind):
    """The moments of a run by how many parts of Gram matrices are there, where there are some."""
    found = []
    with Faults(folder, range(FOREVER), lambda _: found.append(parts(folder))):
        kinds.whole(folder, kind)
    return {at: number for at, number in enumerate(found) if number}


@pytest.mark.parametrize("kind", ["rademacher", "gaussian-dual"])
def test_parts_that_another_removes_when_they_are_looked_at(kind, tmp_path, monkeypatch):
    wanted = kinds.whole(tmp_path / "alone", kind)
    there = moments_with_parts(tmp_path / "counted", kind)
    leave(tmp_path / "left", kind, max(there, key=there.get))
    read, looks = Store.read, []

    def first_another(store, path, *args, **kwargs):
        if path.name.startswith("part-"):
            looks.append(path)
            if len(looks) == number:
                monkeypatch.setattr(Store, "read", read)
                assert kinds.same(kinds.whole(folder, kind), wanted)
        return read(store, path, *args, **kwargs)

    for number in range(1, 1 + parts(tmp_path / "left")):
        folder = tmp_path / f"look-{number}"
        shutil.copytree(tmp_path / "left", folder)
        looks.clear()
        monkeypatch.setattr(Store, "read", first_another)
        assert kinds.same(kinds.whole(folder, kind), wanted), number
        assert len(looks) == number  # it was reached
        assert not parts(folder)


class Beside:
    """A kind of store, and runs of two that continue what one left."""

    def __init__(self, folder, kind):
        self.folder = folder
        self.kind = kind
        self.rng = random.Random(kind)
        with Faults(folder / "alone", reads=True) as counted:
            self.wanted = kinds.whole(folder / "alone", kind)
        self.moments = range(len(counted.steps))

    def run(self, stops):
        """One that ended at one of ``stops``; it goes on, and at any moment another does all."""
        stop_at, at = self.rng.choice(stops), self.rng.choice(self.moments)
        folder = self.folder / "both"
        leave(folder, self.kind, stop_at)
        others = []

        def act(_):
            faults.at = range(0)  # the other is left alone
            others.append(kinds.whole(folder, self.kind))

        with Faults(folder, at, act, reads=True) as faults:
            found = kinds.whole(folder, self.kind)
        for scores in (found, *others):
            assert kinds.same(scores, self.wanted), (stop_at, at)
        assert not parts(folder), (stop_at, at)
        shutil.rmtree(folder)
        return len(others)


@pytest.mark.parametrize("kind", essential(kinds.KINDS, kinds.ESSENTIAL))
def test_another_at_any_moment(kind, tmp_path):
    with_parts = moments_with_parts(tmp_path / "counted", kind)
    Beside(tmp_path, kind).run(list(with_parts))


def every_moment(folder, step, act):
    """What ``step()`` gives where ``act()`` happens at each of its moments."""
    with Faults(folder, reads=True) as counted:
        step()

    def acting(_):
        faults.at = range(0)
        act()

    for at in range(len(counted.steps)):
        with Faults(folder, at, acting, reads=True) as faults:
            yield at, np.array(step())


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("finalize_scores", "sjlt-fisher"),
        *(slow(("finalize_scores", k)) for k in ("rademacher", "gaussian-dual", "fisher-dual")),
        *product(("self_influence", "parts"), ("rademacher", "gaussian-dual", "fisher-dual")),
    ],
)
def test_scores_are_of_one_lambda(step, kind, tmp_path):
    """Whatever another process finalises while they are made."""
    with kinds.quiet():
        kinds.whole(tmp_path, kind)
        run, other = kinds.Run(tmp_path, kind), kinds.Run(tmp_path, kind)
        steps = {
            "finalize_scores": lambda: run.traker.finalize_scores("test"),
            "self_influence": run.traker.self_influence,
            "parts": lambda: scores_of_targets(
                run.traker.saver.systems, run.traker.score_computer, 0, torch.ones(2, k), [0, 1]
            ),
        }
        k = run.traker.proj_dim
        lambdas = (run.traker.lambda_reg, 3.0)
        wanted = []
        for value in lambdas:
            other.traker.finalize_features(lambda_reg=value)
            wanted.append(np.array(steps[step]()))
        assert not np.array_equal(*wanted)
        now = [1]

        def finalize():
            now[0] = 1 - now[0]
            other.traker.finalize_features(lambda_reg=lambdas[now[0]])

        for at, found in every_moment(tmp_path, steps[step], finalize):
            assert any(np.array_equal(found, one) for one in wanted), at


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_another_at_many_moments(kind, tmp_path):
    """From all that a process can leave, parts of matrices in every second case."""
    with_parts = list(moments_with_parts(tmp_path / "counted", kind))
    with Faults(tmp_path / "every") as every:
        kinds.whole(tmp_path / "every", kind)
    beside, everywhere = Beside(tmp_path, kind), range(len(every.steps))
    reached = sum(beside.run(with_parts if i % 2 else everywhere) for i in range(40))
    assert reached > 20
