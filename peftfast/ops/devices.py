"""Which devices have kernels in this process, and why others have none."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from peftfast import _C

LEAST_CAPABILITY = (8, 0)  # tensor cores for bfloat16 and asynchronous copies


@functools.cache
def cuda_state() -> str:
    """Registers the GPU kernels, if there are any and a GPU for them; says how that went.

    Not at import: it initializes CUDA, which would take the choice of devices, and forking, from the user.
    """
    if not _C.cuda.startswith("built") or not torch.cuda.is_available():
        return _C.cuda if not _C.cuda.startswith("built") else f"{_C.cuda}; not loaded: torch sees no GPU"
    try:
        best = max(range(torch.cuda.device_count()), key=torch.cuda.get_device_capability)
        if too_old := _too_old(best):  # one that serves is enough; what is on another does not run on kernels
            return f"{_C.cuda}; not loaded: {too_old}"
        torch.ops.load_library(Path(__file__).parent.parent / "_cuda.so")
    except (OSError, RuntimeError) as error:
        return f"{_C.cuda}; not loaded: {error}"
    return f"{_C.cuda}; loaded"


def _too_old(gpu: int) -> str | None:
    """None, or why the kernels do not run on that GPU."""
    capability = torch.cuda.get_device_capability(gpu)
    if capability >= LEAST_CAPABILITY:
        return None
    has, need = (".".join(map(str, numbers)) for numbers in (capability, LEAST_CAPABILITY))
    return f"{torch.cuda.get_device_name(gpu)} has compute capability {has}, and the kernels need {need}"


@functools.cache
def _serves(gpu: int | None) -> bool:
    return cuda_state().endswith("; loaded") and (gpu is None or _too_old(gpu) is None)


@torch.compiler.assume_constant_result  # torch.compile would look into it, and could not go on
def _gpu_has_kernels(gpu: int | None) -> bool:
    return _serves(gpu)


class _KernelDevices:
    """The devices that have kernels, and their types. Whether GPUs do is found out when one is asked for."""

    def __contains__(self, device: torch.device | str) -> bool:
        kind, index = (device, None) if isinstance(device, str) else (device.type, device.index)
        return kind == "cpu" or (kind == "cuda" and _gpu_has_kernels(index))


KERNEL_DEVICES = _KernelDevices()


def why_no_kernel(device: torch.device) -> str | None:
    """None, or why nothing on `device` runs on kernels."""
    if device in KERNEL_DEVICES:
        return None
    loaded = device.type == "cuda" and cuda_state().endswith("; loaded")
    return _too_old(device.index) if loaded else f"there is no kernel for {device.type} yet"


def host_reads(tensor: Tensor) -> bool:
    """Whether a value of `tensor` can be looked at: without waiting for a GPU, and not while a graph is made."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


of_fakes: str | None = None  # the kind of device that fakes stand for, if it is not their own


def device_type(tensor: Tensor) -> str:
    """The kind of device on which `tensor` is, or which it stands for."""
    return (of_fakes if isinstance(tensor, FakeTensor) else None) or tensor.device.type
