"""Stock PEFT code with peftfast against the same without: equal results, or a reason for not being on."""

import copy
import gc
import inspect
import pickle
import re
import statistics
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from conftest import generator
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast
from peftfast.integrations import forwards
from peftfast.integrations.after_import import after_import
from peftfast.integrations.peft import LoraLinear4bit
from peftfast.nn.fourbit import Linear4bit
from peftfast.testing import assert_as_accurate, relative_error

VOCABULARY = 61
DECODER = dict(
    vocab_size=VOCABULARY,
    hidden_size=36,
    intermediate_size=52,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**DECODER, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**DECODER),
    "gemma": lambda: transformers.GemmaConfig(**DECODER),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=36, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "bert": lambda: transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=36,
        d_kv=10,
        d_ff=52,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
}
AUTO = {
    "bert": transformers.AutoModelForSequenceClassification,
    "t5": transformers.AutoModelForSeq2SeqLM,
}
EVERY_LAYER = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
ATTENTION_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
architectures = pytest.mark.parametrize("architecture", CONFIGS)


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    """The models are tiny: threads would do little but wait for each other."""
    torch.set_num_threads(1)


def randomize(model, names=("lora_B", "bias")):
    """PEFT starts B and most biases at zero, which would hide half of the mistakes."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model


def base_model(architecture, dtype=torch.float32):
    auto = AUTO.get(architecture, transformers.AutoModelForCausalLM)
    return auto.from_config(CONFIGS[architecture](), dtype=dtype)


def build(architecture="llama", dtype=torch.float32, autocast_adapter_dtype=True, **options):
    """A tiny PEFT model with random weights, the same ones for the same arguments."""
    torch.manual_seed(7)
    options = dict(r=5, lora_alpha=8, target_modules=EVERY_LAYER.get(architecture, ATTENTION_MLP)) | options
    if architecture == "bert":
        options["task_type"] = TaskType.SEQ_CLS
    if architecture == "gpt2":
        options["fan_in_fan_out"] = True
    model = get_peft_model(
        base_model(architecture, dtype), LoraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype
    )
    return randomize(model).train()


def batch(architecture="llama", seed=3):
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    labels = ids[:, 0] % 2 if architecture == "bert" else ids
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


class FastCalls(TorchDispatchMode):
    """Counts what really ran: the calls of the fast op with adapters, by direction."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.peftfast.lora_linear.default and len(args[3]) > 0
        self.backward += func is torch.ops.peftfast.lora_linear_backward.default and len(args[3]) > 0
        return func(*args, **(kwargs or {}))


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def step(model, inputs, autocast=None):
    """Loss, logits and every gradient of one training step."""
    model.zero_grad()
    torch.manual_seed(1)  # the models' own dropout
    with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
        out = model(**inputs)
    out.loss.backward()
    results = {"loss": out.loss.detach(), "logits": out.logits.detach()}
    return results | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, stock, tolerance=1e-4):
    """PEFT itself is up to 1e-5 from float64, where gradients are small differences; a mistake shows as 1e-2."""
    assert ours.keys() == stock.keys()
    for name, expected in stock.items():
        assert ours[name].dtype == expected.dtype and ours[name].shape == expected.shape, name
        assert expected.isfinite().all(), name
        error = relative_error(ours[name], expected)
        assert error <= tolerance, f"{name}: {error}"


def assert_parity(model, inputs, fast=None):
    """A step with peftfast equals one without; unless told otherwise every LoRA layer is on the fast path."""
    stock = step(model, inputs)
    with peftfast.enabled(strict=fast is None), FastCalls() as calls:
        ours = step(model, inputs)
    expected = len(lora_layers(model)) if fast is None else fast
    assert (calls.forward, calls.backward) == (expected, expected)
    assert_same(ours, stock)


def flat(results):
    return torch.cat(
        [value.double().flatten() for name, value in results.items() if name not in ("loss", "logits")]
    )


# -------------------------------------------------------------------------------------------------- parity


@architectures
def test_step(architecture):
    assert_parity(build(architecture), batch(architecture))


