"""The operators. Each is a typed function over a `torch.library` operator of the namespace `peftfast`."""

from peftfast.ops.lora import lora_linear

__all__ = ["lora_linear"]
