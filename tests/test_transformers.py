"""4-bit models in transformers: loading, saving and training, against the real bitsandbytes where bytes matter."""

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from conftest import bitsandbytes_misreads
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from test_experts import BOTH, base_model, dequantized
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AutoHfQuantizer

import peftfast
from peftfast import FourBitConfig, reference
from peftfast.integrations.experts import (
    FourBitExperts,
    become_dense,
    is_experts,
    projections,
    quantize_experts,
)
from peftfast.nn import Linear4bit
from peftfast.testing import relative_error

LLAMA = dict(
    vocab_size=64, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, attention_bias=True, bos_token_id=0, eos_token_id=1,
)  # fmt: skip
GPT2 = dict(
    vocab_size=64, n_embd=36, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1,
    attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
FORMATS = [("llama", "nf4", True), ("llama", "fp4", False), ("gpt2", "nf4", False), ("gpt2", "fp4", True)]
IDS = torch.arange(10)[None]


def build(kind="llama", dtype=torch.bfloat16, **options):
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA | options))
    else:
        model = GPT2LMHeadModel(GPT2Config(**GPT2 | options))
    for name, parameter in model.named_parameters():  # biases start at zero: let them count
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


@pytest.fixture
def dense(tmp_path):
    """A directory with a dense checkpoint of a tiny Llama in bfloat16."""
    build().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def quantized(dense, tmp_path):
    """A directory with the same in 4 bits."""
    load(dense, FourBitConfig()).save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def load(path, config=None, **options):
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **options)


def of_bitsandbytes(quant_type="nf4", nested=True, **options):
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested, **options
    )


def layers_of(model, kind=Linear4bit):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


# ---- loading a dense checkpoint --------------------------------------------------------------------------


@pytest.mark.parametrize("kind, quant_type, nested", FORMATS)
def test_quantizes_what_bitsandbytes_quantizes_to_the_same_bytes(kind, quant_type, nested, tmp_path):
    build(kind).save_pretrained(tmp_path)
    ours = load(tmp_path, FourBitConfig(quant_type=quant_type, nested=nested))
    theirs = load(
        tmp_path, of_bitsandbytes(quant_type, nested, bnb_4bit_compute_dtype=torch.bfloat16)
    ).train()
    assert_same_state(ours.state_dict(), theirs.state_dict())
    if any(bitsandbytes_misreads(layer.in_features) for layer in layers_of(ours).values()):
        return
    expected = theirs(IDS).logits
    error = (ours(IDS).logits - expected).norm() / expected.norm()
    assert error < 0.02  # of bfloat16, through two layers


def test_the_logits_are_those_of_the_dequantized_weights(dense):
    ours, plain = load(dense, FourBitConfig(), dtype=torch.float32), load(dense, dtype=torch.float32)
    expected = plain(IDS).logits
    with torch.no_grad():
        for name, layer in layers_of(ours).items():
            plain.get_submodule(name).weight.copy_(layer.dequantize(torch.float32))
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    assert (ours(IDS).logits - expected).abs().max() > 1e-3  # 4 bits do change the weights


def test_what_is_in_4_bits_and_what_is_not(dense):
    model = load(dense, FourBitConfig(blocksize=32, quant_type="fp4", nested=False))
    linears = {name for name, _ in layers_of(model, nn.Linear).items()}
    assert linears - set(layers_of(model)) == {"lm_head"}
    for layer in layers_of(model).values():
        assert (layer.quant_type, layer.blocksize, layer.nested) == ("fp4", 32, False)
        assert layer.compute_dtype == torch.bfloat16 and not layer.weight.requires_grad
        assert layer.weight.dtype == torch.uint8 and layer.quantized_weight.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.bfloat16
    assert model.is_loaded_in_4bit and model.is_quantized and model.hf_quantizer.is_trainable


@pytest.mark.parametrize(
    "skip, tied, stay_dense",
    [
        (None, False, {"lm_head"}),
        (None, True, {"lm_head"}),
        (["q_proj", "model.layers.1.mlp"], False, {"q_proj", "model.layers.1.mlp"}),
        ([], False, set()),
        ([], True, {"lm_head"}),
    ],
    ids=str,
)
def test_modules_to_skip(skip, tied, stay_dense, tmp_path):
    build(tie_word_embeddings=tied).save_pretrained(tmp_path)
    model = load(tmp_path, FourBitConfig(skip_modules=skip))
    for name, layer in layers_of(model, nn.Linear).items():
        assert isinstance(layer, Linear4bit) != any(part in name for part in stay_dense), name
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(load(tmp_path / "saved", FourBitConfig()).state_dict(), model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_computes_in_the_dtype_of_the_model_unless_told_otherwise(dtype, dense):
    config = FourBitConfig()
    model = LlamaForCausalLM.from_pretrained(dense, quantization_config=config, dtype=dtype)
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {dtype}
    assert model.config.quantization_config.compute_dtype == dtype
    assert config == FourBitConfig()  # what was found out of one model is not said of the next
    model = load(dense, FourBitConfig(compute_dtype="bfloat16"), dtype=dtype)
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str
)
def test_device_maps(device_map, dense):
    model = load(dense, FourBitConfig(), device_map=device_map)
    assert_same_state(model.state_dict(), load(dense, FourBitConfig()).state_dict())


