"""Experts under PEFT's adapters and in 4 bits, against PEFT and transformers on the same weights."""

import copy
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import on_a_gpu
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import peftfast
from peftfast import reference
from peftfast.integrations.experts import FourBitExperts, projections, quantize_experts
from peftfast.nn.fourbit import quantize_linears
from peftfast.testing import assert_as_accurate, relative_error

COMMON = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, eos_token_id=1, pad_token_id=0
)
GROUPED = dict(COMMON, num_key_value_heads=2, head_dim=16)
CONFIGS = {
    "mixtral": MixtralConfig(intermediate_size=48, num_local_experts=6, num_experts_per_tok=2, **GROUPED),
    "qwen2_moe": Qwen2MoeConfig(
        moe_intermediate_size=40, shared_expert_intermediate_size=32, intermediate_size=64, num_experts=8,
        num_experts_per_tok=3, **GROUPED,
    ),
    "qwen3_moe": Qwen3MoeConfig(moe_intermediate_size=40, num_experts=8, num_experts_per_tok=3, **GROUPED),
    "olmoe": OlmoeConfig(intermediate_size=40, num_experts=8, num_experts_per_tok=3, **GROUPED),
    "gpt_oss": GptOssConfig(intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    "deepseek_v3": DeepseekV3Config(
        moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1,
        first_k_dense_replace=1, intermediate_size=64, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_shared_experts=1, **COMMON,
    ),
    "nemotron_h": NemotronHConfig(  # no gate
        layers_block_type=["moe", "full_attention", "moe"], num_key_value_heads=2, head_dim=16, intermediate_size=48,
        moe_intermediate_size=40, moe_shared_expert_intermediate_size=32, n_routed_experts=6, num_experts_per_tok=2,
        n_group=1, topk_group=1, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1,
        **{key: value for key, value in COMMON.items() if key != "num_hidden_layers"},
    ),
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(34).view(2, 17) * 7 % 100


def base_model(kind="olmoe", dtype=torch.float32):
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model


def same(logits, others):
    """Equal but for torch's own products, whose last bits may depend on where operands lie in memory."""
    return relative_error(logits, others.double()) < 1e-6


def adapted(model, targets=BOTH, **options):
    """Random adapters: a zero lora_B would hide a wrong layout."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets, **options)
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model


def dequantized(model):
    """The same model with the values of its 4-bit experts in dense ones."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, FourBitExperts):
            values = {
                name: reference.fourbit_dequantize(module.fourbit_weight(name))
                for name in projections(module)
            }
            module.__class__ = type(module).__mro__[2]
            for name, value in values.items():
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return dense


def results(model):
    """Logits and the gradients of all that trains, by name."""
    model.zero_grad()
    ids = IDS.to(model.device)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | grads


def check_equal(ours, theirs, tolerance=3e-6):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative_error(ours[name], value.double()) < tolerance, name


def targets_of(kind):
    return ["experts.up_proj", "experts.down_proj"] if kind == "nemotron_h" else BOTH


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_give_what_peft_gives(kind):
    model = adapted(base_model(kind), targets_of(kind))
    theirs = results(model)
    with peftfast.enabled(strict=True):
        assert len(peftfast.report(model)) and all(layer.fast for layer in peftfast.report(model))
        ours = results(model)
    assert sum("lora_B" in name for name in ours) >= 2
    check_equal(ours, theirs)


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:]], ids=["gate_up", "down"])
def test_one_projection_alone(targets):
    model = adapted(base_model(), targets)
    theirs = results(model)
    with peftfast.enabled(strict=True):
        check_equal(results(model), theirs)


def choosing_all(model):
    """With every expert chosen: a token whose router is of two minds goes another way for a last bit of its scores."""
    for module in model.modules():
        if hasattr(module, "top_k"):
            module.top_k = model.config.num_experts
    return model


def test_16_bits_are_as_accurate():
    model = choosing_all(adapted(base_model(dtype=torch.bfloat16)))
    exact = results(copy.deepcopy(model).float())
    theirs = results(model)
    with peftfast.enabled(strict=True):
        ours = results(model)
    for name, value in theirs.items():
        assert_as_accurate(ours[name], value, exact[name].double(), factor=1.25, name=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_ten_steps(kind):
    losses = {}
    for mode in (False, True):
        torch.manual_seed(0)
        model = adapted(base_model(kind), targets_of(kind))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        losses[mode] = []
        for _ in range(10):
            with peftfast.enabled(strict=True) if mode else warnings.catch_warnings():
                loss = model(input_ids=IDS, labels=IDS).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert losses[True][-1] < losses[True][0]


def test_several_adapters_and_their_states():
    model = adapted(base_model())
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=BOTH))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.normal_(std=0.2)
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        theirs = model(IDS).logits
        with peftfast.enabled(strict=True):
            assert relative_error(model(IDS).logits, theirs.double()) < 3e-6, active
    with peftfast.enabled(strict=True), model.disable_adapter():
        assert relative_error(model(IDS).logits, theirs.double()) > 1e-3
    model.merge_adapter()
    with peftfast.enabled(strict=True):
        assert relative_error(model(IDS).logits, theirs.double()) < 1e-5


