"""Contrastive learning of images and texts (CLIP): (images, texts)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj.trak import batches
from fastproj.trak.files import Indices, digest
from fastproj.trak.fingerprints import model_digest
from fastproj.trak.tasks.base import (
    Batch,
    BatchedModelOutput,
    Params,
    Terms,
    call,
    check_masks,
    check_temperature,
    describe_parts,
)
from fastproj.trak.tasks.language import base_of
from fastproj.trak.tasks.likelihood import prediction_terms

logger = logging.getLogger("fastproj.trak")

NAME = "clip"
OPEN_CLIP, HUGGING_FACE = ("image", "text"), ("pixel_values", "input_ids")
MASK = "attention_mask"
SCALE = "logit_scale"


@dataclass(frozen=True)
class Embeddings:
    """The simulated batch under one checkpoint: embeddings [S, d] of images and of their texts.

    pairs : a hash of what they are embeddings of.
    """

    images: Tensor
    texts: Tensor
    pairs: str


class CLIPModelOutput(BatchedModelOutput):
    """The contrastive output function of CLIP against a simulated batch.

    With image embedding u, text embedding v and S other pairs (u_j, v_j) of the training set,

        f(z; theta) = -log sum_j exp(-u . (v - v_j)) - log sum_j exp(-v . (u - u_j))

    (arXiv 2303.14186, section 5.1): the log-odds of the right text for the image plus those of the
    right image for the text. ``Q = 1 - (p_text + p_image) / 2``, where the two probabilities are
    softmaxes over the right one and the S others, of similarities times the logit scale.

    The others are constants: call ``traker.task.get_embeddings(model, loader, ...)`` after each
    ``load_checkpoint`` of a new checkpoint, before ``featurize``. They are remembered by
    checkpoint, so scoring needs no second call, and features don't depend on how the data are
    batched. (trak draws other pairs for each sample anew, and takes Q from the current batch.)

    A batch is (images, texts), (pixel_values, input_ids, attention_mask), or a dict of the model's
    keyword arguments. The model is a Hugging Face CLIPModel (it returns ``image_embeds`` and
    ``text_embeds``) or one of open_clip (it takes ``image`` and ``text`` and returns a tuple or
    dict of image features, text features, scale). One whose arguments have other names takes dicts.
    A model that neither returns a scale nor has one parameter or buffer ``logit_scale`` (its log)
    needs ``temperature``.

    Parameters
    ----------
    temperature : multiplies the similarities inside the softmax of Q, as in trak; None is the
        model's own logit scale (exp(logit_scale)).
    simulated_batch_size : S.
    seed : of the choice of S pairs among those of the loader.
    likelihood_temperature : divides the similarities times the scale in the likelihood of
        curvature "fisher"; 1 is the likelihood that CLIP is trained by. None is the root of the
        scale: what is left is the geometric mean of the loss's scale and of f's, which is 1.
    """

    model_holds_weights = False  # embeddings are found by the model's own parameters

    knows_likelihood = True

    def __init__(
        self,
        temperature: float | None = None,
        simulated_batch_size: int = 300,
        seed: int = 0,
        likelihood_temperature: float | None = None,
    ) -> None:
        name = type(self).__name__
        if temperature is not None:
            temperature = check_temperature(name, temperature)
        if likelihood_temperature is not None:
            likelihood_temperature = check_temperature(
                name, likelihood_temperature, "likelihood_temperature"
            )
        if simulated_batch_size < 1:
            raise ValueError(
                f"{name}: received simulated_batch_size={simulated_batch_size}; expected >= 1"
            )
        self.temperature = temperature
        self.simulated_batch_size = simulated_batch_size
        self.seed = seed
        self.likelihood_temperature = likelihood_temperature
        self._by_checkpoint: dict[str, Embeddings] = {}
        self._current: tuple[tuple[int, ...], Embeddings] | None = None

    def get_embeddings(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        batch_size: int | None = None,
        embedding_dim: int | None = None,
        size: int = 50_000,
        preprocess_fn_img: Callable[[Tensor], Tensor] | None = None,
        preprocess_fn_txt: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Embed the simulated batch with the model as it is now.

        Parameters
        ----------
        model : the model, with the checkpoint loaded that will be featurized or scored with.
        loader : batches of the training set, in a fixed order, as ``featurize`` takes them.
        batch_size, embedding_dim : accepted for trak's sake; both are read off the data.
        size : how many pairs to embed at most; ``simulated_batch_size`` of them are kept.
        preprocess_fn_img, preprocess_fn_txt : applied to images and texts of (images, texts).
        """
        device = next(model.parameters()).device
        contents: list[Indices] = []
        image_parts: list[Tensor] = []
        text_parts: list[Tensor] = []
        count = 0
        training = model.training
        model.eval()
        try:
            for batch in loader:
                if count >= size:
                    break
                if not isinstance(batch, Mapping) and len(batch) == 2:
                    images, texts = batch
                    batch = (
                        preprocess_fn_img(images) if preprocess_fn_img else images,
                        preprocess_fn_txt(texts) if preprocess_fn_txt else texts,
                    )
                prepared, found = batches.prepare("get_embeddings", batch, device)
                self.check_batch(prepared)
                with torch.no_grad():
                    u, v, scale = embed(model, {}, {}, prepared)
                self._scale(scale)
                image_parts.append(u[: size - count])
                text_parts.append(v[: size - count])
                contents.append(batches.content_ids(prepared, found)[: size - count])
                count += found
        finally:
            model.train(training)
        if not image_parts:
            raise ValueError("get_embeddings: received a loader without batches; expected pairs")
        all_images, all_texts = torch.cat(image_parts), torch.cat(text_parts)
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(all_images), generator=generator, device="cpu")
        if len(order) < self.simulated_batch_size:
            logger.warning(
                "get_embeddings: %d pairs for simulated_batch_size %d; all of them are used",
                len(order),
                self.simulated_batch_size,
            )
        chosen = order[: self.simulated_batch_size].sort().values
        pairs = digest(np.concatenate(contents)[chosen.numpy()].tobytes())
        chosen = chosen.to(device)
        found_embeddings = Embeddings(all_images[chosen].clone(), all_texts[chosen].clone(), pairs)
        self._by_checkpoint[model_digest(model)] = found_embeddings
        self._current = None

    def simulated_pairs(self, model: nn.Module) -> str | None:
        """A hash of the pairs that outputs depend on, under the checkpoint that the model holds.

        None before the first ``get_embeddings``: a subclass may do without.
        """
        return self._embeddings(model).pairs if self._by_checkpoint else None

    def check_batch(self, batch: Batch) -> None:
        """Two or three tensors, or a dict; a mask hides padding alone."""
        is_dict = len(batch) == 1 and isinstance(batch[0], Mapping) and len(batch[0]) >= 2
        is_tuple = len(batch) in (2, 3) and all(isinstance(part, Tensor) for part in batch)
        if not is_dict and not is_tuple:
            raise ValueError(
                f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}); "
                "expected (images, texts), (pixel_values, input_ids, attention_mask), or a dict of "
                "the model's keyword arguments"
            )
        mask = batch[0].get(MASK) if is_dict else batch[2] if len(batch) == 3 else None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        least = "a text of at least one token, or a batch without this pair"
        check_masks(NAME, {MASK: mask}, cure="", least=least)

    def outputs(self, model: Any, weights: Params, buffers: Params, batch: Batch) -> Tensor:
        """f of each pair against the simulated batch, [B]."""
        others = self._embeddings(model)
        u, v, _ = embed(model, weights, buffers, batch)
        own = (u * v).sum(1, keepdim=True)  # [B, 1]
        return -(u @ others.texts.T - own).logsumexp(1) - (v @ others.images.T - own).logsumexp(1)

    def get_out_to_loss_grad(
        self, model: Any, weights: Params, buffers: Params, batch: Batch
    ) -> Tensor:
        """1 - (p_text + p_image) / 2 of each pair, [B]."""
        others = self._embeddings(model)
        with torch.no_grad():
            u, v, scale = embed(model, weights, buffers, batch)
            scale = self._scale(scale)
            own = (u * v).sum(1, keepdim=True)  # [B, 1]
            to_texts = scale * (u @ others.texts.T - own)  # [B, S]
            to_images = scale * (v @ others.images.T - own)
            return (
                torch.sigmoid(to_texts.logsumexp(1)) + torch.sigmoid(to_images.logsumexp(1))
            ) / 2

    def num_predictions(self, batch: Batch) -> int:
        """Two: the text of the image, and the image of the text."""
        return 2

    def likelihood_terms(
        self, model: Any, weights: Params, buffers: Params, batch: Batch, noise: Tensor
    ) -> Terms:
        """Those of both predictions, at half weight each, as in the loss that CLIP is trained by.

        But softer: at CLIP's own scale a few other pairs, the hardest of this simulated batch, make
        all of the gradient, and pairs that are told apart have none. The network that is asked
        about was trained on other batches, and on fewer pairs ("Softer likelihoods", lambda.md).

        The classes are the right partner and those of the simulated batch. The scale is a constant:
        f doesn't depend on it, and scores were no better with its gradient (bench.lds, captions).
        That gradient would take another run of the whole model where the scale belongs to no module
        below it.

        Values along rows are 0, so that lambda is what it is where a fit says nothing. The network
        was fitted to tell apart the pairs of its batches, not those of the simulated batch, and its
        logits are bounded: on captions the fit gave a lambda 8 times the best (lambda.md).
        """
        others = self._embeddings(model)
        u, v, scale = embed(model, weights, buffers, batch)
        scale = self._scale(scale)
        scale = scale.detach() if isinstance(scale, Tensor) else scale
        own_temperature = self.likelihood_temperature
        scale = scale**0.5 if own_temperature is None else scale / own_temperature
        own = (u * v).sum(1, keepdim=True)  # [B, 1]
        to_texts = torch.cat([own, u @ others.texts.T], 1)  # [B, 1 + S]
        to_images = torch.cat([own, v @ others.images.T], 1)
        logits = scale * torch.stack([to_texts, to_images], 1)  # [B, 2, 1 + S]
        right = torch.zeros_like(logits[..., 0], dtype=torch.long)
        terms = prediction_terms(logits, right, torch.full_like(logits[..., 0], 0.5), noise)
        drawn = terms.drawn - terms.drawn.detach()
        return terms._replace(along=torch.zeros_like(terms.along), drawn=drawn)

    def _scale(self, found: Tensor | float | None) -> Tensor | float:
        """What multiplies the similarities, where the model's own scale is ``found``."""
        if self.temperature is not None:
            return self.temperature
        if found is None:
            raise ValueError(
                f"{NAME}: received a model without a logit scale; expected one that returns it or "
                f"has one parameter or buffer {SCALE}, or CLIPModelOutput(temperature=...) with "
                "what multiplies its similarities in training"
            )
        return found

    def _embeddings(self, model: nn.Module) -> Embeddings:
        """The simulated batch of the checkpoint that the model holds now."""
        versions = tuple(x for p in model.parameters() for x in (id(p), p._version))
        if self._current is None or self._current[0] != versions:
            found = self._by_checkpoint.get(model_digest(model))
            if found is None:
                raise ValueError(
                    f"{NAME}: no embeddings of the simulated batch "
                    f"{'are there' if not self._by_checkpoint else 'belong to this checkpoint'}; "
                    "call traker.task.get_embeddings(model, loader) after load_checkpoint and "
                    "before featurize"
                )
            self._current = versions, found
        return self._current[1]


