"""What a provider is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from bench.featurization.workloads import Workload


class Unsupported(Exception):
    """This provider can't take this, or isn't installed; the message says which."""


@dataclass(frozen=True)
class Job:
    """Features that are wanted of training samples.

    count : n, how many samples there will be at most.
    first : a batch of the size that is to come.
    folder : an empty one.
    """

    workload: Workload
    model: nn.Module
    first: dict[str, Tensor]
    count: int
    proj_dim: int
    folder: str


@dataclass(frozen=True)
class Prepared:
    """How to featurize a batch.

    call : featurizes the next batch of training samples.
    warm_up : calls that don't count for the time; at most MOST_WARM_UP.
    dims : numbers that are kept of a sample; 0 where nothing is.
    repeats : timed calls, where those asked for would take too long.
    check : after the calls, what the features of the sample that came last say of its gradient: the
        ratio of squared norms, 1 on average.
    details : for the result file.
    """

    call: Callable[[dict[str, Tensor]], Any]
    dims: int
    warm_up: int = 2
    repeats: int | None = None
    check: Callable[[dict[str, Tensor]], float] | None = None
    details: dict[str, Any] | None = None
