"""How near does `peftfast plan` come to the memory that training takes?

Small and medium models of the Llama, Qwen2 and OLMoE architectures with random weights, dense and in 4 bits, with and
without activation checkpointing, are planned from their configuration alone, and then trained for two steps, each in a
process of its own. Measured is how far the resident memory of the second step, weights and AdamW's moments included,
rises above what the process had before the model was made, and after a tiny model had trained in it, so that libraries
that load on the way count for nothing. The last settings are trained by `peftfast train` itself, whose reported peak is
taken less that of the same run of a tiny model.

The C library is told to give large freed blocks back to the system at once (MALLOC_MMAP_THRESHOLD_=65536). By default
glibc keeps blocks of up to 32 MiB for later, and a process then stays larger than what it uses: "default_malloc_bytes"
in a row, measured with --malloc, says how large.

    python benchmarks/bench_plan.py                  # all settings; minutes
    python benchmarks/bench_plan.py --only 0 3       # some of them, by number
    python benchmarks/bench_plan.py --malloc         # also as glibc does by default; twice as long
    python benchmarks/bench_plan.py --against FILE   # instead of training: what bench_7b.py has recorded there

bench_7b.py records how large its process was before the model was built ("bytes_before_build") and at its largest
("peak_rss"), with a GPU its tensors there: how near the plan of a whole model comes to that, two commands find out.

    python benchmarks/bench_7b.py --tokens 512 --json 7b.json
    python benchmarks/bench_plan.py --against 7b.json

A row of the record holds "planned" by parts, "planned_bytes", "measured_bytes" and "error", planned / measured - 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from record import Record, machine_facts, point_text, positive, verdict
from rich.console import Console
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
)

import peftfast
from peftfast.cli import methods
from peftfast.cli.plan import PlanSettings, plan
from peftfast.cli.settings import DTYPES
from peftfast.demo.pretrain import build_tokenizer
from peftfast.testing import peak_memory

BAR = 0.10
CONFIGS: dict[str, PretrainedConfig] = {
    "llama-small": LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16, vocab_size=8000
    ),
    "llama-medium": LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=4, num_attention_heads=16, vocab_size=8000
    ),
    "qwen-small": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=5, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=16000, tie_word_embeddings=True,
    ),
    "olmoe-small": OlmoeConfig(
        hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, num_experts=32, num_experts_per_tok=4, vocab_size=8000, eos_token_id=1,
    ),
    "tiny": LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, vocab_size=300
    ),
    "tiny-moe": OlmoeConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
        num_experts=4, num_experts_per_tok=2, vocab_size=64, eos_token_id=1,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One setting; the names are those of PlanSettings."""

    model: str
    method: str = "lora"
    dtype: str = "fp32"
    checkpointing: bool = False
    sequence_len: int = 512
    micro_batch_size: int = 1
    lora_r: int = 16
    target_modules: str = "all-linear"

    def settings(self, folder: Path) -> PlanSettings:
        return PlanSettings(**asdict(self) | {"model": str(folder)})


POINTS = [
    Point("llama-small"),
    Point("llama-small", checkpointing=True),
    Point("llama-small", "qlora"),
    Point("llama-small", "qlora", checkpointing=True, sequence_len=768),
    Point("llama-small", sequence_len=128, micro_batch_size=4),
    Point("llama-small", lora_r=128),
    Point("qwen-small", checkpointing=True, lora_r=64),
    Point("qwen-small", "qlora", sequence_len=384, lora_r=64),
    Point("qwen-small", target_modules="q_proj,v_proj", sequence_len=256),
    Point("llama-medium", "qlora", sequence_len=256),
    Point("llama-medium", "lora", "bf16", sequence_len=128),
    Point("llama-medium", "qlora", "bf16", sequence_len=128, micro_batch_size=2),
    Point("olmoe-small", sequence_len=256),
    Point("olmoe-small", "qlora", checkpointing=True),
]
# Trained by `peftfast train`.
COMMANDS = [
    Point("llama-small", sequence_len=256, micro_batch_size=2),
    Point("llama-medium", "qlora", "bf16", checkpointing=True),
]


