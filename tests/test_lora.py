"""The op lora_linear against float64, in all that can vary: shapes, dtypes, layouts, adapters, modes.

The rule: on the same inputs, the error against float64 is at most 1.1 times the error of the computation
that the op replaces, which `peft_formula` spells out. Over a handful of elements the ratio of two rounding
errors is luck; so there, and everywhere else too, each element is held to what rounding can do to it at
the worst. A and B are never zero: a zero B hides a wrong gradient.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import random_states
from hypothesis import given, settings
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast import reference
from peftfast.ops import lora_linear
from peftfast.testing import assert_as_accurate

FORWARD = torch.ops.peftfast.lora_linear.default
BACKWARD = torch.ops.peftfast.lora_linear_backward.default
LINEAR_INTO = torch.ops.peftfast.linear_into.default
DTYPES = {  # of x and the weight, and of the adapters
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
SHAPES = [  # M, K, N, rank
    (1, 1, 1, 1),
    (1, 257, 65, 3),
    (2, 64, 48, 16),
    (5, 33, 129, 1),
    (6, 64, 64, 16),
    (7, 130, 31, 70),
    (13, 3, 200, 3),
    (4, 300, 900, 70),
    (64, 127, 40, 70),
    (131, 300, 96, 24),
]
LARGE = [  # past the blocks of rows, of K and of N, of K and N together; the top rank
    (600, 96, 80, 32),
    (2101, 24, 65, 4),
    (13, 1030, 1030, 4),
    (130, 1100, 40, 8),
    (30, 5000, 70, 32),
    (30, 70, 5000, 32),
    (70, 96, 80, 512),
]
EMPTY = [(0, 8, 8, 4), (3, 0, 8, 4), (3, 8, 0, 4), (90, 0, 70, 4), (90, 70, 0, 4), (0, 0, 0, 1)]
DROPOUTS = [0.0, 0.3]


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """The operands are small: threads would only wait for each other. The test of threads sets its own."""
    torch.set_num_threads(1)


def name_of(shape):
    return "M{}-K{}-N{}-r{}".format(*shape)


def by_dtype(test):
    return pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())(test)


@dataclass
class Problem:
    """One call: the operands, one entry per adapter in the lists, and the gradient of the output."""

    x: torch.Tensor
    weight: torch.Tensor
    lora_A: list
    lora_B: list
    scaling: list
    dropout: list
    bias: torch.Tensor | None = None
    transposed: bool = False
    seed: torch.Tensor = field(default_factory=lambda: torch.tensor([20240229]))
    grad: torch.Tensor | None = None

    def leaves(self):
        named = {"x": self.x, "bias": self.bias}
        named |= {f"lora_A[{i}]": A for i, A in enumerate(self.lora_A)}
        named |= {f"lora_B[{i}]": B for i, B in enumerate(self.lora_B)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def map(self, f):
        """The same problem with f applied to every floating-point operand."""
        return replace(
            self,
            x=f(self.x),
            weight=f(self.weight),
            lora_A=[f(A) for A in self.lora_A],
            lora_B=[f(B) for B in self.lora_B],
            bias=None if self.bias is None else f(self.bias),
            grad=None if self.grad is None else f(self.grad),
        )


def problem(
    shape,
    dtypes,
    *,
    bias=False,
    dropout=0.0,
    transposed=False,
    ranks=None,
    scalings=None,
    dropouts=None,
    batch=None,
):
    """Random operands with outputs of order one. `batch`: leading dimensions in place of M."""
    M, K, N, rank = shape
    dtype, adapter_dtype = dtypes
    ranks = ranks or [rank]

    def randn(*size, scale=1.0, dtype=dtype):
        return (torch.randn(*size) * scale).to(dtype)

    batch = (M,) if batch is None else batch
    return Problem(
        x=randn(*batch, K),
        weight=randn(*((K, N) if transposed else (N, K)), scale=max(K, 1) ** -0.5),
        lora_A=[randn(r, K, scale=max(K, 1) ** -0.5, dtype=adapter_dtype) for r in ranks],
        lora_B=[randn(N, r, scale=r**-0.5, dtype=adapter_dtype) for r in ranks],
        scaling=scalings or [0.75] * len(ranks),
        dropout=dropouts or [dropout] * len(ranks),
        bias=randn(N) if bias else None,
        transposed=transposed,
        grad=randn(*batch, N),
    )


def call(function, p):
    return function(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        p.scaling,
        bias=p.bias,
        dropout=p.dropout,
        transposed=p.transposed,
        seed=p.seed if any(p.dropout) else None,
    )


def peft_formula(x, weight, lora_A, lora_B, scaling, *, bias, dropout, transposed, seed):
    """What PEFT's layer computes, dtype for dtype, with the dropout mask given instead of drawn."""
    masks = [
        reference.dropout_mask(x.shape, p, seed, adapter=i) if p else None for i, p in enumerate(dropout)
    ]
    result = F.linear(x, weight.T if transposed else weight, None if bias is None else bias.to(x.dtype))
    dtype = result.dtype
    for A, B, s, p, mask in zip(lora_A, lora_B, scaling, dropout, masks, strict=True):
        x = x.to(A.dtype)
        dropped = x if mask is None else x * mask / (1 - p)
        result = result + F.linear(F.linear(dropped, A), B) * s
    return result.to(dtype)


