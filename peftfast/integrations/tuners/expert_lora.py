"""LoRA on chosen experts of a mixture-of-experts model, beside PEFT's own LoRA on its dense layers.

Only the chosen experts have adapters: their stacks are what is stored, trained and saved. An expert without an adapter
costs nothing, and dropout acts on the experts' input, since no sum of weight and adapter is ever formed.

Choosing the experts by how much a task uses them: ESFT (arXiv 2407.01906), MoE-Sieve (arXiv 2603.24044), HELLoRA
(arXiv 2605.18795); `peftfast.profile_experts` measures it.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import LoraConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from peftfast import reference
from peftfast.integrations import experts, forwards
from peftfast.integrations.bases import is_plain
from peftfast.integrations.merging import MergesAtOnce, warn_of_rounding
from peftfast.integrations.tuners.profile import experts_within
from peftfast.integrations.tuners.registry import register
from peftfast.nn.moe import Routing
from peftfast.ops import fourbit_dequantize
from peftfast.reference import FourBitWeight

PEFT_TYPE = "EXPERT_LORA"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What makes of LoRA another method: it would hold for the dense layers and not for the experts.
NOT_ON_EXPERTS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "velora_config", "monteclora_config", "kasa_config",
    "arrow_config", "alora_invocation_tokens",
)  # fmt: skip


@dataclass
class ExpertLoraConfig(LoraConfig):
    """LoRA on experts, for get_peft_model; everything of `peft.LoraConfig` holds for the layers of `target_modules`.

    `target_modules` None: experts alone. Of LoraConfig, r, lora_alpha, use_rslora, lora_dropout, init_lora_weights
    (True or False), rank_pattern and alpha_pattern (by the layer's name, before `expert_r`) hold for the experts too;
    layers_to_transform and exclude_modules do not: `experts` names the layers itself.

    Args:
        experts: the experts to adapt of each layer, by the name of the experts' module in the base model, such as
            {"model.layers.0.mlp.experts": [3, 17]}; the choices of `ExpertProfile` are such. None: all of all layers.
        expert_projections: which of an expert's projections, by the parameter's name: "gate_up_proj" ("up_proj" where
            there is no gate), "down_proj". None: both.
        expert_r: the rank on experts, or one for each projection by name. None, and for projections not named: r.
    Raises:
        ValueError, TypeError: an argument is not usable, by itself here, for the model in get_peft_model.
    """

    experts: dict[str, list[int]] | None = field(default=None)
    expert_projections: list[str] | None = field(default=None)
    expert_r: int | dict[str, int] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.experts is not None:
            self.experts = _checked_experts(self.experts)
        if self.expert_projections is not None:
            if isinstance(self.expert_projections, str) or not self.expert_projections:
                raise ValueError(
                    f"expert_projections is {self.expert_projections!r}, expected a list of names."
                )
            self.expert_projections = list(self.expert_projections)
        ranks = {"r": self.r} | (
            self.expert_r if isinstance(self.expert_r, dict) else {"expert_r": self.expert_r}
        )
        for name, rank in ranks.items():
            if name == "expert_r" and rank is None:
                continue
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"The rank {name} is {rank!r}, expected an integer above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, expected a probability in [0, 1).")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}: with adapters on experts it must be True or False."
            )
        for name in NOT_ON_EXPERTS:
            if getattr(self, name, None):
                raise ValueError(f"{name} is not possible with adapters on experts, which are plain LoRA.")


def _checked_experts(chosen: dict[str, list[int]]) -> dict[str, list[int]]:
    """The choice with ascending indices.

    Raises:
        ValueError, TypeError: it is empty or malformed, whatever the model; the message names the layer.
    """
    if not isinstance(chosen, dict) or not chosen:
        raise ValueError(
            f"experts is {chosen!r}, expected lists of experts by layer (None for all of all layers)."
        )
    for layer, indices in chosen.items():
        if isinstance(indices, str) or not hasattr(indices, "__len__") or not len(indices):
            raise ValueError(f"experts of {layer} are {indices!r}, expected a list of at least one index.")
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise TypeError(
                    f"experts of {layer} hold {index!r}, expected integers that are not negative."
                )
        twice = sorted({index for index in indices if list(indices).count(index) > 1})
        if twice:
            raise ValueError(f"experts of {layer} hold {twice[0]} more than once.")
    return {layer: sorted(indices) for layer, indices in chosen.items()}


class ExpertLora(MergesAtOnce, nn.Module, BaseTunerLayer):
    """Adapters on chosen experts of the module that it wraps.

    Runs on the grouped operator, whatever the model's experts implementation. What the operator cannot compute
    (`why_not`) runs in plain torch with a warning, or raises under `peftfast.enable(strict=True)`.

    Attributes, each by the adapter's name:
        lora_A, lora_B: by projection, [slots, r, in] and [slots, out, r]; a slot for each chosen expert.
        lora_experts: int64 [slots], ascending: the expert of each slot; saved with the adapter.
        scaling: by projection.
        requantization_error: what merging into or unmerging from 4-bit experts cost the last time,
            ‖rounded - exact‖ / ‖exact‖ of the weight; by projection, not by adapter.
        fallback: why the last forward ran in plain torch, None where it ran on the operator; not by adapter.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("lora_experts", "lora_dropout", "r", "lora_alpha", "scaling")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_experts = BufferDict(persistent=True)
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, dict[str, int]] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, dict[str, float]] = {}
        self.requantization_error: dict[str, float] = {}
        self.fallback: str | None = None
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def update_layer(
        self, adapter_name: str, chosen: list[int], r: dict[str, int], lora_alpha: float, config: ExpertLoraConfig
    ) -> None:  # fmt: skip
        """Adds an adapter of rank r[projection] on the chosen experts."""
        base = self.get_base_layer()
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = {
            name: lora_alpha / (math.sqrt(rank) if config.use_rslora else rank) for name, rank in r.items()
        }
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        lora_A, lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, rank in r.items():
            weight = experts.weight_of(base, name)
            _, rows, columns = weight.shape
            out_features, in_features = (columns, rows) if base.is_transposed else (rows, columns)
            like = {
                "device": _device(weight),
                "dtype": weight.dtype if weight.dtype in FLOATS else torch.float32,
            }
            lora_A[name] = nn.Parameter(torch.empty(len(chosen), rank, in_features, **like))
            lora_B[name] = nn.Parameter(torch.empty(len(chosen), out_features, rank, **like))
            # As PEFT: every expert's A like the weight of an nn.Linear, its B zero.
            nn.init.kaiming_uniform_(lora_A[name].detach().view(-1, in_features), a=math.sqrt(5))
            if config.init_lora_weights:
                nn.init.zeros_(lora_B[name])
            else:
                nn.init.kaiming_uniform_(lora_B[name].detach().view(-1, rank), a=math.sqrt(5))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = lora_A, lora_B
        self.lora_experts[adapter_name] = torch.tensor(chosen, device=_device(weight))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = self._active()
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        base, adapted = self.base_layer, partial(self._adapted, active)
        if is_plain(base):
            return adapted(hidden_states, top_k_index, top_k_weights)
        with _forward_of(base, adapted):
            return base(hidden_states, top_k_index, top_k_weights)

    def why_not(self) -> str | None:
        """None, or the reason why the active adapters cannot run on the operator."""
        base = self.get_base_layer()
        reason = experts.why_not(base)
        if reason is not None:
            return reason
        active = self._active()
        if len(active) > 1 and any(map(self._dropout, active)):
            return "several adapters are active, each with a dropout of its own"
        for adapter in active:
            for name, A in self.lora_A[adapter].items():
                dtype, B = experts.weight_of(base, name).dtype, self.lora_B[adapter][name]
                if A.dtype != B.dtype or A.dtype not in (dtype, torch.float32):
                    return f"adapter {adapter} is {A.dtype} and {B.dtype}, the experts {dtype}"
        return None

    def get_delta_weight(self, adapter_name: str, projection: str) -> Tensor:
        """What the adapter adds to the weights of its experts: [slots, ...], in their layout, at least in float32."""
        A, B = self.lora_A[adapter_name][projection], self.lora_B[adapter_name][projection]
        dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        delta = B.to(dtype) @ A.to(dtype) * self.scaling[adapter_name][projection]
        return delta.transpose(1, 2) if self.get_base_layer().is_transposed else delta

    def _add(self, names: list[str], sign: int) -> None:
        base = self.get_base_layer()
        weights = {}
        for projection in experts.projections(base):
            with_adapter = [name for name in names if projection in self.lora_A[name]]
            if not with_adapter:
                continue
            weight = experts.weight_of(base, projection)
            quantized = isinstance(weight, FourBitWeight)
            total = fourbit_dequantize(weight, torch.float32) if quantized else weight.clone()
            for name in with_adapter:
                chosen, delta = self.lora_experts[name], self.get_delta_weight(name, projection)
                total[chosen] = (total[chosen] + sign * delta).to(total.dtype)
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"Adapters {', '.join(with_adapter)} cannot be merged: the sum is not finite."
                )
            weights[projection] = total
        self.requantization_error = {}
        for projection, total in weights.items():
            if isinstance(experts.weight_of(base, projection), FourBitWeight):
                self.requantization_error[projection] = experts.requantize(base, projection, total)
                warn_of_rounding(self, self.requantization_error[projection], projection)
            else:
                getattr(base, projection).copy_(total)

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.lora_A]

    def _dropout(self, adapter: str) -> float:
        module = self.lora_dropout[adapter]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def _adapted(
        self, active: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """The experts with their active adapters."""
        base, adapters = self.get_base_layer(), {}
        for adapter in active:
            chosen = self.lora_experts[adapter]
            slots = chosen.new_full((base.num_experts,), -1)
            slots[chosen] = torch.arange(chosen.numel(), device=chosen.device)
            for name, A in self.lora_A[adapter].items():
                B, scaling = self.lora_B[adapter][name], self.scaling[adapter][name]
                one = experts.Adapter(A, B, scaling, self._dropout(adapter), slots)
                adapters.setdefault(name, []).append(one)
        before, self.fallback = self.fallback, self.why_not()
        if self.fallback is None:
            adapters = {name: _side_by_side(several) for name, several in adapters.items()}
            return experts.call(base, hidden_states, top_k_index, top_k_weights, adapters)
        if forwards.in_force(self)[1]:
            layer = forwards.name_of(self, "expert_lora")
            raise forwards.FallbackError(f"Layer {layer} cannot run on the fast path: {self.fallback}.")
        if before != self.fallback:
            warnings.warn(
                f"Adapters on experts run in plain torch, which is slow: {self.fallback}.", stacklevel=2
            )
        return _in_plain_torch(base, hidden_states, top_k_index, top_k_weights, adapters)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        """Where PEFT moves an adapter that was loaded; its dtype stays that of the checkpoint."""
        return _device(experts.weight_of(base_layer, experts.projections(base_layer)[0])), None


def _device(weight: Tensor | FourBitWeight) -> torch.device:
    return weight.packed.device if isinstance(weight, FourBitWeight) else weight.device


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The module with another forward beneath its hooks, and beneath accelerate's, which call `_old_forward`."""
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def _side_by_side(adapters: list[experts.Adapter]) -> experts.Adapter:
    """Several adapters as one of the ranks' sum on the union of their experts, each with its scaling in B."""
    if len(adapters) == 1:
        return adapters[0]
    union = torch.stack([adapter.slots for adapter in adapters]).amax(0) >= 0
    chosen = union.nonzero().squeeze(1)

    def spread(stack: Tensor, slots: Tensor) -> Tensor:
        return torch.cat([stack, torch.zeros_like(stack[:1])])[slots[chosen]]  # no slot is -1: the zeros

    return experts.Adapter(
        torch.cat([spread(adapter.A, adapter.slots) for adapter in adapters], dim=1),
        torch.cat([spread(adapter.B * adapter.scaling, adapter.slots) for adapter in adapters], dim=2),
        scaling=1.0,
        slots=torch.where(union, union.cumsum(0) - 1, -1),
    )


def _in_plain_torch(
    base: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: dict[str, list[experts.Adapter]],
) -> Tensor:
    """What `experts.call` computes, for weights that train and dtypes that have no operator."""
    routing = Routing(top_k_index, base.num_experts)
    up, down = experts.projections(base)

    def project(name: str, x: Tensor) -> Tensor:
        weight = experts.weight_of(base, name)
        bias = getattr(base, f"{name}_bias") if base.has_bias else None
        common = dict(experts=routing.experts, transposed=base.is_transposed)
        y = reference.grouped_linear(x, weight, routing.offsets, bias=bias, **common)
        nothing = x.new_zeros(()).expand(weight.shape)
        for a in adapters.get(name, []):
            y = y + reference.grouped_linear(
                x, nothing, routing.offsets, a.A, a.B, a.scaling, slots=a.slots, dropout=a.dropout, **common
            )
        return y

    with torch.autocast(hidden_states.device.type, enabled=False):
        hidden = project(up, hidden_states.to(experts.weight_of(base, up).dtype)[routing.rows])
        hidden = project(down, base._apply_gate(hidden) if base.has_gate else base.act_fn(hidden))
        if base.has_post_expert_norm:
            hidden = base.post_expert_norm(hidden)
        weights = routing.weights(top_k_weights)
        return reference.moe_combine(hidden, weights, routing.places).to(hidden_states.dtype)


class ExpertLoraModel(LoraModel):
    """PEFT's LoRA, and `ExpertLora` on the experts that the configuration chooses."""

    tuner_layer_cls = BaseTunerLayer

    def _prepare_adapter_config(self, peft_config: ExpertLoraConfig, model_config: dict) -> ExpertLoraConfig:
        """Leaves target_modules at None, for which PEFT has defaults."""
        return peft_config

    def _prepare_model(self, peft_config: ExpertLoraConfig, model: nn.Module) -> None:
        """Everything about experts is checked here, before any layer is replaced."""
        super()._prepare_model(peft_config, model)
        self._chosen = _resolve(model, peft_config)

    def _check_target_module_exists(self, peft_config: ExpertLoraConfig, key: str):
        if key in self._chosen:
            return True
        return peft_config.target_modules is not None and super()._check_target_module_exists(
            peft_config, key
        )

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if current_key not in self._chosen or kwargs.get("parameter_name") is not None:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
            return
        layer = target if isinstance(target, ExpertLora) else ExpertLora(target, adapter_name)
        chosen, ranks = self._chosen[current_key]
        alpha_key = get_pattern_key(lora_config.alpha_pattern.keys(), current_key)
        alpha = lora_config.alpha_pattern.get(alpha_key, lora_config.lora_alpha)
        layer.update_layer(adapter_name, chosen, ranks, alpha, lora_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            setattr(parent, target_name, layer)

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is not possible with adapters on experts: one batch, one set of adapters."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def _check_add_weighted_adapter(self, *args, **kwargs):
        raise ValueError("add_weighted_adapter is not possible with adapters on experts.")

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuses a checkpoint of other experts before any of it is in the model."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, ExpertLora) and adapter_name in module.lora_A
        }
        for name, layer in layers.items():
            _check_checkpoint(name, layer, adapter_name, state_dict)
        known = {f"{name}.lora_experts.{adapter_name}" for name in layers}
        for key in state_dict:
            if ".lora_experts" in key and key not in known:
                layer = key.partition(".lora_experts")[0].removeprefix("base_model.model.")
                raise ValueError(
                    f"The checkpoint has adapters on experts of {layer}, but adapter {adapter_name} has none there."
                )
        return state_dict


def _resolve(model: nn.Module, config: ExpertLoraConfig) -> dict[str, tuple[list[int], dict[str, int]]]:
    """The chosen experts and the rank on each projection, by layer.

    Raises:
        ValueError: the configuration does not fit the model; the message names the layer.
    """
    found = experts_within(model)
    if not found:
        raise ValueError("model has no experts that transformers dispatches.")
    chosen = config.experts or {name: list(range(base.num_experts)) for name, (_, base) in found.items()}
    resolved = {}
    for layer, indices in chosen.items():
        if layer not in found:
            _refuse_layer(model, layer, list(found))
        around, base = found[layer]
        if around is not base and not isinstance(around, ExpertLora):
            raise ValueError(f"experts of {layer}: they are in a {type(around).__name__} of PEFT already.")
        if experts.is_parallel(base):
            raise ValueError(
                f"{layer} is spread over processes by tensor or expert parallelism, where adapters on experts cannot "
                "run: load the model whole, and shard it by FSDP after get_peft_model."
            )
        if indices[-1] >= base.num_experts:
            raise ValueError(
                f"experts of {layer} hold {indices[-1]}, expected 0 to {base.num_experts - 1}: it has "
                f"{base.num_experts} experts."
            )
        available = experts.projections(base)
        names = config.expert_projections or available
        ranks = config.expert_r if isinstance(config.expert_r, dict) else {}
        _check_projections("expert_projections", names, available, layer)
        _check_projections("expert_r", ranks, names, layer)
        for target in config.target_parameters or ():
            if any(f".{layer}.{name}".endswith(f".{target}") for name in available):
                raise ValueError(
                    f"target_parameters names {target!r}, but {layer} has its adapters by experts."
                )
        default = config.r if config.expert_r is None or ranks else config.expert_r
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), layer))
        if rank is not None and rank < 1:
            raise ValueError(f"rank_pattern gives {layer} the rank {rank}, expected at least 1.")
        resolved[layer] = (
            indices,
            {name: rank or ranks.get(name, default) for name in available if name in names},
        )
    return resolved


