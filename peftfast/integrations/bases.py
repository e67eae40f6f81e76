"""The frozen layers that adapters sit on: whether an operator can take their place, and how it is called for them.

`KINDS` has an object for each class of layer. Its functions named why_not... return None or the reason why not, as
the rest of "... cannot run on the fast path: ".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from transformers import activations
from transformers.pytorch_utils import Conv1D

from peftfast.nn import Linear4bit, Linear8bit
from peftfast.ops import eightbit, fourbit, lora
from peftfast.ops.devices import why_no_kernel
from peftfast.ops.lora import DTYPES

ACTIVATIONS = {
    nn.SiLU: "silu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Identity: "identity",
}


class Dense:
    """nn.Linear, or transformers' Conv1D, whose weight is [in_features, out_features]."""

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def why_not(self, base: nn.Module) -> str | None:
        """The layer itself, whatever the input."""
        weight, bias = base.weight, base.bias
        if not is_plain_tensor(weight) or not (bias is None or is_plain_tensor(bias)):
            return f"its base weight is a {type(weight).__name__}"
        if weight.requires_grad:
            return "its base weight is trained too"
        return why_no_kernel(weight.device)

    def why_not_dtype(self, base: nn.Module, x: Tensor, autocast: torch.dtype | None) -> str | None:
        dtype = base.weight.dtype
        if x.dtype != dtype and (autocast is None or x.dtype not in DTYPES or dtype not in DTYPES):
            return f"its input is {x.dtype}, its weight {dtype}"
        return None

    def device(self, base: nn.Module) -> torch.device:
        return base.weight.device

    def in_features(self, base: nn.Module) -> int:
        return base.weight.shape[0 if self.transposed else 1]

    def call(self, base: nn.Module, x: Tensor, lora_A, lora_B, scaling, bias, dropout) -> Tensor:
        """The layer and its adapters as one operator; `bias` is the sum of theirs."""
        return lora.call(x, base.weight, lora_A, lora_B, scaling, bias, dropout, self.transposed)

    def operand(self, base: nn.Module, x: Tensor) -> dict:
        """The weight as operators take it, the dtype of its products, and that of what comes out for x."""
        return dict(weight=base.weight, compute_dtype=None, dtype=autocast_dtype(x) or x.dtype)


class Quantized:
    """What peftfast.nn.Linear4bit and Linear8bit have in common."""

    def why_not(self, base: nn.Module) -> str | None:
        for name, tensor in (("base weight", base.weight), ("bias", base.bias)):
            if not (tensor is None or is_plain_tensor(tensor)):
                return f"its {name} is a {type(tensor).__name__}"
        return why_no_kernel(self.device(base))

    def why_not_dtype(self, base: nn.Module, x: Tensor, autocast: torch.dtype | None) -> str | None:
        return None if x.dtype in DTYPES else f"its input is {x.dtype}"

    def device(self, base: nn.Module) -> torch.device:
        return base.weight.device

    def in_features(self, base: nn.Module) -> int:
        return base.in_features

    def operand(self, base: nn.Module, x: Tensor) -> dict:
        compute_dtype = getattr(base, "compute_dtype", None)
        return dict(
            weight=base.quantized_weight, compute_dtype=compute_dtype, dtype=autocast_dtype(x) or x.dtype
        )


class FourBit(Quantized):
    def call(self, base: nn.Module, x: Tensor, lora_A, lora_B, scaling, bias, dropout) -> Tensor:
        return fourbit.call(
            x, base.quantized_weight, lora_A, lora_B, scaling, bias, dropout, compute_dtype=base.compute_dtype
        )


class EightBit(Quantized):
    def call(self, base: nn.Module, x: Tensor, lora_A, lora_B, scaling, bias, dropout) -> Tensor:
        return eightbit.call(x, base.quantized_weight, lora_A, lora_B, scaling, bias, dropout)


KINDS = {nn.Linear: Dense(), Conv1D: Dense(transposed=True), Linear4bit: FourBit(), Linear8bit: EightBit()}


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, if it is on, makes of the operands of a product."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def why_not_input(base: nn.Module, x: Tensor) -> str | None:
    """The input, and the dtypes that follow from it and from autocast."""
    kind = KINDS[type(base)]
    if not is_plain_tensor(x) or x.layout is not torch.strided:
        return f"its input is a {type(x).__name__} of layout {x.layout}"
    device = kind.device(base)
    if x.device != device:
        return f"its input is on {x.device}, its weight on {device}"
    autocast = autocast_dtype(x)
    reason = kind.why_not_dtype(base, x, autocast)
    if reason is not None:
        return reason
    if (autocast or x.dtype) not in DTYPES:
        return f"it computes in {autocast or x.dtype}"
    if x.dim() == 0 or x.shape[-1] != kind.in_features(base):
        return f"its input has shape {list(x.shape)}"
    return why_not_mode()


def why_not_mode() -> str | None:
    """What torch is at while the layer runs."""
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "it is being traced by torch.jit"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "it runs under a functorch transform"
        if forward_ad._current_level >= 0:
            return "it runs under forward-mode differentiation"
    return None


def is_plain(module: nn.Module, pre_hooks: bool = False) -> bool:
    """No hooks, and the forward of its class: calling it would do what its class says and no more.

    Args:
        pre_hooks: hooks that are given the input are none of these.
    """
    return not (
        module._forward_hooks
        or (module._forward_pre_hooks and not pre_hooks)
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


# Whether fake tensors count as those that they stand for: `peftfast plan` runs training steps on them. Else they do
# not, since what torch.export records is to hold torch's operations.
fakes_are_plain = False


def name_of_activation(activation: object) -> str | None:
    """The name that the operators have for what a module or function computes."""
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return ACTIVATIONS.get(type(activation))


def is_plain_tensor(tensor: Tensor) -> bool:
    """Of no class with a behaviour of its own."""
    kind = type(tensor)
    return kind is nn.Parameter or kind is Tensor or (kind is FakeTensor and fakes_are_plain)
