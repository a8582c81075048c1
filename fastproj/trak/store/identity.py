"""What all features of a ``save_dir`` share, and what is said where a run differs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastproj.trak.draws import settings_of
from fastproj.trak.files import StoreMismatchError

OWN_SCALE = "TRAKer's own"
# What metadata that lack a key mean.
ABSENT = {"curvature": "trak", "size_power": 0.0, "scale": OWN_SCALE}
GIVEN = "given"  # says of a run whether its projector is one of the caller's; not stored
OWN_PROJECTOR = "fastproj.projector.Projector"
# What the matrix follows from: stored names, and the arguments of TRAKer that set them.
MATRIX_ARGUMENTS = {
    "kind": "kind",
    "block": "block",
    "proj_dim": "proj_dim",
    "factored": "factored",
    "seed": "projector_seed",
}
# Settings of tasks that their text names only where they differ from these.
UNSAID = {"likelihood": None, "multilabel": False, "likelihood_temperature": 1.0}


def check_identity(
    save_dir: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], given: bool = False
) -> None:
    """Raise StoreMismatchError where a run differs from what ``save_dir`` holds features of.

    given : whether the run's projector is one of the caller's.
    """
    stored, wanted = {**ABSENT, **stored}, {**ABSENT, **wanted}
    wrong = [key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key)]
    if not wrong:
        return
    values = [
        f"{key.replace('_', ' ')} {stored.get(key)!r} in the directory, "
        f"{wanted.get(key)!r} in this run"
        for key in wrong
    ]
    words, same = same_settings(stored, wrong, given)
    raise StoreMismatchError(
        f"TRAKer: {save_dir} holds features of another run: {'; '.join(values)}",
        f"use {words}, or another save_dir",
        another="save_dir",
        same=same,
    )


def same_settings(
    stored: Mapping[str, Any], wrong: Collection[str], given: bool
) -> tuple[str, dict[str, Any] | None]:
    """How a run can go on with a directory that differs from it in ``wrong``.

    In words, and as ``same`` of StoreMismatchError. Where the matrix or the scale of gradients is
    another, these are arguments of TRAKer.
    """
    if {"format", "spec_version"} & set(wrong):
        return "the version of fastproj that made it", None
    if set(wrong) == {"task"}:
        unsaid = ", ".join(f"{key}={value}" for key, value in UNSAID.items())
        return f"the same task and settings (those that the text doesn't name: {unsaid})", None
    if set(wrong) == {"size_power"}:
        of = f"size_power={stored['size_power']!r}"
        return f"curvature=fastproj.trak.Fisher({of}), with samples= and draws= as here", None
    if set(wrong) <= {"curvature", "size_power"}:
        return same_curvature(stored), None
    named = set(wrong)
    of_ours = stored.get("projector") == OWN_PROJECTOR
    if not (of_ours and named & {"projector", "scale", *MATRIX_ARGUMENTS}):
        return "the same settings", {}
    if stored["scale"] != OWN_SCALE:
        facts = {key: stored.get(key) for key in (*MATRIX_ARGUMENTS, "scale")}
        words = ", ".join(f"{key}={value!r}" for key, value in facts.items())
        return f"a projector with {words}", {}
    if given or "projector" in named:  # beside one that is given, none of these is taken
        named |= {"projector", *MATRIX_ARGUMENTS}
    if named & {"kind", "block"}:
        named |= {"kind", "block"}  # a dense kind takes no block, and sjlt another by default
    same = {name: stored.get(key) for key, name in MATRIX_ARGUMENTS.items() if key in named}
    if "projector" in named:
        same = {"projector": None, **same}
    words = ", ".join(f"{name}={value!r}" for name, value in same.items())
    return f"the same settings ({words})", same


def same_curvature(stored: Mapping[str, Any]) -> str:
    """The arguments of TRAKer that curvature follows from, as a directory has it."""
    if stored["curvature"] == ABSENT["curvature"]:
        return "curvature='trak'"
    found = settings_of(stored)
    if found is None:
        return "the same curvature"
    return f"curvature=fastproj.trak.{found!r}, to whose matrix a lambda_reg is added"


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
