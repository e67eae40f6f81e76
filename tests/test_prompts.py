"""Prefix tuning, prompt tuning and p-tuning with peftfast against stock PEFT, and where PEFT does not go."""

import copy
import functools
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftfast
from peftfast.nn import Linear4bit, quantize_linears
from peftfast.testing import assert_as_accurate, relative_error

FP32, BF16 = torch.float32, torch.bfloat16
VIRTUAL, WINDOW = 7, 9
DECODER = dict(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
GPT2 = dict(vocab_size=61, n_embd=36, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
CONFIGS = {
    "llama": transformers.LlamaConfig(**DECODER),
    "mistral": transformers.MistralConfig(**DECODER, sliding_window=WINDOW),
    "qwen3": transformers.Qwen3Config(
        **DECODER, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **DECODER,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=10,
    ),
    "gpt2": transformers.GPT2Config(**GPT2, **NO_DROPOUT),
}
METHODS = {
    "prefix": PrefixTuningConfig,
    "projected prefix": functools.partial(PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=20),
    "prompt": PromptTuningConfig,
    "p-tuning": functools.partial(PromptEncoderConfig, encoder_hidden_size=20),
    "p-tuning lstm": functools.partial(
        PromptEncoderConfig,
        encoder_hidden_size=20,
        encoder_reparameterization_type="LSTM",
        encoder_dropout=0.0,
    ),
}
architectures = pytest.mark.parametrize("architecture", CONFIGS)
methods = pytest.mark.parametrize("method", METHODS)
main_methods = pytest.mark.parametrize("method", ["prefix", "prompt"])
reentrant = pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
implementations = pytest.mark.parametrize("attention", ["eager", "sdpa"])
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def one_thread(nothing_leaks):
    torch.set_num_threads(1)


def base_model(architecture="llama", dtype=FP32, auto=transformers.AutoModelForCausalLM, **options):
    config = copy.deepcopy(CONFIGS[architecture]) if isinstance(architecture, str) else architecture
    model = auto.from_config(config, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def tuned(base, method="prefix", virtual=VIRTUAL, task_type="CAUSAL_LM"):
    """A model with a method of prompts, whose parameters are random and of a size that matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, METHODS[method](task_type=task_type, num_virtual_tokens=virtual))
    with torch.no_grad():
        for name, parameter in model.prompt_encoder.named_parameters():
            parameter.normal_(std=0.7 if "embedding" in name else 0.3)
    return model.train()


def inputs(samples=3, length=11, padded=False, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = dict(input_ids=torch.randint(3, 61, (samples, length), generator=generator))
    batch["labels"] = batch["input_ids"].clone()
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, :4] = 0
        batch["labels"][1, :4] = -100
    return batch


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def step(model, batch):
    """The outputs and the gradients of one pass."""
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs, gradients(model)


def as_peft(run):
    """What PEFT gives by itself, where this version of it runs with this version of transformers."""
    try:
        return run()
    except (IndexError, ValueError) as error:
        pytest.skip(f"PEFT {peft.__version__} with transformers {transformers.__version__}: {error}")


def on(model, batch, torchs_attention=None):
    """A pass in which nothing falls back but, for the reason given, attention."""
    with peftfast.enabled(strict=torchs_attention is None):
        results = step(model, batch)
        report = peftfast.report(model)
    assert all(layer.fast for layer in report)
    assert torchs_attention is None or {layer.reason for layer in report.attention} == {torchs_attention}
    return results


def assert_same(ours, theirs, tolerance=2e-6):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, f"{name} is not trained: nothing is compared"
        assert relative_error(ours[name], gradient) < tolerance, name


def seen(model, batch):
    """The shapes of what the first layer is given, in the order in which it runs."""
    shapes = []
    layers = next(module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    hook = layers[0].register_forward_pre_hook(lambda layer, args: shapes.append(tuple(args[0].shape[:2])))
    try:
        model(**batch)
    finally:
        hook.remove()
    return shapes


# ---- where PEFT runs: the same --------------------------------------------------------------------------


@architectures
@methods
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_outputs_and_gradients_are_peft_s(architecture, method, dtype):
    """Of ten models together: in one alone, the ratio of two errors is luck."""
    passes = {"peftfast": ([], []), "PEFT": ([], []), "oracle": ([], [])}
    for seed in range(10):
        torch.manual_seed(seed)
        model = tuned(base_model(architecture, dtype), method)
        batch = inputs(seed=seed, padded=seed % 2 == 0)
        results = {"oracle": step(copy.deepcopy(model).double(), batch), "PEFT": step(model, batch)}
        results["peftfast"] = on(model, batch)
        (exact, exact_gradients), (theirs, _), (ours, _) = results.values()
        assert ours.logits.shape == theirs.logits.shape and ours.logits.dtype == theirs.logits.dtype
        assert ours.loss.dtype == theirs.loss.dtype
        assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
        assert relative_error(ours.loss, exact.loss) < (1e-6 if dtype == FP32 else 2e-2)
        for name, (outputs, gradients) in results.items():
            passes[name][0].append(outputs.logits.double().flatten())
            passes[name][1].extend(
                gradient.double().flatten() / exact_gradients[parameter].norm()
                for parameter, gradient in gradients.items()
            )
    ours, theirs, exact = ([torch.cat(parts) for parts in passes[name]] for name in passes)
    # transformers' loss computes in fp32, in the oracle too.
    slack = 2e-7 if dtype == FP32 else 1e-3
    assert_as_accurate(ours[0], theirs[0], exact[0], name="logits")
    assert_as_accurate(ours[1], theirs[1], exact[1], slack=slack, name="gradients")


@architectures
@main_methods
def test_without_labels_and_in_eval_mode(architecture, method):
    model = tuned(base_model(architecture), method).eval()
    batch = inputs(padded=True)
    del batch["labels"]
    theirs = model(**batch)
    with peftfast.enabled(strict=True):
        ours = model(**batch)
        as_tuple = model(**batch, return_dict=False)
        uncached = model(**batch, use_cache=False)
    assert ours.loss is None and relative_error(ours.logits, theirs.logits) < 1e-6
    assert torch.equal(as_tuple[0], ours.logits) and len(as_tuple) == 2
    assert torch.equal(uncached.logits, ours.logits)
    if method == "prompt":
        assert uncached.past_key_values is None
    for mine, yours in zip(ours.past_key_values.layers, theirs.past_key_values.layers):
        if mine.keys.shape == yours.keys.shape:  # PEFT's keep what is in the sliding window
            assert relative_error(mine.keys, yours.keys) < 1e-6


@main_methods
@reentrant
def test_autocast(method, use_reentrant):
    model = tuned(base_model(), method)
    with torch.autocast("cpu", BF16):
        theirs, expected = step(model, inputs(padded=True))
        ours, gradients = on(model, inputs(padded=True))
        again, gradients_again = on(checkpointed(copy.deepcopy(model), use_reentrant), inputs(padded=True))
    assert ours.logits.dtype == theirs.logits.dtype
    assert relative_error(ours.logits, theirs.logits) < 2e-2
    assert_same(gradients, expected, 5e-2)
    assert relative_error(again.loss, ours.loss) < 1e-6
    assert_same(gradients_again, gradients)


@methods
def test_what_trained_for_five_steps(method):
    model = tuned(base_model(), method)
    batches = [inputs(seed=seed, padded=seed % 2 == 0) for seed in range(5)]

    def train(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        losses = []
        for batch in batches:
            loss, _ = step(model, batch)
            losses.append(loss.loss.item())
            optimizer.step()
        return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    expected, theirs = train(copy.deepcopy(model))
    with peftfast.enabled(strict=True):
        losses, ours = train(copy.deepcopy(model))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert any(not torch.equal(theirs[name], before[name]) for name in theirs)
    assert_same(ours, theirs, 1e-5)


@pytest.mark.parametrize("method", ["prompt", "p-tuning"])
def test_prompts_run_once_for_the_batch(method):
    model = tuned(base_model(), method)
    batch = inputs(4, 10)
    assert seen(model, batch) == [(4, VIRTUAL + 10)]
    with peftfast.enabled(strict=True):
        assert seen(model, batch) == [(1, VIRTUAL - 1), (4, 1 + 10)]


@pytest.mark.parametrize(
    "case", ["one sample", "one virtual token", "hidden states", "dropout", "it does not pay"]
)
def test_prompts_run_with_every_sample_where_they_have_to(case):
    config = copy.deepcopy(CONFIGS["llama"])
    config.attention_dropout = 0.1 if case == "dropout" else 0.0
    virtual = 1 if case == "one virtual token" else VIRTUAL
    attention = "eager" if case == "it does not pay" else "sdpa"
    model = tuned(base_model(config, attn_implementation=attention), "prompt", virtual)
    batch = inputs(
        samples=1 if case == "one sample" else 3,
        length=57 if case == "it does not pay" else 11,
    )
    if case == "hidden states":
        batch["output_hidden_states"] = True
    torch.manual_seed(3)
    theirs, expected = step(model, batch)
    torch.manual_seed(3)
    ours, gradients = on(model, batch, "it drops scores out" if case == "dropout" else None)
    with peftfast.enabled(strict=case != "dropout"):
        assert len(seen(model, batch)) == 1
    assert relative_error(ours.logits, theirs.logits) < 1e-6
    assert_same(gradients, expected)
    if case == "hidden states":
        assert [state.shape for state in ours.hidden_states] == [
            state.shape for state in theirs.hidden_states
        ]


class Attentions(TorchDispatchMode):
    """Notes of each attention how many queries and keys it has, and whether it goes without a mask."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args)) | (kwargs or {})
            masked = given.get("attn_mask") is not None
            assert masked != given.get("is_causal", False)
            self.seen.append((args[0].shape[-2], args[1].shape[-2], not masked))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "case", ["prefix", "prompt", "of one's own", "checkpointed", "padded", "longer than the input", "sliding"]
)
def test_attention_to_virtual_tokens_computes_nothing_that_is_hidden(case):
    model = tuned(
        base_model("mistral" if case == "sliding" else "llama"), "prompt" if case == "prompt" else "prefix"
    )
    batch = inputs(length=5 if case == "longer than the input" else 11, padded=case == "padded")
    if case == "of one's own":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    _, expected = step(model, batch)
    if case == "checkpointed":
        model = checkpointed(model, use_reentrant=False)
    with Attentions() as attentions:
        _, gradients = on(model, batch)
    assert_same(gradients, expected)
    alone, tokens = VIRTUAL - (case == "prompt"), batch["input_ids"].shape[1]
    if case in ("padded", "longer than the input", "sliding"):
        assert set(attentions.seen) == {(tokens, VIRTUAL + tokens, False)}
    elif case == "prompt":
        assert set(attentions.seen) == {(alone, alone, True), (VIRTUAL + tokens, VIRTUAL + tokens, True)}
    else:
        assert set(attentions.seen) == {(VIRTUAL + tokens, VIRTUAL + tokens, True)}


def test_layers_that_are_compiled():
    model = tuned(base_model())
    _, expected = step(model, inputs())
    for layer in model.base_model.model.layers:
        layer.compile(backend="aot_eager")
    _, gradients = on(model, inputs())
    assert_same(gradients, expected)


def test_a_prefix_is_projected_once_and_not_copied():
    model = tuned(base_model(), "projected prefix")
    rows = []
    model.prompt_encoder["default"].transform.register_forward_hook(
        lambda module, args, output: rows.append(output.shape[0])
    )
    model(**inputs(4))
    with peftfast.enabled(strict=True):
        model(**inputs(4))
        cache = model.get_prompt(5)
    assert rows == [4, 1, 1]
    assert all(layer.keys.shape[0] == 5 and layer.keys.stride(0) == 0 for layer in cache.layers)


@architectures
@pytest.mark.parametrize(
    "method, options",
    [
        ("prefix", {}),
        ("prefix", dict(num_beams=3)),
        ("prompt", {}),
        ("prompt", dict(num_beams=3)),
        ("prompt", dict(use_cache=False)),
    ],
    ids=str,
)
def test_generation(architecture, method, options):
    model = tuned(base_model(architecture), method).eval()
    batch = inputs(2, 6, padded=True)
    del batch["labels"]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0) | options

    def generate():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.generate(**batch, **options)

    expected = as_peft(generate)
    with peftfast.enabled(strict=True):
        assert torch.equal(generate(), expected)


@methods
def test_saving_and_loading(method, tmp_path):
    base = base_model()
    model = tuned(copy.deepcopy(base), method).eval()
    expected = model(**inputs())
    model.save_pretrained(tmp_path / "theirs")
    with peftfast.enabled(strict=True):
        model.save_pretrained(tmp_path / "ours")
        loaded = PeftModel.from_pretrained(base, tmp_path / "theirs")
        assert relative_error(loaded(**inputs()).logits, expected.logits) < 1e-6
        assert peftfast.report(loaded)[0].fast and type(loaded.peft_config["default"]) is type(
            model.peft_config["default"]
        )
    theirs, ours = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@main_methods
def test_two_adapters_and_none(method):
    model = tuned(base_model(), method).eval()
    model.add_adapter("other", METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=4))
    batch = inputs()
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(**batch).logits
    with model.disable_adapter():
        alone = model(**batch).logits
    del model.forward  # PEFT leaves there the one that it found
    with peftfast.enabled(strict=True):
        for name, logits in expected.items():
            model.set_adapter(name)
            assert relative_error(model(**batch).logits, logits) < 1e-6
        with model.disable_adapter():
            assert relative_error(model(**batch).logits, alone) < 1e-6
        assert peftfast.report(model)[0].fast
        assert relative_error(model(**batch).logits, expected["other"]) < 1e-6


