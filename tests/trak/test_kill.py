"""kill -9 all through a run, and a restart each time: nothing is lost, nothing is done twice."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter

import numpy as np
import pytest

from fastproj.trak.files import read_safetensors
from fastproj.trak.store.scores import read_scores, read_top_scores
from fastproj.trak.store.shards import ShardFile
from tests.essential import essential
from tests.trak import kinds
from tests.trak.killed_run import KINDS, STAGES
from tests.trak.lives import Server

KILLS = 20  # in each stage
IN_A_ROW = 3  # kills of a run over a kind of store


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


def results(folder):
    top = read_top_scores(folder / "scores" / "test.top.safetensors")
    return [np.array(read_scores(folder / "scores" / "test.mmap")), *vars(top).values()]


def there(folder):
    """The batches that are on disk, as killed_run names them."""
    found = set()
    for path in folder.glob("models/*/train-*.safetensors"):
        found |= {f"featurize {path.parent.name} {first}" for first in first_samples(path)}
    for path in folder.glob("models/*/targets/test/target-*.safetensors"):
        found |= {f"score {path.parents[2].name} {first}" for first in first_samples(path)}
    return found


def first_samples(path):
    """The first sample of each batch of a shard."""
    tensors, metadata = read_safetensors(path, ("inds",))
    sizes = ShardFile.of(path, metadata, 0).sizes
    return [int(part[0]) for part in tensors["inds"].split(sizes)]


@pytest.mark.slow
def test_killed_and_restarted_runs_end_with_the_same_scores(tmp_path, server):
    def live(name, stage="", kind="", die_at=0):
        folder, log = tmp_path / name, tmp_path / f"{name}.log"
        function = "tests.trak.killed_run:main"
        (code,) = server.run(function, [[folder, log, stage, kind, die_at]], tmp_path / "printed")
        assert code in (0, -signal.SIGKILL), (tmp_path / "printed").read_text()
        return code, [line.split(" ", 1) for line in log.read_text().splitlines()]

    code, lines = live("whole")
    assert code == 0
    moments = {}
    for stage, *counts in (text.split() for word, text in lines if word == "end"):
        moments |= {(stage, kind): int(n) for kind, n in zip(KINDS, counts, strict=True)}
    once = [text for word, text in lines if word == "compute"]
    assert len(once) == len(set(once)) == 2 * 3 + 2 * 2

    rng = random.Random(0)
    killed = Counter()
    seen = 0
    kept: set[str] = set()
    for stage in STAGES:
        while killed[stage] < KILLS:
            kind = rng.choice(KINDS)
            code, lines = live("killed", stage, kind, rng.randint(1, moments[stage, kind]))
            life, seen = lines[seen:], len(lines)
            if code:
                begun = [text for word, text in life if word == "begin"]
                killed[begun[-1]] += 1
            computed = [text for word, text in life if word == "compute"]
            assert not kept & set(computed)  # nothing is done twice ...
            kept = there(tmp_path / "killed")
            assert set(computed[:-1]) <= kept  # ... but the batch in flight
    assert sum(killed.values()) >= 50
    assert min(killed[stage] for stage in STAGES) >= KILLS

    code, lines = live("killed")
    assert code == 0
    assert {text for word, text in lines if word == "compute"} == set(once)
    for found, wanted in zip(
        results(tmp_path / "killed"), results(tmp_path / "whole"), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    assert kinds.names(tmp_path / "killed") == kinds.names(tmp_path / "whole")
    assert there(tmp_path / "killed") == there(tmp_path / "whole") == set(once)
    for kind, most in (("train", 2), ("drawn", 2), ("target", 2)):  # in each of two folders
        shards = [path.parent for path in (tmp_path / "killed").rglob(f"{kind}-*")]
        assert max(Counter(shards).values()) <= most


def runs_killed(kind, moments, tmp_path, server, rng):
    """A run for each of ``moments`` of an undisturbed one, killed there first; then ever later.

    Returns how many kills there were, by stage and step.
    """
    kills = Counter()

    def live(name, at):
        out = tmp_path / f"{name}.npz"
        arguments = [[tmp_path / name, kind, at, out]]
        (code,) = server.run("tests.trak.kinds:life", arguments, tmp_path / "printed")
        assert code in (0, -signal.SIGKILL), (tmp_path / "printed").read_text()
        if code:
            return None
        with np.load(out) as file:
            return [file[name] for name in file.files if name != "moments"], list(file["moments"])

    wanted, every = live("whole", -1)
    for at in moments(len(every)):
        name = f"killed-{at}"
        for number in range(IN_A_ROW):
            ended = live(name, rng.randrange(len(every) - at) if number else at)
            if ended:
                break
            kills[every[at] if not number else "again"] += 1
        found, _ = ended or live(name, -1)
        assert kinds.same(found, wanted), at
        assert kinds.names(tmp_path / name) == kinds.names(tmp_path / "whole"), at
        shutil.rmtree(tmp_path / name)
    return kills


@pytest.mark.parametrize("kind", essential(kinds.KINDS, kinds.ESSENTIAL))
def test_a_kill_loses_nothing_of_any_kind_of_store(kind, tmp_path, server):
    rng = random.Random(kind)
    kills = runs_killed(kind, lambda n: [rng.randrange(n)], tmp_path, server, rng)
    assert 0 < kills.total() <= IN_A_ROW


@pytest.mark.slow
def test_a_thousand_kills(tmp_path, server):
    """Every sixth moment of each kind; among them every step of every stage."""
    kills = Counter()
    for number, kind in enumerate(kinds.KINDS):
        folder = tmp_path / kind
        folder.mkdir()
        rng = random.Random(kind)
        moments = lambda n, first=number % 6: range(first, n, 6)  # noqa: E731
        kills += runs_killed(kind, moments, folder, server, rng)
        print(kind, kills.total(), flush=True)
    assert kills.total() >= 1000, kills
    steps = {"open", "write", "fsync", "replace", "unlink"}
    assert {f"{stage} {step}" for stage in kinds.STAGES for step in steps} <= set(kills)
