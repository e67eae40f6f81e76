"""Linear layers over groups of rows, and the experts of mixtures on them, against float64 and transformers.

The rule of accuracy is that of test_lora.py; the computation that the op replaces is the loop over groups that
`reference.grouped_linear` spells out. A and B are never zero, and B lies in memory as PEFT stores that of experts.
"""

import importlib
import itertools
import math
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from conftest import on_a_gpu, random_states
from hypothesis import given, settings
from test_lora import LAYOUTS, assert_equal, name_of_bad, strided
from torch.utils.checkpoint import checkpoint

from peftfast import reference
from peftfast.nn.moe import Routing
from peftfast.ops import fourbit_quantize, grouped_linear, lora_linear, moe, moe_combine, swiglu
from peftfast.ops.moe import call
from peftfast.reference import FourBitWeight
from peftfast.testing import assert_as_accurate, bytes_saved_for_backward

FORWARD = torch.ops.peftfast.grouped_linear.default
BACKWARD = torch.ops.peftfast.grouped_linear_backward.default
COMBINE = torch.ops.peftfast.moe_combine.default
COMBINE_BACKWARD = torch.ops.peftfast.moe_combine_backward.default
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # of x, of the adapters
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16-fp32": (BF16, F32),
    "fp16-fp32": (F16, F32),
}
WEIGHTS = {  # how the weight is quantized, None: dense; and whether it is stored transposed
    "dense": (None, False),
    "dense transposed": (None, True),
    "nf4": (dict(), False),
    "nf4 transposed": (dict(blocksize=128), True),
    "fp4 plain": (dict(quant_type="fp4", nested=False, blocksize=32), False),
    "fp4 plain transposed": (dict(quant_type="fp4", nested=False), True),
}
SHAPES = [(33, 65, 3), (128, 64, 16), (130, 129, 5), (96, 31, 40)]  # K, N, rank
EXPERTS, SLOTS = 5, 4


@dataclass
class Grouping:
    """Rows of no group before the first, the rows of each group, and what the groups have; slot 3 is never used."""

    sizes: tuple
    experts: tuple
    slots: tuple
    before: int = 0
    after: int = 0

    @property
    def M(self):
        return self.before + sum(self.sizes) + self.after

    @property
    def offsets(self):
        return torch.tensor([*itertools.accumulate(self.sizes, initial=self.before)])


# An expert and a slot twice, neighbours and not; more and fewer rows than the few that a 4-bit product treats alone.
MIXED = Grouping((13, 0, 1, 40, 12, 9), (4, 0, 2, 1, 4, 3), (1, -1, 0, 1, -1, 0), before=2, after=3)
GROUPINGS = {
    "in order": Grouping((5, 14, 2, 6), (0, 1, 2, 3), (0, 1, 2, 0)),
    "no adapter": Grouping((5, 14), (3, 1), (-1, -7)),
    "one row": Grouping((0, 0, 1, 0), (3, 1, 2, 0), (0, 1, 2, 0)),
    "all in one": Grouping((0, 77, 0), (3, 1, 2), (0, 2, 1)),
    "one expert": Grouping((11, 12, 13, 14), (2, 2, 2, 2), (2, 0, 1, 2)),
    "one adapter": Grouping((30, 1, 12, 20), (3, 1, 2, 0), (1, 1, 1, 1), after=1),
    "empty": Grouping((0, 0, 0), (3, 1, 2), (0, 2, 1), before=3, after=2),
    "no groups": Grouping((), (), (), before=4),
    "no rows": Grouping((0, 0), (3, 1), (0, 2)),
    "nothing": Grouping((), (), ()),
}


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """As in test_lora.py: the operands are small."""
    torch.set_num_threads(1)


def parametrized(name, cases):
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


by_dtype, by_weight, by_grouping = (
    parametrized(*case) for case in [("dtypes", DTYPES), ("kind", WEIGHTS), ("grouping", GROUPINGS)]
)


@dataclass
class Problem:
    """One call: the operands that may have a gradient, the weight, the gradient of the output, all other arguments."""

    leaves: dict
    weight: torch.Tensor | FourBitWeight | None
    grad: torch.Tensor
    offsets: torch.Tensor
    settings: dict = field(default_factory=dict)

    def map(self, f):
        """The same problem with f applied to every operand but a 4-bit weight."""
        weight = f(self.weight) if isinstance(self.weight, torch.Tensor) else self.weight
        leaves = {name: f(leaf) for name, leaf in self.leaves.items()}
        return replace(self, leaves=leaves, weight=weight, grad=f(self.grad))

    def having(self, **settings):
        return replace(self, settings=self.settings | settings)


def problem(
    grouping=MIXED, shape=SHAPES[0], dtypes=DTYPES["bf16-fp32"], kind=WEIGHTS["dense"],
    *, dropout=0.0, tokens=None, adapters=True, bias=True, compute_dtype=None,
):  # fmt: skip
    """Random operands with outputs of order one. `tokens`: rows of x, which the rows of the product repeat."""
    (K, N, r), (dtype, adapter_dtype), (format, transposed), M = shape, dtypes, kind, grouping.M
    weight = torch.randn(EXPERTS, *((K, N) if transposed else (N, K))) * max(K, 1) ** -0.5
    leaves = {"x": torch.randn(M if tokens is None else tokens, K).to(dtype)}
    if adapters:
        leaves["lora_A"] = (torch.randn(SLOTS, r, K) * max(K, 1) ** -0.5).to(adapter_dtype)
        leaves["lora_B"] = (torch.randn(N, r * SLOTS) * r**-0.5).to(adapter_dtype).reshape(N, r, SLOTS)
        leaves["lora_B"] = leaves["lora_B"].permute(2, 0, 1)
    return Problem(
        leaves | ({"bias": torch.randn(EXPERTS, N).to(dtype)} if bias else {}),
        weight.to(dtype) if format is None else fourbit_quantize(weight.to(dtype), **format),
        torch.randn(M, N).to(dtype),
        grouping.offsets,
        dict(
            experts=torch.tensor(grouping.experts, dtype=torch.int64),
            slots=torch.tensor(grouping.slots, dtype=torch.int64) if adapters else None,
            rows=None if tokens is None else torch.randint(tokens, (M,)),
            scaling=0.75,
            dropout=dropout,
            transposed=transposed,
            seed=torch.tensor([20240229]) if dropout else None,
            compute_dtype=compute_dtype,
        ),
    )


def forward_backward(function, p, wanted=None):
    """The output and the gradients of the operands named in `wanted` (all of them if None), by name."""
    leaves = {name: leaf.detach() for name, leaf in p.leaves.items()}
    wanted = list(leaves) if wanted is None else wanted
    for name in wanted:
        leaves[name].requires_grad_()
    rest = {name: leaf for name, leaf in leaves.items() if name != "x"}
    out = function(leaves["x"], p.weight, p.offsets, **rest, **p.settings)
    if out.requires_grad:
        out.backward(p.grad.to(out.dtype))
    for name in wanted:  # the reference gives none to what no group uses
        leaves[name].grad = torch.zeros_like(leaves[name]) if leaves[name].grad is None else leaves[name].grad
    return {"output": out.detach()} | {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}


def in_float64(p, of_weight=lambda dense: dense):
    """The oracle: what the codes stand for, and nothing rounded after that."""
    dense = p.weight
    if isinstance(dense, FourBitWeight):
        dense = reference.fourbit_dequantize(dense, torch.float64)
    weight = None if dense is None else of_weight(dense.double())
    exact = replace(p.map(torch.Tensor.double), weight=weight)
    return forward_backward(reference.grouped_linear, exact.having(compute_dtype=None))


