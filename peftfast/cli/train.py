"""`peftfast train`: fine-tune a causal language model with stock PEFT and transformers' Trainer."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import platform
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peftfast.cli import data, methods
from peftfast.cli.answer import answer
from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.experts import balanced, experts_of
from peftfast.cli.load import describe, expert_load, recorded
from peftfast.cli.model import is_local_model, load_model, load_tokenizer
from peftfast.cli.settings import DTYPES, TrainSettings

RESULT_FILE = "train_result.json"
ANSWERS_FILE = "held_out_answers.jsonl"
PROFILE_FILE = "expert_profile.json"
PROFILED_EXAMPLES = 256  # by which --experts profile: chooses, at most


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on the held-out examples.

    `loss` is the mean cross entropy in nats per learned token, `perplexity` its exponential. `exact_match` is
    the share of completions that greedy decoding gives letter by letter; None unless the data is
    prompt/completion.
    """

    loss: float
    perplexity: float
    exact_match: float | None


@dataclass(frozen=True)
class TrainResult:
    """The record of a training run, as written to train_result.json.

    `parameters` and `base_bytes` are those of the frozen model; `quantization` is how its linear layers and experts
    are kept in 4 bits, as arguments of FourBitConfig, None if they are not, and `quantized` counts these weights.
    `experts` is which experts have adapters, None in a dense model; `router_aux_loss_coef` weighs the load-balancing
    loss in the training loss, None if it is not in it; `expert_load` is peftfast.cli.load.expert_load of the run.
    `trainable_share` is that of the parameters in the trained model; `learning_rates` are the peaks of "method" and of
    "embeddings", where these are trained. `gradient_bytes` and `optimizer_bytes` are held when a step is taken,
    `saved_bytes` are those of the weights on disk.
    `seconds` is the time of training alone, without loading and evaluation; `tokens` counts those of the
    training sequences, without padding; `peak_memory_mib` is the process's largest resident set while it
    trained (on a GPU: the largest amount allocated there); `losses` holds [step, training loss] pairs;
    `report` is what `peftfast.report` says of the model, empty if the backend is peft or there are no adapters.
    """

    settings: dict
    parameters: int
    base_bytes: int
    quantization: dict | None
    quantized: dict[str, int]
    experts: str | None
    router_aux_loss_coef: float | None
    expert_load: dict[str, dict] | None
    trainable_parameters: int
    trainable_share: float
    learning_rates: dict[str, float]
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    examples: int
    held_out_examples: int
    before: Evaluation | None
    after: Evaluation | None
    steps: int
    seconds: float
    tokens: int
    tokens_per_second: float
    peak_memory_mib: float
    losses: list[list[float]]
    report: str
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def train(settings: TrainSettings, console: Console | None = None) -> TrainResult | None:
    """Fine-tune as told and write adapter, tokenizer and record to `settings.out`.

    Nothing is written until everything is there: the folder appears complete or not at all. Of several processes
    (torchrun, accelerate launch) each trains on its share of a batch, and the first alone evaluates, writes and prints;
    the others return None.

    Raises:
        UserError: the model or the data cannot be used, the output would overwrite something, or training
            diverged.
    """
    console = console or Console(quiet=True)
    check_output(settings)
    records = data.read_records(settings.data)
    held_out_records = data.read_records(settings.eval_file) if settings.eval_file else None
    if settings.objective == "pretrain":
        data.check_raw_text(settings.data, records)
        if held_out_records:
            data.check_raw_text(settings.eval_file, held_out_records)
    local = is_local_model(settings.model)

    import huggingface_hub
    import torch
    import transformers
    from accelerate import PartialState

    # While the first process evaluates, the others wait.
    processes = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))
    if not processes.is_main_process:
        console = Console(quiet=True)
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with console.status("Loading the model"):
        tokenizer = load_tokenizer(settings.model, local)
        examples, held_out = _examples(settings, tokenizer, records, held_out_records)
        model = load_model(
            settings.model, methods.weights_dtype(settings), local, methods.four_bit_config(settings)
        )
        methods.check_quantization(settings, model)
    return _fine_tune(settings, console, model, tokenizer, examples, held_out)


