"""How much faster and leaner are adapters on experts when they are computed beside the experts?

One experts layer of a mixture-of-experts model, with stock PEFT adapters on both projections
(`target_parameters`), is timed in turn

- as PEFT runs it on transformers' implementations: "PEFT grouped_mm" and "PEFT eager";
- without adapters, as "frozen grouped_mm" and "frozen eager";
- under `peftfast.enabled()`: "peftfast", the same module, and "peftfast 4-bit", with its experts in NF4;
- with adapters on every fourth expert alone, as "peftfast 25 %" (`peftfast.ExpertLoraConfig`);
- without adapters, as "peftfast frozen".

Not among the rivals are PEFT under torch.compile, since PEFT makes a new class of the experts in each call and each
call would compile again; Unsloth, which takes older transformers than peftfast does, so that no process can hold both;
and grouped-nf4-gemm, which has no adapters of PEFT.

Usage:

    python benchmarks/bench_moe.py --quick                       # OLMoE's layer at 1 and 512 tokens; minutes
    python benchmarks/bench_moe.py --quick --device cuda         # Qwen3-30B's layer at 4096
    python benchmarks/bench_moe.py --layer olmoe qwen3-30b mixtral --tokens 1 64 512 4096

A token's experts are drawn by a fixed seed, "uniform" or "skewed" (Zipf's law over the experts). lora_B is random.
What is timed, "forward" or "forward+backward", is as in bench_lora.py; backward also gives the gradient of the
routing weights. The work counted is the least possible: three products of H x I per token and expert in each pass
over the weights, and the adapters'; a pass reads the experts that have tokens once. "saved" is what forward keeps for
backward beside weights and inputs, "peak" by how much all tensors together grow during the call, its results included.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import DTYPES, GRAPH, Contender, parsed, parser_of, positive, rows_of, run, verdict
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import peftfast
from peftfast.integrations.experts import quantize_experts
from peftfast.testing import bytes_saved_for_backward, peak_memory

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "olmoe": lambda: OlmoeExperts(OlmoeConfig(intermediate_size=1024)),  # 64 experts, H 2048, top 8
    "qwen3-30b": lambda: Qwen3MoeExperts(
        Qwen3MoeConfig(num_experts=128, hidden_size=2048, moe_intermediate_size=768)
    ),
    "mixtral": lambda: MixtralExperts(MixtralConfig()),  # 8 experts, H 4096, I 14336, top 2
}

FOUR_BIT = 4.127  # bits of a weight with its nested scales


@dataclass(frozen=True)
class Point:
    """One workload."""

    call: str  # "forward" or "forward+backward"
    layer: str
    dtype: str
    tokens: int
    r: int
    routing: str  # "skewed" or "uniform"


GPU_POINTS = [  # those of its acceptance bars
    Point("forward+backward", "qwen3-30b", "bf16", 4096, 16, routing) for routing in ("skewed", "uniform")
]


class Model(nn.Module):
    """What get_peft_model needs around a single layer."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.experts(*inputs)


def adapted(experts: nn.Module, r: int, chosen: list[int] | None = None) -> nn.Module:
    """PEFT's adapters on both projections, or ours on the chosen experts, with random lora_A and lora_B."""
    if chosen is None:
        parameters = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=parameters)
    else:
        config = peftfast.ExpertLoraConfig(r=r, lora_alpha=2 * r, experts={"experts": chosen})
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


