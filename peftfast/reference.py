"""Every operator in plain torch: the specification, the oracle of the tests, and the path for devices with no kernel.

Names and signatures are those of `peftfast.ops`. Any floating dtype works, float64 included, and gradients are
autograd's. Nothing here is written for speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
WORD = 0xFFFFFFFF


def _multiply_words(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a * b, in int64 tensors that never overflow: `b` is taken in two halves."""
    low_part = a * (b & 0xFFFF)
    high_part = a * (b >> 16) + (low_part >> 16)
    return high_part >> 16, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counters: Tensor, adapter: int, seed: Tensor | int) -> Tensor:
    """Four random 32-bit words of each counter by Philox 4x32-10 (Salmon et al., SC 2011).

    Args:
        counters: int64 [n].
        adapter: the third word of the counter.
        seed: the key, 64 bits.
    Returns:
        int64 [n, 4], values in [0, 2**32).
    """
    seed = int(seed)
    key = [seed & WORD, (seed >> 32) & WORD]
    c = [counters & WORD, counters >> 32, torch.full_like(counters, adapter), torch.zeros_like(counters)]
    for _ in range(PHILOX_ROUNDS):
        high0, low0 = _multiply_words(c[0], PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply_words(c[2], PHILOX_MULTIPLIERS[1])
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(k + w) & WORD for k, w in zip(key, PHILOX_WEYL)]
    return torch.stack(c, dim=1)


