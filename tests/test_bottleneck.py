"""Bottleneck adapters as a method of PEFT, against the same modules put on by hooks, in plain torch and in float64."""

import copy
import functools
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

import peftfast
from peftfast import BottleneckConfig
from peftfast.integrations.tuners.bottleneck import BottleneckLayer
from peftfast.nn import Linear4bit, quantize_linears
from peftfast.testing import assert_as_accurate

FP32, BF16 = torch.float32, torch.bfloat16
PLAIN = dict(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
DECODER = dict(PLAIN, head_dim=10)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GPT2 = dict(vocab_size=61, n_embd=36, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
BERT = {
    key: PLAIN[key] for key in PLAIN if key not in ("num_key_value_heads", "bos_token_id", "eos_token_id")
}
EXPERTS = dict(moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(**DECODER),
    "mistral": transformers.MistralConfig(**DECODER),
    "qwen2": transformers.Qwen2Config(**PLAIN),
    "qwen3": transformers.Qwen3Config(**DECODER),
    "gemma2": transformers.Gemma2Config(**DECODER),
    "gemma3": transformers.Gemma3TextConfig(**DECODER),
    "gpt2": transformers.GPT2Config(**GPT2, **NO_DROPOUT),
    "bert": transformers.BertConfig(**BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "opt": transformers.OPTConfig(
        vocab_size=61, hidden_size=36, ffn_dim=52, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=36,
        max_position_embeddings=64, dropout=0.0,
    ),
    "t5": transformers.T5Config(
        vocab_size=61, d_model=36, d_kv=18, d_ff=52, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    ),
    "mixtral": transformers.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": transformers.OlmoeConfig(**PLAIN, num_experts=4, num_experts_per_tok=2),
    "qwen3_moe": transformers.Qwen3MoeConfig(**DECODER, **EXPERTS),
}  # fmt: skip
# By hand: the modules after attention, those after the feed-forward block, and those whose input the block reads.
LLAMA = (["model.layers.{}.self_attn"], ["model.layers.{}.mlp"], ["model.layers.{}.mlp"])
PLACES = {
    "gpt2": (["transformer.h.{}.attn"], ["transformer.h.{}.mlp"], ["transformer.h.{}.mlp"]),
    "bert": (
        ["bert.encoder.layer.{}.attention.output.dense"],
        ["bert.encoder.layer.{}.output.dense"],
        ["bert.encoder.layer.{}.intermediate"],
    ),
    "opt": (
        ["model.decoder.layers.{}.self_attn"],
        ["model.decoder.layers.{}.fc2"],
        ["model.decoder.layers.{}.fc1"],
    ),
    "t5": (
        [
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        ],
        ["encoder.block.{}.layer.1.DenseReluDense", "decoder.block.{}.layer.2.DenseReluDense"],
        ["encoder.block.{}.layer.1.DenseReluDense", "decoder.block.{}.layer.2.DenseReluDense"],
    ),
}
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


def base_model(kind="llama", dtype=FP32, seed=0):
    torch.manual_seed(seed)
    auto = {"bert": transformers.AutoModelForMaskedLM, "t5": transformers.AutoModelForSeq2SeqLM}
    model = auto.get(kind, transformers.AutoModelForCausalLM).from_config(CONFIGS[kind], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    if kind in ("mixtral", "olmoe", "qwen3_moe"):
        model.set_experts_implementation("eager")  # the others have no float64
    return model.eval()


def adapted(base, adapter_name="default", **options):
    return get_peft_model(base, BottleneckConfig(**dict(bottleneck_size=5) | options), adapter_name)


def randomize(model, seed=1):
    """Adapters none of whose parameters is zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bottleneck_" in name:
                parameter.normal_(mean=float("norm_weight" in name), std=0.3)
    return model


def adapters(model):
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLayer)
    }


def batch():
    ids = torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 7:] = mask[2, 4:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


def logits(model, **more):
    with torch.no_grad():
        return model(**batch(), **more).logits


def places(kind, placement):
    """The names of the adapted modules, with the module whose input the adapter reads, None for its own output."""
    attention, feed_forward, read = PLACES.get(kind, LLAMA)
    found = {}
    for layer in range(2):
        if placement == "houlsby":
            found |= {name.format(layer): None for name in attention}
        for name, source in zip(feed_forward, read):
            found[name.format(layer)] = source.format(layer) if placement == "parallel" else None
    return found


# ---- the reference ------------------------------------------------------------------------------------------

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def eager_adapter(parameters, config, x):
    if config.layer_norm:
        x = F.layer_norm(x, x.shape[-1:], parameters["norm_weight"], parameters["norm_bias"])
    bottleneck = ACTIVATIONS[config.activation](
        F.linear(x, parameters["down_weight"], parameters["down_bias"])
    )
    scaling = parameters["scaling"] if config.scaling == "learned" else config.scaling
    return F.linear(bottleneck, parameters["up_weight"], parameters["up_bias"]) * scaling


def with_hooks(base, model, kind, dtype):
    """The base model with the adapters of `model`, put on by hooks; and their parameters, by the names of `model`."""
    config, twin = model.peft_config["default"], copy.deepcopy(base).to(dtype)
    leaves, inputs = {}, {}
    for name, source in places(kind, config.placement).items():
        prefix = f"base_model.model.{name}.bottleneck_adapter.default."
        own = {
            key.removeprefix(prefix): p.detach().to(dtype).requires_grad_()
            for key, p in model.named_parameters()
            if key.startswith(prefix)
        }
        leaves |= {prefix + key: p for key, p in own.items()}
        if source is not None:

            def read(module, args, kwargs, name=name):
                inputs[name] = args[0] if args else kwargs["hidden_states"]

            twin.get_submodule(source).register_forward_pre_hook(read, with_kwargs=True)

        def add(module, args, output, name=name, own=own, source=source):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + eager_adapter(own, config, inputs[name] if source else hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        twin.get_submodule(name).register_forward_hook(add)
    return twin.requires_grad_(False), leaves


def step(model, leaves):
    out = model(**batch())
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    return {"loss": out.loss.detach(), "logits": out.logits.detach()} | dict(zip(leaves, grads))


def assert_parity(base, model, kind, slack=1e-5):
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ours = step(model, trained)
    eager, exact = (step(*with_hooks(base, model, kind, dtype)) for dtype in (FP32, torch.float64))
    assert ours.keys() == eager.keys()
    for name, value in eager.items():
        # A learned scaling has one gradient, a sum in which almost all cancels.
        luck = 1e-3 if name.endswith("scaling") else slack
        assert_as_accurate(ours[name], value, exact[name], slack=luck, name=name)


# ---- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_starts_as_its_base(kind, placement):
    base = base_model(kind)
    before = logits(base)
    model = adapted(base, placement=placement, layer_norm=True, scaling="learned")
    assert adapters(model).keys() == places(kind, placement).keys()
    assert torch.equal(logits(model), before)
    assert all(("bottleneck_adapter" in name) == p.requires_grad for name, p in model.named_parameters())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_gives_what_its_modules_give(kind, placement):
    base = base_model(kind)
    options = {
        "houlsby": dict(activation="gelu", layer_norm=True),
        "pfeiffer": dict(activation="silu", scaling="learned"),
        "parallel": dict(activation="tanh", scaling=4.0, layer_norm=True),
    }[placement]
    model = randomize(adapted(copy.deepcopy(base), placement=placement, **options))
    assert_parity(base, model, kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_training_lowers_the_loss_and_a_checkpoint_keeps_it(kind, tmp_path):
    placement = PLACEMENTS[list(CONFIGS).index(kind) % 3]
    base = base_model(kind)
    before = logits(base)
    model = adapted(base, placement=placement, init="normal", scaling="learned", dropout=0.1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.train()(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    trained = logits(model.eval())
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(kind), tmp_path)
    assert again.peft_config["default"].placement == placement
    assert torch.equal(logits(again), trained)
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        dict(reduction_factor=9),
        dict(target_modules=["o_proj", "down_proj"]),
        dict(target_modules=r".*layers\.1\.(mlp|self_attn)"),
        dict(placement="houlsby", exclude_modules=["self_attn"]),
        dict(placement="houlsby", layers_to_transform=[1]),
        dict(modules_to_save=["lm_head"]),
    ],
    ids=str,
)
def test_options_survive_a_checkpoint(options, low_cpu_mem_usage, tmp_path):
    model = randomize(adapted(base_model(), **dict(bottleneck_size=None) | options))
    with torch.no_grad():
        model.base_model.model.lm_head.weight.add_(0.0 if "modules_to_save" not in options else 0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert adapters(again).keys() == adapters(model).keys()
    assert torch.equal(logits(again), logits(model))


def test_where_the_options_put_adapters():
    def names(**options):
        return set(adapters(adapted(base_model(), **options)))

    layers = [f"model.layers.{i}" for i in range(2)]
    assert names(target_modules=["o_proj"]) == {f"{layer}.self_attn.o_proj" for layer in layers}
    assert names(placement="houlsby", exclude_modules=["self_attn"]) == {f"{layer}.mlp" for layer in layers}
    assert names(placement="houlsby", layers_to_transform=1) == {
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
    }


def test_the_size_of_a_bottleneck():
    def size(**options):
        model = adapted(base_model(), **dict(bottleneck_size=None) | options)
        return {layer.bottleneck_adapter["default"].bottleneck_size for layer in adapters(model).values()}

    assert size() == {2} and size(reduction_factor=4.5) == {8} and size(bottleneck_size=50) == {50}


# ---- several adapters ---------------------------------------------------------------------------------------


def two_adapters(first="pfeiffer", second="pfeiffer", kind="llama"):
    model = adapted(base_model(kind), placement=first)
    model.add_adapter("other", BottleneckConfig(bottleneck_size=3, placement=second, activation="gelu"))
    return randomize(model)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("second", PLACEMENTS)
@pytest.mark.parametrize("first", PLACEMENTS)
def test_adapters_are_independent(first, second, kind):
    """One at a time, each gives what it gives alone."""
    model = two_adapters(first, second, kind)
    for name, placement in (("default", first), ("other", second)):
        model.set_adapter(name)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, _ in model.named_parameters() if f"bottleneck_adapter.{name}." in n
        }
        config = model.peft_config[name]
        alone = get_peft_model(base_model(kind), BottleneckConfig(
            placement=placement, bottleneck_size=config.bottleneck_size, activation=config.activation
        ))  # fmt: skip
        state = {
            n.replace(f".{name}.", ".default."): p
            for n, p in model.state_dict().items()
            if f".bottleneck_adapter.{name}." in n
        }
        assert not alone.load_state_dict(state, strict=False).unexpected_keys
        torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=0)


def test_active_adapters_run_one_after_the_other():
    model = two_adapters()
    layer = adapters(model)["model.layers.0.mlp"]
    x = torch.randn(2, 3, 36)
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        y = layer.base_layer(x)
        for name in order:
            y = layer.bottleneck_adapter[name](y, residual=y)
        assert torch.equal(layer(x), y)


def test_a_deleted_adapter_is_gone():
    model = two_adapters()
    model.set_adapter("other")
    other = logits(model)
    model.delete_adapter("default")
    assert torch.equal(logits(model), other)
    assert not any(".default." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "bert", "opt"])
def test_unloading_leaves_the_base_as_it_was(kind):
    base = base_model(kind)
    before, names = logits(base), [name for name, _ in base.named_modules()]
    unloaded = randomize(adapted(base, placement="parallel")).unload()
    assert torch.equal(logits(unloaded), before)
    assert [name for name, _ in unloaded.named_modules()] == names
    assert not any(module._forward_pre_hooks for module in unloaded.modules())


# ---- modes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "mixtral"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_changes_nothing(kind, placement):
    model = randomize(adapted(base_model(kind), placement=placement, dropout=0.2)).train()

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        model(**batch()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    for name, grad in gradients().items():
        torch.testing.assert_close(grad, plain[name], msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "qwen3_moe"])
def test_generation_uses_the_adapters_and_the_cache(kind):
    model = randomize(adapted(base_model(kind), placement="houlsby"))
    ids = batch()["input_ids"][:1]

    def generate(**more):
        return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **more)

    cached = generate()
    assert torch.equal(cached, generate(use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, generate())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", ["bf16", "autocast", "bf16 adapters"])
def test_16_bits(mode, placement):
    base = base_model(dtype=FP32 if mode == "autocast" else BF16)
    config = BottleneckConfig(bottleneck_size=5, placement=placement, layer_norm=True)
    model = randomize(get_peft_model(base, config, autocast_adapter_dtype=mode != "bf16 adapters"))
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {BF16 if mode == "bf16 adapters" else FP32}
    with torch.autocast("cpu", dtype=BF16) if mode == "autocast" else nullcontext():
        out = model(**batch())
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    exact = copy.deepcopy(model).double()
    assert (out.logits - logits(exact)).norm() < 0.05 * logits(exact).norm()


def test_a_copy_stands_alone():
    for kind in ("llama", "bert"):
        model = randomize(adapted(base_model(kind), placement="parallel"))
        before = logits(model)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), before)
        randomize(model, seed=7)
        assert torch.equal(logits(twin), before)


# ---- 4-bit bases --------------------------------------------------------------------------------------------


def in_bitsandbytes(model):
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            linear = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            linear.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            linear.support_avx512bf16_for_cpu = False  # or it computes in bfloat16 in eval mode, on some CPUs
            model.set_submodule(name, linear.to("cpu"))
    return model


@functools.cache
def wide_base():
    """4-bit weights want whole blocks."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**dict(DECODER, hidden_size=64, intermediate_size=128, head_dim=32))
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("quantize", [quantize_linears, in_bitsandbytes], ids=["peftfast", "bitsandbytes"])
def test_a_base_in_4_bits(quantize, placement, tmp_path):
    def quantized():
        model = copy.deepcopy(wide_base())
        return quantize(model) or model

    base = quantized()
    assert any(isinstance(module, (Linear4bit, bnb.nn.Linear4bit)) for module in base.modules())
    before = logits(base)
    model = adapted(base, placement=placement)
    assert torch.equal(logits(model), before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {FP32}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(), tmp_path)), logits(model))


def test_4_bit_projections_as_targets():
    model = adapted(quantize_linears(copy.deepcopy(wide_base())), target_modules=["down_proj", "o_proj"])
    before = logits(model)
    assert not torch.equal(logits(randomize(model)), before)


def test_a_model_loaded_in_4_bits(tmp_path):
    wide_base().save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=peftfast.FourBitConfig(), dtype=FP32
    )
    before = logits(base)
    model = adapted(base, placement="houlsby")
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(randomize(model)), before)


