"""`peftfast train`: fine-tune a causal language model with stock PEFT and transformers' Trainer."""

import contextlib
import dataclasses
import inspect
import json
import os
import platform
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Argument, Context

from peftfast.cli import data, methods, packing
from peftfast.cli.answer import answer
from peftfast.cli.checkpoints import (
    PROFILE_FILE,
    Checkpoint,
    Checkpoints,
    check_batch,
    check_fingerprint,
    fingerprint,
    jsonable,
    written,
)
from peftfast.cli.config_file import read_config
from peftfast.cli.errors import UserError, is_out_of_memory
from peftfast.cli.experts import experts_of
from peftfast.cli.load import describe, expert_load, recorded
from peftfast.cli.model import is_local_model, load_model, load_tokenizer, return_freed_memory
from peftfast.cli.processes import check_launch, joined, rank, together
from peftfast.cli.records import check_raw_text, read_records
from peftfast.cli.settings import BITSANDBYTES_OPTIMIZERS, DTYPES, TrainSettings, option

RESULT_FILE = "train_result.json"
ANSWERS_FILE = "held_out_answers.jsonl"
LOG_FILE, PICTURE_FILE = "train_log.jsonl", "loss.png"
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
    `seconds` is the time of training alone, without loading, evaluating and writing checkpoints; `tokens` counts those
    of the training sequences, without padding; `peak_memory_mib` is the process's largest resident set while it
    trained (on a GPU: the largest amount allocated there). Of a run that was resumed all three are those of the steps
    that led to the result. `losses` holds [step, training loss] pairs. `log` has an entry for each of them: "step",
    "epoch", "loss", the mean since the entry before, "grad_norm", "learning_rate", "tokens" so far, "tokens_per_second"
    since the entry before, "peak_memory_mib" so far; and one for each evaluation during training: "eval_loss",
    "eval_perplexity". `report` is what `peftfast.report` says of the model, empty if the backend is peft or there are
    no adapters.
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
    log: list[dict]
    report: str
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def train(settings: TrainSettings, console: Console | None = None) -> TrainResult | None:
    """Fine-tune as told and write adapter, tokenizer and record to `settings.out`.

    Nothing is written until everything is there: the folder appears complete or not at all. Checkpoints are beside it.
    Of several processes (torchrun, accelerate launch) each trains on its share of a batch, and the first alone writes
    and prints; the others return None. More or fewer of them may resume a run, if a step takes as many sequences as
    before: they go on with the batches that come next, and dropout draws other numbers.

    Raises:
        UserError: the model or the data cannot be used, the output would overwrite something, there is nothing to
            resume, memory or disk space ran out, or training diverged.
    """
    console = console or Console(quiet=True)
    checkpoints = Checkpoints(settings.out)
    check_launch()
    with together():
        checkpoint = checkpoints.to_resume(settings)
        check_output(settings)
        records = read_records(settings.data, split=settings.data_split, kind=settings.data_type)
        held_out_records = None
        if settings.eval_file or settings.eval_split:
            held_out_data = settings.eval_file or settings.data
            held_out_records = read_records(held_out_data, split=settings.eval_split, kind=settings.data_type)
        if settings.objective == "pretrain":
            check_raw_text(settings.data, records)
            if held_out_records:
                check_raw_text(held_out_data, held_out_records)
        local = is_local_model(settings.model)

    import huggingface_hub
    import transformers
    from accelerate.utils import gather_object

    processes = joined()
    if not processes.is_main_process:
        console = Console(quiet=True)
    if settings.activation_offloading:
        check_offloading()
    if len(set(gather_object([checkpoint and checkpoint.step]))) > 1:
        raise UserError(f"--resume: not every process sees the same checkpoints in {checkpoints.folder}.")
    if checkpoint:
        check_batch(checkpoint, settings, processes.num_processes)
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return_freed_memory()
    if settings.optimizer in BITSANDBYTES_OPTIMIZERS:
        from peftfast.cli.trainer import check_bitsandbytes

        check_bitsandbytes(settings.optimizer)
    if settings.report_to != "none":
        from peftfast.cli.trainer import check_reports

        check_reports(settings.report_to)
    with together(), console.status("Loading the model"):
        tokenizer = load_tokenizer(settings.model, local)
        if settings.chat_template:
            data.use_chat_template(tokenizer, settings.chat_template)
        examples, held_out = _examples(settings, tokenizer, records, held_out_records)
        if checkpoint:
            check_fingerprint(checkpoint, fingerprint(settings, examples, held_out))
        model = load_model(
            settings.model,
            methods.weights_dtype(settings),
            local,
            methods.four_bit_config(settings),
            settings.attn_implementation,
        )
        methods.check_quantization(settings, model)
    try:
        with _out_of_memory_said(settings):
            return _fine_tune(
                settings, console, model, tokenizer, examples, held_out, checkpoints, checkpoint
            )
    except (KeyboardInterrupt, SystemExit):
        newest = checkpoints.newest()
        kept = f"with --resume it goes on from step {newest.step}" if newest else "nothing was written"
        console.print(f"Training was interrupted: {kept}.", highlight=False)
        raise


