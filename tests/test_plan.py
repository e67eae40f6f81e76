"""`peftfast plan`: its parts against real training steps and against arithmetic, and what it says fits."""

import contextlib
import json
import math
import re
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OlmoeConfig

import peftfast
from peftfast.cli import dry_run, main, methods
from peftfast.cli.errors import UserError
from peftfast.cli.model import load_config
from peftfast.cli.plan import GPUS, PlanSettings, plan
from peftfast.cli.plan import _Run as Run
from peftfast.integrations import offload
from peftfast.nn import quantize_linears
from peftfast.ops import loss
from peftfast.testing import bytes_saved_for_backward

HIDDEN, INNER, LAYERS, VOCABULARY = 64, 96, 5, 200


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The configuration of a Llama of five layers, without weights, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "olmoe"
    OlmoeConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, eos_token_id=1,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def linear_layers():
    """(in, out) of the linear layers of one decoder layer; keys and values have half the heads."""
    attention = [(HIDDEN, HIDDEN), (HIDDEN, HIDDEN // 2), (HIDDEN, HIDDEN // 2), (HIDDEN, HIDDEN)]
    return [*attention, (HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]


def real_model(settings):
    """The same model with weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(settings.model)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.dtype]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if settings.method == "qlora":
        quantize_linears(model)
        if methods.experts_of(model):
            peftfast.integrations.experts.quantize_experts(model)
    if methods.experts_of(model):
        model.set_experts_implementation("peftfast")
    if settings.checkpointing:
        model.activation_checkpointing_enable()
    return methods.adapt(model, settings.to_train(), ()).model.train()


class Counter(TorchDispatchMode):
    """The bytes of all tensors that are allocated while it is on, at the moment when they are most; without those that
    come while `elsewhere` is true."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most, self.elsewhere = set(), 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs)):  # what was there before, and what this made of it
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage()._cdata)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                size = 0 if self.elsewhere else storage.nbytes()
                self.known.add(storage._cdata)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, size)
        return out

    def gone(self, address, size):
        self.known.discard(address)
        self.now -= size


@contextlib.contextmanager
def on_the_fast_path(model):
    with peftfast.enabled():
        yield
        assert all(layer.fast for layer in peftfast.report(model).layers)


def real_step(settings):
    """What the tensors of a real training step take when that is most, in bytes."""
    model = real_model(settings)
    tokens = torch.zeros(settings.micro_batch_size, settings.sequence_len, dtype=torch.int64)
    with on_the_fast_path(model), Counter() as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return counter.most


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora", "mixture"])
def test_a_step_without_data_allocates_what_a_real_one_does(llama, method, checkpointing):
    settings = PlanSettings(
        llama, method, dtype="fp32", micro_batch_size=2, sequence_len=128, checkpointing=checkpointing
    )
    memory = plan(settings).memory
    step = memory.gradients + memory.activations + memory.logits + memory.workspace
    assert step == pytest.approx(real_step(settings), rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_offloaded_activations_are_counted_while_they_are_on_the_device(
    llama, method, checkpointing, monkeypatch
):
    monkeypatch.setattr(offload, "SMALLEST", 2**14)
    settings = PlanSettings(
        llama, method, dtype="fp32", micro_batch_size=2, sequence_len=512, checkpointing=checkpointing
    )
    without = plan(settings).memory
    memory = plan(replace(settings, activation_offloading=True)).memory
    step = memory.gradients + memory.activations + memory.logits + memory.workspace
    model, largest = real_model(settings), 0
    tokens = torch.zeros(2, 512, dtype=torch.int64)

    class Elsewhere(offload.offload_activations):
        def _pack(self, tensor):
            nonlocal largest
            counter.elsewhere = True  # the copies
            kept = super()._pack(tensor)
            counter.elsewhere = False
            largest = max(largest, 0 if kept is tensor else tensor.nbytes)
            return kept

    with on_the_fast_path(model), Counter() as counter:
        with Elsewhere(model, device="cpu"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    assert memory.activations < 0.8 * without.activations
    assert counter.most <= step <= counter.most + offload.AHEAD * largest


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_step_over_experts_allocates_what_a_real_one_does(olmoe, method):
    # Long enough for the step, and not the optimizer, to take most.
    settings = PlanSettings(olmoe, method, dtype="fp32", sequence_len=512, checkpointing=False)
    memory = plan(settings).memory
    step = memory.gradients + memory.activations + memory.logits + memory.workspace
    assert step == pytest.approx(real_step(settings), rel=0.01)


def test_activations_are_what_autograd_keeps(llama):
    settings = PlanSettings(llama, dtype="fp32", sequence_len=256, checkpointing=False)
    model = real_model(settings)
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    with on_the_fast_path(model):
        kept = bytes_saved_for_backward(
            lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, model.parameters()
        )
    assert plan(settings).memory.activations == pytest.approx(kept, rel=0.02)


def test_weights_are_counted_to_the_byte(llama):
    rank, memory = 8, plan(PlanSettings(llama, "qlora", lora_r=8, sequence_len=64)).memory

    def fourbit(count):
        """Two codes to a byte; a byte of scale to 64; of these a float to 256; 256 floats of code, and an offset."""
        blocks = math.ceil(count / 64)
        return count // 2 + blocks + 4 * math.ceil(blocks / 256) + 4 * 256 + 4

    shapes = linear_layers()
    assert memory.weights["nf4"] == LAYERS * sum(fourbit(inputs * outputs) for inputs, outputs in shapes)
    assert memory.weights["bfloat16"] == 2 * (2 * LAYERS + 1) * HIDDEN  # norms
    assert memory.embeddings == 2 * 2 * VOCABULARY * HIDDEN
    assert memory.adapters == 4 * LAYERS * rank * sum(inputs + outputs for inputs, outputs in shapes)
    assert memory.optimizer == 2 * memory.adapters
    dense = plan(PlanSettings(llama, lora_r=8, sequence_len=64)).memory
    linear = sum(inputs * outputs for inputs, outputs in shapes)
    assert dense.weights["bfloat16"] == memory.weights["bfloat16"] + 2 * LAYERS * linear


def test_tied_embeddings_count_once(tmp_path):
    config = dict(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=128)
    GPT2Config(**config, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path)
    found = plan(PlanSettings(str(tmp_path), sequence_len=64))
    assert found.memory.embeddings == 2 * VOCABULARY * HIDDEN


@pytest.mark.parametrize("offloading", [False, True])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_one_layer_stands_for_all_that_are_alike(llama, monkeypatch, checkpointing, offloading):
    settings = PlanSettings(
        llama, sequence_len=512, checkpointing=checkpointing, activation_offloading=offloading
    )
    short = plan(settings).memory
    monkeypatch.setattr(dry_run, "_leave_out_repeated_layers", lambda model: 1)
    assert plan(settings).memory == short


@pytest.mark.parametrize("checkpointing", [True, False])
def test_mlps_in_tiles_leave_room(tmp_path, checkpointing):
    """Of 12 kB for a token in a layer's MLP, gate and up among them, there is a tile."""
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32768,
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = PlanSettings(str(tmp_path), sequence_len=32768, checkpointing=checkpointing)
    whole, tiled = (plan(replace(settings, tiled_mlp=on)).memory for on in (False, True))
    assert whole.total - tiled.total > (1 if checkpointing else 2) * 20_000 * 12_000
    short = replace(settings, sequence_len=4096)
    assert plan(replace(short, tiled_mlp=True)).memory == plan(short).memory


def test_accumulated_gradients_are_there_throughout(llama):
    once = PlanSettings(llama, sequence_len=512, checkpointing=False)
    memory = plan(replace(once, gradient_accumulation_steps=4)).memory
    assert memory.gradients == memory.adapters
    assert plan(once).memory.gradients < memory.gradients


@pytest.mark.parametrize("gpu, chunk", [(None, loss.CHUNK_BYTES_CPU), ("80GB", loss.CHUNK_BYTES)])
def test_logits_are_those_of_the_device_that_is_planned(tmp_path, gpu, chunk):
    vocabulary, tokens = 100_000, 2048
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)  # fmt: skip
    found = plan(PlanSettings(str(tmp_path), sequence_len=tokens), gpu).memory.logits
    assert chunk - 2 * vocabulary <= found - 2 * tokens * HIDDEN <= 1.02 * chunk


@pytest.mark.parametrize(
    "dtype, tokens, inner, decoded",
    [("bf16", 512, 4096, True), ("bf16", 496, 4096, False), ("fp32", 512, 4096, False), ("bf16", 496, 4104, True)],
    ids=["many rows", "few rows", "fp32", "rows of no whole blocks"],
)  # fmt: skip
def test_a_gpu_decodes_weights_for_many_rows(tmp_path, dtype, tokens, inner, decoded):
    """As csrc/cuda/linear.cu does; most memory is then taken while the largest weight is decoded."""
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=4
    ).save_pretrained(tmp_path)  # fmt: skip
    settings = PlanSettings(str(tmp_path), "qlora", dtype=dtype, sequence_len=tokens, target_modules="q_proj")
    step = Run(load_config(settings.model), settings).dry_run.step
    cpu, gpu = (sum(step(1, tokens, checkpointing=True, on_gpu=on).values()) for on in (False, True))
    size = 2 * 2048 * inner if decoded else 0
    assert 0.7 * size <= gpu - cpu <= size


# ---- what fits ----------------------------------------------------------------------------------------------


def megabytes(size):
    return f"{size / 1e6:.6f}MB"


@pytest.mark.parametrize("checkpointing", [True, False])
def test_longest_sequence_fits_and_the_next_does_not(llama, checkpointing):
    settings = PlanSettings(llama, checkpointing=checkpointing)
    model = Run(load_config(llama), settings)

    def total(length):
        return model.memory(settings, length, on_gpu=True).total

    assert model.longest(settings, total(700), 2048) == 688  # of 16s, the last that is not above 700
    assert total(688) <= total(700) < total(704)
    assert model.longest(settings, 1000, 2048) == 0


def test_all_that_the_model_takes_is_the_longest(llama):
    found = plan(PlanSettings(llama, sequence_len=64), "rtx-3060")
    assert {way.longest for way in found.choices} == {2048}
    assert found.capacity == GPUS["rtx-3060"] * 10**9 - 10**9


def test_cheapest_gives_up_as_little_as_it_must(llama):
    settings = PlanSettings(llama, "lora", micro_batch_size=2, sequence_len=512, checkpointing=False)
    changes = {
        "method": "qlora",
        "checkpointing": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    shorter = changes | {"sequence_len": 256}
    capacity = plan(replace(settings, **shorter)).memory.total
    found = plan(settings, megabytes(capacity + 10**6), "1MB")
    assert found.cheapest.changes == shorter
    assert found.cheapest.fits and not any(way.fits for way in found.choices)
    assert plan(settings, "1.001MB", "1MB").cheapest is None


# ---- command line ------------------------------------------------------------------------------------------


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def test_command_prints_a_table_and_json(llama, capsys):
    assert run("plan", llama, "--method", "qlora", "--sequence_len", 64, "--gpu", "8GB") == 0
    printed = capsys.readouterr().out
    # Checkpointing, which is the default, takes time that is spared where all fits without.
    assert "weights, nf4" in printed and "Cheapest that fits: --no-checkpointing, " in printed
    # The file itself will do, and weights are nowhere to be found.
    assert run("plan", f"{llama}/config.json", "--sequence-len", 64, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    memory = record["memory"]
    assert memory["total"] == sum(memory.pop("weights").values()) + sum(memory.values()) - memory["total"]
    assert record["settings"]["sequence_len"] == 64
    assert [way["changes"] for way in record["choices"]] == [{"checkpointing": False}, {}]


@pytest.mark.parametrize("takes, planned", [(512, 512), (1024, 1024), (2048, 1024)])
def test_sequence_is_by_default_one_that_the_model_takes(tmp_path, takes, planned):
    LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=takes,
    ).save_pretrained(tmp_path)  # fmt: skip
    found = plan(PlanSettings(str(tmp_path)))
    assert found.settings.sequence_len == planned
    assert found.memory == plan(PlanSettings(str(tmp_path), sequence_len=planned)).memory


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--method", "magic"], "--method is one of"),
        (["--lora-r", 0], "--lora-r is at least 1"),
        (["--gpu", "rtx-1"], "--gpu rtx-1: expected a size such as 8GB, or one of t4"),
        (["--gpu", "1GB", "--reserve", "2GB"], "--gpu 1GB: nothing is left of it after --reserve 2GB"),
        (["--reserve", "much", "--gpu", "t4"], "--reserve much: expected a size such as 8GB."),
        (["--sequence-len", 4096], "the model takes 2048 tokens at most"),
        (["--target-modules", "nothing"], "--target-modules nothing"),
        (["--experts", "all"], "the model has no experts"),
    ],
)
def test_refusals_are_one_sentence(llama, capsys, arguments, sentence):
    assert run("plan", llama, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert sentence in captured.err


def test_a_model_in_four_bits_cannot_be_planned_dense(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=2, quantization_config=peftfast.FourBitConfig(blocksize=128).to_dict(),
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes --method qlora"):
        plan(PlanSettings(str(tmp_path), "lora"))
    found = plan(PlanSettings(str(tmp_path), "qlora", sequence_len=64), "8GB")
    assert [way.changes for way in found.choices] == [{"checkpointing": False}, {}]
    twice = plan(PlanSettings(str(tmp_path), "qlora", sequence_len=64)).memory.weights["nf4"]
    assert twice == found.memory.weights["nf4"]


@pytest.mark.parametrize(
    "changed, sentence",
    [
        ({"vocab_size": 0}, "the model cannot be built: model.embed_tokens.weight has no elements"),
        ({"hidden_size": 0}, "the model cannot be built: model.embed_tokens.weight has no elements"),
        ({"head_dim": 3}, "the model cannot run a training step: "),
    ],
)
def test_a_configuration_that_cannot_train_is_refused(llama, tmp_path, changed, sentence):
    config = json.loads(Path(llama, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(PlanSettings(str(tmp_path), sequence_len=64))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        plan(PlanSettings(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="its config.json cannot be read"):
        plan(PlanSettings(str(tmp_path)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["4bit", "8bit"])
def test_quantized_embeddings_are_planned(tmp_path, embeddings, tied):
    LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=4, tie_word_embeddings=tied,
    ).save_pretrained(tmp_path)  # fmt: skip
    dense = PlanSettings(str(tmp_path), "qlora", dtype="fp32", sequence_len=64)
    found = plan(replace(dense, embeddings=embeddings))
    model = real_model(dense)
    peftfast.nn.quantize_embeddings(model.get_base_model(), embeddings)
    held = model.get_base_model().get_input_embeddings().quantized_weight.nbytes
    assert found.memory.embeddings == (1 if tied else 2) * held
    assert found.parameters == plan(dense).parameters
    assert found.memory.total < plan(dense).memory.total


def test_options_of_four_bits_are_not_those_of_the_dense_way(llama):
    found = plan(
        PlanSettings(llama, "qlora", quant_type="fp4", embeddings="8bit", sequence_len=64), gpu="8GB"
    )
    assert {way.changes.get("method", "qlora") for way in found.choices} == {"qlora", "lora"}


# ---- against what was measured -----------------------------------------------------------------------------


@pytest.fixture
def bench_plan(monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_plan

    return bench_plan


@pytest.mark.parametrize("gpu", [None, "a card"])
def test_the_benchmark_reads_records_of_training_steps(bench_plan, tmp_path, gpu):
    import bench_7b

    point = bench_7b.Point("tiny", 5, "bf16", 1024, False, True, rank=8)
    peaks = {"ours": True, "peak_rss": 25 * 10**6, "bytes_before_build": 5 * 10**6}
    rows = [
        {"point": asdict(point), "implementations": {"peftfast": peaks}},
        {"point": asdict(replace(point, dtype="fp16")), "implementations": {"peftfast": peaks}},
        {"point": asdict(point), "implementations": {"peftfast": {"ours": True}, "stock": {"ours": False}}},
    ]
    machine = bench_7b.machine_facts("cpu") | ({"gpu": gpu} if gpu else {})
    bench_7b.Record("7b", machine, {}, rows).save(tmp_path / "7b.json")
    [row] = bench_plan.recorded_rows(tmp_path / "7b.json")
    bench_7b.CONFIGS["tiny"](num_hidden_layers=5).save_pretrained(tmp_path / "tiny")
    settings = PlanSettings(str(tmp_path / "tiny"), "qlora", sequence_len=1024, lora_r=8)
    assert row["planned_bytes"] == plan(settings, gpu and "1000GB").memory.total
    assert row["measured_bytes"] == 20 * 10**6
    assert row["error"] == row["planned_bytes"] / row["measured_bytes"] - 1
    bench_7b.Record("7b", machine, {}, rows[1:]).save(tmp_path / "none.json")
    with pytest.raises(ValueError, match="none.json: no row tells the memory"):
        bench_plan.recorded_rows(tmp_path / "none.json")


def test_the_benchmark_trains_by_command_what_it_plans(bench_plan, monkeypatch):
    point, seen = bench_plan.Point("tiny", "qlora", "bf16", True, 48, 2, 4, "q_proj"), []

    def in_this_process(*arguments, default_malloc):
        assert arguments[:2] == ("-m", "peftfast") and run(*arguments[2:]) == 0
        record = Path(arguments[arguments.index("--json") + 1])
        result = json.loads(record.read_text())
        seen.append((result["settings"], result["tokens"]))
        record.write_text(json.dumps(result | {"peak_memory_mib": 100.0 * len(seen)}))

    monkeypatch.setattr(bench_plan, "_run", in_this_process)
    assert (
        bench_plan.measure_command(point) == -100 * 2**20
    )  # the tiny one, which comes second, is subtracted
    (settings, tokens), (tiny, few) = seen
    same = ("method", "dtype", "lora_r", "target_modules", "sequence_len", "micro_batch_size")
    assert {name: settings[name] for name in same} == {name: getattr(point, name) for name in same}
    assert settings["gradient_checkpointing"] and (tiny["sequence_len"], tiny["micro_batch_size"]) == (32, 1)
    assert (tokens, few) == (3 * 2 * 48, 3 * 32)  # three steps of full sequences
