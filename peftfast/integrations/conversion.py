"""LoRA on experts between its two layouts on disk: stacked, as PEFT trains it with transformers 5, and one expert at a
time, as transformers 4 and vLLM read it.

    fused        target_parameters; where both projections are adapted, PEFT nests the one in the other:
                 experts.base_layer.lora_{A,B}    gate_up_proj    A [experts * r, in], the expert is the slowest index
                 experts.lora_{A,B}               down_proj       B [out, r * experts], the expert is the fastest index
    per-expert   target_modules:
                 experts.3.{gate,up,down}_proj.lora_{A,B}         A [r, in], B [out, r]

gate_up_proj is gate_proj on top of up_proj. Taken apart, the two share A and have a half of B each. Where they share
it, they are put together as they were, byte for byte; with an A of their own each, they stand side by side, with twice
the rank and the scaling that they had:

    A = [A_gate; A_up]    B = [B_gate 0; 0 B_up]
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's keys, before the name of the module
LAYOUTS = ("per-expert", "fused")


@dataclass(frozen=True)
class Names:
    """What a family of models calls its experts: the block that they are in, fused and one by one; their linears."""

    fused_block: str
    block: str
    gate: str
    up: str
    down: str

    @property
    def of_projection(self) -> dict[str, tuple[str, ...]]:
        """The linears of each fused projection."""
        return {"gate_up_proj": (self.gate, self.up), "down_proj": (self.down,)}

    def unfuse(self, name: str) -> str:
        """A name within the fused model, or a pattern of such, as it is where the experts are one by one."""
        return re.sub(rf"\b{self.fused_block}\b", self.block, name)

    def fuse(self, name: str) -> str:
        return re.sub(rf"\b{self.block}\b", self.fused_block, name)


_MIXTRAL = Names("mlp", "block_sparse_moe", "w1", "w3", "w2")
_MLP = Names("mlp", "mlp", "gate_proj", "up_proj", "down_proj")
NAMES = {
    "mixtral": _MIXTRAL, "minimax": _MIXTRAL, "minimax_m2": _MIXTRAL,
    "jamba": Names("feed_forward", "feed_forward", "gate_proj", "up_proj", "down_proj"),
    "lfm2_moe": Names("feed_forward", "feed_forward", "w1", "w3", "w2"),
    "deepseek_v2": _MLP, "deepseek_v3": _MLP, "dots1": _MLP, "ernie4_5_moe": _MLP, "exaone_moe": _MLP,
    "flex_olmo": _MLP, "glm4_moe": _MLP, "glm4_moe_lite": _MLP, "olmoe": _MLP, "qwen2_moe": _MLP, "qwen3_moe": _MLP,
    "qwen3_next": _MLP,
}  # fmt: skip


@dataclass(frozen=True)
class Conversion:
    """What was written: how many tensors; of how many layers and of how many experts of all layers; the ranks."""

    tensors: int
    layers: int
    experts: int
    ranks: list[int]


def convert(
    adapter: Path,
    out: Path,
    to: str,
    model_type: str,
    num_experts: int | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Writes the adapter in the folder `adapter` to the folder `out`, in the layout `to`.

    `out` receives the configuration and the weights, at once or, on an error, not at all. LoRA on other layers, other
    tensors and other settings stay as they are. Where `target_modules` is a pattern or "all-linear", the names of the
    adapted layers take its place; the linears of experts are named in it as in a model without shared experts
    ("gate_proj"), which is what those who read adapters expect: PEFT adds zeros to other layers of that name.

    Args:
        to: "per-expert" or "fused". An adapter on chosen experts (EXPERT_LORA) can be converted to "per-expert".
        model_type: of the base model, as its config.json says; one of `NAMES`.
        num_experts: to a layer of the base model; None: as many as the adapter has.
        overwrite: replace `out` if an adapter is there.
    Raises:
        ValueError: the adapter cannot be read or converted, or `out` is not free; the message is one sentence.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be {' or '.join(LAYOUTS)}, got {to!r}.")
    if model_type not in NAMES:
        raise ValueError(
            f"The names of experts of {model_type} are not known, only of {', '.join(sorted(NAMES))}."
        )
    _check_output(adapter, out, overwrite)
    converter = _to_per_expert if to == "per-expert" else _to_fused
    config, tensors, conversion = converter(
        _checked(read_config(adapter)), _read_weights(adapter), NAMES[model_type], num_experts
    )
    _write(out, config, tensors)
    return conversion


@dataclass(frozen=True)
class Lora:
    """LoRA on one linear of one expert: A [r, in], B [out, r]."""

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def size(self) -> tuple[int, float]:
        return self.A.shape[0], self.alpha


# By the name of the experts' module in the fused model, the expert's index, and the linear.
Layers = dict[str, dict[int, dict[str, Lora]]]
# Rank and alpha by the pattern of a linear's name in all experts of a layer, or by that of a projection.
Sizes = dict[str, tuple[int, float]]


def _to_per_expert(
    config: dict, tensors: dict[str, Tensor], names: Names, num_experts: int | None
) -> tuple[dict, dict, Conversion]:
    chosen = config["peft_type"] == "EXPERT_LORA"
    layers, rest, fused_names = (_read_chosen if chosen else _read_fused)(config, tensors, names)
    most = 1 + max(expert for experts in layers.values() for expert in experts)
    if num_experts and (most > num_experts or (most < num_experts and not chosen)):
        raise ValueError(f"The adapter is for {most} experts to a layer, the base model has {num_experts}.")
    others = _adapted_modules(rest)
    result = {names.unfuse(key): tensor for key, tensor in rest.items()}
    targets, sizes = [], {}
    for layer, experts in layers.items():
        layer = names.unfuse(layer)
        for expert, linears in experts.items():
            for linear, lora in linears.items():
                name = f"{layer}.{expert}.{linear}"
                for side in "AB":  # a tensor of its own: the file holds none twice
                    matrix = getattr(lora, side).clone(memory_format=torch.contiguous_format)
                    result[f"{PREFIX}{name}.lora_{side}.weight"] = matrix
                # Of chosen experts each has to be named: a linear's name alone is that of all experts.
                targets.append(name if chosen else linear)
                sizes[rf"{re.escape(layer)}\.\d+\.{linear}"] = lora.size
    targets += map(names.unfuse, _dense_targets(config, others))
    for parameter in config.get("target_parameters") or []:
        module, _, projection = parameter.rpartition(".")
        if projection == "weight" and _is_target(module, others):  # a router, which is a linear layer there
            targets.append(names.unfuse(module))
        elif projection not in names.of_projection:
            raise ValueError(f"target_parameters has {parameter}, which is neither of experts nor a router.")
    for setting in ("experts", "expert_projections", "expert_r"):
        config.pop(setting, None)
    config |= {"peft_type": "LORA", "target_modules": sorted(set(targets)), "target_parameters": None}
    _set_sizes(config, sizes, fused_names, others, names.unfuse)
    return config, result, _summary(result, layers, sizes)


def _to_fused(
    config: dict, tensors: dict[str, Tensor], names: Names, num_experts: int | None
) -> tuple[dict, dict, Conversion]:
    if config["peft_type"] != "LORA":
        raise ValueError("The adapter is on chosen experts, and the fused layout holds all.")
    layers, rest, linear_names = _read_per_expert(config, tensors, names, num_experts)
    others = _adapted_modules(rest)
    count = len(next(iter(layers.values())))
    one_A = all(
        torch.equal(linears[names.gate].A, linears[names.up].A)
        for experts in layers.values()
        for linears in experts.values()
        if names.gate in linears
    )
    result = {names.fuse(key): tensor for key, tensor in rest.items()}
    parameters, sizes = {}, {}
    for layer, experts in layers.items():
        projections = [name for name, (linear, *_) in names.of_projection.items() if linear in experts[0]]
        for projection in projections:
            linears = names.of_projection[projection]
            loras = [_fuse([experts[e][linear] for linear in linears], one_A, config) for e in range(count)]
            nested = "base_layer." if projection != projections[-1] else ""
            A = torch.cat([lora.A for lora in loras])
            B = torch.stack([lora.B for lora in loras], dim=2).flatten(1)
            result |= {
                f"{PREFIX}{layer}.{nested}lora_A.weight": A,
                f"{PREFIX}{layer}.{nested}lora_B.weight": B,
            }
            sizes[rf"{re.escape(layer)}\.{projection}"] = loras[0].size
        parameters[layer] = projections
    if len(set(map(tuple, parameters.values()))) == 1:  # a name for all layers
        parameters = {f"{names.fused_block}.experts": next(iter(parameters.values()))}
    targets = [
        target
        for target in _dense_targets(config, others)
        if _is_target(target, others) or not _is_target(target, linear_names)
    ]
    routers = [target for target in targets if _is_router(target, others, names)]
    config |= {
        "target_modules": sorted(names.fuse(target) for target in targets if target not in routers),
        "target_parameters": [
            *(f"{layer}.{name}" for layer, projections in parameters.items() for name in projections),
            *(f"{names.fuse(router)}.weight" for router in routers),
        ],
    }
    _set_sizes(config, sizes, linear_names, others, names.fuse)
    return config, result, _summary(result, layers, sizes)


def _fuse(loras: list[Lora], one_A: bool, config: dict) -> Lora:
    """Linears on top of one another as one."""
    A, alpha = [lora.A for lora in loras], loras[0].alpha
    if len(loras) == 1 or one_A:
        return Lora(A[0], torch.cat([lora.B for lora in loras]), alpha)
    # The scaling stays: it is alpha / r, or alpha / sqrt(r).
    alpha *= math.sqrt(len(loras)) if config.get("use_rslora") else len(loras)
    return Lora(torch.cat(A), torch.block_diag(*(lora.B for lora in loras)), alpha)


def _summary(tensors: dict[str, Tensor], layers: Layers, sizes: Sizes) -> Conversion:
    ranks = sorted({rank for rank, _ in sizes.values()})
    return Conversion(len(tensors), len(layers), sum(map(len, layers.values())), ranks)


# ---- tensors ----------------------------------------------------------------------------------------------
# Each of the readers gives the experts, the other tensors, and the names by which the configuration knew the experts.


def _read_fused(config: dict, tensors: dict[str, Tensor], names: Names) -> tuple[Layers, dict, list[str]]:
    pattern = rf"(.*\b{names.fused_block}\.experts)\.(base_layer\.)?lora_([AB])\.weight"
    found, rest = _matching(pattern, tensors, "fused", names)
    pairs: dict[str, dict[bool, dict[str, Tensor]]] = {}
    for (layer, nested, side), matrix in found.items():
        pairs.setdefault(layer, {}).setdefault(bool(nested), {})[side] = matrix
    targets = config.get("target_parameters") or []
    layers, known, count = {}, [], None
    for layer, wrappers in pairs.items():
        adapted = [name for name in names.of_projection if _is_named(f"{layer}.{name}", targets)]
        if len(wrappers) != len(adapted) or False not in wrappers:
            raise ValueError(
                f"{layer} has {len(wrappers)} adapted projections, but target_parameters names {len(adapted)} of them."
            )
        layers[layer] = {}
        for projection, nested in zip(adapted, sorted(wrappers, reverse=True), strict=True):
            name = f"{layer}.{projection}"
            known.append(name)
            A, B = _pair(wrappers[nested], name)
            r = _rank(config, name)
            experts, odd = divmod(A.shape[0], r)
            if odd or B.shape[1] != A.shape[0] or experts != (count or experts):
                wanted = count or "experts"
                raise ValueError(
                    f"{name} has lora_A {list(A.shape)} and lora_B {list(B.shape)}, expected [{wanted} * {r}, in] and "
                    f"[out, {r} * {wanted}]."
                )
            count = experts
            A, B = A.view(count, r, -1), B.view(-1, r, count).permute(2, 0, 1)
            alpha = _setting(config, "alpha_pattern", name, "lora_alpha")
            for expert in range(count):
                layers[layer].setdefault(expert, {}).update(
                    _split(A[expert], B[expert], alpha, names.of_projection[projection], name)
                )
    return layers, rest, known


def _read_chosen(config: dict, tensors: dict[str, Tensor], names: Names) -> tuple[Layers, dict, list[str]]:
    """Of EXPERT_LORA: by projection, A [slots, r, in] and B [slots, out, r], and the experts that have a slot."""
    layer = rf"(.*\b{names.fused_block}\.experts)"
    found, rest = _matching(rf"{layer}\.lora_([AB])\.(gate_up_proj|down_proj)", tensors, "fused", names)
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for (layer, side, projection), stack in found.items():
        pairs.setdefault((layer, projection), {})[side] = stack
    layers: Layers = {}
    for (layer, projection), pair in pairs.items():
        name = f"{layer}.{projection}"
        A, B = _pair(pair, name, dim=3)
        experts = rest.get(f"{PREFIX}{layer}.lora_experts")
        if experts is None or not len(experts) == len(A) == len(B):
            raise ValueError(f"{name} has adapters, but {layer}.lora_experts does not say of which experts.")
        alpha = _setting(config, "alpha_pattern", layer, "lora_alpha")
        for slot, expert in enumerate(experts.tolist()):
            layers.setdefault(layer, {}).setdefault(expert, {}).update(
                _split(A[slot], B[slot], alpha, names.of_projection[projection], name)
            )
    for layer in layers:
        del rest[f"{PREFIX}{layer}.lora_experts"]
    return layers, rest, list(layers)


def _read_per_expert(
    config: dict, tensors: dict[str, Tensor], names: Names, num_experts: int | None
) -> tuple[Layers, dict, list[str]]:
    linears = "|".join((names.gate, names.up, names.down))
    pattern = rf"(.*\b{names.block}\.experts)\.(\d+)\.({linears})\.lora_([AB])\.weight"
    found, rest = _matching(pattern, tensors, "per-expert", names)
    pairs: dict[tuple[str, int, str], dict[str, Tensor]] = {}
    for (layer, expert, linear, side), matrix in found.items():
        pairs.setdefault((layer, int(expert), linear), {})[side] = matrix
    layers, known = {}, []
    for (layer, expert, linear), pair in pairs.items():
        name = f"{layer}.{expert}.{linear}"
        known.append(name)
        lora = Lora(*_pair(pair, name), _setting(config, "alpha_pattern", name, "lora_alpha"))
        r = _rank(config, name)
        if lora.size[0] != r or lora.B.shape[1] != r:
            raise ValueError(f"{name} has rank {lora.size[0]}, but {CONFIG} says {r}.")
        layers.setdefault(names.fuse(layer), {}).setdefault(expert, {})[linear] = lora
    most = 1 + max(expert for experts in layers.values() for expert in experts)
    count = num_experts or most
    if most > count:
        raise ValueError(f"The adapter has expert {most - 1}, the base model {count} experts to a layer.")
    for layer, experts in layers.items():
        wanted = {linear for of_expert in experts.values() for linear in of_expert}
        if (names.gate in wanted) != (names.up in wanted):
            raise ValueError(
                f"{layer} has adapters on only one of {names.gate} and {names.up}, which are fused."
            )
        for expert in range(count):
            missing = wanted - experts.get(expert, {}).keys()
            if missing:
                raise ValueError(f"{layer} has no adapter on {min(missing)} of expert {expert} of {count}.")
        for fused in names.of_projection.values():
            matrices = [
                experts[expert][linear] for expert in range(count) for linear in fused if linear in wanted
            ]
            if len({(lora.size, lora.A.shape, lora.A.dtype, lora.B.dtype) for lora in matrices}) > 1:
                raise ValueError(
                    f"{layer} has adapters of different ranks, alphas or dtypes on {' and '.join(fused)}."
                )
    return layers, rest, known


def _matching(pattern: str, tensors: dict[str, Tensor], layout: str, names: Names) -> tuple[dict, dict]:
    """Tensors by the groups of `pattern`, if their module's name fits it, and the others by their keys.

    Raises:
        ValueError: none fits it, or one of the others is of experts too.
    """
    found, rest = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + pattern, key)
        if match:
            found[match.groups()] = tensor
        else:
            rest[key] = tensor
    blocks = f"{names.fused_block}|{names.block}"
    strange = [
        key
        for key in rest
        if re.search(rf"\b(?:{blocks})\.experts\.", key) and not key.endswith(".lora_experts")
    ]
    if found and strange:
        raise ValueError(f"The adapter's experts are {layout}, but {min(strange)} is not: layouts are mixed.")
    if not found:
        instead = f"; it has {min(strange)}" if strange else ""
        raise ValueError(
            f"The adapter has no LoRA on experts in the {layout} layout of this model type{instead}."
        )
    return found, rest


def _pair(pair: dict[str, Tensor], name: str, dim: int = 2) -> tuple[Tensor, Tensor]:
    for side in "AB":
        if side not in pair:
            raise ValueError(f"{name} has no lora_{side}.")
        if pair[side].dim() != dim:
            raise ValueError(f"{name} has lora_{side} {list(pair[side].shape)}, expected {dim} dimensions.")
    return pair["A"], pair["B"]


def _split(A: Tensor, B: Tensor, alpha: float, linears: tuple[str, ...], name: str) -> dict[str, Lora]:
    """LoRA on a projection of one expert as LoRA on the linears that are on top of one another in it."""
    if B.shape[0] % len(linears):
        raise ValueError(f"{name} has lora_B with {B.shape[0]} rows, which are not {' and '.join(linears)}.")
    return {linear: Lora(A, part, alpha) for linear, part in zip(linears, B.chunk(len(linears)), strict=True)}


# ---- configuration ----------------------------------------------------------------------------------------


def _checked(config: dict) -> dict:
    """A copy, if LoRA on experts can be of that kind."""
    kind = config.get("peft_type")
    if kind not in ("LORA", "EXPERT_LORA"):
        raise ValueError(f"The adapter is of type {kind}, only LORA and EXPERT_LORA can be converted.")
    for setting in ("use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"):
        if config.get(setting):
            raise ValueError(f"The adapter has {setting}, with which LoRA on experts is not known.")
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{CONFIG} has no r and lora_alpha.")
    return copy.deepcopy(config)


def _setting(config: dict, patterns: str, name: str, default: str) -> float:
    """The rank or alpha of a module, as PEFT reads it."""
    values = config.get(patterns) or {}
    return values.get(get_pattern_key(values.keys(), name), config[default])


def _rank(config: dict, name: str) -> int:
    r = _setting(config, "rank_pattern", name, "r")
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"{CONFIG} says rank {r!r} of {name}, expected an integer above 0.")
    return r


def _adapted_modules(tensors: dict[str, Tensor]) -> list[str]:
    names = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    return sorted(names)


def _is_named(name: str, targets: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _is_target(target: str, modules: Iterable[str]) -> bool:
    return any(_is_named(module, [target]) for module in modules)


def _is_router(target: str, modules: list[str], names: Names) -> bool:
    routers = [module for module in modules if module.endswith(f".{names.block}.gate")]
    return target.rpartition(".")[2] == "gate" and _is_target(target, routers)


def _dense_targets(config: dict, others: list[str]) -> list[str]:
    targets = config.get("target_modules") or []
    return others if isinstance(targets, str) else list(targets)


def _set_sizes(
    config: dict, sizes: Sizes, before: list[str], others: list[str], rename: Callable[[str], str]
) -> None:
    """Makes rank and alpha hold for experts by the patterns of their names, and no longer for their names `before`.

    `others` are the adapted modules that are no experts: what holds for them stays, under a name that may have changed.
    """
    if (
        not others and len(set(sizes.values())) == 1
    ):  # without patterns, which not all who serve adapters read
        ((config["r"], config["lora_alpha"]),) = set(sizes.values())
        config |= {"rank_pattern": {}, "alpha_pattern": {}}
        return
    for index, (setting, default) in enumerate((("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))):
        kept = {
            rename(pattern): value
            for pattern, value in (config.get(setting) or {}).items()
            if _fits(pattern, others) or not _fits(pattern, before)
        }
        values: dict[str, dict[str, float]] = {}  # of each linear or projection, by layer
        for pattern, size in sizes.items():
            values.setdefault(pattern[pattern.rindex("experts") :], {})[pattern] = size[index]
        added = {}
        for linear, by_layer in values.items():
            if len(set(by_layer.values())) > 1:
                added |= by_layer
            elif kept or set(by_layer.values()) != {config[default]}:
                added[linear] = next(iter(by_layer.values()))
        config[setting] = added | kept


def _fits(pattern: str, names: Iterable[str]) -> bool:
    return any(get_pattern_key([pattern], name) == pattern for name in names)


# ---- files ------------------------------------------------------------------------------------------------


def read_config(adapter: Path) -> dict:
    """The configuration of the adapter in a folder.

    Raises:
        ValueError: it has none.
    """
    if not (adapter / CONFIG).is_file():
        raise ValueError(f"{adapter} is not an adapter folder: it has no {CONFIG}.")
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{adapter / CONFIG} is not a JSON object.")
    return config


def _read_weights(adapter: Path) -> dict[str, Tensor]:
    if not (adapter / WEIGHTS).is_file():
        raise ValueError(f"{adapter} has no {WEIGHTS}, the one kind of weights that is read.")
    try:
        return load_file(adapter / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{adapter / WEIGHTS} cannot be read: {error}.") from None


def _check_output(adapter: Path, out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file.")
    if out.is_dir() and any(out.iterdir()):
        if adapter.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out} is or holds the adapter itself, which stays as it is.")
        if not overwrite:
            raise ValueError(f"{out} exists and is not empty: pass --overwrite to replace it.")
        if not (out / CONFIG).is_file():
            raise ValueError(f"{out} is not an adapter folder, so --overwrite leaves it alone.")


def _write(out: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Fills a folder beside `out`, which then takes its place."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as beside:
        folder = Path(beside, "new")
        folder.mkdir()  # with the permissions of any folder, unlike the temporary one
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True)
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if out.exists():
            os.replace(out, Path(beside, "earlier"))
        os.replace(folder, out)
