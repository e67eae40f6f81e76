"""The op bottleneck_adapter against float64, in all that can vary: shapes, dtypes, layouts, activations, residuals.

The rule: on the same inputs, the error against float64 is at most 1.1 times the error of the computation that the op
replaces, which `eager` spells out. Over a handful of elements the ratio of two rounding errors is luck: there, some
roundings more are allowed. No operand is ever zero.
"""

import math
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast import reference
from peftfast.nn import BottleneckAdapter
from peftfast.ops import bottleneck_adapter
from peftfast.testing import assert_as_accurate, bytes_saved_for_backward

FORWARD = torch.ops.peftfast.bottleneck_adapter.default
BACKWARD = torch.ops.peftfast.bottleneck_adapter_backward.default
DTYPES = {  # of x, and of the parameters
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
    "fp16-fp32": (torch.float16, torch.float32),
}
ACTIVATIONS = list(reference.ACTIVATIONS)
SHAPES = [  # M, H, D
    (1, 1, 1),
    (1, 257, 65),
    (2, 64, 16),
    (5, 33, 129),
    (6, 64, 64),
    (13, 3, 7),
    (40, 300, 70),
    (131, 96, 24),
]
LARGE = [(600, 96, 32), (2101, 65, 4), (30, 5000, 16), (20, 70, 600)]  # past the blocks of rows and features
EMPTY = [(0, 8, 4), (3, 0, 4), (0, 0, 1)]
VARIANTS = {
    "plain": dict(),
    "after": dict(residual="x", norm=True, scaling="learned"),
    "beside": dict(residual="other", dropout=0.3, scaling=4.0),
    "everything": dict(residual="other", norm=True, dropout=0.3, scaling="learned"),
    "no biases": dict(biases=False, norm="no bias", residual="x", dropout=0.1),
}
PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """The operands are small: threads would only wait for each other. The test of threads sets its own."""
    torch.set_num_threads(1)


def name_of(shape):
    return "M{}-H{}-D{}".format(*shape)


def by_dtype(test):
    return pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())(test)


def by_variant(test):
    return pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())(test)


@dataclass
class Problem:
    """One call, its operands by name, and the gradient of the output. The residual "x" is the very tensor x."""

    operands: dict
    settings: dict
    grad: torch.Tensor
    residual_is_x: bool = False

    def map(self, f):
        return replace(self, operands={name: f(t) for name, t in self.operands.items()}, grad=f(self.grad))

    def call(self, function):
        given = {name: None for name in PARAMETERS} | self.operands
        positional = [given.pop(name) for name in ("x", *PARAMETERS[:4])]
        if self.residual_is_x:
            given["residual"] = positional[0]
        return function(*positional, **given, **self.settings)


def problem(
    shape, dtypes, activation="gelu", *, residual=None, norm=False, dropout=0.0, scaling=0.75, biases=True, batch=None
):  # fmt: skip
    """Random operands with outputs of order one; rows of x whose mean is not zero."""
    M, H, D = shape
    dtype, parameter_dtype = dtypes
    batch = (M,) if batch is None else batch

    def randn(*size, scale=1.0, dtype=parameter_dtype):
        return (torch.randn(*size) * scale).to(dtype)

    operands = {
        "x": (torch.randn(*batch, H) + torch.randn(*batch, 1)).to(dtype),
        "down_weight": randn(D, H, scale=max(H, 1) ** -0.5),
        "up_weight": randn(H, D, scale=D**-0.5),
    }
    if biases:
        operands |= {"down_bias": randn(D, scale=0.3), "up_bias": randn(H, scale=0.3)}
    if norm:
        operands["norm_weight"] = 1 + randn(H, scale=0.3)
        if norm != "no bias":
            operands["norm_bias"] = randn(H, scale=0.3)
    if residual == "other":
        operands["residual"] = randn(*batch, H, dtype=dtype)
    if scaling == "learned":
        operands["scaling"] = torch.tensor([1.25], dtype=parameter_dtype)
    settings = dict(activation=activation, dropout=dropout)
    settings |= {} if scaling == "learned" else {"scaling": scaling}
    settings |= {"seed": torch.tensor([20240229])} if dropout else {}
    return Problem(operands, settings, randn(*batch, H, dtype=dtype), residual == "x")


EAGER_ACTIVATIONS = {
    "identity": torch.nn.Identity(),
    "relu": torch.nn.ReLU(),
    "gelu": torch.nn.GELU(),
    "gelu_tanh": torch.nn.GELU(approximate="tanh"),
    "silu": torch.nn.SiLU(),
    "tanh": torch.nn.Tanh(),
}


