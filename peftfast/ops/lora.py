"""A linear layer with LoRA adapters as one operator, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from peftfast import _C, reference  # noqa: F401  (_C registers the operators)
from peftfast.ops.devices import KERNEL_DEVICES
from peftfast.reference import as_list

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD = torch.ops.peftfast.lora_linear.default
BACKWARD = torch.ops.peftfast.lora_linear_backward.default


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    scaling: float | Tensor | Sequence[float | Tensor],
    *,
    bias: Tensor | None = None,
    dropout: float | Sequence[float] = 0.0,
    transposed: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + sum over adapters of scaling * dropout(x) A^T B^T   (Hu et al., LoRA, ICLR 2022).

    The low-rank term is part of the base product: y is written once, and rounded once from fp32. Backward keeps
    x (shared) and 4 bytes per row and rank; the dropout mask is made again from the seed. `weight` gets no gradient.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: [N, K] in the dtype of x, frozen; [K, N] when `transposed`.
        lora_A: [r, K] in the dtype of x or float32; or one per adapter.
        lora_B: [N, r] in the dtype of lora_A; or one per adapter.
        scaling: a number or a one-element tensor; or one per adapter.
        bias: [N] in the dtype of x or float32.
        dropout: probability in [0, 1) that an element of x is dropped on its way into lora_A; or one per adapter.
            Adapters have independent masks.
        transposed: `weight` is stored [K, N], as transformers' Conv1D does.
        seed: int64 tensor of one element that fixes the masks, on x's device. None: torch draws it.
    Returns:
        [..., N] in the dtype of x. Under autocast, x and weight are cast as `torch.nn.functional.linear` casts them.
    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        NotImplementedError: a second derivative is asked for; training takes none, and a wrong one must not pass.
    """
    lora_A, lora_B = as_list(lora_A, 1), as_list(lora_B, 1)
    scaling, dropout = as_list(scaling, len(lora_A)), as_list(dropout, len(lora_A))
    _check(x, weight, lora_A, lora_B, scaling, bias, dropout, transposed, seed)
    return call(x, weight, lora_A, lora_B, scaling, bias, dropout, transposed, seed)