def train(point: Point, folder: Path) -> int:
    """Bytes by which this process has grown at the height of the second training step of a model in `folder`."""
    tiny = "tiny-moe" if point.model.startswith("olmoe") else "tiny"
    with tempfile.TemporaryDirectory() as other:
        CONFIGS[tiny].save_pretrained(other)
        step = _trainer(replace(point, sequence_len=32, micro_batch_size=1), Path(other))
        step(), step()
        del step
    peak_memory(lambda: None)  # gives back what was freed
    before = psutil.Process().memory_info().rss
    step = _trainer(point, folder)
    step()
    rise = [0, 0]

    def second() -> None:
        rise[0] = psutil.Process().memory_info().rss - before
        step()

    rise[1] = peak_memory(second)
    return sum(rise)


def _trainer(point: Point, folder: Path):
    """The training step of the model, which is made as `peftfast train` makes it, but with random weights."""
    settings = point.settings(folder).to_train()
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, DTYPES[point.dtype]))
    if point.method == "qlora":
        peftfast.nn.quantize_linears(model)
        with contextlib.suppress(ValueError):  # no experts
            peftfast.integrations.experts.quantize_experts(model)
    if point.checkpointing:
        model.activation_checkpointing_enable()
    if methods.experts_of(model):
        model.set_experts_implementation("peftfast")
    model = methods.adapt(model, settings, ()).model.train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
    tokens = torch.randint(config.vocab_size, (point.micro_batch_size, point.sequence_len))
    peftfast.enable(strict=True)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(number: int, folder: Path, default_malloc: bool = False) -> int:
    """`train` of a point in its own process."""
    run = _run(__file__, "--train", str(number), str(folder), default_malloc=default_malloc)
    return json.loads(run.stdout.splitlines()[-1])


def measure_command(point: Point, default_malloc: bool = False) -> int:
    """Bytes by which the peak of `peftfast train` is above that of the same run of a tiny model."""
    tiny = replace(point, model="tiny", sequence_len=32, micro_batch_size=1)
    return _command_peak(point, default_malloc) - _command_peak(tiny, default_malloc)


def _command_peak(point: Point, default_malloc: bool) -> int:
    """The bytes that `peftfast train` reports for three steps of a model with random weights on random letters."""
    with tempfile.TemporaryDirectory() as folder:
        model, data, record = (Path(folder, name) for name in ("model", "data.jsonl", "record.json"))
        dtype = getattr(torch, DTYPES[point.dtype])
        AutoModelForCausalLM.from_config(CONFIGS[point.model], dtype=dtype).save_pretrained(model)
        build_tokenizer().save_pretrained(model)  # a letter is a token
        letters = random.Random(0).choices(
            string.ascii_lowercase, k=3 * point.micro_batch_size * point.sequence_len
        )
        data.write_text(json.dumps({"text": "".join(letters)}))
        checkpointing = f"--{'' if point.checkpointing else 'no-'}gradient-checkpointing"
        options = {
            "model": model, "data": data, "out": Path(folder, "out"), "json": record, "method": point.method,
            "dtype": point.dtype, "lora_r": point.lora_r, "target_modules": point.target_modules,
            "sequence_len": point.sequence_len, "micro_batch_size": point.micro_batch_size, "max_steps": 3,
            "eval_share": 0,
        }  # fmt: skip
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        _run("-m", "peftfast", "train", checkpointing, *words, default_malloc=default_malloc)
        return int(json.loads(record.read_text())["peak_memory_mib"] * 2**20)


def _run(*arguments: str, default_malloc: bool) -> subprocess.CompletedProcess:
    """A process of Python."""
    environment = os.environ | ({} if default_malloc else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True)


