"""The ops swiglu, rms_norm and cross_entropy against float64 and torch's eager modules, and transformers' models that
run on the first two.

The rule: on the same inputs, the error against float64 is at most 1.1 times the error of the computation that the op
replaces. Over a handful of elements the ratio of two rounding errors is luck: there, some roundings more are allowed.
"""

import copy
import math

import pytest
import torch
from conftest import random_states
from peft import LoraConfig, get_peft_model
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.nanochat.modeling_nanochat import NanoChatRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

import peftfast
from peftfast import nn as ours
from peftfast import reference
from peftfast.integrations import rowwise
from peftfast.integrations.rowwise import TILE
from peftfast.ops import rms_norm, swiglu
from peftfast.testing import assert_as_accurate, bytes_saved_for_backward

OPS = torch.ops.peftfast
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 1), (1, 257), (2, 64), (5, 33), (13, 3), (70, 300), (3, 5000), (37, 1032)]  # rows, features
EMPTY = [(0, 8), (3, 0), (0, 0)]
KINDS = {  # of norms: the module that computes it, offset, cast_first
    "llama": (LlamaRMSNorm, 0.0, True),
    "gemma": (GemmaRMSNorm, 1.0, False),
    "olmo2": (Olmo2RMSNorm, 0.0, False),
}


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """The operands are small: threads would only wait for each other. The test of threads sets its own."""
    torch.set_num_threads(1)


def by_dtype(test):
    return pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())(test)


def by_kind(test):
    return pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())(test)


def results(function, leaves, grad=None, wanted=None):
    """The output and the gradients of the leaves that are wanted (all of them if None)."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    wanted = leaves if wanted is None else [leaves[i] for i in wanted]
    return [out.detach(), *torch.autograd.grad(out, wanted, grad)]


def check(got, eager, oracle, few_rows=False):
    """All elements of a row share the error of its norm: that of few rows is luck too."""
    for i, (mine, theirs, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        name = f"gradient {i}" if i else "output"
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape == exact.shape, name
        slack = torch.finfo(mine.dtype).eps * (4 if exact.numel() < 2000 else 0.25 if few_rows else 0)
        assert_as_accurate(mine, theirs, exact, slack=slack, name=name)


def assert_equal(a, b):
    assert all(map(torch.equal, a, b))


# ---- swiglu ---------------------------------------------------------------------------------------------


def halves(shape, dtype, scale=2.0):
    """gate and up, the halves of one tensor, and the gradient of the output."""
    *batch, features = shape
    return (torch.randn(*batch, 2 * features) * scale).to(dtype), torch.randn(*shape).to(dtype)


def gated(function, activation="silu"):
    return lambda both: function(*both.chunk(2, dim=-1), activation=activation)


def check_swiglu(both, grad, activation="silu"):
    eager = results(gated(reference.swiglu, activation), [both], grad)
    oracle = results(gated(reference.swiglu, activation), [both.double()], grad)
    check(results(gated(swiglu, activation), [both], grad), eager, oracle)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@by_dtype
def test_swiglu(dtype, activation, shape):
    check_swiglu(*halves(shape, dtype), activation)


@pytest.mark.every_isa
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_an_activation_over_its_whole_range(activation):
    z = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, -90.0, -1e-3, 1e-6, 90.0, 1e4])])

    def run(function, dtype):
        return results(lambda z: function(z, torch.ones_like(z), activation=activation), [z.to(dtype)])

    for got, exact in zip(run(swiglu, torch.float32), run(reference.swiglu, torch.float64)):
        torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=2e-7)


@pytest.mark.every_isa
@by_dtype
def test_swiglu_of_strided_operands(dtype):
    """Halves, tensors of their own, and columns apart: the same bits."""
    both, grad = halves((6, 7, 40), dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = results(swiglu, [gate.contiguous(), up.contiguous()], grad)
    joined = results(gated(swiglu), [both], grad)
    assert_equal([joined[0], *joined[1].chunk(2, dim=-1)], expected)
    apart = torch.stack([gate, up], dim=-1)
    got = results(lambda apart: swiglu(*apart.unbind(-1)), [apart], grad.mT.contiguous().mT)
    assert_equal([got[0], *got[1].unbind(-1)], expected)
    expanded = results(swiglu, [gate[:1].expand(6, 7, 40), up[:, :1].expand(6, 7, 40)], grad)
    plain = results(swiglu, [gate[:1].repeat(6, 1, 1), up[:, :1].repeat(1, 7, 1)], grad)
    assert_equal(expanded, plain)


class WeightedSwiglu(torch.autograd.Function):
    """weights * swiglu(halves of x), from the operators that layers of experts take."""

    @staticmethod
    def forward(ctx, x, weights, activation):
        ctx.save_for_backward(x, weights)
        ctx.activation = list(reference.ACTIVATIONS).index(activation)
        return OPS.weighted_swiglu(x, weights, ctx.activation)

    @staticmethod
    def backward(ctx, grad):
        x, weights = ctx.saved_tensors
        grad_x, none = OPS.weighted_swiglu_backward(grad, x, weights, ctx.activation, False)
        again, grad_weights = OPS.weighted_swiglu_backward(grad, x, weights, ctx.activation, True)
        assert torch.equal(grad_x, again) and none.shape == (0,)
        return grad_x, grad_weights, None


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(13, 40), (5, 1000), (1, 1), (0, 8)], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@by_dtype
def test_weighted_swiglu(dtype, activation, shape):
    both, grad = halves(shape, dtype)
    weights = torch.randn(shape[0])

    def eager(both, weights):
        return gated(reference.swiglu, activation)(both) * weights.unsqueeze(1).to(both.dtype)

    check(
        results(lambda *leaves: WeightedSwiglu.apply(*leaves, activation), [both, weights], grad),
        results(eager, [both, weights], grad),
        results(eager, [both.double(), weights.double()], grad),
    )


@by_dtype
def test_swiglu_gives_the_gradients_asked_for(dtype):
    both, grad = halves((9, 40), dtype)
    out, *grads = results(swiglu, both.chunk(2, dim=-1), grad)
    for i in (0, 1):
        assert_equal(results(swiglu, both.chunk(2, dim=-1), grad, [i]), [out, grads[i]])


# ---- rms_norm -------------------------------------------------------------------------------------------


def norm_problem(shape, dtype, weight_dtype, offset, mean=0.5):
    x = (torch.randn(*shape) * 3 + mean).to(dtype)
    weight = (torch.randn(shape[-1]) * 0.3 + 1 - offset).to(weight_dtype)
    return x, weight, torch.randn(*shape)


def module_of(kind, weight):
    """transformers' own norm."""
    module = kind(weight.shape[0], eps=1e-5)
    module.weight = torch.nn.Parameter(weight.detach().clone())
    return module