def _examples(settings: TrainSettings, tokenizer, records, held_out_records) -> tuple[list, list]:
    """Return the training and the held-out examples."""
    pretrain = settings.objective == "pretrain"
    encode = data.pack if pretrain else data.encode

    def split(examples: list) -> tuple[list, list]:
        return data.split(examples, settings.eval_share, settings.seed, at_most=settings.max_eval_examples)

    if held_out_records is None and pretrain and len(records) > 1:
        records, held_out_records = split(records)  # whole documents are held out
    examples = encode(records, tokenizer, settings.sequence_len)
    if held_out_records is None:
        return split(examples)
    held_out = encode(held_out_records, tokenizer, settings.sequence_len)
    return examples, held_out[: settings.max_eval_examples]


def _fine_tune(
    settings: TrainSettings, console: Console, model, tokenizer, examples, held_out
) -> TrainResult | None:
    import torch
    import transformers
    from accelerate import PartialState

    transformers.set_seed(settings.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_backend(settings.backend, model))
        parameters, base_bytes = methods.base_size(model)
        quantization, quantized = methods.quantization(model), methods.quantized(model)
        # Without prepare_model_for_kbit_training. Norms and embeddings in fp32, as it would have them, make the
        # whole residual stream fp32; frozen, they gain nothing by it, and the norms compute in fp32 in any case.
        adapted = methods.adapt(model, settings, _batches(settings, tokenizer, examples))
        for note in adapted.notes:
            console.print(note, highlight=False)
        if adapted.router_aux_loss_coef:
            console.print(
                f"The training loss holds {adapted.router_aux_loss_coef:g} times the routers' load-balancing loss; "
                "the held-out loss does not.",
                highlight=False,
            )
        model = adapted.model
        processes = PartialState()
        is_first = processes.is_main_process
        output = _folder_written_at_once(settings) if is_first else tempfile.TemporaryDirectory()
        folder = Path(stack.enter_context(output))
        memory = _optimizer_memory()
        trainer = _build_trainer(settings, model, tokenizer, examples, str(folder), console)
        trainer.add_callback(memory)
        with methods.before_training(model):
            before, _ = _evaluate(trainer, tokenizer, held_out, console) if is_first else (None, [])
        _reset_peak_memory()
        started = time.perf_counter()
        # Where the model's loss is already that of an optimizer step, each of its parts adds the balancing loss whole.
        parts = settings.gradient_accumulation_steps * processes.num_processes
        accumulation = parts if trainer.model_accepts_loss_kwargs else 1
        with recorded(model) as load, balanced(adapted, accumulation):
            try:
                trainer.train()
            except ValueError as error:  # of routing weights, before there is a loss
                if "not finite" not in str(error):
                    raise
                raise _diverged(settings, first_sentence(error)) from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak_memory = _peak_memory_mib()
        losses = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
        if not all(math.isfinite(loss) for _, loss in losses):
            raise _diverged(settings, "the loss is not finite")
        if load is not None:
            for counts in load.tokens.values():
                counts.copy_(trainer.accelerator.reduce(counts.to(trainer.accelerator.device)))
        if not is_first:
            return None
        after, answers = _evaluate(trainer, tokenizer, held_out, console)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        trainable, held = sum(weight.numel() for weight in trained), methods.base_size(model)[0]
        _save(model, settings, folder)
        result = TrainResult(
            settings=dataclasses.asdict(settings),
            parameters=parameters,
            base_bytes=base_bytes,
            quantization=quantization,
            quantized=quantized,
            experts=adapted.experts,
            router_aux_loss_coef=adapted.router_aux_loss_coef,
            expert_load=None if load is None else expert_load(load),
            trainable_parameters=trainable,
            trainable_share=trainable / held,
            learning_rates=dict(zip(("method", "embeddings"), settings.learning_rates)),
            gradient_bytes=memory.gradient_bytes,
            optimizer_bytes=memory.optimizer_bytes,
            saved_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
            examples=len(examples),
            held_out_examples=len(held_out),
            before=before,
            after=after,
            steps=trainer.state.global_step,
            seconds=seconds,
            tokens=trainer.state.num_input_tokens_seen,
            tokens_per_second=trainer.state.num_input_tokens_seen / seconds,
            peak_memory_mib=peak_memory,
            losses=losses,
            report=_report(model) if settings.backend == "peftfast" and settings.method != "full" else "",
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "peft")},
        )
        if adapted.profile is not None:
            adapted.profile.save(folder / PROFILE_FILE)
            _plot(adapted.profile, folder / "expert_profile.png")
        if load is not None:
            _plot(load, folder / "expert_load.png")
        tokenizer.save_pretrained(folder)
        (folder / RESULT_FILE).write_text(result.to_json(), encoding="utf-8")
        if answers:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
            (folder / ANSWERS_FILE).write_text("".join(lines), encoding="utf-8")
    if settings.json:
        settings.json.write_text(result.to_json(), encoding="utf-8")
    return result


