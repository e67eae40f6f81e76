"""The YAML file of `peftfast train`: settings by their own names, and by those of axolotl, LLaMA-Factory and TRL."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.settings import DATA_TYPES, FREQUENCIES, TrainSettings, listed

FIELDS = {field.name: field for field in dataclasses.fields(TrainSettings)}
# Other names of settings. Those of settings that TrainSettings lacks are unknown like any other.
ALIASES = {
    "base_model": "model",
    "model_name_or_path": "model",
    "adapter": "method",
    "finetuning_type": "method",
    "datasets": "data",
    "dataset": "data",
    "dataset_name": "data",
    "dataset_train_split": "data_split",
    "test_datasets": "eval_file",
    "eval_dataset": "eval_file",
    "dataset_test_split": "eval_split",
    "val_set_size": "eval_share",
    "val_size": "eval_share",
    "output_dir": "out",
    "overwrite_output_dir": "overwrite",
    "chat_template_path": "chat_template",
    "lora_rank": "lora_r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lora_target_linear": "target_modules",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bf16": "dtype",
    "cutoff_len": "sequence_len",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "packing": "sample_packing",
    "per_device_train_batch_size": "micro_batch_size",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optim": "optimizer",
    "evaluation_strategy": "eval_strategy",
    "lr_scheduler": "lr_scheduler_type",
    "resume_from_checkpoint": "resume",
}
# Keys that make qlora of lora, with the value that does.
FOUR_BITS = {"load_in_4bit": True, "quantization_bit": 4}
# What the types of data are called by axolotl; it knows more, each with a wording of its own.
TYPES = {
    "completion": "text",
    "pretrain": "text",
    "chat_template": None,  # messages or conversations
    "alpaca": "alpaca",
    "sharegpt": "sharegpt",
} | {name: name for name in DATA_TYPES}
# Keys that choose an attention by switching it on.
ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
}
# Keys that say whether a setting's steps are taken.
STRATEGIES = {"eval_strategy": "eval_steps", "save_strategy": "save_steps"}
# Keys that change nothing here, with the only value that they may have; None: any.
UNUSED = {
    "do_train": True,
    "stage": "sft",
    **dict.fromkeys(("dataset_prepared_path", "pad_to_sequence_len", "plot_loss")),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience")),
}
# What axolotl's examples leave blank or switch off. With any other value, they are as unknown as other keys.
SWITCHED_OFF = (
    "load_in_8bit", "fp16", "tf32", "strict", "group_by_length", "debug", "xformers_attention", "lora_model_dir",
    "early_stopping_patience", "local_rank", "deepspeed", "fsdp", "fsdp_config", "hub_model_id",
    "wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_log_model",
)  # fmt: skip
KNOWN = (*FIELDS, *ALIASES, *FOUR_BITS, *ATTENTION, *STRATEGIES, *UNUSED, "special_tokens")
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def read_config(path: Path, model: str | None = None) -> tuple[dict[str, object], list[str]]:
    """Return the settings that a YAML file makes, by the fields of TrainSettings, and its keys that change nothing.

    A key without a value makes no setting.

    Args:
        model: overrides the file's.
    Raises:
        UserError: the file cannot be read; a key is unknown, has a value of the wrong type, contradicts another, or
            asks for special tokens that the model's tokenizer does not have.
    """
    settings: dict[str, object] = {}
    origins: dict[str, str] = {}
    for key, value in _entries(path).items():
        for name, made in _settings(path, key, value).items():
            if name in settings and settings[name] != made:
                raise UserError(
                    f"{path}: {origins[name]} and {key} contradict each other: one makes {name} "
                    f"{settings[name]}, the other {made}."
                )
            settings[name], origins[name] = made, key
    settings = _in_four_bits(path, settings, origins)
    _check_strategies(path, settings, origins)
    _check_special_tokens(path, model or settings.get("model"), settings.get("special_tokens", {}))
    unused = [origins[name] for name in settings if name not in FIELDS]
    return {name: value for name, value in settings.items() if name in FIELDS}, unused


def _entries(path: Path) -> dict[str, object]:
    import yaml

    if not path.is_file():
        raise UserError(f"{path} does not exist or is not a file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        tree, entries = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {first_sentence(error)}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise UserError(
            f"{where}: not valid YAML ({getattr(error, 'problem', None) or first_sentence(error)})."
        ) from None
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise UserError(f"{path}: a YAML file of settings holds lines such as lora_r: 16.")
    keys = [key.value for key, _ in tree.value]
    for key in entries:
        if keys.count(key) > 1:
            raise UserError(f"{path}: {key} is there {keys.count(key)} times.")
    return entries


def _settings(path: Path, key: str, value: object) -> dict[str, object]:
    """Return what one key makes, by field; "four_bits" beside, of the keys in FOUR_BITS; else the key itself."""
    spelled = key.replace("-", "_")
    name = ALIASES.get(spelled, spelled)
    if spelled in SWITCHED_OFF and value in (None, False):
        return {}
    if name not in KNOWN:
        near = difflib.get_close_matches(spelled, KNOWN, n=1, cutoff=0.75)
        hint = f"; the nearest one is {near[0]}" if near else ""
        raise UserError(f"{path}: {key} is no setting of peftfast train{hint}.")
    if value is None:  # as axolotl has it, without an adapter all is trained
        return {"method": "full"} if name == "method" else {}
    if name in FOUR_BITS:
        told = _typed(path, key, value, type(FOUR_BITS[name]))
        if told not in (FOUR_BITS[name], False):
            raise UserError(f"{path}: {key} is {FOUR_BITS[name]}, not {value!r}.")
        return {"four_bits": told == FOUR_BITS[name]}
    if name in ATTENTION:
        return {"attn_implementation": ATTENTION[name]} if _typed(path, key, value, bool) else {}
    if name in STRATEGIES:
        strategy = "no" if value is False else value  # which YAML reads for no
        if strategy not in ("no", "steps", "epoch"):
            raise UserError(f"{path}: {key} is no, steps or epoch, not {value!r}.")
        return {FREQUENCIES[STRATEGIES[name]]: 1} if strategy == "epoch" else {name: strategy}
    if name in UNUSED:
        if UNUSED[name] not in (None, value):
            raise UserError(f"{path}: {key} is {UNUSED[name]}, not {value!r}.")
        return {name: value}
    if name == "special_tokens":
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} holds lines such as pad_token: <pad>, not {value!r}.")
        return {name: value}
    if name in ("data", "eval_file"):
        return _dataset(path, key, name, value)
    if spelled == "lora_target_linear":
        return {name: "all-linear"} if _typed(path, key, value, bool) else {}
    if spelled == "bf16":
        return {name: "bf16" if _bf16(path, key, value) else "fp32"}
    if name in ("target_modules", "report_to"):
        named = value if isinstance(value, list) else [value]
        joined = ",".join(_typed(path, key, part, str) for part in named)
        return {name: "all-linear" if (name, joined) == ("target_modules", "all") else joined}
    if name == "chat_template" and value == "tokenizer_default":
        return {}
    kind = typing.get_args(FIELDS[name].type)[0]  # of Annotated
    return {name: _typed(path, key, value, *(typing.get_args(kind) or (kind,)))}


def _typed(path: Path, key: str, value: object, *kinds: type):
    """Return the value as one of the types that an option may have."""
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds:
        if type(value) is kind:
            return value
        if kind is Path and isinstance(value, str):
            return Path(value).expanduser()
        if kind is float:
            try:  # 2e-4 is text in YAML, which wants 2.0e-4
                if not isinstance(value, bool):
                    return float(value)
            except (TypeError, ValueError):
                continue
    raise UserError(f"{path}: {key} is {listed(tuple(NAMES[kind] for kind in kinds))}, not {value!r}.")


def _bf16(path: Path, key: str, value: object) -> bool:
    """Tell whether to compute in bfloat16; auto: where the machine is faster in it."""
    if value != "auto":
        return _typed(path, key, value, bool)
    import torch

    import peftfast

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return peftfast.build_info()["isa"] in ("amx", "avx512_bf16")


def _dataset(path: Path, key: str, name: str, value: object) -> dict[str, object]:
    """Return what a path, or a list of one {path, name, split, type}, makes."""
    entry = value
    if isinstance(value, list):
        if len(value) != 1:
            raise UserError(
                f"{path}: {key} lists {len(value)} data sets, but peftfast train reads one, which may be a folder "
                "of files."
            )
        [entry] = value
    if isinstance(entry, str):
        return {name: Path(entry).expanduser()}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise UserError(f"{path}: {key} is a path, or a list of one entry such as path: data.jsonl.")
    made: dict[str, object] = {}
    source = entry["path"]
    for part, text in entry.items():
        if part not in ("path", "name", "split", "type"):
            raise UserError(f"{path}: {part} of {key} is unknown; an entry has path, name, split and type.")
        if text is None:
            continue
        text = _typed(path, f"{part} of {key}", text, str)
        if part == "name":
            source = f"{source}:{text}"
        elif part == "split":
            made["data_split" if name == "data" else "eval_split"] = text
        elif part == "type":
            if text not in TYPES:
                raise UserError(f"{path}: type of {key} is {listed(tuple(TYPES))}, not {text!r}.")
            if TYPES[text] is not None:
                made["data_type"] = TYPES[text]
    return {name: Path(source).expanduser()} | made


def _in_four_bits(path: Path, settings: dict, origins: dict[str, str]) -> dict[str, object]:
    """Make qlora of lora where 4 bits are asked for, and see that both say the same."""
    four_bits = settings.pop("four_bits", None)
    method = settings.get("method", "lora")
    if four_bits and method in ("lora", "qlora"):
        return settings | {"method": "qlora"}
    if four_bits or (four_bits is False and method == "qlora"):
        raise UserError(
            f"{path}: {origins['four_bits']} and {origins['method']} contradict each other: "
            f"{method} {'does not train a model in 4 bits' if four_bits else 'is lora on a model in 4 bits'}."
        )
    return settings


def _check_strategies(path: Path, settings: dict, origins: dict[str, str]) -> None:
    """Raise UserError unless steps are taken where a strategy says so, and there alone."""
    for strategy, steps in STRATEGIES.items():
        told = [origins[name] for name in (steps, FREQUENCIES[steps]) if name in settings]
        if settings.get(strategy) == "no" and told:
            raise UserError(f"{path}: {origins[strategy]} and {told[0]} contradict each other.")
        if settings.get(strategy) == "steps" and not told:
            raise UserError(f"{path}: {origins[strategy]} is steps, which takes {steps} too.")


def _check_special_tokens(path: Path, model: str | None, tokens: dict[str, object]) -> None:
    """Raise UserError unless the model's tokenizer has these tokens, as it stays as it is."""
    if not tokens or model is None:
        return
    from peftfast.cli.model import is_local_model, load_tokenizer

    held = load_tokenizer(model, is_local_model(model)).special_tokens_map
    for name, token in tokens.items():
        if token is not None and token != held.get(name):
            raise UserError(
                f"{path}: {name} of special_tokens is {token!r}, but the model's tokenizer, which stays as it is, "
                f"has {held.get(name)!r}."
            )
