"""The op attention against float64 and torch's own, and transformers' models that run on it.

The rule: on the same inputs, the error against float64 is at most 1.1 times that of torch's attention. Over a handful
of elements the ratio of two rounding errors is luck: there, some roundings more are allowed.
"""

import copy
import math
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DeepseekV3Config,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

import peftfast
from peftfast import _C, reference
from peftfast import nn as ours
from peftfast.integrations import attention as integration
from peftfast.ops import attention
from peftfast.testing import assert_as_accurate, bytes_saved_for_backward

OPS = torch.ops.peftfast
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#        B, H, kv_heads, T, S, D
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 1, 3, 5, 7),
    (2, 4, 2, 33, 33, 16),
    (1, 3, 3, 64, 96, 64),
    (1, 2, 1, 65, 193, 40),
    (2, 2, 2, 130, 97, 33),
    (1, 4, 1, 200, 200, 128),
    (1, 4, 2, 70, 300, 257),
]
EMPTY = [(0, 2, 1, 3, 4, 8), (1, 0, 0, 3, 4, 8), (1, 2, 1, 0, 4, 8), (1, 2, 1, 3, 0, 8), (1, 2, 1, 3, 4, 0)]


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """The operands are small: threads would only wait for each other. The test of threads sets its own."""
    torch.set_num_threads(1)


def by_dtype(test):
    return pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())(test)


def problem(shape, dtype, scale=1.0):
    """q, k, v, and the gradient of the output."""
    B, H, kv_heads, T, S, D = shape
    q, k, v = (torch.randn(B, *size, D) for size in ((H, T), (kv_heads, S), (kv_heads, S)))
    return [(q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)], torch.randn(B, H, T, D).to(dtype)


