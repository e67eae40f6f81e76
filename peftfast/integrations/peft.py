"""PEFT's LoRA layers on the fused operator.

`peft.tuners.lora.Linear.forward` is replaced by one that asks, at every call, whether what this layer does
with this input is exactly what the operator computes. If so, the operator runs; if not, PEFT's own forward
does. PEFT's objects stay as they are, and nothing of them is kept between calls: PEFT re-creates, freezes,
moves and rescales parameters at any time.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.variants import MiCALinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from peftfast.integrations import FallbackError, LayerReport
from peftfast.ops.lora import DTYPES, KERNEL_DEVICES, call

MARK = "_peftfast"  # on a layer of an accelerated model: (generation, strict); plain values, so that copies keep it


@dataclass(frozen=True)
class Switch:
    """What is in force: for every model, with fallbacks as errors, for models given to `accelerate`."""

    everywhere: bool = False
    strict: bool = False
    accelerated: bool = False

    @property
    def installed(self) -> bool:
        return self.everywhere or self.accelerated


switch = Switch()
_generation = 0  # marks of an earlier one are void: `disable` ends them all
_originals: dict[type, Callable] = {}  # forward of each patched class
_last_fallback: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def restore(wanted: Switch) -> None:
    """Makes `wanted` hold."""
    global switch
    if wanted.installed and not switch.installed:
        for kind in _layer_kinds(LoraLayer):
            _originals[kind] = kind.forward
            forward_of = _forward_of_linear if kind is Linear else _forward_of_other_kind
            kind.forward = functools.wraps(kind.forward)(forward_of(kind.forward))
    elif switch.installed and not wanted.installed:
        for kind, forward in _originals.items():
            kind.forward = forward
        _originals.clear()
    switch = wanted


def uninstall() -> None:
    global _generation
    _generation += 1
    restore(Switch())


def mark(model: nn.Module, strict: bool) -> None:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("model has no LoRA layers of PEFT: call get_peft_model before accelerate.")
    for layer in layers:
        layer.__dict__[MARK] = (_generation, strict)
    restore(replace(switch, accelerated=True))


def inspect(model: nn.Module) -> Iterator[LayerReport]:
    """What `peftfast.report` tells of PEFT's layers."""
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not _in_force(layer)[0]:
            reason = "peftfast is not enabled"
        elif not isinstance(layer, Linear):
            reason = _at_rest(layer) or _why_not_kind(layer)
        else:
            reason = (
                _at_rest(layer) or _why_not_reached(layer) or _why_not(layer) or _last_fallback.get(layer)
            )
        yield LayerReport(name, f"lora.{type(layer).__name__}", reason is None, reason)


def _layer_kinds(base: type) -> Iterator[type]:
    """The subclasses of `base` that have a forward of their own."""
    for kind in base.__subclasses__():
        if "forward" in kind.__dict__:
            yield kind
        yield from _layer_kinds(kind)


def _in_force(layer: LoraLayer) -> tuple[bool, bool]:
    """Whether peftfast is on for this layer, and whether its fallbacks are errors."""
    generation, strict = layer.__dict__.get(MARK, (None, False))
    marked = generation == _generation
    return switch.everywhere or marked, (switch.everywhere and switch.strict) or (marked and strict)


def _forward_of_linear(original: Callable) -> Callable:
    """The forward of lora.Linear while peftfast is installed. It keeps the original: a hook may outlive the patch."""

    def forward(self: Linear, x: Tensor, *args, **kwargs) -> Tensor:
        on, strict = _in_force(self)
        if not on or _at_rest(self):
            return original(self, x, *args, **kwargs)
        reason = _why_not_call(args, kwargs) or _why_not(self) or _why_not_input(self, x)
        if reason is None:
            if _last_fallback:
                _last_fallback.pop(self, None)
            return _fused(self, x)
        if strict:
            raise FallbackError(f"Layer {_name_of(self)} cannot run on the fast path: {reason}.")
        if not torch.compiler.is_compiling():
            _last_fallback[self] = reason
        return original(self, x, *args, **kwargs)

    return forward


def _forward_of_other_kind(original: Callable) -> Callable:
    """The forward of a kind of layer that has no fused operator: its own, unless fallbacks are errors."""

    def forward(self: LoraLayer, *args, **kwargs):
        on, strict = _in_force(self)
        if on and strict and not _at_rest(self):
            raise FallbackError(f"Layer {_name_of(self)} cannot run on the fast path: {_why_not_kind(self)}.")
        return original(self, *args, **kwargs)

    return forward


def _fused(layer: Linear, x: Tensor) -> Tensor:
    base = layer.base_layer
    lora_A, lora_B, scaling, dropout = [], [], [], []
    bias = base.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        B = layer.lora_B[name]
        lora_A.append(layer.lora_A[name].weight)
        lora_B.append(B.weight)
        scaling.append(layer.scaling[name])
        dropout.append(_dropout_of(layer.lora_dropout[name]))
        if B.bias is not None:
            term = B.bias * layer.scaling[name]
            bias = term if bias is None else bias + term
    return call(x, base.weight, lora_A, lora_B, scaling, bias, dropout, type(base) is Conv1D)


def _dropout_of(module: nn.Module) -> float:
    return module.p if module.training and type(module) is nn.Dropout else 0.0


# ---- whether the fast path may run ----------------------------------------------------------------------
# Each function returns None or the reason why not, as the rest of "... cannot run on the fast path: ".


