"""Batches in which every sample names its adapter: PEFT's adapter_names on the fast path, against PEFT itself."""

import copy

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from conftest import generator
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import peftfast
from peftfast.nn import Linear4bit, quantize_linears
from peftfast.testing import assert_as_accurate, relative_error

FP32, BF16 = torch.float32, torch.bfloat16
INPUTS, OUTPUTS = 70, 33
ORDERS = {
    "in a row": ["a", "a", "b", "__base__", "c"],
    "shuffled": ["b", "a", "__base__", "b", "c", "a", "b"],
    "one": ["b", "b"],
    "an adapter of another layer": ["other", "a", "other", "b"],
}


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


class FastCalls(TorchDispatchMode):
    """Counts the grouped operator's calls, by direction."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.peftfast.grouped_linear.default
        self.backward += func is torch.ops.peftfast.grouped_linear_backward.default
        return func(*args, **(kwargs or {}))


def fourbit(dtype):
    return quantize_linears(nn.Linear(INPUTS, OUTPUTS, dtype=dtype), compute_dtype=dtype)


def bitsandbytes(dtype):
    return bnb.nn.Linear4bit(INPUTS, OUTPUTS, compute_dtype=dtype, quant_type="nf4").to(
        torch.get_default_device()
    )


LAYERS = {
    "linear": lambda dtype: nn.Linear(INPUTS, OUTPUTS, dtype=dtype),
    "conv1d": lambda dtype: Conv1D(OUTPUTS, INPUTS).to(dtype),
    "fourbit": fourbit,
    "bitsandbytes": bitsandbytes,
}
layers = pytest.mark.parametrize("kind", LAYERS)


def randomize(model):
    """Every adapter trains, and none is zero: PEFT lets only the active ones train."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2).requires_grad_()
    return model


def adapted(kind="linear", dtype=FP32, **options):
    """One layer with three adapters, and a second layer whose adapter the first does not have."""
    net = nn.Sequential(LAYERS[kind](dtype), nn.Linear(OUTPUTS, 8, dtype=dtype))
    net.is_loaded_in_4bit = kind == "bitsandbytes"  # as transformers tells PEFT
    model = get_peft_model(
        net,
        LoraConfig(r=3, lora_alpha=5, target_modules=["0"], fan_in_fan_out=kind == "conv1d", **options),
        adapter_name="a",
    )
    model.add_adapter("b", LoraConfig(r=6, lora_alpha=7, target_modules=["0", "1"], **options))
    model.add_adapter("c", LoraConfig(r=1, use_rslora=True, target_modules=["0"], **options))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["1"], **options))
    return randomize(model).eval()


def decoded(model, dtype):
    """The same model with the values of a 4-bit weight in a dense one."""
    twin = copy.deepcopy(model)
    layer = twin.base_model.model[0]
    base = layer.base_layer
    if isinstance(base, (Linear4bit, bnb.nn.Linear4bit)):
        dense = nn.Linear(INPUTS, OUTPUTS)
        if isinstance(base, Linear4bit):
            weight = base.dequantize(FP32)
        else:
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float()
        dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), base.bias
        layer.base_layer = dense.to(dtype)
    return twin


def in_float64(model):
    return decoded(model, FP32).double()