def results(function, leaves, grad):
    """The output and the gradients of q, k and v."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def torchs(q, k, v, mask=None, causal=False, scale=None):
    mask = mask if mask is None else mask.expand(*q.shape[:-1], k.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def check(leaves, grad, **options):
    got = results(lambda *t: attention(*t, **options), leaves, grad)
    eager = results(lambda *t: torchs(*t, **options), leaves, grad)
    oracle = results(lambda *t: reference.attention(*t, **options), [t.double() for t in leaves], grad)
    for i, (mine, theirs, exact) in enumerate(zip(got, eager, oracle, strict=True)):
        name = ("output", "dq", "dk", "dv")[i]
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape == exact.shape, name
        slack = torch.finfo(mine.dtype).eps * (4 if exact.numel() < 2000 else 0)
        assert_as_accurate(mine, theirs, exact, slack=slack, name=name)


def assert_equal(a, b):
    assert all(map(torch.equal, a, b))


def random_mask(*shape):
    """About half is seen, and of each row something."""
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    return mask


# ---- the op ---------------------------------------------------------------------------------------------


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@by_dtype
def test_attention(dtype, causal, shape):
    check(*problem(shape, dtype), causal=causal)


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 120, 16), (1, 2, 2, 40, 250, 32)], ids=str)
@by_dtype
def test_masks(dtype, shape):
    B, H, _, T, S, _ = shape
    packed = torch.arange(S)[None, :] // 50 == torch.arange(T)[:, None] // 20
    for mask in (
        random_mask(B, H, T, S),
        random_mask(B, 1, T, S),
        random_mask(1, 1, 1, S),
        random_mask(S),
        packed,
    ):
        check(*problem(shape, dtype), mask=mask)


@pytest.mark.every_isa
@by_dtype
def test_a_mask_beside_causal(dtype):
    leaves, grad = problem((2, 2, 1, 100, 100, 16), dtype)
    mask = random_mask(2, 1, 100, 100)
    got = results(lambda *t: attention(*t, mask=mask, causal=True), leaves, grad)
    assert_equal(got, results(lambda *t: attention(*t, mask=mask.tril()), leaves, grad))


@pytest.mark.every_isa
@by_dtype
def test_a_query_that_sees_nothing(dtype):
    """It gets zeros, gives none of its gradient away, and leaves the others alone."""
    leaves, grad = problem((1, 2, 2, 70, 130, 16), dtype)
    mask = torch.ones(70, 130, dtype=torch.bool)
    mask[[0, 66]] = False
    y, dq, dk, dv = results(lambda *t: attention(*t, mask=mask), leaves, grad)
    assert not y[:, :, [0, 66]].any() and not dq[:, :, [0, 66]].any()
    rest = [i for i in range(70) if i not in (0, 66)]
    alone = results(lambda q, k, v: attention(q[:, :, rest], k, v), leaves, grad[:, :, rest])
    for mine, theirs in zip((y[:, :, rest], dq, dk, dv), alone):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
    nothing = torch.zeros(70, 130, dtype=torch.bool)
    assert not any(t.any() for t in results(lambda *t: attention(*t, mask=nothing), leaves, grad))


@pytest.mark.every_isa
@by_dtype
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_scales_and_large_scores(dtype, scale):
    check(*problem((2, 4, 2, 70, 150, 24), dtype, 2.0), scale=scale, causal=True)


@pytest.mark.every_isa
@by_dtype
def test_scores_of_any_size(dtype):
    """Far from zero, and with a maximum that grows, or falls, from chunk to chunk: weights stay weights."""
    (q, k, v), _ = problem((1, 2, 2, 20, 300, 8), dtype)
    for slope in (-40, 40):
        k = torch.linspace(-slope, slope, 300)[:, None].expand(300, 8).to(dtype).expand(k.shape)
        exact = reference.attention(q.abs().double(), k.double(), v.double(), scale=1.0)
        torch.testing.assert_close(attention(q.abs(), k, v, scale=1.0).double(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.every_isa
@by_dtype
def test_strided_operands(dtype):
    """Heads beside each other in memory, as models have them; parts of one tensor; gaps; expanded heads."""
    leaves, grad = problem((2, 3, 3, 50, 50, 24), dtype)

    def run(leaves, grad):
        return results(lambda *t: attention(*t, causal=True), leaves, grad)

    expected = run(leaves, grad)
    beside = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in leaves]
    joined = torch.stack(leaves, dim=-2).unbind(-2)
    apart = [torch.full((2, 3, 50, 48), math.nan, dtype=dtype)[..., ::2].copy_(t) for t in leaves]
    for other in (beside, joined, apart):
        assert_equal(run(other, grad.transpose(1, 2).contiguous().transpose(1, 2)), expected)
    same = [t[:, :1].expand(2, 3, 50, 24) for t in leaves]
    assert_equal(run(same, grad), run([t.contiguous() for t in same], grad))
    assert_equal(
        run(leaves, grad[..., :1].expand(grad.shape)), run(leaves, grad[..., :1].repeat(1, 1, 1, 24))
    )


@pytest.mark.every_isa
@by_dtype
def test_shared_keys_are_repeated_keys(dtype):
    leaves, grad = problem((1, 6, 2, 70, 70, 16), dtype)
    got = results(lambda *t: attention(*t, causal=True), leaves, grad)
    repeated = [leaves[0], *(t.repeat_interleave(3, dim=1) for t in leaves[1:])]
    y, dq, dk, dv = results(lambda *t: attention(*t, causal=True), repeated, grad)
    assert torch.equal(got[0], y) and torch.equal(got[1], dq)
    for mine, theirs in zip(got[2:], (dk, dv)):
        theirs = theirs.float().unflatten(1, (2, 3)).sum(2)
        torch.testing.assert_close(
            mine.float(), theirs, rtol=2e-2, atol=3e-2 if dtype != torch.float32 else 1e-5
        )


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@by_dtype
def test_empty_operands(dtype, shape):
    leaves, grad = problem(shape, dtype)
    out = results(attention, leaves, grad)
    assert [t.shape for t in out] == [grad.shape, *(leaf.shape for leaf in leaves)]
    if shape != (1, 2, 1, 3, 4, 0):
        assert not any(t.any() for t in out[:2])


@pytest.mark.every_isa
@by_dtype
@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 150, 230, 40), (1, 2, 1, 330, 330, 24), (1, 1, 1, 70, 0, 8)], ids=str
)
def test_the_same_bits_for_any_number_of_threads(dtype, shape):
    """Also where there are fewer heads than threads."""
    leaves, grad = problem(shape, dtype)
    for causal in (False, True):
        run = partial(attention, causal=causal)
        torch.set_num_threads(1)
        expected = results(run, leaves, grad)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert_equal(results(run, leaves, grad), expected)


@pytest.mark.every_isa
@by_dtype
def test_a_nan_stays_in_its_row(dtype):
    (q, k, v), _ = problem((1, 1, 1, 80, 200, 16), dtype)
    q[0, 0, 5, 3] = math.nan
    out = attention(q, k, v)
    rows = torch.arange(80) != 5
    assert out[0, 0, 5].isnan().all() and out[0, 0, rows].isfinite().all()
    k[0, 0, 150, 0] = math.inf
    assert attention(q, k, v)[0, 0, rows].isnan().any()


@pytest.mark.every_isa
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 150),
        st.integers(1, 230),
        st.integers(1, 70),
    ),
    st.booleans(),
    st.sampled_from(["none", "rows", "keys"]),
    st.sampled_from(sorted(DTYPES)),
)
def test_any_shape(shape, causal, mask, dtype):
    B, kv_heads, groups, T, S, D = shape
    leaves, grad = problem((B, kv_heads * groups, kv_heads, T, S, D), DTYPES[dtype])
    seen = {"none": None, "rows": random_mask(B, 1, T, S), "keys": random_mask(1, 1, 1, S)}[mask]
    got = results(lambda *t: attention(*t, mask=seen, causal=causal), leaves, grad)
    exact = results(
        lambda *t: reference.attention(*t, mask=seen, causal=causal), [t.double() for t in leaves], grad
    )
    for mine, oracle in zip(got, exact):
        bound = 1e-4 if dtype == "fp32" else 3e-2
        assert (mine.double() - oracle).norm() <= bound * (oracle.norm() + oracle.numel() ** 0.5)


def test_the_reference():
    leaves = [t.requires_grad_() for t in problem((1, 4, 2, 5, 6, 3), torch.float64)[0]]
    mask = random_mask(5, 6)
    mask[2] = False
    assert torch.autograd.gradcheck(lambda *t: reference.attention(*t, mask=mask), leaves)
    assert torch.autograd.gradcheck(lambda *t: reference.attention(*t, causal=True), leaves)
    for causal in (False, True):
        torch.testing.assert_close(
            reference.attention(*leaves, causal=causal), torchs(*leaves, causal=causal)
        )


@by_dtype
def test_the_gradients_that_are_asked_for(dtype):
    leaves, grad = problem((1, 4, 2, 70, 70, 16), dtype)
    expected = results(attention, leaves, grad)[1:]
    for i in range(3):
        given = [t.detach().requires_grad_(j == i) for j, t in enumerate(leaves)]
        assert torch.equal(torch.autograd.grad(attention(*given), given[i], grad)[0], expected[i])


@by_dtype
def test_what_is_kept_for_backward(dtype):
    leaves, _ = problem((2, 4, 2, 70, 90, 16), dtype)
    leaves = [t.requires_grad_() for t in leaves]
    expected = 2 * 4 * 70 * (16 * leaves[0].element_size() + 4)
    assert bytes_saved_for_backward(lambda: attention(*leaves), leaves) == expected


def test_modes():
    """torch.compile as one graph, checkpointing, and what torch asks of an operator."""
    leaves, grad = problem((1, 4, 2, 70, 70, 16), torch.float32)
    mask = random_mask(1, 1, 70, 70)

    def run(*t):
        return attention(*t, mask=mask)

    expected = results(run, leaves, grad)
    assert_equal(results(torch.compile(run, fullgraph=True), leaves, grad), expected)
    assert_equal(results(lambda *t: checkpoint(run, *t, use_reentrant=False), leaves, grad), expected)
    given = [t.detach().requires_grad_() for t in leaves]
    opcheck(OPS.attention.default, (*given, None, True, 0.5))
    opcheck(OPS.attention.default, (*given, mask.expand(1, 4, 70, 70), False, 0.5))


def test_a_second_derivative_is_refused():
    leaves, _ = problem((1, 2, 2, 8, 8, 4), torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    (grad,) = torch.autograd.grad(attention(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


Q = torch.ones(2, 4, 5, 8)
MASK = torch.ones(5, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, error, name",
    [
        (lambda: attention(1.0, Q, Q), TypeError, "q"),
        (lambda: attention(Q.double(), Q, Q), TypeError, "q"),
        (lambda: attention(Q.to_sparse(), Q, Q), TypeError, "q"),
        (lambda: attention(Q[0], Q[0], Q[0]), ValueError, "q"),
        (lambda: attention(Q, Q.bfloat16(), Q), TypeError, "k"),
        (lambda: attention(Q, Q[:1], Q[:1]), ValueError, "k"),
        (lambda: attention(Q, Q[..., :4], Q[..., :4]), ValueError, "k"),
        (lambda: attention(Q, Q[:, :3], Q[:, :3]), ValueError, "k"),
        (lambda: attention(Q, Q[:, :0], Q[:, :0]), ValueError, "k"),
        (lambda: attention(Q, Q.to("meta"), Q), ValueError, "k"),
        (lambda: attention(Q, Q, Q[:, :, :4]), ValueError, "v"),
        (lambda: attention(Q, Q, Q, mask=1), TypeError, "mask"),
        (lambda: attention(Q, Q, Q, mask=MASK.float()), TypeError, "mask"),
        (lambda: attention(Q, Q, Q, mask=MASK[:4]), ValueError, "mask"),
        (lambda: attention(Q, Q, Q, mask=MASK.to("meta")), ValueError, "mask"),
        (lambda: attention(Q, Q, Q, mask=MASK[None, None, None]), ValueError, "mask"),
        (lambda: attention(Q, Q, Q, causal=1), TypeError, "causal"),
        (lambda: attention(Q, Q, Q, scale="1"), TypeError, "scale"),
        (lambda: attention(Q, Q, Q, scale=0.0), ValueError, "scale"),
        (lambda: attention(Q, Q, Q, scale=math.nan), ValueError, "scale"),
        (lambda: attention(Q, Q, Q, scale=math.inf), ValueError, "scale"),
    ],
)
def test_bad_input(call, error, name):
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        call()
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


@pytest.mark.parametrize(
    "arguments",
    [
        (Q[0], Q, Q, None, False, 1.0),
        (Q, Q[0], Q, None, False, 1.0),
        (Q, Q, Q[:, :, :4], None, False, 1.0),
        (Q, Q.half(), Q, None, False, 1.0),
        (Q, Q[:, :3], Q[:, :3], None, False, 1.0),
        (Q, Q, Q, MASK, False, 1.0),
        (Q, Q, Q, MASK.expand(2, 4, 5, 5).float(), False, 1.0),
        (Q, Q, Q, None, False, 0.0),
    ],
)
def test_a_direct_call_is_checked_too(arguments):
    with pytest.raises(RuntimeError):
        OPS.attention(*arguments)


def test_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(sys.modules["peftfast.ops.attention"], "KERNEL_DEVICES", ())
    leaves, _ = problem((1, 2, 1, 5, 7, 4), torch.float32)
    assert torch.equal(attention(*leaves, causal=True), reference.attention(*leaves, causal=True))


def test_the_module_is_the_op():
    leaves, _ = problem((1, 4, 2, 20, 30, 8), torch.float32)
    module, mask = ours.Attention(causal=True, scale=0.5), random_mask(20, 30)
    assert torch.equal(module(*leaves, mask), attention(*leaves, mask=mask, causal=True, scale=0.5))
    assert module(*(leaf.double() for leaf in leaves)).dtype == torch.float64


# ---- transformers' models -------------------------------------------------------------------------------

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen3": Qwen3Config(**SIZES),
    "gemma": GemmaConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=1,
        eos_token_id=2,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}
takes_part = pytest.mark.skipif(
    _C.isa_in_use() == "amx", reason="in bf16, torch's attention is left alone where there are matrix tiles"
)


def model_of(config, dtype=torch.float32, implementation="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=implementation)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def step(model, attention_mask=None, **autocast):
    """The logits, and the gradients of all parameters."""
    ids = torch.arange(1, 61).reshape(2, 30)
    with torch.autocast("cpu", **({"enabled": False} | autocast)):
        logits = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    grads = torch.autograd.grad(logits.float().square().mean(), list(model.parameters()))
    return [logits.detach(), *grads]


@pytest.fixture
def calls(monkeypatch):
    """Grows with each call of the operator."""
    made, call = [], integration.call_attention
    monkeypatch.setattr(integration, "call_attention", lambda *args: made.append(args) or call(*args))
    return made


def check_step(model, calls, slack=1e-6, **options):
    expected, oracle = step(model, **options), step(copy.deepcopy(model).double(), **options)
    assert not calls
    with peftfast.enabled(strict=True):
        got, report = step(model, **options), peftfast.report(model)
    assert len(calls) == len(report.attention) == 2 and all(layer.fast for layer in report.attention)
    assert "  fused attention: 2 of 2" in str(report)
    for mine, theirs, exact in zip(got, expected, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, factor=1.5, slack=slack)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_a_model(name, calls):
    check_step(model_of(MODELS[name]), calls)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_step_with_padding(side, calls):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, slice(None, 9) if side == "left" else slice(-9, None)] = 0
    check_step(model_of(MODELS["llama"]), calls, attention_mask=mask)


@takes_part
def test_a_step_in_16_bits_and_under_autocast(calls):
    model = model_of(MODELS["llama"])
    with peftfast.enabled():
        got = step(model, dtype=torch.bfloat16, enabled=True)
    assert {args[0].dtype for args in calls} == {torch.bfloat16}
    expected = step(model, dtype=torch.bfloat16, enabled=True)
    oracle = step(copy.deepcopy(model).double())
    for mine, theirs, exact in zip(got, expected, oracle, strict=True):
        assert_as_accurate(mine, theirs, exact, factor=1.5, slack=1e-3)
    calls.clear()
    check_step(model.bfloat16(), calls, slack=1e-3)


def test_an_encoder(calls):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    ids, mask = torch.arange(60).reshape(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, 20:] = 0
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    with peftfast.enabled(strict=True):
        got = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert len(calls) == 2
    torch.testing.assert_close(got, expected)


def test_generation(calls):
    """The prompt runs on the operator, single tokens on torch's attention, and nothing is noted as fallen back."""
    model = model_of(MODELS["llama"])
    ids = torch.arange(1, 61).reshape(2, 30)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    with peftfast.enabled(strict=True):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
        assert all(layer.fast for layer in peftfast.report(model).attention)
    assert len(calls) == 2