# ---- gradient checkpointing -----------------------------------------------------------------------------


def checkpointed(model, use_reentrant):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant))
    return model


@architectures
@methods
@reentrant
def test_checkpointing(architecture, method, use_reentrant):
    model = tuned(base_model(architecture), method)
    twin = checkpointed(copy.deepcopy(model), use_reentrant)
    calls = []
    mlp = next(module for name, module in twin.named_modules() if name.endswith(".mlp"))
    for batch in (inputs(padded=True), inputs()):
        expected, expected_gradients = on(model, batch)
        hook = mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        outputs, gradients = on(twin, batch)
        hook.remove()
        assert relative_error(outputs.logits, expected.logits) < 1e-6
        assert_same(gradients, expected_gradients)
        cache = outputs.past_key_values
        assert cache is None or (
            "prefix" in method and cache.get_seq_length() == VIRTUAL
        )  # nothing is kept there
    # Forward and again in backward; of a prompt that runs on its own, the pass over it is not checkpointed.
    assert len(calls) == (4 if "prefix" in method else 6)
    assert twin.is_activation_checkpointing
    layer = next(
        module for module in twin.modules() if type(module).__name__.endswith(("DecoderLayer", "Block"))
    )
    assert "_can_checkpoint_with_cache" not in vars(layer)