def forward_backward(function, p, wanted=None):
    """The output and the gradients of the operands named in `wanted` (all of them if None), by name."""
    operands = {id(t): t.detach() for t in p.leaves().values()}
    fresh = p.map(lambda t: operands.get(id(t), t))
    leaves = fresh.leaves()
    wanted = leaves.keys() if wanted is None else wanted
    for name in wanted:
        leaves[name].requires_grad_()
    out = call(function, fresh)
    if not wanted:
        return {"output": out}
    out.backward(p.grad)
    return {"output": out.detach()} | {f"grad of {name}": leaves[name].grad for name in leaves}


def in_float64(p):
    return forward_backward(reference.lora_linear, p.map(torch.Tensor.double))


def worst_rounding(p, dtypes):
    """By how much each element may be off: every sum in fp32, in any order, and one rounding to its dtype.

    The size of the terms of a sum is the same computation on absolute values.
    """
    K, N = p.x.shape[-1], p.grad.shape[-1]
    terms = p.grad.numel() // N + 2 * (K + N) + sum(A.shape[0] for A in p.lora_A) + 8
    bounds = in_float64(replace(p.map(torch.abs), scaling=[abs(s) for s in p.scaling]))
    for name, size in bounds.items():
        unit = torch.finfo(dtypes[name]).eps / 2
        bounds[name] = size * (unit + terms * 2**-24) + torch.finfo(dtypes[name]).smallest_normal * unit
    return bounds


def check(p, rule=True):
    """The output and every gradient keep the rule. `rule=False`: no element is off by too much.

    The errors of x A^T are shared by whole rows, so it takes enough of those, too, for more than luck.
    """
    enough = rule and p.x.numel() // p.x.shape[-1] * sum(A.shape[0] for A in p.lora_A) >= 256
    got, eager, oracle = forward_backward(lora_linear, p), forward_backward(peft_formula, p), in_float64(p)
    bounds = worst_rounding(p, {name: result.dtype for name, result in got.items()})
    for name, exact in oracle.items():
        assert got[name].shape == exact.shape, name
        assert got[name].dtype == eager[name].dtype, name
        assert ((got[name] - exact).abs() <= bounds[name]).all(), name
        if enough and exact.numel() >= 2000:
            assert_as_accurate(got[name], eager[name], exact, name=name)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.every_isa
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["nobias", "bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@by_dtype
def test_accuracy(shape, dtypes, transposed, bias, dropout):
    check(problem(shape, dtypes, transposed=transposed, bias=bias, dropout=dropout))


@pytest.mark.every_isa
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", LARGE, ids=name_of)
@by_dtype
def test_accuracy_past_the_blocks(shape, dtypes, transposed):
    check(problem(shape, dtypes, transposed=transposed, bias=True, dropout=0.1))


@pytest.mark.every_isa
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", EMPTY, ids=name_of)
def test_nothing_to_sum(shape, transposed, dropout):
    """No rows, no inputs or no outputs: empty results, and zeros (or the bias) where a sum has no terms."""
    p = problem(shape, DTYPES["bf16-fp32"], transposed=transposed, bias=True, dropout=dropout)
    got, oracle = forward_backward(lora_linear, p), in_float64(p)
    for name, exact in oracle.items():
        torch.testing.assert_close(got[name], exact.to(got[name].dtype), rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 4), (3, 0)], ids=str)
@by_dtype
def test_batch_dimensions(batch, dtypes):
    check(problem((0, 40, 24, 5), dtypes, bias=True, dropout=0.3, batch=batch))


@pytest.mark.every_isa
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@by_dtype
def test_several_adapters(dtypes, transposed):
    check(
        problem(
            (29, 70, 45, None),
            dtypes,
            bias=True,
            transposed=transposed,
            ranks=[3, 16, 1],
            scalings=[0.5, -1.25, 2.0],
            dropouts=[0.0, 0.4, 0.1],
        )
    )


@pytest.mark.every_isa
@by_dtype
def test_many_adapters(dtypes):
    """More than the GPU kernels pack with one launch, the wider ones in several tiles of ranks."""
    count = 19
    check(
        problem(
            (21, 40, 33, None),
            dtypes,
            ranks=[1 + 20 * (i % 3 == 2) for i in range(count)],
            scalings=[0.5 - i / 8 for i in range(count)],
            dropouts=[0.3 * (i % 2) for i in range(count)],
        )
    )


