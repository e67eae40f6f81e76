"""LoRA on chosen experts, against PEFT's LoRA on all experts with the same weights."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from test_experts import CONFIGS, IDS, check_equal, dequantized, results, same
from transformers import AutoModelForCausalLM

import peftfast
from peftfast import ExpertLoraConfig
from peftfast.integrations.experts import FourBitExperts, projections, quantize_experts
from peftfast.integrations.tuners.expert_lora import ExpertLora
from peftfast.testing import assert_as_accurate, relative_error

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
SOME = {FIRST: [5, 1], SECOND: [0, 3, 6]}


def base_model(kind="olmoe", dtype=torch.float32):
    """The same weights at every call, and a configuration of its own."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    return model


def randomized(model, seed=1, std=0.2):
    """Random adapters: a zero lora_B would hide a wrong layout."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=std)
    return model


def adapted(base, **options):
    return randomized(get_peft_model(base, ExpertLoraConfig(**{"r": 4, "lora_alpha": 8, **options})))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLora)}


def pairs(model, stock, adapter="default"):
    """Each ExpertLora and projection with the wrapper of PEFT on the same weights."""
    for name, layer in layers_of(model).items():
        wrapper, wrappers = stock.get_submodule(name), {}
        while isinstance(wrapper, ParamWrapper):
            wrappers[wrapper.parameter_name] = wrapper
            wrapper = wrapper.base_layer
        for projection in layer.lora_A[adapter]:
            yield name, layer, projection, wrappers[projection]


def stock_of(model, base, r=4, alpha=8, **options):
    """PEFT's adapters on all experts with the values of ours; zero on the others."""
    names = {f"experts.{name}" for layer in layers_of(model).values() for name in layer.lora_A["default"]}
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=[], target_parameters=sorted(names), **options)
    stock = get_peft_model(base, config)
    with torch.no_grad():
        for _, layer, projection, wrapper in pairs(model, stock):
            chosen = layer.lora_experts["default"]
            A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
            A.zero_().view(wrapper.num_experts, r, -1)[chosen] = layer.lora_A["default"][projection].to(
                A.dtype
            )
            stack = torch.zeros(wrapper.num_experts, B.shape[0], r, dtype=B.dtype)
            stack[chosen] = layer.lora_B["default"][projection].to(B.dtype)
            B.copy_(stack.permute(1, 2, 0).reshape(B.shape))
    return stock


def stock_results(model, stock, value=lambda p: p.grad):
    """PEFT's logits and what `value` takes of its adapters, by the names and in the layout of ours."""
    found = {"logits": results(stock)["logits"]}
    for name, layer, projection, wrapper in pairs(model, stock):
        chosen, experts = layer.lora_experts["default"], wrapper.num_experts
        A, B = value(wrapper.lora_A["default"].weight), value(wrapper.lora_B["default"].weight)
        found[f"{name}.lora_A.default.{projection}"] = A.view(experts, -1, A.shape[1])[chosen]
        found[f"{name}.lora_B.default.{projection}"] = B.view(B.shape[0], -1, experts).permute(2, 0, 1)[
            chosen
        ]
    return found


# ---- what it computes ---------------------------------------------------------------------------------------


def in_float64(model, stock):
    """What PEFT computes, exactly: in fp32 it is off by more than we may be from it."""
    exact = copy.deepcopy(stock).double()
    exact.get_base_model().set_experts_implementation("eager")  # the others have no float64
    return stock_results(model, exact)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h"])
def test_all_experts_are_as_with_peft(kind):
    model = adapted(base_model(kind))
    theirs = stock_results(model, stock_of(model, base_model(kind)))
    assert len(theirs) == 1 + 4 * len(layers_of(model)) > 1
    check_equal(results(model), in_float64(model, stock_of(model, base_model(kind))))


