"""Numbers, flags and strings that a model's modules hold beside tensors, such as ``bn.eps``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from fastproj.trak.callers import stack_to_caller

PLAIN = (bool, int, float, str)
ELSEWHERE = {"training"}  # looked at by others


class Attributes:
    """The plain attributes of a model, and which of them have changed.

    A checkpoint doesn't hold them, and forwards may write to them (counters, largest lengths), so a
    change is not an error. But features before and after it may be those of different functions.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._own: set[str] = set()  # written by the model's forward
        self.renew()

    def renew(self) -> None:
        """Take those that the model has now for unchanged."""
        self._seen = [
            (path, vars(module), plain_attributes(module))
            for path, module in self.model.named_modules()
        ]

    def changed(self) -> dict[str, tuple[object, object]]:
        """Name -> the value before and now, of those that the forward doesn't write to."""
        found = {}
        for path, here, before in self._seen:
            for name, value in before.items():
                now = here.get(name, value)
                if now is not value and now != value and value == value:  # NaN is no change
                    found[f"{path}.{name}".lstrip(".")] = value, now
        return {name: values for name, values in found.items() if name not in self._own}

    def settle(self) -> None:
        """The model's forward has run: what has changed was written by it."""
        written = self.changed()
        if written:
            self._own.update(written)
            self.renew()

    def warn_of_changes(self, function: str, run: Callable[[], object]) -> None:
        """Warn where attributes are others than at the last call of the model.

        run : calls the model once, to see which of them it writes to by itself.
        """
        changed = self.changed()
        if not changed:
            return
        self.renew()
        run()
        self.settle()
        others = [name for name in changed if name not in self._own]
        if others:
            name = others[0]
            before, now = changed[name]
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            warnings.warn(
                f"{function}: {name} of the model was {before!r} when the checkpoint was loaded, "
                f"and is {now!r} now{more}; checkpoints don't hold it. If the model computes other "
                "outputs with it, samples before and after this are not comparable: put it back, "
                "or start again with load_from_save_dir=False. If not, nothing is wrong",
                stacklevel=stack_to_caller(),
            )


def plain_attributes(module: nn.Module) -> dict[str, object]:
    """The numbers, flags and strings among a module's public attributes."""
    return {
        name: value
        for name, value in vars(module).items()
        if type(value) in PLAIN and name[0] != "_" and name not in ELSEWHERE
    }
