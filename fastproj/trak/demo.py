"""``fastproj demo``: TRAK on real data from beginning to end, on any machine, in a minute or two.

Trains small CNNs on the 8 x 8 digits that scikit-learn ships, attributes their outputs on held-out
digits to the training digits, and then checks the attribution the hard way: by training hundreds of
models on random halves of the training set and comparing what they do with what was predicted (the
linear datamodeling score). Writes an HTML page of what helps and what harms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastproj
from fastproj.trak.estimator import TRAKer
from fastproj.trak.files import StoreError, make_dir, read_json, write_json
from fastproj.trak.metrics import LDS, lds, noise_ceiling, spearman
from fastproj.trak.progress import progress, tracked
from fastproj.trak.report import Page, write_report
from fastproj.trak.solve import AUTO, Lambda, check_lambda
from fastproj.trak.tasks import margins

GROUP = 50  # models trained at once: few enough for a core's cache
INTERRUPTED = 130  # what a shell reports for Ctrl-C


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


# ---- data and model -----------------------------------------------------------------------------


@dataclass
class Data:
    """Images [n, 1, 8, 8] in 0..1 and their labels [n]."""

    train_images: Tensor
    train_labels: Tensor
    target_images: Tensor
    target_labels: Tensor


def load_data(settings: Settings) -> Data:
    """A random split of scikit-learn's digits (1,797 handwritten digits)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(images), generator=generator)
    train, held_out = order[: settings.train], order[-settings.targets :]
    return Data(images[train], labels[train], images[held_out], labels[held_out])


