"""How much faster and leaner are adapters on experts when they are computed beside the experts?

One experts layer of a mixture-of-experts model, with stock PEFT adapters on both projections
(`target_parameters`), is timed in turn

- as PEFT runs it on transformers' implementations: "PEFT grouped_mm" and "PEFT eager";
- without adapters, as "frozen grouped_mm" and "frozen eager";
- under `peftfast.enabled()`: "peftfast", the same module, and "peftfast 4-bit", with its experts in NF4;
- without adapters, as "peftfast frozen".

Usage:

    python benchmarks/bench_moe.py --quick                       # OLMoE's layer at 1 and 512 tokens; minutes
    python benchmarks/bench_moe.py --layer olmoe qwen3-30b mixtral --tokens 1 64 512 4096

A token's experts are drawn by a fixed seed, "uniform" or "skewed" (Zipf's law over the experts). lora_B is random.
What is timed, "forward" or "forward+backward", is as in bench_lora.py; backward also gives the gradient of the
routing weights. The work counted is the least possible: three products of H x I per token and expert in each pass
over the weights, and the adapters'; a pass reads the experts that have tokens once.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import DTYPES, Contender, Record, machine_facts, measure_ceilings, positive
from rich.console import Console
from torch import nn
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peftfast
from peftfast.integrations.experts import quantize_experts
from peftfast.testing import bytes_saved_for_backward

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: OlmoeExperts(OlmoeConfig()),  # 64 experts, H 2048, I 1024, top 8
    "qwen3-30b": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=128, hidden_size=2048, moe_intermediate_size=768)
    ),
    "mixtral": lambda: MixtralExperts(MixtralConfig()),  # 8 experts, H 4096, I 14336, top 2
}


@dataclass(frozen=True)
class Point:
    """One workload."""

    call: str  # "forward" or "forward+backward"
    layer: str
    dtype: str
    tokens: int
    r: int
    routing: str  # "skewed" or "uniform"


class Model(nn.Module):
    """What get_peft_model needs around a single layer."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(*inputs)


def adapted(experts: nn.Module, r: int) -> nn.Module:
    """PEFT's adapters on both projections, with random lora_A and lora_B."""
    config = LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    layer = get_peft_model(Model(experts), config).base_model.model.experts
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return layer


def build(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Frozen experts with random weights."""
    with torch.device("meta"):
        experts = LAYERS[name]()
    experts.config._experts_implementation = "grouped_mm"
    experts = experts.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def routing(point: Point, experts: nn.Module, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """top_k_index and top_k_weights [tokens, top_k]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(point.tokens, experts.num_experts, generator=generator)
    if point.routing == "skewed":
        logits -= 1.0 * torch.arange(1, experts.num_experts + 1).log()
    top_k = experts.config.num_experts_per_tok
    weights, index = logits.softmax(-1).topk(top_k)
    return index.to(device), weights.to(device=device, dtype=DTYPES[point.dtype])


@contextmanager
def implementation(experts: nn.Module, name: str) -> Iterator[None]:
    before = experts.config._experts_implementation
    experts.config._experts_implementation = name
    try:
        yield
    finally:
        experts.config._experts_implementation = before


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    torch.manual_seed(0)
    dtype = DTYPES[point.dtype]
    experts = build(point.layer, dtype, device)
    index, weights = routing(point, experts, device)
    hidden_size = experts.down_proj.shape[1]
    x = torch.randn(point.tokens, hidden_size, device=device, dtype=dtype)
    grad = torch.randn_like(x)
    backward = point.call == "forward+backward"
    passes = 2 if backward else 1
    rows, hit = index.numel(), index.unique().numel()
    per_expert = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    adapter_flops = (3 if backward else 1) * 2 * rows * point.r * sum(
        sum(weight.shape[1:]) for weight in (experts.gate_up_proj, experts.down_proj)
    )  # fmt: skip

    def call(layer: nn.Module, tokens: int = point.tokens) -> Callable[[], Any]:
        inputs = x[:tokens].detach().requires_grad_(backward)
        scores = weights[:tokens].detach().requires_grad_(backward)
        parameters = [p for p in layer.parameters() if p.requires_grad]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return layer(inputs, index[:tokens], scores)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            y = layer(inputs, index[:tokens], scores)
            return torch.autograd.grad(y, [inputs, scores, *parameters], grad[:tokens])

        return forward_backward if backward else forward

    found: dict[str, Contender] = {}

    def add(name: str, layer: nn.Module, base: nn.Module, how: Callable = nullcontext) -> None:
        bits = 4.127 if "4-bit" in name else 8 * dtype.itemsize
        inputs = [x.detach().requires_grad_(), index, weights.detach().requires_grad_()]
        known = [*inputs, *base.parameters(), *layer.parameters()]

        def saved() -> int:
            with how():
                return bytes_saved_for_backward(lambda: layer(*inputs), known)

        found[name] = Contender(
            run=call(layer),
            flops=passes * 2 * rows * per_expert + (adapter_flops if layer is not base else 0),
            bytes_moved=passes * (hit * per_expert * bits / 8 + dtype.itemsize * 2 * x.numel()),
            ours=name.startswith("peftfast"),
            context=how,
            shrunk=lambda tokens: call(layer, tokens),
            rows=point.tokens,
            saved_bytes=saved if backward else None,
        )

    layer = adapted(experts, point.r)
    fourbit = quantize_experts(Model(copy.deepcopy(experts))).experts
    for name in ("grouped_mm", "eager"):
        add(f"PEFT {name}", layer, experts, partial(implementation, experts, name))
        add(f"frozen {name}", experts, experts, partial(implementation, experts, name))
    strict = partial(peftfast.enabled, strict=True)
    add("peftfast", layer, experts, strict)
    add("peftfast 4-bit", adapted(fourbit, point.r), fourbit, strict)
    add("peftfast frozen", experts, experts, partial(implementation, experts, "peftfast"))
    return found


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="OLMoE's layer at 1 and 512 tokens, skewed")
    add("--layer", nargs="+", choices=LAYERS, default=["olmoe"])
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--tokens", nargs="+", type=positive, default=[1, 64, 512, 4096])
    add("--rank", nargs="+", type=positive, default=[16], metavar="r")
    add("--routing", nargs="+", choices=["skewed", "uniform"], default=["skewed", "uniform"])
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cap", type=float, default=20.0, metavar="S", help="seconds a call from which a rival is skipped")
    add("--budget", type=float, default=10.0, metavar="S", help="seconds for the timed rounds of one point")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/results/moe-MACHINE.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layer, options.tokens, options.rank, options.routing = ["olmoe"], [1, 512], [16], ["skewed"]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return options


def main() -> None:
    options = parse()
    console = Console()
    console.width = max(console.width, 160)  # The table needs as much; a narrower terminal wraps its lines.
    record = Record(
        benchmark="moe-quick" if options.quick else "moe",
        machine=machine_facts(options.device),
        ceilings=measure_ceilings([DTYPES[name] for name in options.dtype], options.device),
    )
    path = options.json or record.default_path()
    for fact in record.facts():
        console.print(fact, highlight=False)
    calls = ("forward", "forward+backward")
    workloads = itertools.product(
        options.layer, options.dtype, options.tokens, options.rank, options.routing, calls
    )
    record.measure_points(
        [Point(call, *workload) for *workload, call in workloads],
        partial(contenders, device=options.device),
        path,
        console,
        cap=options.cap,
        budget=options.budget,
        least=1,
        cuda=options.device == "cuda",
    )
    record.print(console)
    console.print(f"Record: {path}", highlight=False)


if __name__ == "__main__":
    main()