def check_norm(kind, shape, dtype, weight_dtype=None, **options):
    kind, offset, cast_first = kind
    x, weight, grad = norm_problem(shape, dtype, weight_dtype or dtype, offset, **options)
    settings = dict(eps=1e-5, offset=offset, cast_first=cast_first)
    module = module_of(kind, weight)

    def eager(x, weight):
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    check(
        results(lambda *leaves: rms_norm(*leaves, **settings), [x, weight], grad),
        results(eager, [x, weight], grad),
        results(lambda *leaves: reference.rms_norm(*leaves, **settings), [x.double(), weight.double()], grad),
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@by_kind
@by_dtype
def test_rms_norm(dtype, kind, shape):
    check_norm(kind, shape, dtype)


@pytest.mark.every_isa
@by_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_weight_in_fp32(dtype, kind):
    check_norm(kind, (40, 200), dtype, torch.float32)
    check_norm(kind, (40, 200), torch.float32, dtype)
    check_norm(kind, (40, 200), torch.bfloat16, torch.float16)


@pytest.mark.every_isa
@by_kind
@by_dtype
def test_rows_far_from_zero_and_many_rows(dtype, kind):
    check_norm(kind, (2101, 40), dtype, mean=30.0)


@by_kind
def test_16_bit_results_are_transformers_own(kind):
    """The order of roundings is theirs: but for another order of a sum, the bits are the same."""
    kind, offset, cast_first = kind
    x, weight, _ = norm_problem((64, 300), torch.bfloat16, torch.bfloat16, offset)
    got = rms_norm(x, weight, 1e-5, offset, cast_first=cast_first)
    assert (got == module_of(kind, weight)(x)).float().mean() > 0.999


@pytest.mark.every_isa
@by_dtype
def test_a_norm_without_a_weight(dtype):
    x, _, grad = norm_problem((30, 70), dtype, dtype, 0.0)
    eager = results(lambda x: NanoChatRMSNorm(eps=1e-6)(x), [x], grad)
    oracle = results(lambda x: reference.rms_norm(x, None), [x.double()], grad)
    check(results(lambda x: rms_norm(x, None), [x], grad), eager, oracle)


@pytest.mark.every_isa
@by_kind
@by_dtype
def test_rms_norm_of_strided_operands(dtype, kind):
    _, offset, cast_first = kind
    x, weight, grad = norm_problem((6, 7, 40), dtype, dtype, offset)

    def run(x, weight, grad):
        return results(lambda *t: rms_norm(*t, 1e-6, offset, cast_first=cast_first), [x, weight], grad)

    expected = run(x, weight, grad)
    wide = torch.full((6, 7, 90), math.nan, dtype=dtype)
    wide[..., 1:41], wide[..., 50:] = x, x
    apart = torch.full((6, 7, 80), math.nan, dtype=dtype)[..., ::2].copy_(x)
    for view in (wide[..., 1:41], wide[..., 50:], apart, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert_equal(run(view, weight.repeat_interleave(2)[::2], grad.mT.contiguous().mT), expected)


@by_dtype
def test_rms_norm_gives_the_gradients_asked_for(dtype):
    x, weight, grad = norm_problem((40, 200), dtype, dtype, 0.0)
    out, *grads = results(rms_norm, [x, weight], grad)
    for i in (0, 1):
        assert_equal(results(rms_norm, [x, weight], grad, [i]), [out, grads[i]])


@by_kind
@by_dtype
def test_a_nan_stays_in_its_row(dtype, kind):
    _, offset, cast_first = kind
    x, weight, _ = norm_problem((11, 40), dtype, dtype, offset)
    x[5, 3] = math.nan
    out = rms_norm(x, weight, 1e-6, offset, cast_first=cast_first)
    rows = torch.arange(11, device=x.device) != 5
    assert out[5].isnan().all() and out[rows].isfinite().all()


# ---- cross_entropy --------------------------------------------------------------------------------------

CAPS = {"plain": (1.0, 0.0), "scaled": (-0.3, 0.0), "capped": (1.0, 5.0), "both": (-2.0, 3.0)}  # scale, cap


def by_cap(test):
    return pytest.mark.parametrize("scale, cap", CAPS.values(), ids=CAPS.keys())(test)


def loss_problem(shape, dtype):
    rows, vocabulary = shape
    logits, targets = (torch.randn(shape) * 3).to(dtype), torch.randint(max(1, vocabulary), (rows,))
    return logits, targets, torch.rand(rows) + 0.5


def eager_losses(logits, targets, weights, scale, cap, dtype):
    """The losses and the gradient as `dtype` and autograd give them."""
    leaf = logits.to(dtype).detach().requires_grad_()
    z = leaf * scale
    losses = F.cross_entropy(cap * torch.tanh(z / cap) if cap else z, targets, reduction="none")
    return [losses.detach(), torch.autograd.grad(losses, leaf, weights.to(dtype))[0]]


def our_losses(logits, targets, weights, scale=1.0, cap=0.0):
    gradient = logits.clone()
    return [OPS.cross_entropy(gradient, targets, weights, scale, cap, True), gradient]


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [*SHAPES, (2, 40_001)], ids=str)
@by_cap
@by_dtype
def test_cross_entropy(dtype, scale, cap, shape):
    problem = loss_problem(shape, dtype)
    losses, gradient = eager_losses(*problem, scale, cap, torch.float32)
    oracle = eager_losses(*problem, scale, cap, torch.float64)
    check(our_losses(*problem, scale, cap), [losses, gradient.to(dtype)], oracle, few_rows=True)


@pytest.mark.every_isa
@by_dtype
def test_cross_entropy_of_large_and_missing_logits(dtype):
    """-inf, as where a mask forbids a token, is exact; NaN and inf make their row NaN, and no other."""
    logits, targets, weights = loss_problem((6, 700), dtype)
    logits[0] *= 1000
    logits[1, 1:] = -math.inf
    logits[2, ::2] = -math.inf
    logits[3, 5], logits[4, 600] = math.nan, math.inf
    targets[1], targets[2] = 0, 7
    losses, gradient = our_losses(logits, targets, weights)
    expected = eager_losses(logits, targets, weights, 1.0, 0.0, torch.float32)
    torch.testing.assert_close(losses, expected[0], equal_nan=True)
    torch.testing.assert_close(gradient, expected[1].to(dtype), equal_nan=True)
    assert losses.isnan().tolist() == [False, False, False, True, True, False]
    assert not gradient[1].any() and not gradient[2, ::2].any()


@pytest.mark.every_isa
@by_dtype
def test_cross_entropy_in_place(dtype):
    """Rows may lie apart; what lies between them stays, and so do logits whose gradient nobody wants."""
    logits, targets, weights = loss_problem((9, 300), dtype)
    expected = our_losses(logits, targets, weights)
    wide = torch.full((9, 330), 7.0, dtype=dtype)
    inside = wide[:, 11:311]
    inside.copy_(logits)
    assert torch.equal(OPS.cross_entropy(inside, targets, weights, 1.0, 0.0, False), expected[0])
    assert torch.equal(inside, logits)
    assert torch.equal(OPS.cross_entropy(inside, targets, weights, 1.0, 0.0, True), expected[0])
    assert torch.equal(inside, expected[1])
    assert (wide[:, :11] == 7).all() and (wide[:, 311:] == 7).all()
    one = torch.tensor([0.7])
    assert_equal(our_losses(logits, targets, one), our_losses(logits, targets, one.repeat(9)))


@pytest.mark.every_isa
@by_dtype
def test_cross_entropy_of_a_target_that_is_none(dtype):
    logits, targets, weights = loss_problem((4, 50), dtype)
    targets[1], targets[2] = 50, -100
    losses, _ = our_losses(logits, targets, weights)
    assert losses.isnan().tolist() == [False, True, True, False]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@by_dtype
def test_cross_entropy_of_nothing(dtype, shape):
    losses, gradient = our_losses(*loss_problem(shape, dtype))
    assert losses.shape == shape[:1] and losses.isnan().all() and gradient.shape == shape


@by_dtype
def test_cross_entropy_on_any_number_of_threads(dtype):
    problem = loss_problem((37, 2570), dtype)
    expected = our_losses(*problem)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(our_losses(*problem), expected)


# ---- swiglu and rms_norm --------------------------------------------------------------------------------

CALLS = {
    "swiglu": (swiglu, lambda shape, dtype: halves(shape, dtype)[0].chunk(2, dim=-1)),
    "rms_norm": (rms_norm, lambda shape, dtype: norm_problem(shape, dtype, dtype, 0.0)[:2]),
}


def by_call(test):
    return pytest.mark.parametrize("function, operands", CALLS.values(), ids=CALLS.keys())(test)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@by_call
@by_dtype
def test_nothing_there(dtype, function, operands, shape):
    out, *grads = results(function, operands(shape, dtype))
    assert out.shape == shape and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 4), (3, 0)], ids=str)
