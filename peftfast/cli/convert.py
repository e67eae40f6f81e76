"""`peftfast convert`: LoRA on experts from PEFT's fused layout to one expert at a time, and back."""

from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Argument, Option

from peftfast.cli.errors import UserError
from peftfast.cli.model import load_config

# What configurations call the number of experts of a layer.
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def command(
    adapter: Annotated[Path, Argument(help="The adapter's folder.")],
    to: Annotated[
        str, Option(help="per-expert, which transformers 4 and vLLM read; or fused, which PEFT trains.")
    ],
    out: Annotated[Path, Option(help="The folder that receives the converted adapter.")],
    model: Annotated[
        str | None, Option(help="The base model's folder or name; by default as the adapter says.")
    ] = None,
    model_type: Annotated[
        str | None, Option(help="The base model's type, such as olmoe, where its config.json is not at hand.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an adapter in --out.")] = False,
) -> None:
    """Rewrite an adapter with LoRA on experts, fused or one expert at a time, without loss."""
    from peftfast.integrations.conversion import convert, read_config

    try:
        base = _base_config(model, read_config(adapter).get("base_model_name_or_path"))
        model_type = model_type or getattr(base, "model_type", None)
        if model_type is None:
            raise UserError("The base model's config.json is not at hand: pass --model or --model-type.")
        if base is not None and base.model_type != model_type:
            raise UserError(f"--model-type {model_type}: the base model is of type {base.model_type}.")
        num_experts = next(filter(None, (getattr(base, name, None) for name in NUM_EXPERTS)), None)
        result = convert(adapter, out, to, model_type, num_experts, overwrite)
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}.") from error
    Console().print(
        f"Wrote {result.tensors:,} tensors to {out}: LoRA of rank {' and '.join(map(str, result.ranks))} on "
        f"{result.experts:,} experts in {result.layers} layers, {to}.",
        highlight=False,
        soft_wrap=True,
    )


def _base_config(model: str | None, named_by_adapter: str | None):
    """Return the text configuration of `model` or else of what the adapter names, None if that one is not here.

    Raises:
        UserError: `model` has no configuration that transformers can read.
    """
    from transformers import AutoConfig

    if model is None:
        try:
            return AutoConfig.from_pretrained(named_by_adapter, local_files_only=True).get_text_config()
        except Exception:  # it is a hint, not what the user asked for
            return None
    return load_config(model).get_text_config()
