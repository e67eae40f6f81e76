"""What stands between the products of a decoder layer: its gated activation and its norm, each as one operator.

Both are bound by memory and both are cheap to do again, so that they keep no more than their operands for backward.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.devices import KERNEL_DEVICES
from peftfast.ops.lora import DTYPES, check_number, name_of, refuse_second_derivative
from peftfast.reference import ACTIVATIONS

SWIGLU = torch.ops.peftfast.swiglu.default
SWIGLU_BACKWARD = torch.ops.peftfast.swiglu_backward.default
WEIGHTED_SWIGLU = torch.ops.peftfast.weighted_swiglu.default
WEIGHTED_SWIGLU_BACKWARD = torch.ops.peftfast.weighted_swiglu_backward.default
RMS_NORM = torch.ops.peftfast.rms_norm.default
RMS_NORM_BACKWARD = torch.ops.peftfast.rms_norm_backward.default
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


# ---- gated activations ------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """y = activation(gate) * up   (SwiGLU and its relatives; Shazeer, 2020).

    Computed in fp32 and rounded once. Backward keeps gate and up, both shared, and nothing else. The arithmetic is the
    same under autocast.

    Args:
        gate: [..., I], float32, bfloat16 or float16; any strides: it and up may be the halves of one [..., 2 I].
        up: of the shape and dtype of gate.
        activation: "silu", "gelu", "gelu_tanh" (GELU by its approximation with tanh), "relu", "tanh" or "identity".
    Returns:
        [..., I] in the dtype of gate.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    _check_tensors(gate=gate, up=up)
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, its last the features.")
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {list(up.shape)}, but gate has {list(gate.shape)}.")
    if up.dtype != gate.dtype:
        raise TypeError(f"up is {name_of(up.dtype)}, but gate is {name_of(gate.dtype)}.")
    if not isinstance(activation, str) or activation not in NUMBERS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(NUMBERS)}.")
    return call_swiglu(gate, up, activation)


def call_swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`swiglu` for a caller whose arguments are right: no checks but those that guard memory."""
    if gate.device not in KERNEL_DEVICES:
        return reference.swiglu(gate, up, activation=activation)
    y = _dispatch(SWIGLU, _Swiglu, _rows(gate), _rows(up), NUMBERS[activation])
    return y.view(gate.shape)


class _Swiglu(torch.autograd.Function):
    """The operator and its gradient. Inputs as in the schema."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        with torch._C._AutoDispatchBelowAutograd():
            y = SWIGLU(gate, up, activation)
        ctx.save_for_backward(gate, up)
        ctx.set_materialize_grads(False)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, grad_y):
        want_gate, want_up, _ = ctx.needs_input_grad
        if grad_y is None or not (want_gate or want_up):
            return None, None, None
        with _recording():
            grad_gate, grad_up = SWIGLU_BACKWARD(
                grad_y, *ctx.saved_tensors, ctx.activation, want_gate, want_up
            )
        return grad_gate if want_gate else None, grad_up if want_up else None, None


