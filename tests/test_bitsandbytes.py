"""Stock bitsandbytes layers, alone and under PEFT, with peftfast against the same without."""

import contextlib
import copy
import inspect
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit, quantize_blockwise
from conftest import bitsandbytes_misreads, generator, on_a_gpu
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast
from peftfast.testing import assert_as_accurate, relative_error

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


class FastCalls(TorchDispatchMode):
    """Counts what really ran: the calls of the fast op, by direction, and bitsandbytes' own."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = self.stock = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.peftfast.fourbit_linear.default
        self.backward += func is torch.ops.peftfast.fourbit_linear_backward.default
        self.stock += func.namespace == "bitsandbytes"
        return func(*args, **(kwargs or {}))


def quantized(
    inputs=96,
    outputs=96,
    *,
    bias=True,
    blocksize=32,
    quant_type="nf4",
    nested=True,
    kind=bnb.nn.Linear4bit,
    **options,
):
    """A layer as bitsandbytes makes it, from a random weight. By default no block straddles rows: see test_shapes."""
    if kind is bnb.nn.Linear4bit:
        options["quant_type"] = quant_type
    layer = kind(inputs, outputs, bias=bias, compress_statistics=nested, **options)
    layer.weight.blocksize = blocksize
    if bias:
        layer.bias.data.normal_()
        layer.bias.requires_grad = False
    layer.support_avx512bf16_for_cpu = False  # whatever the machine: see on_avx512_bf16()
    return layer.to(torch.get_default_device())


def adapted(*layers, **options):
    """The layers, one after the other, under LoRA adapters that are not zero."""
    net = nn.Sequential(*layers)
    net.is_loaded_in_4bit = True  # as transformers tells PEFT
    options = dict(r=5, lora_alpha=8, target_modules=[str(i) for i in range(len(layers))]) | options
    return randomize(get_peft_model(net, LoraConfig(**options)))


def randomize(model, names=("lora_B",)):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def step(model, x, autocast=None):
    """Output and every gradient, of the input too, of one step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
        y = model(x)
    grad_y = torch.randint(-64, 65, y.shape, generator=generator(5)) / 32  # exact in every dtype
    y.backward(grad_y.to(y))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad} | grads


def in_float64(model):
    """The same model with its 4-bit weights decoded, in float64: the oracle."""
    twin = copy.deepcopy(model)
    if isinstance(twin, bnb.nn.Linear4bit):
        return dense(twin)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            twin.set_submodule(name, dense(layer))
    for layer in list(twin.modules()):
        if isinstance(layer, lora.bnb.Linear4bit):
            layer.__class__ = lora.Linear
    return twin.double()


def dense(layer):
    state = copy.copy(layer.weight.quant_state)
    state.dtype = FP32  # of what dequantize_4bit gives
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = dequantize_4bit(layer.weight.data, state)
    linear.weight.requires_grad = False
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=layer.bias.requires_grad)
    return linear.double()


def assert_parity(model, x, autocast=None, slack=1e-7):
    """A step with peftfast is as close to float64 as one without, all of it on the fast path and on the same bytes."""
    if on_a_gpu():
        slack = max(slack, 1e-6)  # either path may add up fp32 in another order
    oracle = step(in_float64(model), x.double())
    before = saved_bytes(model)
    with peftfast.enabled(strict=True), FastCalls() as calls:
        ours = step(model, x, autocast)
    layers = sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())
    assert (calls.forward, calls.backward, calls.stock) == (layers, layers, 0)
    assert saved_bytes(model) == before
    stock = step(model, x, autocast)
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
        name: (t.dtype, t.shape) for name, t in stock.items()
    }
    for name, exact in oracle.items():
        assert_as_accurate(ours[name], stock[name], exact, slack=slack, name=name)


def saved_bytes(model):
    """What the state_dict holds, to the bit. A copy is asked: asking bitsandbytes may change the model."""
    state = copy.deepcopy(model).state_dict()
    return {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).tolist()) for name, t in state.items()}


# -------------------------------------------------------------------------------------------------- parity


