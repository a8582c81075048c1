"""Whether the configurations of two models, or of two adapters, make one function of one state.

What leaves the outputs in eval mode as they are is not compared: checkpoints of one training may
differ in it, and so may the model that the user built for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from fastproj.trak.hf.heads import kind_of

# Of transformers' configurations.
UNSEEN = {
    "architectures",
    "begin_suppress_tokens",
    "bos_token_id",  # texts come tokenised
    "chunk_size_feed_forward",
    "do_sample",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "label2id",
    "max_length",  # of generated texts, like min_length
    "min_length",
    "num_beams",
    "pretraining_tp",
    "problem_type",  # the first training step with labels writes it
    "return_dict",
    "suppress_tokens",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
UNSEEN_STARTS = ("_", "forced_", "init_", "initializer_", "output_")
# Of peft's. The names and shapes of the adapters say which modules have one.
ADAPTERS_UNSEEN = {
    "auto_mapping",
    "base_model_name_or_path",  # compared by itself
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "modules_to_save",
    "peft_version",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    *("beta1", "beta2", "deltaT", "orth_reg_weight", "tfinal", "tinit", "total_step"),  # AdaLoRA
}
INITS_OF_ADAPTERS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base, too


def other_settings(model: Any, checkpoint: Any, class_name: str) -> list[str]:
    """In what two transformers configurations differ that changes the function, for messages.

    Only what both have is compared: a class has all settings that it reads.

    class_name : of the models.
    """
    ours, theirs = flat(model.to_dict()), flat(checkpoint.to_dict())
    wrong = unequal({key: ours[key] for key in ours if key in theirs}, theirs)
    classifier = kind_of(class_name) == "text_classification"
    if not (classifier and ours.get("is_encoder_decoder")):
        wrong.pop("eos_token_id", None)  # BART's classifier reads the output at it
    if not classifier and None in wrong.get("pad_token_id", ()):
        del wrong["pad_token_id"]  # a Trainer sets it; classifiers find the end of a text by it
    return described(wrong)


def other_adapters(model: Any, checkpoint: Any) -> list[str]:
    """The same of two peft configurations."""
    ours, theirs = model.to_dict(), checkpoint.to_dict()
    wrong = unequal(*(adapter_settings(config) for config in (ours, theirs)))
    bases = [config.get("base_model_name_or_path") for config in (ours, theirs)]
    # Where a folder lies may change, as may who a model on the Hub belongs to.
    if all(bases) and PurePath(bases[0]).name != PurePath(bases[1]).name:
        wrong["base_model_name_or_path"] = (bases[0], bases[1])
    return described(wrong)


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a peft configuration changes the function."""
    found = {}
    for key, value in config.items():
        if key in ADAPTERS_UNSEEN or is_dropout(key):
            continue
        of_adapters = key.startswith("init_") and value in INITS_OF_ADAPTERS
        found[key] = True if of_adapters else value
    return found


def flat(config: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """What of a transformers configuration changes the function; that of a part as part.name."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in UNSEEN or key.startswith(UNSEEN_STARTS) or is_dropout(key):
            continue
        if isinstance(value, Mapping) and "model_type" in value:
            found.update(flat(value, f"{start}{key}."))
        else:
            found[start + key] = value
    return found


def is_dropout(key: str) -> bool:
    """Whether a setting is a probability of dropout, which eval mode turns off.

    ESM's token_dropout and NLLB-MoE's moe_token_dropout scale the values in eval mode.
    """
    ends = ("dropout", "pdrop", "layerdrop", "dropout_prob", "dropout_rate", "drop_path_rate")
    return key.endswith(ends) and not key.endswith("token_dropout")


def unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of ``ours`` that differ, with both values."""
    return {
        key: (value, theirs.get(key))
        for key, value in ours.items()
        if as_json(value) != as_json(theirs.get(key))
    }


def as_json(value: Any) -> Any:
    """A value as it comes out of a file: there are no tuples, sets, or keys that are numbers."""
    return json.loads(json.dumps(value, default=in_order))


def in_order(value: Any) -> Any:
    """A set as a list, and a string of everything else that JSON has not."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def described(wrong: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Settings that differ, for messages."""
    return [f"{key} {theirs!r:.60}, not {ours!r:.60}" for key, (ours, theirs) in wrong.items()]
