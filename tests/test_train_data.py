"""What `peftfast train` reads: YAML files, data of every format, chat templates; and packed examples."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peftfast
from peftfast.cli import data, main, methods, packing
from peftfast.cli.config_file import ALIASES, FIELDS, read_config
from peftfast.cli.errors import UserError
from peftfast.cli.model import load_model
from peftfast.cli.records import read_records
from peftfast.cli.settings import TrainSettings
from peftfast.cli.train import ANSWERS_FILE, RESULT_FILE, train
from peftfast.demo.pretrain import END_OF_TEXT, PADDING, build_tokenizer

PAIRS = [
    {"prompt": f"{word}=", "completion": word.upper()} for word in ("ab", "cdef", "gh", "ijklmn", "op", "q")
]
CHAT = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6")]
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


def build(kind: str):
    torch.manual_seed(0)
    small = dict(vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, eos_token_id=256)
    layers = small | dict(intermediate_size=64, num_key_value_heads=2)
    match kind:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**layers, bos_token_id=None))
        case "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**layers, head_dim=16))
        case "olmoe":
            return OlmoeForCausalLM(
                OlmoeConfig(**layers, num_experts=4, num_experts_per_tok=2, pad_token_id=None)
            )
        case "gpt2":
            options = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None)
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=258,
                    n_positions=64,
                    n_embd=32,
                    n_layer=2,
                    n_head=2,
                    eos_token_id=256,
                    **options,
                )
            )
    return BloomForCausalLM(
        BloomConfig(vocab_size=258, hidden_size=32, n_layer=2, n_head=2, eos_token_id=256)
    )


def save(kind: str, folder, tokenizer):
    build(kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    return save("llama", tmp_path_factory.mktemp("model"), tokenizer)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def pairs(tmp_path):
    return write_lines(tmp_path / "pairs.jsonl", PAIRS)


def refusal(capsys, *arguments):
    """Run `peftfast train`, which is to be refused, and return its one sentence."""
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2, captured
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


# ---- the YAML file ------------------------------------------------------------------------------------------


def config(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


AXOLOTL = """
base_model: {model}
load_in_8bit: false
load_in_4bit: true
adapter: lora
datasets:
  - path: {data}
    type: prompt
val_set_size: 0.3
output_dir: {out}
sequence_len: 64
sample_packing: true
lora_r: 4
lora_alpha: 8
lora_target_modules:
  - q_proj
  - v_proj
