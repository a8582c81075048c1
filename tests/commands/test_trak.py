"""``fastproj trak``: from local folders and files to scores, and what it says of others."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import transformers as tf

from fastproj import cli
from fastproj.commands import trak
from fastproj.trak.files import read_json, read_safetensors, write_json, write_safetensors
from fastproj.trak.hf import HFTRAKer, load_model, load_tokenizer, tokenize
from fastproj.trak.hf.heads import AUTO_CLASSES
from tests.trak.hf import models

pytestmark = pytest.mark.usefixtures("no_network")

TRAIN = [{"text": f"w{i} w{i + 1} w{i % 3}"} for i in range(12)]
TARGETS = [{"text": "w0 w1 w0"}, {"text": "w5 w6 w2"}]
FEW = ("--proj-dim", 16)


def run(*arguments):
    return cli.main(["trak", *map(str, arguments)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """run/checkpoint-5 and -10 with a tokenizer, train.jsonl and targets.jsonl."""
    monkeypatch.chdir(tmp_path)
    for seed, step in enumerate((5, 10)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        models.model_for("causal_lm", seed).save_pretrained(folder)
        models.tokenizer().save_pretrained(folder)
    write(tmp_path / "train.jsonl", TRAIN)
    write(tmp_path / "targets.jsonl", TARGETS)
    return tmp_path


DATA = ("--train", "train.jsonl", "--targets", "targets.jsonl", *FEW)


def test_scores_of_the_checkpoints_of_a_training(here, capsys):
    assert run("run", *DATA, "--top", 2) == 0
    printed, said = capsys.readouterr()
    assert "%|" not in said  # no bar, also of transformers: this is no terminal
    assert "GPT2LMHeadModel, causal_lm: gradients by 4,976 parameters, 2 checkpoint(s)" in printed
    found = np.load("fastproj-trak/scores/targets.mmap")
    tokenizer = load_tokenizer("run/checkpoint-5")
    folders = ["run/checkpoint-5", "run/checkpoint-10"]
    rows, targets = (tokenize(rows, tokenizer, "causal_lm") for rows in (TRAIN, TARGETS))
    traker = HFTRAKer(load_model(folders[0]), rows, folders, "other", proj_dim=16)
    np.testing.assert_array_equal(found, traker.score(targets))
    best = int(found[:, 0].argmax())
    assert f"helpful {found[best, 0]:+10.3g}  sample {best}: {json.dumps(TRAIN[best])}" in printed
    assert run("run", *DATA, "--json", "--top", 2) == 0  # again, from what is there
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["shape"] == [12, 2]
    assert numbers["checkpoints"] == folders
    for column, extremes in enumerate(numbers["extremes"]):
        order = np.argsort(found[:, column], kind="stable")
        best = np.argsort(-found[:, column], kind="stable")  # equal scores: lower numbers first
        assert [entry["sample"] for entry in extremes["helpful"]] == best[:2].tolist()
        assert [entry["sample"] for entry in extremes["harmful"]] == order[:2].tolist()
    np.testing.assert_array_equal(np.load("fastproj-trak/scores/targets.mmap"), found)


def test_equal_scores_are_in_the_order_of_top_scores(here):
    options = trak.build_parser().parse_args(["run", *map(str, DATA), "--top", "2"])
    rows = {"train": TRAIN, "targets": TARGETS}
    scores = np.array([[1, -1, 2, 2, -1, 2]], np.float32).T
    (found,) = trak.report(options, "causal_lm", [], rows, scores)["extremes"]
    places = {name: [entry["sample"] for entry in found[name]] for name in found}
    assert places == {"helpful": [2, 3], "harmful": [1, 4]}


def test_samples_of_a_regression_raise_or_lower_the_number(here, capsys):
    """A sample need not help itself: what is predicted may be above its label."""
    models.model_for("regression").save_pretrained("scalar")
    models.tokenizer().save_pretrained("scalar")
    write(here / "train.jsonl", [{**row, "label": i / 4} for i, row in enumerate(TRAIN)])
    write(here / "targets.jsonl", [{**row, "label": 1.0} for row in TARGETS])
    assert run("scalar", *DATA, "--top", 2) == 0
    printed = capsys.readouterr().out
    assert "  raises " in printed
    assert "helpful" not in printed
    assert run("scalar", *DATA, "--json", "--top", 2) == 0
    assert set(json.loads(capsys.readouterr().out)["extremes"][0]) == {"raises", "lowers"}


def test_factored_gradients(here, capsys):
    model = "run/checkpoint-5"
    assert run(model, *DATA, "--factored", 3) == 0
    found = np.load("fastproj-trak/scores/targets.mmap")
    tokenizer = load_tokenizer(model)
    rows, targets = (tokenize(rows, tokenizer, "causal_lm") for rows in (TRAIN, TARGETS))
    traker = HFTRAKer(load_model(model), rows, [model], "other", proj_dim=16, factored=3)
    np.testing.assert_array_equal(found, traker.score(targets))
    assert run(model, *DATA, "--factored", 3) == 0  # again, from what is there


@pytest.mark.parametrize(
    ("options", "matrix"),
    [
        (("--kind", "gaussian"), {"kind": "gaussian"}),
        (("--kind", "sjlt", "--block", 32), {"kind": "sjlt", "block": 32}),
        (("--block", "2**6"), {"block": 64}),
        (("--proj-dim", 8), {"proj_dim": 8, "kind": "rademacher"}),
        (("--proj-dim", 8, "--kind", "sjlt"), {"proj_dim": 8, "kind": "sjlt"}),
        (("--factored", 3, "--block", 32), {"factored": 3, "block": 32}),
    ],
    ids=str,
)
def test_the_matrix_that_is_asked_for(here, options, matrix):
    model = "run/checkpoint-5"
    assert run(model, *DATA, *options) == 0
    found = np.load("fastproj-trak/scores/targets.mmap")
    tokenizer = load_tokenizer(model)
    rows, targets = (tokenize(rows, tokenizer, "causal_lm") for rows in (TRAIN, TARGETS))
    traker = HFTRAKer(load_model(model), rows, [model], "other", **{"proj_dim": 16, **matrix})
    np.testing.assert_array_equal(found, traker.score(targets))
    assert matrix.items() <= read_json(STORE / "metadata.json").items()
    assert run(model, *DATA, *options) == 0  # again, from what is there


# What messages of the library name, and a user of the command can't give.
OF_THE_LIBRARY = re.compile(
    r"\b(?:save_dir|exp_name|load_from_save_dir|num_targets|model_id or|finalize_\w+|featurize\b|"
    r"(?:groups|reduction|kind|block|factored|proj_dim|(?:projector_)?seed|curvature|likelihood)=)"
)
FIRST, SECOND = "run/checkpoint-5", "run/checkpoint-10"
STORE = Path("fastproj-trak")


def refused(capsys, *arguments):
    """What a run that ends with exit status 1 says, in words that its user has."""
    capsys.readouterr()
    assert run(*arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("fastproj trak: ")
    named = OF_THE_LIBRARY.search(re.sub("'[^']*'", "", said))  # but for values
    assert not named, (named, said)
    return said


@pytest.mark.parametrize(
    ("before", "now", "said", "cure"),
    [
        ((), ("--factored", 3), "use the same settings (no --factored), or another --out", ()),
        (
            ("--factored", 3),
            ("--factored", 4),
            "factored 3 in the directory, 4 in this run. Nothing was changed; use the same "
            "settings (--factored 3), or another --out",
            ("--factored", 3),
        ),
        (
            ("--factored", 3),
            ("--proj-dim", 48, "--seed", 2),
            "use the same settings (--proj-dim 16, --factored 3, --seed 0), or another --out",
            ("--proj-dim", 16, "--factored", 3, "--seed", 0),
        ),
        (
            ("--kind", "gaussian"),
            (),
            "use the same settings (--kind gaussian, no --block), or another --out",
            ("--kind", "gaussian"),
        ),
        (
            (),
            ("--kind", "rademacher"),
            "use the same settings (--kind sjlt, --block 16), or another --out",
            ("--kind", "sjlt", "--block", 16),
        ),
        (
            ("--block", 64),
            ("--block", 32, "--factored", 3),
            "use the same settings (--kind sjlt, --block 64, no --factored), or another --out",
            ("--kind", "sjlt", "--block", 64),
        ),
        (
            (),
            ("--train", "targets.jsonl"),
            "train set size 12 in the directory, 2 in this run. Nothing was changed; use the same "
            "settings, or another --out",
            ("--train", "targets.jsonl", "--out", "other"),
        ),
        ((), ("--mean",), "use no --mean, or another --name", ("--mean", "--name", "dev")),
        (("--mean",), (), "use --mean, or another --name", ("--mean",)),
        (
            (),
            ("--targets", "train.jsonl"),
            "has 2 targets, received 12. Nothing was changed; use another --name",
            ("--targets", "train.jsonl", "--name", "dev"),
        ),
    ],
)
def test_what_a_directory_refuses_is_said_in_options(here, capsys, before, now, said, cure):
    """And the options that are named are right."""
    assert run(FIRST, *DATA, *before) == 0
    assert said in refused(capsys, FIRST, *DATA, *now)
    assert run(FIRST, *DATA, *cure) == 0


def test_a_training_set_that_was_changed_in_place(here, capsys):
    assert run("run", *DATA) == 0
    found = np.load("fastproj-trak/scores/targets.mmap")
    write(here / "train.jsonl", TRAIN[::-1])
    said = refused(capsys, "run", *DATA)
    assert (
        "sample 0 of model_id 0 was featurized from other data than --train holds now; use "
        "another --out\n" in said
    )
    np.testing.assert_array_equal(np.load("fastproj-trak/scores/targets.mmap"), found)
    assert run("run", *DATA, "--out", "other") == 0
    assert np.load("other/scores/targets.mmap").shape == found.shape


def test_the_directory_of_another_model(here, capsys):
    assert run(FIRST, *DATA) == 0
    said = refused(capsys, SECOND, *DATA)
    assert re.search(
        r"hash \w+, received .* hash \w+\. Nothing was changed; use another --out", said
    )
    assert run(SECOND, *DATA, "--out", "other") == 0


@pytest.mark.parametrize(
    ("file", "facts", "said"),
    [
        ("metadata.json", {"size_power": 0.0}, "size power 0.0 in the directory, 0.5 in this run"),
        (
            "metadata.json",
            {"task": "Older()"},
            "task 'Older()' in the directory, 'CausalLMModelOut",
        ),
        ("experiments/targets.json", {"groups": [0, 1], "reduction": "mean"}, "has groups [0, 1]"),
        ("experiments/targets.json", {"groups": [0, 0], "reduction": "sum"}, "has groups [0, 0]"),
    ],
)
def test_what_no_option_does_is_not_asked_for(here, capsys, file, facts, said):
    """Of directories that other versions or the library wrote."""
    assert run(FIRST, *DATA) == 0
    write_json(STORE / file, {**read_json(STORE / file), **facts})
    printed = refused(capsys, FIRST, *DATA)
    assert said in printed
    another = ("--out", "other") if file == "metadata.json" else ("--name", "other")
    assert printed.endswith(f". Nothing was changed; use another {another[0]}\n")
    assert run(FIRST, *DATA, *another) == 0


def test_features_of_another_run_in_the_directory(here, capsys):
    assert run(FIRST, *DATA, "--seed", 3, "--out", "other") == 0
    assert run(FIRST, *DATA) == 0
    (file,) = Path("other/models/0").glob("train-*")
    shutil.copy(file, STORE / "models" / "0")
    said = refused(capsys, FIRST, *DATA)
    assert (
        "was made with seed '3'; this run has '0'. Nothing was changed; use another --out" in said
    )


def test_features_of_samples_that_are_none(here, capsys):
    assert run(FIRST, *DATA) == 0
    (file,) = (STORE / "models" / "0").glob("train-*")
    tensors, metadata = read_safetensors(file, None)
    write_safetensors(file, {**tensors, "inds": tensors["inds"] + 1}, metadata)
    said = refused(capsys, FIRST, *DATA)
    assert (
        "holds sample 12; expected samples below 12. Nothing was changed; use another --out" in said
    )


@pytest.mark.parametrize(
    "damaged",
    [
        "metadata.json",
        "experiments/targets.json",
        "models/0/checkpoint.json",
        "models/0/train-*",
        "models/0/drawn/drawn-*",
        "models/0/targets/targets/target-*",
    ],
)
def test_a_damaged_file_and_its_cure(here, capsys, damaged):
    assert run(FIRST, *DATA) == 0
    scores = np.load(STORE / "scores/targets.mmap")
    (file,) = STORE.glob(damaged)
    file.write_bytes(file.read_bytes()[:-20])
    said = refused(capsys, FIRST, *DATA)
    assert f"{file.name} is damaged: " in said
    assert said.endswith(". Delete the file and run the same command again\n")
    file.unlink()
    assert run(FIRST, *DATA) == 0
    np.testing.assert_array_equal(np.load(STORE / "scores/targets.mmap"), scores)


def test_no_directory_to_write_to(here, capsys):
    said = refused(capsys, FIRST, *DATA, "--out", "train.jsonl")
    assert "can't make the directory" in said
    assert "expected one that this user may write to" in said


def test_one_score_for_all_targets(here, capsys):
    assert run("run/checkpoint-5", *DATA, "--out", "each") == 0
    assert run("run/checkpoint-5", *DATA, "--mean", "--out", "mean", "--name", "dev") == 0
    each, mean = np.load("each/scores/targets.mmap"), np.load("mean/scores/dev.mmap")
    np.testing.assert_allclose(mean[:, 0], each.mean(1), atol=1e-5 * np.abs(each).max())
    assert "all targets" in capsys.readouterr().out


def test_adapters(here, capsys):
    models.model_for("causal_lm").save_pretrained("base")
    models.tokenizer().save_pretrained("base")
    model = models.with_adapters(load_model("base"))
    for seed in (1, 2):
        models.save_adapters(model, seed, here / "lora" / f"checkpoint-{seed}")
    assert run("lora", *DATA, "--base", "base") == 0
    assert np.load("fastproj-trak/scores/targets.mmap").shape == (12, 2)
    metadata = json.loads((here / "fastproj-trak" / "metadata.json").read_text())
    assert metadata["num_params"] == 128
    assert run("lora", *DATA, "--base", "base", "--grad-wrt", "all", "--out", "all") == 0
    assert json.loads((here / "all" / "metadata.json").read_text())["num_params"] > 4976

    config = here / "lora" / "checkpoint-2" / "adapter_config.json"
    named = json.loads(config.read_text())
    assert named["base_model_name_or_path"] == "base"
    assert run("lora", *DATA, "--out", "named") == 0  # model and tokenizer are where adapters say
    first, second = (np.load(f"{out}/scores/targets.mmap") for out in ("fastproj-trak", "named"))
    np.testing.assert_array_equal(first, second)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "base" / name).unlink()
    capsys.readouterr()
    assert run("lora/checkpoint-2", *DATA, "--out", "none") == 1
    assert "found no tokenizer in lora/checkpoint-2, base; expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("masked_lm", {"text": "w0 w1 w2 w3"}),
        ("seq2seq", {"source": "w0 w1", "target": "w2 w3"}),
        ("text_classification", {"text": "w0 w1", "label": "LABEL_1"}),
    ],
)
def test_other_models(here, kind, row):
    models.model_for(kind).save_pretrained("model")
    models.tokenizer().save_pretrained("model")
    write(here / "train.jsonl", [row] * 6)
    write(here / "targets.jsonl", [row])
    assert run("model", *DATA) == 0
    assert np.isfinite(np.load("fastproj-trak/scores/targets.mmap")).all()


def test_files_of_other_kinds_and_other_names(here):
    rows = [{"body": row["text"], "other": 1} for row in TRAIN]
    datasets.Dataset.from_list(rows).to_parquet("train.parquet")
    datasets.Dataset.from_list([{"body": row["text"]} for row in TARGETS]).save_to_disk("targets")
    (here / "targets.txt").write_text("".join(row["text"] + "\n" for row in TARGETS))
    model = "run/checkpoint-5"
    assert run(model, *DATA, "--out", "a") == 0
    column = ("--column", "text=body")
    assert run(model, "--train", "train.parquet", "--targets", "targets", *column, *FEW) == 0
    first, second = (np.load(f"{out}/scores/targets.mmap") for out in ("a", "fastproj-trak"))
    np.testing.assert_array_equal(first, second)
    assert run(model, "--train", "train.jsonl", "--targets", "targets.txt", *FEW, "--out", "b") == 0
    np.testing.assert_array_equal(np.load("b/scores/targets.mmap"), first)


def test_tokenised_samples_need_no_tokenizer(here):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "run" / "checkpoint-5" / name).unlink()
    rows = [{"input_ids": ids} for ids in models.token_lists(8)]
    write(here / "train.jsonl", rows)
    write(here / "targets.jsonl", rows[:2])
    assert run("run/checkpoint-5", *DATA) == 0


def test_the_labels_of_tokenised_samples_have_another_name(here, capsys):
    models.model_for("text_classification").save_pretrained("bert")
    models.tokenizer().save_pretrained("bert")
    rows = models.samples_for("text_classification", 6)
    own = [{**row, "label": (row["label"] + 1) % 3} for row in rows]
    named = [{**row, "fine": new["label"]} for row, new in zip(rows, own, strict=True)]
    found = []
    for out, samples, column in (("a", own, ()), ("b", named, ("--column", "label=fine"))):
        write(here / "train.jsonl", samples)
        write(here / "targets.jsonl", samples[:2])
        assert run("bert", *DATA, "--out", out, *column) == 0
        found.append(np.load(f"{out}/scores/targets.mmap"))
    np.testing.assert_array_equal(*found)
    # Beside a file of texts, a column of the one is none of the other.
    write(here / "targets.jsonl", [{"body": "w0 w1", "fine": "LABEL_2"}])
    columns = ("--column", "label=fine", "--column", "text=body")
    assert run("bert", *DATA, "--out", "c", *columns) == 0
    write(here / "targets.jsonl", named[:2])
    said = refused(capsys, "bert", *DATA, "--out", "d", *columns)
    assert "sample 0 of train.jsonl has 'input_ids', so columns= (--column) takes no 'text'" in said
    assert run("bert", *DATA, "--out", "d", *columns[:2]) == 0


def test_tokenised_samples_are_not_cut(here, capsys):
    rows = [{"input_ids": [5] * n} for n in (3, 20, 4)]
    write(here / "train.jsonl", rows)
    said = refused(capsys, FIRST, *DATA, "--max-length", 10)
    assert "sample 1 of train.jsonl is tokenised already, and has 20 tokens; expected" in said
    assert run(FIRST, *DATA, "--max-length", 20) == 0
    write(here / "train.jsonl", [*rows, {"input_ids": [5] * (models.LONGEST + 1)}])
    said = refused(capsys, FIRST, *DATA, "--out", "other")
    assert f"sample 3 of train has {models.LONGEST + 1} tokens" in said
    assert f"expected at most {models.LONGEST}: texts cut by" in said


def test_texts_are_cut_to_the_positions_that_tokens_have(here, caplog, capsys):
    """RoBERTa's first ones are none of a token."""
    config = tf.RobertaConfig(**{**models.BERT, "pad_token_id": 1})
    tf.RobertaForMaskedLM(config).save_pretrained("roberta")
    models.tokenizer().save_pretrained("roberta")
    write(here / "train.jsonl", [*TRAIN, {"text": "w0 " * 100}])
    with caplog.at_level(logging.WARNING, "fastproj.trak"):
        assert run("roberta", *DATA) == 0
    assert f"1 of 13 samples of train.jsonl were cut to {models.LONGEST - 2} tokens" in caplog.text
    said = refused(capsys, "roberta", *DATA, "--out", "b", "--max-length", models.LONGEST)
    assert said.endswith("(--max-length 38), or tokenised samples that are shorter\n")
    assert run("roberta", *DATA, "--out", "b", "--max-length", 38) == 0


