"""`peftfast bench`: all benchmarks in one run, each in its own process, with one record, a table and pictures."""

import datetime
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Exit, Option

from peftfast.cli.errors import UserError, first_sentence

FOLDER = Path(__file__).parents[2] / "benchmarks"
# What --quick and --full mean for a benchmark that has no such options; a training step is one beside a rival's.
QUICK = {
    "7b": ["--model", "tiny", "--tokens", "64", "--steps", "3", "--compare"],
    "plan": ["--only", "0", "1", "2", "3"],
}
FULL = {"7b": ["--compare"]}
DEVICES = ("cpu", "cuda")
RECORD_FILE, TABLE_FILE, SPEED_FILE, MEMORY_FILE = "bench.json", "bench.md", "speed.png", "memory.png"
BYTES = ("saved_bytes", "peak_bytes", "peak_rss")  # of an implementation in a record


@dataclass(frozen=True)
class Outcome:
    """What became of one benchmark.

    Attributes:
        status: "done", "failed" or "timed out".
        reason: the last line that a failed one wrote.
        record: as benchmarks/record.py writes it; of one that did not get to its end, what it had found by then.
    """

    command: str
    status: str
    seconds: float
    reason: str | None
    record: dict | None


def run_benchmarks(
    names: list[str],
    out: Path,
    console: Console,
    *,
    full: bool,
    budget: float | None,
    limit: float,
    device: str = "cpu",
) -> dict[str, Outcome]:
    """Run the benchmarks one after the other, and write record, table and pictures to `out` as they come.

    Args:
        names: of `available`.
        budget: seconds for the timed rounds of one point; None: as each benchmark has it.
        limit: seconds that one benchmark may take.
        device: of those that can run on a GPU; the others are of the CPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for number, name in enumerate(names, 1):
        with console.status(f"[{number}/{len(names)}] {name}"):
            outcomes[name] = _run(name, out.absolute() / f"{name}.json", full, budget, limit, device)
        found = outcomes[name]
        console.print(
            f"[{number}/{len(names)}] {name}: {found.status} after {found.seconds:.0f} s"
            + (f": {found.reason}" if found.reason else ""),
            highlight=False,
            markup=False,
        )
        _write(outcomes, out, full)
    return outcomes


def available(folder: Path = FOLDER) -> list[str]:
    """The names of the benchmarks.

    Raises:
        UserError: peftfast was installed without them.
    """
    if not (folder / "record.py").is_file():
        raise UserError(
            f"There are no benchmarks in {folder}: they are part of peftfast's source, so run peftfast bench from a "
            "checkout that is installed with pip install -e."
        )
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def _run(name: str, record: Path, full: bool, budget: float | None, limit: float, device: str) -> Outcome:
    script = FOLDER / f"bench_{name}.py"
    source = script.read_text(encoding="utf-8")
    has_options = "parser_of(" in source  # the options that benchmarks of single calls have in common
    arguments = FULL.get(name, []) if full else ["--quick"] if has_options else QUICK.get(name, [])
    if has_options or '"--device"' in source:
        arguments = [*arguments, "--device", device]
    if budget is not None and has_options:
        arguments = [*arguments, "--budget", f"{budget:g}"]
    arguments = [*arguments, "--json", str(record)]
    started = time.perf_counter()
    status = reason = None
    # A group of its own: with a benchmark that takes too long, the processes that it started end too.
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        status, reason = "timed out", f"it was stopped after {limit:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.communicate()
    if status is None:
        lines = text.strip().splitlines()
        status = "failed" if process.returncode else "done"
        reason = (lines[-1] if lines else f"exit code {process.returncode}") if process.returncode else None
    found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if status == "done" and found is None:
        status, reason = "failed", "it wrote no record"
    command = shlex.join(["python", f"benchmarks/{script.name}", *arguments])
    return Outcome(command, status, time.perf_counter() - started, reason, found)


# ---- what is written ---------------------------------------------------------------------------------------


def _write(outcomes: dict[str, Outcome], out: Path, full: bool) -> None:
    from peftfast.cli.info import machine

    record = {
        "format": 1,
        "size": "full" if full else "quick",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "benchmarks": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }
    files = {
        RECORD_FILE: json.dumps(record, indent=1, default=str) + "\n",
        TABLE_FILE: markdown(outcomes, record["size"]),
    }
    for name, text in files.items():
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / name)
    draw(outcomes, out)


def markdown(outcomes: dict[str, Outcome], size: str) -> str:
    """All tables, one section to a benchmark; those that did not end well say why."""
    Record = _record_module().Record
    parts = [f"# Benchmarks, {size}", ""]
    for name, outcome in outcomes.items():
        parts += [f"## {name}: {outcome.status}", "", f"`{outcome.command}`, {outcome.seconds:.0f} s  "]
        if outcome.reason:
            parts += [outcome.reason, ""]
        if outcome.record:
            fields = {key: value for key, value in outcome.record.items() if key != "format"}
            parts += [Record(**fields).markdown()]
    return "\n".join(parts) + "\n"


def _record_module():
    """benchmarks/record.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("peftfast_benchmark_record", FOLDER / "record.py")
    module = sys.modules.get(spec.name)
    if module is None:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def ratios(record: dict) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Of one record, by rival and over all points: how many times faster ours is, and the rival's bytes over ours."""
    speed: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for ours, rivals in _pairs(record):
        for rival, times in ours.get("speedup", {}).items():
            speed.setdefault(rival, []).append(times)
        for rival, theirs in rivals.items():
            for key in BYTES:
                if ours.get(key) and theirs.get(key):
                    memory.setdefault(rival, []).append(theirs[key] / ours[key])
    return speed, memory


