import os

# Before anything imports huggingface_hub: a test never reaches for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import peftfast


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "every_isa: the core checks that test_isa.py repeats under each instruction set"
    )


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Every test starts from the same seed, on stock PEFT, and leaves the process as it found it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    peftfast.disable()
    torch.set_num_threads(threads)
