"""Parameters that FSDP2 (`torch.distributed.fsdp.fully_shard`) shards between calls and gathers for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from peftfast.nn.fourbit import is_sharded


@contextlib.contextmanager
def as_gathered(model: nn.Module) -> Iterator[None]:
    """Within the block, what is sharded looks as it does while its module runs: a plain tensor of the whole shape.

    For judging the layers only. Nothing is gathered, so that one process may ask alone: the values are zeros, of which
    one is stored.
    """
    sharded = list(_sharded(model))
    for module, name, parameter in sharded:
        zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(zeros, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in sharded:
            module._parameters[name] = parameter


def _sharded(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in filter(is_sharded, model.modules()):
        for name, parameter in module._parameters.items():
            if _is_gathered_whole(parameter):
                yield module, name, parameter


def _is_gathered_whole(parameter: Tensor | None) -> bool:
    """What FSDP alone shards, over groups of processes that each have a copy. What tensor parallelism shards too is
    still a DTensor when FSDP has gathered it."""
    placements = getattr(parameter, "placements", None)
    if placements is None:
        return False
    *copies, last = placements
    return last.is_shard() and all(placement.is_replicate() for placement in copies)
