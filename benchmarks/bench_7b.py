"""How long does a training step of a 1B or 7B model take, in how much memory, and what share of the ceiling is that?

The architecture of TinyLlama-1.1B, Llama-2-7B, Qwen2.5-7B, Llama-3.1-8B or the mixture of experts OLMoE-1B-7B is built
from its transformers configuration with random weights. Each linear layer, each projection of experts is made in the
model's dtype, quantized to 4 bits (NF4, nested scales) at once and dropped, so that the model never exists whole in 16
bits; embeddings, routers and lm_head stay dense, and with --dense all else does. PEFT puts LoRA adapters (r = 16,
dropout 0.05, fp32) on all linear layers but lm_head, and on all experts of a mixture (then without dropout, which PEFT
refuses there), or on a share of them (`peftfast.ExpertLoraConfig`). A step is one sequence of random tokens: forward,
backward with every decoder layer checkpointed (unless --no-checkpointing), AdamW.

- "peftfast": on `peftfast.nn.Linear4bit`, under `peftfast.enabled()`.
- with --compare: one model on `bitsandbytes.nn.Linear4bit`, or a dense one, timed in turn as "stock" (PEFT,
  transformers and bitsandbytes as they are) and as "peftfast" (the same model, as above). By how much memory grows in
  a step of either is measured, too.
- with --memory-limit, on a GPU: for each limit the longest sequence that a step goes through with, found by trying (0:
  the model or 256 tokens do not fit), and the speed and the allocator's peak there and at 2048 tokens. The limit is
  that of all that the process has on the GPU: the CUDA context, which is measured, and torch's allocator, which gets
  the rest. With --compare "stock" is tried too, in a process of its own, but without --embeddings,
  --activation-offloading and --tiled-mlp, which it does not have.

Usage:

    python benchmarks/bench_7b.py                                              # Llama-2-7B; many minutes
    python benchmarks/bench_7b.py --model qwen2.5-7b llama-3.1-8b --tokens 512
    python benchmarks/bench_7b.py --layers 8 --tokens 512 --compare --dtype fp32
    python benchmarks/bench_7b.py --model olmoe-1b-7b --tokens 512 --expert-share 1 0.25
    python benchmarks/bench_7b.py --model tinyllama-1.1b --tokens 512 --compare --no-checkpointing --dense --dtype fp32
    python benchmarks/bench_7b.py --device cuda --model llama-3.1-8b --rank 32 --memory-limit 8GB 24GB --compare
    python benchmarks/bench_7b.py --model tiny --steps 3                       # to see it work; seconds

The dtype is that of activations, products, embeddings and lm_head. Each model has a process of its own. The peak of
its resident memory (of the device's, with --device cuda) includes the build, and with several lengths all
shorter ones. The work counted for the share of the ceiling is the least that the linear layers can do:
2·M·K·N for each of forward, recomputed forward and input gradient (lm_head is not recomputed), and 2·M·r·(K + N)
for each of the adapters' four (three without checkpointing), where M counts a token once for each of its experts.
Attention, the loss and the optimizer count nothing, but their time does.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import re
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from record import (
    DTYPES,
    Contender,
    Record,
    machine_facts,
    measure,
    measure_ceilings,
    point_text,
    positive,
    speed_bar,
    verdict,
)
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, PretrainedConfig, Qwen2Config

import peftfast
from peftfast import testing
from peftfast.cli.errors import is_out_of_memory
from peftfast.cli.model import return_freed_memory
from peftfast.integrations.experts import FourBitExperts, is_experts, projections, quantize_experts, weight_of
from peftfast.nn import Linear4bit, quantize_embeddings
from peftfast.nn.embeddings import EMBEDDINGS
from peftfast.ops import fourbit_quantize

CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "tinyllama-1.1b": partial(
        LlamaConfig,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
    ),
    "llama-2-7b": partial(LlamaConfig, max_position_embeddings=4096, rms_norm_eps=1e-5),
    "qwen2.5-7b": partial(
        Qwen2Config,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama-3.1-8b": partial(
        LlamaConfig,
        vocab_size=128256,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "olmoe-1b-7b": partial(OlmoeConfig, intermediate_size=1024),
    "tiny": partial(
        LlamaConfig,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
}
LIMITED_TOKENS = 2048  # where the speed under a limit is measured, beside the longest sequence
PROBED = 256  # tokens: how finely that is looked for, at first
STDERR = Console(stderr=True)


@dataclass(frozen=True)
class Point:
    """One workload: a training step on one sequence."""

    model: str
    layers: int
    dtype: str
    tokens: int
    dense: bool
    checkpointing: bool
    expert_share: float | None = None  # of the experts of each layer, those with adapters
    rank: int = 16
    embeddings: str | None = None  # "4bit", "8bit": the head, too
    offloading: bool = False
    memory_limit: str | None = None
    tiled_mlp: bool = False


# ---------------------------------------------------------------------------------------------- the model


def build(
    config: PretrainedConfig, options: argparse.Namespace, dtype: torch.dtype, expert_share: float | None
) -> nn.Module:
    """The model in 4 bits, or dense, with adapters, ready to train; on bitsandbytes' layers if it is to compare."""
    device, stock = options.device, options.compare
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base, head = model.base_model, model.get_output_embeddings()
    # Its buffers are no weights but computed.
    base.rotary_emb = type(base.rotary_emb)(config).to(device)

    def filled(parameter: nn.Parameter) -> torch.Tensor:
        """Weights are random, biases and norms one."""
        values = torch.ones_like(parameter, device=device, requires_grad=False)
        return values.normal_(std=config.initializer_range) if values.dim() > 1 else values

    modules = list(model.named_modules())
    for name, module in track(modules, "quantizing", console=STDERR, transient=True):
        if type(module) is nn.Linear and module is not head and not options.dense:
            bias = None if module.bias is None else filled(module.bias)
            quantized = fourbit_quantize(filled(module.weight))
            if stock:
                from bench_fourbit import bitsandbytes_layer  # which takes bitsandbytes

                layer = bitsandbytes_layer(quantized, bias, dtype)
            else:
                layer = Linear4bit.from_quantized(quantized, bias, dtype)
            model.set_submodule(name, layer)
        else:
            for key, parameter in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(filled(parameter), requires_grad=False))
            if is_experts(module) and not stock and not options.dense:
                quantize_experts(module)
    if options.embeddings:
        quantize_embeddings(model, options.embeddings)
    model.is_loaded_in_4bit = not options.dense  # As transformers tells PEFT.
    if options.checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    options = dict(r=options.rank, lora_alpha=2 * options.rank, task_type="CAUSAL_LM")
    if expert_share is None:
        adapters = LoraConfig(target_modules="all-linear", lora_dropout=0.05, **options)
    else:
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if expert_share == 1:
            parameters = ["experts.gate_up_proj", "experts.down_proj"]
            adapters = LoraConfig(target_parameters=parameters, **options)
        else:
            chosen = list(range(round(expert_share * config.num_experts)))
            layers = range(config.num_hidden_layers)
            experts = {f"model.layers.{layer}.mlp.experts": chosen for layer in layers}
            adapters = peftfast.ExpertLoraConfig(experts=experts, **options)
    return get_peft_model(model, adapters).train()


