"""How much faster is attention as our operator than as torch's?

Causal attention, forward+backward with the gradients of q, k and v, and forward alone, timed in turn

- as torch computes it: "sdpa", `scaled_dot_product_attention` on its flash kernel, as transformers calls it;
- as "eager", transformers' own eager attention, which keeps its scores;
- as "peftfast", `peftfast.ops.attention`.

Usage:

    python benchmarks/bench_attention.py --quick      # 32 heads of 128, 512 and 2048 tokens; minutes
    python benchmarks/bench_attention.py --tokens 4096 --heads 32 8 --features 64 --dtype bf16
    python benchmarks/bench_attention.py --prefix 50  # keys that every query sees before its own, behind a mask

The work counted is that of the scores that are seen: two products forward, five backward. Saved is what is kept beside
q, k and v.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from record import DTYPES, Contender, Record, parsed, parser_of, positive, run, speed_bar, verdict
from torch import Tensor
from torch.nn import functional as F

from peftfast.ops import attention
from peftfast.testing import bytes_saved_for_backward


@dataclass(frozen=True)
class Point:
    """One workload."""

    direction: str
    dtype: str
    batch: int
    tokens: int
    prefix: int
    heads: int
    kv_heads: int
    features: int


def contenders(point: Point, device: str) -> dict[str, Contender]:
    """The implementations at one point, rivals and ours."""
    torch.manual_seed(0)
    dtype, keys, groups = DTYPES[point.dtype], point.tokens + point.prefix, point.heads // point.kv_heads
    backward = point.direction == "forward+backward"

    def vectors(tokens: int, heads: int) -> Tensor:
        """As a model has them: heads beside each other in memory."""
        return torch.randn(point.batch, tokens, heads, point.features, device=device, dtype=dtype).transpose(
            1, 2
        )

    q, grad = (vectors(point.tokens, point.heads) for _ in range(2))
    k, v = (vectors(keys, point.kv_heads) for _ in range(2))
    seen = torch.ones(point.tokens, keys, dtype=torch.bool, device=device).tril(point.prefix)
    mask = seen.expand(point.batch, 1, point.tokens, keys) if point.prefix else None

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
        return F.scaled_dot_product_attention(q, *repeated(k, v), mask[..., : q.shape[2], : k.shape[2]])

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = repeated(k, v)
        unseen = ~seen[: q.shape[2], : k.shape[2]]
        scores = (q @ k.transpose(2, 3) * point.features**-0.5).masked_fill(unseen, torch.finfo(dtype).min)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype) @ v

    def repeated(*of_keys: Tensor) -> tuple[Tensor, ...]:
        """A head for each of the queries', as transformers gives torch what it has a mask for."""
        return tuple(x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in of_keys)

    def contender(function: Callable, ours: bool = False) -> Contender:
        products = 7 if backward else 2

        def leaves_of(tokens: int) -> list[Tensor]:
            parts = q[:, :, :tokens], *(x[:, :, : tokens + point.prefix] for x in (k, v))
            return [x.detach().requires_grad_(backward) for x in parts]

        def call_on(leaves: list[Tensor]) -> Callable:
            def call() -> Any:
                y = function(*leaves)
                return torch.autograd.grad(y, leaves, grad[:, :, : y.shape[2]]) if backward else y

            return call

        leaves = leaves_of(point.tokens)
        return Contender(
            run=call_on(leaves),
            shrunk=lambda scores: call_on(leaves_of(math.isqrt(scores))),
            rows=point.tokens**2,
            flops=products * 2 * point.batch * point.heads * point.features * int(seen.sum()),
            bytes_moved=(3 if backward else 1) * 2 * (q.numel() + k.numel()) * dtype.itemsize,
            ours=ours,
            saved_bytes=partial(bytes_saved_for_backward, lambda: function(*leaves), leaves)
            if backward
            else None,
        )

    ours = partial(attention, mask=mask, causal=mask is None)
    return {"sdpa": contender(sdpa), "eager": contender(eager), "peftfast": contender(ours, ours=True)}


def acceptance(record: Record) -> list[dict[str, str]]:
    """Faster than torch's, and no more kept for backward than the output and a number per query and head."""
    seen, checks = [], []
    for row in record.rows:
        kept = row["implementations"]["peftfast"].get("saved_bytes")
        if kept is None:
            continue
        point = Point(**row["point"])
        queries = point.batch * point.heads * point.tokens
        checks.append(kept == queries * (point.features * DTYPES[point.dtype].itemsize + 4))
        seen.append(f"{point.dtype} tokens={point.tokens}: {kept / 2**20:.1f} MiB")
    return [
        speed_bar("time", 1.0, record.rows, ["sdpa", "eager"]),
        verdict("kept for backward", "the output and 4 B per query and head", seen, checks),
    ]


# ------------------------------------------------------------------------------------------ command line

DIRECTIONS = ["forward", "forward+backward"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("attention", __doc__, "32 heads of 128, 512 and 2048 tokens", cap=20.0, budget=5.0)
    add = parser.add_argument
    add("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    add("--batch", type=positive, default=1)
    add("--tokens", nargs="+", type=positive, default=[128, 512, 2048])
    add("--prefix", type=int, default=0, help="keys before the first query's own")
    add("--heads", nargs=2, type=positive, default=[32, 32], metavar=("HEADS", "KV_HEADS"))
    add("--features", nargs="+", type=positive, default=[64, 128], help="of a head")
    return parsed(parser, arguments)


def main() -> None:
    options = parse()
    if options.quick:
        options.tokens, options.features = [512, 2048], [128]
    workloads = itertools.product(options.direction, options.dtype, options.tokens, options.features)
    points = [
        Point(direction, dtype, options.batch, tokens, options.prefix, *options.heads, features)
        for direction, dtype, tokens, features in workloads
    ]
    run("attention", options, points, contenders, acceptance=acceptance)


if __name__ == "__main__":
    main()