def assert_as_close_to_float64(model, architecture, autocast=None, draws=6):
    """In low precision no two right paths agree to the bit: ours has to be as close to float64 as PEFT's.

    The rest of the model rounds too, and one draw's ratio of errors is luck: hence several inputs.
    """
    logits, ratios = [[], [], []], []
    for seed in range(draws):
        inputs = batch(architecture, seed)
        oracle, stock = step(copy.deepcopy(model).double(), inputs), step(model, inputs, autocast)
        with peftfast.enabled(strict=True), FastCalls() as calls:
            ours = step(model, inputs, autocast)
        assert calls.backward == len(lora_layers(model))
        assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in stock.items()}
        for seen, results in zip(logits, (ours, stock, oracle), strict=True):
            seen.append(results["logits"])
        ratios.append(relative_error(flat(ours), flat(oracle)) / relative_error(flat(stock), flat(oracle)))
    assert_as_accurate(*map(torch.cat, logits), name="logits")
    assert statistics.geometric_mean(ratios) <= 1.2, ratios


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_step_in_bf16(architecture):
    assert_as_close_to_float64(build(architecture, torch.bfloat16).eval(), architecture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_under_autocast(dtype):
    assert_as_close_to_float64(build("llama", dtype).eval(), "llama", autocast=torch.bfloat16)


def train(model, architecture, autocast=None, steps=20):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for i in range(steps):
        torch.manual_seed(i)
        with torch.autocast(model.device.type, dtype=autocast) if autocast else nullcontext():
            loss = model(**batch(architecture, seed=i % 3)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@architectures
def test_twenty_steps(architecture):
    stock = train(build(architecture), architecture)
    with peftfast.enabled(strict=True), FastCalls() as calls:
        model = build(architecture)
        ours = train(model, architecture)
    assert calls.backward == 20 * len(lora_layers(model))
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    assert stock[-3:].mean() < stock[:3].mean()


@pytest.mark.parametrize("adapters", ["fp32", "bf16"])
def test_twenty_steps_in_bf16(adapters):
    def build_bf16():
        return build("llama", torch.bfloat16, autocast_adapter_dtype=adapters == "fp32")

    stock = train(build_bf16(), "llama")
    with peftfast.enabled(strict=True):
        ours = train(build_bf16(), "llama")
    torch.testing.assert_close(ours, stock, rtol=1e-2, atol=1e-2)
    assert stock[-3:].mean() < stock[:3].mean()


OPTIONS = {
    "rslora": dict(use_rslora=True),
    "patterns": dict(rank_pattern={"q_proj": 3, "down_proj": 11}, alpha_pattern={"v_proj": 20, "q_proj": 2}),
    "lora_bias": dict(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "bias lora_only": dict(bias="lora_only"),
    "bias all": dict(bias="all"),
    "gaussian": dict(init_lora_weights="gaussian"),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora"),
    "one layer": dict(layers_to_transform=[1]),
    "modules_to_save": dict(modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options):
    assert_parity(build(**options), batch())


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("options", [dict(lora_bias=True), dict(bias="lora_only")], ids=str)
def test_biases(architecture, options):
    # Not the keys: their bias adds the same to all scores of a row, so its gradient is nothing but rounding.
    targets = {"bert": ["query", "value", "dense"], "gpt2": ["c_attn", "c_proj", "c_fc"]}[architecture]
    model, inputs = build(architecture, target_modules=targets, **options), batch(architecture)
    assert_parity(model, inputs)
    trained = [name for name, p in model.named_parameters() if p.grad is not None and name.endswith("bias")]
    assert trained


def test_frozen_factor():
    model = build()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    assert_parity(model, batch())


def two_adapters(**options):
    model = build(**options)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=4, target_modules=["q_proj", "up_proj"]))
    return randomize(model, ["lora_B.second"])


def test_several_active_adapters():
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    assert_parity(model, batch())
    assert any("lora_A.second" in name for name, p in model.named_parameters() if p.grad is not None)


def test_an_adapter_that_some_layers_lack():
    model = two_adapters()
    model.set_adapter("second")
    inputs, stock = batch(), step(model, batch())
    with peftfast.enabled(), FastCalls() as calls:
        ours = step(model, inputs)
    assert calls.backward == 4
    assert_same(ours, stock)


def test_scaling_that_changes_between_calls():
    model, inputs = two_adapters(), batch()
    model.base_model.set_adapter(["default", "second"])
    stock_losses, our_losses = [], []
    for enabled, losses in ((nullcontext, stock_losses), (lambda: peftfast.enabled(strict=True), our_losses)):
        with enabled():
            for layer in lora_layers(model):
                layer.scale_layer(2.5)
            losses.append(step(model, inputs)["loss"])
            for layer in lora_layers(model):
                layer.set_scale("default", 0.3)
            losses.append(step(model, inputs)["loss"])
            for layer in lora_layers(model):
                layer.unscale_layer()
            losses.append(step(model, inputs)["loss"])
            with rescale_adapter_scale(model, 0.5):
                losses.append(step(model, inputs)["loss"])
            losses.append(step(model, inputs)["loss"])
    assert len(set(map(float, stock_losses))) == 4
    torch.testing.assert_close(torch.stack(our_losses), torch.stack(stock_losses), rtol=1e-5, atol=0)


def test_scaling_as_a_tensor():
    model = build()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    layer = lora_layers(model)[0]
    assert isinstance(layer.scaling["default"], torch.Tensor)
    assert_parity(model, batch())
    layer.scaling["default"].fill_(3.0)
    assert_parity(model, batch())


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(reentrant, dropout):
    """As the Trainer switches it on. The recomputation replays the dropout: equal to no checkpointing."""
    model, inputs = build(lora_dropout=dropout), batch()
    model.enable_input_require_grads()
    with peftfast.enabled(strict=True):
        plain = step(model, inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        with FastCalls() as calls:
            checkpointed = step(model, inputs)
    assert calls.forward == 2 * len(lora_layers(model)) and calls.backward == len(lora_layers(model))
    for name in plain:
        assert torch.equal(checkpointed[name], plain[name]), name
    if not dropout:
        assert_same(checkpointed, step(model, inputs))


def test_dropout_has_the_right_mean():
    """Another generator draws other masks than PEFT's, of the same mean: that of the model in eval mode."""
    torch.manual_seed(0)
    layer = get_peft_model(
        nn.Sequential(nn.Linear(24, 16)), LoraConfig(target_modules=["0"], lora_dropout=0.25)
    )
    randomize(layer)
    x = torch.randn(1, 24)
    with torch.no_grad(), peftfast.enabled(strict=True):
        expected = layer.eval()(x)
        samples = torch.cat([layer.train()(x) for _ in range(4000)])
    standard_error = samples.std(0) / len(samples) ** 0.5
    assert (samples.std(0) > 0).all()
    assert ((samples.mean(0) - expected[0]).abs() < 5 * standard_error).all()


def test_dropout_follows_its_own_module():
    """What counts is whether the dropout module is training, not the layer that holds it."""
    model, inputs = build(lora_dropout=0.5), batch()
    for layer in lora_layers(model):
        layer.lora_dropout.eval()
    assert_parity(model, inputs)


def test_eval_mode_drops_nothing():
    assert_parity(build(lora_dropout=0.5).eval(), batch())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_generate(architecture):
    model = build(architecture).eval()
    prompt = batch(architecture)["input_ids"][:2]

    def generate():
        return model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)

    stock = generate()
    with peftfast.enabled(strict=True), FastCalls() as calls:
        ours = generate()
    assert calls.forward and torch.equal(ours, stock)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_model(dropout):
    """Through enable(), torch.compile sees one graph per layer."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    model = randomize(get_peft_model(net, LoraConfig(target_modules=["0", "1"], lora_dropout=dropout)))
    x = torch.randn(7, 12)
    with peftfast.enabled(strict=True):
        torch.manual_seed(3)
        eager = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.manual_seed(3)
        ours = compiled(x)
    torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_compiled_model_does_not_ask_what_other_models_fell_back_from():
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
    model = randomize(get_peft_model(net, LoraConfig(target_modules=["0", "1"])))
    other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], use_dora=True))
    x = torch.randn(7, 12)
    with peftfast.enabled():
        other(torch.randn(2, 4))
        assert forwards.last_fallback(other.base_model.model[0])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        ours = compiled(x)
        del other
        gc.collect()
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(compiled(x), ours, rtol=0, atol=0)


def test_meta_device():
    model = net().to("meta")
    with peftfast.enabled():
        assert model(torch.zeros(3, 4, dtype=torch.int64, device="meta")).shape == (3, 4, 5)


# ---------------------------------------------------------------------------- what PEFT does between calls


def merging(model, inputs, path):
    yield model(**inputs).logits
    model.merge_adapter()
    yield model(**inputs).logits
    yield lora_layers(model)[0].get_base_layer().weight
    model.unmerge_adapter()
    yield model(**inputs).logits
    yield model.merge_and_unload(safe_merge=True)(**inputs).logits


def disabling(model, inputs, path):
    with model.disable_adapter():
        yield model(**inputs).logits
    yield model(**inputs).logits
    model.merge_adapter()
    with model.disable_adapter():
        yield model(**inputs).logits
    yield model(**inputs).logits


def copying(model, inputs, path):
    twin = copy.deepcopy(model)
    randomize(twin)
    yield twin(**inputs).logits
    yield model(**inputs).logits


def pickling(model, inputs, path):
    twin = pickle.loads(pickle.dumps(model))
    torch.manual_seed(5)
    randomize(twin)
    yield twin(**inputs).logits
    yield model(**inputs).logits


def saving(model, inputs, path):
    yield model(**inputs).logits
    model.save_pretrained(path)
    yield from (t for _, t in sorted(load_file(path / "adapter_model.safetensors").items()))
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(base_model("llama"), path)
    yield loaded.eval()(**inputs).logits


def editing(model, inputs, path):
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomize(model, ["lora_B.second"])
    yield model(**inputs).logits
    model.set_adapter("second")
    yield model(**inputs).logits
    model.base_model.set_adapter(["default", "second"])
    yield model(**inputs).logits
    model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="svd", svd_rank=4)
    model.set_adapter("both")
    yield model(**inputs).logits
    model.delete_adapter("default")
    yield model(**inputs).logits
    model.set_adapter("second")
    yield model(**inputs).logits


def hotswapping(model, inputs, path):
    randomize(copy.deepcopy(model)).save_pretrained(path)
    yield model(**inputs).logits
    hotswap_adapter(model, path, adapter_name="default")
    yield model(**inputs).logits


def replacing_parameters(model, inputs, path):
    yield model(**inputs).logits
    for layer in lora_layers(model):
        for linear in (layer.lora_A["default"], layer.lora_B["default"], layer.get_base_layer()):
            linear.weight = nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)
    yield model(**inputs).logits
    for layer in lora_layers(model):
        layer.get_base_layer().weight.data = layer.get_base_layer().weight.data.clone().mul_(0.5)
    yield model(**inputs).logits
    model.bfloat16().float()
    yield model(**inputs).logits


LIVES = [merging, disabling, copying, pickling, saving, editing, hotswapping, replacing_parameters]
WAYS = {
    "enable, then wrap": ("enable", None),
    "wrap, then enable": (None, "enable"),
    "accelerate": (None, "accelerate"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_life_of_a_model(life, way, tmp_path):
    def results(before=None, after=None):
        if before:
            peftfast.enable()
        model = build().eval()
        if after == "enable":
            peftfast.enable()
        if after == "accelerate":
            peftfast.accelerate(model)
        torch.manual_seed(2)
        with torch.no_grad(), FastCalls() as calls:
            values = list(life(model, batch(), tmp_path / f"{before}-{after}"))
        peftfast.disable()
        return values, calls.forward

    stock, none = results()
    ours, calls = results(*way)
    assert none == 0 and calls > 0
    assert len(ours) == len(stock)
    for mine, expected in zip(ours, stock, strict=True):
        assert relative_error(mine, expected) <= 1e-5


def test_nothing_of_the_model_changes():
    def portrait(model):
        return str(model), [(name, type(m)) for name, m in model.named_modules()], list(model.state_dict())

    model = build()
    stock = portrait(model)
    with peftfast.enabled():
        assert portrait(model) == stock and portrait(build()) == stock
        assert b"peftfast" not in pickle.dumps(model)
    peftfast.accelerate(model)
    assert portrait(model) == stock


def test_checkpoint_bytes(tmp_path):
    build().save_pretrained(tmp_path / "stock")
    with peftfast.enabled():
        build().save_pretrained(tmp_path / "ours")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stock" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


# ----------------------------------------------------------------------------------------------- fallbacks


def net(**options):
    """A small model with one layer of every kind."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(20, 12)
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.linear = nn.Linear(24, 16)
            self.head = nn.Linear(16, 5)

        def forward(self, ids, adapter_names=None):
            x = self.conv(self.embedding(ids).unsqueeze(1))
            return self.head(self.linear(x.permute(0, 2, 1, 3).flatten(2)).relu())

    torch.manual_seed(4)
    options = dict(r=4, target_modules=["linear", "head"]) | options
    return randomize(get_peft_model(Net(), LoraConfig(**options)), ["lora_B", "lora_embedding_B", "bias"])


def linear(model):
    return model.base_model.model.linear


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def double_the_output(*hook_args):
    return hook_args[-1] * 2


def hooked(pick, register="register_forward_hook", hook=double_the_output):
    def build():
        model = net()
        getattr(pick(linear(model)), register)(hook)
        return model

    return build


def changed(change):
    def build():
        model = net()
        change(linear(model))
        return model

    return build


def subclassed():
    base = net().unload()
    base.linear = Doubling(24, 16)
    return randomize(get_peft_model(base, LoraConfig(r=4, target_modules=["linear", "head"])))


def own_forward(module):
    original = module.forward
    module.forward = lambda x: original(x) * 2


FALLBACKS = {  # how the model is made, the layer that falls back, words of the reason
    "dora": (lambda: net(use_dora=True), "linear", "dora"),
    "embedding": (lambda: net(target_modules=["embedding", "linear"]), "embedding", "embedding"),
    "conv2d": (lambda: net(target_modules=["conv", "linear"]), "conv", "conv2d"),
    "hook on lora_A": (hooked(lambda layer: layer.lora_A["default"]), "linear", "hook"),
    "hook on lora_B": (hooked(lambda layer: layer.lora_B["default"]), "linear", "hook"),
    "hook on lora_dropout": (hooked(lambda layer: layer.lora_dropout["default"]), "linear", "hook"),
    "hook on the base layer": (hooked(lambda layer: layer.get_base_layer()), "linear", "hook"),
    "pre-hook on lora_A": (
        hooked(
            lambda layer: layer.lora_A["default"], "register_forward_pre_hook", lambda m, args: (args[0] * 2,)
        ),
        "linear",
        "hook",
    ),
    "backward hook on lora_B": (
        hooked(
            lambda layer: layer.lora_B["default"],
            "register_full_backward_hook",
            lambda m, gi, go: (gi[0] * 2,),
        ),
        "linear",
        "hook",
    ),
    "base weight trained": (
        changed(lambda layer: layer.base_layer.weight.requires_grad_()),
        "linear",
        "trained",
    ),
    "float64": (lambda: net().double(), "linear", "float64"),
    "subclass of nn.Linear": (subclassed, "linear", "Doubling"),
    "base layer with its own forward": (
        changed(lambda layer: own_forward(layer.base_layer)),
        "linear",
        "forward",
    ),
    "lora_A with its own forward": (
        changed(lambda layer: own_forward(layer.lora_A["default"])),
        "linear",
        "forward|plain",
    ),
    "custom dropout": (
        changed(lambda layer: layer.lora_dropout.update({"default": nn.Tanh()})),
        "linear",
        "dropout|Tanh",
    ),
}


def net_step(model, **kwargs):
    model.zero_grad()
    torch.manual_seed(1)
    ids = torch.arange(12).view(3, 4)
    out = model(ids, **kwargs)
    if out.requires_grad:
        out.square().mean().backward()
    return {"output": out.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def entry(model, name):
    (found,) = (entry for entry in peftfast.report(model) if entry.name.split(".")[-1] == name)
    return found


@pytest.mark.parametrize("case", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_fallback(case):
    build, layer, reason = case
    model = build()
    stock = net_step(model)
    with peftfast.enabled():
        assert_same(net_step(model), stock, tolerance=1e-6)
        report = entry(model, layer)
        assert not report.fast
        assert re.search(reason, f"{report.kind}: {report.reason}", re.I)
        assert report.name in str(peftfast.report(model))
        assert report.reason in str(peftfast.report(model))
    with peftfast.enabled(strict=True), pytest.raises(RuntimeError, match=f"(?is){layer}.*({reason})"):
        net_step(model)
    assert_same(net_step(model), stock, tolerance=0)


def test_fallback_of_a_mixed_batch():
    """With a bias of an adapter; tests/test_mixed_batches.py has those that run on the fast path."""
    model = net(lora_bias=True).eval()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"]))
    randomize(model, ["lora_B.second"])
    names = ["default", "second", "__base__"]
    stock = net_step(model, adapter_names=names)
    with peftfast.enabled(), FastCalls() as calls:
        assert_same(net_step(model, adapter_names=names), stock, tolerance=0)
    assert calls.forward == 0
    with peftfast.enabled(strict=True), pytest.raises(RuntimeError, match="(?s)linear.*adapter_names"):
        net_step(model, adapter_names=names)


def test_fallback_without_input_casting():
    """With casting off, PEFT hands x to lora_A as it is: an error when dtypes differ, and ours is that."""
    model = net()
    for layer in lora_layers(model):
        layer.base_layer.bfloat16()
    x = torch.randn(3, 24).bfloat16()
    layer = linear(model)
    with disable_input_dtype_casting(model):
        with pytest.raises(RuntimeError) as stock:
            layer(x)
        with peftfast.enabled():
            with pytest.raises(RuntimeError, match=re.escape(str(stock.value))):
                layer(x)
            report = entry(model, "linear")
            assert not report.fast and re.search("cast", report.reason)
        with peftfast.enabled(strict=True), pytest.raises(RuntimeError, match="(?is)linear.*cast"):
            layer(x)
    with peftfast.enabled(strict=True):
        layer(x)


def test_fallback_under_global_hooks():
    model = net()
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        stock = net_step(model)
        with peftfast.enabled():
            assert_same(net_step(model), stock)
            assert not entry(model, "linear").fast
    finally:
        hook.remove()


def test_hook_on_the_lora_layer_itself_stays_fast():
    model = net()
    linear(model).register_forward_hook(double_the_output)
    stock = net_step(model)
    with peftfast.enabled(strict=True), FastCalls() as calls:
        assert_same(net_step(model), stock, tolerance=1e-6)
    assert calls.forward == 2


def test_second_derivative_of_a_fallback_is_pefts():
    """Only the op refuses second derivatives; a layer that runs PEFT's own code keeps them."""
    model = net().double()
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)

    def second_derivative():
        (gradient,) = torch.autograd.grad(linear(model)(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.sum(), x)[0]

    stock = second_derivative()
    with peftfast.enabled():
        assert torch.equal(second_derivative(), stock)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad", "dual numbers"])
def test_function_transforms(transform):
    """What the op cannot be transformed into is computed by PEFT's own code."""
    model = net()
    layer, x = linear(model), torch.randn(6, 24)

    def apply():
        if transform == "vmap":
            return torch.func.vmap(layer)(x)
        if transform == "jvp":
            return torch.func.jvp(layer, (x,), (x.cos(),))[1]
        if transform == "dual numbers":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))).tangent
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    stock = apply()
    with peftfast.enabled():
        torch.testing.assert_close(apply(), stock)


@pytest.mark.parametrize("record", [torch.jit.trace, lambda *args: torch.export.export(*args).module()])
def test_recorded_graphs(record):
    """A graph that may leave the process holds torch's operations, and runs where there is no peftfast."""
    model, ids = net().eval(), torch.arange(12).view(3, 4)
    with peftfast.enabled():
        recorded = record(model, (ids,))
        with FastCalls() as calls:
            torch.testing.assert_close(recorded(ids), model(ids))
    assert calls.forward == 2  # those of model(ids)


def test_an_error_of_the_base_layer_is_the_same_error():
    model = net()
    x = torch.randn(3, 23)
    with pytest.raises(RuntimeError):
        linear(model)(x)
    with peftfast.enabled(), pytest.raises((RuntimeError, ValueError)):
        linear(model)(x)


# --------------------------------------------------------------------------------- report, enable, disable


def test_report_of_a_fast_model():
    model = build()
    with peftfast.enabled():
        report = peftfast.report(model)
        entries = list(report)
    expected = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert [entry.name for entry in entries] == expected
    assert all(entry.fast and entry.reason is None for entry in entries)
    assert str(len(expected)) in str(report)


def test_report_while_disabled():
    entries = list(peftfast.report(build()))
    assert entries and not any(entry.fast for entry in entries)
    assert all("enable" in entry.reason for entry in entries)


def test_report_of_a_model_without_adapters():
    assert list(peftfast.report(nn.Linear(3, 3))) == []
    assert str(peftfast.report(nn.Linear(3, 3)))


def test_report_agrees_with_what_runs():
    model = net(target_modules=["embedding", "conv", "linear", "head"])
    linear(model).lora_A["default"].register_forward_hook(lambda *args: None)
    with peftfast.enabled(), FastCalls() as calls:
        net_step(model)
        fast = {entry.name.split(".")[-1] for entry in peftfast.report(model) if entry.fast}
    assert fast == {"head"} and calls.forward == 1


def test_report_of_a_layer_with_its_own_forward():
    """As accelerate's hooks give it, before enable(): the class's forward, and with it ours, is not called."""
    model = net()
    own_forward(linear(model))
    with peftfast.enabled(), FastCalls() as calls:
        net_step(model)
        assert calls.forward == 1
        assert not entry(model, "linear").fast
        assert "forward" in entry(model, "linear").reason


def test_report_forgets_a_fallback_that_is_over():
    model = net()
    x = torch.randn(6, 24)
    with peftfast.enabled():
        torch.func.vmap(linear(model))(x)
        assert not entry(model, "linear").fast
        linear(model)(x)
        assert entry(model, "linear").fast


def every_class_attribute():
    """All that a patch could reach: the attributes of the classes of PEFT's LoRA code and of their bases."""
    modules = [lora, lora.layer, lora.model, lora.variants, transformers.pytorch_utils, nn.modules.linear]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c)}
    classes |= {base for c in classes for base in c.__mro__} - {object}
    return {(c, name): id(value) for c in classes for name, value in vars(c).items()}


