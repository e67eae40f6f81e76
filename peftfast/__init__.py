"""Faster parameter-efficient fine-tuning: fused kernels under the code that PEFT and transformers users already have.

    import peftfast
    peftfast.enable()      # from here on, stock PEFT models run the fused operators

`peftfast.report(model)` says, layer by layer, which path runs and why; nothing falls back in silence.
"""

from __future__ import annotations

import importlib

import torch

from peftfast import _C
from peftfast.integrations import FallbackError, Report, accelerate, disable, enable, enabled, report
from peftfast.integrations.after_import import after_import

__version__ = _C.version
_C.isa_in_use()  # refuses a PEFTFAST_CPU_ISA that cannot run, here rather than at the first call
__all__ = [
    "BottleneckConfig",
    "ExpertLoraConfig",
    "ExpertProfile",
    "FallbackError",
    "FourBitConfig",
    "MixtureLoraConfig",
    "Report",
    "accelerate",
    "build_info",
    "disable",
    "enable",
    "enabled",
    "machine_peak",
    "offload_activations",
    "profile_experts",
    "report",
    "tile_mlps",
]


# On demand: transformers and PEFT take seconds to import.
_LATE = {
    "BottleneckConfig": "peftfast.integrations.tuners.bottleneck",
    "FourBitConfig": "peftfast.integrations.transformers",
    "ExpertLoraConfig": "peftfast.integrations.tuners.expert_lora",
    "MixtureLoraConfig": "peftfast.integrations.tuners.mixture_lora",
    "ExpertProfile": "peftfast.integrations.tuners.profile",
    "offload_activations": "peftfast.integrations.offload",
    "profile_experts": "peftfast.integrations.tuners.profile",
    "tile_mlps": "peftfast.integrations.rowwise",
}


def __getattr__(name: str):
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module 'peftfast' has no attribute {name!r}")


# So that experts_implementation="peftfast" is known wherever transformers is.
after_import(
    "transformers.integrations.moe", lambda _: importlib.import_module("peftfast.integrations.experts")
)
# So that PEFT knows the methods that peftfast adds to it.
after_import("peft", lambda _: importlib.import_module("peftfast.integrations.tuners"))


def build_info() -> dict:
    """Facts of the build and of this process: version, compiler, torch, threads, the instruction set in use ("isa"),
    those that this machine can run ("isas", best first), and whether there are GPU kernels, or why not ("cuda")."""
    from peftfast.ops.devices import cuda_state

    return {
        "version": __version__,
        "compiler": _C.compiler,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "isa": _C.isa_in_use(),
        "isas": _C.supported_isas(),
        "cuda": cuda_state(),
    }


def machine_peak(dtype: torch.dtype) -> float:
    """Measured ceiling in FLOP/s of torch's threads together: back-to-back multiply-adds of the instruction that the
    CPU kernels use for `dtype` (float32, bfloat16 or float16). Takes about a second.

    Raises:
        ValueError: there are no kernels for `dtype`.
    """
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if dtype not in dtypes:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}.")
    return _C.machine_peak(dtypes.index(dtype))
