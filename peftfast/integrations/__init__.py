"""Where peftfast meets other libraries: switching it on and off, and telling what runs on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn


class FallbackError(RuntimeError):
    """Under `strict`: a layer cannot run on the fast path. The message names the layer and the reason."""


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer: its name in the model, its class, whether the fast path runs, and if not, why."""

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
        """One line: how many of the adapted layers run on the fast path."""
        if not self.layers:
            return "peftfast: the model has no adapted layers"
        fast = sum(layer.fast for layer in self.layers)
        return f"peftfast: {fast} of {len(self.layers)} adapted layers on the fast path"

    def __str__(self) -> str:
        """The summary, then each reason with the layers that it holds for."""
        by_reason: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if not layer.fast:
                by_reason.setdefault(f"{layer.kind}: {layer.reason}", []).append(layer)
        lines = [self.summary]
        for reason, layers in by_reason.items():
            lines.append(f"  {reason} ({len(layers)})")
            lines += [f"    {layer.name}" for layer in layers]
        return "\n".join(lines)


def enable(strict: bool = False) -> None:
    """Runs the adapted layers of every model on the fused operators, wrapped before or after this call.

    Args:
        strict: a layer that cannot run on the fast path raises `FallbackError` instead of running its own code.
    """
    from peftfast.integrations import peft

    peft.restore(replace(peft.switch, everywhere=True, strict=strict))


def disable() -> None:
    """Puts every patched method back as it was, also for models given to `accelerate`."""
    from peftfast.integrations import peft

    peft.uninstall()


@contextlib.contextmanager
def enabled(strict: bool = False) -> Iterator[None]:
    """`enable()` for the length of a with block; then whatever held before."""
    from peftfast.integrations import peft

    before = peft.switch
    enable(strict)
    try:
        yield
    finally:
        peft.restore(replace(before, accelerated=peft.switch.accelerated))


def accelerate(model: nn.Module, strict: bool = False) -> nn.Module:
    """Runs the adapted layers that `model` has now on the fused operators and leaves all other models alone.

    Returns:
        `model` itself. A deepcopy of it is accelerated too.
    Raises:
        ValueError: the model has no adapted layers.
    """
    from peftfast.integrations import peft

    peft.mark(model, strict)
    return model


def report(model: nn.Module) -> Report:
    """Which path each adapted layer of `model` runs, as things stand now, and the reason for every fallback.

    What only shows with an input (its dtype, say) is known once the layer has run.
    """
    from peftfast.integrations import peft

    return Report(list(peft.inspect(model)))