def test_conv1d_is_transposed_into_a_linear_layer(tmp_path):
    plain = build("gpt2")
    plain.save_pretrained(tmp_path)
    weight = plain.transformer.h[0].mlp.c_fc.weight
    layer = load(tmp_path, FourBitConfig()).transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == tuple(weight.shape) and layer.bias is not None
    expected = reference.fourbit_dequantize(reference.fourbit_quantize(weight.T.contiguous()))
    assert torch.equal(layer.dequantize(), expected)


MEASURE = """
import sys, threading, time
import peftfast, torch
from transformers import AutoModelForCausalLM

def private():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def peak_of(path, **options):
    peaks, done, before = [0], threading.Event(), private()
    def watch():
        while not done.is_set():
            peaks.append(private() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    done.set()
    thread.join()
    return max(*peaks, private() - before), model

small, large = sys.argv[1:]
peak_of(small, quantization_config=peftfast.FourBitConfig())
peak, model = peak_of(large, quantization_config=peftfast.FourBitConfig())
kept = sum(m.quantized_weight.nbytes for m in model.modules() if isinstance(m, peftfast.nn.Linear4bit))
for m in model.modules():
    kept += sum(m.fourbit_weight(name).nbytes for name in getattr(m, "fourbit_weights", ()))
del model
print(peak, kept)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_4bit_model_and_a_shard(dense, tmp_path):
    """Of the process's own memory. Pages of the checkpoint, which is mapped, the system takes back when it wants to."""
    model = build(hidden_size=512, intermediate_size=2048, num_hidden_layers=10)
    size = sum(parameter.nbytes for parameter in model.parameters())
    shard = 10 * 2**20
    model.save_pretrained(tmp_path / "large", max_shard_size=shard)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 5
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dense, tmp_path / "large"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, kept = map(int, done.stdout.split()[-2:])
    assert 0.2 * size < kept < 0.3 * size
    assert kept * 0.8 < peak < kept + shard < 0.5 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_with_experts_is_the_4bit_model_and_a_projection(dense, tmp_path):
    """Of all experts of a layer: transformers reads them one by one, stacks them, and joins gate and up."""
    config = OlmoeConfig(
        hidden_size=256, intermediate_size=512, num_experts=16, num_hidden_layers=10, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64, num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    projection = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    model.save_pretrained(tmp_path / "large", max_shard_size=10 * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dense, tmp_path / "large"],
        capture_output=True,
        text=True,
        timeout=120,
        # Otherwise glibc keeps what was freed of this size for later, which is no memory in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
    )
    assert done.returncode == 0, done.stderr
    peak, kept = map(int, done.stdout.split()[-2:])
    assert 0.2 * size < kept < 0.3 * size
    assert kept * 0.8 < peak < kept + 2.5 * projection < 0.5 * size