def dropout_mask(shape: Sequence[int], dropout: float, seed: Tensor | int, adapter: int = 0) -> Tensor:
    """The elements that dropout keeps: bool tensor of `shape`, on the CPU.

    Element i, counted in row-major order, is kept when word i % 4 of counter (i // 4, adapter) is at least
    dropout * 2**32.
    """
    count = 1
    for size in shape:
        count *= size
    words = philox(torch.arange((count + 3) // 4), adapter, seed).flatten()[:count]
    return (words >= min(round(dropout * 2**32), WORD)).reshape(tuple(shape))


def as_list(value, count: int) -> list:
    """One entry per adapter: `value` itself when it is a sequence, else repeated."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    *,
    bias: Tensor | None = None,
    dropout: float | Sequence[float] = 0.0,
    transposed: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + sum over adapters of scaling * dropout(x) A^T B^T; see `peftfast.ops.lora_linear`.

    The low-rank part is computed in the adapter's dtype and added before the one rounding to x's dtype.
    """
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    scaling, dropout = as_list(scaling, len(lora_A)), as_list(dropout, len(lora_A))
    if seed is None and any(dropout):
        seed = torch.randint(2**63 - 1, (1,))
    y = x @ (weight if transposed else weight.T)
    if bias is not None:
        y = y + bias
    for index, (A, B, s, p) in enumerate(zip(lora_A, lora_B, scaling, dropout)):
        z = x.to(A.dtype)
        if p > 0:
            # The counter runs over x seen as a matrix, which is x in row-major order.
            z = z * dropout_mask(x.shape, p, seed, index).to(x.device) / (1 - p)
        y = y + z @ A.T @ B.T * s
    return y.to(x.dtype)


# ---- 4-bit weights ----------------------------------------------------------------------------------------

# What the 16 codes stand for. NF4: quantiles of the normal distribution (Dettmers et al., QLoRA, NeurIPS 2023). FP4:
# sign, two bits of exponent, one of fraction, scaled to a maximum of 1.
FOURBIT_CODEBOOKS = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
}  # fmt: skip
# The codes in ascending order of what they stand for; of FP4's two zeros, -0 counts as the larger.
FOURBIT_ORDER = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
FOURBIT_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256


@dataclass(frozen=True)
class NestedAbsmax:
    """How the 8-bit codes of a doubly quantized absmax are read: code[q] * absmax[block] + offset.

    Attributes:
        absmax: float32 [ceil(blocks / blocksize)].
        code: float32 [256], ascending.
        offset: float32, one element.
        blocksize: codes to one entry of absmax.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int = NESTED_BLOCKSIZE


@dataclass(frozen=True)
class FourBitWeight:
    """A weight in bitsandbytes' 4-bit format: a code of 4 bits per element, one scale per block of the flat weight.

    Attributes:
        packed: the codes of the flattened weight, two to a byte, the first in the high half; any shape and dtype
            whose bytes are these.
        absmax: float32 [blocks], the largest magnitude of each block; uint8 when `nested` says how to read it.
        shape: of the weight, [N, K] for a linear layer.
        dtype: of the weight before it was quantized.
        quant_type: "nf4" or "fp4".
        blocksize: elements to one entry of absmax.
    """

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str = "nf4"
    blocksize: int = 64
    nested: NestedAbsmax | None = None

    def tensors(self) -> list[Tensor]:
        """All of it that is in memory."""
        nested = [self.nested.absmax, self.nested.code, self.nested.offset] if self.nested else []
        return [self.packed, self.absmax, *nested]

    def map(self, function: Callable[[Tensor], Tensor]) -> FourBitWeight:
        """The same weight with what `function` makes of each of its tensors."""
        packed, absmax, *nested = map(function, self.tensors())
        how = replace(self.nested, **dict(zip(("absmax", "code", "offset"), nested))) if nested else None
        return replace(self, packed=packed, absmax=absmax, nested=how)

    def to(self, device: torch.device | str) -> FourBitWeight:
        """The same weight with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """What its tensors take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors())


def dynamic_code() -> Tensor:
    """The 256 values that bitsandbytes' 8-bit codes of absmax stand for, ascending: float32 [256], on the CPU.

    Seven decades; the n-th from below is cut into 2**n parts, each represented by its middle, of either sign; with 0
    and 1 (Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, ICLR 2016).
    """
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        middles = (10 ** (decade - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += middles + [-value for value in middles]
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def fourbit_quantize(
    weight: Tensor, *, quant_type: str = "nf4", blocksize: int = 64, nested: bool = True
) -> FourBitWeight:
    """`weight` in 4 bits; see `peftfast.ops.fourbit_quantize`."""
    flat = weight.detach().reshape(-1).float()
    tail = flat.numel() % blocksize
    blocks = torch.nn.functional.pad(flat, (0, blocksize - tail if tail else 0)).view(-1, blocksize)
    absmax = blocks.abs().amax(1) if blocks.numel() else flat.new_empty(0)
    divisor = absmax.clamp(min=1e-38)
    scaled = blocks * (1.0 / divisor).unsqueeze(1)
    if tail:  # bitsandbytes divides in a block that is not full, and keeps the divisor
        scaled[-1] = blocks[-1] / divisor[-1]
        absmax[-1] = divisor[-1]
    order = torch.tensor(FOURBIT_ORDER[quant_type], device=flat.device)
    levels = torch.tensor(FOURBIT_CODEBOOKS[quant_type], device=flat.device)[order]
    codes = order[torch.bucketize(scaled.clamp(-1, 1).view(-1), (levels[:-1] + levels[1:]) / 2)]
    codes = codes[: flat.numel()].to(torch.uint8)
    if codes.numel() % 2:  # the code of zero fills the last byte
        codes = torch.cat([codes, codes.new_tensor([FOURBIT_ORDER[quant_type][7]])])
    packed = (codes[::2] << 4 | codes[1::2]).unsqueeze(1)
    how = None
    if nested:
        offset = absmax.mean()
        absmax, how = _quantize_absmax(absmax - offset, offset)
    return FourBitWeight(packed, absmax, tuple(weight.shape), weight.dtype, quant_type, blocksize, how)


def _quantize_absmax(centered: Tensor, offset: Tensor) -> tuple[Tensor, NestedAbsmax]:
    """8-bit codes of absmax - offset. As bitsandbytes does, values are first placed on a grid of 65536 points."""
    size, code = NESTED_BLOCKSIZE, dynamic_code().to(centered.device)
    tail = centered.numel() % size
    blocks = torch.nn.functional.pad(centered, (0, size - tail if tail else 0)).view(-1, size)
    absmax = blocks.abs().amax(1) if blocks.numel() else centered.new_empty(0)
    inverse = torch.where(absmax > 0, 1.0 / absmax, 0.0)
    unit = (blocks * inverse.unsqueeze(1)).clamp(-1, 1).nan_to_num(-1.0)  # 0 times the inverse of a subnormal
    place = (((unit + 1) * 0.5).double() * 65535 + 0.5).float().long()
    grid = -1 + torch.arange(0, 131072, 2, device=code.device).float() / 65535
    codes = torch.bucketize(grid, (code[:-1] + code[1:]) / 2).to(torch.uint8)[place]
    codes[absmax == 0] = 0
    return codes.view(-1)[: centered.numel()], NestedAbsmax(absmax, code, offset)


def fourbit_absmax(weight: FourBitWeight) -> Tensor:
    """The scale of each block, float32 [blocks], whether it is stored so or quantized itself."""
    nested = weight.nested
    if nested is None:
        return weight.absmax.float()
    scale = nested.absmax.repeat_interleave(nested.blocksize)[: weight.absmax.numel()]
    return nested.code[weight.absmax.long()] * scale + nested.offset


def fourbit_dequantize(weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of `shape`: code * absmax in fp32, rounded once to `dtype` (default: the weight's own)."""
    count = math.prod(weight.shape)
    packed = weight.packed.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count].long()
    scale = fourbit_absmax(weight).repeat_interleave(weight.blocksize)[:count]
    codebook = torch.tensor(FOURBIT_CODEBOOKS[weight.quant_type], device=packed.device)
    return (codebook[codes] * scale).to(dtype or weight.dtype).view(weight.shape)


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
    """`lora_linear` over a 4-bit weight; see `peftfast.ops.fourbit_linear`."""
    compute_dtype = compute_dtype or x.dtype
    dense = fourbit_dequantize(weight, compute_dtype)
    none = x.new_empty(0, x.shape[-1]), x.new_empty(weight.shape[0], 0)
    y = lora_linear(x.to(compute_dtype), dense, *none, 0.0, bias=bias).to(x.dtype)
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    if not lora_A:
        return y
    # The adapters see x as it is, the base sees it in compute_dtype.
    zero = x.new_zeros(weight.shape)
    return y + lora_linear(x, zero, lora_A, lora_B, scaling, dropout=dropout, seed=seed)