def worst_rounding(p, dtypes):
    """By how much each element may be off: every sum in fp32, in any order, one rounding to its dtype (a second where
    gradients of a repeated row add up), and of both sides of the product of a 4-bit weight to compute_dtype.

    The size of the terms of a sum is the same computation on absolute values.
    """
    terms = p.grad.shape[0] + 2 * (p.grad.shape[1] + sum(p.leaves["x"].shape)) + 520
    bounds = in_float64(p.map(torch.abs), torch.abs)
    for name, size in bounds.items():
        unit = torch.finfo(dtypes[name]).eps / 2
        roundings = 2 if name == "grad of x" and p.settings["rows"] is not None else 1
        product = 0
        if isinstance(p.weight, FourBitWeight) and name in ("output", "grad of x"):
            product = 1.01 * torch.finfo(p.settings["compute_dtype"] or p.leaves["x"].dtype).eps
        bounds[name] = (
            size * (roundings * unit + product + terms * 2**-24)
            + torch.finfo(dtypes[name]).smallest_normal * unit
        )
    return bounds


def check(p, rule=True, function=grouped_linear):
    """The output and every gradient keep the rule. `rule=False`: no element is off by too much."""
    got, eager, oracle = (
        forward_backward(function, p),
        forward_backward(reference.grouped_linear, p),
        in_float64(p),
    )
    bounds = worst_rounding(p, {name: result.dtype for name, result in got.items()})
    for name, exact in oracle.items():
        assert got[name].shape == exact.shape, name
        assert got[name].dtype == eager[name].dtype, name
        off = (got[name] - exact).abs() - bounds[name]
        assert (off <= 0).all(), f"{name} is off by {off.max().item()} more than rounding"
        if rule and exact.numel() >= 2000:
            assert_as_accurate(got[name], eager[name], exact, name=name)
    return got


# Nothing looks at the values of offsets, experts, slots, rows and places on a GPU: it would have to wait.
where_values_are_read = pytest.mark.skipif(on_a_gpu(), reason="values are not checked on a GPU")


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.every_isa
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids="K{0[0]}-N{0[1]}-r{0[2]}".format)
@by_weight
@by_dtype
def test_accuracy(dtypes, kind, shape, dropout):
    got = check(problem(MIXED, shape, dtypes, kind, dropout=dropout))
    assert not got["grad of lora_A"][3].any() and not got["grad of lora_B"][3].any(), "of a slot of no group"
    assert not got["output"][:2].any() and not got["grad of x"][-3:].any(), "of rows of no group"


@pytest.mark.every_isa
@pytest.mark.parametrize("tokens", [None, 7], ids=["", "repeated"])
@by_weight
@by_grouping
def test_groups(grouping, kind, tokens):
    check(problem(grouping, SHAPES[2], kind=kind, dropout=0.3, tokens=tokens), rule=False)


@pytest.mark.every_isa
@by_weight
@by_dtype
def test_the_weights_alone(dtypes, kind):
    """No adapters, so that nothing hides the weight's own part."""
    check(problem(MIXED, SHAPES[2], dtypes, kind, adapters=False, bias=False))


@pytest.mark.every_isa
@pytest.mark.parametrize("tokens", [None, 7], ids=["", "repeated"])
@pytest.mark.parametrize("shape", SHAPES, ids="K{0[0]}-N{0[1]}-r{0[2]}".format)
@by_dtype
def test_the_adapters_alone(dtypes, shape, tokens):
    """No weight, so that nothing hides the low-rank part; a row without an adapter comes out as zeros."""
    p = problem(MIXED, shape, dtypes, dropout=0.3, tokens=tokens, bias=False)
    got = check(replace(p, weight=None).having(experts=None))
    assert not got["output"][p.offsets[4] : p.offsets[5]].any() and got["output"].any()


@pytest.mark.every_isa
@by_grouping
def test_groups_of_adapters_alone(grouping):
    check(replace(problem(grouping, dropout=0.3, bias=False), weight=None).having(experts=None), rule=False)


@pytest.mark.every_isa
@pytest.mark.parametrize("compute_dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    "kind", [WEIGHTS["nf4"], WEIGHTS["fp4 plain transposed"]], ids=["nf4", "fp4 transposed"]
)
@by_dtype
def test_compute_dtype(dtypes, kind, compute_dtype):
    check(problem(MIXED, SHAPES[1], dtypes, kind, dropout=0.3, compute_dtype=compute_dtype))


@pytest.mark.every_isa
@pytest.mark.parametrize("kind", [WEIGHTS["dense"], WEIGHTS["nf4"]], ids=["dense", "nf4"])
@by_dtype
def test_past_the_blocks(dtypes, kind):
    """More rows, inputs and outputs than one block of the kernels has."""
    large = Grouping((2101, 30), (1, 3), (0, 0))
    check(problem(large, (24, 65, 4), dtypes, kind, dropout=0.1))
    for K, N in ((4168, 70), (70, 2177)):
        check(problem(Grouping((13, 0, 5), (1, 3, 0), (2, 1, 0)), (K, N, 32), dtypes, kind, dropout=0.1))


@pytest.mark.parametrize("kind", [WEIGHTS["dense"], WEIGHTS["nf4"]], ids=["dense", "nf4"])
@pytest.mark.parametrize("shape", [(0, 8, 4), (8, 0, 4), (0, 0, 1)], ids=str)
def test_nothing_to_sum(shape, kind):
    check(problem(MIXED, shape, kind=kind, dropout=0.3))


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16"]], ids=["fp32", "bf16"])
def test_experts_and_slots_default_to_the_groups_own(dtypes):
    p = problem(Grouping((5, 14, 2, 6), (0, 1, 2, 3), (0, 1, 2, 3)), SHAPES[2], dtypes)
    assert_equal(
        forward_backward(grouped_linear, p.having(experts=None, slots=None)),
        forward_backward(grouped_linear, p),
    )


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_fp32_bias_over_a_low_precision_base(dtype):
    p = problem(dtypes=(dtype, dtype))
    p.leaves["bias"] = p.leaves["bias"].float()
    check(p)


def test_scaling_as_a_tensor():
    p, scaling = problem(dtypes=DTYPES["fp32"]), torch.tensor(0.75, requires_grad=True)
    got, wanted = (
        forward_backward(grouped_linear, p.having(scaling=scaling)),
        forward_backward(grouped_linear, p),
    )
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5, msg=name)
    assert scaling.grad.abs() > 0


@by_dtype
def test_one_group_is_the_linear_layer(dtypes):
    """One weight, one adapter, all rows: the bits of lora_linear."""
    p = problem(Grouping((50,), (2,), (1,)), SHAPES[2], dtypes, dropout=0.3)
    got = forward_backward(grouped_linear, p)
    x, A, B, bias = (leaf.detach().requires_grad_() for leaf in p.leaves.values())
    y = lora_linear(x, p.weight[2], A[1], B[1], 0.75, bias=bias[2], dropout=0.3, seed=p.settings["seed"])
    y.backward(p.grad)
    assert torch.equal(got["output"], y)
    for name, leaf in zip(p.leaves, (x, A, B)):
        assert torch.equal(got[f"grad of {name}"], leaf.grad), name


# ------------------------------------------------------------------------------------- rows, layouts, groups


def with_places(places):
    def function(x, weight, offsets, lora_A, lora_B, **rest):
        experts, slots, scaling = (rest.pop(name) for name in ("experts", "slots", "scaling"))
        return call(x, weight, offsets, experts, slots, lora_A, lora_B, scaling, places=places, **rest)

    return function


