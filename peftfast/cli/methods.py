"""What `peftfast train` does to a model before it trains: 4 bits, and what its method trains."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.experts import (
    check_routers,
    choice_of_experts,
    experts_of,
    in_layer,
    router_aux_loss_coef,
    routers_of,
    target_parameters,
)
from peftfast.cli.settings import (
    BOTTLENECK,
    DTYPES,
    LORAS,
    MIXTURE,
    PROMPTS,
    QUANTIZATION,
    TrainSettings,
    option,
)

ALL_LINEAR = "all-linear"
TASK = "CAUSAL_LM"
VIRTUAL_TOKENS = 20


@dataclass(frozen=True)
class Adapted:
    """A model that is ready to train.

    `model` is of PEFT, unless the method is full. `experts` is what --experts came to, None for a dense model;
    `profile` the ExpertProfile by which experts were chosen, if they were; `router_aux_loss_coef` weighs the routers'
    load-balancing loss, None if the training loss has none; `notes` are sentences for the user.
    """

    model: object
    experts: str | None
    profile: object | None
    router_aux_loss_coef: float | None
    notes: list[str]


def adapt(model, settings: TrainSettings, batches: Iterable[dict], profile=None) -> Adapted:
    """Return `model` with what `settings.method` trains, and its routers and embeddings trained if told.

    Args:
        batches: model inputs from the training data, by which `--experts profile:` chooses.
        profile: the ExpertProfile by which it has chosen before, instead.
    Raises:
        UserError: the model lacks what an option is about, or PEFT cannot adapt what it names.
    """
    from peft import get_peft_model

    if settings.method == "full":
        model.requires_grad_(True)
        coefficient = router_aux_loss_coef(model, settings, trained=True)
        return Adapted(model, "all" if experts_of(model) else None, None, coefficient, [])
    if settings.method in LORAS:
        config, choice, profile, coefficient, notes = _lora(model, settings, batches, profile)
    else:
        config = _bottleneck(settings) if settings.method == "bottleneck" else _prompt(model, settings)
        choice, profile, coefficient, notes = ("none" if experts_of(model) else None), None, None, []
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        at_fault = "method" if settings.method in ("mixture", *PROMPTS) else "target_modules"
        if settings.method == "bottleneck" and settings.target_modules == ALL_LINEAR:
            at_fault = "method"
        raise UserError(
            f"{option(at_fault)} {getattr(settings, at_fault)}: {first_sentence(error)}."
        ) from error
    if settings.objective == "pretrain":
        _check_tie(adapted)
    _train_in_float32(adapted)
    return Adapted(adapted, choice, profile, coefficient, notes)


def before_training(model) -> contextlib.AbstractContextManager:
    """Have the model answer as it did without its adapters inside the block, where untrained ones change it."""
    if getattr(model, "_is_prompt_learning", False):
        return model.disable_adapter()
    return contextlib.nullcontext()


def _configure(kind: Callable, settings: TrainSettings, options: dict):
    try:
        return kind(**options)
    except ValueError as error:
        raise UserError(f"--method {settings.method}: {first_sentence(error)}.") from error


def _given(settings: TrainSettings, names: dict[str, str]) -> dict:
    """Return the options that are not left to their configuration, by its arguments."""
    values = {argument: getattr(settings, name) for argument, name in names.items()}
    return {argument: value for argument, value in values.items() if value is not None}


# ---- LoRA -------------------------------------------------------------------------------------------------


def _lora(model, settings: TrainSettings, batches: Iterable[dict], profile) -> tuple:
    """Return the configuration, and of Adapted what follows the model."""
    from peft import LoraConfig

    import peftfast

    experts, routers, notes = experts_of(model), routers_of(model), []
    choice = choice_of_experts(settings, experts)
    whole = {}  # modules trained as they are
    if settings.router == "train":
        check_routers(model, routers)
        whole |= routers
    tied = False
    if settings.objective == "pretrain":
        embeddings, tied = _embeddings(model, settings)
        whole |= embeddings
    options = dict(
        task_type=TASK,
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_target_modules(model, settings, routers, notes),
        modules_to_save=_suffixes(model, whole) if whole else None,
        ensure_weight_tying=tied,
    )
    if settings.method == "mixture":
        options |= _given(settings, MIXTURE | {"router_aux_loss_coef": "router_aux_loss_coef"})
        config = _configure(peftfast.MixtureLoraConfig, settings, options)
        return config, choice, profile, config.router_aux_loss_coef, notes
    coefficient = router_aux_loss_coef(model, settings, trained=choice not in (None, "none"))
    kind = LoraConfig
    if settings.expert_share is not None:
        try:
            profile = profile or peftfast.profile_experts(model, batches)
            options["experts"] = profile.top_share(settings.expert_share)
        except ValueError as error:
            raise UserError(f"--experts {settings.experts}: {first_sentence(error)}.") from error
        kind = peftfast.ExpertLoraConfig
    elif choice == "all":
        options["target_parameters"] = target_parameters(experts)
    return _configure(kind, settings, options), choice, profile, coefficient, notes


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
        return text if text == ALL_LINEAR else named
    if text == ALL_LINEAR:
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
    if text != ALL_LINEAR:
        raise UserError(
            f"--target-modules {listed}: in a {model.config.model_type} PEFT takes that for the experts or the "
            "router, about which --experts and --router decide."
        )
    notes.append(
        f"The linear layers named {listed} stay frozen: in a {model.config.model_type} PEFT takes these names for "
        "the experts or the router."
    )
    return [name for name in named if name.rpartition(".")[2] not in taken]


def _suffixes(model, modules: dict) -> list[str]:
    """Return names by whose ends PEFT finds `modules` and no others; without the layer, where that will do."""
    short = sorted({in_layer(name) for name in modules})
    found = {name for name, _ in model.named_modules() if name.endswith(tuple(short))}
    return short if found == set(modules) else sorted(modules)


def _train_in_float32(model) -> None:
    """Keep the trained copies of routers and embeddings in float32: small updates would be lost in bfloat16.

    PEFT trains such copies whole (modules_to_save) instead of by a low-rank update, which has hardly fewer numbers for
    a router: it has one row per expert. transformers' recording of the router's logits knows a router by its class and
    finds the copy; the experts run on their usual path, as the router is a module of its own.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    def as_float32(value):
        return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def cast(module, args, kwargs):
        return tuple(map(as_float32, args)), {name: as_float32(value) for name, value in kwargs.items()}

    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        dtype = next(wrapper.original_module.parameters()).dtype
        if dtype == torch.float32:
            continue
        for copy in wrapper.modules_to_save.values():
            copy.float().register_forward_pre_hook(cast, with_kwargs=True)
            if isinstance(wrapper.original_module, torch.nn.Embedding):  # all layers go on from its output
                copy.register_forward_hook(lambda module, args, output, dtype=dtype: output.to(dtype))