def fourbit_embedding(ids: Tensor, weight: FourBitWeight, dtype: torch.dtype | None = None) -> Tensor:
    """The rows `ids` of a 4-bit weight; see `peftfast.ops.fourbit_embedding`."""
    return fourbit_dequantize(weight, dtype)[ids]


# ---- 8-bit weights ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EightBitWeight:
    """A weight in bitsandbytes' row-wise 8-bit format: row i is codes[i] * absmax[i] / 127.

    Attributes:
        codes: int8 [N, K] in [-127, 127]; "CB" to bitsandbytes.
        absmax: float32 [N], the largest magnitude of each row; "SCB".
    """

    codes: Tensor
    absmax: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.codes.shape)

    def tensors(self) -> list[Tensor]:
        """All of it that is in memory."""
        return [self.codes, self.absmax]

    def map(self, function: Callable[[Tensor], Tensor]) -> EightBitWeight:
        """The same weight with what `function` makes of each of its tensors."""
        return EightBitWeight(function(self.codes), function(self.absmax))

    def to(self, device: torch.device | str) -> EightBitWeight:
        """The same weight with its tensors on `device`."""
        return self.map(lambda tensor: tensor.to(device))

    @property
    def nbytes(self) -> int:
        """What its tensors take in memory."""
        return self.codes.nbytes + self.absmax.nbytes


def eightbit_quantize(weight: Tensor) -> EightBitWeight:
    """`weight` [N, K] in 8 bits; see `peftfast.ops.eightbit_quantize`."""
    rows = weight.detach().float()
    absmax = rows.abs().amax(1) if rows.numel() else rows.new_zeros(len(rows))
    # A row of zeros, and one so small that its scale overflows, where bitsandbytes casts NaN and infinity to int8.
    scaled = (rows * (127.0 / absmax).unsqueeze(1)).nan_to_num(0.0)
    return EightBitWeight(scaled.round_().clamp_(-127, 127).to(torch.int8), absmax)


