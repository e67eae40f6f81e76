"""Softmax attention as one operator, forward and backward, whose scores never leave the processor's caches."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.lora import DTYPES, check_number, name_of, refuse_second_derivative

KERNEL_DEVICES = ("cpu",)
FORWARD = torch.ops.peftfast.attention.default
BACKWARD = torch.ops.peftfast.attention_backward.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """y = softmax(scale * q k^T) v of each head, over the keys that a query sees   (Vaswani et al., NeurIPS 2017).

    Scores are made a block at a time and never kept (FlashAttention: Dao et al., NeurIPS 2022); sums and the softmax
    are fp32. Backward keeps q, k, v (shared), y and 4 bytes per query and head. The arithmetic is the same under
    autocast.

    Args:
        q: [B, H, T, D], float32, bfloat16 or float16; any strides.
        k: [B, kv_heads, S, D] in the dtype of q; kv_heads divides H, and H / kv_heads heads of q, that follow one
            another, share one of k and v.
        v: as k.
        mask: bool, of a shape that broadcasts to [B, H, T, S]: True where a query sees a key. A query that sees none
            gets zeros. None: all are seen.
        causal: query t sees no key beyond t.
        scale: positive; by default 1 / sqrt(D).
    Returns:
        [B, H, T, D] in the dtype of q, in memory [B, T, H, D], in which a model reads it next.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    scale = _check(q, k, v, mask, causal, scale)
    return call_attention(q, k, v, mask, causal, scale)


def call_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """`attention` for a caller whose arguments are right: no checks but those that guard memory."""
    if q.device.type not in KERNEL_DEVICES:
        return reference.attention(q, k, v, mask=mask, causal=causal, scale=scale)
    if mask is not None:
        mask = mask.expand(*q.shape[:-1], k.shape[-2])
    arguments = q, k, v, mask, causal, scale
    if torch.compiler.is_compiling():
        y, _ = FORWARD(*arguments)
    elif torch.is_grad_enabled():
        y, _ = _Attention.apply(*arguments)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            y, _ = FORWARD(*arguments)
    return y.transpose(1, 2)


def _check(q, k, v, mask, causal, scale) -> float:
    for name, value in dict(q=q, k=k, v=v).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {name_of(value.layout)}.")
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device}, but q is on {q.device}.")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {name_of(value.dtype)}.")
        if value.dtype != q.dtype:
            raise TypeError(f"{name} is {name_of(value.dtype)}, but q is {name_of(q.dtype)}.")
        if value.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions, [batch, heads, tokens, features], got {value.dim()}."
            )
    batch, heads, queries, features = q.shape
    if k.shape[0] != batch or k.shape[3] != features:
        raise ValueError(f"k has shape {list(k.shape)}, expected [{batch}, heads, tokens, {features}].")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {list(v.shape)}, but k has {list(k.shape)}.")
    if heads != 0 if k.shape[1] == 0 else heads % k.shape[1] != 0:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {heads} of q.")
    if mask is not None:
        _check_mask(mask, q, [batch, heads, queries, k.shape[2]])
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, got {type(causal).__name__}.")
    if scale is None:
        return 1 / math.sqrt(max(features, 1))
    check_number(scale, "scale")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}, expected a positive number.")
    return scale


def _check_mask(mask: Tensor, q: Tensor, shape: list[int]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor or None, got {type(mask).__name__}.")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {name_of(mask.dtype)}.")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, but q is on {q.device}.")
    missing = len(shape) - mask.dim()
    if missing < 0 or any(size not in (1, wanted) for size, wanted in zip(mask.shape, shape[missing:])):
        raise ValueError(f"mask has shape {list(mask.shape)}, which does not broadcast to {shape}.")


class _Attention(torch.autograd.Function):
    """The operator and its gradient. Inputs as in the schema."""

    @staticmethod
    def forward(ctx, q, k, v, mask, causal, scale):
        with torch._C._AutoDispatchBelowAutograd():
            y, lse = FORWARD(q, k, v, mask, causal, scale)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, mask, y, lse)
        ctx.settings = causal, scale
        return y, lse

    @staticmethod
    def backward(ctx, grad_y, _):
        if grad_y is None or not any(ctx.needs_input_grad):
            return (None,) * 6
        q, k, v, mask, y, lse = ctx.saved_tensors
        # Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words.
        recording = torch.is_grad_enabled()
        with contextlib.nullcontext() if recording else torch._C._AutoDispatchBelowAutograd():
            grads = BACKWARD(grad_y.transpose(1, 2), q, k, v, mask, y, lse, *ctx.settings)
        wanted = zip(ctx.needs_input_grad, grads)
        return *(grad.transpose(1, 2) if want else None for want, grad in wanted), None, None, None


@torch.library.register_fake("peftfast::attention")
def _(q, k, v, mask, causal, scale):
    batch, heads, queries, features = q.shape
    y = q.new_empty(batch, queries, heads, features)
    return y, q.new_empty(batch, heads, queries, dtype=torch.float32)


@torch.library.register_fake("peftfast::attention_backward")
def _(grad_y, q, k, v, mask, y, lse, causal, scale):
    batch, heads, keys, features = k.shape
    return q.new_empty(y.shape), *(k.new_empty(batch, keys, heads, features) for _ in range(2))


# As for lora_linear: torch.library.register_autograd costs a small layer's time.
_library = torch.library.Library("peftfast", "IMPL")
_library.impl("attention", _Attention.apply, "Autograd")
refuse_second_derivative("attention")
