"""Margins, their weights Q, and what the image task refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastproj.trak import AbstractModelOutput, ImageClassificationModelOutput
from fastproj.trak.tasks import margins, resolve_task


def test_margin_is_the_log_odds_of_the_label():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, 3, 4, 2])
    p = logits.softmax(1)[torch.arange(6), labels]
    torch.testing.assert_close(margins(logits, labels), (p / (1 - p)).log())


def test_q_is_one_minus_p_also_where_p_is_almost_one():
    model = nn.Identity()
    logits = torch.tensor([[40.0, 0.0], [0.3, 0.5], [-90.0, 5.0]])
    labels = torch.tensor([0, 1, 0])
    out = ImageClassificationModelOutput().get_out_to_loss_grad(model, {}, {}, (logits, labels))
    exact = 1 / (1 + margins(logits.double(), labels).exp())
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=0)
    assert out[0] > 0  # 1 - softmax would give 0


def test_temperature_divides_the_logits():
    logits, labels = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([0])
    warm = ImageClassificationModelOutput(temperature=2.0)
    out = warm.get_out_to_loss_grad(nn.Identity(), {}, {}, (logits, labels))
    torch.testing.assert_close(out, 1 - (logits / 2).softmax(1)[:, 0])
    with pytest.raises(ValueError, match="temperature=0"):
        ImageClassificationModelOutput(temperature=0)


def test_tasks_are_names_classes_instances_or_lookalikes():
    assert isinstance(resolve_task("image_classification"), ImageClassificationModelOutput)
    assert isinstance(resolve_task(ImageClassificationModelOutput), ImageClassificationModelOutput)

    class Lookalike:
        def get_output(self): ...

        def get_out_to_loss_grad(self): ...

    task = Lookalike()
    assert resolve_task(task) is task


def test_unknown_tasks_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'segmentation'; expected one of image_classification"):
        resolve_task("segmentation")

    class HalfATask:
        def get_output(self): ...

    with pytest.raises(TypeError, match="without get_out_to_loss_grad"):
        resolve_task(HalfATask())
    with pytest.raises(TypeError):
        AbstractModelOutput()


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(3, 4),), "1 parts"),
        ((torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)), "3 parts"),
        ((torch.zeros(3, 4), torch.zeros(3)), r"labels \[3\] float32"),
        ((torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.long)), r"labels \[3, 4\] int64"),
        ((torch.zeros(3, 4), {"y": torch.zeros(3)}), "dict"),
    ],
)
def test_wrong_batches_are_named(batch, message):
    with pytest.raises(ValueError, match=message):
        ImageClassificationModelOutput().check_batch(batch)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"label 3 at row 1 .* classes 0\.\.2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "label -1 at row 0"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), "C >= 2"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 0]), r"\[2, 3, 4\]"),
    ],
)
def test_labels_must_be_classes_of_the_model(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageClassificationModelOutput().get_out_to_loss_grad(
            nn.Identity(), {}, {}, (logits, labels)
        )
