"""transformers' Trainer as `peftfast train` runs it: with a log and an evaluation of its own, and whole checkpoints."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from peftfast.cli.checkpoints import PROFILE_FILE, Checkpoint, Checkpoints, written
from peftfast.cli.data import IGNORED
from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.experts import balanced
from peftfast.cli.load import Recorded
from peftfast.cli.methods import Adapted, embeddings_of
from peftfast.cli.packing import model_inputs
from peftfast.cli.processes import together
from peftfast.cli.progress import peak_memory_mib
from peftfast.cli.settings import TrainSettings
from peftfast.integrations.offload import offload_activations
from peftfast.integrations.rowwise import tile_mlps

WEIGHTS_FILE = "trained_weights.safetensors"


@dataclass
class Run:
    """What of a run is not Trainer's to keep, but has to be there again when it is resumed.

    `told` is what never changes: settings, fingerprint and held-out scores before training. `load` is a Recorded of the
    experts' tokens, `loss` the sum of the steps' losses since the last entry of the log, `logged` at which step, tokens
    and seconds that was.
    """

    told: dict
    load: Recorded | None = None
    loss: torch.Tensor | float = 0.0
    logged: tuple[int, int, float] = (0, 0, 0.0)
    seconds: float = 0.0
    peak_memory_mib: float = 0.0

    def state(self) -> dict:
        """Return it for run.json, with what each of the processes counts of its share of the batches."""
        share = {"loss": float(self.loss), "expert_load": self.load and self.load.state()}
        return self.told | {
            "logged": self.logged,
            "seconds": self.seconds,
            "peak_memory_mib": self.peak_memory_mib,
            "processes": gather_object([share]),
        }

    def restore(self, state: dict) -> None:
        """Go on from a checkpoint's run.json: a process from its share, or from what falls to it of more or fewer."""
        for name in ("logged", "seconds", "peak_memory_mib"):
            setattr(self, name, state[name])
        shares, processes = state["processes"], PartialState()
        mine = shares[processes.process_index :: processes.num_processes]
        # The log has the mean over processes.
        self.loss = sum(share["loss"] for share in mine) * processes.num_processes / len(shares)
        if self.load:
            self.load.restore(*(share["expert_load"] for share in mine))