def row_of(
    point: dict,
    config: PretrainedConfig,
    settings: PlanSettings,
    measured: Callable[[Path], dict],
    on_gpu: bool = False,
) -> dict:
    """A row of the record: the plan of `settings` with this model, and what `measured` says of its folder."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder, point["model"])
        config.save_pretrained(folder)
        found = plan(replace(settings, model=str(folder)), gpu="1000GB" if on_gpu else None).memory
        # No implementations: nothing is timed here.
        row = {"point": point, "implementations": {}, "planned": found.parts(), "planned_bytes": found.total}
        row |= measured(folder)
    return row | {"error": row["planned_bytes"] / row["measured_bytes"] - 1}


def trained_row(number: int, malloc: bool) -> dict:
    """The row of a point, or of a command; with `malloc` also as the C library is by default."""
    point = [*POINTS, *COMMANDS][number]
    by_command = number >= len(POINTS)

    def measured(folder: Path) -> dict:
        ways = {"measured_bytes": False} | ({"default_malloc_bytes": True} if malloc else {})
        return {
            name: measure_command(point, default) if by_command else measure(number, folder, default)
            for name, default in ways.items()
        }

    told = asdict(point) | ({"by": "peftfast train"} if by_command else {})
    return row_of(told, CONFIGS[point.model], point.settings(Path()), measured)


def recorded_rows(path: Path) -> Iterator[dict]:
    """A row for each peak in a record of bench_7b.py, but of what `peftfast plan` cannot be told.

    Raises:
        ValueError: there is none.
    """
    record = Record.load(path)
    rows = [row for row in record.rows if "bytes_before_build" in row["implementations"].get("peftfast", {})]
    rows = [
        row for row in rows if row["point"]["dtype"] in DTYPES and row["point"]["expert_share"] in (None, 1)
    ]
    if not rows:
        raise ValueError(f"{path}: no row tells the memory before the model was built and at its largest")
    return (recorded_row(row, "gpu" in record.machine) for row in rows)


def recorded_row(row: dict, on_gpu: bool) -> dict:
    """The row of what bench_7b.py has measured."""
    from bench_7b import CONFIGS as MODELS

    point, it = row["point"], row["implementations"]["peftfast"]
    settings = PlanSettings(
        model="",
        method="lora" if point["dense"] else "qlora",
        dtype=point["dtype"],
        lora_r=point["rank"],
        target_modules="all-linear" if point["expert_share"] is None else "q_proj,k_proj,v_proj,o_proj",
        embeddings=point["embeddings"],
        sequence_len=point["tokens"],
        checkpointing=point["checkpointing"],
        activation_offloading=point["offloading"],
    )
    config = MODELS[point["model"]](num_hidden_layers=point["layers"])
    rise = {"measured_bytes": it["peak_rss"] - it["bytes_before_build"]}
    return row_of(point | {"by": "bench_7b.py"}, config, settings, lambda _: rise, on_gpu)


def acceptance(rows: list[dict]) -> list[dict[str, str]]:
    """Each plan against what was measured, and all of them together."""
    errors = [row["error"] for row in rows]
    lines = [
        verdict(
            point_text(row["point"]),
            f"within {BAR:.0%}",
            [
                f"planned {row['planned_bytes'] / 1e6:.0f} MB, measured {row['measured_bytes'] / 1e6:.0f} MB, "
                f"{row['error']:+.1%}"
            ],
            [abs(row["error"]) <= BAR],
        )
        for row in rows
    ]
    seen = [f"{min(errors):+.1%} to {max(errors):+.1%}"] if errors else []
    return [*lines, verdict("all settings", f"within {BAR:.0%}", seen, [abs(e) <= BAR for e in errors])]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    numbers = range(len(POINTS) + len(COMMANDS))
    add("--only", nargs="+", type=int, choices=numbers, metavar="N", help="settings by number")
    add("--against", type=Path, metavar="FILE", help="a record of bench_7b.py, whose peaks are compared")
    add("--malloc", action="store_true", help="also with the C library's own way of keeping freed memory")
    add("--threads", type=positive, help="torch's threads; default: as torch chooses")
    add(
        "--json", type=Path, metavar="FILE", help="default: benchmarks/results/plan-MACHINE.json, or plan-7b-"
    )
    add("--train", nargs=2, metavar=("N", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(train(POINTS[int(options.train[0])], Path(options.train[1])))
        return
    console = Console(width=max(Console().width, 120))
    rows = (trained_row(number, options.malloc) for number in options.only or numbers)
    if options.against:
        try:
            rows = recorded_rows(options.against)
        except (OSError, ValueError) as error:
            parser.error(f"--against: {error}")
    benchmark = "plan-7b" if options.against else "plan"
    record = Record(benchmark=benchmark, machine=machine_facts("cpu"), ceilings={})
    path = options.json or record.default_path()
    for row in rows:
        record.rows.append(row)
        record.acceptance = acceptance(record.rows)
        record.save(path)
        found = record.acceptance[-2]
        console.print(f"{found['what']}: {found['seen']}", highlight=False)
    found = record.acceptance[-1]
    console.print(f"{found['seen']}: {found['verdict']}. Record: {path}", highlight=False)


if __name__ == "__main__":
    main()
