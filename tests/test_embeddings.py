"""Embeddings and output heads in 4 and 8 bits: the layers, models that load with them, adapters and training."""

import copy
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peftfast
from peftfast import FourBitConfig, reference
from peftfast.cli.errors import UserError
from peftfast.cli.settings import TrainSettings
from peftfast.cli.train import train
from peftfast.nn import (
    Embedding4bit,
    Embedding8bit,
    Linear4bit,
    Linear8bit,
    quantize_embeddings,
    quantize_linears,
)
from peftfast.ops import (
    EightBitWeight,
    eightbit,
    eightbit_embedding,
    eightbit_linear,
    eightbit_quantize,
    fourbit_embedding,
    fourbit_quantize,
)
from peftfast.testing import assert_as_accurate, peak_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = ["4bit", "8bit"]
IDS = torch.arange(12)[None] % 64


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


@pytest.fixture
def small_panels(monkeypatch):
    """So that a small weight is several panels in both directions, the last of each not full."""
    monkeypatch.setattr(eightbit, "PANEL", 500)


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


# ---- the format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_codes_scales_and_values_are_those_of_bitsandbytes(dtype, small_panels):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(70, 48, dtype=dtype) * torch.logspace(-4, 3, 70).unsqueeze(1).to(dtype)
    codes, scales, _ = functional.int8_vectorwise_quant(weight.clone())
    ours = eightbit_quantize(weight)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax, scales)
    assert torch.equal(reference.eightbit_dequantize(ours), functional.int8_vectorwise_dequant(codes, scales))
    assert (reference.eightbit_dequantize(ours) - weight.float()).abs().amax(1).le(scales / 253).all()


def test_a_linear_layer_in_8_bits_is_that_of_bitsandbytes():
    modules = pytest.importorskip("bitsandbytes.nn")
    dense = nn.Linear(48, 70).half()
    theirs = modules.Linear8bitLt(48, 70, has_fp16_weights=False)
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    ours = Linear8bit.from_linear(dense)
    state = theirs.state_dict()
    assert torch.equal(ours.weight, state["weight"]) and torch.equal(ours.SCB, state["SCB"])
    empty = Linear8bit(48, 70).half()
    empty.load_state_dict(state)  # their "weight_format" included
    assert_same_state(empty.state_dict(), ours.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_an_embedding_in_4_bits_is_that_of_bitsandbytes():
    modules = pytest.importorskip("bitsandbytes.nn")
    dense = nn.Embedding(70, 64)
    theirs = modules.Embedding4bit(70, 64, quant_type="nf4")
    theirs.load_state_dict(dense.state_dict())
    theirs = theirs.to("cpu")
    ours = Embedding4bit.from_embedding(dense, nested=False)
    assert torch.equal(ours.weight, theirs.weight.data.view(70, 32))
    assert torch.equal(ours(IDS), theirs(IDS))


def test_rows_of_zeros_and_rows_too_small_to_scale():
    weight = torch.randn(4, 6)
    weight[1], weight[2] = 0, 1e-39
    quantized = eightbit_quantize(weight)
    values = reference.eightbit_dequantize(quantized)
    assert torch.equal(values[1], torch.zeros(6)) and torch.isfinite(values).all()
    assert (values[2] - weight[2]).abs().max() < 1e-38


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    "columns, blocksize", [(64, 64), (128, 32), (48, 64), (36, 64), (2, 4096), (192, 128)]
)
def test_rows_are_looked_up_bit_for_bit(columns, blocksize, nested, dtype):
    weight = torch.randn(300, columns, dtype=dtype)
    quantized = fourbit_quantize(weight, blocksize=blocksize, nested=nested)
    in_8_bits = eightbit_quantize(weight)
    some = torch.randint(300, (3, 7))
    for ids in (some, some.int(), some[0, 0], some[:0]):
        rows = fourbit_embedding(ids, quantized)
        assert rows.dtype == dtype and torch.equal(rows, reference.fourbit_embedding(ids.long(), quantized))
        rows = eightbit_embedding(ids, in_8_bits, dtype)
        assert torch.equal(rows, reference.eightbit_embedding(ids.long(), in_8_bits, dtype))


