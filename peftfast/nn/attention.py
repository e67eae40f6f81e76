"""Softmax attention as a module."""

from __future__ import annotations

from torch import Tensor, nn

from peftfast import reference
from peftfast.ops import attention
from peftfast.ops.lora import DTYPES


class Attention(nn.Module):
    """softmax(scale * q k^T) v of each head, over the keys that a query sees; see `peftfast.ops.attention`."""

    def __init__(self, *, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.causal, self.scale = causal, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q [B, H, T, D], k and v [B, kv_heads, S, D], a bool mask -> the shape of q, float64 included."""
        run = attention if q.dtype in DTYPES else reference.attention
        return run(q, k, v, mask=mask, causal=self.causal, scale=self.scale)

    def extra_repr(self) -> str:
        return f"causal={self.causal}, scale={self.scale}"
