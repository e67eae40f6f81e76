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
        # One that serves is enough: calls on another are refused by the kernels, which name it.
        capabilities = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        if max(capabilities) < LEAST_CAPABILITY:
            best = capabilities.index(max(capabilities))
            return (
                f"{_C.cuda}; not loaded: {torch.cuda.get_device_name(best)} has compute capability "
                f"{capabilities[best][0]}.{capabilities[best][1]}, and the kernels need "
                f"{LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
            )
        torch.ops.load_library(Path(__file__).parent.parent / "_cuda.so")
    except (OSError, RuntimeError) as error:
        return f"{_C.cuda}; not loaded: {error}"
    return f"{_C.cuda}; loaded"


class _KernelDevices:
    """The types of devices that have kernels. Whether GPUs do is found out when one is asked for."""

    def __contains__(self, device: str) -> bool:
        return device == "cpu" or (device == "cuda" and cuda_state().endswith("; loaded"))


KERNEL_DEVICES = _KernelDevices()


def host_reads(tensor: Tensor) -> bool:
    """Whether a value of `tensor` can be looked at: without waiting for a GPU, and not while a graph is made."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


of_fakes: str | None = None  # the kind of device that fakes stand for, if it is not their own


def device_type(tensor: Tensor) -> str:
    """The kind of device on which `tensor` is, or which it stands for."""
    return (of_fakes if isinstance(tensor, FakeTensor) else None) or tensor.device.type
