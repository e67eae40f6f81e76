"""Linear layers over 4-bit weights in bitsandbytes' format: quantize, dequantize, and multiply with LoRA adapters."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.devices import KERNEL_DEVICES
from peftfast.ops.lora import (
    DTYPES,
    check_adapters,
    check_bias,
    check_ids,
    check_tensors,
    name_of,
    refuse_second_derivative,
    scale_into_B,
)
from peftfast.reference import (
    FOURBIT_BLOCKSIZES,
    FOURBIT_CODEBOOKS,
    NESTED_BLOCKSIZE,
    FourBitWeight,
    NestedAbsmax,
    as_list,
)

FORWARD = torch.ops.peftfast.fourbit_linear.default
BACKWARD = torch.ops.peftfast.fourbit_linear_backward.default
QUANTIZE = torch.ops.peftfast.fourbit_quantize.default
QUANTIZE_ABSMAX = torch.ops.peftfast.fourbit_quantize_absmax.default
DEQUANTIZE = torch.ops.peftfast.fourbit_dequantize.default
QUANT_TYPES = tuple(FOURBIT_CODEBOOKS)  # the operators know them, and DTYPES, by their place


# ---- quantize and dequantize ----------------------------------------------------------------------------


def fourbit_quantize(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True
) -> FourBitWeight:
    """`weight` in 4 bits, in bitsandbytes' format   (Dettmers et al., QLoRA, NeurIPS 2023).

    Bytes and scales equal those that bitsandbytes computes on the CPU.

    Args:
        weight: float32, bfloat16 or float16, of any shape; every value finite.
        quant_type: "nf4" or "fp4".
        blocksize: elements of the flattened weight to one scale; a power of two from 32 to 4096.
        nested: the scales are quantized too, to 8 bits ("double quantization"): 4.127 bits per element instead of
            4.5 at a block size of 64.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype or value, or weight is not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}.")
    if weight.layout is not torch.strided:
        raise TypeError(f"weight must be a dense tensor, got layout {name_of(weight.layout)}.")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {name_of(weight.dtype)}.")
    _check_format(quant_type, blocksize)
    weight = weight.detach()
    if weight.device not in KERNEL_DEVICES:
        quantized = reference.fourbit_quantize(
            weight, quant_type=quant_type, blocksize=blocksize, nested=nested
        )
        finite = torch.isfinite(weight).all()
    else:
        packed, absmax = QUANTIZE(weight, blocksize, QUANT_TYPES.index(quant_type))
        quantized = FourBitWeight(packed, absmax, tuple(weight.shape), weight.dtype, quant_type, blocksize)
        finite = torch.isfinite(absmax).all()
    if not finite:
        raise ValueError("weight holds values that are not finite (NaN or infinity): it cannot be quantized.")
    if nested and quantized.nested is None:
        offset, code = quantized.absmax.mean(), _dynamic_code().to(packed.device, copy=True)
        codes, nested_absmax = QUANTIZE_ABSMAX(quantized.absmax, offset, code, NESTED_BLOCKSIZE)
        how = NestedAbsmax(nested_absmax, code, offset)
        quantized = FourBitWeight(
            packed, codes, tuple(weight.shape), weight.dtype, quant_type, blocksize, how
        )
    return quantized


_dynamic_code = functools.cache(reference.dynamic_code)