def _diverged(settings: TrainSettings, sign: str) -> UserError:
    return UserError(f"training diverged ({sign}): lower --learning-rate {settings.learning_rates[0]}.")


def _save(model, settings: TrainSettings, folder: Path) -> None:
    import torch

    if settings.method == "full":
        model.to(getattr(torch, DTYPES[settings.dtype]))
    model.save_pretrained(folder)


@contextlib.contextmanager
def _backend(name: str, model) -> Iterator[None]:
    """Have PEFT's layers and the model's experts run on peftfast inside the block, or leave both as they are."""
    if name == "peft":
        yield
        return
    import peftfast

    if experts_of(model):
        model.set_experts_implementation("peftfast")
    with peftfast.enabled():
        yield


def _report(model) -> str:
    import peftfast

    return str(peftfast.report(model))


def _plot(profile, path: Path) -> None:
    """Write the profile's heat map where matplotlib is installed."""
    with contextlib.suppress(ImportError):
        profile.plot(path)


def _batches(settings: TrainSettings, tokenizer, examples: list[data.Example]) -> Iterator[dict]:
    """Yield a sample of the training data as model inputs without labels."""
    from transformers import DataCollatorForSeq2Seq

    count = min(PROFILED_EXAMPLES, len(examples))
    rows = _as_rows(random.Random(settings.seed).sample(examples, count))
    collate = DataCollatorForSeq2Seq(tokenizer)
    for start in range(0, count, settings.micro_batch_size):
        batch = collate(rows[start : start + settings.micro_batch_size])
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def _build_trainer(settings: TrainSettings, model, tokenizer, examples, folder: str, console: Console):
    import torch
    from accelerate import PartialState
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    steps = settings.max_steps or math.ceil(
        settings.epochs
        * math.ceil(
            math.ceil(len(examples) / (settings.micro_batch_size * PartialState().num_processes))
            / settings.gradient_accumulation_steps
        )
    )
    autocast = settings.method == "full" and settings.dtype == "bf16"
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rates[0],
        bf16=autocast,
        use_cpu=not torch.accelerator.is_available(),
        warmup_steps=math.ceil(0.03 * steps),
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=settings.seed,
    )
    # The padding side is the trainer's affair: on the right, the positions of a sequence start at 0.
    tokenizer.padding_side = "right"
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_as_rows(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8),
        callbacks=[_progress_callback(console)],
        optimizers=(_optimizer(settings, model, arguments), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _optimizer(settings: TrainSettings, model, arguments):
    """Return the Trainer's optimizer with the embeddings' own learning rate; None where they have none."""
    from transformers import Trainer

    if settings.objective != "pretrain":
        return None
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    rate, embedding_rate = settings.learning_rates
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embeddings = {weight for module in methods.embeddings_of(base).values() for weight in module.parameters()}
    groups = [
        {"params": [weight for weight in trained if weight not in embeddings], "lr": rate},
        {"params": [weight for weight in trained if weight in embeddings], "lr": embedding_rate},
    ]
    return kind(groups, **options)


def _as_rows(examples: list[data.Example]) -> list[dict]:
    return [
        {
            "input_ids": example.input_ids,
            "attention_mask": [1] * len(example.input_ids),
            "labels": example.labels,
        }
        for example in examples
    ]


def _progress_callback(console: Console):
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        """Shows steps, remaining time and the latest training loss."""

        def on_train_begin(self, args, state, control, **kwargs):
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(
                *columns, console=console, transient=True, disable=not console.is_terminal
            )
            self.task = self.progress.add_task("Training", total=state.max_steps)
            self.progress.start()

        def on_step_end(self, args, state, control, **kwargs):
            self.progress.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                self.progress.update(self.task, description=f"Training, loss {float(logs['loss']):.3f}")

        def on_train_end(self, args, state, control, **kwargs):
            self.progress.stop()

    return ProgressBar()


def _optimizer_memory():
    """Return a callback that measures what training holds for the trained weights alone, at the end of a step."""
    import torch
    from transformers import TrainerCallback

    class OptimizerMemory(TrainerCallback):
        gradient_bytes = optimizer_bytes = 0

        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 0:
                gradients = (weight.grad for weight in model.parameters())
                self.gradient_bytes = sum(gradient.nbytes for gradient in gradients if gradient is not None)
                held = getattr(optimizer, "optimizer", optimizer).state.values()  # accelerate wraps it
                values = (value for entries in held for value in entries.values())
                self.optimizer_bytes = sum(
                    value.nbytes for value in values if isinstance(value, torch.Tensor)
                )

    return OptimizerMemory()


def _evaluate(trainer, tokenizer, held_out: list[data.Example], console: Console):
    """Return the model's Evaluation and, for prompt/completion data, its answers as records."""
    if not held_out:
        return None, []
    import torch
    from torch.utils.data import DataLoader

    model = trainer.model.eval()
    total, count = 0.0, 0
    with console.status("Evaluating"), torch.no_grad():
        # Not the Trainer's loader, which would hand out a process's share.
        loader = DataLoader(
            _as_rows(held_out), trainer.args.eval_batch_size, collate_fn=trainer.data_collator
        )
        for batch in loader:
            batch = batch.to(model.device)
            learned = int((batch["labels"][:, 1:] != data.IGNORED).sum())
            total += model(**batch, use_cache=False).loss.item() * learned
            count += learned
        loss = total / count
        answers = []
        if held_out[0].prompt is not None:
            longest = max(sum(label != data.IGNORED for label in example.labels) for example in held_out)
            given = answer(model, tokenizer, [example.prompt for example in held_out], max_new_tokens=longest)
            answers = [
                {"prompt": example.prompt, "completion": example.completion, "answer": text}
                for example, text in zip(held_out, given, strict=True)
            ]
    exact = [line["answer"].strip() == line["completion"].strip() for line in answers]
    exact_match = sum(exact) / len(exact) if exact else None
    return Evaluation(loss, math.exp(min(loss, 700)), exact_match), answers


def _reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux starts a new peak on this request; elsewhere the peak is that of the whole run.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_mib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)


