"""What `peftfast train` does to a model before it trains: 4 bits, adapters, routers, the load-balancing loss."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.settings import DTYPES, MIXTURE, PROFILE, QUANTIZATION, TrainSettings, option


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to train.

    `experts` is what --experts came to, None for a dense model; `profile` the ExpertProfile by which experts were
    chosen, if they were; `router_aux_loss_coef` weighs the routers' load-balancing loss, None if the training loss has
    none; `notes` are sentences for the user.
    """

    model: object
    experts: str | None
    profile: object | None
    router_aux_loss_coef: float | None
    notes: list[str]


def adapt(model, settings: TrainSettings, batches: Iterable[dict]) -> Adapted:
    """Return `model` with the adapters of `settings`, on linear layers and experts, and its routers trained if told.

    Args:
        batches: model inputs from the training data, by which `--experts profile:` chooses.
    Raises:
        UserError: the model lacks what an option is about, or PEFT cannot adapt what it names.
    """
    from peft import LoraConfig, get_peft_model

    import peftfast

    experts, routers, notes = experts_of(model), routers_of(model), []
    choice = _choice_of_experts(settings, experts)
    if settings.router == "train":
        _check_routers(model, routers)
    coefficient = None  # a mixture's own routers are its configuration's affair
    if settings.method != "mixture":
        coefficient = _router_aux_loss_coef(model, settings, trained=choice not in (None, "none"))
    options = dict(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_target_modules(model, settings, routers, notes),
        modules_to_save=_suffixes(model, routers) if settings.router == "train" else None,
    )
    profile = None
    if settings.method == "mixture":
        given = {argument: getattr(settings, name) for argument, name in MIXTURE.items()}
        given |= {"router_aux_loss_coef": settings.router_aux_loss_coef}
        options |= {argument: value for argument, value in given.items() if value is not None}
        kind = peftfast.MixtureLoraConfig
    elif settings.expert_share is not None:
        try:
            profile = peftfast.profile_experts(model, batches)
            options["experts"] = profile.top_share(settings.expert_share)
        except ValueError as error:
            raise UserError(f"--experts {settings.experts}: {first_sentence(error)}.") from error
        kind = peftfast.ExpertLoraConfig
    else:
        if choice == "all":
            options["target_parameters"] = _target_parameters(experts)
        kind = LoraConfig
    try:
        config = kind(**options)
    except ValueError as error:
        raise UserError(f"--method {settings.method}: {first_sentence(error)}.") from error
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        at_fault = "method" if settings.method == "mixture" else "target_modules"
        raise UserError(
            f"{option(at_fault)} {getattr(settings, at_fault)}: {first_sentence(error)}."
        ) from error
    if settings.router == "train":
        _train_in_float32(adapted)
    if settings.method == "mixture":
        coefficient = config.router_aux_loss_coef
    return Adapted(adapted, choice, profile, coefficient, notes)


# ---- experts and routers ----------------------------------------------------------------------------------


def experts_of(model) -> dict:
    """Return the modules of experts that transformers dispatches, by name; a dense model has none."""
    from peftfast.integrations.experts import holds_experts

    return {name: module for name, module in model.named_modules() if holds_experts(module)}


def routers_of(model) -> dict:
    """Return the modules whose output transformers records as router logits, by name.

    Not those that hold experts: some architectures record the logits of a whole block.
    """
    from transformers.utils.output_capturing import OutputRecorder

    recorders = []
    for module in model.modules():
        of_class = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        recorders += of_class if isinstance(of_class, list) else [of_class]
    classes = tuple({recorder.target_class for recorder in recorders if isinstance(recorder, OutputRecorder)})
    experts = experts_of(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, classes) and not any(inner.startswith(f"{name}.") for inner in experts)
    }


