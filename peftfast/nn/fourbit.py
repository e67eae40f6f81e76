"""Frozen layers over a 4-bit weight, a linear one and an embedding, and their entries in a checkpoint: those of
bitsandbytes, without it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from peftfast.nn.quantized import QuantizedEmbedding, QuantizedLayer, QuantizedLinear, check_dense
from peftfast.ops import (
    FourBitWeight,
    NestedAbsmax,
    fourbit_dequantize,
    fourbit_embedding,
    fourbit_linear,
    fourbit_quantize,
)
from peftfast.ops.fourbit import check_weight
from peftfast.ops.lora import DTYPES, name_of
from peftfast.reference import FOURBIT_BLOCKSIZES, FOURBIT_CODEBOOKS

SHARDED = "_is_fsdp_managed_module"  # set by torch.distributed.fsdp.fully_shard on modules whose parameters it shards
QUANT_STATE = ".quant_state.bitsandbytes__"  # followed by the quant type
# What follows a weight's name in a checkpoint; nothing: the packed weight itself.
PLAIN_ENTRIES = ("", ".absmax", ".quant_map")
NESTED_ENTRIES = (".nested_absmax", ".nested_quant_map")
ENTRIES = (*PLAIN_ENTRIES, *NESTED_ENTRIES, *(QUANT_STATE + quant_type for quant_type in FOURBIT_CODEBOOKS))


@dataclass
class _Held:
    """Of a 4-bit weight all but its bytes: one object of all layers that share the weight."""

    quantized: FourBitWeight | None = None


class FourBitLayer(QuantizedLayer):
    """Keeps a weight in bitsandbytes' 4-bit format.

    Attributes:
        weight: uint8 of `packed_shape`, two codes to a byte, frozen.
        quant_type: "nf4" or "fp4".
        blocksize: elements of the flattened weight to one scale; a power of two from 32 to 4096.
        nested: whether the scales are quantized too, to 8 bits ("double quantization").
    """

    bits = 4

    def _init_weight(self, quant_type: str, blocksize: int, nested: bool, device) -> None:
        self.quant_type, self.blocksize, self.nested = quant_type, blocksize, nested
        packed = torch.empty(self.packed_shape, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._held = _Held()

    @property
    def packed_shape(self) -> tuple[int, int]:
        """bitsandbytes' [bytes, 1]; of an embedding [num_embeddings, bytes to a row], by which PEFT finds one."""
        rows, columns = self.shape
        return (rows, columns // 2) if isinstance(self, nn.Embedding) else ((rows * columns + 1) // 2, 1)

    @property
    def _quantized(self) -> FourBitWeight | None:
        """All of the weight but its bytes, which are `weight`."""
        return self._held.quantized

    @_quantized.setter
    def _quantized(self, quantized: FourBitWeight | None) -> None:
        self._held.quantized = quantized

    @property
    def is_empty(self) -> bool:
        """Whether nothing has filled the weight yet."""
        return self._quantized is None

    @property
    def quantized_weight(self) -> FourBitWeight:
        """The weight as the operators take it, for every call anew: parameters are replaced at any time.

        Raises:
            RuntimeError: the layer is empty.
        """
        if self._quantized is None:
            raise RuntimeError(
                f"The {type(self).__name__} has no weight yet: fill it by load_state_dict or set_weight."
            )
        self._quantized = beside(self._quantized, self.weight)
        return replace(self._quantized, packed=self.weight)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight, of the layer's `shape`, in `dtype`; None: that which it had before it was quantized."""
        return fourbit_dequantize(self.quantized_weight, dtype)

    def encode(self, dense: Tensor) -> FourBitWeight:
        how = dict(quant_type=self.quant_type, blocksize=self.blocksize, nested=self.nested)
        quantized = fourbit_quantize(dense, **how)
        # What `dequantize` gives by default, and the checkpoint says, stays too.
        return quantized if self._quantized is None else replace(quantized, dtype=self._quantized.dtype)

    def assign(self, quantized: FourBitWeight) -> None:
        """Makes `quantized`, of this layer's shape, the weight: shared and not copied, in a new parameter."""
        packed = quantized.packed.detach().reshape(-1).view(torch.uint8).view(self.packed_shape)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self._held = _Held(without_bytes(quantized))
        self.quant_type, self.blocksize = quantized.quant_type, quantized.blocksize
        self.nested = quantized.nested is not None

    def share(self, other: FourBitLayer) -> None:
        """Makes the weight of `other` that of this layer too: the same parameter, the same scales.

        Raises:
            ValueError: it has another format or shape.
        """
        self.check_format_of(other)
        self.weight, self._held = other.weight, other._held
        self.quant_type, self.blocksize, self.nested = other.quant_type, other.blocksize, other.nested

    def refill(self, quantized: FourBitWeight) -> None:
        """Makes a copy of `quantized` the weight in place, for layers that share it too, as torch loads a dense one.

        Where it is of another format, or nothing is there yet, the layer gets a parameter of its own.
        """
        old, device = self._quantized, self.weight.device
        if old is None or self.weight.is_meta or _format(old) != _format(quantized):
            quantized = copy.deepcopy(quantized)
            self.assign(quantized if self.weight.is_meta else quantized.to(device))
            return
        copy_bytes(self.weight, quantized.packed)
        self._quantized = copy.deepcopy(without_bytes(quantized)).to(device)

    def _apply(self, fn, recurse: bool = True) -> FourBitLayer:
        """Where `.to`, `.half` and the like end: what describes the weight moves with it and is never cast."""
        super()._apply(fn, recurse)
        if self._quantized is not None:
            device = self.weight.device
            on_meta = device.type == "meta"  # which holds no values: empty again
            self._quantized = None if on_meta else self._quantized.to(device)
        return self

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._quantized is not None:
            for entry, value in pack_state(self._quantized).items():
                destination[f"{prefix}weight{entry}"] = value

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """Reads and checks all that is this layer's before it assigns any of it.

        Raises:
            ValueError: the entries of the weight do not fit together or not this layer; the message names the tensor.
        """
        name = f"{prefix}weight"
        state = {
            key.removeprefix(name): value
            for key, value in state_dict.items()
            if key == name or key.startswith(f"{name}.")
        }
        others = {key: value for key, value in state_dict.items() if key.removeprefix(name) not in state}
        is_own = is_own_weight(state, self.weight)
        quantized = unpack_state(state, self.shape, name) if state and not is_own else None
        errors = len(error_msgs)
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if strict and is_own:
            missing_keys.remove(name)
        if quantized is None or len(error_msgs) > errors:
            return
        if strict:
            missing_keys.remove(name)
            unexpected_keys += [name + entry for entry in state if entry not in ENTRIES]
        if is_sharded(self):  # the parameter has to stay: FSDP holds it
            copy_bytes(self.weight, quantized.packed)
            self._quantized = without_bytes(quantized)
        elif local_metadata.get("assign_to_params_buffers", False):
            self.assign(quantized)
        else:
            self.refill(quantized)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """With the entries beside a weight that FSDP shards: torch.distributed.checkpoint then loads them too."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if is_sharded(self) and self._quantized is not None:
            for entry, value in pack_state(self._quantized).items():
                yield f"{prefix}{'.' if prefix else ''}weight{entry}", value

    def _fqn_modifiers(self) -> dict[str, str]:
        """See `entry_names`."""
        return {"weight": "_entry_names"}

    @property
    def _entry_names(self) -> SimpleNamespace:
        return entry_names(("weight",))


class Linear4bit(FourBitLayer, QuantizedLinear):
    """y = x W^T + bias with a frozen W in bitsandbytes' 4-bit format   (Dettmers et al., QLoRA, NeurIPS 2023).

    Its `state_dict` is, byte for byte, that of `bitsandbytes.nn.Linear4bit`; bitsandbytes is not needed. Casting the
    module casts the bias alone. `Linear4bit(...)` is empty until `load_state_dict` or `set_weight` fills it;
    `from_linear` and `from_quantized` make one that is filled.

    Attributes:
        weight: uint8 [ceil(out_features * in_features / 2), 1], two codes to a byte, frozen.
        bias: [out_features] or None, frozen.
        quant_type: "nf4" or "fp4".
        blocksize: elements of the flattened weight to one scale; a power of two from 32 to 4096.
        nested: whether the scales are quantized too, to 8 bits ("double quantization").
        compute_dtype: of the product; None: the dtype of the input.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer; `dtype` is that of the bias.

        Raises:
            TypeError, ValueError: an argument is not usable; the message names it.
        """
        check_format(quant_type, blocksize, nested, compute_dtype)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._init_weight(quant_type, blocksize, nested, device)
        self.compute_dtype = compute_dtype

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> Linear4bit:
        """`linear` with its weight in 4 bits; the bias is shared.

        Raises:
            TypeError, ValueError: an argument is not usable, or the weight is not finite; the message names it.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantizedLayer):
            raise TypeError(f"linear must be a dense torch.nn.Linear, got {type(linear).__name__}.")
        layer = cls(
            linear.in_features, linear.out_features, bias=False, quant_type=quant_type, blocksize=blocksize,
            nested=nested, compute_dtype=compute_dtype, device="meta",
        )  # fmt: skip
        layer.assign(layer.quantize(linear.weight))
        layer.share_bias(linear.bias)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls, quantized: FourBitWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> Linear4bit:
        """The layer of a weight that is quantized already; it and the bias are shared, not copied.

        Raises:
            TypeError, ValueError: an argument is not usable; the message names it.
        """
        check_weight(quantized, "quantized")
        if len(quantized.shape) != 2:
            raise ValueError(f"quantized must have 2 dimensions, got shape {list(quantized.shape)}.")
        out_features, in_features = quantized.shape
        if bias is not None and bias.shape != (out_features,):
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{out_features}].")
        layer = cls(in_features, out_features, bias=False, compute_dtype=compute_dtype, device="meta")
        layer.assign(quantized)
        layer.share_bias(bias)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in the dtype of x."""
        return fourbit_linear(
            x, self.quantized_weight, bias=self.bias_for(x), compute_dtype=self.compute_dtype
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"quant_type={self.quant_type}, blocksize={self.blocksize}, nested={self.nested}, "
            f"compute_dtype={self.compute_dtype}"
        )


class Embedding4bit(FourBitLayer, QuantizedEmbedding):
    """`nn.Embedding` with a frozen weight in bitsandbytes' 4-bit format; only rows that are asked for are dequantized.

    The bytes are those of `bitsandbytes.nn.Embedding4bit`, which cannot be saved; the entries of the `state_dict` are
    those of `Linear4bit`. A row need not be a whole number of blocks. `Embedding4bit(...)` is empty until
    `load_state_dict` or `set_weight` fills it; `from_embedding` makes one that is filled.

    Attributes:
        weight: uint8 [num_embeddings, embedding_dim / 2], two codes to a byte, frozen.
        dtype: of what comes out; casting the module changes it.
        quant_type, blocksize, nested: as in `Linear4bit`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        nested: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """An empty layer.

        Raises:
            TypeError, ValueError: an argument is not usable; the message names it.
        """
        check_format(quant_type, blocksize, nested)
        if embedding_dim % 2:
            raise ValueError(
                f"embedding_dim must be even, so that every row begins with a byte, got {embedding_dim}."
            )
        super().__init__(num_embeddings, embedding_dim, padding_idx, dtype)
        self._init_weight(quant_type, blocksize, nested, device)

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> [..., embedding_dim]."""
        return fourbit_embedding(input, self.quantized_weight, self.dtype)

    def extra_repr(self) -> str:
        format = f"quant_type={self.quant_type}, blocksize={self.blocksize}, nested={self.nested}"
        return f"{super().extra_repr()}, {format}"


def quantize_linears(
    module: nn.Module,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = True,
    compute_dtype: torch.dtype | None = None,
    skip: Iterable[str] = ("lm_head",),
) -> nn.Module:
    """Puts a `Linear4bit` in the place of every `nn.Linear` within `module`, one after the other.

    Args:
        module: is changed in place; the dense layers are freed one by one.
        skip: names of modules that stay dense, with all within them: whole, or whole parts of them.
        quant_type, blocksize, nested, compute_dtype: as in `Linear4bit`.
    Returns:
        `module` itself; its `Linear4bit` where `module` is an `nn.Linear`.
    Raises:
        TypeError, ValueError: an argument or a weight, which the message names, is not usable. All weights are
            looked at before the first is replaced.
    """
    how = dict(quant_type=quant_type, blocksize=blocksize, nested=nested, compute_dtype=compute_dtype)
    check_format(**how)
    skip = tuple(skip)
    places: dict[nn.Linear, list[str]] = {}  # a layer may be used in several
    for name, layer in module.named_modules(remove_duplicate=False):
        if type(layer) is nn.Linear and not any(f".{part}." in f".{name}." for part in skip):
            places.setdefault(layer, []).append(name)
    for layer, names in places.items():
        check_dense(layer.weight, f"{names[0]}.weight".lstrip("."))
    while places:
        layer, names = places.popitem()
        quantized = Linear4bit.from_linear(layer, **how)
        if layer is module:
            return quantized
        for name in names:
            module.set_submodule(name, quantized)
    return module


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP shards the module's own parameters, which it frees after the forward that it gathered them for."""
    return getattr(module, SHARDED, False)


