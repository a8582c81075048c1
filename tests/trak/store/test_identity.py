"""Whether a run may go on with a save_dir."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastproj.trak import (
    CausalLMModelOutput,
    CLIPModelOutput,
    FunctionModelOutput,
    ImageClassificationModelOutput,
    Seq2SeqModelOutput,
    StoreMismatchError,
)
from fastproj.trak.store.identity import OWN_PROJECTOR, check_identity, describe_task

PLACE = Path("/the/place")
STORED = {
    "seed": 3,
    "projector": OWN_PROJECTOR,
    "kind": "sjlt",
    "block": 16,
    "proj_dim": 64,
    "num_params": 9,
    "task": "One()",
}
ALL = {"kind": "sjlt", "block": 16, "proj_dim": 64, "factored": None, "projector_seed": 3}


def refused(stored, wanted):
    """The error of a run with a directory that it can't go on with."""
    with pytest.raises(StoreMismatchError) as error:
        check_identity(PLACE, stored, wanted)
    return error.value


def test_the_same_run_goes_on():
    check_identity(PLACE, STORED, dict(reversed(STORED.items())))


@pytest.mark.parametrize(("key", "default"), [("curvature", "trak"), ("size_power", 0.0)])
def test_what_metadata_lack_means(key, default):
    """Stores are older than these settings, and runs without them don't write them."""
    check_identity(PLACE, STORED, {**STORED, key: default})
    check_identity(PLACE, {**STORED, key: default}, STORED)
    key_in_words = key.replace("_", " ")
    said = str(refused(STORED, {**STORED, key: 0.25}))
    assert f": {key_in_words} {default!r} in the directory, 0.25 in this run. Nothing" in said
    said = str(refused({**STORED, key: 0.25}, STORED))
    assert f": {key_in_words} 0.25 in the directory, {default!r} in this run. Nothing" in said


def test_everything_that_differs_is_said():
    error = refused({**STORED, "factored": 8}, {**STORED, "num_params": 7, "draws": 2})
    assert str(error) == (
        "TRAKer: /the/place holds features of another run: num params 9 in the directory, 7 in "
        "this run; draws None in the directory, 2 in this run; factored 8 in the directory, None "
        "in this run. Nothing was changed; use the same settings (factored=8), or another save_dir"
    )
    assert str(error).startswith(f"{error.found}. Nothing was changed; ")
    assert (error.another, error.same) == ("save_dir", {"factored": 8})


@pytest.mark.parametrize(
    ("wanted", "same"),
    [
        ({"proj_dim": 32}, {"proj_dim": 64}),
        ({"factored": 4}, {"factored": None}),
        ({"seed": 4}, {"projector_seed": 3}),
        ({"kind": "gaussian"}, {"kind": "sjlt", "block": 16}),
        ({"block": 32}, {"kind": "sjlt", "block": 16}),  # 16 for kind None goes with few proj_dim
        ({"seed": 4, "factored": 4, "proj_dim": 8, "block": 32, "kind": "gaussian"}, ALL),
        ({"projector": "elsewhere.Own"}, {"projector": None, **ALL}),
        ({"projector": "elsewhere.Own", "proj_dim": 9}, {"projector": None, **ALL}),
        ({"proj_dim": 32, "size_power": 0.5, "task": "Two()"}, {"proj_dim": 64}),
        ({"num_params": 8}, {}),
        ({"num_params": 8, "task": "Two()"}, {}),
        ({"num_params": 8, "size_power": 0.5}, {}),
    ],
)
def test_arguments_that_go_on(wanted, same):
    error = refused(STORED, {**STORED, **wanted})
    assert error.same == same
    words = ", ".join(f"{name}={value!r}" for name, value in same.items())
    words = f"the same settings ({words})" if same else "the same settings"
    assert str(error).endswith(f"Nothing was changed; use {words}, or another save_dir")


def test_a_projector_of_someone_else_has_no_arguments_here():
    error = refused({**STORED, "projector": "elsewhere.Own"}, {**STORED, "proj_dim": 32})
    assert str(error).endswith("; use the same settings, or another save_dir")
    assert error.same == {}


def test_another_power_of_sizes():
    error = refused({**STORED, "size_power": 0.25}, {**STORED, "size_power": 0.5})
    said = (
        "use curvature=fastproj.trak.Fisher(size_power=0.25), with samples= and draws= as here, "
        "or another save_dir"
    )
    assert str(error).endswith(f". Nothing was changed; {said}")
    assert error.same is None


def test_another_task():
    error = refused(STORED, {**STORED, "task": "Two()"})
    assert str(error).endswith(
        ": task 'One()' in the directory, 'Two()' in this run. Nothing was changed; use the same "
        "task and settings (those that the text doesn't name: likelihood=None, multilabel=False, "
        "likelihood_temperature=1.0), or another save_dir"
    )
    assert error.same is None


@pytest.mark.parametrize("task", [CausalLMModelOutput, CLIPModelOutput])
def test_another_likelihood_is_refused_and_what_is_said_goes_on(task):
    older = {"task": describe_task(task(likelihood_temperature=1.0))}
    assert "likelihood_temperature" not in older["task"]  # as it was before there was one
    said = str(refused(older, {"task": describe_task(task())}))
    assert "likelihood_temperature=1.0" in said
    assert older["task"] in said
    check_identity(PLACE, older, {"task": describe_task(task(likelihood_temperature=1.0))})


def output(model, batch):
    """A task of its own."""
    return model(batch[0]).sum(1)


class Callable:
    """A function without a name."""

    def __call__(self, *arguments):
        return output(*arguments)


class Elsewhere(ImageClassificationModelOutput):
    """A task that is not fastproj's, whose attributes may be anything."""


@pytest.mark.parametrize(
    ("task", "text"),
    [
        (Seq2SeqModelOutput(), "Seq2SeqModelOutput(reduction=sum)"),
        (CausalLMModelOutput(), "CausalLMModelOutput(reduction=sum, likelihood_temperature=1.5)"),
        (ImageClassificationModelOutput(2.0), "ImageClassificationModelOutput(temperature=2.0)"),
        (ImageClassificationModelOutput(2), "ImageClassificationModelOutput(temperature=2.0)"),
        (
            CausalLMModelOutput(likelihood_temperature=np.float32(2)),
            "CausalLMModelOutput(reduction=sum, likelihood_temperature=2.0)",
        ),
        (
            CLIPModelOutput(2, likelihood_temperature=3),
            "CLIPModelOutput(temperature=2.0, simulated_batch_size=300, seed=0, "
            "likelihood_temperature=3.0)",
        ),
        (
            ImageClassificationModelOutput(multilabel=True),
            "ImageClassificationModelOutput(temperature=1.0, multilabel=True)",
        ),
        (FunctionModelOutput(output), "FunctionModelOutput(output=output, loss=None)"),
        (
            FunctionModelOutput(Callable(), likelihood=partial(output)),
            "FunctionModelOutput(output=Callable, loss=None, likelihood=partial)",
        ),
        (Elsewhere(2.0), "Elsewhere"),
    ],
)
def test_tasks_as_texts(task, text):
    vars(task)["_kept"] = "what a task keeps for itself"
    assert describe_task(task) == text
