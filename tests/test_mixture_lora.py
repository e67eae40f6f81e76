"""A mixture of LoRAs on dense models, against one expert after the other in plain torch and in float64."""

import copy
import functools
import pickle
from contextlib import nullcontext

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from conftest import generator
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from test_experts import same
from torch import nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import peftfast
from peftfast import MixtureLoraConfig
from peftfast.integrations.tuners.mixture_lora import MixtureLoraLayer, activate, finish
from peftfast.nn import Linear4bit, quantize_linears
from peftfast.testing import assert_as_accurate, relative_error

FP32, BF16 = torch.float32, torch.bfloat16
DECODER = dict(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
PLAIN = {key: DECODER[key] for key in DECODER if key != "head_dim"} | dict(num_attention_heads=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(**DECODER, mlp_bias=True),
    "mistral": transformers.MistralConfig(**DECODER),
    "qwen2": transformers.Qwen2Config(**PLAIN),
    "qwen3": transformers.Qwen3Config(**DECODER),
    "gemma": transformers.GemmaConfig(**DECODER),
    "phi3": transformers.Phi3Config(**PLAIN, **NO_DROPOUT),
    "phi": transformers.PhiConfig(**PLAIN, partial_rotary_factor=1.0),
    "nemotron": transformers.NemotronConfig(**DECODER, partial_rotary_factor=1.0),
    "gpt_neox": transformers.GPTNeoXConfig(**PLAIN),
    "gpt2": transformers.GPT2Config(
        vocab_size=61, n_embd=36, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **NO_DROPOUT
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


def base_model(kind="llama", dtype=FP32):
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def adapted(base, seed=1, adapter_name="default", **options):
    """A model with random adapters, none of them zero, and routers that are not undecided."""
    options = dict(r=3, lora_alpha=5, num_experts=5, task_type="CAUSAL_LM") | options
    model = get_peft_model(base, MixtureLoraConfig(**options), adapter_name)
    return randomize(model, seed)


def randomize(model, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MixtureLoraLayer)]


def batch(padded=True):
    ids = torch.randint(3, 61, (3, 11), generator=generator(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 7:] = mask[2, 2:] = 0
    return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))


# ---- the reference ------------------------------------------------------------------------------------------


def naive_forward(layer, x):
    """One expert after the other, a LoRA beside each frozen projection. Leaves the router's logits in the layer."""
    (name,) = layer.active_adapters
    block, shape, x = layer.base_layer, x.shape, x.reshape(-1, x.shape[-1])
    at_least_fp32 = torch.promote_types(x.dtype, FP32)
    layer.logits = F.linear(x.to(at_least_fp32), layer.lora_router[name].weight.to(at_least_fp32))
    weights, index = layer.logits.softmax(-1).topk(layer.top_k[name])
    weights = weights / weights.sum(-1, keepdim=True)

    def project(projection, h, expert):
        A, B = layer.lora_A[name][projection][expert], layer.lora_B[name][projection][expert]
        low_rank = F.linear(F.linear(h.to(A.dtype), A), B) * layer.scaling[name]
        return getattr(block, projection)(h) + low_rank.to(h.dtype)

    y = torch.zeros_like(x)
    for expert in range(layer.logits.shape[1]):
        token, place = torch.where(index == expert)
        hidden = activate(
            block, layer.layout, [project(into, x[token], expert) for into in layer.layout.into]
        )
        out = project(layer.layout.out, hidden, expert)
        y = y.index_add(0, token, (out * weights[token, place, None]).to(y.dtype))
    return finish(block, y).view(shape)


def naive(model, dtype=torch.float64):
    """The same model with plain loops, its 4-bit weights decoded."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, (Linear4bit, bnb.nn.Linear4bit)):
            dense = nn.Linear(module.in_features, module.out_features, bias=False)
            if isinstance(module, Linear4bit):
                weight = module.dequantize(FP32)
            else:
                weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            dense.weight, dense.bias = nn.Parameter(weight, requires_grad=False), module.bias
            twin.set_submodule(name, dense)
    for layer in mixtures(twin):
        layer.forward = functools.partial(naive_forward, layer)
    return twin.to(dtype) if dtype else twin


def naive_aux_loss(model, mask):
    """transformers' own, layer by layer."""
    (name,) = model.active_adapters
    config = model.peft_config[name]
    losses = [
        load_balancing_loss_func((layer.logits,), config.num_experts, config.top_k, mask)
        for layer in mixtures(model)
    ]
    return sum(losses) / len(losses)


def step(model, inputs, aux_of=None):
    """Loss, logits and every gradient."""
    model.zero_grad()
    out = model(**inputs)
    loss = out.loss
    if aux_of is not None:
        loss = loss + model.peft_config["default"].router_aux_loss_coef * naive_aux_loss(model, aux_of)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "logits": out.logits.detach()} | grads