@by_call
def test_batch_dimensions(function, operands, batch):
    given = operands((*batch, 24), torch.float32)
    flat = [tensor.reshape(-1, 24) if tensor.shape == (*batch, 24) else tensor for tensor in given]
    if batch == ():
        flat = list(given)
    got, expected = results(function, given), results(function, flat)
    assert got[0].shape == (*batch, 24)
    for mine, theirs in zip(got, expected):
        assert torch.equal(mine.reshape(theirs.shape), theirs)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(1, 900), (131, 2570), (2101, 65)], ids=str)
@by_call
@by_dtype
def test_equal_bits_for_any_number_of_threads(dtype, function, operands, shape):
    given = operands(shape, dtype)
    torch.set_num_threads(1)
    alone = results(function, given)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert_equal(results(function, given), alone)


@by_dtype
def test_saved_for_backward(dtype):
    """Nothing beside the operands but 4 bytes per row of a norm."""
    both, _ = halves((48, 400), dtype)
    both.requires_grad_()
    assert bytes_saved_for_backward(lambda: gated(swiglu)(both), [both]) == 0
    x, weight, _ = norm_problem((4, 12, 400), dtype, dtype, 0.0)
    x.requires_grad_(), weight.requires_grad_()
    assert bytes_saved_for_backward(lambda: rms_norm(x, weight), [x, weight]) == 4 * 48