# ---- embeddings and output head -----------------------------------------------------------------------------


def embeddings_of(model) -> dict:
    """Return the input embeddings and the output head, by name; of a model of PEFT, where it trains its copies."""
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if module in found}


def _embeddings(model, settings: TrainSettings) -> tuple[dict, bool]:
    """Return the embeddings and head to train, and whether they are one weight."""
    embeddings = embeddings_of(model)
    for name, module in embeddings.items():
        if not module.weight.is_floating_point():
            raise UserError(f"--objective pretrain: {name}, which it trains, is quantized.")
    for name in settings.target_modules.split(","):
        if any(f".{place}".endswith(f".{name.strip()}") for place in embeddings):
            raise UserError(f"--target-modules {name.strip()}: --objective pretrain trains it whole.")
    weights = {module.weight for module in embeddings.values()}
    return embeddings, len(embeddings) > len(weights)


def _check_tie(model) -> None:
    """Refuse a model whose tied weights PEFT would train as two."""
    base = model.get_base_model()
    wrappers = embeddings_of(base).values()
    originals = {wrapper.original_module.weight for wrapper in wrappers}
    if len({wrapper.weight for wrapper in wrappers}) > len(originals):
        raise UserError(
            f"--objective pretrain: PEFT cannot train the tied embeddings of a {type(base).__name__} as one weight; "
            "--method full can."
        )


