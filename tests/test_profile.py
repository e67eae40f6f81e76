"""Expert profiles, against what the routers of the model say."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_expert_lora import base_model
from test_experts import BOTH, IDS, adapted
from transformers import BatchEncoding

import peftfast
from peftfast import ExpertLoraConfig, ExpertProfile, profile_experts
from peftfast.integrations.experts import quantize_experts
from peftfast.integrations.tuners.profile import recording

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
OTHER_IDS = IDS.flip(0)[:, :11] + 1


def counts_of_routers(model, ids, mask=None):
    """Tokens and gate mass of each layer of a tiny OLMoE, one token after the other."""
    tokens, mass = [], []
    for logits in model(ids, attention_mask=mask, output_router_logits=True).router_logits:
        count, total = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.float64)
        for row, kept in zip(
            logits.float().softmax(-1), [True] * ids.numel() if mask is None else mask.flatten()
        ):
            for weight, expert in zip(*row.topk(3)):
                count[expert] += 1 if kept else 0
                total[expert] += weight.item() if kept else 0
        tokens.append(count)
        mass.append(total)
    return tokens, mass


def check(profile, tokens, mass):
    assert list(profile.tokens) == list(profile.gate_mass) == [FIRST, SECOND]
    for name, count, total in zip(profile.tokens, tokens, mass):
        assert profile.tokens[name].dtype == torch.int64 and torch.equal(profile.tokens[name], count)
        assert profile.gate_mass[name].dtype == torch.float64
        torch.testing.assert_close(profile.gate_mass[name], total, rtol=1e-5, atol=1e-6)


def hooks_of(model):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def some_profile():
    tokens = {"a.0": torch.tensor([10, 0, 40, 40, 10]), "a.1": torch.tensor([1, 2, 3, 4])}
    mass = {"a.0": [60, 0, 10, 20, 10], "a.1": [0.7, 0.1, 0.1, 0.1]}
    mass = {name: torch.tensor(values, dtype=torch.float64) for name, values in mass.items()}
    return ExpertProfile(tokens, mass)


# ---- counting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "peftfast"])
def test_counts_are_those_of_the_routers(implementation):
    model = base_model()
    model.set_experts_implementation(implementation)
    parts = [counts_of_routers(model.eval(), ids) for ids in (IDS, OTHER_IDS)]
    hooks = hooks_of(model)
    model.train()
    model.model.layers[1].eval()
    profile = profile_experts(model, [IDS, BatchEncoding({"input_ids": OTHER_IDS})])
    check(profile, *[[a + b for a, b in zip(*both)] for both in zip(*parts)])
    assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    assert hooks_of(model) == hooks


def test_padding_does_not_count():
    model = base_model().eval()
    mask = torch.ones_like(IDS)
    mask[0, :5] = mask[1, 12:] = 0
    tokens, mass = counts_of_routers(model, IDS, mask)
    check(profile_experts(model, [{"input_ids": IDS, "attention_mask": mask}]), tokens, mass)
    assert tokens[0].sum() == 3 * mask.sum()
    with recording(model) as profile, torch.no_grad():
        model(IDS, mask)
        check(profile, tokens, mass)
        model(IDS)  # the mask is not that of the next call
    assert profile.tokens[FIRST].sum() == 3 * (mask.sum() + IDS.numel())


def test_generation_counts_each_token_once():
    model = base_model().eval()
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with recording(model) as profile:
        out = model.generate(
            IDS[:, :6], attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    assert out.shape == (2, 10)
    assert profile.tokens[SECOND].sum() == 3 * (mask.sum() + 2 * 3)  # the last token is not run


@pytest.mark.parametrize("kind", ["gpt_oss", "deepseek_v3", "mixtral", "qwen2_moe"])
def test_other_models(kind):
    model = base_model(kind)
    profile = profile_experts(model, [IDS])
    names = [name for name, module in model.named_modules() if name.endswith(".experts")]
    assert list(profile.tokens) == names
    for name in names:
        experts = model.get_submodule(name)
        assert profile.tokens[name].shape == (experts.num_experts,)
        assert profile.tokens[name].sum() == IDS.numel() * model.config.num_experts_per_tok
        assert profile.gate_mass[name].sum() > 0
    four_bit = profile_experts(quantize_experts(copy.deepcopy(model)), [IDS])
    assert torch.equal(four_bit.tokens[names[0]], profile.tokens[names[0]])


@pytest.mark.parametrize("wrap", ["target_parameters", "experts", "modules_to_save"])
def test_adapters_change_no_name_and_no_path(wrap):
    base = base_model()
    expected = profile_experts(base, [IDS])
    if wrap == "target_parameters":
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], target_parameters=BOTH))
    elif wrap == "experts":
        model = get_peft_model(base, ExpertLoraConfig(experts={FIRST: [2]}))
    else:
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    for which in (model, model.base_model, model.get_base_model()):
        profile = profile_experts(which, [IDS])
        check(profile, expected.tokens.values(), expected.gate_mass.values())
    with peftfast.enabled(strict=True), recording(model) as profile:
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(layer.fast for layer in peftfast.report(model))
    check(profile, expected.tokens.values(), expected.gate_mass.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_counts_once(use_reentrant):
    model = adapted(base_model()).train()
    expected = profile_experts(model, [IDS])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    runs = []
    experts = model.base_model.model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda *_: runs.append(None))
    with peftfast.enabled(strict=True), recording(model) as profile:
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert len(runs) == 2
    check(profile, expected.tokens.values(), expected.gate_mass.values())


def test_no_expert_is_not_counted():
    model = base_model()
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    index = torch.tensor([[0, 8], [8, 3], [7, 3]])
    with recording(model) as profile, torch.no_grad():
        experts(torch.randn(3, 64), top_k_weights=torch.full((3, 2), 0.25), top_k_index=index)
    assert profile.tokens[FIRST].tolist() == [1, 0, 0, 2, 0, 0, 0, 1]
    assert profile.gate_mass[FIRST].tolist() == [0.25, 0, 0, 0.5, 0, 0, 0, 0.25]
    assert not profile.tokens[SECOND].any()


def test_what_cannot_be_profiled():
    model = base_model()
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match="no experts"):
        profile_experts(torch.nn.Linear(3, 3), [torch.ones(1, 3)])
    with pytest.raises(ValueError, match="batches is empty"):
        profile_experts(model, iter(()))
    with pytest.raises(TypeError, match="batches holds a list"):
        profile_experts(model, [[1, 2]])
    assert model.training and hooks_of(model) == hooks


# ---- choosing -----------------------------------------------------------------------------------------------


def test_top_k_and_top_share():
    profile = some_profile()
    assert profile.top_k(2) == {"a.0": [2, 3], "a.1": [3, 2]}
    assert profile.top_k(3) == {"a.0": [2, 3, 0], "a.1": [3, 2, 1]}
    assert profile.top_share(0.5) == {"a.0": [2, 3], "a.1": [3, 2]}
    assert profile.top_share(0.01) == {"a.0": [2], "a.1": [3]}
    assert profile.top_share(1) == {"a.0": [2, 3, 0, 4, 1], "a.1": [3, 2, 1, 0]}
    for bad in (0, 5):
        with pytest.raises(ValueError, match=f"k is {bad}, expected 1 to"):
            profile.top_k(bad)
    for bad in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share is"):
            profile.top_share(bad)


def test_cumulative_mass():
    profile = some_profile()
    assert profile.cumulative_mass(0.6) == {"a.0": [0], "a.1": [0]}
    assert profile.cumulative_mass(0.61) == {"a.0": [0, 3], "a.1": [0]}
    assert profile.cumulative_mass(0.8) == {"a.0": [0, 3], "a.1": [0, 1]}  # 0.7 + 0.1 is 0.7999...
    assert profile.cumulative_mass(1) == {"a.0": [0, 3, 2, 4], "a.1": [0, 1, 2, 3]}
    assert profile.cumulative_mass(0.5, by="tokens") == {"a.0": [2, 3], "a.1": [3, 2]}
    with pytest.raises(ValueError, match="p is 0"):
        profile.cumulative_mass(0)
    with pytest.raises(ValueError, match="by is 'mass'"):
        profile.cumulative_mass(0.5, by="mass")
    profile.tokens["a.1"].zero_()
    with pytest.raises(ValueError, match=r"a\.1"):
        profile.cumulative_mass(0.5, by="tokens")


def test_a_choice_is_a_configuration():
    model = base_model()
    chosen = profile_experts(model, [IDS]).top_share(0.25)
    config = ExpertLoraConfig(r=4, experts=chosen)
    assert get_peft_model(model, config).get_nb_trainable_parameters()[0] == 2 * 2 * 4 * (64 + 80 + 40 + 64)


def test_save_and_load(tmp_path):
    profile = profile_experts(base_model(), [IDS])
    profile.save(tmp_path / "profile.json")
    loaded = ExpertProfile.load(tmp_path / "profile.json")
    for ours, theirs in ((profile.tokens, loaded.tokens), (profile.gate_mass, loaded.gate_mass)):
        assert list(ours) == list(theirs)
        assert all(
            torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
        )


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ('{"layers": {}}', "is not an expert profile"),
        ('{"format": "peftfast.expert_profile", "layers": {"a": {"tokens": [1]}}}', "a has no usable"),
        ('{"format": "peftfast.expert_profile", "layers": {"a": {"tokens": [1], "gate_mass": [1, 2]}}}', "of a are"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=f"p.json.*{message}"):
        ExpertProfile.load(tmp_path / "p.json")


def test_what_it_shows(tmp_path):
    lines = str(some_profile()).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["a.0", "5", "4", "2.00"] and lines[2].split() == ["a.1", "4", "4", "1.60"]
    pytest.importorskip("matplotlib")
    some_profile().plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