def test_disable_restores_everything():
    before, forward = every_class_attribute(), lora.Linear.forward
    peftfast.enable()
    assert every_class_attribute() != before
    assert inspect.signature(lora.Linear.forward) == inspect.signature(forward)
    peftfast.enable(strict=True)  # enabling twice is enabling once
    peftfast.disable()
    assert every_class_attribute() == before and lora.Linear.forward is forward
    peftfast.disable()
    assert every_class_attribute() == before


def test_enabled_restores_what_was():
    before = every_class_attribute()
    with pytest.raises(KeyError), peftfast.enabled():
        raise KeyError
    assert every_class_attribute() == before
    peftfast.enable()
    during = every_class_attribute()
    with peftfast.enabled(strict=True):
        pass
    assert every_class_attribute() == during
    net_step(net(use_dora=True))  # strict only inside


def test_accelerate_is_for_one_model():
    before = every_class_attribute()
    model, other = build(), build()
    inputs = batch()
    stock = step(model, inputs)
    assert peftfast.accelerate(model) is model
    with FastCalls() as calls:
        assert_same(step(model, inputs), stock)
    assert calls.backward == len(lora_layers(model))
    with FastCalls() as calls:
        assert_same(step(other, inputs), stock, tolerance=0)
    assert calls.forward == 0
    assert all(entry.fast for entry in peftfast.report(model))
    assert not any(entry.fast for entry in peftfast.report(other))
    peftfast.disable()
    assert every_class_attribute() == before
    peftfast.accelerate(other)
    with FastCalls() as calls:  # what was disabled stays so when another model is accelerated
        assert_same(step(model, inputs), stock, tolerance=0)
    assert calls.forward == 0