def step(model, x, names):
    """Output and every gradient, of the input too."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x, adapter_names=names)
    grad_y = torch.randint(-64, 65, y.shape, generator=generator(5)) / 32
    y.backward(grad_y.to(y.dtype))  # exact in every dtype
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad} | grads


def assert_parity(model, x, names, calls=2):
    # On bitsandbytes' own layer PEFT's mixed batches have no gradient: autograd refuses how they are put together.
    stock, exact = step(decoded(model, x.dtype), x, names), step(in_float64(model), x.double(), names)
    with peftfast.enabled(strict=True), FastCalls() as counted:
        ours = step(model, x, names)
    assert (counted.forward, counted.backward) == (calls, calls)
    assert ours.keys() == stock.keys()
    for name, value in stock.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape, name
        assert_as_accurate(ours[name], value, exact[name], slack=5e-7 if x.dtype == FP32 else 2e-4, name=name)


@layers
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_gives_what_peft_gives(kind, dtype, order):
    names = ORDERS[order]
    x = torch.randn(len(names), 33, INPUTS).to(dtype)
    assert_parity(adapted(kind, dtype), x, names)


@pytest.mark.parametrize("kind", ["linear", "fourbit"])
def test_a_compiled_layer_is_one_graph(kind):
    torch._dynamo.reset()
    layer, names = adapted(kind).base_model.model[0], ORDERS["shuffled"]

    def run(x):
        return layer(x, adapter_names=names)

    x = torch.randn(len(names), 3, INPUTS)
    with peftfast.enabled(strict=True):
        assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x))


def test_compiled_model():
    """In several graphs: PEFT puts hooks on a model's layers in every forward."""
    torch._dynamo.reset()
    model, names = adapted(), ORDERS["shuffled"]
    x = torch.randn(len(names), 3, INPUTS)
    with peftfast.enabled(strict=True):
        expected = step(model, x, names)
        ours = step(torch.compile(model, backend="eager"), x, names)
    for name, value in expected.items():
        prefix = "" if name in ("output", "input") else "_orig_mod."
        assert torch.equal(ours[prefix + name], value), name


@pytest.mark.parametrize("shape", [(), (1,), (3, 2)], ids=str)
def test_samples_of_any_shape(shape):
    names = ORDERS["shuffled"]
    assert_parity(adapted(), torch.randn(len(names), *shape, INPUTS), names)
    strided = torch.randn(INPUTS, *shape, len(names)).movedim(-1, 0).movedim(1, -1)
    assert_parity(adapted(), strided, names)


def test_adapters_of_the_base_dtype():
    """Without PEFT's cast of adapters to float32; and one of each dtype."""
    model = adapted("linear", BF16)
    layer = model.base_model.model[0]
    x, names = torch.randn(7, 9, INPUTS).to(BF16), ORDERS["shuffled"]
    layer.lora_A["a"].to(BF16), layer.lora_B["a"].to(BF16)
    assert_parity(model, x, names)
    assert_parity(model.to(BF16), x, names)


def test_each_adapter_gives_what_it_gives_alone():
    """Without PEFT's mixed batches: every sample in a batch of its own, its adapter being the active one."""
    model, names = adapted(), ORDERS["shuffled"]
    x = torch.randn(len(names), 4, INPUTS)
    alone = []
    for name, sample in zip(names, x):
        if name == "__base__":
            with model.disable_adapter():
                alone.append(model(sample))
        else:
            model.set_adapter(name)
            alone.append(model(sample))
    with peftfast.enabled(strict=True):
        assert relative_error(model(x, adapter_names=names), torch.stack(alone).double()) < 1e-6


def test_the_base_alone_is_not_touched():
    model, x = adapted(), torch.randn(3, 4, INPUTS)
    stock = model(x, adapter_names=["__base__"] * 3)
    with peftfast.enabled(strict=True), FastCalls() as calls:
        assert torch.equal(model(x, adapter_names=["__base__"] * 3), stock)
    assert calls.forward == 0


def test_autocast():
    model, names = adapted(), ORDERS["shuffled"]
    x = torch.randn(len(names), 5, INPUTS)
    with torch.autocast(x.device.type, dtype=BF16):
        stock = step(model, x, names)
        with peftfast.enabled(strict=True):
            ours = step(model, x, names)
    exact = step(in_float64(model), x.double(), names)
    for name, value in stock.items():
        assert ours[name].dtype == value.dtype
        assert_as_accurate(ours[name], value, exact[name], name=name)


def test_scaling_may_be_a_tensor_and_change():
    model, names = adapted(), ORDERS["shuffled"]
    layer = model.base_model.model[0]
    layer.scaling["a"], layer.scaling["b"] = torch.tensor(1.7), -0.3
    assert_parity(model, torch.randn(len(names), 5, INPUTS), names)


