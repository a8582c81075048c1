"""A recipe: how a model is trained on some of the training samples, and what it then outputs.

    train(indices, seed) -> model     indices: int64 [s], ascending, which samples to train on
    outputs(model) -> [m]             the model's output f on each target

A recipe is a Python file (``recipe.py``), a module on the path (``package.module``), something in
either (``recipe.py:digits``), or the object itself: a module, an object with these two methods, a
class that makes one without arguments, or a function ``train`` that returns the outputs itself.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastproj.trak.files import Indices

FUNCTIONS = "train(indices, seed) -> model and outputs(model) -> [m]"


class RecipeError(ValueError):
    """What was given is no recipe."""


@dataclass(frozen=True)
class Recipe:
    """The two functions; without ``outputs``, ``train`` returns the outputs itself."""

    train: Callable[[Indices, int], Any]
    outputs: Callable[[Any], Any] | None

    def run(self, indices: Indices, seed: int) -> npt.NDArray[np.float64]:
        """Train on ``indices`` and return the outputs, float64 [m].

        The generators of ``random``, NumPy and torch start from ``seed``, so that a recipe which
        draws from them gives the same model in any process and order.

        Raises
        ------
        ValueError
            For outputs that are not finite numbers in one dimension; and whatever the recipe does.
        """
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        made = self.train(indices, seed)
        found = made if self.outputs is None else self.outputs(made)
        try:
            given = torch.as_tensor(found, device="cpu").detach()
            if given.is_complex():
                raise TypeError("complex numbers")
            values = given.to(torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"the recipe returned outputs of type {type(found).__name__}; expected numbers [m]"
            ) from error
        if values.dim() != 1 or not len(values):
            raise ValueError(
                f"the recipe returned outputs {list(values.shape)}; expected [m], one for each "
                "target"
            )
        if not values.isfinite().all():
            bad = int((~values.isfinite()).nonzero()[0, 0])
            raise ValueError(
                f"the recipe returned the output {values[bad]} for target {bad}; expected finite "
                "numbers (did the training diverge?)"
            )
        return values.numpy()


def load_recipe(reference: Any) -> Recipe:
    """The recipe that ``reference`` (see the module) stands for; runs its file or imports it."""
    if not isinstance(reference, str | os.PathLike):
        return as_recipe(reference, getattr(reference, "__name__", type(reference).__name__))
    path, name, attribute = split_reference(os.fspath(reference))
    if path is None:
        found: Any = import_module(name)
    else:
        sys.path.insert(0, str(path.parent.resolve()))  # as for a script: files beside it import
        spec = importlib.util.spec_from_file_location("fastproj_recipe", path)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules["fastproj_recipe"] = found  # dataclasses and pickle look a module up
        spec.loader.exec_module(found)
    if attribute:
        if not hasattr(found, attribute):
            raise RecipeError(f"recipe {name}: has no {attribute!r}; expected one with {FUNCTIONS}")
        found = getattr(found, attribute)
    return as_recipe(found, str(reference))


def split_reference(text: str) -> tuple[Path | None, str, str]:
    """(path or None for a module, name, attribute or "") of a reference as text."""
    name, _, attribute = (text, "", "") if Path(text).is_file() else text.rpartition(":")
    if not name:
        name, attribute = attribute, ""
    if name.endswith(".py") or os.sep in name:
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"recipe {text}: there is no file {path}")
        if path.suffix != ".py":
            raise RecipeError(f"recipe {text}: expected a Python file (.py) or a module's name")
        return path, name, attribute
    return None, name, attribute


def import_module(name: str) -> Any:
    """Import a module, also from the current directory, as ``python -m`` does."""
    find_source(name)
    return importlib.import_module(name)


def find_source(name: str) -> Path:
    """The source file of a module; raises RecipeError where there is none."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise RecipeError(f"recipe {name}: can't be imported ({error})") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise RecipeError(
            f"recipe {name}: there is no such module; expected a Python file (recipe.py), "
            "package.module, or either with :name"
        )
    return Path(spec.origin)


def as_recipe(found: Any, name: str) -> Recipe:
    """The functions of a module, object, class or function."""
    if inspect.isclass(found):
        found = found()
    train, outputs = getattr(found, "train", None), getattr(found, "outputs", None)
    if train is None and callable(found):
        train = found
    if not callable(train) or not (outputs is None or callable(outputs)):
        raise RecipeError(f"recipe {name}: has no train and outputs; expected {FUNCTIONS}")
    return Recipe(train, outputs)


def recipe_identity(reference: Any) -> str:
    """Name and hash of a recipe's source, without running it; another source, another result."""
    if isinstance(reference, str | os.PathLike):
        path, name, attribute = split_reference(os.fspath(reference))
        source = (path or find_source(name)).read_bytes()
        name = path.name if path else name
        return f"{name}{':' if attribute else ''}{attribute} {digest(source)}"
    if isinstance(reference, functools.partial):
        given = digest(repr((reference.args, sorted(reference.keywords.items()))).encode())
        return f"{recipe_identity(reference.func)} {given}"
    thing = reference if hasattr(reference, "__name__") else type(reference)
    try:
        source = source_of(thing).encode()
    except (OSError, TypeError) as error:
        raise RecipeError(
            f"recipe {thing!r}: its source can't be read ({error}), so that a change in it would "
            "go unseen; expected a function or class from a file, or the path of a file"
        ) from error
    return f"{thing.__name__} {digest(source)}"


def source_of(thing: Any) -> str:
    """The source of a function, a module or a class; raises OSError or TypeError without any.

    Python finds no source of a class that was defined in a notebook, only that of its methods. Its
    attributes are then added.
    """
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        if not inspect.isclass(thing):
            raise
    parts = {name: inspect.unwrap(part) for name, part in vars(thing).items()}
    parts = {name: getattr(part, "__func__", part) for name, part in parts.items()}
    methods = [part for part in parts.values() if inspect.isfunction(part)]
    if not methods:
        raise OSError("a class without file and methods")
    others = sorted((name, repr(part)) for name, part in parts.items() if name[:2] != "__")
    attributes = [pair for pair in others if not inspect.isfunction(parts[pair[0]])]
    return "".join(map(inspect.getsource, methods)) + str(attributes)


def file_identity(path: Path) -> str:
    """Name and hash of a file that results depend on."""
    h = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                h.update(block)
    except OSError as error:
        raise RecipeError(f"can't read {path} ({error.strerror or error})") from error
    return f"{path.name} {h.hexdigest()[:16]}"


def digest(data: bytes) -> str:
    """64 bits of a hash, in hex."""
    return hashlib.blake2b(data).hexdigest()[:16]
