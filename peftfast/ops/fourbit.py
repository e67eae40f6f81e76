"""Linear layers over 4-bit weights in bitsandbytes' format: quantize, dequantize, and multiply with LoRA adapters."""

from __future__ import annotations

from peftfast.reference import (  # placeholder until the kernels are in
    FourBitWeight,
    NestedAbsmax,
    fourbit_dequantize,
    fourbit_linear,
    fourbit_quantize,
)

__all__ = ["FourBitWeight", "NestedAbsmax", "call", "fourbit_dequantize", "fourbit_linear", "fourbit_quantize"]


def call(x, weight, lora_A, lora_B, scaling, bias, dropout, seed=None, compute_dtype=None):
    """`fourbit_linear` for a caller whose arguments are lists and right: no checks but those that guard memory."""
    return fourbit_linear(
        x, weight, lora_A, lora_B, scaling, bias=bias, dropout=dropout, seed=seed, compute_dtype=compute_dtype
    )