# ---- checkpoints in 4 bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, quant_type, nested", FORMATS)
def test_bitsandbytes_checkpoints_load_with_their_bytes(kind, quant_type, nested, tmp_path):
    build(kind).save_pretrained(tmp_path / "dense")
    theirs = load(tmp_path / "dense", of_bitsandbytes(quant_type, nested))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", FourBitConfig())
    assert len(layers_of(ours)) == len(layers_of(theirs, nn.Linear)) - 1
    assert_same_state(ours.state_dict(), theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    assert_same_state(*(load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")))
    config = ours.config.quantization_config
    assert (config.quant_type, config.blocksize, config.nested) == (quant_type, 64, nested)
    assert (
        config.compute_dtype == torch.bfloat16
    )  # the model's, where theirs says float32 for want of a choice


@pytest.mark.parametrize(
    "kind, quant_type, blocksize, nested",
    [("llama", *how) for how in product(("nf4", "fp4"), (32, 64, 128), (True, False))]
    + [("gpt2", "nf4", 64, True)],
)
def test_bitsandbytes_loads_what_we_save(kind, quant_type, blocksize, nested, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    build(kind).save_pretrained(tmp_path / "dense")
    ours = load(tmp_path / "dense", FourBitConfig(quant_type, blocksize, nested))
    ours.save_pretrained(tmp_path / "ours")
    theirs = load(tmp_path / "ours")
    name, layer = next(iter(layers_of(ours).items()))
    their_layer = theirs.get_submodule(name)
    assert type(their_layer) is bitsandbytes.nn.Linear4bit
    assert_same_state(ours.state_dict(), theirs.state_dict())
    decoded = bitsandbytes.functional.dequantize_4bit(their_layer.weight, their_layer.weight.quant_state)
    assert torch.equal(decoded, layer.dequantize())


def test_config_json_is_bitsandbytes_own_form(quantized):
    written = json.loads((quantized / "config.json").read_text())["quantization_config"]
    read = BitsAndBytesConfig.from_dict(written)
    assert written["quant_method"] == "bitsandbytes" and read.load_in_4bit and not read.load_in_8bit
    assert (read.bnb_4bit_quant_type, read.bnb_4bit_use_double_quant) == ("nf4", True)
    assert read.bnb_4bit_compute_dtype == torch.bfloat16 and read.bnb_4bit_quant_storage == torch.uint8
    assert FourBitConfig.from_dict(written) == FourBitConfig(compute_dtype=torch.bfloat16)


def test_the_compute_dtype_of_a_checkpoint_can_be_changed(quantized):
    def compute_dtype(config, **options):
        return next(iter(layers_of(load(quantized, config, **options)).values())).compute_dtype

    assert compute_dtype(FourBitConfig(), dtype=torch.float32) == torch.bfloat16  # as the checkpoint says
    assert compute_dtype(FourBitConfig(compute_dtype=torch.float16)) == torch.float16


def test_dense_weights_of_a_4bit_checkpoint_take_the_dtype_asked_for(quantized):
    before, after = load(quantized, FourBitConfig()), load(quantized, FourBitConfig(), dtype=torch.float32)
    for name, value in after.state_dict().items():
        old = before.state_dict()[name]
        dense = name.endswith(("norm.weight", "head.weight", "tokens.weight", "bias"))
        assert value.dtype == (torch.float32 if dense else old.dtype), name
        assert torch.equal(value, old.to(value.dtype))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32], ids=str)
def test_other_storage_dtypes_are_the_same_bytes(storage, dense, tmp_path):
    theirs = load(dense, of_bitsandbytes(bnb_4bit_quant_storage=storage))
    theirs.save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors")[f"{LAYER}.weight"].dtype == storage
    ours = load(tmp_path / "theirs", FourBitConfig())
    assert_same_state(ours.state_dict(), load(dense, FourBitConfig()).state_dict())


WITHOUT_BITSANDBYTES = """
import sys
sys.modules["bitsandbytes"] = None  # as if it was not installed
quantized, dense, order = sys.argv[1:]
if order == "transformers":
    import transformers.modeling_utils
import peftfast
print(order == "transformers" or "transformers" not in sys.modules)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

def show(path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    layers = [module for module in model.modules() if type(module) is peftfast.nn.Linear4bit]
    print(*{(layer.quant_type, str(layer.compute_dtype)) for layer in layers})
    return model

model = show(quantized)
show(dense, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"))

from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 2, "labels": [[1, 2, 3]] * 2})
arguments = TrainingArguments(
    quantized, max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no"
)
print(0 < Trainer(model, arguments, train_dataset=data).train().training_loss < 10)
"""


@pytest.mark.parametrize("first", ["transformers", "peftfast"])
def test_without_bitsandbytes_its_checkpoints_and_configs_are_ours(first, dense, quantized):
    program = [sys.executable, "-c", WITHOUT_BITSANDBYTES, quantized, dense, first]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["True", "('nf4', 'torch.bfloat16')", "('fp4', 'torch.bfloat16')"]
    assert lines[-1] == "True"


def test_with_bitsandbytes_its_configs_stay_its_own(dense):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = load(dense, of_bitsandbytes())
    assert layers_of(model, bitsandbytes.nn.Linear4bit) and not layers_of(model)
    theirs = BitsAndBytesConfig(load_in_4bit=True)
    merged = AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), None)
    assert type(merged) is BitsAndBytesConfig
    with pytest.raises(ValueError, match="BitsAndBytesConfig"):
        from transformers import GPTQConfig

        AutoHfQuantizer.merge_quantization_configs(theirs.to_dict(), GPTQConfig(bits=4))


# ---- using the model -------------------------------------------------------------------------------------


