"""The experts of transformers' mixture-of-experts models on the grouped operator, frozen or under PEFT's adapters.

Importing this module registers the experts implementation "peftfast" with transformers. It computes what
"grouped_mm" computes, for every class of experts that transformers dispatches: gated or not, concatenated or
interleaved, transposed, with biases, with a norm behind the experts. Weights that are trained are left to
"grouped_mm": the operator gives them no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from peftfast.integrations import forwards
from peftfast.integrations.bases import is_plain, is_plain_tensor, name_of_activation
from peftfast.nn.fourbit import (
    ENTRIES,
    beside,
    copy_bytes,
    entry_names,
    is_own_weight,
    is_sharded,
    pack_state,
    unpack_state,
    without_bytes,
)
from peftfast.nn.moe import Routing
from peftfast.nn.quantized import QuantizedLayer
from peftfast.ops import EightBitWeight, FourBitWeight, fourbit_dequantize, fourbit_quantize
from peftfast.ops.devices import host_reads, why_no_kernel
from peftfast.ops.lora import DTYPES, name_of
from peftfast.ops.rowwise import call_swiglu

NAME = "peftfast"


@dataclass(frozen=True)
class Adapter:
    """LoRA on one projection of the experts; `slots` [experts] says which have one (None: each its own)."""

    A: Tensor  # [slots, r, in]
    B: Tensor  # [slots, out, r]
    scaling: float | Tensor
    dropout: float = 0.0
    slots: Tensor | None = None


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls for the implementation "peftfast".

    Args:
        hidden_states: [tokens, H].
        top_k_index: int64 [tokens, top_k]; an index past the experts (expert parallelism) stands for none.
        top_k_weights: [tokens, top_k].
    Returns:
        [tokens, H]
    """
    if why_not(self) is not None:
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    return call(self, hidden_states, top_k_index, top_k_weights, {})


def call(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: dict[str, Adapter],
) -> Tensor:
    """The experts with `adapters` on their projections, by the name of the parameter.

    Raises:
        ValueError: the routing has a wrong shape or a weight that is not a number; the message names the layer.
    """
    _check_routing(experts, hidden_states, top_k_index, top_k_weights)
    routing = Routing(top_k_index, experts.num_experts)
    up, down = projections(experts)
    with torch.autocast(
        hidden_states.device.type, enabled=False
    ):  # as "grouped_mm": in the dtype of the weights
        hidden = hidden_states.to(weight_of(experts, up).dtype)
        hidden = routing.linear(hidden, gather=True, **_projection(experts, up, hidden, routing, adapters))
        activation = _activation_of_gate(experts)
        if activation is None:
            hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        last = _projection(experts, down, hidden, routing, adapters)
        if experts.has_post_expert_norm:
            if activation is not None:
                hidden = call_swiglu(*hidden.chunk(2, dim=-1), activation)
            hidden = experts.post_expert_norm(routing.linear(hidden, **last))
            return routing.combine(hidden, top_k_weights).to(hidden_states.dtype)
        y = routing.combined_linear(hidden, top_k_weights, activation=activation, **last)
        return y.to(hidden_states.dtype)


def _activation_of_gate(experts: nn.Module) -> str | None:
    """The activation, by its name in `peftfast.ops.swiglu`, of experts gated as that does it."""
    if not experts.has_gate or getattr(experts._apply_gate, "__qualname__", None) != "_default_apply_gate":
        return None
    name = name_of_activation(experts.act_fn)
    return name if name is None or is_plain(experts.act_fn) else None


def _check_routing(experts: nn.Module, hidden_states: Tensor, index: Tensor, weights: Tensor) -> None:
    wrong = None
    if index.dim() != 2 or index.shape[0] != hidden_states.shape[0] or index.dtype != torch.int64:
        wrong = (
            f"top_k_index is {name_of(index.dtype)} in {list(index.shape)}, expected int64 in [tokens, top_k]"
        )
    elif weights.shape != index.shape:
        wrong = f"top_k_weights has shape {list(weights.shape)}, expected that of top_k_index, {list(index.shape)}"
    elif host_reads(index) and index.numel():
        least, most = index.aminmax()
        elsewhere = getattr(experts, "_is_expert_parallel", False)
        if least < 0 or (most >= experts.num_experts and not elsewhere):
            wrong = f"top_k_index holds {int(least)} to {int(most)}, there are {experts.num_experts} experts"
        elif not weights.isfinite().all():
            wrong = "top_k_weights holds values that are not finite"
    if wrong:
        raise ValueError(f"Experts {forwards.name_of(experts, NAME)}: {wrong}.")


