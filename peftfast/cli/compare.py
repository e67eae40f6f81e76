"""`peftfast compare`: full fine-tuning and every method on one model and task, under the same budget of tokens."""

# No `from __future__ import annotations`: typer reads the options off annotations.
import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich import box
from rich.console import Console
from rich.table import Table
from typer import Exit, Option

from peftfast import demo
from peftfast.cli import methods
from peftfast.cli.empty import adapted_model
from peftfast.cli.errors import MethodError, UserError
from peftfast.cli.model import load_config
from peftfast.cli.records import read_records
from peftfast.cli.settings import DTYPES, METHODS, METHODS_WITH, TrainSettings, listed, option
from peftfast.cli.train import RESULT_FILE, check_output, check_record_file

RECORD_FILE, PICTURE_FILE = "compare.json", "compare.png"
BASELINE = "full"
ORDER = (BASELINE, *(method for method in METHODS if method != BASELINE))
# Settings that are not the methods' in common.
OWN = (
    *("method", "objective", "out", "json", "overwrite", "save_steps", "saves_per_epoch", "resume"),
    *("learning_rate", "embedding_learning_rate"),
)
SHARED = {
    field.name: field for field in dataclasses.fields(TrainSettings) if field.init and field.name not in OWN
}
# Of the demo's task, where nothing else is told. The learning rates of full, lora, bottleneck and prefix are the better
# of two or three tried on it; the others were tried alone.
DEMO = {
    "model": str(demo.BASE),
    "data": demo.TRAIN_DATA,
    "eval_file": demo.HELD_OUT_DATA,
    "lora_r": 8,
    "lora_alpha": 16,
    "bottleneck_size": 64,
    "epochs": 1,
    "micro_batch_size": 32,
    "sequence_len": 64,
}
DEMO_LEARNING_RATES = {
    "full": 2e-3,
    "lora": 5e-3,
    "qlora": 5e-3,
    "mixture": 5e-3,
    "bottleneck": 1e-2,
    "prefix": 1e-1,
    "prompt": 1e-1,
    "p-tuning": 1e-2,
}


@dataclass(frozen=True)
class Comparison:
    """The record of a comparison.

    `results` holds the TrainResult record of each method, `refused` the sentence of each that the model does not allow
    or that diverged. By method: `time_cost` is the training time and `memory_cost` the bytes of gradients and
    optimizer, over those of full fine-tuning; both are empty without it. `threads` is how many torch computes with,
    `isa` the instruction set of peftfast's kernels.
    """

    results: dict[str, dict]
    refused: dict[str, str]
    time_cost: dict[str, float]
    memory_cost: dict[str, float]
    threads: int
    isa: str


def compare(
    runs: dict[str, TrainSettings],
    out: Path,
    console: Console,
    *,
    overwrite: bool = False,
    refused: dict[str, str] | None = None,
) -> Comparison:
    """Train each of `runs`, by method, in a process of its own, and write record and picture to `out`.

    A run whose record is there, made with the same settings of files that have not changed since, is not repeated.

    Args:
        refused: the sentences of methods that could not be told what the others were, for the record.
    Raises:
        UserError: a run would overwrite something, or none of the methods can be run.
        typer.Exit: a training process failed; it has said why.
    """
    results, refused = {}, dict(refused or {})
    for method, settings in runs.items():
        earlier = _earlier(settings)
        if earlier is not None:
            results[method] = earlier
        elif (settings.out / RESULT_FILE).is_file() and not overwrite:
            raise UserError(
                f"{settings.out} holds the result of other settings or data: pass --overwrite to replace it."
            )
        else:
            check_output(dataclasses.replace(settings, overwrite=overwrite))
    for number, (method, settings) in enumerate(runs.items(), 1):
        console.rule(f"{method} ({number} of {len(runs)})")
        if method in results:
            console.print(f"Kept from an earlier run: {settings.out}", highlight=False)
            continue
        sentence = _train(dataclasses.replace(settings, overwrite=overwrite), console)
        if sentence is None:
            results[method] = _read(settings.out / RESULT_FILE)
        else:
            refused[method] = sentence
    results = {method: results[method] for method in runs if method in results}
    _check_any(results, refused)
    comparison = _sum_up(results, refused)
    out.mkdir(parents=True, exist_ok=True)
    with _written_at_once(out / RECORD_FILE) as path:
        path.write_text(_to_json(comparison), encoding="utf-8")
    return comparison


