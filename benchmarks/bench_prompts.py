"""How much faster and leaner is a training step with a prefix or a prompt?

A Llama of a few layers, in TinyLlama's shape, with stock PEFT's method on it; one step is forward, loss and backward.
It is timed in turn

- as PEFT runs it: "PEFT";
- under `peftfast.enabled()`, the same model: "peftfast";
- and so with every layer checkpointed: "PEFT checkpointed" (which refuses a prefix) and "peftfast checkpointed".

Usage:

    python benchmarks/bench_prompts.py --quick                # prefix and prompt, 4 x 512 tokens; minutes
    python benchmarks/bench_prompts.py --method prefix "projected prefix" prompt p-tuning --virtual 20 50 200

The work counted is the least possible: the linear layers and the output embeddings, forward and to the input
backward, for the tokens and, of a prompt, once for the virtual tokens.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from record import DTYPES, Contender, parsed, parser_of, positive, run, speed_bar
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.testing import bytes_saved_for_backward

METHODS = {
    "prefix": PrefixTuningConfig,
    "projected prefix": partial(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=1024),
    "prompt": PromptTuningConfig,
    "p-tuning": partial(PromptEncoderConfig, encoder_hidden_size=1024),
}


@dataclass(frozen=True)
class Point:
    """One workload."""

    method: str
    dtype: str
    samples: int
    tokens: int  # of a sample
    virtual: int
    layers: int
    hidden: int


def build(point: Point, device: str) -> PeftModel:
    """A frozen model with random weights, and the method's parameters as PEFT initializes them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=point.hidden,
        intermediate_size=point.hidden * 11 // 4,
        num_hidden_layers=point.layers,
        num_attention_heads=point.hidden // 64,
        num_key_value_heads=max(1, point.hidden // 512),
        use_cache=False,
    )
    with torch.device(device):
        base = LlamaForCausalLM._from_config(config, dtype=DTYPES[point.dtype])
    method = METHODS[point.method](task_type="CAUSAL_LM", num_virtual_tokens=point.virtual)
    return get_peft_model(base, method).train()


@contextmanager
def checkpointed(model: PeftModel) -> Iterator[None]:
    model.base_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.base_model.activation_checkpointing_disable()


@contextmanager
def both(*contexts: Callable) -> Iterator[None]:
    with contexts[0](), contexts[1]():
        yield


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    model = build(point, device)
    ids = torch.randint(32000, (point.samples, point.tokens), device=device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    base = model.base_model
    weights = sum(
        p.numel() for name, p in base.named_parameters() if p.dim() == 2 and "embed_tokens" not in name
    )
    rows = ids.numel() + ("prefix" not in point.method) * point.virtual
    strict, checkpoint = partial(peftfast.enabled, strict=True), partial(checkpointed, model)

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), parameters)

    def shrunk(rows: int) -> Callable:
        """The frozen model alone, on so many tokens: of a prompt there are never fewer than its own."""

        def call() -> tuple[torch.Tensor, ...]:
            few = ids.view(1, -1)[:, :rows]
            inputs = base.get_input_embeddings()(few).detach().requires_grad_()
            return torch.autograd.grad(base(inputs_embeds=inputs, labels=few).loss, inputs)

        return call

    contender = partial(
        Contender,
        run=step,
        flops=2 * 2 * rows * weights,
        bytes_moved=2 * weights * DTYPES[point.dtype].itemsize,
        saved_bytes=lambda: bytes_saved_for_backward(forward, model.parameters()),
        shrunk=shrunk,
        rows=ids.numel(),
    )
    refused = "prefix tuning does not work with gradient checkpointing" if "prefix" in point.method else None
    return {
        "PEFT": contender(context=nullcontext),
        "PEFT checkpointed": contender(context=checkpoint, unavailable=refused),
        "peftfast": contender(context=strict, ours=True),
        "peftfast checkpointed": contender(context=partial(both, strict, checkpoint), ours=True),
    }


def acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The bar that a prefix has to reach on the CPU, with what this run has seen of it."""
    steps = []
    for row in rows:
        point = row["point"]
        if point["method"] == "prefix" and (point["samples"], point["virtual"]) == (4, 50):
            found = {name: row["implementations"][name] for name in ("PEFT", "peftfast")}
            steps.append(row | {"implementations": found})
    return [speed_bar("a step with a prefix of 50 tokens, 4 samples", 1.2, steps, ["PEFT"])]


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    quick = "prefix and prompt of 50 virtual tokens, 4 x 512 tokens"
    parser = parser_of("prompts", __doc__, quick, cap=60.0, budget=60.0)
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["prefix", "prompt"])
    add("--dtype", nargs="+", choices=DTYPES, help="default: bf16 and fp32; fp32 on a CPU without AVX-512")
    add("--samples", nargs="+", type=positive, default=[1, 4])
    add("--tokens", nargs="+", type=positive, default=[512], help="of a sample")
    add("--virtual", nargs="+", type=positive, default=[50, 200], help="virtual tokens")
    add("--layers", type=positive, default=4)
    add("--hidden", type=positive, default=2048)
    options = parsed(parser, arguments)
    if options.dtype is None:
        # The frozen layers are torch's own, whose step in bf16 takes an hour there.
        slow = options.device == "cpu" and peftfast.build_info()["isa"] in ("avx2", "scalar")
        options.dtype = ["fp32"] if slow else ["bf16", "fp32"]
    if options.quick:
        options.method, options.virtual, options.samples = ["prefix", "prompt"], [50], [4]
        options.tokens, options.layers, options.hidden = [512], 4, 2048
    return options


def main() -> None:
    options = parse()
    workloads = itertools.product(
        options.method, options.dtype, options.samples, options.tokens, options.virtual
    )
    points = [Point(*workload, options.layers, options.hidden) for workload in workloads]
    run("prompts", options, points, contenders, acceptance=lambda record: acceptance(record.rows))


if __name__ == "__main__":
    main()