@by_call
def test_no_grad_saves_nothing(function, operands):
    given = operands((5, 40), torch.float32)
    expected = function(*given)
    for leaf in given:
        leaf.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = function(*given)
        assert not out.requires_grad and out.grad_fn is None and torch.equal(out, expected)


@by_call
def test_a_second_derivative_is_refused(function, operands):
    leaves = [leaf.detach().requires_grad_() for leaf in operands((5, 40), torch.float32)]
    (gradient, _) = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as refusal:
        gradient.sum().backward()
    assert len(str(refusal.value).strip().splitlines()) == 1


@by_call
def test_operands_changed_before_backward_are_refused(function, operands):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in operands((5, 40), torch.float32)]
    out = function(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@by_call
def test_autocast_changes_nothing(function, operands):
    given = operands((5, 40), torch.float32)
    expected = results(function, given)
    with torch.autocast(given[0].device.type, dtype=torch.bfloat16):
        assert_equal(results(function, given), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@by_call
def test_activation_checkpointing(function, operands, reentrant):
    given = operands((5, 40), torch.float32)
    expected = results(lambda *t: function(*t).relu(), given)
    got = results(
        lambda *t: checkpoint(lambda *t: function(*t).relu(), *t, use_reentrant=reentrant), given,
    ) if not reentrant else _backward(
        lambda *t: checkpoint(lambda *t: function(*t).relu(), *t, use_reentrant=True), given
    )  # fmt: skip
    assert_equal(got, expected)


def _backward(function, leaves):
    """`results` by .backward(), which reentrant checkpointing needs."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    out.sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", None), ("aot_eager", True), ("inductor", None)])
@by_call
def test_compiled(function, operands, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for rows in (5, 13) if dynamic else (5,):
        given = operands((2, rows, 40), torch.bfloat16)
        assert_equal(results(compiled, given), results(function, given))


def test_opcheck():
    """torch's own checks of an op: schema, fake, autograd registration, tracing with dynamic shapes."""
    both, grad = halves((13, 40), torch.bfloat16)
    gate, up = both.chunk(2, dim=-1)
    x, weight, _ = norm_problem((13, 40), torch.bfloat16, torch.float32, 0.0)
    for requires_grad in (False, True):
        for leaf in (gate, up, x, weight):
            leaf.requires_grad_(requires_grad)
        opcheck(OPS.swiglu.default, (gate, up, 4))
        opcheck(OPS.rms_norm.default, (x, weight, 1e-6, 0.0, True))
        opcheck(OPS.rms_norm.default, (x, None, 1e-6, 0.0, False))
    x, weight = x.detach(), weight.detach()
    y, rstd = OPS.rms_norm.default(x, weight, 1e-6, 0.0, True)
    assert y.dtype == torch.float32 and rstd.shape == (13,)
    for wanted in ((True, True), (False, True), (True, False)):
        opcheck(OPS.swiglu_backward.default, (grad, gate.detach(), up.detach(), 4, *wanted))
        opcheck(OPS.rms_norm_backward.default, (torch.randn_like(y), x, weight, rstd, 0.0, True, *wanted))
    for wanted in (True, False):
        opcheck(OPS.weighted_swiglu_backward.default, (grad, both.detach(), torch.randn(13), 4, wanted))
    opcheck(OPS.weighted_swiglu.default, (both.detach(), torch.randn(13), 4))
    opcheck(OPS.cross_entropy.default, (*loss_problem((13, 40), torch.bfloat16), 0.5, 3.0, True))


@pytest.mark.parametrize(
    "call",
    [
        lambda t: OPS.swiglu(t, t[:-1], 4),
        lambda t: OPS.swiglu(t, t[:, 1:], 4),
        lambda t: OPS.swiglu(t, t.bfloat16(), 4),
        lambda t: OPS.swiglu(t, t, 6),
        lambda t: OPS.swiglu(t[0], t[0], 4),
        lambda t: OPS.swiglu_backward(t[:-1], t, t, 4, True, True),
        lambda t: OPS.weighted_swiglu(t, t[1:, 0].clone(), 4),
        lambda t: OPS.weighted_swiglu(t, t[:, 0], 4),
        lambda t: OPS.weighted_swiglu(t[:, 1:], t[:, 0].clone(), 4),
        lambda t: OPS.weighted_swiglu_backward(t, t, t[:, 0].clone(), 4, True),
        lambda t: OPS.rms_norm(t, t[0, 1:], 1e-6, 0.0, True),
        lambda t: OPS.rms_norm(t[0], t[0], 1e-6, 0.0, True),
        lambda t: OPS.rms_norm_backward(t, t, t[0], t[1:, 0], 0.0, True, True, True),
        lambda t: OPS.rms_norm_backward(t[:, 1:], t, t[0], t[:, 0], 0.0, True, True, True),
        lambda t: OPS.rms_norm_backward(t, t, None, t[:, 0].clone(), 0.0, True, True, True),
        lambda t: OPS.cross_entropy(t[0], t[0].long(), t[0], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t.mT, t[0].long(), t[0], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t[:1].expand(5, 8), t[:, 0].long(), t[0, :1], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t.double(), t[:, 0].long(), t[0, :1], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t, t[1:, 0].long(), t[0, :1], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t, t[:, 0].int(), t[0, :1], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t, t[:, 0].long(), t[0, :4], 1.0, 0.0, True),
        lambda t: OPS.cross_entropy(t, t[:, 0].long(), t[0, :1].half(), 1.0, 0.0, True),
    ],
)
def test_the_registered_op_stays_inside_its_memory(call):
    """Called past the Python face, without its checks, the op still refuses what it cannot index."""
    with pytest.raises(RuntimeError):
        call(torch.ones(5, 8))


ONES = torch.ones(5, 8)


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda: swiglu([1.0], ONES), TypeError, "gate"),
        (lambda: swiglu(ONES, None), TypeError, "up"),
        (lambda: swiglu(ONES.double(), ONES.double()), TypeError, "gate"),
        (lambda: swiglu(ONES, ONES.half()), TypeError, "up"),
        (lambda: swiglu(ONES, ONES[1:]), ValueError, "up"),
        (lambda: swiglu(ONES, ONES.to("meta")), ValueError, "up"),
        (lambda: swiglu(ONES.to_sparse(), ONES), TypeError, "gate"),
        (lambda: swiglu(ONES[0, 0], ONES[0, 0]), ValueError, "gate"),
        (lambda: swiglu(ONES, ONES, activation="swish"), ValueError, "activation"),
        (lambda: swiglu(ONES, ONES, activation=None), ValueError, "activation"),
        (lambda: rms_norm(None, ONES[0]), TypeError, "x"),
        (lambda: rms_norm(ONES.int(), ONES[0]), TypeError, "x"),
        (lambda: rms_norm(ONES[0, 0], None), ValueError, "x"),
        (lambda: rms_norm(ONES, ONES), ValueError, "weight"),
        (lambda: rms_norm(ONES, ONES[0, 1:]), ValueError, "weight"),
        (lambda: rms_norm(ONES, ONES[0].double()), TypeError, "weight"),
        (lambda: rms_norm(ONES, 1.0), TypeError, "weight"),
        (lambda: rms_norm(ONES, None, "0"), TypeError, "eps"),
        (lambda: rms_norm(ONES, None, -1.0), ValueError, "eps"),
        (lambda: rms_norm(ONES, None, math.nan), ValueError, "eps"),
        (lambda: rms_norm(ONES, None, 0.0, math.inf), ValueError, "offset"),
        (lambda: rms_norm(ONES, None, cast_first=1), TypeError, "cast_first"),
        (lambda: ours.SwiGLU("swish"), ValueError, "activation"),
    ],
)
def test_bad_input(call, error, name):
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        call()
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