def adapted(model, **options):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    return get_peft_model(model, config)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prepared_adapted_and_trained(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    model = load(tmp_path, FourBitConfig())
    layers = layers_of(model)
    before = {name: value.clone() for name, value in model.state_dict().items() if value.dtype == torch.uint8}
    model = adapted(prepare_model_for_kbit_training(model))
    assert {name.removesuffix(".base_layer") for name in layers_of(model.base_model.model)} == set(layers)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
            assert parameter.grad is None or parameter.grad.isfinite().all()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    after = model.get_base_model().state_dict()
    for name, value in before.items():
        where = name if name in after else name.replace(".weight", ".base_layer.weight", 1)
        assert torch.equal(after[where], value)
    # The norms are in float32 now, and so is what comes in; the products stay in the model's dtype.
    assert {layer.compute_dtype for layer in layers.values()} == {torch.bfloat16}


def test_the_gradient_of_the_input_passes_through_the_4bit_weight(dense):
    layer = load(dense, FourBitConfig(), dtype=torch.float32).model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    grad = torch.randn(3, layer.out_features)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.dequantize(torch.float32), rtol=1e-4, atol=1e-5)


def test_trainer(dense, tmp_path):
    data = Dataset.from_dict({"input_ids": [list(range(10))] * 4, "labels": [list(range(10))] * 4})
    options = dict(use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no")
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, gradient_checkpointing=True,
        **options,
    )  # fmt: skip
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(load(dense, FourBitConfig()), arguments, train_dataset=data)
    model = adapted(prepare_model_for_kbit_training(load(dense, FourBitConfig())))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    result = Trainer(model, arguments, train_dataset=data).train()
    assert 0 < result.training_loss < 10
    trained = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert all(not torch.equal(trained[name], start[name]) for name in start)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert saved and all("lora_" in name for name in saved)


@pytest.mark.parametrize("options", [{}, dict(exclude_embeddings=True), dict(only_trainable=True)], ids=str)
def test_parameters_are_counted_as_in_the_dense_model(options, dense):
    plain, model = load(dense), load(dense, FourBitConfig())
    expected = plain.num_parameters(**options)
    if options.get("only_trainable"):
        expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.num_parameters(**options) == expected and model.is_loaded_in_4bit


def test_training_and_evaluation_leave_the_bytes_alone(dense):
    model = load(dense, FourBitConfig())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for training in (False, True, False):
        model.train(training)
        with torch.no_grad():
            model(IDS)
        assert_same_state(model.state_dict(), before)


def test_casting_the_model_casts_no_quantized_weight(dense):
    model = load(dense, FourBitConfig(nested=False))
    before = {name: layer.state_dict() for name, layer in layers_of(model).items()}
    model.to(torch.float32)
    assert model.lm_head.weight.dtype == torch.float32
    for name, layer in layers_of(model).items():
        state = layer.state_dict()
        assert state.pop("bias", torch.zeros(1)).dtype == torch.float32
        before[name].pop("bias", None)
        assert_same_state(state, before[name])
    assert model(IDS).logits.isfinite().all()


def test_dequantize_gives_a_dense_model_back(dense):
    model = load(dense, FourBitConfig(), dtype=torch.float32)
    expected = model(IDS).logits
    plain = model.dequantize()
    assert not layers_of(plain) and not plain.is_loaded_in_4bit
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_model_generates(dense):
    model = load(dense, FourBitConfig())
    out = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, IDS.shape[1] + 4)


# ---- experts ---------------------------------------------------------------------------------------------

EXPERTS = ["mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3"]  # checkpoints of several forms


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitExperts)}


@pytest.fixture(params=EXPERTS)
def moe(request, tmp_path):
    """A directory with a dense checkpoint of a tiny mixture of experts."""
    base_model(request.param, torch.bfloat16).save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


@pytest.fixture
def olmoe(tmp_path):
    base_model("olmoe", torch.bfloat16).save_pretrained(tmp_path / "olmoe")
    return tmp_path / "olmoe"


FORMAT = dict(quant_type="fp4", blocksize=32, nested=False)


