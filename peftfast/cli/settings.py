"""What `peftfast train` is told: one dataclass, whose fields are the command's options."""

# No `from __future__ import annotations`: typer reads the options off the annotations of TrainSettings.
import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from peftfast.cli.errors import MethodError, UserError
from peftfast.nn.embeddings import EMBEDDINGS
from peftfast.reference import FOURBIT_BLOCKSIZES, FOURBIT_CODEBOOKS

LORAS = ("lora", "qlora", "mixture")
PROMPTS = ("prefix", "prompt", "p-tuning")
METHODS = (*LORAS, "bottleneck", *PROMPTS, "full")
OBJECTIVES = ("fine-tune", "pretrain")
PRETRAINED = ("lora", "qlora", "full")  # the methods of --objective pretrain
BACKENDS = ("peftfast", "peft")
ROUTERS = ("freeze", "train")
PROFILE = "profile:"  # of --experts: what comes before the share
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# By Trainer's names.
BITSANDBYTES_OPTIMIZERS = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
)
OPTIMIZERS = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *BITSANDBYTES_OPTIMIZERS,
)
SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup")
FLASH = ("flash_attention_2", "flash_attention_3")
ATTENTION = ("eager", "sdpa", *FLASH, "flex_attention")  # by transformers' names
# How often the same is done, in steps and by the epoch.
FREQUENCIES = {"eval_steps": "evals_per_epoch", "save_steps": "saves_per_epoch"}
# Options by the argument of the configuration that they go to: FourBitConfig, MixtureLoraConfig, BottleneckConfig.
QUANTIZATION = {
    "quant_type": "quant_type",
    "blocksize": "blocksize",
    "nested": "double_quant",
    "embeddings": "embeddings",
}
MIXTURE = {"num_experts": "mixture_experts", "top_k": "mixture_top_k"}
BOTTLENECK = {
    "placement": "bottleneck_placement",
    "bottleneck_size": "bottleneck_size",
    "scaling": "bottleneck_scaling",
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
# The columns by which training data is known.
DATA_TYPES = {
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question": ("question", "answer"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
# The options that not every method has.
METHODS_WITH = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "experts", "router"), LORAS),
    "target_modules": (*LORAS, "bottleneck"),
    "router_aux_loss_coef": (*LORAS, "full"),
    **dict.fromkeys(QUANTIZATION.values(), ("qlora",)),
    **dict.fromkeys(MIXTURE.values(), ("mixture",)),
    **dict.fromkeys(BOTTLENECK.values(), ("bottleneck",)),
    "num_virtual_tokens": PROMPTS,
    "prompt_init_text": ("prompt",),
    "encoder_hidden_size": ("prefix", "p-tuning"),
}
# Usual ones; the fewer numbers a method trains, the more each has to move.
LEARNING_RATES = {
    **dict.fromkeys(LORAS, 2e-4),
    "bottleneck": 5e-4,
    "prefix": 1e-2,
    "prompt": 3e-2,
    "p-tuning": 3e-3,
    "full": 2e-5,
}
EMBEDDING_SHARE = 0.1  # of the learning rate, beside adapters


