"""The experts of transformers' mixture-of-experts models on the grouped operator, frozen or under PEFT's adapters.

Importing this module registers the experts implementation "peftfast" with transformers. It computes what
"grouped_mm" computes, for every class of experts that transformers dispatches: gated or not, concatenated or
interleaved, transposed, with biases, with a norm behind the experts. Weights that are trained are left to
"grouped_mm": the operator gives them no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from peftfast.nn.moe import Routing, moe_combine
from peftfast.ops.lora import DTYPES, KERNEL_DEVICES

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
    """The experts with `adapters` on their projections, by the name of the parameter."""
    routing = Routing(top_k_index, experts.num_experts)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    with torch.autocast(
        hidden_states.device.type, enabled=False
    ):  # as "grouped_mm": in the dtype of the weights
        hidden = hidden_states.to(weight_of(experts, up).dtype)
        hidden = _project(experts, up, hidden, routing, adapters, gather=True)
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        hidden = _project(experts, "down_proj", hidden, routing, adapters)
        if experts.has_post_expert_norm:
            hidden = experts.post_expert_norm(hidden)
        return moe_combine(hidden, routing.weights(top_k_weights), routing.places).to(hidden_states.dtype)


def _project(
    experts: nn.Module, name: str, x: Tensor, routing: Routing, adapters: dict[str, Adapter], gather: bool = False
) -> Tensor:  # fmt: skip
    adapter = adapters.get(name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    lora = (adapter.A, adapter.B, adapter.scaling) if adapter else (None, None, 1.0)
    slots = None if adapter is None else routing.experts if adapter.slots is None else adapter.slots
    return routing.linear(
        x, weight_of(experts, name), *lora, slots=slots, bias=bias, gather=gather,
        dropout=adapter.dropout if adapter else 0.0, transposed=experts.is_transposed,
    )  # fmt: skip


def weight_of(experts: nn.Module, name: str):
    """The weights of a projection: a parameter, or in 4 bits."""
    fourbit = experts.__dict__.get("_fourbit_weights")
    return getattr(experts, name) if fourbit is None or name not in fourbit else experts.fourbit_weight(name)


def why_not(experts: nn.Module) -> str | None:
    """None, or the reason why the operator cannot compute these experts, whatever the input."""
    for flag in ("has_gate", "has_bias", "is_transposed", "num_experts"):
        if not hasattr(experts, flag):
            return f"a {type(experts).__name__} is not one of transformers' dispatched experts"
    for name in ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj"):
        if name in experts.__dict__.get("_fourbit_weights", ()):
            continue
        weight = getattr(experts, name, None)
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"its {name} is a {type(weight).__name__}"
        if weight.requires_grad and torch.is_grad_enabled():
            return f"its {name} is trained too"
        if weight.device.type not in KERNEL_DEVICES:
            return f"there is no kernel for {weight.device.type} yet"
        if weight.dtype not in DTYPES or weight.dim() != 3:
            return f"its {name} is {weight.dtype} in {list(weight.shape)}"
    return None


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
