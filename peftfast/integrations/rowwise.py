"""The RMSNorms and gated MLPs of transformers' models on the fused operators, in training or not, adapted or not.

A class is known by what it computes, not by its name alone: its own forward runs once, on random numbers, as a method
of a bare object that has what such a layer has and nothing else. A forward that asks for more, or computes something
else, is left alone; so is one that another library has put in place, as Liger does.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from peftfast import reference
from peftfast.integrations import forwards
from peftfast.integrations.bases import is_plain, is_plain_tensor, name_of_activation, why_not_mode
from peftfast.integrations.forwards import last_fallback, stand_in, subclasses, why_not_reached
from peftfast.ops.devices import why_no_kernel
from peftfast.ops.lora import DTYPES
from peftfast.ops.rowwise import call_rms_norm, call_swiglu

NAME = "rowwise"
NAMES = re.compile(r"(RMSNorm|MLP|Mlp)$")
TILE = "_peftfast_tile"  # on an MLP: the tokens of a tile; a plain value, so that copies keep it


@dataclass(frozen=True)
class Norm:
    """What a class of norms computes, and the attribute that holds its eps."""

    eps: str
    offset: float
    cast_first: bool
    weighted: bool

    def tensors(self, norm: nn.Module, x: Tensor) -> list[Tensor]:
        weight = self.weight(norm)
        return [x] if weight is None else [x, weight]

    def weight(self, norm: nn.Module) -> Tensor | None:
        return norm.weight if self.weighted and getattr(norm, "with_scale", True) else None

    def why_not(self, norm: nn.Module) -> None:
        """Nothing about the layer alone: all is in its input and its weight."""

    def why_not_input(self, norm: nn.Module, x: Tensor) -> str | None:
        weight = self.weight(norm)
        if x.dim() == 0 or (weight is not None and weight.shape != x.shape[-1:]):
            return f"its input has shape {list(x.shape)}"
        return None

    def call(self, norm: nn.Module, x: Tensor) -> Tensor:
        return call_rms_norm(x, self.weight(norm), getattr(norm, self.eps), self.offset, self.cast_first)


@dataclass(frozen=True)
class GatedMlp:
    """The attributes of a class of MLPs that computes down_proj(activation(gate) * up)."""

    inputs: tuple[str, ...]  # that make gate and up: one each, or one that makes both side by side
    activation: str

    @property
    def attributes(self) -> tuple[str, ...]:
        return *self.inputs, self.activation, "down_proj"

    def tensors(self, mlp: nn.Module, x: Tensor) -> list[Tensor]:
        return [x]

    def why_not(self, mlp: nn.Module) -> str | None:
        activation = getattr(mlp, self.activation)
        if name_of_activation(activation) is None:
            return f"its activation is a {type(activation).__name__}"
        return None if is_plain(activation) else "its activation has hooks or a forward of its own"

    def why_not_input(self, mlp: nn.Module, x: Tensor) -> str | None:
        return "a global module hook is registered" if _has_any_global_hook() else None

    def call(self, mlp: nn.Module, x: Tensor) -> Tensor:
        tokens = mlp.__dict__.get(TILE)
        if tokens is None or math.prod(x.shape[:-1]) <= tokens:
            return self._call(mlp, x)
        run = functools.partial(checkpoint, use_reentrant=False) if torch.is_grad_enabled() else _apply
        tiles = x.reshape(-1, x.shape[-1]).split(tokens)
        return torch.cat([run(self._call, mlp, tile) for tile in tiles]).view(*x.shape[:-1], -1)

    def _call(self, mlp: nn.Module, x: Tensor) -> Tensor:
        made = [getattr(mlp, name)(x) for name in self.inputs]
        gate, up = made if len(made) == 2 else made[0].chunk(2, dim=-1)
        activation = getattr(mlp, self.activation)
        reason = _why_not_tensors([gate, up])
        if reason is None and (gate.dtype != up.dtype or gate.shape != up.shape):
            reason = "its projections differ in dtype or shape"
        if reason is None:
            return mlp.down_proj(call_swiglu(gate, up, name_of_activation(activation)))
        forwards.fall_back(mlp, NAME, reason)
        return mlp.down_proj(activation(gate) * up)


def _apply(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


MLPS = (GatedMlp(("gate_proj", "up_proj"), "act_fn"), GatedMlp(("gate_up_proj",), "activation_fn"))


def answers_for(module: nn.Module) -> bool:
    """Whether the module goes by the name of a norm or a gated MLP of transformers' models."""
    if not _is_candidate(_owner(type(module))):
        return False
    return is_norm(module) or any(all(hasattr(module, it) for it in mlp.attributes) for mlp in MLPS)