@pytest.mark.parametrize("format", [{}, FORMAT], ids=["nf4", "fp4"])
def test_experts_are_quantized_as_in_memory(format, moe):
    model, plain = load(moe, FourBitConfig(**format)), load(moe)
    in_memory = experts_of(quantize_experts(plain, **format))
    assert in_memory.keys() == experts_of(model).keys() and in_memory
    for name, experts in experts_of(model).items():
        assert_same_state(experts.state_dict(), in_memory[name].state_dict())
        assert set(experts.fourbit_weights) == set(projections(experts))
        assert not any(getattr(experts, name).requires_grad for name in projections(experts))
    stay_dense = [".gate.", ".router.", "norm", "embed", "lm_head", "bias"]
    for name, parameter in model.named_parameters():
        if any(part in name for part in stay_dense):
            assert torch.equal(parameter, plain.get_parameter(name)), name
    logits = model(IDS).logits
    expected = dequantized(model)(IDS).logits
    assert (logits - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("format", [{}, FORMAT], ids=["nf4", "fp4"])
def test_experts_come_back_from_a_4bit_checkpoint(format, moe, tmp_path):
    model = load(moe, FourBitConfig(**format))
    model.save_pretrained(tmp_path / "saved", max_shard_size=20_000)
    for config in (FourBitConfig(), None):
        again = load(tmp_path / "saved", config)
        assert_same_state(again.state_dict(), model.state_dict())
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert again.config.quantization_config == model.config.quantization_config
    again.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "peftfast_4bit" and "load_in_4bit" not in written
    assert_same_state(load(tmp_path / "again").state_dict(), model.state_dict())


@pytest.mark.parametrize("first", ["transformers.modeling_utils", "peftfast"])
def test_4bit_experts_load_wherever_peftfast_is_imported(first, olmoe, tmp_path):
    load(olmoe, FourBitConfig()).save_pretrained(tmp_path / "saved")
    program = (
        f"import sys, {first}, peftfast; from transformers import AutoModelForCausalLM;"
        "print(peftfast.report(AutoModelForCausalLM.from_pretrained(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "saved"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "4-bit: 8 linear layers, 4 expert projections\n  dense: lm_head (bfloat16)\n" in done.stdout


@pytest.mark.parametrize(
    "skip, stay_dense",
    [
        (["experts"], "mlp.experts"),
        (["model.layers.1.mlp"], "layers.1.mlp.experts"),
        (["experts.down_proj"], "experts.down_proj"),
        (["down_proj"], "experts.down_proj"),
    ],
    ids=str,
)
def test_experts_to_skip(skip, stay_dense, olmoe, tmp_path):
    model, plain = load(olmoe, FourBitConfig(skip_modules=skip)), load(olmoe)
    for layer, module in plain.named_modules():
        for name in projections(module) if is_experts(module) else ():
            experts = model.get_submodule(layer)
            is_dense = stay_dense in f"{layer}.{name}"
            assert (name in getattr(experts, "fourbit_weights", ())) != is_dense
            assert not is_dense or torch.equal(getattr(experts, name), getattr(module, name))
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(load(tmp_path / "saved", FourBitConfig()).state_dict(), model.state_dict())
    method = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]["quant_method"]
    assert (method == "peftfast_4bit") == bool(experts_of(model))


def test_experts_that_bitsandbytes_left_dense_stay_so(moe, tmp_path):
    theirs = load(moe, of_bitsandbytes())
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", FourBitConfig())
    assert not experts_of(ours) and layers_of(ours)
    assert_same_state(ours.state_dict(), theirs.state_dict())
    said = peftfast.report(ours)
    assert {name for name in said.dense if "experts" in name} == {
        f"{layer}.{name}"
        for layer, module in ours.named_modules()
        if is_experts(module)
        for name in projections(module)
    }
    assert "experts.gate_up_proj (bfloat16" in str(said)
    ours.save_pretrained(tmp_path / "ours")
    assert_same_state(load(tmp_path / "ours").state_dict(), theirs.state_dict())  # loaded by bitsandbytes


def test_experts_whose_checkpoints_are_stacked_the_other_way_round(tmp_path):
    """transformers transposes them where the shapes say so; experts in 4 bits are in the order of the model."""
    config = Qwen3VLMoeConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=32, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, vocab_size=64,
        ),
        vision_config=dict(
            depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32, patch_size=4,
            num_position_embeddings=16, deepstack_visual_indexes=[0],
        ),
    )  # fmt: skip
    kind = Qwen3VLMoeForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "dense")
    theirs = kind.from_pretrained(tmp_path / "dense", quantization_config=of_bitsandbytes())
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("dense", "theirs"):
        state = load_file(tmp_path / folder / "model.safetensors")
        turned = {
            key: value.transpose(1, 2).contiguous() for key, value in state.items() if ".experts." in key
        }
        save_file(state | turned, tmp_path / folder / "model.safetensors", {"format": "pt"})
    in_memory = quantize_experts(kind.from_pretrained(tmp_path / "dense"))
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=FourBitConfig())
    model.save_pretrained(tmp_path / "saved")
    again = kind.from_pretrained(tmp_path / "saved")
    assert len(experts_of(in_memory)) == 2
    for name, experts in experts_of(in_memory).items():
        assert_same_state(experts_of(model)[name].state_dict(), experts.state_dict())
        assert_same_state(experts_of(again)[name].state_dict(), experts.state_dict())
    left_dense = kind.from_pretrained(tmp_path / "theirs", quantization_config=FourBitConfig())
    assert_same_state(left_dense.state_dict(), theirs.state_dict())