def trainer(model: nn.Module, options: argparse.Namespace) -> Callable[[int], Callable[[], None]]:
    """Given a number of tokens, the training step on a sequence of so many."""
    offload = peftfast.offload_activations(model) if options.offloading else contextlib.nullcontext()
    if options.tiled_mlp:
        peftfast.tile_mlps(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step_on(tokens: int) -> Callable[[], None]:
        ids = torch.randint(model.config.vocab_size, (1, tokens), device=options.device)

        def step() -> None:
            with offload:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if not loss.isfinite():
                raise ArithmeticError(f"the loss is {loss.item()}")

        return step

    return step_on


def least_flops(
    model: nn.Module, tokens: int, options: argparse.Namespace, expert_share: float | None
) -> int:
    """Of the linear layers in one step; a multiply-add counts 2. Tokens are taken to go to all experts alike."""
    head = model.get_base_model().get_output_embeddings()
    flops = 2 * 2 * tokens * head.in_features * head.out_features
    adapted = [
        (layer.in_features, layer.out_features, 1.0)
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    ]
    for experts in model.modules():
        if isinstance(experts, FourBitExperts):
            for name in projections(experts):
                _, N, K = weight_of(experts, name).shape
                adapted.append((K, N, model.config.num_experts_per_tok))
    for K, N, times in adapted:
        rows, adapters = int(tokens * times), expert_share if times > 1 else 1
        passes = 3 if options.checkpointing else 2
        flops += passes * 2 * rows * K * N + int(adapters * (passes + 1) * 2 * rows * options.rank * (K + N))
    return flops


# -------------------------------------------------------------------------------------------- measurement


def run_model(
    options: argparse.Namespace, name: str, dtype: str, expert_share: float | None, ceilings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one model, in ascending order of the lengths."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's use of it.
    return_freed_memory()  # As `peftfast train` does; the rival has it too.
    torch.manual_seed(0)
    config = CONFIGS[name](**({"num_hidden_layers": options.layers} if options.layers else {}))
    begin, before = time.perf_counter(), now_held(options.device)
    model = build(config, options, DTYPES[dtype], expert_share)
    built = {
        "bytes_before_build": before,
        "build_seconds": round(time.perf_counter() - begin, 1),
        "rss_after_build": psutil.Process().memory_info().rss,
    }
    STDERR.print(f"{name}: built in {built['build_seconds']} s, RSS {built['rss_after_build'] / 1e9:.2f} GB")

    step_on = trainer(model, options)
    rows = []
    for tokens in sorted(options.tokens):
        work = work_of(model, tokens, options, expert_share) | dict(shrunk=step_on, rows=tokens)
        # Strict: a layer that is not on the fast path is an error, never a number.
        context = partial(peftfast.enabled, strict=True)
        ours, stock = step_on(tokens), step_on(tokens)
        contenders = {"peftfast": Contender(ours, **work, ours=True, context=context)}
        if options.compare:
            contenders = {
                "stock": Contender(stock, **work, peak_bytes=partial(peak_memory, stock, options.device)),
                "peftfast": replace(
                    contenders["peftfast"], peak_bytes=partial(peak_memory, ours, options.device, context)
                ),
            }
        point = point_of(options, name, config, dtype, tokens, expert_share)
        with STDERR.status(f"{name}, {tokens} tokens"):
            row = measure(
                asdict(point),
                contenders,
                ceilings,
                cap=options.cap,
                budget=0.0,
                repeats=options.steps,
                warmup=0,
                least=options.steps,
                cuda=options.device == "cuda",
            )
        for it in row["implementations"].values():
            if "median_ms" in it:
                it["tokens_per_second"] = float(f"{tokens / it['median_ms'] * 1e3:.4g}")
        if not options.compare:
            row["implementations"]["peftfast"] |= {"peak_rss": peak_so_far(options.device)} | built
        rows.append(row)
    return rows


def work_of(
    model: nn.Module, tokens: int, options: argparse.Namespace, expert_share: float | None
) -> dict[str, int]:
    """What a step does at least, for its Contender: each pass reads all weights."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return dict(flops=least_flops(model, tokens, options, expert_share), bytes_moved=3 * weights)


def point_of(
    options: argparse.Namespace,
    name: str,
    config: PretrainedConfig,
    dtype: str,
    tokens: int,
    expert_share: float | None = None,
    memory_limit: str | None = None,
) -> Point:
    layers, dense, checkpointing = config.num_hidden_layers, options.dense, options.checkpointing
    return Point(
        name, layers, dtype, tokens, dense, checkpointing, expert_share,
        options.rank, options.embeddings, options.offloading, memory_limit, options.tiled_mlp,
    )  # fmt: skip


def run_limited(
    options: argparse.Namespace, name: str, dtype: str, limit: str, ceilings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one model in so much of a GPU's memory, as "stock" or "peftfast": of 2048 tokens, and of the most.

    Where nothing fits there is one row, which says so.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    limit_memory(gigabytes(limit))
    torch.manual_seed(0)
    config = CONFIGS[name](**({"num_hidden_layers": options.layers} if options.layers else {}))
    contender = "stock" if options.compare else "peftfast"
    context = contextlib.nullcontext if options.compare else partial(peftfast.enabled, strict=True)
    point = partial(point_of, options, name, config, dtype, memory_limit=limit)

    def nothing(reason: str) -> list[dict[str, Any]]:
        skipped = {"ours": not options.compare, "skipped": reason, "longest_tokens": 0}
        return [{"point": asdict(point(LIMITED_TOKENS)), "implementations": {contender: skipped}}]

    try:
        model = build(config, options, DTYPES[dtype], None)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return nothing("the model does not fit")
    step_on = trainer(model, options)

    def give_back() -> None:
        """Leaves nothing of a step on the GPU, and has its peak count from here on."""
        model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def fits(tokens: int) -> bool:
        STDERR.print(f"{name} in {limit}, {contender}: {tokens} tokens", highlight=False)
        try:
            with context():
                step_on(tokens)()
            return True
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            give_back()

    rows, most = [], longest(fits, config.max_position_embeddings)
    if most == 0:
        return nothing(f"{min(PROBED, config.max_position_embeddings)} tokens do not fit")
    for tokens in sorted({min(LIMITED_TOKENS, most), most}):
        give_back()
        work = work_of(model, tokens, options, None)
        step = Contender(step_on(tokens), **work, ours=not options.compare, context=context)
        row = measure(
            asdict(point(tokens)), {contender: step}, ceilings,
            cap=options.cap, budget=0.0, repeats=options.steps, warmup=0, least=options.steps,
            cuda=options.device == "cuda",
        )  # fmt: skip
        it = row["implementations"][contender]
        it |= {"longest_tokens": most, "peak_bytes": torch.cuda.max_memory_reserved()}
        if "median_ms" in it:
            it["tokens_per_second"] = float(f"{tokens / it['median_ms'] * 1e3:.4g}")
        rows.append(row)
    return rows


def limit_memory(limit: float) -> None:
    """Has torch refuse what would take the process beyond `limit` bytes of the GPU, the CUDA context included."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(max(0.0, limit - context) / total)
    STDERR.print(
        f"{limit / 1e9:g} GB, of which the CUDA context takes {context / 1e9:.2f} GB", highlight=False
    )


def longest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of tokens up to `most` that fits, to within 1/32 of itself or 256; 0: not even that many do.

    A longer sequence takes more memory, so each try halves what is still open.
    """
    low, high = 0, min(PROBED, most)
    while fits(high):
        low = high
        if low == most:
            return low
        high = min(2 * high, most)
    while high - low > max(PROBED, low // 32):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def peak_memory(step: Callable[[], None], device: str, context: Callable = contextlib.nullcontext) -> int:
    """By how many bytes memory grows in a step."""
    with context():
        return testing.peak_memory(step, device)


def now_held(device: str) -> int:
    """Bytes: of this process, or of its tensors on the GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_so_far(device: str) -> int:
    """The most of that so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_own_process(function: Callable, *arguments: Any) -> Any:
    """Its result. Memory that is freed does not always go back to the system, so each model starts afresh."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Each bar that training in 4 bits has to reach on the CPU, with what this run has seen of it."""
    long = [row for row in rows if row["point"]["tokens"] == 512 and row["point"]["model"] != "tiny"]
    turns = [row for row in long if "stock" in row["implementations"]]
    slices = [row for row in turns if row["point"]["layers"] == 8 and not row["point"]["dense"]]
    small = [row for row in turns if row["point"]["model"] == "tinyllama-1.1b"]
    whole = {  # Only here is the memory that of one whole model.
        point_text(point | {"tokens": None, "layers": None}): row["implementations"]["peftfast"]
        for row in long
        if "peak_rss" in row["implementations"]["peftfast"]
        and (point := row["point"])["layers"] == CONFIGS[point["model"]]().num_hidden_layers
    }
    experts = {of: it for of, it in whole.items() if of.startswith("olmoe")}
    whole = {of: it for of, it in whole.items() if of not in experts}
    peaks = {
        point_text(row["point"]): ours["peak_bytes"] / stock["peak_bytes"]
        for row in small
        if "peak_bytes" in (stock := row["implementations"]["stock"])
        and "peak_bytes" in (ours := row["implementations"]["peftfast"])
    }
    return [
        speed_bar("8 layers, 512 tokens, against PEFT + bitsandbytes", 1.7, slices, ["stock"]),
        speed_bar("1.1B dense, 512 tokens", 1.5, [it for it in small if it["point"]["dense"]], ["stock"]),
        speed_bar(
            "1.1B in 4 bits, 512 tokens", 1.7, [it for it in small if not it["point"]["dense"]], ["stock"]
        ),
        verdict(
            "1.1B, 512 tokens: a step's memory, of stock's",
            "at most 60%",
            [f"{point}: {share:.0%}" for point, share in peaks.items()],
            [share <= 0.6 for share in peaks.values()],
        ),
        verdict(
            "7B, 512 tokens: peak RSS",
            "at most 5.8 GB",
            [f"{name}: {it['peak_rss'] / 1e9:.2f} GB" for name, it in whole.items()],
            [it["peak_rss"] <= 5.8e9 for it in whole.values()],
        ),
        verdict(
            "OLMoE-1B-7B, experts in 4 bits, 512 tokens: peak RSS",
            "at most 6.5 GB",
            [f"{name}: {it['peak_rss'] / 1e9:.2f} GB" for name, it in experts.items()],
            [it["peak_rss"] <= 6.5e9 for it in experts.values()],
        ),
        verdict(
            "7B, 512 tokens: share of the ceiling",
            "at least 70%",
            [f"{name}: {it['ceiling_share']:.0%}" for name, it in whole.items()],
            [it["ceiling_share"] >= 0.7 for it in whole.values()],
        ),
    ]


def limited_acceptance(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The bars of small cards, for Llama-3.1-8B in 4 bits with rank 32, with what this run has seen of them."""
    bars = {"8GB": 6_000, "24GB": 90_000}
    # By limit and dtype: of each contender the longest sequence, and the tokens per second at 2048.
    lengths: dict[tuple, dict[str, int]] = {}
    speeds: dict[tuple, dict[str, float]] = {}
    for row in rows:
        point = Point(**row["point"])
        whole = point.layers == CONFIGS[point.model]().num_hidden_layers
        if point.model != "llama-3.1-8b" or not whole or point.rank != 32 or point.dense:
            continue
        case = point.memory_limit, point.dtype
        for contender, it in row["implementations"].items():
            lengths.setdefault(case, {})[contender] = it["longest_tokens"]
            if point.tokens == LIMITED_TOKENS and point.checkpointing and "tokens_per_second" in it:
                speeds.setdefault(case, {})[contender] = it["tokens_per_second"]
    ratios = {
        f"{limit} {dtype}": found["peftfast"] / found["stock"]
        for (limit, dtype), found in speeds.items()
        if len(found) == 2
    }
    lines = []
    for limit, bar in bars.items():
        those = [it for (of, _), it in lengths.items() if of == limit and "peftfast" in it]
        seen = [", ".join(f"{contender} {tokens} tokens" for contender, tokens in it.items()) for it in those]
        reached = [it["peftfast"] >= bar for it in those]
        what = f"Llama-3.1-8B in {limit}: longest sequence"
        lines.append(verdict(what, f"at least {bar} tokens", seen, reached))
    speed = verdict(
        f"Llama-3.1-8B, {LIMITED_TOKENS} tokens, against PEFT + bitsandbytes + SDPA + checkpointing: tokens/s",
        "at least 2 x",
        [f"{case}: {ratio:.2f} x" for case, ratio in ratios.items()],
        [ratio >= 2 for ratio in ratios.values()],
    )
    return [*lines, speed]


# ------------------------------------------------------------------------------------------ command line


def gigabytes(text: str) -> float:
    """The bytes of a size such as 8GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)GB", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 8GB")
    return float(found[1]) * 1e9


def memory_limit(text: str) -> str:
    gigabytes(text)
    return text


def share_of_all(text: str) -> float:
    """An argument above 0 and up to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and up to 1")
    return value


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", nargs="+", choices=CONFIGS, default=["llama-2-7b"])
    add("--tokens", nargs="+", type=positive, default=[64, 512], help="lengths of the sequence")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="of all that is not in 4 bits")
    add(
        "--expert-share",
        nargs="+",
        type=share_of_all,
        default=[1.0],
        help="of the experts, those with adapters",
    )
    add("--layers", type=positive, metavar="N", help="only the first N decoder layers")
    add("--steps", type=positive, default=1, metavar="N", help="timed steps, after one to warm up")
    add("--dense", action="store_true", help="in the dtype instead of 4 bits")
    add(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="keep the activations of every layer",
    )
    add("--rank", type=positive, default=16, metavar="R", help="of the adapters")
    add(
        "--embeddings", choices=EMBEDDINGS, help="embeddings and head in 4 or 8 bits; by default in the dtype"
    )
    add(
        "--activation-offloading",
        dest="offloading",
        action="store_true",
        help="on a GPU: what goes from forward to backward waits in main memory",
    )
    add("--tiled-mlp", action="store_true", help="MLPs run on 4096 tokens at a time")
    add(
        "--memory-limit",
        nargs="+",
        type=memory_limit,
        metavar="SIZE",
        help="on a GPU: the longest sequence that trains in so much of it, such as 8GB",
    )
    add("--compare", action="store_true", help="in turn with PEFT + transformers + bitsandbytes")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--cap", type=float, default=120.0, metavar="S", help="seconds a step from which a rival is skipped")
    add("--json", type=Path, metavar="FILE", help="the record; default: benchmarks/results/7b-MACHINE.json")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    for name in ("memory_limit", "offloading"):
        if getattr(options, name) and options.device == "cpu":
            parser.error(
                f"--{'activation-' * (name == 'offloading')}{name.replace('_', '-')} takes --device cuda"
            )
    if options.tiled_mlp and options.compare and not options.memory_limit:
        parser.error("--tiled-mlp: with --compare both are timed on one model, and transformers has no tiles")
    if options.embeddings and options.compare and not options.memory_limit:
        parser.error(
            "--embeddings: with --compare both are timed on one model, and bitsandbytes has no such layers"
        )
    return options


def main() -> None:
    options = parse()
    dtypes = [DTYPES[name] for name in options.dtype]
    record = Record(
        benchmark="7b-limited" if options.memory_limit else "7b-compared" if options.compare else "7b",
        machine=machine_facts(options.device),
        ceilings=in_own_process(measure_ceilings, dtypes, options.device),
    )
    path = options.json or record.default_path()
    for fact in record.facts():
        STDERR.print(fact, highlight=False)
    for name, dtype, limit in itertools.product(options.model, options.dtype, options.memory_limit or []):
        own = argparse.Namespace(**vars(options) | {"compare": False})
        stock = argparse.Namespace(
            **vars(options) | {"embeddings": None, "offloading": False, "tiled_mlp": False}
        )
        for contender in [own, stock] if options.compare else [own]:
            record.rows += in_own_process(run_limited, contender, name, dtype, limit, record.ceilings)
            record.save(path)
    for name in [] if options.memory_limit else options.model:
        for dtype in options.dtype:
            for share in options.expert_share if hasattr(CONFIGS[name](), "num_experts_per_tok") else [None]:
                record.rows += in_own_process(run_model, options, name, dtype, share, record.ceilings)
                record.save(path)
    if options.device == "cpu":
        record.acceptance = acceptance(record.rows)
    if options.memory_limit:
        record.acceptance = limited_acceptance(record.rows)
    record.save(path)
    record.print(Console(width=max(STDERR.width, 120)))
    STDERR.print(f"Record: {path}", highlight=False)


if __name__ == "__main__":
    main()