def _format(quantized: FourBitWeight) -> tuple:
    return quantized.shape, quantized.quant_type, quantized.blocksize, quantized.nested is None


def without_bytes(quantized: FourBitWeight) -> FourBitWeight:
    """What a module keeps of a weight beside its parameter. That alone holds the bytes: FSDP shards and frees it."""
    return replace(quantized, packed=quantized.packed.new_empty(0))


def beside(quantized: FourBitWeight, weight: Tensor) -> FourBitWeight:
    """`quantized` on the device of its bytes, should they have been moved alone, as FSDP does."""
    # Not to the meta device, on which accelerate leaves what it has offloaded: the values would be lost.
    elsewhere = quantized.absmax.device != weight.device and not (quantized.absmax.is_meta or weight.is_meta)
    return quantized.to(weight.device) if elsewhere else quantized


# ---- a 4-bit weight in a checkpoint -------------------------------------------------------------------------


def pack_state(quantized: FourBitWeight) -> dict[str, Tensor]:
    """The entries that stand beside the packed weight in bitsandbytes' checkpoints, by what follows its name there."""
    nested = quantized.nested
    facts = {
        "quant_type": quantized.quant_type,
        "blocksize": quantized.blocksize,
        "dtype": name_of(quantized.dtype),
        "shape": quantized.shape,
    }
    codebook = torch.tensor(FOURBIT_CODEBOOKS[quantized.quant_type], device=quantized.absmax.device)
    entries = {".absmax": quantized.absmax, ".quant_map": codebook}
    if nested is not None:
        facts |= {
            "nested_blocksize": nested.blocksize,
            "nested_dtype": "float32",
            "nested_offset": nested.offset.item(),
        }
        # A copy: safetensors refuses tensors that share memory, and layers may share this one.
        entries |= {".nested_absmax": nested.absmax, ".nested_quant_map": nested.code.clone()}
    written = list(json.dumps(facts).encode())
    return entries | {QUANT_STATE + quantized.quant_type: torch.tensor(written, dtype=torch.uint8)}