def _earlier(settings: TrainSettings) -> dict | None:
    """Return the complete record of a run like this one, newer than all that it was made from."""
    record = settings.out / RESULT_FILE
    if not record.is_file():
        return None
    try:
        result = _read(record)
    except ValueError:
        return None

    def compared(values: dict) -> dict:
        return {name: value for name, value in values.items() if name not in ("out", "json", "overwrite")}

    told = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    if compared(told) != compared(result.get("settings", {})):
        return None
    sources = [settings.data, Path(settings.model).expanduser()]
    sources += [Path(path) for path in (settings.eval_file, settings.chat_template) if path]
    files = [file for path in sources for file in (path, *path.rglob("*")) if file.is_file()]
    made = record.stat().st_mtime
    return None if any(file.stat().st_mtime > made for file in files) else result


def _train(settings: TrainSettings, console: Console) -> str | None:
    """Train in a process of its own, so that its memory is its own. Return why not, if the method was refused."""
    arguments = ["train", *settings.to_arguments()]
    console.print(shlex.join(["peftfast", *arguments]), style="dim", highlight=False, soft_wrap=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "peftfast", *arguments], stderr=subprocess.PIPE, text=True
    )
    last = ""
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            last = line.strip() or last
        code = process.wait()
    except BaseException:
        process.terminate()  # it takes its temporary folder with it
        process.wait()
        raise
    finally:
        process.stderr.close()
    if code == 2:
        return last.removeprefix("peftfast: ")
    if code:
        raise Exit(code)
    return None


def _sum_up(results: dict[str, dict], refused: dict[str, str]) -> Comparison:
    import torch

    import peftfast

    full = results.get(BASELINE)
    with_full = results if full else {}
    return Comparison(
        results=results,
        refused=refused,
        time_cost={method: run["seconds"] / full["seconds"] for method, run in with_full.items()},
        memory_cost={method: _state(run) / _state(full) for method, run in with_full.items()},
        threads=torch.get_num_threads(),
        isa=peftfast.build_info()["isa"],
    )


def _state(run: dict) -> int:
    return run["gradient_bytes"] + run["optimizer_bytes"]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _to_json(record) -> str:
    return json.dumps(dataclasses.asdict(record), indent=2) + "\n"


