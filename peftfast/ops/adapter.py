"""A bottleneck adapter as one operator, forward and backward."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.lora import (
    DTYPES,
    check_dropout,
    check_number,
    check_scaling,
    check_seed,
    name_of,
    refuse_second_derivative,
)  # fmt: skip
from peftfast.reference import ACTIVATIONS

KERNEL_DEVICES = ("cpu",)
FORWARD = torch.ops.peftfast.bottleneck_adapter.default
BACKWARD = torch.ops.peftfast.bottleneck_adapter_backward.default
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def bottleneck_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float | Tensor = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    dropout: float = 0.0,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """y = residual + scaling * (dropout(activation(norm(x) down_weight^T + down_bias)) up_weight^T + up_bias)

    Houlsby et al., ICML 2019 (activation "gelu", residual=x, after a sublayer); Pfeiffer et al., EACL 2021 ("relu");
    He et al., ICLR 2022 (x the sublayer's input and residual its output, dropout in the bottleneck, a scaling of its
    own). The norm, both products, the activation, the scaling and the sum are computed in fp32 and rounded once.
    Backward keeps x (shared) and 4 bytes per row and bottleneck feature, and computes the rest again from them. All
    arithmetic is the same under autocast.

    Args:
        x: [..., H], float32, bfloat16 or float16; any strides.
        down_weight: [D, H], of any of these dtypes.
        down_bias: [D] or None.
        up_weight: [H, D] in the dtype of down_weight.
        up_bias: [H] or None.
        activation: "identity", "relu", "gelu", "gelu_tanh" (GELU by its approximation with tanh), "silu" or "tanh".
        scaling: a number or a one-element tensor, which may be trained.
        norm_weight: [H]: x goes through a LayerNorm first. None: it does not.
        norm_bias: [H] or None, beside a norm_weight.
        norm_eps: is added to the variance.
        dropout: probability in [0, 1) that an element of the bottleneck is dropped.
        residual: of the shape and dtype of x, added to the result; may be x itself.
        seed: int64 tensor of one element that fixes the mask, on x's device. None: torch draws it.
    Returns:
        [..., H] in the dtype of x.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    parameters = dict(
        down_weight=down_weight, down_bias=down_bias, up_weight=up_weight, up_bias=up_bias,
        norm_weight=norm_weight, norm_bias=norm_bias,
    )  # fmt: skip
    _check(x, parameters, activation, scaling, norm_eps, dropout, residual, seed)
    if x.device.type not in KERNEL_DEVICES:
        settings = dict(activation=activation, scaling=scaling, norm_eps=norm_eps, dropout=dropout, seed=seed)
        return reference.bottleneck_adapter(x, **parameters, **settings, residual=residual)
    if not dropout:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    learned = scaling.reshape(1) if isinstance(scaling, Tensor) else None
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    other = None if residual is None or residual is x else residual.reshape(rows.shape)
    y, _ = _dispatch(
        rows, other, *parameters.values(), learned, 1.0 if learned is not None else scaling, NUMBERS[activation],
        norm_eps, dropout, seed, residual is x,
    )  # fmt: skip
    return y.view(x.shape)


def _dispatch(*arguments):
    """FORWARD, without the detour through the dispatcher's autograd key."""
    if torch.compiler.is_compiling():
        return FORWARD(*arguments)
    if torch.is_grad_enabled():
        return _BottleneckAdapter.apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(*arguments)