def embed(
    model: Any, weights: Params, buffers: Params, batch: Batch
) -> tuple[Tensor, Tensor, Tensor | float | None]:
    """Image embeddings [B, d], text embeddings [B, d] and the logit scale, None if there is none.

    Where the model returns no scale, it is the exponential of its ``logit_scale``.
    """
    output = call(model, weights, buffers, **by_name(model, batch))
    if hasattr(output, "image_embeds"):
        return output.image_embeds, output.text_embeds, own_scale(model, weights, buffers)
    if isinstance(output, Mapping) and {"image_features", "text_features"} <= output.keys():
        scale = output[SCALE] if SCALE in output else own_scale(model, weights, buffers)
        return output["image_features"], output["text_features"], scale
    if not isinstance(output, (tuple, list)) or len(output) < 2:
        raise TypeError(
            f"{NAME}: the model returned {describe_parts((output,))}; expected image_embeds and "
            "text_embeds (Hugging Face), a dict with image_features and text_features, or a tuple "
            "of image features, text features, scale"
        )
    scale = output[2] if len(output) > 2 else own_scale(model, weights, buffers)
    return output[0], output[1], scale


def own_scale(model: nn.Module, weights: Params, buffers: Params) -> Tensor | None:
    """exp of the only parameter or buffer ``logit_scale`` of a model and all below it, if any."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    named = [name for name in tensors if name.rpartition(".")[2] == SCALE]
    if len(named) != 1:
        return None
    (name,) = named
    return weights.get(name, buffers.get(name, tensors[name])).exp()


def by_name(model: Any, batch: Batch) -> dict[str, Any]:
    """A batch as keyword arguments of the model. Raises ValueError where they are not its own."""
    taken = inspect.signature(base_of(model).forward)
    if isinstance(batch[0], Mapping):
        inputs = dict(batch[0])
    else:
        images, texts = OPEN_CLIP if OPEN_CLIP[0] in taken.parameters else HUGGING_FACE
        inputs = dict(zip((images, texts, MASK), batch, strict=False))
    try:
        taken.bind(**inputs)
    except TypeError as error:
        raise ValueError(
            f"{NAME}: received a batch of {len(batch)} parts ({describe_parts(batch)}) for a model "
            f"whose forward takes {', '.join(taken.parameters)} ({error}); expected one that takes "
            f"{' and '.join(OPEN_CLIP)}, or {' and '.join(HUGGING_FACE)}, and {MASK} where the "
            "batch has three parts; or a batch that is a dict by the forward's own names"
        ) from None
    return inputs
