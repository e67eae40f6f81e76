"""Linear layers over groups of rows, each with its own weight and adapter: experts, subsets of them, mixed batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.devices import KERNEL_DEVICES, host_reads
from peftfast.ops.fourbit import check_weight, parts_of
from peftfast.ops.lora import (
    DTYPES,
    check_dropout,
    check_scaling,
    check_seed,
    check_tensors,
    name_of,
    refuse_second_derivative,
)  # fmt: skip
from peftfast.ops.rowwise import NUMBERS, SWIGLU, WEIGHTED_SWIGLU, WEIGHTED_SWIGLU_BACKWARD, call_swiglu
from peftfast.reference import FourBitWeight

FORWARD = torch.ops.peftfast.grouped_linear.default
BACKWARD = torch.ops.peftfast.grouped_linear_backward.default
COMBINE = torch.ops.peftfast.moe_combine.default
COMBINE_BACKWARD = torch.ops.peftfast.moe_combine_backward.default
LARGE_BYTES = 32 * 2**20  # of a tensor: here less memory is worth more than time


def grouped_linear(
    x: Tensor,
    weight: Tensor | FourBitWeight | None,
    offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float | Tensor = 1.0,
    *,
    experts: Tensor | None = None,
    slots: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    transposed: bool = False,
    seed: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[i] = x[i] W[e]^T + bias[e] + scaling * dropout(x[i]) A[s]^T B[s]^T, where row i's group says e and s.

    One operator serves LoRA on every expert of a mixture of experts, on a chosen few (a group's slot is -1 where its
    expert has no adapter), a routed mixture of adapters on one weight, and batches that mix adapters. Only the weights
    and adapters of groups that have rows are touched, in both directions; `weight` gets no gradient.

    Args:
        x: [M, K], float32, bfloat16 or float16; rows of a group follow one another. With `rows`: [T, K].
        weight: [experts, N, K] in the dtype of x, frozen; [experts, K, N] when `transposed`; or a FourBitWeight
            of that shape. None: no such term, y is what the adapters give.
        offsets: int64 [groups + 1], ascending, within [0, M]: group g is the rows offsets[g] to offsets[g + 1]. Rows
            of no group come out as zeros. On a GPU the values of offsets, experts, slots and rows are not checked,
            since that would mean to wait for it.
        lora_A: [slots, r, K] in the dtype of x or float32; None: no adapters.
        lora_B: [slots, N, r] in the dtype of lora_A, in any strides.
        scaling: a number or a one-element tensor.
        experts: int64 [groups], the weight of each group; None: group g has weight g.
        slots: int64 [groups], the adapter of each group, negative for none; None: group g has adapter g.
        rows: int64 [M], row i of the product is x[rows[i]]; None: i. Their gradients add up.
        bias: [experts, N] in the dtype of x or float32.
        dropout: probability in [0, 1) that an element is dropped on its way into lora_A.
        seed, compute_dtype: as in `lora_linear` and `fourbit_linear`.
    Returns:
        [M, N] in the dtype of x, rounded once.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    _check(
        x, weight, offsets, lora_A, lora_B, scaling, experts, slots, rows, bias, dropout, transposed, seed,
        compute_dtype,
    )  # fmt: skip
    groups = offsets.numel() - 1
    experts = torch.arange(groups, device=x.device) if experts is None else experts.contiguous()
    if slots is not None:
        slots = slots.contiguous()
    elif lora_A is not None:
        slots = torch.arange(groups, device=x.device)
    return call(
        x, weight, offsets.contiguous(), experts, slots, lora_A, lora_B, scaling,
        rows, bias, dropout, transposed, seed, compute_dtype,
    )  # fmt: skip


def call(
    x, weight, offsets, experts, slots, lora_A, lora_B, scaling,
    rows=None, bias=None, dropout=0.0, transposed=False, seed=None, compute_dtype=None, places=None,
) -> Tensor:  # fmt: skip
    """`grouped_linear` for a caller whose arguments are right: no checks but those that guard memory.

    places: int64 [T, times], where each row of x is among `rows`, when each is there as often.
    """
    x, weight, slots, lora_B, scaling = _as_computed(x, weight, experts, slots, lora_B, scaling)
    if x.device not in KERNEL_DEVICES:
        return reference.grouped_linear(
            x, weight, offsets, lora_A, lora_B, scaling, experts=experts, slots=slots, rows=rows,
            bias=bias, dropout=dropout, transposed=transposed, seed=seed, compute_dtype=compute_dtype,
        )  # fmt: skip
    base, experts, settings = _settings(
        x, weight, experts, lora_A, lora_B, scaling, dropout, transposed, seed, compute_dtype
    )
    return _GroupedLinear.apply(
        x, lora_A, lora_B, bias, *base, offsets, experts, slots, rows, places, *settings
    )


def call_combined(
    x, weights, places, rows, weight, offsets, experts, slots, lora_A, lora_B, scaling,
    bias=None, dropout=0.0, transposed=False, activation=None,
) -> Tensor:  # fmt: skip
    """`combine(call(x, ...), weights, places)`, which keeps less for backward.

    activation: the rows are those of `swiglu` of the halves of x, and are made again in backward.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or x.device not in KERNEL_DEVICES
        or (bias is not None and bias.requires_grad)
    ):
        y = call(
            x if activation is None else call_swiglu(*x.chunk(2, dim=-1), activation),
            weight, offsets, experts, slots, lora_A, lora_B, scaling, None, bias, dropout, transposed,
        )  # fmt: skip
        return combine(y, weights, places)
    x, weight, slots, lora_B, scaling = _as_computed(x, weight, experts, slots, lora_B, scaling)
    base, experts, settings = _settings(
        x, weight, experts, lora_A, lora_B, scaling, dropout, transposed, None, None
    )
    return _CombinedLinear.apply(
        x, lora_A, lora_B, weights, bias, *base, offsets, experts, slots, rows, places, *settings, activation
    )


