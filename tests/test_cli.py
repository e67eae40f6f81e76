"""`peftfast train`: real runs on a tiny random Llama, and every way to be refused."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import bitsandbytes_misreads
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peftfast import ExpertProfile, FourBitConfig, report
from peftfast.cli import data, main
from peftfast.cli.answer import answer
from peftfast.cli.errors import UserError
from peftfast.cli.load import describe, expert_load
from peftfast.cli.records import read_records
from peftfast.cli.settings import LEARNING_RATES, TrainSettings
from peftfast.cli.train import ANSWERS_FILE, PROFILE_FILE, RESULT_FILE, train
from peftfast.demo.pretrain import build_tokenizer
from peftfast.nn import Linear4bit

PAIRS = [{"prompt": f"{word}=", "completion": word.upper()} for word in ("ab", "cd", "ef", "gh", "ij", "kl")]
CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    """A Llama of random weights with a byte tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


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
    assert captured.err.startswith("peftfast: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_train_writes_an_adapter_that_plain_peft_loads(model_folder, pairs, tmp_path, capsys, dtype):
    out, record_file = tmp_path / "new" / "out", tmp_path / "record.json"
    code = run(
        *("train", "--model", model_folder, "--data", pairs, "--out", out, "--json", record_file),
        *("--backend", "peft", "--lora_r", 4, "--max-steps", 3, "--learning-rate", 1e-2, "--dtype", dtype),
        *("--eval-file", pairs),
    )
    assert code == 0
    assert "exact match" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    record = json.loads(record_file.read_text())
    assert record == json.loads((out / RESULT_FILE).read_text())
    assert record["settings"]["lora_r"] == 4
    assert record["steps"] == 3
    # Every example is prompt "xy=", completion "XY" and the end: 6 tokens, and a step takes all 6 examples.
    assert record["tokens"] == 3 * 6 * 6
    # Per layer, r times the inputs plus outputs of q, k, v, o (32 and 32) and of gate, up, down (32 and 64).
    assert record["trainable_parameters"] == 2 * 4 * (4 * 64 + 3 * 96)
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["peak_memory_mib"] > 50
    assert len(record["losses"]) == 3

    base = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype={"fp32": torch.float32}.get(dtype, "bfloat16")
    )
    model = PeftModel.from_pretrained(base, out)
    lines = [json.loads(line) for line in (out / ANSWERS_FILE).read_text().splitlines()]
    answers = answer(
        model, AutoTokenizer.from_pretrained(out), [line["prompt"] for line in lines], max_new_tokens=3
    )
    assert answers == [line["answer"] for line in lines]
    exact = [line["answer"] == line["completion"] for line in lines]
    assert record["after"]["exact_match"] == sum(exact) / len(exact)


def test_lora_learns_the_pairs(model_folder, pairs, tmp_path):
    """A random model can at least learn six answers by heart, if all from data to exact match works."""
    settings = TrainSettings(
        model=str(model_folder),
        data=pairs,
        eval_file=pairs,
        out=tmp_path / "out",
        backend="peft",
        max_steps=150,
        learning_rate=2e-2,
    )
    result = train(settings)
    assert result.before.exact_match == 0
    assert result.after.exact_match == 1
    assert result.after.loss < result.before.loss


def test_both_backends_train_alike(model_folder, pairs, tmp_path):
    losses = {}
    for backend in ("peft", "peftfast"):
        settings = TrainSettings(
            model=str(model_folder), data=pairs, out=tmp_path / backend, backend=backend, max_steps=5
        )
        losses[backend] = torch.tensor(train(settings).losses)
    torch.testing.assert_close(losses["peft"], losses["peftfast"], rtol=1e-4, atol=1e-4)


def qlora(model_folder, pairs, out, **options):
    options = dict(method="qlora", max_steps=3, learning_rate=1e-2, eval_file=pairs) | options
    return train(TrainSettings(model=str(model_folder), data=pairs, out=out, **options))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_trains_a_plain_adapter_over_4_bit_layers(model_folder, pairs, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    code = run(
        *("train", "--method", "qlora", "--model", model_folder, "--data", pairs, "--eval-file", pairs),
        *("--out", out, "--max-steps", 3, "--learning-rate", 1e-2),
        *("--dtype", {"float32": "fp32", "bfloat16": "bf16"}[dtype]),
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert code == 0
    assert "linear layers in nf4, a scale to 64 weights, double-quantized, computed in" in shown
    assert "peftfast: 14 of 14 adapted or 4-bit layers on the fast path" in shown

    record = json.loads((out / RESULT_FILE).read_text())
    assert record["quantization"] == dict(quant_type="nf4", blocksize=64, nested=True, compute_dtype=dtype)
    assert record["after"]["loss"] < record["before"]["loss"]
    # Embeddings and head stay dense, in 4 or 2 bytes; two layers of q, k, v, o, gate, up and down are in 4 bits.
    linear, dense = 2 * (4 * 32 * 32 + 3 * 32 * 64), 2 * 258 * 32 + 5 * 32
    assert record["parameters"] == linear + dense
    assert record["base_bytes"] > linear / 2 + dense * getattr(torch, dtype).itemsize
    # The rest: scales in 8 bits, and for each layer their own scales and a table of 256 values.
    assert (
        record["base_bytes"] - linear / 2 - dense * getattr(torch, dtype).itemsize < linear / 64 + 14 * 1050
    )

    weights = load_file(out / "adapter_model.safetensors")
    assert len(weights) == 2 * 14
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in weights)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"

    base = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=getattr(torch, dtype), quantization_config=FourBitConfig()
    )
    assert sum(isinstance(layer, Linear4bit) for layer in base.modules()) == 14
    model = PeftModel.from_pretrained(base, out)
    assert not any(layer.fast for layer in report(model))
    lines = [json.loads(line) for line in (out / ANSWERS_FILE).read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    answers = answer(model, AutoTokenizer.from_pretrained(out), prompts, max_new_tokens=3)
    if dtype == "float32":  # in bf16 the rounding of PEFT's path may turn a close choice
        assert answers == [line["answer"] for line in lines]


def test_plain_peft_over_bitsandbytes_is_the_same_model(model_folder, pairs, tmp_path):
    pytest.importorskip("bitsandbytes")
    if bitsandbytes_misreads(inputs=32):
        pytest.skip("bitsandbytes 0.50.2 misreads blocks that straddle rows on CPUs with AVX-512")
    qlora(model_folder, pairs, tmp_path / "out")
    ids = torch.arange(10)[None]
    logits = []
    for config in (
        FourBitConfig(),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ):
        base = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, quantization_config=config
        )
        # In eval mode, bitsandbytes computes in bfloat16 on some CPUs.
        model = PeftModel.from_pretrained(base, tmp_path / "out").train()
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_quantization_is_what_the_options_say(model_folder, pairs, tmp_path):
    options = dict(quant_type="fp4", blocksize=32, double_quant=False)
    result = qlora(model_folder, pairs, tmp_path / "out", **options)
    assert result.quantization == dict(quant_type="fp4", blocksize=32, nested=False, compute_dtype="float32")
    default = qlora(model_folder, pairs, tmp_path / "default")
    assert result.base_bytes != default.base_bytes
    assert result.before != default.before