def test_adapters_of_two_dtypes():
    p = problem((29, 70, 45, None), DTYPES["bf16"], ranks=[4, 9], scalings=[0.5, 2.0], dropouts=[0.2, 0.1])
    p.lora_A[1], p.lora_B[1] = p.lora_A[1].float(), p.lora_B[1].float()
    check(p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fp32_bias_over_a_low_precision_base(dtype):
    p = problem((29, 70, 45, 4), (dtype, dtype), bias=True)
    check(replace(p, bias=p.bias.float()))


def test_one_adapter_needs_no_lists():
    p = problem((9, 20, 12, 4), DTYPES["fp32"], dropout=0.3)
    single = lora_linear(p.x, p.weight, p.lora_A[0], p.lora_B[0], 0.75, dropout=0.3, seed=p.seed)
    assert torch.equal(single, call(lora_linear, p))


@pytest.mark.parametrize(
    "scaling", [torch.tensor(0.75), torch.tensor([0.75]), torch.tensor(0.75).double()], ids=str
)
@by_dtype
def test_scaling_as_a_tensor(dtypes, scaling):
    p = problem((90, 40, 30, 90), dtypes)
    check(replace(p, scaling=[scaling]))


def test_no_adapter_is_the_base_layer():
    p = problem((9, 20, 12, 4), DTYPES["fp32"], bias=True)
    out = lora_linear(p.x, p.weight, [], [], [], bias=p.bias)
    torch.testing.assert_close(out, F.linear(p.x, p.weight, p.bias))


def test_scaling_zero_is_the_base_layer():
    p = problem((9, 20, 12, 4), DTYPES["fp32"], scalings=[0.0], bias=True)
    got = forward_backward(lora_linear, p)
    torch.testing.assert_close(got["output"], F.linear(p.x, p.weight, p.bias))
    assert not got["grad of lora_A[0]"].any() and not got["grad of lora_B[0]"].any()


@pytest.mark.every_isa
@pytest.mark.parametrize("row", [0, 5, 10])
@by_dtype
def test_a_nan_stays_in_its_row(row, dtypes):
    p = problem((11, 37, 21, 4), dtypes, dropout=0.3)
    p.x[row, 3] = math.nan
    out = call(lora_linear, p)
    assert out[row].isnan().all()
    assert out[torch.arange(11) != row].isfinite().all()


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [1, 11, 80])
@by_dtype
def test_a_nan_stays_in_its_column(M, dtypes):
    p = problem((M, 37, 150, 4), dtypes)
    p.weight[77, 5] = math.nan
    others = torch.arange(150) != 77
    got = forward_backward(lora_linear, p)
    assert got["output"][:, 77].isnan().all()
    assert got["output"][:, others].isfinite().all()
    assert got["grad of x"][:, 5].isnan().all()
    assert got["grad of x"][:, torch.arange(37) != 5].isfinite().all()
    assert got["grad of lora_A[0]"].isfinite().all()


# ------------------------------------------------------------------------------------------------- layouts


def strided(tensor, layout):
    """The same values in another layout. Whatever lies between them is NaN, so that reading it shows."""
    if tensor.numel() == 0 or tensor.dim() < 2:
        return tensor
    rows, cols = tensor.shape[-2:]
    wide = torch.full((*tensor.shape[:-2], 2 * rows, 2 * cols + 3), math.nan, dtype=tensor.dtype)
    view = {
        "contiguous": lambda: wide.new_empty(tensor.shape),
        "row slice": lambda: wide[..., :rows, :cols],
        "odd offset": lambda: wide[..., rows - 1 : 2 * rows - 1, 1 : cols + 1],
        "row stride": lambda: wide[..., ::2, :cols],
        "column stride": lambda: wide[..., :rows, 1 : 2 * cols + 1 : 2],
        "transposed": lambda: wide.new_empty((*tensor.shape[:-2], cols, rows)).mT,
    }[layout]()
    return view.copy_(tensor)


LAYOUTS = ["row slice", "odd offset", "row stride", "column stride", "transposed"]


@pytest.mark.every_isa
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_layouts_change_nothing(dtypes, layout, transposed):
    p = problem((19, 67, 35, 5), dtypes, transposed=transposed, dropout=0.3)
    other = p.map(lambda tensor: strided(tensor, layout))
    assert_equal(forward_backward(lora_linear, other), forward_backward(lora_linear, p))


@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_one_operand(operand, layout):
    p = problem((19, 67, 35, 5), DTYPES["bf16-fp32"], dropout=0.3)
    old = getattr(p, operand)
    new = [strided(old[0], layout)] if isinstance(old, list) else strided(old, layout)
    assert_equal(
        forward_backward(lora_linear, replace(p, **{operand: new})), forward_backward(lora_linear, p)
    )


@by_dtype
def test_expanded_operands(dtypes):
    p = problem((19, 67, 35, 5), dtypes)
    p.x, p.grad = p.x[:1].expand(19, 67), p.grad[:1, :1].expand(19, 35)
    assert_equal(
        forward_backward(lora_linear, p), forward_backward(lora_linear, p.map(torch.Tensor.contiguous))
    )


def test_permuted_batch():
    p = problem((0, 67, 35, 5), DTYPES["fp32"], batch=(4, 6), dropout=0.3)
    p.x, p.grad = p.x.transpose(0, 1), p.grad.transpose(0, 1)
    assert_equal(
        forward_backward(lora_linear, p), forward_backward(lora_linear, p.map(torch.Tensor.contiguous))
    )


