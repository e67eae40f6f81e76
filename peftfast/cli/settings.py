"""What `peftfast train` is told: one dataclass, whose fields are the command's options."""

# No `from __future__ import annotations`: typer reads the options off the annotations of TrainSettings.
import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from peftfast.cli.errors import UserError
from peftfast.reference import FOURBIT_BLOCKSIZES, FOURBIT_CODEBOOKS

METHODS = ("lora", "qlora", "mixture")
BACKENDS = ("peftfast", "peft")
ROUTERS = ("freeze", "train")
PROFILE = "profile:"  # of --experts: what comes before the share
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Options of --method qlora, by the argument of FourBitConfig, and of --method mixture, by that of MixtureLoraConfig.
QUANTIZATION = {"quant_type": "quant_type", "blocksize": "blocksize", "nested": "double_quant"}
MIXTURE = {"num_experts": "mixture_experts", "top_k": "mixture_top_k"}


@dataclass(frozen=True)
class TrainSettings:
    """What a training run is told; each field is an option of `peftfast train`.

    Raises:
        UserError: a number or a choice is out of its range.
    """

    model: Annotated[str, Option(help="A model folder, or the name of a model on the hub.")]
    data: Annotated[Path, Option(help="Training data: .jsonl or .txt.")]
    out: Annotated[Path, Option(help="The folder that receives the adapter; must not exist or be empty.")]
    method: Annotated[str, Option(help="lora; qlora: on a model in 4 bits; mixture: routed LoRAs.")] = "lora"
    backend: Annotated[str, Option(help="peftfast, or peft for PEFT's own forwards.")] = "peftfast"
    lora_r: Annotated[int, Option(help="Rank of the adapters.")] = 16
    lora_alpha: Annotated[float, Option(help="Adapters are scaled by lora_alpha / lora_r.")] = 32
    lora_dropout: Annotated[float, Option(help="Dropout on the adapters' input, in [0, 1).")] = 0.0
    target_modules: Annotated[str, Option(help="all-linear, or names: q_proj,v_proj.")] = "all-linear"
    experts: Annotated[
        str | None,
        Option(help="Experts to adapt: all, the default; none; profile:0.25 for the most used quarter."),
    ] = None
    router: Annotated[str, Option(help="Routers of a mixture of experts: freeze, or train.")] = "freeze"
    router_aux_loss_coef: Annotated[
        float | None,
        Option(help="Weight of the load-balancing loss; by default the model's, if experts or router train."),
    ] = None
    mixture_experts: Annotated[int | None, Option(help="mixture: LoRAs to a layer.")] = None
    mixture_top_k: Annotated[int | None, Option(help="mixture: LoRAs to a token.")] = None
    learning_rate: Annotated[float, Option(help="Peak of a linear schedule with 3 % warmup.")] = 2e-4
    epochs: Annotated[float, Option(help="Passes over the training data.")] = 3.0
    max_steps: Annotated[int | None, Option(help="Optimizer steps; overrides --epochs.")] = None
    micro_batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 8
    gradient_accumulation_steps: Annotated[int, Option(help="Forward passes per optimizer step.")] = 1
    sequence_len: Annotated[int, Option(help="Tokens per sequence, at most.")] = 1024
    dtype: Annotated[str, Option(help="Of the frozen model and its products: fp32 or bf16.")] = "fp32"
    quant_type: Annotated[str | None, Option(help="qlora: nf4, the default, or fp4.")] = None
    blocksize: Annotated[int | None, Option(help="qlora: weights that share a scale; by default 64.")] = None
    double_quant: Annotated[
        bool | None,
        Option("--double-quant/--no-double-quant", help="qlora: scales in 8 bits too; by default they are."),
    ] = None
    eval_file: Annotated[Path | None, Option(help="Held-out data; overrides --eval-share.")] = None
    eval_share: Annotated[float, Option(help="Share of the data to hold out, in [0, 1).")] = 0.1
    max_eval_examples: Annotated[int, Option(help="Held-out examples to use, at most.")] = 500
    seed: Annotated[int, Option(help="Seed of everything random.")] = 0
    json: Annotated[Path | None, Option(help="Also write the result record to this file.")] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the result of an earlier run.")] = False

    def __post_init__(self) -> None:
        for name, choices in {
            "method": METHODS,
            "backend": BACKENDS,
            "router": ROUTERS,
            "dtype": DTYPES,
            "quant_type": (None, *FOURBIT_CODEBOOKS),
            "blocksize": (None, *FOURBIT_BLOCKSIZES),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UserError(f"{option(name)} is one of {listed}, not {value!r}.")
        for method, names in {"qlora": QUANTIZATION.values(), "mixture": MIXTURE.values()}.items():
            for name in names:
                if self.method != method and getattr(self, name) is not None:
                    raise UserError(
                        f"{option(name)} goes with --method {method}, not with --method {self.method}."
                    )
        for name, minimum in {
            "lora_r": 1,
            "mixture_experts": 2,
            "mixture_top_k": 1,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "sequence_len": 2,
            "max_steps": 1,
            "max_eval_examples": 1,
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"{option(name)} is at least {minimum}, not {value}.")
        for name in ("lora_alpha", "learning_rate", "epochs"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{option(name)} is a positive number, not {value}.")
        for name in ("lora_dropout", "eval_share"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{option(name)} lies in [0, 1), not at {value}.")
        value = self.router_aux_loss_coef
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(f"--router-aux-loss-coef is a number of at least 0, not {value}.")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts not in (None, "all", "none") and self.expert_share is None:
            raise UserError(
                f"--experts is all, none, or {PROFILE} and a share in (0, 1] such as {PROFILE}0.25, "
                f"not {self.experts!r}."
            )
        if self.method == "mixture" and self.experts not in (None, "none"):
            raise UserError("--method mixture adapts linear layers alone: it goes with --experts none.")
        if self.backend == "peft" and (self.method == "mixture" or self.expert_share is not None):
            what = "--method mixture" if self.method == "mixture" else f"--experts {self.experts}"
            raise UserError(f"PEFT has no such adapters: {what} goes with --backend peftfast.")

    @property
    def expert_share(self) -> float | None:
        """The share that --experts profile: names, None if it is something else."""
        text = self.experts or ""
        with contextlib.suppress(ValueError):
            share = float(text.removeprefix(PROFILE))
            if text.startswith(PROFILE) and 0 < share <= 1:
                return share
        return None

    def to_arguments(self) -> list[str]:
        """Return the settings that differ from their defaults as arguments of `peftfast train`."""
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, bool):
                arguments.append(option(field.name if value else f"no_{field.name}"))
            else:
                arguments += [option(field.name), str(value)]
        return arguments


def option(name: str) -> str:
    """Return how a field is spelled on the command line."""
    return "--" + name.replace("_", "-")