micro_batch_size: 2
num_epochs: 2
learning_rate: 2e-4
bf16: false
seed:
"""


def test_a_file_of_axolotl_trains_and_options_override_it(model_folder, pairs, tmp_path):
    out = tmp_path / "out"
    path = config(tmp_path, AXOLOTL.format(model=model_folder, data=pairs, out=tmp_path / "elsewhere"))
    with pytest.raises(SystemExit) as stopped:
        main(
            ["train", str(path), "--out", str(out), "--lora-r", "16", "--no-sample-packing"]
        )  # 16: the default
    assert not stopped.value.code
    assert not (tmp_path / "elsewhere").exists()
    told = json.loads((out / RESULT_FILE).read_text())["settings"]
    wanted = dict(
        model=str(model_folder), data=str(pairs), data_type="prompt", method="qlora", eval_share=0.3, sequence_len=64,
        sample_packing=False, lora_r=16, lora_alpha=8, target_modules="q_proj,v_proj", micro_batch_size=2, epochs=2,
        learning_rate=2e-4, dtype="fp32", seed=0,
    )  # fmt: skip
    assert {name: told[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("adapter: qlora", {"method": "qlora"}),
        ("adapter:", {"method": "full"}),
        ("load_in_4bit: true", {"method": "qlora"}),
        ("quantization_bit: 4\nfinetuning_type: lora", {"method": "qlora"}),
        ("load_in_4bit: false\nadapter: prefix", {"method": "prefix"}),
        ("lora_target_linear: true", {"target_modules": "all-linear"}),
        ("lora_target_linear: false\nlora_target_modules: q_proj", {"target_modules": "q_proj"}),
        ("lora_target: all", {"target_modules": "all-linear"}),
        ("bf16: true", {"dtype": "bf16"}),
        ("lora-r: 4\nmodel:", {"lora_r": 4}),
        ("model: a\nbase_model: a", {"model": "a"}),
        ("chat_template: tokenizer_default", {}),
        ("fp16: false\nwandb_project:\nspecial_tokens:\neval_strategy:", {}),
        ("optimizer: adamw_bnb_8bit\nwarmup_steps: 10", {"optimizer": "adamw_bnb_8bit", "warmup_steps": 10}),
        ("evals_per_epoch: 4\nsaves_per_epoch: 1", {"evals_per_epoch": 4, "saves_per_epoch": 1}),
        ("eval_strategy: epoch\nsave_strategy: epoch", {"evals_per_epoch": 1, "saves_per_epoch": 1}),
        ("report_to: none", {"report_to": "none"}),
        ("report_to: [wandb, tensorboard]", {"report_to": "wandb,tensorboard"}),
        ("attn_implementation: eager", {"attn_implementation": "eager"}),
        ("flash_attention: true\nsdp_attention: false", {"attn_implementation": "flash_attention_2"}),
        ("sdp_attention: true\nattn_implementation: sdpa", {"attn_implementation": "sdpa"}),
        (
            "learning_rate: 1e-3\nlora_alpha: 8\nlora_dropout: 0.1",
            dict(learning_rate=1e-3, lora_alpha=8.0, lora_dropout=0.1),
        ),
        ("max_eval_examples: 3\nexperts: none", {"max_eval_examples": 3, "experts": "none"}),
    ],
)
def test_keys_make_settings(tmp_path, text, made):
    assert read_config(config(tmp_path, text)) == (made, [])


def test_data_sets_are_named_with_configuration_split_and_type(tmp_path):
    entry = (
        "datasets:\n  - {path: someone/set, name: main, split: half, type: alpaca}\ntest_datasets: held.jsonl"
    )
    made, _ = read_config(config(tmp_path, entry))
    assert {name: str(value) for name, value in made.items()} == {
        "data": "someone/set:main", "data_split": "half", "data_type": "alpaca", "eval_file": "held.jsonl",
    }  # fmt: skip


NOTHING = """
do_train: true
stage: sft
dataset_prepared_path: last_run_prepared
pad_to_sequence_len: true
loss_watchdog_threshold: 5.0
loss_watchdog_patience: 3
plot_loss: true
save_strategy: no
eval-strategy: steps
eval_steps: 2
"""


def test_keys_that_change_nothing_are_named_once(model_folder, pairs, tmp_path, capsys):
    tokens = f"special_tokens: {{pad_token: {PADDING}, eos_token: {END_OF_TEXT}, unk_token: }}"
    run = f"model: elsewhere\ndata: {pairs}\nout: {tmp_path / 'out'}\nmax_steps: 2\nmicro_batch_size: 2"
    path = config(tmp_path, "\n".join((NOTHING, tokens, run)))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), "--model", str(model_folder)])
    assert not stopped.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(
        "These keys change nothing here: do_train, stage, dataset_prepared_path, pad_to_sequence_len, "
        "loss_watchdog_threshold, loss_watchdog_patience, plot_loss, save_strategy, eval-strategy, special_tokens. "
    )
    assert said.count("change nothing") == 1


def test_keys_that_change_nothing_are_named_by_the_first_process(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr("peftfast.cli.train.train", lambda settings, console: told.append(settings))
    path = config(tmp_path, "plot_loss: true\nmodel: m\ndata: d\nout: o")
    for rank, said in ("0", "These keys change nothing here: plot_loss.\n"), ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            main(["train", str(path)])
        assert capsys.readouterr().out == said
    assert len(told) == 2


def test_other_special_tokens_are_refused(model_folder, tmp_path, capsys):
    path = config(tmp_path, f"model: {model_folder}\nspecial_tokens: {{pad_token: <pad>}}")
    assert (
        "config.yaml: pad_token of special_tokens is '<pad>', but the model's tokenizer, which stays as it is, has "
        f"'{PADDING}'."
    ) in refusal(capsys, path)


def test_bf16_auto_goes_by_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for isa, dtype in {"avx2": "fp32", "avx512_bf16": "bf16", "amx": "bf16"}.items():
        monkeypatch.setattr(peftfast, "build_info", lambda isa=isa: {"isa": isa})
        assert read_config(config(tmp_path, "bf16: auto")) == ({"dtype": dtype}, [])


def test_every_field_is_a_key_and_no_alias_hides_one():
    assert not ALIASES.keys() & FIELDS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rr: 4", "config.yaml: lora_rr is no setting of peftfast train; the nearest one is lora_r."),
        ("base_modle: x", "the nearest one is base_model."),
        ("fp16: true", "config.yaml: fp16 is no setting of peftfast train"),
        ("trust_remote_code: true", "config.yaml: trust_remote_code is no setting of peftfast train.\n"),
        ("deepspeed: a.json", "config.yaml: deepspeed is no setting of peftfast train.\n"),
        ("do_train: false", "config.yaml: do_train is True, not False."),
        ("stage: dpo", "config.yaml: stage is sft, not 'dpo'."),
        (
            "special_tokens: <pad>",
            "config.yaml: special_tokens holds lines such as pad_token: <pad>, not '<pad>'.",
        ),
        ("save_strategy: best", "config.yaml: save_strategy is no, steps or epoch, not 'best'."),
        ("save_strategy: steps", "config.yaml: save_strategy is steps, which takes save_steps too."),
        (
            "eval_strategy: no\nevals_per_epoch: 2",
            "config.yaml: eval_strategy and evals_per_epoch contradict each other.",
        ),
        (
            "evaluation_strategy: epoch\nevals_per_epoch: 2",
            "evaluation_strategy and evals_per_epoch contradict each other: one makes evals_per_epoch 1, the other 2.",
        ),
        ("flash_attention: 2", "config.yaml: flash_attention is true or false, not 2."),
        (
            "flash_attention: true\nattn_implementation: sdpa",
            "flash_attention and attn_implementation contradict each other",
        ),
        (
            "flash_attention: true\nmodel: m\ndata: d\nout: o",
            "--attn-implementation flash_attention_2 computes in 16 bits: it goes with --dtype bf16.",
        ),
        ("lora_r: many", "config.yaml: lora_r is a whole number, not 'many'."),
        ("lora_r: 4.5", "config.yaml: lora_r is a whole number, not 4.5."),
        ("lora_r: true", "config.yaml: lora_r is a whole number, not True."),
        ("learning_rate: fast", "config.yaml: learning_rate is a number, not 'fast'."),
        ("learning_rate: [1]", "config.yaml: learning_rate is a number, not [1]."),
        ("sample_packing: 1", "config.yaml: sample_packing is true or false, not 1."),
        ("base_model: 7", "config.yaml: base_model is text, not 7."),
        ("output_dir: 7", "config.yaml: output_dir is a path, not 7."),
        ("bf16: maybe", "config.yaml: bf16 is true or false, not 'maybe'."),
        ("quantization_bit: 8", "config.yaml: quantization_bit is 4, not 8."),
        ("load_in_4bit: 4", "config.yaml: load_in_4bit is true or false, not 4."),
        ("lora_target_modules: [1]", "config.yaml: lora_target_modules is text, not 1."),
        ("datasets: [a, b]", "config.yaml: datasets lists 2 data sets, but peftfast train reads one"),
        ("datasets: [{type: alpaca}]", "config.yaml: datasets is a path, or a list of one entry"),
        ("datasets: [{path: a, shards: 3}]", "config.yaml: shards of datasets is unknown"),
        ("datasets: [{path: a, type: poem}]", "config.yaml: type of datasets is completion, pretrain"),
        ("datasets: [{path: a, split: 3}]", "config.yaml: split of datasets is text, not 3."),
        (
            "base_model: a\nmodel: b",
            "base_model and model contradict each other: one makes model a, the other b.",
        ),
        (
            "lora_target_linear: true\nlora_target_modules: [q_proj]",
            "lora_target_linear and lora_target_modules contradict",
        ),
        (
            "load_in_4bit: true\nadapter: prefix",
            "load_in_4bit and adapter contradict each other: prefix does not",
        ),
        (
            "load_in_4bit: false\nadapter: qlora",
            "load_in_4bit and adapter contradict each other: qlora is lora on",
        ),
        ("seed: 1\nseed: 2", "config.yaml: seed is there 2 times."),
        ("- a\n- b", "config.yaml: a YAML file of settings holds lines such as lora_r: 16."),
        ("", "config.yaml: a YAML file of settings holds lines"),
        ("a: [1", "config.yaml, line 1: not valid YAML"),
        ("lora_r: 0\nmodel: m\ndata: d\nout: o", "--lora-r is at least 1, not 0."),
        ("lora_r: 4", "Missing option '--model', or model in "),
    ],
)
def test_bad_files_are_refused(tmp_path, capsys, text, message):
    path = config(tmp_path, text)
    assert message in refusal(capsys, path)
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_none_are_refused(tmp_path, capsys):
    assert "missing.yaml does not exist or is not a file" in refusal(capsys, tmp_path / "missing.yaml")
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe")
    assert "config.yaml is not UTF-8 text" in refusal(capsys, path)


# ---- data ---------------------------------------------------------------------------------------------------


def write_table(path, records):
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(records), encoding="utf-8")
        case ".jsonl":
            write_lines(path, records)
        case ".csv":
            Dataset.from_list(records).to_csv(path, index=False)
        case ".parquet":
            Dataset.from_list(records).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_formats_hold_the_same_records(tmp_path, suffix):
    records = [*PAIRS, {"prompt": 'two\nlines, "quoted"', "completion": "007"}]
    assert read_records(write_table(tmp_path / f"data.{suffix}", records)) == records


def test_json_files_may_hold_lines(tmp_path):
    assert read_records(write_lines(tmp_path / "data.json", PAIRS)) == PAIRS


def test_columns_of_other_formats_become_records(tmp_path):
    def read(*rows):
        return read_records(write_lines(tmp_path / "data.jsonl", rows))

    assert read({"question": "2+2?", "answer": "4", "id": 3}) == [{"prompt": "2+2?\n", "completion": "4"}]
    with_input, without = read(
        {"instruction": "Add.", "input": "2, 2", "output": "4", "text": "all"},
        {"instruction": "Say 4.", "input": "", "output": "4", "text": "all"},
    )
    assert with_input["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n2, 2\n\n### Response:\n")
    assert without["prompt"].endswith("request.\n\n### Instruction:\nSay 4.\n\n### Response:\n")
    assert with_input["completion"] == without["completion"] == "4"
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    assert read({"conversations": turns}) == read({"conversations": messages}) == [{"messages": messages}]


def test_the_kind_of_data_can_be_told(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"text": "all", "prompt": "a", "completion": "b"}])
    assert read_records(path) == [{"prompt": "a", "completion": "b"}]
    assert read_records(path, kind="text") == [{"text": "all"}]
    with pytest.raises(
        UserError, match='line 1: the keys are "text", "prompt", "completion"; wanted is "messages"'
    ):
        read_records(path, kind="messages")


def test_messages_survive_a_table(tmp_path):
    """A table has every column in every row, so that messages carry empty ones of each other."""
    rows = [{"messages": [*MESSAGES[1:3], {"role": "user", "content": "Thanks.", "name": "Ann"}]}]
    assert read_records(write_table(tmp_path / "data.parquet", rows)) == rows


def test_folders_have_splits(tmp_path):
    for name, records in {
        "train-0.csv": PAIRS[:2],
        "train-1.jsonl": PAIRS[2:4],
        "test.parquet": PAIRS[4:],
    }.items():
        write_table(tmp_path / name, records)
    (tmp_path / "LICENSE").write_text("mine")
    assert read_records(tmp_path) == PAIRS[:4]
    assert read_records(tmp_path, split="test") == PAIRS[4:]
    with pytest.raises(UserError, match=r"has no split validation; it has train, test\."):
        read_records(tmp_path, split="validation")
    write_table(tmp_path / "train-2.jsonl", [{"text": "a"}])
    with pytest.raises(
        UserError, match='train-2.jsonl holds "text" and .*train-0.csv "prompt", "completion"'
    ):
        read_records(tmp_path)


def test_a_folder_without_split_names_is_read_whole(tmp_path):
    for number, record in enumerate(PAIRS):
        write_table(tmp_path / f"{number}.json", [record])
    assert read_records(tmp_path) == PAIRS


def test_files_of_no_split_are_of_train(tmp_path, monkeypatch):
    """Where others have words in their names, too, and however the folder is named."""
    for name, records in {
        "train.jsonl": PAIRS[:2],
        "more.csv": PAIRS[2:4],
        "b_test.jsonl": PAIRS[4:],
    }.items():
        write_table(tmp_path / name, records)
    write_table(tmp_path / "_hidden.jsonl", PAIRS)
    monkeypatch.chdir(tmp_path.parent)
    for folder in (tmp_path, Path(tmp_path.name)):
        assert read_records(folder) == PAIRS[2:4] + PAIRS[:2]
        assert read_records(folder, split="test") == PAIRS[4:]


def test_text_is_no_other_kind_of_data(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="a.txt is text: it has no messages data"):
        read_records(tmp_path / "a.txt", kind="messages")


def test_a_run_holds_out_a_split(model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train.jsonl", PAIRS)
    write_table(tmp_path / "data" / "test.csv", PAIRS[:2])
    options = dict(model=str(model_folder), data=tmp_path / "data", out=tmp_path / "out", max_steps=1)
    result = train(TrainSettings(**options, eval_split="test"))
    assert (result.examples, result.held_out_examples) == (6, 2)


def test_a_data_set_of_the_hub_is_trained_on(model_folder, tmp_path, monkeypatch):
    """By its name, subset and splits, which `datasets` is asked for."""
    splits = {
        "half": [pair | {"number": 3} for pair in PAIRS],
        "rest": [{"prompt": "rs=", "completion": "RS"}],
    }
    asked = []

    def load_dataset(*args, split, **kwargs):
        asked.append((args, split, kwargs))
        return Dataset.from_list(splits[split])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    path = config(
        tmp_path,
        f"model: {model_folder}\nout: {tmp_path / 'out'}\nepochs: 1\neval_split: rest\n"
        "datasets: [{path: someone/set, name: main, split: half, type: prompt}]",
    )
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path)])
    assert not stopped.value.code
    assert asked == [(("someone/set", "main"), "half", {}), (("someone/set", "main"), "rest", {})]
    result = json.loads((tmp_path / "out" / RESULT_FILE).read_text())
    assert (result["examples"], result["held_out_examples"]) == (6, 1)
    assert result["tokens"] == sum(2 * len(pair["completion"]) + 2 for pair in PAIRS)
    [answer] = (tmp_path / "out" / ANSWERS_FILE).read_text().splitlines()
    assert json.loads(answer) | {"answer": ""} == splits["rest"][0] | {"answer": ""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.csv", b"prompt,completion\na,b,c\n", "data.csv, line 2: the line has not as many fields"),
        ("data.csv", b"prompt,completion\na\n", "data.csv, line 2: the line has not as many fields"),
        ("data.csv", b'prompt,completion\n"a"x,b\n', "data.csv, line 2: not valid CSV"),
        ("data.csv", b"prompt,completion\na,\n", 'data.csv, line 2: "completion" is empty'),
        ("data.csv", b"a,b\n1,2\n", 'data.csv, line 2: the keys are "a", "b"; wanted is one of'),
        ("data.csv", b"prompt,completion\n", "data.csv is empty"),
        ("data.csv", b"\xff\xfe", "data.csv is not UTF-8 text"),
        ("data.json", b"[1, 2", "data.json: not valid JSON"),
        ("data.json", b"[1]", "data.json, record 1: a line is a JSON object, not int"),
        ("data.json", b"[]", "data.json is empty"),
        ("data.json", b'[{"question": "a", "answer": null}]', 'data.json, record 1: "answer" has no value'),
        ("data.json", b'[{"conversations": [{"from": "gpt"}]}]', 'every message has a "from" and a "value"'),
        ("data.json", b'[{"conversations": 3}]', '"conversations" is a list of objects'),
        (
            "data.json",
            b'[{"conversations": [{"from": "human", "value": "a"}]}]',
            'no message has the role "assistant"',
        ),
        ("data.parquet", b"PAR1", "data.parquet cannot be read"),
    ],
)
def test_bad_tables_are_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    error = refusal(capsys, "--model", "nobody/nothing", "--data", tmp_path / name, "--out", tmp_path / "out")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_sources_that_are_none_are_refused(pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.xml").write_text("<data/>")

    def error(source, *options):
        return refusal(
            capsys, "--model", "nobody/nothing", "--data", source, "--out", tmp_path / "out", *options
        )

    for name in ("nobody/nothing", "nobody/nothing:main", "nothing"):
        assert f"{name} is no file or folder, and no data set that can be loaded: " in error(name)
    assert "no/such/data does not exist or is not a file" in error("no/such/data")
    for folder in ("empty", "other"):
        assert f"{folder} holds no data file, whose name would end in .jsonl" in error(folder)
    assert "pairs.jsonl is a file: a split, such as test, is of a folder" in error(
        pairs, "--data-split", "test"
    )
    assert "pairs.jsonl is a file: a split, such as test, is of a folder" in error(
        pairs, "--eval-split", "test"
    )
    assert "--data-type is one of prompt, alpaca, question" in error(pairs, "--data-type", "poem")
    assert not (tmp_path / "out").exists()


def test_a_missing_library_is_named(tmp_path, capsys, monkeypatch):
    path = write_table(tmp_path / "data.parquet", PAIRS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in (path, tmp_path, "nobody/nothing"):
        error = refusal(capsys, "--model", "nobody/nothing", "--data", source, "--out", tmp_path / "out")
        assert f"{source}: reading it takes the library datasets: pip install datasets." in error


# ---- chat templates -----------------------------------------------------------------------------------------


def learned(example, tokenizer):
    return tokenizer.decode([label for label in example.labels if label != data.IGNORED])


@pytest.mark.parametrize("name", data.CHAT_TEMPLATES)
def test_named_templates_teach_what_the_assistant_says(tokenizer, monkeypatch, name):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    data.use_chat_template(tokenizer, name)
    [marked] = data.encode([{"messages": MESSAGES}], tokenizer, 512)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
    assert learned(marked, tokenizer) == f"4{end}6{end}"
    [whole] = data.encode([{"messages": MESSAGES}], tokenizer, 512, train_on_inputs=True)
    assert whole.labels == whole.input_ids == marked.input_ids
    # Without marks, what each turn adds is found out.
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        data.GENERATION.sub("", tokenizer.chat_template).replace("{% endgeneration %}", ""),
    )
    [found] = data.encode([{"messages": MESSAGES}], tokenizer, 512)
    assert found.input_ids == marked.input_ids
    assert learned(found, tokenizer).replace("\n", "") == f"4{end}6{end}"
    assert len(data.encode([{"messages": MESSAGES}], tokenizer, 200)[0].input_ids) == min(
        200, len(whole.input_ids)
    )


def test_a_template_file_is_used_and_kept(model_folder, tmp_path):
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": MESSAGES}] * 4)
    template = tmp_path / "chat.jinja"
    template.write_text(data.CHAT_TEMPLATES["chatml"].replace("im_", "turn_"))
    options = dict(model=str(model_folder), data=chats, out=tmp_path / "out", max_steps=1)
    train(TrainSettings(**options, chat_template=str(template), train_on_inputs=True))
    assert "turn_start" in (tmp_path / "out" / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nothing", "--chat-template nothing is neither a file nor one of chatml, llama3."),
        ("broken.jinja", "--chat-template broken.jinja is not a Jinja template: "),
        ("binary.jinja", "--chat-template binary.jinja is not a Jinja template: "),
        ("picky.jinja", "the chat template fails on a conversation: no systems here."),
        (
            None,
            'the model\'s tokenizer has no chat template, which {"messages"} data needs: pass --chat-template.',
        ),
    ],
)
def test_bad_templates_are_refused(model_folder, tmp_path, capsys, monkeypatch, template, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    (tmp_path / "picky.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no systems here') }}{% endif %}"
    )
    chats = write_lines(tmp_path / "chats.jsonl", [{"messages": MESSAGES}] * 4)
    given_template = ("--chat-template", template) if template else ()
    assert message in refusal(
        capsys, "--model", model_folder, "--data", chats, "--out", "out", *given_template
    )
    assert not (tmp_path / "out").exists()


def test_loss_on_prompts_too(tokenizer):
    pair = {"prompt": "two and two: ", "completion": "four"}
    [example] = data.encode([pair], tokenizer, 64, train_on_inputs=True)
    assert learned(example, tokenizer) == "two and two: four" + tokenizer.eos_token


# ---- packing ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(2, 16)))
def test_rows_hold_each_example_once(lengths):
    examples = [data.Example([number] * length, [number] * length) for number, length in enumerate(lengths)]
    rows = packing.rows_of(examples, 16)
    assert sorted(example.input_ids[0] for row in rows for example in row) == list(range(len(examples)))
    assert all(sum(len(example.input_ids) for example in row) <= 16 for row in rows)
    rooms = [16 - sum(len(example.input_ids) for example in row) for row in rows]
    for number, row in enumerate(rows):  # no row was begun while there was room
        assert all(room < len(row[0].input_ids) for room in rooms[:number])
    assert packing.rows_of(examples, 16) == rows


def test_rows_are_best_fit_decreasing():
    examples = [data.Example([0] * length, [0] * length) for length in (4, 3, 6, 7, 5, 4, 2)]
    rows = packing.rows_of(examples, 10)
    assert [[len(example.input_ids) for example in row] for row in rows] == [[7, 3], [6, 4], [5, 4], [2]]


def some_examples():
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length, prompt in ((9, 4), (5, 1), (7, 0), (3, 2), (11, 6)):
        ids = torch.randint(256, (length,), generator=generator).tolist()
        examples.append(data.Example(ids, [data.IGNORED] * prompt + ids[prompt:]))
    return examples


def summed_loss(model, batch):
    """The loss of all learned tokens, and how many they are."""
    count = int((batch["labels"][:, 1:] != data.IGNORED).sum())
    return model(**packing.model_inputs(batch), use_cache=False).loss * count, count


def gradients(model, batches):
    model.zero_grad()
    losses, counts = zip(*(summed_loss(model, batch) for batch in batches))
    sum(losses).backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return sum(losses).detach(), sum(counts), found


@pytest.mark.parametrize(
    ("kind", "method", "attention"),
    [
        ("llama", "lora", "sdpa"),
        ("llama", "lora", "eager"),
        ("llama", "qlora", "sdpa"),
        ("llama", "bottleneck", "sdpa"),
        ("llama", "mixture", "sdpa"),
        ("llama", "full", "sdpa"),
        ("qwen3", "lora", "sdpa"),
        ("olmoe", "lora", "sdpa"),
        ("olmoe", "qlora", "eager"),
        ("gpt2", "lora", "sdpa"),
        ("gpt2", "lora", "eager"),
        *(
            (kind, method, "sdpa")
            for kind in ("llama", "qwen3", "gpt2")
            for method in ("prefix", "prompt", "p-tuning")
        ),
        ("olmoe", "prefix", "eager"),
    ],
)
def test_packed_examples_are_as_each_alone(tmp_path, kind, method, attention):
    options = {"router_aux_loss_coef": 0} if method == "mixture" else {}
    told = TrainSettings(
        model="m", data=tmp_path, out=tmp_path, method=method, sample_packing=True, **options
    )
    build(kind).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "float32", True, methods.four_bit_config(told))
    model.set_attn_implementation(attention)
    with peftfast.enabled():
        adapted = methods.adapt(model, told, [])
        model = adapted.model.train()
        for weight in model.parameters():
            if weight.requires_grad and method != "full":
                torch.nn.init.normal_(weight, std=0.2)
        stack = packing.Stack(257, flat=adapted.experts is not None or method == "mixture")
        packing.check(model, told, stack, "cpu")
        examples = some_examples()
        rows = [packing.join(row) for row in packing.rows_of(examples, 16)]
        assert [len(row["input_ids"]) for row in rows] == [16, 16, 3]
        packed_loss, packed_count, packed = gradients(model, [stack(rows)])
        tensors = [  # a prompt would predict the first token too, of one example to a row alone
            {name: torch.tensor([packing.join([example])[name]]) for name in ("input_ids", "labels")}
            for example in examples
        ]
        loss, count, alone = gradients(model, tensors)
    assert packed_count == count
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    assert packed.keys() == alone.keys()
    assert any(gradient.norm() > 0 for gradient in alone.values())
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_batches_count_tokens_without_padding():
    rows = [packing.join(row) for row in packing.rows_of(some_examples(), 16)]
    padded, flat = packing.Stack(257, flat=False)(rows), packing.Stack(257, flat=True)(rows)
    assert padded["input_ids"].shape == (3, 16)
    assert flat["input_ids"].shape == (1, 35)
    assert padded["attention_mask"].sum() == flat["attention_mask"].sum() == 35
    assert padded["position_ids"][2].tolist() == [0, 1, 2] + 13 * [0]
    assert (padded["labels"] != data.IGNORED).sum() == (flat["labels"] != data.IGNORED).sum() == 21
    assert (padded["labels"][2, 3:] == data.IGNORED).all()
    assert "attention_mask" not in packing.model_inputs(padded)


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_packed_runs_count_and_evaluate_as_others(tmp_path, tokenizer, kind):
    """An epoch of the same examples: as many tokens, and the same loss of the untrained model."""
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    model = save(kind, tmp_path / "model", tokenizer)
    options = dict(
        model=str(model), data=pairs, eval_file=pairs, epochs=1, sequence_len=16, micro_batch_size=2
    )
    plain = train(TrainSettings(**options, out=tmp_path / "plain"))
    packed = train(TrainSettings(**options, out=tmp_path / "packed", sample_packing=True))
    assert packed.tokens == plain.tokens == sum(2 * len(pair["completion"]) + 2 for pair in PAIRS)
    assert packed.steps < plain.steps == 3
    assert packed.examples == packed.held_out_examples == 6
    assert packed.before.loss == pytest.approx(plain.before.loss, rel=1e-5)
    assert packed.before.exact_match == plain.before.exact_match
    if kind == "olmoe":
        counts = [sum(layer["tokens"]) for layer in packed.expert_load.values()]
        assert counts == [sum(layer["tokens"]) for layer in plain.expert_load.values()]


def test_models_in_which_examples_would_see_each_other_are_refused(tmp_path, tokenizer, capsys):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    for kind, options in {"bloom": (), "llama": ("--method", "prompt", "--backend", "peft")}.items():
        folder = save(kind, tmp_path / kind, tokenizer)
        capsys.readouterr()
        error = refusal(
            capsys,
            "--model",
            folder,
            "--data",
            pairs,
            "--out",
            tmp_path / "out",
            "--sample-packing",
            *options,
        )
        assert f"a {kind} lets examples of a row see each other." in error
        assert error.startswith("peftfast: --sample-packing: with --method ")
        assert not (tmp_path / "out").exists()


def test_blocks_are_not_packed(tmp_path, capsys):
    options = ("--objective", "pretrain", "--sample-packing")
    error = refusal(capsys, "--model", "m", "--data", "d", "--out", tmp_path / "out", *options)
    assert "--sample-packing goes with --objective fine-tune: pretrain fills its blocks itself." in error
