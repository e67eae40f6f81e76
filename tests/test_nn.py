"""peftfast.nn: LoraLinear against PEFT's layer, Linear4bit against bitsandbytes', with the same weights."""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peftfast import reference
from peftfast.nn import Linear4bit, LoraLinear, quantize_linears
from peftfast.testing import assert_as_accurate, relative_error


def weights(factor):
    """lora_A and lora_B are parameters, or modules that hold one."""
    return factor if isinstance(factor, nn.Parameter) else factor.weight


def pair(K=24, N=17, r=5, bias=True, dtype=torch.float32, **options):
    """The same layer twice: PEFT's and ours, with equal random weights."""
    base = nn.Linear(K, N, bias=bias, dtype=dtype)
    config = LoraConfig(r=r, target_modules=["0"], **options)
    peft_layer = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = LoraLinear.from_linear(base, r, **options)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            theirs = getattr(peft_layer, name)["default"].weight
            theirs.copy_(torch.randn(theirs.shape))
            weights(getattr(ours, name)).copy_(theirs)
    return ours, peft_layer


def gradients(layer, x, grad):
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(grad)
    factors = [layer.lora_A, layer.lora_B]
    if isinstance(layer.lora_A, nn.ModuleDict):
        factors = [factor["default"] for factor in factors]
    return [out.detach(), x.grad, *(weights(factor).grad for factor in factors)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("options", [dict(lora_alpha=10), dict(lora_alpha=3, use_rslora=True)], ids=str)
def test_equals_peft(options, bias):
    ours, theirs = pair(bias=bias, **options)
    x, grad = torch.randn(2, 7, 24), torch.randn(2, 7, 17)
    for mine, expected in zip(gradients(ours, x, grad), gradients(theirs, x, grad), strict=True):
        assert relative_error(mine, expected) <= 1e-6


def test_starts_as_the_base_layer():
    base = nn.Linear(24, 17)
    layer = LoraLinear.from_linear(base, 5, lora_alpha=10)
    x = torch.randn(7, 24)
    torch.testing.assert_close(layer(x), base(x))
    assert weights(layer.lora_A).any() and not weights(layer.lora_B).any()


def test_only_the_adapter_is_trained():
    layer = LoraLinear.from_linear(nn.Linear(24, 17), 5, lora_alpha=10)
    trained = {name.split(".")[0] for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 5 * (24 + 17)


def test_from_linear_shares_the_weight():
    base = nn.Linear(24, 17)
    layer = LoraLinear.from_linear(base, 5, lora_alpha=10)
    assert base.weight.data_ptr() in {p.data_ptr() for p in layer.parameters()}


def test_dropout_is_of_training_only():
    layer, _ = pair(lora_alpha=10, lora_dropout=0.5)
    x = torch.randn(7, 24)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    without, _ = pair(lora_alpha=10)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), layer(x)) and torch.equal(layer(x), without(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_unmerge_are_as_exact_as_pefts(dtype):
    ours, theirs = pair(K=64, N=48, lora_alpha=10, dtype=dtype)
    base = ours.weight.double()
    with_adapter = base + ours.scaling * (weights(ours.lora_B).double() @ weights(ours.lora_A).double())
    for layer in (ours, theirs):
        layer.merge()
    assert_as_accurate(ours.weight, theirs.base_layer.weight, with_adapter)
    for layer in (ours, theirs):
        layer.unmerge()
    assert_as_accurate(ours.weight, theirs.base_layer.weight, base)


def test_merging_changes_the_weight_and_not_the_result():
    layer, _ = pair(lora_alpha=10)
    x = torch.randn(7, 24)
    weight, adapted = layer.weight.clone(), layer(x)
    layer.merge()
    assert not torch.equal(layer.weight, weight)
    merged, merged_weight = layer(x), layer.weight.clone()
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    layer.merge()  # merging twice is merging once
    assert torch.equal(layer.weight, merged_weight)
    layer.unmerge()
    torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-4, atol=1e-5)
    unmerged = layer.weight.clone()
    layer.unmerge()
    assert torch.equal(layer.weight, unmerged)


def test_merging_keeps_out_of_the_graph():
    layer, _ = pair(lora_alpha=10)
    layer.merge()
    out = layer(torch.randn(7, 24, requires_grad=True))
    out.sum().backward()
    assert weights(layer.lora_A).grad is None
    assert not layer.weight.requires_grad


def test_a_copy_and_a_pickle_are_the_same_layer():
    layer, _ = pair(lora_alpha=10)
    x = torch.randn(7, 24)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.state_dict().keys() == layer.state_dict().keys()


def test_the_repr_says_what_it_is():
    text = repr(LoraLinear.from_linear(nn.Linear(24, 17), 5, lora_alpha=10, lora_dropout=0.25))
    for word in ("LoraLinear", "24", "17", "5", "0.25"):
        assert word in text


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        (dict(linear=nn.Conv1d(3, 4, 1)), TypeError, "linear"),
        (dict(linear=torch.ones(3, 4)), TypeError, "linear"),
        (dict(r=0), ValueError, "r"),
        (dict(r=-2), ValueError, "r"),
        (dict(r=2.5), (TypeError, ValueError), "r"),
        (dict(lora_dropout=1.0), ValueError, "lora_dropout"),
        (dict(lora_dropout=-0.5), ValueError, "lora_dropout"),
        (dict(lora_dropout=math.nan), ValueError, "lora_dropout"),
        (dict(lora_alpha="16"), TypeError, "lora_alpha"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, name):
    good = dict(linear=nn.Linear(24, 17), r=5, lora_alpha=10)
    LoraLinear.from_linear(**good)
    with pytest.raises(error, match=rf"\b{name}\b"):
        LoraLinear.from_linear(**good | arguments)


# ---- Linear4bit -------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [
    dict(quant_type=quant_type, blocksize=blocksize, nested=nested)
    for quant_type in ("nf4", "fp4")
    for blocksize in (32, 64, 128)
    for nested in (True, False)
]