def assert_parity(model, inputs, slack=2e-6, fast=False):
    mask = inputs["attention_mask"]
    exact = step(naive(model), inputs, mask)
    eager = step(naive(model, dtype=None), inputs, mask)
    with peftfast.enabled(strict=True) if fast else nullcontext():
        ours = step(model, inputs)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert ours.keys() == eager.keys() == trained | {"loss", "logits"}
    for name, value in eager.items():
        assert ours[name].shape == value.shape
        assert_as_accurate(ours[name], value, exact[name], slack=slack, name=name)


# ---- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_gives_what_its_experts_give(kind):
    """With a balance loss large enough to show in the routers' gradients."""
    model = adapted(base_model(kind), router_aux_loss_coef=0.5)
    assert len(mixtures(model)) == 2
    assert_parity(model.train(), batch())


@pytest.mark.parametrize("experts, top_k", [(1, 1), (4, 1), (3, 3), (9, 4)])
def test_numbers_of_experts(experts, top_k):
    model = adapted(base_model(), num_experts=experts, top_k=top_k, router_aux_loss_coef=0.1)
    assert_parity(model.train(), batch())


def test_options_of_lora():
    model = adapted(
        base_model(), target_modules=["q_proj", "o_proj"], use_rslora=True, rank_pattern={"layers.1.mlp": 6}
    )
    assert [layer.r["default"] for layer in mixtures(model)] == [3, 6]
    assert mixtures(model)[1].scaling["default"] == pytest.approx(5 / 6**0.5)
    assert_parity(model.train(), batch())


def block_step(layer, x, forward, autocast=None):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        y = forward(x)
    grad_y = torch.randint(-64, 65, y.shape, generator=generator(5)) / 32
    y.backward(grad_y.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad} | grads


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("adapters", [FP32, BF16], ids=["fp32 adapters", "bf16 adapters"])
def test_16_bits_are_as_accurate(kind, adapters):
    """A block alone: within a model a rounded hidden state may choose another expert."""
    layer = mixtures(adapted(base_model(kind, BF16)))[0]
    for parameters in (layer.lora_A, layer.lora_B, layer.lora_router):
        parameters.to(adapters)
    twin = copy.deepcopy(layer).double()
    x = torch.randn(4, 33, 36).to(BF16)
    exact = block_step(twin, x.double(), functools.partial(naive_forward, twin))
    eager = block_step(layer, x, functools.partial(naive_forward, layer))
    ours = block_step(layer, x, layer)
    for name, value in eager.items():
        assert ours[name].dtype == value.dtype
        # A router's gradient is of the differences of few numbers, that either way have their own rounding.
        slack = 1e-3 if "router" in name else 0.0
        assert_as_accurate(ours[name], value, exact[name], slack=slack, name=name)


def test_autocast():
    layer = mixtures(adapted(base_model()))[0]
    twin = copy.deepcopy(layer).double()
    x = torch.randn(4, 33, 36)
    exact = block_step(twin, x.double(), functools.partial(naive_forward, twin))
    ours = block_step(layer, x, layer, autocast=BF16)
    assert ours["output"].dtype == BF16
    for name, value in exact.items():
        assert relative_error(ours[name], value) < 2e-2, name


def fourbit(model):
    return quantize_linears(model)


def bitsandbytes(model):
    for block in (layer.mlp for layer in model.model.layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            dense = getattr(block, name)
            layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=True, compute_dtype=FP32)
            layer.load_state_dict(dense.state_dict())
            setattr(block, name, layer.to(torch.get_default_device()))
    model.is_loaded_in_4bit = True  # as transformers does
    return model


@pytest.mark.parametrize("quantize", [fourbit, bitsandbytes])
def test_4_bit_weights(quantize):
    model = adapted(quantize(base_model()), target_modules=["v_proj"])
    assert any(isinstance(module, (Linear4bit, bnb.nn.Linear4bit)) for module in model.modules())
    assert_parity(model.train(), batch(), slack=5e-6, fast=True)


def test_a_4_bit_model_of_transformers(tmp_path):
    base_model().save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=peftfast.FourBitConfig()
    )
    model = adapted(base)
    assert isinstance(mixtures(model)[0].base_layer.up_proj, Linear4bit)
    assert_parity(model.train(), batch(), slack=5e-6)