dimensions = st.integers(1, 70)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 20), dimensions, dimensions, st.integers(1, 24)),
    dtypes=st.sampled_from(list(DTYPES.values())),
    layouts=st.fixed_dictionaries({name: st.sampled_from(["contiguous", *LAYOUTS]) for name in "xWABG"}),
    bias=st.booleans(),
    transposed=st.booleans(),
    dropout=st.sampled_from([0.0, 0.05, 0.5, 0.9]),
    scaling=st.sampled_from([0.5, 1.0, -2.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_layout(shape, dtypes, layouts, bias, transposed, dropout, scaling, seed):
    torch.manual_seed(seed % 1000)
    p = problem(shape, dtypes, bias=bias, transposed=transposed, dropout=dropout, scalings=[scaling])
    check(
        replace(
            p,
            x=strided(p.x, layouts["x"]),
            weight=strided(p.weight, layouts["W"]),
            lora_A=[strided(p.lora_A[0], layouts["A"])],
            lora_B=[strided(p.lora_B[0], layouts["B"])],
            grad=strided(p.grad, layouts["G"]),
            seed=torch.tensor([seed]),
        ),
        rule=False,
    )


# ----------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("-+"[i] for i in w)
)
def test_only_the_gradients_asked_for(wanted):
    p = problem((13, 40, 30, 6), DTYPES["bf16-fp32"], bias=True, dropout=0.3)
    everything = forward_backward(lora_linear, p)
    names = [name for name, want in zip(p.leaves(), wanted, strict=True) if want]
    some = forward_backward(lora_linear, p, names)
    assert torch.equal(some["output"], everything["output"])
    assert names or not some["output"].requires_grad
    for name in p.leaves():
        if name in names:
            assert torch.equal(some[f"grad of {name}"], everything[f"grad of {name}"]), name
        else:
            assert some.get(f"grad of {name}") is None, name


def test_a_frozen_adapter_beside_a_trained_one():
    p = problem((13, 40, 30, None), DTYPES["fp32"], ranks=[6, 2], scalings=[0.5, 2.0], dropouts=[0.3, 0.0])
    everything = forward_backward(lora_linear, p)
    some = forward_backward(lora_linear, p, ["lora_A[1]", "lora_B[0]"])
    for name, gradient in some.items():
        if name in ("output", "grad of lora_A[1]", "grad of lora_B[0]"):
            assert torch.equal(gradient, everything[name]), name
        else:
            assert gradient is None, name


def test_gradients_accumulate_over_two_calls():
    p = problem((13, 40, 30, 6), DTYPES["fp32"])
    once = forward_backward(lora_linear, p)
    A = p.lora_A[0].detach().requires_grad_()
    for _ in range(2):
        lora_linear(p.x, p.weight, A, p.lora_B[0], 0.75).backward(p.grad)
    assert torch.equal(A.grad, 2 * once["grad of lora_A[0]"])


def test_retained_graph_gives_the_same_gradients_again():
    p = problem((13, 40, 30, 6), DTYPES["fp32"], dropout=0.3)
    leaves = [p.x.requires_grad_(), p.lora_A[0].requires_grad_(), p.lora_B[0].requires_grad_()]
    out = call(lora_linear, p)
    first = torch.autograd.grad(out, leaves, p.grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, p.grad)
    assert all(map(torch.equal, first, second))


def test_a_weight_that_wants_a_gradient_is_refused():
    p = problem((13, 40, 30, 6), DTYPES["fp32"])
    p.weight.requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient for weight: freeze it"):
        call(lora_linear, p).backward(p.grad)


def test_operands_changed_before_backward_are_refused():
    p = problem((13, 40, 30, 6), DTYPES["fp32"])
    A = p.lora_A[0].requires_grad_()
    B = p.lora_B[0].requires_grad_()
    out = call(lora_linear, p)
    with torch.no_grad():
        B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.grad)
    assert A.grad is None


def test_operands_are_left_alone():
    p = problem((13, 40, 30, 6), DTYPES["bf16"], bias=True, dropout=0.3)
    before = p.map(torch.clone)
    forward_backward(lora_linear, p)
    assert (
        torch.equal(p.x, before.x)
        and torch.equal(p.weight, before.weight)
        and torch.equal(p.grad, before.grad)
    )
    assert torch.equal(p.lora_A[0], before.lora_A[0]) and torch.equal(p.lora_B[0], before.lora_B[0])


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dropouts", [[0.0, 0.0], [0.3, 0.6]], ids=["keep", "drop"])
def test_gradcheck_of_the_reference(dropouts, transposed):
    float64 = (torch.float64, torch.float64)
    p = problem(
        (3, 5, 4, None),
        float64,
        bias=True,
        transposed=transposed,
        ranks=[2, 3],
        scalings=[0.5, -2.0],
        dropouts=dropouts,
    )
    leaves = [t.requires_grad_() for t in (p.x, p.bias, *p.lora_A, *p.lora_B)]

    def function(x, bias, A0, A1, B0, B1):
        return call(reference.lora_linear, replace(p, x=x, bias=bias, lora_A=[A0, A1], lora_B=[B0, B1]))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dropouts", [[0.0, 0.0], [0.3, 0.6]], ids=["keep", "drop"])
