"""Whether a run may go on with a save_dir."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastproj.trak import (
    CausalLMModelOutput,
    CLIPModelOutput,
    Seq2SeqModelOutput,
    StoreMismatchError,
)
from fastproj.trak.store.identity import check_identity, describe_task

PLACE = Path("/the/place")


@pytest.mark.parametrize("task", [CausalLMModelOutput, CLIPModelOutput])
def test_another_likelihood_is_refused_and_what_is_said_goes_on(task):
    older = {"task": describe_task(task(likelihood_temperature=1.0))}
    assert "likelihood_temperature" not in older["task"]  # as it was before there was one
    with pytest.raises(StoreMismatchError) as refused:
        check_identity(PLACE, older, {"task": describe_task(task())})
    assert "likelihood_temperature=1.0" in str(refused.value)
    assert older["task"] in str(refused.value)
    check_identity(PLACE, older, {"task": describe_task(task(likelihood_temperature=1.0))})


def test_stores_of_tasks_that_are_not_softened_go_on():
    assert describe_task(Seq2SeqModelOutput()) == "Seq2SeqModelOutput(reduction=sum)"