@pytest.mark.parametrize(
    "kind, experts",
    [
        ("olmoe", SOME),
        ("gpt_oss", {FIRST: [2, 0], SECOND: [3, 1]}),
        ("nemotron_h", {"model.layers.2.mixer.experts": [4]}),
    ],
)
def test_some_experts_are_as_with_zeros_on_the_others(kind, experts):
    model = adapted(base_model(kind), experts=experts, use_rslora=True)
    check_equal(results(model), in_float64(model, stock_of(model, base_model(kind), use_rslora=True)))
    shapes = {
        name: p.shape[0] for name, p in model.named_parameters() if p.requires_grad
    }  # and no parameter of another expert exists
    assert sum(shapes.values()) == 4 * sum(map(len, experts.values()))


def test_16_bits_are_as_accurate_as_peft():
    model = adapted(base_model(dtype=torch.bfloat16), experts=SOME)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    stock = stock_of(model, base_model(dtype=torch.bfloat16))
    exact = in_float64(model, stock)
    theirs = stock_results(model, stock)
    ours = results(model)
    for name, value in theirs.items():
        assert_as_accurate(ours[name], value, exact[name], name=name)


def test_ten_steps_are_as_with_peft():
    model = adapted(base_model())
    stock = stock_of(model, base_model())
    losses = {}
    for which, trained in (("ours", model), ("theirs", stock)):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], 1e-3)
        losses[which] = []
        for _ in range(10):
            loss = trained(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[which].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]
    theirs = stock_results(model, stock, value=torch.clone)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative_error(parameter, theirs[name].double()) < 1e-4, name


def test_projections_and_ranks():
    model = adapted(base_model(), expert_projections=["down_proj"], expert_r=2, rank_pattern={f"{SECOND}": 3})
    assert {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad} == {"down_proj"}
    assert [layer.r["default"] for layer in layers_of(model).values()] == [{"down_proj": 2}, {"down_proj": 3}]
    model = adapted(base_model(), experts={FIRST: [1]}, expert_r={"down_proj": 3}, use_rslora=True)
    (layer,) = layers_of(model).values()
    assert layer.lora_A["default"]["gate_up_proj"].shape == (1, 4, 64)
    assert layer.lora_B["default"]["down_proj"].shape == (1, 64, 3)
    assert layer.scaling["default"] == {"gate_up_proj": 8 / 4**0.5, "down_proj": 8 / 3**0.5}
    model = adapted(base_model(), experts={FIRST: [1]}, alpha_pattern={"experts": 2})
    (layer,) = layers_of(model).values()
    assert layer.scaling["default"]["down_proj"] == 0.5


def test_dense_layers_have_peft_s_lora():
    base = base_model()
    model = adapted(base, experts=SOME, target_modules=["q_proj", "v_proj"])
    grads = results(model)
    assert (
        sum("q_proj.lora_A" in name for name in grads) == 2 and sum("experts" in name for name in grads) == 8
    )
    with peftfast.enabled(strict=True):
        assert sum(layer.kind == "lora.Linear" for layer in peftfast.report(model)) == 4
        check_equal(results(model), grads)


def test_it_begins_as_the_base_model():
    base = base_model()
    logits = base(IDS).logits
    model = get_peft_model(base, ExpertLoraConfig(experts=SOME))
    assert relative_error(model(IDS).logits, logits.double()) < 1e-6
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    A, B = layer.lora_A["default"]["down_proj"], layer.lora_B["default"]["down_proj"]
    assert not B.any() and 0.9 < A.abs().max() * A.shape[2] ** 0.5 <= 1
    model = get_peft_model(base_model(), ExpertLoraConfig(experts=SOME, init_lora_weights=False))
    assert all(p.any() for p in model.parameters() if p.requires_grad)