def _check_projections(argument: str, names: Iterable[str], available: Iterable[str], layer: str) -> None:
    for name in names:
        if name not in available:
            raise ValueError(
                f"{argument} names {name!r}, expected {' or '.join(available)}: the projections of {layer}."
            )


def _refuse_layer(model: nn.Module, layer: str, known: list[str]) -> None:
    module = dict(model.named_modules()).get(layer)
    if module is not None:
        raise ValueError(f"experts names {layer}, but that is a {type(module).__name__}, not experts.")
    nearest = (difflib.get_close_matches(layer, known, 1, cutoff=0) or known)[0]
    raise ValueError(f"experts names {layer}, which model does not have. Did you mean {nearest}?")


def _check_checkpoint(name: str, layer: ExpertLora, adapter: str, state_dict: dict[str, Tensor]) -> None:
    short = name.removeprefix("base_model.model.")
    ours, theirs = layer.lora_experts[adapter], state_dict.get(f"{name}.lora_experts.{adapter}")
    if theirs is None:
        raise ValueError(f"The checkpoint has no adapters on experts of {short}, but adapter {adapter} has.")
    if theirs.tolist() != ours.tolist():
        raise ValueError(
            f"The checkpoint has adapters on experts {theirs.tolist()} of {short}, but adapter {adapter} on "
            f"{ours.tolist()}."
        )
    for stacks in ("lora_A", "lora_B"):
        for projection, value in getattr(layer, stacks)[adapter].items():
            loaded = state_dict.get(f"{name}.{stacks}.{adapter}.{projection}")
            if loaded is None or loaded.shape != value.shape:
                shape = "is missing" if loaded is None else f"has shape {list(loaded.shape)}"
                raise ValueError(
                    f"{short}.{stacks}.{projection} of the checkpoint {shape}, expected {list(value.shape)}."
                )


register(PEFT_TYPE, ExpertLoraConfig, ExpertLoraModel)
