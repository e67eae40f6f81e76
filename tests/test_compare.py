"""`peftfast compare`: every method on a tiny model, what is kept of an interrupted run, and the arithmetic alone."""

import json
import os

import pytest
from test_cli import model_folder, moe_folder, pairs, refusal, run, tokenizer  # noqa: F401
from transformers import GPT2Config, LlamaConfig

from peftfast.cli import compare
from peftfast.cli.errors import UserError
from peftfast.cli.settings import METHODS
from peftfast.cli.train import RESULT_FILE, train


@pytest.fixture
def trained(monkeypatch):
    """Have methods train in this process, which saves importing torch for each, and list which did."""
    methods = []

    def train_here(settings, console):
        methods.append(settings.method)
        try:
            train(settings)
        except UserError as error:
            return str(error)

    monkeypatch.setattr(compare, "_train", train_here)
    return methods


@pytest.fixture
def arguments(model_folder, pairs, tmp_path):  # noqa: F811
    return (
        *(
            "compare",
            "--model",
            model_folder,
            "--data",
            pairs,
            "--eval-file",
            pairs,
            "--out",
            tmp_path / "out",
        ),
        *("--max-steps", 2, "--lora-r", 2, "--learning-rates", "full=1e-3,lora=1e-2"),
    )


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(shown, method):
    [line] = [line for line in shown.splitlines() if line.split()[:1] == [method]]
    return line.split()


def test_every_method_is_compared(arguments, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*arguments, "--json", tmp_path / "record.json") == 0
    shown = capsys.readouterr().out
    assert trained == list(compare.ORDER)
    assert set(trained) == set(METHODS)

    record = read(out / compare.RECORD_FILE)
    assert record == read(tmp_path / "record.json")
    assert list(record["results"]) == trained
    assert record["refused"] == {}
    full = record["results"]["full"]
    for method, result in record["results"].items():
        assert result == read(out / method / RESULT_FILE)
        # The same budget: 2 steps of 6 examples of 6 tokens.
        assert (result["steps"], result["tokens"]) == (2, 72)
        assert result["gradient_bytes"] == 4 * result["trainable_parameters"]
        assert record["time_cost"][method] == result["seconds"] / full["seconds"]
        state, of_full = (entry["gradient_bytes"] + entry["optimizer_bytes"] for entry in (result, full))
        assert record["memory_cost"][method] == state / of_full
        assert f"{record['memory_cost'][method]:.1%}" in cells(shown, method)
        assert f"{result['after']['exact_match']:.1%}" in cells(shown, method)
    assert record["memory_cost"]["lora"] < 0.2
    assert record["results"]["lora"]["settings"]["learning_rate"] == 1e-2
    assert record["results"]["prompt"]["settings"]["learning_rate"] is None
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*trained, compare.RECORD_FILE, *[compare.PICTURE_FILE] * (out / compare.PICTURE_FILE).exists()]
    )

    # Again: all is kept. With another setting, the methods that have it differ.
    trained.clear()
    assert run(*arguments) == 0
    assert trained == []
    assert capsys.readouterr().out.count("Kept from an earlier run") == len(METHODS)
    assert read(out / compare.RECORD_FILE) == record
    changed = (*arguments, "--methods", "full,lora", "--lora-alpha", 8)
    assert f"{out / 'lora'} holds the result of other settings or data" in refusal(capsys, *changed)
    assert run(*changed, "--overwrite") == 0
    assert trained == ["lora"]


def test_an_interrupted_run_goes_on(arguments, trained, tmp_path, monkeypatch):
    arguments = (*arguments, "--methods", "full,lora,prompt")
    train_here = compare._train

    def interrupted(settings, console):
        if settings.method == "lora":
            raise KeyboardInterrupt
        return train_here(settings, console)

    monkeypatch.setattr(compare, "_train", interrupted)
    assert run(*arguments) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["full"]
    monkeypatch.setattr(compare, "_train", train_here)
    assert run(*arguments) == 0
    assert trained == ["full", "lora", "prompt"]

    # Data that changed since: what it gave is not kept.
    trained.clear()
    later = (tmp_path / "out" / "prompt" / RESULT_FILE).stat().st_mtime + 10
    os.utime(tmp_path / "pairs.jsonl", (later, later))
    assert run(*arguments[:-2], "--methods", "lora", "--overwrite") == 0
    assert trained == ["lora"]


def test_methods_train_in_processes_of_their_own(arguments, tmp_path, capfd):
    """A mixture of more LoRAs to a token than there are is refused, and left out."""
    options = ("--methods", "lora,mixture", "--mixture-top-k", 9)
    assert run(*arguments, *options) == 0
    shown, errors = capfd.readouterr()
    assert "lora (1 of 2)" in shown
    assert "lora on " in shown  # of the process
    sentence = "--method mixture: top_k is 9, but there are only 8 experts."
    assert f"mixture was left out: {sentence}" in shown
    assert f"peftfast: {sentence}" in errors
    record = read(tmp_path / "out" / compare.RECORD_FILE)
    assert list(record["results"]) == ["lora"]
    assert record["refused"] == {"mixture": sentence}
    assert record["time_cost"] == record["memory_cost"] == {}
    assert not (tmp_path / "out" / "mixture").exists()


def test_without_matplotlib_there_is_no_picture(arguments, trained, tmp_path, capsys, without_matplotlib):
    assert run(*arguments, "--methods", "lora") == 0
    assert "a picture takes matplotlib (pip install matplotlib)" in capsys.readouterr().out
    assert (tmp_path / "out" / compare.RECORD_FILE).is_file()
    assert not (tmp_path / "out" / compare.PICTURE_FILE).exists()


