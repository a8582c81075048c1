"""State_dicts as checkpoints: none is in the memory that another is loaded into."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from fastproj.trak.hf import HFTRAKer
from fastproj.trak.hf.checkpoints import kept_apart
from tests.trak.hf import models

OPTIONS = {"proj_dim": 16, "logging_level": logging.ERROR}


def copied(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("first", ["own", "other"])
def test_the_state_dict_of_the_model_itself_is_not_overwritten(tmp_path, first):
    samples = models.samples_for("causal_lm", 12)
    other = models.model_for("causal_lm", 7).state_dict()

    def scores(folder, state_of):
        model = models.model_for("causal_lm")
        pair = {"own": state_of(model), "other": other}
        checkpoints = [pair.pop(first), *pair.values()]
        traker = HFTRAKer(model, samples, checkpoints, folder, **OPTIONS)
        found = np.array(traker.score(samples[:2]))
        np.testing.assert_array_equal(traker.score(samples[:2], "again"), found)
        return found

    wanted = scores(tmp_path / "a", copied)
    found = scores(tmp_path / "b", lambda model: model.state_dict())
    np.testing.assert_array_equal(found, wanted)


def test_state_dicts_of_one_memory_are_refused(tmp_path):
    """As a training leaves them that appended model.state_dict() after each epoch."""
    model, samples = models.model_for("causal_lm"), models.samples_for("causal_lm", 4)
    states = [copied(model), model.state_dict(), model.state_dict()]
    with pytest.raises(ValueError, match=r"checkpoints 1 and 2, .* the same memory.*t.clone"):
        HFTRAKer(model, samples, states, tmp_path, **OPTIONS)
    named = {5: states[0], 9: states[0]}
    with pytest.raises(ValueError, match="checkpoints 5 and 9"):
        HFTRAKer(model, samples, named, tmp_path, **OPTIONS)
    for state in states[1:]:  # also where a buffer is another
        state["counter"] = torch.ones(1)
    model.register_buffer("counter", torch.zeros(1))
    with pytest.raises(ValueError, match="checkpoints 1 and 2"):
        HFTRAKer(model, samples, states, tmp_path, **OPTIONS)


def test_what_checkpoints_share_is_copied_once():
    """The base model under several adapters; and tied weights stay tied."""
    model = models.with_adapters(models.model_for("causal_lm"))
    base = model.state_dict()
    lora = [{k: t + i for k, t in base.items() if "lora_" in k} for i in range(2)]
    first, second = kept_apart(
        "HFTRAKer", model, dict(enumerate([{**base, **own} for own in lora]))
    ).values()
    for name, t in base.items():
        if "lora_" in name:
            assert first[name] is lora[0][name]
        else:
            assert first[name] is second[name]
            assert torch.equal(first[name], t)
            assert first[name].data_ptr() != t.data_ptr()
    heads = [first[name] for name in first if name.endswith(("lm_head.weight", "wte.weight"))]
    assert len(heads) == 2
    assert heads[0] is heads[1]
