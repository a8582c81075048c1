"""What all features of a ``save_dir`` share, and what is said where a run differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

ABSENT = {"curvature": "trak", "size_power": 0.0}  # what metadata that lack a key mean
OWN_PROJECTOR = "fastproj.projector.Projector"
MATRIX_ARGUMENTS = ("kind", "block", "proj_dim", "factored")
# Settings of tasks that their text doesn't name, for older stores lack them.
UNSAID = {"likelihood": None, "multilabel": False, "likelihood_temperature": 1.0}


def difference(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """In what a run differs from what is stored, and how it can go on; "" if in nothing."""
    stored, wanted = {**ABSENT, **stored}, {**ABSENT, **wanted}
    wrong = [key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key)]
    if not wrong:
        return ""
    values = [
        f"{key.replace('_', ' ')} {stored.get(key)!r} in the directory, "
        f"{wanted.get(key)!r} in this run"
        for key in wrong
    ]
    return (
        f"{'; '.join(values)}. Nothing was changed; use {same_settings(stored, wrong)}, or another "
        "save_dir"
    )


def same_settings(stored: Mapping[str, Any], wrong: Collection[str]) -> str:
    """How a run can go on with a directory that differs from it in ``wrong``, for messages.

    Where the matrix or the scale of gradients is another, these are arguments of TRAKer.
    """
    if set(wrong) == {"task"}:
        unsaid = ", ".join(f"{key}={value}" for key, value in UNSAID.items())
        return f"the same task and settings (those that the text doesn't name: {unsaid})"
    if set(wrong) == {"size_power"}:
        return f"curvature=fastproj.trak.Fisher(size_power={stored.get('size_power')!r})"
    if stored.get("projector") != OWN_PROJECTOR or not set(wrong) & set(MATRIX_ARGUMENTS):
        return "the same settings"
    named = set(wrong)
    if named & {"kind", "block"}:
        named |= {"kind", "block"}  # a dense kind takes no block, and sjlt another by default
    words = [f"{key}={stored.get(key)!r}" for key in MATRIX_ARGUMENTS if key in named]
    return f"the same settings ({', '.join(words)})"


def describe_task(task: Any) -> str:
    """The text stored beside features: a task's class, and the settings of a task of ours."""
    name = type(task).__name__
    if not type(task).__module__.startswith("fastproj."):
        return name  # what attributes of others mean, and when they change, is not known
    settings = {
        key: getattr(value, "__name__", type(value).__name__) if callable(value) else value
        for key, value in vars(task).items()
        if not key.startswith("_") and (key, value) not in UNSAID.items()
    }
    return f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"