class FineTuner(Trainer):
    """Trains what `settings` say.

    Its log has an entry for each logged step and each evaluation; `seconds` of the run are those of training alone.

    Args:
        checkpoints: where --save-steps puts them.
        folder: for files that are not whole yet; what else is given is Trainer's.
    """

    def __init__(
        self,
        settings: TrainSettings,
        adapted: Adapted,
        run: Run,
        checkpoints: Checkpoints,
        folder: Path,
        *,
        train_dataset: list[dict],
        **arguments,
    ) -> None:
        super().__init__(
            model=adapted.model,
            args=training_arguments(settings, folder, len(train_dataset)),
            train_dataset=train_dataset,
            **arguments,
        )
        self.remove_callback(PrinterCallback)
        self.settings, self.adapted, self.run, self.checkpoints = settings, adapted, run, checkpoints
        self._offloading = (
            offload_activations(adapted.model) if settings.activation_offloading else contextlib.nullcontext()
        )
        if settings.tiled_mlp:
            try:
                tile_mlps(adapted.model)
            except ValueError as error:
                raise UserError(f"--tiled-mlp: {first_sentence(error)}.") from error
        self._started: float | None = None  # while training

    def fine_tune(self, checkpoint: Checkpoint | None) -> None:
        """Train from the start, or from a checkpoint.

        Raises:
            UserError: training diverged, or a checkpoint cannot be read or written.
        """
        if checkpoint:
            self.run.restore(checkpoint.run)
        self._started = time.perf_counter()
        try:
            self.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        except (ValueError, RuntimeError) as error:
            # Of routing weights, before there is a loss, and of the size of a step.
            if not any(sign in str(error) for sign in ("not finite", "without overflow")):
                raise
            raise self._diverged(first_sentence(error)) from error
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._count()
        self._started = None

    def _count(self) -> None:
        """Have seconds and peak memory of the run be those of this moment."""
        now = time.perf_counter()
        self.run.seconds += now - self._started
        self._started = now
        self.run.peak_memory_mib = max(self.run.peak_memory_mib, peak_memory_mib())

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """What happens in the block is no training: it takes none of its time, random numbers or experts' tokens."""
        load = self.run.load
        self._count()
        held = load and load.state()
        with torch.random.fork_rng(devices=[]):
            yield
        if load:
            load.restore(held)
        self._started = time.perf_counter()

    def _diverged(self, sign: str) -> UserError:
        rate = self.settings.learning_rates[0]
        return UserError(f"training diverged ({sign}): lower --learning-rate {rate}.")

    # ---- steps

    def training_step(self, model, inputs, num_items_in_batch=None):
        # Where the model's loss is already that of an optimizer step, each of its parts adds the balancing loss whole.
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        accumulation = parts if self.model_accepts_loss_kwargs else 1
        with balanced(self.adapted, accumulation):
            loss = super().training_step(model, inputs, num_items_in_batch)
        # As Trainer sums it, but here the sum outlives an interruption between two entries of the log.
        self.run.loss = loss + self.run.loss
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        with self._offloading:
            return super().compute_loss(model, model_inputs(inputs), *args, **kwargs)

    def create_optimizer(self, model=None):
        """Trainer's, with the embeddings' own learning rate where they have one."""
        if self.optimizer is not None or self.settings.objective != "pretrain":
            return super().create_optimizer()
        optimizer = super().create_optimizer()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        embeddings = {weight for module in embeddings_of(base).values() for weight in module.parameters()}
        for group in list(optimizer.param_groups):
            weights = group["params"]
            group["params"] = [weight for weight in weights if weight not in embeddings]
            apart = [weight for weight in weights if weight in embeddings]
            if apart:
                rate = self.settings.learning_rates[1]
                optimizer.add_param_group(group | {"params": apart, "lr": rate})
        return optimizer

    # ---- log and evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._count()
            now = self.state.global_step, int(self.state.num_input_tokens_seen), self.run.seconds
            steps, tokens, seconds = (new - old for new, old in zip(now, self.run.logged, strict=True))
            summed = torch.as_tensor(self.run.loss, dtype=torch.float32, device=self.args.device)
            logs["loss"] = self.accelerator.gather(summed).mean().item() / steps
            if not math.isfinite(logs["loss"]):
                raise self._diverged("the loss is not finite")
            logs["tokens_per_second"] = tokens / seconds
            logs["peak_memory_mib"] = self.run.peak_memory_mib
            self.run.loss, self.run.logged = 0.0, now
        super().log(logs)

    @property
    def entries(self) -> list[dict]:
        """The log: an entry for each logged step ("loss") and each evaluation ("eval_loss")."""
        names = {"num_input_tokens_seen": "tokens"}
        return [
            {"step": entry["step"]} | {names.get(name, name): value for name, value in entry.items()}
            for entry in self.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ]

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Trainer's, by the loss per token of all held-out examples together."""
        with self._aside():
            loss = self.held_out_loss()
        metrics = {"eval_loss": loss, "eval_perplexity": perplexity(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_loss(self) -> float:
        """Return the mean cross entropy of the held-out examples, in nats per learned token."""
        model = self.model.eval()
        total, count = 0.0, 0
        # Not the Trainer's loader, which would hand out a process's share.
        loader = DataLoader(self.eval_dataset, self.args.eval_batch_size, collate_fn=self.data_collator)
        with torch.no_grad():
            for batch in map(self._prepare_inputs, loader):
                learned = int((batch["labels"][:, 1:] != IGNORED).sum())
                total += model(**model_inputs(batch), use_cache=False).loss.item() * learned
                count += learned
        return total / count

    # ---- checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        step = self.state.global_step
        if step >= self.state.max_steps:  # the result is next
            return
        newest = self.checkpoints.newest()
        then = f" With --resume the run goes on from step {newest.step}." if newest else ""
        folder = Path(self.args.output_dir)
        partial = folder / f"checkpoint-{step}"
        what = f"the checkpoint of step {step} in {self.checkpoints.folder}"
        with self._aside():
            run = self.run.state()
            if not all(math.isfinite(share["loss"]) for share in run["processes"]):
                raise self._diverged("the loss is not finite")
            try:
                with together(), written(what, folder, then):
                    super()._save_checkpoint(model, trial)  # of all but the first, random states alone
                files = [(path.name, path.read_bytes()) for path in partial.glob("rng_state*")]
                random_states = gather_object(files)
                with together(), written(what, folder, then):
                    if self.is_world_process_zero():
                        for name, state in random_states:
                            (partial / name).write_bytes(state)
                        if self.adapted.profile is not None:
                            self.adapted.profile.save(partial / PROFILE_FILE)
                        self.checkpoints.keep(partial, step, run)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def _save(self, output_dir=None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        # What save_pretrained writes is for use: of a prompt's encoder it keeps the result alone.
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().contiguous() for name, weight in self._trained().items()}
        save_file(weights, folder / WEIGHTS_FILE)
        if self.settings.method != "full":
            self.model.save_pretrained(folder)

    @together()
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        path, trained = Path(resume_from_checkpoint, WEIGHTS_FILE), self._trained()
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--resume: {path} cannot be read: {first_sentence(error)}.") from error
        if {name: weight.shape for name, weight in weights.items()} != {
            name: weight.shape for name, weight in trained.items()
        }:
            raise UserError(f"--resume: {path} does not hold the weights that are trained.")
        with torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(weights[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}


def perplexity(loss: float) -> float:
    """Return the exponential of a loss, or the largest number that is one."""
    return math.exp(min(loss, 700))


def training_arguments(settings: TrainSettings, folder: Path, examples: int) -> TrainingArguments:
    """Return Trainer's arguments for a run on so many examples."""
    batches = math.ceil(examples / (settings.micro_batch_size * PartialState().num_processes))
    epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    steps = settings.max_steps or math.ceil(settings.epochs * epoch)
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = math.ceil(settings.warmup_ratio * steps)

    def every(steps: int | None, per_epoch: int | None) -> int | None:
        return math.ceil(epoch / per_epoch) if per_epoch else steps

    eval_steps = every(settings.eval_steps, settings.evals_per_epoch)
    save_steps = every(settings.save_steps, settings.saves_per_epoch)
    autocast = settings.method == "full" and settings.dtype == "bf16"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.micro_batch_size,
        per_device_eval_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rates[0],
        lr_scheduler_type=settings.lr_scheduler_type,
        warmup_steps=warmup_steps,
        optim=settings.optimizer,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=autocast,
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=settings.logging_steps or max(1, steps // 50),
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if eval_steps else "no",
        eval_steps=eval_steps,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        report_to=_names(settings.report_to),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        seed=settings.seed,
    )
    # One process trains on one GPU: several would multiply the batch by replicas, which torchrun does better.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _names(report_to: str) -> list[str]:
    return [name.strip() for name in report_to.split(",")]


def check_reports(report_to: str) -> None:
    """Raise UserError unless Trainer knows what --report-to names, and its libraries are there."""
    for name in _names(report_to):
        try:
            [callback] = get_reporting_integration_callbacks([name])
            callback()
        except Exception as error:  # whatever a library raises that is missing or not set up
            raise UserError(f"--report-to {name}: {first_sentence(error)}.") from error


def check_bitsandbytes(optimizer: str) -> None:
    """Raise UserError unless bitsandbytes is there and takes a step of its `optimizer` on the device."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    weight = torch.nn.Parameter(torch.zeros(8192, device=device))  # fewer stay in 32 bits
    weight.grad = torch.ones_like(weight)
    try:
        with tempfile.TemporaryDirectory() as folder:
            # `use_cpu` as in training: another value would have accelerate forget the other processes.
            arguments = TrainingArguments(
                output_dir=folder,
                optim=optimizer,
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),
            )
            kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([weight], **options).step()
    except ImportError:
        raise UserError(
            f"--optimizer {optimizer} takes bitsandbytes, which is not installed: pip install bitsandbytes."
        ) from None
    except Exception as error:  # whatever a library says about a device that it does not know
        raise UserError(
            f"--optimizer {optimizer}: bitsandbytes has it not for {device.type}: {first_sentence(error)}."
        ) from error
