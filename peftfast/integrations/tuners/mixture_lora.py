"""A mixture of LoRAs on the feed-forward blocks of a dense model (MixLoRA, Li et al. 2024, arXiv 2404.15159).

Every expert of a block is the block's own frozen weights with a LoRA on each projection; a trained router sends each
token to `top_k` of them. The frozen weights are linear and the same in all experts, so a token goes through them once,
not once for each of its experts:

    base gate and up of x, then for each expert e of x    h[e] = act(gate + s B[e] A[e] x) * (up + s B[e] A[e] x)
    base down of sum_e w[e] h[e], beside which            sum_e w[e] s B[e] A[e] h[e]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from inspect import signature

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from peftfast.integrations.bases import is_plain
from peftfast.integrations.experts import is_parallel
from peftfast.integrations.tuners.registry import register, targeted
from peftfast.nn.moe import Routing
from peftfast.ops.devices import why_no_kernel
from peftfast.ops.lora import DTYPES, name_of

NAME = "MIXTURE_LORA"
# Variants of LoRA that there is no mixture of.
REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "use_bdlora", "megatron_config", "layer_replication", "target_parameters",
)  # fmt: skip


@dataclass
class MixtureLoraConfig(LoraConfig):
    """A mixture of LoRAs on every feed-forward block, and plain LoRA on `target_modules`.

        model = get_peft_model(model, peftfast.MixtureLoraConfig(r=8, target_modules=["q_proj", "v_proj"]))

    The fields of LoraConfig hold for the experts too: `r`, `lora_alpha`, `use_rslora`, `lora_dropout` and
    `init_lora_weights` (True, False or "gaussian"); the patterns, `exclude_modules` and `layers_to_transform` by the
    name of a block.

    Args:
        target_modules: gets plain LoRA, but for what lies within a block with a mixture. None: nothing.
        num_experts: of each block.
        top_k: experts that a token goes to, with the router's probabilities scaled to a sum of one.
        router_aux_loss_coef: of the balance loss num_experts * sum_e f_e P_e, where f_e is the share of the tokens that
            go to expert e (the shares add up to `top_k`) and P_e is its mean probability; the mean over all blocks
            (Fedus et al., Switch Transformers, JMLR 2022; as in Mixtral). In training it is added to the model's loss.
        mixture_modules: the blocks, by the ends of their names or by one regular expression. None: all that are
            recognized, see `LAYOUTS`.
    Raises:
        TypeError, ValueError: a field is not usable; the message names it.
    """

    num_experts: int = field(default=8, metadata={"help": "LoRA experts of each feed-forward block."})
    top_k: int = field(default=2, metadata={"help": "Experts that a token goes to."})
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the balance loss."})
    mixture_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the blocks; None: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = NAME
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are only {self.num_experts} experts.")
        if any(r < 1 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"r must be at least 1, got {self.r} and in rank_pattern {self.rank_pattern}.")
        if not 0 <= self.router_aux_loss_coef < math.inf:
            raise ValueError(f"router_aux_loss_coef must not be negative, got {self.router_aux_loss_coef}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}."
            )
        modules = self.mixture_modules or ()
        if not isinstance(modules, str) and not all(isinstance(name, str) for name in modules):
            raise TypeError(f"mixture_modules must be None, names or a regular expression, got {modules!r}.")
        for name in REFUSED:
            if getattr(self, name):
                raise ValueError(f"{name} is not available for a mixture of LoRAs.")


# ---- feed-forward blocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a feed-forward block calls its projections."""

    into: tuple[str, ...]  # from the hidden size: gate and up, both in one, or the only one
    out: str

    @property
    def both_in_one(self) -> bool:
        return self.into == ("gate_up_proj",)

    @property
    def projections(self) -> tuple[str, ...]:
        return *self.into, self.out

    def __str__(self) -> str:
        return ", ".join(self.projections)