def four_bit(K=24, N=17, bias=True, dtype=torch.float32, **options):
    return Linear4bit.from_linear(nn.Linear(K, N, bias=bias, dtype=dtype), **options)


def bitsandbytes_layer(linear, quant_type="nf4", blocksize=64, nested=True, storage=torch.uint8):
    """The same layer quantized by bitsandbytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, quant_type=quant_type
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(), blocksize=blocksize, compress_statistics=nested,
        quant_type=quant_type, quant_storage=storage, module=layer,
    )  # fmt: skip
    layer.bias = linear.bias
    return layer.to(torch.get_default_device())


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def rewritten(state, **changes):
    """A state dict whose quant state says something else."""
    (key,) = (key for key in state if "quant_state" in key)
    read = json.loads(bytes(state[key].tolist())) | changes
    return state | {key: torch.tensor(list(json.dumps(read).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(24, 17), (13, 5), (64, 130), (1, 1)], ids=str)
def test_the_state_dict_is_bitsandbytes_own(shape, options):
    for dtype in DTYPES:
        linear = nn.Linear(*shape, dtype=dtype)
        ours, theirs = Linear4bit.from_linear(linear, **options), bitsandbytes_layer(linear, **options)
        assert_same_state(ours.state_dict(), theirs.state_dict())
        empty = Linear4bit(*shape, dtype=dtype)
        empty.load_state_dict(theirs.state_dict())
        assert_same_state(empty.state_dict(), theirs.state_dict())
        assert torch.equal(empty.dequantize(), ours.dequantize()) and ours.dequantize().dtype == dtype


def test_a_state_dict_loads_whatever_the_default_device_is():
    state, empty = Linear4bit.from_linear(nn.Linear(64, 17)).state_dict(), Linear4bit(64, 17)
    with torch.device("meta"):
        empty.load_state_dict(state)
    assert_same_state(empty.state_dict(), state)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_bitsandbytes_reads_the_state_dict(options):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    ours = four_bit(**options)
    state = ours.state_dict(prefix="layer.")
    weight = bitsandbytes.nn.Params4bit.from_prequantized(
        state["layer.weight"],
        {key: value for key, value in state.items() if key.startswith("layer.weight.")},
        device=torch.get_default_device(),
    )
    decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(decoded, ours.dequantize())


@pytest.mark.parametrize("storage", DTYPES, ids=str)
def test_a_state_dict_in_another_storage_dtype(storage):
    linear = nn.Linear(24, 16)
    theirs = bitsandbytes_layer(linear, storage=storage)
    assert theirs.state_dict()["weight"].dtype == storage
    layer = Linear4bit(24, 16)
    layer.load_state_dict(theirs.state_dict())
    assert_same_state(layer.state_dict(), Linear4bit.from_linear(linear).state_dict())


@pytest.mark.parametrize("compute_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_layer_of_the_dequantized_weight(dtype, compute_dtype):
    layer = four_bit(dtype=dtype, compute_dtype=compute_dtype)
    x, grad = torch.randn(2, 7, 24).to(dtype).requires_grad_(), torch.randn(2, 7, 17).to(dtype)
    y = layer(x)
    y.backward(grad)
    assert y.dtype == x.grad.dtype == dtype
    compute, weight, bias = compute_dtype or dtype, layer.dequantize(torch.float32), layer.bias
    eager = nn.functional.linear(x.to(compute), weight.to(compute), bias.to(compute)).to(dtype)
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())
    assert_as_accurate(y, eager, exact)
    eager_grad = (grad.to(compute) @ weight.to(compute)).to(dtype)
    assert_as_accurate(x.grad, eager_grad, grad.double() @ weight.double(), name="gradient of x")


def test_the_operator_is_told_the_compute_dtype(monkeypatch):
    told = []
    monkeypatch.setattr("peftfast.nn.fourbit.fourbit_linear", lambda *_, **options: told.append(options))
    for compute_dtype in (None, torch.bfloat16):
        four_bit(compute_dtype=compute_dtype)(torch.randn(7, 24))
        assert told.pop()["compute_dtype"] is compute_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", DTYPES, ids=str)
def test_a_bias_of_another_dtype(dtype, bias_dtype):
    layer = four_bit().to(bias_dtype)
    x = torch.randn(7, 24).to(dtype)
    exact = nn.functional.linear(x.double(), layer.dequantize().double(), layer.bias.double())
    assert layer(x).dtype == dtype
    assert relative_error(layer(x), exact) <= (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
def test_casting_casts_the_bias_alone(cast, nested):
    layer = four_bit(nested=nested)
    before = layer.state_dict()
    dtype = dict(half=torch.float16, float=torch.float32, double=torch.float64, bfloat16=torch.bfloat16)[cast]
    for twin in (getattr(copy.deepcopy(layer), cast)(), copy.deepcopy(layer).to(dtype=dtype)):
        after = twin.state_dict()
        assert after.pop("bias").dtype == dtype
        assert_same_state(after, {name: value for name, value in before.items() if name != "bias"})
        assert twin.quantized_weight.packed is twin.weight


def test_a_round_trip_through_training_and_evaluation_changes_no_byte():
    layer = four_bit()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(7, 24, requires_grad=True)
    for training in (False, True, False, True):
        layer.train(training)
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x)
        assert_same_state(layer.state_dict(), before)
    assert x.grad is not None and not any(p.requires_grad for p in layer.parameters())


def test_copies_and_pickles():
    layer = four_bit(compute_dtype=torch.bfloat16, quant_type="fp4", blocksize=32)
    x = torch.randn(7, 24)
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_state(twin.state_dict(), layer.state_dict())
        assert twin.quantized_weight.packed is twin.weight and twin.compute_dtype == torch.bfloat16
        twin.set_weight(torch.randn(17, 24))
        assert not torch.equal(twin(x), expected) and torch.equal(layer(x), expected)


def test_an_empty_layer():
    full = four_bit()
    for empty in (Linear4bit(24, 17), Linear4bit(24, 17, device="meta"), copy.deepcopy(full).to("meta")):
        assert empty.is_empty and list(empty.state_dict()) == ["weight", "bias"]
        with pytest.raises(RuntimeError, match="no weight yet"):
            empty(torch.randn(7, 24))
        assert copy.deepcopy(empty).is_empty
        empty.load_state_dict(full.state_dict(), assign=empty.weight.is_meta)
        x = torch.randn(7, 24)
        assert torch.equal(empty(x), full(x))
    with torch.device("meta"):
        assert Linear4bit(24, 17).weight.is_meta
    empty = Linear4bit(24, 17, quant_type="fp4", blocksize=32, nested=False)
    empty.set_weight(torch.randn(17, 24).half())
    weight = empty.quantized_weight
    assert (weight.quant_type, weight.blocksize, weight.nested) == ("fp4", 32, None)
    assert weight.dtype == torch.float16


def test_a_weight_that_is_replaced_is_the_weight():
    layer, other = four_bit(nested=False), four_bit(nested=False)
    x = torch.randn(7, 24)
    layer.weight = nn.Parameter(other.weight.clone(), requires_grad=False)
    expected = layer(x)
    assert layer.quantized_weight.packed is layer.weight
    layer.weight.data = torch.zeros_like(layer.weight)
    assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_set_weight(options):
    layer, dense = four_bit(dtype=torch.bfloat16, **options), torch.randn(17, 24)
    bias = layer.bias
    error = layer.set_weight(dense)
    assert error == pytest.approx(relative_error(layer.dequantize(torch.float32), dense), rel=1e-4)
    assert 0.05 < error < 0.2
    quantized = reference.fourbit_quantize(dense, **options)
    assert torch.equal(layer.weight, quantized.packed) and layer.bias is bias
    assert layer.dequantize().dtype == torch.bfloat16  # as before
    assert torch.equal(layer.dequantize(torch.float32), reference.fourbit_dequantize(quantized))
    assert layer.set_weight(torch.zeros(17, 24)) == 0 and not layer.dequantize().any()


@pytest.mark.parametrize(
    "dense, error, message",
    [
        (torch.full((17, 24), math.nan), ValueError, "^dense holds values that are not finite"),
        (torch.full((17, 24), math.inf), ValueError, "^dense holds values that are not finite"),
        (torch.zeros(24, 17), ValueError, r"^dense has shape \[24, 17\], expected \[17, 24\]"),
        (torch.zeros(17, 24).double(), TypeError, "^dense must be float32, bfloat16 or float16"),
        (torch.zeros(17, 24, dtype=torch.int32), TypeError, "^dense must be float32, bfloat16 or float16"),
        (torch.empty(17, 24, device="meta"), ValueError, "^dense is on the meta device"),
        ([[1.0]], TypeError, "^dense must be a tensor"),
    ],
    ids=["nan", "inf", "shape", "double", "int", "meta", "list"],
)
def test_a_bad_weight_leaves_the_layer_alone(dense, error, message):
    layer = four_bit()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        layer.set_weight(dense)
    assert_same_state(layer.state_dict(), before)


def test_from_quantized_shares_what_it_is_given():
    quantized, bias = reference.fourbit_quantize(torch.randn(17, 24), quant_type="fp4"), torch.randn(17)
    layer = Linear4bit.from_quantized(quantized, bias, torch.bfloat16)
    assert (layer.in_features, layer.out_features, layer.quant_type) == (24, 17, "fp4")
    assert layer.weight.data_ptr() == quantized.packed.data_ptr()
    assert layer.bias.data_ptr() == bias.data_ptr() and layer.compute_dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), reference.fourbit_dequantize(quantized))


def test_layers_that_share_the_map_of_their_scales_can_be_saved(tmp_path):
    first, second = (reference.fourbit_quantize(torch.randn(17, 24)) for _ in range(2))
    nested = dataclasses.replace(second.nested, code=first.nested.code)
    second = dataclasses.replace(second, nested=nested)
    layers = nn.Sequential(Linear4bit.from_quantized(first), Linear4bit.from_quantized(second))
    save_file(layers.state_dict(), tmp_path / "layers.safetensors")
    saved = load_file(tmp_path / "layers.safetensors")
    state = {name: value.cpu() for name, value in layers.state_dict().items()}
    assert_same_state({name: saved[name] for name in state}, state)


def test_from_linear_keeps_the_mode_and_shares_the_bias():
    linear = nn.Linear(24, 17).eval()
    layer = Linear4bit.from_linear(linear)
    assert isinstance(layer, nn.Linear) and not layer.training
    assert layer.bias.data_ptr() == linear.bias.data_ptr() and not layer.bias.requires_grad
    assert Linear4bit.from_linear(nn.Linear(24, 17, bias=False)).bias is None


@pytest.mark.parametrize("assign", [True, False])
def test_loading_shares_only_when_told_to(assign):
    layer, state = four_bit(), four_bit().state_dict()
    layer.load_state_dict(state, assign=assign)
    assert_same_state(layer.state_dict(), state)
    assert (layer.weight.data_ptr() == state["weight"].data_ptr()) == assign


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (
            lambda s: s | {"weight.absmax": s["weight.absmax"][1:]},
            ValueError,
            "^0.weight: absmax has 6 elements",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "weight.absmax"},
            ValueError,
            "^0.weight.absmax is missing",
        ),
        (lambda s: {k: v for k, v in s.items() if k != "weight"}, ValueError, "^0.weight is missing"),
        (lambda s: s | {"weight": s["weight"][1:]}, ValueError, "^0.weight: packed has 203 bytes"),
        (lambda s: rewritten(s, blocksize=128), ValueError, "^0.weight: absmax has 7 elements, expected 4"),
        (lambda s: rewritten(s, shape=[24, 17]), ValueError, r"^0.weight.* says shape \[24, 17\]"),
        (lambda s: s | {"bias": torch.zeros(3)}, RuntimeError, "size mismatch for 0.bias"),
        (lambda s: s | {"weight.more": torch.zeros(3)}, RuntimeError, "Unexpected.*0.weight.more"),
        (lambda s: {"bias": s["bias"]}, RuntimeError, "Missing.*0.weight"),
        (
            lambda s: {"bias": s["bias"], "weight": torch.randn(17, 24)},
            ValueError,
            "^0.weight is no 4-bit weight",
        ),
    ],
    ids=[
        "short absmax",
        "no absmax",
        "no weight",
        "short weight",
        "blocksize",
        "shape",
        "bias",
        "more",
        "none",
        "dense",
    ],
)
def test_a_bad_state_dict_is_refused_whole(edit, error, message):
    layer = nn.Sequential(four_bit())
    before = copy.deepcopy(layer.state_dict())
    state = {f"0.{key}": value for key, value in edit(four_bit().state_dict()).items()}
    with pytest.raises(error, match=f"(?s){message}"):
        layer.load_state_dict(state)
    if (
        error is ValueError or "size mismatch" in message
    ):  # torch loads first and reports other keys afterwards
        assert_same_state(layer.state_dict(), before)


class Twice(nn.Module):
    """A layer in two places, one that is to stay dense, and one that is no nn.Linear by type."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.block = nn.ModuleDict({"again": self.first, "other": nn.Linear(24, 17)})
        self.lm_head = nn.Linear(17, 9)
        self.lora = LoraLinear.from_linear(nn.Linear(9, 9), 2)


