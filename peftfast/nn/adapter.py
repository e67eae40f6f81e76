"""A bottleneck adapter as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftfast import reference
from peftfast.ops import bottleneck_adapter
from peftfast.ops.lora import DTYPES

NORMAL_STD = 1e-2  # of the weights with init="normal", as in Houlsby et al.


class BottleneckAdapter(nn.Module):
    """residual + scaling * up(dropout(activation(down(norm(x))))); see `peftfast.ops.bottleneck_adapter`.

    Attributes:
        down_weight, down_bias: [bottleneck_size, hidden_size] and [bottleneck_size].
        up_weight, up_bias: [hidden_size, bottleneck_size] and [hidden_size].
        norm_weight, norm_bias: [hidden_size], or None without `layer_norm`.
        scaling: a number; a parameter of one element, which starts at 1, with scaling="learned".

    Args:
        init: "zero": down Kaiming-uniform and up zero, so that the module starts as the identity of its residual (He
            et al., ICLR 2022). "normal": both from a normal distribution of deviation 0.01, so that it starts near it
            (Houlsby et al., ICML 2019).
    Raises:
        TypeError, ValueError: an argument is not usable; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str = "relu",
        scaling: float | str = 1.0,
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        init: str = "zero",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_options(activation, scaling, dropout, init)
        for name, size in dict(hidden_size=hidden_size, bottleneck_size=bottleneck_size).items():
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}.")

        def vector(size: int, value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((size,), value, dtype=dtype, device=device))

        self.hidden_size, self.bottleneck_size = hidden_size, bottleneck_size
        self.activation, self.norm_eps, self.dropout = activation, norm_eps, dropout
        self.down_weight = nn.Parameter(torch.empty(bottleneck_size, hidden_size, dtype=dtype, device=device))
        self.up_weight = nn.Parameter(torch.zeros(hidden_size, bottleneck_size, dtype=dtype, device=device))
        self.down_bias, self.up_bias = vector(bottleneck_size, 0.0), vector(hidden_size, 0.0)
        self.norm_weight = vector(hidden_size, 1.0) if layer_norm else None
        self.norm_bias = vector(hidden_size, 0.0) if layer_norm else None
        self.scaling = vector(1, 1.0) if scaling == "learned" else float(scaling)
        if init == "zero":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.down_weight, std=NORMAL_STD)
            nn.init.normal_(self.up_weight, std=NORMAL_STD)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., hidden_size] and residual of its shape -> the same shape and the dtype of x, float64 included."""
        run = bottleneck_adapter if x.dtype in DTYPES else reference.bottleneck_adapter
        return run(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            activation=self.activation,
            scaling=self.scaling,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            norm_eps=self.norm_eps,
            dropout=self.dropout if self.training else 0.0,
            residual=residual,
        )

    def extra_repr(self) -> str:
        scaling = "learned" if isinstance(self.scaling, Tensor) else f"{self.scaling:g}"
        return (
            f"hidden_size={self.hidden_size}, bottleneck_size={self.bottleneck_size}, activation={self.activation}, "
            f"scaling={scaling}, layer_norm={self.norm_weight is not None}, dropout={self.dropout}"
        )


def check_options(activation: str, scaling: float | str, dropout: float, init: str) -> None:
    """Raises TypeError or ValueError, which names the option, for what no adapter can have."""
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(reference.ACTIVATIONS)}.")
    if scaling != "learned":
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            raise TypeError(f"scaling is {scaling!r}, expected a number or 'learned'.")
        if not math.isfinite(scaling):
            raise ValueError(f"scaling is {scaling!r}, expected a finite number or 'learned'.")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout is {dropout!r}, expected a number.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}, expected a probability in [0, 1).")
    if init not in ("zero", "normal"):
        raise ValueError(f"init is {init!r}, expected 'zero' or 'normal'.")