@pytest.mark.every_isa
@by_weight
@by_dtype
def test_places_are_a_shortcut(dtypes, kind):
    """Where each row of x is used as often, its gradients add up from the places where they are."""
    routing = Routing(torch.randint(EXPERTS, (29, 3)), EXPERTS)
    sizes = tuple(routing.offsets.diff().tolist())
    p = problem(
        Grouping(sizes, range(EXPERTS), (1, -1, 2, 0, 1)), SHAPES[2], dtypes, kind, dropout=0.3, tokens=29
    )
    check(p.having(rows=routing.rows), function=with_places(routing.places))


@pytest.mark.parametrize("tokens", [None, 11], ids=["", "repeated"])
@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_layouts_change_nothing(dtypes, layout, tokens):
    p = problem(dtypes=dtypes, dropout=0.3, tokens=tokens)
    other = p.map(lambda tensor: strided(tensor, layout))
    assert_equal(forward_backward(grouped_linear, other), forward_backward(grouped_linear, p))
    assert_equal(
        forward_backward(grouped_linear, p.map(torch.Tensor.contiguous)), forward_backward(grouped_linear, p)
    )


@pytest.mark.parametrize("dtypes", [DTYPES["fp32"], DTYPES["bf16"]], ids=["fp32", "bf16"])
def test_the_gradient_of_B_lies_as_B_does(dtypes):
    """So that it becomes that of PEFT's parameter [N, r * experts] without a copy."""
    p = problem(dtypes=dtypes)
    assert forward_backward(grouped_linear, p)["grad of lora_B"].stride() == p.leaves["lora_B"].stride()
    A, B = p.leaves["lora_A"], p.leaves["lora_B"]
    for lora_B, strides in ((B, B.stride()), (B.contiguous(), B.contiguous().stride())):
        _, _, grad_B = torch.ops.peftfast.grouped_linear_backward(
            p.grad, p.leaves["x"], None, None, None, None, None, 0, 0, 0, [1, B.shape[1], A.shape[2]], False,
            p.offsets, torch.zeros_like(p.settings["slots"]), p.settings["slots"], A, lora_B,
            torch.zeros(len(p.grad), A.shape[1]), 1.0, 0.0, None, 0, False, False, True,
        )  # fmt: skip
        assert grad_B.stride() == strides


def test_expanded_operands():
    p = problem(dtypes=DTYPES["bf16"])
    p.leaves["x"], p.grad = p.leaves["x"][:1].expand(80, 33), p.grad[:1, :1].expand(80, 65)
    assert_equal(
        forward_backward(grouped_linear, p), forward_backward(grouped_linear, p.map(torch.Tensor.contiguous))
    )


group = st.tuples(st.integers(0, 30), st.integers(0, EXPERTS - 1), st.integers(-1, SLOTS - 1))


@pytest.mark.every_isa
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    groups=st.lists(group, max_size=9),
    outside=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 24)),
    dtypes=st.sampled_from(list(DTYPES.values())),
    kind=st.sampled_from(list(WEIGHTS.values())),
    dropout=st.sampled_from([0.0, 0.5]),
    tokens=st.none() | st.integers(1, 9),
)
def test_any_groups(groups, outside, shape, dtypes, kind, dropout, tokens):
    sizes, experts, slots = zip(*groups) if groups else ((), (), ())
    grouping = Grouping(sizes, experts, slots, *outside)
    torch.manual_seed(grouping.M)
    check(problem(grouping, shape, dtypes, kind, dropout=dropout, tokens=tokens), rule=False)


@pytest.mark.every_isa
@by_weight
def test_only_what_has_rows_is_touched(kind):
    """Whatever the experts and slots of no rows hold, it is not read: here they hold NaN."""
    grouping = Grouping((13, 0, 5, 0), (4, 0, 2, 1), (1, 0, -1, 2))
    p = problem(grouping, (64, 32, 5), kind=kind, dropout=0.3)
    clean = forward_backward(grouped_linear, p)
    scales = p.weight
    if isinstance(p.weight, FourBitWeight):  # a block belongs to one expert here
        p.weight = replace(p.weight, absmax=reference.fourbit_absmax(p.weight), nested=None)
        scales = p.weight.absmax.view(EXPERTS, -1)
    for tensor, untouched in (
        (scales, [0, 1, 3]),
        (p.leaves["lora_A"], [0, 2, 3]),
        (p.leaves["lora_B"], [0, 2, 3]),
    ):
        tensor[untouched] = math.nan
    assert_equal(forward_backward(grouped_linear, p), clean)


# ----------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("tokens", [None, 11], ids=["", "repeated"])
@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("-+"[i] for i in w)
)
def test_only_the_gradients_asked_for(wanted, tokens):
    p = problem(dropout=0.3, tokens=tokens)
    everything = forward_backward(grouped_linear, p)
    names = [name for name, want in zip(p.leaves, wanted, strict=True) if want]
    some = forward_backward(grouped_linear, p, names)
    assert torch.equal(some.pop("output"), everything.pop("output"))
    for name, gradient in some.items():
        if name.removeprefix("grad of ") in names:
            assert torch.equal(gradient, everything[name]), name
        else:
            assert gradient is None, name


@by_weight
def test_operands_are_left_alone(kind):
    p = problem(kind=kind, dropout=0.3, tokens=11)
    tensors = [
        *p.leaves.values(),
        p.grad,
        p.offsets,
        *(v for v in p.settings.values() if isinstance(v, torch.Tensor)),
    ]
    tensors += [p.weight.packed, p.weight.absmax] if isinstance(p.weight, FourBitWeight) else [p.weight]
    before = [tensor.clone() for tensor in tensors]
    forward_backward(grouped_linear, p)
    assert all(map(torch.equal, tensors, before))


def test_second_derivative_is_refused():
    p = problem(dtypes=DTYPES["fp32"])
    x = p.leaves["x"].requires_grad_()
    y = grouped_linear(x, p.weight, p.offsets, p.leaves["lora_A"], p.leaves["lora_B"], **p.settings)
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad_x.square().sum().backward()


@pytest.mark.parametrize("tokens", [None, 20], ids=["", "repeated"])
@by_weight
def test_saved_for_backward(kind, tokens):
    """x itself, and 4 bytes per row and rank: no gathered copy, no mask, no decoded weight."""
    p = problem(shape=(64, 32, 5), kind=kind, dropout=0.3, tokens=tokens)
    leaves = [leaf.requires_grad_() for leaf in p.leaves.values()]
    weight = [p.weight] if kind[0] is None else [p.weight.packed, p.weight.absmax]
    if kind[0] is not None and p.weight.nested:
        weight += [p.weight.nested.absmax, p.weight.nested.code, p.weight.nested.offset]
    known = [*leaves, *weight, p.offsets, *(v for v in p.settings.values() if isinstance(v, torch.Tensor))]
    x, A, B, bias = leaves

    def layer():
        return grouped_linear(x, p.weight, p.offsets, A, B, bias=bias, **p.settings)

    assert bytes_saved_for_backward(layer, known) == MIXED.M * 5 * 4


def test_without_adapters_x_is_not_saved():
    p = problem(adapters=False)
    x = p.leaves["x"].requires_grad_()
    known = [p.weight, p.offsets, p.settings["experts"]]
    saved = bytes_saved_for_backward(lambda: grouped_linear(x, p.weight, p.offsets, **p.settings), known)
    assert saved <= MIXED.offsets.nbytes, "no more than the slots and a value that stands for x"