def _pairs(record: dict) -> Iterator[tuple[dict, dict[str, dict]]]:
    """Each implementation of ours that was measured, with the rivals at its point."""
    for row in record["rows"]:
        found = row["implementations"]
        rivals = {name: it for name, it in found.items() if not it["ours"]}
        for it in found.values():
            if it["ours"] and "skipped" not in it:
                yield it, rivals


def draw(outcomes: dict[str, Outcome], out: Path) -> list[Path]:
    """Draw speed and memory against each rival where matplotlib is installed and there is something to draw.

    Returns:
        The pictures.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    found = [(name, *ratios(outcome.record)) for name, outcome in outcomes.items() if outcome.record]
    speed = {f"{name}: {rival}": values for name, by, _ in found for rival, values in by.items()}
    memory = {f"{name}: {rival}": values for name, _, by in found for rival, values in by.items()}
    pictures = []
    for file, bars, title in (
        (SPEED_FILE, speed, "times faster than the rival"),
        (MEMORY_FILE, memory, "rival's memory over peftfast's"),
    ):
        if bars:
            _draw_bars(out / file, bars, f"{title} (geometric mean, and range over the points)")
            pictures.append(out / file)
    return pictures


def _draw_bars(path: Path, bars: dict[str, list[float]], title: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    means = [math.exp(sum(map(math.log, values)) / len(values)) for values in bars.values()]
    below = [mean - min(values) for mean, values in zip(means, bars.values(), strict=True)]
    above = [max(values) - mean for mean, values in zip(means, bars.values(), strict=True)]
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    # A mean may lie a rounding below the least of equal values.
    errors = [[max(0.0, length) for length in side] for side in (below, above)]
    drawn = axes.barh(range(len(bars)), means, xerr=errors, color="tab:blue", ecolor="tab:gray", capsize=2)
    # Three digits of 1350 would be written as 1.35e+03, as far as into the frame.
    labels = [f"{mean:.3g}" if mean < 999.5 else f"{mean:.0f}" for mean in means]
    axes.bar_label(drawn, labels, padding=4, fontsize=8)
    axes.margins(x=0.12)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xscale("log")
    every = [value for values in bars.values() for value in values]
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(every) < 1000 * min(every) else (1,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


# ---- command line ------------------------------------------------------------------------------------------


def command(
    out: Annotated[Path, Option(help="The folder that receives record, table and pictures.")] = Path(
        "bench-results"
    ),
    full: Annotated[
        bool, Option("--full/--quick", help="Every point, for hours; or few, for minutes each.")
    ] = False,
    only: Annotated[str | None, Option(help="Names, such as lora,fourbit; by default all.")] = None,
    budget: Annotated[
        float | None, Option(help="Seconds for the timed rounds of one point; by default as each has it.")
    ] = None,
    time_limit: Annotated[float, Option(help="Minutes that one benchmark may take.")] = 60.0,
    device: Annotated[str, Option(help="Of the benchmarks that can run on a GPU: cpu or cuda.")] = "cpu",
) -> None:
    """Run all benchmarks of a source checkout and gather one record, a Markdown table and pictures."""
    names = available()
    chosen = names if only is None else [name.strip() for name in only.split(",")]
    for name in chosen:
        if name not in names:
            raise UserError(f"--only {name}: there is no such benchmark; there are {', '.join(names)}.")
    if device not in DEVICES:
        raise UserError(f"--device is one of {', '.join(DEVICES)}, not {device!r}.")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no CUDA device here.")
    for option, value in {"--budget": budget, "--time-limit": time_limit}.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"{option} is a positive number, not {value}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} exists: choose a new folder.")
    console = Console()
    try:
        outcomes = run_benchmarks(
            chosen, out, console, full=full, budget=budget, limit=60 * time_limit, device=device
        )
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {first_sentence(error)}.") from error
    table = Table(title="benchmarks", title_justify="left")
    for label in ("", "", "time", "times faster, geometric mean by rival"):
        table.add_column(label)
    for name, outcome in outcomes.items():
        speed = ratios(outcome.record)[0] if outcome.record else {}
        means = {rival: math.exp(sum(map(math.log, each)) / len(each)) for rival, each in speed.items()}
        words = ", ".join(f"{rival} {mean:.2f}" for rival, mean in means.items()) or outcome.reason or ""
        table.add_row(name, outcome.status, f"{outcome.seconds:.0f} s", words)
    console.print(table)
    pictures = [file for file in (SPEED_FILE, MEMORY_FILE) if (out / file).is_file()]
    console.print(
        f"In {out}: {', '.join([RECORD_FILE, TABLE_FILE, *pictures])}."
        + ("" if pictures else " There are no pictures: matplotlib is not installed, or nothing to draw."),
        highlight=False,
        soft_wrap=True,
    )
    if any(outcome.status != "done" for outcome in outcomes.values()):
        raise Exit(1)