def test_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr("peftfast.ops.rowwise.KERNEL_DEVICES", ())
    for function, operands in CALLS.values():
        given = operands((5, 40), torch.float32)
        expected = getattr(reference, function.__name__)(*given)
        assert torch.equal(function(*given), expected)


def test_the_modules_are_the_ops():
    x = torch.randn(2, 3, 40)
    norm = ours.RMSNorm(40, eps=1e-5, offset=1.0, cast_first=False)
    assert torch.equal(norm(x), rms_norm(x, torch.zeros(40), 1e-5, 1.0, cast_first=False))
    assert torch.equal(ours.SwiGLU("gelu")(x), gated(swiglu, "gelu")(x))
    assert norm.double()(x.double()).dtype == ours.SwiGLU()(x.double()).dtype == torch.float64


# ---- transformers' models -------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gemma2": Gemma2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
}


def model_of(name="llama", dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], dtype=dtype, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def step(model, **autocast):
    """The logits, and the gradients of all parameters."""
    ids = torch.arange(40).reshape(2, 20) % 64
    with torch.autocast(ids.device.type, **({"enabled": False} | autocast)):
        logits = model(input_ids=ids, use_cache=False).logits
    grads = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
    return [logits.detach(), *grads]


def counting(monkeypatch):
    """How often each of the operators ran."""
    calls = {"rms_norm": 0, "swiglu": 0}

    def count(name, run):
        def counted(*args):
            calls[name] += 1
            return run(*args)

        monkeypatch.setattr(rowwise, f"call_{name}", counted)

    for name in calls:
        count(name, getattr(rowwise, f"call_{name}"))
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_a_model(name, monkeypatch):
    """Every norm and every MLP runs on the operators, and all gradients are right."""
    calls, model = counting(monkeypatch), model_of(name)
    expected = step(model)
    oracle = step(copy.deepcopy(model).double())
    assert calls == {"rms_norm": 0, "swiglu": 0}
    with peftfast.enabled(strict=True):
        got = step(model)
        report = peftfast.report(model)
    norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
    assert calls == {"rms_norm": norms, "swiglu": 2}
    assert len(report.rowwise) == norms + 2 and all(layer.fast for layer in report.rowwise)
    assert f"  fused norms and gated MLPs: {norms + 2} of {norms + 2}" in str(report)
    for mine, theirs, exact in zip(got, expected, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, factor=1.5, slack=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_step_in_16_bits_and_under_autocast(name):
    model = model_of(name)
    expected = step(model, dtype=torch.bfloat16, enabled=True)
    with peftfast.enabled(strict=True):
        got = step(model, dtype=torch.bfloat16, enabled=True)
    oracle = step(copy.deepcopy(model).double())
    for mine, theirs, exact in zip(got, expected, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, factor=1.5, slack=1e-3)
    model = model.bfloat16()
    expected = step(model)
    with peftfast.enabled(strict=True):
        got = step(model)
    oracle = step(copy.deepcopy(model).double())
    for mine, theirs, exact in zip(got, expected, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, factor=1.5, slack=1e-3)


def test_what_a_model_keeps_for_backward():
    """Of each layer: what its norms and its activation add beside their operands is gone."""
    model, ids = model_of(), torch.arange(40).reshape(2, 20)

    def forward():
        return model.model(input_ids=ids, use_cache=False).last_hidden_state

    before = bytes_saved_for_backward(forward, model.parameters())
    with peftfast.enabled():
        after = bytes_saved_for_backward(forward, model.parameters())
    tokens, hidden, inner = 40, 32, 48
    # A norm: its normalized rows, and rstd stays. An MLP: silu(gate).
    assert before - after == 4 * tokens * (5 * hidden + 2 * inner)


@pytest.mark.parametrize(
    "kind, expected",
    [
        (LlamaRMSNorm, ("variance_epsilon", 0.0, True, True)),
        (GemmaRMSNorm, ("eps", 1.0, False, True)),
        (GptOssRMSNorm, ("variance_epsilon", 0.0, False, True)),
        (NanoChatRMSNorm, ("eps", 0.0, True, False)),
        (IdeficsRMSNorm, None),  # rounds to the dtype of its weight
    ],
)
def test_norms_are_known_by_what_they_compute(kind, expected):
    assert rowwise.known(kind) == (expected and rowwise.Norm(*expected))


def test_mlps_are_known_by_what_they_compute():
    assert rowwise.known(LlamaMLP).inputs == ("gate_proj", "up_proj")
    assert rowwise.known(SeedOssMLP) is None  # drops out what it returns


@pytest.mark.parametrize("limit", [None, 50.0])
def test_a_forward_that_clips_is_another(limit):
    class ClippedMLP(torch.nn.Module):
        def forward(self, x):
            product = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(product if limit is None else product.clamp(-limit, limit))

    assert (rowwise.known(ClippedMLP) is None) == (limit is not None)


def test_probing_leaves_the_random_state_alone():
    states = random_states()
    assert rowwise.known.__wrapped__(LlamaRMSNorm) == rowwise.known(LlamaRMSNorm)
    assert all(map(torch.equal, random_states(), states))


def with_a_subclass(model):
    class Mine(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    model.model.norm.__class__ = Mine


def with_its_own_forward(model):
    norm = model.model.norm
    norm.forward = lambda x: x * norm.weight


def with_another_activation(model):
    model.model.layers[0].mlp.act_fn = torch.nn.Mish()


def with_a_hook_on_the_activation(model):
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, out: out * 2)


def with_a_projection_in_float64(model):
    class Wide(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    class Narrow(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    mlp = model.model.layers[0].mlp
    mlp.gate_proj.__class__ = mlp.up_proj.__class__ = Wide
    mlp.down_proj.__class__ = Narrow


def in_float64(model):
    model.double()


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_a_subclass, None),  # of a class that is not transformers': no entry
        (with_its_own_forward, "its forward was replaced"),
        (with_another_activation, "its activation is a Mish"),
        (with_a_hook_on_the_activation, "its activation has hooks"),
        (with_a_projection_in_float64, "its input or weight is torch.float64"),
        (in_float64, "its input or weight is torch.float64"),
    ],
)
def test_what_is_not_known_runs_its_own_code(change, reason):
    model = model_of()
    change(model)
    expected = step(model)
    with peftfast.enabled():
        got = step(model)
        report = peftfast.report(model)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    if reason is not None:
        assert reason in str(report) and any(reason in (layer.reason or "") for layer in report.rowwise)


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
@pytest.mark.parametrize("tokens", [1, 7, 40, 41])
def test_tiles_change_nothing(tokens, checkpointing):
    """Of 2 x 20 tokens."""
    model = model_of().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.model.embed_tokens.weight.requires_grad_()

    def run():
        model.zero_grad()
        out = model(input_ids=torch.arange(40).reshape(2, 20) % 64, use_cache=False).logits
        out.float().square().mean().backward()
        return [out.detach(), *(parameter.grad for parameter in model.parameters())]

    with peftfast.enabled(strict=True):
        expected = run()
        assert peftfast.tile_mlps(model, tokens) is model
        tiled = copy.deepcopy(model)
        got = run()
        assert all(TILE in module.__dict__ for module in tiled.modules() if isinstance(module, LlamaMLP))
        peftfast.tile_mlps(model, None)
        assert_equal(run(), expected)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)


