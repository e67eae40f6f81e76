"""The loss of a language model from its last hidden states, without the logits: they exist a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops import eightbit, fourbit, lora
from peftfast.ops.devices import device_type
from peftfast.ops.eightbit import EightBitWeight
from peftfast.ops.fourbit import FourBitWeight, parts_of
from peftfast.ops.lora import (
    DTYPES,
    KERNEL_DEVICES,
    check_adapters,
    check_bias,
    check_number,
    check_tensors,
    low_rank,
    name_of,
)
from peftfast.reference import as_list

# Bytes of logits that exist at a time. Each chunk packs the head's weight again: in fp32, 64 MiB of a
# vocabulary of 128 256 take a tenth more time on the CPU than 96. With 112, 2048 tokens need 4.3 % of eager's memory.
CHUNK_BYTES, CHUNK_BYTES_CPU = 256 << 20, 112 << 20
# Rows of logits that are widened at a time, where the head's adapters are added to them.
BLOCK_BYTES_CPU = 2 << 20
# Columns of the vocabulary whose weight gradient is added to at a time: their logits are widened for it.
PANEL = 8192

CROSS_ENTROPY = torch.ops.peftfast.cross_entropy.default
LINEAR_INTO = torch.ops.peftfast.linear_into.default


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | FourBitWeight | EightBitWeight,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    lora_A: Tensor | Sequence[Tensor] = (),
    lora_B: Tensor | Sequence[Tensor] = (),
    scaling: float | Tensor | Sequence[float | Tensor] = (),
    dropout: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The cross-entropy of softcap(logit_scale * (hidden W^T + bias + low-rank terms)) against `labels`.

    The low-rank terms are those of `peftfast.ops.lora_linear`; softcap(z) is `softcap` * tanh(z / `softcap`). Rows that
    are ignored cost nothing. The gradients are computed with the loss, some rows at a time, and kept until backward:
    of the hidden states, the bias and the adapters, and of a dense weight that is trained (in fp32 until the last row).
    The softmax is in fp32 (float64 for float64). Nothing of the size of the logits is kept or ever allocated.

    Args:
        hidden: [..., H]; float64, float32, bfloat16 or float16.
        weight: [V, H] in the dtype of hidden, trained or frozen; or in 4 or 8 bits, and
            frozen.
        labels: int64 [...], each in [0, V) or `ignore_index`. They are not shifted.
        bias: [V] in the dtype of hidden or float32.
        lora_A, lora_B, scaling, dropout, seed: of adapters on the head, as in `lora_linear`.
        reduction: "mean" over the rows that are not ignored (NaN if there is none), "sum", or "none".
        num_items_in_batch: the loss is the sum divided by it, whatever `reduction` says, as in transformers'
            ForCausalLMLoss.
        softcap: above 0, as Gemma 2 has it; None: none.
        compute_dtype: of the products with a 4-bit weight, as in `fourbit_linear`.
    Returns:
        One value, or [...] for "none"; in float32, or float64 for float64 hidden states. Under autocast, hidden states
        and weight are cast as `torch.nn.functional.linear` casts them.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    scaling, dropout = as_list(scaling, len(lora_A)), as_list(dropout, len(lora_A))
    _check(
        hidden, weight, labels, bias, lora_A, lora_B, scaling, dropout, seed, ignore_index, reduction,
        num_items_in_batch, logit_scale, softcap, compute_dtype,
    )  # fmt: skip
    return call(
        hidden, weight, labels, bias, lora_A, lora_B, scaling, dropout, seed, ignore_index, reduction,
        num_items_in_batch, logit_scale, softcap, compute_dtype,
    )  # fmt: skip


@torch.compiler.disable  # how many rows are not ignored depends on the data
def call(
    hidden, weight, labels, bias, lora_A, lora_B, scaling, dropout, seed=None, ignore_index=-100, reduction="mean",
    num_items_in_batch=None, logit_scale=1.0, softcap=None, compute_dtype=None,
) -> Tensor:  # fmt: skip
    """`linear_cross_entropy` for a caller whose arguments are lists and right: only labels are checked."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
        if isinstance(weight, Tensor):
            weight = weight.to(hidden.dtype)
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(hidden.dtype)
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    with torch.autocast(device, enabled=False):
        u, B = low_rank(rows, lora_A, lora_B, scaling, dropout, seed)
        is_dense = isinstance(weight, Tensor)
        vocabulary = weight.shape[0]
        kept = (targets != ignore_index).nonzero().squeeze(1)
        if len(kept):
            least, most = targets[kept].aminmax()
            if least < 0 or most >= vocabulary:
                raise ValueError(
                    f"labels holds {int(least)} to {int(most)}, expected {ignore_index} or values from 0 to "
                    f"{vocabulary - 1}."
                )
        divisor = num_items_in_batch
        if divisor is None and reduction == "mean":
            divisor = len(kept)
        elif isinstance(divisor, Tensor):
            divisor = divisor.detach().reshape(()).to(hidden.device, _accumulator(hidden.dtype))
        per_row = divisor is None and reduction == "none"
        task = _Task(
            kept, targets[kept], None if is_dense else weight, compute_dtype, logit_scale, softcap, divisor,
            per_row, at_once=torch.is_grad_enabled() and not per_row,
        )  # fmt: skip
        loss = _LinearCrossEntropy.apply(task, rows, weight if is_dense else None, bias, u, B)
        return loss.view(labels.shape) if per_row else loss


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class _Task:
    """What of a call has no gradient."""

    kept: Tensor  # int64 [rows], those that are not ignored
    targets: Tensor  # int64 [rows], their labels
    quantized: FourBitWeight | EightBitWeight | None  # in the place of a dense weight
    compute_dtype: torch.dtype | None
    logit_scale: float
    softcap: float | None
    divisor: int | Tensor | None  # of the sum
    per_row: bool
    at_once: bool  # gradients with the loss


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss, and the gradients with it.

    Until backward they are those of the loss times a power of two, so that what a large batch makes small does not
    vanish in fp16; multiplying by the rest is exact. A loss per row needs to know the rows' own gradients: there all is
    computed in backward, and so are gradients that a first backward has used up.
    """

    @staticmethod
    def forward(ctx, task: _Task, hidden, weight, bias, low_rank, B):
        ctx.task, ctx.gradients = task, None
        ctx.save_for_backward(hidden, weight, bias, low_rank, B)
        wanted = [want and task.at_once for want in ctx.needs_input_grad[1:]]
        losses, gradients = _run(task, hidden, weight, bias, low_rank, B, _mantissa(task.divisor), wanted)
        if any(wanted):
            ctx.gradients = gradients
        if task.per_row:
            return losses.new_zeros(len(hidden)).index_copy_(0, task.kept, losses)
        return losses.sum() if task.divisor is None else losses.sum() / task.divisor

    @staticmethod
    def backward(ctx, grad_loss):
        task, gradients, inputs = ctx.task, ctx.gradients, ctx.saved_tensors
        ctx.gradients = None  # they are scaled in place, and handed out
        with torch.no_grad():
            if gradients is None:
                weights = grad_loss[task.kept].unsqueeze(1) if task.per_row else _mantissa(task.divisor)
                _, gradients = _run(task, *inputs, weights, ctx.needs_input_grad[1:])
            scale = 1.0 if task.per_row else grad_loss * _power(task.divisor)
            gradients = [
                None if gradient is None else gradient.mul_(scale).to(tensor.dtype)
                for gradient, tensor in zip(gradients, inputs)
            ]
        if torch.is_grad_enabled():
            gradients = [
                None if gradient is None else _Refuse.apply(gradient, grad_loss, *inputs)
                for gradient in gradients
            ]
        return None, *gradients


class _Refuse(torch.autograd.Function):
    """Deliberate: training needs no second derivative, and one that is missing must not be taken for zero."""

    @staticmethod
    def forward(ctx, gradient, *depends_on):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grads):
        # Deliberate: training needs none, and the gradients that were computed with the loss know nothing of it.
        raise NotImplementedError(
            "peftfast.linear_cross_entropy has no second derivative; compute it with peftfast disabled."
        )


def _mantissa(divisor: int | Tensor | None) -> float | Tensor:
    """1 / divisor without its power of two."""
    if isinstance(divisor, Tensor):
        return torch.frexp(1 / divisor).mantissa
    return math.frexp(1 / divisor)[0] if divisor else 1.0


def _power(divisor: int | Tensor | None) -> float | Tensor:
    """The power of two in 1 / divisor."""
    if isinstance(divisor, Tensor):
        inverse = 1 / divisor
        return torch.ldexp(torch.ones_like(inverse), torch.frexp(inverse).exponent)
    return 2.0 ** math.frexp(1 / divisor)[1] if divisor else 1.0


def _run(task: _Task, hidden, weight, bias, low_rank, B, row_weights, wanted) -> tuple[Tensor, list]:
    """The loss of each row that is kept, and the gradients of the sum of them, each times its weight.

    Args:
        row_weights: one for all rows, or [rows, 1].
        wanted: for hidden, weight, bias, low_rank and B.
    """
    want_hidden, want_weight, want_bias, want_low_rank, want_B = wanted
    wide = _accumulator(hidden.dtype)
    operand = weight if task.quantized is None else task.quantized
    vocabulary, count = operand.shape[0], len(task.kept)
    project, project_back = _products(operand, bias, hidden, task.compute_dtype)
    if B is not None:
        expand, expand_back = _products(B, None, low_rank, None)
    everything = count == len(hidden)
    losses = hidden.new_empty(count, dtype=wide)
    grad_hidden = (torch.empty_like if everything else torch.zeros_like)(hidden) if want_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
    grad_bias = hidden.new_zeros(vocabulary, dtype=wide) if want_bias else None
    grad_low_rank = torch.zeros_like(low_rank) if want_low_rank else None
    grad_B = torch.zeros_like(B) if want_B else None

    on_cpu = device_type(hidden) == "cpu"
    budget = CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES
    chunk = max(1, budget // (vocabulary * hidden.element_size()))
    # The kernel widens what it reads; what adds to the logits needs them wide.
    in_place = _has_kernel(hidden) and B is None
    block = max(1, BLOCK_BYTES_CPU // (vocabulary * wide.itemsize)) if on_cpu and not in_place else chunk
    if not torch.is_tensor(row_weights):
        row_weights = losses.new_full((), row_weights)
    for start in range(0, count, chunk):
        rows = task.kept[start : start + chunk]
        x = hidden[start : start + chunk] if everything else hidden[rows]
        z = project(x)  # the logits; then, in their place, their gradient
        for first in range(0, len(rows), block):
            here = slice(first, first + block)
            among_kept = slice(start + first, start + min(first + block, len(rows)))
            logits = z[here] if in_place else z[here].to(wide)  # a view too where z is as wide
            if B is not None:
                u = low_rank[rows[here]]
                logits += expand(u)
            weights = row_weights[among_kept] if row_weights.dim() else row_weights
            losses[among_kept] = _softmax(logits, task, task.targets[among_kept], weights, any(wanted))
            if want_low_rank:
                grad_low_rank[rows[here]] = expand_back(logits, u)
            if want_B:
                grad_B.addmm_(logits.T, u)
            if want_bias:
                grad_bias += logits.sum(0, dtype=wide)
            if logits.dtype != z.dtype:
                z[here] = logits
        if want_weight:
            for first in range(0, vocabulary, PANEL):
                panel = slice(first, first + PANEL)
                grad_weight[panel].addmm_(z[:, panel].T.to(wide), x.to(wide))
        if want_hidden:
            grad_x = project_back(z, x)
            if everything:
                grad_hidden[start : start + chunk] = grad_x
            else:
                grad_hidden[rows] = grad_x
        del z, logits  # before the next chunk's are allocated
    return losses, [grad_hidden, grad_weight, grad_bias, grad_low_rank, grad_B]


def _has_kernel(logits: Tensor) -> bool:
    return logits.device in KERNEL_DEVICES and logits.dtype in DTYPES


def _softmax(logits: Tensor, task: _Task, targets: Tensor, weights: Tensor, want_gradient: bool) -> Tensor:
    """The losses [rows] of `logits` [rows, V], in the place of which comes their gradient, times the rows' weights."""
    if _has_kernel(logits):
        cap = task.softcap or 0.0
        return CROSS_ENTROPY(logits, targets, weights.view(-1), task.logit_scale, cap, want_gradient)
    targets, slope = targets.unsqueeze(1), None
    if task.softcap is not None:
        logits.mul_(task.logit_scale / task.softcap).tanh_()
        if want_gradient:
            slope = 1 - logits.square()
        logits.mul_(task.softcap)
    elif task.logit_scale != 1:
        logits.mul_(task.logit_scale)
    hit = logits.gather(1, targets)
    largest = logits.amax(1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(1, keepdim=True)
    if want_gradient:
        weights = weights * task.logit_scale
        logits.mul_(weights / total)
        logits.scatter_add_(1, targets, torch.zeros_like(hit) - weights)
        if slope is not None:
            logits.mul_(slope)
    return (total.log_() + largest - hit).squeeze(1)


def _products(
    weight: Tensor | FourBitWeight | EightBitWeight,
    bias: Tensor | None,
    like: Tensor,
    compute_dtype: torch.dtype | None,
) -> tuple[Callable, Callable]:
    """x -> x W^T + bias, and (grad_y, x) -> grad_y W; for x like `like`, and below autograd.

    What the first returns is overwritten by its next call.
    """
    if isinstance(weight, EightBitWeight):
        return (
            lambda x: eightbit.project(x, weight, bias),
            lambda grad_y, x: eightbit.project_back(grad_y, weight),
        )
    if isinstance(weight, FourBitWeight):
        if like.device in KERNEL_DEVICES and like.dtype in DTYPES:
            parts, compute = parts_of(weight), DTYPES.index(compute_dtype or like.dtype)

            def project(x):
                return fourbit.FORWARD(x, *parts, weight.shape[0], bias, [], [], [], [], None, compute)[0]

            def project_back(grad_y, x):
                none = x.new_empty(len(x), 0, dtype=torch.float32)
                return fourbit.BACKWARD(
                    grad_y, x, *parts, [], [], none, [], [], None, compute, True, [], []
                )[0]  # fmt: skip

            return project, project_back
        weight = reference.fourbit_dequantize(weight, compute_dtype or like.dtype).to(like.dtype)
    if like.device not in KERNEL_DEVICES or like.dtype not in DTYPES:
        bias = None if bias is None else bias.to(like.dtype)
        return lambda x: F.linear(x, weight, bias), lambda grad_y, x: grad_y @ weight

    # Of all results, one after another: new pages would cost a few percent of the product's time.
    memory = like.new_empty(0, weight.shape[0])

    def project(x):
        nonlocal memory
        if len(memory) < len(x):
            memory = x.new_empty(len(x), weight.shape[0])
        y = memory[: len(x)]
        LINEAR_INTO(y, x, weight, bias)
        return y

    def project_back(grad_y, x):
        none = x.new_empty(len(x), 0, dtype=torch.float32)
        return lora.BACKWARD(grad_y, x, weight, [], [], none, [], [], None, False, True, [], [])[0]

    return project, project_back


def _check(
    hidden, weight, labels, bias, lora_A, lora_B, scaling, dropout, seed, ignore_index, reduction,
    num_items_in_batch, logit_scale, softcap, compute_dtype,
) -> None:  # fmt: skip
    """One sentence for each argument that is wrong."""
    is_dense, held = False, weight
    if isinstance(weight, FourBitWeight):
        fourbit.check_weight(weight)
        held = weight.packed
    elif isinstance(weight, EightBitWeight):
        eightbit.check_weight(weight)
        held = weight.codes
    else:
        is_dense = True
    tensors = {"x": hidden, "weight": held, "bias": bias, "seed": seed}
    for name, value in {"hidden": hidden, "weight": tensors["weight"], "labels": labels}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, but hidden is on {hidden.device}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {name_of(value.layout)}.")
    check_tensors(tensors, lora_A, lora_B)
    dtypes = (torch.float64, *DTYPES)
    if hidden.dtype not in dtypes:
        raise TypeError(f"hidden must be float64, float32, bfloat16 or float16, got {name_of(hidden.dtype)}.")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    if is_dense and weight.dtype != hidden.dtype and not (autocast and weight.dtype in dtypes):
        raise TypeError(
            f"weight is {name_of(weight.dtype)}, but hidden is {name_of(hidden.dtype)}: they must be the same."
        )
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise TypeError(f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}.")
    if len(weight.shape) != 2:
        raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}.")
    vocabulary, inputs = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != inputs:
        raise ValueError(f"hidden has shape {list(hidden.shape)}, but weight has {inputs} input features.")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {name_of(labels.dtype)}.")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels has shape {list(labels.shape)}, expected {list(hidden.shape[:-1])}.")
    check_bias(bias, vocabulary, (hidden.dtype, tensors["weight"].dtype, torch.float32))
    check_adapters(hidden, lora_A, lora_B, scaling, dropout, seed, vocabulary, inputs)
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}.")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(f"num_items_in_batch has {num_items_in_batch.numel()} elements, expected one.")
    elif num_items_in_batch is not None:
        check_number(num_items_in_batch, "num_items_in_batch")
    check_number(logit_scale, "logit_scale")
    if softcap is not None:
        check_number(softcap, "softcap")
        if not softcap > 0:
            raise ValueError(f"softcap is {softcap}, expected a number above 0 or None.")


@torch.library.register_fake("peftfast::linear_into")
def _(y, x, weight, bias):
    return None


@torch.library.register_fake("peftfast::cross_entropy")
def _(logits, targets, weights, scale, cap, want_gradient):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
