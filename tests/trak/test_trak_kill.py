"""kill -9 all through a run, and a restart each time: nothing is lost, nothing is done twice."""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections import Counter
from pathlib import Path

import killed_run
import numpy as np
import pytest


@pytest.fixture
def run():
    """Runs ``killed_run.main`` in a process of its own; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    # Imports torch, and what torch.func imports at its first use, once for all lives.
    context.set_forkserver_preload(["fastproj.trak", "torch._dynamo"])

    def start(*arguments):
        process = context.Process(target=killed_run.main, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    return start


def test_killed_and_restarted_runs_end_with_the_same_scores(tmp_path, run):
    assert run(tmp_path / "whole", tmp_path / "whole.log", 0) == 0
    *once, last = (tmp_path / "whole.log").read_text().splitlines()
    moments = int(last.split()[1])

    # Each life does what is missing, up to a random moment of its own; the last one lives.
    rng = random.Random(0)
    kills, save_dir, log = 0, tmp_path / "killed", tmp_path / "killed.log"
    for die_at in [*(rng.randint(1, moments // 5) for _ in range(8)), 0]:
        code = run(save_dir, log, die_at)
        kills += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
    assert code == 0
    assert kills >= 5

    name = Path("scores") / "test.mmap"
    np.testing.assert_array_equal(np.load(save_dir / name), np.load(tmp_path / "whole" / name))
    assert not list(save_dir.rglob(".*.tmp"))
    batches = Counter(line for line in log.read_text().splitlines() if "moments" not in line)
    assert len(once) == len(set(once)) == 2 * 3 + 2 * 2
    assert set(batches) == set(once)
    assert sum(batches.values()) - len(once) <= kills  # at most the batch in flight at each kill
