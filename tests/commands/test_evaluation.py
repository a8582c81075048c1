"""The commands that hold scores against retraining, from a recipe file to numbers in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastproj import cli
from fastproj.trak.distributed import Ranks
from fastproj.trak.evaluation.metrics import (
    brittleness,
    lds,
    loo_correlation,
    mislabel_auc,
    noise_ceiling,
)
from fastproj.trak.evaluation.recipe import load_recipe
from fastproj.trak.evaluation.retrain import GroundTruth, model_seed, random_subsets, samples_digest
from fastproj.trak.store.scores import TopWriter
from tests.trak.recipe_files import RIDGE, trained, write_recipe


@pytest.fixture
def scores(tmp_path):
    """scores.npy [24, 5]; the recipe is beside it."""
    write_recipe(tmp_path)
    path = tmp_path / "scores.npy"
    np.save(path, np.random.default_rng(1).normal(size=(24, 5)).astype(np.float32))
    return path


def outputs_without(folder, removed, run=0, seed=0):
    """Outputs of the recipe trained on all samples but ``removed``."""
    mask = np.ones(24, bool)
    mask[removed] = False
    recipe = load_recipe(folder / "recipe.py")
    return recipe.run(np.flatnonzero(mask), model_seed(seed, samples_digest(mask), run))


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_lds(tmp_path, scores, capsys):
    out = tmp_path / "out"
    arguments = ["lds", tmp_path / "recipe.py", "--scores", scores, "--out", out, "--subsets", 7]
    assert run(*arguments, "--repeats", 2, "--fraction", 0.4, "--n-boot", 50) == 0
    truth = GroundTruth.load(out)
    np.testing.assert_array_equal(truth.masks, random_subsets(24, 7, 0.4))
    result = lds(np.load(scores), truth.masks, truth.mean, n_boot=50)
    ceiling = noise_ceiling(truth.outputs)
    printed = capsys.readouterr().out
    assert f"{result}  {scores}\n" in printed
    assert f"at most about {ceiling:.2f} to predict" in printed
    numbers = json.loads((out / "results.json").read_text())
    (found,) = numbers["results"]
    assert (found["mean"], found["low"], found["high"]) == (result.mean, result.low, result.high)
    assert found["per_target"] == result.per_target.tolist()
    assert (numbers["n_runs"], numbers["n_subsets"], numbers["n_targets"]) == (2, 7, 5)
    assert numbers["noise_ceiling"] == ceiling
    assert numbers["failed"] == {}


def test_one_ground_truth_serves_other_scores(tmp_path, scores, capsys):
    out, other = tmp_path / "out", tmp_path / "other.npy"
    constant = np.load(scores)
    constant[:, 2] = 0
    np.save(other, constant)
    recipe = tmp_path / "recipe.py"
    assert run("lds", recipe, "--train-set-size", 24, "--subsets", 6, "--out", out) == 0
    assert "LDS" not in capsys.readouterr().out
    given = ["lds", "--ground-truth", out, "--scores", scores, other, "--json"]
    assert run(*given, "--seed", 3) == 0
    assert len(trained(tmp_path)) == 6
    results = json.loads(capsys.readouterr().out)["results"]
    truth = GroundTruth.load(out)
    for path, found in zip((scores, other), results, strict=True):
        expected = lds(np.load(path), truth.masks, truth.mean, seed=3)
        assert (found["scores"], found["mean"], found["low"]) == (
            str(path),
            expected.mean,
            expected.low,
        )
    assert results[1]["per_target"][2] is None
    np.savez(tmp_path / "truth.npz", masks=truth.masks, outputs=truth.mean)
    capsys.readouterr()
    assert run("lds", "--ground-truth", tmp_path / "truth.npz", "--scores", scores) == 0
    printed = capsys.readouterr().out
    assert f"{lds(np.load(scores), truth.masks, truth.mean)}  {scores}" in printed
    assert "numbers:" not in printed


def test_lds_without_a_subset_that_fails_says_so(tmp_path, scores, capsys):
    bad = np.flatnonzero(random_subsets(24, 6)[3]).tolist()
    write_recipe(tmp_path, f"if list(indices) == {bad}: raise ValueError('not this one')")
    out = tmp_path / "out"
    arguments = ["lds", tmp_path / "recipe.py", "--scores", scores, "--out", out, "--subsets", 6]
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert "5 subsets, 1 models each" in printed.out
    assert "LDS" in printed.out
    assert "subset 3, retraining 0 failed and is left out: ValueError: not this" in printed.err
    assert list(json.loads((out / "results.json").read_text())["failed"]) == [
        "subset 3, retraining 0"
    ]


@pytest.mark.parametrize("method", ["spearman", "kendall"])
def test_loo(tmp_path, scores, capsys, method):
    out = tmp_path / "out"
    arguments = ["loo", tmp_path / "recipe.py", "--scores", scores, "--out", out, "--seed", 4]
    assert run(*arguments, "--samples", 6, "--repeats", 2, "--method", method) == 0
    removed = json.loads((out / "results.json").read_text())["removed"]
    assert len(set(removed)) == 6
    outputs = [
        np.mean([outputs_without(tmp_path, i, run, seed=4) for run in range(2)], 0) for i in removed
    ]
    expected = loo_correlation(np.load(scores), removed, outputs, method=method, seed=4)
    assert f"{expected}  {scores}\n" in capsys.readouterr().out


CONSTANT = {
    "outputs": ("return np.ones(5)", None, "5 have the same output in all of the 4 models"),
    "scores": (None, np.zeros((24, 5)), "the scores of 5 predict the same for all of them"),
    "both": (
        "return (Z @ model) * [0, 1, 1, 1, 1]",
        np.ones((24, 5)) * np.arange(5),
        "1 have the same output .* the scores of 4 predict the same",
    ),
}


@pytest.mark.parametrize("command", ["lds", "loo"])
@pytest.mark.parametrize("name", CONSTANT)
def test_no_correlation_at_all_is_an_error_that_says_why(tmp_path, scores, capsys, command, name):
    body, values, message = CONSTANT[name]
    if body is not None:
        write_recipe(tmp_path, text=RIDGE.replace("return Z @ model", body))
    if values is not None:
        np.save(scores, values)
    count = {"lds": ("--subsets", 4, "--repeats", 2), "loo": ("--samples", 4, "--repeats", 2)}
    assert (
        run(
            *(command, tmp_path / "recipe.py", "--scores", scores, "--out", tmp_path / "out"),
            *(*count[command], "--n-boot", 5, "--json"),
        )
        == 1
    )
    printed = capsys.readouterr()
    pattern = rf"{command}: .*5 of 5 targets have no correlation.*{message}.*Expected outputs and"
    assert re.search(pattern, printed.err.replace("\n", " "))
    assert "nan to predict" not in printed.err
    assert json.loads(printed.out)["results"][0]["mean"] is None


def test_some_targets_without_a_correlation_are_counted(tmp_path, scores, capsys):
    values = np.load(scores)
    values[:, 3] = 0
    np.save(scores, values)
    arguments = ("--scores", scores, "--out", tmp_path / "out", "--subsets", 5)
    assert run("lds", tmp_path / "recipe.py", *arguments) == 0
    assert "1 of 5 targets have no correlation and are left out" in capsys.readouterr().err


def test_fewer_subsets_than_before_are_the_first_of_those_that_are_kept(tmp_path, scores, capsys):
    out, recipe = tmp_path / "out", tmp_path / "recipe.py"
    common = ("--scores", scores, "--out", out, "--n-boot", 20)
    assert run("lds", recipe, *common, "--subsets", 9, "--repeats", 2) == 0
    whole = GroundTruth.load(out)
    capsys.readouterr()
    assert run("lds", recipe, *common, "--subsets", 4) == 0
    printed = capsys.readouterr().out
    assert len(trained(tmp_path)) == 18
    expected = lds(np.load(scores), whole.masks[:4], whole.outputs[0, :4], n_boot=20)
    assert f"{expected}  {scores}" in printed
    assert f"4 subsets, 1 models each, 5 targets; 14 more models in {out} are kept" in printed
    assert "is left as it is, with 9 subsets, 2 models each" in printed
    np.testing.assert_array_equal(GroundTruth.load(out).outputs, whole.outputs)
    given = ("lds", "--ground-truth", out, "--scores", scores, "--n-boot", 20)
    assert run(*given, "--subsets", 4, "--repeats", 1) == 0
    printed = capsys.readouterr().out
    assert f"{expected}  {scores}" in printed
    assert "4 subsets, 1 models each, 5 targets; the first of 9 subsets, 2 models each" in printed
    assert run(*given) == 0
    assert "ground truth: 9 subsets, 2 models each, 5 targets\n" in capsys.readouterr().out
    assert run(*given, "--subsets", 10) == 1
    assert "received subsets=10; expected 1 to 9, which it holds" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*given, "--fraction", 0.4)
    assert "--fraction goes with RECIPE" in capsys.readouterr().err
    # More of one and fewer of the other: a ground truth of its own, and nothing trained again.
    assert run("lds", recipe, *common, "--subsets", 4, "--repeats", 3) == 0
    assert len(trained(tmp_path)) == 22
    assert GroundTruth.load(out).outputs.shape == (3, 4, 5)


def test_fewer_left_out_than_before_are_the_first_of_them(tmp_path, scores, capsys):
    arguments = ("loo", tmp_path / "recipe.py", "--scores", scores, "--out", tmp_path / "out")
    assert run(*arguments, "--samples", 6, "--repeats", 2) == 0
    capsys.readouterr()
    assert run(*arguments, "--samples", 4, "--repeats", 1) == 0
    assert len(trained(tmp_path)) == 12
    assert "left out: 4 samples, 1 models each, 5 targets; 8 more" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["lds", "loo", "brittleness"])
def test_scores_that_are_not_finite_are_found_before_anything_is_trained(
    tmp_path, scores, capsys, command
):
    values = np.load(scores)
    values[3, 2] = np.nan
    np.save(scores, values)
    sizes = {"lds": (), "loo": ("--samples", 4), "brittleness": ("--remove", 2)}[command]
    arguments = ("--scores", scores, "--out", tmp_path / "out", *sizes)
    assert run(command, tmp_path / "recipe.py", *arguments) == 1
    assert "nan at sample 3, target 2" in capsys.readouterr().err
    assert not trained(tmp_path)


def test_numbers_that_say_nothing_are_called_that(tmp_path, scores, capsys):
    write_recipe(tmp_path, text=RIDGE.replace("return Z @ model", "return np.ones(5)"))
    arguments = ("--scores", scores, "--remove", 2, "--repeats", 1, "--out", tmp_path / "out")
    assert run("brittleness", tmp_path / "recipe.py", *arguments) == 0
    assert "all models have the same outputs" in capsys.readouterr().err
    flipped = tmp_path / "flipped.npy"
    np.save(flipped, np.arange(24) < 3)
    np.save(scores, np.ones(24))
    assert run("mislabel", "--scores", scores, "--flipped", flipped) == 0
    assert "all scores are 1, which finds nothing" in capsys.readouterr().err
    np.save(scores, np.arange(24))
    assert run("mislabel", "--scores", scores, "--flipped", flipped) == 0
    assert capsys.readouterr().err == ""


def test_brittleness(tmp_path, scores, capsys):
    out = tmp_path / "out"
    arguments = ["brittleness", tmp_path / "recipe.py", "--scores", scores, "--out", out]
    targets, sizes = [4, 0, 2], [3, 12]
    assert run(*arguments, "--targets", *targets, "--remove", 12, 3, "--repeats", 2) == 0
    base = [outputs_without(tmp_path, [], run)[targets] for run in range(2)]
    table = np.load(scores)
    outputs = np.empty((2, 2, 3))
    for t, target in enumerate(targets):
        order = np.argsort(-table[:, target])
        for k, size in enumerate(sizes):
            for run_number in range(2):
                made = outputs_without(tmp_path, order[:size], run_number)
                outputs[run_number, k, t] = made[target]
    expected = brittleness(outputs, base, sizes)
    assert str(expected) in capsys.readouterr().out
    found = json.loads((out / "results.json").read_text())["result"]
    assert found["flipped"] == expected.flipped.tolist()
    assert found["removed"] == sizes


def test_mislabel(tmp_path, capsys):
    rng = np.random.default_rng(0)
    values, flipped = rng.normal(size=40), rng.random(40) < 0.3
    np.save(tmp_path / "values.npy", values)
    np.save(tmp_path / "flipped.npy", flipped)
    files = ["--scores", tmp_path / "values.npy", "--flipped", tmp_path / "flipped.npy"]
    assert run("mislabel", *files, "--n-boot", 20) == 0
    expected = mislabel_auc(values, flipped, n_boot=20)
    assert capsys.readouterr().out == f"{expected}\n"
    assert run("mislabel", *files, "--n-boot", 20, "--json") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["result"]["mean"] == expected.mean
    assert printed.err == f"{expected}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "scores.npy"], "expected either RECIPE or --ground-truth"),
        (["recipe.py", "--ground-truth", "out"], "expected either RECIPE or --ground-truth"),
        (["--ground-truth", "out"], "--ground-truth needs --scores"),
        (["recipe.py"], "expected --scores, or --train-set-size"),
    ],
)
def test_lds_that_cannot_start(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        run("lds", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lds", "recipe.py", "--scores", "missing.npy"], "can't read scores from missing.npy"),
        (
            ["lds", "recipe.py", "--scores", "recipe.py"],
            "recipe.py (it holds no array of numbers); exp",
        ),
        (["lds", "recipe.py", "--scores", "one.npz"], "one.npz is a zip archive"),
        (["lds", "recipe.py", "--scores", "scores.pt"], "scores.pt is a zip archive"),
        (
            ["loo", "recipe.py", "--scores", "a.top.safetensors", "--samples", "5"],
            "a.top.safetensors holds the extremes of each target only; expected all scores",
        ),
        (["lds", "recipe.py", "--scores", "line.npy"], r"line.npy holds [24] float64; expected"),
        (["lds", "recipe.py", "--scores", "text.npy"], "text.npy holds [2, 1] <U1; expected"),
        (
            ["lds", "recipe.py", "--scores", "scores.npy", "short.npy"],
            "received 24 training samples in scores.npy, 23 in short.npy; expected the same",
        ),
        (
            ["lds", "recipe.py", "--scores", "scores.npy", "--train-set-size", "25"],
            "24 training samples in scores.npy, 25 in --train-set-size",
        ),
        (["lds", "recipe.py", "--scores", "scores.npy", "--fraction", "50"], "fraction=50.0"),
        (["lds", "recipe.py", "--scores", "scores.npy", "--subsets", "2"], "--subsets: received 2"),
        (["lds", "recipe.py", "--train-set-size", "9", "--subsets", "0"], "count=0"),
        (["lds", "recipe.py", "--scores", "scores.npy", "--confidence", "95"], "confidence=95.0"),
        (["loo", "recipe.py", "--scores", "scores.npy", "--n-boot", "0"], "n_boot=0"),
        (["lds", "recipe.py", "--scores", "scores.npy", "--jobs", "0"], "jobs=0"),
        (["lds", "missing.py", "--scores", "scores.npy"], "there is no file missing.py"),
        (["lds", "recipe.py", "--scores", "narrow.npy"], "returned 5 outputs; expected 4"),
        (["lds", "recipe.py", "--train-set-size", "30"], "IndexError"),
        (["lds", "--ground-truth", "missing", "--scores", "scores.npy"], "can't read missing"),
        (["lds", "--ground-truth", ".", "--scores", "scores.npy"], "ground-truth.npz is not there"),
        (
            ["lds", "--ground-truth", "recipe.py", "--scores", "scores.npy"],
            "recipe.py (it holds no arrays of numbers); expected a .npz file",
        ),
        (["loo", "recipe.py", "--scores", "scores.npy", "--samples", "25"], "expected 3 to n = 24"),
        (
            ["brittleness", "recipe.py", "--scores", "scores.npy"],
            "--remove: received [10, 20, 50, 100]; expected 1 to n - 1 = 23",
        ),
        (
            [
                "brittleness",
                "recipe.py",
                "--scores",
                "scores.npy",
                "--remove",
                "2",
                "--targets",
                "5",
            ],
            "targets with 5; expected indices from 0 to 4",
        ),
        (["mislabel", "--scores", "scores.npy", "--flipped", "line.npy"], "scores [24, 5]"),
    ],
)
def test_what_a_user_can_put_right(tmp_path, scores, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.save("line.npy", np.zeros(24))
    np.save("text.npy", [["a"], ["b"]])
    np.save("short.npy", np.zeros((23, 5)))
    np.save("narrow.npy", np.zeros((24, 4)))
    np.savez("one.npz", np.zeros((24, 5)))
    torch.save(torch.zeros(24, 5), "scores.pt")
    with TopWriter(Path("a.top.safetensors"), (24, 5), 3, Ranks()) as extremes:
        extremes.add(np.arange(24), range(5), np.zeros((24, 5), np.float32))
        extremes.finish()
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert f"fastproj {arguments[0]}: " in said
    assert message in said
    assert "Traceback" not in said.rpartition(f"fastproj {arguments[0]}: ")[2]
    tried = {"narrow.npy", "30"} & set(arguments)  # these only show once the recipe has run
    assert bool(trained(tmp_path)) == bool(tried)


def test_interrupted_command(tmp_path, scores, monkeypatch, capsys):
    write_recipe(tmp_path, "if count == 3: raise KeyboardInterrupt")
    out = tmp_path / "out"
    arguments = ["lds", tmp_path / "recipe.py", "--scores", scores, "--out", out, "--subsets", 5]
    assert run(*arguments) == 130
    assert f"stopped. Finished models are kept in {out}" in capsys.readouterr().err
    assert run(*arguments) == 0
    assert len(trained(tmp_path)) == 6
