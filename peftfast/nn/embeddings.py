"""The embeddings and the output head of a language model in 4 or 8 bits: frozen, and still one weight where tied."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peftfast.nn.eightbit import Embedding8bit, Linear8bit
from peftfast.nn.fourbit import Embedding4bit, Linear4bit, check_format
from peftfast.nn.quantized import QuantizedLayer, check_dense, check_embedding

EMBEDDINGS = ("4bit", "8bit")


def quantize_embeddings(
    module: nn.Module,
    embeddings: str = "4bit",
    *,
    names: Iterable[str] | None = None,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """Puts `Embedding4bit` and `Linear4bit`, or the like in 8 bits, in the place of embeddings and output head.

    Layers that share their weight with one of these go with it, and share it still. What `save_pretrained` writes then
    cannot be loaded: for that, load the model with `peftfast.FourBitConfig(embeddings=...)`.

    Args:
        module: is changed in place.
        embeddings: "4bit" or "8bit".
        names: of the modules; None: those that `get_input_embeddings` and `get_output_embeddings` of a model of
            transformers return.
        quant_type, blocksize, nested, compute_dtype: as in `Linear4bit`; nothing in 8 bits.
    Returns:
        `module` itself.
    Raises:
        TypeError, ValueError: an argument, a module or a weight, which the message names, is not usable. All are looked
            at before the first is replaced.
    """
    how = dict(quant_type=quant_type, blocksize=blocksize, nested=nested, compute_dtype=compute_dtype)
    check_format(**how)
    check_embeddings(embeddings)
    if names is not None:
        ends = [module.get_submodule(name) for name in names]
    elif hasattr(module, "get_input_embeddings") and hasattr(module, "get_output_embeddings"):
        ends = [module.get_input_embeddings(), module.get_output_embeddings()]
    else:
        raise TypeError(
            f"module, a {type(module).__name__}, is no model of transformers: its embeddings are to be named by names."
        )
    weights = {getattr(end, "weight", end): [] for end in ends if end is not None}
    for name, layer in module.named_modules(remove_duplicate=False):  # a layer may be used in several places
        if getattr(layer, "weight", layer) in weights:
            weights[getattr(layer, "weight", layer)].append((name, layer))
    made: dict[nn.Module, QuantizedLayer] = {}
    for weight, places in weights.items():
        for name, layer in places:
            if layer not in made:
                made[layer] = counterpart(layer, name, embeddings, **how)
        check_dense(weight, f"{places[0][0]}.weight")
    for weight, places in weights.items():
        first = made[places[0][1]]
        first.assign(first.quantize(weight, f"{places[0][0]}.weight"))
        for name, layer in places:
            if made[layer] is not first:
                made[layer].share(first)
            module.set_submodule(name, made[layer])
    return module


def counterpart(
    layer: nn.Module,
    name: str,
    embeddings: str,
    *,
    quant_type: str,
    blocksize: int,
    nested: bool,
    compute_dtype: torch.dtype | None,
) -> QuantizedLayer:
    """The quantized layer for a dense one called `name`: empty, on the meta device; the bias is shared.

    Raises:
        TypeError, ValueError: there is none, or not in this format; the message names the layer.
    """
    format = dict(quant_type=quant_type, blocksize=blocksize, nested=nested) if embeddings == "4bit" else {}
    dtype = layer.weight.dtype if hasattr(layer, "weight") else None
    if type(layer) is nn.Linear:
        kind = Linear4bit if embeddings == "4bit" else Linear8bit
        if embeddings == "4bit":
            format["compute_dtype"] = compute_dtype
        made = kind(layer.in_features, layer.out_features, bias=False, device="meta", **format)
        made.share_bias(layer.bias)
    elif isinstance(layer, nn.Embedding):
        check_embedding(layer, name)
        kind = Embedding4bit if embeddings == "4bit" else Embedding8bit
        sizes = layer.num_embeddings, layer.embedding_dim, layer.padding_idx
        try:
            made = kind(*sizes, device="meta", dtype=dtype, **format)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    else:
        raise TypeError(
            f"{name} is a {type(layer).__name__}, which has no form in {embeddings[0]} bits: only torch.nn.Linear and "
            "torch.nn.Embedding have."
        )
    return made.train(layer.training)


def check_embeddings(embeddings: str | None) -> None:
    """Refuses a name of no format.

    Raises:
        ValueError: as described.
    """
    if embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings must be '4bit' or '8bit', got {embeddings!r}.")