def test_quantize_linears():
    module = Twice()
    dense = {name: layer.weight for name, layer in module.named_modules() if type(layer) is nn.Linear}
    assert quantize_linears(module, quant_type="fp4", blocksize=32, nested=False) is module
    assert module.first is module.block["again"] and type(module.lm_head) is nn.Linear
    for name, layer in (("first", module.first), ("block.other", module.block["other"])):
        assert type(layer) is Linear4bit and layer.blocksize == 32
        quantized = reference.fourbit_quantize(dense[name], quant_type="fp4", blocksize=32, nested=False)
        assert torch.equal(layer.weight, quantized.packed)
    assert type(quantize_linears(nn.Linear(24, 17))) is Linear4bit
    skipped = quantize_linears(Twice(), skip=["block", "first"], compute_dtype=torch.bfloat16)
    assert type(skipped.block["other"]) is nn.Linear and type(skipped.first) is nn.Linear
    assert type(skipped.lm_head) is Linear4bit and skipped.lm_head.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_quantize_linears_looks_before_it_replaces(value):
    module = Twice()
    with torch.no_grad():
        module.block["other"].weight[3, 4] = value
    with pytest.raises(ValueError, match="^block.other.weight holds values that are not finite"):
        quantize_linears(module)
    assert not any(isinstance(layer, Linear4bit) for layer in module.modules())
    with pytest.raises(TypeError, match="^first.weight must be float32, bfloat16 or float16, got float64"):
        quantize_linears(Twice().double())
    with pytest.raises(ValueError, match="^first.weight is on the meta device"):
        quantize_linears(Twice().to("meta"))


