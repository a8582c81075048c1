"""A disk that is full from the i-th thing that is done to it on: an error that names the file and
the need, nothing lost, nothing left behind, and the same bits once there is room.
"""

from __future__ import annotations

import random
import re

import pytest

from fastproj.trak import StoreError
from tests.essential import essential
from tests.trak import cases, kinds
from tests.trak.faults import Faults, no_room

FOREVER = 10**6
ROOM = (
    r"no room for .* \(\d+ bytes; \d+ bytes free on that disk\); nothing that was there is lost|"
    "can't make the directory .*No space left"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cases.small_blocks(monkeypatch.setattr)


def fill_at(kind, moments, tmp_path):
    """Fill the disk at each of ``moments(n)`` of the n of a run; how often that ended the run."""
    with Faults(tmp_path / "whole") as counted:
        wanted = kinds.whole(tmp_path / "whole", kind)
    ended = 0
    for at in moments(len(counted.steps)):
        folder = tmp_path / f"full-{at}"
        with Faults(folder, range(at, FOREVER), no_room) as faults:
            said = None
            try:
                found = kinds.whole(folder, kind)
            except StoreError as error:
                said = str(error)
        if said is None:  # what was refused could be done without
            assert kinds.same(found, wanted), at
            assert {*faults.steps[at:]} <= {"fsync", "unlink", "mkdir"}, at
        else:
            ended += 1
            assert str(folder) in said
            assert re.search(ROOM, said), said
        assert not list(folder.rglob(".*.tmp")), at
        assert kinds.same(kinds.whole(folder, kind), wanted), at
        assert kinds.names(folder) == kinds.names(tmp_path / "whole"), at
    return ended


@pytest.mark.parametrize("kind", essential(kinds.KINDS, kinds.ESSENTIAL))
def test_a_disk_that_fills_up_loses_nothing(kind, tmp_path):
    rng = random.Random(kind)
    fill_at(kind, lambda n: [rng.randrange(n)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(kinds.KINDS)))
def test_a_disk_that_fills_up_anywhere(number, tmp_path):
    """Every moment of a run, in five kinds of ten the even ones."""
    kind = list(kinds.KINDS)[number]
    assert fill_at(kind, lambda n: range(number % 2, n, 2), tmp_path) > 100