def unpack_state(state: Mapping[str, Tensor], shape: tuple[int, int], name: str = "weight") -> FourBitWeight:
    """The weight `name`, of `shape`, from its entries in a checkpoint: `pack_state` and "", the packed weight itself,
    in any dtype whose bytes are the codes.

    Raises:
        ValueError: an entry is missing, or does not fit the others or `shape`; the message names it.
    """
    kinds = [quant_type for quant_type in FOURBIT_CODEBOOKS if QUANT_STATE + quant_type in state]
    if len(kinds) != 1:
        found = [entry.removeprefix(".") for entry in state if entry.startswith(".quant_state")]
        wanted = " or ".join(f"{name}{QUANT_STATE}{quant_type}" for quant_type in FOURBIT_CODEBOOKS)
        raise ValueError(f"{name} is no 4-bit weight: expected one entry {wanted}, found {found or 'none'}.")
    quant_type = kinds[0]
    facts = _read_facts(state[QUANT_STATE + quant_type], f"{name}{QUANT_STATE}{quant_type}")
    expected = {
        "quant_type": (quant_type,),
        "blocksize": FOURBIT_BLOCKSIZES,
        "dtype": tuple(map(name_of, DTYPES)),
        "shape": (list(shape),),
    }
    for fact, values in expected.items():
        if facts.get(fact) not in values or isinstance(facts[fact], float):
            options = str(values[0]) if len(values) == 1 else f"one of {list(values)}"
            raise ValueError(
                f"{name}{QUANT_STATE}{quant_type} says {fact} {facts.get(fact)!r}, expected {options}."
            )
    is_nested = "nested_blocksize" in facts or ".nested_absmax" in state
    for entry in PLAIN_ENTRIES + NESTED_ENTRIES if is_nested else PLAIN_ENTRIES:
        if entry not in state:
            raise ValueError(f"{name}{entry} is missing.")
    codebook = torch.tensor(FOURBIT_CODEBOOKS[quant_type], device="cpu")
    quant_map = state[".quant_map"].cpu().float()
    # Not to the last bit: there are checkpoints with rounded values, which bitsandbytes reads as the exact ones too.
    if quant_map.shape != codebook.shape or not torch.allclose(quant_map, codebook, rtol=0, atol=1e-3):
        raise ValueError(f"{name}.quant_map is not the codebook of {quant_type}.")
    nested = None
    if is_nested:
        offset, nested_blocksize = facts.get("nested_offset"), facts.get("nested_blocksize")
        if (
            not isinstance(offset, float)
            or not math.isfinite(offset)
            or not isinstance(nested_blocksize, int)
        ):
            raise ValueError(
                f"{name}{QUANT_STATE}{quant_type} says nested_offset {offset!r} and nested_blocksize "
                f"{nested_blocksize!r}, expected two finite numbers."
            )
        absmax, code = state[".nested_absmax"], state[".nested_quant_map"]
        nested = NestedAbsmax(absmax, code, torch.tensor(offset, device=absmax.device), nested_blocksize)
    dtype = getattr(torch, facts["dtype"])
    quantized = FourBitWeight(
        state[""], state[".absmax"], tuple(shape), dtype, quant_type, facts["blocksize"], nested
    )
    try:
        check_weight(quantized, name)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return quantized


