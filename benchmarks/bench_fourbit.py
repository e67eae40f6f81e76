"""Is a 4-bit layer with LoRA faster under peftfast than PEFT on bitsandbytes, and than a layer that is not quantized?

One linear layer in bitsandbytes' 4-bit format, with a LoRA adapter, is timed in turn

- as "bitsandbytes": PEFT's layer on `bitsandbytes.nn.Linear4bit`, in training mode; and, in 16 bits, as
  "bitsandbytes 16-bit adapters", the same with the adapter in the base's dtype rather than PEFT's fp32;
- as "bitsandbytes eval" (forward only): the same in eval mode, where bitsandbytes repacks the weight for its
  inference kernel on a CPU with AVX-512 BF16; elsewhere it has none, and the record says so. Its dropout does
  not act, ours does;
- on a GPU as "bitsandbytes compiled", the one with 16-bit adapters (in fp32 the first) under torch.compile;
- as "dense", the frozen `nn.Linear` alone, of the same dtype, with no adapter;
- as "dense peftfast", PEFT's LoRA on that, under `peftfast.enabled()`;
- under `peftfast.enabled()`: "peftfast bitsandbytes", the layer of "bitsandbytes" itself, and "peftfast
  Linear4bit", PEFT's layer on `peftfast.nn.Linear4bit`.

The quantizer and the dequantizer are timed beside bitsandbytes' functions for the same. Where bitsandbytes is not
installed, its contenders are recorded as unavailable. Unsloth is not among the rivals: it takes older transformers
than peftfast does, so that no process can hold both.

Usage:

    python benchmarks/bench_fourbit.py --quick      # the points that the device's acceptance bars name; minutes
    python benchmarks/bench_fourbit.py              # the whole sweep; hours
    python benchmarks/bench_fourbit.py --dtype bf16 --rows 1 1024 --shape 4096x4096 --rank 16 --dropout 0.05
    python benchmarks/bench_fourbit.py --quick --quant-type fp4 --blocksize 128 --plain

What is timed:

- "forward": with no gradient recorded, in training mode (but for "bitsandbytes eval").
- "forward+backward": also the gradients of lora_A, lora_B and of the input, as in every layer but the first.
  "dense" computes its input's gradient too.
- "quantize", "dequantize": a weight of 4096 x 4096.

The dtype is that of the input, of the dense weight and of the products. lora_B is random (PEFT starts it at
zero). The 4-bit contenders share one weight, bytes and scales; the caches are emptied of it before every call,
since a model of such layers never finds one there; that is not timed. The work counted for the share of the
ceiling is the least possible: 2·M·K·N per pass over the base weight and 2·M·r·(K + N) per direction of the
adapter, which has two in backward; and every byte of the weight (in its 4 bits and scales), of X, Y and their
gradients moved once per pass. Decoding, dropout and casts count nothing.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import (
    DTYPES,
    GRAPH,
    Contender,
    parsed,
    parser_of,
    positive,
    probability,
    rows_of,
    run,
    shape,
    speed_bar,
    verdict,
)
from torch import nn

import peftfast
from peftfast.nn import Linear4bit
from peftfast.nn.fourbit import pack_state
from peftfast.ops import FourBitWeight, fourbit_dequantize, fourbit_quantize
from peftfast.testing import bytes_saved_for_backward

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None
NOT_INSTALLED = "bitsandbytes is not installed"

LLAMA_7B = [(4096, 4096), (4096, 11008), (11008, 4096)]  # (K, N): q/k/v/o, gate/up, down
ROWS = [1, 8, 16, 128, 512, 1024, 4096]
QUANTIZED = (4096, 4096)  # The weight given to the quantizer.


@dataclass(frozen=True)
class Point:
    """One workload. The letters are those of Y[M,N] = X[M,K] W[N,K]ᵀ, with a rank-r adapter."""

    call: str  # "forward", "forward+backward", "quantize" or "dequantize"
    dtype: str
    M: int | None  # M, r and dropout are None for the quantizer.
    K: int
    N: int
    r: int | None
    dropout: float | None
    quant_type: str
    blocksize: int
    scales: str  # "nested" or "plain"


GPU_POINTS = [  # those that its acceptance bars name
    ("forward+backward" if M == 4096 else "forward", "bf16", M, K, N, 16, 0.05)
    for M in (4096, 1, 16, 64, 256)
    for K, N in LLAMA_7B
]


def quick(options: argparse.Namespace) -> Iterator[tuple]:
    """call, dtype, M, K, N, r, dropout of the points that the acceptance bars name."""
    if options.device == "cuda":
        yield from (workload for workload in GPU_POINTS if workload[1] in options.dtype)
        return
    for dtype in options.dtype:
        for call, rows in {"forward": (1, 512, 1024), "forward+backward": (8, 128, 1024)}.items():
            for M in rows:
                yield call, dtype, M, 4096, 4096, 16, 0.05


def sweep(options: argparse.Namespace) -> Iterator[tuple]:
    """The same of every combination of what the options select."""
    for dtype, (K, N), r, dropout, call, M in itertools.product(
        options.dtype,
        options.shape,
        options.rank,
        options.dropout,
        ("forward", "forward+backward"),
        options.rows,
    ):
        yield call, dtype, M, K, N, r, dropout


def points(options: argparse.Namespace) -> list[Point]:
    quantizer = [
        (call, dtype, None, *QUANTIZED, None, None)
        for call in ("quantize", "dequantize")
        for dtype in options.dtype
    ]
    weight = (options.quant_type, options.blocksize, "plain" if options.plain else "nested")
    layer = quick(options) if options.quick else sweep(options)
    return [Point(*workload, *weight) for workload in [*quantizer, *layer]]


# --------------------------------------------------------------------------------------------- contenders


def bitsandbytes_layer(
    quantized: FourBitWeight, bias: torch.Tensor | None, compute_dtype: torch.dtype
) -> bnb.nn.Linear4bit:
    """bitsandbytes' layer over these bytes, as it is after loading them from a checkpoint; they are shared."""
    if bnb is None:
        raise ModuleNotFoundError(NOT_INSTALLED)
    N, K = quantized.shape
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=compute_dtype, device="meta")
    device = quantized.packed.device
    layer.weight = bnb.nn.Params4bit.from_prequantized(
        quantized.packed, pack_state(quantized), device=device, module=layer
    )
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def adapted(base: nn.Module, point: Point) -> nn.Module:
    """PEFT's LoRA layer on `base`, with random lora_A and lora_B, in training mode."""
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = True  # As transformers tells PEFT.
    config = LoraConfig(r=point.r, lora_alpha=2 * point.r, lora_dropout=point.dropout, target_modules=["0"])
    layer = get_peft_model(model, config).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.train()