def test_only_the_rows_that_are_asked_for_are_decoded():
    embedding, ids = nn.Embedding(10_000, 512), torch.arange(256)  # 20 MiB, of which half of one is asked for
    for kind in (Embedding4bit, Embedding8bit):
        look_up = partial(kind.from_embedding(embedding), ids)
        look_up()
        assert peak_memory(look_up) < 6 << 20


# ---- the linear layer in 8 bits -----------------------------------------------------------------------------


def gradients(function, x, bias, grad):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = function(x, bias)
    return [y.detach(), *torch.autograd.grad(y, [x, bias], grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inputs, outputs", [(5, 48, 70), (1, 33, 129), (0, 8, 6), (19, 5, 211)])
def test_is_the_layer_of_the_dequantized_weight(rows, inputs, outputs, dtype, small_panels):
    weight = eightbit_quantize(torch.randn(outputs, inputs, dtype=dtype) * inputs**-0.5)
    x, bias = torch.randn(rows, inputs, dtype=dtype), torch.randn(outputs, dtype=dtype)
    grad = torch.randn(rows, outputs, dtype=dtype)
    ours = gradients(lambda x, bias: eightbit_linear(x, weight, bias=bias), x, bias, grad)
    dense = reference.eightbit_dequantize(weight, dtype)
    eager = gradients(lambda x, bias: F.linear(x, dense, bias), x, bias, grad)
    exact = reference.eightbit_dequantize(weight, torch.float64)
    oracle = gradients(lambda x, bias: F.linear(x, exact, bias), x.double(), bias.double(), grad)
    for name, one, other, right in zip(("y", "grad_x", "grad_bias"), ours, eager, oracle):
        assert one.dtype == dtype
        assert_as_accurate(one, other, right, slack=2e-7, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_over_8_bits(dtype, small_panels):
    weight = eightbit_quantize(torch.randn(70, 48) / 7)
    x = torch.randn(2, 5, 96, dtype=dtype)[..., ::2].requires_grad_()
    A, B = (torch.randn(shape).requires_grad_() for shape in ((4, 48), (70, 4)))
    seed, grad = torch.tensor([7]), torch.randn(2, 5, 70)

    def results(function, dtype=None):
        inputs = [t.to(dtype) if dtype else t for t in (x, A, B)]
        y = function(inputs[0], weight, *inputs[1:], 0.5, dropout=0.3, seed=seed)
        return [y, *torch.autograd.grad(y, [x, A, B], grad.to(y.dtype))]

    names = ("y", "grad_x", "grad_A", "grad_B")
    oracle, eager = results(reference.eightbit_linear, torch.float64), results(reference.eightbit_linear)
    for name, one, other, right in zip(names, results(eightbit_linear), eager, oracle):
        assert_as_accurate(one, other, right, slack=3e-7, name=name)


def test_never_exists_whole(monkeypatch):
    monkeypatch.setattr(eightbit, "PANEL", 1 << 18)
    codes = torch.ones(24_000, 512, dtype=torch.int8)  # 47 MiB in float32
    weight = EightBitWeight(codes, torch.ones(24_000))
    x, grad = torch.randn(4, 512, requires_grad=True), torch.randn(4, 24_000)

    def step():
        eightbit_linear(x, weight).backward(grad)

    step()
    assert peak_memory(step) < 16 << 20


def test_autocast_and_a_second_derivative():
    layer, x = Linear8bit.from_linear(nn.Linear(48, 70)), torch.randn(3, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, eightbit_linear(x.bfloat16(), layer.quantized_weight, bias=layer.bias))
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_compiled_and_without_memory():
    torch._dynamo.reset()
    for how in BITS:
        model = quantize_embeddings(small(), how, names=["embedding", "head"])
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(IDS), model(IDS))
        with FakeTensorMode(allow_non_fake_inputs=True):
            out = model(torch.zeros(2, 5, dtype=torch.int64))
            assert out.shape == (2, 5, 64) and out.dtype == torch.float32
        meta = model.to("meta")
        assert meta.embedding.weight.is_meta and meta.embedding.is_empty and meta.head.is_empty


@pytest.mark.parametrize("how", BITS)
def test_a_weight_without_values_has_its_size(how):
    model = quantize_embeddings(small(), how, names=["embedding"])
    held = model.embedding.quantized_weight
    model.embedding.assign(held.to("meta"))
    model.head.share(model.embedding)
    assert not model.head.is_empty and model.head.quantized_weight.nbytes == held.nbytes
    assert model.embedding(IDS.to("meta")).shape == (1, 12, 48)


# ---- the layers ---------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 48), nn.Linear(48, 64, bias=not tied)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def small(tied=True):
    return Small(tied)


def made(how, **options):
    format = dict(nested=False) if how == "4bit" else {}
    return (Embedding4bit if how == "4bit" else Embedding8bit)(64, 48, **format | options)


@pytest.mark.parametrize("how", BITS)
def test_a_tied_pair_in_memory(how):
    dense = small()
    model = quantize_embeddings(copy.deepcopy(dense), how, names=["head"])
    assert model.embedding.weight is model.head.weight and not model.head.weight.requires_grad
    assert sum(p.numel() for p in model.parameters()) == 64 * 48 // (2 if how == "4bit" else 1)
    dense.embedding.weight.data = model.embedding.dequantize()
    torch.testing.assert_close(model(IDS), dense(IDS))
    for other in (copy.deepcopy(model), model.bfloat16()):
        assert other.embedding.weight is other.head.weight
    assert model(IDS).dtype == torch.bfloat16 and model.embedding.dequantize().dtype == torch.float32
    if how == "8bit":
        assert model.head.SCB.dtype == torch.float32 and model.head.SCB is model.embedding.SCB


@pytest.mark.parametrize("how", BITS)
def test_a_pair_with_two_weights(how):
    dense = small(tied=False)
    model = quantize_embeddings(copy.deepcopy(dense), how, names=["embedding", "head"])
    assert model.embedding.weight is not model.head.weight
    assert torch.equal(model.head.bias, dense.head.bias)
    error = (model(IDS) - dense(IDS)).norm() / dense(IDS).norm()
    assert 0 < error < (0.3 if how == "4bit" else 0.03)


@pytest.mark.parametrize("how", BITS)
def test_state_dicts_come_back_bit_for_bit(how):
    model = quantize_embeddings(small(tied=False), how, names=["embedding", "head"])
    state = copy.deepcopy(model.state_dict())
    other = quantize_embeddings(small(tied=False), how, names=["embedding", "head"])
    other.load_state_dict(state)
    assert_same_state(other.state_dict(), state)
    empty = made(how, nested=True) if how == "4bit" else made(how)
    assert empty.is_empty
    with pytest.raises(RuntimeError, match="no weight yet"):
        empty(IDS)
    empty.load_state_dict(model.embedding.state_dict())
    assert torch.equal(empty(IDS), model.embedding(IDS))
    assert empty.load_state_dict({}, strict=False).missing_keys[0] == "weight"


@pytest.mark.parametrize("how", BITS)
def test_set_weight_tells_its_error(how):
    layer = made(how)
    dense = torch.randn(64, 48)
    error = layer.set_weight(dense)
    assert error == pytest.approx(
        float((layer.dequantize(torch.float32) - dense).norm() / dense.norm()), rel=1e-5
    )
    before = layer.dequantize(torch.float32)
    for wrong, message in ((torch.zeros(3, 3), "dense has shape"), (dense * float("nan"), "not finite")):
        with pytest.raises(ValueError, match=message):
            layer.set_weight(wrong)
    assert torch.equal(layer.dequantize(torch.float32), before)


@pytest.mark.parametrize("how", BITS)
def test_ids_out_of_range(how):
    layer = made(how)
    layer.set_weight(torch.randn(64, 48))
    for wrong in (64, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))
    with pytest.raises(TypeError, match="ids must be int64 or int32"):
        layer(torch.tensor([1.0]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(SCB=None), "SCB is missing"),
        (dict(weight=None), "weight is missing"),
        (dict(weight=torch.zeros(64, 47, dtype=torch.int8)), "weight has shape"),
        (dict(weight=torch.zeros(64, 48)), "codes must be int8, got float32"),
        (dict(SCB=torch.zeros(63)), "absmax has shape"),
        (dict(SCB=-torch.ones(64)), "no magnitudes"),
        (dict(weight_format=torch.tensor(1, dtype=torch.uint8)), "weight_format is 1"),
    ],
    ids=str,
)
def test_a_bad_8_bit_state_is_refused_whole(change, message):
    layer = made("8bit")
    layer.set_weight(torch.randn(64, 48))
    before = copy.deepcopy(layer.state_dict())
    state = {name: value for name, value in (before | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), before)


