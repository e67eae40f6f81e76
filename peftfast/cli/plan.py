"""`peftfast plan`: how much memory a training run takes, part by part, and what fits a card. No weights are loaded."""

import dataclasses
import inspect
import itertools
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from peftfast.cli.empty import adapted_model, is_quantized
from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.model import load_config
from peftfast.cli.settings import METHODS_WITH, TrainSettings, option

# Memory of cards in GB (1e9 bytes), as sold.
GPUS = {
    "t4": 16, "v100": 32, "a10": 24, "a100": 80, "a100-40gb": 40, "l4": 24, "l40s": 48, "h100": 80, "h200": 141,
    "b200": 180, "rtx-2080-ti": 11, "rtx-3060": 12, "rtx-3070": 8, "rtx-3080": 10, "rtx-3090": 24, "rtx-4060": 8,
    "rtx-4060-ti": 16, "rtx-4070": 12, "rtx-4080": 16, "rtx-4090": 24, "rtx-5070": 12, "rtx-5080": 16,
    "rtx-5090": 32, "rtx-a6000": 48,
}  # fmt: skip
UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}
SEQUENCE_STEP = 16  # tokens: how finely the longest sequence is told
MOST_TOKENS = 2**20  # where a configuration names no limit
GIGABYTE = 10**9
METHODS = ("lora", "qlora", "mixture")  # that can be planned


@dataclass(frozen=True)
class PlanSettings:
    """What is planned; each field is an option of `peftfast plan`, and means what it does for `peftfast train`, whose
    defaults of dtype and batch size are those of small models."""

    model: Annotated[str, Argument(help="A model folder, a config.json, or the name of a model on the hub.")]
    method: Annotated[str, Option(help="lora; qlora: on a model in 4 bits; mixture: routed LoRAs.")] = "lora"
    dtype: Annotated[str, Option(help="Of the frozen model and its products: fp32 or bf16.")] = "bf16"
    lora_r: Annotated[int, Option(help="Rank of the adapters.")] = 16
    target_modules: Annotated[str, Option(help="all-linear, or names: q_proj,v_proj.")] = "all-linear"
    experts: Annotated[str | None, Option(help="Experts to adapt: all, the default, or none.")] = None
    mixture_experts: Annotated[int | None, Option(help="mixture: LoRAs to a layer.")] = None
    mixture_top_k: Annotated[int | None, Option(help="mixture: LoRAs to a token.")] = None
    quant_type: Annotated[str | None, Option(help="qlora: nf4, the default, or fp4.")] = None
    blocksize: Annotated[int | None, Option(help="qlora: weights that share a scale; by default 64.")] = None
    double_quant: Annotated[
        bool | None,
        Option("--double-quant/--no-double-quant", help="qlora: scales in 8 bits too; by default they are."),
    ] = None
    embeddings: Annotated[
        str | None,
        Option(help="qlora: embeddings and output head in 4bit or 8bit; by default they stay dense."),
    ] = None
    micro_batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 1
    gradient_accumulation_steps: Annotated[int, Option(help="Forward passes per optimizer step.")] = 1
    sequence_len: Annotated[
        int | None, Option(help="Tokens per sequence; by default 1024, or all that the model takes.")
    ] = None
    checkpointing: Annotated[
        bool, Option("--checkpointing/--no-checkpointing", help="Run each layer again in backward.")
    ] = True
    activation_offloading: Annotated[
        bool,
        Option(
            "--activation-offloading/--no-activation-offloading",
            help="On a GPU: what goes from forward to backward waits in main memory, which is not counted.",
        ),
    ] = False

    tiled_mlp: Annotated[
        bool, Option("--tiled-mlp/--no-tiled-mlp", help="Run MLPs on 4096 tokens at a time.")
    ] = False

    def to_train(self) -> TrainSettings:
        """The same as settings of a training run, which checks them."""
        if self.method not in METHODS:
            raise UserError(f"--method is one of {', '.join(METHODS)} here, not {self.method!r}.")
        same = {field.name for field in dataclasses.fields(TrainSettings)}
        given = {name: value for name, value in vars(self).items() if name in same and value is not None}
        return TrainSettings(**given, data=Path(), out=Path())