def test_the_reference_is_the_peft_formula(dropouts):
    float64 = (torch.float64, torch.float64)
    p = problem((6, 25, 14, None), float64, bias=True, ranks=[2, 3], scalings=[0.5, -2.0], dropouts=dropouts)
    ours, formula = forward_backward(reference.lora_linear, p), forward_backward(peft_formula, p)
    for name in formula:
        torch.testing.assert_close(ours[name], formula[name], rtol=1e-12, atol=1e-12, msg=name)


def test_second_derivative_is_refused():
    p = problem((6, 25, 14, 3), DTYPES["fp32"])
    p.x.requires_grad_()
    (gradient,) = torch.autograd.grad(call(lora_linear, p).square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as refusal:
        gradient.sum().backward()
    assert len(str(refusal.value).strip().splitlines()) == 1


def saved_bytes(function, operands):
    """Bytes that autograd holds for the backward of function(), not counting the storage of its operands."""
    storages = {}
    known = {t.untyped_storage().data_ptr() for t in operands}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, sum(storages.values())


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("batch", [(48,), (4, 12)], ids=str)
@pytest.mark.parametrize("ranks", [[6], [3, 5]], ids=str)
@by_dtype
def test_saved_for_backward(dtypes, ranks, batch, dropout):
    p = problem((48, 400, 300, None), dtypes, ranks=ranks, batch=batch, bias=True, dropout=dropout)
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    out, size = saved_bytes(lambda: call(lora_linear, p), [p.weight, p.seed, *p.leaves().values()])
    assert 0 < size <= 8 * 48 * sum(ranks)
    out.backward(p.grad)


def test_no_grad_saves_nothing():
    p = problem((48, 400, 300, 6), DTYPES["bf16-fp32"], bias=True, dropout=0.3)
    expected = call(lora_linear, p)
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, size = saved_bytes(lambda: call(lora_linear, p), [])
        assert size == 0 and not out.requires_grad and out.grad_fn is None
        assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------ determinism, dropout


@pytest.mark.every_isa
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize(
    "shape", [(1, 900, 700, 16), (131, 257, 130, 16), (300, 64, 33, 70), *LARGE[:3]], ids=name_of
)
@by_dtype
def test_equal_bits_for_any_number_of_threads(shape, dtypes, transposed):
    p = problem(shape, dtypes, bias=True, dropout=0.2, transposed=transposed)
    torch.set_num_threads(1)
    alone = forward_backward(lora_linear, p)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(forward_backward(lora_linear, p), alone)


def test_calls_from_several_threads_at_once():
    """Each has its own workspace: the results are those of one after the other."""
    torch.set_num_threads(2)
    problems = [problem((40 + i, 100, 90, 8), DTYPES["bf16-fp32"], dropout=0.2) for i in range(8)]
    expected = [forward_backward(lora_linear, p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, wanted in zip(
                pool.map(lambda p: forward_backward(lora_linear, p), problems), expected, strict=True
            ):
                assert_equal(got, wanted)


def drawn(p, seed):
    torch.manual_seed(seed)
    leaves = [p.x, *p.lora_A, *p.lora_B]
    for leaf in leaves:
        leaf.requires_grad_()
    out = lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, dropout=p.dropout)
    return [out, *torch.autograd.grad(out, leaves, p.grad)]


def test_manual_seed_decides_the_dropout():
    p = problem((31, 64, 48, 8), DTYPES["bf16-fp32"], dropout=0.2)
    first, again, other = drawn(p, 1), drawn(p, 1), drawn(p, 2)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_every_call_draws_a_new_mask():
    p = problem((31, 64, 48, 8), DTYPES["fp32"], dropout=0.2)
    outputs = [lora_linear(p.x, p.weight, p.lora_A[0], p.lora_B[0], 1.0, dropout=0.2) for _ in range(2)]
    assert not torch.equal(*outputs)


def test_no_dropout_leaves_the_generator_alone():
    p = problem((31, 64, 48, 8), DTYPES["fp32"])
    states = random_states()
    call(lora_linear, p)
    assert all(map(torch.equal, random_states(), states))


def kernel_masks(shape, dropouts, seed, dtypes):
    """The kernel's keep-masks, read off its output: x = 1, W = 0, A = B = eye: y = keep / (1 - dropout)."""
    K, (dtype, adapter_dtype) = shape[-1], dtypes
    eye = torch.eye(K, dtype=adapter_dtype)
    for i, p in enumerate(dropouts):
        scaling = [float(i == j) for j in range(len(dropouts))]
        out = lora_linear(
            torch.ones(shape, dtype=dtype),
            torch.zeros(K, K, dtype=dtype),
            [eye] * len(dropouts),
            [eye] * len(dropouts),
            scaling,
            dropout=dropouts,
            seed=seed,
        )
        kept = out != 0
        torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)))
        yield kept