def test_gradient_checkpointing():
    model = adapted(base_model())
    theirs = results(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    with peftfast.enabled(strict=True):
        check_equal(results(model.train()), theirs)


def test_no_sum_is_formed():
    """PEFT reads an effective weight of all experts; here weights of experts without tokens may be anything."""
    model = adapted(base_model())
    experts = model.base_model.model.model.layers[1].mlp.experts
    base = experts.get_base_layer()
    x = torch.randn(5, 64)
    index, weights = torch.tensor([[0, 2, 5]] * 5), torch.rand(5, 3)
    with peftfast.enabled(strict=True):
        before = experts(x, index, weights)
        with torch.no_grad():
            base.gate_up_proj[[1, 3, 4, 6, 7]] = torch.nan
        assert torch.equal(experts(x, index, weights), before)


@pytest.mark.parametrize(
    "break_it, reason",
    [
        (lambda e: e.get_base_layer().down_proj.requires_grad_(True), "trained too"),
        (lambda e: e.get_base_layer().register_forward_hook(lambda *_: None), "hooks"),
        (lambda e: e.lora_A["default"].register_forward_hook(lambda *_: None), "hooks"),
        (lambda e: e.lora_A["default"].half(), "differ|float16"),
    ],
    ids=["trained", "hook", "hook on lora_A", "dtype"],
)
def test_what_falls_back_says_why(break_it, reason):
    model = adapted(base_model())
    break_it(model.base_model.model.model.layers[0].mlp.experts)
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match=reason):
        model(IDS)


def test_a_router_is_left_to_peft():
    model = adapted(base_model(), ["gate.weight"])
    theirs = model(IDS).logits
    with peftfast.enabled():
        torch.testing.assert_close(model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
        assert any("dispatched experts" in (layer.reason or "") for layer in peftfast.report(model))


def test_the_implementation_is_known_without_more():
    script = (
        "import peftfast, torch; from transformers import AutoModelForCausalLM, OlmoeConfig;"
        "m = AutoModelForCausalLM.from_config(OlmoeConfig(hidden_size=32, intermediate_size=16, num_experts=4,"
        "num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=50, num_experts_per_tok=2,"
        "eos_token_id=1, pad_token_id=0), experts_implementation='peftfast'); m(torch.arange(6)[None])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- 4 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_4_bit_experts_compute_what_they_hold(kind):
    model = quantize_experts(base_model(kind))
    dense = dequantized(model)
    assert any(isinstance(module, FourBitExperts) for module in model.modules())
    assert not any(isinstance(module, FourBitExperts) for module in dense.modules())
    assert relative_error(model(IDS).logits, dense(IDS).logits.double()) < 3e-6


def test_4_bit_experts_survive():
    model = quantize_experts(base_model(), quant_type="fp4", blocksize=32, nested=False)
    logits, state = model(IDS).logits, model.state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IDS).logits, logits)
    other = quantize_experts(base_model())
    for parameter in other.parameters():
        parameter.data.fill_(3)
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, logits)
    cast = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    packed = [key for key in state if "experts." in key]
    assert len(packed) == 2 * 2 * 4 and all(torch.equal(cast[key], state[key]) for key in packed)