formats = pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
computes = pytest.mark.parametrize("compute_dtype", [None, FP32, BF16], ids=str)


@formats
@types
@dtypes
@computes
def test_layer_alone(quant_type, nested, dtype, compute_dtype):
    layer = quantized(quant_type=quant_type, nested=nested, compute_dtype=compute_dtype)
    assert_parity(layer, torch.randn(40, 96).to(dtype))


@formats
@types
@dtypes
@computes
def test_layer_with_adapter(quant_type, nested, dtype, compute_dtype):
    layer = quantized(quant_type=quant_type, nested=nested, compute_dtype=compute_dtype)
    assert_parity(adapted(layer), torch.randn(40, 96).to(dtype))


@pytest.mark.parametrize("compute_dtype", [None, FP16, FP32], ids=str)
def test_fp16(compute_dtype):
    assert_parity(adapted(quantized(compute_dtype=compute_dtype)), torch.randn(40, 96).half())


@pytest.mark.parametrize("kind", [bnb.nn.LinearNF4, bnb.nn.LinearFP4])
def test_subclasses(kind):
    assert_parity(quantized(kind=kind), torch.randn(12, 96))
    assert_parity(adapted(quantized(kind=kind)), torch.randn(12, 96))


@pytest.mark.parametrize("storage", [BF16, FP16, FP32], ids=str)
def test_storage(storage):
    """For FSDP the bytes are declared to be floats."""
    layer = quantized(quant_storage=storage)
    assert layer.weight.dtype == storage
    assert_parity(layer, torch.randn(12, 96))
    assert_parity(adapted(layer), torch.randn(12, 96))


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("inputs, outputs", [(96, 80), (70, 33), (64, 1), (130, 48)], ids=str)
def test_shapes(inputs, outputs, blocksize):
    """Blocks that straddle rows and outputs that are no multiple of anything."""
    if bitsandbytes_misreads(inputs, blocksize):
        pytest.skip("bitsandbytes 0.50.2 misreads blocks that straddle rows on CPUs with AVX-512")
    layer = quantized(inputs, outputs, blocksize=blocksize)
    assert_parity(adapted(layer), torch.randn(9, inputs), slack=2e-7)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (0, 96)], ids=str)
def test_inputs(shape):
    for model in (quantized(), adapted(quantized())):
        x = torch.randn(shape)
        stock = step(model, x)
        with peftfast.enabled(strict=True):
            ours = step(model, x)
        assert ours.keys() == stock.keys()
        for name, expected in stock.items():
            assert ours[name].shape == expected.shape, name
            assert relative_error(ours[name], expected) <= 1e-5, name


@pytest.mark.parametrize("autocast", [BF16, FP16], ids=str)
@pytest.mark.parametrize("compute_dtype", [None, FP32, BF16], ids=str)
def test_autocast(compute_dtype, autocast):
    for dtype in (FP32, autocast):
        x = torch.randn(40, 96).to(dtype)
        assert_parity(quantized(compute_dtype=compute_dtype), x, autocast)
        assert_parity(adapted(quantized(compute_dtype=compute_dtype)), x, autocast)


def test_compute_dtype_is_set_by_the_first_input():
    stock = quantized()
    ours = copy.deepcopy(stock)
    first, second = torch.randn(3, 96).bfloat16(), torch.randn(3, 96)
    expected = stock(first), stock(second)
    with peftfast.enabled(strict=True):
        results = ours(first), ours(second)
    assert ours.compute_type_is_set and ours.compute_dtype == stock.compute_dtype == BF16
    for mine, theirs in zip(results, expected, strict=True):
        assert mine.dtype == theirs.dtype and relative_error(mine, theirs) < 1e-2


@pytest.mark.parametrize("bias_dtype", [FP32, BF16, FP16], ids=str)
def test_the_bias_keeps_its_dtype(bias_dtype):
    """bitsandbytes casts it for good."""
    layer = quantized(compute_dtype=BF16)
    layer.bias.data = layer.bias.data.to(bias_dtype)
    with peftfast.enabled(strict=True):
        ours = layer(torch.ones(2, 96))
    assert layer.bias.dtype == bias_dtype
    stock = layer(torch.ones(2, 96))
    assert layer.bias.dtype == BF16 and relative_error(ours, stock) < 1e-2