def test_frozen_weights_run_once_for_a_token():
    model = adapted(base_model(), top_k=4)
    rows = []
    for projection in ("gate_proj", "up_proj", "down_proj"):
        getattr(mixtures(model)[0].base_layer, projection).register_forward_hook(
            lambda module, args, output: rows.append(args[0].numel() // args[0].shape[-1])
        )
    model(**batch())
    assert rows == [33, 33, 33]


def test_dropout():
    layer = mixtures(adapted(base_model(), lora_dropout=0.3))[0]
    x = torch.randn(20, 36)
    with torch.no_grad():
        exact = layer.eval()(x)
        assert torch.equal(layer(x), exact)
        layer.train()
        with torch.random.fork_rng():
            first = layer(x)
        assert torch.equal(layer(x), first) and not torch.equal(layer(x), first)
        # Linear in what is dropped: a mixture without what the others go through has the right mean.
        for projection in ("gate_proj", "up_proj"):
            layer.lora_B["default"][projection].zero_()
        mean = torch.stack([layer(x) for _ in range(500)]).mean(0)
        assert relative_error(mean, layer.eval()(x).double()) < 0.05


# ---- the balance loss ---------------------------------------------------------------------------------------


def test_the_balance_loss_is_in_the_loss():
    model = adapted(base_model(), router_aux_loss_coef=0.25)
    inputs = batch()
    plain = model.eval()(**inputs)
    assert "aux_loss" not in plain
    out = model.train()(**inputs)
    reference = naive(model)
    reference(**inputs)
    expected = naive_aux_loss(reference, inputs["attention_mask"])
    assert out.aux_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.loss.item() == pytest.approx(plain.loss.item() + 0.25 * expected.item(), rel=1e-6)
    as_tuple = model(**inputs, return_dict=False)
    assert as_tuple[0].item() == pytest.approx(out.loss.item(), rel=1e-6)
    without_padding = model(**batch(padded=False))
    assert without_padding.aux_loss.item() != pytest.approx(out.aux_loss.item(), rel=1e-4)
    with torch.no_grad():
        assert model(**inputs).loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)


def test_padding_is_left_out_of_it_however_the_mask_is_given():
    model = get_peft_model(
        base_model(), MixtureLoraConfig(r=3, num_experts=5)
    ).train()  # hands on what it is given
    inputs = batch()
    expected = randomize(model)(**inputs)
    ids, mask, labels = inputs.values()
    assert model(ids, mask).aux_loss.item() == expected.aux_loss.item()
    assert model(ids, torch.ones_like(mask)).aux_loss.item() != expected.aux_loss.item()
    loss, *_ = model(ids, mask, None, None, None, labels, return_dict=False)
    assert loss.item() == expected.loss.item()


def test_its_gradient():
    model = adapted(base_model()).train()
    model(**batch()).aux_loss.backward()
    reference = naive(model).train()
    reference(**batch())
    naive_aux_loss(reference, batch()["attention_mask"]).backward()
    routers = 0
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters()):
        if "lora_router" in name:
            assert relative_error(ours.grad, theirs.grad) < 1e-5, name
            routers += 1
    assert routers == 2


def test_without_a_task_type():
    """PEFT then calls the wrapped model itself."""
    model = adapted(base_model(), task_type=None).train()
    assert model(**batch()).aux_loss.requires_grad


def test_it_evens_the_load():
    model = adapted(base_model(), num_experts=4, router_aux_loss_coef=1.0).train()
    routers = [p for name, p in model.named_parameters() if "lora_router" in name]
    optimizer = torch.optim.Adam(routers, 0.03)
    losses = []
    for _ in range(25):
        loss = model(**batch()).aux_loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 2.05 > losses[-1] > 1.9  # top_k where all experts get the same


def test_ten_steps():
    model = adapted(base_model(), target_modules=["q_proj", "v_proj"], lora_dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


# ---- gradient checkpointing ---------------------------------------------------------------------------------


def test_gradient_checkpointing():
    model = adapted(base_model(), router_aux_loss_coef=0.5, lora_dropout=0.2).train()
    torch.manual_seed(2)
    plain = step(model, batch())
    load = model.base_model.expert_load()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(2)
    ours = step(model, batch())
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], value) for name, value in plain.items())
    again = model.base_model.expert_load()
    assert load.keys() == again.keys() and all(
        torch.equal(again[name], value) for name, value in load.items()
    )