def eager(
    x, down_weight, down_bias, up_weight, up_bias, *, activation, scaling, norm_weight=None, norm_bias=None,
    dropout=0.0, residual=None, seed=None,
):  # fmt: skip
    """What the modules of an adapter compute, one after the other, with the dropout mask given instead of drawn."""
    h = x.to(down_weight.dtype)
    if norm_weight is not None:
        h = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias)
    h = EAGER_ACTIVATIONS[activation](F.linear(h, down_weight, down_bias))
    if dropout:
        h = h * reference.dropout_mask(h.shape, dropout, seed) / (1 - dropout)
    y = F.linear(h, up_weight, up_bias) * scaling
    return (y if residual is None else y + residual).to(x.dtype)


def forward_backward(function, p, wanted=None):
    """The output and the gradients of the operands named in `wanted` (all of them if None), by name."""
    fresh = replace(p, operands={name: t.detach() for name, t in p.operands.items()})
    wanted = list(fresh.operands) if wanted is None else wanted
    for name in wanted:
        fresh.operands[name].requires_grad_()
    out = fresh.call(function)
    if not wanted:
        return {"output": out}
    out.backward(p.grad)
    return {"output": out.detach()} | {f"grad of {name}": t.grad for name, t in fresh.operands.items()}


def in_float64(p):
    return forward_backward(reference.bottleneck_adapter, p.map(torch.Tensor.double))


def check(p):
    got, rival, oracle = forward_backward(bottleneck_adapter, p), forward_backward(eager, p), in_float64(p)
    bottleneck = p.operands["x"][..., :1].numel() * p.operands["down_weight"].shape[0]
    for name, exact in oracle.items():
        assert got[name].shape == exact.shape, name
        assert got[name].dtype == rival[name].dtype, name
        few = exact.numel() < 2000 or bottleneck < 2000
        slack = 16 * torch.finfo(got[name].dtype).eps if few else 0.0
        assert_as_accurate(got[name], rival[name], exact, slack=slack, name=name)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.every_isa
@by_variant
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@by_dtype
def test_accuracy(shape, dtypes, variant):
    check(problem(shape, dtypes, **variant))


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@by_dtype
def test_activations(dtypes, activation):
    check(problem((60, 70, 40), dtypes, activation, **VARIANTS["everything"]))


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", LARGE, ids=name_of)
@by_dtype
def test_accuracy_past_the_blocks(shape, dtypes):
    check(problem(shape, dtypes, **VARIANTS["everything"]))


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_over_its_whole_range(activation):
    """One feature that passes through: the activation and its slope themselves, far out too."""
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -90.0, -1e-3, 1e-6, 90.0, 1e4])])
    one = torch.ones(1, 1)

    def run(function, dtype):
        x = z.to(dtype)[:, None].requires_grad_()
        y = function(x, one.to(dtype), None, one.to(dtype), None, activation=activation)
        return y.detach(), *torch.autograd.grad(y.sum(), x)

    for got, exact in zip(
        run(bottleneck_adapter, torch.float32), run(reference.bottleneck_adapter, torch.float64)
    ):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-7)


@pytest.mark.every_isa
@by_variant
@pytest.mark.parametrize("shape", EMPTY, ids=name_of)
def test_nothing_to_sum(shape, variant):
    """No rows or no features: empty results, and zeros where a sum has no terms."""
    if shape[1] == 0 and variant.get("norm"):
        pytest.skip("torch has no norm of nothing")
    p = problem(shape, DTYPES["bf16-fp32"], **variant)
    got, oracle = forward_backward(bottleneck_adapter, p), in_float64(p)
    for name, exact in oracle.items():
        torch.testing.assert_close(got[name], exact.to(got[name].dtype), msg=name)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 4), (3, 0)], ids=str)
@by_dtype
def test_batch_dimensions(batch, dtypes):
    check(problem((0, 40, 5), dtypes, batch=batch, **VARIANTS["everything"]))


@pytest.mark.every_isa
@by_dtype
def test_a_norm_of_rows_far_from_zero(dtypes):
    """Their mean is ten times their deviation."""
    p = problem((64, 96, 40), dtypes, **VARIANTS["after"])
    p.operands["x"] += 10
    check(p)