def test_gradient_checkpointing():
    model = adapted(base_model(), experts=SOME, lora_dropout=0.3).train()
    torch.manual_seed(3)
    theirs = results(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    check_equal(results(model), theirs)


def test_dropout():
    model = adapted(base_model(), lora_dropout=0.4)
    without = adapted(base_model())(IDS).logits
    assert torch.equal(model.eval()(IDS).logits, without)
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    x, index, weights = torch.randn(40, 64), torch.randint(8, (40, 2)), torch.rand(40, 2)
    with torch.no_grad():
        layer.lora_B["default"]["gate_up_proj"].zero_()  # what is left is linear in what dropout keeps
        index[:, 1] = (index[:, 0] + 1) % 8
        layer.eval()
        expected, base = layer(x, index, weights), layer.base_layer(x, index, weights)
        layer.train()
        torch.manual_seed(5)
        draws = torch.stack([layer(x, index, weights) for _ in range(400)])
        torch.manual_seed(5)
        assert torch.equal(draws[0], layer(x, index, weights))
    assert not torch.equal(draws[0], draws[1])
    assert relative_error(draws.mean(0) - base, (expected - base).double()) < 0.15


# ---- several adapters, and their states ---------------------------------------------------------------------


def two_adapters():
    model = adapted(base_model(), experts=SOME)
    second = ExpertLoraConfig(r=2, lora_alpha=6, experts={FIRST: [1, 2, 7]}, expert_projections=["down_proj"])
    model.add_adapter("second", second)
    return randomized(model)


def test_several_adapters():
    model = two_adapters()
    base = base_model()(IDS).logits
    logits = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        grads = results(model)
        logits["+".join(active)] = grads.pop("logits")
        assert {name.split(".")[-2] for name in grads} == set(active)
        assert len(grads) == 8 * ("default" in active) + 2 * ("second" in active)
        merged = copy.deepcopy(model).merge_and_unload()
        assert relative_error(merged(IDS).logits, logits["+".join(active)].double()) < 1e-5, active
    with model.disable_adapter():
        assert same(model(IDS).logits, base)
    assert same(model(IDS).logits, logits["default+second"])
    model.delete_adapter("second")
    assert same(model(IDS).logits, logits["default"])
    model.set_adapter("default")
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == model.get_nb_trainable_parameters()[0]
        > 0
    )
    assert same(model.unload()(IDS).logits, base)


def test_several_adapters_with_dropout_have_one_mask_each():
    """In plain torch: the operator drops the same elements for both."""
    model = adapted(base_model(), experts=SOME, lora_dropout=0.5)
    model.add_adapter("second", ExpertLoraConfig(r=4, lora_alpha=8, experts=SOME, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for layer in layers_of(model).values():
            for name in ("gate_up_proj", "down_proj"):
                layer.lora_A["second"][name].copy_(layer.lora_A["default"][name])
                layer.lora_B["second"][name].copy_(-layer.lora_B["default"][name])
    base = base_model()(IDS).logits
    assert relative_error(model.eval()(IDS).logits, base.double()) < 1e-5  # they cancel
    with pytest.warns(UserWarning, match="plain torch"):
        assert relative_error(model.train()(IDS).logits, base.double()) > 1e-2
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match=r"layers\.0.*dropout"):
        model(IDS)


def test_merging():
    model = adapted(base_model(), experts=SOME)
    theirs = model(IDS).logits
    before = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter()
    changed = {
        (name, e)
        for name, value in model.state_dict().items()
        if "base_layer" in name
        for e in range(8)
        if not torch.equal(value[e], before[name][e])
    }
    assert {e for name, e in changed if "layers.0" in name} == set(SOME[FIRST])
    assert relative_error(model(IDS).logits, theirs.double()) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model(IDS).logits, theirs.double()) < 1e-5
    merged = model.merge_and_unload()
    assert not layers_of(merged) and relative_error(merged(IDS).logits, theirs.double()) < 1e-5


def test_merging_what_is_not_finite_changes_nothing():
    model = adapted(base_model(), experts=SOME)
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.lora_B["default"]["down_proj"].data[0, 3, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert all(torch.equal(value, before[name]) for name, value in layer.base_layer.state_dict().items())


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_4_bit_experts(kind):
    experts = {FIRST: [3, 1], SECOND: [2]}
    base = quantize_experts(base_model(kind))
    theirs = results(adapted(dequantized(base), experts=experts))
    model = adapted(base, experts=experts)
    check_equal(results(model), theirs, tolerance=5e-6)
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.experts .*relative error of its gate_up_proj"):
        merged = copy.deepcopy(model).merge_and_unload()
    assert isinstance(merged.get_submodule(FIRST), FourBitExperts)
    wanted = dequantized(layer.base_layer).down_proj
    wanted[layer.lora_experts["default"]] += layer.get_delta_weight("default", "down_proj")
    got = dequantized(merged).get_submodule(FIRST).down_proj
    assert relative_error(got, wanted.double()) < 0.15
    with pytest.warns(UserWarning) as warned:
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_adapter()
    assert 1 <= len([w for w in warned if "quantized anew" in str(w.message)]) < 4
    assert set(layer.requantization_error) == set(projections(layer.base_layer))
    assert all(0 < error < 0.15 for error in layer.requantization_error.values())
    model.unmerge_adapter()
    assert not layer.merged


def test_copies():
    model = two_adapters()
    theirs = results(model)
    check_equal(results(copy.deepcopy(model)), theirs, tolerance=1e-12)
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    x, index, weights = torch.randn(9, 64), torch.randint(8, (9, 2)), torch.rand(9, 2)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, index, weights), layer(x, index, weights))