# ---- bottleneck adapters and prompts ------------------------------------------------------------------------


def _bottleneck(settings: TrainSettings):
    import peftfast

    options = {"task_type": TASK} | _given(settings, BOTTLENECK)
    if settings.target_modules != ALL_LINEAR:
        options["target_modules"] = [name.strip() for name in settings.target_modules.split(",")]
    return _configure(peftfast.BottleneckConfig, settings, options)


def _prompt(model, settings: TrainSettings):
    """Return the configuration of a prefix or prompt of virtual tokens.

    A prompt starts from embeddings of tokens, as Lester et al., The Power of Scale for Parameter-Efficient Prompt
    Tuning, EMNLP 2021, found better than from random numbers.
    """
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, PromptTuningInit

    options = dict(task_type=TASK, num_virtual_tokens=settings.num_virtual_tokens or VIRTUAL_TOKENS)
    if settings.encoder_hidden_size is not None:
        options["encoder_hidden_size"] = settings.encoder_hidden_size
    if settings.method == "p-tuning":
        return PromptEncoderConfig(**options)
    if settings.method == "prefix":
        return PrefixTuningConfig(**options, prefix_projection=settings.encoder_hidden_size is not None)
    if settings.prompt_init_text is None:
        return PromptTuningConfig(**options, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB)
    return PromptTuningConfig(
        **options,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=settings.prompt_init_text,
        tokenizer_name_or_path=str(Path(settings.model).expanduser()),
    )


# ---- 4 bits -----------------------------------------------------------------------------------------------


def weights_dtype(settings: TrainSettings) -> str:
    """Return torch's name of the weights' dtype: float32 if they are trained, since bf16 would lose small updates."""
    return DTYPES["fp32" if settings.method == "full" else settings.dtype]


def four_bit_config(settings: TrainSettings):
    """Return how to keep the base model, or None for dense; the products are always of --dtype."""
    if settings.method != "qlora":
        return None
    from peftfast import FourBitConfig

    return FourBitConfig(**_given(settings, QUANTIZATION), compute_dtype=DTYPES[settings.dtype])


def check_quantization(settings: TrainSettings, model) -> None:
    """Refuse a checkpoint that is in 4 bits already, and in others than were asked for."""
    held = quantization(model)
    for argument, name in QUANTIZATION.items():
        value = getattr(settings, name)
        if value is not None and value != held.get(argument, "dense"):
            raise UserError(
                f"{option(name)} asks for {value}, but the model is in 4 bits already, "
                f"and there it is {held.get(argument, 'dense')}."
            )


def quantization(model) -> dict | None:
    """Return how the model's weights are kept in 4 bits, as arguments of FourBitConfig."""
    from peftfast import FourBitConfig

    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    if not isinstance(config, FourBitConfig):
        return None
    how = {argument: getattr(config, argument) for argument in QUANTIZATION}
    if config.embeddings is None:
        del how["embeddings"]
    return how | {"compute_dtype": str(config.compute_dtype).removeprefix("torch.")}


def quantized(model) -> dict[str, int]:
    """Return how many weights of each kind are in 4 bits: "linear layer", "embedding", "expert projection"."""
    import peftfast

    return dict(Counter(peftfast.report(model).fourbit.values()))


def base_size(model) -> tuple[int, int]:
    """Return the parameters of a model without adapters, and the bytes that they take."""
    from peftfast.integrations.experts import quantized_parameters

    packed = quantized_parameters(model)
    sizes = [
        (math.prod(packed[weight].shape), packed[weight].nbytes)
        if weight in packed
        else (weight.numel(), weight.nbytes)
        for weight in model.parameters()
    ]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)
