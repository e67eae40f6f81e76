"""4-bit weights: the same bits as bitsandbytes, and the linear layer over them against float64.

The rule of accuracy is that of test_lora.py; the computation that the op replaces is bitsandbytes' under PEFT's, which
`reference.fourbit_linear` spells out: the weight is decoded and rounded to the dtype of the product, the adapters see x
as it is. A and B are never zero.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import random_states
from hypothesis import given, settings
from test_lora import LAYOUTS, assert_equal, name_of_bad, saved_bytes, strided
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from peftfast import reference
from peftfast.ops import fourbit_dequantize, fourbit_linear, fourbit_quantize
from peftfast.reference import FOURBIT_BLOCKSIZES, FOURBIT_CODEBOOKS, FourBitWeight, NestedAbsmax
from peftfast.testing import assert_as_accurate

FORWARD = torch.ops.peftfast.fourbit_linear.default
BACKWARD = torch.ops.peftfast.fourbit_linear_backward.default
QUANTIZE = torch.ops.peftfast.fourbit_quantize.default
QUANTIZE_ABSMAX = torch.ops.peftfast.fourbit_quantize_absmax.default
DEQUANTIZE = torch.ops.peftfast.fourbit_dequantize.default
F32, BF16, F16 = FLOATS = torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # of x, of the adapters, and compute_dtype
    "fp32": (F32, F32, None),
    "bf16": (BF16, BF16, None),
    "fp16": (F16, F16, None),
    "bf16-fp32": (BF16, F32, None),
    "fp16-fp32": (F16, F32, None),
    "fp32 in bf16": (F32, F32, BF16),
    "fp32 in fp16": (F32, F32, F16),
    "bf16 in fp32": (BF16, F32, F32),
    "bf16 in fp16": (BF16, BF16, F16),
}
TYPES = ["nf4", "fp4"]


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """As in test_lora.py: the operands are small."""
    torch.set_num_threads(1)


def by_dtype(test):
    return pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())(test)


# --------------------------------------------------------------------------------------------- the same bits


def tensors_of(weight):
    named = {"packed": weight.packed, "absmax": weight.absmax}
    if weight.nested is not None:
        named |= {f"nested {part}": getattr(weight.nested, part) for part in ("absmax", "code", "offset")}
    return named


def assert_same_bits(got, wanted, what):
    """Also the sign of a zero and the bits of a NaN; a scalar may have one dimension or none."""
    assert got.dtype == wanted.dtype and got.numel() == wanted.numel(), what
    got, wanted = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (got, wanted))
    assert torch.equal(got, wanted), what


def bitsandbytes_quantize(weight, *, quant_type, blocksize, nested):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
    )
    how = None
    if nested:
        how = NestedAbsmax(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return FourBitWeight(packed, state.absmax, tuple(weight.shape), weight.dtype, quant_type, blocksize, how)


def bitsandbytes_dequantize(weight, dtype):
    """The flat weight: the AVX-512 kernel of bitsandbytes 0.50.2 is wrong where blocks straddle rows, unless there is
    one row; and what it leaves to torch.compile is the same in eager mode, without the minutes."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    nested = weight.nested and functional.QuantState(
        absmax=weight.nested.absmax, blocksize=weight.nested.blocksize, code=weight.nested.code, dtype=F32
    )
    state = functional.QuantState(
        absmax=weight.absmax,
        shape=(math.prod(weight.shape),),
        blocksize=weight.blocksize,
        quant_type=weight.quant_type,
        dtype=dtype,
        offset=weight.nested and weight.nested.offset,
        state2=nested,
    )
    with torch.compiler.set_stance("force_eager"):
        return functional.dequantize_4bit(weight.packed, state).view(weight.shape)


RIVALS = {
    "reference": (reference.fourbit_quantize, reference.fourbit_dequantize),
    "bitsandbytes": (bitsandbytes_quantize, bitsandbytes_dequantize),
}


def bounds_of(quant_type):
    """What lies between two neighbouring codes, and the floats on either side of it."""
    levels = torch.tensor(sorted(set(FOURBIT_CODEBOOKS[quant_type])))
    bounds = (levels[:-1] + levels[1:]) / 2
    return torch.cat([bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0))])


def weights(quant_type, blocksize):
    """What may go wrong: odd sizes, blocks that straddle rows, ends that are not full, and values at the edges."""
    bounds = bounds_of(quant_type)
    ties = torch.stack([F.pad(bounds.repeat(100)[: blocksize - 1], (1, 0), value=v) for v in (1.0, -1.0)])
    sizes = 2.0 ** torch.randint(-60, 60, (2 * blocksize + 7, 1))
    yield from {
        "one value": torch.randn(1),
        "one block": torch.randn(blocksize),
        "odd": torch.randn(3, 2 * blocksize + 1),
        "rows shorter than blocks": torch.randn(2 * blocksize + 9, 5),
        "many blocks": torch.randn(301, blocksize),
        "three dimensions": torch.randn(2, 3, blocksize // 2 + 1),
        "transposed": torch.randn(blocksize + 3, 6).T,
        "zeros": torch.zeros(blocksize + 5),
        "a block of zeros": torch.cat([torch.zeros(blocksize), torch.randn(blocksize)]),
        "subnormal": torch.randn(blocksize + 5) * 1e-40,
        "below the smallest absmax": torch.tensor([1e-38, -0.9e-38, 0.2e-38]).repeat(blocksize),
        "huge": torch.randn(blocksize + 5).clamp(-1, 1) * 3e38,
        "ties": ties * 2.0,
        "ties, scaled inexactly": ties * 1.7,
        "ties in a block that is not full": ties[0, : blocksize - 1] * 0.25,
        "ties in one, scaled inexactly": ties[0, : blocksize - 1] * 1.7,
        "all sizes": torch.randn(2 * blocksize + 7, 3) * sizes,
    }.items()


def each_format(test):
    rivals = [pytest.param("reference", marks=pytest.mark.every_isa), "bitsandbytes"]
    for name, values in {"blocksize": FOURBIT_BLOCKSIZES, "quant_type": TYPES, "rival": rivals}.items():
        test = pytest.mark.parametrize(name, values)(test)
    return test


@each_format
def test_quantize_gives_the_same_bits(rival, quant_type, blocksize):
    for (name, weight), dtype, nested in itertools.product(
        weights(quant_type, blocksize), FLOATS, [False, True]
    ):
        weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        settings = dict(quant_type=quant_type, blocksize=blocksize, nested=nested)
        got, wanted = fourbit_quantize(weight, **settings), RIVALS[rival][0](weight, **settings)
        for part, tensor in tensors_of(wanted).items():
            assert_same_bits(tensors_of(got)[part], tensor, f"{part} of {name}, {dtype}, {settings}")
        assert got.packed.shape == wanted.packed.shape and got.absmax.shape == wanted.absmax.shape
        assert replace(got, packed=None, absmax=None, nested=None) == replace(
            wanted, packed=None, absmax=None, nested=None
        )
        assert (got.nested and got.nested.blocksize) == (wanted.nested and wanted.nested.blocksize)


@each_format
def test_dequantize_gives_the_same_bits(rival, quant_type, blocksize):
    shapes = [(1,), (2, blocksize // 2), (7, blocksize + 2), (23, 397)]
    for shape, nested, dtype in itertools.product(shapes, [False, True], [None, *FLOATS]):
        weight = fourbit_quantize(
            torch.randn(shape, dtype=BF16), quant_type=quant_type, blocksize=blocksize, nested=nested
        )
        got, wanted = fourbit_dequantize(weight, dtype), RIVALS[rival][1](weight, dtype or BF16)
        # Not the sign of zeros: that of FP4's second one is, in bitsandbytes, a matter of the shape.
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype, f"{shape}, nested: {nested}, {dtype}"


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)], ids=str)
def test_nothing_to_quantize(shape, nested):
    weight = fourbit_quantize(torch.empty(shape), nested=nested)
    assert weight.packed.shape == (0, 1) and weight.absmax.shape == (0,)
    assert fourbit_dequantize(weight).shape == shape