class Scaled(nn.Embedding):
    pass


@pytest.mark.parametrize(
    "act, error, message",
    [
        (lambda: Embedding4bit(8, 5), ValueError, "embedding_dim must be even"),
        (lambda: Embedding4bit(8, 4, blocksize=48), ValueError, "blocksize"),
        (lambda: Embedding8bit(8, 4, padding_idx=9), ValueError, "padding_idx is 9"),
        (lambda: Embedding8bit(8, 4, dtype=torch.float64), TypeError, "dtype must be"),
        (lambda: Embedding8bit.from_embedding(Scaled(8, 4)), TypeError, "got Scaled"),
        (lambda: Embedding4bit.from_embedding(nn.Embedding(8, 4, max_norm=1.0)), ValueError, "max_norm"),
        (lambda: Linear8bit.from_linear(Linear4bit(4, 8)), TypeError, "must be a dense"),
        (lambda: eightbit_quantize(torch.randn(4)), ValueError, "2 dimensions"),
        (lambda: eightbit_quantize(torch.full((2, 2), torch.inf)), ValueError, "not finite"),
        (
            lambda: eightbit_linear(torch.randn(2, 3), eightbit_quantize(torch.randn(4, 5))),
            ValueError,
            "5 input",
        ),
        (lambda: quantize_embeddings(small(), "3bit", names=["head"]), ValueError, "embeddings must be"),
        (lambda: quantize_embeddings(small()), TypeError, "named by names"),
        (lambda: Linear8bit(48, 64).share(Linear8bit(48, 65)), ValueError, "shape"),
        (lambda: Linear8bit(48, 64).share(Linear4bit(48, 64)), ValueError, "4 bits"),
        (lambda: FourBitConfig(embeddings="2bit"), ValueError, "embeddings must be '4bit' or '8bit'"),
    ],
)
def test_bad_arguments(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_all_is_looked_at_before_the_first_is_replaced():
    model = small(tied=False)
    model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="head.weight holds values that are not finite"):
        quantize_embeddings(model, "8bit", names=["embedding", "head"])
    model.norm = nn.LayerNorm(48)
    with pytest.raises(TypeError, match="norm is a LayerNorm"):
        quantize_embeddings(model, "8bit", names=["embedding", "norm"])
    assert type(model.embedding) is nn.Embedding