def test_who_trains():
    model = adapted(base_model(), experts=SOME)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    model.add_adapter("second", ExpertLoraConfig(experts={SECOND: [2]}))
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    model.set_adapter("second")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    frozen = get_peft_model(base_model(), ExpertLoraConfig(experts=SOME, inference_mode=True))
    assert not any(p.requires_grad for p in frozen.parameters())


# ---- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, dtype, low_cpu_mem_usage):
    model = adapted(
        base_model(dtype=dtype), experts=SOME, target_modules=["q_proj"], expert_r={"down_proj": 2}
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["experts"] == {FIRST: [1, 5], SECOND: [0, 3, 6]} and config["peft_type"] == "EXPERT_LORA"
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(value.numel() for name, value in saved.items() if "lora_experts" not in name) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    base = base_model(dtype=dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, is_trainable=True)
    assert type(loaded.peft_config["default"]) is ExpertLoraConfig
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if "experts" in name:  # PEFT itself rounds a dense layer's adapter under low_cpu_mem_usage
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    if dtype == torch.float32:
        assert same(loaded(IDS).logits, model(IDS).logits)


def test_loading_a_second_adapter(tmp_path):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    theirs = model(IDS).logits
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "another")
    loaded.set_adapter("another")
    assert same(loaded(IDS).logits, theirs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, _: config["experts"].update({FIRST: [1, 4]}), r"experts \[1, 5\] of .*layers\.0.* on \[1, 4\]"),
        (lambda config, _: config["experts"].pop(FIRST), r"layers\.0\.mlp\.experts, but adapter default has none"),
        (lambda config, _: config["experts"].update({"model.layers.1.mlp.experts": [0]}), r"\[0, 3, 6\] of"),
        (lambda config, _: config.update(r=3), r"lora_A.* has shape \[2, 4, .*expected \[2, 3"),
        (lambda _, state: state.pop(f"base_model.model.{SECOND}.lora_experts"), r"no adapters on experts of .*\.1\."),
        (lambda _, state: state.pop(f"base_model.model.{SECOND}.lora_B.down_proj"), r"\.1.*lora_B.down_proj.*missing"),
    ],
    ids=["other experts", "a layer too many", "fewer experts", "rank", "no experts", "a tensor missing"],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    adapted(base_model(), experts=SOME).save_pretrained(tmp_path)
    path, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config, state = json.loads(path.read_text()), load_file(weights)
    change(config, state)
    path.write_text(json.dumps(config))
    save_file(state, weights)
    base = base_model()
    before = base(IDS).logits
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert relative_error(base(IDS).logits, before.double()) < 1e-6


