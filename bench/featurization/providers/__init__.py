"""What featurizes: one file for each package.

A provider is a function of a ``Job`` that returns ``Prepared``, or raises ``Unsupported``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.featurization.job import Job, Prepared
from bench.featurization.providers import (
    bergson,
    dattri,
    kronfluence,
    logix,
    ours,
    plain,
    trakpkg,
)


@dataclass(frozen=True)
class Provider:
    """One line of the table.

    by_dim : whether K matters to it; where not, it is measured once.
    against : the provider of fastproj that it competes with; "" for fastproj's own.
    by_default : whether it is measured where no providers are named.
    install : words of pip's that install its package, where make bench doesn't.
    """

    label: str
    prepare: Callable[[Job], Prepared]
    by_dim: bool = True
    against: str = ""
    by_default: bool = True
    install: str = ""


def ours_with(label: str, by_default: bool = True, **options: Any) -> Provider:
    """TRAKer with options."""
    prepare = partial(ours.prepare, **options)
    return Provider(f"fastproj {label}", prepare, by_default=by_default)


def features(label: str, by_default: bool = True, **options: Any) -> Provider:
    """TRAKer with options, for features alone."""
    return ours_with(label, by_default, **ours.FEATURES, **options)


def peer(
    label: str,
    prepare: Callable[[Job], Prepared],
    against: str,
    install: str,
    by_dim: bool = False,
) -> Provider:
    """A provider of another package, which ``make bench`` doesn't install."""
    return Provider(label, prepare, by_dim, against, install=install)


# Two of them go without their dependencies: bergson asks for a torchaudio that follows another
# torch, LogIX for a Python before 3.11, with which it runs all the same.
DATTRI = "dattri==0.3.*"
BERGSON = (
    "accelerate datasets jaxtyping ml_dtypes natsort peft petname simple-parsing && "
    "python -m pip install --no-deps bergson bitsandbytes"
)
LOGIX = "--no-deps --ignore-requires-python logix-ai"

PROVIDERS: dict[str, Provider] = {
    "plain": Provider("forward + backward", plain.prepare, by_dim=False),
    "dense": features("dense (rademacher)", kind="rademacher"),
    "sjlt": features("sjlt"),
    **{
        f"factored-{r}": features(f"factored, r = {r}", r in (16, 64, 128), factored=r)
        for r in (8, 16, 32, 64, 128)
    },
    "factored-16-linear": features(
        "factored 16, linear layers", by_default=False, factored=16, linear=True
    ),
    "default": ours_with("as it comes, all drawn for"),
    "func": features("sjlt, torch.func", by_default=False, gradient_computer="func"),
    "loop": features("sjlt, loop", by_default=False, gradient_computer="loop"),
    "trak": Provider("trak 0.3.2, float32", trakpkg.prepare, against="sjlt"),
    "dattri": peer("dattri, projected gradients", dattri.project, "sjlt", DATTRI, by_dim=True),
    "dattri-logra": peer("dattri, LoGra 64 x 64", dattri.logra, "factored-64", DATTRI),
    "dattri-logra-k": peer(
        "dattri, LoGra, K in all", dattri.equal, "factored-16", DATTRI, by_dim=True
    ),
    "bergson": peer("bergson, 16 x 16 a layer", bergson.recommended, "factored-16", BERGSON),
    "bergson-k": peer("bergson, K in all", bergson.equal, "factored-16", BERGSON, by_dim=True),
    "logix": peer("LogIX, 64 x 64 a layer", logix.recommended, "factored-64", LOGIX),
    "logix-k": peer("LogIX, K in all", logix.equal, "factored-16", LOGIX, by_dim=True),
    "kronfluence": peer("kronfluence, 1 target", kronfluence.prepare, "sjlt", "kronfluence"),
}
