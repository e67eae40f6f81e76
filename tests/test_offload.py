"""Activations in the host's memory: on a CPU that plays the device, and on a GPU where there is one."""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

import peftfast
from peftfast import offload_activations
from peftfast.integrations import offload
from peftfast.integrations.offload import AHEAD
from peftfast.nn import quantize_linears
from peftfast.testing import relative_error


@pytest.fixture(autouse=True)
def everything_counts(nothing_leaks, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.fixture
def offloaded(monkeypatch):
    """All that was offloaded, in order, as long as it lives."""
    made = []
    original = offload._Offloaded.__init__

    def init(self, tensor, *args):
        original(self, tensor, *args)
        made.append(weakref.ref(self))
        self.of, self.address = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage()._cdata

    monkeypatch.setattr(offload._Offloaded, "__init__", init)
    return made


def in_bitsandbytes(model):
    """With its linear layers in bitsandbytes' 4 bits."""
    bnb = pytest.importorskip("bitsandbytes")
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            quantized = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False)
            quantized.load_state_dict({"weight": layer.weight.data})
            model.set_submodule(name, quantized.to("cpu"))
    return model


BASES = {"dense": lambda model: model, "4bit": quantize_linears, "bitsandbytes": in_bitsandbytes}


def llama(base="dense", checkpointing=None, attention="sdpa"):
    torch.manual_seed(0)
    config = LlamaConfig(
        attn_implementation=attention,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = BASES[base](LlamaForCausalLM(config))
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    adapters = LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def gradients(model, context, *, forwards=1):
    """The loss and the gradients of a step on so many batches, each of its own forward and backward."""
    model.zero_grad()
    torch.manual_seed(1)
    losses = []
    for _ in range(forwards):
        tokens = torch.randint(64, (2, 12), device=model.device)
        with context:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return losses + [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs) > 20
    for one, other in zip(ours, theirs):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fused", [True, False], ids=["peftfast", "stock"])
@pytest.mark.parametrize("checkpointing", [None, "not-reentrant", "reentrant"])
@pytest.mark.parametrize("base", BASES)
def test_a_step_is_the_same_bit_for_bit(base, checkpointing, fused, offloaded):
    model = llama(base, checkpointing)
    with peftfast.enabled() if fused else nullcontext():
        plain = gradients(model, nullcontext(), forwards=2)
        assert not offloaded
        offloading = offload_activations(model, device="cpu")
        assert_same_bits(gradients(model, offloading, forwards=2), plain)
    assert len(offloaded) >= 8  # layers x batches
    assert not any(it() for it in offloaded), "the host's memory outlives the graph"


@pytest.mark.parametrize("checkpointing", [None, "not-reentrant", "reentrant"])
def test_the_inputs_of_tiles_are_offloaded(checkpointing, offloaded):
    model = peftfast.tile_mlps(llama("dense", checkpointing), 7)
    with peftfast.enabled():
        plain = gradients(model, nullcontext())
        assert_same_bits(gradients(model, offload_activations(model, device="cpu")), plain)
    assert len(offloaded) >= 4


@pytest.mark.parametrize("base", BASES)
def test_weights_and_scales_stay(base, monkeypatch):
    taken = []

    class Taken(offload._Offloaded):
        def __init__(self, tensor, *args):
            taken.append(tensor)
            super().__init__(tensor, *args)

    monkeypatch.setattr(offload, "_Offloaded", Taken)
    monkeypatch.setattr(offload, "SMALLEST", 16)  # but the seeds of dropout
    model, tokens = llama(base), torch.zeros(2, 11, dtype=torch.int64)
    with peftfast.enabled(), offload_activations(model, device="cpu"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    # An activation has a row for each of the 22 tokens; no weight or scale has a size that 11 divides.
    assert len(taken) > 40
    assert all(tensor.numel() % 11 == 0 for tensor in taken), [tensor.shape for tensor in taken]


def on_the_device(offloaded):
    """Of how many the values are in the device's memory."""
    return sum(it() is not None and it().on_device is not None for it in offloaded)


def test_no_more_than_a_few_are_on_the_device_at_a_time(offloaded):
    model = llama(checkpointing="not-reentrant")
    seen = []
    for layer in model.get_base_model().model.layers:
        layer.input_layernorm.register_forward_pre_hook(lambda *_: seen.append(on_the_device(offloaded)))
    tokens = torch.zeros(2, 12, dtype=torch.int64)
    with offload_activations(model, device="cpu"):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert len(seen) == 4 and max(seen) == AHEAD
    assert on_the_device(offloaded) == 0
    assert all(it().of.expired() for it in offloaded[1:4])  # the inputs of the layers; the first is a leaf
    loss.backward()
    assert len(seen) == 8 and max(seen[4:]) == AHEAD  # the layer's own went to its only use


def test_what_several_keep_is_copied_once(offloaded):
    x = torch.randn(32, 16, requires_grad=True)
    weights = [torch.randn(16, 16, requires_grad=True) for _ in range(3)]

    def product():
        hidden = x * 2
        return sum((hidden @ weight).sum() for weight in weights)

    model = nn.ParameterList(weights)
    plain = torch.autograd.grad(product(), [x, *weights])
    with offload_activations(model, device="cpu"):
        value = product()
    kept = [it() for it in offloaded if it() is not None]
    assert [it.uses for it in kept if it.host.shape == (32, 16)] == [3]
    for _ in range(2):  # a graph that is kept gives its gradients again
        again = torch.autograd.grad(value, [x, *weights], retain_graph=True)
        assert all(map(torch.equal, again, plain))


def test_a_tensor_changed_in_place_is_another(offloaded):
    x = torch.randn(8, 8)
    w = torch.randn(8, 8, requires_grad=True)
    with offload_activations(nn.Identity(), device="cpu"):
        first = (x * w).sum()
        before = x.clone()
        x.add_(1)
        second = (x * w).sum()
    assert torch.equal(torch.autograd.grad(first, w)[0], before)
    assert torch.equal(torch.autograd.grad(second, w)[0], x)


def test_views_come_back_as_they_were(offloaded):
    w = torch.randn(6, 4, requires_grad=True)
    x = torch.randn(4, 12)
    for view in (x[:, ::2].T, x.T[3:9], x[:, :1].expand(4, 6).T, x.view(12, 4)[:6]):
        with offload_activations(nn.Identity(), device="cpu"):
            value = (view * w).sum()
        assert torch.equal(torch.autograd.grad(value, w)[0], view)
    assert len(offloaded) == 4


def test_small_tensors_stay(offloaded, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 16 * 16 * 4)
    w = torch.randn(16, 16, requires_grad=True)
    with offload_activations(nn.Identity(), device="cpu"):
        (torch.randn(16, 16) * w).sum() + (torch.randn(8, 16) * w[:8]).sum()
    assert len(offloaded) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is what this machine must lack")
def test_without_an_accelerator_everything_stays(offloaded):
    model = llama()
    plain = gradients(model, nullcontext())
    assert_same_bits(gradients(model, offload_activations(model)), plain)
    assert not offloaded


def test_an_error_within_leaves_nothing_behind(offloaded):
    w = torch.randn(8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="of the test"), offload_activations(nn.Identity(), device="cpu"):
        kept = (torch.randn(8, 8) * w).sum()
        raise RuntimeError("of the test")
    assert on_the_device(offloaded) == 0
    before = len(offloaded)
    (torch.randn(8, 8) * w).sum()
    assert len(offloaded) == before
    kept.backward()
    assert w.grad is not None


class Device:
    """What torch.cuda has of streams and events. A copy is not carried out before somebody waits for its event."""

    def __init__(self):
        self.now = self.Stream(self)
        self.order = []

    class Stream:
        def __init__(self, device):
            self.device, self.work = device, []

        def wait_stream(self, other):
            self.device.order.append("copies wait for computation" if other is self.device.now else "?")

        def record_event(self):
            return len(self.work), self

        def wait_event(self, event):
            until, stream = event
            for run in stream.work[:until]:
                run()
            stream.work[:until] = [lambda: None] * until

    def current_stream(self, device=None):
        return self.now

    @contextmanager
    def stream(self, stream):
        yield


def test_nobody_reads_before_the_copy_is_there(monkeypatch):
    """With copies as late as events allow, values are still right: each use waits for its own."""
    device = Device()
    module = SimpleNamespace(
        Stream=lambda _: Device.Stream(device), stream=device.stream, current_stream=device.current_stream
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)

    def copy(self, source, to):
        self.stream.wait_stream(self._module.current_stream(self._device))
        to.fill_(1)
        self.stream.work.append(lambda: to.copy_(source))
        return self.stream.record_event()

    monkeypatch.setattr(offload._Offloaded, "_copy", copy)
    model = llama(checkpointing="not-reentrant")
    plain = gradients(model, nullcontext())
    assert_same_bits(gradients(model, offload_activations(model, device="cpu")), plain)
    assert set(device.order) == {"copies wait for computation"}


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@on_gpu
@pytest.mark.parametrize("fused", [True, False], ids=["peftfast", "stock"])
@pytest.mark.parametrize("checkpointing", [None, "not-reentrant", "reentrant"])
def test_on_a_gpu_a_step_is_the_same_bit_for_bit(checkpointing, fused, offloaded):
    """With eager attention: the gradients of others may add up in another order every time."""
    model = llama("dense", checkpointing, "eager").cuda()
    with peftfast.enabled() if fused else nullcontext():
        plain = gradients(model, nullcontext(), forwards=2)
        assert_same_bits(gradients(model, offload_activations(model), forwards=2), plain)
    assert len(offloaded) >= 8  # layers x batches


@on_gpu
@pytest.mark.parametrize("checkpointing", [None, "not-reentrant"])
def test_on_a_gpu_a_step_takes_less_memory(checkpointing, monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 2**20)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM")).train()
    tokens = torch.randint(64, (1, 4096), device="cuda")
    peaks, results = [], []
    for context in (nullcontext(), offload_activations(model)):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with context:
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        results.append([loss.detach()] + [w.grad.clone() for w in model.parameters() if w.grad is not None])
    for ours, plain in zip(results[1], results[0], strict=True):
        assert relative_error(ours, plain) < 1e-2
    assert peaks[1] < (0.9 if checkpointing else 0.5) * peaks[0]


@pytest.mark.parametrize("most", [100, 256, 5000, 131072])
@pytest.mark.parametrize("room", [0, 1, 99, 300, 4321, 10**6])
def test_the_benchmark_finds_the_longest_sequence(room, most, monkeypatch):
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    from bench_7b import PROBED, longest

    tried = []
    found = longest(lambda tokens: tried.append(tokens) or tokens <= room, most)
    assert found <= min(room, most) <= found + max(PROBED, found // 32)
    assert max(tried) <= most and len(tried) == len(set(tried)) < 30


@pytest.fixture
def bench_7b(monkeypatch):
    """The benchmark, with a GPU that takes `room` tokens, or not even the model where that is None."""
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import bench_7b

    def build(*arguments, build=bench_7b.build):
        if bench_7b.room is None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return build(*arguments)

    def trainer(*arguments, trainer=bench_7b.trainer):
        step_on = trainer(*arguments)

        def limited(tokens):
            def step():
                if tokens > bench_7b.room:
                    raise RuntimeError("CUDA out of memory. peftfast tried to allocate 8 bytes.")
                bench_7b.peak = max(bench_7b.peak, tokens)
                step_on(tokens)()

            return step

        return limited

    def reset():
        bench_7b.peak = 0

    monkeypatch.setattr(bench_7b, "build", build)
    monkeypatch.setattr(bench_7b, "trainer", trainer)
    monkeypatch.setattr(bench_7b, "limit_memory", lambda limit: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: bench_7b.peak)
    monkeypatch.setattr(bench_7b, "LIMITED_TOKENS", 64)
    monkeypatch.setattr(bench_7b, "PROBED", 16)
    monkeypatch.setattr(bench_7b, "peak", 0, raising=False)
    monkeypatch.setattr(bench_7b, "room", None, raising=False)
    return bench_7b


@pytest.mark.parametrize(
    "room, longest, reason",
    [(None, 0, "the model does not fit"), (5, 0, "16 tokens do not fit"), (40, 32, None), (100, 96, None)],
)
def test_the_benchmark_records_what_fits(bench_7b, monkeypatch, room, longest, reason):
    bench_7b.room = room
    options = bench_7b.parse(["--model", "tiny"])
    ceilings = {"bandwidth": {"bytes_per_second": 1e9}, "fp32": {"flops_per_second": 1e9}}
    rows = bench_7b.run_limited(options, "tiny", "fp32", "8GB", ceilings)
    if longest == 0:
        assert [row["implementations"] for row in rows] == [
            {"peftfast": {"ours": True, "skipped": reason, "longest_tokens": 0}}
        ]
    else:
        sizes = [64, longest] if longest > 64 else [longest]
        found = [(row["point"]["tokens"], row["implementations"]["peftfast"]["peak_bytes"]) for row in rows]
        assert found == [(size, size) for size in sizes]  # the peak of each alone
        assert {row["implementations"]["peftfast"]["longest_tokens"] for row in rows} == {longest}
    record = bench_7b.Record("7b-limited", bench_7b.machine_facts("cpu"), {}, rows)
    assert len(record.table()[1]) == (0 if longest == 0 else len(rows))


def limited_row(bench_7b, contender, tokens, longest, speed=None, **changed):
    """What `run_limited` finds of Llama-3.1-8B in 8 GB."""
    point = bench_7b.Point("llama-3.1-8b", 32, "bf16", tokens, False, True, rank=32, memory_limit="8GB")
    found = {"ours": contender == "peftfast", "longest_tokens": longest}
    found |= {"skipped": "no"} if speed is None else {"tokens_per_second": speed}
    return {"point": asdict(replace(point, **changed)), "implementations": {contender: found}}


def test_bars_of_small_cards_are_judged_where_they_were_measured(bench_7b, monkeypatch):
    monkeypatch.setattr(bench_7b, "LIMITED_TOKENS", 2048)
    row = partial(limited_row, bench_7b)

    def verdicts(*rows):
        return [line["verdict"] for line in bench_7b.limited_acceptance(list(rows))]

    ours = row("peftfast", 2048, 6100, 400.0)
    none, reached = "not in this run", "reached"
    assert verdicts() == [none] * 3
    assert verdicts(ours) == [reached, none, none]
    assert verdicts(ours, row("stock", 2048, 0)) == [reached, none, none]  # it ran out of memory
    assert verdicts(ours, row("stock", 700, 700, 300.0)) == [reached, none, none]
    assert verdicts(ours, row("stock", 2048, 2100, 200.0)) == [reached, none, reached]
    assert verdicts(ours, row("stock", 2048, 2100, 201.0)) == [reached, none, "not reached"]
    assert verdicts(ours, row("stock", 2048, 2100, 200.0, checkpointing=False)) == [reached, none, none]
    assert verdicts(row("peftfast", 2048, 9000, 400.0, layers=8)) == [none] * 3
    assert verdicts(row("peftfast", 2048, 0)) == ["not reached", none, none]
