"""Models, adapters and tokenizers in local folders, and what is said of folders without."""

from __future__ import annotations

import json
import logging
import re

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers as tf

from fastproj import TRAKer
from fastproj.trak.hf import (
    HFTRAKer,
    checkpoints_in,
    load_model,
    load_tokenizer,
    read_samples,
)
from fastproj.trak.hf.folders import load_weights
from fastproj.trak.hf.heads import kind_of
from fastproj.trak.hf.settings import is_dropout, other_settings
from tests.trak.hf import models, training

pytestmark = pytest.mark.usefixtures("no_network")

OPTIONS = {"proj_dim": 16, "logging_level": logging.ERROR}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The output directory of a Trainer: checkpoint-9, checkpoint-10, checkpoint-100."""
    folder = tmp_path_factory.mktemp("run")
    for seed, step in enumerate((10, 9, 100)):
        models.model_for("causal_lm", seed).save_pretrained(folder / f"checkpoint-{step}")
    return folder


def scores(folder, model, checkpoints):
    samples = models.samples_for("causal_lm", 10)
    return np.array(HFTRAKer(model, samples, checkpoints, folder, **OPTIONS).score(samples[:2]))


def test_checkpoints_come_in_the_order_of_training(run_dir):
    assert [path.name for path in checkpoints_in(run_dir)] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-100",
    ]
    assert checkpoints_in(run_dir / "checkpoint-9") == [run_dir / "checkpoint-9"]


def test_folders_are_the_states_in_them(tmp_path, run_dir):
    states = [models.model_for("causal_lm", seed).state_dict() for seed in (1, 0)]
    wanted = scores(tmp_path / "a", models.model_for("causal_lm", 5), states)
    found = scores(tmp_path / "b", run_dir / "checkpoint-100", checkpoints_in(run_dir)[:2])
    np.testing.assert_array_equal(found, wanted)
    other = scores(tmp_path / "c", run_dir / "checkpoint-100", None)
    assert (other != wanted).any()


@pytest.mark.parametrize("injected", [False, True])
def test_adapters_are_the_states_in_them(tmp_path, injected):
    model = models.with_adapters(models.model_for("causal_lm"))
    folders, states = [], []
    for seed in (1, 2):
        folders.append(models.save_adapters(model, seed, tmp_path / f"checkpoint-{seed}"))
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    wanted = scores(tmp_path / "a", model, states)
    assert (wanted != scores(tmp_path / "one", model, states[:1])).any()
    other: object = model
    if injected:  # by transformers, without peft's wrapper
        other = models.model_for("causal_lm")
        other.add_adapter(model.peft_config["default"])
    np.testing.assert_allclose(scores(tmp_path / "b", other, folders), wanted, rtol=1e-6)


@pytest.mark.parametrize("active", [["other"], ["default", "other"]])
def test_adapters_by_name_are_in_folders_of_these_names(tmp_path, active):
    """As peft saves them: "default" beside the others' folders."""
    model = models.with_adapters(models.model_for("causal_lm"))
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(active)
    folders, states = [], []
    for seed in (1, 2):
        folders.append(models.save_adapters(model, seed, tmp_path / f"checkpoint-{seed}"))
        states.append({name: t.clone() for name, t in model.state_dict().items()})
    wanted = scores(tmp_path / "a", model, states)
    if len(active) == 1:  # the other one isn't read, and need not be there
        (folders[0] / "adapter_config.json").unlink()
    np.testing.assert_array_equal(scores(tmp_path / "b", model, folders), wanted)
    if len(active) == 2:
        with pytest.raises(ValueError, match=r"not all of the adapters .*default, other.*set_ad"):
            scores(tmp_path / "c", model, [folders[0] / "other"])


