"""Thin modules over the operators, for those who use no PEFT."""

from peftfast.nn.adapter import BottleneckAdapter
from peftfast.nn.fourbit import Linear4bit, quantize_linears
from peftfast.nn.lora import LoraLinear
from peftfast.nn.rowwise import RMSNorm, SwiGLU

__all__ = ["BottleneckAdapter", "Linear4bit", "LoraLinear", "RMSNorm", "SwiGLU", "quantize_linears"]
