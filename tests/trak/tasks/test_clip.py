"""CLIP: its simulated batch, and which models and batches it takes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from fastproj.trak import CLIPModelOutput, TRAKer, batches
from fastproj.trak.tasks.clip import embed
from tests.trak import modules
from tests.trak.model_zoo import make

N = 5
IMAGES = torch.zeros(2, 3, 4, 4)
IDS = torch.tensor([[4, 5, 6], [4, 7, 8]])
PARTS = ("pixel_values", "input_ids", "attention_mask")


def prepared(batch):
    return batches.prepare("test", batch, torch.device("cpu"))[0]


def test_embeddings_belong_to_a_checkpoint():
    model, task, data = make("clip")
    batch = prepared(data(N))
    first = task.outputs(model, {}, {}, batch)
    state = {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        model.text_projection.weight.add_(0.1)
    with pytest.raises(ValueError, match="belong to this checkpoint; call"):
        task.outputs(model, {}, {}, batch)
    task.get_embeddings(model, [data(8), data(9)], batch_size=8, embedding_dim=8, size=16)
    assert not torch.equal(task.outputs(model, {}, {}, batch), first)
    model.load_state_dict(state)  # the first again: remembered
    torch.testing.assert_close(task.outputs(model, {}, {}, batch), first)


@modules.of(drop=lambda: nn.Dropout(0.5), unused=lambda: nn.Parameter(torch.zeros(1)))
def Dropping(self, image, text):
    return self.drop(image), self.drop(text), 1.0


@pytest.mark.parametrize("training", [False, True])
def test_embeddings_are_of_pairs_chosen_by_the_seed_without_dropout(training):
    model = Dropping().train(training)
    pairs = torch.arange(1.0, 11.0).unsqueeze(1)  # of number i: images i, texts -i
    chosen = []
    for seed in (0, 1, 0):
        task = CLIPModelOutput(simulated_batch_size=5, seed=seed)
        task.get_embeddings(model, [(part, -part) for part in pairs.split(4)], size=9)
        assert model.training == training
        found = task._embeddings(model)
        torch.testing.assert_close(found.texts, -found.images)
        chosen.append(found.images.flatten().tolist())
        assert len(set(chosen[-1])) == 5
        assert set(chosen[-1]) <= set(range(1, 10))
    assert chosen[0] == chosen[2] != chosen[1]


def test_the_likelihood_is_no_function_of_the_scale():
    """A gradient by it would take another run of the whole model."""
    model, task, data = make("clip")
    batch = prepared(data(N))
    noise = torch.full((N, 1, 2, 3), 0.5)
    made = task.likelihood_terms(model, {}, {}, batch, noise)
    for out in (made.output, made.drawn):
        (slope,) = torch.autograd.grad(
            out.sum(), [model.logit_scale], allow_unused=True, retain_graph=True
        )
        assert slope is None


def test_another_simulated_batch_in_one_checkpoint_is_said(tmp_path):
    model, _, data = make("clip")
    batch, state = data(N), {key: t.clone() for key, t in model.state_dict().items()}

    def run(pairs, starts, exp_name=None):
        task = CLIPModelOutput(simulated_batch_size=10)
        traker = TRAKer(model, task, 3 * N, tmp_path, proj_dim=16, logging_level="ERROR")
        if exp_name is None:
            traker.load_checkpoint(state, 0)
            take = traker.featurize
        else:
            traker.finalize_features()
            traker.start_scoring_checkpoint(exp_name, state, 0, 3 * N)
            take = traker.score
        task.get_embeddings(traker.model, pairs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for start in starts:
                take(batch, inds=range(start, start + N))
        return [str(w.message) for w in said if "simulated batch" in str(w.message)]

    pairs, others = [data(8), data(9)], [data(9), data(8)]
    assert not run(pairs, [0])
    assert not run(others, [0])  # nothing is new: nothing is mixed
    (said,) = run(others, [N, 2 * N])
    assert said.startswith("featurize: get_embeddings took other pairs")
    assert not run(pairs, [0], "one")
    assert not run(others, [0], "two")
    (said,) = run(others, [N, 2 * N], "one")
    assert "than when the first features of 'one' were made" in said
    assert not run(others, [N, 2 * N], "two")


def test_a_subclass_may_do_without_a_simulated_batch():
    class Alone(CLIPModelOutput):
        def outputs(self, model, weights, buffers, batch):
            return embed(model, weights, buffers, batch)[0].sum(1)

    assert Alone().simulated_pairs(make("clip").model) is None


def test_without_embeddings_it_says_what_to_call():
    model, _, data = make("clip")
    task = CLIPModelOutput()
    with pytest.raises(ValueError, match="no embeddings of the simulated batch are there; call"):
        task.get_out_to_loss_grad(model, {}, {}, prepared(data(2)))


def of_clip(forward):
    """A model around the one of ``make("clip")``, with this forward."""
    return modules.of(clip=lambda: make("clip", torch.float64).model)(forward)


@of_clip
def OpenClip(self, image=None, text=None):
    output = self.clip(pixel_values=image, input_ids=text)
    return output.image_embeds, output.text_embeds, self.clip.logit_scale.exp()


@of_clip
def OpenClipOfDicts(self, image=None, text=None):
    names = ("image_features", "text_features", "logit_scale")
    return dict(zip(names, OpenClip.forward(self, image, text), strict=True))


@of_clip
def OwnNames(self, pictures, captions, scale=True):
    return OpenClip.forward(self, pictures, captions)


@of_clip
def Anything(self, **inputs):
    return self.clip(**inputs)


@of_clip
def NoScale(self, image, text):
    return OpenClip.forward(self, image, text)[:2]


@of_clip
def NoScaleOfDicts(self, image, text):
    return {k: t for k, t in OpenClipOfDicts.forward(self, image, text).items() if "scale" not in k}


@of_clip
def HalfAsNamed(self, image, caption):
    return OpenClip.forward(self, image, caption)


@of_clip
def OfOneModality(self, pixel_values, input_ids):
    return self.clip.vision_model(pixel_values)


@of_clip
def Similarities(self, pixel_values, input_ids):
    return self.clip(pixel_values=pixel_values, input_ids=input_ids).logits_per_image


def given(batch, names):
    """A dict with these names, or as many parts as the number says."""
    parts = [batch[name] for name in PARTS]
    return tuple(parts[:names]) if isinstance(names, int) else dict(zip(names, parts, strict=False))


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (OpenClip, 2),
        (OpenClip, ("image", "text")),
        (OpenClipOfDicts, 2),
        (OwnNames, ("pictures", "captions")),
        (HalfAsNamed, ("image", "caption")),
        (Anything, 2),
        (Anything, PARTS[:2]),
        (NoScale, 2),
        (NoScaleOfDicts, 2),
    ],
)
def test_the_same_pairs_with_other_models(kind, names):
    model, task, data = make("clip", torch.float64)
    opened, other = kind().eval(), CLIPModelOutput(simulated_batch_size=10)
    other.get_embeddings(opened, [given(data(8), names), given(data(9), names)])
    task.get_embeddings(model, [given(data(8), 2), given(data(9), 2)])
    for function in ("outputs", "get_out_to_loss_grad"):
        torch.testing.assert_close(
            getattr(other, function)(opened, {}, {}, prepared(given(data(N), names))),
            getattr(task, function)(model, {}, {}, prepared(given(data(N), 2))),
        )


@pytest.mark.parametrize("kind", [Anything, NoScale, NoScaleOfDicts])
@pytest.mark.parametrize("scales", [0, 2])
def test_a_scale_that_is_not_found_must_be_given(kind, scales):
    model, _, data = make("clip", torch.float64)
    opened = kind().eval()
    scale = opened.clip.logit_scale.detach()
    if scales == 0:  # of the model's own, which is a constant now
        del opened.clip.logit_scale
        opened.clip.logit_scale = scale
    else:
        opened.logit_scale = torch.nn.Parameter(scale + 1)
    batch = given(data(N), 2)
    with pytest.raises(
        ValueError, match=r"without a logit scale; .* CLIPModelOutput\(temperature="
    ):
        CLIPModelOutput().get_embeddings(opened, [batch])
    told = CLIPModelOutput(temperature=float(scale.exp()), simulated_batch_size=10)
    own = CLIPModelOutput(simulated_batch_size=10)
    told.get_embeddings(opened, [batch])
    own.get_embeddings(model, [batch])
    for function in ("outputs", "get_out_to_loss_grad"):
        torch.testing.assert_close(
            getattr(told, function)(opened, {}, {}, prepared(batch)),
            getattr(own, function)(model, {}, {}, prepared(batch)),
        )


BY_NAME = "or a batch that is a dict by the forward's own names$"


@pytest.mark.parametrize(
    ("kind", "names", "said"),
    [
        (OwnNames, 2, rf"2 parts \(\[3, 3, 8, 8\] .* takes pictures, captions, scale .*{BY_NAME}"),
        (OwnNames, PARTS[:2], "dict of pixel_values, input_ids.* takes pictures, captions, scale"),
        (OwnNames, ("pictures", "text"), rf"dict of pictures, text\).* takes pictures.*{BY_NAME}"),
        (HalfAsNamed, 2, "takes image, caption .*; expected one that takes image and text, or pix"),
        (OpenClip, 3, "3 parts .* takes image, text .*'attention_mask'.*, and attention_mask"),
        (OfOneModality, 2, "returned dict of last_hidden_state, .*; expected image_embeds and"),
        (Similarities, 2, r"returned \[3, 3\] float64 on cpu; expected image_embeds"),
    ],
)
def test_other_models_and_batches_are_named(kind, names, said):
    _, _, data = make("clip", torch.float64)
    with pytest.raises((TypeError, ValueError), match=said):
        CLIPModelOutput().get_embeddings(kind(), [given(data(3), names)])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (IDS, "received attention_mask with the value 4 at row 0 .*; expected 1 for a token and 0"),
        (torch.tensor([[1, 1, 1], [1, 1, 0.5]]), "with the value 0.5 at row 1 "),
        (torch.tensor([[1, 1, 0], [0, 0, 0]]), "attention_mask without a 1 at row 1 of the batch"),
        (torch.tensor([[0, 0, 0], [1, 1, 0]]).bool(), "at row 0 .*; expected a text of at least"),
    ],
)
def test_masks_hide_padding_alone(mask, said):
    task = CLIPModelOutput()
    for batch in ((IMAGES, IDS, mask), (dict(zip(PARTS, (IMAGES, IDS, mask), strict=True)),)):
        with pytest.raises(ValueError, match=f"clip: .*{said}") as error:
            task.check_batch(batch)
        assert "label" not in str(error.value)  # a pair has none
    right = torch.tensor([[1, 1, 0], [1, 1, 1]]).to(mask.dtype)
    task.check_batch((IMAGES, IDS, right))
    task.check_batch((IMAGES, IDS))


def test_a_mask_of_pairs_of_tokens_is_added_to_the_logits_of_attention():
    hidden = torch.triu(torch.full((3, 3), -torch.inf), 1).expand(2, 1, 3, 3)
    CLIPModelOutput().check_batch((IMAGES, IDS, hidden))