def test_accelerate_outlives_a_block_of_enabled():
    model, inputs = build(), batch()
    with peftfast.enabled():
        peftfast.accelerate(model)
    with FastCalls() as calls:
        step(model, inputs)
    assert calls.backward == len(lora_layers(model))


def test_accelerate_is_kept_by_a_block_of_enabled():
    model, inputs = peftfast.accelerate(build()), batch()
    with peftfast.enabled():
        pass
    with FastCalls() as calls:
        step(model, inputs)
    assert calls.backward == len(lora_layers(model))


def test_accelerate_refuses_a_model_without_adapters():
    with pytest.raises(ValueError, match="model"):
        peftfast.accelerate(nn.Linear(3, 3))


def test_accelerate_strictly():
    model = peftfast.accelerate(net(use_dora=True), strict=True)
    with pytest.raises(RuntimeError, match="(?is)linear.*dora"):
        net_step(model)
    net_step(net(use_dora=True))


def test_a_copy_of_an_accelerated_model_is_its_own():
    model = peftfast.accelerate(build().eval())
    twin = randomize(copy.deepcopy(model))
    reference = randomize(build().eval())
    reference.load_state_dict(twin.state_dict())
    with torch.no_grad():
        ours, stock = twin(**batch()).logits, reference(**batch()).logits
    assert relative_error(ours, stock) <= 1e-5


