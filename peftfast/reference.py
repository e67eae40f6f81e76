"""Every operator in plain torch: the specification, the oracle of the tests, and the path for devices with no kernel.

Names and signatures are those of `peftfast.ops`. Any floating dtype works, float64 included, and gradients are
autograd's. Nothing here is written for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
