"""Whether a run may go on with a save_dir."""

from __future__ import annotations

import pytest

from fastproj.trak import CausalLMModelOutput, CLIPModelOutput, Seq2SeqModelOutput
from fastproj.trak.store.identity import describe_task, difference


@pytest.mark.parametrize("task", [CausalLMModelOutput, CLIPModelOutput])
def test_another_likelihood_is_refused_and_what_is_said_goes_on(task):
    older = {"task": describe_task(task(likelihood_temperature=1.0))}
    assert "likelihood_temperature" not in older["task"]  # as it was before there was one
    said = difference(older, {"task": describe_task(task())})
    assert "likelihood_temperature=1.0" in said
    assert older["task"] in said
    assert difference(older, {"task": describe_task(task(likelihood_temperature=1.0))}) == ""


def test_stores_of_tasks_that_are_not_softened_go_on():
    assert describe_task(Seq2SeqModelOutput()) == "Seq2SeqModelOutput(reduction=sum)"