def _as_computed(x, weight, experts, slots, lora_B, scaling) -> tuple:
    """The arguments under autocast, with slots, and with a scaling that is a number."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
        weight = weight.to(x.dtype) if isinstance(weight, Tensor) else weight
    if isinstance(scaling, Tensor):
        lora_B, scaling = None if lora_B is None else lora_B * scaling.to(lora_B.dtype), 1.0
    if slots is None:
        slots = torch.full_like(experts, -1)
    elif slots is experts and torch.compiler.is_compiling():  # which takes no tensor twice
        slots = slots.clone()
    return x, weight, slots, lora_B, scaling


def _settings(
    x, weight, experts, lora_A, lora_B, scaling, dropout, transposed, seed, compute_dtype
) -> tuple[tuple, Tensor, tuple]:
    """(the stack of weights, whether it is transposed), experts, (scaling, dropout, seed, compute dtype), as the
    operators take them."""
    if lora_A is None or not dropout:
        seed, dropout = None, 0.0
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    if weight is None:
        experts, transposed = torch.zeros_like(experts), False
        stack = (None,) * 5 + (0, 0, 0, [1, lora_B.shape[1], lora_A.shape[2]])
    else:
        stack = _parts(weight)
    compute = DTYPES.index(compute_dtype or x.dtype)
    return (stack, transposed), experts, (scaling, dropout, seed, compute)


def _parts(weight: Tensor | FourBitWeight) -> tuple:
    """The stack of weights as the operators take it."""
    if isinstance(weight, Tensor):
        return weight, None, None, None, None, 0, 0, 0, list(weight.shape)
    return *parts_of(weight), list(weight.shape)


def _below_autograd() -> contextlib.AbstractContextManager:
    """Without the detour through the dispatcher's autograd key, where that is to be had."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