@pytest.mark.parametrize("kind", ["peft", "put in by peft", "transformers", "two of transformers"])
def test_adapters_alone_are_a_checkpoint_for_the_rest_of_the_model(tmp_path, kind):
    """Without the name that a model has for them, as ``save_pretrained`` leaves it out."""
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = models.model_for("causal_lm")
    if kind == "peft":
        model = peft.get_peft_model(model, lora)
    elif kind == "put in by peft":
        model = peft.inject_adapter_in_model(lora, model)
    else:
        model.add_adapter(lora, "mine")
    if kind == "two of transformers":
        model.add_adapter(lora, "other")
        model.set_adapter("mine")
    name = "mine" if "transformers" in kind else "default"
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    whole = {key: t.clone() for key, t in model.state_dict().items()}
    alone = {key.replace(f".{name}.", "."): t for key, t in whole.items() if f".{name}." in key}
    ids = torch.randint(0, 20, (4, 6))
    found = []
    for folder, state, strict in (("a", whole, True), ("b", alone, False)):
        traker = TRAKer(model, "causal_lm", 4, tmp_path / folder, proj_dim=16, grad_wrt="trainable")
        for p in model.parameters():
            if p.requires_grad:
                torch.nn.init.zeros_(p)
        traker.load_checkpoint(state, 0, strict=strict)
        traker.featurize({"input_ids": ids, "labels": ids}, num_samples=4)
        found.append(traker.saver.matrix(0))
    assert torch.equal(*found)
    assert bool(found[0].any())
    every = TRAKer(model, "causal_lm", 4, tmp_path / "c", proj_dim=16)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"strict=False of a TRAKer\(grad_wrt='trainable'\)"):
            every.load_checkpoint(alone, 0, strict=strict)


def test_advice_about_a_part_of_the_model_works_for_hftraker(tmp_path):
    model = models.with_adapters(models.model_for("causal_lm"))
    whole = {key: t.clone() for key, t in model.state_dict().items()}
    part = {key: t for key, t in whole.items() if "lora_" in key}
    with pytest.raises(ValueError, match=r"HFTRAKer: \{\*\*model.state_dict\(\), \*\*checkpoint\}"):
        scores(tmp_path / "a", model, [part])
    found = scores(tmp_path / "b", model, [{**model.state_dict(), **part}])
    np.testing.assert_array_equal(found, scores(tmp_path / "c", model, [whole]))


def test_adapters_and_their_base(tmp_path):
    base = models.model_for("causal_lm")
    base.save_pretrained(tmp_path / "base")
    model = models.with_adapters(tf.GPT2LMHeadModel.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapters")
    loaded = load_model(tmp_path / "adapters")  # which say where their base is
    for (name, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    trainable = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in loaded.named_parameters() if "lora_" in name}
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "meta/llama"
    (tmp_path / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FileNotFoundError, match=r"'meta/llama', which is no folder here.*--base"):
        load_model(tmp_path / "adapters")
    again = load_model(tmp_path / "adapters", base=tmp_path / "base")
    assert all(map(torch.equal, again.state_dict().values(), loaded.state_dict().values()))


def test_prefixes_are_loaded_to_be_trained(tmp_path):
    """peft loads them for inference alone, and saves none of the network that may make them."""
    models.model_for("causal_lm").save_pretrained(tmp_path / "base")
    for own in (False, True):
        config = peft.PrefixTuningConfig(
            num_virtual_tokens=2,
            task_type="CAUSAL_LM",
            prefix_projection=own,
            encoder_hidden_size=8,
        )
        made = peft.get_peft_model(models.model_for("causal_lm"), config).eval()
        made.save_pretrained(tmp_path / f"adapters{own}")
        model = load_model(tmp_path / f"adapters{own}", base=tmp_path / "base")
        found = scores(tmp_path / f"a{own}", model, [tmp_path / f"adapters{own}"])
        if own:
            with pytest.raises(ValueError, match="expected a model from load_model"):
                scores(tmp_path / "c", made, [tmp_path / "adaptersTrue"])
        else:
            np.testing.assert_allclose(found, scores(tmp_path / "b", made, None), rtol=1e-4)


@pytest.mark.parametrize("said", [None, "", 5])
def test_adapters_that_name_no_base_do_not_take_the_working_directory(tmp_path, monkeypatch, said):
    models.model_for("causal_lm").save_pretrained(tmp_path)
    models.with_adapters(load_model(tmp_path)).save_pretrained(tmp_path / "adapters")
    path = tmp_path / "adapters" / "adapter_config.json"
    config = {**json.loads(path.read_text()), "base_model_name_or_path": said}
    path.write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=f"belong to {said!r}, which is no folder here.*--b"
    ):
        load_model("adapters")
    with pytest.raises(FileNotFoundError, match="received '', which is no folder here"):
        load_model("adapters", base="")
    assert load_model("adapters", base=".").peft_config


