"""Bottleneck adapters: small trained networks after or beside the sublayers of a frozen model.

Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019; Pfeiffer et al., AdapterFusion, EACL 2021;
He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftfast.integrations.tuners.registry import register, targeted
from peftfast.nn.adapter import BottleneckAdapter, check_options
from peftfast.ops.adapter import KERNEL_DEVICES
from peftfast.ops.lora import DTYPES

PEFT_TYPE = "BOTTLENECK"
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters on a model, for get_peft_model; they cannot be merged into its weights.

        model = get_peft_model(model, peftfast.BottleneckConfig(placement="parallel", bottleneck_size=64, scaling=4.0))

    Several active adapters run one after the other, in the order in which they were named.

    Args:
        placement: "houlsby": an adapter on the output of each attention and of each feed-forward block, before the
            model's residual sum. "pfeiffer": on that of each feed-forward block. "parallel": beside each feed-forward
            block, from its input, added to its output.
        target_modules: the modules that get an adapter, by the ends of their names or by one regular expression. None:
            the blocks that `placement` says, see `sublayers`. Of a module that returns a tuple, the first entry counts.
        exclude_modules: modules that do not, in the same way.
        layers_to_transform: the numbers of the layers whose modules get one. None: all.
        bottleneck_size: features of the bottleneck. None: from `reduction_factor`.
        reduction_factor: the hidden size over the bottleneck's. None: 16.
        activation: as in `peftfast.ops.bottleneck_adapter`.
        scaling: a factor of what the adapter adds, or "learned": one for each adapter, which starts at 1.
        layer_norm: whether the adapter's input goes through a LayerNorm of its own.
        dropout: probability that an element of the bottleneck is dropped in training.
        init: "zero": the model starts as it is, bit for bit. "normal": near it, with small random weights.
        modules_to_save: modules that are trained and saved whole, beside the adapters.
    Raises:
        TypeError, ValueError: a field is not usable, by itself here, for the model in get_peft_model.
    """

    placement: str = field(default="pfeiffer")
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    bottleneck_size: int | None = field(default=None)
    reduction_factor: float | None = field(default=None)
    activation: str = field(default="relu")
    scaling: float | str = field(default=1.0)
    layer_norm: bool = field(default=False)
    dropout: float = field(default=0.0)
    init: str = field(default="zero")
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement is {self.placement!r}, expected one of {', '.join(PLACEMENTS)}.")
        check_options(self.activation, self.scaling, self.dropout, self.init)
        for name in ("bottleneck_size", "reduction_factor"):
            value, whole = getattr(self, name), name == "bottleneck_size"
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise TypeError(f"{name} is {value!r}, expected a {'whole ' if whole else ''}number.")
            if not value >= (1 if whole else 0) or value == 0:
                raise ValueError(
                    f"{name} is {value}, expected {'at least 1' if whole else 'a positive number'}."
                )
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ValueError("bottleneck_size and reduction_factor are both set: one follows from the other.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not all(isinstance(entry, str) for entry in value) or (name == "target_modules" and not value):
                raise TypeError(f"{name} is {value!r}, expected names, one regular expression or None.")
            setattr(self, name, set(value))

    def size_for(self, hidden_size: int, module: str) -> int:
        """The bottleneck's features on a module of `hidden_size`."""
        if self.bottleneck_size is not None:
            return self.bottleneck_size
        factor = 16 if self.reduction_factor is None else self.reduction_factor
        size = int(hidden_size / factor)
        if size < 1:
            raise ValueError(
                f"reduction_factor {factor:g} leaves nothing of the {hidden_size} features of {module}."
            )
        return size


# ---- where adapters go --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A module that gets an adapter on its output."""

    name: str
    module: nn.Module
    source: str | None = None  # parallel: the module whose input the adapter reads; it may be the same


ATTENTION = (
    "self_attn", "self_attention", "attn", "attention", "SelfAttention", "cross_attn", "encoder_attn", "crossattention",
    "EncDecAttention",
)  # fmt: skip
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "ff", "DenseReluDense", "block_sparse_moe", "moe")
# Where a block is two modules of the layer rather than one: the one that reads, and the projection back.
FEED_FORWARD_PAIRS = (("intermediate", "output.dense"), ("fc1", "fc2"))
# Where a block adds its residual inside: the projection back, within the block.
PROJECTION_BEFORE_RESIDUAL = "output.dense"