def test_an_mlp_in_tiles_keeps_its_input_alone():
    mlp = model_of().model.layers[0].mlp
    x = torch.randn(2, 20, 32, requires_grad=True)
    with peftfast.enabled(strict=True):
        whole = bytes_saved_for_backward(lambda: mlp(x), [x, *mlp.parameters()])
        peftfast.tile_mlps(mlp, 8)
        in_tiles = bytes_saved_for_backward(lambda: mlp(x), [x, *mlp.parameters()])
        with torch.no_grad():
            assert torch.equal(mlp(x), mlp(x[:, None])[:, 0])
    assert whole > x.nbytes and in_tiles == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_dropout_of_a_tile_is_made_again(checkpointing, monkeypatch):
    model = get_peft_model(
        model_of(), LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    ).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def run():
        model.zero_grad()
        torch.manual_seed(3)
        model(
            input_ids=torch.arange(40).reshape(2, 20) % 64, use_cache=False
        ).logits.square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    with peftfast.enabled(strict=True):
        peftfast.tile_mlps(model, 16)
        got = run()
        monkeypatch.setattr(rowwise, "checkpoint", lambda function, *args, use_reentrant: function(*args))
        assert_equal(got, run())


@pytest.mark.parametrize(
    ("model", "tokens", "message"),
    [
        (torch.nn.Linear(2, 2), 8, "model has no gated MLP"),
        (model_of().model.norm, 8, "model has no gated MLP"),
        (model_of(), 0, "tokens is 0, expected at least 1"),
    ],
)
def test_what_cannot_run_in_tiles(model, tokens, message):
    with pytest.raises(ValueError, match=message):
        peftfast.tile_mlps(model, tokens)