@contextlib.contextmanager
def _written_at_once(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file takes the place of `path` if the block ends well."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)


# ---- the arithmetic alone -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a method takes on a model, counted on real modules that hold no values.

    `weights_bytes` are those of all weights, trained ones included; `gradient_bytes` those of the trained weights once
    more, `optimizer_bytes` AdamW's two moments of each. `saved_bytes` is what is written to disk.
    """

    parameters: int
    trainable_parameters: int
    trainable_share: float
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int


def plan(runs: dict[str, TrainSettings]) -> tuple[dict[str, Plan], dict[str, str]]:
    """Return what each of `runs`, by method, takes, and the sentences of those that the model does not allow.

    The model of the settings is a hub name, a folder or a config.json; its weights are not needed.

    Raises:
        UserError: the configuration cannot be read, or no method can be planned.
    """
    plans, refused = {}, {}
    config = load_config(next(iter(runs.values())).model, "--plan-only")
    for method, settings in runs.items():
        try:
            plans[method] = _plan(settings, config)
        except UserError as error:
            refused[method] = str(error)
    _check_any(plans, refused)
    return plans, refused


def _plan(settings: TrainSettings, config) -> Plan:
    model, parameters = adapted_model(config, settings)
    held, held_bytes = methods.base_size(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    trainable, trained_bytes = sum(weight.numel() for weight in trained), sum(w.nbytes for w in trained)
    return Plan(
        parameters=parameters,
        trainable_parameters=trainable,
        trainable_share=trainable / held,
        weights_bytes=held_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        saved_bytes=_saved_bytes(model, settings),
    )


def _saved_bytes(model, settings: TrainSettings) -> int:
    import torch
    from peft import get_peft_model_state_dict

    if settings.method == BASELINE:
        size = getattr(torch, DTYPES[settings.dtype]).itemsize
        return sum(weight.numel() * size for weight in model.parameters())
    if model._is_prompt_learning:  # what the encoder makes of the virtual tokens
        (encoder,) = model.prompt_encoder.values()
        return encoder(torch.arange(model.active_peft_config.num_virtual_tokens, device="meta")[None]).nbytes
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    saved = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    return sum(weight.nbytes for weight in saved.values())


# ---- tables and the picture -----------------------------------------------------------------------------------


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _count(number: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def _show(table: Table, refused: dict[str, str], console: Console) -> None:
    console.print(table)
    for method, sentence in refused.items():
        console.print(f"{method} was left out: {sentence}", highlight=False, soft_wrap=True)


def show(comparison: Comparison, console: Console) -> None:
    """Print the comparison as a table."""
    exact = all(
        run["after"] and run["after"]["exact_match"] is not None for run in comparison.results.values()
    )
    score = "accuracy" if exact else "loss"
    first = next(iter(comparison.results.values()))
    table = _table(
        f"{Path(first['settings']['model']).name}, {first['tokens']:,} tokens in {first['steps']:,} steps",
        ["trained", "share", "gradients,\noptimizer", "of full", "peak", "seconds", "of full", "tokens/s",
         f"{score}\nbefore", "after", "on disk"],
    )  # fmt: skip

    def cost(costs: dict[str, float], method: str) -> str:
        return f"{costs[method]:.1%}" if costs else ""

    def scored(evaluation: dict | None) -> str:
        if evaluation is None:
            return ""
        return f"{evaluation['exact_match']:.1%}" if exact else f"{evaluation['loss']:.3f}"

    for method, run in comparison.results.items():
        table.add_row(
            method,
            _count(run["trainable_parameters"]),
            f"{run['trainable_share']:.2%}",
            _bytes(_state(run)),
            cost(comparison.memory_cost, method),
            _bytes(run["peak_memory_mib"] * 2**20),
            f"{run['seconds']:.1f}",
            cost(comparison.time_cost, method),
            f"{run['tokens_per_second']:,.0f}",
            scored(run["before"]),
            scored(run["after"]),
            _bytes(run["saved_bytes"]),
        )
    _show(table, comparison.refused, console)


def show_plans(plans: dict[str, Plan], refused: dict[str, str], console: Console) -> None:
    """Print the plans as a table."""
    parameters = next(iter(plans.values())).parameters
    table = _table(
        f"A model of {parameters:,} parameters; memory without activations",
        ["trained", "share", "weights", "gradients", "optimizer", "together", "of full", "on disk"],
    )

    def together(entry: Plan) -> int:
        return entry.weights_bytes + entry.gradient_bytes + entry.optimizer_bytes

    full = plans.get(BASELINE)
    for method, entry in plans.items():
        table.add_row(
            method,
            _count(entry.trainable_parameters),
            f"{entry.trainable_share:.2%}",
            _bytes(entry.weights_bytes),
            _bytes(entry.gradient_bytes),
            _bytes(entry.optimizer_bytes),
            _bytes(together(entry)),
            f"{together(entry) / together(full):.1%}" if full else "",
            _bytes(entry.saved_bytes),
        )
    _show(table, refused, console)


def draw(comparison: Comparison, path: Path) -> None:
    """Draw the held-out score over the cost, a point for each method, and the memory of weights and training.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    results = comparison.results
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    scores, memory = figure.subplots(1, 2, width_ratios=(1.15, 1))
    exact = all(run["after"] and run["after"]["exact_match"] is not None for run in results.values())
    relative = bool(comparison.time_cost)
    points = {
        method: (
            comparison.time_cost[method] if relative else run["seconds"],
            (100 * run["after"]["exact_match"] if exact else run["after"]["loss"]) if run["after"] else 0.0,
        )
        for method, run in results.items()
    }
    colours = {method: f"C{ORDER.index(method)}" for method in results}
    low, high = (
        (0.0, 100.0) if exact else (min(y for _, y in points.values()), max(y for _, y in points.values()))
    )
    gap = 0.055 * ((high - low) or 1.0)
    for (method, (x, y)), place in zip(points.items(), _apart([y for _, y in points.values()], gap, high)):
        scores.plot(x, y, "o", color=colours[method])
        scores.annotate(
            method, (x, y), (1.03, place), textcoords=scores.get_yaxis_transform(), va="center",
            color=colours[method], annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colours[method], linewidth=0.6, relpos=(0, 0.5)),
        )  # fmt: skip
    scores.set_xlim(left=0)
    scores.set_ylim(low - gap, high + gap)
    scores.set_xlabel("training time, full fine-tuning = 1" if relative else "training time, seconds")
    scores.set_ylabel("exact match on held-out examples, %" if exact else "held-out loss, nats per token")
    scores.set_title("What is learned, over its cost")
    scores.grid(alpha=0.3)

    names = list(results)[::-1]
    left = [0.0] * len(names)
    for label, key, colour in (
        ("weights", None, "#9aa5b1"),
        ("gradients", "gradient_bytes", "#e0a458"),
        ("optimizer", "optimizer_bytes", "#b5483a"),
    ):
        sizes = [(results[name][key] if key else _weights(results[name])) / 2**20 for name in names]
        memory.barh(names, sizes, left=left, label=label, color=colour)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    memory.set_xlabel("MiB")
    memory.set_title("Memory of the weights and of training them")
    memory.legend()
    with _written_at_once(path) as temporary:
        figure.savefig(temporary, dpi=150)