@pytest.mark.parametrize("padded", [False, True], ids=["causal", "padded"])
def test_a_prefix(padded, calls):
    """Keys of a cache, which every query sees, whatever hides the others."""
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        model_of(MODELS["llama"]), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    )
    ids = torch.arange(1, 61).reshape(2, 30)
    mask = torch.ones_like(ids)
    mask[0, : 8 if padded else 0] = 0

    def run():
        loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
        return loss.detach(), *torch.autograd.grad(loss, list(model.prompt_encoder.parameters()))

    expected = run()
    with peftfast.enabled(strict=True):
        got = run()
    assert len(calls) == 2
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


def test_what_falls_back(calls):
    """With its reason, and as torch's own bits."""
    ids = torch.arange(1, 61).reshape(2, 30)
    dropping = model_of(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    other_values = model_of(
        DeepseekV3Config(
            **{**SIZES, "num_key_value_heads": 4, "head_dim": 8}, kv_lora_rank=8, q_lora_rank=8,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=4,
            num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=2,
        )
    )  # fmt: skip
    llama = model_of(MODELS["llama"]).eval()
    additive = torch.zeros(2, 1, 30, 30).masked_fill(torch.ones(30, 30).triu(1).bool(), -1e9)
    for model, mask, reason in (
        (dropping, None, "it drops scores out"),
        (other_values, None, "differ in size"),
        (llama, additive, "its mask is not one of True and False"),
    ):
        torch.manual_seed(1)
        expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with peftfast.enabled():
            torch.manual_seed(1)
            got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            report = peftfast.report(model)
        assert {layer.fast for layer in report.attention} == {False}
        assert all(reason in layer.reason for layer in report.attention) and reason in str(report)
        torch.testing.assert_close(got, expected)
        with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match=reason):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert not calls


def test_a_model_that_asks_for_another_attention(calls):
    """It is left alone, and reports say nothing of it."""
    model = model_of(Gemma2Config(**SIZES), implementation="eager")
    expected = step(model)
    with peftfast.enabled():
        got = step(model)
        assert not peftfast.report(model).attention
    assert not calls
    torch.testing.assert_close(got, expected)


def test_accelerate_and_disable(calls):
    """One model alone, and after `disable` none."""
    from peft import LoraConfig, get_peft_model

    model, other = (
        get_peft_model(model_of(MODELS["llama"]), LoraConfig(target_modules=["q_proj"])) for _ in range(2)
    )
    ids = torch.arange(1, 61).reshape(2, 30)
    assert {layer.reason for layer in peftfast.report(model).attention} == {"peftfast is not enabled"}
    peftfast.accelerate(model)
    model(input_ids=ids), other(input_ids=ids)
    assert len(calls) == 2
    peftfast.disable()
    model(input_ids=ids)
    assert len(calls) == 2