def test_both_backends_train_qlora_alike(model_folder, pairs, tmp_path):
    fast = qlora(model_folder, pairs, tmp_path / "fast")
    eager = qlora(model_folder, pairs, tmp_path / "eager", backend="peft")
    assert "14 of 14" in fast.report
    assert eager.report == ""
    torch.testing.assert_close(torch.tensor(fast.losses), torch.tensor(eager.losses), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def model_folder_in_4_bits(model_folder, tokenizer, tmp_path_factory):
    """The model in a checkpoint that bitsandbytes reads too, in fp4 and blocks of 128."""
    folder = tmp_path_factory.mktemp("model-in-4-bits")
    config = FourBitConfig(quant_type="fp4", blocksize=128, nested=False)
    AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_qlora_trains_a_model_that_is_in_4_bits_already(model_folder_in_4_bits, pairs, tmp_path):
    result = qlora(model_folder_in_4_bits, pairs, tmp_path / "out", dtype="bf16", blocksize=128)
    assert result.quantization == dict(
        quant_type="fp4", blocksize=128, nested=False, compute_dtype="bfloat16"
    )
    assert "14 of 14" in result.report
    assert result.after.loss < result.before.loss


def test_qlora_trains_a_checkpoint_of_bitsandbytes(model_folder, tokenizer, pairs, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(model_folder, quantization_config=config).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    result = qlora(tmp_path / "model", pairs, tmp_path / "out", dtype="bf16")
    assert result.quantization == dict(quant_type="nf4", blocksize=64, nested=False, compute_dtype="bfloat16")
    assert "14 of 14" in result.report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lora"), "its weights are in 4 bits, which takes --method qlora."),
        (("--quant-type", "nf4"), "--quant-type asks for nf4, but the model is in 4 bits already"),
        (("--blocksize", 64), "--blocksize asks for 64, but the model is in 4 bits already"),
        (("--double-quant",), "--double-quant asks for True, but the model is in 4 bits already"),
    ],
)
def test_a_model_in_4_bits_stays_as_it_is(model_folder_in_4_bits, pairs, tmp_path, capsys, options, message):
    method = () if "--method" in options else ("--method", "qlora")
    error = refusal(
        capsys,
        *("train", "--model", model_folder_in_4_bits, "--data", pairs, "--out", tmp_path / "out"),
        *(*method, *options),
    )
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quant-type", "nf4"), "--quant-type goes with --method qlora, not with --method lora."),
        (("--blocksize", 64), "--blocksize goes with --method qlora"),
        (("--double-quant",), "--double-quant goes with --method qlora"),
        (("--no-double-quant",), "--double-quant goes with --method qlora"),
        (("--method", "qlora", "--quant-type", "int4"), "--quant-type is one of nf4, fp4, not 'int4'."),
        (("--method", "qlora", "--blocksize", 48), "--blocksize is one of 32, 64, 128"),
        (("--method", "qlora", "--blocksize", "big"), "--blocksize"),
        (("--method", "qlora", "--dtype", "nf4"), "--dtype is one of fp32, bf16, not 'nf4'"),
    ],
)
def test_bad_quantization_is_refused(model_folder, pairs, tmp_path, capsys, options, message):
    arguments = ("--model", model_folder, "--data", pairs, "--out", tmp_path / "out", *options)
    assert message in refusal(capsys, "train", *arguments)