def test_an_empty_path_is_no_folder(tmp_path, monkeypatch):
    """As a shell's variable that isn't set gives it; the working directory holds all."""
    models.model_for("causal_lm").save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    datasets.Dataset.from_list([{"text": "w1"}]).save_to_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    for read in (load_model, load_tokenizer, checkpoints_in, read_samples):
        assert read(".")
        with pytest.raises(FileNotFoundError, match="received '', which is "):
            read("")


def test_dtype_is_that_of_the_files_or_what_is_asked_for(tmp_path):
    models.model_for("causal_lm").to(torch.bfloat16).save_pretrained(tmp_path)
    assert next(load_model(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path, dtype="float32").parameters()).dtype == torch.float32
    assert not load_model(tmp_path).training


def test_a_head_in_more_digits_than_the_rest_keeps_them(tmp_path):
    made = models.model_for("text_classification")
    made.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    model.classifier.float()
    samples = models.samples_for("text_classification", 4)
    traker = HFTRAKer(model, samples, [tmp_path], tmp_path / "trak", **OPTIONS)
    traker.traker.load_checkpoint(load_weights(model, tmp_path), 0)
    assert model.bert.pooler.dense.weight.dtype == torch.bfloat16
    assert torch.equal(model.classifier.weight, made.classifier.weight)


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm", "seq2seq", "text_classification"])
def test_the_task_may_be_named_where_the_configuration_says_nothing(tmp_path, kind):
    model = models.model_for(kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names the class \(none\)"):
        load_model(tmp_path)
    assert type(load_model(tmp_path, kind)) is type(model)
    with pytest.raises(ValueError, match="received task='lm'"):
        load_model(tmp_path, "lm")


def test_parameters_are_not_filled_at_random(tmp_path):
    """A base model's folder for a classifier: transformers would only warn."""
    models.model_for("masked_lm").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks 4 parameters of BertForSequenceClassification"):
        load_model(tmp_path, "text_classification")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_that_were_saved_with_a_wrapper_are_named(tmp_path, prefix):
    model = models.model_for("text_classification")
    weights = {prefix + name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=f"its keys begin with '{prefix}': remove that"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("gpt2", FileNotFoundError, "no folder here.*hf download gpt2 --local-dir DIR"),
        ("openai-community/gpt2", FileNotFoundError, "hf download openai-community/gpt2"),
        ("a/b/c", FileNotFoundError, "no folder here; expected a local folder, as save_pre[^(]*$"),
        ("file.txt", FileNotFoundError, "is a file; expected a local folder"),
        ("empty", FileNotFoundError, "holds no model; expected config.json"),
        ("trained", FileNotFoundError, "checkpoints_in.*lists checkpoint-5"),
        (7, TypeError, "received int"),
    ],
)
def test_what_is_no_local_folder(tmp_path, monkeypatch, path, error, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "trained" / "checkpoint-5").mkdir(parents=True)
    with pytest.raises(error, match=said):
        load_model(path)
    samples = models.samples_for("causal_lm", 3)
    with pytest.raises(error, match=said):
        scores(tmp_path / "out", models.model_for("causal_lm"), [path])
    with pytest.raises(error, match="received"):
        HFTRAKer(path, samples, None, tmp_path / "out")


def test_checkpoints_of_another_kind_than_the_model(tmp_path):
    plain = models.model_for("causal_lm")
    plain.save_pretrained(tmp_path / "whole")
    adapted = models.with_adapters(models.model_for("causal_lm"))
    adapted.save_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="a whole model, for a model with adapters"):
        scores(tmp_path / "out", adapted, [tmp_path / "whole"])
    with pytest.raises(ValueError, match="adapters, for a model without any"):
        scores(tmp_path / "other", plain, [tmp_path / "adapters"])
    with pytest.raises(ValueError, match=r"received base=.*holds a whole model"):
        load_model(tmp_path / "whole", base=tmp_path / "whole")
    (tmp_path / "adapters" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        scores(tmp_path / "out", adapted, [tmp_path / "adapters"])


def test_adapters_of_another_shape(tmp_path):
    model = models.with_adapters(models.model_for("causal_lm"))
    for name, lora in (
        ("rank", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)),
        ("more", peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
        ("fewer", peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True)),
    ):
        peft.get_peft_model(models.model_for("causal_lm"), lora).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match="are not those of the model"):
            scores(tmp_path / "out", model, [tmp_path / name])