def call(x, weight, lora_A, lora_B, scaling, bias, dropout, transposed, seed=None) -> Tensor:
    """`lora_linear` for a caller whose arguments are lists and right: no checks but those that guard memory."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        if bias is not None and bias.dtype != torch.float32:
            bias = bias.to(dtype)
    lora_B, scaling = scale_into_B(lora_B, scaling)
    if x.device not in KERNEL_DEVICES:
        return reference.lora_linear(
            x, weight, lora_A, lora_B, scaling, bias=bias, dropout=dropout, transposed=transposed, seed=seed
        )
    if not any(dropout):
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y, _ = _dispatch(rows, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def low_rank(
    x: Tensor, lora_A, lora_B, scaling, dropout, seed: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """U [M, r] and B [N, r] of all adapters together, whose term is U B^T; in at least fp32, recorded by autograd.

    It is the operator of a layer of r outputs, all of whose base weights are zero.
    """
    if not lora_A:
        return None, None
    wide = torch.promote_types(x.dtype, torch.float32)
    ranks = [A.shape[0] for A in lora_A]
    selections = torch.eye(sum(ranks), device=x.device, dtype=wide).split(ranks, dim=1)
    if seed is None and any(dropout):
        seed = torch.randint(2**63 - 1, (1,), device=x.device)
    linear = call if wide == torch.float32 else _reference
    zero = x.new_zeros(sum(ranks), x.shape[1], dtype=wide)
    U = linear(
        x.to(wide), zero, [A.to(wide) for A in lora_A], list(selections), scaling, None, dropout, False, seed
    )
    return U, torch.cat([B.to(wide) for B in lora_B], dim=1)


def _reference(x, weight, lora_A, lora_B, scaling, bias, dropout, transposed, seed) -> Tensor:
    return reference.lora_linear(x, weight, lora_A, lora_B, scaling, dropout=dropout, seed=seed)


def _dispatch(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed):
    """FORWARD, without the detour through the dispatcher's autograd key: 15 us, a part of a small layer's time."""
    if torch.compiler.is_compiling():
        return FORWARD(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed)
    if torch.is_grad_enabled():
        return _LoraLinear.apply(x, weight, bias, scaling, dropout, seed, transposed, *lora_A, *lora_B)
    with torch._C._AutoDispatchBelowAutograd():
        return FORWARD(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed)


def _check(x, weight, lora_A, lora_B, scaling, bias, dropout, transposed, seed) -> None:
    """One sentence for each argument that is wrong."""
    check_tensors({"x": x, "weight": weight, "bias": bias, "seed": seed}, lora_A, lora_B)
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {name_of(x.dtype)}.")
    if weight.dtype != x.dtype and not (autocast and weight.dtype in DTYPES):
        raise TypeError(
            f"weight is {name_of(weight.dtype)}, but x is {name_of(x.dtype)}: they must be the same."
        )
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, its last the input features.")
    if weight.dim() != 2:
        raise ValueError(f"weight must have 2 dimensions, got shape {list(weight.shape)}.")
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"x has {x.shape[-1]} input features, but weight has {inputs}.")
    check_bias(bias, outputs, (x.dtype, weight.dtype, torch.float32))
    check_adapters(x, lora_A, lora_B, scaling, dropout, seed, outputs, inputs)


def check_tensors(tensors: dict[str, Tensor | None], lora_A: list, lora_B: list) -> None:
    """Each is a dense tensor on the device of "x"; a bias and a seed may be missing."""
    for i in range(max(len(lora_A), len(lora_B))):
        tensors |= {f"lora_A[{i}]": lora_A[i]} if i < len(lora_A) else {}
        tensors |= {f"lora_B[{i}]": lora_B[i]} if i < len(lora_B) else {}
    for name, value in tensors.items():
        if value is None and name in ("bias", "seed"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}.")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {name_of(value.layout)}.")
        if value.device != tensors["x"].device:
            raise ValueError(f"{name} is on {value.device}, but x is on {tensors['x'].device}.")


def check_bias(bias: Tensor | None, outputs: int, dtypes: tuple) -> None:
    if bias is None:
        return
    if bias.dtype not in dtypes:
        raise TypeError(f"bias is {name_of(bias.dtype)}, expected {name_of(dtypes[0])} or float32.")
    if bias.shape != (outputs,):
        raise ValueError(f"bias has shape {list(bias.shape)}, expected [{outputs}].")


def check_adapters(x, lora_A, lora_B, scaling, dropout, seed, outputs: int, inputs: int) -> None:
    counts = {"lora_B": len(lora_B), "scaling": len(scaling), "dropout": len(dropout)}
    for name, count in counts.items():
        if count != len(lora_A):
            raise ValueError(
                f"{name} has {count} entries, but lora_A has {len(lora_A)}: one per adapter is wanted."
            )
    autocast = torch.is_autocast_enabled(x.device.type)
    base_dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    for i, (A, B, s, p) in enumerate(zip(lora_A, lora_B, scaling, dropout)):
        if A.dtype not in (base_dtype, torch.float32):
            raise TypeError(f"lora_A[{i}] is {name_of(A.dtype)}, expected {name_of(base_dtype)} or float32.")
        if B.dtype != A.dtype:
            raise TypeError(f"lora_B[{i}] is {name_of(B.dtype)}, but lora_A[{i}] is {name_of(A.dtype)}.")
        if A.dim() != 2 or A.shape[0] == 0 or A.shape[1] != inputs:
            raise ValueError(
                f"lora_A[{i}] has shape {list(A.shape)}, expected [rank, {inputs}] with a rank above 0."
            )
        if B.shape != (outputs, A.shape[0]):
            raise ValueError(f"lora_B[{i}] has shape {list(B.shape)}, expected [{outputs}, {A.shape[0]}].")
        check_scaling(s, f"scaling[{i}]")
        if isinstance(s, Tensor) and s.device != x.device:
            raise ValueError(f"scaling[{i}] is on {s.device}, but x is on {x.device}.")
        check_dropout(p, f"dropout[{i}]")
    check_seed(seed)


def check_ids(ids: Tensor, device: torch.device) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}.")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {name_of(ids.dtype)}.")
    if ids.device != device:
        raise ValueError(f"ids is on {ids.device}, but weight is on {device}.")


def check_scaling(scaling: float | Tensor, name: str = "scaling") -> None:
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"{name} has {scaling.numel()} elements, expected one.")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {type(scaling).__name__}.")


def check_number(number: float, name: str) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(number).__name__}.")


def check_dropout(dropout: float, name: str = "dropout") -> None:
    check_number(dropout, name)
    if not 0 <= dropout < 1:
        raise ValueError(f"{name} is {dropout}, expected a probability in [0, 1).")


def check_seed(seed: Tensor | None) -> None:
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed must be one int64 value, got {seed.numel()} of {name_of(seed.dtype)}.")


def name_of(of_torch: torch.dtype | torch.layout) -> str:
    return str(of_torch).removeprefix("torch.")


def scale_into_B(lora_B: list, scaling: list) -> tuple[list, list]:
    """A scaling that is a tensor goes into B, so that its value is never read on the host."""
    for i, s in enumerate(scaling):
        if isinstance(s, Tensor):
            lora_B = [B * s.to(B.dtype) if i == j else B for j, B in enumerate(lora_B)]
            scaling = [1.0 if i == j else t for j, t in enumerate(scaling)]
    return lora_B, scaling


@torch.library.register_fake("peftfast::lora_linear")
def _(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed):
    features = weight.shape[1] if transposed else weight.shape[0]
    rank = sum(A.shape[0] for A in lora_A)
    return x.new_empty(x.shape[0], features), x.new_empty(x.shape[0], rank, dtype=torch.float32)


@torch.library.register_fake("peftfast::lora_linear_backward")
def _(grad_y, x, weight, lora_A, lora_B, u, scaling, dropout, seed, transposed, want_x, want_A, want_B):
    features, inputs = grad_y.shape[1], x.shape[1]
    grad_A = [A.new_empty(A.shape[0] if want else 0, inputs) for A, want in zip(lora_A, want_A)]
    grad_B = [B.new_empty(features if want else 0, B.shape[1]) for B, want in zip(lora_B, want_B)]
    return x.new_empty(x.shape[0] if want_x else 0, inputs), grad_A, grad_B


class _LoraLinear(torch.autograd.Function):
    """The operator and its gradient. Inputs as in the schema, but the adapters' factors last and flat."""

    @staticmethod
    def forward(ctx, x, weight, bias, scaling, dropout, seed, transposed, *factors):
        count = len(factors) // 2
        with torch._C._AutoDispatchBelowAutograd():
            y, u = FORWARD(
                x, weight, bias, factors[:count], factors[count:], scaling, dropout, seed, transposed
            )
        ctx.mark_non_differentiable(u)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, u, seed, *factors)
        ctx.settings = scaling, dropout, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, u

    @staticmethod
    def backward(ctx, grad_y, _):
        grads = [None] * len(ctx.needs_input_grad)
        if grad_y is None:
            return tuple(grads)
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        if want_weight:
            # Deliberate: the weight of an adapted layer is frozen, and its gradient is what adapters save.
            raise NotImplementedError(
                "peftfast.lora_linear gives no gradient for weight: freeze it with weight.requires_grad_(False)."
            )
        x, weight, u, seed, *factors = ctx.saved_tensors
        count = len(factors) // 2
        want_factors = ctx.needs_input_grad[7:]
        if want_x or any(want_factors):
            scaling, dropout, transposed = ctx.settings
            # Gradients are recorded only for create_graph; then the operator's own autograd refuses in clear words.
            with (
                contextlib.nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd()
            ):
                grad_x, grad_A, grad_B = BACKWARD(
                    grad_y, x, weight, factors[:count], factors[count:], u, scaling, dropout, seed, transposed,
                    want_x, want_factors[:count], want_factors[count:],
                )  # fmt: skip
            grads[0] = grad_x if want_x else None
            grads[7:] = [grad if want else None for grad, want in zip(grad_A + grad_B, want_factors)]
        if want_bias:
            grads[2] = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grads)


def _autograd(x, weight, bias, lora_A, lora_B, scaling, dropout, seed, transposed):
    return _LoraLinear.apply(x, weight, bias, scaling, dropout, seed, transposed, *lora_A, *lora_B)


def refuse_second_derivative(name: str) -> None:
    """Registers for `name`'s backward that it has no gradient of its own.

    Deliberate: training needs none, and without this torch would hand out a gradient without the part that runs
    through the backward, in silence.
    """

    def refuse(ctx, *grads):
        raise NotImplementedError(
            f"peftfast.{name} has no second derivative; compute it with peftfast disabled."
        )

    torch.library.register_autograd(f"peftfast::{name}_backward", refuse)


# torch.library.register_autograd would do for both, but costs 200 us a call on lists of tensors: a small layer's time.
_library = torch.library.Library("peftfast", "IMPL")
_library.impl("lora_linear", _autograd, "Autograd")
refuse_second_derivative("lora_linear")
