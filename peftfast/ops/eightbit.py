"""Layers over 8-bit weights in bitsandbytes' row-wise format: linear ones, with LoRA adapters, and embeddings.

Plain torch over the dense operators. Both directions decode a panel of the weight at a time, of which every output
element is written once: rows of it forward, columns backward. The weight never exists whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from peftfast import reference
from peftfast.ops import lora
from peftfast.ops.lora import (
    DTYPES,
    KERNEL_DEVICES,
    check_adapters,
    check_bias,
    check_ids,
    check_tensors,
    low_rank,
    name_of,
)
from peftfast.reference import EightBitWeight, as_list

# Elements of the weight that are decoded at a time, through fp32: at 4096 columns 1024 rows.
PANEL = 4 << 20


def eightbit_quantize(weight: Tensor) -> EightBitWeight:
    """`weight` in 8 bits, each row by its largest magnitude   (Dettmers et al., LLM.int8(), NeurIPS 2022).

    Codes and scales equal those of bitsandbytes' `int8_vectorwise_quant`.

    Args:
        weight: [N, K], float32, bfloat16 or float16; every value finite.
    Raises:
        TypeError, ValueError: weight has a wrong type, dtype or shape, or is not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}.")
    if weight.layout is not torch.strided:
        raise TypeError(f"weight must be a dense tensor, got layout {name_of(weight.layout)}.")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {name_of(weight.dtype)}.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}.")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for panel in _panels(*weight.shape):
        part = reference.eightbit_quantize(weight[panel])
        codes[panel], absmax[panel] = part.codes, part.absmax
    if not torch.isfinite(absmax).all():
        raise ValueError("weight holds values that are not finite (NaN or infinity): it cannot be quantized.")
    return EightBitWeight(codes, absmax)