def sublayers(model: nn.Module, placement: str) -> Iterator[Target]:
    """The targets of a placement: attention and feed-forward blocks, recognized by their names.

    A block within another one is part of it. Where a block adds its own residual (BERT), the target is the projection
    in it before that sum.
    """
    modules = dict(base_modules(model))
    blocks: list[str] = []
    for name, module in modules.items():
        if name.startswith(tuple(f"{block}." for block in blocks)):
            continue
        last, prefix = name.rpartition(".")[2], f"{name}." if name else ""
        if last in ATTENTION:
            blocks.append(name)
            inner = prefix + PROJECTION_BEFORE_RESIDUAL
            if placement == "houlsby":
                yield Target(inner, modules[inner]) if inner in modules else Target(name, module)
        elif last in FEED_FORWARD:
            blocks.append(name)
            yield Target(name, module, name if placement == "parallel" else None)
        for into, out in FEED_FORWARD_PAIRS:
            if last not in FEED_FORWARD and prefix + into in modules and prefix + out in modules:
                blocks += [prefix + into, prefix + out]
                source = prefix + into if placement == "parallel" else None
                yield Target(prefix + out, modules[prefix + out], source)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by the names that they have without any adapter, which are left out."""
    layers = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in model.named_modules():
        around = [layer for layer in layers if name.startswith(layer)]
        if isinstance(module, BaseTunerLayer) or any(
            not name[len(layer) :].startswith("base_layer") for layer in around
        ):
            continue
        yield name.replace(".base_layer", ""), module


def find_targets(config: BottleneckConfig, model: nn.Module) -> tuple[dict[str, Target], list[str]]:
    """The targets of a configuration, by name; and the names of those that it excludes.

    Raises:
        ValueError: there are no targets.
    """
    parallel = config.placement == "parallel"
    if config.target_modules is None:
        found = {target.name: target for target in sublayers(model, config.placement)}
        if not found:
            raise ValueError(
                f"model has no blocks for placement {config.placement!r}; name modules by target_modules. Looked for "
                f"modules called {', '.join(FEED_FORWARD)}"
                + (f", {', '.join(ATTENTION)}." * (not parallel) or ".")
            )
    else:
        found = {
            name: Target(name, module, name if parallel else None)
            for name, module in base_modules(model)
            if name
        }
    wanted = config.target_modules or {name.rpartition(".")[2] for name in found}
    matched = {name: targeted(name, wanted, config) for name in found}
    chosen = {name: found[name] for name, match in matched.items() if match}
    excluded = [name for name, match in matched.items() if isinstance(match, _ExcludedModule)]
    if not chosen:
        named = config.target_modules
        if named is None:
            raise ValueError("exclude_modules and layers_to_transform leave no module for an adapter.")
        if isinstance(named, str):
            raise ValueError(f"target_modules {named!r} matches no module of the model.")
        ends = {name.rpartition(".")[2] for name in found}
        near = {
            close
            for name in named
            for close in difflib.get_close_matches(name.rpartition(".")[2], ends, cutoff=0.3)
        }
        raise ValueError(
            f"target_modules {', '.join(sorted(named))} match no module of the model that is not excluded"
            + (f"; the nearest names are {', '.join(sorted(near))}." if near else ".")
        )
    return chosen, excluded


def width_of(target: Target, model: nn.Module) -> int:
    """The features of a module's output: its own, else the hidden size of the nearest configuration around it.

    Raises:
        ValueError: neither is known.
    """
    for attribute in ("out_features", "nf", "embedding_dim"):
        if isinstance(getattr(target.module, attribute, None), int):
            return getattr(target.module, attribute)
    around = [target.module]
    parts = target.name.split(".")
    for count in range(len(parts) - 1, -1, -1):
        around.append(model.get_submodule(".".join(parts[:count])))
    for module in around:
        hidden_size = getattr(getattr(module, "config", None), "hidden_size", None)
        if isinstance(hidden_size, int):
            return hidden_size
    raise ValueError(f"The features of {target.name}, a {type(target.module).__name__}, are not known.")


# ---- the layer ----------------------------------------------------------------------------------------------


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module with adapters on its output.

    Attributes, by the adapter's name:
        bottleneck_adapter: `peftfast.nn.BottleneckAdapter`.
        reads: what goes through the adapter: the "output" of the module, its "input", or that of the "block" which the
            module is the end of.
    """

    adapter_layer_names = ("bottleneck_adapter",)
    other_param_names = ("reads",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_adapter = nn.ModuleDict()
        self.reads: dict[str, str] = {}
        self.merged_adapters = []
        self._block_input: Tensor | None = None  # between the block's first module and this
        self._hook: RemovableHandle | None = None

    def __getattr__(self, name: str):
        """What a model asks of the module that this stands for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add(self, adapter_name: str, adapter: BottleneckAdapter, source: nn.Module | None) -> None:
        """An adapter that reads the input of `source`, or None: the output of this module."""
        self.bottleneck_adapter[adapter_name] = adapter
        if source is None or source in (self, self.base_layer):
            self.reads[adapter_name] = "output" if source is None else "input"
            return
        self.reads[adapter_name] = "block"
        if self._hook is None:
            self._hook = source.register_forward_pre_hook(self._keep_block_input, with_kwargs=True)

    def why_not(self) -> str | None:
        """None, or the reason why an active adapter does not run on the operator."""
        for name in self.active_adapters:
            if name in self.bottleneck_adapter:
                weight = self.bottleneck_adapter[name].down_weight
                if weight.device.type not in KERNEL_DEVICES:
                    return f"there is no kernel for {weight.device.type} yet"
                if weight.dtype not in DTYPES:
                    return f"adapter {name} is {weight.dtype}"
        return None

    def _keep_block_input(self, source: nn.Module, args: tuple, kwargs: dict) -> None:
        self._block_input = _first_tensor(args, kwargs)

    def forward(self, *args, **kwargs):
        block_input, self._block_input = self._block_input, None
        result = self.base_layer(*args, **kwargs)
        active = [name for name in self.active_adapters if name in self.bottleneck_adapter]
        if self.disable_adapters or not active:
            return result
        hidden = result[0] if isinstance(result, tuple) else result
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"A bottleneck adapter needs a tensor, first in a tuple or alone, but {type(self.base_layer).__name__} "
                f"returns {type(hidden).__name__}."
            )
        for name in active:
            x = hidden
            if self.reads[name] != "output":
                x = block_input if self.reads[name] == "block" else _first_tensor(args, kwargs)
                x = x.to(hidden.dtype)  # under autocast they may differ
            hidden = self.bottleneck_adapter[name](x, residual=hidden)
        return (hidden, *result[1:]) if isinstance(result, tuple) else hidden

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merging()

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    def take_off(self) -> None:
        """Leaves no trace in the model but itself."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _first_tensor(args: tuple, kwargs: dict) -> Tensor:
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    found = next((value for value in given if isinstance(value, Tensor)), None)
    if found is None:
        raise TypeError(
            "A parallel bottleneck adapter reads the input of its block, which was given no tensor."
        )
    return found


def refuse_merging() -> None:
    raise ValueError(
        "A bottleneck adapter cannot be merged into the weights: its activation is not linear. unload() takes it off."
    )


# ---- the model ----------------------------------------------------------------------------------------------


class BottleneckModel(BaseTuner):
    """A model with bottleneck adapters; see `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _prepare_adapter_config(self, peft_config: BottleneckConfig, model_config: dict) -> BottleneckConfig:
        """Leaves target_modules at None: `placement` says where."""
        return peft_config

    def _prepare_model(self, peft_config: BottleneckConfig, model: nn.Module) -> None:
        """Everything is checked here, before any module is replaced."""
        targets, self._excluded = find_targets(peft_config, model)
        taken = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        around = {name.replace(".base_layer", "") for name in taken} | set(targets)
        for name in sorted(around):
            outer = next((other for other in sorted(around) if name.startswith(f"{other}.")), None)
            if outer is not None:
                raise ValueError(f"{name} is within {outer}: only one of them can have adapters.")
        self._targets = {}
        for name, target in targets.items():
            width = width_of(target, model)
            inputs = getattr(target.module, "in_features", getattr(target.module, "nx", width))
            if target.source == name and inputs != width:
                raise ValueError(
                    f"placement 'parallel' needs as many outputs as inputs, but {name} has {width} and {inputs}."
                )
            self._targets[name] = target, width, peft_config.size_for(width, name)

    def _check_target_module_exists(self, peft_config: BottleneckConfig, key: str) -> bool | _ExcludedModule:
        return _ExcludedModule() if key in self._excluded else key in self._targets

    def _create_and_replace(
        self, config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        where, width, size = self._targets[current_key]
        layer = target
        if not isinstance(target, BottleneckLayer):
            layer = BottleneckLayer(target)
            layer.training = target.training
        like = next((p for p in (*target.parameters(), *parent.parameters())), torch.empty(0))
        adapter = BottleneckAdapter(
            width,
            size,
            activation=config.activation,
            scaling=config.scaling,
            layer_norm=config.layer_norm,
            dropout=config.dropout,
            init=config.init,
            dtype=like.dtype if like.dtype in (*DTYPES, torch.float64) else torch.float32,
            device=like.device,
        )
        source = None if where.source is None else self.model.get_submodule(where.source)
        layer.add(adapter_name, adapter.train(layer.training), source)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.bottleneck_adapter.requires_grad_(False)  # until it is
            setattr(parent, target_name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Without PEFT's care for a weight, which a whole block does not have."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Refuses a checkpoint of another model or size before any of it is in this one."""
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        mark = f".bottleneck_adapter.{adapter_name}."
        ours = {name: p.shape for name, p in model.named_parameters() if mark in name}
        theirs = {name: value.shape for name, value in state_dict.items() if mark in name}
        for name in sorted(ours.keys() | theirs.keys()):
            short = name.removeprefix("base_model.model.").replace(mark, " ").replace(" ", ": ")
            if name not in theirs:
                raise ValueError(
                    f"The checkpoint has nothing for {short}, but the model has an adapter there."
                )
            if name not in ours:
                raise ValueError(f"The checkpoint has an adapter on {short}, but the model has none there.")
            if ours[name] != theirs[name]:
                raise ValueError(
                    f"{short} has shape {list(theirs[name])} in the checkpoint, expected {list(ours[name])}."
                )
        return state_dict

    def _check_merge_allowed(self) -> None:
        refuse_merging()

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs) -> nn.Module:
        layers = [module for module in self.model.modules() if isinstance(module, BottleneckLayer)]
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        for layer in layers:
            layer.take_off()
        return model


register(PEFT_TYPE, BottleneckConfig, BottleneckModel)
