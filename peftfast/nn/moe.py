"""Experts: rows sorted by expert once, and every projection over the sorted rows."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfast.ops import moe
from peftfast.ops.devices import host_reads
from peftfast.reference import FourBitWeight

__all__ = ["Routing"]


class Routing:
    """Which rows go to which expert: tokens repeated top_k times and sorted by expert.

    Attributes:
        experts: int64 [count], 0 to count - 1: group g of the sorted rows has expert g.
        offsets: int64 [count + 1], where the rows of each expert begin. Rows behind the last have no expert.
        rows: int64 [tokens * top_k], the token of each sorted row.
        places: int64 [tokens, top_k], where the rows of a token are among the sorted.
    """

    def __init__(self, top_k_index: Tensor, count: int) -> None:
        """
        Args:
            top_k_index: int64 [tokens, top_k], an expert each; from `count` on: none.
            count: of experts.
        Raises:
            ValueError: an index is negative; where values cannot be looked at, on a GPU and under torch.compile, it
                stands for no expert.
        """
        self.count, (tokens, top_k) = count, top_k_index.shape
        index = top_k_index.reshape(-1)
        readable = host_reads(index)
        if readable and index.numel() and index.min() < 0:
            raise ValueError(f"top_k_index holds {int(index.min())}, expected experts from 0 to {count - 1}.")
        sorted_index, order = torch.sort(index, stable=True)
        self.experts = torch.arange(count, device=index.device)
        bounds = torch.arange(count + 1, device=index.device)
        self.offsets = torch.searchsorted(sorted_index, bounds)
        self.rows = order // top_k if top_k else order
        self.places = torch.empty_like(order)
        self.places[order] = torch.arange(order.numel(), device=index.device)
        self.places = self.places.view(tokens, top_k)
        self._all_have_one = readable and not (index.numel() and sorted_index[-1] >= count)

    def weights(self, top_k_weights: Tensor) -> Tensor:
        """`top_k_weights` [tokens, top_k] with zeros, that get no gradient, where there is no expert."""
        if self._all_have_one:
            return top_k_weights
        without = (self.places < self.offsets[0]) | (self.places >= self.offsets[-1])
        return top_k_weights.masked_fill(without, 0.0)

    def linear(
        self,
        x: Tensor,
        weight: Tensor | FourBitWeight | None,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | Tensor = 1.0,
        *,
        slots: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        transposed: bool = False,
        gather: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """`peftfast.ops.grouped_linear` of the sorted rows.

        Args:
            x: the sorted rows [tokens * top_k, K]; with `gather` the tokens [tokens, K].
            slots: int64 [count], the adapter of each expert, -1 for none.
        Returns:
            [tokens * top_k, N], sorted.
        """
        return moe.call(
            x, weight, self.offsets, self.experts, slots, lora_A, lora_B, scaling,
            self.rows if gather else None, bias, dropout, transposed,
            compute_dtype=compute_dtype, places=self.places if gather else None,
        )  # fmt: skip

    def combined_linear(
        self,
        x: Tensor,
        top_k_weights: Tensor,
        weight: Tensor | FourBitWeight,
        lora_A: Tensor | None = None,
        lora_B: Tensor | None = None,
        scaling: float | Tensor = 1.0,
        *,
        slots: Tensor | None = None,
        bias: Tensor | None = None,
        dropout: float = 0.0,
        transposed: bool = False,
        activation: str | None = None,
    ) -> Tensor:
        """`combine` of `linear` of x, or of `peftfast.ops.swiglu` of the halves of x with this `activation`.

        Backward keeps x, and nothing of what comes of it. What a row without an expert says is zero, and so is what
        goes back through it: its weight counts for nothing, if only it is finite.

        Args:
            x: the sorted rows [tokens * top_k, K], or [tokens * top_k, 2 K] with an activation.
        Returns:
            [tokens, N]
        """
        return moe.call_combined(
            x, top_k_weights, self.places, self.rows, weight, self.offsets, self.experts, slots,
            lora_A, lora_B, scaling, bias, dropout, transposed, activation=activation,
        )  # fmt: skip

    def repeat(self, x: Tensor) -> Tensor:
        """The sorted rows [tokens * top_k, N] of the tokens x [tokens, N]."""
        return moe.repeat(x, self.rows, self.places)

    def combine(self, x: Tensor, top_k_weights: Tensor) -> Tensor:
        """`peftfast.ops.moe_combine` of the sorted rows x [tokens * top_k, N]: [tokens, N]."""
        return moe.combine(x, self.weights(top_k_weights), self.places)
