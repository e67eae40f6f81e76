"""What a training run shows while it runs, what memory it takes, and the picture of its losses."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

LINES = 20  # where there is no terminal to draw a bar on, at most
SECONDS = 5.0  # between two of them, at least


class ProgressBar(TrainerCallback):
    """Shows steps, training loss, tokens per second and the remaining time; without a terminal, a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_train_begin(self, args, state, control, **kwargs):
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        )
        self._task = self._bar.add_task("Training", total=state.max_steps, completed=state.global_step)
        self._bar.start()
        self._began = self._shown = time.monotonic()
        self._first = self._line = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        said = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, description=f"Training, {said}")
        now, step = time.monotonic(), state.global_step
        due = step - self._line >= state.max_steps / LINES and now - self._shown >= SECONDS
        if due and not self._console.is_terminal:
            self._line, self._shown = step, now
            left = (now - self._began) / (step - self._first) * (state.max_steps - step)
            self._console.print(
                f"step {step:,} of {state.max_steps:,}, {said}, {_duration(left)} left", highlight=False
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, however training ended."""
        if hasattr(self, "_bar"):
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---- memory -----------------------------------------------------------------------------------------------


class OptimizerMemory(TrainerCallback):
    """Measures what training holds for the trained weights alone, at the end of its first step."""

    gradient_bytes = optimizer_bytes = 0

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.gradient_bytes:
            return
        gradients = (weight.grad for weight in model.parameters())
        self.gradient_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
        held = getattr(optimizer, "optimizer", optimizer).state.values()  # accelerate wraps it
        values = (value for entries in held for value in entries.values())
        self.optimizer_bytes = sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def reset_peak_memory() -> None:
    """Have `peak_memory_mib` count from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux starts a new peak on this request; elsewhere the peak is that of the whole run.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib() -> float:
    """Return the process's largest resident set; on a GPU, the largest amount allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


# ---- the picture --------------------------------------------------------------------------------------------


def draw(
    log: list[dict], last: int, before: float | None, after: float | None, title: str, path: Path
) -> None:
    """Draw the losses of a run over its steps, and the learning rate below them.

    Args:
        log: of TrainResult.
        last: the last step.
        before: held-out loss before and, `after`, at the end of training; None without held-out examples.
    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [entry for entry in log if "loss" in entry]
    steps, losses = ([entry[name] for entry in trained] for name in ("step", "loss"))
    figure = Figure(figsize=(8, 5.6))
    margins = dict(left=0.1, right=0.97, bottom=0.1, top=0.93, hspace=0.12)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1), gridspec_kw=margins)
    many = len(trained) >= 10
    upper.plot(
        steps, losses, color="C0", alpha=0.35 if many else 1, marker="" if many else "o", label="training"
    )
    if many:
        upper.plot(steps, _smooth(losses), color="C0", label="training, smoothed")
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry]
    held_out = [(0, before), *(point for point in held_out if point[0] != last), (last, after)]
    held_out = [(step, loss) for step, loss in held_out if loss is not None]
    if held_out:
        upper.plot(*zip(*held_out), "o--", color="C1", linewidth=0.8, label="held-out")
    upper.set_ylabel("loss, nats per token")
    upper.set_title(title)
    upper.legend()
    lower.plot(steps, [entry["learning_rate"] for entry in trained], color="C2", marker="" if many else "o")
    lower.set_ylabel("learning rate")
    figure.align_ylabels()
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    lower.set_xlabel("optimizer step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _smooth(values: list[float]) -> list[float]:
    """Return the exponential moving average over about a tenth of the values, unbiased at its start."""
    decay = 1 - 1 / max(2.0, len(values) / 10)
    smooth, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth
