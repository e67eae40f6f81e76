"""The loss of transformers' language models without their logits.

While the forward of a language model that is given labels runs, its output embeddings return `DeferredLogits`: a tensor
that knows its hidden states and has not been computed. The model scales and softcaps it, its loss function reshapes,
shifts and widens it, and all of that is noted down; where it meets `torch.nn.functional.cross_entropy`, the operator
computes the loss from the hidden states. So every model and every loss function that ends in a cross-entropy is served,
and no code of either is replaced. The output's `logits` are such a tensor too. Whatever else is done with one computes
it, once, as the model would have, with its gradient: code that reads logits gets them, code that does not never pays.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._pytree import tree_map
from transformers import GenerationMixin, PreTrainedModel

from peftfast.integrations import forwards, peft
from peftfast.integrations.bases import KINDS, autocast_dtype, is_plain, is_plain_tensor, why_not_input
from peftfast.integrations.forwards import last_fallback, stand_in, subclasses, why_not_reached
from peftfast.nn.fourbit import is_sharded
from peftfast.ops import EightBitWeight, FourBitWeight, eightbit, fourbit, lora, loss

NAME = "loss"


def answers_for(module: nn.Module) -> bool:
    return (
        isinstance(module, PreTrainedModel)
        and _takes_labels(type(module))
        and module.get_output_embeddings() is not None
    )


def kind_of(model: PreTrainedModel) -> str:
    return f"{NAME}.{type(model).__name__}"


def stand_ins() -> Iterator[tuple[type, str, Callable]]:
    """Of the classes that exist by now; a model of one that comes later brings its class as it is made."""
    yield PreTrainedModel, "__init__", _init
    for kind in subclasses(PreTrainedModel):
        if "forward" in kind.__dict__ and _takes_labels(kind):
            yield kind, "forward", _forward


def why_not(model: PreTrainedModel) -> str | None:
    return why_not_reached(model) or _why_not_call(model) or last_fallback(model)


def _takes_labels(kind: type) -> bool:
    return issubclass(kind, GenerationMixin) and "labels" in inspect.signature(kind.forward).parameters


def _init(original: Callable) -> Callable:
    def __init__(self, *args, **kwargs):
        for kind in type(self).__mro__:
            if issubclass(kind, GenerationMixin) and "forward" in kind.__dict__ and _takes_labels(kind):
                forwards.install(kind, "forward", _forward)
        original(self, *args, **kwargs)

    return __init__


def _forward(original: Callable) -> Callable:
    place = list(inspect.signature(original).parameters).index("labels")
    guarded = stand_in(original, NAME, _at_rest, _why_not_call, partial(_without_logits, original))

    def forward(self, *args, **kwargs):
        labels = args[place - 1] if len(args) >= place else kwargs.get("labels")
        # A derived class's forward that calls this one has seen to it.
        plain = labels is None or _HeadForward.under_way(self.get_output_embeddings())
        return (original if plain else guarded)(self, *args, **kwargs)

    return forward


def _without_logits(original: Callable, model: PreTrainedModel, *args, **kwargs):
    """The model's own forward, but that its output embeddings return logits that have yet to be computed."""
    head, sources = model.get_output_embeddings(), []

    def forward(*args, **kwargs) -> Tensor:
        given, more = _after_pre_hooks(head, args, kwargs)
        if len(given) != 1 or more:
            reason = "its output embeddings were given more than their input"
        else:
            reason = _why_not_input(head, given[0])
        if reason is not None:
            forwards.fall_back(model, NAME, reason)
            return type(head).forward(head, *args, **kwargs)
        sources.append(_Source(model, _projection(head, *given), *given))
        return sources[-1].deferred()

    try:
        with _HeadForward.running(head, forward):
            return original(model, *args, **kwargs)
    finally:
        for source in sources:
            source.model = None