@pytest.mark.parametrize("tokens", [None, 11], ids=["", "repeated"])
@by_weight
def test_equal_bits_for_any_number_of_threads(kind, tokens):
    p = problem(Grouping((300, 0, 1, 40, 12, 9), MIXED.experts, MIXED.slots, 2, 3), (130, 200, 16), kind=kind,
                dropout=0.3, tokens=tokens)  # fmt: skip
    one = forward_backward(grouped_linear, p)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_equal(forward_backward(grouped_linear, p), one)


# -------------------------------------------------------------------------------------------- modes of torch


def test_manual_seed_decides_the_dropout():
    p = problem(dropout=0.3).having(seed=None)

    def run(seed, p):
        torch.manual_seed(seed)
        return forward_backward(grouped_linear, p)

    assert_equal(run(5, p), run(5, p))
    assert not torch.equal(run(5, p)["output"], run(6, p)["output"])
    states = random_states()
    forward_backward(grouped_linear, p.having(dropout=0.0))
    assert all(map(torch.equal, random_states(), states)), "no dropout draws nothing"


def test_activation_checkpointing_replays_the_dropout():
    p = problem(shape=(64, 64, 5), dropout=0.3).having(seed=None)

    def gradients(run):
        torch.manual_seed(11)
        x, A, B, bias = (leaf.detach().requires_grad_() for leaf in p.leaves.values())

        def layer(x):
            y = grouped_linear(x, p.weight, p.offsets, A, B, bias=bias, **p.settings)
            return torch.nn.functional.silu(y)

        run(layer, run(layer, x)).backward(p.grad)
        return [leaf.grad for leaf in (x, A, B, bias)]

    plain = gradients(lambda layer, x: layer(x))
    replayed = gradients(lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert all(map(torch.equal, plain, replayed))


@pytest.mark.parametrize(
    "dtypes, autocast", [("fp32", BF16), ("fp32", F16), ("bf16-fp32", BF16), ("bf16", BF16)]
)
@by_weight
def test_autocast(kind, dtypes, autocast):
    """x and a dense weight are cast as torch casts those of a linear layer; gradients come in the operands' dtypes."""
    p = problem(shape=SHAPES[2], dtypes=DTYPES[dtypes], kind=kind, dropout=0.3, tokens=11)

    def under(x, weight, *rest, **settings):
        with torch.autocast(x.device.type, dtype=autocast):
            return grouped_linear(x, weight, *rest, **settings)

    def cast(x, weight, *rest, **settings):
        weight = weight.to(autocast) if isinstance(weight, torch.Tensor) else weight
        return grouped_linear(x.to(autocast), weight, *rest, **settings)

    got = forward_backward(under, p)
    assert got["output"].dtype == autocast
    assert_equal(got, forward_backward(cast, p))


# ------------------------------------------------------------------------------- combining what experts say


@pytest.mark.every_isa
@pytest.mark.parametrize("weights_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("tokens, top_k, H", [(40, 4, 70), (300, 1, 64), (7, 3, 1), (5, 2, 3), (2, 8, 2177), (0, 2, 8),
                                              (3, 2, 0)])  # fmt: skip
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_combine(dtype, tokens, top_k, H, weights_dtype):
    x, weights = torch.randn(tokens * top_k, H).to(dtype), torch.rand(tokens, top_k).to(weights_dtype)
    places, grad = torch.randperm(tokens * top_k).view(tokens, top_k), torch.randn(tokens, H).to(dtype)

    def run(function, x, weights):
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        y = function(x, weights, places)
        return y.detach(), *torch.autograd.grad(y, (x, weights), grad.to(y.dtype))

    got, eager = run(moe_combine, x, weights), run(reference.moe_combine, x, weights)
    oracle = run(reference.moe_combine, x.double(), weights.double())
    sizes = abs(x).double(), abs(weights).double()
    grad = grad.abs()
    for name, ours, rival, exact, size in zip(
        ("output", "grad of x", "grad of weights"), got, eager, oracle, run(reference.moe_combine, *sizes)
    ):
        assert ours.dtype == rival.dtype and ours.shape == exact.shape, name
        unit = torch.finfo(ours.dtype).eps / 2
        assert (
            (ours - exact).abs() <= size * (unit + (H + top_k) * 2**-24) + 1e-30 + 2**-25 * (dtype == F16)
        ).all()
        if exact.numel() >= 2000:
            assert_as_accurate(ours, rival, exact, name=name)


def test_combine_for_any_number_of_threads_and_layout():
    x, weights, places = torch.randn(600, 70), torch.rand(200, 3), torch.randperm(600).view(200, 3)

    def run(x, weights, places, grad):
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        y = moe_combine(x, weights, places)
        return y.detach(), *torch.autograd.grad(y, (x, weights), grad)

    grad = torch.randn(200, 70)
    one = run(x, weights, places, grad)
    torch.set_num_threads(2)
    assert all(map(torch.equal, run(x, weights, places, grad), one))
    other = (
        strided(x, "row stride"),
        strided(weights, "transposed"),
        places.T.contiguous().T,
        strided(grad, LAYOUTS[1]),
    )
    assert all(map(torch.equal, run(*other), one))


@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "4-bit"])
def test_experts_compiled(fourbit):
    """A layer of experts in one graph: sorting, both projections, what is in between, and putting together."""
    torch._dynamo.reset()
    count, H, width = 4, 12, 10
    index = torch.tensor([[0, 3], [3, count], [1, 0], [count, count]])  # `count`: no expert
    up, down = torch.randn(count, width, H), torch.randn(count, H, width)
    if fourbit:
        up, down = fourbit_quantize(up), fourbit_quantize(down)
    shapes = (count, 3, H), (count, width, 3), (count, 2, width), (count, H, 2)
    factors = [torch.randn(shape).requires_grad_() for shape in shapes]
    x, weights = torch.randn(4, H).requires_grad_(), torch.rand(4, 2).requires_grad_()

    def layer(x, weights):
        routing = Routing(index, count)
        A, B, C, D = factors
        hidden = routing.linear(x, up, A, B, 2.0, slots=routing.experts, gather=True).relu()
        hidden = hidden + routing.repeat(x)[:, :width]
        return routing.combine(routing.linear(hidden, down, C, D, 0.5, slots=routing.experts), weights)

    def run(function):
        y = function(x, weights)
        return y.detach(), *torch.autograd.grad(y.square().sum(), (x, weights, *factors))

    for ours, expected in zip(run(torch.compile(layer, fullgraph=True, backend="aot_eager")), run(layer)):
        torch.testing.assert_close(ours, expected)


def test_combine_asks_for_no_gradient_of_frozen_weights():
    x, weights = torch.randn(6, 8, requires_grad=True), torch.rand(3, 2)
    y = moe_combine(x, weights, torch.randperm(6).view(3, 2))
    y.sum().backward()
    assert x.grad is not None and weights.grad is None


# ------------------------------------------------------------------------- a product and what is made of it