def test_a_broken_checkpoint_is_refused():
    model = quantize_experts(base_model())
    before, state = model.state_dict(), model.state_dict()
    key = "model.layers.0.mlp.experts.down_proj.absmax"
    state[key] = state[key][:-1]
    with pytest.raises(ValueError, match="down_proj.*absmax"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_named():
    model = base_model()
    model.model.layers[1].mlp.experts.down_proj.data[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.*not finite"):
        quantize_experts(model)
    with pytest.raises(ValueError, match="no experts"):
        quantize_experts(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
@pytest.mark.parametrize("on", [False, True], ids=["off", "on"])
def test_adapters_on_4_bit_experts(kind, on):
    base = quantize_experts(base_model(kind))
    theirs = results(adapted(dequantized(base)))
    model = adapted(base)
    with peftfast.enabled(strict=True) if on else warnings.catch_warnings():
        check_equal(results(model), theirs, tolerance=5e-6)


def test_merging_into_4_bit_experts(tmp_path):
    base = quantize_experts(base_model())
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    with pytest.warns(UserWarning) as warned:
        merged = copy.deepcopy(model).merge_and_unload()
    first, *more = [str(w.message) for w in warned if "quantized anew" in str(w.message)]
    assert re.search(r"layers\.0\.mlp\.experts.* relative error of its (gate_up|down)_proj of", first)
    assert len(more) < 3  # of four projections that are much alike
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    name = wrapper.parameter_name
    wanted = reference.fourbit_dequantize(
        wrapper.get_base_layer().fourbit_weight(name)
    ) + wrapper.get_delta_weight("default")
    experts = merged.model.layers[0].mlp.experts
    assert isinstance(experts, FourBitExperts)
    got = reference.fourbit_dequantize(experts.fourbit_weight(name))
    assert relative_error(got, wanted.double()) < 0.15
    with pytest.warns(UserWarning, match="quantized anew"):
        model.merge_adapter()
        error = wrapper.requantization_error
        model.unmerge_adapter()
    assert 0 < error < 0.15
    assert not wrapper.merged


# ---- the report -------------------------------------------------------------------------------------------


def test_the_report_says_what_is_in_4_bits():
    model = base_model()
    assert not peftfast.report(model).fourbit and not peftfast.report(model).dense  # not a 4-bit model at all
    quantize_linears(model, skip=["lm_head", "layers.1.self_attn.q_proj", "experts"])
    assert "4-bit: 7 linear layers\n" in str(peftfast.report(model))
    projections = {f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in BOTH}
    report = peftfast.report(model)
    assert set(report.dense) == projections | {"lm_head", "model.layers.1.self_attn.q_proj"}
    assert ".experts.down_proj (float32, 2 of them), model.layers.1.self_attn.q_proj (float32), lm" in str(
        report
    )
    quantize_experts(model)
    report = peftfast.report(model)
    assert projections == {name for name, kind in report.fourbit.items() if kind == "expert projection"}
    assert "  4-bit: 7 linear layers, 4 expert projections\n" in str(report)


def test_the_report_of_a_4_bit_model_is_the_same_under_adapters():
    model = quantize_linears(quantize_experts(base_model()))
    alone = peftfast.report(model)
    for config in (
        LoraConfig(target_modules=["q_proj"], target_parameters=BOTH),
        peftfast.ExpertLoraConfig(target_modules=["q_proj"], experts={"model.layers.0.mlp.experts": [1]}),
    ):
        report = peftfast.report(get_peft_model(copy.deepcopy(model), config))
        assert {name.removeprefix("base_model.model.") for name in report.fourbit} == alone.fourbit.keys()
        assert (
            {name.removeprefix("base_model.model.") for name in report.dense}
            == alone.dense.keys()
            == {"lm_head"}
        )


def test_adapters_on_4_bit_experts_are_fast_when_peftfast_is_off():
    model = adapted(quantize_experts(base_model()))
    entries = list(peftfast.report(model))
    assert entries and all(entry.fast for entry in entries)
    with peftfast.enabled():
        assert list(peftfast.report(model)) == entries
    model.merge_adapter()
    assert {entry.reason for entry in peftfast.report(model)} == {
        "its adapters are merged into the base weight"
    }
    assert not any(entry.fast for entry in peftfast.report(adapted(base_model())))


def test_layers_of_peftfasts_own_methods_are_fast_when_peftfast_is_off():
    config = peftfast.ExpertLoraConfig(
        r=2, experts={"model.layers.1.mlp.experts": [0, 3]}, target_modules=["q_proj"]
    )
    model = get_peft_model(base_model(), config)
    fast = {entry.name: entry.kind for entry in peftfast.report(model) if entry.fast}
    assert fast == {"base_model.model.model.layers.1.mlp.experts": "peftfast.ExpertLora"}
    assert "1 of 3 adapted" in peftfast.report(model).summary  # q_proj is PEFT's
    model.model.model.layers[1].mlp.experts.get_base_layer().down_proj.requires_grad_(True)
    (entry,) = [entry for entry in peftfast.report(model) if entry.kind == "peftfast.ExpertLora"]
    assert not entry.fast and "trained too" in entry.reason
    model = get_peft_model(base_model(), peftfast.ExpertLoraConfig(r=2))
    assert all(entry.fast for entry in peftfast.report(peftfast.accelerate(model)))
    with model.disable_adapter():
        assert not any(entry.fast for entry in peftfast.report(model))


where_values_are_read = pytest.mark.skipif(on_a_gpu(), reason="values are not checked on a GPU")


@pytest.mark.parametrize("adapters", [False, True], ids=["", "adapted"])
@pytest.mark.parametrize(
    "index, weights, message",
    [
        pytest.param(
            [[0, 8]],
            [[0.5, 0.5]],
            "top_k_index holds 0 to 8, there are 8 experts",
            marks=where_values_are_read,
        ),
        pytest.param([[0, -1]], [[0.5, 0.5]], "top_k_index holds -1 to 0", marks=where_values_are_read),
        ([[0, 1], [1, 2]], [[0.5, 0.5], [0.5, 0.5]], r"top_k_index is int64 in \[2, 2\]"),
        ([[0, 1]], [[0.5, 0.3, 0.2]], r"top_k_weights has shape \[1, 3\]"),
        pytest.param(
            [[0, 1]],
            [[0.5, float("nan")]],
            "top_k_weights holds values that are not finite",
            marks=where_values_are_read,
        ),
    ],
)
def test_wrong_routing_is_refused(index, weights, message, adapters):
    model = base_model().requires_grad_(False)
    model.set_experts_implementation("peftfast")
    if adapters:
        model = adapted(model).get_base_model()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.experts(x[0, :1], torch.tensor(index), torch.tensor(weights)).view_as(x)
    where = r"model\.layers\.1\.mlp\.experts|OlmoeExperts" if adapters else r"model\.layers\.1\.mlp\.experts"
    with peftfast.enabled(), pytest.raises(ValueError, match=f"^Experts ({where})[^:]*: {message}"):
        model(IDS[:1, :1])
