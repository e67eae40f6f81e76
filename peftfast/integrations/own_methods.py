"""The layers of peftfast's own methods, whose forward is the fast path whether or not peftfast is enabled."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

NAME = "peftfast"


def answers_for(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and type(module).__module__.startswith(
        "peftfast.integrations.tuners."
    )


def kind_of(layer: nn.Module) -> str:
    return f"{NAME}.{type(layer).__name__}"


def always_on(layer: nn.Module) -> bool:
    return True


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    yield from ()


def why_not(layer: nn.Module) -> str | None:
    if layer.disable_adapters:
        return "its adapters are disabled, the base layer runs alone"
    if layer.merged:
        return "its adapters are merged into the base weight"
    return layer.why_not() if hasattr(layer, "why_not") else None