def test_experts_that_transformers_splits_over_two_modules(tmp_path):
    """ernie4_5_vl_moe: the experts of a layer are those of text and those of images, of different sizes."""
    config = Ernie4_5_VLMoeConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=32, moe_intermediate_size=[24, 16], moe_num_experts=4, moe_k=2,
            num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=64,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2]),
            mlp_layer_types=["dense", "sparse"],
        ),
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, patch_size=4),
    )  # fmt: skip
    kind = Ernie4_5_VLMoeForConditionalGeneration
    kind(config).save_pretrained(tmp_path / "dense")
    model = kind.from_pretrained(tmp_path / "dense", quantization_config=FourBitConfig())
    in_memory = experts_of(quantize_experts(kind.from_pretrained(tmp_path / "dense")))
    assert len(in_memory) == 2
    for name, experts in in_memory.items():
        assert_same_state(experts_of(model)[name].state_dict(), experts.state_dict())
    model.save_pretrained(tmp_path / "saved")
    assert_same_state(kind.from_pretrained(tmp_path / "saved").state_dict(), model.state_dict())


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
def test_device_maps_with_experts(device_map, olmoe):
    model = load(olmoe, FourBitConfig(), device_map=device_map)
    assert_same_state(model.state_dict(), load(olmoe, FourBitConfig()).state_dict())


def test_adapters_on_experts_of_a_4bit_model(olmoe, tmp_path):
    model = prepare_model_for_kbit_training(load(olmoe, FourBitConfig()), use_gradient_checkpointing=False)
    bytes_before = {name: experts.state_dict() for name, experts in experts_of(model).items()}
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=BOTH))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.05
    for name, experts in experts_of(model.base_model.model).items():
        assert_same_state(experts.state_dict(), bytes_before[name.replace(".base_layer", "")])
    model.save_pretrained(tmp_path / "adapter")
    base = prepare_model_for_kbit_training(load(olmoe, FourBitConfig()), use_gradient_checkpointing=False)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])  # without biases and with