def eightbit_dequantize(weight: EightBitWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [N, K]: code * absmax / 127 in fp32, rounded once to `dtype`.

    Args:
        dtype: float32, bfloat16 or float16.
    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or the parts of `weight` do not fit together.
    """
    check_weight(weight)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {name_of(dtype)}.")
    return reference.eightbit_dequantize(weight, dtype)


def eightbit_embedding(ids: Tensor, weight: EightBitWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows `ids` of the dequantized weight; no others are dequantized.

    Args:
        ids: int64 or int32 [...], each in [0, N).
        weight: of shape [N, K].
        dtype: float32, bfloat16 or float16.
    Returns:
        [..., K].
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, device or value; the message names it.
        IndexError: an id is out of range.
    """
    check_weight(weight)
    check_ids(ids, weight.codes.device)
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {name_of(dtype)}.")
    flat = ids.reshape(-1)
    scales = F.embedding(flat, weight.absmax.unsqueeze(1)).squeeze(1)
    rows = EightBitWeight(F.embedding(flat, weight.codes), scales)
    return reference.eightbit_dequantize(rows, dtype).view(*ids.shape, weight.shape[1])


def eightbit_linear(
    x: Tensor,
    weight: EightBitWeight,
    lora_A: Tensor | Sequence[Tensor] = (),
    lora_B: Tensor | Sequence[Tensor] = (),
    scaling: float | Tensor | Sequence[float | Tensor] = (),
    *,
    bias: Tensor | None = None,
    dropout: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + sum over adapters of scaling * dropout(x) A^T B^T over an 8-bit W, decoded in the dtype of x.

    The adapters are those of `peftfast.ops.lora_linear`; without any it is the quantized layer alone.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: of shape [N, K], frozen.
    Returns:
        [..., N] in the dtype of x.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        RuntimeError: a second derivative is asked for.
    """
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    scaling, dropout = as_list(scaling, len(lora_A)), as_list(dropout, len(lora_A))
    check_weight(weight)
    check_tensors({"x": x, "codes": weight.codes, "bias": bias, "seed": seed}, lora_A, lora_B)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {name_of(x.dtype)}.")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {list(x.shape)}, but weight has {inputs} input features.")
    check_bias(bias, outputs, (x.dtype, torch.float32))
    check_adapters(x, lora_A, lora_B, scaling, dropout, seed, outputs, inputs)
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout, seed)


def call(x, weight: EightBitWeight, lora_A, lora_B, scaling, bias, dropout, seed=None) -> Tensor:
    """`eightbit_linear` for a caller whose arguments are lists and right."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = x.reshape(-1, x.shape[-1])
    with torch.autocast(device, enabled=False):
        y = _EightBitLinear.apply(rows, weight.codes, weight.absmax, bias)
        u, B = low_rank(rows, lora_A, lora_B, scaling, dropout, seed)
        if B is not None:
            y = torch.addmm(y.to(B.dtype), u, B.T).to(y.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


class _EightBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, codes, absmax, bias):
        ctx.save_for_backward(codes, absmax)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return project(x, EightBitWeight(codes, absmax), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        want_x, _, _, want_bias = ctx.needs_input_grad
        grad_x = project_back(grad_y, EightBitWeight(*ctx.saved_tensors)) if want_x else None
        grad_bias = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if want_bias else None
        return grad_x, None, None, grad_bias


def project(x: Tensor, weight: EightBitWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] W^T + bias, below autograd."""

    def columns(panel: slice) -> Tensor:
        part = EightBitWeight(weight.codes[panel], weight.absmax[panel])
        decoded = reference.eightbit_dequantize(part, x.dtype)
        return _product(x, decoded, None if bias is None else bias[panel])

    panels = list(_panels(*weight.shape))
    if len(panels) == 1:
        return columns(panels[0])
    y = x.new_empty(len(x), weight.shape[0])
    for panel in panels:
        y[:, panel] = columns(panel)
    return y


def project_back(grad_y: Tensor, weight: EightBitWeight) -> Tensor:
    """grad_y [M, N] W, below autograd."""
    grad_x = grad_y.new_empty(len(grad_y), weight.shape[1])
    for panel in _panels(*reversed(weight.shape)):
        part = EightBitWeight(weight.codes[:, panel], weight.absmax)
        decoded = reference.eightbit_dequantize(part, grad_y.dtype)
        grad_x[:, panel] = _product(grad_y, decoded, transposed=True)
    return grad_x


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """x W^T + bias, or x W, of a dense weight."""
    if x.device in KERNEL_DEVICES and x.dtype in DTYPES:
        return lora.FORWARD(x, weight, bias, [], [], [], [], None, transposed)[0]
    return F.linear(x, weight.T if transposed else weight, None if bias is None else bias.to(x.dtype))


def _panels(count: int, elements: int) -> Iterator[slice]:
    """Slices of `count` rows or columns that have so many elements each."""
    size = max(1, PANEL // max(1, elements))
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


def check_weight(weight: EightBitWeight, name: str = "weight") -> None:
    """One sentence for what does not fit together in an 8-bit weight.

    Raises:
        TypeError, ValueError: as described; the message begins with `name`.
    """
    if not isinstance(weight, EightBitWeight):
        raise TypeError(f"{name} must be an EightBitWeight, got {type(weight).__name__}.")
    parts = [("codes", weight.codes, torch.int8), ("absmax", weight.absmax, torch.float32)]
    for part, tensor, dtype in parts:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {part} must be a tensor, got {type(tensor).__name__}.")
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {part} must be {name_of(dtype)}, got {name_of(tensor.dtype)}.")
    if weight.codes.dim() != 2:
        raise ValueError(f"{name}: codes must have 2 dimensions, got shape {list(weight.codes.shape)}.")
    if weight.absmax.shape != weight.codes.shape[:1]:
        raise ValueError(
            f"{name}: absmax has shape {list(weight.absmax.shape)}, expected [{len(weight.codes)}]: one to a row."
        )
    if weight.absmax.device != weight.codes.device:
        raise ValueError(
            f"{name}: absmax is on {weight.absmax.device}, but codes is on {weight.codes.device}."
        )