@dataclass
class Combined:
    """Sorted rows, some without an expert, on their way through a gate and a product and back to their tokens."""

    leaves: dict
    weight: torch.Tensor | FourBitWeight
    bias: torch.Tensor
    routing: Routing
    grad: torch.Tensor
    transposed: bool
    activation: str | None
    slots: torch.Tensor = field(default_factory=lambda: torch.tensor([0, -1, 2, 1, 0]))

    def ours(self, x, lora_A, lora_B, weights, dropout=0.0):
        return self.routing.combined_linear(
            x, weights, self.weight, lora_A, lora_B, 0.75, slots=self.slots, bias=self.bias, dropout=dropout,
            transposed=self.transposed, activation=self.activation,
        )  # fmt: skip

    def in_steps(self, x, lora_A, lora_B, weights, dropout=0.0):
        """By the operators one after another."""
        a = x if self.activation is None else swiglu(*x.chunk(2, dim=1), activation=self.activation)
        y = self.routing.linear(
            a, self.weight, lora_A, lora_B, 0.75, slots=self.slots, bias=self.bias, dropout=dropout,
            transposed=self.transposed,
        )  # fmt: skip
        return self.routing.combine(y, weights)

    def eager(self, x, lora_A, lora_B, weights):
        weight = self.weight
        if isinstance(weight, FourBitWeight):
            weight = reference.fourbit_dequantize(weight, x.dtype)
        a = x if self.activation is None else reference.swiglu(*x.chunk(2, dim=1), activation=self.activation)
        y = reference.grouped_linear(
            a, weight.to(x.dtype), self.routing.offsets, lora_A, lora_B, 0.75, experts=self.routing.experts,
            slots=self.slots, bias=self.bias.to(x.dtype), transposed=self.transposed,
        )  # fmt: skip
        return reference.moe_combine(y, self.routing.weights(weights), self.routing.places)

    def run(self, function, dtype=None, **settings):
        """The output and the gradients of the leaves, by name; computed in `dtype` if there is one."""
        leaves = {
            name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in self.leaves.items()
        }
        y = function(**leaves, **settings)
        grads = torch.autograd.grad(y, leaves.values(), self.grad.to(y.dtype))
        return {"output": y.detach()} | dict(zip(leaves, grads))


def combined(dtypes=DTYPES["fp32"], kind=WEIGHTS["dense"], activation="silu", tokens=700, top_k=3):
    (K, N, r), (dtype, adapter_dtype), (format, transposed) = SHAPES[1], dtypes, kind
    weight = (torch.randn(EXPERTS, *((K, N) if transposed else (N, K))) * K**-0.5).to(dtype)
    leaves = {
        "x": torch.randn(tokens * top_k, 2 * K if activation else K).to(dtype),
        "lora_A": (torch.randn(SLOTS, r, K) * K**-0.5).to(adapter_dtype),
        "lora_B": (torch.randn(SLOTS, N, r) * r**-0.5).to(adapter_dtype),
        "weights": torch.rand(tokens, top_k),
    }
    return Combined(
        {name: leaf.detach() for name, leaf in leaves.items()},
        weight if format is None else fourbit_quantize(weight, **format),
        torch.randn(EXPERTS, N).to(dtype),
        Routing(torch.randint(EXPERTS + 1, (tokens, top_k)), EXPERTS),
        torch.randn(tokens, N).to(dtype),
        transposed,
        activation,
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@by_weight
@by_dtype
def test_combined_linear(dtypes, kind, activation):
    p = combined(dtypes, kind, activation)
    ours, eager, oracle = p.run(p.ours), p.run(p.eager), p.run(p.eager, torch.float64)
    for name, exact in oracle.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == exact.shape, name
        assert_as_accurate(ours[name], eager[name], exact, name=name)
    outside = p.routing.rows[p.routing.offsets[-1] :]
    assert len(outside) and not ours["x"][p.routing.offsets[-1] :].any(), "of rows without an expert"


@pytest.mark.parametrize("activation", [None, "relu"])
def test_combined_linear_is_its_steps(activation):
    """Dropout draws the same mask; a weight of zero has a gradient, and one without an expert has none."""
    p = combined(activation=activation, tokens=50)
    p.leaves["weights"][7] = 0
    torch.manual_seed(3)
    ours = p.run(p.ours, dropout=0.3)
    torch.manual_seed(3)
    for name, expected in p.run(p.in_steps, dropout=0.3).items():
        torch.testing.assert_close(ours[name], expected)
    assert ours["weights"][7].any()


@pytest.mark.parametrize("layer", ["grouped", None, "silu"])
def test_a_large_input_is_gone_before_its_gradient_comes(layer, monkeypatch):
    """In two calls, which give the same bits."""
    calls, backward = [], moe.BACKWARD

    def watched(*args):
        calls.append(args[-3:])
        return backward(*args)

    def run():
        torch.manual_seed(3)
        if layer == "grouped":
            return forward_backward(grouped_linear, problem(dropout=0.3, tokens=11))
        p = combined(activation=layer)
        return p.run(p.ours, dropout=0.3)

    monkeypatch.setattr(moe, "BACKWARD", watched)
    expected = run()
    assert calls == [(True, True, True)]
    monkeypatch.setattr(moe, "LARGE_BYTES", 0)
    assert_equal(run(), expected)
    assert calls[1:] == [(False, True, True), (True, False, False)]


@pytest.mark.parametrize("choices", [EXPERTS, EXPERTS + 1], ids=["", "some without an expert"])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_combined_linear_keeps_its_input_alone(activation, choices):
    p = combined(activation=activation)
    p.routing = routing = Routing(torch.randint(choices, (700, 3)), EXPERTS)
    leaves = {name: leaf.requires_grad_() for name, leaf in p.leaves.items()}
    known = [*leaves.values(), p.weight, p.bias, p.slots, *(routing.rows, routing.places, routing.offsets)]
    saved = bytes_saved_for_backward(lambda: p.ours(**leaves), [*known, routing.experts])
    assert saved == 4 * len(routing.rows) * SHAPES[1][2], "u"


def test_combined_linear_gives_only_the_gradients_asked_for():
    p = combined()
    everything = p.run(p.ours)
    for wanted in [("x",), ("lora_A",), ("lora_B",), ("weights",), ("x", "weights"), ("lora_A", "lora_B")]:
        leaves = {name: leaf.clone().requires_grad_(name in wanted) for name, leaf in p.leaves.items()}
        p.ours(**leaves).backward(p.grad)
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, everything[name]), name


def test_combined_linear_with_a_trained_bias():
    p = combined()
    biases = []
    for function in (p.ours, p.in_steps):
        p.bias = p.bias.detach().requires_grad_()
        function(**p.leaves).backward(p.grad)
        biases.append(p.bias.grad)
    assert biases[0].any() and torch.equal(*biases)


def test_combined_linear_for_any_number_of_threads():
    p = combined(DTYPES["bf16-fp32"])
    one = p.run(p.ours)
    torch.set_num_threads(2)
    assert all(torch.equal(value, one[name]) for name, value in p.run(p.ours).items())


def test_combined_linear_refuses_a_second_derivative():
    p = combined()
    x = p.leaves["x"].requires_grad_()
    (grad,) = torch.autograd.grad(p.ours(**p.leaves).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


# ------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("index", [
    torch.tensor([[2, 0], [0, 4], [2, 1]]), torch.tensor([[1, 3]]), torch.tensor([[7, 5], [0, 9]]),
    torch.full((2, 3), 5), torch.empty(0, 2, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64),
], ids=["usual", "one token", "some without an expert", "all without", "no tokens", "no experts"])  # fmt: skip
def test_routing_sorts_by_expert(index):
    routing, flat = Routing(index, 5), index.reshape(-1)
    assert routing.experts.tolist() == list(range(5))
    for expert in range(5):
        rows = routing.rows[routing.offsets[expert] : routing.offsets[expert + 1]]
        assert rows.tolist() == [t for t, chosen in enumerate(index.tolist()) if expert in chosen]
    assert routing.offsets[0] == 0 and routing.offsets[-1] == (flat < 5).sum()
    assert routing.places.shape == index.shape and routing.places.flatten().sort()[0].tolist() == [
        *range(len(flat))
    ]
    for t, places in enumerate(routing.places.tolist()):
        assert all(routing.rows[place] == t for place in places)


@where_values_are_read
def test_routing_refuses_negative_experts():
    with pytest.raises(ValueError, match="top_k_index"):
        Routing(torch.tensor([[0, -1]]), 5)


