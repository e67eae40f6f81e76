"""The GPU kernels, where there is a GPU; and what can be said of them without one.

The operators' own tests (test_lora, test_fourbit, test_moe, test_rowwise) run on a GPU with `pytest --device cuda`, and
with the kernels emulated on the CPU as .ci/run does it. On a GPU so do those of parity with PEFT, transformers and
bitsandbytes (test_nn, test_peft and the others that conftest names). Here is what is particular to the device, and the
layers of these libraries on it in more dtypes.
"""

import contextlib
import copy
import gc

import pytest
import torch

import peftfast
from peftfast import _C, ops, reference
from peftfast.nn.moe import Routing
from peftfast.ops import devices
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


@pytest.fixture
def gpus(monkeypatch):
    """Gives torch GPUs of these compute capabilities, and returns what libraries are loaded."""

    def have(*capabilities):
        libraries = []
        monkeypatch.setattr(_C, "cuda", "built by nvcc 0 for sm_0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
        monkeypatch.setattr(torch.ops, "load_library", libraries.append)
        for cached in (cuda_state, devices._serves):
            cached.cache_clear()
        return libraries

    yield have
    monkeypatch.undo()
    for cached in (cuda_state, devices._serves):
        cached.cache_clear()


@pytest.mark.parametrize(
    "capabilities, loaded", [([(7, 5), (9, 0)], True), ([(8, 0)], True), ([(6, 1), (7, 5)], False)], ids=str
)
def test_one_gpu_that_serves_is_enough(capabilities, loaded, gpus):
    libraries = gpus(*capabilities)
    state = cuda_state()
    if loaded:
        assert state.endswith("; loaded") and len(libraries) == 1
    else:
        assert state.endswith("GPU 1 has compute capability 7.5, and the kernels need 8.0") and not libraries


def test_each_gpu_has_kernels_or_says_why_not(gpus):
    gpus((7, 5), (8, 6))
    old, new = torch.device("cuda:0"), torch.device("cuda:1")
    assert "cuda" in KERNEL_DEVICES and new in KERNEL_DEVICES and old not in KERNEL_DEVICES
    assert devices.why_no_kernel(new) is None
    assert devices.why_no_kernel(old) == "GPU 0 has compute capability 7.5, and the kernels need 8.0"
    assert devices.why_no_kernel(torch.device("mps")) == "there is no kernel for mps yet"


def test_asking_for_kernels_does_not_break_a_graph(monkeypatch):
    def load():
        with open(_C.__file__, "rb"):  # torch.compile cannot look into this
            return "loaded"

    devices._serves.cache_clear()
    monkeypatch.setattr(devices, "_too_old", lambda gpu: None if load() and gpu else "old")
    monkeypatch.setattr(devices, "cuda_state", lambda: f"; {load()}")

    @torch.compile(backend="eager", fullgraph=True)
    def which(x):
        return x + sum(torch.device("cuda", gpu) in KERNEL_DEVICES for gpu in (0, 1, 2))

    assert which(torch.zeros(1)).item() == 2
    devices._serves.cache_clear()


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
    decoding=0,  # by the rows, first, within
):
    return _C.cuda_choice(
        M, N, K, groups, dtype, compute, four_bit, straight, dropout, hopper, decoding, 132
    )[:3]


def splits(M, N, K=4096, groups=1, four_bit=True, straight=True, multiprocessors=132):
    return _C.cuda_choice(
        M, N, K, groups, BFLOAT16, BFLOAT16, four_bit, straight, False, False, 0, multiprocessors
    )[3]


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
def test_where_a_weight_is_decoded_is_forced_wherever_it_can_be():
    assert choice(16, decoding=1) == ("tiled", 32, True)
    assert choice(4096, decoding=2) == ("tiled", 128, False)
    assert choice(4096, N=128256, decoding=1) == ("tiled", 128, False)  # does not fit
    assert choice(8, K=4090, decoding=2) == ("tiled", 32, True)  # cannot be decoded within the product
    assert choice(4096, four_bit=False, decoding=1) == ("tiled", 128, False)


