"""PEFT's mixed batches, in which every sample names its adapter, on the fused operators.

The base layer runs once for the whole batch. Beside it, one grouped operator computes the low-rank terms: neighbouring
samples with the same adapter are a group, the adapter is its slot. No row is copied or sorted, whatever the order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.functional import pad

from peftfast.integrations.bases import KINDS
from peftfast.ops import moe

BASE = "__base__"  # PEFT's name for no adapter


def named(layer: LoraLayer, adapter_names: Sequence[str]) -> list[str]:
    """The adapters of `layer` among `adapter_names`, each once; samples of all others get the base layer alone."""
    adapters = layer.lora_A.keys() | layer.lora_embedding_A.keys()
    return [name for name in dict.fromkeys(adapter_names) if name != BASE and name in adapters]


def why_not(layer: LoraLayer, names: list[str], dropout: list[float]) -> str | None:
    """None, or the reason why the operators do not compute this mixture of plain LoRA adapters."""
    for name in names:
        if layer.lora_B[name].bias is not None:
            return f"adapter_names mixes adapters of which {name} has a bias"
    if len(set(dropout)) > 1:
        return "adapter_names mixes adapters with different dropout"
    return None


def fused(
    layer: LoraLayer, x: Tensor, adapter_names: Sequence[str], names: list[str], dropout: float
) -> Tensor:
    """The layer with, for each sample, the adapter that it names.

    Args:
        x: [samples, ..., K].
        adapter_names: one per sample.
        names: the adapters among them that the layer has.
        dropout: of all of these.
    Raises:
        ValueError: there are not as many names as samples.
    """
    layer._check_forward_args(x, adapter_names=adapter_names)
    base = layer.base_layer
    y = KINDS[type(base)].call(base, x, [], [], [], base.bias, [])
    slot_of = {name: slot for slot, name in enumerate(names)}
    runs = [
        (slot, len(list(run)))
        for slot, run in itertools.groupby(slot_of.get(name, -1) for name in adapter_names)
    ]
    rows = x.shape[1:-1].numel()  # of a sample
    offsets = [0, *itertools.accumulate(samples * rows for _, samples in runs)]
    low_rank = moe.call(
        x.reshape(-1, x.shape[-1]),
        None,
        torch.tensor(offsets, device=x.device),
        torch.zeros(len(runs), dtype=torch.int64, device=x.device),
        torch.tensor([slot for slot, _ in runs], device=x.device),
        *_stacked(layer, names),
        1.0,
        dropout=dropout,
    )
    return y + low_rank.view(y.shape).to(y.dtype)


def _stacked(layer: LoraLayer, names: list[str]) -> tuple[Tensor, Tensor]:
    """lora_A [adapters, r, K] and lora_B [adapters, N, r], which has the scaling in it, both padded to one rank.

    In float32, where the scaling rounds nothing that counts.
    """
    rank = max(layer.lora_A[name].weight.shape[0] for name in names)
    A, B = [], []
    for name in names:
        missing = rank - layer.lora_A[name].weight.shape[0]
        A.append(pad(layer.lora_A[name].weight.float(), (0, 0, 0, missing)))
        B.append(pad(layer.lora_B[name].weight.float() * layer.scaling[name], (0, missing)))
    return torch.stack(A), torch.stack(B)