def test_what_has_no_expert_counts_for_nothing():
    """An index from `count` on: no part in the output, no gradient to its weight nor through its row."""
    index, x = torch.tensor([[0, 3], [4, 3], [1, 0]]), torch.randn(3, 8, requires_grad=True)
    weights = torch.rand(3, 2, requires_grad=True)
    weight, bias = torch.randn(3, 6, 8), torch.randn(3, 6)
    routing = Routing(index, 3)
    y = moe_combine(
        routing.linear(x, weight, bias=bias, gather=True), routing.weights(weights), routing.places
    )
    y.sum().backward()
    none = index >= 3
    assert not y[1].any() and not x.grad[1].any() and x.grad[0].any()
    assert not weights.grad[none].any() and (weights.grad[~none] != 0).all()
    torch.testing.assert_close(y[0], weights[0, 0] * (x[0] @ weight[0].T + bias[0]))


def test_routing_without_sentinels_takes_the_weights_as_they_are():
    weights = torch.rand(2, 2)
    taken = Routing(torch.tensor([[0, 1], [1, 0]]), 2).weights(weights)
    assert torch.equal(taken, weights) if on_a_gpu() else taken is weights


# ------------------------------------------------------------------------------------ transformers' experts


H, I, COUNT = 48, 40, 6  # noqa: E741
EXPERT_CLASSES = {  # the model, the class, its config
    "mixtral": ("mixtral", "MixtralExperts", dict(num_local_experts=COUNT, intermediate_size=I, hidden_act="silu")),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeExperts", dict(num_experts=COUNT, moe_intermediate_size=I, hidden_act="silu")),
    "deepseek_v3": (
        "deepseek_v3", "DeepseekV3Experts",
        dict(num_local_experts=COUNT, n_routed_experts=COUNT, moe_intermediate_size=I, hidden_act="silu"),
    ),
    "transposed, interleaved, with bias": (
        "gpt_oss", "GptOssExperts",
        dict(num_local_experts=COUNT, intermediate_size=I, swiglu_alpha=1.7, swiglu_limit=7.0),
    ),
    "no gate": (
        "nemotron_h", "NemotronHExperts",
        dict(n_routed_experts=COUNT, moe_intermediate_size=I, moe_latent_size=None, mlp_hidden_act="relu2"),
    ),
    "norm behind": (
        "muse_spark", "MuseSparkExperts",
        dict(num_local_experts=COUNT, moe_hidden_size=H, moe_intermediate_size=I, hidden_act="silu",
             post_norm_eps=1e-6),
    ),
}  # fmt: skip
by_experts = parametrized("which", EXPERT_CLASSES)


def build_experts(which):
    """A class of transformers' experts alone, with random weights that are frozen."""
    module, name, config = which
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
    experts = kind(SimpleNamespace(_experts_implementation="eager", hidden_size=H, **config))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.requires_grad_(False)


def run_experts(experts, implementation, x, index, weights, grad, trained=()):
    """The output and the gradients of x, of the routing weights and of the parameters named."""
    importlib.import_module("peftfast.integrations.experts")
    experts.config._experts_implementation = implementation
    parameters = [getattr(experts, name).requires_grad_() for name in trained]
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = experts(x, index.clone(), weights)
    gradients = torch.autograd.grad(y, (x, weights, *parameters), grad.to(y.dtype))
    return dict(zip(("output", "grad of x", "grad of weights", *trained), (y.detach(), *gradients)))


def routed(tokens, dtype, top_k=3):
    """Inputs of experts: x, the chosen experts and their weights, and the gradient of the output."""
    index = torch.rand(tokens, COUNT).topk(top_k).indices
    return (
        torch.randn(tokens, H).to(dtype),
        index,
        torch.rand(tokens, top_k).to(dtype),
        torch.randn(tokens, H).to(dtype),
    )


@pytest.mark.parametrize("tokens", [1, 90])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@by_experts
def test_experts_are_those_of_transformers(which, dtype, tokens):
    experts, arguments = build_experts(which).to(dtype), routed(tokens, dtype)
    got, *rivals = (run_experts(experts, name, *arguments) for name in ("peftfast", "eager", "grouped_mm"))
    exact = [t.double() if t.is_floating_point() else t for t in arguments]
    for name, oracle in run_experts(experts.double(), "eager", *exact).items():
        assert got[name].dtype == dtype and got[name].shape == oracle.shape, name
        near = dict(rtol=0, atol=20 * torch.finfo(dtype).eps * oracle.abs().max().item())
        torch.testing.assert_close(got[name].double(), oracle, **near, msg=name)
        if oracle.numel() >= 2000:
            rival = max((rival[name] for rival in rivals), key=lambda t: (t - oracle).norm())
            assert_as_accurate(got[name], rival, oracle, name=name)


@by_experts
def test_experts_of_no_tokens(which):
    x, index, weights, grad = (
        torch.empty(0, H),
        torch.empty(0, 3).long(),
        torch.empty(0, 3),
        torch.empty(0, H),
    )
    got = run_experts(build_experts(which), "peftfast", x, index, weights, grad)
    assert [result.shape for result in got.values()] == [(0, H), (0, H), (0, 3)]


@by_experts
def test_experts_elsewhere_say_nothing(which):
    """Under expert parallelism an index past the experts stands for one of another machine."""
    experts, (x, index, weights, grad) = build_experts(which), routed(30, F32)
    experts._is_expert_parallel = True
    index[::3, 1] = COUNT
    index[5] = COUNT
    weights = weights.masked_fill(index == COUNT, 0.0)
    got, wanted = (run_experts(experts, name, x, index, weights, grad) for name in ("peftfast", "grouped_mm"))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    assert not got["grad of weights"][index == COUNT].any()


@by_experts
def test_experts_that_are_trained_are_left_to_grouped_mm(which):
    experts, arguments = build_experts(which), routed(30, F32)
    trained = ["down_proj", "gate_up_proj" if experts.has_gate else "up_proj"]
    got, wanted = (
        run_experts(experts, name, *arguments, trained=trained) for name in ("peftfast", "grouped_mm")
    )
    assert_equal(got, wanted)
    with torch.no_grad():  # then nothing is trained
        y = experts(*arguments[:3])
        experts.config._experts_implementation = "peftfast"
        torch.testing.assert_close(experts(*arguments[:3]), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@by_experts
def test_adapters_on_experts(which, dtype):
    """As if W + scaling B A were there: on both projections, of which one adapts two experts alone."""
    from peftfast.integrations.experts import Adapter, projections
    from peftfast.integrations.experts import call as call_experts

    experts, (x, index, routing_weights, grad) = build_experts(which).to(dtype), routed(90, dtype)
    few = torch.full((COUNT,), -1)
    few[[4, 1]] = torch.tensor([0, 1])
    factors, adapted = [], {}
    for name, slots in zip(projections(experts), (few, None)):
        count = 2 if slots is not None else COUNT
        shape = getattr(experts, name).shape
        inputs, outputs = shape[1:] if experts.is_transposed else (shape[2], shape[1])
        factors += [
            torch.randn(count, 4, inputs).to(dtype) * 0.1,
            torch.randn(outputs, 4, count).to(dtype) * 0.3,
        ]
        adapted[name] = slots

    def run(x, weights, grad, factors, merged):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weights, *factors)]
        x, weights, *leaf = leaves
        named, adapters = {}, {}
        for i, (name, slots) in enumerate(adapted.items()):
            A, B = leaf[2 * i], leaf[2 * i + 1].permute(2, 0, 1)
            adapters[name] = Adapter(A, B, 0.5, slots=slots)
            delta = 0.5 * B @ A
            if slots is not None:
                delta = torch.where((slots >= 0)[:, None, None], delta[slots.clamp(min=0)], 0.0)
            named[name] = getattr(experts, name).to(x.dtype) + (delta.mT if experts.is_transposed else delta)
        if merged:
            experts.config._experts_implementation = "eager"
            y = torch.func.functional_call(experts, named, (x, index, weights))
        else:
            y = call_experts(experts, x, index, weights, adapters)
        names = "output", "grad of x", "grad of weights", "up A", "up B", "down A", "down B"
        return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype)))))

    got, eager = (run(x, routing_weights, grad, factors, merged) for merged in (False, True))
    experts.double()
    oracle = run(x.double(), routing_weights.double(), grad.double(), [f.double() for f in factors], True)
    for name, exact in oracle.items():
        assert got[name].dtype == dtype, name
        assert_as_accurate(got[name], eager[name], exact, name=name, slack=torch.finfo(dtype).eps / 4)


