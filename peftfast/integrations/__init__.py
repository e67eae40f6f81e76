"""Where peftfast meets other libraries: switching it on and off, and telling what runs on it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import nn

from peftfast.integrations import forwards
from peftfast.integrations.after_import import after_import
from peftfast.integrations.forwards import FallbackError
from peftfast.integrations.sharding import as_gathered
from peftfast.ops.lora import name_of

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
    """What `peftfast.report` found: a sequence of `LayerReport`, printable as a table.

    Attributes:
        fourbit: the weights in 4 bits: a "linear layer", an "embedding" or an "expert projection" by its name.
        dense: of a model that has such, the linear layers and expert projections that are not quantized, with their
            dtypes. Embeddings, norms and routers are none of these.
        losses: the language models, and whether their loss is computed without logits.
        eightbit: the weights in 8 bits, as those in 4.
        rowwise: the RMSNorms and gated MLPs of transformers' models, and whether they are fused.
        attention: the layers of transformers' models that ask for torch's attention, and whether they are fused.
    """

    layers: list[LayerReport] = field(default_factory=list)
    fourbit: dict[str, str] = field(default_factory=dict)
    dense: dict[str, torch.dtype] = field(default_factory=dict)
    losses: list[LayerReport] = field(default_factory=list)
    eightbit: dict[str, str] = field(default_factory=dict)
    rowwise: list[LayerReport] = field(default_factory=list)
    attention: list[LayerReport] = field(default_factory=list)

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
        """The summary, what is in 4 bits and what is not, then each reason with the layers that it holds for."""
        by_reason: dict[str, list[LayerReport]] = {}
        for layer in self.layers:
            if not layer.fast:
                by_reason.setdefault(f"{layer.kind}: {layer.reason}", []).append(layer)
        lines = [self.summary]
        for bits, weights in {4: self.fourbit, 8: self.eightbit}.items():
            counts = Counter(weights.values()).items()
            if counts:
                listed = ", ".join(f"{count} {kind}{'s'[: count > 1]}" for kind, count in counts)
                lines.append(f"  {bits}-bit: {listed}")
        if self.dense:
            alike: dict[tuple[str, torch.dtype], list[str]] = {}  # what is the same in every layer
            for name, dtype in self.dense.items():
                alike.setdefault((re.sub(r"\.\d+\.", ".*.", name), dtype), []).append(name)
            entries = (
                f"{names[0]} ({name_of(dtype)})"
                if len(names) == 1
                else f"{name} ({name_of(dtype)}, {len(names)} of them)"
                for (name, dtype), names in alike.items()
            )
            lines.append("  dense: " + ", ".join(entries))
        for loss in self.losses:
            how = "without logits" if loss.fast else f"from logits: {loss.reason}"
            lines.append(f"  loss of {loss.name or 'the model itself'}: {how}")
        for what, parts in {"norms and gated MLPs": self.rowwise, "attention": self.attention}.items():
            if parts:
                fast = sum(layer.fast for layer in parts)
                reasons = Counter(f"{layer.kind}: {layer.reason}" for layer in parts if not layer.fast)
                lines.append(f"  fused {what}: {fast} of {len(parts)}")
                lines += [f"    {reason} ({count})" for reason, count in reasons.items()]
        for reason, layers in by_reason.items():
            lines.append(f"  {reason} ({len(layers)})")
            lines += [f"    {layer.name or 'the model itself'}" for layer in layers]
        return "\n".join(lines)


def enable(strict: bool = False) -> None:
    """Runs PEFT's adapted layers and bitsandbytes' 4-bit layers of every model on the fused operators.

    Prefix tuning, prompt tuning and p-tuning compute what the samples of a batch have in common once, and train under
    gradient checkpointing and on packed batches, where the documents of a row are told apart by position_ids.
    The loss of a language model that is given labels is computed without its logits; they come into being, as they
    would have been, if anything reads them. RMSNorms and gated MLPs of transformers' models keep for backward no more
    than their operands. On the CPU their attention, where they ask for torch's, never leaves the caches.

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
    """Does for the adapters, prompts and 4-bit layers that `model` has now, and for its loss, its norms, its gated
    MLPs and its attention, what `enable` does; and for no other model.

    Returns:
        `model` itself. A deepcopy of it is accelerated too.
    Raises:
        ValueError: the model has none of these.
    """
    from peftfast.integrations import attention, losses, rowwise

    layers = [layer for _, layer, _ in _layers(model)]
    if not layers:
        raise ValueError(
            "model has no LoRA layers, prefix or prompt of PEFT and no 4-bit layers of bitsandbytes: "
            "call get_peft_model before accelerate."
        )
    libraries = losses, rowwise, attention
    besides = (part for part in model.modules() if any(library.answers_for(part) for library in libraries))
    for layer in (*layers, *besides):
        forwards.mark(layer, strict)
    forwards.restore(replace(forwards.switch, accelerated=True))
    rowwise.install_for(model)
    return model