def peak_of_tensors(function: Callable[[], Any], device: str) -> int:
    """As `peak_memory` has it of a GPU. The process's own peak is of what its allocator keeps for later, too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


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
    adapter_flops = (3 if backward else 1) * 2 * point.r * sum(
        sum(weight.shape[1:]) for weight in (experts.gate_up_proj, experts.down_proj)
    )  # fmt: skip
    chosen = list(range(0, experts.num_experts, 4))
    chosen_rows = int(torch.isin(index.cpu(), torch.tensor(chosen)).sum())

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
        adapted_rows = 0 if layer is base else chosen_rows if "%" in name else rows
        bits = FOUR_BIT if "4-bit" in name else 8 * dtype.itemsize
        inputs = [x.detach().requires_grad_(), index, weights.detach().requires_grad_()]
        known = [*inputs, *base.parameters(), *layer.parameters()]
        for weight in getattr(base, "fourbit_weights", {}).values():  # their scales
            known += [weight.absmax, weight.nested.absmax, weight.nested.code, weight.nested.offset]

        def saved() -> int:
            with how():
                return bytes_saved_for_backward(lambda: layer(*inputs), known)

        run = call(layer)
        found[name] = Contender(
            run=run,
            flops=passes * 2 * rows * per_expert + adapted_rows * adapter_flops,
            bytes_moved=passes * (hit * per_expert * bits / 8 + dtype.itemsize * 2 * x.numel()),
            ours=name.startswith("peftfast"),
            context=how,
            shrunk=lambda tokens: call(layer, tokens),
            rows=point.tokens,
            saved_bytes=saved if backward else None,
            peak_bytes=partial(peak_memory if device == "cuda" else peak_of_tensors, run, device),
            capturable="eager" not in name,  # it asks which experts have tokens
        )

    layer = adapted(experts, point.r)
    fourbit = quantize_experts(Model(copy.deepcopy(experts))).experts
    for name in ("grouped_mm", "eager"):
        add(f"PEFT {name}", layer, experts, partial(implementation, experts, name))
        add(f"frozen {name}", experts, experts, partial(implementation, experts, name))
    strict = partial(peftfast.enabled, strict=True)
    add("peftfast", layer, experts, strict)
    add("peftfast 4-bit", adapted(fourbit, point.r), fourbit, strict)
    add("peftfast 25 %", adapted(experts, point.r, chosen), experts, strict)
    add("peftfast frozen", experts, experts, partial(implementation, experts, "peftfast"))
    return found


def acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each bar that adapters on experts have to reach on the CPU, with what this run has seen of it."""
    PEFT, frozen = ("PEFT grouped_mm", "PEFT eager"), ("frozen grouped_mm", "frozen eager")

    def select(call: str, *tokens: int) -> list[tuple[str, dict[str, Any]]]:
        points = [(row["point"], row["implementations"]) for row in rows]
        return [
            (f"{point['dtype']} {point['tokens']} {point['routing']}", found)
            for point, found in points
            if point["layer"] == "olmoe" and point["call"] == call and point["tokens"] in tokens
        ]

    def faster(what: str, least: float, ours: str, rivals: tuple[str, ...], cases: list) -> dict[str, str]:
        seen, checks, gaps = [], [], 0
        for where, found in cases:
            times = [found[ours]["speedup"][rival] for rival in rivals if rival in found[ours]["speedup"]]
            gaps += len(times) < len(rivals)
            seen.append(
                f"{where}: {min(times):.2f} x" if times else f"{where}: {found[rivals[0]]['skipped']}"
            )
            checks += [min(times) >= least] if times else []
        return verdict(what, f"at least {least:g} x", seen, checks, gaps)

    def at_most(what: str, most: float, cases: list, ratio: Callable[[dict], float | None]) -> dict[str, str]:
        ratios = {where: ratio(found) for where, found in cases}
        known = {where: value for where, value in ratios.items() if value is not None}
        seen = [f"{where}: {value:.0%}" for where, value in known.items()]
        return verdict(
            what, f"at most {most:.0%}", seen, [v <= most for v in known.values()], len(ratios) - len(known)
        )

    def extra_memory(found: dict) -> float | None:
        """Ours of PEFT's, beyond that of the frozen layer."""
        peaks = {name: it["peak_bytes"] for name, it in found.items() if "peak_bytes" in it}
        if not peaks.keys() & set(PEFT) or not peaks.keys() & set(frozen):
            return None
        least = min(peaks["peftfast frozen"], *(peaks[name] for name in frozen if name in peaks))
        return (peaks["peftfast"] - least) / (min(peaks[name] for name in PEFT if name in peaks) - least)

    def adapter_work(found: dict) -> float:
        all_, some, none = (found[f"peftfast{which}"]["median_ms"] for which in ("", " 25 %", " frozen"))
        return (some - none) / (all_ - none)

    both = "forward+backward"
    return [
        faster("512 tokens, against PEFT's best", 6, "peftfast", PEFT, select(both, 512)),
        faster("4096 tokens, against PEFT's best", 5, "peftfast", PEFT, select(both, 4096)),
        faster("1 token, forward, against PEFT's best", 60, "peftfast", PEFT, select("forward", 1)),
        faster("frozen, 512 tokens, against transformers' best", 1.5, "peftfast frozen", frozen, select(both, 512)),
        faster("frozen, 4096 tokens, against transformers' best", 3, "peftfast frozen", frozen, select(both, 4096)),
        at_most("peak memory beyond the frozen layer's, of PEFT's", 0.05, select(both, 512, 4096), extra_memory),
        at_most(
            "4-bit experts, 512 tokens, time of dense ones'", 1.15, select(both, 512),
            lambda found: found["peftfast 4-bit"]["median_ms"] / found["peftfast"]["median_ms"],
        ),
        at_most("adapters on 25 % of the experts, work of all's", 0.35, select(both, 512, 4096), adapter_work),
    ]  # fmt: skip


