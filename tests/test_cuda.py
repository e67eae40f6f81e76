"""The GPU kernels, where there is a GPU; and what can be said of them without one.

The operators' own tests (test_lora, test_fourbit, test_moe, test_rowwise) run on a GPU with `pytest --device cuda`, and
with the kernels emulated on the CPU as .ci/run does it. Here is what is particular to the device.
"""

import pytest
import torch

import peftfast
from peftfast import _C, ops, reference
from peftfast.ops.devices import KERNEL_DEVICES, cuda_state
from peftfast.testing import assert_as_accurate

on_gpu = pytest.mark.skipif(
    "cuda" not in KERNEL_DEVICES, reason=f"needs a GPU and its kernels: {cuda_state()}"
)
emulated = pytest.mark.skipif(
    not hasattr(_C, "cuda_choice"),
    reason="needs the module of -DPEFTFAST_EMULATE_CUDA=DIR, as .ci/run makes it",
)
FLOAT32, BFLOAT16, FLOAT16 = range(3)


def test_the_build_says_what_it_has():
    state = peftfast.build_info()["cuda"]
    assert state == cuda_state() and ("cuda" in KERNEL_DEVICES) == state.endswith("; loaded")
    assert state.startswith(("built by nvcc", "not built: ", "emulated"))


@pytest.mark.parametrize(
    "capabilities, loaded", [([(7, 5), (9, 0)], True), ([(8, 0)], True), ([(6, 1), (7, 5)], False)], ids=str
)
def test_one_gpu_that_serves_is_enough(capabilities, loaded, monkeypatch):
    libraries = []
    monkeypatch.setattr(_C, "cuda", "built by nvcc 0 for sm_0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch.ops, "load_library", libraries.append)
    state = cuda_state.__wrapped__()
    if loaded:
        assert state.endswith("; loaded") and len(libraries) == 1
    else:
        assert state.endswith("GPU 1 has compute capability 7.5, and the kernels need 8.0") and not libraries


# ---- which kernel ---------------------------------------------------------------------------------------------------


def choice(
    M,
    N=4096,
    K=4096,
    groups=1,
    dtype=BFLOAT16,
    compute=BFLOAT16,
    four_bit=True,
    straight=True,
    dropout=False,
    hopper=False,
):
    return _C.cuda_choice(M, N, K, groups, dtype, compute, four_bit, straight, dropout, hopper)


@emulated
def test_few_rows_are_bound_by_reading_the_weight():
    assert choice(1) == ("few", 16, False)
    assert choice(16) == ("few", 16, False)
    assert choice(17) == ("few", 64, False)
    assert choice(64) == ("few", 64, False)
    assert choice(16, four_bit=False) == ("few", 16, False)


@emulated
def test_many_rows_decode_the_weight_once():
    assert choice(511) == ("tiled", 128, False)
    assert choice(512) == ("tiled", 128, True)
    assert choice(4096, four_bit=False) == ("tiled", 128, False)


@emulated
def test_what_a_decoded_weight_may_take_is_bounded():
    assert choice(4096, N=128256, K=4096) == ("tiled", 128, False)  # 1 GB in bfloat16
    assert choice(65536, groups=64) == ("tiled", 128, False)  # a stack of experts is never decoded whole


@emulated
def test_groups_count_by_their_rows():
    assert choice(2048, groups=128, N=1536, K=2048) == ("few", 16, False)
    assert choice(8192, groups=128, N=1536, K=2048) == ("few", 64, False)
    assert choice(32768, groups=128, N=1536, K=2048) == ("tiled", 128, False)


@emulated
def test_backward_and_its_dropout_run_tiled():
    assert choice(8, straight=False) == ("tiled", 32, False)
    assert choice(8, dropout=True) == ("tiled", 32, False)


@emulated
def test_fp32_and_odd_shapes():
    assert choice(4096, dtype=FLOAT32, compute=FLOAT32) == ("plain", 0, False)
    assert choice(4096, compute=FLOAT32) == ("plain", 0, False)
    assert choice(4096, dtype=FLOAT16, compute=BFLOAT16) == ("plain", 0, False)
    assert choice(8, K=4090) == ("tiled", 32, True)  # codes straddle rows: decoded first
    assert choice(8, K=4090, groups=4) == ("plain", 0, False)


@emulated
def test_hopper_multiplies_many_rows_of_a_dense_weight():
    assert choice(256, four_bit=False, hopper=True) == ("hopper", 256, False)
    assert choice(4096, hopper=True) == ("hopper", 256, True)
    assert choice(4096, straight=False, dropout=True, hopper=True) == ("hopper", 256, True)
    assert choice(4096, dtype=FLOAT32, hopper=True) == ("hopper", 256, True)
    assert choice(255, four_bit=False, hopper=True) == ("tiled", 128, False)
    assert choice(511, hopper=True) == ("tiled", 128, False)  # decoded within the product
    assert choice(4096, K=4090, hopper=True) == ("tiled", 128, True)  # rows at no multiple of 16 bytes
    assert choice(65536, groups=64, four_bit=False, hopper=True) == ("tiled", 128, False)


needs_hopper = pytest.mark.skipif(
    not hasattr(_C, "cuda_choice")
    and not ("cuda" in KERNEL_DEVICES and torch.cuda.get_device_capability() == (9, 0)),
    reason=f"needs a GPU of compute capability 9.0, or its kernels emulated: {cuda_state()}",
)


@needs_hopper
@pytest.mark.parametrize("shape", [(256, 128, 64), (300, 200, 328), (520, 136, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])
def test_hopper_agrees_with_the_other_kernels(shape, dtype, quantized, monkeypatch):
    torch.manual_seed(2)
    device = "cuda" if "cuda" in KERNEL_DEVICES else "cpu"
    M, N, K = shape
    rank = 20  # more than one tile of ranks
    x, A = torch.randn(M, K), torch.randn(rank, K) / 10
    weight, B, bias = torch.randn(N, K) / 10, torch.randn(N, rank), torch.randn(N)
    gradient = torch.randn(M, N)
    inputs = [t.to(device, dtype).requires_grad_() for t in (x, A, B)]
    weight, bias, gradient = (t.to(device, dtype) for t in (weight, bias, gradient))
    seed = torch.tensor([7], device=device)
    linear = ops.lora_linear
    if quantized:
        weight, linear = ops.fourbit_quantize(weight), ops.fourbit_linear

    def run(wgmma):
        monkeypatch.setenv("PEFTFAST_CUDA_WGMMA", wgmma)
        x, A, B = inputs
        y = linear(x, weight, A, B, 0.5, bias=bias, dropout=0.3, seed=seed)
        return [y, *torch.autograd.grad(y, inputs, gradient)]

    for ours, other in zip(run("1"), run("0"), strict=True):
        torch.testing.assert_close(ours, other, rtol=0.01, atol=0.02)


emulated_or_on_gpu = pytest.mark.skipif(
    not hasattr(_C, "cuda_choice") and "cuda" not in KERNEL_DEVICES,
    reason=f"needs a GPU, or its kernels emulated: {cuda_state()}",
)


@emulated_or_on_gpu
@pytest.mark.parametrize("shape", [(1, 600, 3), (200, 300, 4), (70, 131, 5), (40, 2400, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_pass_over_the_gradient_gives_both(shape, dtype):
    """V, which is seen in the gradients of x and A, and the gradient of B: where that pays they come of one pass."""
    device = "cuda" if "cuda" in KERNEL_DEVICES else "cpu"
    M, N, rank = shape
    K = 32
    tensors = torch.randn(M, K), torch.randn(N, K) / 10, torch.randn(rank, K) / 10, torch.randn(N, rank)
    x, weight, A, B = (t.to(device, dtype) for t in tensors)
    gradient = torch.randn(M, N).to(device, dtype)

    def gradients(layer, x_dtype, factor_dtype):
        inputs = [
            t.to(kind).requires_grad_()
            for t, kind in zip((x, A, B), (x_dtype, *[factor_dtype] * 2), strict=True)
        ]
        y = layer(*inputs)
        return torch.autograd.grad(y, inputs, gradient.to(y.dtype))

    def reference(x, A, B):
        return x @ weight.double().T + 0.5 * x @ A.T @ B.T

    def ours(x, A, B):
        return ops.lora_linear(x, weight, A, B, 0.5)

    first, second = (gradients(ours, dtype, torch.float32) for _ in range(2))
    oracle = gradients(reference, torch.float64, torch.float64)
    for got, twice, wanted in zip(first, second, oracle, strict=True):
        assert torch.equal(got, twice)
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < (1e-6 if got.dtype == torch.float32 else torch.finfo(dtype).eps)


@emulated_or_on_gpu
@pytest.mark.parametrize("M", [3, 20, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])
def test_blocks_part_a_long_reduction(M, dtype, quantized):
    """Few rows and columns make few blocks: several then share the reduction, forward and backward."""
    device = "cuda" if "cuda" in KERNEL_DEVICES else "cpu"
    features, rank = 4128, 4

    def random(*shape):
        return torch.randn(shape).to(device, dtype)

    for N, K in (40, features), (features, 48):
        weight, linear = random(N, K), ops.lora_linear
        x, A, B, bias, gradient = random(M, K), random(rank, K), random(N, rank), random(N), random(M, N)
        dense = weight
        if quantized:
            weight, linear = ops.fourbit_quantize(weight), ops.fourbit_linear
            dense = ops.fourbit_dequantize(weight)

        results = []
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            y = linear(inputs, weight, A, B, 0.5, bias=bias)
            results.append((y, *torch.autograd.grad(y, inputs, gradient)))
        W = dense.double() + 0.5 * B.double() @ A.double()
        oracle = x.double() @ W.T + bias.double(), gradient.double() @ W
        for got, again, wanted in zip(*results, oracle, strict=True):
            assert torch.equal(got, again)
            assert (got.double() - wanted).norm() / wanted.norm() < torch.finfo(dtype).eps / 2


@emulated_or_on_gpu
def test_blocks_drop_the_same_elements_of_their_parts():
    device = "cuda" if "cuda" in KERNEL_DEVICES else "cpu"
    tensors = torch.randn(3, 1100), torch.zeros(9, 1100), torch.randn(20, 1100), torch.randn(9, 20)
    operands = [t.to(device, torch.bfloat16) for t in tensors]
    seed = torch.tensor([11], device=device)
    y = ops.lora_linear(*operands, 0.5, dropout=0.4, seed=seed)
    oracle = reference.lora_linear(*(t.double() for t in operands), 0.5, dropout=0.4, seed=seed)
    assert (y.double() - oracle).norm() / oracle.norm() < torch.finfo(torch.bfloat16).eps / 2


@emulated_or_on_gpu
def test_where_a_weight_is_decoded_can_be_forced(monkeypatch):
    device = "cuda" if "cuda" in KERNEL_DEVICES else "cpu"
    x = torch.randn(20, 64).to(device, torch.bfloat16)
    weight = ops.fourbit_quantize(torch.randn(48, 64).to(device, torch.bfloat16))
    wanted = x.double() @ ops.fourbit_dequantize(weight).double().T
    for way in "first", "within":
        monkeypatch.setenv("PEFTFAST_CUDA_DECODE", way)
        y = ops.fourbit_linear(x, weight)
        assert (y.double() - wanted).norm() / wanted.norm() < torch.finfo(torch.bfloat16).eps / 2
    monkeypatch.setenv("PEFTFAST_CUDA_DECODE", "never")
    with pytest.raises(RuntimeError, match="PEFTFAST_CUDA_DECODE must be first or within, got never"):
        ops.fourbit_linear(x, weight)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.fixture
def problem():
    torch.manual_seed(1)
    tensors = dict(
        x=torch.randn(70, 96),
        weight=torch.randn(130, 96) / 10,
        A=torch.randn(8, 96) / 10,
        B=torch.randn(130, 8),
    )
    return {name: tensor.bfloat16().cuda() for name, tensor in tensors.items()}


def layer(p, seed, **others):
    return ops.lora_linear(p["x"], p["weight"], p["A"], p["B"], 0.5, dropout=0.3, seed=seed, **others)


@on_gpu
def test_a_seed_gives_the_mask_of_the_cpu(problem):
    seed = torch.tensor([12345])
    on_cpu = layer({name: tensor.cpu().float() for name, tensor in problem.items()}, seed)
    torch.testing.assert_close(layer(problem, seed.cuda()).float().cpu(), on_cpu, rtol=0.02, atol=0.02)


@on_gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 96), (7, 33)], ids=str)
def test_codes_and_scales_are_those_of_the_cpu(quant_type, shape):
    weight = torch.randn(shape)
    ours = ops.fourbit_quantize(weight.cuda(), quant_type=quant_type)
    theirs = ops.fourbit_quantize(weight, quant_type=quant_type)
    assert torch.equal(ours.packed.cpu(), theirs.packed)
    assert torch.equal(ops.fourbit_dequantize(ours).cpu(), ops.fourbit_dequantize(theirs))


@on_gpu
def test_on_another_stream(problem):
    seed = torch.tensor([3], device="cuda")
    wanted = layer(problem, seed)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = layer(problem, seed)
    stream.synchronize()
    assert torch.equal(got, wanted)


@on_gpu
def test_captured_in_a_graph(problem):
    seed = torch.tensor([3], device="cuda")
    with torch.no_grad():
        layer(problem, seed)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer(problem, seed)
        problem["x"].copy_(torch.randn_like(problem["x"]))
        seed.fill_(4)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, layer(problem, seed))


@on_gpu
def test_experts_captured_in_a_graph():
    x = torch.randn(64, 32, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(4, 64, 32, dtype=torch.bfloat16, device="cuda")
    offsets = torch.tensor([0, 10, 10, 40, 64], device="cuda")
    with torch.no_grad():
        ops.grouped_linear(x, weight, offsets)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.grouped_linear(x, weight, offsets)
        offsets.copy_(torch.tensor([0, 20, 30, 31, 60]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, ops.grouped_linear(x, weight, offsets))


@on_gpu
def test_tensors_on_different_devices_are_refused(problem):
    with pytest.raises(ValueError, match=r"lora_A\[0\] is on cpu, but x is on cuda"):
        layer(problem | {"A": problem["A"].cpu()}, torch.tensor([3], device="cuda"))


@on_gpu
def test_a_call_leaves_no_memory_behind(problem):
    seed = torch.tensor([3], device="cuda")
    layer(problem, seed)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        layer(problem, seed)
    assert torch.cuda.memory_allocated() == before


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_peft_as_accurate_as_eager(dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    ).cuda()
    ids = torch.randint(128, (2, 16), device="cuda")

    def logits(kind):
        return model.to(kind)(input_ids=ids).logits

    with torch.no_grad():
        oracle, eager = logits(torch.float64), logits(dtype)
        with peftfast.enabled():
            ours = logits(dtype)
    assert_as_accurate(ours, eager, oracle)