def test_long_samples_are_cut_to_what_the_model_takes(here, caplog):
    write(here / "train.jsonl", [*TRAIN, {"text": "w0 " * 100}])
    with caplog.at_level(logging.WARNING, "fastproj.trak"):
        assert run("run/checkpoint-5", *DATA) == 0
    assert f"1 of 13 samples of train.jsonl were cut to {models.LONGEST} tokens" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpt2", *DATA), "'gpt2', which is no folder here; expected a local folder"),
        (("run", *DATA, "--train", "none.jsonl"), "'none.jsonl', which is not here"),
        (("run", *DATA, "--train", "run"), "holds no data set"),
        (("run", *DATA, "--tokenizer", "run"), "found no tokenizer in run"),
        (("run", *DATA, "--base", "run/checkpoint-5"), "expected a folder of adapters"),
        (
            ("run", *DATA, "--task", "masked_lm"),
            "AutoModelForMaskedLM can't load; expected another task",
        ),
        (
            ("run", *DATA, "--column", "text=body"),
            "sample 0 of train.jsonl has 'text'; expected 'b",
        ),
        (("run", *DATA, "--max-length", "1"), "max_length=1 (--max-length) for causal_lm"),
    ],
)
def test_what_can_not_work_is_said(here, capsys, arguments, said):
    assert run(*arguments) == 1
    printed = capsys.readouterr().err
    assert "fastproj trak: " in printed
    assert said in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "MODEL"),
        (("run", "--train", "a.txt"), "--targets"),
        (("run", *DATA, "--column", "text"), "expected NAME=COLUMN"),
        (("run", *DATA, "--base", ""), "argument --base: received ''; expected a path"),
        (("run", *DATA, "--out", ""), "argument --out: received ''; expected a path"),
        (("",), "argument MODEL: received ''; expected a path"),
        (("run", *DATA, "--proj-dim", "0"), "expected an integer of at least 1"),
        (("run", *DATA, "--factored", "0"), "received '0'; expected an integer of at least 1"),
        (
            ("run", *DATA, "--factored", 1 << 16),
            "--factored: received r=65536; expected 1 <= r < 2",
        ),
        (("run", *DATA, "--proj-dim", "2**33"), "--proj-dim: received K=8589934592; expected 1 <="),
        (
            ("run", *DATA, "--batch-size", "2**20"),
            "--batch-size: received B=1048576; expected 1 <= B",
        ),
        (("run", *DATA, "--batch-size", "0"), "received '0'; expected an integer of at least 1"),
        (("run", *DATA, "--seed", "-1"), "--seed: received N=-1; expected 0 <= N < 2^64"),
        (("run", *DATA, "--seed", 1 << 64), "expected 0 <= N < 2^64"),
        (("run", *DATA, "--top", "0"), "--top: received '0'; expected an integer of at least 1"),
        (("run", *DATA, "--show", "-1"), "--show: received N=-1; expected 0 <= N < 2^63"),
        (("run", *DATA, "--show", "2.5"), "--show: invalid int value: '2.5'"),
        (
            ("run", *DATA, "--device", "nowhere"),
            "--device: received device='nowhere' (Expected one",
        ),
        (("run", *DATA, "--device", "meta"), "--device: received device='meta', where tensors"),
        (("run", *DATA, "--name", "a/b"), "--name: received NAME='a/b'; expected letters"),
        (("run", *DATA, "--factored", "2.5"), "received '2.5'; expected an integer of at least 1"),
        (("run", *DATA, "--task", "lm"), "invalid choice: 'lm'"),
        (("run", *DATA, "--kind", "sparse"), "--kind: invalid choice: 'sparse'"),
        (
            ("run", *DATA, "--kind", "rademacher", "--block", 16),
            "--block: received W=16 with --kind rademacher; expected --kind sjlt, or no --block\n",
        ),
        (
            ("run", *DATA, "--block", 48),
            "--block: received W=48; expected a power of two from 16 to 65536\n",
        ),
        (("run", *DATA, "--block", 8), "--block: received W=8; expected a power of two from 16"),
        (("run", *DATA, "--block", 1 << 17), "--block: received W=131072; expected a power of"),
        (("run", *DATA, "--block", "0"), "--block: received '0'; expected a power of two from 16"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, arguments, said):
    """Before anything is loaded."""
    monkeypatch.setattr(trak, "run", None)
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_interrupted(here, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(HFTRAKer, "score", interrupted)
    assert run("run", *DATA) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for said in ("asks no network", "prompt", "source", "text_pair", "exit status", "torchrun"):
        assert said.lower() in printed.lower()
    assert cli.COMMANDS["trak"]


def test_the_tasks_are_those_of_the_models():
    assert sorted(trak.TASKS) == sorted(AUTO_CLASSES)


def test_without_transformers_there_is_help_and_the_extra_is_named():
    """As after `pip install torch-fastproj[trak]`."""
    program = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "from fastproj import cli\n"
        "try: cli.main(['trak', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not cli.main(['--print-completion', 'bash'])\n"
        "sys.exit(cli.main(['trak', 'run', '--train', 'a.txt', '--targets', 'a.txt']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said = "fastproj trak: fastproj.trak.hf needs transformers: pip install 'torch-fastproj[hf]'\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert "--max-length" in done.stdout


def test_a_model_without_a_head_is_refused(here, capsys):
    tf.BertModel(tf.BertConfig(**models.BERT)).save_pretrained("bert")
    assert run("bert", *DATA) == 1
    assert "names the class BertModel" in capsys.readouterr().err