def test_trained_biases():
    for options in (dict(bias="all"), dict(bias="lora_only"), dict(lora_bias=True)):
        model = randomize(adapted(quantized(), **options), ["bias"])
        assert_parity(model, torch.randn(40, 96))
        assert any(name.endswith("bias") and p.grad is not None for name, p in model.named_parameters())


def test_frozen_factor():
    model = adapted(quantized())
    lora_layers(model)[0].lora_A.requires_grad_(False)
    assert_parity(model, torch.randn(40, 96))


def test_several_active_adapters():
    model = adapted(quantized())
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    randomize(model, ["second"])
    model.base_model.set_adapter(["default", "second"])
    assert_parity(model, torch.randn(40, 96))


def test_base_layer_that_peft_was_not_told_of():
    """Then PEFT takes it for a dense layer and puts its lora.Linear on it."""
    model = randomize(get_peft_model(nn.Sequential(quantized()), LoraConfig(target_modules=["0"])))
    assert type(lora_layers(model)[0]) is lora.Linear
    assert_parity(model, torch.randn(40, 96))


def test_dropout_has_the_right_mean():
    model = adapted(quantized(32, 16, compute_dtype=BF16), lora_dropout=0.25)
    x = torch.randn(1, 32)
    with torch.no_grad(), peftfast.enabled(strict=True):
        expected = model.eval()(x)
        samples = torch.cat([model.train()(x) for _ in range(3000)])
    standard_error = samples.std(0) / len(samples) ** 0.5
    assert (samples.std(0) > 0).all()
    assert ((samples.mean(0) - expected[0]).abs() < 5 * standard_error + 1e-6).all()


def test_compiled_model():
    torch._dynamo.reset()
    model, x = adapted(quantized(), quantized(96, 32)), torch.randn(7, 96)
    with peftfast.enabled(strict=True):
        eager = model(x)
        ours = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(ours, eager, rtol=0, atol=0)


# ------------------------------------------------------------------------------- what happens between calls


def disabling(model, x):
    with model.disable_adapter():
        yield model(x)
    yield model(x)


def merging(model, x):
    model.merge_adapter()
    yield model(x)
    model.unmerge_adapter()
    yield model(x)
    yield model.merge_and_unload()(x)


def switching(model, x):
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"]))
    randomize(model, ["second"])
    yield model(x)
    model.set_adapter("second")
    yield model(x)
    model.delete_adapter("second")
    yield model(x)


def copying(model, x):
    yield copy.deepcopy(model)(x)
    yield pickle.loads(pickle.dumps(model))(x)


def moving(model, x):
    yield model.bfloat16()(x.bfloat16())
    yield model.float().to("cpu").to(x.device)(x)


def losing_the_quantization_state(model, x):
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.quant_state = layer.weight.quant_state
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    yield model(x)
    assert all(
        isinstance(layer.weight, bnb.nn.Params4bit)
        for layer in model.modules()
        if isinstance(layer, bnb.nn.Linear4bit)
    )


@pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module")
@pytest.mark.parametrize("way", ["enable", "accelerate"])
@pytest.mark.parametrize(
    "life",
    [disabling, merging, switching, copying, moving, losing_the_quantization_state],
    ids=lambda f: f.__name__,
)
def test_life_of_a_model(life, way):
    def results(way=None):
        torch.manual_seed(2)
        model = adapted(quantized(compute_dtype=FP32), quantized(96, 32, compute_dtype=FP32)).eval()
        if way:
            peftfast.enable(strict=True) if way == "enable" else peftfast.accelerate(model)
        torch.manual_seed(3)
        with torch.no_grad(), FastCalls() as calls:
            values = list(life(model, torch.randn(6, 96)))
        peftfast.disable()
        return values, calls

    stock, none = results()
    ours, calls = results(way)
    assert none.forward == 0 and calls.forward == 2 * len(ours)
    for mine, expected in zip(ours, stock, strict=True):
        assert mine.dtype == expected.dtype
        assert relative_error(mine, expected) <= (1e-5 if mine.dtype == FP32 else 1e-2)