# ---- what cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"experts": {}}, ValueError, "experts is {}"),
        ({"experts": {FIRST: []}}, ValueError, r"layers\.0\.mlp\.experts are \[\]"),
        ({"experts": {FIRST: [2, 1, 2]}}, ValueError, r"layers\.0\.mlp\.experts hold 2 more than once"),
        ({"experts": {FIRST: [-1]}}, TypeError, r"layers\.0\.mlp\.experts hold -1"),
        ({"experts": {FIRST: [1.5]}}, TypeError, r"hold 1\.5"),
        ({"experts": {FIRST: [8]}}, ValueError, r"layers\.0\.mlp\.experts hold 8, expected 0 to 7"),
        ({"experts": {"model.layers.1.mlp.expert": [0]}}, ValueError, f"does not have. Did you mean {SECOND}"),
        ({"experts": {"model.layers.0.mlp": [0]}}, ValueError, r"layers\.0\.mlp, but that is a OlmoeSparseMoeBlock"),
        ({"expert_projections": ["up_proj"]}, ValueError, "expert_projections names 'up_proj', expected gate_up"),
        ({"expert_projections": []}, ValueError, "expert_projections is"),
        ({"expert_r": {"gate": 3}}, ValueError, "expert_r names 'gate'"),
        ({"expert_r": {"down_proj": 0}}, ValueError, "rank down_proj is 0"),
        ({"expert_r": 0}, ValueError, "rank expert_r is 0"),
        ({"rank_pattern": {SECOND: 0}}, ValueError, r"rank_pattern gives model\.layers\.1.* the rank 0"),
        ({"r": 0}, ValueError, "rank r is 0"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout is 1.0"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights is 'pissa'"),
        ({"use_dora": True}, ValueError, "use_dora is not possible"),
        ({"lora_bias": True}, ValueError, "lora_bias is not possible"),
        ({"target_parameters": ["experts.down_proj"]}, ValueError, "target_parameters names"),
    ],
)  # fmt: skip
def test_bad_configurations_are_named_and_change_nothing(options, error, message):
    base = base_model()
    with pytest.raises(error, match=message):
        get_peft_model(base, ExpertLoraConfig(**options))
    assert not layers_of(base) and all(p.requires_grad for p in base.parameters())


def test_models_that_cannot_have_it():
    with pytest.raises(ValueError, match="no experts"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), ExpertLoraConfig())
    stock = get_peft_model(
        base_model(), LoraConfig(target_modules=[], target_parameters=["experts.down_proj"])
    )
    with warnings.catch_warnings(), pytest.raises(ValueError, match="ParamWrapper of PEFT already"):
        warnings.simplefilter("ignore")
        get_peft_model(stock.base_model.model, ExpertLoraConfig())


def test_what_peft_can_and_experts_cannot():
    model = two_adapters()
    with pytest.raises(ValueError, match="adapter_names"):
        model.eval()(IDS, adapter_names=["default", "second"])
    with pytest.raises(ValueError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum")


def test_what_has_no_operator_runs_in_plain_torch():
    single = results(adapted(base_model("gpt_oss"), experts={FIRST: [1, 2]}))
    model = adapted(base_model("gpt_oss"), experts={FIRST: [1, 2]}).double()
    model.get_base_model().set_experts_implementation("eager")  # the others have no float64
    with pytest.warns(UserWarning, match="float64"):
        check_equal(single, results(model))
    model = adapted(base_model("gpt_oss"), experts={FIRST: [1, 2]})
    layer = layers_of(model)[f"base_model.model.{FIRST}"]
    layer.base_layer.down_proj.requires_grad_(True)
    with pytest.warns(UserWarning, match="down_proj is trained"):
        ours = results(model)
    trained = ours.pop(f"base_model.model.{FIRST}.base_layer.down_proj")
    assert trained.any() and layer.fallback
    check_equal(ours, single)
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match="is trained"):
        model(IDS)


def test_hooks_on_the_experts_still_run():
    model = adapted(base_model(), experts=SOME)
    theirs, layer = model(IDS).logits, layers_of(model)[f"base_model.model.{FIRST}"]
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    assert torch.equal(model(IDS).logits, theirs) and seen == [(34, 64)]
    handle.remove()
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Scale(ModelHook):
        def post_forward(self, module, output):
            return output * 3

    add_hook_to_module(layer.base_layer, Scale())
    x, index, weights = torch.randn(9, 64), torch.randint(8, (9, 2)), torch.rand(9, 2)
    tripled = layer(x, index, weights)
    layer.base_layer._hf_hook = ModelHook()
    assert torch.allclose(tripled, 3 * layer(x, index, weights))


def test_any_experts_implementation():
    logits = []
    for implementation in ("eager", "grouped_mm", "peftfast"):
        base = base_model()
        base.set_experts_implementation(implementation)
        logits.append(adapted(base, experts=SOME)(IDS).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