def random_weight(point: Point, device: str) -> tuple[torch.Tensor, FourBitWeight]:
    """A dense weight [N,K], and it in 4 bits."""
    weight = torch.randn(point.N, point.K, device=device).mul_(point.K**-0.5).to(DTYPES[point.dtype])
    return weight, fourbit_quantize(weight, **quantization(point))


def quantization(point: Point) -> dict[str, Any]:
    return dict(quant_type=point.quant_type, blocksize=point.blocksize, nested=point.scales == "nested")


def quantizers(point: Point, device: str) -> dict[str, Contender]:
    """The implementations of quantization, or of its inverse."""
    weight, quantized = random_weight(point, device)
    if point.call == "quantize":
        ours = partial(fourbit_quantize, weight, **quantization(point))
    else:
        ours = partial(fourbit_dequantize, quantized)
    moved = weight.nbytes + quantized.nbytes
    found = {"peftfast": Contender(ours, flops=0, bytes_moved=moved, ours=True)}
    if bnb is None:
        return without_bitsandbytes("bitsandbytes") | found
    stock = bitsandbytes_layer(quantized, None, weight.dtype).weight
    how = dict(
        blocksize=point.blocksize, compress_statistics=point.scales == "nested", quant_type=point.quant_type
    )
    if point.call == "quantize":
        rival = partial(bnb.functional.quantize_4bit, weight, **how)
    else:
        rival = partial(bnb.functional.dequantize_4bit, stock.data, stock.quant_state)
    return {"bitsandbytes": Contender(rival, flops=0, bytes_moved=moved)} | found


def without_bitsandbytes(*names: str) -> dict[str, Contender]:
    """What takes its place where it is not installed."""
    return {
        name: Contender(lambda: None, flops=0, bytes_moved=0, unavailable=NOT_INSTALLED) for name in names
    }


