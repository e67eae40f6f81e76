"""How near does `peftfast plan` come to the memory that training takes?

Small and medium models of the Llama, Qwen2 and OLMoE architectures with random weights, dense and in 4 bits, with and
without activation checkpointing, are planned from their configuration alone, and then trained for two steps, each in a
process of its own. Measured is how far the resident memory of the second step, weights and AdamW's moments included,
rises above what the process had before the model was made, and after a tiny model had trained in it, so that libraries
that load on the way count for nothing.

The C library is told to give large freed blocks back to the system at once (MALLOC_MMAP_THRESHOLD_=65536). By default
glibc keeps blocks of up to 32 MiB for later, and a process then stays larger than what it uses: "default_malloc_bytes"
in a row, measured with --malloc, says how large.

    python benchmarks/bench_plan.py                  # all settings; minutes
    python benchmarks/bench_plan.py --only 0 3       # some of them, by number
    python benchmarks/bench_plan.py --malloc         # also as glibc does by default; twice as long

A row of the record holds "planned" by parts, "planned_bytes", "measured_bytes" and "error", planned / measured - 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
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
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, vocab_size=64
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
    environment = os.environ | ({} if default_malloc else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    command = [sys.executable, "-W", "ignore", __file__, "--train", str(number), str(folder)]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(run.stdout.splitlines()[-1])


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
    add("--only", nargs="+", type=int, choices=range(len(POINTS)), metavar="N", help="settings by number")
    add("--malloc", action="store_true", help="also with the C library's own way of keeping freed memory")
    add("--threads", type=positive, help="torch's threads; default: as torch chooses")
    add("--json", type=Path, metavar="FILE", help="default: benchmarks/results/plan-MACHINE.json")
    add("--train", nargs=2, metavar=("N", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        print(train(POINTS[int(options.train[0])], Path(options.train[1])))
        return
    console = Console(width=max(Console().width, 120))
    record = Record(benchmark="plan", machine=machine_facts("cpu"), ceilings={})
    path = options.json or record.default_path()
    for number in options.only or range(len(POINTS)):
        point = POINTS[number]
        with tempfile.TemporaryDirectory() as folder, console.status(point_text(asdict(point))):
            folder = Path(folder, point.model)
            CONFIGS[point.model].save_pretrained(folder)
            found = plan(point.settings(folder)).memory
            # No implementations: nothing is timed here.
            row = {"point": asdict(point), "implementations": {}, "planned": found.parts()}
            row["planned_bytes"] = found.total
            row["measured_bytes"] = measure(number, folder)
            if options.malloc:
                row["default_malloc_bytes"] = measure(number, folder, default_malloc=True)
        row["error"] = row["planned_bytes"] / row["measured_bytes"] - 1
        record.rows.append(row)
        record.acceptance = acceptance(record.rows)
        record.save(path)
        found = record.acceptance[-2]
        console.print(f"{number:2} {found['what']}: {found['seen']}", highlight=False)
    found = record.acceptance[-1]
    console.print(f"{found['seen']}: {found['verdict']}. Record: {path}", highlight=False)


if __name__ == "__main__":
    main()