def _examples(settings: TrainSettings, tokenizer, records, held_out_records) -> tuple[list, list]:
    """Return the training and the held-out examples."""
    pretrain = settings.objective == "pretrain"
    encode = data.pack if pretrain else partial(data.encode, train_on_inputs=settings.train_on_inputs)

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
    settings: TrainSettings,
    console: Console,
    model,
    tokenizer,
    examples,
    held_out,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
) -> TrainResult | None:
    import transformers
    from accelerate import PartialState

    from peftfast.cli.progress import OptimizerMemory, ProgressBar, reset_peak_memory
    from peftfast.cli.trainer import FineTuner, Run

    transformers.set_seed(settings.seed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_backend(settings.backend, model))
        parameters, base_bytes = methods.base_size(model)
        quantization, quantized = methods.quantization(model), methods.quantized(model)
        # Without prepare_model_for_kbit_training. Norms and embeddings in fp32, as it would have them, make the
        # whole residual stream fp32; frozen, they gain nothing by it, and the norms compute in fp32 in any case.
        adapted = methods.adapt(
            model, settings, _batches(settings, tokenizer, examples), _profile_of(checkpoint)
        )
        for note in adapted.notes:
            console.print(note, highlight=False)
        if adapted.router_aux_loss_coef:
            console.print(
                f"The training loss holds {adapted.router_aux_loss_coef:g} times the routers' load-balancing loss; "
                "the held-out loss does not.",
                highlight=False,
            )
        model = adapted.model
        is_first = PartialState().is_main_process
        with together():
            if is_first and (settings.saves or checkpoint or checkpoints.newest()):
                stack.enter_context(checkpoints.opened())
                if not checkpoint:
                    checkpoints.forget()
            output = (
                _folder_written_at_once(settings, checkpoints) if is_first else tempfile.TemporaryDirectory()
            )
            folder = Path(stack.enter_context(output))
        run = Run(told={"settings": jsonable(settings)})
        memory, bar = OptimizerMemory(), ProgressBar(console)
        stack.callback(bar.stop)
        # The padding side is the trainer's affair: on the right, the positions of a sequence start at 0.
        tokenizer.padding_side = "right"
        collate = _collator(settings, tokenizer, adapted)
        trainer = FineTuner(
            settings,
            adapted,
            run,
            checkpoints,
            folder,
            train_dataset=_training_rows(settings, examples),
            eval_dataset=_training_rows(settings, held_out) or None,
            data_collator=collate,
            callbacks=[bar, memory],
        )
        if settings.sample_packing:
            packing.check(model, settings, collate, trainer.args.device)
        if checkpoint:
            before = checkpoint.run["before"] and Evaluation(**checkpoint.run["before"])
            console.print(f"Going on from step {checkpoint.step}.", highlight=False)
        else:
            with methods.before_training(model):
                before, _ = _evaluate(trainer, tokenizer, held_out, console) if is_first else (None, [])
        if settings.saves:
            run.told["fingerprint"] = fingerprint(settings, examples, held_out)
            run.told["before"] = before and dataclasses.asdict(before)
        reset_peak_memory()
        with recorded(model) as run.load:
            trainer.fine_tune(checkpoint)
        load = run.load and run.load.profile()
        if load is not None:
            for counts in load.tokens.values():
                counts.copy_(trainer.accelerator.reduce(counts.to(trainer.accelerator.device)))
        if not is_first:
            return None
        after, answers = _evaluate(trainer, tokenizer, held_out, console)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        trainable, held = sum(weight.numel() for weight in trained), methods.base_size(model)[0]
        newest = checkpoints.newest()
        then = f" With --resume the run goes on from step {newest.step}." if newest else ""
        stack.enter_context(written(f"--out {settings.out}", folder, then))
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
            seconds=run.seconds,
            tokens=trainer.state.num_input_tokens_seen,
            tokens_per_second=trainer.state.num_input_tokens_seen / run.seconds,
            peak_memory_mib=run.peak_memory_mib,
            losses=[[entry["step"], entry["loss"]] for entry in trainer.entries if "loss" in entry],
            log=trainer.entries,
            report=_report(model) if settings.backend == "peftfast" and settings.method != "full" else "",
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "peft")},
        )
        _write(result, folder, tokenizer, adapted.profile, load, answers)
    if settings.json:
        settings.json.write_text(result.to_json(), encoding="utf-8")
    return result


