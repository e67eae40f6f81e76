"""`peftfast demo` in short, and what ships with it."""

import inspect
import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftfast import demo, profile_experts
from peftfast.cli import main
from peftfast.cli.demo import RUNS
from peftfast.demo import pretrain, task

SHORT = ("--max-steps", "8", "--max-eval-examples", "40")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_demo_compares_eager_peft_and_peftfast(tmp_path, capfd):
    out, record_file = tmp_path / "out", tmp_path / "record.json"
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(out), "--json", str(record_file), *SHORT])
    assert not stopped.value.code, capfd.readouterr()
    shown = capfd.readouterr().out
    for name, _ in RUNS.values():
        assert f"│ {name}" in shown
    assert (
        "the same answer on 40 (LoRA), 40 (QLoRA, over the 4-bit model) and 40 (mixture of experts) of 40 held-out"
        in " ".join(shown.split())
    )

    record = json.loads(record_file.read_text())
    assert record["same_answers"] == {"peftfast": 40, "qlora": 40, "moe": 40}
    assert record["answers"] == 40
    for fast_name, eager_name in (("peftfast", "peft"), ("moe", "moe_peft")):
        assert record["largest_loss_difference"][fast_name] < 1e-3
        fast, eager = record["results"][fast_name], record["results"][eager_name]
        assert record["speedup"][fast_name] == pytest.approx(eager["seconds"] / fast["seconds"])
        assert eager["before"] == pytest.approx(fast["before"], rel=1e-4)
        assert eager["steps"] == fast["steps"] == 8
        assert fast["after"]["loss"] < fast["before"]["loss"]
        assert fast["trainable_parameters"] < 0.2 * fast["parameters"]
    for name in RUNS:
        assert (out / name / "adapter_model.safetensors").is_file()

    moe = record["results"]["moe"]
    assert moe["experts"] == "all"
    assert moe["router_aux_loss_coef"] > 0
    assert len(moe["expert_load"]) == 4
    # Of 4 layers, q, k, v and o, and the experts.
    assert "20 of 20 adapted or 4-bit layers on the fast path" in moe["report"]

    four_bit, fast = record["results"]["qlora"], record["results"]["peftfast"]
    assert four_bit["quantization"]["quant_type"] == "nf4"
    assert four_bit["parameters"] == fast["parameters"]
    assert 4 * four_bit["base_bytes"] < fast["base_bytes"] == 4 * fast["parameters"]
    assert four_bit["after"]["loss"] < four_bit["before"]["loss"]
    assert four_bit["before"]["loss"] == pytest.approx(fast["before"]["loss"], rel=0.1)
    assert "28 of 28 adapted or 4-bit layers on the fast path" in four_bit["report"]


def test_the_demo_touches_nothing_of_others(tmp_path, capfd):
    (tmp_path / "peftfast").mkdir()
    (tmp_path / "peftfast" / "file").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "exists and is not empty" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["peftfast"]


@pytest.mark.parametrize("base", [demo.BASE, demo.MOE_BASE], ids=["dense", "moe"])
def test_the_base_models_are_small_and_load(base):
    assert (base / "model.safetensors").stat().st_size <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    built = pretrain.build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert len(tokenizer) == model.config.vocab_size == 258
    # It has read Python: what follows "self, " of a method is far likelier than chance, log(258) = 5.6 nats.
    text = "    def __init__(self, name, value):\n        self.name = name\n        self.value = value\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 1.5


def test_the_mixture_uses_its_experts():
    model = AutoModelForCausalLM.from_pretrained(demo.MOE_BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.MOE_BASE)
    text = tokenizer(inspect.getsource(random)[:8192], return_tensors="pt")["input_ids"]
    profile = profile_experts(model, [text.view(-1, pretrain.SEQUENCE_LENGTH)])
    used = [int((tokens > 0).sum()) for tokens in profile.tokens.values()]
    # transformers balances the layers together, which lets an expert of one of them go to waste.
    assert len(used) == 4
    assert sum(used) >= 31
    assert max(tokens.max() / tokens.sum() for tokens in profile.tokens.values()) < 0.5


def test_the_tokenizer_keeps_every_character():
    tokenizer = AutoTokenizer.from_pretrained(demo.BASE)
    text = "tab\there, naïve 東京 \U0001f40d\n  two  spaces"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_shipped_files_name_no_machine():
    for path in [*demo.BASE.iterdir(), *demo.MOE_BASE.iterdir(), demo.TRAIN_DATA, demo.HELD_OUT_DATA]:
        content = path.read_bytes()
        for folder in (b"/home/", b"/root/", b"/tmp/", b"/usr/", b"C:\\"):
            assert folder not in content, path


def test_the_task_is_consistent_and_disjoint():
    training, held_out = read(demo.TRAIN_DATA), read(demo.HELD_OUT_DATA)
    assert len(training) == 4000
    assert len(held_out) == 400
    prompts = [example["prompt"] for example in training + held_out]
    assert len(set(prompts)) == len(prompts)
    for example in training + held_out:
        assert example == task.make_example(example["prompt"].removesuffix(" -> "))


def test_the_task_is_seeded():
    names = [f"{first}_{second}" for first in ("get", "set", "run") for second in ("a", "b", "c", "d")]
    training, held_out = task.make_task(names, train=8, held_out=3, seed=5)
    assert (training, held_out) == task.make_task(names, train=8, held_out=3, seed=5)
    assert training != task.make_task(names, train=8, held_out=3, seed=6)[0]
    assert task.make_example("get_file_name") == {"prompt": "get_file_name -> ", "completion": "GetFileName"}


def test_names_are_found_in_the_standard_library():
    names = task.collect_names()
    assert {"default_factory", "read_text", "get_running_loop"} <= set(names)
    assert names == sorted(set(names))
    assert all(name.islower() and "_" in name and len(name) <= task.LONGEST_NAME for name in names)


@pytest.mark.parametrize("kind", pretrain.MODELS)
def test_pretraining_is_deterministic(tmp_path, monkeypatch, kind):
    words = random.Random(0).choices(["def ", "return ", "self.", "name", "\n"], k=20_000)
    monkeypatch.setattr(pretrain, "read_standard_library", lambda: ["".join(words)] * 3)
    for name in ("first", "second"):
        pretrain.pretrain(tmp_path / name, kind=kind, max_steps=2, batch_size=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    pretrain.pretrain(tmp_path / "third", kind=kind, max_steps=2, batch_size=2, seed=1)
    assert (tmp_path / "third" / "model.safetensors").read_bytes() != weights[0]


def test_one_block_in_four_repeats_itself():
    tokenizer = pretrain.build_tokenizer()
    blocks = pretrain.encode_blocks(["".join(map(chr, range(33, 127))) * 100], tokenizer, seed=0)
    assert blocks.shape[1] == pretrain.SEQUENCE_LENGTH

    def repeats(block):
        # The text's own period is 94 characters.
        periods = set(range(16, pretrain.SEQUENCE_LENGTH // 2 + 1)) - {94}
        return any(bool((block[period:] == block[:-period]).all()) for period in periods)

    assert [repeats(block) for block in blocks] == [index % 4 == 0 for index in range(len(blocks))]