@pytest.mark.parametrize("how", ["class", "forward"])
def test_kernels_of_others_stay(how):
    """Liger gives a model classes of its own or, once it is made, forwards of its own."""
    ran = []

    class LigerRMSNorm(torch.nn.Module):
        def forward(self, x):
            ran.append(self)
            return x * self.weight

    model = model_of()
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    for norm in norms:
        if how == "class":
            norm.__class__ = LigerRMSNorm
        else:
            norm.forward = LigerRMSNorm.forward.__get__(norm)
    expected = step(model)
    ran.clear()
    with peftfast.enabled():
        got = step(model)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=1e-6)
    assert ran == norms


def test_hooks_of_a_layer_run():
    model, seen = model_of(), []
    for part in (model.model.norm, model.model.layers[0].mlp, model.model.layers[0].mlp.up_proj):
        part.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__))
        part.register_full_backward_hook(lambda module, *grads: seen.append(type(module).__name__))
    with peftfast.enabled(strict=True):
        step(model)
    assert sorted(seen) == sorted(2 * ["LlamaRMSNorm", "LlamaMLP", "Linear"])


def test_strict_names_the_layer():
    model = model_of().double()
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match="layernorm.*float64"):
        step(model)


def test_disable_restores_and_the_report_says_so():
    model, before = model_of(), (LlamaRMSNorm.forward, LlamaMLP.forward)
    peftfast.enable()
    assert LlamaRMSNorm.forward is not before[0] and LlamaMLP.forward is not before[1]
    peftfast.disable()
    assert (LlamaRMSNorm.forward, LlamaMLP.forward) == before
    assert {layer.reason for layer in peftfast.report(model).rowwise} == {"peftfast is not enabled"}


