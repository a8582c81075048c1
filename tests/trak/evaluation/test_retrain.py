"""Ground truth: the same however it is trained and wherever it is stopped, and nothing twice."""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import linecache
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from fastproj.trak.evaluation.recipe import RecipeError, load_recipe, recipe_identity
from fastproj.trak.evaluation.retrain import (
    GroundTruth,
    TrainingError,
    all_but,
    random_subsets,
    train_subsets,
)
from fastproj.trak.evaluation.workers import WorkerError, work
from fastproj.trak.files import StoreCorruptError, StoreError, StoreMismatchError
from tests.trak import killed_retraining
from tests.trak.recipe_files import RIDGE, trained, write_recipe


def same(a: GroundTruth, b: GroundTruth) -> bool:
    return np.array_equal(a.masks, b.masks) and np.array_equal(a.outputs, b.outputs)


# ---- which samples ------------------------------------------------------------------------------


def test_random_subsets():
    masks = random_subsets(30, 40, 0.4, seed=3)
    assert masks.shape == (40, 30)
    assert masks.dtype == bool
    assert (masks.sum(1) == 12).all()
    assert len({row.tobytes() for row in masks}) == 40
    np.testing.assert_array_equal(random_subsets(30, 15, 0.4, seed=3), masks[:15])
    assert not np.array_equal(random_subsets(30, 40, 0.4, seed=4), masks)
    # Each sample is in 40 % of 4,000 subsets, up to 5 standard deviations.
    share = random_subsets(10, 4000, 0.4).mean(0)
    assert abs(share - 0.4).max() < 5 * np.sqrt(0.24 / 4000)