# -------------------------------------------------------------------------------- where bitsandbytes fails


repacks = pytest.mark.skipif(on_a_gpu(), reason="bitsandbytes repacks weights on a CPU alone")


def on_avx512_bf16(layer):
    """A layer as on a CPU where bitsandbytes repacks weights in eval mode; the repacking is plain torch."""
    layer.support_avx512bf16_for_cpu = True
    return layer


@repacks
@formats
def test_training_after_eval(nested):
    for model in (quantized(128, 64, nested=nested), adapted(quantized(128, 64, nested=nested))):
        for layer in model.modules():
            on_avx512_bf16(layer)
        x = torch.randn(7, 128)
        before, expected = saved_bytes(model), step(model, x)
        with peftfast.enabled(strict=True):
            with torch.no_grad():
                assert relative_error(model.eval()(x), expected["output"]) < 1e-5
            ours = step(model.train(), x)
        assert saved_bytes(model) == before
        assert ours.keys() == expected.keys()
        for name in expected:
            assert relative_error(ours[name], expected[name]) < 1e-5, name


@repacks
def test_bitsandbytes_does_fail_there():
    """What makes the tests around this one worth their while."""
    layer = on_avx512_bf16(quantized(128, 64, nested=False)).eval()
    before = saved_bytes(layer)
    with contextlib.suppress(Exception), torch.no_grad():  # this machine may lack the kernel
        layer(torch.randn(7, 128))
    assert saved_bytes(layer) != before
    with pytest.raises(AssertionError), torch.no_grad():
        on_avx512_bf16(quantized(outputs=33)).eval()(torch.randn(7, 96))
    with pytest.raises(RuntimeError), torch.no_grad():
        on_avx512_bf16(quantized(70, 64, blocksize=64)).eval()(torch.randn(7, 70))


@repacks
@pytest.mark.parametrize("inputs, outputs", [(96, 33), (70, 64)], ids=["N % 32", "K % blocksize"])
def test_odd_sizes_in_eval(inputs, outputs):
    layer, x = quantized(inputs, outputs), torch.randn(5, inputs)
    expected = layer(x)
    with peftfast.enabled(strict=True), torch.no_grad():
        assert relative_error(on_avx512_bf16(layer).eval()(x), expected) < 1e-5


@repacks
def test_moving_after_eval():
    layer, x = on_avx512_bf16(quantized(128, 64)).eval(), torch.randn(5, 128)
    before, expected = saved_bytes(layer), layer.train()(x)
    with peftfast.enabled(strict=True), torch.no_grad():
        layer.eval()(x)
        layer.to("cpu")
        layer.weight = layer.weight.to("cpu")
        assert saved_bytes(layer) == before
        assert relative_error(layer(x), expected) < 1e-5


def test_any_block_size_of_the_scales():
    layer = quantized(nested=False)
    exact = in_float64(layer)
    state = layer.weight.quant_state
    offset = state.absmax.mean()
    codes, inner = quantize_blockwise(state.absmax - offset, blocksize=64)
    state.absmax, state.offset, state.state2, state.nested = codes, offset, inner, True
    with pytest.raises(NotImplementedError, match="blocksize != 256"):  # bitsandbytes' own refusal
        layer(torch.randn(3, 96))
    x = torch.randn(3, 96)
    with peftfast.enabled(strict=True):
        assert relative_error(layer(x), exact(x.double())) < 0.03  # what 8 bits make of the scales
    state.absmax = torch.full_like(codes, int((inner.code == 0).nonzero()))  # then each scale is the offset
    state.offset = torch.tensor(0.5)
    with peftfast.enabled(strict=True):
        ours = layer(x)
    state.absmax, state.state2, state.nested = torch.full(codes.shape, 0.5), None, False
    assert relative_error(ours, layer(x)) < 1e-6


# ------------------------------------------------------------------------------------------ a whole model


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).save_pretrained(path)
    return path