def _check_routers(model, routers: dict) -> None:
    """Refuse to train routers that are not there, or that loading has put into 4 bits."""
    if not routers:
        raise UserError(f"--router train: a {type(model).__name__} has no routers that transformers names.")
    for name, router in routers.items():
        if not all(weight.is_floating_point() for weight in router.parameters()):
            raise UserError(f"--router train: {name} is in 4 bits.")


def _choice_of_experts(settings: TrainSettings, experts: dict) -> str | None:
    if not experts:
        if settings.experts not in (None, "none"):
            raise UserError(
                f"--experts {settings.experts}: the model has no experts that transformers dispatches."
            )
        return None
    choice = settings.experts or ("none" if settings.method == "mixture" else "all")
    if choice == "all" and settings.lora_dropout:
        raise UserError(
            f"--lora-dropout {settings.lora_dropout}: PEFT has no dropout on experts; "
            f"--experts {PROFILE}1, peftfast's own adapters on all of them, has."
        )
    return choice


def _target_parameters(experts: dict) -> list[str]:
    """Return the experts' projections as PEFT's target_parameters."""
    from peftfast.integrations.experts import projections

    return sorted(
        {
            f"{_in_layer(name)}.{parameter}"
            for name, module in experts.items()
            for parameter in projections(module)
        }
    )


def _suffixes(model, modules: dict) -> list[str]:
    """Return names by whose ends PEFT finds `modules` and no others; without the layer, where that will do."""
    short = sorted({_in_layer(name) for name in modules})
    found = {name for name, _ in model.named_modules() if name.endswith(tuple(short))}
    return short if found == set(modules) else sorted(modules)


def _in_layer(name: str) -> str:
    """Return what follows the number of the layer: mlp.gate of model.layers.0.mlp.gate."""
    return re.split(r"\.\d+\.", name)[-1]


def _target_modules(model, settings: TrainSettings, routers: dict, notes: list[str]) -> str | list[str]:
    """Return the linear layers to adapt, as PEFT takes them.

    PEFT translates adapters made for models with one linear layer per expert. In several families it therefore reads
    "gate_proj", which "all-linear" comprises there, as the experts' weights and "gate" as the router, whatever else the
    model has by these names. About those --experts and --router decide, so such names are kept from it.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    text = settings.target_modules
    named = [name.strip() for name in text.split(",")]
    if not experts_of(model):
        return text if text == "all-linear" else named
    if text == "all-linear":
        linear = _maybe_include_all_linear_layers(LoraConfig(target_modules=text), model).target_modules
        named = [
            name
            for name in sorted(linear)
            if not any(f"{name}.".startswith(f"{router}.") for router in routers)
        ]
    if settings.method == "mixture" or settings.expert_share is not None:
        return named  # not PEFT's own adapters: it translates nothing
    taken = []
    for name in {name.rpartition(".")[2] for name in named}:
        config = LoraConfig(target_modules=[name])
        with contextlib.suppress(ValueError):  # of one of two names that it would only translate together
            convert_peft_config_for_transformers(config, model, None)
            if name in config.target_modules:
                continue
        taken.append(name)
    if not taken:
        return named
    listed = ", ".join(sorted(taken))
    if text != "all-linear":
        raise UserError(
            f"--target-modules {listed}: in a {model.config.model_type} PEFT takes that for the experts or the "
            "router, about which --experts and --router decide."
        )
    notes.append(
        f"The linear layers named {listed} stay frozen: in a {model.config.model_type} PEFT takes these names for "
        "the experts or the router."
    )
    return [name for name in named if name.rpartition(".")[2] not in taken]


def _train_in_float32(model) -> None:
    """Keep the trained copies of routers in float32: their small updates would be lost in bfloat16.

    PEFT trains such copies whole (modules_to_save) instead of by a low-rank update, which has hardly fewer numbers: a
    router has one row per expert. transformers' recording of the router's logits knows a router by its class and
    finds the copy; the experts run on their usual path, as the router is a module of its own.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    def cast(module, args, kwargs):
        def as_float32(value):
            return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return tuple(map(as_float32, args)), {name: as_float32(value) for name, value in kwargs.items()}

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for router in wrapper.modules_to_save.values():
                if next(router.parameters()).dtype != torch.float32:
                    router.float().register_forward_pre_hook(cast, with_kwargs=True)