@pytest.mark.every_isa
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 17, -(2**63)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (37, 131), (3, 5, 64)], ids=str)
@by_dtype
def test_the_kernel_drops_what_the_reference_drops(shape, seed, dtypes):
    seed, dropouts = torch.tensor([seed]), [0.25, 0.0, 0.7]
    for i, kept in enumerate(kernel_masks(shape, dropouts, seed, dtypes)):
        assert torch.equal(kept, reference.dropout_mask(shape, dropouts[i], seed, adapter=i))


@pytest.mark.every_isa
@by_dtype
def test_backward_drops_what_forward_dropped(dtypes):
    dtype, seed, shape = dtypes[0], torch.tensor([99]), (37, 66)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    eye = torch.eye(66, dtype=dtype)
    A = eye.clone().requires_grad_()
    lora_linear(x, 0 * eye, A, eye, 1.0, dropout=0.4, seed=seed).backward(torch.ones_like(x))
    mask = reference.dropout_mask(shape, 0.4, seed)
    kept = mask / 0.6
    torch.testing.assert_close(x.grad, kept.to(dtype))
    torch.testing.assert_close(A.grad.double(), kept.double().sum(0).expand(66, 66), rtol=1e-2, atol=0)


def philox(counter, key):
    """Philox 4x32-10 on Python integers, from its paper's definition."""
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def test_philox_known_answers():
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


