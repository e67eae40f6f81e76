"""PEFT's LoRA layers on the fused operators, and LoRA layers for peftfast's own quantized layers.

The forwards of `peft.tuners.lora.Linear` and of its like for bitsandbytes are replaced by one that asks, at every
call, whether what this layer does with this input is exactly what the operator computes. If so, the operator runs; if
not, PEFT's own forward does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Embedding, Linear, LoraLayer
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS, ParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant, ArrowLinearVariant, MiCALinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from peftfast.integrations import expert_adapters, mixed_batches
from peftfast.integrations.bases import KINDS, autocast_dtype, is_plain, is_plain_tensor, why_not_input
from peftfast.integrations.forwards import last_fallback, stand_in, why_not_reached
from peftfast.integrations.merging import MergesAtOnce, warn_of_rounding
from peftfast.nn import Linear4bit
from peftfast.nn.quantized import QuantizedLayer

NAME = "lora"


class LoraLinearQuantized(MergesAtOnce, Linear):
    """PEFT's LoRA layer on a quantized linear layer of peftfast; the same, but that it merges into a quantized weight.

    Merging and unmerging quantize the weight anew, once for all adapters. `requantization_error` is what that cost the
    last time, ‖rounded - exact‖ / ‖exact‖ of the weight; a warning tells the largest of a model.
    """

    requantization_error: float | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, **kwargs) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict:
        """Those that do not read the base weight."""
        return {
            (): None,
            ("alora_invocation_tokens",): ALoraLinearVariant,
            ("arrow_config",): ArrowLinearVariant,
        }

    def _add(self, names: list[str], sign: int) -> None:
        base = self.get_base_layer()
        weight, bias = base.dequantize(torch.float32), base.bias
        for name in names:
            if name in self.lora_variant:
                variant = self.lora_variant[name]
                weight = (variant.merge_safe if sign > 0 else variant.unmerge)(self, name, weight)
            else:
                weight += sign * self.get_delta_weight(name)
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(
                        f"Adapter {name} has a bias and cannot be merged: the base layer has none."
                    )
                bias = bias + sign * self.scaling[name] * self.lora_B[name].bias
        if not torch.isfinite(weight).all() or not (bias is None or torch.isfinite(bias).all()):
            raise ValueError(f"Adapters {', '.join(names)} cannot be merged: the sum is not finite.")
        self.requantization_error = base.set_weight(weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
        warn_of_rounding(self, self.requantization_error)

    def loftq_init(self, *args, **kwargs) -> None:
        raise ValueError("init_lora_weights='loftq' needs the weight before it was quantized.")


class LoraLinear4bit(LoraLinearQuantized):
    """On a `peftfast.nn.Linear4bit`."""


class LoraLinear8bit(LoraLinearQuantized):
    """On a `peftfast.nn.Linear8bit`."""


class LoraEmbeddingQuantized(Embedding):
    """PEFT's LoRA layer on a `peftfast.nn.Embedding4bit` or `Embedding8bit`; the same, but that it does not merge."""

    @property
    def lora_variants(self) -> dict:
        """Those that do not read the base weight."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "Adapters on quantized embeddings cannot be merged: dequantize the model first, or keep the adapter apart."
        )


def layer_for(
    target: nn.Module, adapter_name: str, config, parameter_name: str | None = None, **kwargs
) -> LoraLayer | None:
    """The LoRA layer of a quantized layer of peftfast or of 4-bit experts; None for what PEFT has layers for itself."""
    if parameter_name is not None:
        return expert_adapters.layer_for(target, adapter_name, parameter_name, config, **kwargs)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base, QuantizedLayer):
        return None
    if isinstance(base, nn.Embedding):
        return LoraEmbeddingQuantized(target, adapter_name, config, **kwargs)
    kind = LoraLinear4bit if isinstance(base, Linear4bit) else LoraLinear8bit
    return kind(target, adapter_name, config, **kwargs)


FUSED = [Linear, LoraLinear4bit, LoraLinear8bit]
if is_bnb_4bit_available():
    from peft.tuners.lora import bnb

    FUSED.append(bnb.Linear4bit)


def answers_for(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer)


def kind_of(layer: LoraLayer) -> str:
    return f"{NAME}.{type(layer).__name__}"


def always_on(layer: LoraLayer) -> bool:
    return isinstance(layer, expert_adapters.ParamWrapper)


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    """Every kind of LoRA layer with a forward of its own: those not fused have to be noticed under `strict`."""
    for kind in _with_own_forward(LoraLayer):
        judge, fused = _why_not_kind, None
        if kind in FUSED:
            judge, fused = why_not_call, _fused
        elif issubclass(kind, ParamWrapper):
            judge, fused = expert_adapters.why_not_call, expert_adapters.fused
        yield kind, "forward", lambda original, why=judge, run=fused: _forward(original, why, run)


def _forward(original: Callable, why_not_call: Callable, fused: Callable | None) -> Callable:
    """Adapters are the active ones, or those that `adapter_names` gives to the samples."""
    active = stand_in(original, NAME, at_rest, why_not_call, fused)
    mixed = stand_in(original, NAME, _switched_off, why_not_call, fused)

    def forward(self, *args, **kwargs):
        names = kwargs.get("adapter_names")
        if names is None:
            return active(self, *args, **kwargs)
        run = mixed if mixed_batches.named(self, names) else original
        return run(self, *args, **kwargs)

    return forward


def why_not(layer: LoraLayer) -> str | None:
    if isinstance(layer, ParamWrapper):
        return (
            at_rest(layer) or why_not_reached(layer) or expert_adapters.why_not(layer) or last_fallback(layer)
        )
    if not isinstance(layer, tuple(FUSED)):
        return at_rest(layer) or _why_not_kind(layer)
    return at_rest(layer) or why_not_reached(layer) or why_not_fused(layer) or last_fallback(layer)


def why_not_fused(layer: LoraLayer) -> str | None:
    """The layer with its active adapters, whatever the input."""
    return _why_not(layer, _active(layer)) if isinstance(layer, tuple(FUSED)) else _why_not_kind(layer)


def _with_own_forward(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        if "forward" in kind.__dict__:
            yield kind
        yield from _with_own_forward(kind)


def _fused(layer: Linear, x: Tensor, adapter_names: Sequence[str] | None = None, **_) -> Tensor:
    if adapter_names is not None:
        names = mixed_batches.named(layer, adapter_names)
        return mixed_batches.fused(layer, x, adapter_names, names, _dropout_of(layer.lora_dropout[names[0]]))
    base = layer.base_layer
    return KINDS[type(base)].call(base, x, *operands(layer))


def operands(layer: Linear) -> tuple[list, list, list, Tensor | None, list]:
    """Of the active adapters lora_A, lora_B and scaling; the bias, theirs and the base layer's; their dropouts."""
    lora_A, lora_B, scaling, dropout = [], [], [], []
    bias = layer.base_layer.bias
    for name in _active(layer):
        B = layer.lora_B[name]
        lora_A.append(layer.lora_A[name].weight)
        lora_B.append(B.weight)
        scaling.append(layer.scaling[name])
        dropout.append(_dropout_of(layer.lora_dropout[name]))
        if B.bias is not None:
            term = B.bias * layer.scaling[name]
            bias = term if bias is None else bias + term
    return lora_A, lora_B, scaling, bias, dropout


