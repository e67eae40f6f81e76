"""`peftfast merge`, `info` and `bench`: real runs on tiny models, and every way to be refused."""

import errno
import importlib.util
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peftfast
from peftfast.cli import bench, info, main
from peftfast.cli.errors import UserError
from peftfast.cli.merge import merge
from peftfast.demo.pretrain import build_tokenizer
from peftfast.nn import Linear4bit


def run(*arguments):
    """Run the command line in this process and return its exit code."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code or 0


def refusal(capsys, *arguments):
    """Run a command line that is to be refused, and return its one sentence."""
    code = run(*arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("peftfast: ") and captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of random weights with a byte tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "base"
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    """A LoRA adapter with random factors, which changes the logits for all to see, beside its base."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    folder = base.parent / "adapter"
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).unsqueeze(0) + 20).logits.double()


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


# ---- merge --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_merged_model_is_the_adapter_model(base, adapter, tmp_path, capsys, dtype):
    out = tmp_path / "new" / "merged"
    assert run("merge", adapter, "--out", out, *(["--dtype", dtype] if dtype else [])) == 0
    assert "Merged 14 layers" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["merged"]
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == {None: torch.float32, "bf16": torch.bfloat16}[dtype]
    wanted = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert distance(logits(merged), wanted) < (1e-5 if dtype is None else 0.03)
    assert distance(logits(AutoModelForCausalLM.from_pretrained(base)), wanted) > 0.1
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, out)]
    assert tokenizers[0]("abc").input_ids == tokenizers[1]("abc").input_ids


def test_merging_in_four_bits_reports_the_error_of_rounding(base, adapter, tmp_path, capsys):
    out = tmp_path / "merged"
    assert run("merge", adapter, "--out", out, "--to", "4bit") == 0
    assert "Quantizing anew changed the merged weights by up to" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(out, quantization_config=peftfast.FourBitConfig())
    assert sum(isinstance(layer, Linear4bit) for layer in merged.modules()) == 14
    # Decoded, this model is a base in its own right: an adapter merges into it exactly.
    again = merge(adapter, tmp_path / "again", str(out))
    assert again.difference < 1e-5 < again.adapter_effect
    assert again.requantization_error is None
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert not any(isinstance(layer, Linear4bit) for layer in dense.modules())
    assert getattr(dense.config, "quantization_config", None) is None