def is_norm(module: nn.Module) -> bool:
    return _owner(type(module)).__name__.endswith("RMSNorm")


def kind_of(module: nn.Module) -> str:
    return type(module).__name__


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    """Of the classes that exist by now; those that come later are found as a model is made of them."""
    yield PreTrainedModel, "post_init", _post_init
    for kind in set(subclasses(nn.Module)):
        yield from _stand_in_of(kind)


def why_not(module: nn.Module) -> str | None:
    if not forwards.is_installed(_owner(type(module)), "forward"):
        return _why_not_layer(module) or "its class came after peftfast was enabled"
    return why_not_reached(module) or _why_not_layer(module) or last_fallback(module)


def _is_candidate(kind: type) -> bool:
    """By its name, and a forward that is its own."""
    return (
        kind.__module__.startswith("transformers.models.")
        and NAMES.search(kind.__name__) is not None
        and "forward" in kind.__dict__
        and inspect.unwrap(kind.forward).__module__ == kind.__module__
    )


def _stand_in_of(kind: type) -> Iterator[tuple[type, str, Callable]]:
    layer = known(kind) if _is_candidate(kind) else None
    if layer is not None:

        def fused(module: nn.Module, *args, **kwargs) -> Tensor:
            return layer.call(module, *args, *kwargs.values())

        yield kind, "forward", lambda original: stand_in(original, NAME, _at_rest, _why_not_call, fused)


def install_for(model: nn.Module) -> None:
    """Puts the stand-ins of the model's classes in place: of those that came after the others'."""
    for kind in {_owner(type(module)) for module in model.modules()}:
        for stand_in_for_it in _stand_in_of(kind):
            forwards.install(*stand_in_for_it)


def tile_mlps(model: nn.Module, tokens: int | None = 4096) -> nn.Module:
    """Has the gated MLPs within `model` run on so many tokens at a time, and keep their input alone for backward.

    What an MLP makes of a token takes several times the memory of all else in a layer; of a long sequence that is what
    does not fit. In tiles it is there for one tile at a time, in forward and in backward, which computes each again:
    one forward pass of the MLPs more, beside the one that activation checkpointing takes. Dropout is that of the first
    pass. Works where MLPs run on the fast path (`peftfast.enable`); others stay as they are.

    Args:
        tokens: of a tile. None: no tiles any more.
    Returns:
        `model` itself.
    Raises:
        ValueError: tokens is below 1, or the model has no gated MLP that is known.
    """
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}, expected at least 1.")
    mlps = [
        it for it in model.modules() if answers_for(it) and not is_norm(it) and _why_not_layer(it) is None
    ]
    if not mlps:
        raise ValueError("model has no gated MLP that could run in tiles.")
    for mlp in mlps:
        mlp.__dict__.pop(TILE, None)
        if tokens is not None:
            mlp.__dict__[TILE] = tokens
    return model


def _post_init(original: Callable) -> Callable:
    def post_init(self):
        install_for(self)
        return original(self)

    return post_init


def _at_rest(module: nn.Module) -> bool:
    """A compiler fuses these itself, and with what stands around them. What computes something else, of a class derived
    from the one whose forward this is, say, or with another activation, has nothing to fuse."""
    return torch.compiler.is_compiling() or _why_not_layer(module) is not None


def _owner(kind: type) -> type:
    """The class whose forward it has."""
    return next(base for base in kind.__mro__ if "forward" in base.__dict__)


def _why_not_layer(module: nn.Module) -> str | None:
    kind = _owner(type(module))
    layer = known(kind) if _is_candidate(kind) else None
    if layer is None:
        return "its class computes something else"
    return layer.why_not(module)