def test_the_op_is_called_by_nobody_unless_enabled():
    with FastCalls() as calls:
        step(build(), batch())
    assert calls.forward == calls.backward == 0


# ------------------------------------------------------------------------ adapters on peftfast's 4-bit layers


class FourBitCalls(FastCalls):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.peftfast.fourbit_linear.default
        self.backward += func is torch.ops.peftfast.fourbit_linear_backward.default
        return func(*args, **(kwargs or {}))


def fourbit_base():
    torch.manual_seed(6)
    net = nn.ModuleDict({"linear": nn.Linear(24, 16), "other": nn.Linear(24, 16), "dense": nn.Linear(24, 16)})
    for name in ("linear", "other"):
        net[name] = Linear4bit.from_linear(net[name])
    return net


def fourbit_net(**options):
    options = dict(r=4, lora_alpha=6, target_modules=["linear", "other", "dense"]) | options
    return randomize(get_peft_model(fourbit_base(), LoraConfig(**options)), ["lora_B"])


def weight_with_adapters(layer, *names):
    """In float64: what merging should make of the base weight."""
    weight = layer.get_base_layer().dequantize(torch.float32).double()
    for name in names:
        A, B = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        weight = weight + layer.scaling[name] * B @ A
    return weight


def test_fourbit_layer_is_given_its_own_lora_layer():
    """Whether peftfast is enabled or not; dense layers get PEFT's."""
    for _ in range(2):
        kinds = {
            name.split(".")[-1]: type(m)
            for name, m in fourbit_net().named_modules()
            if isinstance(m, LoraLayer)
        }
        assert kinds == {"linear": LoraLinear4bit, "other": LoraLinear4bit, "dense": lora.Linear}
        peftfast.enable()


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_fourbit_step(dtype, compute_dtype, autocast):
    model = fourbit_net()
    layer, oracle = linear(model), copy.deepcopy(linear(model)).double()
    layer.base_layer.compute_dtype = compute_dtype
    oracle.base_layer = nn.Linear(24, 16)
    oracle.base_layer.weight.data = weight_with_adapters(layer)
    oracle.base_layer.bias.data = layer.base_layer.bias.double()
    oracle.__class__ = lora.Linear
    x = torch.randn(30, 24).to(dtype)

    def results(layer, x, autocast=None):
        layer.zero_grad()
        x = x.detach().requires_grad_()
        with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
            y = layer(x)
        grad_y = torch.randint(-64, 65, y.shape, generator=generator(5)) / 32
        y.backward(grad_y.to(y.dtype))  # exact in every dtype
        factors = {name: p.grad for name, p in layer.named_parameters() if "lora" in name}
        return {"output": y.detach(), "input": x.grad} | factors

    exact, stock = results(oracle, x.double()), results(layer, x, autocast)
    with peftfast.enabled(strict=True), FourBitCalls() as calls:
        ours = results(layer, x, autocast)
    assert (calls.forward, calls.backward) == (1, 1)
    assert len(exact) == 4
    for name in exact:
        assert ours[name].dtype == stock[name].dtype
        assert_as_accurate(ours[name], stock[name], exact[name], slack=1e-7, name=name)