@reentrant
def test_a_prefix_on_a_model_that_is_checkpointed(use_reentrant):
    plain = tuned(base_model())
    base = checkpointed(copy.deepcopy(plain.base_model), use_reentrant)
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        tuned(base)
    peftfast.enable(strict=True)
    model = tuned(base)
    model.load_state_dict(plain.state_dict())
    assert base.is_activation_checkpointing
    expected, expected_gradients = step(plain, inputs())
    outputs, gradients = step(model, inputs())
    assert relative_error(outputs.loss, expected.loss) < 1e-6
    assert_same(gradients, expected_gradients)


def test_checkpointing_is_left_as_it_was_by_an_error():
    model = checkpointed(tuned(base_model()), False)
    before = [module._gradient_checkpointing_func for module in model.base_model.model.layers]
    with peftfast.enabled(), pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 61))
    layers = model.base_model.model.layers
    assert [layer._gradient_checkpointing_func for layer in layers] == before
    assert (
        all(layer.gradient_checkpointing for layer in layers)
        and model.base_model.model.gradient_checkpointing
    )


# ---- packed batches -------------------------------------------------------------------------------------

LENGTHS = [[4, 12, 6], [13, 1, 8]]


def packed(seed=1):
    """Two rows of documents; what begins one is no target, as transformers' collator has it."""
    batch = inputs(2, sum(LENGTHS[0]), seed=seed)
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    batch["labels"][batch["position_ids"] == 0] = -100
    return batch


