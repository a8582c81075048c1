"""Every file of every kind of store damaged in many ways: the right result, or an error that names
the file and says what mends it.
"""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter

import pytest

from fastproj.trak import StoreCorruptError, StoreError, StoreMismatchError
from tests.essential import slow
from tests.trak import cases, kinds
from tests.trak.damage import damages, put, remove
from tests.trak.faults import Faults


@pytest.fixture(autouse=True)
def small(monkeypatch):
    cases.small_blocks(monkeypatch.setattr)


def stores(folder, kind):
    """A store at several moments of a run, by name, and the scores of the run.

    features : featurized. parts : while its matrix is summed up. finished : with everything in it.
    other : finished, of another seed.
    """
    most = 0

    def look(_):
        nonlocal most
        parts = len(list(whole.rglob("part-*")))
        if stage == "finalize" and parts > most:
            most = parts
            shutil.rmtree(folder / "parts", ignore_errors=True)
            shutil.copytree(whole, folder / "parts")

    def begin(name):
        nonlocal stage
        stage = name
        if name == "finalize":
            shutil.copytree(whole, folder / "features")

    stage, whole = "", folder / "finished"
    with Faults(whole, range(10**6), look):
        scores = kinds.whole(whole, kind, begin)
    kinds.whole(folder / "other", kind, seed=1)
    assert most
    return ["features", "parts", "finished"], scores


def role(path):
    """What a file is, without numbers."""
    return re.sub(r"-\d[-\w]*(?=\.)", "", path.name)


def files(folder, every):
    """The files of a store; of several of one role the first, unless ``every``."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.setdefault(path if every else (path.parent.name, role(path)), path)
    return [path.relative_to(folder) for path in found.values() if not path.name.startswith(".")]


def attempt(folder, kind, path, scores, what):
    """Go on with a store; how it ended. Fails for wrong scores and for errors that don't help."""
    try:
        found = kinds.whole(folder, kind)
    except (StoreError, StoreMismatchError) as error:
        said = error
    else:
        assert kinds.same(found, scores), what
        return "right"
    text = str(said)
    named = folder if isinstance(said, StoreMismatchError) else path
    assert str(named) in text, (what, text)
    if isinstance(said, StoreCorruptError):
        assert "Delete the file and" in text, (what, text)
        assert "\n" not in text, what
        assert len(text) < 1000 + 2 * len(str(path)), what
    return "named"


def fuzz(folder, kind, rng, every, choose):
    """Damage files of all stores of a kind; Counter of how that ended."""
    ends = Counter()
    names, scores = stores(folder, kind)
    for name in names:
        for relative in files(folder / name, every):
            whole = (folder / name / relative).read_bytes()
            some = [("gone", ""), *damages(whole, rng)]
            twin = folder / "other" / relative
            if not twin.exists():  # its name has a random part
                twin = next(
                    (p for p in sorted(twin.parent.glob("*")) if role(p) == role(relative)), None
                )
            if twin is not None and twin.is_file():
                some.append(("that of another store", twin.read_bytes()))
            for what, content in choose(some):
                copy = folder / "copy"
                shutil.copytree(folder / name, copy)
                path = copy / relative
                if content == "":
                    path.unlink()
                else:
                    put(path, content)
                what = f"{kind}, {name}, {relative}: {what}"
                end = attempt(copy, kind, path, scores, what)
                ends[end] += 1
                if end == "named":
                    remove(path)  # as the message says
                    assert attempt(copy, kind, path, scores, f"{what}, removed") == "right", what
                shutil.rmtree(copy)
    return ends


@pytest.mark.parametrize("kind", ["sjlt-fisher", *map(slow, ("gaussian-dual", "factored"))])
def test_damage_gives_the_right_scores_or_is_named(kind, tmp_path):
    rng = random.Random(kind)
    ends = fuzz(tmp_path, kind, rng, False, lambda some: rng.sample(some, 1))
    assert ends["named"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(kinds.KINDS)))
def test_all_damage_gives_the_right_scores_or_is_named(number, tmp_path):
    """Each way to damage each file, in two kinds of store of ten: every fifth one in each."""
    kind = list(kinds.KINDS)[number]
    ends = fuzz(tmp_path, kind, random.Random(kind), False, lambda some: some[number % 5 :: 5])
    print(kind, dict(ends))
    assert min(ends["named"], ends["right"]) > 20