MODELS = {
    "Mixtral": dict(intermediate_size=48, num_local_experts=6, num_experts_per_tok=2),
    "Qwen2Moe": dict(
        moe_intermediate_size=40, shared_expert_intermediate_size=32, num_experts=8, num_experts_per_tok=3
    ),
    "Qwen3Moe": dict(moe_intermediate_size=40, num_experts=8, num_experts_per_tok=3),
    "Olmoe": dict(intermediate_size=40, num_experts=8, num_experts_per_tok=3),
    "GptOss": dict(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "DeepseekV3": dict(
        moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=16, num_key_value_heads=4, head_dim=8,
    ),
}  # fmt: skip


@parametrized("name, settings", {name: (name, settings) for name, settings in MODELS.items()})
def test_models_are_those_of_transformers(name, settings):
    """Logits, and gradients of the embeddings and of the routers."""
    import transformers

    importlib.import_module("peftfast.integrations.experts")
    config = getattr(transformers, f"{name}Config")(**dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=100,
    ) | settings)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    routers = [
        p.requires_grad_()
        for n, p in model.named_parameters()
        if n.endswith(("gate.weight", "router.weight"))
    ]
    embeddings = model.get_input_embeddings()(torch.randint(100, (2, 17))).detach().requires_grad_()
    assert routers

    def run(implementation):
        model.set_experts_implementation(implementation)
        logits = model(inputs_embeds=embeddings).logits
        return logits.detach(), *torch.autograd.grad(logits.square().sum(), (embeddings, *routers))

    for ours, theirs in zip(run("peftfast"), run("eager")):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * theirs.abs().max().item())
        assert theirs.any()


# ----------------------------------------------------------------------------------------------- bad input

FOURBIT = reference.fourbit_quantize(torch.ones(3, 6, 8))
GOOD = dict(
    x=torch.ones(5, 8),
    weight=torch.ones(3, 6, 8),
    offsets=torch.tensor([0, 2, 5]),
    lora_A=torch.ones(2, 4, 8),
    lora_B=torch.ones(2, 6, 4),
    scaling=1.0,
    experts=torch.tensor([2, 0]),
    slots=torch.tensor([1, -1]),
    rows=None,
    bias=torch.ones(3, 6),
    dropout=0.5,
    transposed=False,
    seed=torch.tensor([1]),
    compute_dtype=None,
)
BAD = [  # what changes, the error, the arguments of which the message names one
    (dict(x=[[1.0]]), TypeError, "x"),
    (dict(x=torch.ones(5, 8).int()), TypeError, "x"),
    (dict(x=torch.ones(5, 8).double()), TypeError, "x"),
    (dict(x=torch.ones(5, 9)), ValueError, "x"),
    (dict(x=torch.ones(5, 1, 8)), ValueError, "x"),
    (dict(x=torch.ones(8)), ValueError, "x"),
    (dict(x=torch.ones(5, 8).to_sparse()), TypeError, "x"),
    (dict(x=torch.ones(5, 8, device="meta")), ValueError, "offsets|weight"),
    (dict(weight=None), ValueError, "bias"),
    (dict(weight=None, bias=None), ValueError, "experts"),
    (dict(weight=None, bias=None, experts=None, lora_A=None, lora_B=None), ValueError, "lora_A"),
    (dict(weight=None, bias=None, experts=None, lora_A=torch.ones(8)), ValueError, "lora_A"),
    (dict(weight=None, bias=None, experts=None, x=torch.ones(5, 7)), ValueError, "x"),
    (dict(weight=1.0), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8)), ValueError, "weight"),
    (dict(weight=torch.ones(3, 6, 7)), ValueError, "x|weight"),
    (dict(weight=torch.ones(2, 6, 8)), ValueError, "bias|experts"),
    (dict(weight=torch.ones(3, 6, 8).bfloat16()), TypeError, "weight"),
    (dict(weight=torch.ones(3, 6, 8, device="meta")), ValueError, "weight"),
    (dict(weight=replace(FOURBIT, shape=(18, 8))), ValueError, "weight"),
    (dict(weight=replace(FOURBIT, shape=(3, 6, 9))), ValueError, "weight"),
    (dict(weight=replace(FOURBIT, blocksize=48)), ValueError, "weight"),
    (dict(transposed=True), ValueError, "x|weight"),
    (dict(offsets=None), TypeError, "offsets"),
    (dict(offsets=[0, 2, 5]), TypeError, "offsets"),
    (dict(offsets=torch.tensor([0, 2, 5]).int()), ValueError, "offsets"),
    (dict(offsets=torch.tensor([[0, 2, 5]])), ValueError, "offsets"),
    (dict(offsets=torch.tensor([], dtype=torch.int64)), ValueError, "offsets"),
    (dict(offsets=torch.tensor([0, 5])), ValueError, "experts"),
    (dict(lora_A=None), ValueError, "lora_A"),
    (dict(lora_B=None), ValueError, "lora_B"),
    (dict(lora_A=torch.ones(4, 8)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(2, 4, 7)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(2, 3, 8)), ValueError, "lora_B"),
    (dict(lora_A=torch.ones(2, 0, 8), lora_B=torch.ones(2, 6, 0)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(2, 4, 8).half()), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(2, 4, 8).double()), TypeError, "lora_A"),
    (dict(lora_B=torch.ones(2, 4, 6)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(3, 6, 4)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(2, 6, 4).half()), TypeError, "lora_B"),
    (dict(lora_B=torch.ones(2, 6, 4, device="meta")), ValueError, "lora_B"),
    (dict(scaling="1"), TypeError, "scaling"),
    (dict(scaling=None), TypeError, "scaling"),
    (dict(scaling=[1.0]), TypeError, "scaling"),
    (dict(scaling=True), TypeError, "scaling"),
    (dict(scaling=torch.ones(2)), ValueError, "scaling"),
    (dict(scaling=torch.tensor(1.0, device="meta")), ValueError, "scaling"),
    (dict(experts=[2, 0]), TypeError, "experts"),
    (dict(experts=torch.tensor([2])), ValueError, "experts"),
    (dict(experts=torch.tensor([2.0, 0.0])), ValueError, "experts"),
    (dict(experts=None, offsets=torch.tensor([0, 1, 2, 3, 4]), slots=None), ValueError, "experts|slots"),
    (dict(slots=torch.tensor([[1, -1]])), ValueError, "slots"),
    (dict(slots=torch.tensor([1])), ValueError, "slots"),
    (
        dict(slots=None, offsets=torch.tensor([0, 1, 2, 3]), experts=torch.tensor([0, 1, 2])),
        ValueError,
        "slots",
    ),
    (dict(rows=[0, 1, 2, 3, 4]), TypeError, "rows"),
    (dict(bias=torch.ones(6)), ValueError, "bias"),
    (dict(bias=torch.ones(3, 5)), ValueError, "bias"),
    (dict(bias=torch.ones(3, 6).double()), TypeError, "bias"),
    (dict(bias=1.0), TypeError, "bias"),
    (dict(dropout=1.0), ValueError, "dropout"),
    (dict(dropout=-0.1), ValueError, "dropout"),
    (dict(dropout=math.nan), ValueError, "dropout"),
    (dict(dropout="0.5"), TypeError, "dropout"),
    (dict(dropout=[0.5]), TypeError, "dropout"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "seed"),
    (dict(seed=torch.tensor([1.0])), ValueError, "seed"),
    (dict(seed=1), TypeError, "seed"),
    (dict(compute_dtype=torch.float64), TypeError, "compute_dtype"),
    (dict(compute_dtype="bfloat16"), TypeError, "compute_dtype"),
]
BAD_VALUES = [
    (dict(x=torch.ones(4, 8)), ValueError, "offsets"),
    (dict(weight=torch.ones(2, 6, 8), bias=None), ValueError, "experts"),
    (dict(offsets=torch.tensor([0, 3, 2])), ValueError, "offsets"),
    (dict(offsets=torch.tensor([-1, 2, 5])), ValueError, "offsets"),
    (dict(offsets=torch.tensor([0, 2, 6])), ValueError, "offsets"),
    (dict(experts=torch.tensor([3, 0])), ValueError, "experts"),
    (dict(experts=torch.tensor([2, -1])), ValueError, "experts"),
    (dict(slots=torch.tensor([2, -1])), ValueError, "slots"),
    (dict(rows=torch.tensor([0, 5, 1, 1, 1])), ValueError, "rows"),
    (dict(rows=torch.tensor([0, -1, 1, 1, 1])), ValueError, "rows"),
    (dict(rows=torch.tensor([0, 1])), ValueError, "offsets"),
]
GOOD_COMBINE = dict(x=torch.ones(6, 8), weights=torch.ones(3, 2), places=torch.arange(6).view(3, 2))
BAD_COMBINE = [
    (dict(x=None), TypeError, "x"),
    (dict(x=torch.ones(6, 8).double()), TypeError, "x"),
    (dict(x=torch.ones(5, 8)), ValueError, "x"),
    (dict(x=torch.ones(6)), ValueError, "x"),
    (dict(x=torch.ones(6, 8).to_sparse()), TypeError, "x"),
    (dict(weights=[[1.0]]), TypeError, "weights"),
    (dict(weights=torch.ones(3, 2).int()), TypeError, "weights"),
    (dict(weights=torch.ones(3, 3)), ValueError, "weights"),
    (dict(weights=torch.ones(3, 2, device="meta")), ValueError, "weights"),
    (dict(places=[[0, 1]]), TypeError, "places"),
    (dict(places=torch.arange(6).int().view(3, 2)), ValueError, "places"),
    (dict(places=torch.arange(6)), ValueError, "places"),
]
BAD_VALUES_OF_COMBINE = [
    (dict(places=torch.arange(1, 7).view(3, 2)), ValueError, "places"),
    (dict(places=torch.arange(-1, 5).view(3, 2)), ValueError, "places"),
    (dict(places=torch.zeros(3, 2, dtype=torch.int64)), ValueError, "places"),
]