def _check(x, parameters, activation, scaling, norm_eps, dropout, residual, seed) -> None:
    """One sentence for each argument that is wrong."""
    tensors = {"x": x, **parameters, "residual": residual, "seed": seed}
    tensors |= {"scaling": scaling} if isinstance(scaling, Tensor) else {}
    for name, value in tensors.items():
        if value is None and name not in ("x", "down_weight", "up_weight"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {name_of(value.layout)}.")
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}, but x is on {x.device}.")
        if name != "seed" and value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {name_of(value.dtype)}.")
    down, up = parameters["down_weight"], parameters["up_weight"]
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, its last the features.")
    if down.dim() != 2 or down.shape[0] == 0 or down.shape[1] != x.shape[-1]:
        raise ValueError(
            f"down_weight has shape {list(down.shape)}, expected [size, {x.shape[-1]}] with a size above 0."
        )
    D, H = down.shape
    for name, shape in dict(
        down_bias=(D,), up_weight=(H, D), up_bias=(H,), norm_weight=(H,), norm_bias=(H,)
    ).items():
        if parameters[name] is not None and parameters[name].shape != shape:
            raise ValueError(f"{name} has shape {list(parameters[name].shape)}, expected {list(shape)}.")
    if up.dtype != down.dtype:
        raise TypeError(f"up_weight is {name_of(up.dtype)}, but down_weight is {name_of(down.dtype)}.")
    if parameters["norm_bias"] is not None and parameters["norm_weight"] is None:
        raise ValueError("norm_bias is there, but no norm_weight.")
    if not isinstance(activation, str) or activation not in NUMBERS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(NUMBERS)}.")
    check_scaling(scaling)
    check_dropout(dropout)
    check_number(norm_eps, "norm_eps")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps is {norm_eps}, expected a number that is not negative.")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {list(residual.shape)}, but x has {list(x.shape)}.")
        if residual.dtype != x.dtype:
            raise TypeError(f"residual is {name_of(residual.dtype)}, but x is {name_of(x.dtype)}.")
    check_seed(seed)


@torch.library.register_fake("peftfast::bottleneck_adapter")
def _(x, residual, down_weight, *rest):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[0], down_weight.shape[0], dtype=torch.float32
    )


@torch.library.register_fake("peftfast::bottleneck_adapter_backward")
def _(grad_y, x, *rest):
    tensors, want = (x, *rest[:7]), rest[-1]
    grads = []
    for tensor, wanted in zip(tensors, want):
        first, *others = (0,) if tensor is None else tensor.shape
        dtype = tensor.dtype if others else torch.float32
        grads.append(x.new_empty(first if wanted else 0, *others, dtype=dtype))
    return grads


class _BottleneckAdapter(torch.autograd.Function):
    """The operator and its gradient. Inputs as in the schema."""

    @staticmethod
    def forward(ctx, x, residual, *rest):
        parameters, settings = rest[:7], rest[7:]
        with torch._C._AutoDispatchBelowAutograd():
            y, z = FORWARD(x, residual, *rest)
        ctx.mark_non_differentiable(z)
        ctx.set_materialize_grads(False)
        scaling, activation, norm_eps, dropout, seed, residual_is_x = settings
        ctx.save_for_backward(x, z, seed, *parameters)
        ctx.settings = scaling, activation, norm_eps, dropout, residual_is_x
        return y, z

    @staticmethod
    def backward(ctx, grad_y, _):
        grads = [None] * len(ctx.needs_input_grad)
        if grad_y is None:
            return tuple(grads)
        want_x, want_residual, *want_parameters = ctx.needs_input_grad[:9]
        want = [want_x, *want_parameters]
        if any(want):
            x, z, seed, *parameters = ctx.saved_tensors
            *settings, residual_is_x = ctx.settings
            # Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words.
            with (
                contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
            ):
                computed = BACKWARD(grad_y, x, *parameters, z, *settings, seed, residual_is_x, want)
            of = [
                grad.to(t.dtype) if wanted else None
                for grad, t, wanted in zip(computed, [x, *parameters], want)
            ]
            grads[0], grads[2:9] = of[0], of[1:]
        if want_residual:
            grads[1] = grad_y
        return tuple(grads)


def _autograd(*arguments):
    return _BottleneckAdapter.apply(*arguments)


# As for lora_linear: torch.library.register_autograd costs a small layer's time.
_library = torch.library.Library("peftfast", "IMPL")
_library.impl("bottleneck_adapter", _autograd, "Autograd")
refuse_second_derivative("bottleneck_adapter")
