"""Where peftfast meets other libraries: switching it on and off, and telling what runs on it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType

from torch import nn

from peftfast.integrations import forwards
from peftfast.integrations.after_import import after_import
from peftfast.integrations.forwards import FallbackError

__all__ = ["FallbackError", "LayerReport", "Report", "accelerate", "disable", "enable", "enabled", "report"]


@dataclass(frozen=True)
class LayerReport:
    """One layer: its name in the model, its class, whether the fast path runs, and if not, why."""

    name: str
    kind: str
    fast: bool
    reason: str | None = None


@dataclass(frozen=True)
class Report:
    """What `peftfast.report` found: a sequence of `LayerReport`, printable as a table."""

    layers: list[LayerReport] = field(default_factory=list)

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerReport:
        return self.layers[index]

    @property
    def summary(self) -> str:
        """One line: how many of the layers run on the fast path."""
        if not self.layers:
            return "peftfast: the model has no adapted layers"
        fast = sum(layer.fast for layer in self.layers)
        return f"peftfast: {fast} of {len(self.layers)} adapted or 4-bit layers on the fast path"

    def __str__(self) -> str:
        """The summary, then each reason with the layers that it holds for."""
        by_reason: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if not layer.fast:
                by_reason.setdefault(f"{layer.kind}: {layer.reason}", []).append(layer)
        lines = [self.summary]
        for reason, layers in by_reason.items():
            lines.append(f"  {reason} ({len(layers)})")
            lines += [f"    {layer.name or 'the model itself'}" for layer in layers]
        return "\n".join(lines)


def enable(strict: bool = False) -> None:
    """Runs PEFT's adapted layers and bitsandbytes' 4-bit layers of every model on the fused operators.

    Prefix tuning, prompt tuning and p-tuning compute what the samples of a batch have in common once, and train under
    gradient checkpointing and on packed batches, where the documents of a row are told apart by position_ids.

    Whether a model is made or wrapped before or after this call makes no difference.

    Args:
        strict: a layer that cannot run on the fast path raises `FallbackError` instead of running its own code.
    """
    forwards.restore(replace(forwards.switch, everywhere=True, strict=strict))


def disable() -> None:
    """Puts every patched method back as it was, also for models given to `accelerate`."""
    forwards.uninstall()


@contextlib.contextmanager
def enabled(strict: bool = False) -> Iterator[None]:
    """`enable()` for the length of a with block; then whatever held before."""
    before = forwards.switch
    enable(strict)
    try:
        yield
    finally:
        forwards.restore(replace(before, accelerated=forwards.switch.accelerated))


def accelerate(model: nn.Module, strict: bool = False) -> nn.Module:
    """Does for the adapters, prompts and 4-bit layers that `model` has now what `enable` does, and for no other model.

    Returns:
        `model` itself. A deepcopy of it is accelerated too.
    Raises:
        ValueError: the model has neither.
    """
    layers = [layer for _, layer, _ in _layers(model)]
    if not layers:
        raise ValueError(
            "model has no LoRA layers, prefix or prompt of PEFT and no 4-bit layers of bitsandbytes: "
            "call get_peft_model before accelerate."
        )
    for layer in layers:
        forwards.mark(layer, strict)
    forwards.restore(replace(forwards.switch, accelerated=True))
    return model


def report(model: nn.Module) -> Report:
    """Which path each adapted layer and each 4-bit layer of bitsandbytes runs, as things stand, and why it falls back.

    A 4-bit layer under an adapter is an entry of its own only where the two do not run as one; a prefix or a prompt is
    one for its whole model. What only shows with
    an input (its dtype, say) is known once the layer has run.
    """
    found, fused_with_adapter = [], set()
    for name, layer, library in _layers(model):
        if layer in fused_with_adapter:
            continue
        on, _ = forwards.in_force(layer)
        reason = library.why_not(layer) if on else "peftfast is not enabled"
        found.append(LayerReport(name, library.kind_of(layer), reason is None, reason))
        if reason is None:
            fused_with_adapter.add(getattr(layer, "base_layer", None))
    return Report(found)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleType]]:
    """Name, layer and the integration that knows it, of all layers that might be fused, adapters before their bases."""
    libraries = forwards.libraries()
    for name, layer in model.named_modules():
        for library in libraries:
            if library.answers_for(layer):
                yield name, layer, library


def _teach_peft(model: ModuleType) -> None:
    """PEFT asks one function after the other for the LoRA layer of a base layer: here the last learns of ours."""
    default = model.dispatch_default

    @functools.wraps(default)
    def dispatch(target, adapter_name, config, parameter_name=None, **kwargs):
        from peftfast.integrations import peft

        layer = peft.layer_for(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
        return layer or default(target, adapter_name, config, parameter_name=parameter_name, **kwargs)

    model.dispatch_default = dispatch


after_import("peft.tuners.lora.model", _teach_peft)
