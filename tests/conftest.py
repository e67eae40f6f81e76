import os
import sys

# Before anything imports huggingface_hub: a test never reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Before anything multiplies: what our error is compared with has no more instructions than we have.
if os.environ.get("PEFTFAST_CPU_ISA") == "avx2":
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = "AVX2"

import hypothesis
import pytest
import torch

import peftfast
from peftfast.ops.devices import KERNEL_DEVICES, cuda_state

hypothesis.settings.register_profile("fuzz", max_examples=10_000)  # --hypothesis-profile fuzz


def bitsandbytes_misreads(inputs, blocksize=64):
    """Whether bitsandbytes 0.50.2 decodes a weight of so many columns wrongly here: blocks that straddle rows, on a CPU
    with AVX-512. A test cannot hold us to that."""
    avx512 = not on_a_gpu() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return avx512 and inputs % blocksize != 0 and blocksize < 2048


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where tensors are made, also at import: test_lora, _fourbit, _moe, _rowwise, _nn, _peft, _bitsandbytes, "
        "_experts, _expert_lora, _mixture_lora, _mixed_batches, _matrix",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "every_isa: the core checks that test_isa.py repeats under each instruction set"
    )
    device = config.getoption("--device")
    if device not in KERNEL_DEVICES:
        raise pytest.UsageError(f"--device {device}: {cuda_state()}.")
    if device != "cpu":
        torch.set_default_device(device)
        torch.backends.cudnn.deterministic = True  # what falls back is compared to the bit


def on_a_gpu():
    """Whether tensors are made there."""
    return torch.get_default_device().type == "cuda"


def generator(seed):
    """Of numbers that are the same at every call, for tensors that are made where they are by default."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_states():
    """Of every generator that a test could draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if on_a_gpu() else [])]


@pytest.fixture
def without_matplotlib(monkeypatch):
    """As if it were not installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Every test starts from the same seed, on stock PEFT, and leaves the process as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    peftfast.disable()
    torch.set_num_threads(threads)
