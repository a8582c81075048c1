"""Labels: which a task takes, and what is said of others, by the number of the sample."""

from __future__ import annotations

import logging

import pytest

from fastproj.trak.hf import HFTRAKer
from tests.trak.hf import models


@pytest.mark.parametrize(
    ("kind", "labels", "said"),
    [
        ("text_classification", -1, r"the label -1; expected an integer, the class 0\.\.2"),
        ("text_classification", -100, r"the label -100; expected an integer, the class 0\.\.2 "),
        ("text_classification", [3], r"the label 3; .* 0\.\.2 \(config.num_labels is 3\)"),
        ("text_classification", 0.0, r"the label 0\.0; expected an integer, the class 0\.\.2"),
        ("text_classification", True, "the label True; expected an integer"),
        ("text_classification", [1, 0], "2 labels; expected one class number"),
        ("text_classification", "good", r"labels 'good'; .*hf.tokenize makes them of names"),
        ("token_classification", [-100, 4], r"the label 4; .* 0\.\.3 .*or -100 where a token has"),
        ("token_classification", [1.0, 2.0], r"the label 1\.0; expected an integer"),
        ("token_classification", ["a", "b"], "labels .*tokenize makes them of names"),
        ("regression", [1.5, 2.0], "2 labels; expected one number"),
        ("causal_lm", [5.0, 6.0], r"the label 5\.0; expected integers, the tokens to predict"),
        ("causal_lm", ["a", "b"], "labels .*; expected numbers, in lists of one length$"),
    ],
)
def test_a_label_that_can_not_work_is_named_by_its_sample(tmp_path, kind, labels, said):
    """Batches are in another order."""
    samples = models.samples_for(kind, 8)
    samples[6] = {"input_ids": [5, 6], "labels": labels}
    if kind == "causal_lm":
        samples = [{"labels": sample["input_ids"], **sample} for sample in samples]
    options = {"proj_dim": 8, "batch_size": 4, "logging_level": logging.ERROR}
    traker = HFTRAKer(models.model_for(kind), samples, None, tmp_path, **options)
    with pytest.raises(ValueError, match=f"HFTRAKer: sample 6 of train has {said}"):
        traker.featurize()