def _apart(heights: list[float], gap: float, top: float) -> list[float]:
    """Return heights for labels in a column, none nearer to another than `gap` and none above `top`."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    places, least, most = list(heights), -math.inf, top
    for index in order:
        places[index] = least = max(places[index], least + gap)
    for index in reversed(order):
        places[index] = min(places[index], most)
        most = places[index] - gap
    return places


def _weights(run: dict) -> int:
    """Return the bytes of all weights: the base model's and those that the method added, in float32."""
    added = 0 if run["settings"]["method"] == BASELINE else run["gradient_bytes"]
    return run["base_bytes"] + added


# ---- the command ------------------------------------------------------------------------------------------------


def runs_of(
    given: dict, chosen: tuple[str, ...], learning_rates: dict[str, float], out: Path
) -> tuple[dict[str, TrainSettings], dict[str, str]]:
    """Return the settings of each of the `chosen` methods, and a sentence of each that cannot have them.

    Args:
        given: the shared settings that are told; an option that a method does not have is the others'. Without "model",
            model, task and whatever is not told are the demo's.
        learning_rates: by method, where told.
    Raises:
        UserError: an option is none of any chosen method, or is out of its range.
    """
    for name in given:
        if not set(METHODS_WITH.get(name, METHODS)) & set(chosen):
            raise UserError(f"{option(name)} goes with --methods {listed(METHODS_WITH[name])}.")
    on_demo = not given.keys() & {"model", "data"}
    if not on_demo and not {"model", "data"} <= given.keys():
        missing = "--model" if "data" in given else "--data"
        raise UserError(f"--model and --data go together: {missing} is missing.")
    told = (DEMO if on_demo else {}) | given
    rates = (DEMO_LEARNING_RATES if on_demo else {}) | learning_rates
    runs, refused = {}, {}
    for method in chosen:
        options = {name: value for name, value in told.items() if method in METHODS_WITH.get(name, METHODS)}
        try:
            runs[method] = TrainSettings(
                **options, method=method, learning_rate=rates.get(method), out=out / method
            )
        except MethodError as error:
            refused[method] = str(error)
    _check_any(runs, refused)
    return runs, refused