def fourbit_dequantize(weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of `weight.shape`: code * absmax in fp32, rounded once to `dtype`.

    Args:
        dtype: float32, bfloat16 or float16; None: that of the weight before it was quantized.
    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or the parts of `weight` do not fit together.
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {name_of(dtype)}.")
    check_weight(weight)
    if weight.packed.device not in KERNEL_DEVICES:
        return reference.fourbit_dequantize(weight, dtype)
    count = math.prod(weight.shape)
    return DEQUANTIZE(*parts_of(weight), 1, count, DTYPES.index(dtype)).view(weight.shape)


def fourbit_embedding(ids: Tensor, weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The rows `ids` of the dequantized weight; no others are dequantized.

    Args:
        ids: int64 or int32 [...], each in [0, N).
        weight: of shape [N, K] with an even K, so that every row begins with a byte.
        dtype: float32, bfloat16 or float16; None: that of the weight before it was quantized.
    Returns:
        [..., K].
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, device or value; the message names it.
        IndexError: an id is out of range.
    """
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {name_of(dtype)}.")
    check_weight(weight)
    check_ids(ids, weight.packed.device)
    if len(weight.shape) != 2 or weight.shape[1] % 2:
        raise ValueError(f"weight must have 2 dimensions, the last even, got shape {list(weight.shape)}.")
    rows, columns = weight.shape
    flat = ids.reshape(-1).long()
    packed = F.embedding(flat, weight.packed.reshape(-1).view(torch.uint8).view(rows, columns // 2))
    # So many columns share a scale, in every row alike: a row need not begin with a block.
    blocksize = math.gcd(columns, weight.blocksize)
    first = (flat * (columns // blocksize)).unsqueeze(1)
    blocks = (first + torch.arange(columns // blocksize, device=ids.device)) // (
        weight.blocksize // blocksize
    )
    absmax, nested = weight.absmax[blocks], weight.nested
    if nested is not None:
        absmax = nested.code[absmax.long()] * nested.absmax[blocks // nested.blocksize] + nested.offset
    found = FourBitWeight(
        packed.view(-1), absmax.view(-1), (len(flat), columns), weight.dtype, weight.quant_type, blocksize
    )
    if ids.device in KERNEL_DEVICES and blocksize in FOURBIT_BLOCKSIZES:
        decoded = DEQUANTIZE(*parts_of(found), *found.shape, DTYPES.index(dtype))
    else:
        decoded = reference.fourbit_dequantize(found, dtype)
    return decoded.view(*ids.shape, columns)


def _check_format(quant_type: str, blocksize: int) -> None:
    if quant_type not in FOURBIT_CODEBOOKS:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if blocksize not in FOURBIT_BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {list(FOURBIT_BLOCKSIZES)}, got {blocksize!r}.")


def check_weight(weight: FourBitWeight, name: str = "weight") -> None:
    """One sentence for what does not fit together in a 4-bit weight.

    Raises:
        TypeError, ValueError: as described; the message begins with `name`.
    """
    if not isinstance(weight, FourBitWeight):
        raise TypeError(f"{name} must be a FourBitWeight, got {type(weight).__name__}.")
    try:
        _check_format(weight.quant_type, weight.blocksize)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    nested, count = weight.nested, math.prod(weight.shape)
    blocks = -(-count // weight.blocksize)
    wanted = [
        ("packed", weight.packed, None, (count + 1) // 2),
        ("absmax", weight.absmax, torch.uint8 if nested else torch.float32, blocks),
    ]
    if nested is not None:
        if nested.blocksize < 1 or nested.blocksize & (nested.blocksize - 1):
            raise ValueError(
                f"{name}: the block size of nested absmax must be a power of two, got {nested.blocksize}."
            )
        wanted += [
            ("nested absmax", nested.absmax, torch.float32, -(-blocks // nested.blocksize)),
            ("nested code", nested.code, torch.float32, 256),
            ("nested offset", nested.offset, torch.float32, 1),
        ]
    for part, tensor, dtype, size in wanted:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {part} must be a tensor, got {type(tensor).__name__}.")
        if dtype is not None and tensor.dtype != dtype:
            raise TypeError(f"{name}: {part} must be {name_of(dtype)}, got {name_of(tensor.dtype)}.")
        found = tensor.numel() * (tensor.element_size() if dtype is None else 1)
        if found != size:
            unit = "bytes" if dtype is None else "elements"
            raise ValueError(
                f"{name}: {part} has {found} {unit}, expected {size} for shape {list(weight.shape)} "
                f"in blocks of {weight.blocksize}."
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {part} must be contiguous, got strides {list(tensor.stride())}.")
        if tensor.device != weight.packed.device:
            raise ValueError(
                f"{name}: {part} is on {tensor.device}, but packed is on {weight.packed.device}."
            )


# ---- the linear layer -----------------------------------------------------------------------------------


def fourbit_linear(
    x: Tensor,
    weight: FourBitWeight,
    lora_A: Tensor | Sequence[Tensor] = (),
    lora_B: Tensor | Sequence[Tensor] = (),
    scaling: float | Tensor | Sequence[float | Tensor] = (),
    *,
    bias: Tensor | None = None,
    dropout: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x W^T + bias + sum over adapters of scaling * dropout(x) A^T B^T over a 4-bit W   (QLoRA).

    W is decoded panel by panel into the cache, in both directions, and never exists whole. Otherwise as
    `peftfast.ops.lora_linear`, whose arguments these are; without adapters it is the quantized layer alone.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: of shape [N, K], frozen.
        compute_dtype: of the base product. In 16 bits, W and x are rounded to it, unless a wider product costs
            no more; the adapters always see x as it is. None: the dtype of x.
    Returns:
        [..., N] in the dtype of x, rounded once.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    scaling, dropout = as_list(scaling, len(lora_A)), as_list(dropout, len(lora_A))
    check_weight(weight)
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}.")
    check_tensors({"x": x, "packed": weight.packed, "bias": bias, "seed": seed}, lora_A, lora_B)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {name_of(x.dtype)}.")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise TypeError(f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}.")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x has shape {list(x.shape)}, but weight has {inputs} input features.")
    check_bias(bias, outputs, (x.dtype, compute_dtype, torch.float32))
    check_adapters(x, lora_A, lora_B, scaling, dropout, seed, outputs, inputs)
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout, seed, compute_dtype)


def call(
    x, weight: FourBitWeight, lora_A, lora_B, scaling, bias, dropout, seed=None, compute_dtype=None
) -> Tensor:
    """`fourbit_linear` for a caller whose arguments are lists and right: no checks but those that guard memory."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    lora_B, scaling = scale_into_B(lora_B, scaling)
    if x.device not in KERNEL_DEVICES:
        return reference.fourbit_linear(
            x, weight, lora_A, lora_B, scaling,
            bias=bias, dropout=dropout, seed=seed, compute_dtype=compute_dtype,
        )  # fmt: skip
    if not any(dropout):
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    parts, compute = parts_of(weight), DTYPES.index(compute_dtype or x.dtype)
    y, _ = _dispatch(rows, parts, weight.shape[0], bias, lora_A, lora_B, scaling, dropout, seed, compute)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def parts_of(weight: FourBitWeight) -> tuple:
    """The weight as the operators take it.

    Raises:
        RuntimeError: only a shard of it is here.
    """
    packed, nested, quant_type = weight.packed, weight.nested, QUANT_TYPES.index(weight.quant_type)
    if hasattr(packed, "device_mesh"):
        raise RuntimeError(
            "Only a shard of a 4-bit weight is here (a DTensor): FSDP gathers it where the module runs that was given "
            "to fully_shard."
        )
    if packed.dtype != torch.uint8:
        packed = packed.reshape(-1).view(torch.uint8)
    if nested is None:
        return packed, weight.absmax, None, None, None, weight.blocksize, 0, quant_type
    return (
        packed, weight.absmax, nested.absmax, nested.code, nested.offset,
        weight.blocksize, nested.blocksize, quant_type,
    )  # fmt: skip


def _dispatch(x, parts, out_features, bias, lora_A, lora_B, scaling, dropout, seed, compute):
    """FORWARD, without the detour through the dispatcher's autograd key."""
    if torch.compiler.is_compiling():
        return FORWARD(x, *parts, out_features, bias, lora_A, lora_B, scaling, dropout, seed, compute)
    if torch.is_grad_enabled():
        return _FourBitLinear.apply(
            x, *parts[:5], bias, seed, parts[5:], out_features, scaling, dropout, compute, *lora_A, *lora_B
        )
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(x, *parts, out_features, bias, lora_A, lora_B, scaling, dropout, seed, compute)


class _FourBitLinear(torch.autograd.Function):
    """The operator and its gradient; the adapters' factors come last and flat."""

    BIAS, FIRST_FACTOR = 6, 13  # places among the inputs of forward

    @staticmethod
    def forward(
        ctx, x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, seed,
        format, out_features, scaling, dropout, compute, *factors,
    ):  # fmt: skip
        count = len(factors) // 2
        parts = (packed, absmax, nested_absmax, nested_code, nested_offset, *format)
        with torch._C._AutoDispatchBelowAutograd():
            y, u = FORWARD(
                x,
                *parts,
                out_features,
                bias,
                factors[:count],
                factors[count:],
                scaling,
                dropout,
                seed,
                compute,
            )
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        # Without adapters x is not needed again, but its shape is: an expanded view keeps no more than a value.
        kept = x if count else x.new_empty(1).expand(x.shape)
        ctx.save_for_backward(kept, *parts[:5], u, seed, *factors)
        ctx.settings = format, scaling, dropout, compute
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, u

    @staticmethod
    def backward(ctx, grad_y, _):
        place = _FourBitLinear.FIRST_FACTOR
        grads = [None] * len(ctx.needs_input_grad)
        if grad_y is None:
            return tuple(grads)
        want_x, want_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[_FourBitLinear.BIAS]
        saved = ctx.saved_tensors  # asked for once: activation checkpointing allows no more
        (x, *parts, u, seed), factors = saved[:8], saved[8:]
        count = len(factors) // 2
        want_factors = ctx.needs_input_grad[place:]
        if want_x or any(want_factors):
            format, scaling, dropout, compute = ctx.settings
            # Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words.
            with (
                contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
            ):
                grad_x, grad_A, grad_B = BACKWARD(
                    grad_y, x, *parts, *format, factors[:count], factors[count:], u, scaling, dropout, seed, compute,
                    want_x, want_factors[:count], want_factors[count:],
                )  # fmt: skip
            grads[0] = grad_x if want_x else None
            grads[place:] = [grad if want else None for grad, want in zip(grad_A + grad_B, want_factors)]
        if want_bias:
            grads[_FourBitLinear.BIAS] = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grads)


def _autograd(
    x, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
    out_features, bias, lora_A, lora_B, scaling, dropout, seed, compute_dtype,
):  # fmt: skip
    return _FourBitLinear.apply(
        x, packed, absmax, nested_absmax, nested_code, nested_offset, bias, seed,
        (blocksize, nested_blocksize, quant_type), out_features, scaling, dropout, compute_dtype, *lora_A, *lora_B,
    )  # fmt: skip


_library = torch.library.Library("peftfast", "IMPL")
_library.impl("fourbit_linear", _autograd, "Autograd")
refuse_second_derivative("fourbit_linear")


# ---- shapes without data ----------------------------------------------------------------------------------


@torch.library.register_fake("peftfast::fourbit_quantize")
def _(weight, blocksize, quant_type):
    count = weight.numel()
    packed = weight.new_empty((count + 1) // 2, 1, dtype=torch.uint8)
    return packed, weight.new_empty((count + blocksize - 1) // blocksize, dtype=torch.float32)


@torch.library.register_fake("peftfast::fourbit_quantize_absmax")
def _(absmax, offset, code, blocksize):
    blocks = absmax.shape[0]
    return absmax.new_empty(blocks, dtype=torch.uint8), absmax.new_empty(
        (blocks + blocksize - 1) // blocksize
    )


@torch.library.register_fake("peftfast::fourbit_dequantize")
def _(
    packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
    rows, columns, dtype,
):  # fmt: skip
    return packed.new_empty(rows, columns, dtype=DTYPES[dtype])


@torch.library.register_fake("peftfast::fourbit_linear")
def _(
    x, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
    out_features, bias, lora_A, lora_B, scaling, dropout, seed, compute_dtype,
):  # fmt: skip
    rank = sum(A.shape[0] for A in lora_A)
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], rank, dtype=torch.float32)


@torch.library.register_fake("peftfast::fourbit_linear_backward")
def _(
    grad_y, x, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
    lora_A, lora_B, u, scaling, dropout, seed, compute_dtype, want_x, want_A, want_B,
):  # fmt: skip
    features, inputs = grad_y.shape[1], x.shape[1]
    grad_A = [A.new_empty(A.shape[0] if want else 0, inputs) for A, want in zip(lora_A, want_A)]
    grad_B = [B.new_empty(features if want else 0, B.shape[1]) for B, want in zip(lora_B, want_B)]
    return x.new_empty(x.shape[0] if want_x else 0, inputs), grad_A, grad_B