@pytest.mark.parametrize("adapter", [0, 3])
@pytest.mark.parametrize("dropout", [0.0, 2**-33, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("seed", [0, -2, 0x0123456789ABCDEF])
def test_the_mask_is_philox(seed, dropout, adapter):
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = [word for i in range(20) for word in philox((i, 0, adapter, 0), key)]
    keep = [word >= round(dropout * 2**32) for word in words[:77]]
    mask = reference.dropout_mask((7, 11), dropout, torch.tensor([seed]), adapter=adapter)
    assert mask.dtype == torch.bool and mask.flatten().tolist() == keep


def within_five_sigma(count, trials, probability):
    return abs(count - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability))


@pytest.mark.parametrize("dropout", [0.01, 0.05, 0.5, 0.9])
def test_dropout_drops_as_often_as_asked(dropout):
    shape = (300, 301)
    mask = reference.dropout_mask(shape, dropout, torch.tensor([7]))
    dropped = ~mask
    assert within_five_sigma(dropped.sum().item(), dropped.numel(), dropout)
    others = {
        "the next row": (dropped[:-1] & dropped[1:]),
        "the next column": (dropped[:, :-1] & dropped[:, 1:]),
        "another adapter": dropped & ~reference.dropout_mask(shape, dropout, torch.tensor([7]), adapter=1),
        "the next seed": dropped & ~reference.dropout_mask(shape, dropout, torch.tensor([8])),
    }
    for name, both in others.items():
        assert within_five_sigma(both.sum().item(), both.numel(), dropout**2), name


def test_drawn_seeds_drop_as_often_as_asked():
    """Over seeds that torch draws, elements are kept with the right frequency, independently per adapter."""
    x, eye, runs = torch.ones(1, 32), torch.eye(32), 1000
    kept = torch.zeros(2)
    both = 0
    for _ in range(runs):
        out = lora_linear(x, 0 * eye, [eye, eye], [eye, eye], [1.0, 10.0], dropout=[0.5, 0.5])
        first, second = (out % 20) > 1, out > 10
        kept += torch.tensor([first.sum(), second.sum()])
        both += (first & second).sum().item()
    assert within_five_sigma(kept[0].item(), runs * 32, 0.5)
    assert within_five_sigma(kept[1].item(), runs * 32, 0.5)
    assert within_five_sigma(both, runs * 32, 0.25)


# ------------------------------------------------------------------------------------------ modes of torch


def compiled(backend, **options):
    torch._dynamo.reset()
    return torch.compile(lora_linear, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("ranks", [[4], [4, 7]], ids=str)
@by_dtype
def test_compiled(dtypes, ranks, dropout):
    p = problem((13, 40, 30, None), dtypes, bias=True, ranks=ranks, dropout=dropout)
    assert_equal(forward_backward(compiled("aot_eager"), p), forward_backward(lora_linear, p))


def test_compiled_by_inductor():
    p = problem((13, 40, 30, 4), DTYPES["bf16-fp32"], bias=True, dropout=0.3)
    assert_equal(forward_backward(compiled("inductor"), p), forward_backward(lora_linear, p))


def test_compiled_for_any_number_of_rows():
    function = compiled("aot_eager", dynamic=True)
    for M in (5, 13, 64):
        p = problem((M, 40, 30, 4), DTYPES["fp32"], dropout=0.3)
        assert_equal(forward_backward(function, p), forward_backward(lora_linear, p))


def test_compiled_draws_its_seed():
    p = problem((13, 40, 30, 4), DTYPES["fp32"], dropout=0.3)
    function = compiled("aot_eager")

    def run(f):
        return f(p.x, p.weight, p.lora_A[0], p.lora_B[0], 0.75, dropout=0.3)

    first, second = run(function), run(function)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    expected = run(lora_linear)
    torch.manual_seed(5)
    assert torch.equal(run(function), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_replays_the_dropout(reentrant):
    p = problem((31, 64, 64, 8), DTYPES["bf16-fp32"], dropout=0.3)

    def layer(x, A, B):
        return F.silu(lora_linear(x, p.weight, A, B, 0.75, dropout=0.3))

    def gradients(run):
        torch.manual_seed(11)
        leaves = [t.detach().requires_grad_() for t in (p.x, p.lora_A[0], p.lora_B[0])]
        x, A, B = leaves
        run(run(x, A, B), A, B).backward(p.grad)
        return [leaf.grad for leaf in leaves]

    plain = gradients(layer)
    replayed = gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, replayed))


@pytest.mark.parametrize(
    ("dtypes", "autocast"),
    [
        ("fp32", torch.bfloat16),
        ("fp32", torch.float16),
        ("bf16", torch.bfloat16),
        ("bf16-fp32", torch.bfloat16),
    ],
)
def test_autocast(dtypes, autocast):
    def under(function):
        def run(*args, **kwargs):
            with torch.autocast(p.x.device.type, dtype=autocast):
                return function(*args, **kwargs)

        return run

    p = problem((64, 64, 64, 40), DTYPES[dtypes], bias=True, dropout=0.3)
    p.grad = p.grad.to(autocast)
    got, eager = forward_backward(under(lora_linear), p), forward_backward(under(peft_formula), p)
    for name, exact in in_float64(p).items():
        assert got[name].dtype == eager[name].dtype, name
        if exact.numel() >= 2000:
            assert_as_accurate(got[name], eager[name], exact, name=name)
        else:
            torch.testing.assert_close(got[name], exact.to(got[name].dtype), rtol=0.01, atol=0.01)


def test_autocast_ends_where_it_is_disabled():
    p = problem((31, 64, 48, 8), DTYPES["fp32"])
    device = p.x.device.type
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert_equal(forward_backward(lora_linear, p), forward_backward(lora_linear, p))
        assert call(lora_linear, p).dtype == torch.float32


# ----------------------------------------------------------------------------------------------- bad input

GOOD = dict(
    x=torch.ones(5, 8),
    weight=torch.ones(6, 8),
    lora_A=torch.ones(3, 8),
    lora_B=torch.ones(6, 3),
    scaling=1.0,
    bias=torch.ones(6),
    dropout=0.5,
    transposed=False,
    seed=torch.tensor([1]),
)
BAD = [  # what changes, the error, the arguments of which the message names one
    (dict(x=[[1.0]]), TypeError, "x"),
    (dict(x=torch.ones(5, 8, dtype=torch.int32)), TypeError, "x"),
    (dict(x=torch.ones(5, 8, dtype=torch.complex64)), TypeError, "x"),
    (dict(x=torch.ones(5, 8).double()), TypeError, "x"),
    (dict(x=torch.ones(5, 9)), ValueError, "x|weight"),
    (dict(x=torch.ones(())), ValueError, "x"),
    (dict(x=torch.ones(5, 8).to_sparse()), (TypeError, ValueError), "x"),
    (dict(x=torch.ones(5, 8, device="meta")), ValueError, "x|weight|lora_A|lora_B|bias|seed"),
    (dict(weight=None), TypeError, "weight"),
    (dict(weight=torch.ones(8)), ValueError, "weight"),
    (dict(weight=torch.ones(1, 6, 8)), ValueError, "weight"),
    (dict(weight=torch.ones(6, 7)), ValueError, "x|weight"),
    (dict(weight=torch.ones(6, 8).bfloat16()), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8, device="meta")), ValueError, "weight"),
    (dict(transposed=True), ValueError, "x|weight"),
    (dict(lora_A=None), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(8)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(3, 7)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(8, 3)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(2, 8)), ValueError, "lora_A|lora_B"),
    (dict(lora_A=torch.ones(0, 8), lora_B=torch.ones(6, 0)), ValueError, "lora_A|lora_B"),
    (dict(lora_A=torch.ones(3, 8).double()), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(3, 8).half()), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(3, 8).bfloat16(), lora_B=torch.ones(6, 3).bfloat16()), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(3, 8, device="meta")), ValueError, "lora_A"),
    (dict(lora_B=3), TypeError, "lora_B"),
    (dict(lora_B=torch.ones(6)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(7, 3)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(3, 6)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(6, 3).half()), TypeError, "lora_B"),
    (dict(lora_B=torch.ones(6, 3, device="meta")), ValueError, "lora_B"),
    (dict(lora_A=[torch.ones(3, 8)] * 2), ValueError, "lora_A|lora_B"),
    (dict(scaling=[1.0, 2.0]), ValueError, "scaling"),
    (dict(scaling="1"), TypeError, "scaling"),
    (dict(scaling=torch.ones(2)), ValueError, "scaling"),
    (dict(bias=torch.ones(5)), ValueError, "bias"),
    (dict(bias=torch.ones(1, 6)), ValueError, "bias"),
    (dict(bias=torch.ones(6).double()), TypeError, "bias"),
    (dict(bias=1.0), TypeError, "bias"),
    (dict(bias=torch.ones(6, device="meta")), ValueError, "bias"),
    (dict(dropout=1.0), ValueError, "dropout"),
    (dict(dropout=-0.1), ValueError, "dropout"),
    (dict(dropout=1.5), ValueError, "dropout"),
    (dict(dropout=math.nan), ValueError, "dropout"),
    (dict(dropout="0.5"), TypeError, "dropout"),
    (dict(dropout=[0.5, 0.5]), ValueError, "dropout"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "seed"),
    (dict(seed=torch.tensor([], dtype=torch.int64)), ValueError, "seed"),
    (dict(seed=torch.tensor([math.nan])), (TypeError, ValueError), "seed"),
    (dict(seed=torch.tensor([1], dtype=torch.int32)), (TypeError, ValueError), "seed"),
    (dict(seed=math.nan), TypeError, "seed"),
    (dict(seed=torch.tensor([1], device="meta")), ValueError, "seed"),
]