def _projection(
    experts: nn.Module, name: str, x: Tensor, routing: Routing, adapters: dict[str, Adapter]
) -> dict[str, Any]:
    """The arguments of `Routing.linear` for a projection of x."""
    adapter = adapters.get(name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if bias is not None and bias.dtype is not x.dtype:
        bias = bias.float()  # exact, and fits every x
    arguments = {"weight": weight_of(experts, name), "bias": bias, "transposed": experts.is_transposed}
    if adapter is None:
        return arguments
    return arguments | {
        "lora_A": adapter.A,
        "lora_B": adapter.B,
        "scaling": adapter.scaling,
        "slots": routing.experts if adapter.slots is None else adapter.slots,
        "dropout": adapter.dropout,
    }


def weight_of(experts: nn.Module, name: str) -> Tensor | FourBitWeight:
    """The weights of a projection, the parameter or what it holds in 4 bits; their dtype is that of the products."""
    if name not in _quantized(experts):
        return getattr(experts, name)
    weight = experts.fourbit_weight(name)
    return weight if experts.compute_dtype is None else replace(weight, dtype=experts.compute_dtype)


def _quantized(experts: nn.Module) -> Iterable[str]:
    return experts.fourbit_weights if isinstance(experts, FourBitExperts) else ()


def quantized_weights(module: nn.Module) -> dict[str, FourBitWeight | EightBitWeight]:
    """Those that a layer or experts themselves hold, by the name of the parameter with their codes."""
    if isinstance(module, QuantizedLayer):
        return {"weight": module.quantized_weight}
    return {name: module.fourbit_weight(name) for name in _quantized(module)}


def quantized_parameters(model: nn.Module) -> dict[nn.Parameter, FourBitWeight | EightBitWeight]:
    """The weights within `model` that are in 4 or 8 bits, by the parameter with their codes: shared ones once."""
    return {
        module.get_parameter(name): weight
        for module in model.modules()
        for name, weight in quantized_weights(module).items()
    }


def is_experts(module: nn.Module) -> bool:
    """Whether the module is of a class of experts that transformers dispatches, and not quantized yet."""
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts")
    return all(hasattr(module, flag) for flag in flags) and not isinstance(module, FourBitExperts)


def holds_experts(module: nn.Module) -> bool:
    """Whether the module is of such a class, quantized or not."""
    return is_experts(module) or isinstance(module, FourBitExperts)


def projections(experts: nn.Module) -> tuple[str, str]:
    """The parameters of the two projections."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def why_not(experts: nn.Module) -> str | None:
    """None, or the reason why the operator cannot compute these experts, whatever the input."""
    if not holds_experts(experts):
        return f"a {type(experts).__name__} is not one of transformers' dispatched experts"
    for name in projections(experts):
        weight = getattr(experts, name, None)
        if not is_plain_tensor(weight):
            return f"its {name} is a {type(weight).__name__}"
        if name in _quantized(experts):
            continue
        if weight.requires_grad and torch.is_grad_enabled():
            return f"its {name} is trained too"
        if reason := why_no_kernel(weight.device):
            return reason
        if weight.dtype not in DTYPES or weight.dim() != 3:
            return f"its {name} is {weight.dtype} in {list(weight.shape)}"
    return None


def is_parallel(module: nn.Module) -> bool:
    """Whether transformers spreads the module over processes by tensor or expert parallelism. Its forward then is what
    brings the parts together, and its parameters are parts while it runs."""
    return getattr(module, "_is_hooked", False)


# ---- experts in 4 bits ------------------------------------------------------------------------------------


class FourBitExperts(nn.Module):
    """What `quantize_experts` adds to a class of experts: projections whose parameter is the packed weight.

    A projection's state_dict entries are those of a 4-bit linear layer, with the parameter's name for `weight`.

    Attributes:
        fourbit_weights: the quantized projections, by the name of their parameter; all but their bytes, which the
            parameter holds.
        compute_dtype: of the products; None: that which the weights had before they were quantized.
    """

    fourbit_weights: dict[str, FourBitWeight]
    compute_dtype: torch.dtype | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return call(self, hidden_states, top_k_index, top_k_weights, {})

    def fourbit_weight(self, name: str) -> FourBitWeight:
        """The weight as the operators take it, for every call anew: parameters are replaced at any time."""
        packed = getattr(self, name)
        self.fourbit_weights[name] = beside(self.fourbit_weights[name], packed)
        return replace(self.fourbit_weights[name], packed=packed)

    def set_fourbit_weight(self, name: str, quantized: FourBitWeight) -> None:
        packed = quantized.packed.detach().reshape(-1).view(torch.uint8).unsqueeze(1)
        setattr(self, name, nn.Parameter(packed, requires_grad=False))
        self.fourbit_weights[name] = without_bytes(quantized)

    def _apply(self, fn, recurse: bool = True):
        """Where `.to`, `.half` and the like end: what describes a weight moves with it and is never cast."""
        super()._apply(fn, recurse)
        for name, quantized in self.fourbit_weights.items():
            self.fourbit_weights[name] = quantized.to(getattr(self, name).device)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in projections(self):  # in this order, whichever was quantized first
            if name in self.fourbit_weights:
                for entry, value in pack_state(self.fourbit_weights[name]).items():
                    destination[f"{prefix}{name}{entry}"] = value

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Reads and checks all projections before it assigns any.

        Raises:
            ValueError: the entries of a weight do not fit together or not this layer; the message names the tensor.
        """
        loaded, kept, others = {}, [], dict(state_dict)
        for name, quantized in self.fourbit_weights.items():
            key = prefix + name
            state = {entry: others.pop(key + entry) for entry in ENTRIES if key + entry in others}
            if is_own_weight(state, getattr(self, name)):
                kept.append(name)
            elif state:
                loaded[name] = unpack_state(state, quantized.shape, key)
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in (*loaded, *kept):
            if prefix + name in missing_keys:
                missing_keys.remove(prefix + name)
        for name, quantized in loaded.items():
            if is_sharded(self):  # the parameter has to stay: FSDP holds it
                copy_bytes(getattr(self, name), quantized.packed)
                self.fourbit_weights[name] = without_bytes(quantized)
            else:
                self.set_fourbit_weight(name, deepcopy(quantized).to(getattr(self, name).device))

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """With the entries beside weights that FSDP shards: torch.distributed.checkpoint then loads them too."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if is_sharded(self):
            for name, quantized in self.fourbit_weights.items():
                for entry, value in pack_state(quantized).items():
                    yield f"{prefix}{'.' if prefix else ''}{name}{entry}", value

    def _fqn_modifiers(self) -> dict[str, str]:
        """See `entry_names`."""
        return dict.fromkeys(self.fourbit_weights, "_entry_names")

    @property
    def _entry_names(self) -> SimpleNamespace:
        return entry_names(self.fourbit_weights)

    def __reduce_ex__(self, protocol):
        return _restored, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _fourbit_class(kind: type[nn.Module]) -> type[FourBitExperts]:
    return type(kind.__name__, (FourBitExperts, kind), {"__module__": kind.__module__})


def become_fourbit(experts: nn.Module, compute_dtype: torch.dtype | None = None) -> None:
    """Makes a module of experts one whose projections can be in 4 bits, none of which is yet."""
    experts.__class__ = _fourbit_class(type(experts))
    experts.fourbit_weights = {}
    experts.compute_dtype = compute_dtype


def become_dense(experts: FourBitExperts, dtype: torch.dtype | None = None) -> None:
    """Puts dense parameters in the place of those in 4 bits; `dtype` None: as before they were quantized."""
    dense = {
        name: fourbit_dequantize(experts.fourbit_weight(name), dtype) for name in experts.fourbit_weights
    }
    for attribute in ("fourbit_weights", "compute_dtype"):
        experts.__dict__.pop(attribute, None)
    experts.__class__ = type(experts).__mro__[2]
    for name, weight in dense.items():
        setattr(experts, name, nn.Parameter(weight, requires_grad=False))


def _restored(kind: type[nn.Module], state: dict) -> nn.Module:
    experts = kind.__new__(_fourbit_class(kind))
    experts.__setstate__(state)
    return experts


def quantize_experts(
    model: nn.Module, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True
) -> nn.Module:
    """Quantizes the fused experts within `model` to 4 bits, one projection after the other, in place.

    bitsandbytes and transformers leave them as they are. Works for every class of experts that transformers dispatches;
    they then run on the grouped operator whatever the model's experts implementation. `save_pretrained` cannot write
    them: a model that was loaded with `peftfast.FourBitConfig`, which quantizes experts too, it can.

    Args:
        quant_type, blocksize, nested: as in `peftfast.ops.fourbit_quantize`.
    Returns:
        `model` itself.
    Raises:
        ValueError: the model has no such experts, or a weight, which the message names, is not usable.
    """
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not found:
        raise ValueError("model has no experts that could be quantized.")
    for name, module in found:
        become_fourbit(module)
        for projection in projections(module):
            try:
                quantized = fourbit_quantize(
                    getattr(module, projection), quant_type=quant_type, blocksize=blocksize, nested=nested
                )
            except (TypeError, ValueError) as error:
                raise type(error)(f"{name}.{projection}: {error}") from None
            module.set_fourbit_weight(projection, quantized)
    return model


def requantize(experts: FourBitExperts, name: str, dense: Tensor) -> float:
    """Quantizes `dense` into a projection, whose format stays.

    Returns:
        The error of doing so: ‖dequantized - dense‖ / ‖dense‖.
    Raises:
        ValueError: `dense` is not finite; the experts stay as they were.
    """
    old = experts.fourbit_weight(name)
    nested = old.nested is not None
    new = fourbit_quantize(dense, quant_type=old.quant_type, blocksize=old.blocksize, nested=nested)
    distance = torch.linalg.vector_norm(fourbit_dequantize(new, torch.float32).sub_(dense))
    norm = torch.linalg.vector_norm(dense)
    experts.set_fourbit_weight(name, replace(new, dtype=old.dtype).to(old.packed.device))
    return (distance / norm).item() if norm > 0 else 0.0


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