def qlora(path, compute_dtype=BF16, nested=True, prepare=True, **options):
    """As the usual recipe makes it."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=BF16
    )
    if prepare:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    return randomize(get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options)))


def train(model, steps=10, autocast=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for i in range(steps):
        ids = torch.randint(3, 61, (2, 13), generator=generator(i % 2))
        with torch.autocast(ids.device.type, dtype=autocast) if autocast else nullcontext():
            loss = model.train()(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


RECIPES = {
    "fp32 x, bf16 compute": dict(),
    "fp32 compute": dict(compute_dtype=FP32, nested=False),
    "bf16 x": dict(prepare=False),
    "autocast": dict(autocast=BF16),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_ten_steps(tiny_llama, recipe):
    recipe = dict(recipe)
    autocast = recipe.pop("autocast", None)
    stock = train(qlora(tiny_llama, **recipe), autocast=autocast)
    model = qlora(tiny_llama, **recipe)
    before = {name: t.clone() for name, t in model.state_dict().items() if "lora_" not in name}
    with peftfast.enabled(strict=True), FastCalls() as calls:
        ours = train(model, autocast=autocast)
        report = peftfast.report(model)
    assert calls.stock == 0 and calls.backward == 10 * len(lora_layers(model)) == 140
    assert len(report) == 14 and all(entry.fast for entry in report)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-3)
    assert stock[-2:].mean() < stock[:2].mean() - 0.02
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ------------------------------------------------------------------------------------- report and fallbacks


def fused(model):
    return {entry.name.removeprefix("base_model.model."): entry.fast for entry in peftfast.report(model)}


def test_report_of_layers_alone():
    model = nn.Sequential(quantized(), nn.ReLU(), quantized(96, 7))
    assert [entry.reason for entry in peftfast.report(model)] == ["peftfast is not enabled"] * 2
    with peftfast.enabled():
        assert fused(model) == {"0": True, "2": True}
    assert [entry.kind for entry in peftfast.report(model)] == ["bitsandbytes.Linear4bit"] * 2


def test_report_of_a_base_layer():
    """It is an entry of its own where it runs by itself."""
    model = adapted(quantized(), quantized(96, 32))
    with peftfast.enabled():
        assert fused(model) == {"0": True, "1": True}
        lora_layers(model)[0].lora_A["default"].register_forward_hook(lambda *args: None)
        assert fused(model) == {"0": False, "0.base_layer": True, "1": True}
        with model.disable_adapter():
            assert fused(model) == {"0": False, "0.base_layer": True, "1": False, "1.base_layer": True}
            with FastCalls() as calls:
                model(torch.randn(3, 96))
            assert calls.forward == 2 and calls.stock == 0


class Doubling(bnb.nn.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed():
    layer = Doubling(96, 80, quant_type="nf4").to(torch.get_default_device())
    return layer


def transposed():
    layer = quantized(outputs=80, nested=False)
    packed, state = quantize_4bit(torch.randn(96, 80), quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(packed, quant_state=state, bnb_quantized=True)
    return layer


def half_scales():
    if on_a_gpu():
        pytest.skip("bitsandbytes' kernels take scales in fp32 alone there")
    layer = quantized(nested=False)
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.half()
    return layer


FALLBACKS = {
    "subclass": (subclassed, FP32, "Doubling"),
    "quantized from the transpose": (transposed, FP32, "shape"),
    "scales in fp16": (half_scales, FP32, "absmax.*float16"),
    "autocast to another dtype": (quantized, FP16, "autocast"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", FALLBACKS.values(), ids=FALLBACKS.keys())
@pytest.mark.parametrize("with_adapter", [False, True], ids=["alone", "adapted"])
def test_fallback(case, with_adapter):
    build, dtype, reason = case
    layer, x = build(), torch.randn(5, 96).to(dtype)
    model = adapted(layer) if with_adapter else nn.Sequential(layer)

    def run():
        with torch.autocast(x.device.type, dtype=BF16) if dtype == FP16 else nullcontext():
            return model(x)

    stock = run()
    with peftfast.enabled():
        assert torch.equal(run(), stock)
        entries = list(peftfast.report(model))
        with FastCalls() as calls:
            run()
    assert calls.forward == 0
    assert not entries[0].fast and re.search(reason, entries[0].reason, re.I)
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match=f"(?i)0.*{reason}"):
        run()


def test_weight_that_is_not_quantized_yet():
    layer = bnb.nn.Linear4bit(96, 80)
    with peftfast.enabled(), pytest.raises(AssertionError):  # bitsandbytes' own
        layer(torch.randn(2, 96))
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match="not quantized yet"):
        layer(torch.randn(2, 96))


@repacks
def test_weight_that_was_repacked_before():
    model = adapted(quantized(128, 64))
    layer = lora_layers(model)[0].base_layer
    layer.weight.data, layer.weight.quant_state = bnb.functional._convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with peftfast.enabled(strict=True):
        for entry in peftfast.report(model):
            assert not entry.fast and "repacked" in entry.reason
        with pytest.raises(peftfast.FallbackError, match="0 cannot .* repacked"):
            model(torch.randn(3, 128))


def test_bfloat16_adapters_under_fp32_input():
    model = adapted(quantized(compute_dtype=BF16))
    lora_layers(model)[0].lora_A.bfloat16(), lora_layers(model)[0].lora_B.bfloat16()
    x = torch.randn(3, 96)
    stock = model(x)
    with peftfast.enabled(), FastCalls() as calls:
        ours = model(x)
        assert "bfloat16" in peftfast.report(model)[0].reason
    assert calls.forward == 1 and calls.stock == 0  # the base layer alone is still on the fast path
    assert relative_error(ours, stock) < 1e-2


def test_a_wrong_input_is_bitsandbytes_error():
    layer = quantized()
    with pytest.raises(RuntimeError) as stock:
        layer(torch.randn(3, 95))
    with peftfast.enabled(), pytest.raises(RuntimeError, match=re.escape(str(stock.value))):
        layer(torch.randn(3, 95))


# ------------------------------------------------------------------------------------- enable and disable


def every_class_attribute():
    classes = {
        c for m in (bnb.nn.modules, lora.bnb, lora.layer) for c in vars(m).values() if inspect.isclass(c)
    }
    return {(c, name): id(value) for c in classes for name, value in vars(c).items()}


def test_disable_restores_everything():
    before, forward = every_class_attribute(), bnb.nn.Linear4bit.forward
    peftfast.enable()
    assert bnb.nn.Linear4bit.forward is not forward
    assert inspect.signature(bnb.nn.Linear4bit.forward) == inspect.signature(forward)
    peftfast.disable()
    assert every_class_attribute() == before


def test_nothing_of_a_layer_changes():
    layer = quantized(compute_dtype=FP32)
    before = {name: id(value) for name, value in layer.__dict__.items()}, str(layer), type(layer.weight)
    with peftfast.enabled(strict=True):
        layer(torch.randn(2, 96))
        assert b"peftfast" not in pickle.dumps(layer)
    assert (
        {name: id(value) for name, value in layer.__dict__.items()},
        str(layer),
        type(layer.weight),
    ) == before


def test_accelerate_is_for_one_model():
    model, other = nn.Sequential(quantized()), nn.Sequential(quantized())
    assert peftfast.accelerate(model) is model
    twin = copy.deepcopy(model)
    for net, fast in ((model, 1), (twin, 1), (other, 0)):
        with FastCalls() as calls:
            net(torch.randn(2, 96))
        assert (calls.forward, fused(net)) == (fast, {"0": bool(fast)})


def test_without_bitsandbytes():
    script = """
import sys
sys.modules["bitsandbytes"] = None  # as if it were not installed
import torch, peftfast
peftfast.enable(strict=True)
from peft import LoraConfig, get_peft_model
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 4)), LoraConfig(target_modules=["0"]))
model(torch.randn(2, 8))
assert all(entry.fast for entry in peftfast.report(model)) and len(peftfast.report(model)) == 1
peftfast.disable()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
