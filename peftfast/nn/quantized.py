"""What frozen layers over a quantized weight have in common, whatever its format: linear layers and embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfast.ops import EightBitWeight, FourBitWeight
from peftfast.ops.lora import DTYPES, name_of


class QuantizedLayer(nn.Module):
    """A frozen layer over a quantized weight.

    What depends on its format is of the classes that derive from it: `bits`; `is_empty`, whether nothing has filled the
    weight yet; `quantized_weight`, the weight as the operators take it; `encode` and `dequantize`; `assign`, which
    makes a weight the layer's; `refill`, which does so for all that share it; and `share`, which makes that of another
    layer its own, the same parameter.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """That of the dense weight: [out_features, in_features], or [num_embeddings, embedding_dim]."""
        if isinstance(self, nn.Embedding):
            return self.num_embeddings, self.embedding_dim
        return self.out_features, self.in_features

    @torch.no_grad()
    def set_weight(self, dense: Tensor) -> float:
        """Quantizes `dense` into this layer, whose format stays.

        Args:
            dense: of the layer's `shape`, float32, bfloat16 or float16.
        Returns:
            The error of doing so: ‖dequantized - dense‖ / ‖dense‖.
        Raises:
            TypeError, ValueError: `dense` is not usable or not finite; the layer stays as it was.
        """
        self.refill(self.quantize(dense, "dense"))
        distance = torch.linalg.vector_norm(self.dequantize(torch.float32).sub_(dense.to(self.weight.device)))
        norm = torch.linalg.vector_norm(dense, dtype=torch.float32)
        return (distance / norm).item() if norm > 0 else 0.0

    def quantize(self, dense: Tensor, name: str = "weight") -> FourBitWeight | EightBitWeight:
        """`dense` in this layer's format; the layer stays as it is. Errors speak of `dense` as `name`.

        Raises:
            TypeError, ValueError: `dense` is not usable or not finite.
        """
        if not isinstance(dense, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(dense).__name__}.")
        if dense.shape != self.shape:
            raise ValueError(f"{name} has shape {list(dense.shape)}, expected {list(self.shape)}.")
        if dense.is_meta:
            raise ValueError(f"{name} is on the meta device, which holds no values to quantize.")
        try:
            return self.encode(dense)
        except (TypeError, ValueError) as error:
            raise type(error)(str(error).replace("weight", name, 1)) from None

    def check_format_of(self, other: QuantizedLayer) -> None:
        """Refuses a layer whose weight cannot be this one's too.

        Raises:
            ValueError: as described; the message says what differs.
        """
        if (self.bits, self.shape) != (other.bits, other.shape):
            raise ValueError(
                f"A weight of {self.bits} bits and shape {list(self.shape)} is not one of {other.bits} bits and shape "
                f"{list(other.shape)}."
            )


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Of a linear layer all but the weight's format: its sizes and the bias, which is frozen."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a dense weight
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("weight", None)  # in a state_dict before the bias
        self.register_parameter("bias", None)
        if bias:
            self.share_bias(torch.empty(out_features, dtype=dtype, device=device))

    def share_bias(self, bias: Tensor | None) -> None:
        if bias is not None:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def bias_for(self, x: Tensor) -> Tensor | None:
        """The bias in a dtype that the operators take beside x."""
        bias = self.bias
        return bias if bias is None or bias.dtype is x.dtype else bias.float()  # exact, and fits every x


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """Of an embedding all but the weight's format."""

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype | None
    ) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate a dense weight
        dtype = dtype or torch.get_default_dtype()
        if dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16, got {name_of(dtype)}.")
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx is {padding_idx}, but there are {num_embeddings} embeddings.")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.dtype = padding_idx, dtype
        # What nn.Embedding has, and code that wraps one reads.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **format) -> QuantizedEmbedding:
        """`embedding` with its weight quantized; `format` is what the class takes of that.

        Raises:
            TypeError, ValueError: an argument is not usable, or the weight is not finite; the message names it.
        """
        check_embedding(embedding, "embedding")
        layer = cls(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta",
            dtype=embedding.weight.dtype, **format,
        )  # fmt: skip
        layer.assign(layer.quantize(embedding.weight))
        return layer.train(embedding.training)

    def _apply(self, fn, recurse: bool = True) -> QuantizedEmbedding:
        """Where `.to`, `.half` and the like end: a cast is one of what comes out."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={name_of(self.dtype)}"


def check_embedding(embedding: nn.Module, name: str) -> None:
    """One sentence for an embedding that does more than to look rows up, or is quantized already.

    Raises:
        TypeError, ValueError: as described; the message begins with `name`.
    """
    if type(embedding) is not nn.Embedding:
        raise TypeError(f"{name} must be a dense torch.nn.Embedding, got {type(embedding).__name__}.")
    if embedding.max_norm is not None:
        raise ValueError(
            f"{name} has max_norm, which changes its weight as it is used: it cannot be quantized."
        )


def check_dense(weight: Tensor, name: str) -> None:
    """One sentence for a dense weight that cannot be quantized.

    Raises:
        TypeError, ValueError: as described; the message begins with `name`.
    """
    if weight.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {name_of(weight.dtype)}.")
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values to quantize.")
    if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
        raise ValueError(
            f"{name} holds values that are not finite (NaN or infinity): it cannot be quantized."
        )
