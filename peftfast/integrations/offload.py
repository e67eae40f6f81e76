"""Activations in the host's memory, from forward to backward."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from peftfast.integrations.experts import quantized_parameters

SMALLEST = 2**20  # bytes: less is not worth a copy
AHEAD = 2  # copies under way, in either direction


class offload_activations(saved_tensors_hooks):
    """A context in which forward keeps what it needs for backward in the host's memory.

        with peftfast.offload_activations(model):
            loss = model(**batch).loss
        loss.backward()

    With gradient checkpointing that is the input of each layer, so that the length of a sequence is bounded by the
    activations of one layer; without, it is everything that would be computed again. Copies run beside the computation,
    through pinned memory and on a stream of their own; at most two tensors wait for theirs, and as many are fetched
    before backward asks for them. Results are the same bits. A tensor that several operators keep is copied once;
    weights, buffers and tensors of less than 1 MiB stay where they are.

    Args:
        model: whose weights stay; gradients may be those of anything computed in the context.
        device: the kind of device whose tensors are offloaded; by default the accelerator's. Without one, nothing is.
    """

    def __init__(self, model: nn.Module, *, device: str | None = None) -> None:
        accelerator = torch.accelerator.current_accelerator()
        self.model, self.device = model, device or (accelerator and accelerator.type)
        self.ahead = AHEAD
        self._streams: dict[torch.device, torch.Stream] = {}
        super().__init__(self._pack, lambda kept: kept if isinstance(kept, Tensor) else kept.back())

    def __enter__(self) -> None:
        # Found anew each time: adapters come and go, weights move.
        self._weights = {tensor.untyped_storage()._cdata for tensor in _weights(self.model)}
        # By storage and view; where a storage is gone, its address may be another's.
        self._kept: dict[tuple, tuple[StorageWeakRef, weakref.ref[_Offloaded]]] = {}
        self._leaving: deque[_Offloaded] = deque()
        self._last: weakref.ref[_Offloaded] | None = None
        super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for offloaded in self._leaving:
            offloaded.let_go()
        self._leaving.clear()
        self._kept.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        storage = tensor.untyped_storage()
        if (
            tensor.device.type != self.device
            or type(tensor) not in (Tensor, FakeTensor)  # parameters, distributed tensors
            or tensor.nbytes < SMALLEST
            or storage._cdata in self._weights
        ):
            return tensor
        view = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        view += (tensor._version,)
        of, earlier = self._kept.get(view, (None, lambda: None))
        if (offloaded := earlier()) is not None and not of.expired():
            offloaded.uses += 1
            return offloaded
        if tensor.device not in self._streams:
            self._streams[tensor.device] = torch.get_device_module(tensor.device).Stream(tensor.device)
        offloaded = _Offloaded(tensor, self._streams[tensor.device], self._last, self.ahead)
        self._kept[view] = StorageWeakRef(storage), weakref.ref(offloaded)
        self._last = weakref.ref(offloaded)
        self._leaving.append(offloaded)
        if len(self._leaving) > self.ahead:
            self._leaving.popleft().let_go()
        return offloaded


class _Offloaded:
    """A tensor whose values are in the host's memory, or on the way there or back.

    Args:
        stream: for the copies, which follow each other on it.
        previous: what was offloaded before, which backward will ask for next.
    """

    def __init__(
        self, tensor: Tensor, stream: torch.Stream, previous: weakref.ref[_Offloaded] | None, ahead: int
    ) -> None:
        self.stream, self.previous, self.ahead = stream, previous, ahead
        self.uses = 1
        self.on_device: Tensor | None = tensor
        self._device, self._module = tensor.device, torch.get_device_module(tensor.device)
        self.host = torch.empty_like(tensor, device="cpu", pin_memory=self._device.type != "cpu")
        self._done = self._copy(tensor, self.host)

    def _copy(self, source: Tensor, to: Tensor) -> torch.Event:
        """Begins once all is done that was asked of the device so far; returns its end."""
        self.stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self.stream):
            to.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def _wait(self) -> None:
        """What is asked of the device from here on waits for the copy."""
        self._module.current_stream(self._device).wait_event(self._done)

    def let_go(self) -> None:
        """Leaves the tensor's memory on the device to others."""
        self._wait()
        self.on_device = None

    def fetch(self) -> None:
        """Begins to bring it back, unless it is there or on the way."""
        if self.on_device is None:
            tensor = torch.empty_like(self.host, device=self._device)
            self._done = self._copy(self.host, tensor)
            if self._device.type != "cpu":
                tensor.record_stream(self.stream)  # should backward end before the copy
            self.on_device = tensor

    def back(self) -> Tensor:
        """The tensor, for one of its uses."""
        self.fetch()
        self._wait()
        tensor = self.on_device
        self.uses -= 1
        if self.uses <= 0:
            self.on_device = None
        previous = self
        for _ in range(self.ahead):
            previous = previous.previous and previous.previous()
            if previous is None:
                break
            previous.fetch()
        return tensor


def _weights(model: nn.Module) -> Iterator[Tensor]:
    """All tensors of the model, with the scales of those that are quantized."""
    yield from model.parameters()
    yield from model.buffers()
    for weight in quantized_parameters(model).values():
        yield from weight.tensors()
    for parameter in model.parameters():  # bitsandbytes'
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (state.absmax, state.code)
            state = state.state2
