"""`peftfast merge`: an adapter and its base as one checkpoint, dense or in 4 bits, checked against the two."""

import contextlib
import gc
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from safetensors import SafetensorError
from typer import Argument, Option

from peftfast.cli import methods
from peftfast.cli.empty import is_quantized
from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.model import is_local_model, load_config, load_model
from peftfast.cli.train import RESULT_FILE

FORMATS = ("dense", "4bit")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOKENS = 16  # that the models are compared on


@dataclass(frozen=True)
class MergeResult:
    """What merging came to. Differences are ‖one - other‖ / ‖other‖ of logits on a few random tokens.

    Attributes:
        layers: into whose weights the adapter went, modules that it had replaced whole included.
        adapter_effect: how far the adapter model is from its base.
        difference: how far the written model, loaded again, is from the adapter model.
        allowed: what `difference` may be at most where weights are rounded to `dtype`; None in 4 bits.
        requantization_error: the largest of a layer, ‖rounded - exact‖ / ‖exact‖ of its weight; None where dense.
        has_tokenizer: whether one was found and written.
    """

    dtype: str
    layers: int
    adapter_effect: float
    difference: float
    allowed: float | None
    requantization_error: float | None
    has_tokenizer: bool


def merge(
    adapter: Path, out: Path, base: str | None = None, to: str = "dense", dtype: str | None = None
) -> MergeResult:
    """Write the model that `adapter` makes of its base to `out`, whole or not at all.

    The adapter is merged into the weights that it was trained on. Those are in 4 bits where the base is, or where the
    record of `peftfast train` beside the adapter says so; for "dense" they are decoded first, which is exact. Else they
    are dense, and for "4bit" what is merged is rounded once.

    Args:
        base: a folder or hub name; None: the one that the adapter names.
        to: "dense" or "4bit".
        dtype: of the dense weights: "fp32", "bf16" or "fp16"; None: as in the base.
    Raises:
        UserError: something cannot be read, merged or written, or the result is not the adapter model.
    """
    import torch
    from peft import PeftModel

    from peftfast import FourBitConfig

    if to not in FORMATS:
        raise UserError(f"--to is one of {', '.join(FORMATS)}, not {to!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}.")
    _check_output(out)
    config = _mergeable(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise UserError(f"{adapter} names no base model: pass --base.")
    try:
        model = _load_base(base, to, dtype, _quantization_of(adapter))
    except UserError as error:  # of loading
        raise UserError(str(error).replace("--model", "--base")) from error
    dtype = str(model.dtype).removeprefix("torch.")
    tokens = torch.randint(
        model.get_input_embeddings().weight.shape[0], (1, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    try:
        model = PeftModel.from_pretrained(model, adapter).eval()
        with model.disable_adapter():
            before = _logits(model, tokens)
        wanted = _logits(model, tokens)
    except Exception as error:  # whatever a library raises over a folder's contents, the folder is at fault
        raise UserError(f"{adapter} does not fit {base}: {first_sentence(error)}.") from error
    layers = [layer for layer in model.modules() if _is_adapted(layer)]
    hidden = model.get_output_embeddings().weight.shape[1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rounding: reported below for all layers together
            merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise UserError(f"{adapter} cannot be merged: {first_sentence(error)}.") from error
    count, errors = len(layers), [getattr(layer, "requantization_error", None) for layer in layers]
    del model, layers
    with _folder_written_at_once(out) as folder:
        if to == "4bit" and methods.quantization(merged) is None:
            merged, errors = _in_four_bits(merged, dtype, folder.parent)
        merged.save_pretrained(folder)
        has_tokenizer = _write_tokenizer(folder, adapter, base)
        del merged
        gc.collect()
        written = load_model(str(folder), dtype, True, FourBitConfig() if to == "4bit" else None)
        got = _logits(written.eval(), tokens)
        del written
        result = MergeResult(
            dtype=dtype,
            layers=count,
            adapter_effect=_distance(before, wanted),
            difference=_distance(got, wanted),
            allowed=None if to == "4bit" else _allowed(dtype, count, hidden),
            requantization_error=max((error for error in errors if error is not None), default=None),
            has_tokenizer=has_tokenizer,
        )
        if not math.isfinite(result.difference):
            raise UserError(f"{adapter}: the merged model's logits are not finite; nothing was written.")
        if result.allowed is not None and result.difference > result.allowed:
            raise UserError(
                f"{adapter}: the merged model's logits differ by {result.difference:.1e} from the adapter model's, of "
                f"which rounding to {dtype} explains {result.allowed:.1e}; nothing was written."
            )
    return result


def _mergeable(adapter: Path):
    """The adapter's configuration.

    Raises:
        UserError: it cannot be read, or is of a method that does not change weights.
    """
    from peft import PeftConfig

    from peftfast.integrations.tuners import bottleneck, mixture_lora

    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} is not an adapter folder: it has no adapter_config.json.")
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # whatever a library raises over a folder's contents
        raise UserError(
            f"{adapter}: its adapter_config.json cannot be read: {first_sentence(error)}."
        ) from error
    if config.is_prompt_learning:
        kind = str(getattr(config.peft_type, "value", config.peft_type)).lower().replace("_", " ")
        raise UserError(
            f"{adapter} cannot be merged: {kind} puts virtual tokens before the input and changes no weights."
        )
    refusals = {
        bottleneck.PEFT_TYPE: bottleneck.refuse_merging,
        mixture_lora.NAME: mixture_lora.refuse_merging,
    }
    try:
        refusals.get(config.peft_type, lambda: None)()
    except ValueError as error:
        raise UserError(f"{adapter}: {error}") from None
    return config


def _load_base(base: str, to: str, dtype: str | None, quantization: dict | None):
    """The base with the weights that the adapter was trained on: in 4 bits if they were, or decoded from those."""
    import torch

    from peftfast import FourBitConfig

    local, config = is_local_model(base, "--base"), load_config(base, "--base")
    held = getattr(config.dtype, "name", str(config.dtype or torch.float32)).removeprefix("torch.")
    name = DTYPES[dtype] if dtype else held
    in_four_bits = is_quantized(config) or quantization is not None
    model = load_model(base, name, local, FourBitConfig(**quantization or {}) if in_four_bits else None)
    return model.dequantize(getattr(torch, name)) if in_four_bits and to == "dense" else model


def _quantization_of(adapter: Path) -> dict | None:
    """How the base was kept in 4 bits when `peftfast train` trained the adapter, as arguments of FourBitConfig."""
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((adapter / RESULT_FILE).read_text(encoding="utf-8"))
        quantization = record.get("quantization") if isinstance(record, dict) else None
        return quantization if isinstance(quantization, dict) else None
    return None


def _in_four_bits(dense, dtype: str, beside: Path) -> tuple:
    """A dense model in 4 bits, as if it were loaded so, and each weight's ‖rounded - exact‖ / ‖exact‖."""
    from peftfast import FourBitConfig
    from peftfast.integrations.experts import quantized_weights
    from peftfast.ops import fourbit_dequantize

    with tempfile.TemporaryDirectory(dir=beside) as folder:
        dense.save_pretrained(folder)
        rounded, errors = load_model(folder, dtype, True, FourBitConfig()), []
    for name, module in rounded.named_modules():
        for held, weight in quantized_weights(module).items():
            exact = dense.get_submodule(name).get_parameter(held).float()
            difference = fourbit_dequantize(weight, exact.dtype).view_as(exact) - exact
            errors.append((difference.norm() / exact.norm().clamp_min(1e-30)).item())
    return rounded, errors


def _is_adapted(layer) -> bool:
    """Whether an adapter changes this module's weights, or takes its place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double()


def _distance(one, other) -> float:
    return ((one - other).norm() / other.norm()).item()


def _allowed(dtype: str, layers: int, hidden: int) -> float:
    """How far logits may move as weights are rounded to `dtype`, and as sums in fp32 of `hidden` terms round otherwise.

    Both happen in each layer independently of the others, so errors add up as their squares do; times two.
    """
    import torch

    of_weights = torch.finfo(getattr(torch, dtype)).eps
    of_sums = torch.finfo(torch.float32).eps * math.sqrt(hidden)
    return 2 * (of_weights + of_sums) * math.sqrt(layers + 1)


def _write_tokenizer(folder: Path, adapter: Path, base: str) -> bool:
    """Save the adapter's tokenizer or else the base's; tell whether there was one."""
    from transformers import AutoTokenizer

    for source in (str(adapter), base):
        with contextlib.suppress(Exception):  # whatever transformers raises where there is none
            local = source != base or is_local_model(base)
            AutoTokenizer.from_pretrained(source, local_files_only=local).save_pretrained(folder)
            return True
    return False


def _check_output(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out} exists: choose a new folder.")


@contextlib.contextmanager
def _folder_written_at_once(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out`, which takes that name if the block ends well."""
    absolute = out.absolute()
    try:
        absolute.parent.mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix=f".{absolute.name}-", dir=absolute.parent)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    with holder as beside:
        folder = Path(beside, absolute.name)
        folder.mkdir()
        try:
            yield folder
            _check_output(out)
            os.replace(folder, absolute)
        except (OSError, SafetensorError) as error:
            what = getattr(error, "strerror", None) or first_sentence(error)
            raise UserError(f"--out {out} cannot be written: {what}.") from error


def command(
    adapter: Annotated[Path, Argument(help="The adapter's folder.")],
    out: Annotated[Path, Option(help="The folder that receives the model; must not exist or be empty.")],
    base: Annotated[
        str | None, Option(help="The base model's folder or name; by default as the adapter says.")
    ] = None,
    to: Annotated[str, Option(help="dense or 4bit.")] = "dense",
    dtype: Annotated[
        str | None, Option(help="Of the dense weights: fp32, bf16 or fp16; by default the base's.")
    ] = None,
) -> None:
    """Merge an adapter into its base, write the model with its tokenizer, and check it against the adapter."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = Console()
    with console.status("Merging"):
        result = merge(adapter, out, base, to, dtype)
    rounding = (
        f"rounding to {result.dtype} explains up to {result.allowed:.1e}"
        if result.allowed is not None
        else "weights are rounded to 4 bits"
    )
    lines = [
        f"Merged {result.layers:,} layers into {out}, {to}, {result.dtype}.",
        f"On {TOKENS} random tokens the written model's logits differ by {result.difference:.1e} from the adapter "
        f"model's ({rounding}), the base's by {result.adapter_effect:.1e}.",
    ]
    if result.requantization_error is not None:
        lines.append(
            f"Quantizing anew changed the merged weights by up to {result.requantization_error:.2%} of a layer's."
        )
    if not result.has_tokenizer:
        lines.append("Neither the adapter nor the base has a tokenizer to write.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
