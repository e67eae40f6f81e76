"""Thin modules over the operators, for those who use no PEFT."""

from peftfast.nn.adapter import BottleneckAdapter
from peftfast.nn.attention import Attention
from peftfast.nn.eightbit import Embedding8bit, Linear8bit
from peftfast.nn.embeddings import quantize_embeddings
from peftfast.nn.fourbit import Embedding4bit, Linear4bit, quantize_linears
from peftfast.nn.lora import LoraLinear
from peftfast.nn.rowwise import RMSNorm, SwiGLU

__all__ = [
    "Attention",
    "BottleneckAdapter",
    "Embedding4bit",
    "Embedding8bit",
    "Linear4bit",
    "Linear8bit",
    "LoraLinear",
    "RMSNorm",
    "SwiGLU",
    "quantize_embeddings",
    "quantize_linears",
]