@pytest.mark.every_isa
@pytest.mark.parametrize("quant_type", TYPES)
def test_every_code_of_every_scale(quant_type):
    """Not only what quantizing gives: all 16 codes, -0 among them, at both places of a byte, under any scale."""
    packed = torch.arange(256, dtype=torch.uint8).repeat(9)[:-5]
    scales = torch.tensor([0.0, 1.0, -2.5, 1e-39, 3e38, math.inf, math.nan, 0.1])
    count = 2 * packed.numel() - 1
    weight = FourBitWeight(packed, scales.repeat(99)[: -(-count // 64)], (1, count), F32, quant_type, 64)
    for dtype in FLOATS:
        got, wanted = fourbit_dequantize(weight, dtype), reference.fourbit_dequantize(weight, dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert_same_bits(got.nan_to_num(7.0), wanted.nan_to_num(7.0), dtype)


def test_the_dynamic_code_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    assert_same_bits(reference.dynamic_code(), functional.create_dynamic_map(), "code")


@pytest.mark.parametrize("quant_type", TYPES)
def test_equal_codes_for_any_number_of_threads(quant_type):
    weight = torch.randn(301, 1001)
    quantized = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        quantized.append(fourbit_quantize(weight, quant_type=quant_type, blocksize=32, nested=False))
        quantized[-1] = tensors_of(quantized[-1]) | {"values": fourbit_dequantize(quantized[-1], BF16)}
    for other in quantized[1:]:
        assert_equal(other, quantized[0])


@pytest.mark.every_isa
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 200, 298])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights_that_are_not_finite_are_refused(dtype, place, value):
    weight = torch.randn(13, 23, dtype=dtype)
    weight.view(-1)[place] = value
    for nested in (False, True):
        with pytest.raises(ValueError, match="weight.*not finite"):
            fourbit_quantize(weight, nested=nested)


# ------------------------------------------------------------------------------------------------- numbers


@dataclass
class Problem:
    """One call: the operands, one entry per adapter in the lists, and the gradient of the output."""

    x: torch.Tensor
    weight: FourBitWeight
    lora_A: list
    lora_B: list
    scaling: list
    dropout: list
    bias: torch.Tensor | None = None
    compute_dtype: torch.dtype | None = None
    seed: torch.Tensor = field(default_factory=lambda: torch.tensor([20240229]))
    grad: torch.Tensor | None = None

    def leaves(self):
        named = {"x": self.x} | ({} if self.bias is None else {"bias": self.bias})
        named |= {f"lora_A[{i}]": A for i, A in enumerate(self.lora_A)}
        return named | {f"lora_B[{i}]": B for i, B in enumerate(self.lora_B)}

    def map(self, f):
        """The same problem with f applied to every operand but the weight."""
        return replace(
            self,
            x=f(self.x),
            lora_A=[f(A) for A in self.lora_A],
            lora_B=[f(B) for B in self.lora_B],
            bias=None if self.bias is None else f(self.bias),
            grad=f(self.grad),
        )


def problem(
    shape,
    dtypes=DTYPES["bf16-fp32"],
    *,
    ranks=(5,),
    bias=None,
    dropout=0.0,
    scaling=0.75,
    batch=None,
    **format,
):
    """Random operands with outputs of order one. `dropout`: of every adapter, or one each; `batch`: leading dimensions
    in place of M; `format`: how the weight is quantized."""
    (M, K, N), (dtype, adapter_dtype, compute_dtype) = shape, dtypes
    batch = (M,) if batch is None else batch
    return Problem(
        x=torch.randn(*batch, K).to(dtype),
        weight=fourbit_quantize((torch.randn(N, K) * max(K, 1) ** -0.5).to(dtype), **format),
        lora_A=[(torch.randn(r, K) * max(K, 1) ** -0.5).to(adapter_dtype) for r in ranks],
        lora_B=[(torch.randn(N, r) * r**-0.5).to(adapter_dtype) for r in ranks],
        scaling=reference.as_list(scaling, len(ranks)),
        dropout=reference.as_list(dropout, len(ranks)),
        bias=None if bias is None else torch.randn(N, dtype=bias),
        compute_dtype=compute_dtype,
        grad=torch.randn(*batch, N).to(dtype),
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
        seed=p.seed if any(p.dropout) else None,
        compute_dtype=p.compute_dtype,
    )


def forward_backward(function, p, wanted=None):
    """The output and the gradients of the operands named in `wanted` (all of them if None), by name."""
    fresh = p.map(torch.Tensor.detach)
    leaves = fresh.leaves()
    wanted = leaves.keys() if wanted is None else wanted
    for name in wanted:
        leaves[name].requires_grad_()
    out = call(function, fresh)
    if wanted:
        out.backward(p.grad)
    return {"output": out.detach()} | {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}


def in_float64(p, of_weight=lambda dense: dense):
    """The oracle: what the codes stand for, and nothing rounded after that."""
    dense = of_weight(reference.fourbit_dequantize(p.weight, torch.float64))

    def function(x, weight, *adapters, compute_dtype, **settings):
        return reference.lora_linear(x, dense, *adapters, **settings)

    return forward_backward(function, p.map(torch.Tensor.double))


def worst_rounding(p, dtypes):
    """By how much each element may be off: every sum in fp32, in any order, one rounding to its dtype, and where the
    weight takes part, the rounding of both sides of its product to compute_dtype.

    The size of the terms of a sum is the same computation on absolute values.
    """
    terms = math.prod(p.x.shape[:-1]) + 2 * sum(p.weight.shape) + sum(A.shape[0] for A in p.lora_A) + 8
    bounds = in_float64(replace(p.map(torch.abs), scaling=[abs(s) for s in p.scaling]), torch.abs)
    for name, size in bounds.items():
        unit = torch.finfo(dtypes[name]).eps / 2
        product = (
            1.01 * torch.finfo(p.compute_dtype or p.x.dtype).eps if name in ("output", "grad of x") else 0
        )
        bounds[name] = (
            size * (unit + product + terms * 2**-24) + torch.finfo(dtypes[name]).smallest_normal * unit
        )
    return bounds


def check(p, rule=True):
    """The output and every gradient keep the rule. `rule=False`: no element is off by too much.

    Two errors compare only over many elements, and those of x A^T are shared by whole rows.
    """
    ranks = sum(A.shape[0] for A in p.lora_A)
    enough = rule and (ranks == 0 or math.prod(p.x.shape[:-1]) * ranks >= 256)
    got, eager, oracle = (
        forward_backward(fourbit_linear, p),
        forward_backward(reference.fourbit_linear, p),
        in_float64(p),
    )
    bounds = worst_rounding(p, {name: result.dtype for name, result in got.items()})
    for name, exact in oracle.items():
        assert got[name].shape == exact.shape, name
        assert got[name].dtype == eager[name].dtype, name
        assert ((got[name] - exact).abs() <= bounds[name]).all(), name
        if enough and exact.numel() >= 2000:
            assert_as_accurate(got[name], eager[name], exact, name=name)


SHAPES = {  # M, K, N, and how the weight is quantized; what is particular to them
    (1, 1, 1): dict(),
    (1, 64, 2050): dict(quant_type="fp4"),
    (2, 33, 129): dict(blocksize=32, nested=False),  # words straddle rows
    (7, 96, 70): dict(blocksize=32),
    (12, 1000, 65): dict(blocksize=256, quant_type="fp4"),  # the last of few rows
    (13, 1000, 64): dict(blocksize=256, nested=False),  # the first of many
    (40, 130, 31): dict(blocksize=128),
    (40, 24, 200): dict(blocksize=4096),  # a block is more than a row
    (40, 160, 129): dict(blocksize=64),  # blocks straddle rows, words do not
    (40, 256, 66): dict(blocksize=128, quant_type="fp4", nested=False),
    (200, 257, 65): dict(blocksize=64, quant_type="fp4"),
}
LONG = {  # past the blocks of M, of K and of N
    (3, 4128, 70): dict(blocksize=64),
    (12, 2272, 70): dict(blocksize=32, quant_type="fp4"),
    (13, 2304, 70): dict(blocksize=256),
    (30, 4168, 70): dict(blocksize=64, quant_type="fp4"),
    (30, 2177, 65): dict(blocksize=512, nested=False),
    (30, 72, 2177): dict(blocksize=64),
    (530, 1120, 40): dict(blocksize=32),
}
EMPTY = [(0, 8, 8), (3, 0, 8), (3, 8, 0), (90, 0, 70), (90, 70, 0), (0, 0, 0)]


def by_shape(shapes):
    return pytest.mark.parametrize(
        "shape, format", shapes.items(), ids=["M{}-K{}-N{}".format(*shape) for shape in shapes]
    )


@pytest.mark.every_isa
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@by_shape(SHAPES)
@by_dtype
def test_accuracy(shape, format, dtypes, dropout):
    check(problem(shape, dtypes, bias=dtypes[0], dropout=dropout, **format))


@pytest.mark.every_isa
@by_shape(LONG)
@by_dtype
def test_accuracy_past_the_blocks(shape, format, dtypes):
    check(problem(shape, dtypes, dropout=0.1, **format))


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [0, 1, 2, 7, 12, 13])
@pytest.mark.parametrize("K", [32, 96, 264, 333])
@by_dtype
def test_the_quantized_layer_alone(M, K, dtypes):
    """No adapters, so that nothing hides the weight's own part.

    For few rows a scale multiplies the sum over its block; the oracle rounds each element's product with it to fp32. In
    a sum of only 32 elements, that difference is as large as the other errors.
    """
    p = problem((M, K, 2100 // max(M, 1) + 1), dtypes, ranks=(), blocksize=64)
    check(p, rule=M > 2 or K > 32)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("blocksize", FOURBIT_BLOCKSIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("M", [5, 40])
def test_every_format(M, nested, blocksize, quant_type):
    for K in (96, 128):
        check(problem((M, K, 65), DTYPES["fp32"], nested=nested, blocksize=blocksize, quant_type=quant_type))


@pytest.mark.every_isa
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_sum(shape, nested, dropout):
    p = problem(shape, bias=BF16, dropout=dropout, nested=nested)
    got, oracle = forward_backward(fourbit_linear, p), in_float64(p)
    for name, exact in oracle.items():
        torch.testing.assert_close(got[name], exact.to(got[name].dtype), rtol=1e-2, atol=1e-2, msg=name)


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [5, 29])
@by_dtype
def test_several_adapters(M, dtypes):
    several = dict(ranks=(3, 16, 1), scaling=[0.5, -1.25, 2.0], dropout=[0.0, 0.4, 0.1])
    check(problem((M, 70, 45), dtypes, bias=F32, **several))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 40), (3, 0)], ids=str)