@emulated
def test_blocks_part_the_reduction_where_they_are_few():
    assert splits(1, N=4096) == 1  # 128 blocks
    assert splits(1, N=1024) == 4  # 32 blocks
    assert splits(1, N=1024, K=2048) == 2  # each has 1024 of the reduction at least
    assert splits(1, N=1024, K=1024) == 1
    assert splits(1, N=2048) == 2
    assert splits(1, N=2048, multiprocessors=64) == 1
    assert splits(8, N=4096, straight=False) == 4  # backward: 32 blocks of 128 columns
    assert splits(48, N=4096, straight=False) == 2
    assert splits(256, N=1024, four_bit=False) == 8  # 16 blocks; no more than 512 of the reduction to each
    assert splits(4096, N=4096) == 1
    assert splits(64, N=1024, groups=8) == 1


@emulated
@pytest.mark.parametrize("M", [1, 16, 300, 4096, 65536])
@pytest.mark.parametrize("N", [64, 1000, 4096, 14336])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_blocks_of_one_pass(M, N, rank):
    across, along, pays = _C.cuda_one_pass(M, N, rank, 132)
    tiles = -(-rank // 16)
    assert 1 <= across <= -(-N // 256) and 1 <= along <= -(-M // 64)
    assert across * along * tiles >= 264 or (across, along) == (-(-N // 256), -(-M // 64))
    assert pays == ((across * M + (along - 1) * N) * rank * 8 < 2 * M * N)


@emulated
def test_one_pass_pays_for_the_usual_ranks():
    assert _C.cuda_one_pass(4096, 4096, 16, 132) == (16, 17, True)
    assert _C.cuda_one_pass(4096, 4096, 32, 132)[2] and not _C.cuda_one_pass(4096, 4096, 128, 132)[2]
    assert _C.cuda_one_pass(1, 4096, 16, 132) == (16, 1, True)


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
    if quantized and K % 64 == 0:
        M = 512  # of fewer rows, such a weight is decoded within the product
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
    seed = torch.tensor([12345], device="cpu")
    on_cpu = layer({name: tensor.cpu().float() for name, tensor in problem.items()}, seed)
    torch.testing.assert_close(layer(problem, seed.cuda()).float().cpu(), on_cpu, rtol=0.02, atol=0.02)


@on_gpu
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 96), (7, 33)], ids=str)
def test_codes_and_scales_are_those_of_the_cpu(quant_type, shape):
    weight = torch.randn(shape, device="cpu")
    ours, theirs = (
        ops.fourbit_quantize(w, quant_type=quant_type, nested=False) for w in (weight.cuda(), weight)
    )
    assert torch.equal(ours.packed.cpu(), theirs.packed) and torch.equal(ours.absmax.cpu(), theirs.absmax)
    assert torch.equal(ops.fourbit_dequantize(ours).cpu(), ops.fourbit_dequantize(theirs))


@on_gpu
def test_nested_scales_are_those_of_the_cpu():
    """Of one mean: that of the scales may differ in its last bit."""
    operands = torch.rand(700), torch.tensor(0.5), reference.dynamic_code()
    ours, theirs = (
        torch.ops.peftfast.fourbit_quantize_absmax(*(tensor.to(device) for tensor in operands), 256)
        for device in ("cuda", "cpu")
    )
    assert all(torch.equal(one.cpu(), other) for one, other in zip(ours, theirs, strict=True))


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


def assert_replays(run, change):
    """Nothing in run() waits for the GPU, and its graph gives after change() what run() gives then."""
    stream = torch.cuda.Stream()  # a graph with a backward in it wants to be tried on one first
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            before = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        change()
    graph.replay()
    torch.cuda.synchronize()
    for got, wanted, earlier in zip(captured, run(), before, strict=True):
        assert torch.equal(got, wanted) and not torch.equal(got, earlier)


def random(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


either = pytest.mark.parametrize("quantized", [False, True], ids=["dense", "4-bit"])


def linear_of(weight, quantized):
    """The operator of a linear layer and the weight as it takes it."""
    return (ops.fourbit_linear, ops.fourbit_quantize(weight)) if quantized else (ops.lora_linear, weight)


@on_gpu
@pytest.mark.parametrize("M", [1, 70, 600])
@either
def test_captured_in_a_graph(M, quantized):
    x, A, B = leaves = [t.requires_grad_() for t in (random(M, 128), random(8, 128) / 10, random(130, 8))]
    linear, weight = linear_of(random(130, 128) / 10, quantized)
    gradient, seed = random(M, 130), torch.tensor([3], device="cuda")

    def run():
        y = linear(x, weight, A, B, 0.5, dropout=0.3, seed=seed)
        return y.detach(), *torch.autograd.grad(y, leaves, gradient)

    def change():
        x.copy_(random(M, 128))
        B.copy_(random(130, 8))
        seed.fill_(4)

    assert_replays(run, change)


@on_gpu
def test_groups_captured_in_a_graph():
    x, bias = leaves = [random(40, 32).requires_grad_(), random(4, 64).requires_grad_()]
    weight, gradient = random(4, 64, 32), random(64, 64)
    rows = torch.randint(40, (64,), device="cuda")
    offsets = torch.tensor([0, 10, 10, 40, 64], device="cuda")

    def run():
        y = ops.grouped_linear(x, weight, offsets, rows=rows, bias=bias)
        return y.detach(), *torch.autograd.grad(y, leaves, gradient)

    def change():
        rows.copy_(torch.randint(40, (64,)))
        offsets.copy_(torch.tensor([0, 20, 30, 31, 60]))

    assert_replays(run, change)


def experts(x, index, weights, up, down, factors):
    """A layer of experts with all that it may do: sorting, both projections with adapters, and what is in between."""
    routing = Routing(index, up.shape[0])
    A, B, C, D = factors
    slots = torch.where(routing.experts == 1, -1, routing.experts)
    hidden = routing.linear(x, up, A, B, 2.0, slots=slots, gather=True)
    y = routing.combined_linear(hidden, weights, down, C, D, 0.5, slots=routing.experts, activation="silu")
    return y + routing.combine(routing.repeat(x), weights)


def problem_of_experts(quantized, tokens=64, count=4, H=64, width=32):
    """The leaves x, weights and four factors; the chosen experts; the two weights."""
    up, down = random(count, 2 * width, H) / 10, random(count, H, width) / 10
    if quantized:
        up, down = ops.fourbit_quantize(up), ops.fourbit_quantize(down)
    shapes = (count, 4, H), (count, 2 * width, 4), (count, 4, width), (count, H, 4)
    leaves = [random(tokens, H), torch.rand(tokens, 2, device="cuda"), *(random(*s) / 10 for s in shapes)]
    index = torch.randint(count, (tokens, 2), device="cuda")
    return [leaf.requires_grad_() for leaf in leaves], index, up, down


def run_experts(leaves, index, up, down):
    """The output and the gradients of the leaves."""
    x, weights, *factors = leaves
    y = experts(x, index, weights, up, down, factors)
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)


@on_gpu
@either
def test_experts_captured_in_a_graph(quantized):
    leaves, index, up, down = problem_of_experts(quantized)

    def change():
        leaves[0].copy_(random(*leaves[0].shape))
        index.copy_(torch.randint(5, index.shape))  # 4: no expert

    assert_replays(lambda: run_experts(leaves, index, up, down), change)


@on_gpu
@either
def test_a_negative_index_stands_for_no_expert(quantized):
    leaves, index, up, down = problem_of_experts(quantized)
    index[::3, 1] = -1
    index[5] = -7
    none = index.masked_fill(index < 0, 4)
    for ours, wanted in zip(
        run_experts(leaves, index, up, down), run_experts(leaves, none, up, down), strict=True
    ):
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.02)