def test_an_adapter_of_a_dense_base_is_rounded_once(base, adapter, tmp_path):
    """What the base alone would lose in 4 bits is part of the error that is told."""
    result = merge(adapter, tmp_path / "merged", to="4bit")
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    written = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", quantization_config=peftfast.FourBitConfig()
    )
    tokens = torch.randint(
        exact.get_input_embeddings().weight.shape[0], (1, 16), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        one, other = (model.eval()(input_ids=tokens).logits.double() for model in (written, exact))
    assert result.difference == pytest.approx(distance(one, other), rel=1e-3)
    assert 0.01 < result.requantization_error < 0.2


def test_merging_onto_a_full_disk_says_so(adapter, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        merge(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_written_model_that_is_not_the_adapter_model_is_not_kept(adapter, tmp_path, monkeypatch):
    """As if saving had lost the adapter."""
    kept = AutoModelForCausalLM.from_pretrained

    def forgetful(path, **options):
        return kept(adapter.parent / "base", **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", forgetful)
    with pytest.raises(UserError, match="logits differ by .* nothing was written"):
        merge(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_merge_refuses_what_changes_no_weights(base, adapter, tmp_path, capsys):
    def saved(config):
        folder = tmp_path / type(config).__name__
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
        return folder

    out = tmp_path / "out"
    prefix = saved(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "virtual tokens" in refusal(capsys, "merge", prefix, "--out", out)
    bottleneck = saved(peftfast.BottleneckConfig(bottleneck_size=4))
    assert "activation is not linear" in refusal(capsys, "merge", bottleneck, "--out", out)
    mixture = saved(peftfast.MixtureLoraConfig(num_experts=2, top_k=1))
    assert "depends on the token" in refusal(capsys, "merge", mixture, "--out", out)
    assert not out.exists()


def test_merge_refuses_bad_arguments(base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--to is one of" in refusal(capsys, "merge", adapter, "--out", out, "--to", "8bit")
    assert "--dtype is one of" in refusal(capsys, "merge", adapter, "--out", out, "--dtype", "fp8")
    assert "no adapter_config.json" in refusal(capsys, "merge", base, "--out", out)
    assert "--base nowhere/at/all: there is no such folder" in refusal(
        capsys, "merge", adapter, "--out", out, "--base", "nowhere/at/all"
    )
    assert "exists: choose a new folder" in refusal(capsys, "merge", adapter, "--out", base)
    assert not out.exists()


# ---- info ---------------------------------------------------------------------------------------------------


def test_info_tells_the_machine_the_build_and_the_gpu(capsys, monkeypatch):
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and peftfast.build_info()["isa"] in printed
    facts = info.machine()
    assert facts["machine"]["memory"] > 2**28
    assert facts["build"] == facts["build"] | peftfast.build_info()
    # Whatever a build has to say of itself is shown.
    monkeypatch.setattr(peftfast, "build_info", lambda: {"cuda": ["sm_90"], "weather": "fine"})
    assert info.machine()["build"] == {"cuda": ["sm_90"], "weather": "fine"}
    assert run("info") == 0
    assert "sm_90" in (printed := capsys.readouterr().out) and "fine" in printed
    monkeypatch.setattr(peftfast, "build_info", lambda: {})
    assert "no CUDA part" in info.machine()["build"]["cuda"]


def test_info_of_a_model_is_its_report(base, adapter, capsys):
    assert run("info", "--model", base, "--adapter", adapter, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"]["summary"] == "peftfast: 14 of 14 adapted or 4-bit layers on the fast path"
    assert len(record["model"]["layers"]) == 14
    assert not peftfast.report(AutoModelForCausalLM.from_pretrained(base)).layers  # nothing stays switched on
    assert "--adapter" in refusal(capsys, "info", "--adapter", adapter)
    assert "does not fit" in refusal(capsys, "info", "--model", base, "--adapter", base)


# ---- bench --------------------------------------------------------------------------------------------------

GOOD = """
import json, sys  # parser_of(
assert "--quick" in sys.argv and sys.argv[sys.argv.index("--budget") + 1] == "0.5"
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({record!r}, file)
"""
RECORD = {
    "format": 1,
    "benchmark": "good",
    "command": "python bench_good.py",
    "date": "2026-01-01",
    "machine": {"cpu": "a CPU", "isa": "scalar", "threads": 1, "load": 0.0, "versions": {}},
    "ceilings": {"fp32": {"flops_per_second": 1e9, "by": "guess"}},
    "rows": [
        {
            "point": {"dtype": "fp32"},
            "implementations": {
                "peftfast": {
                    "ours": True, "median_ms": 1.0, "gflops": 1.0, "ceiling_share": 0.5, "bound": "compute",
                    "speedup": {"eager": 4.0}, "saved_bytes": 100,
                },
                "eager": {"ours": False, "median_ms": 4.0, "saved_bytes": 300},
                "broken": {"ours": False, "skipped": "no"},
            },
        }
    ],
    "acceptance": [],
}  # fmt: skip


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """A folder of three benchmarks: one that ends well, one that fails, one that never ends."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "record.py").write_text((bench.FOLDER / "record.py").read_text())
    (folder / "bench_good.py").write_text(GOOD.format(record=RECORD))
    (folder / "bench_bad.py").write_text("raise ValueError('it is broken')")
    (folder / "bench_endless.py").write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(bench, "FOLDER", folder)
    monkeypatch.setattr(bench, "available", lambda available=bench.available: available(folder))
    return folder


def test_bench_lists_what_failed_and_gathers_the_rest(benchmarks, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("bench", "--out", out, "--budget", 0.5, "--time-limit", 0.05) == 1
    printed = capsys.readouterr().out
    assert "good: done" in printed and "bad: failed" in printed and "endless: timed out" in printed
    record = json.loads((out / "bench.json").read_text())
    assert record["machine"]["build"]["isa"] == peftfast.build_info()["isa"]
    found = record["benchmarks"]
    assert {name: it["status"] for name, it in found.items()} == {
        "bad": "failed", "endless": "timed out", "good": "done",
    }  # fmt: skip
    assert found["bad"]["reason"] == "ValueError: it is broken"
    assert found["good"]["record"]["rows"][0]["implementations"]["peftfast"]["speedup"] == {"eager": 4.0}
    assert bench.ratios(found["good"]["record"]) == ({"eager": [4.0]}, {"eager": [3.0]})
    table = (out / "bench.md").read_text()
    assert "## bad: failed" in table and "ValueError: it is broken" in table and "x eager" in table
    pictures = {path.name for path in out.glob("*.png")}
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    assert pictures == ({"speed.png", "memory.png"} if has_matplotlib else set())


WRITES = """
import json, sys{options}
with open(sys.argv[sys.argv.index("--json") + 1], "w") as file:
    json.dump({record!r}, file)
"""


@pytest.mark.parametrize("size", ["--quick", "--full"])
def test_bench_hands_the_device_to_those_that_have_one(benchmarks, tmp_path, monkeypatch, size):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, options in {"good": "  # parser_of(", "7b": '  # add("--device"', "plan": ""}.items():
        (benchmarks / f"bench_{name}.py").write_text(WRITES.format(options=options, record=RECORD))
    out = tmp_path / "out"
    assert run("bench", "--out", out, size, "--device", "cuda", "--only", "good,7b,plan") == 0
    found = json.loads((out / "bench.json").read_text())["benchmarks"]
    told = {name: outcome["command"].split(" --json")[0].split()[2:] for name, outcome in found.items()}
    assert {name: "cuda" in words for name, words in told.items()} == {
        "good": True,
        "7b": True,
        "plan": False,
    }
    assert told["7b"][-3:] == ["--compare", "--device", "cuda"]


def test_the_quick_training_step_is_compared(tmp_path):
    """The real benchmark, as the quick run has it: its record has a rival to draw."""
    pytest.importorskip("bitsandbytes")
    outcomes = bench.run_benchmarks(
        ["7b"], tmp_path / "out", Console(quiet=True), full=False, budget=None, limit=300
    )
    assert outcomes["7b"].status == "done", outcomes["7b"].reason
    assert set(bench.ratios(outcomes["7b"].record)[0]) == {"stock"}


def test_bench_refuses_bad_arguments(benchmarks, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert "there are bad, endless, good" in refusal(capsys, "bench", "--out", out, "--only", "fast")
    assert "--budget is a positive number" in refusal(capsys, "bench", "--out", out, "--budget", -1)
    assert "--device is one of cpu, cuda, not 'gpu'." in refusal(
        capsys, "bench", "--out", out, "--device", "gpu"
    )
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        sentence = refusal(capsys, "bench", "--out", out, "--device", "cuda")
        assert "--device cuda: torch sees no CUDA device here." in sentence
    assert "exists: choose a new folder" in refusal(capsys, "bench", "--out", benchmarks)
    with pytest.raises(UserError, match="part of peftfast's source"):
        bench.available.__defaults__[0](tmp_path / "nowhere")
    assert not out.exists()