@by_dtype
def test_batch_dimensions(batch, dtypes):
    check(problem((0, 40, 24), dtypes, bias=F32, dropout=0.3, batch=batch))


@pytest.mark.parametrize("bias", FLOATS, ids=str)
@by_dtype
def test_dtypes_of_the_bias(dtypes, bias):
    if bias in (dtypes[0], dtypes[2], F32):
        for M in (5, 40):
            check(problem((M, 40, 51), dtypes, bias=bias))


def test_adapters_of_two_dtypes():
    p = problem((29, 70, 45), DTYPES["bf16"], ranks=(4, 9), scaling=[0.5, 2.0], dropout=[0.2, 0.1])
    p.lora_A[1], p.lora_B[1] = p.lora_A[1].float(), p.lora_B[1].float()
    check(p)


def test_one_adapter_needs_no_lists():
    p = problem((9, 20, 12), DTYPES["fp32"], dropout=0.3)
    single = fourbit_linear(p.x, p.weight, p.lora_A[0], p.lora_B[0], 0.75, dropout=0.3, seed=p.seed)
    assert torch.equal(single, call(fourbit_linear, p))


@pytest.mark.parametrize("scaling", [torch.tensor(0.75), torch.tensor([0.75])], ids=str)
def test_scaling_as_a_tensor(scaling):
    check(problem((90, 40, 30), scaling=scaling))


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [1, 5, 40])
@by_dtype
def test_what_is_not_finite_stays_where_it_is(M, dtypes):
    """A NaN in its row of x; a scale that is NaN, as a broken checkpoint may have it, in what it covers."""
    p = problem((M, 96, 70), dtypes, blocksize=32, nested=False)
    p.x[M // 2, 3] = math.nan
    p.weight.absmax[77 * 32 // 32] = math.nan  # row 25, columns 64 to 95
    got = forward_backward(fourbit_linear, p)
    others = torch.arange(M) != M // 2
    assert got["output"][M // 2].isnan().all() and got["output"][:, 25].isnan().all()
    assert got["output"][others][:, torch.arange(70) != 25].isfinite().all()
    assert got["grad of x"][:, 64:].isnan().all() and got["grad of x"][:, :64].isfinite().all()


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [5, 19])
@pytest.mark.parametrize("layout", LAYOUTS)
@by_dtype
def test_layouts_change_nothing(dtypes, layout, M):
    p = problem((M, 64, 35), dtypes, dropout=0.3)
    other = p.map(lambda tensor: strided(tensor, layout))
    assert_equal(forward_backward(fourbit_linear, other), forward_backward(fourbit_linear, p))


@by_dtype
def test_expanded_operands(dtypes):
    p = problem((19, 67, 35), dtypes)
    p.x, p.grad = p.x[:1].expand(19, 67), p.grad[:1, :1].expand(19, 35)
    contiguous = p.map(torch.Tensor.contiguous)
    assert_equal(forward_backward(fourbit_linear, p), forward_backward(fourbit_linear, contiguous))


def test_permuted_batch():
    p = problem((0, 67, 35), batch=(4, 6), dropout=0.3)
    p.x, p.grad = p.x.transpose(0, 1), p.grad.transpose(0, 1)
    contiguous = p.map(torch.Tensor.contiguous)
    assert_equal(forward_backward(fourbit_linear, p), forward_backward(fourbit_linear, contiguous))


@pytest.mark.parametrize("storage", [F32, BF16, F16, torch.int8], ids=str)
@pytest.mark.parametrize("M", [5, 19])
def test_packed_may_be_seen_as_another_dtype(M, storage):
    """bitsandbytes' quant_storage, for FSDP."""
    p = problem((M, 64, 32), dropout=0.3)
    view = replace(p.weight, packed=p.weight.packed.view(-1).view(storage).view(-1, 1))
    assert_equal(
        forward_backward(fourbit_linear, replace(p, weight=view)), forward_backward(fourbit_linear, p)
    )
    assert torch.equal(fourbit_dequantize(view), fourbit_dequantize(p.weight))


dimensions = st.integers(1, 140)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 20), dimensions | st.sampled_from([32, 64, 128, 256, 2080]), dimensions),
    dtypes=st.sampled_from(list(DTYPES.values())),
    layouts=st.tuples(*[st.sampled_from(["contiguous", *LAYOUTS])] * 2),
    format=st.fixed_dictionaries(
        {
            "quant_type": st.sampled_from(TYPES),
            "blocksize": st.sampled_from(FOURBIT_BLOCKSIZES),
            "nested": st.booleans(),
        }
    ),
    ranks=st.lists(st.integers(1, 20), max_size=2),
    dropout=st.sampled_from([0.0, 0.05, 0.9]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_layout_and_format(shape, dtypes, layouts, format, ranks, dropout, seed):
    torch.manual_seed(seed % 1000)
    p = problem(shape, dtypes, ranks=ranks, dropout=dropout, **format)
    p.x, p.grad, p.seed = strided(p.x, layouts[0]), strided(p.grad, layouts[1]), torch.tensor([seed])
    check(p, rule=False)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["contiguous", *LAYOUTS]),
    quant_type=st.sampled_from(TYPES),
    blocksize=st.sampled_from(FOURBIT_BLOCKSIZES),
    nested=st.booleans(),
)
def test_any_weight(shape, dtype, layout, **format):
    weight = torch.randn(shape).to(dtype)
    got = fourbit_quantize(strided(weight, layout), **format)
    wanted = reference.fourbit_quantize(weight, **format)
    for name, tensor in tensors_of(wanted).items():
        torch.testing.assert_close(tensors_of(got)[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.equal(fourbit_dequantize(got), reference.fourbit_dequantize(wanted))


# ----------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "wanted", list(itertools.product([False, True], repeat=4)), ids=lambda w: "".join("-+"[i] for i in w)
)
@pytest.mark.parametrize("M", [5, 13])
def test_only_the_gradients_asked_for(M, wanted):
    p = problem((M, 40, 30), bias=BF16, dropout=0.3)
    everything = forward_backward(fourbit_linear, p)
    names = [name for name, want in zip(p.leaves(), wanted, strict=True) if want]
    some = forward_backward(fourbit_linear, p, names)
    for name in p.leaves():
        if name not in names:
            assert some.pop(f"grad of {name}") is None, name
    assert_equal(some, {name: everything[name] for name in some})


def test_a_frozen_adapter_beside_a_trained_one():
    p = problem((13, 40, 30), ranks=(6, 2), scaling=[0.5, 2.0], dropout=[0.3, 0.0])
    everything = forward_backward(fourbit_linear, p)
    some = forward_backward(fourbit_linear, p, ["lora_A[1]", "lora_B[0]"])
    some = {name: result for name, result in some.items() if result is not None}
    assert some.keys() == {"output", "grad of lora_A[1]", "grad of lora_B[0]"}
    assert_equal(some, {name: everything[name] for name in some})


def test_retained_graph_gives_the_same_gradients_again():
    p = problem((13, 40, 30), dropout=0.3)
    leaves = [leaf.requires_grad_() for leaf in p.leaves().values()]
    out = call(fourbit_linear, p)
    first = torch.autograd.grad(out, leaves, p.grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, p.grad)
    assert all(map(torch.equal, first, second))


def test_a_weight_changed_before_backward_is_refused():
    p = problem((13, 40, 30))
    p.x.requires_grad_()
    out = call(fourbit_linear, p)
    p.weight.packed.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(p.grad)


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_operands_are_left_alone(nested, M):
    p = problem((M, 64, 30), bias=BF16, dropout=0.3, nested=nested)
    before = p.map(torch.clone)
    parts = {name: (tensor._version, tensor.clone()) for name, tensor in tensors_of(p.weight).items()}
    forward_backward(fourbit_linear, p)
    fourbit_dequantize(p.weight)
    assert_equal(p.leaves() | {"grad": p.grad}, before.leaves() | {"grad": before.grad})
    for name, (version, tensor) in parts.items():
        assert_same_bits(tensors_of(p.weight)[name], tensor, name)
        assert tensors_of(p.weight)[name]._version == version, name
    dense = torch.randn(70, 9)
    copy = dense.clone()
    fourbit_quantize(dense, nested=nested)
    assert torch.equal(dense, copy)


@pytest.mark.parametrize("dropout", [0.0, [0.3, 0.6]], ids=["keep", "drop"])
def test_gradcheck_of_the_reference(dropout):
    p = problem((3, 5, 4), ranks=(2, 3), bias=F32, scaling=[0.5, -2.0], dropout=dropout).map(
        torch.Tensor.double
    )
    leaves = [leaf.requires_grad_() for leaf in p.leaves().values()]

    def function(x, bias, A0, A1, B0, B1):
        return call(reference.fourbit_linear, replace(p, x=x, bias=bias, lora_A=[A0, A1], lora_B=[B0, B1]))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dropout", [0.0, [0.3, 0.6]], ids=["keep", "drop"])
def test_the_reference_in_float64_is_the_oracle(dropout):
    p = problem((6, 25, 14), ranks=(2, 3), bias=F32, scaling=[0.5, -2.0], dropout=dropout).map(
        torch.Tensor.double
    )
    ours, oracle = forward_backward(reference.fourbit_linear, p), in_float64(p)
    for name, exact in oracle.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-12, atol=1e-12, msg=name)