def test_a_class_that_comes_later(monkeypatch):
    """A class that is there only after `enable` is found as a model is made of it."""
    calls, model = counting(monkeypatch), model_of()
    with peftfast.enabled():
        attributes = {"__module__": _later_forward.__module__, "forward": _later_forward}
        norm = type("LaterRMSNorm", (torch.nn.Module,), attributes)()
        norm.weight, norm.eps = torch.nn.Parameter(torch.ones(32)), 1e-6
        model.model.norm = norm
        step(model)
        assert calls["rms_norm"] == 4
        model.post_init()
        step(model)
        assert calls["rms_norm"] == 9
    assert type(norm).forward is _later_forward


def _later_forward(self, x):
    return reference.rms_norm(x, self.weight, self.eps)


_later_forward.__module__ = "transformers.models.later.modeling_later"


def test_accelerate_is_for_one_model(monkeypatch):
    from peft import LoraConfig, get_peft_model

    mine, other = get_peft_model(model_of(), LoraConfig(target_modules=["q_proj"])), model_of()
    peftfast.accelerate(mine)
    calls = counting(monkeypatch)
    step(other)
    assert calls == {"rms_norm": 0, "swiglu": 0}
    mine(input_ids=torch.arange(5)[None])
    assert calls == {"rms_norm": 5, "swiglu": 2}


def test_adapters_on_the_projections(monkeypatch):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, calls = get_peft_model(model_of(), config), counting(monkeypatch)
    ids = torch.arange(40).reshape(2, 20)

    def gradients(model):
        loss = model(input_ids=ids, labels=ids).loss
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    expected = gradients(model)
    with peftfast.enabled(strict=True):
        got = gradients(model)
    assert calls == {"rms_norm": 5, "swiglu": 2}
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_compiler_gets_the_models_own_code(monkeypatch):
    """It fuses that itself, with what stands around."""
    torch._dynamo.reset()
    model, calls = model_of(), counting(monkeypatch)
    compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 32)
    expected = model.model.layers[0].mlp(x)
    with peftfast.enabled(strict=True):
        torch.testing.assert_close(compiled(x), expected)
    assert calls["swiglu"] == 0


def test_a_derived_class_is_its_parent_and_arguments_may_be_named(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class Derived(LlamaRMSNorm):
        pass

    class Another(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    x, derived, another = torch.randn(3, 32), Derived(32), Another(32)
    expected = derived(x), another(x)
    with peftfast.enabled(strict=True):
        calls = counting(monkeypatch)
        torch.testing.assert_close(derived(hidden_states=x), expected[0])
        assert calls["rms_norm"] == 1
        torch.testing.assert_close(another(x), expected[1])


def test_what_came_after_enable_is_not_called_fused():
    """As a model that is unpickled brings classes without having been initialized."""
    attributes = {"__module__": _later_forward.__module__, "forward": _later_forward}
    model = model_of()
    with peftfast.enabled():
        norm = type("UnpickledRMSNorm", (torch.nn.Module,), attributes)()
        norm.weight, norm.eps = torch.nn.Parameter(torch.ones(32)), 1e-6
        model.model.norm = norm
        (found,) = [entry for entry in peftfast.report(model).rowwise if entry.name == "model.norm"]
        assert (found.fast, found.reason) == (False, "its class came after peftfast was enabled")