def layers(point: Point, device: str) -> dict[str, Contender]:
    """The implementations of the layer, rivals and ours."""
    dtype, M, K, N, r = DTYPES[point.dtype], point.M, point.K, point.N, point.r
    weight, quantized = random_weight(point, device)
    x = torch.randn(M, K, device=device, dtype=dtype)
    grad = torch.randn(M, N, device=device, dtype=dtype)

    backward = point.call == "forward+backward"
    passes = 2 if backward else 1
    base_flops = passes * 2 * M * K * N
    adapter_flops = (3 if backward else 1) * 2 * M * r * (K + N)

    def call(layer: nn.Module, parameters: list[nn.Parameter], rows: int = M) -> Callable[[], Any]:
        # bitsandbytes repacks in eval mode only what meets an input that needs no gradient.
        inputs, outputs = x[:rows].detach().requires_grad_(backward), grad[:rows]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return layer(inputs)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(layer(inputs), [inputs, *parameters], outputs)

        return forward_backward if backward else forward

    found: dict[str, Contender] = {}

    def add(
        name: str,
        layer: nn.Module,
        fused: bool = False,
        compiled: bool = False,
        weight_bytes: int = quantized.nbytes,
        **more: Any,
    ) -> None:
        module = torch.compile(layer, dynamic=False) if compiled else layer
        parameters = [p for p in layer.parameters() if p.requires_grad]
        # A pass reads the weight and its input and writes its output. Backward reads X once more, for dA.
        moved = passes * (weight_bytes + dtype.itemsize * M * (K + N))
        moved += dtype.itemsize * M * K if backward else 0
        inputs = x.detach().requires_grad_()
        besides = [inputs, weight, *layer.parameters(), *scales_of(layer)]
        found[name] = Contender(
            run=call(module, parameters),
            flops=base_flops + (adapter_flops if parameters else 0),
            bytes_moved=moved,
            ours=name.startswith("peftfast"),
            # Strict: a layer that is not on the fast path is an error, never a number.
            context=(lambda: peftfast.enabled(strict=True)) if fused else nullcontext,
            shrunk=lambda rows: call(layer, parameters, rows),
            rows=M,
            saved_bytes=(lambda: bytes_saved_for_backward(lambda: module(inputs), besides))
            if backward
            else None,
            **more,
        )

    if bnb is None:
        found |= without_bitsandbytes("bitsandbytes", "bitsandbytes 16-bit adapters")
    else:
        stock = best = adapted(bitsandbytes_layer(quantized, None, dtype), point)
        add("bitsandbytes", stock)
        if dtype.itemsize == 2:
            best = adapted(bitsandbytes_layer(quantized, None, dtype), point)
            for factor in (best.lora_A, best.lora_B):
                factor.to(dtype)
            add("bitsandbytes 16-bit adapters", best)
        if device == "cuda":
            torch.compiler.reset()
            add("bitsandbytes compiled", best, compiled=True)
        elif not backward:
            native = bnb.functional.has_avx512bf16()
            reason = None if native else "bitsandbytes has no inference kernel without AVX-512 BF16"
            # A layer of its own: bitsandbytes repacks the weight in place.
            add("bitsandbytes eval", copy.deepcopy(stock).eval(), unavailable=reason)
    dense = nn.Linear(K, N, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    add("dense", dense, weight_bytes=weight.nbytes)
    add("dense peftfast", adapted(dense, point), fused=True, weight_bytes=weight.nbytes)
    if bnb is not None:
        add("peftfast bitsandbytes", stock, fused=True)
    add("peftfast Linear4bit", adapted(Linear4bit.from_quantized(quantized), point), fused=True)
    return found


def scales_of(layer: nn.Module) -> list[torch.Tensor]:
    """What belongs to the 4-bit weight of a layer and is no parameter."""
    base = getattr(layer, "base_layer", layer)
    if isinstance(base, Linear4bit):
        parts = [base.quantized_weight, base.quantized_weight.nested]
    elif bnb is not None and isinstance(base, bnb.nn.Linear4bit):
        parts = [base.weight.quant_state, base.weight.quant_state.state2]
    else:
        return []
    values = [value for part in parts if part is not None for value in vars(part).values()]
    return [value for value in values if isinstance(value, torch.Tensor)]


def contenders(point: Point, device: str) -> dict[str, Contender]:
    return (quantizers if point.M is None else layers)(point, device)


# -------------------------------------------------------------------------------------------- acceptance


def acceptance(rows: list[dict[str, Any]], isa: str) -> list[dict[str, str]]:
    """Each bar that the 4-bit kernels have to reach on the CPU, with what this run has seen of it.

    The bars are for NF4 with nested scales, bf16, 4096 x 4096, rank 16 and dropout 0.05.
    """

    def at(call: str, dtype: str, *workload: Any) -> dict[str, Any] | None:
        wanted = asdict(Point(call, dtype, *workload, "nf4", 64, "nested"))
        return next((row for row in rows if row["point"] == wanted), None)

    def layer(call: str, M: int) -> dict[str, Any] | None:
        return at(call, "bf16", M, 4096, 4096, 16, 0.05)

    both, stock = "forward+backward", ["bitsandbytes", "bitsandbytes 16-bit adapters"]
    quantizer = [at("quantize", dtype, None, *QUANTIZED, None, None) for dtype in ("bf16", "fp32")]
    return [
        speed_bar(f"bf16 {both}, M=1024, against PEFT + bitsandbytes", 1.5, [layer(both, 1024)], stock),
        speed_bar(f"bf16 {both}, M=1024, against the dense layer", 1.0, [layer(both, 1024)], ["dense"]),
        speed_bar(f"bf16 {both}, M=128, against PEFT + bitsandbytes", 2.2, [layer(both, 128)], stock),
        speed_bar(f"bf16 {both}, M=8, against PEFT + bitsandbytes", 8, [layer(both, 8)], stock),
        speed_bar("bf16 forward, M=1, against PEFT + bitsandbytes", 20, [layer("forward", 1)], stock),
        speed_bar("the same in eval mode", 2, [layer("forward", 1)], ["bitsandbytes eval"]),
        speed_bar("bf16 forward, M=1, against the dense layer", 4, [layer("forward", 1)], ["dense"]),
        share_bar("bf16, M of 512 and more, share of the dpbf16 peak", 0.9, rows, isa),
        speed_bar("quantize, against bitsandbytes", 10, quantizer, ["bitsandbytes"]),
    ]


def gpu_acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same on a GPU, for the layers of a 7B model. Graphs are held against graphs; and one token runs as a graph
    alone, since launching its kernels one by one takes longer than they do."""

    def at(*tokens: int) -> list[dict[str, Any] | None]:
        workloads = [workload for workload in GPU_POINTS if workload[2] in tokens]
        return rows_of(rows, [Point(*workload, "nf4", 64, "nested") for workload in workloads])

    def forms(*names: str) -> list[str]:
        return [*names, *(f"{name}{GRAPH}" for name in names)]

    stock = forms("bitsandbytes", "bitsandbytes 16-bit adapters")
    training, few = "bf16 forward+backward, M=4096, against", "bf16 forward, M=16 to 256, against"
    share = {
        f"{row['point']['K']}x{row['point']['N']} {name}": it["ceiling_share"]
        for row in filter(None, at(1))
        for name, it in row["implementations"].items()
        if it["ours"] and name.endswith(GRAPH)
    }
    return [
        speed_bar(f"{training} PEFT + bitsandbytes", 2, at(4096), stock),
        # At most 1.12 times its time.
        speed_bar(f"{training} the dense layer", 0.893, at(4096), forms("dense")),
        speed_bar("bf16 forward, M=1, as graphs, against the dense layer", 2.5, at(1), [f"dense{GRAPH}"]),
        verdict(
            "the same, share of the bandwidth",
            "at least 60%",
            [f"{name}: {value:.0%}" for name, value in share.items()],
            [value >= 0.6 for value in share.values()],
            at(1).count(None),
        ),
        speed_bar(f"{few} PEFT + bitsandbytes", 1.5, at(16, 64, 256), stock),
    ]


def share_bar(what: str, bar: float, rows: list[dict[str, Any]], isa: str) -> dict[str, str]:
    seen, checks = [], []
    native = isa == "avx512_bf16"
    for row in rows:
        point = Point(**row["point"])
        if point.dtype == "bf16" and (point.M or 0) >= 512:
            for name, found in row["implementations"].items():
                if found["ours"]:
                    seen.append(f"{point.call} M={point.M} {name}: {found['ceiling_share']:.0%}")
                    checks.append(found["ceiling_share"] >= bar)
    if seen and not native:
        seen[0] = f"{isa} does not use dpbf16; of the peak of what it uses, {seen[0]}"
    return verdict(what, f"at least {bar:.0%}", seen, checks if native else [], gaps=0 if native else 1)


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of(
        "fourbit", __doc__, "only the points that the acceptance bars name", cap=5.0, budget=10.0
    )
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="of the input and the products")
    add("--shape", nargs="+", type=shape, default=LLAMA_7B, metavar="KxN", help="in x out features")
    add("--rows", nargs="+", type=positive, default=ROWS, metavar="M", help=f"default {ROWS}")
    add("--rank", nargs="+", type=positive, default=[8, 16, 64], metavar="r")
    add("--dropout", nargs="+", type=probability, default=[0.0, 0.05], metavar="p")
    add("--quant-type", choices=["nf4", "fp4"], default="nf4")
    add("--blocksize", type=positive, default=64, help="elements to one scale")
    add("--plain", action="store_true", help="fp32 scales; default: nested, quantized to 8 bits")
    options = parsed(parser, arguments)
    return options


def main() -> None:
    options = parse()
    evict = torch.ones(2**25, device=options.device).sum  # 128 MiB: pushes the weight out of the caches
    run(
        "fourbit",
        options,
        points(options),
        contenders,
        acceptance=lambda record: acceptance(record.rows, record.machine["isa"]),
        gpu_acceptance=lambda record: gpu_acceptance(record.rows),
        before=lambda point: evict,
    )


if __name__ == "__main__":
    main()
