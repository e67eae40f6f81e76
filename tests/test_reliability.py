"""Long runs, threads, and files that are not what they say: no growth, no crosstalk, one clear sentence.

The fuzzing takes more examples with `pytest tests/test_reliability.py -k corrupt --hypothesis-profile fuzz`.
"""

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import hypothesis.strategies as st
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast.cli.config_file import read_config
from peftfast.cli.errors import UserError
from peftfast.cli.merge import merge
from peftfast.cli.model import load_config, load_model
from peftfast.cli.plan import PlanSettings, plan
from peftfast.cli.records import read_records
from peftfast.integrations.conversion import convert
from peftfast.nn import quantize_linears

VOCABULARY = 64


def adapted_llama(seed, fourbit=False, dropout=0.1):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if fourbit:
        quantize_linears(model)
    adapters = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return get_peft_model(model, adapters).train()


def trained(model, steps, seed=0, after_step=lambda step: None):
    """The losses of so many steps on random tokens."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, generator, losses = torch.optim.AdamW(weights, 1e-3), torch.Generator().manual_seed(seed), []
    for step in range(steps):
        tokens = torch.randint(VOCABULARY, (2, 16), generator=generator)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after_step(step)
    return losses


# ---- long runs and threads ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fourbit", [False, True], ids=["dense", "4-bit"])
def test_two_thousand_steps_take_no_more_memory_than_two_hundred(fourbit):
    resident, process = {}, psutil.Process()

    def look(step):
        if step in (199, 1999):
            resident[step] = process.memory_info().rss

    with peftfast.enabled(strict=True):
        losses = trained(adapted_llama(0, fourbit), 2000, after_step=look)
    assert losses[-1] < losses[0]
    # What a step allocates is about 100 KB: one in a hundred that stays would be 2 MB.
    assert resident[1999] - resident[199] < 2 * 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory otherwise")
def test_freed_memory_goes_back():
    """Large blocks between small ones that stay, as activations lie between gradients."""
    script = """
import psutil, torch
from peftfast.cli.model import return_freed_memory
return_freed_memory()
torch.ones(2**21)  # glibc keeps what is no larger than the largest block that it saw freed
before, kept = psutil.Process().memory_info().rss, []
for _ in range(60):
    large = torch.ones(2**20)
    kept.append((large, torch.ones(2**14)))
kept = [small for large, small in kept]
del large
print(psutil.Process().memory_info().rss - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )
    assert int(ran.stdout) < 40 * 2**20  # of the 240 MiB


@pytest.mark.parametrize("strided", [False, True])
def test_out_of_memory_is_said_to_be_that(strided):
    gate = torch.zeros(1, 8).expand(2**46, 8)[:, :: 2 if strided else 1]
    with pytest.raises(RuntimeError, match="Out of memory. peftfast tried to allocate"):
        peftfast.ops.swiglu(gate, gate)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_a_dense_checkpoint_is_let_go_of_once_it_is_quantized(adapter):
    """Else its pages are memory of the process, beside the same weights in 4 bits."""

    def is_mapped():
        return str(adapter.parent / "base/model.safetensors") in Path("/proc/self/maps").read_text()

    dense = load_model(str(adapter.parent / "base"), "float32", True)
    assert is_mapped()  # so that the test can fail
    del dense
    model = load_model(str(adapter.parent / "base"), "float32", True, peftfast.FourBitConfig())
    assert peftfast.report(model).fourbit and not is_mapped()