@on_gpu
def test_gradients_add_up_to_the_same_bits():
    """Of rows that are used often, and of a bias: in fp32, where the order of a sum shows."""
    x = torch.randn(7, 64, device="cuda", requires_grad=True)
    bias = torch.randn(4, 48, device="cuda", requires_grad=True)
    weight, gradient = torch.randn(4, 48, 64, device="cuda"), torch.randn(5000, 48, device="cuda")
    rows = torch.randint(7, (5000,), device="cuda")
    offsets = torch.tensor([0, 1000, 1010, 1010, 4990], device="cuda")

    def run():
        y = ops.grouped_linear(x, weight, offsets, rows=rows, bias=bias)
        return torch.autograd.grad(y, (x, bias), gradient)

    once = run()
    for _ in range(20):
        assert all(map(torch.equal, run(), once))
    group = torch.bucketize(torch.arange(5000, device="cuda"), offsets[1:], right=True)
    kept = group < 4
    exact = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in (x, bias)]
    products = torch.einsum("mn,mnk->mk", gradient[kept].double(), weight.double()[group[kept]])
    exact[0].index_add_(0, rows[kept], products)
    exact[1].index_add_(0, group[kept], gradient[kept].double())
    for ours, wanted in zip(once, exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-3)


@on_gpu
def test_tensors_on_different_devices_are_refused(problem):
    with pytest.raises(ValueError, match=r"lora_A\[0\] is on cpu, but x is on cuda"):
        layer(problem | {"A": problem["A"].cpu()}, torch.tensor([3], device="cuda"))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@either
