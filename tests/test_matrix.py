"""Every method on every base in every mode of training: computes the table of README.md, and holds README to it.

    python tests/test_matrix.py --write      # puts the table, computed anew, between README's marks

A cell is a training that was done: a tiny model, under peftfast.enabled(), takes a step plainly and one in the cell's
mode, whose gradients have to be the same, and then trains in that mode until its loss has fallen. Where that cannot
be, the cell refers to what the software itself says.
"""

import argparse
import copy
import functools
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import generator, on_a_gpu
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence

import peftfast
from peftfast.testing import relative_error

README = Path(__file__).parent.parent / "README.md"
MARKS = "<!-- methods -->\n", "<!-- /methods -->\n"

SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
ARCHITECTURES = {
    "llama": functools.partial(transformers.LlamaConfig, **SHAPE),
    "qwen3": functools.partial(transformers.Qwen3Config, head_dim=8, **SHAPE),
    "olmoe": functools.partial(transformers.OlmoeConfig, **SHAPE, **EXPERTS),
    "qwen3 moe": functools.partial(
        transformers.Qwen3MoeConfig, head_dim=8, moe_intermediate_size=24, **SHAPE, **EXPERTS
    ),
}
BASES = {  # architectures, and whether in 4 bits
    "dense": (("llama", "qwen3"), False),
    "4-bit": (("llama", "qwen3"), True),
    "MoE": (("olmoe", "qwen3 moe"), False),
    "4-bit MoE": (("olmoe", "qwen3 moe"), True),
}
PROJECTIONS = ["experts.gate_up_proj", "experts.down_proj"]
VIRTUAL = dict(num_virtual_tokens=4)
METHODS = {
    "LoRA": functools.partial(LoraConfig, r=4, target_modules=["q_proj", "v_proj", "o_proj"]),
    "DoRA": functools.partial(LoraConfig, r=4, target_modules=["q_proj"], use_dora=True),
    "mixture of LoRAs": functools.partial(
        peftfast.MixtureLoraConfig, r=4, num_experts=4, target_modules=["q_proj"]
    ),
    "LoRA on chosen experts": functools.partial(
        peftfast.ExpertLoraConfig, r=4, experts={"model.layers.0.mlp.experts": [0, 2]}, target_modules=["q_proj"]
    ),
    "`target_parameters`": functools.partial(
        LoraConfig, r=4, target_modules=[], target_parameters=PROJECTIONS
    ),
    "bottleneck adapters": functools.partial(peftfast.BottleneckConfig, bottleneck_size=8),
    "prefix tuning": functools.partial(PrefixTuningConfig, **VIRTUAL),
    "prompt tuning": functools.partial(PromptTuningConfig, **VIRTUAL),
    "p-tuning": functools.partial(PromptEncoderConfig, encoder_hidden_size=16, **VIRTUAL),
}  # fmt: skip
MODES = ("checkpointed", "checkpointed, reentrant", "packed", "compiled")
TOLERANCE = 2e-5  # of a gradient in float32, relative; sums in another order


@functools.cache
def base_model(architecture, fourbit, layers):
    """Frozen, with random weights."""
    torch.manual_seed(0)
    config = ARCHITECTURES[architecture](num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    if not fourbit:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=peftfast.FourBitConfig(), dtype=torch.float32
        )


def adapted(method, base):
    """A model with the method's parameters, none of them zero."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), METHODS[method](task_type="CAUSAL_LM")).train()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


LENGTHS = (7, 5, 9)


def documents():
    drawn = generator(2)
    return [torch.randint(3, SHAPE["vocab_size"], (length,), generator=drawn) for length in LENGTHS]


def separate():
    """The documents as samples of a padded batch. What begins one is no target."""
    ids = pad_sequence(documents(), batch_first=True)
    mask = pad_sequence([torch.ones_like(document) for document in documents()], batch_first=True)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def packed():
    """The documents in one row. With a cache, transformers does not tell them apart."""
    ids = torch.cat(documents())[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    labels = ids.masked_fill(positions == 0, -100)
    return dict(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)


def step(model, batch):
    """The loss, and the gradient of everything that is trained."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {
        name.replace("_orig_mod.", ""): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def train(model, batch, steps=4):
    """The loss before each step."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        losses.append(step(model, batch)[0])
        optimizer.step()
    return losses


def runs_of_first_block(model, batch):
    """How often a step runs the model's first attention block."""
    runs = []
    block = next(module for name, module in model.named_modules() if name.endswith("layers.0.self_attn"))
    hook = block.register_forward_pre_hook(lambda *_: runs.append(1))
    step(model, batch)
    hook.remove()
    return len(runs)