def test_reentrant_checkpointing():
    model = adapted(base_model()).train()
    plain = model(**batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**batch())
    model.peft_config["default"].router_aux_loss_coef = 0.0
    loss = model(**batch()).loss
    loss.backward()
    assert loss.item() == pytest.approx((plain.loss - 0.01 * plain.aux_loss).item(), rel=1e-6)
    assert all(layer.lora_router["default"].weight.grad.abs().sum() > 0 for layer in mixtures(model))


# ---- the life of a model ------------------------------------------------------------------------------------


def test_expert_load():
    model = adapted(base_model(), top_k=3)
    assert model.base_model.expert_load() == {}
    model(**batch())
    model(**batch())
    load = model.base_model.expert_load()
    assert list(load) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    reference = naive(model, FP32)
    reference(**batch())
    for layer, counts in zip(mixtures(reference), load.values()):
        index = layer.logits.topk(3).indices
        assert counts.dtype == torch.int64
        assert torch.equal(counts, 2 * torch.bincount(index.flatten(), minlength=5))
    assert model.base_model.expert_load() == {}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_new_mixture_is_the_base(kind):
    """lora_B starts at zero."""
    base = base_model(kind)
    before = base(**batch()).logits.detach()
    model = get_peft_model(base, MixtureLoraConfig(num_experts=4))
    assert relative_error(model(**batch()).logits, before.double()) < 1e-6
    layer = mixtures(model)[0]
    assert layer.lora_A["default"][layer.layout.into[0]].abs().max() <= 36**-0.5


def test_other_initializations():
    random = get_peft_model(base_model(), MixtureLoraConfig(num_experts=4, init_lora_weights=False))
    assert mixtures(random)[0].lora_B["default"]["up_proj"].abs().sum() > 0
    gaussian = get_peft_model(
        base_model(), MixtureLoraConfig(r=2, num_experts=64, init_lora_weights="gaussian")
    )
    layer = mixtures(gaussian)[0]
    assert layer.lora_A["default"]["up_proj"].std().item() == pytest.approx(1 / 2, rel=0.05)
    assert not layer.lora_B["default"]["up_proj"].any()
    assert 0.015 < layer.lora_router["default"].weight.std() < 0.025


def test_saved_and_loaded(tmp_path):
    base = base_model()
    model = adapted(copy.deepcopy(base), target_modules=["q_proj"]).eval()
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_memory)
        assert isinstance(loaded.peft_config["default"], MixtureLoraConfig)
        assert same(loaded(**batch()).logits, model(**batch()).logits)
    trained = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).train()
    assert trained(**batch()).aux_loss.requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other(**batch()).logits, model(**batch()).logits)
        assert other.train()(**batch()).aux_loss.requires_grad


def test_loading_with_another_number_of_experts(tmp_path):
    base = base_model()
    adapted(copy.deepcopy(base)).save_pretrained(tmp_path)
    config = MixtureLoraConfig(r=3, num_experts=7, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"lora_router.* is of 5 experts.*num_experts is 7"):
        PeftModel.from_pretrained(base, tmp_path, config=config)


def test_several_adapters():
    base = base_model()
    plain = base(**batch()).logits.detach()
    alone = {
        name: adapted(copy.deepcopy(base), seed, name, num_experts=experts)(**batch()).logits
        for name, seed, experts in (("one", 1, 5), ("two", 2, 3))
    }
    model = adapted(base, 1, "one")
    model.add_adapter("two", MixtureLoraConfig(r=3, lora_alpha=5, num_experts=3))
    other = adapted(copy.deepcopy(base_model()), 2, "two", num_experts=3)
    for ours, theirs in zip(mixtures(model), mixtures(other)):
        for part in ("lora_A", "lora_B", "lora_router"):
            getattr(ours, part)["two"].load_state_dict(getattr(theirs, part)["two"].state_dict())
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert same(model(**batch()).logits, alone[name])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all(f".{name}." in n or n.endswith(f".{name}") for n in trained)
        with model.disable_adapter():
            assert same(model(**batch()).logits, plain)
    with pytest.raises(ValueError, match="one adapter at a time, got 'one', 'two'"):
        model.base_model.set_adapter(["one", "two"])
    assert same(model(**batch()).logits, alone["one"])
    with pytest.warns(UserWarning, match="two"):
        model.delete_adapter("one")
    assert same(model(**batch()).logits, alone["two"])
    unloaded = model.unload()
    assert same(unloaded(**batch()).logits, plain) and not unloaded._forward_hooks
    assert not any(isinstance(module, MixtureLoraLayer) for module in unloaded.modules())


def test_generation():
    model = adapted(base_model()).eval()
    ids = batch()["input_ids"][:2, :5]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    for length in range(5, out.shape[1]):
        assert torch.equal(model(input_ids=out[:, :length]).logits[:, -1].argmax(-1), out[:, length])


