"""How much faster and leaner is a bottleneck adapter as one operator than as the modules that it is made of?

One adapter (LayerNorm, down, activation, up, scaling, residual) is timed in turn

- as modules of torch, one after the other: "eager", and "compiled", the same under torch.compile;
- as "peftfast", `peftfast.ops.bottleneck_adapter` on the same parameters.

Usage:

    python benchmarks/bench_adapter.py --quick      # H 2048 and D 64 at 512 tokens, without and with a norm; minutes
    python benchmarks/bench_adapter.py --hidden 2048 4096 --size 64 256 --tokens 1 64 512 4096

Placements: "parallel" reads an x of its own and adds to another tensor; "after" reads the tensor that it adds to, and
has a LayerNorm. Timed are "forward", without gradients, and "forward+backward", with those of the input, the residual
and all parameters. The work counted is the least possible: two products of H x D per token, and four in backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from record import DTYPES, Contender, parsed, parser_of, positive, run
from torch import nn
from torch.nn import functional as F

from peftfast.nn import BottleneckAdapter
from peftfast.testing import bytes_saved_for_backward

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Point:
    """One workload."""

    call: str  # "forward" or "forward+backward"
    dtype: str
    tokens: int
    hidden: int
    size: int
    placement: str  # "parallel" or "after"
    activation: str


class Eager(nn.Module):
    """The same adapter as modules of torch, on the parameters of one of ours."""

    def __init__(self, adapter: BottleneckAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        it = self.adapter
        if it.norm_weight is not None:
            x = F.layer_norm(x, x.shape[-1:], it.norm_weight, it.norm_bias, it.norm_eps)
        bottleneck = ACTIVATIONS[it.activation](F.linear(x, it.down_weight, it.down_bias))
        return residual + F.linear(bottleneck, it.up_weight, it.up_bias) * it.scaling


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    torch.manual_seed(0)
    dtype, backward = DTYPES[point.dtype], point.call == "forward+backward"
    tokens, hidden, size, after = point.tokens, point.hidden, point.size, point.placement == "after"
    adapter = BottleneckAdapter(
        hidden, size, activation=point.activation, scaling=4.0, layer_norm=after, init="normal", dtype=dtype,
        device=device,
    )  # fmt: skip
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    other, grad = torch.randn_like(x), torch.randn_like(x)

    def call(module: Callable, rows: int = tokens) -> Callable[[], Any]:
        inputs = [
            tensor[:rows].detach().requires_grad_(backward) for tensor in ([x] if after else [x, other])
        ]
        leaves = [*inputs, *adapter.parameters()]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return module(inputs[0], inputs[-1])

        def forward_backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(module(inputs[0], inputs[-1]), leaves, grad[:rows])

        return forward_backward if backward else forward

    def saved(module: Callable) -> int:
        inputs = [tensor.detach().requires_grad_() for tensor in ([x] if after else [x, other])]
        return bytes_saved_for_backward(
            lambda: module(inputs[0], inputs[-1]), [*inputs, *adapter.parameters()]
        )

    products, passes = (6, 2) if backward else (2, 1)
    tensors = 1 if after else 2

    def contender(module: Callable, estimator: Callable, ours: bool = False) -> Contender:
        return Contender(
            run=call(module),
            flops=products * 2 * tokens * hidden * size,
            bytes_moved=dtype.itemsize * passes * ((1 + tensors) * x.numel() + 2 * hidden * size),
            ours=ours,
            shrunk=partial(call, estimator),
            rows=tokens,
            saved_bytes=partial(saved, module) if backward else None,
        )

    torch.compiler.reset()
    eager = Eager(adapter)
    return {
        "eager": contender(eager, eager),
        "compiled": contender(torch.compile(eager, dynamic=False), eager),
        "peftfast": contender(adapter, adapter, ours=True),
    }


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("adapter", __doc__, "H 2048, D 64, 512 tokens", cap=20.0, budget=5.0)
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--tokens", nargs="+", type=positive, default=[1, 64, 512, 4096])
    add("--hidden", nargs="+", type=positive, default=[2048, 4096], metavar="H")
    add("--size", nargs="+", type=positive, default=[64, 256], metavar="D")
    add("--placement", nargs="+", choices=["parallel", "after"], default=["parallel", "after"])
    add("--activation", nargs="+", choices=ACTIVATIONS, default=["gelu"])
    options = parsed(parser, arguments)
    if options.quick:
        options.hidden, options.size, options.tokens = [2048], [64], [512]
    return options


def main() -> None:
    options = parse()
    workloads = itertools.product(
        options.dtype, options.tokens, options.hidden, options.size, options.placement, options.activation
    )
    points = [Point(call, *workload) for workload in workloads for call in ("forward", "forward+backward")]
    run("adapter", options, points, contenders, least=1)


if __name__ == "__main__":
    main()
