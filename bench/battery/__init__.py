"""Small problems whose truth is known: data, models, and many of them trained on random halves.

``PROBLEMS[name]()`` makes one; nothing is downloaded. ``training`` trains its checkpoints and the
models that show what the targets' outputs become without half of the samples, and keeps them. What
is a held-out problem is for judging a rule, never for choosing one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench.battery import captions, images, photographs, tables, texts
from bench.battery.problem import Problem

PROBLEMS: dict[str, Callable[..., Problem]] = {
    "digits": images.digits,
    "breast_cancer": tables.breast_cancer,
    "mnist": images.mnist,
    "mnist_mlp": images.mnist_mlp,
    "wine": tables.wine,
    "unequal": tables.unequal,
    "diabetes": tables.diabetes,
    "auto_mpg": tables.auto_mpg,
    "digits_wrong10": partial(images.digits_wrong, 10),
    "digits_wrong20": partial(images.digits_wrong, 20),
    "digits_wrong40": partial(images.digits_wrong, 40),
    "digits_half": images.digits_half,
    "digits_over": images.digits_over,
    "blocks": images.blocks,
    "glyphs": images.glyphs,
    "textures": images.textures,
    "portrait": photographs.portrait,
    "regions": photographs.regions,
    "modules": texts.modules,
    "docstring_words": texts.docstring_words,
    "docstring_gaps": texts.docstring_gaps,
    "docstring_masks": texts.docstring_masks,
    "source_tags": texts.source_tags,
    "captions": captions.captions,
    "sides": photographs.sides,
    "zones": texts.zones,
    "photos": photographs.photos,
    "neighbours": photographs.neighbours,
    "pixels": photographs.pixels,
    "shapes": images.shapes,
    "manual_words": texts.manual_words,
    "manual_gaps": texts.manual_gaps,
    "manual_masks": texts.manual_masks,
    "numpy_words": texts.numpy_words,
}