def test_experts_compute_in_the_dtype_that_linear_layers_compute_in(kind, tmp_path):
    base_model(kind, torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = FourBitConfig(compute_dtype=torch.float32)
    exact, model = (load(tmp_path / "dense", which) for which in (config, FourBitConfig()))
    exact.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", config)
    arguments = torch.randn(5, 64).bfloat16(), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    exact, again, model = (next(iter(experts_of(which).values())) for which in (exact, again, model))
    results = [experts(*arguments) for experts in (exact, again, model)]
    assert all(result.dtype == torch.bfloat16 for result in results) and torch.equal(*results[:2])
    assert exact.fourbit_weight("down_proj").dtype == torch.bfloat16  # what dequantize gives is as before
    become_dense(exact, torch.float32)
    expected = exact.float()(arguments[0].float(), *arguments[1:])
    error, rounded_more_often = (relative_error(result, expected.double()) for result in results[1:])
    assert error < 2**-9 and rounded_more_often > 2 * error


@pytest.mark.parametrize("options", [{}, dict(exclude_embeddings=True)], ids=str)
def test_parameters_of_experts_are_counted(options, moe):
    assert load(moe, FourBitConfig()).num_parameters(**options) == load(moe).num_parameters(**options)


def test_dequantize_gives_dense_experts_back(moe, tmp_path):
    model = load(moe, FourBitConfig(), dtype=torch.float32)
    expected, values = model(IDS).logits, dequantized(model).state_dict()
    plain = model.dequantize()
    assert not experts_of(plain) and not layers_of(plain)
    torch.testing.assert_close(plain(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    state = load(tmp_path / "plain", dtype=torch.float32).state_dict()
    assert all(torch.equal(state[name], values[name]) for name in state if ".experts." in name)


# ---- bad input -------------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"
STATE = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"


def facts(**changes):
    """An edit of the layer's quant state."""

    def edit(state):
        read = json.loads(bytes(state[STATE].tolist())) | changes
        read = {key: value for key, value in read.items() if value is not None}
        state[STATE] = torch.tensor(list(json.dumps(read).encode()), dtype=torch.uint8)

    return edit


def entry(name, change):
    """An edit of one entry of the layer; None takes it out."""

    def edit(state):
        key = f"{LAYER}.weight{name}"
        if change is None:
            del state[key]
        else:
            state[key] = change(state[key]).contiguous()

    return edit


def renamed_state(state):
    state[STATE.replace("nf4", "int4")] = state.pop(STATE)


BAD = {
    "no packed weight": (entry("", None), "up_proj.weight is missing"),
    "no entry at all": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith(f"{LAYER}.")],
        "up_proj.weight is missing",
    ),
    "no absmax": (entry(".absmax", None), "up_proj.weight.absmax is missing"),
    "no quant map": (entry(".quant_map", None), "up_proj.weight.quant_map is missing"),
    "no nested absmax": (entry(".nested_absmax", None), "up_proj.weight.nested_absmax is missing"),
    "no nested map": (entry(".nested_quant_map", None), "up_proj.weight.nested_quant_map is missing"),
    "no quant state": (entry(".quant_state.bitsandbytes__nf4", None), "up_proj.weight is no 4-bit weight"),
    "unknown type": (renamed_state, "up_proj.weight is no 4-bit weight"),
    "dense weight": (
        lambda state: [
            state.pop(key) if key != f"{LAYER}.weight" else state.update({key: torch.randn(52, 36)})
            for key in list(state)
            if key.startswith(f"{LAYER}.weight")
        ],
        "up_proj.weight is no 4-bit weight",
    ),
    "other type": (facts(quant_type="fp4"), "says quant_type 'fp4', expected nf4"),
    "unheard-of type": (facts(quant_type="nf5"), "says quant_type 'nf5'"),
    "wrong shape": (facts(shape=[52, 35]), r"says shape \[52, 35\], expected \[52, 36\]"),
    "transposed shape": (facts(shape=[36, 52]), r"says shape \[36, 52\]"),
    "no shape": (facts(shape=None), "says shape None"),
    "shape of words": (facts(shape="52x36"), "says shape '52x36'"),
    "unheard-of block size": (facts(blocksize=48), "says blocksize 48"),
    "fractional block size": (facts(blocksize=64.0), "says blocksize 64.0"),
    "block size that does not match": (facts(blocksize=128), "up_proj.weight: absmax has 30 elements, expected 15"),
    "unheard-of dtype": (facts(dtype="float8"), "says dtype 'float8'"),
    "nested block size that does not match": (facts(nested_blocksize=8), "up_proj.weight: nested absmax has 1"),
    "nested block size of words": (facts(nested_blocksize="8"), "nested_blocksize '8'"),
    "no nested block size": (facts(nested_blocksize=None), "nested_blocksize None"),
    "infinite offset": (facts(nested_offset=float("inf")), "nested_offset inf"),
    "no offset": (facts(nested_offset=None), "nested_offset None"),
    "broken JSON": (entry(".quant_state.bitsandbytes__nf4", lambda t: t[:-1]), "is not the JSON object"),
    "JSON of another kind": (
        entry(".quant_state.bitsandbytes__nf4", lambda t: torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "is not the JSON object",
    ),
    "no text": (entry(".quant_state.bitsandbytes__nf4", lambda t: t | 128), "is not the JSON object"),
    "numbers for text": (entry(".quant_state.bitsandbytes__nf4", lambda t: t.float()), "is not the JSON object"),
    "short weight": (entry("", lambda t: t[:-1]), "up_proj.weight: packed has 935 bytes, expected 936"),
    "long weight": (entry("", lambda t: torch.cat([t, t])), "up_proj.weight: packed has 1872 bytes"),
    "short absmax": (entry(".absmax", lambda t: t[1:]), "up_proj.weight: absmax has 29 elements"),
    "absmax of another dtype": (entry(".absmax", lambda t: t.float()), "up_proj.weight: absmax must be uint8"),
    "long nested absmax": (entry(".nested_absmax", lambda t: t.repeat(2)), "up_proj.weight: nested absmax has 2"),
    "short nested map": (entry(".nested_quant_map", lambda t: t[1:]), "up_proj.weight: nested code has 255"),
    "other quant map": (entry(".quant_map", lambda t: -t), "up_proj.weight.quant_map is not the codebook"),
    "short quant map": (entry(".quant_map", lambda t: t[1:]), "up_proj.weight.quant_map is not the codebook"),
}  # fmt: skip


@pytest.mark.parametrize("edit, message", BAD.values(), ids=BAD.keys())
def test_a_bad_checkpoint_is_refused_by_the_tensors_name(edit, message, quantized):
    state = load_file(quantized / "model.safetensors")
    edit(state)
    save_file(state, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=f"^model.layers.1.mlp.up_proj.weight.*{message.removeprefix('up_proj.weight')}"
    ) as caught:
        load(quantized, FourBitConfig())
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_dense_by_configuration_and_quantized_in_the_checkpoint(quantized):
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "up_proj"]
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="^model.layers.0.mlp.up_proj.weight is in 4 bits in the checkpoint"):
        load(quantized, FourBitConfig())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind, name", [("llama", LAYER), ("gpt2", "transformer.h.1.mlp.c_fc")])