def _write(result: TrainResult, folder: Path, tokenizer, profile, load, answers: list[dict]) -> None:
    """Write all that is beside the weights: tokenizer, record, log, pictures, answers."""
    tokenizer.save_pretrained(folder)
    (folder / RESULT_FILE).write_text(result.to_json(), encoding="utf-8")
    _write_lines(result.log, folder / LOG_FILE)
    if answers:
        _write_lines(answers, folder / ANSWERS_FILE)
    if profile is not None:
        profile.save(folder / PROFILE_FILE)
    with contextlib.suppress(ImportError):  # pictures, where matplotlib is installed
        draw(result, folder / PICTURE_FILE)
        if profile is not None:
            profile.plot(folder / "expert_profile.png")
        if load is not None:
            load.plot(folder / "expert_load.png")


def _write_lines(records: list[dict], path: Path) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _save(model, settings: TrainSettings, folder: Path) -> None:
    import torch

    if settings.method == "full":
        model.to(getattr(torch, DTYPES[settings.dtype]))
    model.save_pretrained(folder)


def _profile_of(checkpoint: Checkpoint | None):
    """Return the profile by which the interrupted run chose experts; None if it chose none."""
    from peftfast import ExpertProfile

    path = checkpoint and checkpoint.path / PROFILE_FILE
    return ExpertProfile.load(path) if path and path.is_file() else None


@contextlib.contextmanager
def _out_of_memory_said(settings: TrainSettings) -> Iterator[None]:
    """Turn running out of memory inside the block into a sentence that says what takes less."""
    import torch

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        ways = [f"--micro-batch-size {settings.micro_batch_size}"] if settings.micro_batch_size > 1 else []
        ways.append(f"--sequence-len {settings.sequence_len}")
        also = "" if settings.gradient_checkpointing else ", or pass --gradient-checkpointing"
        if not also and not settings.tiled_mlp and settings.micro_batch_size * settings.sequence_len > 4096:
            also = ", or pass --tiled-mlp"
        if not also and not settings.activation_offloading and torch.accelerator.is_available():
            also = ", or pass --activation-offloading"
        raise UserError(f"memory ran out: lower {' or '.join(ways)}{also}.") from error


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


def _batches(settings: TrainSettings, tokenizer, examples: list[data.Example]) -> Iterator[dict]:
    """Yield a sample of the training data as model inputs without labels."""
    from transformers import DataCollatorForSeq2Seq

    count = min(PROFILED_EXAMPLES, len(examples))
    rows = _rows(random.Random(settings.seed).sample(examples, count))
    collate = DataCollatorForSeq2Seq(tokenizer)
    for start in range(0, count, settings.micro_batch_size):
        batch = collate(rows[start : start + settings.micro_batch_size])
        yield {name: batch[name] for name in ("input_ids", "attention_mask")}


def _collator(settings: TrainSettings, tokenizer, adapted: methods.Adapted):
    from transformers import DataCollatorForSeq2Seq

    if settings.sample_packing:
        routed = adapted.experts is not None or settings.method == "mixture"
        return packing.Stack(tokenizer.pad_token_id, flat=routed)
    return DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)


def _training_rows(settings: TrainSettings, examples: list[data.Example]) -> list[dict]:
    """Return what the collator takes: an example each, or several that are joined."""
    if settings.sample_packing:
        return [packing.join(row) for row in packing.rows_of(examples, settings.sequence_len)]
    return _rows(examples)


