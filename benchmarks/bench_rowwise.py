"""How much faster and leaner are a norm and a gated activation as one operator each than as the ops they are made of?

Forward and backward of each, with the gradients of all operands but a norm's weight, are timed in turn

- as the modules of transformers compute it, "eager", and "compiled", the same under torch.compile;
- as "peftfast", `peftfast.ops.swiglu` and `rms_norm`.

Usage:

    python benchmarks/bench_rowwise.py --quick      # SwiGLU of 2048 x 5632, RMSNorm of 512 and 2048 x 2048; minutes
    python benchmarks/bench_rowwise.py --rows 512 4096 --features 4096 --op rms_norm --trained
    python benchmarks/bench_rowwise.py --step       # what a training step of a LoRA model keeps for backward; no timing

The work counted is the least possible: each operand read once, each result written once, forward and backward. Saved is
what is kept beside the operands.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import (
    DTYPES,
    Contender,
    Record,
    machine_facts,
    parsed,
    parser_of,
    positive,
    run,
    speed_bar,
    verdict,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.integrations import rowwise
from peftfast.ops import rms_norm, swiglu
from peftfast.testing import bytes_saved_for_backward


@dataclass(frozen=True)
class Point:
    """One workload."""

    op: str
    dtype: str
    rows: int
    features: int
    trained: bool  # the weight of a norm


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """LlamaRMSNorm's forward."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


CALLS = {"swiglu": (eager_swiglu, swiglu), "rms_norm": (eager_rms_norm, rms_norm)}


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    torch.manual_seed(0)
    dtype = DTYPES[point.dtype]
    x, other, grad = (torch.randn(point.rows, point.features, device=device, dtype=dtype) for _ in range(3))
    gated = point.op == "swiglu"
    operands = [x, other if gated else other[0].clone()]
    wanted = 2 if gated or point.trained else 1

    def call(function: Callable, rows: int = point.rows) -> Callable[[], Any]:
        leaves = [
            (operand[:rows] if operand.dim() == 2 else operand).detach().requires_grad_(i < wanted)
            for i, operand in enumerate(operands)
        ]
        return lambda: torch.autograd.grad(function(*leaves), leaves[:wanted], grad[:rows])

    def saved(function: Callable) -> int:
        leaves = [operand.detach().requires_grad_(i < wanted) for i, operand in enumerate(operands)]
        return bytes_saved_for_backward(lambda: function(*leaves), leaves)

    eager, ours = CALLS[point.op]

    def contender(function: Callable, ours: bool = False) -> Contender:
        return Contender(
            run=call(function),
            flops=(20 if gated else 12) * x.numel(),
            bytes_moved=(8 if gated else 5) * x.numel() * dtype.itemsize,
            ours=ours,
            shrunk=partial(call, eager),
            rows=point.rows,
            saved_bytes=partial(saved, function),
        )

    torch.compiler.reset()
    return {
        "eager": contender(eager),
        "compiled": contender(torch.compile(eager, dynamic=False)),
        "peftfast": contender(ours, ours=True),
    }


def acceptance(record: Record) -> list[dict[str, str]]:
    """Faster than the modules, and not a byte for backward but 4 per row of a norm."""
    seen, checks = [], []
    for row in record.rows:
        point, kept = row["point"], row["implementations"]["peftfast"]["saved_bytes"]
        checks.append(kept == (4 * point["rows"] if point["op"] == "rms_norm" else 0))
        seen.append(f"{point['op']} {point['dtype']} rows={point['rows']}: {kept} B")
    return [
        speed_bar("time of forward and backward", 1.0, record.rows, ["eager", "compiled"]),
        verdict("kept for backward", "0 B, of a norm 4 B a row", seen, checks),
    ]


def record_step(path: Path | None) -> None:
    """The bytes that two layers of TinyLlama's shape with LoRA keep for backward, 512 tokens, fp32: "eager" with stock
    PEFT, "peftfast", and "without_rowwise", peftfast without these two operators."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=4,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear")).train()
    ids = torch.randint(32000, (1, 512))

    def kept() -> int:
        known = [*model.parameters(), *model.buffers()]
        return bytes_saved_for_backward(lambda: model(input_ids=ids, labels=ids).loss, known)

    found = {"eager": kept()}
    with peftfast.enabled():
        found["peftfast"] = kept()
        layers = [module for module in model.modules() if rowwise.answers_for(module)]
        for layer in layers:
            layer.forward = partial(type(layer).forward.__wrapped__, layer)
        found["without_rowwise"] = kept()
    record = Record(benchmark="rowwise-step", machine=machine_facts("cpu"), ceilings={})
    point = {"model": "2 layers of TinyLlama", "dtype": "fp32", "tokens": 512, "lora_r": 16}
    record.rows = [{"point": point, "implementations": {}, "kept_bytes": found}]
    path = path or record.default_path()
    record.save(path)
    text = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in found.items())
    print(f"kept for backward: {text}. Record: {path}")


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    quick = "SwiGLU of 2048 x 5632, RMSNorm of 512 and 2048 x 2048"
    parser = parser_of("rowwise", __doc__, quick, cap=20.0, budget=5.0)
    add = parser.add_argument
    add("--op", nargs="+", choices=CALLS, default=list(CALLS))
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--rows", nargs="+", type=positive, default=[1, 512, 2048])
    add("--features", nargs="+", type=positive, default=[2048, 5632])
    add("--trained", action="store_true", help="the weight of a norm has a gradient too")
    add("--step", action="store_true", help="the memory of a model's step, and nothing else")
    return parsed(parser, arguments)


def main() -> None:
    options = parse()
    if options.step:
        record_step(options.json)
        return
    workloads = itertools.product(options.op, options.dtype, options.rows, options.features)
    if options.quick:
        shapes = [("swiglu", 2048, 5632), ("rms_norm", 512, 2048), ("rms_norm", 2048, 2048)]
        workloads = [(op, dtype, *shape) for op, *shape in shapes for dtype in options.dtype]
    points = [Point(*workload, options.trained and workload[0] == "rms_norm") for workload in workloads]
    run("rowwise", options, points, contenders, acceptance=acceptance)


if __name__ == "__main__":
    main()