def test_two_models_train_in_two_threads_as_each_does_alone():
    """Without dropout, whose seeds come from torch's one generator of the process."""

    def losses_of(seed):
        return trained(models[seed], 30, seed)

    with peftfast.enabled(strict=True):
        models = {seed: adapted_llama(seed, fourbit=seed == 1, dropout=0.0) for seed in (0, 1)}
        alone = {seed: losses_of(seed) for seed in models}
        models = {seed: adapted_llama(seed, fourbit=seed == 1, dropout=0.0) for seed in (0, 1)}
        together, start = {}, threading.Barrier(2)

        def run(seed):
            start.wait()
            together[seed] = losses_of(seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert together == alone


# ---- corrupt files ------------------------------------------------------------------------------------------

corrupt = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=max(30, settings().max_examples // 4),
)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
keys = st.sampled_from(["prompt", "completion", "messages", "text", "role", "content", "other"])
lines = st.dictionaries(
    keys, anything | st.lists(st.dictionaries(keys, anything, max_size=3), max_size=3), max_size=3
)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter beside its base, and the base in 4 bits."""
    folder = tmp_path_factory.mktemp("models")
    model = adapted_llama(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=peftfast.FourBitConfig()
    )
    quantized.save_pretrained(folder / "fourbit")
    return folder / "adapter"


def copied(folder: Path, tmp_path: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(tmp_path / folder.name, ignore_errors=True)
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def mutated(draw, content: bytes, start: int, stop: int) -> bytes:
    """The content with bytes of [start, stop) overwritten, and perhaps cut or longer."""
    content = bytearray(content)
    for place, value in draw(
        st.lists(st.tuples(st.integers(start, stop - 1), st.integers(0, 255)), max_size=8)
    ):
        content[place] = value
    length = draw(st.just(len(content)) | st.integers(0, len(content)))
    return bytes(content[:length]) + draw(st.just(b"") | st.binary(max_size=8))


def refused_or_done(call, *arguments):
    """Anything but a sentence, or success, is a fault of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call(*arguments)
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
    return None


@corrupt
@given(content=st.binary(max_size=200) | st.lists(lines, max_size=4).map(
    lambda records: "\n".join(map(json.dumps, records)).encode()
))  # fmt: skip
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_corrupt_data(tmp_path, suffix, content):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    records = refused_or_done(read_records, path)
    if records is not None:
        assert records and all(isinstance(record, dict) for record in records)


@corrupt
@given(
    told=st.dictionaries(
        st.sampled_from(["base_model", "datasets", "adapter", "lora_r", "load_in_4bit", "bf16", "other"]),
        anything,
    ),
    text=st.text(max_size=20),
)
def test_corrupt_settings_files(tmp_path, told, text):
    path = tmp_path / "config.yaml"
    for content in (json.dumps(told), text, json.dumps(told) + text):
        path.write_text(content, encoding="utf-8")
        refused_or_done(read_config, path)


@corrupt
@given(draw=st.data())
@pytest.mark.parametrize("name", ["base", "adapter"])
def test_corrupt_configurations(adapter, tmp_path, name, draw):
    folder = copied(adapter.parent / name, tmp_path)
    path = folder / ("config.json" if name == "base" else "adapter_config.json")
    config = json.loads(path.read_text())
    changed = draw.draw(st.dictionaries(st.sampled_from(sorted(config)), anything, min_size=1, max_size=2))
    text = json.dumps(config | changed)
    if draw.draw(st.booleans()):
        text = mutated(draw.draw, text.encode(), 0, len(text)).decode("utf-8", errors="replace")
    path.write_text(text)
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    if name == "base":
        refused_or_done(load_config, str(folder))
        layers = (config | changed).get("num_hidden_layers")
        if not isinstance(layers, int) or layers <= 8:  # each of more would be made
            refused_or_done(plan, PlanSettings(str(folder), sequence_len=16))
    else:
        refused_or_done(merge, folder, out, str(adapter.parent / "base"))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def header_end(content: bytes) -> int:
    """Of a safetensors file: eight bytes of length, and the JSON."""
    return 8 + struct.unpack("<Q", content[:8])[0]


@corrupt
@given(draw=st.data())
@pytest.mark.parametrize("name", ["base", "fourbit"])
def test_corrupt_headers_of_weights(adapter, tmp_path, name, draw):
    folder = copied(adapter.parent / name, tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(mutated(draw.draw, content, 0, header_end(content)))
    four_bit = peftfast.FourBitConfig() if name == "fourbit" else None
    refused_or_done(load_model, str(folder), "float32", True, four_bit)


@corrupt
@given(draw=st.data())
def test_corrupt_headers_of_adapters(adapter, tmp_path, draw):
    folder = copied(adapter, tmp_path)
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(mutated(draw.draw, content, 0, header_end(content)))
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    refused_or_done(merge, folder, out)
    # The converter's errors are of the library, not of the command line.
    try:
        convert(folder, tmp_path / "converted", "per-expert", "olmoe", 4, True)
    except (ValueError, OSError, SafetensorError) as error:
        assert str(error).strip()
