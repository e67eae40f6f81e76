"""Is stock PEFT code faster under peftfast.enable(), and how far is that from what the machine can do?

One `lora.Linear` of PEFT is timed in turn

- as PEFT runs it: "PEFT default" (fp32 adapters, whatever the base's dtype), "PEFT best" (adapters in the
  base's dtype, autocast_adapter_dtype=False) and "PEFT compiled" (the latter under torch.compile);
- as "dense", the frozen `nn.Linear` alone, with no adapter;
- under `peftfast.enabled()`: "peftfast default" and "peftfast best", the same two modules.

Usage:

    python benchmarks/bench_lora.py --quick        # the points that the device's acceptance bars name; minutes
    python benchmarks/bench_lora.py                # the whole sweep; an hour or more
    python benchmarks/bench_lora.py --dtype bf16 --rows 1 1024 --shape 4096x4096 --rank 16 --dropout 0.05

What is timed:

- "forward": the layer in training mode, so that dropout acts, with no gradient recorded. With dropout 0 that
  is generation; with dropout it is the first pass of activation checkpointing.
- "forward+backward": also the gradients of lora_A, lora_B and of the input, as in every layer but the first.
  The frozen `nn.Linear` computes its input's gradient too.

lora_B is random (PEFT starts it at zero). All contenders share one base weight. A weight of 16 MiB or more is
evicted from the caches before every call, since a model of such layers never finds one there; that is not
timed. The work counted for GFLOP/s and for the share of the ceiling is the least possible: 2·M·K·N per pass
over the base weight and 2·M·r·(K + N) per direction of the adapter, which has two in backward; dropout and
casts count nothing.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import (
    DTYPES,
    GRAPH,
    Contender,
    Record,
    parsed,
    parser_of,
    positive,
    probability,
    rows_of,
    run,
    shape,
)
from torch import nn

import peftfast
from peftfast.testing import bytes_saved_for_backward

LLAMA_7B = [(4096, 4096), (4096, 11008), (11008, 4096)]  # (K, N): q/k/v/o, gate/up, down
SMALL = (256, 256)
ROWS, SMALL_ROWS = [1, 16, 128, 1024, 4096], [512]
EVICTED = 16 * 2**20  # Bytes from which a weight is taken to be out of the caches between two calls.


@dataclass(frozen=True)
class Point:
    """One workload. The letters are those of Y[M,N] = X[M,K] W[N,K]ᵀ, with a rank-r adapter."""

    call: str  # "forward" or "forward+backward"
    dtype: str
    M: int
    K: int
    N: int
    r: int
    dropout: float


GPU_POINTS = [
    Point("forward+backward", "bf16", 4096, K, N, 16, 0.05) for K, N in LLAMA_7B
]  # those of its bars


def sweep(options: argparse.Namespace) -> Iterator[Point]:
    """Every combination of what the options select."""
    for dtype, (K, N), r, dropout, call in itertools.product(
        options.dtype, options.shape, options.rank, options.dropout, ("forward", "forward+backward")
    ):
        for M in options.rows or (SMALL_ROWS if (K, N) == SMALL else ROWS):
            yield Point(call, dtype, M, K, N, r, dropout)


def quick(options: argparse.Namespace) -> Iterator[Point]:
    """The points that the acceptance bars name."""
    if options.device == "cuda":
        yield from (point for point in GPU_POINTS if point.dtype in options.dtype)
        return
    for dtype in options.dtype:
        yield Point("forward+backward", dtype, *SMALL_ROWS, *SMALL, 16, 0.05)
        if dtype == "bf16":
            for M in (1, 16, 512, 1024):
                yield Point("forward", dtype, M, 4096, 4096, 16, 0.05)
        yield Point("forward+backward", dtype, 1024, 4096, 4096, 16, 0.05)


# --------------------------------------------------------------------------------------------- contenders


class _Model(nn.Module):
    """What get_peft_model needs around a single layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.layer = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def lora_layer(weight: nn.Parameter, point: Point, autocast_adapter_dtype: bool) -> nn.Module:
    """A PEFT lora.Linear over `weight` [N,K], with random lora_A and lora_B, in training mode."""
    base = nn.Linear(point.K, point.N, bias=False, device="meta")
    base.weight = weight
    config = LoraConfig(
        r=point.r, lora_alpha=2 * point.r, lora_dropout=point.dropout, target_modules=["layer"]
    )
    model = get_peft_model(_Model(base), config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.base_model.model.layer
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.train()


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    dtype, M, K, N, r = DTYPES[point.dtype], point.M, point.K, point.N, point.r
    weight = nn.Parameter(torch.randn(N, K, device=device).mul_(K**-0.5).to(dtype), requires_grad=False)
    x = torch.randn(M, K, device=device, dtype=dtype).requires_grad_()
    grad = torch.randn(M, N, device=device, dtype=dtype)

    backward = point.call == "forward+backward"
    passes = 2 if backward else 1
    base_flops = passes * 2 * M * K * N
    adapter_flops = (3 if backward else 1) * 2 * M * r * (K + N)
    # A pass reads the weight and its input and writes its output. Backward reads X once more, for dA.
    moved = dtype.itemsize * (passes * (K * N + M * (K + N)) + (M * K if backward else 0))

    def call(module: Callable, parameters: list[nn.Parameter], rows: int = M) -> Callable[[], Any]:
        inputs, outputs = x.detach()[:rows].requires_grad_(), grad[:rows]

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return module(inputs)

        def forward_backward() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(module(inputs), [inputs, *parameters], outputs)

        return forward_backward if backward else forward

    found: dict[str, Contender] = {}

    def add(name: str, module: Callable, estimator: nn.Module, ours: bool = False) -> None:
        parameters = [p for p in estimator.parameters() if p.requires_grad]
        found[name] = Contender(
            run=call(module, parameters),
            flops=base_flops + (adapter_flops if parameters else 0),
            bytes_moved=moved,
            ours=ours,
            # Strict: a layer that is not on the fast path is an error, never a number.
            context=(lambda: peftfast.enabled(strict=True)) if ours else nullcontext,
            shrunk=lambda rows: call(estimator, parameters, rows),
            rows=M,
            saved_bytes=(lambda: bytes_saved_for_backward(lambda: module(x), [x, *estimator.parameters()]))
            if backward
            else None,
        )

    default = lora_layer(weight, point, autocast_adapter_dtype=True)
    # Over an fp32 base the default is the best already.
    best = default if dtype == torch.float32 else lora_layer(weight, point, autocast_adapter_dtype=False)
    dense = nn.Linear(K, N, bias=False, device="meta")
    dense.weight = weight
    # Dynamo gives up silently after its eighth layer, and compiles a second shape as a dynamic one.
    torch.compiler.reset()
    add("PEFT default", default, default)
    if best is not default:
        add("PEFT best", best, best)
    add("PEFT compiled", torch.compile(best, dynamic=False), best)
    add("dense", dense, dense)
    add("peftfast default", default, default, ours=True)
    if best is not default:
        add("peftfast best", best, best, ours=True)
    return found


def evictor(point: Point, device: str) -> Callable[[], Any] | None:
    """A function that pushes the weight out of the caches; None where the weight is small."""
    if point.K * point.N * DTYPES[point.dtype].itemsize < EVICTED:
        return None
    return torch.ones(2**25, device=device).sum  # 128 MiB


# -------------------------------------------------------------------------------------------- acceptance

# Ours against PEFT at the same dtype of the adapters; against the dense layer at both.
DEFAULT, BEST = ("peftfast default", "PEFT default"), ("peftfast best", "PEFT best")
COMPILED = ("peftfast best", "PEFT compiled")
BESIDE_DENSE = [("peftfast default", "dense"), ("peftfast best", "dense")]


def acceptance(rows: list[dict[str, Any]], isa: str) -> list[dict[str, str]]:
    """Each bar that the LoRA kernels have to reach on the CPU, with what this run has seen of it.

    The bars are for rank 16 and dropout 0.05. A bar is reached when all the cases that it covers reach it.
    """

    def at(call: str, dtype: str, M: int, K: int, N: int) -> dict[str, Any] | None:
        wanted = asdict(Point(call, dtype, M, K, N, 16, 0.05))
        return next((row for row in rows if row["point"] == wanted), None)

    bf16, fp32 = (at("forward+backward", dtype, 1024, 4096, 4096) for dtype in ("bf16", "fp32"))
    few = [at("forward", "bf16", M, 4096, 4096) for M in (1, 16)]
    small = [at("forward+backward", dtype, *SMALL_ROWS, *SMALL) for dtype in ("bf16", "fp32")]
    training = "forward+backward, M=1024, against"
    return [
        _speed_bar(f"bf16 {training} PEFT's default", 1.35, [bf16], [DEFAULT]),
        _speed_bar(f"bf16 {training} PEFT's best", 1.2, [bf16], [BEST]),
        _speed_bar(f"bf16 {training} the dense layer without adapter", 1.0, [bf16], BESIDE_DENSE),
        _speed_bar(f"fp32 {training} PEFT's default", 1.3, [fp32], [DEFAULT]),
        _share_bar("bf16 forward, M of 512 and more, share of the dpbf16 peak", 0.88, rows, isa),
        _speed_bar("bf16 forward, M=1 and M=16, against PEFT", 1.3, few, [DEFAULT, BEST]),
        _speed_bar("256x256 forward+backward, M=512, against PEFT", 1.2, small, [DEFAULT, BEST]),
        _bytes_bar("bytes saved for backward beyond X, per M·r", 8, rows),
    ]


def gpu_acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The same on a GPU, for 4096 tokens and the layers of a 7B model. Graphs are held against graphs."""

    def bar(rival: str, least: float, *pairs: tuple[str, str]) -> dict[str, str]:
        graphs = [(ours + GRAPH, theirs + GRAPH) for ours, theirs in pairs]
        what = f"bf16 forward+backward, M=4096, against {rival} PEFT"
        return _speed_bar(what, least, rows_of(rows, GPU_POINTS), [*pairs, *graphs])

    return [bar("eager", 1.8, DEFAULT, BEST), bar("compiled", 1.3, COMPILED)]


def _speed_bar(
    what: str, bar: float, rows: list[dict[str, Any] | None], pairs: list[tuple[str, str]]
) -> dict[str, str]:
    seen, checks, gaps = [], [], rows.count(None)
    for row in filter(None, rows):
        found, point = row["implementations"], row["point"]
        # Over an fp32 base there is no "best" beside the default; that is no gap.
        for ours, rival in (pair for pair in pairs if pair[0] in found):
            sizes = f"{point['dtype']} M={point['M']} K={point['K']} N={point['N']}"
            where = f"{sizes} {ours.removeprefix('peftfast ')}:"
            if reason := found[rival].get("skipped"):
                gaps += 1
                estimate = found[rival].get("estimate_ms")
                about = f", about {estimate / 1e3:.3g} s" if estimate else ""
                seen.append(f"{where} {found[ours]['median_ms']:.4g} ms; {rival} skipped ({reason}{about})")
            else:
                checks.append(found[ours]["speedup"][rival] >= bar)
                seen.append(f"{where} {found[ours]['speedup'][rival]:.2f} x")
    return _bar(what, f"at least {bar:g} x", seen, checks, gaps)


def _share_bar(what: str, bar: float, rows: list[dict[str, Any]], isa: str) -> dict[str, str]:
    seen, checks = [], []
    native = isa == "avx512_bf16"
    for row in rows:
        point = Point(**row["point"])
        if point.call == "forward" and point.dtype == "bf16" and point.M >= 512 and point.K >= 4096:
            for name, found in row["implementations"].items():
                if found["ours"]:
                    seen.append(f"M={point.M} {name.split()[1]}: {found['ceiling_share']:.0%}")
                    checks.append(found["ceiling_share"] >= bar)
    if seen and not native:
        seen[0] = f"{isa} does not use dpbf16; of the peak of what it uses, {seen[0]}"
    return _bar(what, f"at least {bar:.0%}", seen, checks if native else [], gaps=0 if native else 1)


def _bytes_bar(what: str, bar: float, rows: list[dict[str, Any]]) -> dict[str, str]:
    most: dict[str, float] = {}
    for row in rows:
        for name, found in row["implementations"].items():
            if "saved_bytes" in found and name != "dense":
                bytes_per = found["saved_bytes"] / (row["point"]["M"] * row["point"]["r"])
                most[name] = max(most.get(name, 0.0), bytes_per)
    seen = [f"{name}: {bytes_per:.4g}" for name, bytes_per in most.items()]
    checks = [bytes_per <= bar for name, bytes_per in most.items() if name.startswith("peftfast")]
    return _bar(what, f"at most {bar:g}", seen, checks, gaps=0)


def _bar(what: str, bar: str, seen: list[str], checks: list[bool], gaps: int) -> dict[str, str]:
    if not seen:
        verdict = "not in this run"
    elif not all(checks):
        verdict = "not reached"
    else:
        verdict = "not measurable here" if gaps else "reached"
    return {"what": what, "bar": bar, "seen": "; ".join(seen), "verdict": verdict}


# ------------------------------------------------------------------------------------------ command line


def plot(record: Record, path: Path) -> None:
    """Bars: how many times faster ours is than each rival, per point (the lesser of default and best)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best: dict[str, dict[str, float]] = {}  # rival -> point -> the least of our adapter dtypes' speedups
    for row in record.rows:
        point = Point(**row["point"])
        label = f"{point.call} {point.dtype}\n{point.K}x{point.N} M={point.M} r={point.r} p={point.dropout:g}"
        for found in row["implementations"].values():
            for rival, times in found.get("speedup", {}).items():
                so_far = best.setdefault(rival, {})
                so_far[label] = min(times, so_far.get(label, times))
    labels = list(dict.fromkeys(label for points in best.values() for label in points))
    height = 0.8 / max(len(best), 1)
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.7 * len(labels)), layout="constrained")
    for index, (rival, points) in enumerate(best.items()):
        positions = [labels.index(label) + index * height for label in points]
        axes.barh(positions, list(points.values()), height, label=rival)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the rival (at 1: as fast)")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("lora", __doc__, "only the points that the acceptance bars name", cap=5.0, budget=10.0)
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="dtype of the base layer")
    add("--shape", nargs="+", type=shape, default=[*LLAMA_7B, SMALL], metavar="KxN", help="in x out features")
    add("--rows", nargs="+", type=positive, metavar="M", help=f"default {ROWS}, and {SMALL_ROWS} for 256x256")
    add("--rank", nargs="+", type=positive, default=[8, 16, 64], metavar="r")
    add("--dropout", nargs="+", type=probability, default=[0.0, 0.05], metavar="p")
    add("--plot", type=Path, metavar="FILE.png", help="also draw the speedups")
    options = parsed(parser, arguments)
    return options


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", module="torch")  # Compilation's advice. What fails is in the record.
    record = run(
        "lora",
        options,
        list(quick(options) if options.quick else sweep(options)),
        contenders,
        acceptance=lambda record: acceptance(record.rows, record.machine["isa"]),
        gpu_acceptance=lambda record: gpu_acceptance(record.rows),
        before=lambda point: evictor(point, options.device),
    )
    if options.plot:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