def test_second_derivative_is_refused():
    p = problem((6, 25, 14), DTYPES["fp32"])
    p.x.requires_grad_()
    (gradient,) = torch.autograd.grad(call(fourbit_linear, p).square().sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative") as refusal:
        gradient.sum().backward()
    assert len(str(refusal.value).strip().splitlines()) == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("batch", [(48,), (4, 12)], ids=str)
@pytest.mark.parametrize("ranks", [(6,), (3, 5)], ids=str)
@by_dtype
def test_saved_for_backward(dtypes, ranks, batch, dropout):
    """u: 4 bytes per row and rank. No cast copy of x, no decoded weight."""
    p = problem((48, 400, 300), dtypes, ranks=ranks, batch=batch, bias=dtypes[0], dropout=dropout)
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    operands = [p.seed, *tensors_of(p.weight).values(), *p.leaves().values()]
    out, size = saved_bytes(lambda: call(fourbit_linear, p), operands)
    assert 0 < size <= 4 * 48 * sum(ranks)
    out.backward(p.grad)


def test_without_adapters_x_is_not_saved():
    p = problem((48, 400, 300), ranks=(), bias=BF16)
    p.x.requires_grad_()
    out, size = saved_bytes(lambda: call(fourbit_linear, p), tensors_of(p.weight).values())
    assert size <= 16
    out.backward(p.grad)


def test_no_grad_saves_nothing():
    p = problem((48, 400, 300), bias=BF16, dropout=0.3)
    expected = call(fourbit_linear, p)
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, size = saved_bytes(lambda: call(fourbit_linear, p), [])
        assert size == 0 and not out.requires_grad and out.grad_fn is None
        assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------ determinism, dropout


@pytest.mark.every_isa
@pytest.mark.parametrize("shape", [(1, 900, 700), (12, 256, 130), (131, 257, 130), (700, 64, 33)], ids=str)
@by_dtype
def test_equal_bits_for_any_number_of_threads(shape, dtypes):
    p = problem(shape, dtypes, bias=dtypes[0], dropout=0.2)
    alone = forward_backward(fourbit_linear, p)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert_equal(forward_backward(fourbit_linear, p), alone)


@pytest.mark.every_isa
@pytest.mark.parametrize("M", [1, 5, 37])
@by_dtype
def test_the_kernel_drops_what_the_reference_drops(M, dtypes):
    """x = 1, W = 0, A = B = 1: y is 1 / (1 - dropout) where an element was kept, and so is the gradient of x."""
    K, dropouts, ones = 66, [0.25, 0.0, 0.7], torch.eye(66, dtype=dtypes[1])
    weight = fourbit_quantize(torch.zeros(K, K))
    for i, dropout in enumerate(dropouts):
        x = torch.ones(M, K, dtype=dtypes[0], requires_grad=True)
        scaling = [float(i == j) for j in range(3)]
        seed = torch.tensor([2**40 + 17])
        out = fourbit_linear(
            x, weight, [ones] * 3, [ones] * 3, scaling, dropout=dropouts, seed=seed, compute_dtype=dtypes[2]
        )
        out.backward(torch.ones_like(out))
        kept = (reference.dropout_mask((M, K), dropout, seed, adapter=i) / (1 - dropout)).to(x.dtype)
        torch.testing.assert_close(out.detach(), kept)
        torch.testing.assert_close(x.grad, kept)


def test_manual_seed_decides_the_dropout():
    p = problem((31, 64, 48), DTYPES["fp32"], dropout=0.2)

    def drawn(seed):
        torch.manual_seed(seed)
        return fourbit_linear(p.x, p.weight, p.lora_A, p.lora_B, p.scaling, dropout=p.dropout)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))
    states = random_states()
    call(fourbit_linear, replace(p, dropout=[0.0]))
    assert all(map(torch.equal, random_states(), states))