def one_by_one(batch):
    """The documents, each a batch of its own. (One of a single token has no target.)"""
    for row, lengths in enumerate(LENGTHS):
        for ids, labels in zip(batch["input_ids"][row].split(lengths), batch["labels"][row].split(lengths)):
            if len(ids) > 1:
                yield dict(input_ids=ids[None], labels=labels[None])


def sum_of_losses(model, batch):
    return model(**batch, num_items_in_batch=1)


@architectures
@methods
@implementations
def test_packed_documents_are_as_separate_ones(architecture, method, attention):
    model = tuned(base_model(architecture, attn_implementation=attention), method)
    batch = packed()
    expected_losses, logits = [], []
    model.zero_grad()
    for document in one_by_one(batch):
        outputs = sum_of_losses(model, document)  # PEFT's
        outputs.loss.backward()
        expected_losses.append(outputs.loss.item())
        logits.append(outputs.logits[0, -document["input_ids"].shape[1] :])
    expected_gradients = gradients(model)

    def run(model):
        model.zero_grad()
        with peftfast.enabled(strict=True):
            outputs = sum_of_losses(model, batch)
            outputs.loss.backward()
        return outputs, gradients(model)

    outputs, ours = run(model)
    assert outputs.loss.item() == pytest.approx(sum(expected_losses), rel=1e-6)
    assert_same(ours, expected_gradients, 5e-6)
    length = sum(LENGTHS[0])
    rows = [document for row, n in zip(outputs.logits, LENGTHS) for document in row[-length:].split(n)]
    rows = [document for document in rows if len(document) > 1]
    for document, expected in zip(rows, logits, strict=True):
        assert relative_error(document, expected) < 2e-6
    for use_reentrant in (False, True):
        again, gradients_again = run(checkpointed(copy.deepcopy(model), use_reentrant))
        assert relative_error(again.loss, outputs.loss) < 1e-6
        assert_same(gradients_again, ours)


