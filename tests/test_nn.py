"""peftfast.nn.LoraLinear against PEFT's layer with the same weights."""

import copy
import math
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peftfast.nn import LoraLinear
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