def _check_any(left: dict, refused: dict[str, str]) -> None:
    if not left:
        raise UserError(f"no method is left to compare: {next(iter(refused.values()))}")


def _methods(text: str) -> tuple[str, ...]:
    if text == "all":
        return ORDER
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in METHODS:
            raise UserError(f"--methods is all, or some of {', '.join(ORDER)}, not {name!r}.")
    return tuple(method for method in ORDER if method in named)


def _learning_rates(text: str | None) -> dict[str, float]:
    rates = {}
    for entry in filter(None, (text or "").split(",")):
        name, _, number = (part.strip() for part in entry.partition("="))
        try:
            rates[name] = float(number)
        except ValueError:
            rates[name] = math.nan
        if name not in METHODS or not (math.isfinite(rates[name]) and rates[name] > 0):
            raise UserError(
                f"--learning-rates names methods and positive numbers, such as lora=2e-4,full=2e-5, not {text!r}."
            )
    return rates


def command(
    methods: Annotated[str, Option(help="all, or names: full,lora,prefix.")] = "all",
    learning_rates: Annotated[
        str | None,
        Option(help="Of methods: lora=2e-4,full=2e-5; else those tuned for the demo, or peftfast train's."),
    ] = None,
    plan_only: Annotated[
        str | None,
        Option(
            help="Train nothing: tell what each method takes on this model, a name, a folder or a config.json."
        ),
    ] = None,
    out: Annotated[Path, Option(help="The folder of record, picture and results.")] = Path(
        "peftfast-compare"
    ),
    json_file: Annotated[Path | None, Option("--json", help="Also write the record to this file.")] = None,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace results that other settings or data gave.")
    ] = False,
    **shared,
) -> None:
    """Compare full fine-tuning and every method: what they learn from the same tokens, in what time and memory.

    Without --model and --data on the demo's small model and task. A run that was interrupted goes on where it stopped.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    check_record_file(json_file)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # no terminal sets it
    given = {name: value for name, value in shared.items() if value is not None}
    chosen, rates = _methods(methods), _learning_rates(learning_rates)
    if plan_only is not None:
        if given.keys() & {"model", "data"}:
            raise UserError("--plan-only names the model itself: it goes without --model and --data.")
        runs, refused = runs_of(given | {"model": plan_only, "data": Path()}, chosen, rates, out)
        with console.status("Counting"):
            plans, more = plan(runs)
        refused |= more
        show_plans(plans, refused, console)
        record = {name: dataclasses.asdict(entry) for name, entry in plans.items()}
        if json_file:
            json_file.write_text(json.dumps(record | {"refused": refused}, indent=2) + "\n", encoding="utf-8")
        return
    runs, refused = runs_of(given, chosen, rates, out)
    settings = next(iter(runs.values()))  # data is what all have in common
    read_records(settings.data, split=settings.data_split, kind=settings.data_type)
    comparison = compare(runs, out, console, overwrite=overwrite, refused=refused)
    show(comparison, console)
    try:
        draw(comparison, out / PICTURE_FILE)
        written = f"{out / RECORD_FILE} and {out / PICTURE_FILE}"
    except ImportError:
        written = f"{out / RECORD_FILE}; a picture takes matplotlib (pip install matplotlib) and the same command again"
    console.print(f"Written: {written}.", highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(_to_json(comparison), encoding="utf-8")


def _signature() -> inspect.Signature:
    """The options above, and those of `peftfast train` that methods have in common, none of which need be told."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = []
    for name, field in SHARED.items():
        kind, told = field.type.__origin__, field.type.__metadata__[0]
        shared.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, told]
            )
        )
    return inspect.Signature(itertools.chain(own, shared))


command.__signature__ = _signature()
command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}