@main_methods
def test_one_packed_row(method):
    model = tuned(base_model("qwen3"), method)
    batch = {name: value[:1] for name, value in packed().items()}
    documents = list(one_by_one(packed()))[:3]
    expected = sum(sum_of_losses(model, document).loss.item() for document in documents)
    with peftfast.enabled(strict=True):
        assert sum_of_losses(model, batch).loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "architecture, attention, kind",
    [
        ("llama", "sdpa", "bool"),
        ("llama", "eager", "added"),
        ("gpt2", "sdpa", "added"),
        ("qwen3", "sdpa", "dict"),
    ],
)
@main_methods
def test_a_mask_for_each_pair_of_tokens(architecture, attention, kind, method):
    """As a data collator may make it, instead of position_ids alone."""
    config = copy.deepcopy(CONFIGS[architecture])
    config.sliding_window = 1000 if kind == "dict" else None
    model = tuned(base_model(config, attn_implementation=attention), method)
    batch = packed()
    document = (batch["position_ids"] == 0).cumsum(1)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    if kind == "added":
        mask = torch.where(mask, 0.0, torch.finfo(FP32).min)
    if kind == "dict":
        mask = dict(full_attention=mask, sliding_attention=mask)
    expected, expected_gradients = on(model, batch)
    added = "its mask is not one of True and False" if (kind, attention) == ("added", "sdpa") else None
    ours, gradients = on(model, batch | dict(attention_mask=mask), added)
    assert relative_error(ours.logits, expected.logits) < 1e-6
    assert_same(gradients, expected_gradients)


@architectures
@main_methods
def test_position_ids_of_left_padding(architecture, method):
    """PEFT drops those of prompts; what they should be is what the base model makes of them by itself."""
    model = tuned(base_model(architecture), method)
    batch = inputs(padded=True)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    ours, gradients = on(model, batch)
    if method == "prefix":
        theirs, expected = step(model, batch)
    else:
        model.zero_grad()
        prompt = model.prompt_encoder["default"].embedding.weight.expand(3, -1, -1)
        places = torch.cat((torch.arange(VIRTUAL).expand(3, -1), batch["position_ids"] + VIRTUAL), 1)
        theirs = model.base_model(
            inputs_embeds=torch.cat((prompt, model.word_embeddings(batch["input_ids"])), 1),
            attention_mask=torch.cat((torch.ones(3, VIRTUAL), batch["attention_mask"]), 1),
            labels=torch.cat((torch.full((3, VIRTUAL), -100), batch["labels"]), 1),
            position_ids=places,
        )
        theirs.loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert relative_error(ours.logits, theirs.logits) < 1e-6
    assert_same(gradients, expected)


