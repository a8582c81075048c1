"""Self-influence is the diagonal of the scores of the training set on itself."""

from __future__ import annotations

import numpy as np
import pytest

from fastproj.trak import NotReadyError, features
from tests.trak import cases


@pytest.mark.parametrize("half", [False, True])
def test_self_influence_is_the_diagonal(tmp_path, monkeypatch, half):
    monkeypatch.setattr(features, "BLOCK_ROWS", 8)
    models, train = [cases.net(0), cases.net(1)], cases.data(20)
    options = {"lambda_reg": 0.1, "use_half_precision": half}
    square = cases.whole_run(tmp_path, models, train, train, **options)
    found = cases.make(models[0], tmp_path, 20, **options).self_influence()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.diag(square), rtol=1e-5)
    one = cases.make(models[0], tmp_path, 20, **options).self_influence([1])
    assert not np.allclose(one, found)


def test_self_influence_needs_finalised_features(tmp_path):
    model = cases.net(0)
    traker = cases.make(model, tmp_path, 20)
    cases.featurize(traker, model, 0, cases.data(20))
    with pytest.raises(NotReadyError, match="self_influence: model_id 0 is not finalised"):
        traker.self_influence()
    with pytest.raises(NotReadyError, match=r"received model_ids \[3\]"):
        traker.self_influence([3])
