"""The tolerance rule and the timing helpers: what the other tests and the benchmarks rely on."""

import math
import time

import pytest
import torch

from peftfast.testing import (
    assert_as_accurate,
    bytes_saved_for_backward,
    peak_memory,
    relative_error,
    speedup,
    time_in_turn,
)


@pytest.fixture
def oracle():
    return torch.randn(64, 64, dtype=torch.float64)


def test_relative_error(oracle):
    assert 0 < relative_error(oracle.float(), oracle) < 1e-7
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.ones(3), torch.zeros(3)) == math.inf
    assert math.isnan(relative_error(torch.tensor([math.nan]), torch.zeros(1)))
    with pytest.raises(ValueError):
        relative_error(oracle[0], oracle)


def test_as_accurate_accepts_what_the_eager_path_or_one_rounding_does(oracle):
    assert_as_accurate(oracle.bfloat16(), oracle.bfloat16(), oracle)
    assert_as_accurate(oracle.bfloat16(), oracle, oracle)
    assert_as_accurate(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3))
    assert_as_accurate(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("scale", [1.01, math.nan], ids=["too large", "nan"])
def test_as_accurate_refuses_more_error(oracle, scale):
    with pytest.raises(AssertionError):
        assert_as_accurate(oracle.bfloat16() * scale, oracle.bfloat16(), oracle)


def test_as_accurate_refuses_something_where_nothing_is_due():
    with pytest.raises(AssertionError):
        assert_as_accurate(torch.full((2,), 1e-3), torch.zeros(2), torch.zeros(2))


def test_as_accurate_refuses_an_infinite_oracle(oracle):
    with pytest.raises(ValueError):
        assert_as_accurate(oracle, oracle, oracle * math.inf)


def test_contenders_take_turns():
    order = []
    contenders = {
        "a": lambda: (order.append("a"), time.sleep(0.002)),
        "b": lambda: (order.append("b"), time.sleep(0.02)),
    }
    timings = time_in_turn(contenders, repeats=4, warmup=1)
    assert "".join(order) == "ab" * 5
    assert timings["a"].rounds == 4
    assert speedup(timings["a"], timings["b"]) > 1


def test_a_budget_ends_the_rounds():
    assert time_in_turn({"a": lambda: time.sleep(0.05)}, repeats=100, budget=0.2)["a"].rounds <= 5


def test_bytes_saved_for_backward():
    x, w = (torch.randn(10, 10, requires_grad=True) for _ in range(2))
    assert bytes_saved_for_backward(lambda: x @ w) == 800
    assert bytes_saved_for_backward(lambda: x @ w, [x, w]) == 0
    assert bytes_saved_for_backward(lambda: (x @ w).exp().sum(), [x, w]) == 400


def test_peak_memory_is_what_a_function_needs_at_once():
    size = 2**26

    def run():
        torch.ones(size // 4)  # freed before the next
        return torch.ones(size // 4) * 2

    run()
    assert 1.9 * size < peak_memory(run) < 2.3 * size
    assert peak_memory(lambda: None) < size // 8
