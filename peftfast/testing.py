"""What the tests and the benchmarks share: the tolerance rule, and timing in turn.

The tolerance rule says when a result is right. The error of a result is ‖result - oracle‖ / ‖oracle‖, where
the oracle is the same computation in float64 (`peftfast.reference`); on the same inputs our error may
be at most 1.1 times that of the eager path that we replace. So the tolerance follows from the dtype and the
shape, and no absolute number has to be guessed.

A speed is a ratio of two things that are timed in turn (A B A B ...) in one process, because the speed of a
shared machine drifts by more than the differences of interest.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "Timing",
    "assert_as_accurate",
    "bytes_saved_for_backward",
    "relative_error",
    "speedup",
    "time_in_turn",
]


# ---------------------------------------------------------------------------------------------- accuracy


def relative_error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    """‖out - oracle‖ / ‖oracle‖ in float64 (Frobenius norms).

    Args:
        out: a result of any dtype and device, of any shape.
        oracle: the exact result, of the same shape.

    Returns:
        The relative error. Where the oracle is zero everywhere (or has no elements) there is no scale to
        relate to: 0.0 if `out` is zero everywhere too, infinity otherwise. A NaN in either gives NaN.

    Raises:
        ValueError: the shapes differ.
    """
    distance, norm = _distance_and_norm(out, oracle)
    return _ratio(distance, norm)


def assert_as_accurate(
    ours: torch.Tensor,
    eager: torch.Tensor,
    oracle: torch.Tensor,
    *,
    factor: float = 1.1,
    slack: float = 0.0,
    name: str = "output",
) -> None:
    """Assert that `ours` is as close to the oracle as `eager` is.

    The rule is error(ours) <= factor · max(error(eager), error(rounded)) + slack, where `rounded` is the
    oracle rounded to the dtype of `ours`: no result of that dtype can be nearer than that, so an eager
    path that happened to be exact does not make the rule impossible to meet.

    Args:
        ours: the result under test.
        eager: the result of the path that it replaces, on the same inputs.
        oracle: the same in float64.
        factor: how much larger than the eager path's our error may be.
        slack: an additional relative error to allow; for tensors of a handful of elements, where the ratio
            of two rounding errors is luck.
        name: what is compared, for the message.

    Raises:
        AssertionError: ours is less accurate, or is not finite where the oracle is; the message gives both
            errors.
        ValueError: the shapes differ, or the oracle is not finite (it then judges nothing).
    """
    __tracebackhide__ = True
    oracle = oracle.detach()
    if not torch.isfinite(oracle).all():
        raise ValueError(f"{name}: the oracle holds values that are not finite")
    distance, norm = _distance_and_norm(ours, oracle)
    eager_distance, _ = _distance_and_norm(eager, oracle)
    rounded_distance, _ = _distance_and_norm(oracle.to(ours.dtype), oracle)
    # max() must not let a NaN of the eager path through as the bound.
    bounds = [d for d in (eager_distance, rounded_distance) if d == d]
    # Distances, not relative errors: the same rule, and it still means something where the norm is zero.
    allowed = factor * max(bounds) + slack * norm
    if distance <= allowed:
        return
    raise AssertionError(
        f"{name} of shape {tuple(ours.shape)}, {ours.dtype}: our error {_describe(distance, norm)} is larger "
        f"than {factor:g} times the eager path's {_describe(eager_distance, norm)}"
        f" (rounding alone: {_describe(rounded_distance, norm)}{f'; slack {slack:.3g}' if slack else ''})"
    )


def _distance_and_norm(out: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    if out.shape != oracle.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)} and the oracle's {tuple(oracle.shape)}")
    exact = oracle.detach().to("cpu", torch.float64)
    distance = torch.linalg.vector_norm(out.detach().to("cpu", torch.float64) - exact).item()
    return distance, torch.linalg.vector_norm(exact).item()


def _ratio(distance: float, norm: float) -> float:
    if norm == 0.0:
        return distance if distance == 0.0 or distance != distance else float("inf")
    return distance / norm


def _describe(distance: float, norm: float) -> str:
    return f"{distance / norm:.3e}" if norm else f"{distance:.3e} (absolute, the oracle is zero)"


# ------------------------------------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing:
    """The durations of one contender, one per round, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def rounds(self) -> int:
        return len(self.seconds)


