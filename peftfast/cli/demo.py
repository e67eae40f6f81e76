"""`peftfast demo`: eager PEFT and peftfast on two models and a task that ship with the package."""

import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Exit, Option

from peftfast import demo
from peftfast.cli import answer
from peftfast.cli.train import (
    ANSWERS_FILE,
    RESULT_FILE,
    TrainSettings,
    check_output,
    check_record_file,
    mebibytes,
)

SETTINGS = {
    "model": str(demo.BASE),
    "data": demo.TRAIN_DATA,
    "eval_file": demo.HELD_OUT_DATA,
    "lora_r": 8,
    "lora_alpha": 16,
    "learning_rate": 5e-3,
    "epochs": 1,
    "micro_batch_size": 32,
    "sequence_len": 64,
}
RUNS = {
    "peft": ("eager PEFT", {"backend": "peft"}),
    "peftfast": ("peftfast", {}),
    "qlora": ("peftfast, QLoRA", {"method": "qlora"}),
    "moe_peft": ("MoE, eager PEFT", {"model": str(demo.MOE_BASE), "backend": "peft"}),
    "moe": ("MoE, peftfast", {"model": str(demo.MOE_BASE)}),
}
# Runs that do the same on the two backends, peftfast's first.
RIVALS = {"peftfast": "peft", "moe": "moe_peft"}


@dataclass(frozen=True)
class DemoResult:
    """The record of a demo.

    `results` holds the TrainResult record of each of RUNS. By the names in RIVALS, `speedup` is eager PEFT's training
    time over peftfast's, and `largest_loss_difference` compares the two runs' training losses, logged at the same
    steps. `same_answers` of `answers` held-out prompts got the same answer from the run's adapter when plain PEFT
    loaded it in a process of its own, over the base that it was trained on. `seconds` is the time of the whole demo.
    """

    results: dict[str, dict]
    speedup: dict[str, float]
    largest_loss_difference: dict[str, float]
    same_answers: dict[str, int]
    answers: int
    seconds: float


def run_demo(
    out: Path,
    console: Console,
    *,
    overwrite: bool = False,
    max_steps: int | None = None,
    max_eval_examples: int = 500,
) -> DemoResult:
    """Train each of RUNS into `out`, reload peftfast's adapters with plain PEFT, and compare.

    Raises:
        UserError: `out` holds something else.
        typer.Exit: a training process failed; it has said why.
    """
    started = time.perf_counter()
    runs = {
        name: TrainSettings(
            **SETTINGS | options,
            out=out / name,
            max_steps=max_steps,
            max_eval_examples=max_eval_examples,
            overwrite=overwrite,
        )
        for name, (_, options) in RUNS.items()
    }
    for settings in runs.values():
        check_output(settings)
    # A process each: no run finds memory or compiled state of another.
    for name, settings in runs.items():
        console.rule(f"training with {RUNS[name][0]}")
        arguments = ["train", *settings.to_arguments()]
        console.print(shlex.join(["peftfast", *arguments]), style="dim", highlight=False)
        code = subprocess.run([sys.executable, "-m", "peftfast", *arguments], check=False).returncode
        if code:
            raise Exit(code)
    results = {name: json.loads((out / name / RESULT_FILE).read_text(encoding="utf-8")) for name in runs}
    console.rule("reloading peftfast's adapters with plain PEFT")
    fast_runs = [name for name, settings in runs.items() if settings.backend == "peftfast"]
    same_answers = {name: _reload(out / name, results[name]) for name in fast_runs}
    return DemoResult(
        results=results,
        speedup={
            fast: results[eager]["seconds"] / results[fast]["seconds"] for fast, eager in RIVALS.items()
        },
        largest_loss_difference={
            fast: max(
                abs(one - other)
                for (_, one), (_, other) in zip(
                    results[fast]["losses"], results[eager]["losses"], strict=True
                )
            )
            for fast, eager in RIVALS.items()
        },
        same_answers=same_answers,
        answers=results["peftfast"]["held_out_examples"],
        seconds=time.perf_counter() - started,
    )