@pytest.mark.filterwarnings("ignore:Layer .* quantized anew")
@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
def test_fourbit_merge_and_unmerge(safe):
    model = fourbit_net(lora_bias=True)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["linear"]))
    randomize(model, ["second"])
    layer, base = linear(model), linear(model).get_base_layer()
    expected, before = weight_with_adapters(layer, "default", "second"), base.dequantize(torch.float32)
    bias = base.bias.clone()
    model.merge_adapter(["default", "second"], safe_merge=safe)
    assert layer.merged_adapters == ["default", "second"]
    assert type(base) is Linear4bit and base.weight.dtype == torch.uint8
    error = relative_error(base.dequantize(torch.float32), expected)
    assert 0.02 < error < 0.15 and layer.requantization_error == pytest.approx(error, rel=1e-3)
    torch.testing.assert_close(base.bias, bias + layer.scaling["default"] * layer.lora_B["default"].bias)
    x = torch.randn(5, 24)
    with peftfast.enabled():
        torch.testing.assert_close(layer(x), x @ base.dequantize(torch.float32).T + base.bias)
    model.unmerge_adapter()
    assert not layer.merged
    assert relative_error(base.dequantize(torch.float32), before) < 0.3
    torch.testing.assert_close(base.bias, bias)


def test_fourbit_merge_warns_of_the_error():
    """Once for layers that are alike, and again for one that is clearly worse."""
    model = fourbit_net()
    with pytest.warns(UserWarning) as warned:
        model.merge_adapter()
    first, *more = [str(w.message) for w in warned if "quantized anew" in str(w.message)]
    layer = linear(model)
    assert "model.linear" in first and f"{layer.requantization_error:.2%}" in first and not more