# ------------------------------------------------------------------------------------------ modes of torch


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("ranks", [(), (4,), (4, 7)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_compiled(nested, ranks, backend):
    p = problem((13, 40, 30), bias=BF16, ranks=ranks, dropout=0.3, nested=nested)
    torch._dynamo.reset()
    compiled = torch.compile(fourbit_linear, fullgraph=True, backend=backend)
    assert_equal(forward_backward(compiled, p), forward_backward(fourbit_linear, p))


def test_compiled_for_any_number_of_rows():
    torch._dynamo.reset()
    compiled = torch.compile(fourbit_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in (5, 13, 64):
        p = problem((M, 40, 30), DTYPES["fp32 in bf16"], dropout=0.3)
        assert_equal(forward_backward(compiled, p), forward_backward(fourbit_linear, p))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing_replays_the_dropout(reentrant):
    p = problem((31, 64, 64), dropout=0.3)

    def layer(x, A, B):
        return F.silu(fourbit_linear(x, p.weight, A, B, 0.75, dropout=0.3))

    def gradients(run):
        torch.manual_seed(11)
        x, A, B = leaves = [leaf.detach().requires_grad_() for leaf in p.leaves().values()]
        run(run(x, A, B), A, B).backward(p.grad)
        return [leaf.grad for leaf in leaves]

    plain = gradients(layer)
    replayed = gradients(lambda *inputs: checkpoint(layer, *inputs, use_reentrant=reentrant))
    assert all(map(torch.equal, plain, replayed))


@pytest.mark.parametrize("compute_dtype", [None, BF16, F32], ids=str)
def test_autocast_casts_x(compute_dtype):
    """The same bits as with an x that was cast before the call; the gradient of x comes back in its own dtype."""
    p = problem((40, 64, 48), (F32, F32, compute_dtype), dropout=0.3)
    p.grad, device = p.grad.bfloat16(), p.x.device.type
    with torch.autocast(device, dtype=BF16):
        got = forward_backward(fourbit_linear, p)
    cast = forward_backward(fourbit_linear, replace(p, x=p.x.bfloat16()))
    assert got["output"].dtype == BF16 and got["grad of x"].dtype == F32
    assert_equal(got, cast | {"grad of x": cast["grad of x"].float()})
    with torch.autocast(device, dtype=BF16), torch.autocast(device, enabled=False):
        assert call(fourbit_linear, p).dtype == F32


# ----------------------------------------------------------------------------------------------- bad input

WEIGHT = FourBitWeight(
    torch.zeros(24, 1, dtype=torch.uint8),
    torch.zeros(2, dtype=torch.uint8),
    (6, 8),
    F32,
    "nf4",
    32,
    NestedAbsmax(torch.ones(1), torch.ones(256), torch.ones(())),
)
GOOD = dict(
    x=torch.ones(5, 8),
    weight=WEIGHT,
    lora_A=torch.ones(3, 8),
    lora_B=torch.ones(6, 3),
    scaling=1.0,
    bias=torch.ones(6),
    dropout=0.5,
    seed=torch.tensor([1]),
    compute_dtype=BF16,
)
BAD = [  # what changes, the error, the arguments of which the message names one
    (dict(x=[[1.0]]), TypeError, "x"),
    (dict(x=torch.ones(5, 8, dtype=torch.int32)), TypeError, "x"),
    (dict(x=torch.ones(5, 8).double()), TypeError, "x"),
    (dict(x=torch.ones(5, 9)), ValueError, "x"),
    (dict(x=torch.ones(())), ValueError, "x"),
    (dict(x=torch.ones(5, 8).to_sparse()), TypeError, "x"),
    (dict(x=torch.ones(5, 8, device="meta")), ValueError, "packed"),
    (dict(weight=None), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8)), TypeError, "weight"),
    (dict(lora_A=None), TypeError, "lora_A"),
    (dict(lora_A=torch.ones(3, 7)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(0, 8), lora_B=torch.ones(6, 0)), ValueError, "lora_A"),
    (dict(lora_A=torch.ones(3, 8).half()), TypeError, "lora_A"),
    (dict(lora_B=torch.ones(3, 6)), ValueError, "lora_B"),
    (dict(lora_B=torch.ones(6, 3).half()), TypeError, "lora_B"),
    (dict(lora_B=()), ValueError, "lora_B"),
    (dict(lora_A=[torch.ones(3, 8)] * 2), ValueError, "lora_B"),
    (dict(scaling=[1.0, 2.0]), ValueError, "scaling"),
    (dict(scaling="1"), TypeError, "scaling"),
    (dict(scaling=torch.ones(2)), ValueError, "scaling"),
    (dict(bias=torch.ones(5)), ValueError, "bias"),
    (dict(bias=torch.ones(6).half()), TypeError, "bias"),
    (dict(bias=1.0), TypeError, "bias"),
    (dict(dropout=1.0), ValueError, "dropout"),
    (dict(dropout=math.nan), ValueError, "dropout"),
    (dict(dropout="0.5"), TypeError, "dropout"),
    (dict(seed=torch.tensor([1, 2])), ValueError, "seed"),
    (dict(seed=torch.tensor([1], dtype=torch.int32)), ValueError, "seed"),
    (dict(seed=1), TypeError, "seed"),
    (dict(compute_dtype=torch.float64), TypeError, "compute_dtype"),
    (dict(compute_dtype=torch.int8), TypeError, "compute_dtype"),
    (dict(compute_dtype="bfloat16"), TypeError, "compute_dtype"),
]
BAD_WEIGHTS = [  # what changes in the weight, the error, what the message names
    (dict(packed=torch.zeros(23, 1, dtype=torch.uint8)), ValueError, "packed"),
    (dict(packed=torch.zeros(24, 1)), ValueError, "packed"),
    (dict(packed=torch.zeros(24, 1, dtype=torch.uint8, device="meta")), ValueError, "packed"),
    (dict(packed=torch.zeros(24, 2, dtype=torch.uint8)[:, :1]), ValueError, "packed"),
    (dict(packed=None), TypeError, "packed"),
    (dict(absmax=torch.ones(2)), TypeError, "absmax"),
    (dict(absmax=torch.zeros(3, dtype=torch.uint8)), ValueError, "absmax"),
    (dict(absmax=torch.zeros(4, dtype=torch.uint8)[::2]), ValueError, "absmax"),
    (dict(absmax=None), TypeError, "absmax"),
    (dict(nested=None), TypeError, "absmax"),
    (dict(shape=(6, 9)), ValueError, "packed"),
    (dict(quant_type="int4"), ValueError, "quant_type"),
    (dict(quant_type=None), ValueError, "quant_type"),
    (dict(blocksize=64), ValueError, "absmax"),
    (dict(blocksize=16), ValueError, "blocksize"),
    (dict(blocksize=8192), ValueError, "blocksize"),
    (dict(blocksize=-64), ValueError, "blocksize"),
    (dict(nested=NestedAbsmax(torch.ones(2), torch.ones(256), torch.ones(()))), ValueError, "nested absmax"),
    (dict(nested=NestedAbsmax(torch.ones(1), torch.ones(255), torch.ones(()))), ValueError, "nested code"),
    (dict(nested=NestedAbsmax(torch.ones(1), torch.ones(256), torch.ones(2))), ValueError, "nested offset"),
    (
        dict(nested=NestedAbsmax(torch.ones(1).double(), torch.ones(256), torch.ones(()))),
        TypeError,
        "nested absmax",
    ),
    (
        dict(nested=NestedAbsmax(torch.ones(1), torch.ones(256), torch.ones(()), 100)),
        ValueError,
        "block size",
    ),
    (dict(nested=NestedAbsmax(torch.ones(1), torch.ones(256), torch.ones(()), 0)), ValueError, "block size"),
]
BAD_QUANTIZE = [
    (dict(weight=[1.0]), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8).double()), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8, dtype=torch.int8)), TypeError, "weight"),
    (dict(weight=torch.ones(6, 8).to_sparse()), TypeError, "weight"),
    (dict(quant_type="nf3"), ValueError, "quant_type"),
    (dict(blocksize=48), ValueError, "blocksize"),
    (dict(blocksize=0), ValueError, "blocksize"),
    (dict(blocksize="64"), ValueError, "blocksize"),
]


