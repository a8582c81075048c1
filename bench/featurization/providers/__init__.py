"""What featurizes: one file for each package.

A provider is a function of a ``Job`` that returns ``Prepared``, or raises ``Unsupported``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.featurization.job import Job, Prepared
from bench.featurization.providers import ours, plain


@dataclass(frozen=True)
class Provider:
    """One line of the table.

    by_dim : whether K matters to it; where not, it is measured once.
    against : the provider of fastproj that it competes with; "" for fastproj's own.
    by_default : whether it is measured where no providers are named.
    """

    label: str
    prepare: Callable[[Job], Prepared]
    by_dim: bool = True
    against: str = ""
    by_default: bool = True


def ours_with(label: str, by_default: bool = True, **options: Any) -> Provider:
    """TRAKer with options."""
    prepare = partial(ours.prepare, **options)
    return Provider(f"fastproj {label}", prepare, by_default=by_default)


def features(label: str, by_default: bool = True, **options: Any) -> Provider:
    """TRAKer with options, for features alone."""
    return ours_with(label, by_default, **ours.FEATURES, **options)


PROVIDERS: dict[str, Provider] = {
    "plain": Provider("forward + backward", plain.prepare, by_dim=False),
    "dense": features("dense (rademacher)", kind="rademacher"),
    "sjlt": features("sjlt"),
    "factored-16": features("factored, r = 16", factored=16),
    "factored-64": features("factored, r = 64", factored=64),
    "factored-128": features("factored, r = 128", factored=128),
    "default": ours_with("as it comes, all drawn for"),
    "func": features("sjlt, torch.func", by_default=False, gradient_computer="func"),
    "loop": features("sjlt, loop", by_default=False, gradient_computer="loop"),
}