@by_dtype
def test_the_dtype_of_vectors_is_free(dtypes):
    p = problem((30, 40, 8), dtypes, **VARIANTS["after"])
    expected = p.call(bottleneck_adapter)
    for name in ("down_bias", "up_bias", "norm_weight", "norm_bias", "scaling"):
        p.operands[name] = p.operands[name].float()
    assert torch.equal(p.call(bottleneck_adapter), expected)


@pytest.mark.every_isa
@by_dtype
def test_zero_up_is_the_residual_bit_for_bit(dtypes):
    p = problem((31, 64, 16), dtypes, **VARIANTS["everything"])
    p.operands["up_weight"].zero_()
    p.operands["up_bias"].zero_()
    assert torch.equal(p.call(bottleneck_adapter), p.operands["residual"])


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", [False, True], ids=["", "norm"])
@by_dtype
def test_a_nan_stays_in_its_row(dtypes, norm, activation):
    p = problem((11, 37, 8), dtypes, activation, norm=norm, residual="other")
    p.operands["x"][5, 3] = math.nan
    out = p.call(bottleneck_adapter)
    assert out[5].isnan().all()
    assert out[torch.arange(11) != 5].isfinite().all()


# ------------------------------------------------------------------------------------------------- layouts


def strided(tensor, layout):
    """The same values in another layout. Whatever lies between them is NaN, so that reading it shows."""
    if tensor.numel() == 0 or tensor.dim() < 2:
        return tensor
    rows, cols = tensor.shape[-2:]
    wide = torch.full((*tensor.shape[:-2], 2 * rows, 2 * cols + 3), math.nan, dtype=tensor.dtype)
    view = {
        "contiguous": lambda: wide.new_empty(tensor.shape),
        "row slice": lambda: wide[..., :rows, 1 : cols + 1],
        "row stride": lambda: wide[..., ::2, :cols],
        "column stride": lambda: wide[..., :rows, 1 : 2 * cols + 1 : 2],
        "transposed": lambda: wide.new_empty((*tensor.shape[:-2], cols, rows)).mT,
    }[layout]()
    return view.copy_(tensor)


LAYOUTS = ["contiguous", "row slice", "row stride", "column stride", "transposed"]


@pytest.mark.every_isa
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@by_dtype
def test_layouts_change_nothing(dtypes, layout):
    p = problem((19, 67, 35), dtypes, **VARIANTS["everything"])
    other = p.map(lambda tensor: strided(tensor, layout))
    assert_equal(forward_backward(bottleneck_adapter, other), forward_backward(bottleneck_adapter, p))


def test_expanded_operands():
    p = problem((19, 67, 35), DTYPES["fp32"], **VARIANTS["everything"])
    p.operands["x"], p.grad = p.operands["x"][:1].expand(19, 67), p.grad[:1, :1].expand(19, 67)
    contiguous = p.map(torch.Tensor.contiguous)
    assert_equal(forward_backward(bottleneck_adapter, p), forward_backward(bottleneck_adapter, contiguous))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 20), st.integers(1, 90), st.integers(1, 70)),
    dtypes=st.sampled_from(list(DTYPES.values())),
    activation=st.sampled_from(ACTIVATIONS),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
    norm=st.sampled_from([False, True, "no bias"]),
    biases=st.booleans(),
    residual=st.sampled_from([None, "x", "other"]),
    dropout=st.sampled_from([0.0, 0.05, 0.5]),
    scaling=st.sampled_from([0.5, -2.0, "learned"]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_layout(
    shape, dtypes, activation, layouts, norm, biases, residual, dropout, scaling, seed
):
    torch.manual_seed(seed)
    p = problem(
        shape, dtypes, activation, norm=norm, biases=biases, residual=residual, dropout=dropout, scaling=scaling
    )  # fmt: skip
    layouts = iter(layouts)
    check(p.map(lambda t: strided(t, next(layouts)) if t.dim() == 2 else t))


# ----------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("only", [None, "x", *PARAMETERS, "residual", "scaling"])
def test_only_the_gradients_asked_for(only):
    p = problem((13, 40, 6), DTYPES["bf16-fp32"], **VARIANTS["everything"])
    everything = forward_backward(bottleneck_adapter, p)
    some = forward_backward(bottleneck_adapter, p, [] if only is None else [only])
    assert torch.equal(some.pop("output"), everything["output"])
    for name, grad in some.items():
        assert grad is None if name != f"grad of {only}" else torch.equal(grad, everything[name]), name


def test_the_gradient_of_a_residual_that_is_x_is_the_sum_of_both():
    p = problem((37, 64, 16), DTYPES["fp32"], **VARIANTS["after"])
    apart = replace(p, operands=p.operands | {"residual": p.operands["x"].clone()}, residual_is_x=False)
    together, parts = (forward_backward(bottleneck_adapter, q) for q in (p, apart))
    assert torch.equal(together["output"], parts["output"])
    torch.testing.assert_close(together["grad of x"], parts["grad of x"] + parts["grad of residual"])


def test_retained_graph_gives_the_same_gradients_again():
    p = problem((13, 40, 6), DTYPES["fp32"], **VARIANTS["everything"])
    leaves = [t.requires_grad_() for t in p.operands.values()]
    out = p.call(bottleneck_adapter)
    first = torch.autograd.grad(out, leaves, p.grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, leaves, p.grad)))


