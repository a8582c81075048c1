"""``fastproj demo``: TRAK on real data from beginning to end, on any machine, in a minute or two.

The demo trains small CNNs on the 8 x 8 digits that scikit-learn ships. It attributes their outputs
on held-out digits to the training digits. Then it checks the attribution: it trains hundreds of
models on random halves of the training set, and compares their outputs with those that the scores
predict (the linear datamodeling score). It writes an HTML page of the digits that help and harm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

import fastproj
from fastproj.commands.arguments import add_json, add_option, command_parser
from fastproj.commands.running import DONE, Outcome, execute
from fastproj.testbed import ensembles
from fastproj.testbed.digits import DigitsCNN, digits, ensemble_logits, patches
from fastproj.testbed.ensembles import Ensemble, Training, random_halves, split
from fastproj.trak.estimator import TRAKer
from fastproj.trak.evaluation.metrics import LDS, lds, noise_ceiling, spearman
from fastproj.trak.evaluation.report import Page, write_report
from fastproj.trak.files import StoreError, StoreMismatchError, make_dir, read_json, write_json
from fastproj.trak.progress import progress, tracked
from fastproj.trak.solving.solve import AUTO, Lambda, check_lambda
from fastproj.trak.tasks import margins

GROUP = 50  # models trained at once: few enough for a core's cache


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on."""

    seed: int = 0
    train: int = 1000
    targets: int = 100
    checkpoints: int = 10
    proj_dim: int = 1024
    lambda_reg: Lambda = AUTO
    subsets: int = 200
    retrainings: int = 3  # models per subset; their mean output is what the LDS is measured on
    epochs: int = 60
    batch: int = 50
    learning_rate: float = 0.1
    weight_decay: float = 2e-3

    def fingerprint(self) -> str:
        """Names the files that belong to these settings."""
        text = json.dumps([asdict(self), fastproj.__version__], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# ---- data and models ----------------------------------------------------------------------------


@dataclass
class Data:
    """Images [n, 1, 8, 8] in 0..1 and their labels [n]."""

    train_images: Tensor
    train_labels: Tensor
    target_images: Tensor
    target_labels: Tensor


def load_data(settings: Settings) -> Data:
    """A random split of scikit-learn's digits (1,797 handwritten digits)."""
    return Data(*split(*digits(), settings.train, settings.targets, settings.seed))


def train_ensemble(
    settings: Settings, data: Data, members: Tensor, seed: int, what: str
) -> Ensemble:
    """Train M models, model j on the training samples ``members[j]`` [M, s]."""
    torch.manual_seed(seed)
    models = [dict(DigitsCNN().named_parameters()) for _ in members]
    start = {name: torch.stack([m[name].detach() for m in models]) for name in models[0]}
    x, y = patches(data.train_images), data.train_labels

    def loss(params: Ensemble, rows: Tensor) -> Tensor:
        logits = ensemble_logits(params, x[rows]).flatten(0, 1)
        return F.cross_entropy(logits, y[rows].flatten(), reduction="sum") / rows.shape[1]

    training = Training(
        settings.epochs, settings.batch, settings.learning_rate, settings.weight_decay
    )
    return ensembles.train_ensemble(
        start, members, lambda: loss, training, group=GROUP, seed=seed, what=what
    )


def ensemble_margins(params: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
    """The output f (margin) of each of M models on each image, [M, n]."""
    count = params["fc.bias"].shape[0]
    x = patches(images)
    logits = ensemble_logits(params, x.expand(count, *x.shape))  # [M, n, 10]
    return margins(logits.flatten(0, 1), labels.repeat(count)).reshape(count, len(labels))


# ---- the steps ----------------------------------------------------------------------------------


def train_checkpoints(settings: Settings, data: Data) -> list[dict[str, Tensor]]:
    """State dicts of models trained on the whole training set, from different seeds."""
    everything = torch.arange(settings.train, device="cpu").repeat(settings.checkpoints, 1)
    params = train_ensemble(settings, data, everything, settings.seed + 1, "training checkpoints")
    return [{name: p[c].clone() for name, p in params.items()} for c in range(settings.checkpoints)]


def attribute(
    settings: Settings, data: Data, checkpoints: list[dict[str, Tensor]], save_dir: Path
) -> npt.NDArray[np.float32]:
    """TRAK scores [train, targets]."""
    traker = TRAKer(
        DigitsCNN(),
        "image_classification",
        train_set_size=settings.train,
        save_dir=save_dir,
        proj_dim=settings.proj_dim,
        projector_seed=settings.seed,
        lambda_reg=settings.lambda_reg,
        logging_level=logging.WARNING,
    )
    with progress("featurizing", settings.train * len(checkpoints), "sample") as bar:
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id)
            for rows in torch.arange(settings.train, device="cpu").split(250):
                batch = (data.train_images[rows], data.train_labels[rows])
                traker.featurize(batch, num_samples=len(rows))
                bar.update(len(rows))
    traker.finalize_features()
    scored = tracked(checkpoints, "scoring", len(checkpoints), "checkpoint")
    for model_id, checkpoint in enumerate(scored):
        traker.start_scoring_checkpoint("held_out", checkpoint, model_id, settings.targets)
        traker.score((data.target_images, data.target_labels), num_samples=settings.targets)
    return traker.finalize_scores("held_out")


def retrain(settings: Settings, data: Data, path: Path) -> tuple[Tensor, Tensor]:
    """(masks [S, n] bool, outputs [runs, S, m]) of models trained on random halves.

    Each of the runs is kept in ``path`` when it is finished, and not done again.
    """
    members, masks = random_halves(settings.train, settings.subsets, settings.seed + 2)
    make_dir(path.parent)
    outputs = finished_runs(path)
    for run in range(len(outputs), settings.retrainings):
        what = f"retraining on {settings.subsets} subsets, {run + 1} of {settings.retrainings}"
        params = train_ensemble(settings, data, members, settings.seed + 100 + run, what)
        outputs.append(ensemble_margins(params, data.target_images, data.target_labels))
        write_json(path, {"outputs": [run.tolist() for run in outputs]})
    return masks, torch.stack(outputs)


def finished_runs(path: Path) -> list[Tensor]:
    """The outputs [S, m] of each run that ``retrain`` has kept."""
    kept = read_json(path)["outputs"] if path.exists() else []
    return [torch.tensor(run, device="cpu") for run in kept]


# ---- the page -----------------------------------------------------------------------------------


def choose_targets(mean_margin: npt.NDArray[np.float64], count: int = 12) -> list[int]:
    """Targets to show: the least certain third, and the rest spread over all margins."""
    order = [int(i) for i in np.argsort(mean_margin)]
    hard, rest = order[: count // 3], order[count // 3 :]
    spread = np.linspace(0, len(rest) - 1, min(count - len(hard), len(rest)))
    return hard + [rest[int(i)] for i in spread]


def build_page(
    data: Data,
    scores: npt.NDArray[np.float32],
    masks: Tensor,
    outputs: Tensor,
    result: LDS,
    ceiling: float | None,
    facts: dict[str, Any],
) -> Page:
    """The page of a finished run."""
    measured = outputs.double().mean(0).numpy()  # [S, m]
    predicted = masks.double().numpy() @ scores.astype(np.float64)  # [S, m]
    right = (outputs > 0).float().mean((0, 1))  # [m]
    per_target = spearman(predicted, measured)
    middle = [int(np.argsort(per_target)[int(q * (len(per_target) - 1))]) for q in (0.9, 0.5, 0.1)]
    return Page(
        title="TRAK on handwritten digits",
        intro="Which training digits make a small network surer, or less sure, of a held-out "
        "digit? Scores by fastproj; checked by training on random halves of the training set.",
        scores=scores,
        targets=choose_targets(measured.mean(0)),
        train_images=(255 * (1 - data.train_images[:, 0])).byte().numpy(),
        target_images=(255 * (1 - data.target_images[:, 0])).byte().numpy(),
        train_labels=data.train_labels.tolist(),
        target_labels=data.target_labels.tolist(),
        target_notes=[f"right in {share:.0%} of subset models" for share in right.tolist()],
        lds=result,
        ceiling=ceiling,
        facts=facts,
        scatters=[
            (f"target {t}: rank correlation {per_target[t]:.2f}", predicted[:, t], measured[:, t])
            for t in middle
        ],
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one core. For tensors as small as these, waiting for other threads takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(settings: Settings, out: Path) -> LDS:
    """The whole demo; prints what it finds."""
    started = time.perf_counter()
    work = out / f"work-{settings.fingerprint()}"
    make_dir(work)  # before anything is trained
    data = load_data(settings)

    checkpoints = train_checkpoints(settings, data)
    stacked = {name: torch.stack([c[name] for c in checkpoints]) for name in checkpoints[0]}
    right = ensemble_margins(stacked, data.target_images, data.target_labels) > 0
    accuracy = float(right.float().mean())
    parameters = sum(p.numel() for p in checkpoints[0].values())
    print(
        f"trained {settings.checkpoints} checkpoints of {parameters} parameters on "
        f"{settings.train} digits: {accuracy:.1%} right on {settings.targets} held-out ones"
    )

    begun = time.perf_counter()
    with one_thread():
        scores = attribute(settings, data, checkpoints, work / "trak")
    print(f"TRAK scores {list(scores.shape)} in {time.perf_counter() - begun:.1f} s")

    begun = time.perf_counter()
    kept = settings.subsets * len(finished_runs(work / "retrained.json"))
    masks, outputs = retrain(settings, data, work / "retrained.json")
    print(
        f"retrained {settings.subsets * settings.retrainings - kept} models on random halves "
        f"in {time.perf_counter() - begun:.1f} s" + (f"; {kept} were there" if kept else "")
    )
    result = lds(scores, masks.numpy(), outputs.mean(0).numpy(), seed=settings.seed)
    ceiling = noise_ceiling(outputs.numpy()) if settings.retrainings > 1 else None
    print(result)
    if ceiling is not None:
        print(f"the randomness of training leaves at most about {ceiling:.2f} to predict")
    facts = {
        **asdict(settings),
        "parameters": parameters,
        "accuracy on held-out digits": f"{accuracy:.1%}",
        "fastproj": f"{fastproj.__version__}, matrix spec {fastproj.SPEC_VERSION}",
        "torch": torch.__version__,
        "seconds": f"{time.perf_counter() - started:.0f}",
    }
    page = build_page(data, scores, masks, outputs, result, ceiling, facts)
    print(f"report: {write_report(out / 'report.html', page)}")
    return result


def build_parser() -> argparse.ArgumentParser:
    """The options of ``fastproj demo``."""
    defaults = Settings()
    parser = command_parser(
        "demo",
        "TRAK on scikit-learn's digits: train, attribute, check by retraining, report. It takes a "
        "minute or two. A stopped demo goes on where it was when the same command runs again.",
        """
        fastproj demo                                       # writes fastproj-demo/report.html
        fastproj demo --train 300 --subsets 50 --targets 20 # less of everything
        fastproj demo --lambda-reg '0.1*mean' --out other   # a ridge of your own
        """,
    )
    add_option(parser, "--out", Path("fastproj-demo"), "DIR", "where to write", Path)
    for name, text in (
        ("seed", "of everything random"),
        ("train", "training digits, at most 1700"),
        ("targets", "held-out digits"),
        ("checkpoints", "models whose scores are averaged"),
        ("proj-dim", "dimension of the features"),
        ("subsets", "random halves to retrain on"),
        ("retrainings", "models for each half"),
        ("epochs", "of each training"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        add_option(parser, f"--{name}", default, "N", text)
    add_option(
        parser,
        "--lambda-reg",
        defaults.lambda_reg,
        "L",
        "ridge: auto, a number, or a share of the mean eigenvalue",
        number_or_text,
    )
    add_json(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``fastproj demo``; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    named = vars(options)
    settings = Settings(**{f.name: named[f.name] for f in fields(Settings) if f.name in named})
    check(parser, settings)

    def whole(options: argparse.Namespace) -> Outcome:
        result = run(settings, options.out)
        return DONE, {"report": str(options.out / "report.html"), "lds": asdict(result)}

    kept = f"Finished work is kept in {options.out}; the same command goes on from there"
    return execute("demo", options, whole, (StoreError, StoreMismatchError, OSError), kept)


def number_or_text(text: str) -> Lambda:
    """A lambda from the command line: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def check(parser: argparse.ArgumentParser, settings: Settings) -> None:
    """End with a usage message for settings that can't work."""
    lowest = {"seed": 0, "train": 20, "targets": 1, "subsets": 3}
    for name, value in asdict(settings).items():
        if isinstance(value, int) and value < lowest.get(name, 1):
            least = lowest.get(name, 1)
            parser.error(f"--{name.replace('_', '-')}: received {value}; expected at least {least}")
    if settings.train + settings.targets > 1797:
        parser.error(
            f"--train, --targets: received {settings.train} and {settings.targets}; expected at "
            "most 1797 together, as many digits as there are"
        )
    try:
        check_lambda(settings.lambda_reg)
    except ValueError as error:
        parser.error(str(error))
    if settings.seed >= 1 << 62:
        parser.error(f"--seed: received {settings.seed}; expected less than 2^62")