def test_all_but():
    masks = all_but(5, [2, [0, 4], np.empty(0, int)])
    assert masks.astype(int).tolist() == [[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_subsets(1, 5), "n=1"),
        (lambda: random_subsets(10, 0), "count=0"),
        (lambda: random_subsets(10, 5, 0.0), "fraction=0.0 of n=10"),
        (lambda: random_subsets(10, 5, 0.01), "keeps at least one"),
        (lambda: random_subsets(10, 5, 0.99), "leaves at least one out"),
        (lambda: random_subsets(10, 5, seed=-1), "seed=-1"),
        (lambda: all_but(5, [5]), "removed with 5; expected indices from 0 to 4"),
        (lambda: all_but(5, [[1, 1]]), "1 more than once"),
        (lambda: all_but(5, [0.5]), "float64"),
    ],
)
def test_impossible_subsets(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# ---- training -----------------------------------------------------------------------------------


def test_outputs_are_those_of_the_recipe(tmp_path):
    recipe = write_recipe(tmp_path)
    masks = random_subsets(24, 6)
    truth = train_subsets(recipe, masks, tmp_path / "out", repeats=2)
    assert truth.outputs.shape == (2, 6, 5)
    np.testing.assert_array_equal(truth.rows, np.arange(6))
    lines = trained(tmp_path)
    assert len(lines) == 12
    loaded = load_recipe(recipe)
    for line, (run, row) in zip(lines, itertools.product(range(2), range(6)), strict=True):
        indices, seed = line.split(" | ")
        indices = np.array(indices.split(), int)
        np.testing.assert_array_equal(indices, np.flatnonzero(masks[row]))
        np.testing.assert_array_equal(loaded.run(indices, int(seed)), truth.outputs[run, row])
    assert len({line.split(" | ")[1] for line in lines}) == 12  # each model has a seed of its own
    truth.save(tmp_path / "truth.npz")
    assert same(GroundTruth.load(tmp_path / "truth.npz"), truth)


def test_what_is_there_is_not_trained_again(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    whole = train_subsets(recipe, random_subsets(24, 6), tmp_path / "whole", repeats=2)
    (tmp_path / "log.txt").unlink()
    first = train_subsets(recipe, random_subsets(24, 4), out)
    assert len(trained(tmp_path)) == 4
    np.testing.assert_array_equal(first.outputs, whole.outputs[:1, :4])
    assert same(train_subsets(recipe, random_subsets(24, 6), out, repeats=2), whole)
    assert len(trained(tmp_path)) == 12
    assert same(train_subsets(recipe, random_subsets(24, 6), out, repeats=2), whole)
    assert len(trained(tmp_path)) == 12


def test_a_subset_that_occurs_twice_is_trained_once(tmp_path):
    masks = random_subsets(24, 2)[[0, 1, 0]]
    truth = train_subsets(write_recipe(tmp_path), masks, tmp_path / "out")
    assert len(trained(tmp_path)) == 2
    np.testing.assert_array_equal(truth.outputs[:, 0], truth.outputs[:, 2])


def test_training_here_leaves_the_process_as_it_was(tmp_path):
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    torch.set_num_threads(1)
    seen = []

    class Counting:
        def train(self, indices, seed):
            seen.append(torch.get_num_threads())
            return torch.rand(2)

    train_subsets(Counting, random_subsets(24, 3), tmp_path / "out", threads=2)
    assert seen == [2, 2, 2]
    assert torch.get_num_threads() == 1
    assert (random.random(), np.random.random(), torch.rand(1)) == expected  # noqa: NPY002


# ---- worker processes ---------------------------------------------------------------------------


def test_workers_give_what_one_process_gives_and_survive_each_other(tmp_path):
    """Two jobs: a subset that raises, one whose process dies, and all others as in one process."""
    masks = random_subsets(24, 8)
    alone = train_subsets(write_recipe(tmp_path / "a"), masks, tmp_path / "a" / "out", threads=1)
    bad = [np.flatnonzero(mask).tolist() for mask in masks[[2, 5]]]
    trouble = (
        f"if list(indices) == {bad[0]}: raise ZeroDivisionError('not this one')\n"
        f"    if list(indices) == {bad[1]}: os.kill(os.getpid(), signal.SIGKILL)"
    )
    recipe, out = write_recipe(tmp_path / "b", trouble), tmp_path / "b" / "out"
    failed = (
        r"2 trainings failed \((?=.*subset 2, retraining 0: ZeroDivisionError: not this one)"
        r"(?=.*subset 5, retraining 0: the worker process ended with signal 9 \(SIGKILL\))"
    )
    with pytest.raises(TrainingError, match=failed):
        train_subsets(recipe, masks, out, jobs=2, threads=1)
    assert len(trained(tmp_path / "b")) == 8
    (tmp_path / "b" / "trouble.py").write_text("def trouble(count, indices): ...")
    assert same(train_subsets(recipe, masks, out, jobs=2, threads=1), alone)
    assert sorted(trained(tmp_path / "b")[8:]) == sorted(
        line for line in trained(tmp_path / "a") if line.startswith(tuple(map(joined, bad)))
    )


def joined(indices):
    return " ".join(map(str, indices)) + " |"


def command(recipe, out):
    """``fastproj lds`` with two jobs, in a process group of its own."""
    arguments = [recipe, "--train-set-size", "24", "--subsets", "8", "--out", out, "--jobs", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastproj", "lds", *map(str, arguments)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def test_a_killed_command_loses_the_models_in_flight_only(tmp_path):
    """kill -9 of the parent: its workers end too, and the same command goes on."""
    lock = tmp_path / "lock"
    trouble = (
        f"import fcntl; global held; held = open({str(lock)!r}, 'a'); "
        "fcntl.flock(held, fcntl.LOCK_SH)\n"
        "    if count == 5: os.kill(os.getppid(), signal.SIGKILL); signal.pause()"
    )
    recipe, out = write_recipe(tmp_path, trouble), tmp_path / "out"
    process = command(recipe, out)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    with open(lock, "a") as held:  # comes when the last worker is gone
        fcntl.flock(held, fcntl.LOCK_EX)
    lines = trained(tmp_path)
    there = list((out / "models").glob("*.safetensors"))
    assert len(lines) - len(there) in (1, 2)  # in flight
    masks, settings = random_subsets(24, 8), {"identity": {"fraction": 0.5}}
    (tmp_path / "trouble.py").unlink()
    truth = train_subsets(recipe, masks, out, **settings)
    assert len(trained(tmp_path)) - len(lines) == 8 - len(there)
    assert same(truth, train_subsets(recipe, masks, tmp_path / "alone", **settings))


def test_ctrl_c_ends_with_130_and_keeps_what_is_finished(tmp_path):
    """And no worker sees it: each checks that it is blocked."""
    trouble = (
        "assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "    if count == 4: os.killpg(0, signal.SIGINT); signal.pause()"
    )
    recipe, out = write_recipe(tmp_path, trouble), tmp_path / "out"
    process = command(recipe, out)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert f"fastproj lds: stopped. Finished models are kept in {out}" in errors
    assert "Traceback" not in errors, errors
    assert len(list((out / "models").glob("*.safetensors"))) in (2, 3)


def test_killed_at_any_write_and_restarted(tmp_path):
    """kill -9 around every kind of write: the result is the same, and nothing is done twice."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastproj.trak", "torch._dynamo"])

    def run(*arguments):
        process = context.Process(target=killed_retraining.main, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    log = tmp_path / "moments"
    whole = write_recipe(tmp_path / "whole")
    assert run(whole, tmp_path / "whole" / "out", log, 0) == 0
    moments, once = int(log.read_text()), trained(tmp_path / "whole")
    killed = write_recipe(tmp_path / "killed")
    rng, kills = random.Random(0), 0
    for die_at in [*(rng.randint(1, moments // 5) for _ in range(9)), 0]:
        code = run(killed, tmp_path / "killed" / "out", log, die_at)
        assert code in (0, -signal.SIGKILL)
        kills += code == -signal.SIGKILL
    assert code == 0
    assert kills >= 6
    found, expected = (
        GroundTruth.load(tmp_path / name / "truth.npz") for name in ("killed", "whole")
    )
    assert same(found, expected)
    assert not list((tmp_path / "killed").rglob(".*.tmp"))
    lines = Counter(trained(tmp_path / "killed"))
    assert set(lines) == set(once)
    assert sum(lines.values()) - len(once) <= kills


def test_a_recipe_that_cannot_be_sent_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"can't be sent to worker processes.*jobs=1 trains"):
        train_subsets(lambda inds, seed: [0.0], random_subsets(24, 3), tmp_path / "out", jobs=2)


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_directory_of_other_settings_is_refused(tmp_path):
    recipe, out, data = write_recipe(tmp_path), tmp_path / "out", tmp_path / "data.npy"
    data.write_text("1")
    masks, options = random_subsets(24, 3), {"depends": [data], "identity": {"fraction": 0.5}}
    train_subsets(recipe, masks, out, **options)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def refused(message, masks=masks, **changes):
        with pytest.raises(StoreMismatchError, match=message):
            train_subsets(recipe, masks, out, **{**options, **changes})
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    refused("train set size 24 in the directory, 20 in this run", masks=random_subsets(20, 3))
    refused("seed 0 in the directory, 1 in this run", seed=1)
    refused("fraction 0.5 in the directory, 0.4 in this run", identity={"fraction": 0.4})
    refused("depends 'data.npy .*' in the directory, '' in this run", depends=[])
    data.write_text("2")
    refused("depends 'data.npy .*' in the directory, 'data.npy .*' in this run")
    data.write_text("1")
    recipe.write_text(RIDGE + "\n# changed\n")
    refused("recipe 'recipe.py .*' in the directory, 'recipe.py .*' in this run")
    recipe.write_text(RIDGE)
    train_subsets(recipe, masks, out, **options)


def test_a_failing_subset_costs_no_other(tmp_path):
    masks = random_subsets(24, 6)
    bad = np.flatnonzero(masks[4]).tolist()
    recipe = write_recipe(tmp_path, f"if list(indices) == {bad}: raise SystemExit(3)")
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"1 trainings failed \(subset 4, .* exit\(3\)"):
        train_subsets(recipe, masks, out)
    truth = train_subsets(recipe, masks, out, allow_failures=True)
    assert truth.rows.tolist() == [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(truth.masks, masks[truth.rows])
    assert list(truth.failed) == ["subset 4, retraining 0"]
    assert len(trained(tmp_path)) == 7


def test_a_recipe_that_always_fails_is_given_up(tmp_path):
    recipe = write_recipe(tmp_path, "raise ZeroDivisionError('always')")
    with pytest.raises(WorkerError, match=r"first 3 trainings all failed.*ZeroDivision.*always"):
        train_subsets(recipe, random_subsets(24, 20), tmp_path / "out")
    assert len(trained(tmp_path)) == 3
    # Nothing was trained, so that the directory is no obstacle to putting the recipe right.
    write_recipe(tmp_path, "pass", RIDGE + "# right")
    train_subsets(recipe, random_subsets(24, 4), tmp_path / "out")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1.0, float('nan')]", "the output nan for target 1; expected finite"),
        ("[[1.0]]", r"outputs \[1, 1\]; expected \[m\]"),
        ("3.0", r"outputs \[\]; expected \[m\]"),
        ("[]", r"outputs \[0\]; expected \[m\]"),
        ("None", "outputs of type NoneType; expected numbers"),
        ("['a']", "outputs of type list; expected numbers"),
        ("[1j]", "outputs of type list; expected numbers"),
    ],
)
def test_outputs_that_are_none(tmp_path, returned, message):
    text = f"def train(indices, seed): ...\ndef outputs(model): return {returned}"
    recipe = write_recipe(tmp_path, text=text)
    with pytest.raises(WorkerError, match=message):
        train_subsets(recipe, random_subsets(24, 3), tmp_path / "out")


def test_outputs_of_another_length_are_no_outputs(tmp_path):
    text = "def train(indices, seed): return [0.0] * (2 if 0 in indices else 3)"
    recipe, masks = write_recipe(tmp_path, text=text), ~np.eye(6, dtype=bool)
    with pytest.raises(TrainingError, match="it returned 2 outputs; expected 3"):
        train_subsets(recipe, masks, tmp_path / "out")
    with pytest.raises(WorkerError, match="it returned 2 outputs; expected 7"):
        train_subsets(recipe, masks, tmp_path / "other", n_targets=7)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_is_named_and_loses_nothing(tmp_path, monkeypatch, code):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    replace, renamed = os.replace, []

    def refuse(source, target):
        renamed.append(target)
        if len(renamed) == 4:
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    wanted = "no room for .* bytes free" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(StoreError, match=wanted):
        train_subsets(recipe, random_subsets(24, 5), out)
    monkeypatch.undo()
    train_subsets(recipe, random_subsets(24, 5), out)
    assert len(trained(tmp_path)) == 6  # the one that could not be written again


def test_a_damaged_file_is_named(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    train_subsets(recipe, random_subsets(24, 3), out)
    path = sorted((out / "models").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreCorruptError, match=f"{path.name} is damaged.*Delete the file"):
        train_subsets(recipe, random_subsets(24, 3), out)
    path.unlink()
    train_subsets(recipe, random_subsets(24, 3), out)
    assert len(trained(tmp_path)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": np.ones(5, bool)}, r"masks \[5\]"),
        ({"masks": np.ones((0, 5), bool)}, r"masks \[0, 5\]"),
        ({"masks": np.arange(10).reshape(2, 5)}, "masks with the value 2"),
        ({"masks": [[True, False], [False, False]]}, "row 1 has no sample"),
        ({"repeats": 0}, "repeats=0"),
        ({"allow_failures": "no"}, "allow_failures='no' .*expected True or False"),
        ({"jobs": 0}, "jobs=0"),
        ({"threads": 0}, "threads=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"names": ["a"]}, "1 names; expected 3"),
        ({"depends": ["missing.npy"]}, "can't read missing.npy"),
        ({"recipe": "missing.py"}, "there is no file missing.py"),
        ({"recipe": "no_such_module"}, "no such module"),
        ({"recipe": 5}, "source can't be read"),
    ],
)
def test_bad_arguments_make_no_directory(tmp_path, arguments, message):
    given = {"recipe": write_recipe(tmp_path), "masks": random_subsets(24, 3), **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        train_subsets(directory=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


# ---- recipes and files --------------------------------------------------------------------------

FORMS = """
class Ridge:
    def train(self, indices, seed): return len(indices)
    def outputs(self, model): return [model, 1]
ridge = Ridge()
def function(indices, seed): return [len(indices), 1]
nothing = 5
"""


@pytest.mark.parametrize("name", [":Ridge", ":ridge", ":function"])
@pytest.mark.parametrize("module", [False, True])
def test_a_recipe_may_be_a_class_an_object_or_a_function(tmp_path, monkeypatch, name, module):
    write_recipe(tmp_path, text=FORMS)
    (tmp_path / "forms_for_tests.py").write_text(FORMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    reference = ("forms_for_tests" if module else "recipe.py") + name
    assert load_recipe(reference).run(np.arange(3), 0).tolist() == [3, 1]
    assert re.fullmatch(rf"(recipe\.py|forms_for_tests){name} \w{{16}}", recipe_identity(reference))
    monkeypatch.delitem(sys.modules, "forms_for_tests", raising=False)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("recipe.py:nothing", "has no train and outputs; expected train"),
        ("recipe.py:absent", "has no 'absent'"),
        ("recipe.py", "has no train and outputs"),
        ("./recipe", "there is no file recipe"),
        ("json.absent", "no such module"),
        ("absent.module", "can't be imported"),
        ("", "no such module|can't be imported"),
    ],
)
def test_what_is_no_recipe(tmp_path, monkeypatch, reference, message):
    write_recipe(tmp_path, text=FORMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(RecipeError, match=message):
        load_recipe(reference)


def test_what_partial_fixes_is_part_of_the_recipe():
    one = recipe_identity(functools.partial(random_subsets, seed=1))
    assert one == recipe_identity(functools.partial(random_subsets, seed=1))
    assert one != recipe_identity(functools.partial(random_subsets, seed=2))
    assert one.startswith("random_subsets ")


def class_of_a_cell(source: str, name: str) -> type:
    """What a notebook makes of a cell: a class of no file, whose lines Python knows."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope = {"__name__": "no_module_of_tests"}
    exec(compile(source, name, "exec"), scope)
    return scope["Notebook"]


def test_a_class_of_a_notebook_is_known_by_its_methods_and_attributes(tmp_path):
    source = (
        "class Notebook:\n"
        "    epochs = 3\n"
        "    @staticmethod\n"
        "    def doubled(number): return 2 * number\n"
        "    def train(self, indices, seed): return self.doubled(len(indices))\n"
        "    def outputs(self, model): return [model, 1]\n"
    )
    found = class_of_a_cell(source, "<cell 1>")
    masks = random_subsets(24, 3)
    for recipe in (found, found()):
        truth = train_subsets(recipe, masks, tmp_path / "out")
        assert truth.mean.tolist() == [[24, 1]] * 3
    assert recipe_identity(found) == recipe_identity(class_of_a_cell(source, "<cell 2>"))
    for number, (old, new) in enumerate({"= 3": "= 4", "2 *": "3 *", ", 1]": ", 2]"}.items()):
        other = class_of_a_cell(source.replace(old, new), f"<cell {3 + number}>")
        assert recipe_identity(found) != recipe_identity(other)
    with pytest.raises(RecipeError, match="source can't be read"):
        recipe_identity(class_of_a_cell("class Notebook: epochs = 3\n", "<cell 9>"))


def test_a_recipe_that_does_not_load_says_why(tmp_path):
    recipe = write_recipe(tmp_path, text="import os\nraise OverflowError('in line two')")
    with pytest.raises(WorkerError, match=r"(?s)recipe.py: can't be loaded.*in line two"):
        train_subsets(recipe, random_subsets(24, 3), tmp_path / "out")


def test_ground_truth_files(tmp_path):
    masks, outputs = random_subsets(6, 4), np.arange(12.0).reshape(4, 3)
    np.savez(tmp_path / "plain.npz", masks=masks.astype(int), outputs=outputs)
    truth = GroundTruth.load(tmp_path / "plain.npz")
    assert truth.masks.dtype == bool
    np.testing.assert_array_equal(truth.outputs, outputs[None])
    np.testing.assert_array_equal(truth.mean, outputs)

    def refused(message, **parts):
        np.savez(tmp_path / "wrong.npz", **parts)
        with pytest.raises((StoreError, ValueError), match=message):
            GroundTruth.load(tmp_path / "wrong.npz")

    refused("holds a; expected masks", a=masks)
    refused(r"masks \[4, 6\] and outputs \[3, 3\]", masks=masks, outputs=outputs[1:])
    refused("value 2", masks=2 * masks, outputs=outputs)
    (tmp_path / "text.npz").write_text("no array")
    for path in ("text.npz", "missing.npz"):
        with pytest.raises(StoreError, match=f"can't read .*{path}"):
            GroundTruth.load(tmp_path / path)
    np.save(tmp_path / "one.npy", masks)
    with pytest.raises(StoreError, match=r"one.npy is a .npy file of one array \[4, 6\]; expected"):
        GroundTruth.load(tmp_path / "one.npy")
    with pytest.raises(StoreError, match="expected a directory that `fastproj lds` has finished"):
        GroundTruth.load(tmp_path)


def test_a_damaged_ground_truth_is_named(tmp_path):
    path = tmp_path / "truth.npz"
    masks, numbers = random_subsets(24, 9), np.random.default_rng(0)
    GroundTruth(masks, numbers.normal(size=(2, 9, 5)), np.arange(9)).save(path)
    whole, said = path.read_bytes(), set()
    for place in numbers.integers(len(whole), size=60):
        for damaged in (
            whole[:place],
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
        ):
            path.write_bytes(damaged)
            try:
                found = GroundTruth.load(path)
            except (StoreError, ValueError) as error:
                said.add(str(error)[: str(error).index(" ", len("ground truth: can't read "))])
            else:  # a date, or another byte that nothing is read from
                np.testing.assert_array_equal(found.masks, masks)
    assert said == {f"ground truth: can't read {path}"}


def test_a_worker_whose_pipe_is_gone_ends_quietly(tmp_path, capfd):
    """As after Ctrl-C while it starts."""
    recipe = write_recipe(tmp_path)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, str(recipe), 1))
    ours.close()
    process.start()
    theirs.close()
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