def test_operands_changed_before_backward_are_refused():
    p = problem((13, 40, 6), DTYPES["fp32"])
    p.operands["up_weight"].requires_grad_()
    out = p.call(bottleneck_adapter)
    with torch.no_grad():
        p.operands["up_weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.grad)


def test_operands_are_left_alone():
    p = problem((13, 40, 6), DTYPES["bf16"], **VARIANTS["everything"])
    before = p.map(torch.clone)
    forward_backward(bottleneck_adapter, p)
    assert_equal(p.operands, before.operands)
    assert torch.equal(p.grad, before.grad)


@by_variant
def test_the_reference_is_the_modules(variant):
    p = problem((6, 25, 4), (torch.float64, torch.float64), **variant)
    ours, modules = forward_backward(reference.bottleneck_adapter, p), forward_backward(eager, p)
    for name in modules:
        torch.testing.assert_close(ours[name], modules[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    p = problem((3, 5, 4), (torch.float64, torch.float64), activation, **VARIANTS["everything"])
    names = list(p.operands)

    def function(*leaves):
        return replace(p, operands=dict(zip(names, leaves))).call(reference.bottleneck_adapter)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in p.operands.values()])


def test_second_derivative_is_refused():
    p = problem((6, 25, 3), DTYPES["fp32"])
    x = p.operands["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(p.call(bottleneck_adapter).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as refusal:
        gradient.sum().backward()
    assert len(str(refusal.value).strip().splitlines()) == 1


@by_variant
@by_dtype
def test_saved_for_backward(dtypes, variant):
    """The bottleneck in fp32, beside what is there anyway."""
    p = problem((48, 400, 12), dtypes, **variant)
    known = [*p.operands.values(), *(t for t in p.settings.values() if isinstance(t, torch.Tensor))]
    for leaf in p.operands.values():
        leaf.requires_grad_()
    assert bytes_saved_for_backward(lambda: p.call(bottleneck_adapter), known) == 4 * 48 * 12


def test_no_grad_saves_nothing():
    p = problem((48, 40, 12), DTYPES["fp32"], **VARIANTS["everything"])
    expected = p.call(bottleneck_adapter)
    for leaf in p.operands.values():
        leaf.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = p.call(bottleneck_adapter)
        assert not out.requires_grad and out.grad_fn is None and torch.equal(out, expected)


# ------------------------------------------------------------------------------------ determinism, dropout


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(1, 900, 16), (131, 257, 70), *LARGE[:2]], ids=name_of)
@by_dtype
def test_equal_bits_for_any_number_of_threads(shape, dtypes):
    p = problem(shape, dtypes, **VARIANTS["everything"])
    torch.set_num_threads(1)
    alone = forward_backward(bottleneck_adapter, p)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(forward_backward(bottleneck_adapter, p), alone)


@pytest.mark.every_isa
@pytest.mark.parametrize("seed", [0, -1, 2**40 + 17, -(2**63)])
def test_the_kernel_drops_what_the_reference_drops(seed):
    eye, seed = torch.eye(66), torch.tensor([seed])
    out = bottleneck_adapter(
        torch.ones(37, 66), eye, None, eye, None, activation="identity", dropout=0.4, seed=seed
    )
    torch.testing.assert_close(out, reference.dropout_mask((37, 66), 0.4, seed) / 0.6)


def test_manual_seed_decides_the_dropout():
    p = problem((31, 64, 8), DTYPES["fp32"], dropout=0.2)
    del p.settings["seed"]

    def drawn(seed):
        torch.manual_seed(seed)
        return forward_backward(bottleneck_adapter, p)

    first = drawn(1)
    assert_equal(drawn(1), first)
    assert not torch.equal(drawn(2)["output"], first["output"])
    assert not torch.equal(p.call(bottleneck_adapter), p.call(bottleneck_adapter))