def _why_not_call(module: nn.Module, *args, **kwargs) -> str | None:
    values = (*args, *kwargs.values())
    if len(values) != 1:
        return "its forward was given more than its input"
    layer, (x,) = known(_owner(type(module))), values
    return _why_not_tensors(layer.tensors(module, x)) or layer.why_not_input(module, x) or why_not_mode()


def _why_not_tensors(tensors: list[Tensor]) -> str | None:
    """The input and what it meets."""
    for tensor in tensors:
        if not is_plain_tensor(tensor) or tensor.layout is not torch.strided:
            return f"its input or weight is a {type(tensor).__name__}"
        if tensor.dtype not in DTYPES:
            return f"its input or weight is {tensor.dtype}"
        if tensor.device != tensors[0].device:
            return f"its input is on {tensors[0].device}, its weight on {tensor.device}"
    return why_no_kernel(tensors[0].device)


# ---- what a class computes ------------------------------------------------------------------------------


@functools.cache
def known(kind: type) -> Norm | GatedMlp | None:
    """What the class computes, or None. Asked for before the class's forward is replaced."""
    candidates = _norms() if kind.__name__.endswith("RMSNorm") else ((mlp, _probes_of(mlp)) for mlp in MLPS)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        return next((layer for layer, probes in candidates if all(map(_same(kind), probes))), None)


@dataclass(frozen=True)
class _Probe:
    """The attributes of a bare object, the input of its forward, and what should come out."""

    attributes: dict[str, Any]
    x: Tensor
    expected: Tensor


def _same(kind: type) -> Callable[[_Probe], bool]:
    def same(probe: _Probe) -> bool:
        bare = kind.__new__(kind)
        nn.Module.__init__(bare)
        bare.__dict__.update(probe.attributes)  # as they are: nothing that watches parameters sees them
        try:
            out = kind.forward(bare, probe.x)
        except Exception:  # whatever a forward that wants another layer's attributes raises
            return False
        expected = probe.expected
        if not isinstance(out, Tensor) or out.dtype != expected.dtype or out.shape != expected.shape:
            return False
        # Where a value is on the boundary of two roundings, another order of the same sum may decide it.
        close = torch.isclose(out.double(), expected.double(), rtol=1e-5, atol=1e-6)
        return close.double().mean().item() > 0.98

    return same


def _random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device="cpu") * scale).to(dtype)


def _norms() -> Iterator[tuple[Norm, list[_Probe]]]:
    """The dtypes, and roundings in 16 bits, tell the kinds apart."""
    eps, hidden = 0.25, 48
    for name, others, (weighted, offset, cast_first) in itertools.product(
        ("variance_epsilon", "eps"),
        ({}, {"with_scale": True}),
        ((True, 0.0, True), (True, 0.0, False), (True, 1.0, False), (True, 1.0, True), (False, 0.0, True)),
    ):
        probes = []
        for dtype, weight_dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16),
        ):
            x, weight = _random(2, 9, hidden, dtype=dtype), _random(hidden, scale=0.3, dtype=weight_dtype)
            expected = reference.rms_norm(x, weight if weighted else None, eps, offset, cast_first=cast_first)
            probes.append(_Probe({"weight": weight, name: eps, **others}, x, expected))
        yield Norm(name, offset, cast_first, weighted), probes


def _probes_of(mlp: GatedMlp) -> list[_Probe]:
    """Inputs far from zero: a forward that clips is another."""
    hidden, size = 5, 12
    weight, down = _random(2 * size, hidden), _random(hidden, size)
    x = _random(2, 33, hidden, scale=20.0)
    gate, up = F.linear(x, weight).chunk(2, dim=-1)
    parts = weight.chunk(len(mlp.inputs))
    attributes = {name: functools.partial(F.linear, weight=part) for name, part in zip(mlp.inputs, parts)}
    attributes |= {mlp.activation: F.silu, "down_proj": functools.partial(F.linear, weight=down)}
    return [_Probe(attributes, x, F.linear(F.silu(gate) * up, down))]
