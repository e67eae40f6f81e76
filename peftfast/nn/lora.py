"""A frozen linear layer with one LoRA adapter."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from peftfast.ops import lora_linear


class LoraLinear(nn.Module):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T, with W and bias frozen   (Hu et al., LoRA, ICLR 2022).

    Attributes:
        weight: [out_features, in_features], frozen; shared with the layer that it came from.
        bias: [out_features] or None, frozen.
        lora_A: [r, in_features], trained; starts Kaiming-uniform.
        lora_B: [out_features, r], trained; starts at zero, so that the layer starts as its base.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.
        merged: whether `weight` holds the adapter's contribution.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if weight.dim() != 2:
            raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}.")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a whole number of at least 1, got {r!r}.")
        if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
            raise TypeError(f"lora_alpha must be a number, got {type(lora_alpha).__name__}.")
        if not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout}, expected a probability in [0, 1).")
        if dtype not in (weight.dtype, torch.float32):
            raise TypeError(f"dtype is {dtype}, expected {weight.dtype} or torch.float32.")
        self.out_features, self.in_features = weight.shape
        self.r, self.lora_dropout = r, lora_dropout
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.merged = False
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options) -> LoraLinear:
        """An adapter of rank `r` on `linear`, whose weight and bias are shared, not copied.

        Args:
            linear: the layer to adapt.
            r: rank of the adapter.
            options: lora_alpha, lora_dropout, use_rslora and dtype (of the adapter), as in the class.
        Raises:
            TypeError, ValueError: an argument is not usable; the message names it.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}.")
        return cls(linear.weight, linear.bias, r=r, **options)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        dropout = self.lora_dropout if self.training else 0.0
        return lora_linear(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, bias=self.bias, dropout=dropout
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Adds scaling * B A to `weight`, in place and rounded once: the layer then costs what its base does."""
        if not self.merged:
            self.weight += self._delta()  # in place: rounded once
            self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes scaling * B A out of `weight` again; in 16 bits the weight may stay a rounding off."""
        if self.merged:
            self.weight -= self._delta()
            self.merged = False

    def _delta(self) -> Tensor:
        return self.lora_B.float() @ self.lora_A.float() * self.scaling

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, scaling={self.scaling:g}, lora_dropout={self.lora_dropout}, merged={self.merged}"
        )
