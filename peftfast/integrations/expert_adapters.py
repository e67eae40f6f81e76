"""PEFT's adapters on the parameters of experts, computed beside the experts instead of into their weights.

PEFT adapts a parameter by replacing it with W + B A for all experts, in every forward. Here the base's experts run on
the grouped operator, which adds each row's low-rank term: no such sum is formed, and no gradient of its size.

PEFT's layouts: lora_A.weight is [experts * r, in] with the expert as the slowest index, lora_B.weight is
[out, r * experts] with the expert as the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftfast.integrations import experts
from peftfast.integrations.bases import is_plain, is_plain_tensor


def fused(layer: ParamWrapper, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts below `layer` with the active adapters of all wrappers around them."""
    adapters = {wrapper.parameter_name: _adapter(wrapper) for wrapper in _active_wrappers(layer)}
    base = layer.get_base_layer()
    return experts.call(base, hidden_states, top_k_index, top_k_weights, adapters)


def why_not_call(layer: ParamWrapper, *args, **kwargs) -> str | None:
    """None, or the reason why the operator cannot run, as the rest of "... cannot run on the fast path: "."""
    if len(args) != 3 or kwargs:
        return "its forward was given other arguments than hidden_states, top_k_index and top_k_weights"
    hidden_states, top_k_index, top_k_weights = args
    if not all(map(is_plain_tensor, args)) or hidden_states.dim() != 2 or top_k_index.dim() != 2:
        return f"its input is {type(hidden_states).__name__} of shape {list(hidden_states.shape)}"
    if top_k_index.dtype != torch.int64 or top_k_weights.shape != top_k_index.shape:
        return f"its routing weights have shape {list(top_k_weights.shape)}, its indices {list(top_k_index.shape)}"
    return why_not(layer)


def why_not(layer: ParamWrapper) -> str | None:
    base = layer.get_base_layer()
    reason = experts.why_not(base)
    if reason is not None:
        return reason
    if not is_plain(base) or not all(
        is_plain(wrapper) for wrapper in _wrappers(layer) if wrapper is not layer
    ):
        return "its base layer has hooks or a forward of its own"
    if parametrize.is_parametrized(base):
        return "its base layer has parametrizations"
    weights = ("gate_up_proj" if base.has_gate else "up_proj", "down_proj")
    for wrapper in _active_wrappers(layer):
        name = wrapper.parameter_name
        if name not in weights or wrapper.num_experts != base.num_experts:
            return f"{name} is not a projection of the experts"
        dtype = experts.weight_of(base, name).dtype
        for adapter in _active_adapters(wrapper):
            A, B = wrapper.lora_A[adapter], wrapper.lora_B[adapter]
            if type(A) is not nn.Linear or type(B) is not nn.Linear or not is_plain(A) or not is_plain(B):
                return f"lora_A or lora_B of adapter {adapter} has hooks or is not a plain Linear"
            if not is_plain_tensor(A.weight) or not is_plain_tensor(B.weight):
                return f"the weights of adapter {adapter} are a {type(A.weight).__name__}"
            if A.weight.dtype != B.weight.dtype or A.weight.dtype not in (dtype, torch.float32):
                return f"adapter {adapter} is {A.weight.dtype}, the experts {dtype}"
    return None


def _wrappers(layer: nn.Module) -> Iterator[ParamWrapper]:
    """`layer` and the wrappers within it, down to the experts."""
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def _active_wrappers(layer: ParamWrapper) -> Iterator[ParamWrapper]:
    for wrapper in _wrappers(layer):
        if not wrapper.disable_adapters and not wrapper.merged and _active_adapters(wrapper):
            yield wrapper


def _active_adapters(wrapper: ParamWrapper) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _adapter(wrapper: ParamWrapper) -> experts.Adapter:
    """The wrapper's active adapters as one: several stand side by side, each with its scaling in B."""
    count, parts = wrapper.num_experts, []
    for name in _active_adapters(wrapper):
        A, B = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        A, B = A.view(count, -1, A.shape[1]), B.view(B.shape[0], -1, count).permute(2, 0, 1)
        parts.append((A, B, wrapper.scaling[name]))
    if len(parts) == 1:
        return experts.Adapter(*parts[0])
    A = torch.cat([A for A, _, _ in parts], dim=1)
    B = torch.cat([B * scaling for _, B, scaling in parts], dim=2)
    return experts.Adapter(A, B, 1.0)