def cases(bad):
    return pytest.mark.parametrize(
        "change, error, names", bad, ids=[name_of_bad(change) for change, _, _ in bad]
    )


def assert_refused(function, arguments, change, error, names):
    function(**arguments)
    with pytest.raises(error, match=rf"\b({names})\b") as caught:
        function(**arguments | change)
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


@cases(BAD)
def test_bad_input(change, error, names):
    assert_refused(grouped_linear, GOOD, change, error, names)


@where_values_are_read
@cases(BAD_VALUES)
def test_bad_values(change, error, names):
    assert_refused(grouped_linear, GOOD, change, error, names)


@cases(BAD_COMBINE)
def test_bad_input_of_combine(change, error, names):
    assert_refused(moe_combine, GOOD_COMBINE, change, error, names)


@where_values_are_read
@cases(BAD_VALUES_OF_COMBINE)
def test_bad_values_of_combine(change, error, names):
    assert_refused(moe_combine, GOOD_COMBINE, change, error, names)


# -------------------------------------------------------------------------------------------- registration

INTS = torch.tensor
STORAGE = dict(
    weight=FOURBIT.packed, absmax=FOURBIT.absmax, nested_absmax=FOURBIT.nested.absmax,
    nested_code=FOURBIT.nested.code, nested_offset=FOURBIT.nested.offset.view(1), blocksize=64, nested_blocksize=256,
    quant_type=0,
)  # fmt: skip
DENSE = dict.fromkeys(STORAGE) | dict(
    weight=torch.ones(3, 6, 8), blocksize=0, nested_blocksize=0, quant_type=0
)
GROUPS = dict(
    shape=[3, 6, 8], transposed=False, offsets=INTS([0, 2, 5]), experts=INTS([2, 0]), slots=INTS([1, -1])
)
SETTINGS = dict(scaling=1.0, dropout=0.5, seed=INTS([1]), compute_dtype=0)
ADAPTERS = dict(lora_A=torch.ones(2, 4, 8), lora_B=torch.ones(2, 6, 4))
OPERATORS = {
    "forward": (FORWARD, dict(x=torch.ones(5, 8), bias=torch.ones(3, 6)) | GROUPS | ADAPTERS | SETTINGS),
    "backward": (
        BACKWARD,
        dict(grad_y=torch.ones(5, 6), x=torch.ones(5, 8), u=torch.ones(5, 4), want_x=True, want_A=True, want_B=True)
        | GROUPS | ADAPTERS | SETTINGS,
    ),
    "combine": (COMBINE, GOOD_COMBINE),
    "combine backward": (COMBINE_BACKWARD, GOOD_COMBINE | dict(grad_y=torch.ones(3, 8), want_weights=True)),
}  # fmt: skip


def wrong(argument, value):
    """Values that an operator must not take as they are: other sizes, other dtypes, and numbers out of range."""
    if isinstance(value, list):
        yield from ([3, 6, 9], [4, 6, 8], [3, 48], [-3, -6, 8], [])
    if isinstance(value, torch.Tensor):
        yield from (value.flatten()[:-1], torch.cat([value, value], -1), value.double())
        if on_a_gpu():
            return  # nothing would refuse them
        if value.dtype == torch.int64 and argument != "seed":
            yield value + 100
        if argument in ("offsets", "experts", "places"):
            yield value - 100 * (value == value.max())


@pytest.mark.parametrize("base", ["dense", "nf4"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_registered_operators_stay_inside_their_memory(name, base):
    """Called past the Python face, without its checks, they still refuse what they cannot index."""
    operator, good = OPERATORS[name]
    if "shape" in good:
        good = good | (DENSE if base == "dense" else STORAGE)
    operator(**good)
    for argument, value in good.items():
        for other in wrong(argument, value):
            if (name, argument) == ("combine", "x"):
                other = other[:-1]  # any width is right there
            with pytest.raises(RuntimeError):
                operator(**good | {argument: other})
                pytest.fail(f"took {argument} = {other}")
    if "seed" in good:
        for change in (dict(seed=None), dict(seed=INTS([], dtype=torch.int64)), dict(dropout=1.0)):
            with pytest.raises(RuntimeError):
                operator(**good | change)