LAYOUTS = (
    Layout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma
    Layout(("gate_up_proj",), "down_proj"),  # Phi-3, GLM
    Layout(("up_proj",), "down_proj"),  # Nemotron
    Layout(("c_fc",), "c_proj"),  # GPT-2
    Layout(("fc_in",), "fc_out"),  # GPT-J
    Layout(("fc1",), "fc2"),  # Phi, CLIP
    Layout(("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)
ACTIVATIONS = ("act_fn", "activation_fn", "act")


def layout_of(module: nn.Module) -> Layout | None:
    """The first of `LAYOUTS` that the module has all projections of, and one of `ACTIVATIONS`."""
    if not any(hasattr(module, name) for name in ACTIVATIONS):
        return None
    has_all = (
        layout
        for layout in LAYOUTS
        if all(isinstance(getattr(module, name, None), nn.Module) for name in layout.projections)
    )
    return next(has_all, None)


def activate(block: nn.Module, layout: Layout, projected: list[Tensor]) -> Tensor:
    """What a block makes of the results of the projections from the hidden size."""
    activation = next(getattr(block, name) for name in ACTIVATIONS if hasattr(block, name))
    if layout.both_in_one:
        projected = projected[0].chunk(2, dim=-1)
    if len(projected) == 1:
        return activation(projected[0])
    gate, up = projected
    return activation(gate) * up


def finish(block: nn.Module, y: Tensor) -> Tensor:
    """What a block does after its last projection."""
    return block.dropout(y) if isinstance(getattr(block, "dropout", None), nn.Module) else y


def computes_its_layout(block: nn.Module, layout: Layout) -> bool:
    """Whether the block's forward is that of its layout and no more: tried, with small projections in place of its own.

    In training mode, so that a dropout in an unexpected place shows.
    """
    modes = [(module, module.training) for module in block.modules()]  # children of children are shared
    twin = copy.copy(block)
    twin._modules = {name: copy.copy(child) for name, child in block._modules.items()}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        for name in layout.into:
            twin._modules[name] = _Product(4, 12 if layout.both_in_one else 6)
        twin._modules[layout.out] = _Product(6, 4)
        twin.train()
        x = torch.randn(2, 5, 4)
        try:
            state = torch.get_rng_state()
            theirs = type(block).forward(twin, x)
            torch.set_rng_state(state)
            hidden = activate(twin, layout, [twin._modules[name](x) for name in layout.into])
            ours = finish(twin, twin._modules[layout.out](hidden))
            return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        except Exception:  # whatever its forward does with such sizes: it is not what was expected
            return False
        finally:
            for module, training in modes:
                module.training = training


class _Product(nn.Module):
    """A linear layer without a parameter, which PEFT would put on the meta device under low_cpu_mem_usage."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.randn(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def sizes_of(projection: nn.Module) -> tuple[int, int]:
    """in_features and out_features."""
    if isinstance(projection, Conv1D):
        return tuple(projection.weight.shape)
    return projection.in_features, projection.out_features


# ---- the layer ----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """The routers' decisions in the forward that is running, if it is to have a balance loss."""

    routings: list[tuple[Tensor, Tensor]] | None = None  # probabilities [T, experts], experts [T, top_k]


class MixtureLoraLayer(nn.Module, BaseTunerLayer):
    """A feed-forward block with a mixture of LoRAs; several adapters may be there, one at a time is active.

    Parameters of an adapter, E experts: `lora_router` [E, hidden]; by projection `lora_A` [E, r, in] and `lora_B`
    [E, out, r].
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_router")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "top_k")

    def __init__(self, base_layer: nn.Module, record: Record) -> None:
        super().__init__()
        self.base_layer, self.record, self.layout = base_layer, record, layout_of(base_layer)
        self.lora_A, self.lora_B, self.lora_router = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.r, self.lora_alpha, self.scaling, self.lora_dropout, self.top_k = {}, {}, {}, {}, {}
        self.merged_adapters = []
        self.load: Tensor | None = None  # int64 [experts], the rows that each of the active adapter's got

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MixtureLoraConfig) -> None:
        """Adds an adapter, whose experts start, as in PEFT, with a zero lora_B."""
        weight = getattr(self.base_layer, self.layout.out).weight
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        kind = dict(device=weight.device, dtype=dtype)
        factors_A, factors_B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.layout.projections:
            inputs, outputs = sizes_of(getattr(self.base_layer, name))
            A = torch.empty(config.num_experts, r, inputs, **kind)
            B = torch.zeros(config.num_experts, outputs, r, **kind)
            if config.init_lora_weights == "gaussian":
                A.normal_(std=1 / r)
            else:
                A.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
            if config.init_lora_weights is False:
                B.uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r))
            factors_A[name], factors_B[name] = nn.Parameter(A), nn.Parameter(B)
        hidden, _ = sizes_of(getattr(self.base_layer, self.layout.into[0]))
        router = nn.Linear(hidden, config.num_experts, bias=False, **kind)
        if not router.weight.is_meta:
            nn.init.normal_(router.weight, std=0.02)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = factors_A, factors_B
        self.lora_router[adapter_name] = router
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name], self.top_k[adapter_name] = config.lora_dropout, config.top_k

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        refuse_several(adapter_names)
        if self.active_adapters != ([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            self.load = None  # of other experts
        super().set_adapter(adapter_names, inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merging()

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def why_not(self) -> str | None:
        """None, or the reason why the active adapter does not run on the operators."""
        return why_no_kernel(next(iter(self.lora_router.parameters())).device)

    def forward(self, x: Tensor) -> Tensor:
        name = next((name for name in self.active_adapters if name in self.lora_router), None)
        if self.disable_adapters or name is None:
            return self.base_layer(x)
        if x.dtype not in DTYPES:
            raise TypeError(f"A mixture of LoRAs takes float32, bfloat16 or float16, got {name_of(x.dtype)}.")
        block, layout, tokens = self.base_layer, self.layout, x.reshape(-1, x.shape[-1])
        routing, weights = self._route(name, tokens)
        projected = []
        for projection in layout.into:
            base = routing.repeat(getattr(block, projection)(tokens))
            low_rank = self._low_rank(name, projection, tokens, routing, gather=True)
            projected.append(base + low_rank.to(base.dtype))
        hidden = activate(block, layout, projected)
        low_rank = self._low_rank(name, layout.out, hidden, routing)
        y = getattr(block, layout.out)(routing.combine(hidden, weights))
        y = y + routing.combine(low_rank, weights).to(y.dtype)
        y = finish(block, y)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _route(self, name: str, tokens: Tensor) -> tuple[Routing, Tensor]:
        """Which rows go to which expert, and the weights [T, top_k] of a token's experts, in fp32."""
        router = self.lora_router[name].weight
        with torch.autocast(tokens.device.type, enabled=False):
            probabilities = F.linear(tokens.float(), router.float()).softmax(-1)
            weights, index = probabilities.topk(self.top_k[name], dim=-1)
            weights = weights / weights.sum(-1, keepdim=True)
        routing = Routing(index, router.shape[0])
        # Within a backward, by gradient checkpointing; torch.compile traces a checkpointed forward once.
        recomputed = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not recomputed:
            counts = routing.offsets.diff()
            self.load = counts if self.load is None else self.load + counts
            if self.record.routings is not None:
                if router.requires_grad and not probabilities.requires_grad:
                    raise RuntimeError(
                        "Reentrant gradient checkpointing hides the routers from the balance loss: set use_reentrant "
                        "to False in gradient_checkpointing_kwargs, or router_aux_loss_coef to 0."
                    )
                self.record.routings.append((probabilities, index))
        return routing, weights

    def _low_rank(
        self, name: str, projection: str, x: Tensor, routing: Routing, gather: bool = False
    ) -> Tensor:
        """The low-rank term of each routed row. `x` are these rows, or with `gather` the tokens."""
        A, B = self.lora_A[name][projection], self.lora_B[name][projection]
        if A.dtype != x.dtype:
            A, B = A.float(), B.float()
        dropout = self.lora_dropout[name] if self.training else 0.0
        return routing.linear(
            x, None, A, B, self.scaling[name], slots=routing.experts, dropout=dropout, gather=gather
        )


def refuse_several(adapter_names: str | list[str]) -> None:
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(
            f"A mixture of LoRAs runs one adapter at a time, got {', '.join(map(repr, adapter_names))}."
        )


def refuse_merging() -> None:
    raise ValueError(
        "A mixture of LoRAs cannot be merged into the weights: which of them a token gets depends on the token."
    )


# ---- the model ----------------------------------------------------------------------------------------------


class MixtureLoraModel(LoraModel):
    """A transformers model with mixtures of LoRAs on its feed-forward blocks; see `MixtureLoraConfig`.

    In training, an output with a `loss` has the balance loss in it, and it alone, without its coefficient, as
    `aux_loss`. Tokens that an attention_mask [batch, length] marks as padding do not count there.
    """

    tuner_layer_cls = BaseTunerLayer
    uses_shared_state = True  # the balance loss is the model's, not a layer's

    def _pre_injection_hook(self, model: nn.Module, config: MixtureLoraConfig, adapter_name: str) -> None:
        self._record = Record()
        self._hooks: list[RemovableHandle] = []

    def _post_injection_hook(self, model: nn.Module, config: MixtureLoraConfig, adapter_name: str) -> None:
        # On the model that is wrapped: PEFT calls it directly in generate() and where there is no task type.
        self._hooks += [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
        ]

    # ---- injection

    def _prepare_adapter_config(
        self, peft_config: MixtureLoraConfig, model_config: dict
    ) -> MixtureLoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = set()
        return peft_config

    def _prepare_model(self, peft_config: MixtureLoraConfig, model: nn.Module) -> None:
        self._blocks = self._blocks_for(peft_config, model)
        within = tuple(f"{name}." for name, module in self._mixtures() if name not in self._blocks)
        for name, _ in model.named_modules() if within else ():
            name = name.replace(".base_layer", "")
            if name.startswith(within) and super()._check_target_module_exists(peft_config, name):
                raise ValueError(
                    f"target_modules names {name}, but another adapter has a mixture on the block around it."
                )

    def _blocks_for(self, config: MixtureLoraConfig, model: nn.Module) -> set[str]:
        """The names of the blocks that get a mixture.

        Raises:
            ValueError: there are none, or one does not compute what its projections' names suggest.
        """
        blocks = dict(feed_forward_blocks(model))
        wanted = config.mixture_modules
        if wanted is None:
            wanted = {name.rpartition(".")[2] for name in blocks}
        chosen = {name for name in blocks if targeted(name, wanted, config)}
        if not chosen:
            looked_for = "; ".join(map(str, LAYOUTS))
            named = "" if config.mixture_modules is None else f" that mixture_modules={wanted!r} names"
            raise ValueError(
                f"model has no feed-forward block{named}. Looked for modules with these projections and one of "
                f"{', '.join(ACTIVATIONS)}: {looked_for}."
            )
        for name in sorted(chosen):
            layout = layout_of(blocks[name])
            if not is_plain(blocks[name]):
                raise ValueError(
                    f"{name} has hooks or a forward of its own, which a mixture would leave out."
                )
            if any(map(is_parallel, blocks[name].modules())):
                raise ValueError(
                    f"{name} is spread over processes by tensor parallelism, where a mixture of LoRAs cannot run: load "
                    "the model whole, and shard it by FSDP after get_peft_model."
                )
            if not computes_its_layout(blocks[name], layout):
                raise ValueError(
                    f"{name} has the projections {layout}, but its class, {type(blocks[name]).__name__}, computes more "
                    "than a feed-forward block of these: leave it out by mixture_modules or exclude_modules."
                )
        return chosen

    def _check_target_module_exists(self, peft_config: MixtureLoraConfig, key: str):
        if key in self._blocks:
            return True
        if any(key.startswith(f"{block}.") for block in self._blocks):
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if current_key not in self._blocks:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
            )
            return
        ranks, alphas = lora_config.rank_pattern, lora_config.alpha_pattern
        r = ranks.get(get_pattern_key(ranks.keys(), current_key), lora_config.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), current_key), lora_config.lora_alpha)
        layer = target
        if not isinstance(target, MixtureLoraLayer):
            layer = MixtureLoraLayer(target, self._record)
            layer.training = target.training
        layer.update_layer(adapter_name, r, alpha, lora_config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # until it is
            setattr(parent, target_name, layer)

    def _mixtures(self) -> Iterator[tuple[str, MixtureLoraLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, MixtureLoraLayer):
                yield name, module

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        for key, value in state_dict.items():
            if ".lora_router." in key and value.shape[0] != config.num_experts:
                raise ValueError(
                    f"{key} is of {value.shape[0]} experts, but num_experts is {config.num_experts}."
                )
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    # ---- use

    def expert_load(self) -> dict[str, Tensor]:
        """How many rows each expert of each block got since the last call: int64 [num_experts] by the block's name.

        Padding counts, recomputation by gradient checkpointing does not. Blocks that did not run are left out.
        """
        loads = {}
        for name, layer in self._mixtures():
            if layer.load is not None:
                loads[name], layer.load = layer.load, None
        return loads

    def _before_forward(self, model: nn.Module, args: tuple) -> None:
        config = self.peft_config.get(next(iter(self.active_adapters), None))
        wanted = config and config.router_aux_loss_coef > 0 and model.training and torch.is_grad_enabled()
        self._record.routings = [] if wanted else None

    def _after_forward(self, model: nn.Module, args: tuple, kwargs: dict, output):
        routings, self._record.routings = self._record.routings, None
        if not routings or output is None:
            return None
        if args:
            kwargs = dict(zip(signature(model.forward).parameters, args)) | kwargs
        aux_loss = balance_loss(routings, kwargs.get("attention_mask"))
        coefficient = self.peft_config[self.active_adapters[0]].router_aux_loss_coef
        if isinstance(output, Mapping):
            loss = output.get("loss")
            if loss is not None:
                output["loss"] = loss + coefficient * aux_loss.to(loss.device)
            if output.get("aux_loss") is None:  # a model with experts of its own may have one
                output["aux_loss"] = aux_loss
        elif isinstance(output, tuple) and kwargs.get("labels") is not None:
            output = (output[0] + coefficient * aux_loss.to(output[0].device), *output[1:])
        return output

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        refuse_several(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names is not available for a mixture of LoRAs, whose router chooses.")
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        raise ValueError("Mixtures of LoRAs cannot be added up: each has a router of its own.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _check_merge_allowed(self) -> None:
        refuse_merging()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        while self._hooks:
            self._hooks.pop().remove()
        return model


def feed_forward_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the blocks of `LAYOUTS`, also where they have a mixture already."""
    mixtures = []
    for name, module in model.named_modules():
        if name.startswith(tuple(mixtures)):
            continue
        if isinstance(module, MixtureLoraLayer):
            mixtures.append(f"{name}.")
            yield name, module.base_layer
        elif name and layout_of(module) is not None:
            yield name, module


def balance_loss(routings: list[tuple[Tensor, Tensor]], attention_mask: Tensor | None = None) -> Tensor:
    """The mean over the routers of experts * sum_e f_e P_e; see `MixtureLoraConfig`.

    Args:
        routings: of each router the probabilities [T, experts] and the chosen experts [T, top_k].
        attention_mask: zeros for the tokens to leave out; used where it is [batch, length] of the T tokens.
    """
    losses = []
    for probabilities, index in routings:
        tokens, experts = probabilities.shape
        counts = probabilities.new_ones(tokens)
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.numel() == tokens:
            counts = (attention_mask.reshape(-1) != 0).to(counts)
        total = counts.sum().clamp(min=1)
        chosen = probabilities.new_zeros(experts).index_add(
            0, index.reshape(-1), counts.repeat_interleave(index.shape[1])
        )
        losses.append(experts * (chosen / total * (counts @ probabilities / total)).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


register(NAME, MixtureLoraConfig, MixtureLoraModel)