def test_weights_that_cannot_be_quantized_are_named(model_folder, tokenizer, pairs, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(model_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    error = refusal(
        capsys,
        *("train", "--method", "qlora", "--model", tmp_path / "model", "--data", pairs),
        *("--out", tmp_path / "out"),
    )
    assert "model.layers.1.mlp.up_proj.weight holds values that are not finite" in error
    assert not (tmp_path / "out").exists()


def test_qlora_needs_no_bitsandbytes(model_folder, pairs, tmp_path):
    """In a process of its own, where bitsandbytes cannot be found."""
    code = "import sys; sys.modules['bitsandbytes'] = None\nfrom peftfast.cli import main; main(sys.argv[1:])"
    arguments = ("train", "--method", "qlora", "--model", model_folder, "--data", pairs, "--max-steps", 2)
    arguments += ("--out", tmp_path / "out", "--eval-share", 0)
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "14 of 14" in ran.stdout


def test_text_is_cut_into_blocks(model_folder, tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("Half a league, half a league, half a league onward.\n" * 4, encoding="utf-8")
    examples = data.encode(read_records(path), tokenizer, 32)
    assert tokenizer.decode([token for example in examples for token in example.input_ids]) == (
        path.read_text() + tokenizer.eos_token
    )
    assert all(len(example.input_ids) == 32 for example in examples[:-1])
    result = train(
        TrainSettings(
            model=str(model_folder),
            data=path,
            out=tmp_path / "out",
            backend="peft",
            sequence_len=32,
            max_steps=2,
            eval_share=0.3,
        )
    )
    assert result.examples + result.held_out_examples == len(examples) == 7
    assert result.held_out_examples == 2
    assert result.after.exact_match is None
    assert not (tmp_path / "out" / ANSWERS_FILE).exists()


def learned_text(example, tokenizer):
    assert len(example.labels) == len(example.input_ids)
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, data.IGNORED)
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


def test_loss_is_on_the_completion_alone(tokenizer):
    [example] = data.encode([{"prompt": "two and two: ", "completion": "four"}], tokenizer, 64)
    assert tokenizer.decode(example.input_ids) == "two and two: four" + tokenizer.eos_token
    assert learned_text(example, tokenizer) == "four" + tokenizer.eos_token


def test_loss_is_on_what_the_assistant_says(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    turns = [
        ("system", "Be brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
        ("user", "3+3?"),
        ("assistant", "6"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    [example] = data.encode([{"messages": messages}], tokenizer, 256)
    assert tokenizer.decode(example.input_ids) == "".join(f"[{role}]{content}\n" for role, content in turns)
    assert learned_text(example, tokenizer) == "4\n6\n"


def test_a_prompt_that_fills_the_sequence_is_left_out(tokenizer):
    long, short = {"prompt": "x" * 40, "completion": "y"}, {"prompt": "x", "completion": "y"}
    assert [example.prompt for example in data.encode([long, short], tokenizer, 16)] == ["x"]
    with pytest.raises(UserError, match="--sequence-len 16"):
        data.encode([long], tokenizer, 16)


def test_split_is_disjoint_and_seeded():
    examples = [data.Example([number], [number]) for number in range(20)]
    training, held_out = data.split(examples, 0.2, seed=1, at_most=9)
    assert len(held_out) == 4
    assert sorted(example.input_ids[0] for example in training + held_out) == list(range(20))
    assert data.split(examples, 0.2, seed=1, at_most=9) == (training, held_out)
    assert data.split(examples, 0.2, seed=2, at_most=9) != (training, held_out)
    assert data.split(examples, 0, seed=1, at_most=9) == (examples, [])
    assert len(data.split(examples, 0.9, seed=1, at_most=9)[1]) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
        (b'{"prompt": "a", "completion": "b"}\n\n[1]\n', "line 3: a line is a JSON object, not list"),
        (
            b'{"query": "a", "reply": "b"}\n',
            'line 1: the keys are "query", "reply"; wanted is one of {"prompt"',
        ),
        (b'{"prompt": "a"}\n', 'line 1: the keys are "prompt"'),
        (b"{}\n", "line 1: the keys are none"),
        (b'{"prompt": "a", "completion": 3}\n', 'line 1: "completion" is a string, not int'),
        (b'{"prompt": "a", "completion": ""}\n', 'line 1: "completion" is empty'),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "lines of one kind"),
        (b'{"text": "\\ud83d"}\n', "line 1: a \\ud escape is without its other half"),
        (b'{"messages": "hello"}\n', '"messages" is a list'),
        (b'{"messages": [{"role": "user"}]}\n', 'a "role" and a "content"'),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n', 'no message has the role "assistant"'),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}\n', "no chat template"),
        (b'{"text": "a"}\n', "one example cannot be split"),
        (b"\n\n", "is empty"),
        (b"", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_data_is_refused(model_folder, tmp_path, capsys, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    error = refusal(capsys, "train", "--model", model_folder, "--data", path, "--out", tmp_path / "out")
    assert message in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--method", "magic", "--method is one of lora, qlora, mixture, bottleneck, prefix, prompt"),
        ("--backend", "jax", "--backend is one of peftfast, peft, not 'jax'"),
        ("--dtype", "int3", "--dtype is one of fp32, bf16, not 'int3'"),
        ("--experts", "some", "--experts is all, none, or profile: and a share in (0, 1]"),
        ("--experts", "profile:0", "--experts is all, none, or profile: and a share in (0, 1]"),
        ("--experts", "profile:1.5", "--experts is all, none, or profile: and a share in (0, 1]"),
        ("--experts", "profile:nan", "--experts is all, none, or profile: and a share in (0, 1]"),
        ("--experts", "0.5", "--experts is all, none, or profile: and a share in (0, 1]"),
        ("--experts", "all", "--experts all: the model has no experts that transformers dispatches."),
        (
            "--experts",
            "profile:0.5",
            "PEFT has no such adapters: --experts profile:0.5 goes with --backend peftfast",
        ),
        ("--method", "mixture", "PEFT has no such adapters: --method mixture goes with --backend peftfast"),
        ("--router", "on", "--router is one of freeze, train, not 'on'"),
        ("--router", "train", "--router train: a LlamaForCausalLM has no routers"),
        ("--router-aux-loss-coef", "-1", "--router-aux-loss-coef is a number of at least 0, not -1.0"),
        (
            "--router-aux-loss-coef",
            "0.1",
            "--router-aux-loss-coef: a LlamaForCausalLM of transformers computes no",
        ),
        ("--mixture-experts", "4", "--mixture-experts goes with --method mixture, not with --method lora"),
        ("--mixture-top-k", "4", "--mixture-top-k goes with --method mixture, not with --method lora"),
        ("--objective", "sing", "--objective is one of fine-tune, pretrain, not 'sing'"),
        (
            "--objective",
            "pretrain",
            'pairs.jsonl: --objective pretrain takes .txt files and lines with "text", not',
        ),
        ("--embedding-learning-rate", "1e-5", "--embedding-learning-rate goes with --objective pretrain."),
        (
            "--method",
            "bottleneck",
            "PEFT has no such adapters: --method bottleneck goes with --backend peftfast",
        ),
        ("--bottleneck-size", "8", "--bottleneck-size goes with --method bottleneck, not with --method lora"),
        (
            "--num-virtual-tokens",
            "8",
            "--num-virtual-tokens goes with --method prefix, prompt or p-tuning, not",
        ),
        ("--prompt-init-text", "Hi", "--prompt-init-text goes with --method prompt, not with --method lora"),
        ("--encoder-hidden-size", "8", "--encoder-hidden-size goes with --method prefix or p-tuning, not"),
        ("--lora-r", "0", "--lora-r is at least 1, not 0"),
        ("--lora-r", "many", "--lora-r"),
        ("--lora-alpha", "-1", "--lora-alpha is a positive number"),
        ("--lora-dropout", "1", "--lora-dropout lies in [0, 1)"),
        ("--learning-rate", "nan", "--learning-rate is a positive number, not nan"),
        ("--epochs", "0", "--epochs is a positive number"),
        ("--max-steps", "0", "--max-steps is at least 1"),
        ("--micro-batch-size", "0", "--micro-batch-size is at least 1"),
        ("--gradient-accumulation-steps", "0", "--gradient-accumulation-steps is at least 1"),
        ("--sequence-len", "1", "--sequence-len is at least 2"),
        ("--eval-share", "1.5", "--eval-share lies in [0, 1)"),
        ("--max-eval-examples", "0", "--max-eval-examples is at least 1"),
        ("--seed", "-1", "--seed is at least 0"),
        ("--target-modules", "no_such_layer", "--target-modules no_such_layer"),
        ("--data", "missing.jsonl", "missing.jsonl does not exist"),
        ("--data", "data.xml", "data files end in .jsonl, .json, .csv, .parquet or .txt"),
        ("--eval-file", "missing.jsonl", "missing.jsonl does not exist"),
        ("--json", "missing/record.json", "lies in one that does not exist"),
        ("--model", "./missing", "--model ./missing: there is no such folder"),
        ("--model", "empty", "--model empty: not a model folder, it has no config.json"),
        ("--model", "empty/model", "--model empty/model: there is no such folder"),
        ("--model", "bert", "--model bert: the model cannot be loaded: Unrecognized configuration class"),
        ("--model", "truncated", "--model truncated: the model cannot be loaded"),
        ("--model", "hollow", "--model hollow: the checkpoint lacks"),
        ("--model", "someone/nothing", "--model someone/nothing: its tokenizer cannot be loaded"),
        ("--out", "full", "--out full exists and is not empty"),
        ("--out", "pairs.jsonl", "--out pairs.jsonl is a file"),
        ("--out", "pairs.jsonl/out", "--out pairs.jsonl/out cannot be written: Not a directory"),
        ("--colour", "red", "No such option: --colour"),
    ],
)
def test_bad_options_are_refused(
    model_folder, tokenizer, pairs, tmp_path, capsys, monkeypatch, option, value, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "data.xml").write_text("<data/>\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for name in ("truncated", "hollow"):
        (tmp_path / name).mkdir()
        for path in model_folder.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    if value == "hollow":
        model = LlamaForCausalLM.from_pretrained(model_folder)
        kept = {name: weight for name, weight in model.state_dict().items() if "layers.1" not in name}
        model.save_pretrained("hollow", state_dict=kept)
    BertConfig().save_pretrained("bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    tokenizer.save_pretrained("bert")

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = {"--model": model_folder, "--data": pairs, "--out": "new/out", "--backend": "peft"} | {
        option: value
    }
    assert message in refusal(capsys, "train", *(item for pair in options.items() for item in pair))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_missing_option_is_named(capsys):
    assert "Missing option '--model'" in refusal(capsys, "train")
    assert "No such command 'fly'" in refusal(capsys, "fly")


def test_training_that_diverges_leaves_nothing(model_folder, pairs, tmp_path, capsys):
    error = refusal(
        capsys,
        *("train", "--model", model_folder, "--data", pairs, "--out", tmp_path / "out", "--backend", "peft"),
        *("--learning-rate", 1e38, "--max-steps", 4),
    )
    assert "diverged" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_without_matplotlib_there_is_no_picture(model_folder, pairs, tmp_path, capsys, without_matplotlib):
    out = tmp_path / "out"
    arguments = ("train", "--model", model_folder, "--data", pairs, "--out", out)
    assert run(*arguments, "--max-steps", 1, "--eval-share", 0) == 0
    assert "Pictures take matplotlib (pip install matplotlib)." in capsys.readouterr().out
    assert (out / "train_log.jsonl").is_file() and not list(out.glob("*.png"))


def test_overwrite_replaces_an_earlier_result_and_nothing_else(model_folder, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = (
        *("train", "--model", model_folder, "--data", pairs, "--out", out, "--backend", "peft"),
        *("--max-steps", 1, "--eval-share", 0),
    )
    assert run(*arguments) == 0
    (out / "stale").write_text("of the earlier run")
    capsys.readouterr()
    assert "pass --overwrite" in refusal(capsys, *arguments)
    assert run(*arguments, "--overwrite") == 0
    assert not (out / "stale").exists()
    assert (out / "adapter_model.safetensors").is_file()
    (out / RESULT_FILE).unlink()
    capsys.readouterr()
    assert "leaves it alone" in refusal(capsys, *arguments, "--overwrite")
    assert (out / "adapter_model.safetensors").is_file()


def test_settings_survive_the_command_line(tmp_path):
    settings = TrainSettings(
        model="m", data=tmp_path / "d.txt", out=tmp_path / "o", lora_r=3, epochs=0.5, overwrite=True
    )
    assert settings.to_arguments() == [
        *("--model", "m", "--data", str(tmp_path / "d.txt"), "--out", str(tmp_path / "o")),
        *("--lora-r", "3", "--epochs", "0.5", "--overwrite"),
    ]
    paths = dict(model="m", data=tmp_path, out=tmp_path, method="qlora")
    common = ["--model", "m", "--data", str(tmp_path), "--out", str(tmp_path), "--method", "qlora"]
    for double_quant, last in ((None, []), (True, ["--double-quant"]), (False, ["--no-double-quant"])):
        assert TrainSettings(**paths, double_quant=double_quant).to_arguments() == common + last


def test_help_is_quick():
    """Help and refusals need none of the libraries that take seconds to import."""
    code = (
        "import sys; sys.argv = ['peftfast', 'train', '--help']\n"
        "from peftfast.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'transformers', 'peft', 'datasets'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--lora-r" in output
    assert output.splitlines()[-1] == "[]"


# ---- methods other than LoRA ------------------------------------------------------------------------------


# In the model of two layers and a hidden size of 32, with four virtual tokens.
TRAINED = {
    ("bottleneck", "--bottleneck-size", 4): 2 * (2 * 4 * 32 + 4 + 32),
    ("bottleneck", "--bottleneck-placement", "houlsby"): 2 * 2 * (2 * 2 * 32 + 2 + 32),
    ("prefix", "--num-virtual-tokens", 4): 4 * 2 * 2 * 32,
    ("prompt", "--num-virtual-tokens", 4): 4 * 32,
    ("prompt", "--prompt-init-text", "AB"): 20 * 32,
    ("p-tuning", "--num-virtual-tokens", 4): 4 * 32 + 3 * (32 * 32 + 32),
    ("p-tuning", "--encoder-hidden-size", 8): 20 * 32 + (8 * 32 + 8) + (8 * 8 + 8) + (8 * 32 + 32),
}


@pytest.mark.parametrize(("method", "option", "value"), TRAINED)
def test_every_method_writes_an_adapter(model_folder, pairs, tmp_path, method, option, value):
    out = tmp_path / "out"
    code = run(
        *("train", "--method", method, "--model", model_folder, "--data", pairs, "--eval-file", pairs),
        *("--out", out, "--max-steps", 8, option, value),
    )
    assert code == 0
    record = json.loads((out / RESULT_FILE).read_text())
    count = TRAINED[method, option, value]
    assert record["trainable_parameters"] == count
    # The prompt's encoder has a part of its own, which is not saved.
    assert record["trainable_share"] == pytest.approx(count / (record["parameters"] + count))
    assert record["gradient_bytes"] == 4 * count
    assert 0 <= record["optimizer_bytes"] - 8 * count < 4 * 100  # each weight has a count of its steps
    assert 0 < record["saved_bytes"] < 4 * count + 4000
    assert record["learning_rates"]["method"] == LEARNING_RATES[method]
    assert record["after"]["loss"] < record["before"]["loss"]
    assert_reloads(model_folder, out)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_prompts_start_from_the_model_as_it_is(model_folder, pairs, tmp_path, method):
    """Untrained virtual tokens change its answers; what was before them is the model without."""
    results = [
        train(
            TrainSettings(
                model=str(model_folder), data=pairs, eval_file=pairs, out=tmp_path / f"{each}-{backend}",
                method=each, backend=backend, max_steps=3, learning_rate=1e-2,
            )
        )
        for each, backend in (("lora", "peft"), (method, "peft"), (method, "peftfast"))
    ]  # fmt: skip
    lora, eager, fast = results
    assert lora.before.loss == pytest.approx(eager.before.loss, rel=1e-5)
    assert lora.before.loss == pytest.approx(fast.before.loss, rel=1e-5)
    assert "1 of 1 adapted" in fast.report
    torch.testing.assert_close(torch.tensor(fast.losses), torch.tensor(eager.losses), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_full_fine_tuning_writes_a_model(model_folder, pairs, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    code = run(
        *("train", "--method", "full", "--model", model_folder, "--data", pairs, "--eval-file", pairs),
        *("--out", out, "--max-steps", 4, "--learning-rate", 1e-3, "--dtype", dtype),
    )
    assert code == 0
    assert f"Model: {out}" in capsys.readouterr().out.replace("\n", "")
    record = json.loads((out / RESULT_FILE).read_text())
    assert record["trainable_parameters"] == record["parameters"] == 37152
    assert record["trainable_share"] == 1
    assert (record["gradient_bytes"], record["base_bytes"]) == (4 * 37152, 4 * 37152)  # float32 in any case
    assert record["after"]["loss"] < record["before"]["loss"]
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert 0 < record["saved_bytes"] - torch_dtype.itemsize * 37152 < 6000
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch_dtype
    lines = [json.loads(line) for line in (out / ANSWERS_FILE).read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    answers = answer(model, AutoTokenizer.from_pretrained(out), prompts, max_new_tokens=3)
    if dtype == "fp32":  # rounding may turn a close choice
        assert answers == [line["answer"] for line in lines]


def test_full_fine_tuning_trains_experts_and_routers(moe_folder, pairs, tmp_path):
    result = train_moe(moe_folder, pairs, tmp_path / "out", method="full", learning_rate=1e-3)
    assert result.experts == "all"
    assert result.router_aux_loss_coef == 0.05
    assert result.trainable_parameters == result.parameters
    assert result.after.loss < result.before.loss
    before, after = (load_file(folder / "model.safetensors") for folder in (moe_folder, tmp_path / "out"))
    assert all(not torch.equal(after[name], before[name]) for name in before if "mlp" in name)


# ---- continued pre-training ---------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    records = [
        {"text": f"Document {number} squares it: {number**2}. " * (1 + number % 3)} for number in range(20)
    ]
    return write_jsonl(tmp_path / "texts.jsonl", records)


def save_tied(folder, tokenizer, architecture):
    torch.manual_seed(0)
    common = dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **common))
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                tie_word_embeddings=architecture == "tied", **common,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pretrain(folder, texts, out, **options):
    options = dict(max_steps=4, learning_rate=1e-2, sequence_len=64, objective="pretrain") | options
    return train(TrainSettings(model=str(folder), data=texts, out=out, **options))


def test_documents_are_joined_into_full_blocks(tokenizer):
    texts = ["first", "second one", "third"]
    blocks = data.pack([{"text": text} for text in texts], tokenizer, 8)
    joined = [token for block in blocks for token in block.input_ids]
    assert tokenizer.decode(joined) == "".join(text + tokenizer.eos_token for text in texts)
    assert [len(block.input_ids) for block in blocks] == [8, 8, 7]
    assert all(block.labels == block.input_ids for block in blocks)


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("architecture", ["tied", "untied", "gpt2"])
def test_pretraining_trains_embeddings_and_head(tokenizer, texts, tmp_path, architecture, method):
    folder = save_tied(tmp_path / "model", tokenizer, architecture)
    result = pretrain(folder, texts, tmp_path / "out", method=method, embedding_learning_rate=1e-4)
    assert result.after.loss < result.before.loss
    assert result.after.exact_match is None
    if method == "full":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert result.trainable_parameters == result.parameters
    else:
        config = FourBitConfig() if method == "qlora" else None
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        peft_model = PeftModel.from_pretrained(base, tmp_path / "out")
        lora = 2 * 16 * (4 * 64 + 3 * 96 if architecture != "gpt2" else (32 + 96) + 64 + 2 * (32 + 128))
        assert result.trainable_parameters == lora + (1 + (architecture == "untied")) * 258 * 32
        model = peft_model.get_base_model()
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = [
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ]
    for after, original in weights:
        # Two peaks' worth of Adam's steps after the warmup: 0, 1, 2/3 and 1/3.
        assert 1e-4 < (after - original).abs().max() < 2.5e-4
    if architecture != "untied":
        assert torch.equal(weights[0][0], weights[1][0])
    if method == "full":  # all else learns at the whole rate
        after, original = (dict(each.named_parameters()) for each in (model, before))
        [name] = [
            name for name in original if name.endswith(("layers.1.mlp.up_proj.weight", "h.1.mlp.c_fc.weight"))
        ]
        assert 1e-2 < (after[name] - original[name]).abs().max() < 2.5e-2


@pytest.mark.parametrize("architecture", ["tied", "untied"])
def test_a_pretrained_adapter_is_the_same_under_plain_peft(tokenizer, texts, tmp_path, architecture):
    folder = save_tied(tmp_path / "model", tokenizer, architecture)
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": "Document 5 squares it: 25."}])
    result = pretrain(folder, texts, tmp_path / "out", eval_file=held_out)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    [example] = data.pack([{"text": "Document 5 squares it: 25."}], tokenizer, 64)
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(result.after.loss, rel=1e-5)
    assert result.after.loss < result.before.loss


def test_embeddings_learn_at_a_tenth_by_default(tokenizer, texts, tmp_path):
    folder = save_tied(tmp_path / "model", tokenizer, "untied")
    result = pretrain(folder, texts, tmp_path / "out")
    assert result.learning_rates == {"method": 1e-2, "embeddings": pytest.approx(1e-3)}
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    change = (
        after["base_model.model.lm_head.weight"] - load_file(folder / "model.safetensors")["lm_head.weight"]
    )
    assert 1e-3 < change.abs().max() < 2.5e-3


def test_embeddings_train_in_float32_in_a_model_of_bf16(tokenizer, texts, tmp_path):
    folder = save_tied(tmp_path / "model", tokenizer, "tied")
    result = pretrain(
        folder, texts, tmp_path / "out", dtype="bf16", learning_rate=1e-3, embedding_learning_rate=1e-6
    )
    assert "14 of 14 adapted" in result.report
    base = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].bfloat16().float()
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    after = weights["base_model.model.model.embed_tokens.weight"]
    assert after.dtype == torch.float32
    assert "loss of base_model.model: without logits" in result.report
    assert 0 < (after - base).abs().max() < 3e-6  # bfloat16 could not hold it
    assert ((after != base).float().mean()) > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "prefix"), "goes with --method lora, qlora or full, not with --method prefix"),
        (("--method", "mixture"), "goes with --method lora, qlora or full, not with --method mixture"),
        (("--target-modules", "q_proj,lm_head"), "--target-modules lm_head: --objective pretrain trains it whole."),
        (("--embedding-learning-rate", 0), "--embedding-learning-rate is a positive number, not 0.0"),
        (("--eval-file", "pairs.jsonl"), 'pairs.jsonl: --objective pretrain takes .txt files and lines'),
    ],
)  # fmt: skip
def test_bad_pretraining_is_refused(
    model_folder, pairs, texts, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    arguments = (
        "--model",
        model_folder,
        "--data",
        texts,
        "--out",
        "out",
        "--objective",
        "pretrain",
        *options,
    )
    assert message in refusal(capsys, "train", *arguments)
    assert not (tmp_path / "out").exists()


# ---- mixtures of experts ----------------------------------------------------------------------------------


def save_moe(folder, config_class, model_class, tokenizer, **options):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory, tokenizer):
    """Two layers of four experts, two to a token."""
    return save_moe(
        tmp_path_factory.mktemp("moe"), Qwen3MoeConfig, Qwen3MoeForCausalLM, tokenizer, head_dim=16
    )


def train_moe(folder, pairs, out, **options):
    options = dict(max_steps=4, learning_rate=1e-2, eval_file=pairs, micro_batch_size=4) | options
    return train(TrainSettings(model=str(folder), data=pairs, out=out, **options))


# In a layer: r = 16 times inputs plus outputs of q, k, v, o (32 and 32), and of four experts' gate_up (32 and 48) and
# down (24 and 32).
ATTENTION, EXPERT = 16 * 4 * 64, 16 * (80 + 56)


def assert_reloads(folder, out, quantization_config=None, dtype=torch.float32):
    """Assert that the adapter, loaded by PEFT alone, gives the answers that training ended with."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization_config)
    model = PeftModel.from_pretrained(base, out)
    lines = [json.loads(line) for line in (out / ANSWERS_FILE).read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    answers = answer(model, AutoTokenizer.from_pretrained(out), prompts, max_new_tokens=3)
    assert answers == [line["answer"] for line in lines]
    return model


@pytest.mark.parametrize("router", ["freeze", "train"])
@pytest.mark.parametrize("backend", ["peft", "peftfast"])
def test_experts_have_adapters_that_plain_peft_loads(moe_folder, pairs, tmp_path, backend, router):
    result = train_moe(moe_folder, pairs, tmp_path / "out", backend=backend, router=router)
    assert result.experts == "all"
    assert result.router_aux_loss_coef == 0.05
    assert result.trainable_parameters == 2 * (ATTENTION + 4 * EXPERT + (router == "train") * 4 * 32)
    assert result.after.loss < result.before.loss
    if backend == "peftfast":
        assert "10 of 10 adapted" in result.report

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    model = assert_reloads(moe_folder, tmp_path / "out")
    untrained = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)
    for layer, before in zip(model.get_base_model().model.layers, untrained.model.layers, strict=True):
        assert torch.equal(layer.mlp.gate.weight, before.mlp.gate.weight) == (router == "freeze")
        assert torch.equal(layer.mlp.experts.get_base_layer().down_proj, before.mlp.experts.down_proj)


@pytest.mark.parametrize("router", ["freeze", "train"])
def test_both_backends_train_experts_alike(moe_folder, pairs, tmp_path, router):
    losses = [
        train_moe(moe_folder, pairs, tmp_path / backend, backend=backend, router=router).losses
        for backend in ("peft", "peftfast")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("backend", ["peft", "peftfast"])
def test_the_training_loss_holds_the_balancing_loss_once(
    moe_folder, tokenizer, tmp_path, backend, accumulation
):
    same = write_jsonl(tmp_path / "same.jsonl", PAIRS[:1] * 4)
    results = {
        coefficient: train_moe(
            moe_folder, same, tmp_path / str(coefficient), eval_file=None, eval_share=0.25, max_steps=1,
            backend=backend, micro_batch_size=1, gradient_accumulation_steps=accumulation,
            router_aux_loss_coef=coefficient,
        )
        for coefficient in (0.0, 0.5)
    }  # fmt: skip
    # Adapters start at zero, so that the first step sees the model as it was.
    model = AutoModelForCausalLM.from_pretrained(moe_folder, dtype=torch.float32)
    [example] = data.encode(PAIRS[:1], tokenizer, 64)
    with torch.no_grad():
        aux_loss = model(
            input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]),
            output_router_logits=True,
        ).aux_loss.item()  # fmt: skip
    (_, plain), (_, balanced) = results[0.0].losses[0], results[0.5].losses[0]
    assert aux_loss > 1
    assert balanced - plain == pytest.approx(0.5 * aux_loss, rel=1e-5)
    # The held-out loss is the cross entropy alone.
    assert results[0.0].before.loss == results[0.5].before.loss == pytest.approx(plain, rel=1e-5)


def test_a_frozen_router_without_experts_trained_is_not_balanced(moe_folder, pairs, tmp_path):
    result = train_moe(moe_folder, pairs, tmp_path / "out", experts="none")
    assert result.experts == "none"
    assert result.router_aux_loss_coef is None
    assert result.trainable_parameters == 2 * ATTENTION
    assert not any("mlp" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    balanced = train_moe(moe_folder, pairs, tmp_path / "balanced", experts="none", router="train")
    assert balanced.router_aux_loss_coef == 0.05


def test_routers_train_in_float32_in_a_model_of_bf16(moe_folder, pairs, tmp_path):
    result = train_moe(moe_folder, pairs, tmp_path / "out", router="train", dtype="bf16", learning_rate=1e-4)
    assert "10 of 10 adapted" in result.report
    base = load_file(moe_folder / "model.safetensors")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    routers = {name: weight for name, weight in weights.items() if "gate.weight" in name}
    assert len(routers) == 2
    for name, weight in routers.items():
        before = base[name.removeprefix("base_model.model.")].bfloat16().float()
        assert weight.dtype == torch.float32
        assert (weight != before).float().mean() > 0.9
        assert (weight - before).abs().max() < 1e-3


def test_the_most_used_experts_are_adapted(moe_folder, pairs, tmp_path):
    out = tmp_path / "out"
    result = train_moe(moe_folder, pairs, out, experts="profile:0.5", lora_dropout=0.1)
    assert result.experts == "profile:0.5"
    assert result.trainable_parameters == 2 * (ATTENTION + 2 * EXPERT)
    assert "10 of 10 adapted" in result.report

    # Every example is prompt "xy=", completion "XY" and the end: 6 tokens, each for two experts.
    profile = ExpertProfile.load(out / PROFILE_FILE)
    assert [tokens.sum() for tokens in profile.tokens.values()] == [2 * 6 * 6] * 2
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "EXPERT_LORA"
    assert config["experts"] == {name: sorted(chosen) for name, chosen in profile.top_share(0.5).items()}
    assert_reloads(moe_folder, out)


def test_the_load_of_the_experts_is_logged(moe_folder, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        *("train", "--model", moe_folder, "--data", pairs, "--eval-file", pairs, "--out", out),
        *("--max-steps", 3, "--gradient-accumulation-steps", 2, "--micro-batch-size", 2),
    )
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The training loss holds 0.05 times the routers' load-balancing loss" in shown
    record = json.loads((out / RESULT_FILE).read_text())
    load = record["expert_load"]
    assert list(load) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for layer in load.values():
        assert sum(layer["tokens"]) == 2 * record["tokens"]
        assert layer["max_over_mean"] == max(layer["tokens"]) * 4 / sum(layer["tokens"])
        assert 0 < layer["entropy"] <= math.log(4)
        assert layer["unused"] == layer["tokens"].count(0)
    worst = max(layer["max_over_mean"] for layer in load.values())
    assert f"Expert load: the fullest expert had {worst:.1f} times the mean of its layer" in shown
    if importlib.util.find_spec("matplotlib"):
        assert (out / "expert_load.png").read_bytes().startswith(b"\x89PNG")


def test_load_is_summed_up():
    profile = ExpertProfile({"a": torch.tensor([4, 4, 0, 0]), "b": torch.tensor([3, 0, 0, 0])}, {})
    load = expert_load(profile)
    assert load["a"] == dict(
        tokens=[4, 4, 0, 0], max_over_mean=2.0, entropy=pytest.approx(math.log(2)), unused=2
    )
    assert load["b"] == dict(tokens=[3, 0, 0, 0], max_over_mean=4.0, entropy=0.0, unused=3)
    text = describe(load)
    assert "4.0 times the mean of its layer (b)" in text
    assert "entropy at least 0.00 of 1.39 nats (b); 5 of 8 experts" in text


@pytest.mark.parametrize("backend", ["peft", "peftfast"])
def test_qlora_keeps_experts_in_4_bits(moe_folder, pairs, tmp_path, capsys, backend):
    out = tmp_path / "out"
    code = run(
        *("train", "--method", "qlora", "--backend", backend, "--model", moe_folder, "--data", pairs),
        *("--eval-file", pairs, "--out", out, "--max-steps", 4, "--learning-rate", 1e-2),
    )
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "linear layers and expert projections in nf4, a scale to 64 weights" in shown
    record = json.loads((out / RESULT_FILE).read_text())
    assert record["quantized"] == {"linear layer": 8, "expert projection": 4}
    if backend == "peftfast":
        assert "4-bit: 8 linear layers, 4 expert projections" in record["report"]
    # In a layer q, k, v, o of 32 x 32 and four experts of 3 x 24 x 32; the rest is embeddings, head, routers, norms.
    packed = 2 * (4 * 32 * 32 + 4 * 3 * 24 * 32)
    dense = 2 * 258 * 32 + 2 * 4 * 32 + (2 * 2 + 1) * 32 + 2 * 2 * 16
    assert record["parameters"] == packed + dense
    # Besides: scales in 8 bits, and for each of 12 weights their own scales and a table of 256 values.
    assert 0 < record["base_bytes"] - packed / 2 - 4 * dense < packed / 64 + 12 * 1050
    assert record["after"]["loss"] < record["before"]["loss"]
    assert_reloads(moe_folder, out, FourBitConfig())


def test_names_that_peft_takes_for_experts_are_kept_from_it(tokenizer, pairs, tmp_path, capsys):
    """The first layer of the model is dense: its feed-forward block has linear layers."""
    folder = save_moe(
        tmp_path / "model", Qwen3MoeConfig, Qwen3MoeForCausalLM, tokenizer,
        head_dim=16, mlp_only_layers=[0], intermediate_size=48,
    )  # fmt: skip
    arguments = ("train", "--model", folder, "--data", pairs, "--eval-share", 0, "--max-steps", 1)
    assert run(*arguments, "--out", tmp_path / "out", "--experts", "none", "--router", "train") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The linear layers named down_proj, gate_proj, up_proj stay frozen" in shown
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # Two factors of q, k, v, o in both layers, and the router of the second.
    assert len(names) == 2 * 2 * 4 + 1
    assert sum("mlp" in name for name in names) == 1

    error = refusal(capsys, *arguments, "--out", tmp_path / "other", "--target-modules", "q_proj,up_proj")
    assert "--target-modules up_proj: in a qwen3_moe PEFT takes that for the experts or the router" in error
    # Adapters of ours mean what they say: the first layer's block has its own.
    assert run(*arguments, "--out", tmp_path / "sparse", "--experts", "profile:0.25") == 0
    names = load_file(tmp_path / "sparse" / "adapter_model.safetensors")
    assert sum("layers.0.mlp.up_proj" in name for name in names) == 2


def test_a_shared_expert_is_linear_layers(tokenizer, pairs, tmp_path):
    folder = save_moe(
        tmp_path / "model", Qwen2MoeConfig, Qwen2MoeForCausalLM, tokenizer, shared_expert_intermediate_size=40
    )
    result = train_moe(folder, pairs, tmp_path / "out", router="train", max_steps=1)
    shared = 16 * (3 * (32 + 40) + 32 + 1)  # gate, up and down, and the gate of all
    assert result.trainable_parameters == 2 * (ATTENTION + 4 * EXPERT + shared + 4 * 32)
    assert_reloads(folder, tmp_path / "out")


def test_dropout_on_all_experts_is_refused(moe_folder, pairs, tmp_path, capsys):
    arguments = ("--model", moe_folder, "--data", pairs, "--out", tmp_path / "out", "--lora-dropout", 0.1)
    assert "PEFT has no dropout on experts; --experts profile:1" in refusal(capsys, "train", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_mixture_of_loras_trains_on_a_dense_model(model_folder, pairs, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(
        *("train", "--method", "mixture", "--model", model_folder, "--data", pairs, "--eval-file", pairs),
        *(
            "--out",
            out,
            "--max-steps",
            4,
            "--learning-rate",
            1e-2,
            "--mixture-experts",
            4,
            "--mixture-top-k",
            2,
        ),
        *("--router-aux-loss-coef", 0.1),
    )
    assert code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "The training loss holds 0.1 times the routers' load-balancing loss" in shown
    assert "Expert load: the fullest expert had" in shown
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_experts"], config["top_k"]) == ("MIXTURE_LORA", 4, 2)
    assert config["router_aux_loss_coef"] == 0.1
    record = json.loads((out / RESULT_FILE).read_text())
    assert record["router_aux_loss_coef"] == 0.1
    assert record["experts"] is None
    assert [len(layer["tokens"]) for layer in record["expert_load"].values()] == [4, 4]
    assert record["after"]["loss"] < record["before"]["loss"]
    assert_reloads(model_folder, out)


def test_a_mixture_of_loras_is_balanced_once_to_a_step(model_folder, tmp_path):
    same = write_jsonl(tmp_path / "same.jsonl", PAIRS[:1] * 4)
    losses = {
        (coefficient, accumulation): train_moe(
            model_folder, same, tmp_path / f"{coefficient}-{accumulation}", method="mixture", eval_file=None,
            eval_share=0, max_steps=1, micro_batch_size=1, gradient_accumulation_steps=accumulation,
            router_aux_loss_coef=coefficient,
        ).losses[0][1]
        for coefficient in (0.0, 0.5)
        for accumulation in (1, 2)
    }  # fmt: skip
    once = losses[0.5, 1] - losses[0.0, 1]
    assert once > 0.5
    assert losses[0.5, 2] - losses[0.0, 2] == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mixture-top-k", 9), "--method mixture: top_k is 9, but there are only 8 experts."),
        (("--mixture-experts", 1), "--mixture-experts is at least 2, not 1."),
        (("--experts", "all"), "--method mixture adapts linear layers alone"),
    ],
)
def test_bad_mixtures_are_refused(model_folder, pairs, tmp_path, capsys, options, message):
    arguments = ("--model", model_folder, "--data", pairs, "--out", tmp_path / "out", "--method", "mixture")
    assert message in refusal(capsys, "train", *arguments, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