class DigitsCNN(nn.Module):
    """Two strided convolutions and a linear layer; 3,530 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, stride=2, padding=1)  # 8 x 8 -> 4 x 4
        self.conv2 = nn.Conv2d(16, 32, 2, stride=2)  # 4 x 4 -> 2 x 2
        self.fc = nn.Linear(32 * 2 * 2, classes)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.get_parameter("bias"))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return self.fc(x.flatten(1))


Ensemble = dict[str, Tensor]  # parameter name -> [M, *shape]


def patches(images: Tensor) -> Tensor:
    """The 3 x 3 neighbourhoods that conv1 sees, [n, 16, 9], the four of a conv2 cell together."""
    n = len(images)
    cells = F.unfold(images, 3, padding=1, stride=2).mT  # [n, 4 * 4, 9]
    cells = cells.reshape(n, 2, 2, 2, 2, 9).transpose(2, 3)  # y, dy, x, dx -> y, x, dy, dx
    return cells.reshape(n, 16, 9).contiguous()


def ensemble_logits(params: Ensemble, x: Tensor) -> Tensor:
    """Logits [M, B, 10] of M models, each on its own images, x [M, B, 16, 9] as from ``patches``.

    ``DigitsCNN`` for all models at once: both convolutions are matrix products over patches.
    """
    m, b = x.shape[:2]
    w1 = params["conv1.weight"].flatten(2).mT  # [M, 9, 16]
    h = torch.baddbmm(params["conv1.bias"].unsqueeze(1), x.reshape(m, b * 16, 9), w1).relu()
    w2 = params["conv2.weight"].permute(0, 3, 4, 2, 1).reshape(m, 64, 32)  # dy, dx, channel
    h = torch.baddbmm(params["conv2.bias"].unsqueeze(1), h.reshape(m, b * 4, 64), w2).relu()
    w3 = params["fc.weight"].reshape(m, -1, 32, 4).permute(0, 3, 2, 1).reshape(m, 128, -1)
    return torch.baddbmm(params["fc.bias"].unsqueeze(1), h.reshape(m, b, 128), w3)


def train_ensemble(
    settings: Settings, data: Data, members: Tensor, seed: int, what: str
) -> Ensemble:
    """Train M models, model j on the training samples ``members[j]`` [M, s]."""
    torch.manual_seed(seed)
    models = [dict(DigitsCNN().named_parameters()) for _ in members]
    start = {name: torch.stack([m[name].detach() for m in models]) for name in models[0]}

    def train_rows(rows: Tensor, *how: Any) -> Ensemble:
        params = {name: p[rows] for name, p in start.items()}
        return train_group(settings, data, params, members[rows], *how)

    return train_in_groups(train_rows, len(members), GROUP, settings.epochs, seed, what)


def train_in_groups(
    train_rows: Callable[
        [Tensor, torch.Generator, Callable[[], object], threading.Event], Ensemble
    ],
    count: int,
    size: int,
    epochs: int,
    seed: int,
    what: str,
) -> Ensemble:
    """Train ``count`` models in groups of ``size``, each group in a thread with torch on one core.

    Small products gain nothing from threads inside, and on a busy machine lose much. The result
    doesn't depend on how many cores there are.

    Parameters
    ----------
    train_rows : trains the models of these numbers with (generator, count_epoch, stopped): calls
        ``count_epoch`` after each epoch, and returns early once ``stopped`` is set.
    """
    groups = torch.arange(count).split(size)
    threads = torch.get_num_threads()
    stopped = threading.Event()
    bar = progress(what, len(groups) * epochs, "epoch")

    def count_epoch() -> None:
        if not stopped.is_set():
            bar.update(1)

    with bar, ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            jobs = [
                pool.submit(
                    train_rows,
                    rows,
                    torch.Generator().manual_seed(seed * 1009 + number),
                    count_epoch,
                    stopped,
                )
                for number, rows in enumerate(groups)
            ]
            finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
            for job in finished:
                job.result()  # raises what it raised
            trained = [job.result() for job in jobs]
        finally:
            stopped.set()  # where an error or Ctrl-C ended the wait, threads end at their next step
            torch.set_num_threads(threads)
    return {name: torch.cat([params[name] for params in trained]) for name in trained[0]}


def train_group(
    settings: Settings,
    data: Data,
    params: Ensemble,
    members: Tensor,
    generator: torch.Generator,
    count_epoch: Callable[[], object],
    stopped: threading.Event,
) -> Ensemble:
    """Train models at once from ``params``, model j on the samples ``members[j]`` [M, s].

    SGD with momentum 0.9, weight decay, and a learning rate that rises over the first fifth and
    then falls to zero.
    """
    count, size = members.shape
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    velocity = {name: torch.zeros_like(p) for name, p in params.items()}
    x, y = patches(data.train_images), data.train_labels
    steps = max(1, size // settings.batch)
    total, step = steps * settings.epochs, 0
    for _ in range(settings.epochs):
        shuffled = members.gather(1, torch.rand(count, size, generator=generator).argsort(1))
        for rows in shuffled.split(settings.batch, 1)[:steps]:  # [M, batch]
            if stopped.is_set():
                return params
            done = (step + 1) / total
            rate = settings.learning_rate * min(done / 0.2, (1 - done) / 0.8)
            logits = ensemble_logits(params, x[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="sum")
            grads = torch.autograd.grad(loss / rows.shape[1], list(params.values()))
            with torch.no_grad():
                for (name, p), g in zip(params.items(), grads, strict=True):
                    velocity[name].mul_(0.9).add_(g).add_(p, alpha=settings.weight_decay)
                    p.sub_(velocity[name], alpha=rate)
            step += 1
        count_epoch()
    return {name: p.detach() for name, p in params.items()}


def ensemble_margins(params: Ensemble, images: Tensor, labels: Tensor) -> Tensor:
    """The output f (margin) of each of M models on each image, [M, n]."""
    count = params["fc.bias"].shape[0]
    x = patches(images)
    logits = ensemble_logits(params, x.expand(count, *x.shape))  # [M, n, 10]
    return margins(logits.flatten(0, 1), labels.repeat(count)).reshape(count, len(labels))


# ---- the steps ----------------------------------------------------------------------------------


def train_checkpoints(settings: Settings, data: Data) -> list[dict[str, Tensor]]:
    """State dicts of models trained on the whole training set, from different seeds."""
    everything = torch.arange(settings.train).expand(settings.checkpoints, -1).contiguous()
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
            for rows in torch.arange(settings.train).split(250):
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
    """(masks [S, n] bool, outputs [R, S, m]) of models trained on random halves.

    Each of the R rounds is kept in ``path`` when it is finished, and not done again.
    """
    generator = torch.Generator().manual_seed(settings.seed + 2)
    half = settings.train // 2
    noise = torch.rand(settings.subsets, settings.train, generator=generator)
    members = noise.argsort(1)[:, :half].contiguous()  # [S, n / 2]
    masks = torch.zeros(settings.subsets, settings.train, dtype=torch.bool)
    masks.scatter_(1, members, True)
    outputs: list[Tensor] = []
    make_dir(path.parent)
    if path.exists():
        outputs = [torch.tensor(run) for run in read_json(path)["outputs"]]
    for run in range(len(outputs), settings.retrainings):
        what = f"retraining on {settings.subsets} subsets, {run + 1} of {settings.retrainings}"
        params = train_ensemble(settings, data, members, settings.seed + 100 + run, what)
        outputs.append(ensemble_margins(params, data.target_images, data.target_labels))
        write_json(path, {"outputs": [run.tolist() for run in outputs]})
    return masks, torch.stack(outputs)


# ---- the page -----------------------------------------------------------------------------------


def choose_targets(mean_margin: npt.NDArray[np.float64], count: int = 12) -> list[int]:
    """Targets to show: the least certain third, and the rest spread over all margins."""
    order = [int(i) for i in np.argsort(mean_margin)]
    hard, rest = order[: count // 3], order[count // 3 :]
    spread = np.linspace(0, len(rest) - 1, min(count - len(hard), len(rest)))
    return hard + [rest[int(i)] for i in spread]


def build_page(
    settings: Settings,
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
    """torch on one core: for tensors as small as these, waiting for others takes longer."""
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
    masks, outputs = retrain(settings, data, work / "retrained.json")
    print(
        f"retrained {settings.subsets * settings.retrainings} models on random halves "
        f"in {time.perf_counter() - begun:.1f} s"
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
    page = build_page(settings, data, scores, masks, outputs, result, ceiling, facts)
    print(f"report: {write_report(out / 'report.html', page)}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``fastproj demo``; returns the exit status."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="fastproj demo",
        description="TRAK on scikit-learn's digits: train, attribute, check by retraining, report. "
        "Run again with the same settings, it goes on where it was stopped.",
    )
    parser.add_argument("--out", type=Path, default=Path("fastproj-demo"), metavar="DIR")
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
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; {default}")
    parser.add_argument(
        "--lambda-reg",
        type=number_or_text,
        default=defaults.lambda_reg,
        help=f"ridge: auto, a number, or a share of the mean eigenvalue; {defaults.lambda_reg}",
    )
    options = vars(parser.parse_args(argv))
    out: Path = options.pop("out")
    settings = Settings(**options)
    check(parser, settings)
    try:
        run(settings, out)
    except KeyboardInterrupt:
        print(
            f"\nstopped. Finished work is kept in {out}; the same command goes on from there",
            file=sys.stderr,
        )
        return INTERRUPTED
    except (StoreError, OSError) as error:
        print(f"fastproj demo: {error}", file=sys.stderr)
        return 1
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