# ---- the load-balancing loss ------------------------------------------------------------------------------


def _router_aux_loss_coef(model, settings: TrainSettings, trained: bool) -> float | None:
    """Return the weight of the load-balancing loss of the model's own routers; None: it stays out."""
    asked = settings.router_aux_loss_coef
    offered = "output_router_logits" in inspect.signature(type(model).forward).parameters
    if not (offered and hasattr(model, "router_aux_loss_coef")):
        if asked is not None:
            raise UserError(
                f"--router-aux-loss-coef: a {type(model).__name__} of transformers computes no load-balancing loss."
            )
        return None
    if asked is None and (trained or settings.router == "train"):
        return model.router_aux_loss_coef
    return asked


@contextlib.contextmanager
def balanced(adapted: Adapted, accumulation: int) -> Iterator[None]:
    """Have the model's loss comprise the load-balancing loss inside the block, as the settings say.

    Args:
        accumulation: losses that are added up for one optimizer step, of each of which the model adds it once.
    """
    if not adapted.router_aux_loss_coef:
        yield
        return
    base, config = adapted.model.get_base_model(), adapted.model.active_peft_config
    coefficient = adapted.router_aux_loss_coef / accumulation
    if hasattr(config, "router_aux_loss_coef"):  # a mixture's own routers
        changes = [(config, "router_aux_loss_coef", coefficient)]
    else:
        changes = [(base, "router_aux_loss_coef", coefficient), (base.config, "output_router_logits", True)]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


# ---- 4 bits -----------------------------------------------------------------------------------------------


def four_bit_config(settings: TrainSettings):
    """Return how to keep the base model, or None for dense; the products are always of --dtype."""
    if settings.method != "qlora":
        return None
    from peftfast import FourBitConfig

    given = {argument: getattr(settings, name) for argument, name in QUANTIZATION.items()}
    given = {argument: value for argument, value in given.items() if value is not None}
    return FourBitConfig(**given, compute_dtype=DTYPES[settings.dtype])


def check_quantization(settings: TrainSettings, model) -> None:
    """Refuse a checkpoint that is in 4 bits already, and in others than were asked for."""
    held = quantization(model)
    for argument, name in QUANTIZATION.items():
        value = getattr(settings, name)
        if value is not None and value != held[argument]:
            raise UserError(
                f"{option(name)} asks for {value}, but the model is in 4 bits already, "
                f"and there it is {held[argument]}."
            )


def quantization(model) -> dict | None:
    """Return how the model's weights are kept in 4 bits, as arguments of FourBitConfig."""
    from peftfast import FourBitConfig

    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, FourBitConfig):
        return None
    return {argument: getattr(config, argument) for argument in QUANTIZATION} | {
        "compute_dtype": str(config.compute_dtype).removeprefix("torch.")
    }


def quantized(model) -> dict[str, int]:
    """Return how many weights of each kind are in 4 bits: "linear layer", "expert projection"."""
    import peftfast

    return dict(Counter(peftfast.report(model).fourbit.values()))


def base_size(model) -> tuple[int, int]:
    """Return the parameters of a model without adapters, and the bytes that they take."""
    from peftfast.integrations.experts import FourBitExperts
    from peftfast.nn import Linear4bit

    packed = {}
    for module in model.modules():
        if isinstance(module, Linear4bit):
            packed[module.weight] = module.quantized_weight
        elif isinstance(module, FourBitExperts):
            packed |= {getattr(module, name): module.fourbit_weight(name) for name in module.fourbit_weights}
    sizes = [
        (math.prod(packed[weight].shape), packed[weight].nbytes)
        if weight in packed
        else (weight.numel(), weight.nbytes)
        for weight in model.parameters()
    ]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)
