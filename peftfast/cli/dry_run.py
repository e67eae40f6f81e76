"""A training step without data: the model's own modules run on tensors that have no memory, and every one is counted.

torch's FakeTensorMode gives a tensor a shape, a dtype and a device but no storage. peftfast's operators, which have
told torch what they return and keep for backward, run in it as torch's own do. So what a step allocates, and for how
long, comes from the code that will train, whatever the architecture. What an operator needs within itself for the
length of its call is not seen: of peftfast's on the CPU a panel of the weight per thread, in the cache; on a GPU the
adapters' factors and products with them, which are small, and 4-bit weights decoded for many rows, which are added.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import masking_utils

import peftfast
from peftfast.cli.experts import experts_of
from peftfast.integrations import bases
from peftfast.integrations.experts import quantized_parameters, quantized_weights
from peftfast.integrations.offload import AHEAD, offload_activations
from peftfast.integrations.rowwise import tile_mlps
from peftfast.nn.quantized import QuantizedLayer
from peftfast.ops import devices, fourbit
from peftfast.ops.lora import DTYPES

PARTS = ("gradients", "activations", "logits", "workspace")
# On a GPU a 4-bit weight is decoded for a product of so many rows and more, if it is no larger.
DECODED_ROWS, MOST_DECODED_BYTES = 512, 256 << 20


class DryRun:
    """A model with adapters, made on the meta device, whose training steps are run without data.

    `model` is taken over: it cannot be used for anything else.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mode = model.train(), FakeTensorMode()
        with self.mode:
            _without_memory(model)
        if experts_of(model):
            model.set_experts_implementation("peftfast")
        self.repeats = _leave_out_repeated_layers(model)
        self.known = list(_tensors(model))

    def step(
        self,
        batch_size: int,
        sequence_len: int,
        *,
        checkpointing: bool,
        offloading: bool = False,
        tiled_mlp: bool = False,
        accumulation: bool = False,
        on_gpu: bool = False,
    ) -> dict[str, int]:
        """What a training step allocates beside weights and optimizer when that is most, in bytes.

        Args:
            checkpointing: each decoder layer keeps its input alone, and runs once more in backward.
            offloading: what goes from forward to backward is in the host's memory, which is not counted.
            tiled_mlp: MLPs run on some tokens at a time.
            accumulation: gradients of earlier batches are there already, and are not counted.
            on_gpu: as on a GPU, which computes more of the logits at a time, and decodes weights; else as on the CPU.
        Returns:
            By PARTS: "gradients" of the adapters; "activations", kept from forward to backward; "logits", from the
            output embeddings to the loss and back; "workspace", all that lives within one layer, which with
            checkpointing comprises what its second forward keeps.
        Raises:
            ValueError: the model does not support checkpointing.
        """
        base = self.model.get_base_model()
        if checkpointing:
            # No random state to keep: there are no random numbers.
            base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        else:
            base.activation_checkpointing_disable()
        if tiled_mlp:
            tile_mlps(base)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self.mode:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if accumulation else None
            recorder = _Recorder([*self.known, *(it.grad for it in trained if accumulation)], on_gpu)
            handles = _mark_segments(self.model, recorder)
            offload = _Offloading(self.model, recorder) if offloading else contextlib.nullcontext()
            with recorder, _looking_at_values(), _fakes_on("cuda" if on_gpu else "cpu"), peftfast.enabled():
                tokens = torch.zeros(batch_size, sequence_len, dtype=torch.int64)
                with offload:
                    loss = self.model(input_ids=tokens, labels=tokens, use_cache=False).loss
                loss.backward()
            recorder.label(parameter.grad for parameter in trained if not accumulation)
            for handle in handles:
                handle.remove()
            for parameter in trained:
                parameter.grad = None
        peak = _peak(_repeated(recorder.segments, self.repeats))
        if offloading:
            peak["activations"] += AHEAD * offload.largest
        return peak


# ---- what is recorded --------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Storage:
    """The memory of a tensor and its views, by the numbers of the segments in which it came and went."""

    size: int
    came: int
    went: int | None = None
    part: str = "workspace"


