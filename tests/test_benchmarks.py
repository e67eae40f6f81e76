"""What the benchmarks time on a GPU is what its acceptance bars ask for, and the bars tell fast from slow."""

import importlib
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

# Of each: ours, and rivals.
CONTENDERS = {
    "lora": (
        ["peftfast default", "peftfast best"],
        ["PEFT default", "PEFT best", "PEFT compiled", "dense"],
    ),
    "fourbit": (
        ["peftfast Linear4bit", "peftfast bitsandbytes"],
        ["bitsandbytes", "bitsandbytes 16-bit adapters", "dense"],
    ),
    "moe": (
        ["peftfast", "peftfast 4-bit"],
        ["PEFT grouped_mm", "PEFT eager", "frozen grouped_mm"],
    ),
}


@pytest.fixture(params=CONTENDERS)
def bench(request, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module(f"bench_{request.param}")


def points_of(bench, monkeypatch):
    """Those of --quick on a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        options = bench.parse(["--quick", "--device", "cuda"])
    return list((bench.quick if bench.__name__ == "bench_lora" else bench.points)(options))


def made_up(bench, points, times, share, skipped=()):
    """Rows in which ours is so many times faster than each rival, one by one and as graphs."""
    ours, rivals = CONTENDERS[bench.__name__.removeprefix("bench_")]
    rows = []
    for point in points:
        found = {}
        for form in ("", ", graph"):
            found |= {name + form: {"ours": False, "peak_bytes": 9e9} for name in rivals}
            for name in ours:
                speedup = {rival: times for rival in found if not found[rival]["ours"]}
                found[name + form] = {
                    "ours": True,
                    "median_ms": 1.0,
                    "speedup": speedup,
                    "ceiling_share": share,
                    "peak_bytes": 9e9 / times,
                }
        found |= {name: {"ours": False, "skipped": "it failed"} for name in skipped}
        rows.append({"point": asdict(point), "implementations": found})
    return rows


@pytest.mark.parametrize(
    ("times", "share", "verdict"), [(10.0, 0.9, "reached"), (0.5, 0.1, "not reached")], ids=["fast", "slow"]
)
def test_the_bars_of_a_gpu(bench, monkeypatch, times, share, verdict):
    rows = made_up(bench, points_of(bench, monkeypatch), times, share)
    bars = bench.gpu_acceptance(rows)
    assert {bar["verdict"] for bar in bars} == {verdict}, bars
    assert all(bar["seen"] for bar in bars)


def test_what_was_not_timed_is_no_verdict(bench, monkeypatch):
    assert {bar["verdict"] for bar in bench.gpu_acceptance([])} == {"not in this run"}
    points = points_of(bench, monkeypatch)
    bars = bench.gpu_acceptance(made_up(bench, points[-1:], 10.0, 0.9))  # not all that a bar covers
    assert {bar["verdict"] for bar in bars} <= {"not in this run", "not measurable here"}


def test_a_rival_that_did_not_run_gives_no_verdict(bench, monkeypatch):
    if bench.__name__ == "bench_moe":
        pytest.skip("there PEFT's best is the best of what ran")
    skipped = CONTENDERS[bench.__name__.removeprefix("bench_")][1][:1]
    rows = made_up(bench, points_of(bench, monkeypatch), 10.0, 0.9, skipped)
    assert bench.gpu_acceptance(rows)[0]["verdict"] == "not measurable here"


def test_a_rival_that_takes_too_long_is_not_called_again_and_again(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    record = importlib.import_module("record")
    calls = {"slow": [], "slow at first": [], "ours": []}

    def contender(name, ours=False):
        def run():
            calls[name].append(None)
            if name != "slow at first" or len(calls[name]) == 1:
                time.sleep(0.3)

        return record.Contender(run, flops=1.0, bytes_moved=1.0, ours=ours)

    row = record.measure(
        {"dtype": "fp32"},
        {"slow": contender("slow"), "slow at first": contender("slow at first"), "ours": contender("ours", ours=True)},
        {"fp32": {"flops_per_second": 1.0}, "bandwidth": {"bytes_per_second": 1.0}},
        cap=0.25, budget=0.0,
    )  # fmt: skip
    found = row["implementations"]
    assert found["slow"]["skipped"] == "> 0.25 s a call" and found["slow"]["estimate_ms"] >= 300
    assert len(calls["slow"]) == 2 and len(calls["ours"]) > 2
    assert list(found["ours"]["speedup"]) == ["slow at first"]