@dataclass(frozen=True)
class TrainSettings:
    """What a training run is told; each field is an option of `peftfast train`.

    Raises:
        UserError: a number or a choice is out of its range.
    """

    model: Annotated[str, Option(help="A model folder, or the name of a model on the hub.")]
    data: Annotated[
        Path,
        Option(
            help="Training data: a .jsonl, .json, .csv, .parquet or .txt file, a folder of them, or a data set of the "
            "hub, name or name:config."
        ),
    ]
    out: Annotated[Path, Option(help="The folder that receives the adapter; must not exist or be empty.")]
    method: Annotated[
        str,
        Option(
            help="lora; qlora: on a model in 4 bits; mixture: routed LoRAs; bottleneck: adapters; prefix, prompt, "
            "p-tuning: virtual tokens; full: every weight of the model."
        ),
    ] = "lora"
    objective: Annotated[
        str,
        Option(
            help="fine-tune; or pretrain on raw text: documents are joined, each closed by the end-of-sequence token, "
            "and cut into full blocks, and with adapters (lora, qlora) embeddings and output head are trained too."
        ),
    ] = "fine-tune"
    data_split: Annotated[
        str | None,
        Option(help="Of a folder or a data set of the hub: the split to train on; by default train."),
    ] = None
    data_type: Annotated[
        str | None,
        Option(
            help=", ".join(DATA_TYPES)
            + "; by default the first of which the columns are there: "
            + "; ".join(", ".join(columns) for columns in DATA_TYPES.values())
            + "."
        ),
    ] = None
    chat_template: Annotated[
        str | None,
        Option(help="In place of the tokenizer's own: a Jinja file, chatml or llama3. The result keeps it."),
    ] = None
    train_on_inputs: Annotated[
        bool,
        Option(
            "--train-on-inputs/--no-train-on-inputs",
            help="Loss on prompts too, and on all that is said, not on completions and the assistant alone.",
        ),
    ] = False
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
    bottleneck_placement: Annotated[
        str | None, Option(help="bottleneck: pfeiffer, the default, houlsby or parallel.")
    ] = None
    bottleneck_size: Annotated[
        int | None, Option(help="bottleneck: its features; by default a 16th of the model's.")
    ] = None
    bottleneck_scaling: Annotated[float | None, Option(help="bottleneck: factor; by default 1.")] = None
    num_virtual_tokens: Annotated[
        int | None, Option(help="prefix, prompt, p-tuning: virtual tokens; by default 20.")
    ] = None
    prompt_init_text: Annotated[
        str | None, Option(help="prompt: text to start from; by default tokens drawn from the vocabulary.")
    ] = None
    encoder_hidden_size: Annotated[
        int | None,
        Option(
            help="p-tuning: width of the prompt's encoder, by default the model's; prefix: of a projection of it, "
            "by default there is none."
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        Option(
            help="Peak of the schedule; by default that of the method: "
            + ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
            + "."
        ),
    ] = None
    embedding_learning_rate: Annotated[
        float | None,
        Option(
            help="pretrain: that of embeddings and output head; beside adapters a tenth of theirs by default "
            "(a half to a tenth is usual), with full the same."
        ),
    ] = None
    optimizer: Annotated[
        str,
        Option(
            help=f"By Trainer's name: {', '.join(OPTIMIZERS)}; those with bits in their name are bitsandbytes'."
        ),
    ] = "adamw_torch"
    lr_scheduler_type: Annotated[str, Option(help=f"{', '.join(SCHEDULERS)}.")] = "linear"
    warmup_ratio: Annotated[float, Option(help="Share of the steps to warm up in, in [0, 1).")] = 0.03
    warmup_steps: Annotated[int | None, Option(help="Steps to warm up in; overrides --warmup-ratio.")] = None
    weight_decay: Annotated[float, Option(help="Of what is trained, but for biases and norms.")] = 0.0
    max_grad_norm: Annotated[float, Option(help="Clip gradients to this norm; 0: do not.")] = 1.0
    gradient_checkpointing: Annotated[
        bool,
        Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Keep each layer's input alone and compute the rest again: less memory, more time.",
        ),
    ] = False
    activation_offloading: Annotated[
        bool,
        Option(
            "--activation-offloading/--no-activation-offloading",
            help="On a GPU: keep in main memory what goes from forward to backward, with --gradient-checkpointing the "
            "layers' inputs, without it all that is not computed again.",
        ),
    ] = False
    tiled_mlp: Annotated[
        bool,
        Option(
            "--tiled-mlp/--no-tiled-mlp",
            help="Run MLPs on 4096 tokens at a time, and again in backward: long sequences take far less memory.",
        ),
    ] = False
    epochs: Annotated[float, Option(help="Passes over the training data.")] = 3.0
    max_steps: Annotated[int | None, Option(help="Optimizer steps; overrides --epochs.")] = None
    micro_batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 8
    gradient_accumulation_steps: Annotated[int, Option(help="Forward passes per optimizer step.")] = 1
    sequence_len: Annotated[int, Option(help="Tokens per sequence, at most.")] = 1024
    sample_packing: Annotated[
        bool,
        Option(
            "--sample-packing/--no-sample-packing",
            help="Join examples to sequences of nearly --sequence-len tokens, in which none sees another.",
        ),
    ] = False
    dtype: Annotated[
        str,
        Option(help="Of the frozen model and its products, with full of the products alone: fp32 or bf16."),
    ] = "fp32"
    attn_implementation: Annotated[
        str | None,
        Option(help=f"By transformers' name: {', '.join(ATTENTION)}; by default the model's own choice."),
    ] = None
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
    eval_file: Annotated[Path | None, Option(help="Held-out data, as --data; overrides --eval-share.")] = None
    eval_split: Annotated[
        str | None, Option(help="The split to hold out: of --eval-file, or else of --data.")
    ] = None
    eval_share: Annotated[float, Option(help="Share of the data to hold out, in [0, 1).")] = 0.1
    max_eval_examples: Annotated[int, Option(help="Held-out examples to use, at most.")] = 500
    logging_steps: Annotated[
        int | None, Option(help="Steps from one entry of the log to the next; by default there are about 50.")
    ] = None
    eval_steps: Annotated[
        int | None,
        Option(help="Evaluate every so many steps too; by default before and after training alone."),
    ] = None
    evals_per_epoch: Annotated[
        int | None, Option(help="In place of --eval-steps: so often in every epoch, at equal distances.")
    ] = None
    save_steps: Annotated[
        int | None,
        Option(help="Steps from one checkpoint to the next, in OUT.checkpoints, which is gone at the end."),
    ] = None
    saves_per_epoch: Annotated[
        int | None, Option(help="In place of --save-steps: so often in every epoch, at equal distances.")
    ] = None
    resume: Annotated[
        bool,
        Option(
            "--resume",
            help="Go on with an interrupted run of the same --out, from its newest checkpoint; on more or fewer "
            "processes too, if --micro-batch-size times --gradient-accumulation-steps times processes stays the same.",
        ),
    ] = False
    report_to: Annotated[
        str,
        Option(help="Where Trainer sends the log too, such as tensorboard or wandb,mlflow; none: nowhere."),
    ] = "none"
    seed: Annotated[int, Option(help="Seed of everything random.")] = 0
    json: Annotated[Path | None, Option(help="Also write the result record to this file.")] = None
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the result of an earlier run.")] = False

    def __post_init__(self) -> None:
        for name, choices in {
            "method": METHODS,
            "objective": OBJECTIVES,
            "backend": BACKENDS,
            "router": ROUTERS,
            "dtype": DTYPES,
            "optimizer": OPTIMIZERS,
            "lr_scheduler_type": SCHEDULERS,
            "attn_implementation": (None, *ATTENTION),
            "quant_type": (None, *FOURBIT_CODEBOOKS),
            "blocksize": (None, *FOURBIT_BLOCKSIZES),
            "data_type": (None, *DATA_TYPES),
            "embeddings": (None, *EMBEDDINGS),
            "bottleneck_placement": (None, *PLACEMENTS),
        }.items():
            value = getattr(self, name)
            if value not in choices:
                names = ", ".join(str(choice) for choice in choices if choice is not None)
                raise UserError(f"{option(name)} is one of {names}, not {value!r}.")
        for name in self.given():
            methods = METHODS_WITH.get(name, METHODS)
            if self.method not in methods:
                raise UserError(
                    f"{option(name)} goes with --method {listed(methods)}, not with --method {self.method}."
                )
        for name, minimum in {
            "lora_r": 1,
            "mixture_experts": 2,
            "mixture_top_k": 1,
            "bottleneck_size": 1,
            "num_virtual_tokens": 1,
            "encoder_hidden_size": 1,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "sequence_len": 2,
            "max_steps": 1,
            "max_eval_examples": 1,
            "warmup_steps": 0,
            "logging_steps": 1,
            "eval_steps": 1,
            "evals_per_epoch": 1,
            "save_steps": 1,
            "saves_per_epoch": 1,
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"{option(name)} is at least {minimum}, not {value}.")
        for name in (
            *("lora_alpha", "learning_rate", "embedding_learning_rate", "epochs", "bottleneck_scaling"),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{option(name)} is a positive number, not {value}.")
        for name in ("lora_dropout", "eval_share", "warmup_ratio"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{option(name)} lies in [0, 1), not at {value}.")
        for name in ("router_aux_loss_coef", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"{option(name)} is a number of at least 0, not {value}.")
        if self.prompt_init_text is not None and not self.prompt_init_text.strip():
            raise UserError("--prompt-init-text is empty.")
        for steps, per_epoch in FREQUENCIES.items():
            if getattr(self, steps) and getattr(self, per_epoch):
                raise UserError(f"{option(steps)} and {option(per_epoch)} exclude each other.")
        if not (self.eval_file or self.eval_split or self.eval_share):
            for name in ("eval_steps", "evals_per_epoch"):
                if getattr(self, name):
                    raise UserError(
                        f"{option(name)} goes with held-out data, and --eval-share 0 holds out none."
                    )
        if self.attn_implementation in FLASH and self.dtype == "fp32":
            raise UserError(
                f"--attn-implementation {self.attn_implementation} computes in 16 bits: it goes with --dtype bf16."
            )
        if self.tiled_mlp and self.backend == "peft":
            raise UserError("--tiled-mlp goes with --backend peftfast.")
        if self.method == "prefix" and self.gradient_checkpointing and self.backend == "peft":
            raise MethodError(
                "PEFT cannot checkpoint a prefix: --method prefix with --gradient-checkpointing goes with "
                "--backend peftfast."
            )
        self._check_experts()
        self._check_objective()

    def _check_experts(self) -> None:
        if self.experts not in (None, "all", "none") and self.expert_share is None:
            raise UserError(
                f"--experts is all, none, or {PROFILE} and a share in (0, 1] such as {PROFILE}0.25, "
                f"not {self.experts!r}."
            )
        if self.method == "mixture" and self.experts not in (None, "none"):
            raise MethodError("--method mixture adapts linear layers alone: it goes with --experts none.")
        own = self.method in ("mixture", "bottleneck")
        if self.backend == "peft" and (own or self.expert_share is not None):
            what = f"--method {self.method}" if own else f"--experts {self.experts}"
            raise MethodError(f"PEFT has no such adapters: {what} goes with --backend peftfast.")

    def _check_objective(self) -> None:
        if self.objective != "pretrain":
            if self.embedding_learning_rate is not None:
                raise UserError("--embedding-learning-rate goes with --objective pretrain.")
            return
        if self.method not in PRETRAINED:
            raise UserError(
                f"--objective pretrain goes with --method {listed(PRETRAINED)}, not with --method {self.method}."
            )
        if self.sample_packing:
            raise UserError(
                "--sample-packing goes with --objective fine-tune: pretrain fills its blocks itself."
            )
        if self.embeddings is not None:
            raise UserError(
                f"--embeddings {self.embeddings}: --objective pretrain trains the embeddings, which stay dense."
            )

    @property
    def learning_rates(self) -> tuple[float, float]:
        """The peak learning rates of what the method trains, and of embeddings and output head."""
        rate = self.learning_rate or LEARNING_RATES[self.method]
        share = EMBEDDING_SHARE if self.method != "full" else 1
        return rate, self.embedding_learning_rate or share * rate

    @property
    def saves(self) -> bool:
        """Whether the run writes checkpoints."""
        return bool(self.save_steps or self.saves_per_epoch)

    @property
    def expert_share(self) -> float | None:
        """The share that --experts profile: names, None if it is something else."""
        text = self.experts or ""
        with contextlib.suppress(ValueError):
            share = float(text.removeprefix(PROFILE))
            if text.startswith(PROFILE) and 0 < share <= 1:
                return share
        return None

    def given(self) -> dict:
        """Return the settings that differ from their defaults."""
        values = {
            field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)
        }
        return {name: value for name, (value, default) in values.items() if value != default}

    def to_arguments(self) -> list[str]:
        """Return the settings that differ from their defaults as arguments of `peftfast train`."""
        arguments = []
        for name, value in self.given().items():
            if isinstance(value, bool):
                arguments.append(option(name if value else f"no_{name}"))
            else:
                arguments += [option(name), str(value)]
        return arguments


def option(name: str) -> str:
    """Return how a field is spelled on the command line."""
    return "--" + name.replace("_", "-")


def listed(choices: tuple[str, ...]) -> str:
    """Return choices as text: a, b or c."""
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))