def try_mode(mode, model, backend=None):
    """What a cell says of a model and a mode: "✓", what came with it, or why it cannot be.

    Args:
        backend: of torch.compile.
    Raises:
        AssertionError: the mode trains, but not as the model does without it.
    """
    batch = separate()
    expected_loss, expected = step(model, batch)
    twin = run = copy.deepcopy(model)
    mark = "✓"
    if mode == "packed":
        batch = packed()
    elif mode == "compiled":
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        run = torch.compile(twin, backend=backend, dynamic=False)
    else:
        twin.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": "reentrant" in mode}
        )
        twin.enable_input_require_grads()
    try:
        loss, gradients = step(run, batch)
    except (ValueError, RuntimeError) as error:
        return sentence(error)
    if mode == "compiled":
        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
        if counters["graph_break"] or counters["stats"]["unique_graphs"] > 1:
            mark = "✓ with graph breaks"
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradients[name].isfinite().all() and gradient.any(), name
        assert relative_error(gradients[name], gradient) < TOLERANCE, name
    losses = train(run, batch)
    assert losses[-1] < losses[0], losses
    if "checkpointed" in mode:
        assert runs_of_first_block(twin, batch) > runs_of_first_block(model, batch)
    return mark


def sentence(error):
    """The first one of a message."""
    return re.split(r"(?<=\.) ", " ".join(str(error).split()))[0].rstrip(".") + "."


def path_of(model):
    """Whether all that the method adapts runs on the fast path; if not, what the report says."""
    step(model, separate())
    reasons = sorted({f"{layer.kind}: {layer.reason}." for layer in peftfast.report(model) if not layer.fast})
    return reasons[0] if reasons else "fused"


@functools.cache
def cells(method, base):
    """Which path the method runs on this base, and its cell for each mode; or one sentence that says why not."""
    architectures, fourbit = BASES[base]
    found = []
    with peftfast.enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for architecture in architectures:
            try:
                model = adapted(method, base_model(architecture, fourbit, layers=2))
            except ValueError as error:
                found.append(sentence(error))
                continue
            found.append((path_of(model), *(try_mode(mode, model) for mode in MODES[:-1])))
        assert len(set(found)) == 1, f"architectures differ: {found}"
        if isinstance(found[0], str):
            return found[0]
        # Compiling takes seconds: one architecture, one layer; and dense bases alone have their backward traced too.
        model = adapted(method, base_model(architectures[0], fourbit, layers=1))
        return *found[0], try_mode(MODES[-1], model, "eager" if fourbit else "aot_eager")


def table():
    """The lines of README between its marks."""
    notes = {}

    def cell(text):
        if text.startswith("✓") or text == "fused":
            return text
        number = notes.setdefault(text, len(notes) + 1)
        return f"[{number}]"

    lines = [f"| method | base | path | {' | '.join(MODES)} |\n", "|---" * (3 + len(MODES)) + "|\n"]
    for method in METHODS:
        alike = {}
        for base in BASES:
            alike.setdefault(cells(method, base), []).append(base)
        for row, bases in alike.items():
            on = "all" if len(bases) == len(BASES) else ", ".join(bases)
            if isinstance(row, str):
                row = (f"not possible {cell(row)}", *["–"] * len(MODES))
            else:
                path, *rest = row
                path = path if path == "fused" else f"PEFT's own code {cell(path)}"
                row = (path, *map(cell, rest))
            lines.append(f"| {method} | {on} | {' | '.join(row)} |\n")
    lines.append("\n")
    lines += [f"[{number}] {text}  \n" for text, number in notes.items()]
    return "".join(lines)


def parts_of_readme():
    """What is before the table, the table, and what comes after it."""
    text = README.read_text()
    before, begin, rest = text.partition(MARKS[0])
    found, end, after = rest.partition(MARKS[1])
    assert begin and end, f"README.md has no marks {MARKS}"
    return before + begin, found, end + after


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_training(method, base):
    assert cells(method, base)


@pytest.mark.skipif(on_a_gpu(), reason="the table is of the CPU, which has kernels that a GPU lacks")
def test_readme_has_this_table():
    _, found, _ = parts_of_readme()
    assert found == table(), "README.md is not up to date: run python tests/test_matrix.py --write"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into README.md; without, the table is printed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = table()
    if options.write:
        before, _, after = parts_of_readme()
        README.write_text(before + found + after)
    else:
        print(found, end="")


if __name__ == "__main__":
    main()
