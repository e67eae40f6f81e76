"""Frozen layers over an 8-bit weight, a linear one and an embedding, in bitsandbytes' row-wise format, without it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from peftfast.nn.quantized import QuantizedEmbedding, QuantizedLayer, QuantizedLinear
from peftfast.ops import (
    EightBitWeight,
    eightbit_dequantize,
    eightbit_embedding,
    eightbit_linear,
    eightbit_quantize,
)
from peftfast.ops.eightbit import check_weight

SCALES = "SCB"  # bitsandbytes' name, in the layer and in checkpoints


class EightBitLayer(QuantizedLayer):
    """Keeps a weight in 8 bits.

    Attributes:
        weight: int8, of the layer's `shape`, frozen.
        SCB: float32 [rows], the largest magnitude of each row; None: the layer is empty.
    """

    bits = 8
    encode = staticmethod(eightbit_quantize)

    def _init_weight(self, device: torch.device | str | None) -> None:
        codes = torch.empty(self.shape, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer(SCALES, None)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has filled the weight yet."""
        return self.SCB is None

    @property
    def quantized_weight(self) -> EightBitWeight:
        """The weight as the operators take it, for every call anew: parameters are replaced at any time.

        Raises:
            RuntimeError: the layer is empty.
        """
        if self.SCB is None:
            raise RuntimeError(
                f"The {type(self).__name__} has no weight yet: fill it by load_state_dict or set_weight."
            )
        return EightBitWeight(self.weight, self.SCB)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, of the layer's `shape`, in `dtype`; None: float32."""
        return eightbit_dequantize(self.quantized_weight, dtype or torch.float32)

    def assign(self, quantized: EightBitWeight) -> None:
        """Makes `quantized`, of this layer's shape, the weight: shared and not copied, in a new parameter."""
        self.weight = nn.Parameter(quantized.codes.detach(), requires_grad=False)
        self.SCB = quantized.absmax.detach()

    @torch.no_grad()
    def refill(self, quantized: EightBitWeight) -> None:
        """Makes a copy of `quantized` the weight in place, for layers that share it too, as torch loads a dense one."""
        if self.is_empty or self.weight.is_meta:
            quantized = copy.deepcopy(quantized)
            self.assign(quantized if self.weight.is_meta else quantized.to(self.weight.device))
            return
        self.weight.copy_(quantized.codes)
        self.SCB.copy_(quantized.absmax)

    def share(self, other: EightBitLayer) -> None:
        """Makes the weight of `other` that of this layer too: the same parameter, the same scales.

        Raises:
            ValueError: it has another format or shape.
        """
        self.check_format_of(other)
        self.weight, self.SCB = other.weight, other.SCB

    def _apply(self, fn, recurse: bool = True) -> EightBitLayer:
        """Where `.to`, `.half` and the like end: the scales move with the weight and are never cast."""
        scales = self.SCB
        super()._apply(fn, recurse)
        if scales is not None:
            # The meta device holds no values: empty again.
            self.SCB = None if self.weight.is_meta and not scales.is_meta else scales.to(self.weight.device)
        return self

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Reads and checks all that is this layer's before it assigns any of it.

        Raises:
            ValueError: the entries of the weight do not fit together or not this layer; the message names the tensor.
        """
        # "weight_format" is what bitsandbytes says of the order of the codes: always 0, by rows.
        names = [prefix + entry for entry in ("weight", SCALES, "weight_format")]
        weight, scales, order = map(state_dict.get, names)
        others = {key: value for key, value in state_dict.items() if key not in names}
        if weight is not None or scales is not None:
            quantized = unpack_state(weight, scales, self.shape, names)
            if order is not None and int(order) != 0:
                raise ValueError(f"{names[2]} is {int(order)}, expected 0: codes by rows.")
        errors = len(error_msgs)
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if weight is None or len(error_msgs) > errors:
            return
        for name in names[:2]:
            if name in missing_keys:
                missing_keys.remove(name)
        if local_metadata.get("assign_to_params_buffers", False):
            self.assign(quantized)
        else:
            self.refill(quantized)


class Linear8bit(EightBitLayer, QuantizedLinear):
    """y = x W^T + bias with a frozen W in 8 bits, a scale to a row   (Dettmers et al., LLM.int8(), NeurIPS 2022).

    The codes and scales, and their names in a `state_dict`, are those of `bitsandbytes.nn.Linear8bitLt` (which rounds a
    weight to float16 before), but x stays as it is: W is decoded in the dtype of x, a panel at a time. It is meant for
    the output head of a model. Casting the module casts the bias alone. `Linear8bit(...)` is empty until
    `load_state_dict` or `set_weight` fills it; `from_linear` makes one that is filled.

    Attributes:
        weight: int8 [out_features, in_features], frozen.
        SCB: float32 [out_features], the largest magnitude of each row; None: the layer is empty.
        bias: [out_features] or None, frozen.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `dtype` is that of the bias."""
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_weight(device)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Linear8bit:
        """`linear` with its weight in 8 bits; the bias is shared.

        Raises:
            TypeError, ValueError: `linear` is no dense layer, or its weight is not finite.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantizedLayer):
            raise TypeError(f"linear must be a dense torch.nn.Linear, got {type(linear).__name__}.")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.assign(layer.quantize(linear.weight))
        layer.share_bias(linear.bias)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        return eightbit_linear(x, self.quantized_weight, bias=self.bias_for(x))


class Embedding8bit(EightBitLayer, QuantizedEmbedding):
    """`nn.Embedding` with a frozen weight in 8 bits, a scale to a row; only rows that are asked for are dequantized.

    `Embedding8bit(...)` is empty until `load_state_dict` or `set_weight` fills it; `from_embedding` makes one that is
    filled.

    Attributes:
        weight: int8 [num_embeddings, embedding_dim], frozen.
        SCB: float32 [num_embeddings], the largest magnitude of each row; None: the layer is empty.
        dtype: of what comes out; casting the module changes it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer.

        Raises:
            TypeError, ValueError: an argument is not usable; the message names it.
        """
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self._init_weight(device)

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> [..., embedding_dim]."""
        return eightbit_embedding(input, self.quantized_weight, self.dtype)


def unpack_state(
    weight: Tensor | None, scales: Tensor | None, shape: tuple[int, int], names: list[str]
) -> EightBitWeight:
    """The weight of `shape` from its two entries in a checkpoint, whose names these are.

    Raises:
        ValueError: an entry is missing, or does not fit the other or `shape`; the message names it.
    """
    for name, entry in zip(names, (weight, scales)):
        if entry is None:
            raise ValueError(f"{name} is missing.")
    if weight.shape != shape:
        raise ValueError(f"{names[0]} has shape {list(weight.shape)}, expected {list(shape)}.")
    if not (scales.is_meta or (scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"{names[1]} holds values that are no magnitudes: negative, NaN or infinity.")
    quantized = EightBitWeight(weight, scales)
    try:
        check_weight(quantized, names[0])
    except TypeError as error:
        raise ValueError(str(error)) from None
    return quantized