class _GroupedLinear(torch.autograd.Function):
    """The operator and its gradient. x is kept as it came: rows are gathered again in backward, not stored."""

    @staticmethod
    def forward(
        ctx, x, lora_A, lora_B, bias, base, transposed, offsets, experts, slots, rows, places, scaling, dropout, seed,
        compute,
    ):  # fmt: skip
        gathered = x if rows is None else x.index_select(0, rows)
        with _below_autograd():
            y, u = FORWARD(
                gathered, *base, transposed, offsets, experts, slots, bias, lora_A, lora_B, scaling, dropout, seed,
                compute,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        # Without adapters x is not needed again, but its shape is: an expanded view keeps no more than a value.
        kept = x if lora_A is not None else x.new_empty(1).expand(x.shape)
        ctx.save_for_backward(
            kept, lora_A, lora_B, u, *base[:5], offsets, experts, slots, rows, places, seed, bias
        )
        ctx.settings = base[5:], transposed, scaling, dropout, compute
        return y

    @staticmethod
    def backward(ctx, grad_y):
        grads = [None] * len(ctx.needs_input_grad)
        if grad_y is None:
            return tuple(grads)
        want_x, want_A, want_B, want_bias = ctx.needs_input_grad[:4]
        x, lora_A, lora_B, u, *parts, offsets, experts, slots, rows, places, seed, bias = ctx.saved_tensors
        format, transposed, scaling, dropout, compute = ctx.settings
        if want_x or want_A or want_B:

            def run(x: Tensor, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
                # Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words.
                with contextlib.nullcontext() if torch.is_grad_enabled() else _below_autograd():
                    return BACKWARD(
                        grad_y, x, *parts, *format, transposed, offsets, experts, slots, lora_A, lora_B, u, scaling,
                        dropout, seed, compute, *wanted,
                    )  # fmt: skip

            if rows is None:
                grad_x, grad_A, grad_B = run(x, want_x, want_A, want_B)
            else:
                like, gather = x[:1].expand(rows.numel(), -1), lambda: _gather(x, rows, offsets, slots)
                grad_x, grad_A, grad_B = _gradients(run, gather, like, want_x, want_A, want_B)
            if want_x and rows is not None:
                grad_x = _sum_rows(grad_x, rows, places, x.shape[0])
            grads[:3] = [grad_x if want_x else None, grad_A if want_A else None, grad_B if want_B else None]
        if want_bias:
            grads[3] = _sum_by_expert(grad_y, offsets, experts, bias)
        return tuple(grads)


class _CombinedLinear(torch.autograd.Function):
    """A product over sorted rows and what `combine` makes of it, with the gated activation before it if there is one.

    Nothing of the product is kept. The gradient of a routing weight is the scalar product of g, its token's gradient,
    and W a, what the expert said. That is also the product of W^T g and a, and W^T g is made for the gradient of a.
    """

    @staticmethod
    def forward(
        ctx, x, lora_A, lora_B, weights, bias, base, transposed, offsets, experts, slots, rows, places, scaling,
        dropout, seed, compute, activation,
    ):  # fmt: skip
        weights32 = weights.float().contiguous()
        with _below_autograd():
            y, u = FORWARD(
                _gated(x, activation), *base, transposed, offsets, experts, slots, bias, lora_A, lora_B, scaling,
                dropout, seed, compute,
            )  # fmt: skip
            combined = COMBINE(y, weights32, places)
        ctx.save_for_backward(
            x, lora_A, lora_B, u, *base[:5], offsets, experts, slots, rows, places, weights32, seed, bias
        )
        ctx.settings = base[5:], transposed, scaling, dropout, compute, activation, weights.dtype
        ctx.set_materialize_grads(False)
        return combined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        grads = [None] * len(ctx.needs_input_grad)
        want_x, want_A, want_B, want_weights = ctx.needs_input_grad[:4]
        if grad_y is None or not (want_x or want_A or want_B or want_weights):
            return tuple(grads)
        x, lora_A, lora_B, u, *parts, offsets, experts, slots, rows, places, weights, seed, bias = (
            ctx.saved_tensors
        )
        format, transposed, scaling, dropout, compute, activation, weights_dtype = ctx.settings
        weight = weights.new_zeros(len(rows))
        weight[places] = weights
        # Of rows with the gradient g and the weight w, w stands beside a and u rather than g: the gradients of A and B
        # are the same, and that of a is W^T g.
        weighted_u = u * weight.unsqueeze(1)

        def run(weighted_a: Tensor, *wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
            return BACKWARD(
                grad_y.index_select(0, rows), weighted_a, *parts, *format, transposed, offsets, experts, slots,
                lora_A, lora_B, weighted_u, scaling, dropout, seed, compute, *wanted,
            )  # fmt: skip

        grad_a, grads[1], grads[2] = _gradients(
            run,
            lambda: _weighted(x, weight, activation, offsets, slots),
            x if activation is None else x.chunk(2, dim=1)[0],
            want_x or want_weights,
            want_A,
            want_B,
        )
        if want_x or want_weights:
            if activation is None:
                each = torch.arange(len(rows), device=x.device).unsqueeze(1)
                grads[0], grad_weight = COMBINE_BACKWARD(
                    grad_a, x.contiguous(), weight.unsqueeze(1), each, want_weights
                )
                grad_weight = grad_weight.view(-1)
            else:
                grads[0], grad_weight = WEIGHTED_SWIGLU_BACKWARD(
                    grad_a, x, weight, NUMBERS[activation], want_weights
                )
        if want_weights:
            if bias is not None:
                grad_weight += _products_with(bias, grad_y, offsets, experts, rows)
            grads[3] = grad_weight[places].to(weights_dtype)
        return tuple(grad if want else None for grad, want in zip(grads, ctx.needs_input_grad))


def _gradients(
    run: Callable, make_x: Callable[[], Tensor], like: Tensor, want_x: bool, want_A: bool, want_B: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """run(x, want_x, want_A, want_B), whose x has to be made for the gradient of A; else `like` tells its shape."""
    if not want_A:
        return run(like, want_x, False, want_B)
    if not want_x or like.numel() * like.element_size() < LARGE_BYTES:
        return run(make_x(), want_x, True, want_B)
    # A large x is gone before there is a gradient of its size. What A's gradient and that of x have in common is
    # computed twice, which takes a hundredth of the time.
    _, grad_A, grad_B = run(make_x(), False, True, want_B)
    return run(like, True, False, False)[0], grad_A, grad_B


def _gated(x: Tensor, activation: str | None) -> Tensor:
    return x.contiguous() if activation is None else SWIGLU(*x.chunk(2, dim=1), NUMBERS[activation])


def _products_with(bias: Tensor, grad: Tensor, offsets: Tensor, experts: Tensor, rows: Tensor) -> Tensor:
    """[rows] of grad[rows[i]] . bias[e], for the expert e that row i has, if it has one."""
    group, inside = _groups_of_rows(len(rows), offsets, experts)
    table = grad.float() @ bias.float().t()
    return table[rows, experts[group]] * inside


def _groups_of_rows(count: int, offsets: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """The group of each row, or another where it has none; and whether it has one."""
    group = torch.searchsorted(offsets, torch.arange(count, device=offsets.device), right=True) - 1
    return group.clamp(0, len(experts) - 1), (group >= 0) & (group < len(experts))


def _sum_by_expert(grad: Tensor, offsets: Tensor, experts: Tensor, bias: Tensor) -> Tensor:
    """The gradient of `bias` [experts, N]: row e sums the rows of grad whose group has expert e."""
    if experts.numel() == 0:
        return torch.zeros_like(bias)
    group, inside = _groups_of_rows(grad.shape[0], offsets, experts)
    return _add_up(grad.float() * inside.unsqueeze(1), experts[group], len(bias)).to(bias.dtype)


def _gather(x: Tensor, rows: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """x[rows], where only the rows of groups with an adapter need be there."""
    parts = _with_adapter(offsets, slots)
    if parts is None:
        return x.index_select(0, rows)
    gathered = x.new_empty(rows.numel(), x.shape[1])
    with torch.no_grad():
        for part in parts:
            torch.index_select(x, 0, rows[part], out=gathered[part])
    return gathered


def _weighted(x: Tensor, weight: Tensor, activation: str | None, offsets: Tensor, slots: Tensor) -> Tensor:
    """weight[i] * `_gated(x)`[i], where only the rows of groups with an adapter need be there."""

    def rows(part: slice) -> Tensor:
        if activation is not None:
            return WEIGHTED_SWIGLU(x[part], weight[part], NUMBERS[activation])
        scale = weight[part].unsqueeze(1)
        return COMBINE(x[part].contiguous(), scale, torch.arange(len(scale), device=x.device).unsqueeze(1))

    parts = _with_adapter(offsets, slots)
    if parts is None:
        return rows(slice(None))
    weighted = x.new_empty(x.shape[0], x.shape[1] // (1 if activation is None else 2))
    for part in parts:
        weighted[part] = rows(part)
    return weighted


def _with_adapter(offsets: Tensor, slots: Tensor) -> list[slice] | None:
    """The rows of each group that has an adapter; None: all may have one."""
    if not host_reads(slots) or bool((slots >= 0).all()):
        return None
    bounds = offsets.tolist()
    return [slice(bounds[i], bounds[i + 1]) for i in (slots >= 0).nonzero().view(-1).tolist()]


def _sum_rows(grad: Tensor, rows: Tensor, places: Tensor | None, count: int) -> Tensor:
    """Row t of `count` is the sum of grad[i] over rows[i] = t, in fp32. places: as in `call`."""
    if places is not None and grad.device in KERNEL_DEVICES:
        return COMBINE(grad.contiguous(), None, places)
    return _add_up(grad.float(), rows, count).to(grad.dtype)


def _add_up(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Row t of `count` is the sum of values[i] over index[i] = t, always in the same order."""
    if not values.is_cuda:
        return values.new_zeros(count, values.shape[1]).index_add_(0, index, values)
    # There index_add_ takes them as they come.
    index, order = index.sort(stable=True)
    offsets = torch.searchsorted(index, torch.arange(count + 1, device=index.device))
    return torch.segment_reduce(values[order], "sum", offsets=offsets, initial=0)


def moe_combine(x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """y[t] = sum over k of weights[t, k] * x[places[t, k]]: what the experts of a token say, put together in fp32.

    Args:
        x: [tokens * top_k, H], float32, bfloat16 or float16.
        weights: [tokens, top_k], any floating dtype; gets its gradient.
        places: int64 [tokens, top_k], a permutation of the rows of x.
    Returns:
        [tokens, H] in the dtype of x.
    Raises:
        TypeError, ValueError: an argument has a wrong dtype or shape; the message names it.
    """
    check_tensors({"x": x, "weights": weights, "places": places}, [], [])
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {name_of(x.dtype)}.")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"weights must be floating, got {name_of(weights.dtype)}.")
    if places.dtype != torch.int64 or places.dim() != 2 or places.shape != weights.shape:
        raise ValueError(
            f"places must be int64 in the shape of weights, {list(weights.shape)}, "
            f"got {name_of(places.dtype)} in {list(places.shape)}."
        )
    if x.dim() != 2 or x.shape[0] != places.numel():
        raise ValueError(f"x has shape {list(x.shape)}, expected [{places.numel()}, H].")
    if host_reads(places) and not torch.equal(
        places.reshape(-1).sort().values, torch.arange(places.numel(), device=x.device)
    ):
        raise ValueError(f"places must hold each row of x once, from 0 to {places.numel() - 1}.")
    return combine(x, weights, places)


def combine(x: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """`moe_combine` for a caller whose arguments are right: no checks but those that guard memory."""
    if x.device not in KERNEL_DEVICES:
        return reference.moe_combine(x, weights, places)
    return _Combine.apply(x, weights, places)


def repeat(x: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """x[rows], whose gradients are added up in fp32; `places` [T, times] is where each row of x is among `rows`."""
    return _Repeat.apply(x, rows, places)


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, places):
        ctx.save_for_backward(rows, places)
        return x.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, places = ctx.saved_tensors
        return _sum_rows(grad, rows, places, len(places)), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, places):
        weights32 = weights.float().contiguous()
        ctx.save_for_backward(x, weights32, places)
        ctx.weights_dtype = weights.dtype
        return COMBINE(x.contiguous(), weights32, places.contiguous())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weights, places = ctx.saved_tensors
        grad_x, grad_weights = COMBINE_BACKWARD(
            grad_y, x.contiguous(), weights, places.contiguous(), ctx.needs_input_grad[1]
        )
        wanted = ctx.needs_input_grad[1]
        return grad_x, grad_weights.to(ctx.weights_dtype) if wanted else None, None


def _check(
    x, weight, offsets, lora_A, lora_B, scaling, experts, slots, rows, bias, dropout, transposed, seed, compute_dtype,
) -> None:  # fmt: skip
    """One sentence for each argument that is wrong."""
    four_bit = isinstance(weight, FourBitWeight)
    if four_bit:
        check_weight(weight)
    optional = {
        "weight": weight.packed if four_bit else weight,
        "lora_A": lora_A, "lora_B": lora_B, "experts": experts, "slots": slots, "rows": rows, "bias": bias,
        "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in optional.items() if value is not None}
    check_tensors({"x": x, "offsets": offsets} | given, [], [])
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {name_of(x.dtype)}.")
    if compute_dtype is not None and compute_dtype not in DTYPES:
        raise TypeError(f"compute_dtype must be float32, bfloat16 or float16, got {compute_dtype}.")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B must be given together.")
    if weight is None:
        for name, value in {"bias": bias, "experts": experts}.items():
            if value is not None:
                raise ValueError(f"{name} goes with a weight, and weight is None.")
        for name, value in {"lora_A": lora_A, "lora_B": lora_B}.items():
            if value is None or value.dim() != 3:
                raise ValueError(f"{name} must have 3 dimensions, as weight is None.")
    autocast = torch.is_autocast_enabled(x.device.type)
    shape = (1, lora_B.shape[1], lora_A.shape[2]) if weight is None else tuple(weight.shape)
    if len(shape) != 3:
        raise ValueError(f"weight must have 3 dimensions, got shape {list(shape)}.")
    if isinstance(weight, Tensor) and weight.dtype != x.dtype and not autocast:
        raise TypeError(
            f"weight is {name_of(weight.dtype)}, but x is {name_of(x.dtype)}: they must be the same."
        )
    count, outputs, inputs = (shape[0], shape[2], shape[1]) if transposed and weight is not None else shape
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"x has shape {list(x.shape)}, expected [M, {inputs}].")
    if lora_A is not None:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if lora_A.dtype not in (dtype, torch.float32):
            raise TypeError(f"lora_A is {name_of(lora_A.dtype)}, expected {name_of(dtype)} or float32.")
        if lora_B.dtype != lora_A.dtype:
            raise TypeError(f"lora_B is {name_of(lora_B.dtype)}, but lora_A is {name_of(lora_A.dtype)}.")
        if lora_A.dim() != 3 or lora_A.shape[1] == 0 or lora_A.shape[2] != inputs:
            raise ValueError(
                f"lora_A has shape {list(lora_A.shape)}, expected [slots, rank, {inputs}] with a rank above 0."
            )
        wanted = (lora_A.shape[0], outputs, lora_A.shape[1])
        if lora_B.shape != wanted:
            raise ValueError(f"lora_B has shape {list(lora_B.shape)}, expected {list(wanted)}.")
    if bias is not None:
        if bias.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"bias is {name_of(bias.dtype)}, expected {name_of(x.dtype)} or float32.")
        if bias.shape != (count, outputs):
            raise ValueError(f"bias has shape {list(bias.shape)}, expected [{count}, {outputs}].")
    if isinstance(scaling, Tensor):
        check_tensors({"x": x, "scaling": scaling}, [], [])
    check_scaling(scaling)
    check_dropout(dropout)
    check_seed(seed)

    M = x.shape[0] if rows is None else rows.numel()
    for name, value in {"offsets": offsets, "experts": experts, "slots": slots, "rows": rows}.items():
        if value is not None and (value.dtype != torch.int64 or value.dim() != 1):
            raise ValueError(
                f"{name} must be int64 with one dimension, got {name_of(value.dtype)} in {list(value.shape)}."
            )
    groups = offsets.numel() - 1
    if groups < 0:
        raise ValueError("offsets must have an entry more than there are groups, got none.")
    values = host_reads(offsets)  # on a GPU, looking would mean to wait
    if values and (bool((offsets.diff() < 0).any()) or offsets[0] < 0 or offsets[-1] > M):
        raise ValueError(f"offsets must ascend within [0, {M}].")
    slot_count = 0 if lora_A is None else lora_A.shape[0]
    for name, value, least, most in (
        ("experts", experts, 0, count), ("slots", slots, None, slot_count), ("rows", rows, 0, x.shape[0]),
    ):  # fmt: skip
        if value is None:
            by_place = weight is not None if name == "experts" else lora_A is not None
            if name != "rows" and groups > most and by_place:
                raise ValueError(f"{name} must say what each of the {groups} groups has: there are {most}.")
            continue
        if name != "rows" and value.numel() != groups:
            raise ValueError(f"{name} has {value.numel()} entries, expected {groups}: one per group.")
        if values and value.numel() and (value.max() >= most or (least is not None and value.min() < least)):
            raise ValueError(f"{name} holds {int(value.min())} to {int(value.max())}, there are {most}.")


refuse_second_derivative("grouped_linear")


# ---- shapes without data ----------------------------------------------------------------------------------


@torch.library.register_fake("peftfast::grouped_linear")
def _(
    x, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type, shape,
    transposed, offsets, experts, slots, bias, lora_A, lora_B, scaling, dropout, seed, compute_dtype,
):  # fmt: skip
    rank = 0 if lora_A is None else lora_A.shape[1]
    features = shape[2] if transposed else shape[1]
    return x.new_empty(x.shape[0], features), x.new_empty(x.shape[0], rank, dtype=torch.float32)


@torch.library.register_fake("peftfast::grouped_linear_backward")
def _(
    grad_y, x, weight, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize, quant_type,
    shape, transposed, offsets, experts, slots, lora_A, lora_B, u, scaling, dropout, seed, compute_dtype,
    want_x, want_A, want_B,
):  # fmt: skip
    slot_count, rank = (0, 0) if lora_A is None else lora_A.shape[:2]
    like = x.new_empty(0, dtype=torch.float32) if lora_A is None else lora_A
    shape_B = slot_count if want_B else 0, grad_y.shape[1], rank
    as_B = slot_count > 1 and lora_B.stride() == (1, rank * slot_count, slot_count)
    return (
        x.new_empty(x.shape[0] if want_x else 0, x.shape[1]),
        like.new_empty(slot_count if want_A else 0, rank, x.shape[1]),
        like.new_empty_strided(shape_B, lora_B.stride()) if as_B else like.new_empty(shape_B),
    )


@torch.library.register_fake("peftfast::moe_combine")
def _(x, weights, places):
    return x.new_empty(places.shape[0], x.shape[1])


@torch.library.register_fake("peftfast::moe_combine_backward")
def _(grad_y, x, weights, places, want_weights):
    rows = places.shape[0] if want_weights else 0
    return torch.empty_like(x), x.new_empty(rows, places.shape[1], dtype=torch.float32)