@dataclass(frozen=True)
class Memory:
    """The bytes of a training run at the moment when it takes most.

    Attributes:
        weights: frozen weights and buffers by precision, such as {"nf4": ..., "bfloat16": ...}, without the next.
        embeddings: of tokens, and the output embeddings; once where they are tied.
        adapters: everything that is trained.
        gradients: of what is trained, as far as they are there at that moment.
        optimizer: AdamW's two moments.
        activations: what forward keeps for backward.
        logits: from the output embeddings to the loss, and back.
        workspace: what one layer needs while it runs, or the optimizer.
    """

    weights: dict[str, int]
    embeddings: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Every part by its name, the weights by precision."""
        parts = dataclasses.asdict(self)
        return {f"weights, {name}": size for name, size in parts.pop("weights").items()} | parts


@dataclass(frozen=True)
class Choice:
    """One way to run: the settings that differ from the planned ones, and the memory.

    Attributes:
        fits: on the card; True where none was named.
        longest: the longest sequence that does, in tokens: a multiple of 16, or all that the model takes; 0: not even
            16 do; None where it was not looked for.
    """

    changes: dict
    memory: Memory
    fits: bool
    longest: int | None = None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        parameters, trainable_parameters: of the frozen model, and of the adapters.
        with_checkpointing, without_checkpointing: the memory of the settings either way.
        capacity: the bytes of the card that tensors may use; None without a card.
        choices: ways to run the planned batch: with and without checkpointing and, on a card, dense and in 4 bits.
        cheapest: of all ways that fit, the fastest that gives up least of what was asked for; None where nothing fits.
    """

    settings: PlanSettings
    parameters: int
    trainable_parameters: int
    with_checkpointing: Memory
    without_checkpointing: Memory
    capacity: int | None
    choices: list[Choice]
    cheapest: Choice | None

    @property
    def memory(self) -> Memory:
        """That of the settings as they are."""
        return self.with_checkpointing if self.settings.checkpointing else self.without_checkpointing

    def to_json(self) -> str:
        """The plan as indented JSON; sizes are bytes."""

        def plain(value):
            if isinstance(value, Memory):
                return dataclasses.asdict(value) | {"total": value.total}
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}

        return json.dumps(plain(self) | {"memory": self.memory}, indent=2, default=plain) + "\n"


def plan(settings: PlanSettings, gpu: str | None = None, reserve: str = "1GB") -> Plan:
    """Work out the memory of a training run and, for a card, what fits there.

    Args:
        gpu: a name in GPUS, or a size such as "8GB" or "24GiB".
        reserve: what of the card is not for tensors: the driver's context, libraries, gaps of the allocator.
    Raises:
        UserError: an argument is out of its range, or the model's configuration cannot be read or adapted.
    """
    capacity = None if gpu is None else _size(gpu, "--gpu") - _size(reserve, "--reserve")
    if capacity is not None and capacity <= 0:
        raise UserError(f"--gpu {gpu}: nothing is left of it after --reserve {reserve}.")
    settings.to_train()
    config = load_config(settings.model, told_by="")
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    if settings.sequence_len is None:
        settings = dataclasses.replace(settings, sequence_len=min(TrainSettings.sequence_len, most))
    elif settings.sequence_len > most:
        raise UserError(f"--sequence-len {settings.sequence_len}: the model takes {most} tokens at most.")
    runs: dict[str, _Run] = {}

    def choice(**changes) -> Choice:
        changed = dataclasses.replace(settings, **changes)
        if changed.method not in runs:
            runs[changed.method] = _Run(config, _without_others(changed))
        memory = runs[changed.method].memory(changed, changed.sequence_len, gpu is not None)
        different = {name: value for name, value in changes.items() if getattr(settings, name) != value}
        return Choice(different, memory, capacity is None or memory.total <= capacity)

    def with_longest(way: Choice) -> Choice:
        changed = dataclasses.replace(settings, **way.changes)
        return dataclasses.replace(way, longest=runs[changed.method].longest(changed, capacity, most))

    choices = [choice(checkpointing=on) for on in (False, True)]
    either = {on: way.memory for on, way in zip((False, True), choices)}
    if capacity is not None:
        other = {"lora": "qlora", "qlora": None if is_quantized(config) else "lora"}.get(settings.method)
        if other is not None:
            choices += [choice(method=other, checkpointing=on) for on in (False, True)]
        choices = list(map(with_longest, choices))
    run = runs[settings.method]
    return Plan(
        settings=settings,
        parameters=run.parameters,
        trainable_parameters=run.trainable,
        with_checkpointing=either[True],
        without_checkpointing=either[False],
        capacity=capacity,
        choices=choices,
        cheapest=_cheapest(settings, choices, choice, with_longest),
    )


def _without_others(settings: PlanSettings) -> PlanSettings:
    """Without the options that its method does not have."""
    others = [name for name, their in METHODS_WITH.items() if settings.method not in their]
    return dataclasses.replace(settings, **{name: None for name in others if hasattr(settings, name)})