# ---- models of transformers -----------------------------------------------------------------------------------


LLAMA = dict(
    vocab_size=64, hidden_size=48, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
)  # fmt: skip


def build(kind, **options):
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=36, n_layer=1, n_head=2, n_positions=32))
    if kind == "t5":
        sizes = dict(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=kind == "tied", **options))


def load(path, config=None, **options):
    kind = AutoModelForSeq2SeqLM if str(path).endswith("-t5") else AutoModelForCausalLM
    if config is not None:
        options["quantization_config"] = config
    return kind.from_pretrained(path, **options)


def loaded(kind, folder, how, dtype=torch.float32, **options):
    build(kind).to(dtype).save_pretrained(folder / f"dense-{kind}")
    return load(folder / f"dense-{kind}", FourBitConfig(embeddings=how, **options), dtype=dtype)


def embeddings_of(model):
    """The layers of the model over its quantized embeddings, by name."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (Embedding4bit, Embedding8bit)) or module is head
    }


INPUTS = {"t5": dict(input_ids=IDS, decoder_input_ids=IDS)}


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("kind, layers", [("untied", 2), ("tied", 2), ("gpt2", 2), ("t5", 4)])
def test_loads_saves_and_loads(kind, layers, how, tmp_path):
    model = loaded(kind, tmp_path, how)
    found = embeddings_of(model)
    assert len(found) == layers and {layer.bits for layer in found.values()} == {int(how[0])}
    assert len({layer.weight for layer in found.values()}) == (2 if kind == "untied" else 1)
    held = peftfast.report(model).fourbit if how == "4bit" else peftfast.report(model).eightbit
    assert {name: held[name] for name in found} == {
        name: "embedding" if isinstance(layer, nn.Embedding) else "linear layer"
        for name, layer in found.items()
    }
    model.save_pretrained(tmp_path / f"quantized-{kind}")
    again = load(tmp_path / f"quantized-{kind}")
    assert_same_state(again.state_dict(), model.state_dict())
    assert len({layer.weight for layer in embeddings_of(again).values()}) == (2 if kind == "untied" else 1)
    inputs = INPUTS.get(kind, dict(input_ids=IDS))
    assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    written = json.loads((tmp_path / f"quantized-{kind}" / "config.json").read_text())["quantization_config"]
    assert written["embeddings"] == how and written["quant_method"] != "bitsandbytes"
    stored = sum(file.stat().st_size for file in (tmp_path / f"quantized-{kind}").glob("*.safetensors"))
    names = load_file(tmp_path / f"quantized-{kind}" / "model.safetensors").keys()
    assert any(name.startswith("lm_head") for name in names) == (kind == "untied") and stored


@pytest.mark.parametrize("how", BITS)
def test_the_bytes_are_those_of_the_model_in_memory(how, tmp_path):
    model = loaded("tied", tmp_path, how, torch.bfloat16)
    memory = quantize_embeddings(
        quantize_linears(load(tmp_path / "dense-tied", dtype=torch.bfloat16), compute_dtype=torch.bfloat16),
        how,
    )
    if how == "4bit":
        memory.lm_head.compute_dtype = model.lm_head.compute_dtype
    assert_same_state(model.state_dict(), memory.state_dict())
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert model.get_memory_footprint() < load(tmp_path / "dense-tied").get_memory_footprint() / 3


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_counting_and_dequantizing(how, kind, tmp_path):
    model = loaded(kind, tmp_path, how)
    dense = load(tmp_path / f"dense-{kind}")
    for options in ({}, dict(exclude_embeddings=True), dict(only_trainable=True)):
        wanted = 0 if "only_trainable" in options else dense.num_parameters(**options)
        if "only_trainable" not in options:
            assert model.num_parameters(**options) == wanted
    expected = model(IDS).logits
    restored = model.dequantize()
    assert type(restored.model.embed_tokens) is nn.Embedding and type(restored.lm_head) is nn.Linear
    assert (restored.lm_head.weight is restored.model.embed_tokens.weight) == (kind == "tied")
    torch.testing.assert_close(restored(IDS).logits, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", BITS)
def test_resizing_is_refused_unless_nothing_changes(how, tmp_path):
    model = loaded("tied", tmp_path, how)
    with pytest.raises(ValueError, match="resize_token_embeddings: .* stay 64 rows"):
        model.resize_token_embeddings(65)
    with pytest.raises(ValueError, match="quantized"):
        model.resize_token_embeddings(pad_to_multiple_of=48)
    assert model.resize_token_embeddings() is model.resize_token_embeddings(64) is model.model.embed_tokens
    assert model.resize_token_embeddings(60, pad_to_multiple_of=32) is model.model.embed_tokens
    assert model.config.vocab_size == 64
    dense = load(tmp_path / "dense-tied")
    assert dense.resize_token_embeddings(70).weight.shape == (70, 48) and dense.config.vocab_size == 70


def test_what_is_to_stay_dense(tmp_path):
    model = loaded("untied", tmp_path, "8bit", skip_modules=["lm_head"])
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is Embedding8bit
    model.save_pretrained(tmp_path / "quantized")
    assert type(load(tmp_path / "quantized").lm_head) is nn.Linear
    with pytest.raises(ValueError, match="skip_modules keeps lm_head dense, but it shares its weight with"):
        loaded("tied", tmp_path, "4bit", skip_modules=["lm_head"])
    model = loaded("tied", tmp_path, "4bit", skip_modules=["lm_head", "embed_tokens"])
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def test_a_checkpoint_that_is_quantized_already(tmp_path):
    loaded("untied", tmp_path, None).save_pretrained(tmp_path / "quantized")
    with pytest.raises(ValueError, match="embeddings='8bit' was asked for, .* they are dense"):
        load(tmp_path / "quantized", FourBitConfig(embeddings="8bit"))
    loaded("untied", tmp_path, "4bit").save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="they are in 4 bits"):
        load(tmp_path / "both", FourBitConfig(embeddings="8bit"))
    assert load(tmp_path / "both", FourBitConfig()).model.embed_tokens.bits == 4


def test_embeddings_that_do_more_are_refused(tmp_path):
    sizes = dict(hidden_size=48, num_attention_heads=2, num_key_value_heads=1, head_dim=24, vocab_size=64)
    config = Gemma3TextConfig(**sizes, intermediate_size=52, num_hidden_layers=1)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="embed_tokens must be a dense torch.nn.Embedding, got Gemma3"):
        load(tmp_path, FourBitConfig(embeddings="4bit"))


# ---- adapters and training --------------------------------------------------------------------------------------


def adapted(model, **options):
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**dict(r=4, target_modules=["q_proj", "down_proj"]) | options))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def step(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.loss.detach(), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=str)
def test_training_is_that_of_the_dequantized_model(how, targets, tmp_path):
    model = loaded("untied", tmp_path, how)
    dense = adapted(copy.deepcopy(model).dequantize(), target_modules=targets)
    model = adapted(model, target_modules=targets)
    expected, gradients = step(dense)
    with peftfast.enabled(strict="embed_tokens" not in targets):
        found, ours = step(model)
        (loss,) = peftfast.report(model).losses
        assert loss.fast and peftfast.report(model).layers
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert list(ours) == list(gradients) and len(ours)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", BITS)
def test_an_adapter_on_the_head_is_saved_merged_and_taken_out(how, tmp_path):
    base = loaded("untied", tmp_path, how)
    model = adapted(copy.deepcopy(base), target_modules=["lm_head"]).eval()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, expected)
    with pytest.warns(UserWarning, match="quantized anew"):
        merged = model.merge_and_unload()
    assert type(merged.lm_head) is type(base.lm_head)
    error = (merged(IDS).logits - expected).norm() / expected.norm()
    assert error < (0.2 if how == "4bit" else 0.02)


@pytest.mark.parametrize("how", BITS)
def test_an_adapter_on_quantized_embeddings_does_not_merge(how, tmp_path):
    model = adapted(loaded("untied", tmp_path, how), target_modules=["embed_tokens"]).eval()
    expected = model(IDS).logits
    with pytest.raises(ValueError, match="Adapters on quantized embeddings cannot be merged"):
        model.merge_adapter()
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("how", BITS)
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_before_quantized_embeddings(kind, how, tmp_path):
    model = loaded("tied", tmp_path, how)
    options = dict(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if kind is PromptTuningConfig:
        options["prompt_tuning_init"] = PromptTuningInit.SAMPLE_VOCAB
    model = get_peft_model(model, kind(**options))
    assert model.word_embeddings is model.get_base_model().model.embed_tokens
    _, expected = step(model)
    with peftfast.enabled():
        _, gradients = step(model)
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("how", BITS)
def test_checkpointed_and_generating(how, tmp_path):
    model = adapted(loaded("tied", tmp_path, how))
    expected = step(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    loss, gradients = step(model)
    assert torch.equal(loss, expected[0])
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][name], msg=name)
    model.gradient_checkpointing_disable()
    out = model.eval().generate(input_ids=IDS[:, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


# ---- what is saved for backward ---------------------------------------------------------------------------------


class Saved:
    """The tensors that are saved for backward while it is on, with the innermost of some modules that ran.

    Not of those with adapters: hooks on these would need PEFT's own code.
    """

    def __init__(self, model):
        self.found, self.running = [], []
        for name, module in model.named_modules():
            if re.search(r"(\d|self_attn|mlp|norm|embed_tokens)$", name):
                module.register_forward_pre_hook(partial(self.enter, name))
                module.register_forward_hook(self.leave)

    def enter(self, name, *_):
        self.running.append(name)

    def leave(self, *_):
        self.running.pop()

    def pack(self, tensor):
        self.found.append((self.running[-1] if self.running else "", tensor.detach()))
        return tensor

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("how", [None, *BITS])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_in_bf16_keeps_nothing_in_fp32(method, how, tmp_path):
    """fp32 of the size of the hidden states, or of a matrix of the model."""
    build("untied").bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, FourBitConfig(embeddings=how) if method == "qlora" else None, dtype=torch.bfloat16)
    if method == "lora" and how is not None:
        quantize_embeddings(model, how)
    model = adapted(model, target_modules="all-linear")
    ids = torch.arange(48)[None]  # more rows than any module has features, so that a size tells what it is
    with peftfast.enabled(strict=True), Saved(model.get_base_model().model) as saved:
        model(input_ids=ids, labels=ids).loss.backward()
    wide = [(name, t.shape) for name, t in saved.found if t.dtype == torch.float32 and t.numel() >= 48 * 48]
    assert len(saved.found) > 30 and wide == []


# ---- peftfast train -----------------------------------------------------------------------------------------------


DEMO = Path(peftfast.__file__).parent / "demo"


def train_on_the_demo(folder, **options):
    lines = (DEMO / "train.jsonl").read_text().splitlines()[:16]
    (folder / "data.jsonl").write_text("\n".join(lines))
    common = dict(method="qlora", max_steps=1, micro_batch_size=2, sequence_len=64, eval_share=0)
    files = dict(data=folder / "data.jsonl", out=folder / "out")
    return train(TrainSettings(**dict(model=str(DEMO / "base_model")) | files | common | options))


def test_train_with_quantized_embeddings(tmp_path):
    dense, *quantized = (train_on_the_demo(tmp_path, embeddings=how, overwrite=True) for how in (None, *BITS))
    assert "embeddings" not in dense.quantization
    for how, result in zip(BITS, quantized):
        assert result.quantization["embeddings"] == how
        assert result.quantized.get("embedding", 0) == (how == "4bit")
        assert "without logits" in result.report and f"{how[0]}-bit: " in result.report
        assert result.parameters == dense.parameters and result.base_bytes < dense.base_bytes
        assert 0 < abs(result.losses[0][1] - dense.losses[0][1]) < 0.5


def test_train_refuses(tmp_path):
    shutil.copytree(DEMO / "base_model", tmp_path / "model")  # with its tokenizer
    load(DEMO / "base_model", FourBitConfig()).save_pretrained(tmp_path / "model")
    for options, message in (
        (dict(embeddings="3bit"), "--embeddings is one of 4bit, 8bit, not '3bit'"),
        (dict(embeddings="4bit", method="lora"), "--embeddings goes with --method qlora"),
        (dict(embeddings="4bit", objective="pretrain"), "trains the embeddings, which stay dense"),
        (dict(embeddings="8bit", model=str(tmp_path / "model")), "quantized already: they are dense"),
    ):
        with pytest.raises(UserError, match=message):
            train_on_the_demo(tmp_path, **options)
    assert not (tmp_path / "out").exists()


# ---- one weight of several layers ---------------------------------------------------------------------------


def tied_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("embeddings", ["4bit", "8bit"])
def test_tied_layers_stay_one_when_they_are_filled_anew(embeddings):
    """As those of a dense model do, into whose one parameter torch copies."""
    model, other = (quantize_embeddings(tied_llama(), embeddings) for _ in range(2))
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    other.get_input_embeddings().set_weight(torch.randn(96, 64))
    wanted = other.get_input_embeddings().dequantize()
    state = {name: value for name, value in other.state_dict().items() if not name.startswith("lm_head")}
    model.load_state_dict(state, strict=False)
    assert ends[0].weight is ends[1].weight
    assert all(torch.equal(end.dequantize(), wanted) for end in ends)
    dense = torch.randn(96, 64)
    ends[1].set_weight(dense)
    model.tie_weights()
    assert torch.equal(ends[0].dequantize(), ends[1].dequantize())
    assert (ends[0].dequantize().float() - dense).norm() < 0.1 * dense.norm()


def test_scales_outlive_a_weight_that_is_offloaded():
    """accelerate leaves weights on the meta device between calls, when they may be counted."""
    model = quantize_linears(tied_llama())
    ids = torch.arange(6)[None]
    wanted = model(input_ids=ids).logits
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    model.num_parameters()
    torch.testing.assert_close(model(input_ids=ids).logits, wanted)