def test_adapters_that_make_another_function(tmp_path):
    """Of the same names and shapes: only their settings say so."""

    def adapted(**settings):
        chosen = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, **settings}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **chosen)
        return peft.get_peft_model(models.model_for("causal_lm"), lora)

    model = adapted(lora_alpha=2)
    for settings, said in (
        ({"lora_alpha": 64}, "lora_alpha 64, not 2"),
        ({"lora_alpha": 2, "use_rslora": True}, "use_rslora True, not False"),
        ({"lora_alpha": 2, "alpha_pattern": {"c_attn": 9}}, "alpha_pattern {'c_attn': 9}, not {}"),
        ({"lora_alpha": 2, "init_lora_weights": "olora"}, "init_lora_weights 'olora', not True"),
        ({"lora_alpha": 2, "use_dora": True}, "use_dora True, not False"),
        ({"lora_alpha": 2, "r": 3}, "r 3, not 2"),
    ):
        models.save_adapters(adapted(**settings), 1, tmp_path / "other")
        with pytest.raises(ValueError, match=f"differ in {re.escape(said)}.*of one training"):
            scores(tmp_path / "out", model, [tmp_path / "other"])
        injected = models.model_for("causal_lm")
        injected.add_adapter(model.peft_config["default"])
        with pytest.raises(ValueError, match=re.escape(said)):
            scores(tmp_path / "injected", injected, [tmp_path / "other"])


def test_adapters_of_another_base(tmp_path):
    model = models.with_adapters(models.model_for("causal_lm"))
    folder = models.save_adapters(model, 1, tmp_path / "adapters")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    own, other = model.peft_config["default"], "elsewhere/gpt2-large"
    path.write_text(json.dumps({**config, "base_model_name_or_path": other}))
    scores(tmp_path / "one says none", model, [folder])
    own.base_model_name_or_path = "/data/gpt2-large"  # the same one, in another place
    scores(tmp_path / "place", model, [folder])
    own.base_model_name_or_path = "gpt2"
    with pytest.raises(ValueError, match=r"base_model_name_or_path 'elsewhere/gpt2-large', not 'g"):
        scores(tmp_path / "out", model, [folder])


def test_settings_of_adapters_that_leave_the_function(tmp_path):
    """Of dropout, of initialisation, and other words for the same modules."""
    base = models.model_for("causal_lm")
    lora = peft.LoraConfig(
        r=2, target_modules=".*c_attn", lora_dropout=0.5, init_lora_weights="gaussian"
    )
    model = peft.get_peft_model(models.model_for("causal_lm"), lora).eval()
    folder = models.save_adapters(model, 1, tmp_path / "adapters")
    wanted = scores(tmp_path / "a", model, [model.state_dict()])
    other = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"])).eval()
    np.testing.assert_array_equal(scores(tmp_path / "b", other, [folder]), wanted)