def test_the_picture(arguments, trained, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(*arguments, "--methods", "full,lora") == 0
    assert (tmp_path / "out" / compare.PICTURE_FILE).read_bytes().startswith(b"\x89PNG")


def test_help_names_the_options_of_train(capsys):
    assert run("compare", "--help") == 0
    shown = capsys.readouterr().out
    assert "--lora-r" in shown
    assert "--num-virtual-to" in shown
    assert "--objective" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--methods", "lora,magic"), "--methods is all, or some of full, lora,"),
        (("--learning-rates", "lora"), "--learning-rates names methods and positive numbers"),
        (("--learning-rates", "lora=-1"), "--learning-rates names methods and positive numbers"),
        (("--learning-rates", "magic=1"), "--learning-rates names methods and positive numbers"),
        (("--methods", "full", "--lora-r", 4), "--lora-r goes with --methods lora, qlora or mixture."),
        (("--lora-r", 0), "--lora-r is at least 1, not 0."),
        (("--model", "somewhere"), "--model and --data go together: --data is missing."),
        (("--data", "missing.jsonl"), "--model and --data go together: --model is missing."),
        (("--model", "m", "--data", "missing.jsonl"), "missing.jsonl does not exist"),
        (("--json", "missing/record.json"), "lies in one that does not exist"),
        (("--out", "full", "--methods", "lora"), "full/lora exists and is not empty"),
        (("--plan-only", "m", "--data", "d.jsonl"), "--plan-only names the model itself"),
        (("--plan-only", "./missing"), "--plan-only ./missing: there is no such folder"),
        (("--plan-only", "full/lora/file"), "--plan-only full/lora/file: its config.json cannot be read"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "full" / "lora").mkdir(parents=True)
    (tmp_path / "full" / "lora" / "file").write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert message in refusal(capsys, "compare", *options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---- the arithmetic alone -----------------------------------------------------------------------------------


def plans_of(model, tmp_path, **given):
    given = {"model": str(model), "data": tmp_path} | given
    runs, unfit = compare.runs_of(given, compare.ORDER, {}, tmp_path)
    plans, refused = compare.plan(runs)
    return plans, unfit | refused


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_is_what_training_takes(model_folder, pairs, tmp_path, dtype):  # noqa: F811
    plans, refused = plans_of(model_folder / "config.json", tmp_path, dtype=dtype)
    assert refused == {}
    methods = ("full", "lora", "qlora") + ("mixture", "bottleneck", "prefix", "p-tuning") * (dtype == "fp32")
    runs, _ = compare.runs_of(
        {"model": str(model_folder), "data": pairs, "max_steps": 1, "dtype": dtype, "eval_share": 0.0},
        methods, {}, tmp_path,
    )  # fmt: skip
    for method, settings in runs.items():
        result, plan = train(settings), plans[method]
        assert plan.parameters == result.parameters
        assert plan.trainable_parameters == result.trainable_parameters
        assert plan.trainable_share == pytest.approx(result.trainable_share)
        assert plan.gradient_bytes == result.gradient_bytes
        assert (
            0 <= result.optimizer_bytes - plan.optimizer_bytes < 4 * 200
        )  # each weight has a count of its steps
        assert 0 < result.saved_bytes - plan.saved_bytes < 20_000  # names and shapes
        held = result.base_bytes + (method != "full") * plan.gradient_bytes
        assert plan.weights_bytes == held, method


def test_the_plan_of_llama_2_7b(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )  # fmt: skip
    config.save_pretrained(tmp_path / "llama")
    out = tmp_path / "out"
    options = ("--dtype", "bf16", "--methods", "full,lora,qlora,prompt", "--out", out)
    options += ("--json", tmp_path / "plan.json")
    assert run("compare", "--plan-only", tmp_path / "llama", *options) == 0
    shown = capsys.readouterr().out
    plan = read(tmp_path / "plan.json")
    parameters, lora = 6_738_415_616, 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert "6,738,415,616 parameters" in shown
    assert plan["full"]["trainable_parameters"] == plan["lora"]["parameters"] == parameters
    assert plan["full"]["weights_bytes"] == plan["full"]["gradient_bytes"] == 4 * parameters
    assert plan["full"]["optimizer_bytes"] == 8 * parameters
    assert plan["lora"]["trainable_parameters"] == lora == 39_976_960
    assert plan["lora"]["weights_bytes"] == 2 * parameters + 4 * lora
    assert plan["lora"]["saved_bytes"] == 4 * lora
    linear = parameters - 2 * 32000 * 4096 - (2 * 32 + 1) * 4096
    four_bit = plan["qlora"]["weights_bytes"] - 4 * lora - 2 * (parameters - linear)
    assert four_bit / linear == pytest.approx(4.127 / 8, rel=1e-3)
    assert plan["prompt"]["trainable_parameters"] == 20 * 4096
    assert "GiB" in " ".join(cells(shown, "full"))
    assert not out.exists()


def test_a_plan_leaves_out_what_a_model_does_not_allow(moe_folder, tmp_path):  # noqa: F811
    plans, refused = plans_of(moe_folder, tmp_path)
    assert list(refused) == ["mixture"]
    assert "feed-forward" in refused["mixture"]
    assert plans["qlora"].weights_bytes < plans["lora"].weights_bytes
    plans, refused = plans_of(moe_folder, tmp_path, experts="profile:0.5")
    assert "--experts profile:0.5 takes the model itself" in refused["lora"]
    assert "it goes with --experts none" in refused["mixture"]
    assert "full" in plans


def test_a_plan_knows_transposed_layers(tmp_path):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    config.save_pretrained(tmp_path)
    plans, refused = plans_of(tmp_path, tmp_path)
    assert refused == {}
    assert plans["full"].parameters == plans["lora"].parameters
    assert plans["qlora"].weights_bytes < plans["lora"].weights_bytes