def name_of_bad(change):
    def short(value):
        if isinstance(value, torch.Tensor):
            dtype, layout = (
                str(value.dtype).removeprefix("torch."),
                str(value.layout).removeprefix("torch.strided"),
            )
            return f"{dtype}{list(value.shape)}{value.device.type}{layout}"
        return [short(v) for v in value] if isinstance(value, list) else value

    return ",".join(f"{name}={short(value)}" for name, value in change.items())


@pytest.mark.parametrize("change, error, names", BAD, ids=[name_of_bad(change) for change, _, _ in BAD])
def test_bad_input(change, error, names):
    lora_linear(**GOOD)
    with pytest.raises(error, match=rf"\b({names})\b") as caught:
        lora_linear(**GOOD | change)
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


def test_the_smallest_and_largest_dropout():
    p = problem((31, 64, 48, 8), DTYPES["fp32"])
    check(replace(p, dropout=[1e-12]))
    check(replace(p, dropout=[1 - 1e-7]))


# -------------------------------------------------------------------------------------------- registration


def operands(p):
    """The arguments of the registered op, as its schema orders them."""
    seed = p.seed if any(p.dropout) else None
    return p.x, p.weight, p.bias, p.lora_A, p.lora_B, p.scaling, p.dropout, seed, p.transposed


@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("ranks", [[4], [4, 7]], ids=str)
@by_dtype
def test_opcheck(dtypes, ranks, dropout):
    """torch's own checks of an op: schema, fake, autograd registration, tracing with dynamic shapes."""
    p = problem((13, 40, 30, None), dtypes, bias=True, ranks=ranks, dropout=dropout)
    opcheck(FORWARD, operands(p))
    y, u = FORWARD(*operands(p))
    x, weight, _, A, B, *settings = operands(p)
    wanted = (True, [True] * len(A), [False] * len(B))
    opcheck(BACKWARD, (torch.randn_like(y), x, weight, A, B, u, *settings, *wanted))
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    opcheck(FORWARD, operands(p))
    assert [result.requires_grad for result in FORWARD(*operands(p))] == [True, False]


@pytest.mark.parametrize("change", ["weight", "lora_A", "lora_B", "bias", "seed", "lists"])
def test_the_registered_op_stays_inside_its_memory(change):
    """Called past the Python face, without its checks, the op still refuses what it cannot index."""
    p = problem((13, 40, 30, 4), DTYPES["fp32"], bias=True, dropout=0.3)
    p = replace(
        p,
        **{
            "weight": dict(weight=p.weight[:, :-1]),
            "lora_A": dict(lora_A=[p.lora_A[0][:, :-1]]),
            "lora_B": dict(lora_B=[p.lora_B[0][:-1]]),
            "bias": dict(bias=p.bias[:-1]),
            "seed": dict(seed=p.seed.int()),
            "lists": dict(scaling=[1.0, 1.0]),
        }[change],
    )
    with pytest.raises(RuntimeError):
        FORWARD(*operands(p))


@pytest.mark.every_isa
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@by_dtype
def test_linear_into(dtypes, bias):
    """The product alone, in memory that the caller has: the bits of the operator that allocates its own."""
    for M in (0, 1, 13, 50):
        p = problem((M, 40, 30, 4), dtypes, bias=bias)
        y = p.x.new_full((M + 2, 30), 7)
        assert LINEAR_INTO(y[1:-1], p.x, p.weight, p.bias) is None
        assert torch.equal(y[1:-1], FORWARD(p.x, p.weight, p.bias, [], [], [], [], None, False)[0])
        assert (y[0] == 7).all() and (y[-1] == 7).all()
    opcheck(LINEAR_INTO, (y[1:-1], p.x, p.weight, p.bias))


@pytest.mark.parametrize("wrong", ["rows", "columns", "strides", "dtype"])
def test_linear_into_stays_inside_its_memory(wrong):
    p = problem((13, 40, 30, 4), DTYPES["fp32"])
    y = {
        "rows": p.x.new_empty(12, 30),
        "columns": p.x.new_empty(13, 31),
        "strides": p.x.new_empty(30, 13).T,
        "dtype": p.x.new_empty(13, 30).half(),
    }[wrong]
    with pytest.raises(RuntimeError, match="y (has shape|must)"):
        LINEAR_INTO(y, p.x, p.weight, None)