def _rows(examples: list[data.Example]) -> list[dict]:
    return [
        {
            "input_ids": example.input_ids,
            "attention_mask": [1] * len(example.input_ids),
            "labels": example.labels,
        }
        for example in examples
    ]


def _evaluate(trainer, tokenizer, held_out: list[data.Example], console: Console):
    """Return the model's Evaluation and, for prompt/completion data, its answers as records."""
    if not held_out:
        return None, []
    from peftfast.cli.trainer import perplexity

    with console.status("Evaluating"):
        loss = trainer.held_out_loss()
        answers = []
        if held_out[0].prompt is not None:
            longest = max(sum(label != data.IGNORED for label in example.labels) for example in held_out)
            given = answer(
                trainer.model, tokenizer, [example.prompt for example in held_out], max_new_tokens=longest
            )
            answers = [
                {"prompt": example.prompt, "completion": example.completion, "answer": text}
                for example, text in zip(held_out, given, strict=True)
            ]
    exact = [line["answer"].strip() == line["completion"].strip() for line in answers]
    exact_match = sum(exact) / len(exact) if exact else None
    return Evaluation(loss, perplexity(loss), exact_match), answers


def check_offloading() -> None:
    """Raise UserError unless there is a device beside the CPU to offload from."""
    import torch

    if not torch.accelerator.is_available():
        raise UserError("--activation-offloading takes a GPU: without one, all is in main memory already.")


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
def _folder_written_at_once(settings: TrainSettings, checkpoints: Checkpoints) -> Iterator[Path]:
    """Yield a temporary folder beside `settings.out`, which takes its place if the block ends well."""
    out = settings.out.absolute()
    # Where the parent is still missing, beside means in the nearest folder that exists: the same file system. Among
    # checkpoints, where there are any, a resumed run finds and removes what a killed one has left.
    beside = next(folder for folder in (checkpoints.folder, *out.parents) if folder.exists())
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=beside))
    except OSError as error:
        raise UserError(f"--out {settings.out} cannot be written: {error.strerror}.") from error
    try:
        yield folder
        check_output(settings)
        folder.chmod(0o777 & ~_umask())
        for path in folder.iterdir():  # safetensors lets its owner alone read a file
            if path.is_file():
                path.chmod(0o666 & ~_umask())
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


def draw(result: TrainResult, path: Path) -> None:
    """Draw the losses of a run and its learning rate over its steps.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from peftfast.cli import progress

    method, model = result.settings["method"], Path(result.settings["model"]).name
    scores = [score and score.loss for score in (result.before, result.after)]
    progress.draw(result.log, result.steps, *scores, f"{method} on {model}", path)


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


def command(context: Context, config: Path | None = None, **options) -> None:
    """Fine-tune a causal language model, or go on pre-training it: with adapters of any kind, experts and routers
    included, or whole. The adapter is plain PEFT's, except a mixture of LoRAs, a bottleneck adapter and adapters on
    chosen experts."""
    # What one library tells another about its next version is no news to the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    given = {
        name: value for name, value in options.items() if context.get_parameter_source(name).name != "DEFAULT"
    }
    told, unused = read_config(config, given.get("model")) if config else ({}, [])
    told |= given
    for field in dataclasses.fields(TrainSettings):
        if field.default is dataclasses.MISSING and field.name not in told:
            raise UserError(
                f"Missing option '{option(field.name)}'{f', or {field.name} in {config}' if config else ''}."
            )
    settings = TrainSettings(**told)
    console = Console(quiet=rank() != 0)
    if unused:
        console.print(f"These keys change nothing here: {', '.join(unused)}.", highlight=False)
    result = train(settings, console)
    if result is not None:
        show(result, console)
        if not Path(result.settings["out"], PICTURE_FILE).exists():
            console.print("Pictures take matplotlib (pip install matplotlib).", highlight=False)


def _signature() -> inspect.Signature:
    """One list of settings: the command's options are the fields of TrainSettings, any of which a file may hold."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    told = Argument(
        help="A YAML file of settings, which options override; without it, model, data and out are needed."
    )
    parameters = [
        inspect.Parameter("context", keyword, annotation=Context),
        inspect.Parameter("config", keyword, default=None, annotation=Annotated[Path | None, told]),
    ]
    for field in dataclasses.fields(TrainSettings):
        default = None if field.default is dataclasses.MISSING else field.default
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=field.type))
    return inspect.Signature(parameters)


command.__signature__ = _signature()
command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}
