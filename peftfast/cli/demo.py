"""`peftfast demo`: eager PEFT, peftfast and QLoRA on a model and a task that ship with the package."""

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
}


@dataclass(frozen=True)
class DemoResult:
    """The record of a demo.

    `results` holds the TrainResult record of each of RUNS; `speedup` is eager PEFT's training time over
    peftfast's, both of LoRA; `largest_loss_difference` compares these two runs' training losses, logged at the
    same steps; `same_answers` of `answers` held-out prompts got the same answer from the run's adapter when
    plain PEFT loaded it in a process of its own, over the base that it was trained on. `seconds` is the time
    of the whole demo.
    """

    results: dict[str, dict]
    speedup: float
    largest_loss_difference: float
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
            **SETTINGS,
            **options,
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
    same_answers = {name: _reload(out / name, results[name]) for name in ("peftfast", "qlora")}
    losses = zip(results["peft"]["losses"], results["peftfast"]["losses"], strict=True)
    return DemoResult(
        results=results,
        speedup=results["peft"]["seconds"] / results["peftfast"]["seconds"],
        largest_loss_difference=max(abs(eager - fast) for (_, eager), (_, fast) in losses),
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
            [sys.executable, "-W", "ignore", answer.__file__, demo.BASE, adapter, task, answers],
            check=True,
            # The modules beside the file must not stand in for others of the same name.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        given = json.loads(answers.read_text(encoding="utf-8"))
    return sum(line["answer"] == text for line, text in zip(lines, given, strict=True))


def show(result: DemoResult, console: Console) -> None:
    """Print the comparison as a table."""
    table = Table(title="snake_case to CamelCase, held-out names", title_justify="left")
    table.add_column("")
    for name in result.results:
        table.add_column(RUNS[name][0], justify="right")
    for label, cell in {
        "exact match, base model": lambda run: f"{run['before']['exact_match']:.1%}",
        "exact match, tuned": lambda run: f"{run['after']['exact_match']:.1%}",
        "training time": lambda run: f"{run['seconds']:.1f} s",
        "training speed": lambda run: f"{run['tokens_per_second']:,.0f} tokens/s",
        "frozen weights": lambda run: mebibytes(run["base_bytes"]),
        "peak memory of the process": lambda run: f"{run['peak_memory_mib']:,.0f} MiB",
    }.items():
        table.add_row(label, *map(cell, result.results.values()))
    console.print(table)
    fast, same = result.results["peftfast"], result.same_answers
    trained, frozen = fast["trainable_parameters"], fast["parameters"]
    console.print(
        f"peftfast trained LoRA {result.speedup:.2f} times as fast, on the same seed and data; "
        f"training losses differ by at most {result.largest_loss_difference:.1e}.\n"
        "QLoRA keeps the linear layers of the frozen model in 4 bits. Beside Python and its libraries a model so "
        "small hardly counts: see the weights' own size.\n"
        f"Trained: {trained:,} of {trained + frozen:,} parameters ({trained / (trained + frozen):.1%}).\n"
        f"Reloaded by plain PEFT, the adapters give the same answer on {same['peftfast']} (LoRA) and "
        f"{same['qlora']} (QLoRA, over the 4-bit model) of {result.answers} held-out names.\n"
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
    """Fine-tune a small model that ships with peftfast: with eager PEFT, with peftfast, and in 4 bits."""
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