def time_in_turn(
    contenders: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 25,
    warmup: int = 1,
    budget: float = 10.0,
    least: int = 3,
    contexts: Mapping[str, Callable[[], contextlib.AbstractContextManager]] | None = None,
    before: Callable[[], Any] | None = None,
    cuda: bool = False,
) -> dict[str, Timing]:
    """Time several callables in turn, A B C A B C ..., so that all see the same moods of the machine.

    Args:
        contenders: name to callable; a callable takes nothing, and its result is dropped.
        repeats: the number of timed rounds to aim for.
        warmup: the number of rounds run before them and not counted.
        budget: seconds for the timed rounds of all contenders together; rounds stop when the next one would
            no longer fit.
        least: the number of rounds that are run whatever the budget.
        contexts: name to a function that returns a context manager; it is entered around each call of that
            contender, outside the timed span.
        before: called before every call, outside the timed span (to empty the caches, say).
        cuda: time by events on the current CUDA stream rather than by the host's clock.

    Returns:
        A `Timing` per name; all have the same number of rounds, and round i of one ran beside round i
        of every other.
    """
    contexts = contexts or {}

    def run(name: str) -> float:
        with contexts.get(name, contextlib.nullcontext)():
            if before is not None:
                before()
            return _seconds(contenders[name], cuda)

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # A collection in the middle of one contender's call would be charged to it alone.
    try:
        for _ in range(warmup):
            for name in contenders:
                run(name)
        begin = time.perf_counter()
        for done in range(1, max(repeats, least) + 1):
            for name in contenders:
                seconds[name].append(run(name))
            spent = time.perf_counter() - begin
            if done >= least and spent * (done + 1) / done > budget:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def speedup(ours: Timing, rival: Timing) -> float:
    """How many times faster `ours` is: the median over rounds of rival's time / our time.

    Both must come from one call of `time_in_turn`: pairing the neighbours cancels the machine's drift,
    which a ratio of two medians keeps.

    Raises:
        ValueError: the numbers of rounds differ.
    """
    if ours.rounds != rival.rounds:
        raise ValueError(f"not timed in turn: {ours.rounds} rounds against {rival.rounds}")
    return statistics.median(theirs / mine for mine, theirs in zip(ours.seconds, rival.seconds, strict=True))


def _seconds(function: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        # Recorded on an idle stream, so a call that is bound by its kernel launches is charged for them.
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ memory


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """The bytes by which memory grows, at its highest, while `function` runs: what it returns and all it needs for it.

    Of a GPU its tensors count, of the CPU the resident memory of the whole process (Linux). There a function that ran
    before finds its scratch memory still allocated, and what other threads do counts too.

    Raises:
        OSError: the system does not let the process reset its own peak.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = function()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide as much of the peak
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    result = function()
    del result
    return max(0, _resident("VmHWM") - before)


def _resident(entry: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[entry].split()[0]) * 1024


def bytes_saved_for_backward(function: Callable[[], Any], besides: Iterable[torch.Tensor] = ()) -> int:
    """The bytes that autograd keeps alive between `function()` and its backward pass.

    Every storage counts once and whole, however many views of it are saved, since any one of them keeps all
    of it.

    Args:
        function: a forward pass; it is run once with gradients enabled.
        besides: tensors that live on anyway and whose storages are not counted: the input, the parameters.

    Returns:
        The number of bytes.
    """
    alive: list[torch.Tensor] = []  # Holding them keeps an address from being used twice.

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor.detach())
        return alive[-1]  # Not the tensor itself: a node that saves its own output would then never be freed.

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in alive)}
    del result
    return sum(size for address, size in storages.items() if address not in known)
