"""How much faster and leaner is a language model's loss computed without its logits?

The loss of one batch and the gradient of its last hidden states, with a frozen dense head, is timed in turn

- as transformers has it, "eager": the head's logits, widened to fp32, and their cross-entropy; and "compiled", the
  same under torch.compile;
- "chunked": plain torch, some rows at a time, each checkpointed, as training libraries save memory;
- as "peftfast", `peftfast.ops.linear_cross_entropy`.

Usage:

    python benchmarks/bench_loss.py --quick      # 512 tokens of a vocabulary of 32 000, H 2048; minutes
    python benchmarks/bench_loss.py              # 2048 tokens of a vocabulary of 128 256, H 2048
    python benchmarks/bench_loss.py --ignored 0.5 --trained    # half of the rows have no label; the head is trained

The work counted is the least possible: two products of T x V x H (three when the head is trained). The peak is by how
much memory grows during a call, with malloc set as `peftfast train` sets it. On the CPU the bars are to take no longer
than eager and 5 % of its peak.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from record import DTYPES, Contender, Record, parsed, parser_of, positive, run, speed_bar, verdict
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftfast.cli.model import return_freed_memory
from peftfast.ops import linear_cross_entropy
from peftfast.testing import peak_memory

CHUNK = 256  # rows of the chunked rival
PEAK_BAR = 0.05


@dataclass(frozen=True)
class Point:
    """One workload."""

    dtype: str
    tokens: int
    vocabulary: int
    hidden: int
    ignored: float  # share of the rows that have no label
    trained: bool


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """transformers' ForCausalLMLoss, after its shift."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    def part(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, weight).float(), targets, reduction="sum")

    parts = zip(hidden.split(CHUNK), labels.split(CHUNK))
    losses = [checkpoint(part, rows, weight, targets, use_reentrant=False) for rows, targets in parts]
    return torch.stack(losses).sum() / (labels != -100).sum()


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    torch.manual_seed(0)
    dtype = DTYPES[point.dtype]
    hidden = torch.randn(point.tokens, point.hidden, device=device, dtype=dtype)
    weight = torch.randn(point.vocabulary, point.hidden, device=device, dtype=dtype).mul_(point.hidden**-0.5)
    weight.requires_grad_(point.trained)
    labels = torch.randint(point.vocabulary, (point.tokens,), device=device)
    labels[torch.rand(point.tokens, device=device) < point.ignored] = -100

    def call(loss: Callable, rows: int = point.tokens) -> Callable[[], Any]:
        x, targets = hidden[:rows].detach().requires_grad_(), labels[:rows]
        leaves = [x, weight] if point.trained else [x]
        return lambda: torch.autograd.grad(loss(x, weight, targets), leaves)

    def contender(loss: Callable, estimator: Callable = eager, ours: bool = False) -> Contender:
        work = call(loss)
        products = 3 if point.trained else 2
        labelled = int((labels != -100).sum())
        return Contender(
            run=work,
            flops=products * 2 * labelled * point.vocabulary * point.hidden,
            bytes_moved=dtype.itemsize * products * weight.numel(),
            ours=ours,
            shrunk=partial(call, estimator),
            rows=point.tokens,
            peak_bytes=partial(peak_memory, work, device),
        )

    torch.compiler.reset()
    return {
        "eager": contender(eager),
        "compiled": contender(torch.compile(eager, dynamic=False)),
        "chunked": contender(chunked),
        "peftfast": contender(linear_cross_entropy, ours=True),
    }


def acceptance(record: Record) -> list[dict[str, str]]:
    """No slower than eager, at a twentieth of its peak where the vocabulary is large."""
    large = [row for row in record.rows if row["point"]["vocabulary"] * row["point"]["tokens"] >= 1 << 27]
    seen, checks, gaps = [], [], 0
    for row in large:
        point, found = row["point"], row["implementations"]
        logits = point["tokens"] * point["vocabulary"]
        # Where eager was not run: its logits, their fp32 copy, the log-softmax and the gradients of both.
        width = DTYPES[point["dtype"]].itemsize
        peak = found["eager"].get("peak_bytes") or logits * (8 if width == 4 else 8 + width)
        share = found["peftfast"]["peak_bytes"] / peak
        checks.append(share <= PEAK_BAR)
        how = "" if "peak_bytes" in found["eager"] else " (eager's by arithmetic)"
        seen.append(f"{point['dtype']} tokens={point['tokens']}: {share:.1%}{how}")
    return [
        speed_bar("time of loss and gradients", 1.0, record.rows, ["eager"]),
        verdict("peak memory, of eager's", f"at most {PEAK_BAR:.0%}", seen, checks, gaps),
    ]


# ------------------------------------------------------------------------------------------ command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("loss", __doc__, "512 tokens, vocabulary 32 000, H 2048", cap=60.0, budget=60.0)
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--tokens", nargs="+", type=positive, default=[2048])
    add("--vocabulary", nargs="+", type=positive, default=[128256], metavar="V")
    add("--hidden", nargs="+", type=positive, default=[2048], metavar="H")
    add("--ignored", nargs="+", type=float, default=[0.0], metavar="SHARE", help="of the rows")
    add("--trained", action="store_true", help="the head has a gradient too")
    options = parsed(parser, arguments)
    if any(not 0 <= share < 1 for share in options.ignored):
        parser.error("argument --ignored: a share is wanted, from 0 to below 1")
    if options.quick:
        options.tokens, options.vocabulary, options.hidden = [512], [32000], [2048]
    return options


def main() -> None:
    options = parse()
    return_freed_memory()  # else holes that one contender leaves in the heap are charged to another
    workloads = itertools.product(
        options.dtype, options.tokens, options.vocabulary, options.hidden, options.ignored, [options.trained]
    )
    points = list(itertools.starmap(Point, workloads))
    run("loss", options, points, contenders, acceptance=acceptance, least=3, warmup=0)


if __name__ == "__main__":
    main()