@methods
def test_trainer(method, tmp_path):
    """Packed by transformers' own collator, and checkpointed: the losses of training without checkpointing."""
    documents = [dict(input_ids=inputs(1, 4 + seed, seed=seed)["input_ids"][0].tolist()) for seed in range(9)]
    losses = {}
    peftfast.enable(strict=True)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = transformers.Trainer(
            tuned(base_model(), method),
            transformers.TrainingArguments(
                tmp_path, max_steps=3, per_device_train_batch_size=3, logging_steps=1, report_to=[], use_cpu=True,
                learning_rate=0.1, gradient_checkpointing=checkpointing, save_strategy="no", disable_tqdm=True,
            ),
            data_collator=transformers.DataCollatorWithFlattening(),
            train_dataset=documents,
        )  # fmt: skip
        trainer.train()
        losses[checkpointing] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[True]) == 3 and losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True][0] != losses[True][2]


# ---- 4-bit bases ----------------------------------------------------------------------------------------


def in_four_bits(kind, tmp_path):
    base = base_model()
    if kind == "peftfast":
        quantize_linears(base.model)
        return base
    if kind == "bitsandbytes":
        for name, layer in list(base.model.named_modules()):
            if isinstance(layer, nn.Linear):
                fourbit = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=FP32, quant_type="nf4"
                )
                fourbit.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                base.model.set_submodule(name, fourbit)
        base.is_loaded_in_4bit = True
        return base.to("cpu")
    base.save_pretrained(tmp_path)
    return transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=peftfast.FourBitConfig(), dtype=FP32
    )


@methods
@pytest.mark.parametrize("kind", ["peftfast", "FourBitConfig", "bitsandbytes"])
def test_on_four_bits(method, kind, tmp_path):
    model = tuned(in_four_bits(kind, tmp_path), method)
    four_bit = (Linear4bit, bnb.nn.Linear4bit)
    assert sum(isinstance(module, four_bit) for module in model.modules()) == 14
    batch = inputs(padded=True)
    theirs, expected = step(model, batch)
    ours, gradients = on(model, batch)
    assert relative_error(ours.logits, theirs.logits) < 1e-5
    assert_same(gradients, expected, 1e-4)
    for use_reentrant in (False, True):
        again, gradients_again = on(checkpointed(copy.deepcopy(model), use_reentrant), batch)
        assert relative_error(again.loss, ours.loss) < 1e-6
        assert_same(gradients_again, gradients)
    packed_loss = on(model, packed())[0].loss
    assert torch.isfinite(packed_loss) and abs(packed_loss - ours.loss) > 1e-4


def test_prepared_for_kbit_training():
    """PEFT's own preparation switches checkpointing on, ahead of the adapter."""
    peftfast.enable(strict=True)
    base = in_four_bits("bitsandbytes", None)
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=dict(use_reentrant=True))
    model = tuned(base)
    assert base.is_activation_checkpointing
    _, gradients = step(model, inputs())
    model.gradient_checkpointing_disable()
    _, expected = step(model, inputs())
    assert_same(gradients, expected)


# ---- other tasks ----------------------------------------------------------------------------------------