@dataclass
class _Segment:
    """A stretch of a step: what is allocated (1) and freed (-1) in it, in order; `layer` runs, None: no layer does."""

    phase: str  # "forward", "logits" or "backward"
    layer: int | None = None
    events: list[tuple[_Storage, int]] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Sees each tensor come and go while it is on, but those that are known."""

    def __init__(self, known: Iterable[Tensor], on_gpu: bool) -> None:
        super().__init__()
        self.on_gpu = on_gpu
        self.segments = [_Segment("forward")]
        self.storages = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})
        self.answers = WeakIdKeyDictionary()
        self.elsewhere = False  # what comes now is not in the memory that is counted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            # What code asks of values that are not there: is all of it right (yes), is something out of range (no).
            return self.answers.get(args[0], 0)
        if function is torch.ops.aten.equal.default:
            return True
        if function is torch.ops.aten.nonzero.default:  # the labels that count: not the last
            function, args = torch.ops.aten.zeros.default, ([args[0].numel() - 1, args[0].dim()],)
            kwargs = {"dtype": torch.int64, "device": "cpu"}
        out = function(*args, **(kwargs or {}))
        self.saw(tensor for tensor in tree_iter(out) if isinstance(tensor, Tensor))
        if self.on_gpu and function in (fourbit.FORWARD, fourbit.BACKWARD):
            self.used(_gpu_workspace(function, args))
        if function is torch.ops.aten.all.default:
            self.answers[out] = 1
        return out

    def saw(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self.storages and self.elsewhere:
                self.storages[storage] = None
            if storage not in self.storages:
                entry = self.storages[storage] = _Storage(storage.nbytes(), len(self.segments) - 1)
                self.segments[-1].events.append((entry, 1))
                weakref.finalize(storage, self._went, entry)

    def used(self, size: int) -> None:
        """A workspace of an operator, which is gone when that is done."""
        here = len(self.segments) - 1
        entry = _Storage(size, here, here)
        self.segments[-1].events += [(entry, 1), (entry, -1)]

    def _went(self, entry: _Storage) -> None:
        entry.went = len(self.segments) - 1
        self.segments[-1].events.append((entry, -1))

    def begin(self, phase: str, layer: int | None = None) -> None:
        """What comes next is of this segment."""
        self.segments.append(_Segment(phase, layer))

    def label(self, gradients: Iterable[Tensor]) -> None:
        """Finds what each storage was for, now that the step is over."""
        for gradient in gradients:
            self.storages[gradient.untyped_storage()].part = "gradients"
        for entry in {entry for segment in self.segments for entry, _ in segment.events}:
            phase = self.segments[entry.came].phase
            if entry.part == "gradients":
                continue
            if phase == "logits":
                entry.part = "logits"
            elif phase == "forward" and entry.went != entry.came:
                entry.part = "activations"


class _Offloading(offload_activations):
    """Offloads fakes. None waits for its copy, nor comes early, so that layers which are alike keep alike: of what is
    under way there are at most AHEAD of the `largest`."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        super().__init__(model, device="cpu")
        self.recorder, self.ahead, self.largest = recorder, 0, 0

    def _pack(self, tensor: Tensor):
        self.recorder.elsewhere = True
        kept = super()._pack(tensor)
        self.recorder.elsewhere = False
        if kept is not tensor:
            self.largest = max(self.largest, tensor.nbytes)
        return kept


def _mark_segments(model: nn.Module, recorder: _Recorder) -> list:
    """Has each decoder layer's forward, what follows the last one's, and each layer's backward begin a segment."""

    def before(layer: int, *_) -> None:
        if torch._C._current_graph_task_id() == -1:  # else forward runs again within backward
            recorder.begin("forward", layer)

    def after(layer: int, module, args, output) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if torch._C._current_graph_task_id() == -1 and hidden.requires_grad:
            hidden.register_hook(lambda grad: recorder.begin("backward", layer))

    handles = []
    for number, layer in enumerate(_decoder_layers(model)):
        handles.append(layer.register_forward_pre_hook(functools.partial(before, number)))
        handles.append(layer.register_forward_hook(functools.partial(after, number)))
    decoder = model.get_base_model().base_model
    handles.append(decoder.register_forward_hook(lambda *_: recorder.begin("logits")))
    return handles


def _repeated(segments: list[_Segment], times: int) -> Iterator[_Segment]:
    """The segments of the whole model: those of layer 1 stand for `times` layers, in forward and in backward.

    What comes or goes there alike for every layer does so each time; what is left of the logits goes once.
    """
    for segment in segments:
        yield segment
        if segment.layer == 1:
            events = [(entry, sign) for entry, sign in segment.events if entry.part != "logits"]
            yield from itertools.repeat(replace(segment, events=events), times - 1)


