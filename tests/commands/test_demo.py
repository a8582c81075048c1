"""The demo in small: end to end, repeatable, resumable, stoppable."""

from __future__ import annotations

import re

import pytest
import torch

from fastproj.commands import demo
from fastproj.testbed import digits, ensembles
from fastproj.trak import lds
from fastproj.trak.tasks import margins

SMALL = {
    "train": 120,
    "targets": 12,
    "checkpoints": 2,
    "proj-dim": 32,
    "subsets": 12,
    "retrainings": 2,
    "epochs": 6,
}
ARGUMENTS = [text for name, value in SMALL.items() for text in (f"--{name}", str(value))]


def test_ensembles_compute_what_the_model_computes():
    torch.manual_seed(0)
    models = [digits.DigitsCNN() for _ in range(3)]
    params = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models])
        for name, _ in models[0].named_parameters()
    }
    images, labels = torch.rand(7, 1, 8, 8), torch.randint(0, 10, (7,))
    x = digits.patches(images)
    logits = digits.ensemble_logits(params, x.expand(3, *x.shape))
    for j, model in enumerate(models):
        torch.testing.assert_close(logits[j], model(images))
        torch.testing.assert_close(
            demo.ensemble_margins(params, images, labels)[j], margins(model(images), labels)
        )


def test_an_ensemble_trains_each_model_on_its_own_samples():
    """What other members are trained on makes no difference; what this one is, does."""
    settings = demo.Settings(train=60, targets=5, epochs=2, batch=10)
    data = demo.load_data(settings)
    first, second = torch.arange(30), torch.arange(30, 60)
    both = demo.train_ensemble(settings, data, torch.stack([first, second]), 3, "")
    same = demo.train_ensemble(settings, data, torch.stack([first, first]), 3, "")
    torch.testing.assert_close(both["fc.weight"][0], same["fc.weight"][0])
    assert not torch.allclose(both["fc.weight"][1], same["fc.weight"][1])


@pytest.mark.parametrize("threads", [1, 3])
def test_training_does_not_depend_on_the_number_of_cores(monkeypatch, threads):
    settings = demo.Settings(train=60, targets=5, epochs=2, batch=10)
    data = demo.load_data(settings)
    members = torch.rand(7, 60).argsort(1)[:, :30].contiguous()
    monkeypatch.setattr(demo, "GROUP", 2)
    torch.set_num_threads(2)
    expected = demo.train_ensemble(settings, data, members, 3, "")
    torch.set_num_threads(threads)
    found = demo.train_ensemble(settings, data, members, 3, "")
    assert torch.get_num_threads() == threads
    assert [len(p) for p in found.values()] == [7] * len(found)
    assert all(torch.equal(p, expected[name]) for name, p in found.items())


def test_an_error_in_one_group_ends_the_others(monkeypatch):
    settings = demo.Settings(train=60, targets=5, epochs=10_000, batch=10)
    data = demo.load_data(settings)
    train, started = ensembles.train_group, []

    def failing(*arguments):
        started.append(arguments)
        if len(started) == 2:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(demo, "GROUP", 1)
    monkeypatch.setattr(ensembles, "train_group", failing)
    torch.set_num_threads(2)
    members = torch.arange(60).expand(6, -1).contiguous()
    with pytest.raises(KeyboardInterrupt):
        demo.train_ensemble(settings, data, members, 3, "")
    assert all(arguments[-1].is_set() for arguments in started)


def test_split_holds_targets_out():
    data = demo.load_data(demo.Settings(train=1000, targets=100))
    train = {image.numpy().tobytes() for image in data.train_images}
    assert not train & {image.numpy().tobytes() for image in data.target_images}
    assert float(data.train_images.max()) == 1.0


def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "a"
    assert demo.main(["--out", str(out), *ARGUMENTS]) == 0
    printed = capsys.readouterr().out
    found = re.search(r"LDS (-?[\d.]+) \(95% CI (-?[\d.]+) to (-?[\d.]+); 12 targets", printed)
    value, low, high = (float(text) for text in found.groups())
    assert low <= value <= high
    page = (out / "report.html").read_text()
    assert f"{value:.3f}" in page
    assert "http" not in page
    assert page.count('class="target"') == 12

    # The same command once more finds everything there; another directory finds the same result.
    before = sorted(path.name for path in out.rglob("*.safetensors"))
    assert demo.main(["--out", str(out), *ARGUMENTS]) == 0
    assert sorted(path.name for path in out.rglob("*.safetensors")) == before
    assert demo.main(["--out", str(tmp_path / "b"), *ARGUMENTS]) == 0
    again = capsys.readouterr().out
    assert re.findall("LDS .*", again) == [found.string[found.start() :].split("\n")[0]] * 2


def test_scores_predict_retraining(tmp_path):
    """The full demo's model and recipe, smaller: far from chance, not yet the demo's 0.6."""
    settings = demo.Settings(
        train=300, targets=30, checkpoints=5, proj_dim=256, subsets=60, retrainings=2
    )
    data = demo.load_data(settings)
    checkpoints = demo.train_checkpoints(settings, data)
    scores = demo.attribute(settings, data, checkpoints, tmp_path / "trak")
    masks, outputs = demo.retrain(settings, data, tmp_path / "retrained.json")
    assert masks.sum(1).tolist() == [150] * 60
    assert float((outputs > 0).float().mean()) > 0.8
    result = lds(scores, masks.numpy(), outputs.mean(0).numpy())
    assert result.low > 0.3, result


def test_interrupting_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    train = demo.train_ensemble
    calls = []

    def interrupted(settings, data, members, seed, what):
        calls.append(what)
        if len(calls) == 3:  # checkpoints, first retraining, second retraining
            raise KeyboardInterrupt
        return train(settings, data, members, seed, what)

    monkeypatch.setattr(demo, "train_ensemble", interrupted)
    arguments = ["--out", str(tmp_path), *ARGUMENTS]
    assert demo.main(arguments) == 130
    assert f"kept in {tmp_path}; the same command goes on" in capsys.readouterr().err
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"retrained (\d+) models on random halves in [\d.]+ s; \1 were there", printed)
    assert [what.split(",")[-1].strip() for what in calls[3:]] == ["training checkpoints", "2 of 2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "5"], "--train: received 5; expected at least 20"),
        (["--train", "1700"], "received 1700 and 100; expected at most 1797 together"),
        (["--subsets", "2"], "--subsets: received 2"),
        (["--seed", "-1"], "--seed: received -1"),
        (["--seed", str(2**63)], "expected less than 2^62"),
        (["--proj-dim", "x"], "invalid int value"),
    ],
)
def test_settings_that_cannot_work(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        demo.main(["--out", str(tmp_path / "new"), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_bad_lambda_is_an_error_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--out", str(tmp_path / "new"), "--lambda-reg", "lots"])
    assert "lambda_reg='lots'" in capsys.readouterr().err


def test_a_directory_that_cannot_be_is_an_error_message(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert demo.main(["--out", str(tmp_path / "file"), *ARGUMENTS]) == 1
    assert "fastproj demo: can't make the directory" in capsys.readouterr().err


def test_a_place_that_can_not_be_written_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "train_checkpoints", None)
    assert demo.main([*ARGUMENTS, "--out", str(tmp_path / "file")]) == 1
    assert f"can't make the directory {tmp_path}/file" in capsys.readouterr().err