@pytest.mark.filterwarnings("ignore:Layer .* quantized anew")
def test_fourbit_merge_and_unload():
    model = fourbit_net()
    expected = weight_with_adapters(linear(model), "default")
    plain = model.merge_and_unload()
    assert type(plain["linear"]) is Linear4bit
    assert relative_error(plain["linear"].dequantize(torch.float32), expected) < 0.15
    assert not any("lora" in name for name in plain.state_dict())


def test_fourbit_merge_of_a_broken_adapter_changes_nothing():
    model = fourbit_net()
    model.add_adapter("second", LoraConfig(r=3, target_modules=["linear"]))
    layer = linear(model)
    layer.lora_B["second"].weight.data[3, 1] = torch.nan
    before = copy.deepcopy(model.state_dict())
    for safe in (False, True):
        with pytest.raises(ValueError, match="second.*not finite"):
            layer.merge(safe_merge=safe, adapter_names=["default", "second"])
    assert not layer.merged
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_fourbit_options_that_need_the_dense_weight_are_refused():
    for options in (dict(use_dora=True), dict(init_lora_weights="pissa"), dict(init_lora_weights="mica")):
        with pytest.raises((ValueError, TypeError)):
            fourbit_net(**options)
    with pytest.raises(ValueError, match="loftq"):
        linear(fourbit_net()).loftq_init("default", None)