def _active(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout_of(module: nn.Module) -> float:
    return module.p if module.training and type(module) is nn.Dropout else 0.0


# ---- whether the fast path may run ----------------------------------------------------------------------
# Each function returns None or the reason why not, as the rest of "... cannot run on the fast path: ".


def _why_not_kind(layer: LoraLayer, *args, **kwargs) -> str:
    return f"there is no fused operator for lora.{type(layer).__name__}"


def at_rest(layer: LoraLayer) -> str | None:
    """States in which PEFT runs the base layer alone: nothing to fuse, and no fallback either."""
    reason = _switched_off(layer)
    if reason is not None:
        return reason
    if not any(name in layer.lora_A or name in layer.lora_embedding_A for name in layer.active_adapters):
        return "it has no active adapter, the base layer runs alone"
    return None


def _switched_off(layer: LoraLayer) -> str | None:
    if layer.disable_adapters:
        return "its adapters are disabled, the base layer runs alone"
    if layer.merged:
        return "its adapters are merged into the base weight"
    return None


def why_not_call(
    layer: Linear, x: Tensor, *args, adapter_names: Sequence[str] | None = None, **kwargs
) -> str | None:
    """What is passed to the forward, then the layer."""
    if args or any(key not in VARIANT_KWARG_KEYS for key in kwargs):
        return "its forward was given more arguments than x"
    if _has_any_global_hook():
        return "a global module hook is registered"
    names = _active(layer) if adapter_names is None else mixed_batches.named(layer, adapter_names)
    reason = _why_not(layer, names) or why_not_input(layer.base_layer, x) or _why_not_dtype(layer, x, names)
    if reason is None and adapter_names is not None:
        reason = mixed_batches.why_not(
            layer, names, [_dropout_of(layer.lora_dropout[name]) for name in names]
        )
    return reason


def _why_not(layer: Linear, names: list[str]) -> str | None:
    """The layer itself, whatever the input."""
    if type(layer) not in FUSED:
        return f"{type(layer).__name__} is a subclass of a LoRA layer that is fused"
    base = layer.base_layer
    kind = KINDS.get(type(base))
    if kind is None:
        return f"its base layer is a {type(base).__name__}, which no operator can take the place of"
    reason = kind.why_not(base)
    if reason is not None:
        return reason
    if not is_plain(base):
        return "its base layer has hooks or a forward of its own"
    device = kind.device(base)
    for name in names:
        variant = layer.lora_variant.get(name)
        if (
            variant is not None
            and variant is not MiCALinearVariant
            and type(variant) is not MiCALinearVariant
        ):
            variant = variant if isinstance(variant, type) else type(variant)
            return f"adapter {name} is not plain LoRA but {variant.__name__.removesuffix('LinearVariant')}"
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear or not is_plain(A) or not is_plain(B):
            return f"lora_A or lora_B of adapter {name} has hooks or is not a plain Linear"
        if type(dropout) not in (nn.Dropout, nn.Identity) or not is_plain(dropout):
            return f"the dropout of adapter {name} has hooks or is a {type(dropout).__name__}"
        if type(dropout) is nn.Dropout and not dropout.p < 1:
            return f"the dropout of adapter {name} drops everything"
        if not is_plain_tensor(A.weight) or not is_plain_tensor(B.weight):
            return f"the weights of adapter {name} are a {type(A.weight).__name__}"
        if A.weight.device != device or B.weight.device != device:
            return f"adapter {name} is on {A.weight.device}, the base weight on {device}"
        if A.weight.dtype != B.weight.dtype:
            return f"lora_A and lora_B of adapter {name} differ in dtype"
        if A.bias is not None:
            return f"lora_A of adapter {name} has a bias"
    return None


def _why_not_dtype(layer: Linear, x: Tensor, names: list[str]) -> str | None:
    """The adapters' dtypes, given that the base layer can take x."""
    dtype = autocast_dtype(x) or x.dtype
    cast_input = getattr(layer, "cast_input_dtype_enabled", True)
    for name in names:
        adapter_dtype = layer.lora_A[name].weight.dtype
        if adapter_dtype not in (dtype, torch.float32):
            return f"adapter {name} is {adapter_dtype}, its input {dtype}"
        if not cast_input and adapter_dtype != x.dtype:
            return "casting its input to the adapter's dtype is switched off"
    return None
