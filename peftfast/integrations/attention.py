"""The attention of transformers' models on the fused operator, where they ask for torch's ("sdpa").

A model looks its function up by name at every call; what it finds is replaced, no code of the model. On a GPU torch's
own kernels run, and so they do under torch.compile and for a query or two (decoding), where there is nothing to fuse.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from peftfast import _C
from peftfast.integrations.bases import autocast_dtype, is_plain_tensor, why_not_mode
from peftfast.integrations.forwards import last_fallback, stand_in
from peftfast.integrations.prompts import CausalMask
from peftfast.ops.attention import KERNEL_DEVICES, call_attention
from peftfast.ops.lora import DTYPES

NAME = "attention"
FEWEST_QUERIES = 16  # a block of 64 takes as long for fewer


def answers_for(module: nn.Module) -> bool:
    """Whether the module is a layer of transformers that looks its attention up, and asks for torch's."""
    config = getattr(module, "config", None)
    return _looks_up(type(module)) and getattr(config, "_attn_implementation", None) == "sdpa"


def kind_of(module: nn.Module) -> str:
    return type(module).__name__


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    yield AttentionInterface, "get_interface", _get_interface


def why_not(module: nn.Module) -> str | None:
    return last_fallback(module)


@functools.cache
def _looks_up(kind: type) -> bool:
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("Attention"):
        return False
    try:
        return "get_interface" in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # there is no source
        return False


def _get_interface(original: Callable) -> Callable:
    def get_interface(self, *args, **kwargs) -> Callable:
        found = original(self, *args, **kwargs)
        return _forward if found is sdpa_attention_forward else found

    return get_interface


def _nothing_to_gain(query: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or query.device.type not in KERNEL_DEVICES
        or query.shape[-2] < FEWEST_QUERIES
        # torch's products run in matrix tiles there.
        or (_C.isa_in_use() == "amx" and (autocast_dtype(query) or query.dtype) == torch.bfloat16)
    )


def _why_not_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    cache=None,
    **kwargs,
) -> str | None:
    for tensor in (query, key, value):
        if not is_plain_tensor(tensor) or tensor.layout is not torch.strided:
            return f"its input is a {type(tensor).__name__}"
        if tensor.dtype not in DTYPES:
            return f"its input is {tensor.dtype}"
        if tensor.device != query.device or (tensor.dtype != query.dtype and autocast_dtype(query) is None):
            return "its queries, keys and values differ in dtype or device"
    if value.shape != key.shape or query.shape[-1] != key.shape[-1]:
        return "its queries, keys and values differ in size"
    if (
        query.dim() != 4
        or query.shape[0] != key.shape[0]
        or key.shape[1] == 0
        or query.shape[1] % key.shape[1]
    ):
        return f"its input has shapes {list(query.shape)} and {list(key.shape)}"
    if dropout:
        return "it drops scores out"
    if position_bias is not None:
        return "a bias is added to its scores"
    if cache is not None:
        return "its cache is paged"
    if kwargs.get("softcap") is not None or kwargs.get("output_attentions"):
        return "it caps or returns its scores"
    if scaling is not None and not (isinstance(scaling, (int, float)) and scaling > 0):
        return f"its scores are scaled by {scaling}"
    return _why_not_mask(attention_mask, [*query.shape[:3], key.shape[2]]) or why_not_mode()


def _why_not_mask(mask: Tensor | None, shape: list[int]) -> str | None:
    if mask is None:
        return None
    if not (is_plain_tensor(mask) or type(mask) is CausalMask) or mask.dtype != torch.bool:
        return "its mask is not one of True and False"
    if mask.dim() != 4 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, shape)):
        return f"its mask has shape {list(mask.shape)}"
    return None


def _fused(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """What sdpa_attention_forward returns."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    dtype = autocast_dtype(query)
    if dtype is not None:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    causal = bool(is_causal) and attention_mask is None
    mask = attention_mask if attention_mask is None else attention_mask.as_subclass(Tensor)
    return call_attention(query, key, value, mask, causal, scale).transpose(1, 2), None


_guarded = stand_in(sdpa_attention_forward, NAME, lambda module: False, _why_not_call, _fused)


@functools.wraps(sdpa_attention_forward)
def _forward(module: nn.Module, query: Tensor, *args, **kwargs):
    plain = _nothing_to_gain(query)
    return (sdpa_attention_forward if plain else _guarded)(module, query, *args, **kwargs)