def _cheapest(
    settings: PlanSettings,
    choices: list[Choice],
    choice: Callable[..., Choice],
    with_longest: Callable[[Choice], Choice],
) -> Choice | None:
    """The first that fits, in the order of what it costs.

    First the ways to run the batch as it is: without checkpointing, which takes a forward pass more; with it; where
    dense weights were asked for, both again in 4 bits, which cost precision. Then the leanest of these with the batch
    halved, as often as need be, and made up for by accumulation; then with a shorter sequence.
    """

    def cost(way: Choice) -> tuple[bool, bool]:
        changed = dataclasses.replace(settings, **way.changes)
        return changed.method != settings.method, changed.checkpointing

    ways = [way for way in choices if way.changes.get("method") != "lora"]  # never denser than was asked for
    for way in sorted(ways, key=cost):
        if way.fits:
            return way
    way = min(ways, key=lambda way: way.memory.total)
    batch, steps = settings.micro_batch_size, settings.gradient_accumulation_steps
    while batch > 1:
        smaller = batch // 2
        batch, steps = smaller, math.ceil(batch * steps / smaller)
        way = choice(**way.changes | dict(micro_batch_size=batch, gradient_accumulation_steps=steps))
        if way.fits:
            return way
    longest = with_longest(way).longest
    return choice(**way.changes, sequence_len=longest) if longest else None


# ---- one model ---------------------------------------------------------------------------------------------


