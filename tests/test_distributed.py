"""Training on two processes: the results of one, on the fast path.

The tests launch this file with torchrun, once for all scenarios: each process runs `SCENARIOS` one after the other and
writes what came of each, or its traceback. The tests then compare that with the same training in this process.
"""

import copy
import datetime
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.state import DistributedType, PartialState
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    Trainer,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

import peftfast
from peftfast import ExpertLoraConfig, FourBitConfig, MixtureLoraConfig
from peftfast.cli import main
from peftfast.cli.settings import TrainSettings
from peftfast.cli.train import RESULT_FILE, train
from peftfast.demo.pretrain import build_tokenizer

PROCESSES, STEPS, BATCH = 2, 3, 4  # the batch is that of all processes together
EPSILON = (
    1e-4  # of Adam: where a gradient is next to nothing, its default makes of the order of a sum a whole step
)
VOCABULARY = 64
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
MODELS = {"llama": LlamaConfig(**SIZES), "olmoe": OlmoeConfig(**SIZES, num_experts=6, num_experts_per_tok=2)}
ATTENTION, LINEARS = ["q_proj", "v_proj"], "all-linear"
# The base, how it is loaded, and the adapters on it.
CASES = {
    "dense": ("llama", None, LoraConfig(target_modules=LINEARS)),
    "bitsandbytes": (
        "llama",
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        LoraConfig(target_modules=LINEARS),
    ),
    "fourbit": ("llama", FourBitConfig(), LoraConfig(target_modules=LINEARS)),
    "experts": ("olmoe", FourBitConfig(), ExpertLoraConfig(target_modules=ATTENTION)),
    "parameters": (
        "olmoe",
        None,
        LoraConfig(target_modules=ATTENTION, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    # The balance loss is of a process's own batch, so that it would not be that of one process.
    "mixture": (
        "llama",
        FourBitConfig(),
        MixtureLoraConfig(num_experts=3, target_modules=ATTENTION, router_aux_loss_coef=0.0),
    ),
}


def write_models(folder):
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / name)


def load(case, folder):
    """The model of a case with random adapters, which are the same in every process."""
    name, quantization, config = CASES[case]
    return adapt(base_of(name, folder, quantization), config)


def base_of(name, folder, quantization=None, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder / name, dtype=torch.float32, quantization_config=copy.deepcopy(quantization), **options
    )


def adapt(base, config):
    model = get_peft_model(base, copy.deepcopy(config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


def samples():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(VOCABULARY, (STEPS * BATCH, 7), generator=generator)


def adapter_of(model):
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def slow_layers(model):
    """What does not run on the fast path, the loss included, as reports name it."""
    found = peftfast.report(model)
    assert len(found) > 0
    return [(layer.kind, layer.reason) for layer in (*found.layers, *found.losses) if not layer.fast]


# ---- what both one process and two do -----------------------------------------------------------------------


def train_by_trainer(case, folder, processes, **options):
    """transformers' Trainer: DDP where there are processes."""
    with peftfast.enabled(strict=True):
        model = load(case, folder)
        trainer = trainer_for(model, folder, processes, **options)
        trainer.train()
        return {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "adapter": adapter_of(model),
            "wrapped": type(trainer.model_wrapped).__name__,
            "slow": slow_layers(model),
        }


def trainer_for(model, folder, processes, **options):
    arguments = dict(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=BATCH // processes, max_steps=STEPS,
        learning_rate=1e-2, adam_epsilon=EPSILON, lr_scheduler_type="constant", max_grad_norm=0.1, logging_steps=1,
        save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, seed=0, logging_nan_inf_filter=False,
    )  # fmt: skip
    rows = [{"input_ids": sample, "labels": sample} for sample in samples()]
    settings = TrainingArguments(**arguments | options)
    if (
        settings.fsdp
    ):  # accelerate heeds it on GPUs alone; told that these are such, it does what it does there
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return Trainer(model=model, args=settings, train_dataset=rows)


def optimizer_for(model):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, eps=EPSILON)


def train_by_hand(model, optimizer, steps, rank=0, processes=1):
    """Some of the steps with clipped gradients. Strict: a layer that falls back is an error."""
    losses, batches = [], samples().view(STEPS, processes, BATCH // processes, -1)
    with peftfast.enabled(strict=True):
        for step in steps:
            ids = batches[step, rank]
            logits = model(input_ids=ids).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return torch.stack(losses)


# ---- what a process of two does -------------------------------------------------------------------------------


def ddp(folder, rank):
    return {case: train_by_trainer(case, folder, PROCESSES) for case in CASES}


def fsdp(folder, rank):
    return {case: train_sharded(case, folder, rank) for case in CASES}


def shard(model):
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_sharded(case, folder, rank):
    model = load(case, folder)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    if case == "bitsandbytes":  # which knows its scales by the class of the parameter, and FSDP makes another
        whole = {name: whole[name] for name, _ in model.named_parameters()}
    shard(model)
    whole_parameters = [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
    gathered = gather(model)
    differing = [name for name in whole.keys() | gathered.keys() if not same(whole, gathered, name)]
    optimizer = optimizer_for(model)
    losses = train_by_hand(model, optimizer, range(2), rank, PROCESSES)
    dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / f"{case}-of-two")
    losses = torch.cat([losses, train_by_hand(model, optimizer, range(2, STEPS), rank, PROCESSES)])
    dist.all_reduce(losses)
    with peftfast.enabled():
        slow = slow_layers(model)
    trained = gather(model)
    changed = [name for name in whole if "lora_" not in name and not same(whole, trained, name)]
    result = {
        "whole parameters": whole_parameters,
        "differing": differing + changed,
        "losses": losses / PROCESSES,
        "adapter": get_peft_model_state_dict(model, state_dict=trained),
        "slow": slow,
    }
    model = wiped(case, folder)
    shard(model)
    optimizer = optimizer_for(model)
    load_checkpoint(model, optimizer, folder / f"{case}-of-one")
    train_by_hand(model, optimizer, range(2, STEPS), rank, PROCESSES)
    return result | {"resumed": get_peft_model_state_dict(model, state_dict=gather(model))}


def gather(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def same(first, second, name):
    return name in first and name in second and torch.equal(first[name], second[name])


TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def checkpoint_of(model, optimizer):
    """The trained parameters and the optimizer, sharded where they are."""
    adapter = get_peft_model_state_dict(model, state_dict=get_model_state_dict(model))
    return {"adapter": adapter, "optimizer": get_optimizer_state_dict(model, optimizer, options=TRAINED)}


def load_checkpoint(model, optimizer, path):
    state = checkpoint_of(model, optimizer)
    dcp.load(state, checkpoint_id=path)  # into the parameters, which the state dict shares
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=TRAINED)


def accelerate(folder, rank):
    """transformers' Trainer with accelerate's plugin of FSDP2."""
    return {case: train_by_plugin(case, folder) for case in WITH_PLUGIN}


WITH_PLUGIN = ["dense", "fourbit", "experts"]
PLUGIN = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip


def train_by_plugin(case, folder):
    output = folder / f"plugin-{case}"
    with peftfast.enabled():
        trainer = trainer_for(
            load(case, folder),
            folder,
            PROCESSES,
            output_dir=str(output),
            save_strategy="steps",
            save_steps=2,
            **PLUGIN,
        )
        trainer.train()
        trainer.save_model(output)
        result = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "slow": slow_layers(trainer.model),
            "sharded": [
                name for name, value in trainer.model.named_parameters() if isinstance(value, DTensor)
            ],
        }
        again = trainer_for(wiped(case, folder), folder, PROCESSES, output_dir=str(output), **PLUGIN)
        again.train(resume_from_checkpoint=str(output / "checkpoint-2"))
        again.save_model(folder / f"plugin-{case}-resumed")
    return result


def parallel(folder, rank):
    """transformers' tensor and expert parallelism, which shard a model while it loads."""
    tensor = dict(distributed_config=DistributedConfig(tp_size=PROCESSES))
    expert = dict(distributed_config=DistributedConfig(fsdp_size=PROCESSES, ep_size=PROCESSES))
    attention, found = LoraConfig(target_modules=ATTENTION), {}
    ids = samples()[:BATCH].view(PROCESSES, BATCH // PROCESSES, -1)[rank]

    model = adapt(base_of("llama", folder, **tensor), attention)
    stock = model(input_ids=samples()[:BATCH]).logits
    with peftfast.enabled():
        ours = model(input_ids=samples()[:BATCH]).logits
        found["tensor"] = {"stock": stock.detach(), "ours": ours.detach(), "slow": slow_layers(model)}

    model = adapt(base_of("olmoe", folder, experts_implementation="peftfast", **expert), attention)
    with peftfast.enabled():
        logits = model(input_ids=ids).logits
        logits.square().mean().backward()
        found["expert"] = {
            "logits": logits.detach(),
            "gradients": {
                name: value.grad for name, value in model.named_parameters() if value.requires_grad
            },
            "slow": slow_layers(model),
            "experts": model.get_base_model().model.layers[0].mlp.experts.num_experts,
        }

    mixture = MixtureLoraConfig(num_experts=3)
    found["refused"] = [
        refusal(lambda: base_of("llama", folder, FourBitConfig(), **tensor)),
        refusal(lambda: base_of("olmoe", folder, FourBitConfig(), **expert)),
        refusal(lambda: adapt(base_of("olmoe", folder, **expert), ExpertLoraConfig())),
        refusal(lambda: adapt(base_of("llama", folder, **tensor), mixture)),
        refusal(
            lambda: strict_forward(adapt(base_of("olmoe", folder, **expert), CASES["parameters"][2]), ids)
        ),
    ]
    return found


def strict_forward(model, ids):
    with peftfast.enabled(strict=True):
        model(input_ids=ids)


def refusal(attempt):
    with pytest.raises((ValueError, peftfast.FallbackError)) as caught:
        attempt()
    return str(caught.value)


SCENARIOS = {"ddp": ddp, "fsdp": fsdp, "accelerate": accelerate, "parallel": parallel}


def run_scenarios(folder):
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for name, scenario in SCENARIOS.items():
        try:
            result = scenario(folder, rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")
        if isinstance(result, str):
            sys.exit(f"{name}, process {rank}: {result}")
    dist.destroy_process_group()


# ---- the tests ------------------------------------------------------------------------------------------------


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", PROCESSES],
    # "--multi_gpu" stands for several processes, which find no GPU.
    "accelerate launch": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", PROCESSES, "--num_machines", 1),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


def launch(*arguments, by="torchrun", **options):
    command = [sys.executable, "-P", "-m", *map(str, LAUNCHERS[by]), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """By case what training by hand comes to; the checkpoint after two steps is there for two processes."""
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        model = load(case, folder)
        optimizer = optimizer_for(model)
        losses = train_by_hand(model, optimizer, range(2))
        dcp.save(checkpoint_of(model, optimizer), checkpoint_id=folder / f"{case}-of-one", no_dist=True)
        losses = torch.cat([losses, train_by_hand(model, optimizer, range(2, STEPS))])
        found[case] = {"losses": losses, "adapter": adapter_of(model)}
    return found


@pytest.fixture(scope="module")
def two_processes(folder, one_process):
    """By scenario what each process found."""
    done = launch(__file__, folder)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, done.stderr[-8000:]
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(PROCESSES)] for name in SCENARIOS
    }


def assert_same_adapter(found, expected, tolerance=1e-5):
    """Up to the order of sums."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name].float(), expected[name].float(), rtol=1e-3, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_data_parallel(two_processes, folder, case):
    first, second = (results[case] for results in two_processes["ddp"])
    assert first["wrapped"] == "DistributedDataParallel" and first["slow"] == second["slow"] == []
    for name, value in first["adapter"].items():
        assert torch.equal(value, second["adapter"][name]), name
    alone = train_by_trainer(case, folder, 1)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert_same_adapter(first["adapter"], alone["adapter"])


def wiped(case, folder):
    """The model with adapters that a checkpoint has to replace."""
    model = load(case, folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    return model


@pytest.mark.parametrize("case", CASES)
def test_fully_sharded(two_processes, one_process, folder, case):
    alone = one_process[case]
    for results in two_processes["fsdp"]:
        found = results[case]
        assert found["whole parameters"] == found["differing"] == []
        (loss,) = found["slow"]
        assert loss[0].startswith("loss.") and "sharded by FSDP" in loss[1]
        torch.testing.assert_close(found["losses"], alone["losses"], rtol=1e-5, atol=0)
        assert_same_adapter(found["adapter"], alone["adapter"])
        assert_same_adapter(found["resumed"], alone["adapter"])
    model = wiped(case, folder)
    optimizer = optimizer_for(model)
    load_checkpoint(model, optimizer, folder / f"{case}-of-two")
    train_by_hand(model, optimizer, range(2, STEPS))
    assert_same_adapter(adapter_of(model), alone["adapter"])


@pytest.mark.parametrize("case", WITH_PLUGIN)
def test_fully_sharded_by_trainer(two_processes, folder, case):
    alone = train_by_trainer(case, folder, 1)
    for results in two_processes["accelerate"]:
        found = results[case]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        (loss,) = found["slow"]
        assert loss[0].startswith("loss.")
        assert len(found["sharded"]) > 0
    for saved in (f"plugin-{case}", f"plugin-{case}-resumed"):
        assert_same_adapter(load_file(folder / saved / "adapter_model.safetensors"), alone["adapter"])


def test_tensor_parallel(two_processes):
    for results in two_processes["parallel"]:
        found = results["tensor"]
        torch.testing.assert_close(found["ours"], found["stock"], rtol=1e-5, atol=1e-5)  # the norms are fused
        layers = [reason for kind, reason in found["slow"] if not kind.startswith("loss.")]
        assert layers == ["its base weight is a DTensor"] * 4


def test_expert_parallel(two_processes, folder):
    """Frozen experts of each process, and LoRA on the attention beside them."""
    model = adapt(base_of("olmoe", folder), LoraConfig(target_modules=ATTENTION))
    batches = samples()[:BATCH].view(PROCESSES, BATCH // PROCESSES, -1)
    for rank, results in enumerate(two_processes["parallel"]):
        found, logits = results["expert"], model(input_ids=batches[rank]).logits
        assert [kind.partition(".")[0] for kind, _ in found["slow"]] == ["loss"]
        assert found["experts"] == MODELS["olmoe"].num_experts // PROCESSES
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        logits.square().mean().backward()
        gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
        assert found["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_what_is_spread_otherwise_is_refused(two_processes):
    for results in two_processes["parallel"]:
        fourbit, fourbit_experts, experts, mixture, parameters = results["refused"]
        assert "distributed_config (tp_size=2)" in fourbit
        assert "distributed_config (ep_size=2, fsdp_size=2)" in fourbit_experts
        assert experts.startswith("model.layers.0.mlp.experts is spread over processes")
        assert mixture.startswith("model.layers.0.mlp is spread over processes")
        assert parameters.endswith("spread over processes by tensor or expert parallelism.")


@pytest.fixture(scope="module", params=LAUNCHERS)
def trained(folder, request):
    """`peftfast train` by one process and by two with half of its batch each."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = ({"prompt": f"{i:02d}=", "completion": "abcdefgh"[i % 8] * 3} for i in range(20))
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = dict(
        model=str(folder / "model"),
        data=folder / "data.jsonl",
        method="qlora",
        eval_share=0.2,
        epochs=2,
        dtype="fp32",
    )
    train(TrainSettings(**options, micro_batch_size=4, out=folder / "alone", overwrite=True))
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--micro-batch-size", 2, "--out", folder / "both", "--overwrite"]
    both = launch("-m", "peftfast", "train", *words, by=request.param)
    assert both.returncode == 0, both.stderr[-8000:]
    return both


def test_train_command_on_two_processes(trained, folder):
    alone, both = (json.loads((folder / name / RESULT_FILE).read_text()) for name in ("alone", "both"))
    assert both["steps"] == alone["steps"] == 8 and both["tokens"] == alone["tokens"]
    for evaluation in ("before", "after"):
        assert both[evaluation] == pytest.approx(alone[evaluation], rel=1e-4)
    assert dict(both["losses"]) == pytest.approx(dict(alone["losses"]), rel=1e-4)
    adapters = (load_file(folder / name / "adapter_model.safetensors") for name in ("both", "alone"))
    assert_same_adapter(*adapters)
    assert not list(folder.glob(".both*")), "a temporary folder was left"


def test_one_process_prints(trained, folder):
    assert trained.stdout.count("held-out") == 1 and trained.stdout.count("Adapter:") == 1


@pytest.mark.parametrize(
    "rank, world, who",
    [("0", "2", "peftfast: "), ("1", "2", "peftfast, process 1: "), ("1", "1", "peftfast: ")],
)
def test_a_process_says_which_it_is(rank, world, who, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", "none", "--data", "none.jsonl", "--out", "none", "--epochs", "0"])
    assert capsys.readouterr().err.startswith(who)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_weights_are_not_shared(kind, monkeypatch, capsys):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", "none", "--data", "none.jsonl", "--out", "none"])
    assert "shares batches among processes, not weights: launch it without" in capsys.readouterr().err


if __name__ == "__main__":
    run_scenarios(Path(sys.argv[1]))