def test_weights_that_are_not_finite_are_refused_by_name(value, kind, name, tmp_path):
    model = build(kind)
    with torch.no_grad():
        model.get_submodule(name).weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}.weight holds values that are not finite"):
        load(tmp_path, FourBitConfig())


def test_a_dense_checkpoint_without_a_weight_is_refused(dense):
    state = load_file(dense / "model.safetensors")
    del state[f"{LAYER}.weight"]
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{LAYER}.weight is missing"):
        load(dense, FourBitConfig())


PROJECTION = "model.layers.1.mlp.experts.down_proj"


def edit(path, change):
    file = next(path.glob("*.safetensors"))
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def of_experts(state):
    return [key for key in state if key.startswith("model.layers.1.mlp.experts") and ".down_proj" in key]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: [state.pop(key) for key in of_experts(state)], "is missing from the checkpoint"),
        (lambda state: state[of_experts(state)[3]].fill_(float("nan")), "holds values that are not finite"),
        (
            lambda state: [state.update({key: torch.ones(64, 39)}) for key in of_experts(state)],
            r"has shape \[8, 64, 39\], expected \[8, 64, 40\]",
        ),
    ],
    ids=["missing", "not finite", "shape"],
)
def test_dense_experts_that_cannot_be_quantized_are_named(change, message, olmoe):
    edit(olmoe, change)
    with pytest.raises(ValueError, match=f"^{PROJECTION} {message}") as caught:
        load(olmoe, FourBitConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(f"{PROJECTION}.absmax"), r"\.absmax is missing"),
        (lambda state: state.pop(PROJECTION), " is missing"),
        (
            lambda state: state.update({PROJECTION: state[PROJECTION][:-1].clone()}),
            ": packed has 10239 bytes, expected 10240",
        ),
        (lambda state: state.pop(f"{PROJECTION}.quant_state.bitsandbytes__nf4"), " is no 4-bit weight"),
    ],
    ids=["absmax", "packed", "short", "quant state"],
)
def test_broken_4bit_experts_are_named(change, message, olmoe, tmp_path):
    load(olmoe, FourBitConfig()).save_pretrained(tmp_path / "saved")
    edit(tmp_path / "saved", change)
    with pytest.raises(ValueError, match=f"^{PROJECTION}{message}") as caught:
        load(tmp_path / "saved", FourBitConfig())
    assert "\n" not in str(caught.value)


def test_a_bias_that_is_missing_starts_at_zero_as_in_a_dense_model(dense):
    name = "model.layers.1.self_attn.q_proj.bias"
    state = load_file(dense / "model.safetensors")
    del state[name]
    save_file(state, dense / "model.safetensors", {"format": "pt"})
    assert not load(dense, FourBitConfig()).state_dict()[name].any()


@pytest.mark.parametrize(
    "options, error, name",
    [
        (dict(quant_type="int4"), ValueError, "quant_type"),
        (dict(blocksize=48), ValueError, "blocksize"),
        (dict(blocksize="64"), ValueError, "blocksize"),
        (dict(nested="yes"), TypeError, "nested"),
        (
            dict(compute_dtype=torch.float64),
            ValueError,
            "compute_dtype must be None, float32, bfloat16 or float16",
        ),
        (dict(compute_dtype="half-ish"), ValueError, "compute_dtype"),
        (dict(skip_modules="lm_head"), TypeError, "skip_modules"),
        (dict(skip_modules=[1]), TypeError, "skip_modules"),
    ],
    ids=str,
)
def test_bad_arguments(options, error, name):
    with pytest.raises(error, match=name):
        FourBitConfig(**options)


@pytest.mark.parametrize(
    "other, kind",
    [
        (dict(quant_method="bitsandbytes", load_in_8bit=True), "8 bits"),
        (dict(quant_method="gptq", bits=4), "gptq"),
    ],
    ids=str,
)
def test_other_quantized_checkpoints_are_refused(other, kind, dense):
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": other}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"FourBitConfig reads .* this one is in {kind}"):
        load(dense, FourBitConfig())


def test_no_offloading_to_disk(dense):
    with pytest.raises(ValueError, match="device_map"):
        load(dense, FourBitConfig(), device_map={"model": "cpu", "lm_head": "disk"})