# ---- what cannot be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, words",
    [
        (dict(placement="after"), ValueError, "placement.*houlsby, pfeiffer, parallel"),
        (dict(activation="swish"), ValueError, "activation.*relu"),
        (dict(bottleneck_size=0), ValueError, "bottleneck_size"),
        (dict(bottleneck_size=2.5), TypeError, "bottleneck_size"),
        (dict(bottleneck_size=True), TypeError, "bottleneck_size"),
        (dict(reduction_factor=0), ValueError, "reduction_factor"),
        (dict(reduction_factor=-2), ValueError, "reduction_factor"),
        (dict(reduction_factor="16"), TypeError, "reduction_factor"),
        (dict(bottleneck_size=2, reduction_factor=16), ValueError, "bottleneck_size and reduction_factor"),
        (dict(scaling="much"), TypeError, "scaling"),
        (dict(dropout=1.0), ValueError, "dropout"),
        (dict(init="ones"), ValueError, "init"),
        (dict(target_modules=[]), TypeError, "target_modules"),
        (dict(target_modules=[1]), TypeError, "target_modules"),
    ],
)
def test_a_configuration_that_cannot_be(options, error, words):
    with pytest.raises(error, match=words):
        BottleneckConfig(**options)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(target_modules=["down_prj"]), "down_prj.*nearest names.*down_proj"),
        (dict(target_modules="nothing.*"), "nothing"),
        (dict(target_modules=["mlp", "down_proj"]), r"layers\.0\.mlp\.down_proj is within .*layers\.0\.mlp"),
        (dict(layers_to_transform=[7]), "layers_to_transform"),
        (dict(placement="parallel", target_modules=["down_proj"]), r"down_proj has 36 and 52"),
        (dict(bottleneck_size=None, reduction_factor=100), "reduction_factor 100.*36 features"),
    ],
    ids=str,
)
def test_a_model_that_it_does_not_fit_is_left_alone(options, words):
    base = base_model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=words) as caught:
        adapted(base, **options)
    assert len(str(caught.value).strip().splitlines()) == 1
    assert [name for name, _ in base.named_modules()] == names