def test_on_a_gpu_that_is_not_the_current_one(problem, quantized):
    linear, weight = linear_of(problem["weight"], quantized)
    gradient = random(70, 130)

    def run(device):
        x, A, B = leaves = [problem[name].detach().to(device).requires_grad_() for name in ("x", "A", "B")]
        seed = torch.tensor([3], device=device)
        y = linear(x, weight.to(device), A, B, 0.5, dropout=0.3, seed=seed)
        results = y.detach(), *torch.autograd.grad(y, leaves, gradient.to(device))
        assert all(result.device == x.device for result in results)
        return results

    assert torch.cuda.current_device() == 0
    for there, here in zip(run("cuda:1"), run("cuda:0"), strict=True):
        torch.testing.assert_close(there.cpu(), here.cpu(), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match=r"lora_A\[0\] is on cuda:1, but x is on cuda:0"):
        layer(problem | {"A": problem["A"].to("cuda:1")}, torch.tensor([3], device="cuda:0"))


@on_gpu
def test_a_call_leaves_no_memory_behind(problem):
    seed = torch.tensor([3], device="cuda")
    layer(problem, seed)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        layer(problem, seed)
    assert torch.cuda.memory_allocated() == before


@contextlib.contextmanager
def no_memory_left():
    """As if the GPU had no more than what is in use."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@on_gpu
@either
def test_out_of_memory_leaves_nothing_behind(quantized):
    leaves = x, A, B = [t.requires_grad_() for t in (random(2**17, 128), random(8, 128), random(1024, 8))]
    linear, weight = linear_of(random(1024, 128), quantized)

    def run():
        return linear(x, weight, A, B, 0.5)

    def fails(function):
        gc.collect()
        before = torch.cuda.memory_allocated()
        with no_memory_left(), pytest.raises(RuntimeError, match="out of memory"):
            function()
        gc.collect()
        assert torch.cuda.memory_allocated() == before

    y = run()
    gradient = torch.ones_like(y)
    wanted = torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    fails(run)
    fails(lambda: torch.autograd.grad(y, leaves, gradient, retain_graph=True))
    assert torch.equal(run(), y)
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, gradient), wanted))


ROWS = 2**20  # of 2064 elements: more than 2**31 in all
holds_them = pytest.mark.skipif(
    "cuda" in KERNEL_DEVICES and torch.cuda.get_device_properties(0).total_memory < 24e9,
    reason="needs a GPU of 24 GB",
)


@on_gpu
@holds_them
def test_an_input_past_32_bits():
    """Its last rows come out as they do alone; that others have no gradient leaves the sums over all rows to them."""
    x, weight, A, B = random(ROWS, 2064), random(16, 2064) / 50, random(4, 2064) / 50, random(16, 4)
    gradient, last = torch.zeros_like(x[:, :16]), slice(-64, None)
    gradient[last] = random(64, 16)

    def run(x, gradient):
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = ops.lora_linear(leaves[0], weight, *leaves[1:], 0.5)
        return y.detach(), *torch.autograd.grad(y, leaves, gradient)

    y, grad_x, *of_factors = run(x, gradient)
    alone = run(x[last].clone(), gradient[last])
    for ours, wanted in zip((y[last], grad_x[last], *of_factors), alone, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.02)
    assert not grad_x[:-64].any()


@on_gpu
@holds_them
def test_dropout_past_32_bits():
    """The mask, read off an output of x = 1 at one place of each row, and off the gradient of x."""
    x = torch.zeros(ROWS, 2064, dtype=torch.bfloat16, device="cuda")
    row, column = torch.arange(-64, 0, device="cuda"), 32 * torch.arange(64, device="cuda") + 7
    x[row, column] = 1
    x.requires_grad_()
    weight, A, B = torch.zeros_like(x[:16]).detach(), torch.ones_like(x[:1]), torch.ones_like(x[:16, :1])
    y = ops.lora_linear(x, weight, A, B, 1.0, dropout=0.5, seed=torch.tensor([5], device="cuda"))
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    elements = torch.arange((ROWS - 64) * 2064 // 4, ROWS * 2064 // 4, device="cpu")
    mask = (reference.philox(elements, 0, 5).view(64, 2064) >= 2**31).cuda()
    assert torch.equal(grad_x[-64:] != 0, mask)
    assert torch.equal(y[-64:, 0] != 0, mask[row, column])


@on_gpu
@holds_them
def test_a_weight_past_32_bits():
    """Its last rows are quantized, decoded and multiplied as they are alone."""
    weight, last = random(ROWS, 2064), slice(-64, None)
    whole, part = (ops.fourbit_quantize(w, nested=False) for w in (weight, weight[last].clone()))
    for ours, wanted in ((whole.packed, part.packed), (whole.absmax, part.absmax)):
        assert torch.equal(ours.view(-1)[-wanted.numel() :], wanted.view(-1))
    assert torch.equal(ops.fourbit_dequantize(whole)[last], ops.fourbit_dequantize(part))
    for M in (1, 70, 600):
        x = random(M, 2064).requires_grad_()
        y, alone = ops.fourbit_linear(x, whole), ops.fourbit_linear(x, part)
        torch.testing.assert_close(y[:, last], alone, rtol=0.02, atol=0.5)  # of about 45
        gradient = torch.zeros_like(y)
        gradient[:, last] = random(M, 64)
        ours, wanted = (
            torch.autograd.grad(of, x, g)[0] for of, g in ((y, gradient), (alone, gradient[:, last]))
        )
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.1)  # of about 8


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


# ---- on a GPU, PEFT's and bitsandbytes' layers against themselves ----------------------------------------------------

MODES = [  # the dtype of the model or of its input, and that of autocast
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
]


@on_gpu
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype, autocast", MODES, ids=str)
def test_adapters_of_peft(dtype, autocast, architecture):
    """A step of a model: what it gives, and the gradients of all adapters."""
    from test_peft import assert_as_close_to_float64, assert_parity, batch, build

    with torch.device("cuda"):
        model = build(architecture, dtype).eval()
        if dtype == torch.float32 and autocast is None:
            assert_parity(model, batch(architecture))
        else:
            assert_as_close_to_float64(model, architecture, autocast)


@on_gpu
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "dtype, autocast", [*MODES, (torch.float16, None), (torch.float16, torch.float16)], ids=str
)
@pytest.mark.parametrize("inputs, nested", [(128, True), (96, False)])
def test_layers_of_bitsandbytes(inputs, nested, dtype, autocast, storage):
    """Alone and under PEFT's adapters; one row without gradients too, which bitsandbytes multiplies in another way."""
    pytest.importorskip("bitsandbytes")
    from test_bitsandbytes import adapted, assert_parity, in_float64, quantized

    with torch.device("cuda"):
        layer = quantized(inputs, 96, blocksize=64, nested=nested, quant_storage=storage)
        assert layer.weight.dtype == storage and layer.weight.is_cuda
        for model in (layer, adapted(copy.deepcopy(layer))):
            for rows in (1, 40, 600):
                assert_parity(model, torch.randn(rows, inputs).to(dtype), autocast, slack=1e-6)
            x = torch.randn(1, inputs).to(dtype)
            with torch.no_grad(), torch.autocast("cuda", autocast, enabled=autocast is not None):
                stock = model(x)
                with peftfast.enabled(strict=True):
                    ours = model(x)
            # Of 96 values, by no more than a rounding worse.
            slack = torch.finfo(ours.dtype).eps / 2
            assert_as_accurate(ours, stock, in_float64(model)(x.double()), slack=slack)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
@either
def test_adapters_of_peft_on_experts(kind, dtype, quantized):
    from test_experts import adapted, base_model, choosing_all, dequantized, quantize_experts, results

    with torch.device("cuda"):
        model = choosing_all(base_model(kind, dtype))
        rival = dequantized(quantize_experts(model)) if quantized else copy.deepcopy(model)
        model, rival = adapted(model), adapted(rival)
        rival.set_experts_implementation("eager")
        exact, stock = results(copy.deepcopy(rival).double()), results(rival)
        with peftfast.enabled(strict=True):
            ours = results(model)
    for name, value in stock.items():
        assert ours[name].dtype == value.dtype
        assert_as_accurate(ours[name], value, exact[name], factor=1.25, slack=1e-6, name=name)
