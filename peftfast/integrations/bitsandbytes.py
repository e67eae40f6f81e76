"""bitsandbytes' 4-bit linear layers on the fused operator, alone and under adapters.

The packed bytes and their quantization state are read in place, in train and in eval mode alike. bitsandbytes itself
repacks them in eval mode on some CPUs, which loses the input's gradient and bits of the scales; nothing of this happens
on the fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from peftfast.integrations.bases import KINDS, autocast_dtype, is_plain_tensor, why_not_input
from peftfast.integrations.forwards import last_fallback, stand_in, why_not_reached
from peftfast.ops import fourbit
from peftfast.ops.devices import why_no_kernel
from peftfast.ops.lora import DTYPES
from peftfast.reference import FOURBIT_BLOCKSIZES, FOURBIT_CODEBOOKS, FourBitWeight, NestedAbsmax

NAME = "bitsandbytes"


def answers_for(module: nn.Module) -> bool:
    return isinstance(module, Linear4bit)


def kind_of(layer: Linear4bit) -> str:
    return f"{NAME}.{type(layer).__name__}"


def always_on(layer: Linear4bit) -> bool:
    return False


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    yield Linear4bit, "forward", lambda original: stand_in(original, NAME, _at_rest, _why_not_call, _fused)


def why_not(layer: Linear4bit) -> str | None:
    return why_not_reached(layer) or _why_not(layer) or last_fallback(layer)


def _at_rest(layer: Linear4bit) -> bool:
    return False


def _fused(layer: Linear4bit, x: Tensor) -> Tensor:
    return KINDS[type(layer)].call(layer, x, [], [], [], layer.bias, [])


def _why_not_call(layer: Linear4bit, x: Tensor, *args, **kwargs) -> str | None:
    if args or kwargs:
        return "its forward was given more arguments than x"
    return _why_not(layer) or why_not_input(layer, x)


def _why_not(layer: Linear4bit) -> str | None:
    if type(layer) not in KINDS:
        return f"{type(layer).__name__} is a subclass of Linear4bit"
    return KINDS[type(layer)].why_not(layer)


class Bitsandbytes4bit:
    """bitsandbytes.nn.Linear4bit and its two subclasses."""

    def why_not(self, base: Linear4bit) -> str | None:
        weight, bias, state = base.weight, base.bias, _state(base)
        if state is None:
            return "its weight is not quantized yet"
        if not isinstance(weight, Params4bit) and not is_plain_tensor(weight):
            return f"its base weight is a {type(weight).__name__}"
        if getattr(state, "packing_format_for_cpu", False):
            return "bitsandbytes has repacked its weight for inference"
        packed, shape = _bytes(weight), (base.out_features, base.in_features)
        if reason := why_no_kernel(packed.device):
            return reason
        if tuple(state.shape) != shape:
            return f"its weight was quantized in shape {list(state.shape)}, it is {list(shape)}"
        if packed.nbytes != (shape[0] * shape[1] + 1) // 2:
            return f"its packed weight takes {packed.nbytes} bytes, which does not fit shape {list(shape)}"
        if state.quant_type not in FOURBIT_CODEBOOKS or state.blocksize not in FOURBIT_BLOCKSIZES:
            return f"its weight is {state.quant_type} in blocks of {state.blocksize}"
        if state.absmax.dtype != (torch.uint8 if state.nested else torch.float32):
            return f"the absmax of its weight is {state.absmax.dtype}"
        if bias is not None and (not is_plain_tensor(bias) or bias.dtype not in DTYPES):
            return f"its bias is a {type(bias).__name__} of {bias.dtype}"
        return None

    def why_not_dtype(self, base: Linear4bit, x: Tensor, autocast: torch.dtype | None) -> str | None:
        if x.dtype not in DTYPES or (base.compute_dtype or x.dtype) not in DTYPES:
            return f"its input is {x.dtype}, it computes in {base.compute_dtype}"
        if autocast is not None and x.dtype not in (autocast, torch.float32):
            return f"its input is {x.dtype} under autocast to {autocast}"
        return None

    def device(self, base: Linear4bit) -> torch.device:
        return _bytes(base.weight).device

    def in_features(self, base: Linear4bit) -> int:
        return base.in_features

    def call(self, base: Linear4bit, x: Tensor, lora_A, lora_B, scaling, bias, dropout) -> Tensor:
        it = self.operand(base, x)
        y = fourbit.call(
            x, it["weight"], lora_A, lora_B, scaling, bias, dropout, compute_dtype=it["compute_dtype"]
        )
        return y.to(it["dtype"])

    def operand(self, base: Linear4bit, x: Tensor) -> dict:
        """As bitsandbytes, in the dtype of x also under autocast. The bias is not cast in place."""
        fix_4bit_weight_quant_state_from_module(base)
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = True
        compute = autocast_dtype(x) or base.compute_dtype
        return dict(weight=_weight(base.weight), compute_dtype=compute, dtype=x.dtype)


def _state(base: Linear4bit) -> QuantState | None:
    """Some wrappers make a new parameter of the weight, which has lost it; the layer still has it."""
    state = getattr(base.weight, "quant_state", None)
    return base.quant_state if state is None else state


def _bytes(weight: Params4bit) -> Tensor:
    """The packed weight as a plain tensor, past what the class does to every access of an attribute."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.data


def _weight(weight: Params4bit) -> FourBitWeight:
    state, nested = weight.quant_state, None
    if state.nested:
        inner = state.state2
        nested = NestedAbsmax(inner.absmax, inner.code, state.offset, inner.blocksize)
    return FourBitWeight(
        _bytes(weight), state.absmax, state.shape, state.dtype, state.quant_type, state.blocksize, nested
    )


KINDS.update(dict.fromkeys((Linear4bit, LinearFP4, LinearNF4), Bitsandbytes4bit()))