@pytest.mark.parametrize("enabled", [False, True])
def test_fourbit_life(enabled, tmp_path):
    """Keys, files and copies are those of PEFT's own layer on a dense weight."""
    if enabled:
        peftfast.enable(strict=True)
    model, x = fourbit_net(lora_dropout=0.1).eval(), torch.randn(5, 24)
    twin = randomize(get_peft_model(nn.ModuleDict({n: nn.Linear(24, 16) for n in ("linear", "other", "dense")}),
                          LoraConfig(r=4, target_modules=["linear", "other", "dense"])))  # fmt: skip
    assert [n for n in model.state_dict() if "lora" in n] == [n for n in twin.state_dict() if "lora" in n]
    expected = linear(model)(x)
    assert relative_error(expected, x.double() @ weight_with_adapters(linear(model), "default").T
                          + linear(model).base_layer.bias.double()) < 1e-6  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fourbit_base(), tmp_path)
    assert type(linear(loaded)) is LoraLinear4bit
    for same in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(linear(same)(x), expected)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["linear"]))
    randomize(model, ["second"])
    model.set_adapter("second")
    assert not torch.equal(linear(model)(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(linear(model)(x), linear(model).base_layer(x))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(linear(model)(x), expected)


def test_fourbit_report():
    model = fourbit_net()
    with peftfast.enabled():
        assert {e.name.split(".")[-1]: (e.kind, e.fast) for e in peftfast.report(model)} == {
            "linear": ("lora.LoraLinear4bit", True),
            "other": ("lora.LoraLinear4bit", True),
            "dense": ("lora.Linear", True),
        }
        linear(model).lora_B["default"].register_forward_hook(double_the_output)
        assert not entry(model, "linear").fast and "hook" in entry(model, "linear").reason


def test_after_import(tmp_path, monkeypatch):
    """PEFT learns of the layer whenever it is imported, before peftfast or after it."""
    (tmp_path / "imported_later.py").write_text("value = 3")
    monkeypatch.syspath_prepend(tmp_path)
    seen, finders = [], list(sys.meta_path)
    after_import("json", lambda module: seen.append(module.dumps(1)))
    after_import("imported_later", lambda module: seen.append(module.value))
    assert seen == ["1"]
    import imported_later  # noqa: F401

    assert seen == ["1", 3] and sys.meta_path == finders


def test_asking_whether_peft_is_installed_does_not_lose_peftfast_s_methods():
    """As transformers does before anything of PEFT is imported."""
    code = (
        "import importlib.util, sys, peftfast\n"
        "assert importlib.util.find_spec('peft') and 'peft' not in sys.modules\n"
        "import peft.mapping\n"
        "print(*sorted(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.keys() & "
        "{'EXPERT_LORA', 'MIXTURE_LORA', 'BOTTLENECK'}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["BOTTLENECK", "EXPERT_LORA", "MIXTURE_LORA"]