def gpu_acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same on a GPU, ours in 4 bits against PEFT in bf16; graphs are held against graphs. The memory is that of the
    experts and of what a call adds."""
    rivals, cases = ("PEFT grouped_mm", "PEFT eager"), rows_of(rows, GPU_POINTS)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in LAYERS["qwen3-30b"]().parameters())
    speeds, shares = {}, {}
    for row in filter(None, cases):
        where, found = row["point"]["routing"], row["implementations"]
        for form in ("", GRAPH):
            times = found.get(f"peftfast 4-bit{form}", {}).get("speedup", {})
            if known := {times[f"{rival}{form}"]: rival for rival in rivals if f"{rival}{form}" in times}:
                speeds[f"{where}, {known[min(known)]}{form}"] = min(known)
        if known := [found[rival]["peak_bytes"] for rival in rivals if "peak_bytes" in found.get(rival, {})]:
            ours = found["peftfast 4-bit"]["peak_bytes"] + weights * FOUR_BIT / 8
            shares[where] = ours / (min(known) + weights * 2)
    what, gaps = "4-bit experts, 4096 tokens, against PEFT's best in bf16", cases.count(None)
    return [
        verdict(
            what,
            "at least 2.5 x",
            [f"{where}: {times:.2f} x" for where, times in speeds.items()],
            [times >= 2.5 for times in speeds.values()],
            gaps,
        ),
        verdict(
            f"{what}: memory",
            "at most 33%",
            [f"{where}: {share:.0%}" for where, share in shares.items()],
            [share <= 1 / 3 for share in shares.values()],
            gaps,
        ),
    ]


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(
        "moe",
        __doc__,
        "OLMoE's layer at 1 and 512 tokens, skewed, in fp32; on a GPU Qwen3-30B's at 4096 in bf16",
        cap=60.0,
        budget=10.0,
    )
    add = parser.add_argument
    add("--layer", nargs="+", choices=LAYERS, default=["olmoe"])
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--tokens", nargs="+", type=positive, default=[1, 64, 512, 4096])
    add("--rank", nargs="+", type=positive, default=[16], metavar="r")
    add("--routing", nargs="+", choices=["skewed", "uniform"], default=["skewed", "uniform"])
    options = parsed(parser, arguments)
    if options.quick and options.device == "cuda":
        options.layer, options.dtype, options.rank = ["qwen3-30b"], ["bf16"], [16]
        options.tokens, options.routing = [4096], ["skewed", "uniform"]
    elif options.quick:
        options.layer, options.dtype, options.rank = ["olmoe"], ["fp32"], [16]
        options.tokens, options.routing = [1, 512], ["skewed"]
    return options


def points(options: argparse.Namespace) -> list[Point]:
    workloads = itertools.product(
        options.layer,
        options.dtype,
        options.tokens,
        options.rank,
        options.routing,
        ("forward", "forward+backward"),
    )
    return [Point(call, *workload) for *workload, call in workloads]


def main() -> None:
    options = parse()
    run(
        "moe",
        options,
        points(options),
        contenders,
        acceptance=lambda record: acceptance(record.rows),
        gpu_acceptance=lambda record: gpu_acceptance(record.rows),
        least=1,
    )


if __name__ == "__main__":
    main()