def test_dropout_has_the_right_mean():
    """PEFT takes no adapter_names in training; its layers, called on their own, do."""
    layer = adapted(lora_dropout=0.4).base_model.model[0]
    x, names = torch.randn(4, 3, INPUTS), ["a", "b", "a", "__base__"]
    exact = layer(x, adapter_names=names)
    layer.train()
    with peftfast.enabled(strict=True), torch.no_grad():
        runs = [layer(x, adapter_names=names) for _ in range(400)]
        torch.manual_seed(3)
        first = layer(x, adapter_names=names)
        torch.manual_seed(3)
        assert torch.equal(layer(x, adapter_names=names), first)
    assert torch.equal(runs[0][3], runs[1][3]) and not torch.equal(runs[0][:3], runs[1][:3])
    assert relative_error(torch.stack(runs).mean(0), exact.double()) < 0.06


# ---- what falls back, and what PEFT refuses -----------------------------------------------------------------


def other_dropout(layer):
    layer.lora_dropout["b"] = nn.Dropout(0.3).train()


def hooked(layer):
    layer.lora_A["b"].register_forward_hook(lambda *_: None)


def biased(layer):
    layer.lora_B["b"].bias = nn.Parameter(torch.randn(OUTPUTS))


@pytest.mark.parametrize(
    "change, reason",
    [(other_dropout, "different dropout"), (hooked, "hooks"), (biased, "b has a bias")],
    ids=["dropout", "hook", "bias"],
)
def test_what_falls_back_says_why(change, reason):
    model, names = adapted(), ORDERS["shuffled"]
    x, layer = torch.randn(len(names), 5, INPUTS), model.base_model.model[0]
    change(layer)
    torch.manual_seed(1)
    stock = model(x, adapter_names=names)
    torch.manual_seed(1)
    with peftfast.enabled():
        assert relative_error(model(x, adapter_names=names), stock.double()) < 1e-6
        (report,) = (entry for entry in peftfast.report(model) if entry.name.endswith("0"))
        assert not report.fast and reason in report.reason
    with peftfast.enabled(strict=True):
        with pytest.raises(peftfast.FallbackError, match=reason):
            model(x, adapter_names=names)
        model(x, adapter_names=["a", "c", "a", "a", "__base__", "c", "a"])  # b is what falls back


def test_adapters_that_are_active_do_not_matter():
    """Whether the layer has an active adapter says nothing about the adapters that the samples name."""
    model, x = adapted(), torch.randn(2, 4, INPUTS)
    model.set_adapter("other")
    randomize(model)
    assert_parity(model, x, ["a", "b"])
    hooked(model.base_model.model[0])
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match="hooks"):
        model(x, adapter_names=["a", "b"])


def test_what_peft_refuses():
    model, x = adapted(), torch.randn(2, 4, INPUTS)
    with peftfast.enabled(strict=True):
        with pytest.raises(ValueError, match="non-existing"):
            model(x, adapter_names=["a", "nobody"])
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            model(x, adapter_names=["a"])
        with pytest.raises(ValueError, match="training mode"):
            model.train()(x, adapter_names=["a", "b"])
        model.eval().merge_adapter(["a"])
        with pytest.raises(ValueError, match="merged"):
            model(x, adapter_names=["a", "b"])


# ---- whole models -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    everywhere = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=everywhere), "a")
    model.add_adapter("b", LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    return randomize(model).eval()


def test_a_model(llama):
    ids, names = torch.randint(3, 61, (4, 7)), ["b", "a", "__base__", "b"]
    stock = llama(input_ids=ids, adapter_names=names).logits
    with peftfast.enabled(strict=True), FastCalls() as calls:
        ours = llama(input_ids=ids, adapter_names=names).logits
    assert calls.forward == 14
    assert relative_error(ours, stock.double()) < 3e-6
    assert len({tuple(row) for row in ours[:, 0].tolist()}) == 4


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(llama, beams):
    ids = torch.randint(3, 61, (1, 5)).expand(4, -1)
    how = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=["b", "a", "__base__", "b"],
        max_new_tokens=8, do_sample=False, num_beams=beams,
    )  # fmt: skip
    stock = llama.generate(**how)
    with peftfast.enabled(strict=True), FastCalls() as calls:
        ours = llama.generate(**how)
    assert torch.equal(ours, stock) and calls.forward >= 14
    assert torch.equal(ours[0], ours[3]) and not torch.equal(ours[0], ours[1])