def test_a_model_without_blocks():
    with pytest.raises(ValueError, match="target_modules"):
        adapted(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = adapted(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), target_modules=["0"])
    assert model(torch.randn(3, 4)).shape == (3, 6)
    with pytest.raises(ValueError, match="features of 1, a ReLU"):
        adapted(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), target_modules=["1"])


def test_an_adapter_within_the_module_of_another():
    model = adapted(base_model())
    with pytest.raises(ValueError, match="down_proj is within .*mlp"):
        model.add_adapter("other", BottleneckConfig(target_modules=["down_proj"], bottleneck_size=2))
    assert not any("other" in name for name, _ in model.named_parameters())


def test_merging_is_refused():
    model = randomize(adapted(base_model()))
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter, adapters(model)["model.layers.0.mlp"].merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("gpt2", dict(), "transformer|adapter"),
        ("llama", dict(bottleneck_size=7), r"down_\w+ has shape \[5.*expected \[7"),
        ("llama", dict(placement="houlsby"), "nothing for .*self_attn"),
        ("llama", dict(layer_norm=True), "nothing for .*norm_"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(kind, options, words, tmp_path):
    adapted(base_model()).save_pretrained(tmp_path)
    config = BottleneckConfig(**dict(bottleneck_size=5) | options)
    with pytest.raises(ValueError, match=words) as caught:
        PeftModel.from_pretrained(base_model(kind), tmp_path, config=config)
    assert len(str(caught.value).strip().splitlines()) == 1
