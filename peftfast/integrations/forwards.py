"""The forwards of other libraries' layers, and what stands in for them while peftfast is on.

Nothing of a layer is kept between calls: its library re-creates, freezes, moves and rescales parameters at any time.
So its state is judged at every call, and what the operators do not compute exactly runs the layer's own code.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import nn

MARK = "_peftfast"  # on a layer of an accelerated model: (generation, strict); plain values, so that copies keep it


class FallbackError(RuntimeError):
    """Under `strict`: a layer cannot run on the fast path. The message names the layer and the reason."""


@dataclass(frozen=True)
class Switch:
    """What is in force: for every model, with fallbacks as errors, for models given to `accelerate`."""

    everywhere: bool = False
    strict: bool = False
    accelerated: bool = False

    @property
    def installed(self) -> bool:
        return self.everywhere or self.accelerated


switch = Switch()
_generation = 0  # marks of an earlier one are void: `disable` ends them all
_originals: dict[tuple[type, str], Callable] = {}  # what each patched method of a class was
_installing = threading.Lock()  # models are made, and bring their classes, in any thread
_last_fallback: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def libraries() -> list[ModuleType]:
    """The integrations whose library is installed. Each has

    answers_for(module)   whether the module is one of its layers
    kind_of(layer)        the layer's method or library, and its class, as reports name them
    always_on(layer)      whether its own forward is the fast path, so that nothing need be switched on
    stand_ins()           triples of a class, the name of a method, and the function that makes the new method from it
    why_not(layer)        None, or the reason why a layer that is switched on does not run on the fast path as things
                          stand
    """
    from peftfast.integrations import own_methods, peft, prompts

    if importlib.util.find_spec("bitsandbytes") is None:
        return [own_methods, peft, prompts]
    from peftfast.integrations import bitsandbytes

    return [own_methods, peft, prompts, bitsandbytes]


def restore(wanted: Switch) -> None:
    """Makes `wanted` hold."""
    global switch
    if wanted.installed and not switch.installed:
        from peftfast.integrations import attention, losses, rowwise

        for library in (*libraries(), losses, rowwise, attention):
            for kind, name, stand_in_for in list(library.stand_ins()):
                install(kind, name, stand_in_for)
    elif switch.installed and not wanted.installed:
        for (kind, name), original in _originals.items():
            setattr(kind, name, original)
        _originals.clear()
    switch = wanted


def install(kind: type, name: str, stand_in_for: Callable) -> None:
    """Puts in place what `stand_in_for` makes of the method, until all is uninstalled; the first one stays."""
    with _installing:
        if (kind, name) not in _originals:
            original = _originals[kind, name] = getattr(kind, name)
            setattr(kind, name, functools.wraps(original)(stand_in_for(original)))


def subclasses(kind: type) -> Iterator[type]:
    """All classes derived from it that exist by now; one of several bases of another comes more than once."""
    for derived in kind.__subclasses__():
        yield derived
        yield from subclasses(derived)


def is_installed(kind: type, name: str) -> bool:
    """Whether something stands in for the method."""
    return (kind, name) in _originals


def uninstall() -> None:
    global _generation
    _generation += 1
    restore(Switch())


def mark(layer: nn.Module, strict: bool) -> None:
    """Puts peftfast in force for this layer; `restore` has to install it."""
    layer.__dict__[MARK] = (_generation, strict)


def in_force(layer: nn.Module) -> tuple[bool, bool]:
    """Whether peftfast is on for this layer, and whether its fallbacks are errors."""
    generation, strict = layer.__dict__.get(MARK, (None, False))
    marked = generation == _generation
    return switch.everywhere or marked, (switch.everywhere and switch.strict) or (marked and strict)


def stand_in(
    original: Callable, name: str, at_rest: Callable, why_not: Callable, fused: Callable
) -> Callable:
    """The forward that asks whether the operator may run. It keeps the original: a hook may outlive the patch.

    Args:
        name: of the library, for messages.
        at_rest: given the layer, whether its own forward has nothing to fuse.
        why_not: given what forward is, the reason for falling back or None.
        fused: what runs instead of `original`.
    """

    def forward(self, *args, **kwargs):
        if not in_force(self)[0] or at_rest(self):
            return original(self, *args, **kwargs)
        reason = why_not(self, *args, **kwargs)
        if reason is None:
            # A compiled call notes nothing, and must not depend on the fate of all layers that ever fell back.
            if not torch.compiler.is_compiling() and _last_fallback:
                _last_fallback.pop(self, None)
            return fused(self, *args, **kwargs)
        fall_back(self, name, reason)
        return original(self, *args, **kwargs)

    return forward


def fall_back(layer: nn.Module, name: str, reason: str) -> None:
    """Notes for reports that a call of the layer falls back, or refuses it under `strict`."""
    if in_force(layer)[1]:
        raise FallbackError(f"Layer {name_of(layer, name)} cannot run on the fast path: {reason}.")
    if not torch.compiler.is_compiling():
        _last_fallback[layer] = reason


def last_fallback(layer: nn.Module) -> str | None:
    """Why the layer's last call fell back, if it did."""
    return _last_fallback.get(layer)


def why_not_reached(layer: nn.Module) -> str | None:
    """A forward set on the instance hides the class's. Accelerate's hooks keep the one they call as `_old_forward`."""
    reached = getattr(layer.__dict__.get("_old_forward"), "__func__", None)
    if "forward" in layer.__dict__ and reached is not type(layer).forward:
        return "its forward was replaced before peftfast was enabled"
    return None


def name_of(layer: nn.Module, library: str) -> str:
    """The layer's name in the outermost module that is running; its class where no module contains it."""
    name, _ = outermost(layer)
    return name or f"of class {library}.{type(layer).__name__}"


def outermost(layer: nn.Module) -> tuple[str, nn.Module]:
    """The outermost module with a method running that contains the layer, and the layer's name in it; else itself."""
    found, frame = ("", layer), sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            names = (name for name, part in module.named_modules() if part is layer and name)
            found = next(((name, module) for name in names), found)
        frame = frame.f_back
    return found
