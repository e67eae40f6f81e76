"""Which experts of a model its inputs are routed to, and the choice of experts to adapt that follows from it."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peftfast.integrations.experts import holds_experts

FORMAT = "peftfast.expert_profile"


@dataclass(eq=False)
class ExpertProfile:
    """How much of what a model has seen each of its experts was given.

    Layers go by the name of the experts' module in the base model, e.g. "model.layers.0.mlp.experts". The choices
    below are what `ExpertLoraConfig.experts` takes: the chosen experts of each layer, most-routed first (of two alike,
    the one of lower index).

    Attributes:
        tokens: int64 [experts] of each layer, the tokens routed to each expert.
        gate_mass: float64 [experts] of each layer, the sum of those tokens' routing weights.
    """

    tokens: dict[str, Tensor]
    gate_mass: dict[str, Tensor]

    def top_k(self, k: int) -> dict[str, list[int]]:
        """The k experts of each layer that most tokens were routed to.

        Raises:
            ValueError: k is not from 1 to the number of experts, or no token was seen.
        """
        for name, tokens in self.tokens.items():
            if not 1 <= k <= tokens.numel():
                raise ValueError(
                    f"k is {k}, expected 1 to {tokens.numel()}, the number of experts of {name}."
                )
        return {name: order[:k].tolist() for name, (order, _) in self._ranked("tokens").items()}

    def top_share(self, share: float) -> dict[str, list[int]]:
        """That share of the experts of each layer, at least one: those that most tokens were routed to.

        A quarter is the choice of MoE-Sieve (arXiv 2603.24044).

        Raises:
            ValueError: share is not within (0, 1], or no token was seen.
        """
        _check_share("share", share)
        return {
            name: order[: max(1, round(share * order.numel()))].tolist()
            for name, (order, _) in self._ranked("tokens").items()
        }

    def cumulative_mass(
        self, p: float, by: Literal["gate_mass", "tokens"] = "gate_mass"
    ) -> dict[str, list[int]]:
        """The smallest set of experts of each layer whose part of all gate mass, or of all tokens, reaches p.

        The choice of ESFT (Wang et al., arXiv 2407.01906), there with p = 0.1 of the gate mass or 0.2 of the tokens.

        Raises:
            ValueError: p is not within (0, 1], `by` is another word, or no token was seen.
        """
        _check_share("p", p)
        if by not in ("gate_mass", "tokens"):
            raise ValueError(f"by is {by!r}, expected 'gate_mass' or 'tokens'.")
        chosen = {}
        for name, (order, amounts) in self._ranked(by).items():
            reached = amounts.cumsum(0) / amounts.sum()
            count = int((reached < p * (1 - 1e-12)).sum()) + 1  # a sum that is p but for rounding reaches it
            chosen[name] = order[:count].tolist()
        return chosen

    def _ranked(self, by: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each layer, the experts by descending amount, and those amounts."""
        ranked = {}
        for name, amounts in getattr(self, by).items():
            amounts, order = amounts.double().sort(descending=True, stable=True)
            if not amounts.sum() > 0:
                raise ValueError(f"No token was routed to the experts of {name} yet.")
            ranked[name] = order, amounts
        return ranked

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        layers = {
            name: {"tokens": self.tokens[name].tolist(), "gate_mass": self.gate_mass[name].tolist()}
            for name in self.tokens
        }
        Path(path).write_text(json.dumps({"format": FORMAT, "layers": layers}, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> ExpertProfile:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not an expert profile, or a layer of it is not complete.
        """
        try:
            content = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not an expert profile: its format is not {FORMAT!r}.")
        tokens, gate_mass = {}, {}
        for name, layer in content.get("layers", {}).items():
            try:
                tokens[name] = torch.tensor(layer["tokens"], dtype=torch.int64)
                gate_mass[name] = torch.tensor(layer["gate_mass"], dtype=torch.float64)
            except (KeyError, TypeError, ValueError, RuntimeError):
                raise ValueError(f"{path}: {name} has no usable tokens and gate_mass.") from None
            if tokens[name].dim() != 1 or tokens[name].shape != gate_mass[name].shape:
                raise ValueError(f"{path}: tokens and gate_mass of {name} are not one number per expert.")
        return cls(tokens, gate_mass)

    def plot(self, path: str | Path) -> None:
        """Draws layers against experts, coloured by the share of the layer's routed tokens, as an image file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        layers, experts = len(self.tokens), max(tokens.numel() for tokens in self.tokens.values())
        shares = torch.full((layers, experts), math.nan, dtype=torch.float64)
        for row, tokens in enumerate(self.tokens.values()):
            shares[row, : tokens.numel()] = tokens / tokens.sum().clamp(min=1)
        width, height = min(3 + 0.14 * experts, 20), min(1.8 + 0.2 * layers, 14)
        figure = Figure(figsize=(max(width, 5), max(height, 2.8)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        image = axes.imshow(
            100 * shares.numpy(), aspect="auto", interpolation="nearest", cmap="magma", vmin=0
        )
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        step = max(1, math.ceil(layers / 32))
        axes.set_yticks(range(0, layers, step), [_short(name) for name in self.tokens][::step])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"Tokens by expert (an even share is {100 / experts:.3g} %)", fontsize=10)
        figure.colorbar(image, label="share of routed tokens (%)")
        figure.savefig(path, dpi=150)

    def __str__(self) -> str:
        """A line for each layer: how many of its experts were used, and the largest load over the mean one."""
        width = max(map(len, ["layer", *self.tokens]))
        lines = [f"{'layer':{width}}  experts  used  max/mean load"]
        for name, tokens in self.tokens.items():
            mean = tokens.double().mean()
            load = f"{tokens.max() / mean:.2f}" if mean > 0 else "-"
            lines.append(f"{name:{width}}  {tokens.numel():7}  {int((tokens > 0).sum()):4}  {load:>13}")
        return "\n".join(lines)


def profile_experts(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> ExpertProfile:
    """Runs `batches` through `model` and counts where their tokens are routed.

    The model runs in eval mode without gradients, whatever its experts implementation and whether or not it has
    adapters; its modes are put back. Tokens whose place in a 2-dimensional attention_mask is 0 do not count.

    Args:
        model: with experts that transformers dispatches (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V3, gpt-oss, ...).
        batches: of what the model takes: keyword arguments (a dict, a BatchEncoding), or a tensor of input_ids. Tensors
            are moved to the model's device.
    Raises:
        ValueError: the model has no such experts, or there are no batches.
        TypeError: a batch is something else.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    count = 0
    with recording(model) as profile, torch.no_grad():
        model.eval()
        try:
            for count, batch in enumerate(batches, 1):  # noqa: B007
                if isinstance(batch, Tensor):
                    batch = {"input_ids": batch}
                elif not isinstance(batch, Mapping):
                    raise TypeError(
                        f"batches holds a {type(batch).__name__}, expected dicts of the model's arguments or tensors "
                        "of input_ids."
                    )
                model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
        finally:
            for module, training in modes:
                module.training = training
    if count == 0:
        raise ValueError("batches is empty.")
    return profile


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[ExpertProfile]:
    """A profile that counts in every forward of `model` within the context, training included.

    What gradient checkpointing computes again in backward does not count again, and neither do tokens whose place in a
    2-dimensional attention_mask given to the model is 0. Which path the layers run stays as it is. The model must
    not be wrapped or unwrapped meanwhile.

    Raises:
        ValueError: the model has no experts that transformers dispatches.
    """
    base = _base_of(model)
    found = experts_within(base)
    if not found:
        raise ValueError("model has no experts that transformers dispatches.")
    sizes = {name: module.num_experts for name, (_, module) in found.items()}
    profile = ExpertProfile(
        {name: torch.zeros(size, dtype=torch.int64) for name, size in sizes.items()},
        {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()},
    )
    mask = None

    def see_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal mask
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask", kwargs.get("attention_mask"))

    def forget_mask(*_) -> None:
        nonlocal mask
        mask = None

    def count(name: str, module: nn.Module, _, args: tuple, kwargs: dict) -> None:
        if torch._C._current_graph_task_id() != -1:  # within backward: computed again
            return
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        _, _, index, weights = list(given.values())[:4]
        index, weights = index.detach(), weights.detach()
        counted = _counted(mask, index.shape[0])
        if counted is not None:
            index, weights = index[counted.to(index.device)], weights[counted.to(weights.device)]
        inside = index < module.num_experts
        index, weights = index[inside].cpu(), weights[inside].double().cpu()
        profile.tokens[name] += torch.bincount(index, minlength=module.num_experts)
        profile.gate_mass[name] += torch.bincount(index, weights, minlength=module.num_experts)

    handles = [
        base.register_forward_pre_hook(see_mask, with_kwargs=True),
        base.register_forward_hook(forget_mask, always_call=True),
    ]
    # On what is around the experts: a hook below an adapter would keep it off the fast path.
    for name, (outermost, module) in found.items():
        handles.append(outermost.register_forward_pre_hook(partial(count, name, module), with_kwargs=True))
    try:
        yield profile
    finally:
        for handle in handles:
            handle.remove()


def experts_within(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """By name, each experts module of `model`: what PEFT has put around it (else itself), and itself."""
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        if name.startswith(tuple(f"{outer}." for outer in found)):
            continue
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
        inner = inner.get_base_layer() if isinstance(inner, BaseTunerLayer) else inner
        if holds_experts(inner):
            found[name] = module, inner
    return found


def _base_of(model: nn.Module) -> nn.Module:
    """The model that PEFT, torch.compile and data parallelism are around: names in it have no prefixes."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif isinstance(model, BaseTuner):
            model = model.model
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model._orig_mod
        else:
            return model


def _counted(mask: Tensor | None, tokens: int) -> Tensor | None:
    """Which of the rows of a batch the mask keeps, bool [tokens]; None for all."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] == 0:
        return None
    length, rest = divmod(tokens, mask.shape[0])
    if rest or not 0 < length <= mask.shape[1]:
        return None
    return mask[:, -length:].reshape(-1) != 0  # the last of them: in generation the mask covers the past too


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, expected a number above 0 and up to 1.")


def _short(name: str) -> str:
    """A layer's number, where its name has one."""
    return next((part for part in name.split(".") if part.isdigit()), name)