@pytest.mark.parametrize(
    "modules, expected",
    [
        (dict(mixture_modules=["layers.1.mlp"]), [1]),
        (dict(mixture_modules=r".*\.0\.mlp"), [0]),
        (dict(layers_to_transform=[1]), [1]),
        (dict(exclude_modules=["layers.1.mlp"]), [0]),
    ],
    ids=["names", "expression", "layers", "exclusion"],
)
def test_chosen_blocks(modules, expected):
    model = adapted(base_model(), **modules)
    found = [isinstance(layer.mlp, MixtureLoraLayer) for layer in model.base_model.model.model.layers]
    assert [i for i, is_mixture in enumerate(found) if is_mixture] == expected
    assert_parity(model.train(), batch())


def test_all_linear_leaves_the_blocks_to_the_mixture():
    model = adapted(base_model(), target_modules="all-linear")
    plain = {name for name, module in model.named_modules() if hasattr(module, "lora_embedding_A")}
    assert len(plain) == 8 and all("self_attn" in name for name in plain)
    assert_parity(model.train(), batch())


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(top_k=9), ValueError, "top_k is 9, but there are only 8"),
        (dict(num_experts=0), ValueError, "num_experts must be at least 1"),
        (dict(top_k=0), ValueError, "top_k must be at least 1"),
        (dict(num_experts=2.5), TypeError, "num_experts must be a whole number"),
        (dict(router_aux_loss_coef=-1.0), ValueError, "router_aux_loss_coef"),
        (dict(lora_dropout=1.0), ValueError, "lora_dropout"),
        (dict(r=0), ValueError, "r must be at least 1"),
        (dict(mixture_modules=[1]), TypeError, "mixture_modules"),
        (dict(use_dora=True), ValueError, "use_dora"),
        (dict(init_lora_weights="pissa"), ValueError, "init_lora_weights.*pissa"),
        (dict(target_parameters=["experts.up_proj"]), ValueError, "target_parameters"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        MixtureLoraConfig(**options)


class Scaled(nn.Module):
    """Named like a feed-forward block, but not one."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return 1.1 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LateDropout(Scaled):
    def forward(self, x):
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(hidden, 0.1, self.training))


def test_models_without_feed_forward_blocks():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(
        ValueError, match="no feed-forward block.*gate_proj, up_proj, down_proj.*c_fc, c_proj"
    ):
        get_peft_model(model, MixtureLoraConfig())
    assert isinstance(model[0], nn.Linear)
    with pytest.raises(ValueError, match=r"mixture_modules=\['ffn'\] names"):
        adapted(base_model(), mixture_modules=["ffn"])
    for block in (Scaled(), LateDropout()):
        with pytest.raises(
            ValueError, match=f"^0 has the projections.*{type(block).__name__}.*computes more"
        ):
            get_peft_model(nn.Sequential(block), MixtureLoraConfig())


def test_what_a_mixture_cannot():
    model = adapted(base_model()).eval()
    before = model(**batch()).logits
    for merging in (model.merge_adapter, model.merge_and_unload, mixtures(model)[0].merge):
        with pytest.raises(ValueError, match="cannot be merged"):
            merging()
    with pytest.raises(ValueError, match="adapter_names"):
        model(**batch(), adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="added up"):
        model.add_weighted_adapter(["default"], [1.0], "new")
    assert torch.equal(model(**batch()).logits, before)
    with pytest.raises(TypeError, match="got float64"):
        copy.deepcopy(model).double()(**batch())
    with pytest.raises(ValueError, match="get_peft_model"):
        inject_adapter_in_model(MixtureLoraConfig(), base_model())


def test_plain_lora_within_another_adapters_mixture():
    model = adapted(base_model(), mixture_modules=["layers.0.mlp"])
    config = MixtureLoraConfig(mixture_modules=["layers.1.mlp"], target_modules=["up_proj"])
    with pytest.raises(ValueError, match=r"target_modules names model\.layers\.0\.mlp\.up_proj"):
        model.add_adapter("second", config)
    assert list(model.peft_config) == ["default"]
    model(**batch())


def test_other_adapters_are_as_they_were():
    """A LoRA model of PEFT's is no mixture."""
    model = get_peft_model(base_model(), LoraConfig(target_modules=["up_proj"]))
    assert not mixtures(model) and "aux_loss" not in model.train()(**batch())


def test_a_block_with_hooks_is_refused():
    model = base_model()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp has hooks"):
        get_peft_model(model, MixtureLoraConfig(r=2))