# ---- the norm ---------------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float = 1e-6,
    offset: float = 0.0,
    *,
    cast_first: bool = True,
) -> Tensor:
    """y = x / sqrt(mean of the squares of x's row + eps) * (offset + weight)   (Zhang and Sennrich, NeurIPS 2019).

    The rows are normalized in fp32. What happens then differs between models, and y is rounded as they round it: with
    `cast_first` the rows are rounded to the dtype of x and then multiplied, as in transformers' LlamaRMSNorm; without,
    they are multiplied in fp32 and then rounded, as in its GemmaRMSNorm (whose offset is 1). Backward keeps x and
    weight, both shared, and 4 bytes per row. The arithmetic is the same under autocast.

    Args:
        x: [..., H], float32, bfloat16 or float16; any strides.
        weight: [H], of any of these dtypes. None: y is the normalized rows.
        eps: is added to the mean of the squares.
        offset: is added to the weight.
        cast_first: see above.
    Returns:
        [..., H] in the dtype of x; with `cast_first` in that to which torch promotes the dtypes of x and weight.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    _check_tensors(x=x, **({} if weight is None else {"weight": weight}))
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, its last the features.")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}, expected [{x.shape[-1]}].")
    for name, value in dict(eps=eps, offset=offset).items():
        check_number(value, name)
        if not -math.inf < value < math.inf or (name == "eps" and value < 0):
            raise ValueError(
                f"{name} is {value}, expected a number{' that is not negative' * (name == 'eps')}."
            )
    if not isinstance(cast_first, bool):
        raise TypeError(f"cast_first must be True or False, got {type(cast_first).__name__}.")
    return call_rms_norm(x, weight, eps, offset, cast_first)


def call_rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool) -> Tensor:
    """`rms_norm` for a caller whose arguments are right: no checks but those that guard memory."""
    if x.device not in KERNEL_DEVICES:
        return reference.rms_norm(x, weight, eps, offset, cast_first=cast_first)
    y, _ = _dispatch(RMS_NORM, _RmsNorm, _rows(x), weight, eps, offset, cast_first)
    return y.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """The operator and its gradient. Inputs as in the schema."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, cast_first):
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = RMS_NORM(x, weight, eps, offset, cast_first)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, rstd)
        ctx.settings = offset, cast_first
        return y, rstd

    @staticmethod
    def backward(ctx, grad_y, _):
        want_x, want_weight = ctx.needs_input_grad[:2]
        if grad_y is None or not (want_x or want_weight):
            return None, None, None, None, None
        x, weight, rstd = ctx.saved_tensors
        with _recording():
            grad_x, grad_weight = RMS_NORM_BACKWARD(
                grad_y, x, weight, rstd, *ctx.settings, want_x, want_weight
            )
        grad_weight = grad_weight.to(weight.dtype) if want_weight else None
        return grad_x if want_x else None, grad_weight, None, None, None


# ---- what both have ---------------------------------------------------------------------------------------


def _check_tensors(**tensors) -> None:
    first = next(iter(tensors))
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {name_of(value.layout)}.")
        if value.device != tensors[first].device:
            raise ValueError(f"{name} is on {value.device}, but {first} is on {tensors[first].device}.")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {name_of(value.dtype)}.")


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _dispatch(operator, function: type[torch.autograd.Function], *arguments):
    """The operator, without the detour through the dispatcher's autograd key."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _recording() -> contextlib.AbstractContextManager:
    """Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words."""
    return contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()


@torch.library.register_fake("peftfast::swiglu")
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("peftfast::swiglu_backward")
def _(grad_y, gate, up, activation, want_gate, want_up):
    rows, features = gate.shape
    return gate.new_empty(rows if want_gate else 0, features), gate.new_empty(
        rows if want_up else 0, features
    )


@torch.library.register_fake("peftfast::weighted_swiglu")
def _(x, weights, activation):
    return x.new_empty(x.shape[0], x.shape[1] // 2)


@torch.library.register_fake("peftfast::weighted_swiglu_backward")
def _(grad_y, x, weights, activation, want_weights):
    return x.new_empty(x.shape), weights.new_empty(x.shape[0] if want_weights else 0)


@torch.library.register_fake("peftfast::rms_norm")
def _(x, weight, eps, offset, cast_first):
    promoted = torch.promote_types(x.dtype, weight.dtype) if cast_first and weight is not None else x.dtype
    return x.new_empty(x.shape, dtype=promoted), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.register_fake("peftfast::rms_norm_backward")
def _(grad_y, x, weight, rstd, offset, cast_first, want_x, want_weight):
    rows, features = x.shape
    return x.new_empty(rows if want_x else 0, features), x.new_empty(
        features if want_weight else 0, dtype=torch.float32
    )


# As for lora_linear: torch.library.register_autograd costs a small layer's time.
_library = torch.library.Library("peftfast", "IMPL")
_library.impl("swiglu", _Swiglu.apply, "Autograd")
_library.impl("rms_norm", _RmsNorm.apply, "Autograd")
refuse_second_derivative("swiglu")
refuse_second_derivative("rms_norm")
