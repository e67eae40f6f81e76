"""What the command knows of a mixture of experts: its experts and routers, and the load-balancing loss."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator

from peftfast.cli.errors import UserError
from peftfast.cli.settings import PROFILE, TrainSettings


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


def check_routers(model, routers: dict) -> None:
    """Raise UserError for routers that are not there, or that loading has put into 4 bits."""
    if not routers:
        raise UserError(f"--router train: a {type(model).__name__} has no routers that transformers names.")
    for name, router in routers.items():
        if not all(weight.is_floating_point() for weight in router.parameters()):
            raise UserError(f"--router train: {name} is in 4 bits.")


def choice_of_experts(settings: TrainSettings, experts: dict) -> str | None:
    """Return what --experts comes to; None for a dense model.

    Raises:
        UserError: the model has no experts, or adapters on them cannot have what else was asked for.
    """
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


def target_parameters(experts: dict) -> list[str]:
    """Return the experts' projections as PEFT's target_parameters."""
    from peftfast.integrations.experts import projections

    return sorted(
        {
            f"{in_layer(name)}.{parameter}"
            for name, module in experts.items()
            for parameter in projections(module)
        }
    )


def in_layer(name: str) -> str:
    """Return what follows the number of the layer: mlp.gate of model.layers.0.mlp.gate."""
    return re.split(r"\.\d+\.", name)[-1]


# ---- the load-balancing loss ------------------------------------------------------------------------------


def router_aux_loss_coef(model, settings: TrainSettings, trained: bool) -> float | None:
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
def balanced(adapted, accumulation: int) -> Iterator[None]:
    """Have the model's loss comprise the load-balancing loss inside the block, as the settings say.

    Args:
        accumulation: losses that are added up for one optimizer step, of each of which the model adds it once.
    """
    if not adapted.router_aux_loss_coef:
        yield
        return
    model = adapted.model
    base, config = model, None
    if hasattr(model, "get_base_model"):
        base, config = model.get_base_model(), model.active_peft_config
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
