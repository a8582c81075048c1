"""Per-sample gradients of a task's output, d f(z_i; theta) / d theta, and their projections."""

from __future__ import annotations

from fastproj.trak.gradients.base import AbstractGradientComputer, parameter_names
from fastproj.trak.gradients.choice import AutomaticGradientComputer, resolve_gradient_computer
from fastproj.trak.gradients.functional import FunctionalGradientComputer
from fastproj.trak.gradients.hooks import HookGradientComputer, HooksError
from fastproj.trak.gradients.layout import FuncError
from fastproj.trak.gradients.loop import IterativeGradientComputer
from fastproj.trak.gradients.modules import project_modules
from fastproj.trak.gradients.sinks import modules_of

__all__ = [
    "AbstractGradientComputer",
    "AutomaticGradientComputer",
    "FuncError",
    "FunctionalGradientComputer",
    "HookGradientComputer",
    "HooksError",
    "IterativeGradientComputer",
    "modules_of",
    "parameter_names",
    "project_modules",
    "resolve_gradient_computer",
]
