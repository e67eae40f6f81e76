"""The operators. Each is a typed function over a `torch.library` operator of the namespace `peftfast`."""

from peftfast.ops.adapter import bottleneck_adapter
from peftfast.ops.attention import attention
from peftfast.ops.eightbit import (
    EightBitWeight,
    eightbit_dequantize,
    eightbit_embedding,
    eightbit_linear,
    eightbit_quantize,
)
from peftfast.ops.fourbit import (
    FourBitWeight,
    NestedAbsmax,
    fourbit_dequantize,
    fourbit_embedding,
    fourbit_linear,
    fourbit_quantize,
)
from peftfast.ops.lora import lora_linear
from peftfast.ops.loss import linear_cross_entropy
from peftfast.ops.moe import grouped_linear, moe_combine
from peftfast.ops.rowwise import rms_norm, swiglu

__all__ = [
    "EightBitWeight",
    "FourBitWeight",
    "NestedAbsmax",
    "attention",
    "bottleneck_adapter",
    "eightbit_dequantize",
    "eightbit_embedding",
    "eightbit_linear",
    "eightbit_quantize",
    "fourbit_dequantize",
    "fourbit_embedding",
    "fourbit_linear",
    "fourbit_quantize",
    "grouped_linear",
    "linear_cross_entropy",
    "lora_linear",
    "moe_combine",
    "rms_norm",
    "swiglu",
]