@contextlib.contextmanager
def refuses(error, names):
    with pytest.raises(error, match=rf"\b({names})\b") as caught:
        yield
    assert caught.type is error
    assert len(str(caught.value).strip().splitlines()) == 1, "one sentence"


def cases(bad):
    return pytest.mark.parametrize(
        "change, error, names", bad, ids=[name_of_bad(change) for change, *_ in bad]
    )


@cases(BAD)
def test_bad_input(change, error, names):
    fourbit_linear(**GOOD)
    with refuses(error, names):
        fourbit_linear(**GOOD | change)


@cases(BAD_WEIGHTS)
def test_bad_weight(change, error, names):
    weight = replace(WEIGHT, **change)
    with refuses(error, names):
        fourbit_linear(**GOOD | dict(weight=weight))
    with refuses(error, names):
        fourbit_dequantize(weight)


@cases(BAD_QUANTIZE)
def test_bad_input_of_quantize(change, error, names):
    with refuses(error, names):
        fourbit_quantize(**dict(weight=torch.ones(6, 8)) | change)


def test_a_weight_that_is_no_matrix():
    with refuses(ValueError, "weight"):
        fourbit_linear(torch.ones(2, 8), fourbit_quantize(torch.ones(2, 3, 8)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float32"], ids=str)
def test_bad_dtype_of_dequantize(dtype):
    with refuses(TypeError, "dtype"):
        fourbit_dequantize(WEIGHT, dtype)


# -------------------------------------------------------------------------------------------- registration


def parts_of(weight):
    """The weight as the registered ops take it."""
    nested = weight.nested or NestedAbsmax(None, None, None, 0)
    return dict(
        packed=weight.packed,
        absmax=weight.absmax,
        nested_absmax=nested.absmax,
        nested_code=nested.code,
        nested_offset=nested.offset,
        blocksize=weight.blocksize,
        nested_blocksize=nested.blocksize,
        quant_type=("nf4", "fp4").index(weight.quant_type),
    )


def forward_arguments(p):
    return dict(
        x=p.x,
        **parts_of(p.weight),
        out_features=p.weight.shape[0],
        bias=p.bias,
        lora_A=p.lora_A,
        lora_B=p.lora_B,
        scaling=p.scaling,
        dropout=p.dropout,
        seed=p.seed if any(p.dropout) else None,
        compute_dtype=FLOATS.index(p.compute_dtype or p.x.dtype),
    )


def backward_arguments(p, u):
    arguments = forward_arguments(p)
    del arguments["out_features"], arguments["bias"]
    wanted = dict(want_x=True, want_A=[True] * len(p.lora_A), want_B=[True] * len(p.lora_B))
    return dict(grad_y=p.grad, u=u) | arguments | wanted


@pytest.mark.parametrize("ranks", [(), (4,), (4, 7)], ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_opcheck(nested, ranks):
    """torch's own checks of an op: schema, fake, autograd registration, tracing with dynamic shapes."""
    p = problem((13, 40, 30), bias=BF16, ranks=ranks, dropout=0.3, nested=nested)
    opcheck(FORWARD, (), forward_arguments(p))
    _, u = FORWARD(**forward_arguments(p))
    opcheck(BACKWARD, (), backward_arguments(p, u))
    opcheck(DEQUANTIZE, (), parts_of(p.weight) | dict(rows=30, columns=40, dtype=2))
    for leaf in p.leaves().values():
        leaf.requires_grad_()
    opcheck(FORWARD, (), forward_arguments(p))
    assert [result.requires_grad for result in FORWARD(**forward_arguments(p))] == [True, False]


def test_opcheck_of_quantize():
    opcheck(QUANTIZE, (torch.randn(37, 11, dtype=BF16), 64, 0))
    opcheck(QUANTIZE_ABSMAX, (torch.rand(700), torch.tensor(0.5), reference.dynamic_code(), 256))


def shorter(tensor):
    return tensor.reshape(-1)[:-1].clone()


BAD_PARTS = {
    "packed too short": lambda a: dict(packed=shorter(a["packed"])),
    "packed of another dtype": lambda a: dict(packed=a["packed"].float()),
    "packed with gaps": lambda a: dict(packed=a["packed"].repeat(1, 2)[:, :1]),
    "absmax too short": lambda a: dict(absmax=shorter(a["absmax"])),
    "absmax of another dtype": lambda a: dict(absmax=a["absmax"].half()),
    "nested_absmax too short": lambda a: dict(nested_absmax=shorter(a["nested_absmax"])),
    "nested_absmax missing": lambda a: dict(nested_absmax=None),
    "nested_code too short": lambda a: dict(nested_code=shorter(a["nested_code"])),
    "nested_code missing": lambda a: dict(nested_code=None),
    "nested_offset empty": lambda a: dict(nested_offset=torch.empty(0)),
    "nested_blocksize 0": lambda a: dict(nested_blocksize=0),
    "nested_blocksize odd": lambda a: dict(nested_blocksize=255),
    "nested_blocksize small": lambda a: dict(nested_blocksize=2),
    "blocksize 0": lambda a: dict(blocksize=0),
    "blocksize 16": lambda a: dict(blocksize=16),
    "blocksize negative": lambda a: dict(blocksize=-64),
    "blocksize another": lambda a: dict(blocksize=32),
    "quant_type": lambda a: dict(quant_type=2),
}
BAD_LINEAR = {
    "x has another K": lambda a: dict(x=a["x"][:, :-1]),
    "x has one dimension": lambda a: dict(x=a["x"][0]),
    "x of another dtype": lambda a: dict(x=a["x"].double()),
    "lora_A has another K": lambda a: dict(lora_A=[a["lora_A"][0][:, :-1]]),
    "lora_B has another N": lambda a: dict(lora_B=[a["lora_B"][0][:-1]]),
    "lists of two lengths": lambda a: dict(scaling=[1.0, 1.0]),
    "seed of another dtype": lambda a: dict(seed=a["seed"].int()),
    "seed missing": lambda a: dict(seed=None),
    "compute_dtype": lambda a: dict(compute_dtype=3),
}
BAD_FORWARD = {
    "out_features another": lambda a: dict(out_features=29),
    "out_features negative": lambda a: dict(out_features=-30),
    "out_features past 64 bits": lambda a: dict(
        out_features=2**61, packed=a["packed"][:0], absmax=a["absmax"][:0]
    ),
    "bias too short": lambda a: dict(bias=a["bias"][:-1]),
}
BAD_BACKWARD = {
    "grad_y has another M": lambda a: dict(grad_y=a["grad_y"][:-1]),
    "grad_y has another N": lambda a: dict(grad_y=a["grad_y"][:, :-1]),
    "grad_y of another dtype": lambda a: dict(grad_y=a["grad_y"].float()),
    "u has another M": lambda a: dict(u=a["u"][:-1]),
    "u has another rank": lambda a: dict(u=a["u"][:, :-1]),
    "u of another dtype": lambda a: dict(u=a["u"].half()),
    "want_A too short": lambda a: dict(want_A=[]),
}
BAD_DEQUANTIZE = {
    "rows another": lambda a: dict(rows=29),
    "rows negative": lambda a: dict(rows=-30, columns=-40),
    "rows past 64 bits": lambda a: dict(
        rows=2**32,
        columns=2**32,
        packed=a["packed"][:0],
        absmax=a["absmax"][:0],
        nested_absmax=a["nested_absmax"][:0],
    ),
    "dtype": lambda a: dict(dtype=3),
}
BAD_CALLS = [
    *((FORWARD, change) for change in (BAD_PARTS | BAD_LINEAR | BAD_FORWARD).items()),
    *((BACKWARD, change) for change in (BAD_PARTS | BAD_LINEAR | BAD_BACKWARD).items()),
    *((DEQUANTIZE, change) for change in (BAD_PARTS | BAD_DEQUANTIZE).items()),
]


@pytest.mark.every_isa
@pytest.mark.parametrize(
    "op, change", BAD_CALLS, ids=[f"{op._schema.name.split('_', 1)[1]}-{name}" for op, (name, _) in BAD_CALLS]
)
def test_the_registered_ops_stay_inside_their_memory(op, change):
    """Called past the Python face, without its checks, the ops still refuse what they cannot index."""
    p = problem((13, 40, 30), bias=BF16, dropout=0.3)
    arguments = {
        FORWARD: forward_arguments(p),
        BACKWARD: backward_arguments(p, torch.zeros(13, 5)),
        DEQUANTIZE: parts_of(p.weight) | dict(rows=30, columns=40, dtype=0),
    }[op]
    op(**arguments)
    with pytest.raises(RuntimeError):
        op(**arguments | change[1](arguments))


@pytest.mark.every_isa
def test_the_registered_quantizers_stay_inside_their_memory():
    weight, absmax, offset, code = (
        torch.randn(300),
        torch.rand(300),
        torch.tensor(0.5),
        reference.dynamic_code(),
    )
    for arguments in [
        (weight, 0, 0),
        (weight, 48, 0),
        (weight, 64, 2),
        (weight.double(), 64, 0),
    ]:
        with pytest.raises(RuntimeError):
            QUANTIZE(*arguments)
    for arguments in [
        (absmax, offset, code, 0),
        (absmax, offset, code, 100),
        (absmax, offset, code[:-1], 256),
        (absmax, torch.empty(0), code, 256),
        (absmax.double(), offset, code, 256),
        (absmax[::2], offset, code, 256),
    ]:
        with pytest.raises(RuntimeError):
            QUANTIZE_ABSMAX(*arguments)
