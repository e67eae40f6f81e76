"""LoRA on experts, fused and one expert at a time: the same values, the same bytes on the way back, and the command."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_experts import BOTH, CONFIGS, IDS, base_model
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

import peftfast
from peftfast.integrations.conversion import CONFIG, NAMES, WEIGHTS, convert
from peftfast.testing import relative_error

KINDS = ["mixtral", "olmoe", "qwen2_moe", "deepseek_v3"]
TARGETS = {
    "both": (BOTH, []),
    "gate_up": (BOTH[:1], ["o_proj"]),
    "down": (BOTH[1:], "all-linear"),
    "router": ([*BOTH, "gate.weight"], r".*layers\.1.*o_proj"),
}
LINEARS = ("gate_proj", "up_proj", "down_proj")
SIZES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")


def saved(path, kind="olmoe", parameters=BOTH, modules=(), dtype=torch.float32, config=None, **options):
    """A folder with an adapter that PEFT saved, and the model: random values, since a zero B hides wrong layouts."""
    options = dict(r=3, lora_alpha=8) | options
    modules = modules if isinstance(modules, str) else list(modules)
    config = config or LoraConfig(target_modules=modules, target_parameters=parameters, **options)
    model = get_peft_model(base_model(kind, dtype), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    return model


def weights(path):
    return load_file(path / WEIGHTS)


def settings(path):
    return json.loads((path / CONFIG).read_text())


def write(path, config, tensors):
    path.mkdir(exist_ok=True)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config))


def edit(path, change_config=None, change_weights=None):
    config, tensors = settings(path), weights(path)
    if change_config:
        change_config(config)
    if change_weights:
        change_weights(tensors)
    write(path, config, tensors)


@pytest.fixture
def fused(tmp_path):
    saved(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.fixture
def per_expert(fused, tmp_path):
    convert(fused, tmp_path / "per_expert", "per-expert", "olmoe")
    return tmp_path / "per_expert"


def deltas(wrapper):
    """What PEFT adds to each expert, float64 [experts, out, in], by the name of the projection."""
    found = {}
    while hasattr(wrapper, "parameter_name"):
        A, B = wrapper.lora_A["default"].weight.double(), wrapper.lora_B["default"].weight.double()
        A, B = A.view(wrapper.num_experts, -1, A.shape[1]), B.view(B.shape[0], -1, wrapper.num_experts)
        found[wrapper.parameter_name] = torch.einsum("ore,eri->eoi", B, A) * wrapper.scaling["default"]
        wrapper = wrapper.base_layer
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parameters, modules", TARGETS.values(), ids=TARGETS.keys())
def test_there_and_back(kind, parameters, modules, tmp_path):
    model = saved(tmp_path / "a", kind, parameters, modules, dtype=torch.bfloat16)
    there = convert(tmp_path / "a", tmp_path / "b", "per-expert", kind)
    back = convert(tmp_path / "b", tmp_path / "c", "fused", kind)
    wrappers = {name: module for name, module in model.named_modules() if name.endswith(".experts")}
    assert there.layers == back.layers == len(wrappers)
    assert there.experts == sum(wrapper.num_experts for wrapper in wrappers.values()) == back.experts
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()
    again = PeftModel.from_pretrained(base_model(kind, torch.bfloat16), tmp_path / "c")
    again.base_model.model.load_state_dict(
        model.base_model.model.state_dict()
    )  # the base has other random weights
    assert {name for name, _ in again.named_parameters()} == {name for name, _ in model.named_parameters()}
    for name, wrapper in wrappers.items():
        for projection, delta in deltas(wrapper).items():
            assert torch.equal(deltas(again.get_submodule(name))[projection], delta)


def one_by_one(path):
    """The adapter as PEFT applies it to linear layers, one for each that it has tensors for, as in transformers 4."""
    model, tensors, config = torch.nn.Module(), weights(path), settings(path)
    for key, A in tensors.items():
        name, lora_A, _ = key.removeprefix("base_model.model.").partition(".lora_A.weight")
        if lora_A:
            *parents, linear = name.split(".")
            place = model
            for part in parents:
                if part not in dict(place.named_children()):
                    place.add_module(part, torch.nn.Module())
                place = place.get_submodule(part)
            out_features = len(tensors[key.replace("lora_A", "lora_B")])
            place.add_module(linear, torch.nn.Linear(A.shape[1], out_features, bias=False))
    config = LoraConfig(**{key: config[key] for key in (*SIZES, "use_rslora", "target_modules")})
    model = get_peft_model(model, config)
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys and not any("lora_" in key for key in result.missing_keys)
    return model.base_model.model


def delta_of(layer):
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    return B @ A * layer.scaling["default"]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_delta_of_each_expert_is_the_same(kind, use_rslora, tmp_path):
    sizes = dict(
        rank_pattern={"down_proj": 2, "o_proj": 1}, alpha_pattern={r".*\.gate_up_proj": 5, "o_proj": 7}
    )
    model = saved(tmp_path / "a", kind, modules=["o_proj"], use_rslora=use_rslora, **sizes)
    convert(tmp_path / "a", tmp_path / "b", "per-expert", kind)
    convert(tmp_path / "b", tmp_path / "c", "fused", kind)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()
    apart, again, names = (
        one_by_one(tmp_path / "b"),
        PeftModel.from_pretrained(base_model(kind), tmp_path / "c"),
        NAMES[kind],
    )
    attention = "model.layers.1.self_attn.o_proj"
    assert torch.equal(
        delta_of(apart.get_submodule(attention)), delta_of(model.base_model.model.get_submodule(attention))
    )
    wrapper = model.base_model.model.model.layers[1].mlp.experts
    assert deltas(wrapper).keys() == names.of_projection.keys()
    for projection, delta in deltas(wrapper).items():
        assert torch.equal(deltas(again.base_model.model.model.layers[1].mlp.experts)[projection], delta)
        for expert in range(wrapper.num_experts):
            module = names.unfuse(f"model.layers.1.mlp.experts.{expert}")
            parts = [
                delta_of(apart.get_submodule(f"{module}.{linear}"))
                for linear in names.of_projection[projection]
            ]
            torch.testing.assert_close(torch.cat(parts), delta[expert], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["mixtral", "olmoe", "qwen3_moe"])
def test_peft_reads_one_by_one_as_the_same(kind, tmp_path):
    """By its own conversion of adapters from transformers 4, which it has for these."""
    base = base_model(kind)
    model = saved(tmp_path / "a", kind)
    convert(tmp_path / "a", tmp_path / "b", "per-expert", kind)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "b")
    ours = PeftModel.from_pretrained(base, tmp_path / "a")
    expected = ours(IDS).logits.detach().double()
    assert relative_error(theirs(IDS).logits, expected) < 1e-6
    with ours.disable_adapter():
        assert relative_error(ours(IDS).logits, expected) > 1e-2
    assert deltas(model.base_model.model.model.layers[0].mlp.experts).keys() == {"gate_up_proj", "down_proj"}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "olmoe"])
def test_gate_and_up_with_an_A_of_their_own(kind, use_rslora, tmp_path):
    """As adapters that were trained with transformers 4 have."""
    saved(tmp_path / "a", kind, use_rslora=use_rslora)
    convert(tmp_path / "a", tmp_path / "b", "per-expert", kind)
    names = NAMES[kind]
    edit(
        tmp_path / "b",
        change_weights=lambda state: state.update(
            {key: torch.randn_like(value) for key, value in state.items() if f".{names.up}.lora_A" in key}
        ),
    )
    conversion = convert(tmp_path / "b", tmp_path / "c", "fused", kind)
    assert conversion.ranks == [3, 6]
    tensors = weights(tmp_path / "b")
    model = PeftModel.from_pretrained(base_model(kind), tmp_path / "c")
    scaling = 8 / 3**0.5 if use_rslora else 8 / 3
    for layer in range(2):
        found = deltas(model.get_submodule(f"base_model.model.model.layers.{layer}.mlp.experts"))
        for expert in range(len(found["down_proj"])):
            module = names.unfuse(f"base_model.model.model.layers.{layer}.mlp.experts.{expert}")
            for projection, linears in names.of_projection.items():
                parts = [
                    tensors[f"{module}.{linear}.lora_B.weight"].double()
                    @ tensors[f"{module}.{linear}.lora_A.weight"].double()
                    for linear in linears
                ]
                torch.testing.assert_close(found[projection][expert], torch.cat(parts) * scaling)
    convert(tmp_path / "c", tmp_path / "d", "per-expert", kind)  # now with A's in common, of twice the rank
    convert(tmp_path / "d", tmp_path / "e", "fused", kind)
    assert (tmp_path / "c" / WEIGHTS).read_bytes() == (tmp_path / "e" / WEIGHTS).read_bytes()


def test_chosen_experts(tmp_path):
    chosen = {"model.layers.0.mlp.experts": [1, 6], "model.layers.1.mlp.experts": [0, 3, 5]}
    config = peftfast.ExpertLoraConfig(
        r=4, lora_alpha=6, experts=chosen, expert_r={"down_proj": 2}, target_modules=["q_proj"]
    )
    model = saved(tmp_path / "a", config=config)
    conversion = convert(tmp_path / "a", tmp_path / "b", "per-expert", "olmoe", num_experts=8)
    assert (conversion.experts, conversion.layers, conversion.ranks) == (5, 2, [2, 4])
    tensors, written = weights(tmp_path / "b"), settings(tmp_path / "b")
    assert written["peft_type"] == "LORA" and "experts" not in written and len(tensors) == 2 * (3 * 5 + 2)
    linears = {f"{layer}.{expert}.{name}" for layer in chosen for expert in chosen[layer] for name in LINEARS}
    assert set(written["target_modules"]) == linears | {"q_proj"}
    apart = one_by_one(tmp_path / "b")
    for layer, experts in chosen.items():
        for projection, names in NAMES["olmoe"].of_projection.items():
            delta = model.get_submodule(f"base_model.model.{layer}").get_delta_weight("default", projection)
            for slot, expert in enumerate(experts):
                parts = [delta_of(apart.get_submodule(f"{layer}.{expert}.{name}")) for name in names]
                torch.testing.assert_close(torch.cat(parts).float(), delta[slot])
    with pytest.raises(ValueError, match="on chosen experts"):
        convert(tmp_path / "a", tmp_path / "c", "fused", "olmoe")
    with pytest.raises(ValueError, match="has no adapter on down_proj of expert 0 of 7"):
        convert(tmp_path / "b", tmp_path / "c", "fused", "olmoe")
    with pytest.raises(ValueError, match="for 7 experts to a layer, the base model has 5"):
        convert(tmp_path / "a", tmp_path / "c", "per-expert", "olmoe", num_experts=5)


@pytest.mark.parametrize("model_type", NAMES)
def test_the_names_are_those_of_transformers_own_conversion(model_type):
    names, conversions = NAMES[model_type], get_checkpoint_conversion_mapping(model_type)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    for projection, linears in names.of_projection.items():
        for linear in linears:
            key = f"model.layers.3.{names.block}.experts.7.{linear}.weight"
            for renaming in renamings:
                key, _ = renaming.rename_source_key(key)
            results = [(converter, *converter.rename_source_key(key)) for converter in converters]
            ((converter, renamed, _),) = [result for result in results if result[2] is not None]
            assert renamed == f"model.layers.3.{names.fused_block}.experts.{projection}"
            assert [pattern.split(".")[-2] for pattern in converter.source_patterns] == list(linears)
            assert [type(operation) for operation in converter.operations][:1] == [MergeModulelist]
            assert (len(linears) == 2) == any(isinstance(op, Concatenate) for op in converter.operations)


# ---- bad input --------------------------------------------------------------------------------------------

GATE = "base_model.model.model.layers.0.mlp.experts.2.gate_proj.lora_A.weight"
OUTER = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
INNER = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
BAD_FUSED = {
    "dora": (lambda config, _: config.update(use_dora=True), "has use_dora"),
    "another type": (lambda config, _: config.update(peft_type="LOHA"), "is of type LOHA"),
    "no rank": (lambda config, _: config.pop("r"), "has no r and lora_alpha"),
    "wrong rank": (lambda config, _: config.update(r=5), r"expected \[experts \* 5, in\]"),
    "rank of nothing": (
        lambda config, _: config.update(rank_pattern={"down_proj": 0}),
        "says rank 0 of model.layers",
    ),
    "dimensions": (
        lambda _, state: state.update({OUTER: torch.ones(3)}),
        r"down_proj has lora_A \[3\], expected 2",
    ),
    "magnitudes": (
        lambda _, state: state.update({OUTER.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}),
        "lora_magnitude_vector.*layouts are mixed",
    ),
    "mixed": (lambda _, state: state.update({GATE: torch.ones(3, 64)}), "layouts are mixed"),
    "half a pair": (lambda _, state: state.pop(OUTER), "down_proj has no lora_A"),
    "one projection": (
        lambda _, state: [state.pop(key) for key in list(state) if "layers.1" in key and "base_layer" in key],
        "layers.1.mlp.experts has 1 adapted projections, but target_parameters names 2",
    ),
    "fewer experts": (
        lambda _, state: state.update({INNER: state[INNER][:, :21].clone()}),
        r"layers.1.mlp.experts.gate_up_proj has lora_A",
    ),
    "other parameters": (
        lambda config, _: config["target_parameters"].append("embed_tokens.weight"),
        "embed_tokens.weight, which is neither",
    ),
    "no experts": (
        lambda _, state: [state.pop(key) for key in list(state)] and state.update(a=torch.ones(1)),
        "no LoRA on experts in the fused layout",
    ),
}
BAD_PER_EXPERT = {
    "missing expert": (
        lambda _, state: [state.pop(key) for key in list(state) if ".1.mlp.experts.4." in key],
        "layers.1.mlp.experts has no adapter on down_proj of expert 4 of 8",
    ),
    "gate without up": (
        lambda _, state: [state.pop(key) for key in list(state) if ".up_proj." in key],
        "only one of gate_proj and up_proj",
    ),
    "ranks": (
        lambda _, state: state.update({GATE: state[GATE][:2].clone()}),
        "2.gate_proj has rank 2, but adapter_config.json says 3",
    ),
    "alphas": (
        lambda config, _: config.update(alpha_pattern={r"experts\.\d+\.up_proj": 4}),
        "different ranks, alphas or dtypes on gate_proj and up_proj",
    ),
    "mixed": (lambda _, state: state.update({OUTER: torch.ones(3, 3)}), "layouts are mixed"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_FUSED.values(), ids=BAD_FUSED.keys())
def test_fused_adapters_that_cannot_be_taken_apart(change, message, fused, tmp_path):
    config, state = settings(fused), weights(fused)
    change(config, state)
    write(fused, config, state)
    with pytest.raises(ValueError, match=message) as caught:
        convert(fused, tmp_path / "out", "per-expert", "olmoe")
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == [fused]


@pytest.mark.parametrize("change, message", BAD_PER_EXPERT.values(), ids=BAD_PER_EXPERT.keys())
def test_adapters_that_cannot_be_fused(change, message, per_expert, tmp_path):
    config, state = settings(per_expert), weights(per_expert)
    change(config, state)
    write(per_expert, config, state)
    with pytest.raises(ValueError, match=message) as caught:
        convert(per_expert, tmp_path / "out", "fused", "olmoe")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_last_expert_is_missed_if_the_base_model_is_known(per_expert, tmp_path):
    edit(
        per_expert,
        change_weights=lambda state: [state.pop(key) for key in list(state) if ".experts.7." in key],
    )
    with pytest.raises(ValueError, match="of expert 7 of 8"):
        convert(per_expert, tmp_path / "out", "fused", "olmoe", num_experts=8)


# ---- the command ------------------------------------------------------------------------------------------


def run(*arguments):
    from peftfast import cli

    with pytest.raises(SystemExit) as done:
        cli.main(["convert", *map(str, arguments)])
    return done.value.code or 0


def test_the_command(fused, tmp_path, capsys):
    CONFIGS["olmoe"].save_pretrained(tmp_path / "base")
    options = ("--model", tmp_path / "base")
    assert run(fused, "--to", "per-expert", "--out", tmp_path / "b", *options) == 0
    assert "96 tensors" in (said := capsys.readouterr().out) and "rank 3 on 16 experts in 2 layers" in said
    assert run(tmp_path / "b", "--to", "fused", "--out", tmp_path / "c", "--model-type", "olmoe") == 0
    assert (fused / WEIGHTS).read_bytes() == (tmp_path / "c" / WEIGHTS).read_bytes()
    edit(fused, lambda config: config.update(base_model_name_or_path=str(tmp_path / "base")))
    assert run(fused, "--to", "per-expert", "--out", tmp_path / "d") == 0
    assert weights(tmp_path / "d").keys() == weights(tmp_path / "b").keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "base", "c", "d", "fused"]


def test_what_is_there_already_stays(fused, tmp_path, capsys):
    out, options = tmp_path / "out", ("--to", "per-expert", "--model-type", "olmoe")
    out.mkdir()
    assert run(fused, "--out", out, *options) == 0
    before = (out / WEIGHTS).read_bytes()
    assert run(fused, "--out", out, *options) == 2 and "--overwrite" in capsys.readouterr().err
    (out / "kept").write_text("")
    assert run(fused, "--out", out, *options, "--overwrite") == 0
    assert (out / WEIGHTS).read_bytes() == before and not (out / "kept").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes").write_text("mine")
    assert run(fused, "--out", other, *options, "--overwrite") == 2 and (other / "notes").exists()
    assert run(fused, "--out", fused, *options, "--overwrite") == 2 and (fused / WEIGHTS).exists()
    assert run(fused, "--out", other / "notes", *options) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--to", "per-expert"], "pass --model or --model-type"),
        (["--to", "per-expert", "--model-type", "llama"], "llama are not known, only of deepseek_v2, "),
        (["--to", "vllm", "--model-type", "olmoe"], "per-expert or fused, got 'vllm'"),
        (["--to", "fused", "--model-type", "olmoe"], "no LoRA on experts in the per-expert layout"),
        (["--to", "per-expert", "--model", "./nothing"], "no such folder"),
        (["--to", "per-expert", "--model", "BASE", "--model-type", "mixtral"], "of type olmoe"),
    ],
    ids=["no model", "type", "layout", "direction", "folder", "two types"],
)
def test_bad_arguments(arguments, message, fused, tmp_path, capsys):
    CONFIGS["olmoe"].save_pretrained(tmp_path / "base")
    arguments = [str(tmp_path / "base") if argument == "BASE" else argument for argument in arguments]
    assert run(fused, "--out", tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, text", [(None, None), (CONFIG, "[]"), (CONFIG, "{"), (WEIGHTS, "no tensors")])
def test_what_is_no_adapter(name, text, fused, tmp_path, capsys):
    folder = tmp_path
    if name:
        folder = fused
        (fused / name).write_text(text)
    assert run(folder, "--to", "fused", "--out", tmp_path / "out", "--model-type", "olmoe") == 2
    assert (name or "not an adapter folder") in capsys.readouterr().err


def test_it_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "peftfast", "convert", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "per-expert" in done.stdout


def test_overwrite_spares_a_folder_that_holds_the_adapter(tmp_path):
    adapter = tmp_path / "run" / "checkpoint-10"
    saved(adapter)
    saved(tmp_path / "run")
    with pytest.raises(ValueError, match="holds the adapter itself"):
        convert(adapter, tmp_path / "run", "per-expert", "olmoe", overwrite=True)
    assert (adapter / WEIGHTS).is_file()