def saved(folder, kind="causal_lm", **changes):
    """A model in a folder whose configuration then says something else."""
    models.model_for(kind).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("causal_lm", {"activation_function": "relu"}, "activation_function 'relu', not 'gelu_ne"),
        ("causal_lm", {"scale_attn_weights": False}, "scale_attn_weights False, not True"),
        ("causal_lm", {"pad_token_id": 3}, "pad_token_id 3, not 0"),
        ("text_classification", {"pad_token_id": None}, "pad_token_id None, not 0"),
        ("text_classification", {"layer_norm_eps": 0.1}, "layer_norm_eps 0.1, not 1e-12"),
        ("seq2seq", {"decoder_start_token_id": 1}, "decoder_start_token_id 1, not 0"),
    ],
)
def test_models_of_another_function(tmp_path, kind, changes, said):
    """Of the same names and shapes."""
    folder = saved(tmp_path / "other", kind, **changes)
    samples = models.samples_for(kind, 5)
    traker = HFTRAKer(models.model_for(kind), samples, [folder], tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match=rf"another function .*\({said}.*of one training"):
        traker.featurize()
    again = HFTRAKer(folder, samples, [folder], tmp_path / "again", **OPTIONS)  # as it says
    again.featurize()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("causal_lm", {"resid_pdrop": 0.7, "use_cache": False, "initializer_range": 1.0}),
        ("causal_lm", {"pad_token_id": None, "bos_token_id": 7, "eos_token_id": [2, 3]}),
        ("causal_lm", {"layer_norm_epsilon": 1e-5, "n_inner": None, "max_length": 9, "mine": 3}),
        ("text_classification", {"problem_type": "single_label_classification"}),
        ("text_classification", {"id2label": {"0": "a", "1": "b", "2": "c"}, "eos_token_id": 4}),
    ],
)
def test_settings_that_leave_the_function(tmp_path, kind, changes):
    folder, samples = saved(tmp_path / "same", kind, **changes), models.samples_for(kind, 8)
    model = models.model_for(kind)
    wanted = HFTRAKer(model, samples, None, tmp_path / "a", **OPTIONS).score(samples[:2])
    found = HFTRAKer(model, samples, [folder], tmp_path / "b", **OPTIONS).score(samples[:2])
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("adapters", [False, True])
def test_all_checkpoints_of_a_training_are_of_one_function(tmp_path, adapters):
    """Also of one that was resumed, and for the model as it was before."""
    options = {"adapters": adapters, "save_steps": 2}
    training.train(tmp_path / "run", [], max_steps=4, **options)
    training.train(tmp_path / "run", [], tmp_path / "run" / "checkpoint-4", max_steps=6, **options)
    model = models.model_for("causal_lm")
    if adapters:
        model = models.with_adapters(model)
    checkpoints = checkpoints_in(tmp_path / "run")
    assert len(checkpoints) == 3
    assert np.isfinite(scores(tmp_path / "out", model, checkpoints)).all()


def test_dropout_is_told_from_scales_by_the_same_name():
    assert is_dropout("hidden_dropout_prob")
    assert is_dropout("encoder_layerdrop")
    assert not is_dropout("token_dropout")  # ESM: in eval mode, too
    assert not is_dropout("moe_token_dropout")


def test_settings_of_the_parts_of_a_model_count():
    ours, theirs = tf.MptConfig(), tf.MptConfig(attn_config={"attn_pdrop": 1})
    assert not other_settings(ours, theirs, "MptForCausalLM")
    theirs = tf.MptConfig(attn_config={"alibi_bias_max": 4})
    assert other_settings(ours, theirs, "MptForCausalLM") == ["attn_config.alibi_bias_max 4, not 8"]


def test_tokenizers(tmp_path):
    models.tokenizer().save_pretrained(tmp_path / "there")
    (tmp_path / "empty").mkdir()
    assert load_tokenizer(tmp_path / "empty", tmp_path / "there")("w0 w1")["input_ids"] == [5, 6, 2]
    with pytest.raises(FileNotFoundError, match="found no tokenizer in"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2LMHeadModel", "causal_lm"),
        ("LlamaForCausalLM", "causal_lm"),
        ("MyOwnForCausalLM", "causal_lm"),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("BartForConditionalGeneration", "seq2seq"),  # a masked one, too
        ("MarianMTModel", "seq2seq"),
        ("BertForMaskedLM", "masked_lm"),
        ("ModernBertForMaskedLM", "masked_lm"),
        ("BertForTokenClassification", "token_classification"),
        ("GPT2ForSequenceClassification", "text_classification"),
        ("XLMWithLMHeadModel", None),
        ("XLNetLMHeadModel", None),
        ("LlavaForConditionalGeneration", None),
        ("BertModel", None),
        ("BertForQuestionAnswering", None),
    ],
)
def test_what_classes_are_for(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
    ids=["python", "torch"],
)
def test_a_want_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    model = models.model_for("causal_lm")
    model.save_pretrained(tmp_path)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(type(error)) as raised:
        load_model(tmp_path, "causal_lm")
    assert raised.value is error
