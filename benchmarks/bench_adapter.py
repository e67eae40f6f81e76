"""How much faster and leaner is a bottleneck adapter as one operator than as the modules that it is made of?

One adapter (LayerNorm, down, activation, up, scaling, residual) is timed in turn

- as modules of torch, one after the other: "eager", and "compiled", the same under torch.compile;
- as "peftfast", `peftfast.ops.bottleneck_adapter` on the same parameters.

Usage:

    python benchmarks/bench_adapter.py --quick      # H 2048 and D 64 at 512 tokens, without and with a norm; minutes
    python benchmarks/bench_adapter.py --hidden 2048 4096 --size 64 256 --tokens 1 64 512 4096
    python benchmarks/bench_adapter.py --quick --model --dtype fp32 bf16      # a training step of a model; minutes

Placements: "parallel" reads an x of its own and adds to another tensor; "after" reads the tensor that it adds to, and
has a LayerNorm. Timed are "forward", without gradients, and "forward+backward", with those of the input, the residual
and all parameters. The work counted is the least possible: two products of H x D per token, and four in backward.

With --model it is instead a "step", forward, loss and backward, of a frozen Llama with random weights, with an adapter
after each feed-forward block (`peftfast.BottleneckConfig(placement="pfeiffer")`), without and with a norm of its own:
"eager" is the same model whose adapters compute as modules of torch, in the model's dtype like ours; of "peftfast" the
adapters alone are ours, of "peftfast enabled" all that `peftfast.enable()` brings: the loss, norms, gated MLPs and
attention. The work of the frozen linear layers counts too. Saved is what the whole step keeps for backward.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from record import DTYPES, Contender, parsed, parser_of, positive, run, speed_bar, verdict
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.nn import BottleneckAdapter
from peftfast.testing import bytes_saved_for_backward

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Point:
    """One workload."""

    call: str  # "forward" or "forward+backward"; of a model "step"
    dtype: str
    tokens: int
    hidden: int
    size: int
    placement: str  # "parallel" or "after"; of a model "pfeiffer" or "pfeiffer, norm"
    activation: str
    layers: int | None = None  # of a model


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
    if point.layers is not None:
        return contenders_in_model(point, device)
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


def model_with_adapters(point: Point, device: str) -> nn.Module:
    """A frozen Llama with random weights in TinyLlama's shape, and adapters that are not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=point.hidden,
        intermediate_size=point.hidden * 11 // 4,
        num_hidden_layers=point.layers,
        num_attention_heads=max(1, point.hidden // 64),
        num_key_value_heads=max(1, point.hidden // 512),
        max_position_embeddings=max(2048, point.tokens),
        use_cache=False,
    )
    with torch.device(device):
        base = LlamaForCausalLM._from_config(config, dtype=DTYPES[point.dtype])
    adapters = peftfast.BottleneckConfig(
        placement="pfeiffer",
        bottleneck_size=point.size,
        activation=point.activation,
        layer_norm=point.placement == "pfeiffer, norm",
        init="normal",
    )
    return get_peft_model(base, adapters, autocast_adapter_dtype=False).train()


@contextmanager
def computing(model: nn.Module, forward_of: Callable[[BottleneckAdapter], Callable]) -> Iterator[None]:
    """The model with other forwards of its adapters."""
    before = {module: module.forward for module in model.modules() if isinstance(module, BottleneckAdapter)}
    for adapter in before:
        adapter.forward = forward_of(adapter)
    try:
        yield
    finally:
        for adapter, forward in before.items():
            adapter.forward = forward


def contenders_in_model(point: Point, device: str) -> dict[str, Contender]:
    """A training step of a model, whose adapters are modules of torch or ours."""
    model = model_with_adapters(point, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids = torch.randint(32000, (1, point.tokens), device=device)
    weights = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and not weight.requires_grad and "embed_tokens" not in name
    )
    adapters = sum(parameter.numel() for parameter in parameters if parameter.dim() == 2)

    def loss(rows: int = point.tokens) -> torch.Tensor:
        return model(input_ids=ids[:, :rows], labels=ids[:, :rows]).loss

    def step(rows: int = point.tokens) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(rows), parameters)

    contender = partial(
        Contender,
        run=step(),
        flops=2 * point.tokens * (2 * weights + 3 * adapters),
        bytes_moved=2 * weights * DTYPES[point.dtype].itemsize,
        shrunk=step,
        rows=point.tokens,
        saved_bytes=lambda: bytes_saved_for_backward(loss, model.parameters()),
    )
    return {
        "eager": contender(context=partial(computing, model, lambda adapter: Eager(adapter).forward)),
        "peftfast": contender(ours=True),
        "peftfast enabled": contender(ours=True, context=peftfast.enabled),
    }


# -------------------------------------------------------------------------------------------- acceptance


def acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The bars that a model's step has to reach on the CPU, with what this run has seen of them."""
    steps, ratios = [], {}
    for row in rows:
        found = {name: row["implementations"][name] for name in ("eager", "peftfast enabled")}
        steps.append(row | {"implementations": found})
        eager, ours = (implementation.get("saved_bytes") for implementation in found.values())
        if eager is not None:
            ratios[f"{row['point']['dtype']} {row['point']['placement']}"] = ours / eager
    return [
        speed_bar("a model's step", 1.2, steps, ["eager"]),
        verdict(
            "what it keeps for backward, of eager's",
            "at most 50%",
            [f"{where}: {ratio:.0%}" for where, ratio in ratios.items()],
            [ratio <= 0.5 for ratio in ratios.values()],
            len(steps) - len(ratios),
        ),
    ]


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
    add("--model", action="store_true", help="a training step of a model instead of one adapter")
    add("--layers", type=positive, default=4, help="of the model")
    options = parsed(parser, arguments)
    if options.quick:
        options.hidden, options.size, options.tokens = [2048], [64], [512]
    return options


def main() -> None:
    options = parse()
    if options.model:
        placements = ["pfeiffer", "pfeiffer, norm"]
        workloads = itertools.product(
            options.dtype, options.tokens, options.hidden, options.size, placements, options.activation
        )
        points = [Point("step", *workload, options.layers) for workload in workloads]
        run("adapter-model", options, points, contenders, acceptance=lambda record: acceptance(record.rows))
        return
    workloads = itertools.product(
        options.dtype, options.tokens, options.hidden, options.size, options.placement, options.activation
    )
    points = [Point(call, *workload) for workload in workloads for call in ("forward", "forward+backward")]
    run("adapter", options, points, contenders, least=1)


if __name__ == "__main__":
    main()
