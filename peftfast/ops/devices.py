"""Which devices have kernels in this process, and why others have none."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from peftfast import _C

LEAST_CAPABILITY = (8, 0)  # tensor cores for bfloat16 and asynchronous copies


def _load_cuda() -> str:
    """Registers the GPU kernels, if there are any and a GPU for them; says how that went."""
    library = Path(__file__).parent.parent / "_cuda.so"
    if not library.exists():
        return _C.cuda
    if not torch.cuda.is_available():
        return f"{_C.cuda}; not loaded: torch sees no GPU"
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            return (
                f"{_C.cuda}; not loaded: {torch.cuda.get_device_name(device)} has compute capability "
                f"{capability[0]}.{capability[1]}, and the kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
            )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{_C.cuda}; not loaded: {error}"
    return f"{_C.cuda}; loaded"


CUDA = _load_cuda()
KERNEL_DEVICES = ("cpu", "cuda") if CUDA.endswith("; loaded") else ("cpu",)


def host_reads(tensor: Tensor) -> bool:
    """Whether a value of `tensor` can be looked at: without waiting for a GPU, and not while a graph is made."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