def report(model: nn.Module) -> Report:
    """Which path each adapted layer and each 4-bit layer of bitsandbytes runs, as things stand, and why it falls back;
    and which weights are in 4 bits.

    A 4-bit layer under an adapter is an entry of its own only where the two do not run as one; a prefix or a prompt is
    one for its whole model. What only shows with an input (its dtype, say) is known once the layer has run. What FSDP
    has sharded is judged as it is when its module runs, which is when it has been gathered.
    """
    with as_gathered(model):
        fourbit, dense, eightbit = _weights(model)
        losses, rowwise, attention = _besides(model)
        return Report(_adapted(model), fourbit, dense, losses, eightbit, rowwise, attention)


def _adapted(model: nn.Module) -> list[LayerReport]:
    found, fused_with_adapter = [], set()
    for name, layer, library in _layers(model):
        if layer in fused_with_adapter:
            continue
        on = library.always_on(layer) or forwards.in_force(layer)[0]
        reason = library.why_not(layer) if on else "peftfast is not enabled"
        found.append(LayerReport(name, library.kind_of(layer), reason is None, reason))
        if reason is None and library.NAME == "lora":
            fused_with_adapter.add(layer.base_layer)
    return found


def _besides(model: nn.Module) -> Iterator[list[LayerReport]]:
    """`losses`, `rowwise` and `attention` of the report."""
    from peftfast.integrations import attention, losses, rowwise

    for library in (losses, rowwise, attention):
        found = []
        for name, part in model.named_modules():
            if library.answers_for(part):
                on = forwards.in_force(part)[0]
                reason = library.why_not(part) if on else "peftfast is not enabled"
                found.append(LayerReport(name, library.kind_of(part), reason is None, reason))
        yield found


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleType]]:
    """Name, layer and the integration that knows it, of all layers that might be fused, adapters before their bases."""
    libraries = forwards.libraries()
    for name, layer in model.named_modules():
        for library in libraries:
            if library.answers_for(layer):
                yield name, layer, library


def _weights(model: nn.Module) -> tuple[dict[str, str], dict[str, torch.dtype], dict[str, str]]:
    """`fourbit`, `dense` and `eightbit` of the report."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D

    from peftfast.integrations import experts
    from peftfast.nn.quantized import QuantizedLayer

    bitsandbytes = [library for library in forwards.libraries() if library.NAME == "bitsandbytes"]
    fourbit, dense, eightbit, adapters = {}, {}, {}, set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            adapters.update(
                part for child, part in module.named_modules() if not child.startswith("base_layer")
            )
        if module in adapters:
            continue
        name = name.replace(".base_layer", "")
        if isinstance(module, QuantizedLayer):
            kind = "embedding" if isinstance(module, nn.Embedding) else "linear layer"
            (fourbit if module.bits == 4 else eightbit)[name] = kind
        elif any(library.answers_for(module) for library in bitsandbytes):
            fourbit[name] = "linear layer"
        elif type(module) is nn.Linear or isinstance(module, Conv1D):
            dense[name] = module.weight.dtype
        elif experts.holds_experts(module):
            for projection in experts.projections(module):
                if projection in getattr(module, "fourbit_weights", ()):
                    fourbit[f"{name}.{projection}"] = "expert projection"
                else:
                    dense[f"{name}.{projection}"] = getattr(module, projection).dtype
    return fourbit, dense if fourbit or eightbit else {}, eightbit


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
# So that a checkpoint with experts in 4 bits, whose configuration is peftfast's own, loads without more.
after_import(
    "transformers.modeling_utils", lambda _: importlib.import_module("peftfast.integrations.transformers")
)
