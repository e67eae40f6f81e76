"""`peftfast demo`: eager PEFT against peftfast on a model and a task that ship with the package."""

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
    BACKENDS,
    RESULT_FILE,
    TrainSettings,
    check_output,
    check_record_file,
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


@dataclass(frozen=True)
class DemoResult:
    """The record of a demo.

    `results` holds the TrainResult record of each backend; `speedup` is eager PEFT's training time over
    peftfast's; `largest_loss_difference` compares the two runs' training losses, logged at the same steps;
    `same_answers` of `answers` held-out prompts got the same answer from the adapter when plain PEFT loaded
    it in a process of its own. `seconds` is the time of the whole demo.
    """

    results: dict[str, dict]
    speedup: float
    largest_loss_difference: float
    same_answers: int
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
    """Train once with each backend into `out`, reload peftfast's adapter with plain PEFT, and compare.

    Raises:
        UserError: `out` holds something else.
        typer.Exit: a training process failed; it has said why.
    """
    started = time.perf_counter()
    runs = {
        backend: TrainSettings(
            **SETTINGS,
            out=out / backend,
            backend=backend,
            max_steps=max_steps,
            max_eval_examples=max_eval_examples,
            overwrite=overwrite,
        )
        for backend in reversed(BACKENDS)
    }
    for settings in runs.values():
        check_output(settings)
    # A process each: the second run finds no memory or compiled state of the first.
    for backend, settings in runs.items():
        console.rule(f"training with {'eager PEFT' if backend == 'peft' else 'peftfast'}")
        arguments = ["train", *settings.to_arguments()]
        console.print(shlex.join(["peftfast", *arguments]), style="dim", highlight=False)
        code = subprocess.run([sys.executable, "-m", "peftfast", *arguments], check=False).returncode
        if code:
            raise Exit(code)
    console.rule("reloading peftfast's adapter with plain PEFT")
    same, count = _reload(out / "peftfast")
    results = {
        backend: json.loads((out / backend / RESULT_FILE).read_text(encoding="utf-8")) for backend in runs
    }
    losses = zip(results["peft"]["losses"], results["peftfast"]["losses"], strict=True)
    return DemoResult(
        results=results,
        speedup=results["peft"]["seconds"] / results["peftfast"]["seconds"],
        largest_loss_difference=max(abs(eager - fast) for (_, eager), (_, fast) in losses),
        same_answers=same,
        answers=count,
        seconds=time.perf_counter() - started,
    )


def _reload(adapter: Path) -> tuple[int, int]:
    """Return on how many prompts, of how many, plain PEFT in its own process gives the adapter's answers."""
    lines = [json.loads(line) for line in (adapter / ANSWERS_FILE).read_text(encoding="utf-8").splitlines()]
    longest = 1 + max(len(line["completion"].encode()) for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        task, answers = Path(folder, "prompts.json"), Path(folder, "answers.json")
        prompts = [line["prompt"] for line in lines]
        task.write_text(json.dumps({"prompts": prompts, "max_new_tokens": longest}), encoding="utf-8")
        subprocess.run(
            [sys.executable, "-W", "ignore", answer.__file__, demo.BASE, adapter, task, answers],
            check=True,
            # The modules beside the file must not stand in for others of the same name.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
        given = json.loads(answers.read_text(encoding="utf-8"))
    return sum(line["answer"] == text for line, text in zip(lines, given, strict=True)), len(lines)


def show(result: DemoResult, console: Console) -> None:
    """Print the comparison as a table."""
    eager, fast = result.results["peft"], result.results["peftfast"]
    table = Table(title="snake_case to CamelCase, held-out names", title_justify="left")
    table.add_column("")
    table.add_column("eager PEFT", justify="right")
    table.add_column("peftfast", justify="right")
    for label, cell in {
        "exact match, base model": lambda run: f"{run['before']['exact_match']:.1%}",
        "exact match, tuned": lambda run: f"{run['after']['exact_match']:.1%}",
        "training time": lambda run: f"{run['seconds']:.1f} s",
        "training speed": lambda run: f"{run['tokens_per_second']:,.0f} tokens/s",
        "peak memory": lambda run: f"{run['peak_memory_mib']:,.0f} MiB",
    }.items():
        table.add_row(label, cell(eager), cell(fast))
    console.print(table)
    trained, frozen = fast["trainable_parameters"], fast["parameters"]
    console.print(
        f"peftfast trained {result.speedup:.2f} times as fast, on the same seed and data; "
        f"training losses differ by at most {result.largest_loss_difference:.1e}.\n"
        f"Trained: {trained:,} of {trained + frozen:,} parameters ({trained / (trained + frozen):.1%}).\n"
        f"Reloaded by plain PEFT, the adapter gives the same answer on {result.same_answers} of "
        f"{result.answers} held-out names.\n"
        f"The whole demo took {result.seconds:.0f} s.",
        highlight=False,
    )


def command(
    out: Annotated[Path | None, Option(help="Keep both adapters in this folder.")] = None,
    json_file: Annotated[Path | None, Option("--json", help="Write the result record to this file.")] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an earlier demo's adapters.")] = False,
    max_steps: Annotated[int | None, Option(hidden=True)] = None,
    max_eval_examples: Annotated[int, Option(hidden=True)] = 500,
) -> None:
    """Fine-tune a small model that ships with peftfast, once with eager PEFT and once with peftfast."""
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