class _Run:
    """The model of some settings with its adapters, on the meta device, and the memory of its training steps."""

    def __init__(self, config, settings: PlanSettings) -> None:
        from peftfast.cli.dry_run import DryRun
        from peftfast.integrations.experts import quantized_parameters

        model, _ = adapted_model(config, settings.to_train())
        base = model.get_base_model()
        ends = {
            weight
            for end in (base.get_input_embeddings(), base.get_output_embeddings())
            for weight in end.parameters()
        }
        trained = {weight for weight in model.parameters() if weight.requires_grad}
        packed = quantized_parameters(model)
        scales = {tensor for weight in packed.values() for tensor in weight.tensors()}
        # What the tensors hold, from their shapes and dtypes; of a quantized weight with its scales and their code.
        self.weights, self.embeddings, self.parameters = {}, 0, 0
        buffers = set(model.buffers()) - scales
        for weight in {*model.parameters(), *buffers} - trained:
            held = packed.get(weight, weight)
            self.parameters += 0 if weight in buffers else math.prod(held.shape)
            if weight in ends:
                self.embeddings += held.nbytes
                continue
            name = str(getattr(held, "quant_type", weight.dtype)).removeprefix("torch.")
            self.weights[name] = self.weights.get(name, 0) + held.nbytes
        self.adapters = sum(weight.nbytes for weight in trained)
        self.largest_adapter = max(weight.nbytes for weight in trained)
        self.trainable = sum(weight.numel() for weight in trained)
        self.dry_run = DryRun(model)

    def memory(self, settings: PlanSettings, sequence_len: int, on_gpu: bool) -> Memory:
        """The parts at the moment when their sum is largest: within the step, or within the optimizer after it."""
        accumulation = settings.gradient_accumulation_steps > 1
        try:
            step = self.dry_run.step(
                settings.micro_batch_size,
                sequence_len,
                checkpointing=settings.checkpointing,
                offloading=settings.activation_offloading,
                tiled_mlp=settings.tiled_mlp,
                accumulation=accumulation,
                on_gpu=on_gpu,
            )
        except Exception as error:  # whatever a model raises over its configuration
            raise UserError(
                f"{settings.model}: the model cannot run a training step: {first_sentence(error)}."
            ) from error
        if accumulation:
            step["gradients"] = self.adapters
        # On a GPU torch's AdamW updates all parameters at once, and forms the denominator of all; on the CPU one after
        # the other, where the square root and the denominator are two tensors.
        denominators = self.adapters if on_gpu else 2 * self.largest_adapter
        update = {"gradients": self.adapters, "activations": 0, "logits": 0, "workspace": denominators}
        return Memory(
            weights=dict(sorted(self.weights.items())),
            embeddings=self.embeddings,
            adapters=self.adapters,
            optimizer=2 * self.adapters,  # AdamW's moments are of the shape and dtype of the parameter
            **max(step, update, key=lambda parts: sum(parts.values())),
        )

    def longest(self, settings: PlanSettings, capacity: int, most: int) -> int:
        """The longest sequence of at most `most` tokens that fits.

        Memory grows with the length, and not less the longer it is: so between a length that fits and one that does
        not, the straight line between the two gives one that fits.
        """

        def spare(length: int) -> int:
            return capacity - self.memory(settings, length, on_gpu=True).total

        low, high = SEQUENCE_STEP, most
        spare_low, spare_high = spare(low), spare(high)
        if spare_high >= 0:
            return high
        if spare_low < 0:
            return low - SEQUENCE_STEP
        for attempt in itertools.count():
            if high - low <= SEQUENCE_STEP:
                return low
            # In turn: on the line; a step further, which ends the search where the line was straight; halfway.
            guess = (
                low + (high - low) * spare_low // (spare_low - spare_high),
                low + SEQUENCE_STEP,
                (low + high) // 2,
            )[attempt % 3]
            guess = min(max(guess // SEQUENCE_STEP * SEQUENCE_STEP, low + SEQUENCE_STEP), high - 1)
            spare_guess = spare(guess)
            if spare_guess >= 0:
                low, spare_low = guess, spare_guess
            else:
                high, spare_high = guess, spare_guess


def _size(text: str, name: str) -> int:
    """The bytes of a card by its name, or of a size such as 8GB.

    Raises:
        UserError: it is neither.
    """
    key = text.strip().lower().replace(" ", "-").replace("_", "-")
    if name == "--gpu" and key in GPUS:
        return GPUS[key] * GIGABYTE
    found = re.fullmatch(r"(\d+\.?\d*)-?([gm]i?b)", key)
    if not found:
        cards = f", or one of {', '.join(GPUS)}" if name == "--gpu" else ""
        raise UserError(f"{name} {text}: expected a size such as 8GB{cards}.")
    return int(float(found[1]) * UNITS[found[2]])


# ---- command line ------------------------------------------------------------------------------------------


def show(found: Plan, console: Console) -> None:
    """Print the parts as a table and, for a card, the ways to run there."""
    settings = found.settings
    share = found.trainable_parameters / (found.parameters + found.trainable_parameters)
    how = f"batch {settings.micro_batch_size} x {settings.sequence_len:,} tokens, {settings.dtype}"
    table = Table(title=f"{settings.method} on {Path(settings.model).name}, {how}", title_justify="left")
    table.add_column("memory")
    either = {"with checkpointing": found.with_checkpointing, "without": found.without_checkpointing}
    for label in either:
        table.add_column(label, justify="right")
    parts = [memory.parts() | {"total": memory.total} for memory in either.values()]
    for name in parts[0]:
        table.add_row(
            name, *(_text(part[name]) for part in parts), end_section=name in ("workspace", "total")
        )
    console.print(table)
    console.print(
        f"{found.parameters:,} frozen parameters, {found.trainable_parameters:,} trained ({share:.2%}). The process "
        "itself, Python with its libraries, comes on top in main memory.",
        highlight=False,
    )
    if found.capacity is None:
        return
    table = Table(title=f"on a card with {_text(found.capacity)} for tensors", title_justify="left")
    table.add_column("way")
    for label in ("memory", "fits", "longest sequence"):
        table.add_column(label, justify="right")
    for way in found.choices:
        changed = dataclasses.replace(settings, **way.changes)
        label = f"{changed.method}, {'with' if changed.checkpointing else 'without'} checkpointing"
        table.add_row(label, _text(way.memory.total), "yes" if way.fits else "no", f"{way.longest:,} tokens")
    console.print(table)
    cheapest = found.cheapest
    if cheapest is None:
        console.print("Nothing fits, not even one short sequence.")
        return
    options = " ".join(map(_option, cheapest.changes, cheapest.changes.values()))
    console.print(
        f"Cheapest that fits: {options or 'the settings as they are'}, {_text(cheapest.memory.total)}.",
        highlight=False,
        soft_wrap=True,
    )


def _option(name: str, value) -> str:
    """How a setting is spelled on the command line."""
    if isinstance(value, bool):
        return option(name if value else f"no_{name}")
    return f"{option(name)} {value}"


def _text(size: int) -> str:
    return f"{size / GIGABYTE:,.2f} GB" if size >= GIGABYTE / 10 else f"{size / 10**6:,.1f} MB"


def command(
    gpu: Annotated[str | None, Option(help="A card to fit: its memory, such as 8GB, or its name.")] = None,
    reserve: Annotated[
        str, Option(help="What of the card is not for tensors: driver, libraries, gaps.")
    ] = "1GB",
    as_json: Annotated[bool, Option("--json", help="Print the plan as JSON; sizes are bytes.")] = False,
    **options,
) -> None:
    """Work out how much memory a training run takes, part by part, and what fits a card, without loading weights."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    found = plan(PlanSettings(**options), gpu, reserve)
    if as_json:
        sys.stdout.write(found.to_json())
    else:
        show(found, Console())


# One list of settings: the command's options are the fields of PlanSettings and those above.
_own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
_settings = inspect.signature(PlanSettings).parameters.values()
command.__signature__ = inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in (*_settings, *_own)])
command.__annotations__ = {p.name: p.annotation for p in (*_settings, *_own)}