def eightbit_dequantize(weight: EightBitWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """code * absmax / 127 in fp32, rounded once to `dtype`; the division is bitsandbytes' multiplication."""
    rows = weight.codes.detach().to(torch.float32).mul_(weight.absmax.unsqueeze(1))
    return rows.mul_(7.874015718698502e-3).to(dtype)


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
    """`lora_linear` over an 8-bit weight; see `peftfast.ops.eightbit_linear`."""
    return lora_linear(
        x,
        eightbit_dequantize(weight, x.dtype),
        lora_A,
        lora_B,
        scaling,
        bias=bias,
        dropout=dropout,
        seed=seed,
    )


def eightbit_embedding(ids: Tensor, weight: EightBitWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows `ids` of an 8-bit weight; see `peftfast.ops.eightbit_embedding`."""
    return eightbit_dequantize(weight, dtype)[ids]


# ---- groups of rows ------------------------------------------------------------------------------------------


def grouped_linear(
    x: Tensor,
    weight: Tensor | FourBitWeight | None,
    offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    experts: Tensor | None = None,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    transposed: bool = False,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`lora_linear` of each group of rows; see `peftfast.ops.grouped_linear`."""
    compute_dtype = compute_dtype or x.dtype
    if isinstance(weight, FourBitWeight):
        weight = fourbit_dequantize(weight, compute_dtype)
    if rows is not None:
        x = x[rows]
    dropped = x
    if lora_A is not None:
        dropped = x.to(lora_A.dtype)
        if dropout > 0:
            seed = torch.randint(2**63 - 1, (1,)) if seed is None else seed
            dropped = dropped * dropout_mask(x.shape, dropout, seed).to(x.device) / (1 - dropout)
    features = lora_B.shape[1] if weight is None else weight.shape[2 if transposed else 1]
    y = x.new_zeros(x.shape[0], features)
    for g in range(offsets.numel() - 1):
        group = slice(int(offsets[g]), int(offsets[g + 1]))
        expert = g if experts is None else int(experts[g])
        slot = g if slots is None else int(slots[g])
        part = x.new_zeros(group.stop - group.start, features)
        if weight is not None:
            W = weight[expert] if transposed else weight[expert].T
            part = x[group].to(compute_dtype) @ W.to(compute_dtype)
        if bias is not None:
            part = part + bias[expert]
        if lora_A is not None and slot >= 0:
            part = part + dropped[group] @ lora_A[slot].T @ lora_B[slot].T * scaling
        y = y.index_copy(0, torch.arange(group.start, group.stop, device=x.device), part.to(x.dtype))
    return y


def moe_combine(x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * x[places[t, k]]; see `peftfast.ops.moe_combine`."""
    return (x[places] * weights.unsqueeze(-1)).sum(1).to(x.dtype)


# ---- bottleneck adapters -----------------------------------------------------------------------------------------

ACTIVATIONS = {
    "identity": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}


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
    """residual + scaling * up(dropout(activation(down(norm(x))))); see `peftfast.ops.bottleneck_adapter`.

    Computed in the dtype of the weights, rounded once to that of x.
    """

    def like_weight(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.to(down_weight.dtype)

    z = x.to(down_weight.dtype)
    if norm_weight is not None:
        z = F.layer_norm(z, z.shape[-1:], like_weight(norm_weight), like_weight(norm_bias), norm_eps)
    z = ACTIVATIONS[activation](F.linear(z, down_weight, like_weight(down_bias)))
    if dropout > 0:
        seed = torch.randint(2**63 - 1, (1,)) if seed is None else seed
        z = z * dropout_mask(z.shape, dropout, seed).to(x.device) / (1 - dropout)
    y = F.linear(z, up_weight, like_weight(up_bias)) * scaling
    return (y if residual is None else residual + y).to(x.dtype)


# ---- between the products of a decoder layer ----------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu") -> Tensor:
    """activation(gate) * up; see `peftfast.ops.swiglu`."""
    return ACTIVATIONS[activation](gate) * up


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, offset: float = 0.0, *, cast_first: bool = True
) -> Tensor:
    """x / sqrt(mean of its squares + eps) * (offset + weight), in at least float32; see `peftfast.ops.rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if cast_first or weight is None:
        normalized = normalized.to(x.dtype)
    if weight is None:
        return normalized
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_first else x.dtype
    return (normalized.to(wide.dtype) * (offset + weight.to(wide.dtype))).to(dtype)


# ---- attention --------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v over the keys that a query sees; see `peftfast.ops.attention`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).repeat_interleave(q.shape[1] // max(x.shape[1], 1), dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask
    # Scores of what is not seen stay finite, so that a query that sees nothing has a gradient: of zeros.
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(wide).min), dim=-1) * seen
    return (weights @ v).to(q.dtype)


# ---- the loss of a language model -------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | FourBitWeight | EightBitWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_A: Tensor | Sequence[Tensor] = (),
    lora_B: Tensor | Sequence[Tensor] = (),
    scaling: float | Tensor | Sequence[float | Tensor] = (),
    dropout: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross-entropy of the logits of a linear layer; see `peftfast.ops.linear_cross_entropy`.

    The logits are rounded to the dtype of hidden, and widened to at least float32, as in transformers.
    """
    adapters = dict(bias=bias, dropout=dropout, seed=seed)
    if isinstance(weight, Tensor):
        logits = lora_linear(hidden, weight, lora_A, lora_B, scaling, **adapters)
    elif isinstance(weight, EightBitWeight):
        logits = eightbit_linear(hidden, weight, lora_A, lora_B, scaling, **adapters)
    else:
        logits = fourbit_linear(
            hidden, weight, lora_A, lora_B, scaling, compute_dtype=compute_dtype, **adapters
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if num_items_in_batch is not None:
        reduction = "sum"
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    if num_items_in_batch is not None:
        return loss / num_items_in_batch
    return loss.view(labels.shape) if reduction == "none" else loss