def test_the_repr_of_a_4bit_layer():
    text = repr(four_bit(quant_type="fp4", blocksize=128, compute_dtype=torch.bfloat16))
    for word in ("Linear4bit", "24", "17", "fp4", "128", "nested=True", "bfloat16"):
        assert word in text


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        (dict(linear=torch.ones(3, 4)), TypeError, "linear"),
        (dict(linear=four_bit()), TypeError, "linear"),
        (
            dict(linear=nn.Linear(24, 17, dtype=torch.float64)),
            TypeError,
            "weight must be float32, bfloat16 or float16",
        ),
        (dict(linear=nn.Linear(24, 17, device="meta")), ValueError, "weight is on the meta device"),
        (dict(quant_type="int4"), ValueError, "quant_type"),
        (dict(blocksize=16), ValueError, "blocksize"),
        (dict(blocksize=64.0), ValueError, "blocksize"),
        (dict(nested=1), TypeError, "nested"),
        (
            dict(compute_dtype=torch.float64),
            ValueError,
            "compute_dtype must be None, float32, bfloat16 or float16",
        ),
    ],
    ids=str,
)
def test_bad_arguments_of_a_4bit_layer(arguments, error, name):
    good = dict(linear=nn.Linear(24, 17))
    Linear4bit.from_linear(**good)
    with pytest.raises(error, match=name):
        Linear4bit.from_linear(**good | arguments)


def test_bad_quantized_weights():
    quantized = reference.fourbit_quantize(torch.randn(17, 24))
    with pytest.raises(TypeError, match="quantized must be a FourBitWeight"):
        Linear4bit.from_quantized(torch.zeros(204, 1))
    with pytest.raises(ValueError, match="quantized must have 2 dimensions"):
        Linear4bit.from_quantized(reference.fourbit_quantize(torch.randn(2, 17, 24)))
    with pytest.raises(ValueError, match="quantized: packed has 203 bytes"):
        Linear4bit.from_quantized(dataclasses.replace(quantized, packed=quantized.packed[1:]))
    with pytest.raises(ValueError, match=r"bias has shape \[24\]"):
        Linear4bit.from_quantized(quantized, torch.zeros(24))
