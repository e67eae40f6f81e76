"""Thin modules over the operators, for those who use no PEFT."""

from peftfast.nn.lora import LoraLinear

__all__ = ["LoraLinear"]