BERT = transformers.BertConfig(
    vocab_size=61, hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
T5 = transformers.T5Config(
    vocab_size=61, d_model=40, d_kv=10, d_ff=52, num_layers=2, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)  # fmt: skip
TASKS = {
    "llama classifies": (
        transformers.LlamaConfig(**DECODER, num_labels=3),
        transformers.AutoModelForSequenceClassification,
        "SEQ_CLS",
    ),
    "bert classifies": (BERT, transformers.AutoModelForSequenceClassification, "SEQ_CLS"),
    "bert tags": (BERT, transformers.AutoModelForTokenClassification, "TOKEN_CLS"),
    "t5": (T5, transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
}


def task_batch(task):
    batch = inputs(padded=True)
    batch["input_ids"][batch["attention_mask"] == 0] = 0
    if task == "SEQ_CLS":
        batch["labels"] = torch.tensor([0, 2, 1])
    if task == "TOKEN_CLS":
        batch["labels"] = batch["input_ids"] % 3
    return batch


@pytest.mark.parametrize("name", TASKS)
def test_prefixes_of_other_tasks(name):
    config, auto, task = TASKS[name]
    model = tuned(base_model(copy.deepcopy(config), auto=auto), "projected prefix", task_type=task)
    batch = task_batch(task)
    theirs, expected = as_peft(lambda: step(model, batch))
    ours, gradients = on(model, batch)
    assert relative_error(ours.logits, theirs.logits) < 1e-6
    assert_same(gradients, expected)
    twin = checkpointed(copy.deepcopy(model), False)
    if name == "t5":
        with peftfast.enabled():
            assert (
                peftfast.report(twin)[0].reason == "the prefix of an encoder-decoder cannot be checkpointed"
            )
        return
    again, gradients_again = on(twin, batch)
    assert relative_error(again.logits, ours.logits) < 1e-6
    assert_same(gradients_again, gradients)


def test_prompts_of_other_tasks_are_peft_s():
    config, auto, task = TASKS["llama classifies"]
    model = tuned(base_model(copy.deepcopy(config), auto=auto), "prompt", task_type=task).eval()
    expected = model(**task_batch(task))
    peftfast.enable()
    assert relative_error(model(**task_batch(task)).logits, expected.logits) < 1e-6
    (entry,) = peftfast.report(model)
    assert entry.kind == "prompt_tuning.PeftModelForSequenceClassification"
    assert (
        entry.reason
        == "PROMPT_TUNING runs on causal language models, this is a PeftModelForSequenceClassification"
    )


# ---- the switch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, kind",
    [("prefix", "prefix_tuning"), ("prompt", "prompt_tuning"), ("p-tuning", "p_tuning")],
)
def test_report(method, kind):
    model = tuned(base_model(), method)
    (entry,) = peftfast.report(model)
    assert (entry.name, entry.kind) == ("", f"{kind}.PeftModelForCausalLM")
    assert (entry.fast, entry.reason) == (False, "peftfast is not enabled")
    peftfast.enable()
    (entry,) = peftfast.report(model)
    assert (entry.fast, entry.reason) == (True, None)
    (entry,) = peftfast.report(nn.ModuleDict({"student": model}))
    assert entry.name == "student"


FALLBACKS = {
    "past_key_values": (
        lambda: dict(past_key_values=transformers.DynamicCache()),
        "its forward was given past_key_values",
    ),
    "three dimensions": (
        lambda: dict(position_ids=torch.arange(11).expand(3, 3, 11)),
        "its position_ids have 3 dimensions",
    ),
    "flex attention": (
        lambda: dict(position_ids=(torch.arange(11) % 4).expand(3, -1)),
        "packed documents or prepared masks take attention of kind eager or sdpa, not flex_attention",
    ),
}


@pytest.mark.parametrize("case", FALLBACKS)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_fallbacks(case):
    more, reason = FALLBACKS[case]
    model = tuned(base_model(), "prompt").eval()
    expected = model(**inputs(), **more()).logits
    if case == "flex attention":  # which would have to be compiled
        model.base_model.config._attn_implementation = "flex_attention"
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError) as error:
        model(**inputs(), **more())
    assert (
        str(error.value) == f"Layer of class peft.PeftModelForCausalLM cannot run on the fast path: {reason}."
    )
    if case == "flex attention":
        return
    peftfast.enable()
    assert relative_error(model(**inputs(), **more()).logits, expected) < 1e-6
    assert peftfast.report(model)[0].reason == reason
    model(**inputs())
    assert peftfast.report(model)[0].fast


def test_a_model_without_position_ids():
    model = tuned(
        base_model(transformers.BloomConfig(vocab_size=61, hidden_size=36, n_layer=2, n_head=4)), "prompt"
    )
    ours, _ = on(model, inputs(padded=True))
    assert relative_error(ours.logits, model(**inputs(padded=True)).logits) < 1e-6
    with peftfast.enabled(strict=True), pytest.raises(peftfast.FallbackError, match="takes no position_ids"):
        model(**inputs(), position_ids=torch.arange(11)[None])