def _after_pre_hooks(head: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """What the layer within the output embeddings is given, by its hooks; torch has called those of `head` itself."""
    layer = _effective(head)
    for key, hook in layer._forward_pre_hooks.items() if layer is not head else ():
        if key in layer._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(layer, args, kwargs) or (args, kwargs)
        elif (given := hook(layer, args)) is not None:
            args = given if isinstance(given, tuple) else (given,)
    return args, kwargs


class _HeadForward:
    """The forward of output embeddings while a model's runs: each thread's own, where threads share the model."""

    _lock = threading.Lock()

    def __init__(self, head: nn.Module) -> None:
        self.head, self.users, self.of_thread = head, 0, threading.local()

    def __call__(self, *args, **kwargs):
        forward = getattr(self.of_thread, "forward", None)
        return forward(*args, **kwargs) if forward else type(self.head).forward(self.head, *args, **kwargs)

    @classmethod
    def of(cls, head: nn.Module | None) -> _HeadForward | None:
        forward = None if head is None else head.__dict__.get("forward")
        return forward if isinstance(forward, cls) else None

    @classmethod
    def under_way(cls, head: nn.Module | None) -> bool:
        """Whether a model's forward with it runs in this thread."""
        forward = cls.of(head)
        return forward is not None and getattr(forward.of_thread, "forward", None) is not None

    @classmethod
    @contextmanager
    def running(cls, head: nn.Module, forward: Callable) -> Iterator[None]:
        with cls._lock:
            shared = cls.of(head) or cls(head)
            shared.users += 1
            head.__dict__["forward"] = shared  # `_why_not_call` has seen that it has none of its own
        shared.of_thread.forward = forward
        try:
            yield
        finally:
            shared.of_thread.forward = None
            with cls._lock:
                shared.users -= 1
                if shared.users == 0:
                    del head.__dict__["forward"]


# ---- the output embeddings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Projection:
    """What the output embeddings compute for one input, whatever becomes of the modules: switched, merged, replaced."""

    weight: Tensor | FourBitWeight | EightBitWeight
    bias: Tensor | None
    dtype: torch.dtype  # of the logits
    compute_dtype: torch.dtype | None
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    scaling: list[float | Tensor]
    dropout: list[float]
    seed: Tensor | None

    def tensors(self) -> list[Tensor]:
        parts = [self.weight] if isinstance(self.weight, Tensor) else self.weight.tensors()
        parts = (*parts, self.bias, *self.lora_A, *self.lora_B, *self.scaling)
        return [part for part in parts if isinstance(part, Tensor)]

    def logits(self, x: Tensor) -> Tensor:
        adapters = (self.lora_A, self.lora_B, self.scaling, self.bias, self.dropout)
        if isinstance(self.weight, FourBitWeight):
            y = fourbit.call(x, self.weight, *adapters, self.seed, self.compute_dtype)
        elif isinstance(self.weight, EightBitWeight):
            y = eightbit.call(x, self.weight, *adapters, self.seed)
        elif self.lora_A:
            y = lora.call(x, self.weight, *adapters, False, self.seed)
        else:
            y = F.linear(x, self.weight, self.bias)
        return y.to(self.dtype)


def _at_rest(model: PreTrainedModel) -> bool:
    return torch.compiler.is_compiling()


def _why_not_call(model: PreTrainedModel, *args, **kwargs) -> str | None:
    """The model and its output embeddings, whatever their input."""
    head = model.get_output_embeddings()
    if head is None:
        return "it has no output embeddings"
    if _has_any_global_hook():
        return "a global module hook is registered"
    if not is_plain(head, pre_hooks=True) and _HeadForward.of(head) is None:
        return "its output embeddings have hooks or a forward of their own"
    layer = _effective(head)
    if layer is not head and not is_plain(layer, pre_hooks=True):
        return "its output embeddings have parts with hooks or a forward of their own"
    if any(map(is_sharded, layer.modules())):  # logits may be read later
        return "its output embeddings are sharded by FSDP, which frees them after the forward"
    if isinstance(layer, LoraLayer):
        return peft.why_not_fused(layer)
    if type(layer) is nn.Linear:
        plain = is_plain_tensor(layer.weight) and (layer.bias is None or is_plain_tensor(layer.bias))
        return None if plain else f"the weight of its output embeddings is a {type(layer.weight).__name__}"
    if type(layer) in KINDS and not hasattr(KINDS[type(layer)], "transposed"):
        return KINDS[type(layer)].why_not(layer)
    return f"its output embeddings are a {type(layer).__name__}"


def _why_not_input(head: nn.Module, x: Tensor) -> str | None:
    layer = _effective(head)
    return peft.why_not_call(layer, x) if isinstance(layer, LoraLayer) else why_not_input(layer, x)


def _effective(head: nn.Module) -> nn.Module:
    """The layer that runs: within PEFT's wrapper of trained copies, or under adapters that are at rest."""
    if type(head) is ModulesToSaveWrapper:
        if head.disable_adapters or any(name not in head._adapters for name in head.active_adapters):
            return _effective(head.original_module)
        return _effective(head.modules_to_save[head.active_adapters[0]])
    if isinstance(head, LoraLayer) and peft.at_rest(head):
        return head.base_layer
    return head


def _projection(head: nn.Module, x: Tensor) -> _Projection:
    layer = _effective(head)
    lora_A, lora_B, scaling, bias, dropout, base = [], [], [], layer.bias, [], layer
    if isinstance(layer, LoraLayer):
        lora_A, lora_B, scaling, bias, dropout = peft.operands(layer)
        base = layer.base_layer
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if any(dropout) else None
    operand = KINDS[type(base)].operand(base, x)
    if not isinstance(operand["weight"], Tensor):
        weight = operand["weight"]
        operand["weight"] = replace(weight, **{name: _as_it_is(part) for name, part in vars(weight).items()})
    tensors = dict(bias=bias, lora_A=lora_A, lora_B=lora_B, scaling=scaling, **operand)
    return _Projection(**tree_map(_as_it_is, tensors), dropout=dropout, seed=seed)


def _as_it_is(value: Any) -> Any:
    """What a parameter holds now, should it be given other data: but for one that gets a gradient."""
    tensor = isinstance(value, Tensor) and not (value.requires_grad and torch.is_grad_enabled())
    return value.detach() if tensor else value


# ---- logits that have yet to be computed ----------------------------------------------------------------


class _Source:
    """The hidden states and the projection of one call of the output embeddings, shared by all that is made of it.

    Attributes:
        model: while its forward runs.
        fused: whether the loss has been computed without logits.
        read: whether the logits have been computed.
    """

    def __init__(self, model: PreTrainedModel, projection: _Projection, hidden: Tensor) -> None:
        self.model, self.projection, self.hidden = model, projection, hidden
        self.fused = self.read = False
        self.autocast = autocast_dtype(hidden)
        parts = [hidden, *projection.tensors()]
        self.states = list(map(_State.of, parts))
        self.leaves = [part for part in parts if part.requires_grad] if torch.is_grad_enabled() else []

    def deferred(self) -> DeferredLogits:
        shape = (*self.hidden.shape[:-1], self.projection.weight.shape[0])
        return DeferredLogits.make(
            self, shape, self.projection.dtype, self._logits, self.hidden, (), leaves=self.leaves
        )

    def check(self) -> None:
        if not all(state.holds() for state in self.states):
            raise RuntimeError(
                "logits cannot be computed any more: the output embeddings or the hidden states have changed since. "
                "Read logits before the optimizer's step, or call the model with peftfast disabled."
            )

    def _logits(self) -> Tensor:
        self.check()
        self.read = True
        with self.in_its_autocast():
            return self.projection.logits(self.hidden)

    @contextmanager
    def in_its_autocast(self) -> Iterator[None]:
        with torch.autocast(self.hidden.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    def falls_back(self, reason: str) -> None:
        """Of a model whose forward needs the logits before, or for, its loss; afterwards anyone may read them."""
        if self.model is not None and not self.fused:
            model, self.model = self.model, None
            forwards.fall_back(model, NAME, reason)


@dataclass(frozen=True)
class _State:
    """Whether a tensor holds what it held: by its version, and by at most a thousand of its values, since what is
    written to `tensor.data` leaves the version as it is."""

    tensor: Tensor
    version: int
    address: int
    some: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _State:
        some = _some(tensor.detach()).flatten().contiguous().view(torch.uint8).clone()
        version = 0 if tensor.is_inference() else tensor._version
        return cls(tensor, version, tensor.untyped_storage()._cdata, some)

    def holds(self) -> bool:
        now = _State.of(self.tensor)
        same = (now.version, now.address) == (self.version, self.address)
        return same and torch.equal(now.some, self.some)


def _some(tensor: Tensor, most: int = 1000) -> Tensor:
    """At most so many of the values, spread evenly over every dimension."""
    index, shorter_first = {}, sorted(range(tensor.dim()), key=tensor.size)
    for place, dim in enumerate(shorter_first):
        size = tensor.size(dim)
        wanted = max(1, int(most ** (1 / (len(shorter_first) - place))))
        step = max(1, -(-size // wanted))
        index[dim] = slice(None, None, step)
        most //= max(1, -(-size // step))
    return tensor[tuple(index[dim] for dim in range(tensor.dim()))]


class DeferredLogits(Tensor):
    """Logits, or what was made of them, that are computed as soon as anything needs their values.

    Attributes:
        source: where they come from.
        hidden: [..., H], whose projection they are; None: they are no longer one that the operator knows.
        recorded: whether autograd was on when they were due.
        steps: what was done to the projection element by element: ("mul", number) or ("tanh",).
    """

    @staticmethod
    def __new__(cls, source, shape, dtype, compute, hidden, steps):
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=source.hidden.device)
        self.source, self.hidden, self.steps = source, hidden, steps
        self._compute, self._value, self.recorded = compute, None, torch.is_grad_enabled()
        return self

    @classmethod
    def make(cls, source: _Source, *args, leaves: list[Tensor]) -> DeferredLogits:
        if not (torch.is_grad_enabled() and leaves):
            return cls(source, *args)
        return _Edge.apply(partial(cls, source, *args), *leaves)

    def value(self) -> Tensor:
        """The tensor itself, computed with the settings of when it was due; once."""
        if self._value is None:
            with torch.set_grad_enabled(self.recorded):
                self._value = self._compute()
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = _name_of(func)
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        deferred = [
            arg for arg in (args[0] if name == "cat" else args[:1]) if isinstance(arg, DeferredLogits)
        ]
        if deferred:
            handled = _defer(deferred[0], name, func, args, kwargs)
            if handled is not None:
                return handled
        return func(*_values(args, name), **_values(kwargs, name))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What comes from C++, below autograd, to which `_Edge` is the gradient."""
        with torch.no_grad():
            detached = partial(tree_map, lambda arg: arg.apart() if isinstance(arg, DeferredLogits) else arg)
            return func(*detached(args), **detached(kwargs or {}))

    def apart(self) -> Tensor:
        """The value for code that runs below autograd: one that is computed here has no gradient and is not kept."""
        return self._compute() if self._value is None else self._value.detach()


class _Edge(torch.autograd.Function):
    """Joins deferred logits to the graph for what reaches them from C++, as torch.autograd.Function.apply does."""

    @staticmethod
    def forward(ctx, make, *leaves):
        deferred = make()
        deferred.recorded = True  # within a Function nothing is
        ctx.compute, ctx.leaves = deferred._compute, leaves
        return deferred

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            value = ctx.compute()
        return None, *torch.autograd.grad(value, ctx.leaves, grad, allow_unused=True, retain_graph=True)


# What is known without the values.
METADATA = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_nested", "size", "dim", "numel", "nelement", "element_size", "__len__",
    "is_floating_point", "is_complex", "is_same_size", "__hash__", "is_inference",
}  # fmt: skip
ASK_FOR_GRADIENTS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


def _name_of(func: Callable) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name in ("__get__", "__set__") else name


def _values(arguments: Any, name: str) -> Any:
    def value(argument):
        if not isinstance(argument, DeferredLogits):
            return argument
        source = argument.source
        source.falls_back(f"its forward needs the logits themselves (for {name})")
        if name in ASK_FOR_GRADIENTS and source.fused:
            raise RuntimeError(
                f"{name}: the loss was computed without its logits, so there is no gradient of them. "
                "Call the model with peftfast disabled."
            )
        return argument.value()

    return tree_map(value, arguments)


def _leaves(part: Tensor) -> list[Tensor]:
    """The tensors with gradients that it is made of."""
    return part.source.leaves if isinstance(part, DeferredLogits) else [part] * part.requires_grad


def _defer(deferred: DeferredLogits, name: str, func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """What `func` makes of deferred logits, still deferred; or their cross-entropy; None where it needs values."""
    if deferred.source.read or deferred.hidden is None:
        return None
    if name == "cross_entropy":
        return _cross_entropy(deferred, *args[1:], **kwargs)
    shape, dtype, hidden, steps = tuple(deferred.shape), deferred.dtype, deferred.hidden, deferred.steps
    leaves = deferred.source.leaves
    if name in WIDTHS and len(args) == 1 and not kwargs:
        dtype = WIDTHS[name]
    elif name in ("to", "type") and len(args) == 2 and not kwargs and isinstance(args[1], torch.dtype):
        dtype = args[1]
    elif name == "to" and args[1:] in ((deferred.device,), (str(deferred.device),)) and not kwargs:
        return deferred
    elif name == "contiguous" and len(args) == 1 and not kwargs:
        pass
    elif name in ("mul", "div") and len(args) == 2 and not kwargs and _is_number(args[1]):
        steps += (("mul", args[1] if name == "mul" else 1 / args[1]),)
    elif name == "tanh" and len(args) == 1 and not kwargs:
        steps += (("tanh",),)
    elif name in ("view", "reshape") and not kwargs:
        wanted = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        if not all(isinstance(size, int) for size in wanted) or not wanted or wanted[-1] != shape[-1]:
            return None
        hidden = hidden.reshape(*wanted[:-1], hidden.shape[-1])
        shape = (*hidden.shape[:-1], shape[-1])
    elif name == "__getitem__":
        hidden = _rows(deferred, args[1])
        if hidden is None:
            return None
        shape = (*hidden.shape[:-1], shape[-1])
    elif name == "cat" and kwargs.keys() <= {"dim"} and all(part.dtype == dtype for part in args[0]):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        shape = list(shape)
        shape[dim] = sum(part.shape[dim] for part in args[0])
        hidden = None
        leaves = list({id(leaf): leaf for part in args[0] for leaf in _leaves(part)}.values())
    else:
        return None

    def compute() -> Tensor:
        return func(*_values(args, name), **_values(kwargs, name))

    return DeferredLogits.make(deferred.source, shape, dtype, compute, hidden, steps, leaves=leaves)


WIDTHS = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16, "half": torch.float16}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _rows(deferred: DeferredLogits, index: Any) -> Tensor | None:
    """The hidden states of the rows that an index of the logits takes; None where it takes none of whole rows."""
    hidden, vocabulary = deferred.hidden, deferred.shape[-1]
    if any(deferred.source.projection.dropout):  # the mask goes by the place of a row among all
        return None
    if isinstance(index, Tensor):
        whole = deferred.dim() > (index.dim() if index.dtype == torch.bool else 1)
        return hidden[index] if whole else None
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or part is None or isinstance(part, (int, slice)) for part in index):
        return None
    rows = hidden[index]
    taken = torch.empty(1, device="meta").expand(*hidden.shape[:-1], vocabulary)[index]
    whole = rows.dim() and rows.shape[-1] == hidden.shape[-1] and taken.shape[-1] == vocabulary
    return rows if whole else None


def _cross_entropy(
    deferred: DeferredLogits, target: Tensor, weight=None, size_average=None, ignore_index=-100, reduce=None,
    reduction="mean", label_smoothing=0.0,
) -> Tensor | None:  # fmt: skip
    source, settings = deferred.source, _scale_and_softcap(deferred.steps)
    it = source.projection
    reason = None
    if weight is not None or label_smoothing or size_average is not None or reduce is not None:
        reason = "its loss weighs classes or smooths labels"
    elif settings is None:
        reason = "its logits are no scaled and softcapped projection"
    elif not is_plain_tensor(target) or target.dtype != torch.int64 or target.device != source.hidden.device:
        reason = "its labels are no int64 tensor on the device of its hidden states"
    elif deferred.dim() != 2 or target.shape != deferred.shape[:1]:
        reason = f"its loss compares logits {list(deferred.shape)} with labels {list(target.shape)}"
    if reason is not None:
        source.falls_back(reason)
        return None
    source.check()
    recorded = torch.is_grad_enabled() and deferred.recorded
    with source.in_its_autocast(), torch.set_grad_enabled(recorded):
        value = loss.call(
            deferred.hidden, it.weight, target, it.bias, it.lora_A, it.lora_B, it.scaling, it.dropout, it.seed,
            ignore_index, reduction, None, *settings, it.compute_dtype,
        )  # fmt: skip
        source.fused = True
        return value.to(deferred.dtype)


def _scale_and_softcap(steps: tuple) -> tuple[float, float | None] | None:
    """logits = softcap * tanh(scale * projection / softcap), or scale * projection; None for what is neither."""
    factors = [1.0]
    for name, *number in steps:
        if name == "tanh":
            factors.append(1.0)
        else:
            factors[-1] *= number[0]
    if len(factors) == 1:
        return factors[0], None
    before, after = factors[0], factors[1]
    return (before * after, after) if len(factors) == 2 and after > 0 else None