def _why_not_kind(layer: LoraLayer) -> str:
    return f"there is no fused operator for lora.{type(layer).__name__}"


def _at_rest(layer: LoraLayer) -> str | None:
    """States in which PEFT runs the base layer alone: nothing to fuse, and no fallback either."""
    if layer.disable_adapters:
        return "its adapters are disabled, the base layer runs alone"
    if layer.merged:
        return "its adapters are merged into the base weight"
    if not any(name in layer.lora_A or name in layer.lora_embedding_A for name in layer.active_adapters):
        return "it has no active adapter, the base layer runs alone"
    return None


def _why_not_reached(layer: Linear) -> str | None:
    """A forward set on the instance hides the class's. Accelerate's hooks keep the one they call as `_old_forward`."""
    reached = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
    if "forward" in layer.__dict__ and reached is not Linear.forward:
        return "its forward was replaced before peftfast was enabled"
    return None


def _why_not_call(args: tuple, kwargs: dict) -> str | None:
    """What is passed to the forward beside x."""
    if args or kwargs:
        if kwargs.get("adapter_names") is not None:
            return "adapter_names mixes adapters within the batch"
        extra = [key for key in kwargs if key not in VARIANT_KWARG_KEYS and key != "adapter_names"]
        if args or extra:
            return "its forward was given more arguments than x"
    if _has_any_global_hook():
        return "a global module hook is registered"
    return None


def _why_not(layer: Linear) -> str | None:
    """The layer itself, whatever the input."""
    if type(layer) is not Linear:
        return f"{type(layer).__name__} is a subclass of lora.Linear"
    base = layer.base_layer
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is a {type(base).__name__}, not a Linear or Conv1D"
    weight, bias = base.weight, base.bias
    if not _is_plain(base):
        return "its base layer has hooks or a forward of its own"
    if not _is_plain_tensor(weight) or not (bias is None or _is_plain_tensor(bias)):
        return f"its base weight is a {type(weight).__name__}"
    if weight.requires_grad:
        return "its base weight is trained too"
    if weight.device.type not in KERNEL_DEVICES:
        return f"there is no kernel for {weight.device.type} yet"
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(name)
        if (
            variant is not None
            and variant is not MiCALinearVariant
            and type(variant) is not MiCALinearVariant
        ):
            kind = variant if isinstance(variant, type) else type(variant)
            return f"adapter {name} is not plain LoRA but {kind.__name__.removesuffix('LinearVariant')}"
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear or not _is_plain(A) or not _is_plain(B):
            return f"lora_A or lora_B of adapter {name} has hooks or is not a plain Linear"
        if type(dropout) not in (nn.Dropout, nn.Identity) or not _is_plain(dropout):
            return f"the dropout of adapter {name} has hooks or is a {type(dropout).__name__}"
        if type(dropout) is nn.Dropout and not dropout.p < 1:
            return f"the dropout of adapter {name} drops everything"
        if not _is_plain_tensor(A.weight) or not _is_plain_tensor(B.weight):
            return f"the weights of adapter {name} are a {type(A.weight).__name__}"
        if A.weight.device != weight.device or B.weight.device != weight.device:
            return f"adapter {name} is on {A.weight.device}, the base weight on {weight.device}"
        if A.weight.dtype != B.weight.dtype:
            return f"lora_A and lora_B of adapter {name} differ in dtype"
        if A.bias is not None:
            return f"lora_A of adapter {name} has a bias"
    return None


def _why_not_input(layer: Linear, x: Tensor) -> str | None:
    """The input, and the dtypes that follow from it and from autocast."""
    if not _is_plain_tensor(x) or x.layout is not torch.strided:
        return f"its input is a {type(x).__name__} of layout {x.layout}"
    weight = layer.base_layer.weight
    if x.device != weight.device:
        return f"its input is on {x.device}, its weight on {weight.device}"
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        if dtype not in DTYPES or weight.dtype not in DTYPES:
            return f"its input is {dtype}, its weight {weight.dtype}"
        dtype = torch.get_autocast_dtype(x.device.type)
    elif dtype != weight.dtype:
        return f"its input is {dtype}, its weight {weight.dtype}"
    if dtype not in DTYPES:
        return f"it computes in {dtype}"
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return f"its input has shape {list(x.shape)}"
    cast_input = getattr(layer, "cast_input_dtype_enabled", True)
    for name in layer.active_adapters:
        if name in layer.lora_A:
            adapter_dtype = layer.lora_A[name].weight.dtype
            if adapter_dtype not in (dtype, torch.float32):
                return f"adapter {name} is {adapter_dtype}, its input {dtype}"
            if not cast_input and adapter_dtype != x.dtype:
                return "casting its input to the adapter's dtype is switched off"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "it is being traced by torch.jit"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "it runs under a functorch transform"
        if forward_ad._current_level >= 0:
            return "it runs under forward-mode differentiation"
    return None


def _is_plain(module: nn.Module) -> bool:
    """No hooks, and the forward of its class: calling it would do what its class says and no more."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_plain_tensor(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter or type(tensor) is Tensor


def _name_of(layer: nn.Module) -> str:
    """The layer's name in the outermost module whose forward is running; its class where no module contains it."""
    name, frame = f"of class lora.{type(layer).__name__}", sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            name = next((found for found, part in module.named_modules() if part is layer and found), name)
        frame = frame.f_back
    return name