def check_output(settings: TrainSettings) -> None:
    """Refuse to write where something else is.

    Raises:
        UserError: `settings.out` holds what may not be replaced, or `settings.json` cannot be written.
    """
    out = settings.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file.")
    if out.is_dir() and any(out.iterdir()):
        if not settings.overwrite:
            raise UserError(f"--out {out} exists and is not empty: pass --overwrite to replace it.")
        if not (out / RESULT_FILE).is_file():
            raise UserError(
                f"--out {out} is not the result of an earlier run, so --overwrite leaves it alone."
            )
    check_record_file(settings.json)


def check_record_file(path: Path | None) -> None:
    """Raise UserError unless `path` is None or can name a new file."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"--json {path} is a folder, or lies in one that does not exist.")


@contextlib.contextmanager
def _folder_written_at_once(settings: TrainSettings) -> Iterator[Path]:
    """Yield a temporary folder beside `settings.out`, which takes its place if the block ends well."""
    out = settings.out.absolute()
    # Where the parent is still missing, beside means in the nearest folder that exists: the same file system.
    beside = next(parent for parent in out.parents if parent.exists())
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=beside))
    except OSError as error:
        raise UserError(f"--out {settings.out} cannot be written: {error.strerror}.") from error
    try:
        yield folder
        check_output(settings)
        folder.chmod(0o777 & ~_umask())
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=beside) as aside:
            if out.exists():
                os.replace(out, Path(aside, "earlier"))
            os.replace(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def show(result: TrainResult, console: Console) -> None:
    """Print the held-out scores as a table, and below it what the run took."""
    if result.before and result.after:
        table = Table(title=f"{result.settings['method']} on {Path(result.settings['model']).name}")
        table.add_column("held-out")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        table.add_row("loss, nats per token", f"{result.before.loss:.3f}", f"{result.after.loss:.3f}")
        table.add_row("perplexity", f"{result.before.perplexity:.2f}", f"{result.after.perplexity:.2f}")
        if result.after.exact_match is not None:
            table.add_row(
                "exact match", f"{result.before.exact_match:.1%}", f"{result.after.exact_match:.1%}"
            )
        console.print(table)
    full = result.settings["method"] == "full"
    kept = "Model" if full else "Adapter"
    console.print(
        f"{result.steps} steps in {result.seconds:.1f} s, {result.tokens_per_second:,.0f} tokens/s, "
        f"{result.peak_memory_mib:,.0f} MiB peak memory; {result.trainable_parameters:,} trained parameters "
        f"({result.trainable_share:.1%}). {kept}: {result.settings['out']}",
        highlight=False,
    )
    base = f"{'Weights' if full else 'Frozen weights'}: {mebibytes(result.base_bytes)}"
    if (how := result.quantization) is not None:
        kinds = " and ".join(f"{kind}s" for kind in result.quantized)
        nested = ", double-quantized" if how["nested"] else ""
        base += (
            f" where 16 bits would take {mebibytes(2 * result.parameters)}; {kinds} in {how['quant_type']}, "
            f"a scale to {how['blocksize']} weights{nested}, computed in {result.settings['dtype']}"
        )
    console.print(f"{base}.", highlight=False)
    if result.report:
        summary = result.report.splitlines()[0]
        counts = re.search(r"(\d+) of (\d+)", summary)
        if counts and int(counts[1]) < int(counts[2]):
            summary += f" (the reasons are in {RESULT_FILE})"
        console.print(summary, highlight=False)
    if result.expert_load:
        console.print(describe(result.expert_load), highlight=False)


def mebibytes(size: int) -> str:
    """Return a number of bytes as text."""
    return f"{size / 2**20:,.1f} MiB"


def command(**options) -> None:
    """Fine-tune a causal language model, or go on pre-training it: with adapters of any kind, experts and routers
    included, or whole. The adapter is plain PEFT's, except a mixture of LoRAs, a bottleneck adapter and adapters on
    chosen experts."""
    # What one library tells another about its next version is no news to the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    console = Console()
    result = train(TrainSettings(**options), console)
    if result is not None:
        show(result, console)


# One list of settings: the command's options are the fields above.
command.__signature__ = inspect.signature(TrainSettings)
command.__annotations__ = {name: field.type for name, field in TrainSettings.__dataclass_fields__.items()}