@torch.no_grad()
def copy_bytes(weight: Tensor, packed: Tensor) -> None:
    """Loads the bytes of a weight in place; of one that is sharded, they may be the weight itself."""
    if packed is not weight:
        weight.copy_(
            packed
            if packed.shape == weight.shape
            else packed.reshape(-1).view(torch.uint8).view(weight.shape)
        )


def is_own_weight(state: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether a state_dict brings back the parameter itself: torch.distributed.checkpoint does so with all that it does
    not load, by parameters, of which the entries beside a packed weight are none."""
    return list(state) == [""] and state[""] is weight


def entry_names(parameters: Iterable[str]) -> SimpleNamespace:
    """The entries of 4-bit weights as attributes of attributes.

    torch.distributed.checkpoint.state_dict looks up each name of a state_dict by attributes, and asks a module's
    `_fqn_modifiers()` by which attribute of it to look up a parameter instead.
    """
    names = SimpleNamespace()
    for parameter in parameters:
        for entry in ENTRIES:
            place = names
            for part in f"{parameter}{entry}".split("."):
                place = vars(place).setdefault(part, SimpleNamespace())
    return names


def _read_facts(written: Tensor, name: str) -> dict:
    try:
        facts = json.loads(bytes(written.tolist()))
    except (TypeError, ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{name} is not the JSON object that it should be.")
    return facts


# ---- checks -----------------------------------------------------------------------------------------------


def check_format(
    quant_type: str, blocksize: int, nested: bool, compute_dtype: torch.dtype | None = None
) -> None:
    """One sentence for an argument that no 4-bit layer can have.

    Raises:
        TypeError, ValueError: as described; the message names the argument.
    """
    if quant_type not in FOURBIT_CODEBOOKS:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}.")
    if isinstance(blocksize, float) or blocksize not in FOURBIT_BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {list(FOURBIT_BLOCKSIZES)}, got {blocksize!r}.")
    if not isinstance(nested, bool):
        raise TypeError(f"nested must be True or False, got {nested!r}.")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise ValueError(f"compute_dtype must be None, float32, bfloat16 or float16, got {compute_dtype!r}.")