def _reload(adapter: Path, result: dict) -> int:
    """Return on how many prompts plain PEFT, in its own process, gives the answers that training ended with."""
    lines = [json.loads(line) for line in (adapter / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()]
    longest = 1 + max(len(line["completion"].encode()) for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        task, answers = Path(folder, "prompts.json"), Path(folder, "answers.json")
        request = {
            "prompts": [line["prompt"] for line in lines],
            "max_new_tokens": longest,
            "quantization": result["quantization"],
        }
        task.write_text(json.dumps(request), encoding="utf-8")
        subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                answer.__file__,
                result["settings"]["model"],
                adapter,
                task,
                answers,
            ],
            check=True,
            # The modules beside the file must not stand in for others of the same name.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        given = json.loads(answers.read_text(encoding="utf-8"))
    return sum(line["answer"] == text for line, text in zip(lines, given, strict=True))


def show(result: DemoResult, console: Console) -> None:
    """Print the comparison as a table."""
    table = Table(
        title=f"snake_case to CamelCase: exact match on {result.answers} held-out names",
        title_justify="left",
    )
    table.add_column("")
    columns = {
        "base": lambda run: f"{run['before']['exact_match']:.1%}",
        "tuned": lambda run: f"{run['after']['exact_match']:.1%}",
        "time": lambda run: f"{run['seconds']:.1f} s",
        "tokens/s": lambda run: f"{run['tokens_per_second']:,.0f}",
        "frozen": lambda run: mebibytes(run["base_bytes"]),
        "memory": lambda run: f"{run['peak_memory_mib']:,.0f} MiB",
    }
    for label in columns:
        table.add_column(label, justify="right")
    for name, run in result.results.items():
        table.add_row(RUNS[name][0], *(cell(run) for cell in columns.values()))
    console.print(table)

    def trained(name: str) -> str:
        count, frozen = (result.results[name][key] for key in ("trainable_parameters", "parameters"))
        return f"{count:,} of {count + frozen:,} parameters ({count / (count + frozen):.1%})"

    same, difference = result.same_answers, result.largest_loss_difference
    console.print(
        f"peftfast trained LoRA {result.speedup['peftfast']:.2f} times as fast as eager PEFT, and the mixture of "
        f"experts {result.speedup['moe']:.2f} times, on the same seed and data; training losses differ by at most "
        f"{difference['peftfast']:.1e} and {difference['moe']:.1e}.\n"
        f"Trained: {trained('peftfast')}; with LoRA on all experts and the attention of the mixture {trained('moe')}.\n"
        "QLoRA keeps the linear layers of the frozen model in 4 bits. Beside Python and its libraries a model so "
        "small hardly counts in the memory of the process: see the size of the frozen weights.\n"
        f"Reloaded by plain PEFT, the adapters give the same answer on {same['peftfast']} (LoRA), {same['qlora']} "
        f"(QLoRA, over the 4-bit model) and {same['moe']} (mixture of experts) of {result.answers} held-out names.\n"
        f"The whole demo took {result.seconds:.0f} s.",
        highlight=False,
    )


def command(
    out: Annotated[Path | None, Option(help="Keep the adapters in this folder.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the result record to this file.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier demo's adapters.")] = False,
    max_steps: Annotated[int | None, Option(hidden=True)] = None,
    max_eval_examples: Annotated[int, Option(hidden=True)] = 500,
) -> None:
    """Fine-tune small models that ship with peftfast, dense, in 4 bits and a mixture of experts, and compare."""
    check_record_file(json_file)
    console = Console()
    with contextlib.ExitStack() as stack:
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peftfast-demo-")))
        result = run_demo(
            folder, console, overwrite=overwrite, max_steps=max_steps, max_eval_examples=max_eval_examples
        )
    show(result, console)
    if json_file:
        json_file.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
