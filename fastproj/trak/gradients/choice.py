"""Which gradient computer: by name, by class, or the first that works."""

from __future__ import annotations

import dis
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastproj.memory import is_out_of_memory
from fastproj.trak.callers import stack_to_caller
from fastproj.trak.gradients.base import AbstractGradientComputer, Grads
from fastproj.trak.gradients.functional import FunctionalGradientComputer
from fastproj.trak.gradients.hooks import HookGradientComputer
from fastproj.trak.gradients.layout import FuncError
from fastproj.trak.gradients.loop import IterativeGradientComputer
from fastproj.trak.gradients.modules import project_modules
from fastproj.trak.inputs import RandomNumbersError
from fastproj.trak.tasks.base import Terms, has_batched_outputs

NAMES: dict[str, type[AbstractGradientComputer]] = {
    "hooks": HookGradientComputer,
    "func": FunctionalGradientComputer,
    "loop": IterativeGradientComputer,
}
# What a line of ours raises only where it is wrong; a model that can't be taken is another kind.
FAULTS = (AssertionError, NameError, AttributeError, LookupError, TypeError, ArithmeticError)


class AutomaticGradientComputer(AbstractGradientComputer):
    """Module hooks; where they fail, ``torch.func``; where that fails, a loop.

    Tasks without batched outputs start at ``torch.func``. A step down costs speed and memory, not
    accuracy. A warning gives its reason. A batch that no computer can take raises the error of the
    last one, and leaves the step as it was.
    """

    _computer: AbstractGradientComputer

    def load_model_params(self, model: nn.Module) -> None:
        """Use the parameters and buffers that ``model`` has now."""
        super().load_model_params(model)
        if not hasattr(self, "_left"):
            batched = has_batched_outputs(self.task)
            self._left = ["hooks", "func", "loop"] if batched else ["func", "loop"]
        if hasattr(self, "_computer"):
            self._computer.load_model_params(model)
        else:
            self._computer = self._make(self._left[0])

    def sibling(self, task: Any) -> AbstractGradientComputer:
        """Such a computer for another task of the same model. The two step down together."""
        made = super().sibling(task)
        assert isinstance(made, AutomaticGradientComputer)
        made._left, made._computer.said = self._left, self.said
        return made

    def _make(self, name: str) -> AbstractGradientComputer:
        computer = NAMES[name](self.model, self.task, self.grad_dim, None, self.device, self.names)
        computer.said = self.said
        return computer

    def _current(self) -> AbstractGradientComputer:
        """The computer of the step that is in use."""
        if type(self._computer) is not NAMES[self._left[0]]:  # a sibling has gone down
            self._computer = self._make(self._left[0])
        return self._computer

    @property
    def name(self) -> str:
        """Which one is in use: "hooks" | "func" | "loop"."""
        return self._left[0]

    def compute_rows(self, batch: tuple[Any, ...]) -> list[Grads]:
        """Of each output of a sample, name -> [B, *shape of the parameter]."""
        rows: list[Grads] = self._first(lambda computer: computer.compute_rows(batch))
        return rows

    def project_rows(self, batch: tuple[Any, ...], projector: Any, model_id: int) -> list[Tensor]:
        """``projector.project`` of the gradients of each output of the samples, [B, proj_dim]."""
        rows: list[Tensor] = self._first(
            lambda computer: computer.project_rows(batch, projector, model_id)
        )
        return rows

    def project_drawn(
        self, batch: tuple[Any, ...], chosen: Tensor, projector: Any, model_id: int
    ) -> tuple[Tensor, list[Tensor]]:
        """The first output of all samples and the others of those that are chosen."""
        found: tuple[Tensor, list[Tensor]] = self._first(
            lambda computer: computer.project_drawn(batch, chosen, projector, model_id)
        )
        return found

    def project_modules(
        self, batch: tuple[Any, ...], projector: Any, model_id: int
    ) -> list[Tensor]:
        """What each of ``modules_of`` the parameters adds to ``project``, [B, proj_dim] each."""
        rows: list[Tensor] = self._first(
            lambda computer: project_modules(computer, batch, projector, model_id)
        )
        return rows

    def compute_terms(self, batch: tuple[Any, ...]) -> Terms:
        """What the computer in use has for them."""
        computer = self._current()
        computer.trusting = self.trusting
        return computer.compute_terms(batch)

    def compute_loss_grad(self, batch: tuple[Any, ...]) -> Tensor:
        """What the computer in use has for it."""
        computer = self._current()
        computer.trusting = self.trusting
        return computer.compute_loss_grad(batch)

    def _first(self, use: Callable[[AbstractGradientComputer], Any]) -> Any:
        """The result of the first computer that has one; later batches start with it."""
        refused: list[tuple[str, Exception]] = []
        for name in list(self._left):
            computer = self._make(name) if refused else self._current()
            computer.trusting, computer.when_disproved = self.trusting, self.when_disproved
            try:
                result = use(computer)
            except Exception as error:
                hopeless = is_out_of_memory(error) or isinstance(error, RandomNumbersError)
                if name == self._left[-1] or hopeless:
                    raise
                refused.append((name, error))
            else:
                break
        self.on_trust = computer.on_trust
        self._computer = computer
        del self._left[: len(refused)]
        for name, reason in refused:
            warnings.warn(step_down(name, self.name, reason), stacklevel=stack_to_caller())
        return result


def step_down(name: str, instead: str, reason: BaseException) -> str:
    """What a user is told where one computer takes the place of another."""
    if isinstance(reason, FuncError):  # whose remedy is taken already
        reason = reason.__cause__ or reason
    first_line = str(reason).strip().partition("\n")[0]
    error = f"{type(reason).__name__}: {first_line[:400]}".removesuffix(": ")
    place = own_fault(reason)
    if place is None:
        return (
            f"TRAKer: gradient_computer {name!r} can't take this model, {instead!r} is used "
            f"instead, which is slower: {error}"
        )
    return (
        f"TRAKer: gradient_computer {name!r} has failed by a fault of fastproj, not of the model: "
        f"{error} ({place}). {instead!r} is used instead, which is slower; its features are right. "
        f"Please report it, with the traceback that gradient_computer={name!r} ends in"
    )


def own_fault(error: BaseException) -> str | None:
    """Where fastproj itself is wrong, "file:line in function"; None for any other error.

    Errors of models and tasks come from frames of theirs or of torch. What fastproj says of them by
    ``raise`` is meant; so is what our tasks trip over, which is what a model has returned.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(error, FAULTS):
        return None
    code = last.tb_frame.f_code
    module = str(last.tb_frame.f_globals.get("__name__"))
    ours = module.startswith("fastproj.") and not module.startswith("fastproj.trak.tasks.")
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    if not ours or (raised and not isinstance(error, AssertionError)):
        return None
    path = f"{module.replace('.', '/')}.py"
    return f"{path}:{last.tb_lineno} in {code.co_name}"


def resolve_gradient_computer(given: Any) -> Any:
    """The class that ``TRAKer(gradient_computer=...)`` names or is; None and "auto" choose."""
    if given is None or given == "auto":
        return AutomaticGradientComputer
    if isinstance(given, str):
        if given not in NAMES:
            raise ValueError(
                f"TRAKer: received gradient_computer={given!r}; expected 'auto', "
                f"{', '.join(map(repr, NAMES))}, or a class"
            )
        return NAMES[given]
    if not callable(given):
        raise TypeError(
            f"TRAKer: received gradient_computer={given!r:.80}; expected 'auto', "
            f"{', '.join(map(repr, NAMES))}, or a class (not an instance)"
        )
    return given