def _peak(segments: Iterable[_Segment]) -> dict[str, int]:
    """The bytes of each of PARTS at the moment when their sum is largest."""
    now, total = dict.fromkeys(PARTS, 0), 0
    found, largest = dict(now), 0
    for segment in segments:
        for entry, sign in segment.events:
            now[entry.part] += sign * entry.size
            total += sign * entry.size
            if total > largest:
                largest, found = total, dict(now)
    return found


def _gpu_workspace(function, args: tuple) -> int:
    """Bytes beside the results of a 4-bit product, as csrc/cuda/linear.cu decides on them: the weight decoded, and an
    input in fp32 rounded to 16 bits."""
    named = dict(zip((argument.name for argument in function._schema.arguments), args))
    backward = function is fourbit.BACKWARD
    x, compute, K = named["grad_y" if backward else "x"], DTYPES[named["compute_dtype"]], named["x"].shape[1]
    if backward and not named["want_x"]:
        return 0
    if compute == torch.float32 or x.dtype not in (torch.float32, compute):  # decoded within the product
        return 0
    decoded = 2 * x.shape[1] * (K if backward else named["out_features"])
    # Few rows of 32 codes each lie well enough to be decoded within the product, too.
    if decoded > MOST_DECODED_BYTES or (len(x) < DECODED_ROWS and K % 32 == 0):
        decoded = 0
    return decoded + (2 * x.numel() if x.dtype == torch.float32 else 0)


@contextlib.contextmanager
def _fakes_on(device: str) -> Iterator[None]:
    """Has peftfast choose for fakes, which are all on the CPU, as it does for tensors on this kind of device."""
    devices.of_fakes = device
    try:
        yield
    finally:
        devices.of_fakes = None


@contextlib.contextmanager
def _looking_at_values() -> Iterator[None]:
    """Has transformers look at what masks hold, and peftfast take part and look at labels, as in training.

    The recorder then answers that nothing is padded or packed, so that attention runs without a mask of its own, and
    that all labels count.
    """
    before = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    bases.fakes_are_plain = True
    try:
        yield
    finally:
        masking_utils.is_tracing = before
        bases.fakes_are_plain = False


# ---- the model without memory ------------------------------------------------------------------------------


def _without_memory(model: nn.Module) -> None:
    """Puts tensors of the current FakeTensorMode, on the CPU, in the place of those on the meta device."""
    made: dict[Tensor, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if tensor not in made:  # tied weights stay tied
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            parameter = isinstance(tensor, nn.Parameter)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
        return made[tensor]

    first: dict[Tensor, QuantizedLayer] = {}
    for module in model.modules():
        quantized = {name: weight.map(fake) for name, weight in quantized_weights(module).items()}
        for held in (module._parameters, module._buffers):
            held.update({name: fake(tensor) for name, tensor in held.items() if tensor is not None})
        if isinstance(module, QuantizedLayer):
            owner = first.setdefault(module.weight, module)
            if owner is module:
                module.assign(quantized["weight"])
            else:
                module.share(owner)
        else:
            for name, weight in quantized.items():
                module.set_fourbit_weight(name, weight)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    """All that is in memory before a step begins, but the optimizer."""
    yield from model.parameters()
    yield from model.buffers()
    for weight in quantized_parameters(model).values():
        yield from weight.tensors()


# ---- layers that are alike ---------------------------------------------------------------------------------


def _decoder_layers(model: nn.Module) -> nn.ModuleList | list:
    """The decoder layers: the list that has as many modules as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if type(module) is nn.ModuleList and len(module) == count]
    return lists[0] if lists else []


def _leave_out_repeated_layers(model: nn.Module) -> int:
    """Leaves three of decoder layers that are all alike: the first, one for all in the middle, and the last.

    Returns:
        How many layers the second stands for; 1 where no layer was left out.
    """
    layers = _decoder_layers(model)
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    kinds = {
        (
            kind,
            tuple(
                (name, type(part), tuple((p.shape, p.dtype, p.requires_grad) for p in part.parameters(False)))
                for name, part in layer.named_modules()
            ),
        )
        for kind, layer in zip(types, layers, strict=False)
    }
    if len(layers) < 4 or len(kinds) > 1:
        return 1
    middle = len(layers) - 2
    del layers[2:-1]
    config.num_hidden_layers = len(layers)
    return middle