def test_no_dropout_leaves_the_generator_alone():
    state = torch.get_rng_state()
    p = Problem(
        {"x": torch.ones(3, 8), "down_weight": torch.ones(2, 8), "up_weight": torch.ones(8, 2)}, {}, None
    )
    p.call(bottleneck_adapter)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------ modes of torch


@pytest.mark.parametrize(
    "backend, variant", [*(("aot_eager", variant) for variant in VARIANTS), ("inductor", "everything")]
)
def test_compiled(backend, variant):
    torch._dynamo.reset()
    p = problem((13, 40, 6), DTYPES["bf16-fp32"], **VARIANTS[variant])
    compiled = torch.compile(bottleneck_adapter, fullgraph=True, backend=backend)
    assert_equal(forward_backward(compiled, p), forward_backward(bottleneck_adapter, p))


def test_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    compiled = torch.compile(bottleneck_adapter, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (5, 13, 64):
        p = problem((M, 40, 4), DTYPES["fp32"], **VARIANTS["everything"])
        assert_equal(forward_backward(compiled, p), forward_backward(bottleneck_adapter, p))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_replays_the_dropout(reentrant):
    p = problem((31, 64, 8), DTYPES["fp32"], **VARIANTS["beside"])
    del p.settings["seed"]

    def gradients(run):
        torch.manual_seed(11)
        leaves = {name: t.detach().requires_grad_() for name, t in p.operands.items()}

        def layer(*tensors):
            return replace(p, operands=dict(zip(leaves, tensors))).call(bottleneck_adapter).relu()

        run(layer, *leaves.values()).backward(p.grad)
        return [leaf.grad for leaf in leaves.values()]

    plain = gradients(lambda layer, *tensors: layer(*tensors))
    replayed = gradients(lambda layer, *tensors: checkpoint(layer, *tensors, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, replayed))


def test_autocast_changes_nothing():
    p = problem((31, 64, 8), DTYPES["bf16-fp32"], **VARIANTS["everything"])
    expected = forward_backward(bottleneck_adapter, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(forward_backward(bottleneck_adapter, p), expected)


# ----------------------------------------------------------------------------------------------- bad input

GOOD = dict(
    x=torch.ones(5, 8), down_weight=torch.ones(3, 8), down_bias=torch.ones(3), up_weight=torch.ones(8, 3),
    up_bias=torch.ones(8), activation="relu", scaling=1.0, norm_weight=torch.ones(8), norm_bias=torch.ones(8),
    norm_eps=1e-5, dropout=0.5, residual=torch.ones(5, 8), seed=torch.tensor([1]),
)  # fmt: skip
BAD = [
    (dict(x=[[1.0]]), TypeError, "x"),
    (dict(x=torch.ones(5, 8).double()), TypeError, "x"),
    (dict(x=torch.ones(5, 8, dtype=torch.int32)), TypeError, "x"),
    (dict(x=torch.ones(())), ValueError, "x"),
    (dict(x=torch.ones(5, 9)), ValueError, "down_weight"),
    (dict(x=torch.ones(5, 8).to_sparse()), TypeError, "x"),
    (dict(down_weight=None), TypeError, "down_weight"),
    (dict(down_weight=torch.ones(8)), ValueError, "down_weight"),
    (dict(down_weight=torch.ones(0, 8), up_weight=torch.ones(8, 0)), ValueError, "down_weight"),
    (dict(down_weight=torch.ones(3, 8, device="meta")), ValueError, "down_weight"),
    (dict(down_bias=torch.ones(4)), ValueError, "down_bias"),
    (dict(down_bias=torch.ones(3).double()), TypeError, "down_bias"),
    (dict(up_weight=torch.ones(3, 8)), ValueError, "up_weight"),
    (dict(up_weight=torch.ones(8, 3).half()), TypeError, "up_weight"),
    (dict(up_weight=None), TypeError, "up_weight"),
    (dict(up_bias=torch.ones(1, 8)), ValueError, "up_bias"),
    (dict(up_bias=1.0), TypeError, "up_bias"),
    (dict(norm_weight=torch.ones(7)), ValueError, "norm_weight"),
    (dict(norm_weight=None), ValueError, "norm_bias"),
    (dict(norm_bias=torch.ones(7)), ValueError, "norm_bias"),
    (dict(norm_eps=-1.0), ValueError, "norm_eps"),
    (dict(norm_eps="0"), TypeError, "norm_eps"),
    (dict(activation="swish"), ValueError, "activation"),
    (dict(activation=None), ValueError, "activation"),
    (dict(scaling=torch.ones(2)), ValueError, "scaling"),
    (dict(scaling="learned"), TypeError, "scaling"),
    (dict(scaling=torch.tensor(1)), TypeError, "scaling"),
    (dict(dropout=1.0), ValueError, "dropout"),
    (dict(dropout=-0.1), ValueError, "dropout"),
    (dict(dropout=math.nan), ValueError, "dropout"),
    (dict(dropout="0.5"), TypeError, "dropout"),
    (dict(residual=torch.ones(4, 8)), ValueError, "residual"),
    (dict(residual=torch.ones(5, 8).bfloat16()), TypeError, "residual"),
    (dict(residual=1.0), TypeError, "residual"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "seed"),
    (dict(seed=torch.tensor([1.0])), ValueError, "seed"),
    (dict(seed=3), TypeError, "seed"),
]


@pytest.mark.parametrize("change, error, name", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(change, error, name):
    bottleneck_adapter(**GOOD)
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        bottleneck_adapter(**GOOD | change)
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


# -------------------------------------------------------------------------------------------- registration


def as_registered(p):
    """The arguments of the registered op, as its schema orders them."""
    given = {name: p.operands.get(name) for name in ("x", "residual", *PARAMETERS, "scaling")}
    settings = p.settings.get("scaling", 1.0), ACTIVATIONS.index(p.settings["activation"]), 1e-5
    return (*given.values(), *settings, p.settings["dropout"], p.settings.get("seed"), p.residual_is_x)


@by_variant
def test_opcheck(variant):
    """torch's own checks of an op: schema, fake, autograd registration, tracing with dynamic shapes."""
    p = problem((13, 40, 6), DTYPES["bf16-fp32"], **variant)
    x, _, *rest = arguments = as_registered(p)
    opcheck(FORWARD, arguments)
    y, z = FORWARD(*arguments)
    want = [True, *(tensor is not None for tensor in rest[:7])]
    want[3] = False
    opcheck(BACKWARD, (torch.randn_like(y), x, *rest[:7], z, *rest[7:], want))
    for leaf in p.operands.values():
        leaf.requires_grad_()
    opcheck(FORWARD, arguments)
    assert [result.requires_grad for result in FORWARD(*arguments)] == [True, False]


@pytest.mark.parametrize(
    "change",
    ["down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias", "residual", "scaling"],
)
def test_the_registered_op_stays_inside_its_memory(change):
    """Called past the Python face, without its checks, the op still refuses what it cannot index."""
    p = problem((13, 40, 6), DTYPES["fp32"], **VARIANTS["everything"])
    FORWARD(*as_registered(p))
    p.operands[change] = p.operands[change][:-1]
    with pytest.raises(RuntimeError):
        FORWARD(*as_registered(p))


# ----------------------------------------------------------------------------------------------- the module


def test_the_module_is_the_op():
    adapter = BottleneckAdapter(40, 8, activation="silu", scaling="learned", layer_norm=True, init="normal")
    x, residual = torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    given = {name: getattr(adapter, name) for name in (*PARAMETERS, "scaling")}
    expected = bottleneck_adapter(x, **given, activation="silu", residual=residual)
    assert torch.equal(adapter(x, residual), expected)
    assert not torch.equal(expected, residual)
    exact = adapter.double()(x.double(), residual.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_module_drops_in_training_alone():
    adapter = BottleneckAdapter(40, 8, dropout=0.5, init="normal")
    x = torch.randn(6, 40)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


@pytest.mark.parametrize(
    "options, error, name",
    [
        (dict(hidden_size=0), ValueError, "hidden_size"),
        (dict(bottleneck_size=0), ValueError, "bottleneck_size"),
        (dict(bottleneck_size=2.0), ValueError, "bottleneck_size"),
        (dict(activation="swish"), ValueError, "activation"),
        (dict(scaling="much"), TypeError, "scaling"),
        (dict(scaling=math.inf), ValueError, "scaling"),
        (dict(dropout=1.0), ValueError, "dropout"),
        (dict(init="ones"), ValueError, "init"),
    ],
)
def test_options_of_the_module_that_cannot_be(options, error, name):
    with pytest.raises(error, match=name):
        BottleneckAdapter(**dict(hidden_size=8, bottleneck_size=2) | options)