def test_a_prefix_takes_the_place_of_past_key_values():
    model = tuned(base_model())
    theirs, _ = step(model, inputs() | dict(past_key_values=transformers.DynamicCache()))
    ours, _ = on(model, inputs() | dict(past_key_values=transformers.DynamicCache()))
    assert relative_error(ours.logits, theirs.logits) < 1e-6


def test_methods_without_a_path():
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_tasks=2, prompt_tuning_init="RANDOM"
    )
    model = get_peft_model(base_model(), config)
    batch = inputs() | dict(task_ids=torch.tensor([0, 1, 1]))
    expected = model(**batch).logits
    peftfast.enable()
    assert relative_error(model(**batch).logits, expected) < 1e-6
    assert peftfast.report(model)[0].reason == "peftfast has no path of its own for MULTITASK_PROMPT_TUNING"


def test_cartridges_are_prefixes():
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_frozen_tokens=2)
    model = get_peft_model(base_model(), config)
    theirs, expected = step(model, inputs())
    ours, gradients = on(checkpointed(model, True), inputs())
    assert relative_error(ours.logits, theirs.logits) < 1e-6
    assert_same(gradients, expected)


def test_a_forward_that_is_not_reached():
    model = tuned(base_model())
    with model.disable_adapter():
        pass
    peftfast.enable()
    assert peftfast.report(model)[0].reason == "its forward was replaced before peftfast was enabled"


def test_disable_restores_every_method():
    kinds = [PeftModel, *PeftModel.__subclasses__()]
    before = [dict(vars(kind)) for kind in kinds]
    peftfast.enable()
    assert [dict(vars(kind)) for kind in kinds] != before
    peftfast.disable()
    assert [dict(vars(kind)) for kind in kinds] == before


def test_accelerate_one_model():
    model, other = tuned(base_model(), "prompt"), tuned(base_model(), "prompt")
    assert peftfast.accelerate(model, strict=True) is model
    for accelerated in (model, copy.deepcopy(model)):
        assert len(seen(accelerated, inputs())) == 2
        assert peftfast.report(accelerated)[0].fast
    assert len(seen(other, inputs())) == 1
    assert peftfast.report(other)[0].reason == "peftfast is not enabled"
    prefix = checkpointed(peftfast.accelerate(tuned(base_model())), False)
    step(prefix, inputs())
    peftfast.disable()
    assert len(seen(model, inputs())) == 1


# ---- errors ---------------------------------------------------------------------------------------------


@main_methods
@pytest.mark.parametrize("positions", [False, True])
def test_more_tokens_than_the_model_has_positions(method, positions):
    model = tuned(base_model("gpt2"), method, virtual=60)
    batch = inputs(2, 5)
    if positions:
        batch["position_ids"] = torch.arange(5).expand(2, -1)
    peftfast.enable()
    message = (
        r"num_virtual_tokens \(60\) and the input's 5 tokens are more than the 64 positions of the model"
    )
    with pytest.raises(ValueError, match=message):
        model(**batch)
    assert torch.isfinite(model(**inputs(2, 4)).loss)


def test_rotary_positions_go_on():
    model = tuned(base_model("llama"), "prompt", virtual=60)
    theirs, _ = step(model, inputs(2, 5))
    ours, _ = on(model, inputs(2, 5))
    assert relative_error(ours.logits, theirs.logits) < 1e-6


@pytest.mark.parametrize("strict", [False, True])
def test_no_input(strict):
    model = tuned(base_model())
    with peftfast.enabled(strict), pytest.raises(peftfast.FallbackError if strict else ValueError):
        model(attention_mask=torch.ones(1, 3))


def test_a_model_that_drops_the_cache():
    """Rather an error than training without the prefix."""
    model = checkpointed(tuned(base_model()), False)
    layers = model.base_model.model.layers
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: (
                args,
                kwargs
                | dict(attention_mask=None)
                | dict.fromkeys({"past_key_values", "cache"} & kwargs.keys()),
            ),
            with_kwargs=True,
        )
    with peftfast.enabled(), pytest.raises(ValueError, match="hands its checkpointed layers no cache"):
        model(**inputs())
