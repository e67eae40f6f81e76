"""PEFT's adapters on the parameters of experts, computed beside the experts instead of into their weights.

PEFT adapts a parameter by replacing it with W + B A for all experts, in every forward. Here the base's experts run on
the grouped operator, which adds each row's low-rank term: no such sum is formed, and no gradient of its size.

PEFT's layouts: lora_A.weight is [experts * r, in] with the expert as the slowest index, lora_B.weight is
[out, r * experts] with the expert as the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.tuners.lora.layer import ParamWrapper as Wrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftfast.integrations import experts
from peftfast.integrations.bases import is_plain, is_plain_tensor
from peftfast.integrations.merging import MergesAtOnce, warn_of_rounding
from peftfast.ops import fourbit_dequantize


class ParamWrapper(MergesAtOnce, Wrapper):
    """PEFT's adapter on a projection of 4-bit experts; the same, but that it merges into a 4-bit weight.

    PEFT knows the class by its name.
    `requantization_error` is what merging or unmerging cost the last time, ‖rounded - exact‖ / ‖exact‖ of the weight.
    """

    requantization_error: float | None = None

    def get_param(self) -> Tensor:
        """What PEFT asks for the shape, dtype and device of the weight: one value, expanded."""
        weight = experts.weight_of(self.get_base_layer(), self.parameter_name)
        return torch.zeros((), dtype=weight.dtype, device=weight.packed.device).expand(weight.shape)

    def forward(self, *args, **kwargs) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        return fused(self, *args, **kwargs)

    def _add(self, names: list[str], sign: int) -> None:
        base, name = self.get_base_layer(), self.parameter_name
        weight = fourbit_dequantize(base.fourbit_weight(name), torch.float32)
        for adapter in names:
            weight += sign * self.get_delta_weight(adapter).float()
        self.requantization_error = experts.requantize(base, name, weight)
        warn_of_rounding(self, self.requantization_error, name)


def layer_for(target: nn.Module, adapter_name: str, parameter_name: str, config, **kwargs):
    """The adapter of a projection of 4-bit experts; None for what PEFT has one for itself."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, experts.FourBitExperts) or parameter_name not in base.fourbit_weights:
        return None
    return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)


def fused(layer: Wrapper, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts below `layer` with the active adapters of all wrappers around them."""
    adapters = {wrapper.parameter_name: _adapter(wrapper) for wrapper in _active_wrappers(layer)}
    base = layer.get_base_layer()
    return experts.call(base, hidden_states, top_k_index, top_k_weights, adapters)


def why_not_call(layer: Wrapper, *args, **kwargs) -> str | None:
    """None, or the reason why the operator cannot run, as the rest of "... cannot run on the fast path: "."""
    if len(args) != 3 or kwargs:
        return "its forward was given other arguments than hidden_states, top_k_index and top_k_weights"
    hidden_states, top_k_index, _ = args
    if not all(map(is_plain_tensor, args)) or hidden_states.dim() != 2 or top_k_index.dim() != 2:
        return f"its input is {type(hidden_states).__name__} of shape {list(hidden_states.shape)}"
    if top_k_index.dtype != torch.int64:
        return f"its indices are {top_k_index.dtype}"
    return why_not(layer)


def why_not(layer: Wrapper) -> str | None:
    base = layer.get_base_layer()
    if experts.is_parallel(base):
        return "its base layer is spread over processes by tensor or expert parallelism"
    reason = experts.why_not(base)
    if reason is not None:
        return reason
    if not is_plain(base) or not all(
        is_plain(wrapper) for wrapper in _wrappers(layer) if wrapper is not layer
    ):
        return "its base layer has hooks or a forward of its own"
    if parametrize.is_parametrized(base):
        return "its base layer has parametrizations"
    for wrapper in _active_wrappers(layer):
        name = wrapper.parameter_name
        if name not in experts.projections(base) or wrapper.num_experts != base.num_experts:
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


def _wrappers(layer: nn.Module) -> Iterator[Wrapper]:
    """`layer` and the wrappers within it, down to the experts."""
    while isinstance(layer, Wrapper):
        yield layer
        layer = layer.base_layer


def _active_wrappers(layer: Wrapper) -> Iterator[Wrapper]:
    for wrapper in _wrappers(layer):
        if not wrapper.disable_adapters and not wrapper.merged and _active_adapters(wrapper):
            yield wrapper


def _active_adapters(wrapper: Wrapper) -> list[str]:
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def _adapter(wrapper: Wrapper) -> experts.Adapter:
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
