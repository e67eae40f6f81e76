"""The norm and the gated activation of a decoder layer as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfast import reference
from peftfast.ops import rms_norm, swiglu
from peftfast.ops.lora import DTYPES
from peftfast.reference import ACTIVATIONS


class RMSNorm(nn.Module):
    """x / sqrt(mean of its squares + eps) * (offset + weight); see `peftfast.ops.rms_norm`.

    Attributes:
        weight: [hidden_size]; it starts where offset + weight is 1.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        *,
        cast_first: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.offset, self.cast_first = eps, offset, cast_first
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - offset, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] -> the same shape, float64 included."""
        run = rms_norm if x.dtype in DTYPES else reference.rms_norm
        return run(x, self.weight, self.eps, self.offset, cast_first=self.cast_first)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}, cast_first={self.cast_first}"


class SwiGLU(nn.Module):
    """activation(gate) * up; see `peftfast.ops.swiglu`.

    Raises:
        ValueError: there is no such activation.
    """

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}.")
        self.activation = activation

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate and up side by side [..., 2 I] -> [..., I], float64 included."""
        gate, up = gate_up.chunk(2, dim=-1)
        run = swiglu if gate_up.dtype in DTYPES else reference.swiglu
        return run(gate, up, activation=self.activation)

    def extra_repr(self) -> str:
        return self.activation
