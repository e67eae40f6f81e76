"""The one record that every benchmark writes, and the one way in which they measure.

A benchmark describes its points (a point is one workload: shapes, dtype, direction) and, per point, its
contenders: what is ours, and what it is compared with. `measure` times the contenders of a point in
turn and relates each to the machine's measured ceilings. The rows, the machine's facts and the acceptance
bars make a `Record`: a JSON file, a table on the terminal, and a Markdown table.

    python benchmarks/record.py benchmarks/results/NAME.json        # an existing record as Markdown

The record, format 1:

    {"format": 1, "benchmark", "command", "date", "machine": {...},
     "ceilings": {"bandwidth": {"bytes_per_second", "by"}, "<dtype>": {"flops_per_second", "by"}},
     "rows": [{"point": {...}, "implementations": {name: implementation}}],
     "acceptance": [{"what", "bar", "seen", "verdict"}]}

An implementation is either {"ours", "median_ms", "minimum_ms", "rounds", "gflops", "gigabytes_per_second",
"ceiling_share", "bound", "saved_bytes", "peak_bytes"} and for ours also "speedup": {rival: times faster}; or {"ours",
"skipped": reason}, where a skipped one may carry "estimate_ms", extrapolated from fewer rows or seen in a single call,
and never used for a ratio. A benchmark of whole models adds "tokens_per_second", "build_seconds", "longest_tokens" and,
in bytes, "bytes_before_build", "rss_after_build" and "peak_rss".
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import peftfast
from peftfast.testing import speedup, time_in_turn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
RESULTS = Path(__file__).parent / "results"
GRAPH = ", graph"  # What the name of a contender that is a CUDA graph ends in.
BANDWIDTH_BYTES = 512 * 2**20  # The size of the buffer read to measure the bandwidth: beyond the caches.


# ----------------------------------------------------------------------------------------- the machine


def machine_facts(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers: the processor, what runs on it, and the versions."""
    facts = {
        "cpu": _cpu_model(),
        "isa": peftfast.build_info()["isa"],
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # Of the minute before; well below 1 on a machine to trust.
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("peftfast", "torch", "peft", "transformers", "bitsandbytes")
        },
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = properties.name
        facts["cuda"] = torch.version.cuda
    return facts


def measure_ceilings(dtypes: Iterable[torch.dtype], device: str) -> dict[str, dict[str, Any]]:
    """Measure what no kernel can exceed: FLOP/s per dtype, and bytes/s of memory.

    On the CPU the FLOP/s are those of back-to-back multiply-adds on all threads, of the instruction that our
    kernels use for the dtype. On a GPU they are those of a square matrix product of torch, which is a lower
    bound of the ceiling. The bandwidth is the better of summing a large fp32 tensor (one read) and copying
    it (a read and a write).
    """
    ceilings: dict[str, dict[str, Any]] = {"bandwidth": _bandwidth(device)}
    for dtype in dtypes:
        if device == "cuda":
            flops, by = _matmul_flops(dtype), "torch.mm of 8192 x 8192"
        else:
            flops = max(peftfast.machine_peak(dtype) for _ in range(3))
            by = f"back-to-back multiply-adds, {peftfast.build_info()['isa']}"
        ceilings[short(dtype)] = {"flops_per_second": flops, "by": by}
    return ceilings


def _bandwidth(device: str) -> dict[str, Any]:
    source = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    target = torch.empty_like(source)
    timings = time_in_turn(
        {"sum": source.sum, "copy": lambda: target.copy_(source)},
        repeats=7,
        budget=5.0,
        cuda=device == "cuda",
    )
    rates = {
        f"torch.sum of {BANDWIDTH_BYTES >> 20} MiB": BANDWIDTH_BYTES / timings["sum"].minimum,
        f"copy of {BANDWIDTH_BYTES >> 20} MiB": 2 * BANDWIDTH_BYTES / timings["copy"].minimum,
    }
    by = max(rates, key=rates.__getitem__)
    return {"bytes_per_second": rates[by], "by": by}


def _matmul_flops(dtype: torch.dtype, size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_in_turn({"mm": lambda: a @ b}, repeats=9, cuda=True)["mm"].minimum


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bf16"."""
    return next(name for name, known in DTYPES.items() if known == dtype)


# --------------------------------------------------------------------------------------- one measurement


@dataclass
class Contender:
    """One implementation at one point.

    Attributes:
        run: the call to time.
        flops, bytes_moved: the work that cannot be avoided: multiply-adds count 2, and each operand is read
            or written once. They give GFLOP/s and the share of the ceiling.
        ours: ours is compared with every contender that is not.
        context: returns a context manager to hold around each call.
        shrunk: given a number of rows below `rows`, the same call on so many; used to foretell how long
            `run` takes without waiting for it.
        rows: the size of `run` in the unit of `shrunk`; the time is taken to be proportional to it.
        saved_bytes: what the forward pass keeps for backward, where that is part of the question.
        peak_bytes: by how much memory grows during `run`, where that is.
        unavailable: why this machine cannot run it at all; it is then recorded as skipped.
        capturable: False where it waits for results of the GPU on the way, which a CUDA graph cannot hold.
    """

    run: Callable[[], Any]
    flops: float
    bytes_moved: float
    ours: bool = False
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    shrunk: Callable[[int], Callable[[], Any]] | None = None
    rows: int = 0
    saved_bytes: Callable[[], int] | None = None
    peak_bytes: Callable[[], int] | None = None
    unavailable: str | None = None
    capturable: bool = True


def measure(
    point: dict[str, Any],
    contenders: dict[str, Contender],
    ceilings: dict[str, dict[str, Any]],
    *,
    cap: float,
    budget: float,
    repeats: int = 100,
    warmup: int = 1,
    least: int = 3,
    before: Callable[[], Any] | None = None,
    cuda: bool = False,
) -> dict[str, Any]:
    """Time the contenders of one point in turn and return a row of the record.

    A rival that is expected to need more than `cap` seconds for one call, or is seen to, or that fails, is recorded
    as skipped with the reason. Ours is never skipped: if it fails, so does the benchmark.

    Args:
        point: what is measured; `point["dtype"]` names the ceiling.
        contenders: name to contender.
        ceilings: from `measure_ceilings`.
        cap: seconds that one call of a rival may take.
        budget: seconds for the timed rounds together (at least `least` rounds are run).
        repeats, warmup, least: as in `time_in_turn`; each contender has run once even before the warm-up.
        before: called before each call, not timed.
        cuda: time with CUDA events.
    """
    implementations: dict[str, dict[str, Any]] = {}
    ready: dict[str, Contender] = {}
    for name, contender in contenders.items():
        implementations[name] = {"ours": contender.ours}
        if contender.unavailable:
            implementations[name]["skipped"] = f"unavailable: {contender.unavailable}"
            continue
        try:
            if not contender.ours and (estimate := _foretell(contender, cap)) > cap:
                implementations[name] |= _too_slow(estimate, cap)
                continue
            with contender.context():
                seconds = _seconds(contender.run)
                if not contender.ours and seconds > cap:
                    seconds = _seconds(contender.run)  # A first call may have compiled, too.
                    if seconds > cap:
                        implementations[name] |= _too_slow(seconds, cap)
                        continue
                if contender.saved_bytes is not None:
                    implementations[name]["saved_bytes"] = contender.saved_bytes()
                if contender.peak_bytes is not None:
                    implementations[name]["peak_bytes"] = contender.peak_bytes()
        except Exception as error:
            if contender.ours:
                raise
            lines = str(error).strip().splitlines() or ["no message"]
            implementations[name]["skipped"] = f"{type(error).__name__}: {lines[0][:200]}"
            continue
        ready[name] = contender

    timings = time_in_turn(
        {name: contender.run for name, contender in ready.items()},
        repeats=repeats,
        warmup=warmup,
        budget=budget,
        least=least,
        contexts={name: contender.context for name, contender in ready.items()},
        before=before,
        cuda=cuda,
    )
    peak = ceilings[point["dtype"]]["flops_per_second"]
    bandwidth = ceilings["bandwidth"]["bytes_per_second"]
    for name, contender in ready.items():
        timing = timings[name]
        compute, memory = contender.flops / peak, contender.bytes_moved / bandwidth
        implementation = implementations[name]
        implementation |= {
            "median_ms": _digits(timing.median * 1e3),
            "minimum_ms": _digits(timing.minimum * 1e3),
            "rounds": timing.rounds,
            "gflops": _digits(contender.flops / timing.median / 1e9),
            "gigabytes_per_second": _digits(contender.bytes_moved / timing.median / 1e9),
            "ceiling_share": _digits(max(compute, memory) / timing.median),
            "bound": "compute" if compute >= memory else "memory",
        }
        if contender.ours:
            implementation["speedup"] = {
                rival: _digits(speedup(timing, timings[rival])) for rival in ready if not ready[rival].ours
            }
    return {"point": point, "implementations": implementations}


def _foretell(contender: Contender, cap: float) -> float:
    """Estimate the seconds of one call from calls on fewer rows; 0.0 says that it may as well be tried.

    Few rows are bound by memory, and extrapolating from them says too much. So an estimate above the cap is
    checked with more rows for as long as that is cheap.
    """
    if contender.shrunk is None:
        return 0.0
    rows, estimate = 4, 0.0
    while rows < contender.rows:
        seconds = _seconds(contender.shrunk(rows))
        estimate = seconds * contender.rows / rows
        if estimate <= cap or 4 * seconds > cap:
            break
        rows *= 4
    else:
        return 0.0
    return estimate


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _too_slow(seconds: float, cap: float) -> dict[str, Any]:
    return {"skipped": f"> {cap:g} s a call", "estimate_ms": round(seconds * 1e3, 1)}


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


# -------------------------------------------------------------------------------------------- the record


@dataclass
class Record:
    """All that one run of a benchmark has found; see the module's text for the format."""

    benchmark: str
    machine: dict[str, Any]
    ceilings: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    acceptance: list[dict[str, str]] = field(default_factory=list)
    command: str = field(default_factory=lambda: shlex.join(["python", *sys.argv]))
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @classmethod
    def load(cls, path: Path) -> Record:
        content = json.loads(path.read_text())
        if content.pop("format", None) != 1:
            raise ValueError(f"{path}: not a benchmark record of format 1")
        return cls(**content)

    def default_path(self) -> Path:
        """benchmarks/results/<benchmark>-<processor>-<isa>.json"""
        machine = self.machine.get("gpu") or f"{self.machine['cpu']}-{self.machine['isa']}"
        slug = re.sub(r"[^a-z0-9_]+", "-", machine.lower()).strip("-")
        return RESULTS / f"{self.benchmark}-{slug}.json"

    def save(self, path: Path) -> None:
        """Write the record whole: to a temporary file beside it, which then takes its name."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({"format": 1} | self.__dict__, file, indent=1)
                file.write("\n")
            os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone.
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def measure_points(
        self,
        points: list[Any],
        contenders: Callable[[Any], dict[str, Contender]],
        path: Path,
        console: Console,
        before: Callable[[Any], Callable[[], Any] | None] = lambda point: None,
        **options: Any,
    ) -> None:
        """Measure point after point; the record is saved after each, so that an interrupted run keeps them.

        Args:
            points: dataclasses, whose fields are the record's "point".
            contenders, before: those of a point, as `measure` takes them.
            options: as `measure` takes them.
        """
        for number, point in enumerate(points, 1):
            where = f"[{number}/{len(points)}] {point_text(asdict(point))}"
            with console.status(where):
                row = measure(
                    asdict(point), contenders(point), self.ceilings, before=before(point), **options
                )
            self.rows.append(row)
            self.save(path)
            found = row["implementations"]
            medians = ", ".join(
                f"{name} {it.get('median_ms', it.get('skipped'))}" for name, it in found.items()
            )
            console.print(f"{where}, ms: {medians}", highlight=False)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The headers and the lines of the table: one line per point and implementation of ours."""
        found = [(name, it) for row in self.rows for name, it in row["implementations"].items()]
        rivals = list(dict.fromkeys(name for name, it in found if not it["ours"]))
        more = [column for column in COLUMNS if any(column in it for _, it in found)]
        headers = [
            "point",
            "peftfast",
            "ms",
            *(f"x {name}" for name in rivals),
            "rate",
            "ceiling",
            *(COLUMNS[column][0] for column in more),
        ]
        lines = [
            [
                point_text(row["point"]),
                name.removeprefix("peftfast "),
                f"{it['median_ms']:.4g}",
                *(_speedup_cell(row["implementations"], name, rival) for rival in rivals),
                _rate_cell(it),
                f"{it['ceiling_share']:.0%} {it['bound']}",
                *(COLUMNS[column][1](it[column]) if column in it else "" for column in more),
            ]
            for row in self.rows
            for name, it in row["implementations"].items()
            if it["ours"] and "skipped" not in it
        ]
        return headers, lines

    def facts(self) -> list[str]:
        """The machine and its ceilings, in two lines."""
        machine, versions = self.machine, self.machine["versions"]
        ceilings = [
            f"{name} {found['bytes_per_second'] / 1e9:.1f} GB/s ({found['by']})"
            if name == "bandwidth"
            else f"{name} {found['flops_per_second'] / 1e9:.0f} GFLOP/s ({found['by']})"
            for name, found in self.ceilings.items()
        ]
        parts = [machine.get("gpu"), machine["cpu"], machine["isa"], f"{machine['threads']} threads"]
        parts += [f"load before {machine['load']}"]
        parts += [f"{name} {version}" for name, version in versions.items() if version]
        return [
            ", ".join(part for part in parts if part),
            "Measured ceilings: " + "; ".join(ceilings),
        ]

    def print(self, console: Console) -> None:
        """The tables, on a terminal."""
        for fact in self.facts():
            console.print(fact, highlight=False)
        for title, (headers, lines) in self._tables():
            table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
            for index, header in enumerate(headers):
                # Only the first column gives way on a narrow terminal, unless the cells are sentences.
                sentence = index == 0 or title == "acceptance"
                words = header if sentence else header.replace(" ", "\n").replace("x\n", "x ", 1)
                table.add_column(words, no_wrap=not sentence, overflow="fold")
            for line in lines:
                table.add_row(*line)
            console.print(table)

    def markdown(self) -> str:
        """The tables, as Markdown."""
        parts = [f"{fact}  " for fact in self.facts()]
        for _, (headers, lines) in self._tables():
            parts += [
                "",
                *("| " + " | ".join(line) + " |" for line in [headers, ["---"] * len(headers), *lines]),
            ]
        return "\n".join(parts) + "\n"

    def _tables(self) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
        tables = [(f"{self.benchmark}: times faster (x) than each rival", self.table())]
        if self.acceptance:
            columns = ["what", "bar", "seen", "verdict"]
            tables.append(("acceptance", (columns, [[bar[c] for c in columns] for bar in self.acceptance])))
        return tables


def point_text(point: dict[str, Any]) -> str:
    """A point on one line, without what does not apply to it."""
    return " ".join(
        f"{value}" if isinstance(value, str) else f"{key}={value}"
        for key, value in point.items()
        if value is not None
    )


def _speedup_cell(implementations: dict[str, dict[str, Any]], ours: str, rival: str) -> str:
    if rival not in implementations:
        return ""
    if reason := implementations[rival].get("skipped"):
        if reason.startswith("unavailable"):
            return "unavailable"
        return reason.removesuffix(" a call") if reason.startswith(">") else "failed"
    return f"{implementations[ours]['speedup'][rival]:.2f}"


def _rate_cell(it: dict[str, Any]) -> str:
    if it["bound"] == "memory" and "gigabytes_per_second" in it:
        return f"{it['gigabytes_per_second']:.4g} GB/s"
    return f"{it['gflops']:.4g} GFLOP/s"


def _bytes_cell(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


# What an implementation may have besides its speed: how its column of the table is headed and written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "saved_bytes": ("saved", _bytes_cell),
    "peak_bytes": ("peak", _bytes_cell),
    "tokens_per_second": ("tokens/s", "{:.4g}".format),
    "longest_tokens": ("longest", "{} tokens".format),
    "peak_rss": ("peak RSS", lambda count: f"{count / 1e9:.2f} GB"),
}


# ---------------------------------------------------------------------------------------- acceptance bars


def rows_of(rows: list[dict[str, Any]], points: Iterable[Any]) -> list[dict[str, Any] | None]:
    """The row of each point, None where it is not among them."""
    return [next((row for row in rows if row["point"] == asdict(point)), None) for point in points]


def speed_bar(
    what: str,
    bar: float,
    rows: list[dict[str, Any] | None],
    rivals: list[str],
) -> dict[str, str]:
    """Whether all that is ours is `bar` times faster than each of the rivals that a row has; as a graph, than graphs.

    A rival that was skipped gives no ratio: then the bar is not measurable here, unless another ratio misses it.
    """
    seen, checks, gaps = [], [], rows.count(None)
    for row in filter(None, rows):
        found = row["implementations"]
        sizes = {key: row["point"].get(key) for key in ("M", "K", "N", "tokens")}
        where = row["point"]["dtype"] + "".join(f" {key}={size}" for key, size in sizes.items() if size)
        for rival in filter(found.__contains__, rivals):
            if reason := found[rival].get("skipped"):
                gaps += 1
                estimate = found[rival].get("estimate_ms")
                about = f", about {estimate / 1e3:.3g} s" if estimate else ""
                seen.append(f"{where} {rival} skipped ({reason}{about})")
                continue
            for name, it in found.items():
                if it["ours"] and name.endswith(GRAPH) == rival.endswith(GRAPH):
                    checks.append(it["speedup"][rival] >= bar)
                    seen.append(f"{where} {name}: {it['speedup'][rival]:.2f} x {rival}")
    return verdict(what, f"at least {bar:g} x", seen, checks, gaps)


def verdict(what: str, bar: str, seen: list[str], checks: list[bool], gaps: int = 0) -> dict[str, str]:
    """A line of the record's acceptance: reached when all the cases that it covers are there and reach it."""
    if not seen:
        outcome = "not in this run"
    elif not all(checks):
        outcome = "not reached"
    else:
        outcome = "not measurable here" if gaps else "reached"
    return {"what": what, "bar": bar, "seen": "; ".join(seen), "verdict": outcome}


# ----------------------------------------------------------------------------------------- command lines


def parser_of(
    benchmark: str, documentation: str, quick: str, cap: float, budget: float
) -> argparse.ArgumentParser:
    """The options that the benchmarks of single calls have in common; `quick` says what --quick leaves."""
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=quick)
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--graphs", action="store_true", help="each implementation once more as a CUDA graph, replayed")
    add("--threads", type=positive, help="torch's threads; default: as torch chooses")
    add("--cap", type=float, default=cap, metavar="S", help="seconds a call from which a rival is skipped")
    add("--budget", type=float, default=budget, metavar="S", help="seconds for the timed rounds of one point")
    add("--json", type=Path, metavar="FILE", help=f"default: benchmarks/results/{benchmark}-MACHINE.json")
    return parser


def parsed(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    if options.graphs and options.device == "cpu":
        parser.error("--graphs takes --device cuda")
    return options


class Replay:
    """A call as a CUDA graph: captured when it is called first, after three calls beside it, and replayed."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call, self.graph, self.result = call, None, None

    def __call__(self) -> Any:
        if self.graph is None:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(3):
                    self.call()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.result = self.call()
            self.graph = graph
        self.graph.replay()
        return self.result


def with_replays(contenders: dict[str, Contender]) -> dict[str, Contender]:
    """The contenders, and each that can be one as a CUDA graph."""
    replays = {
        f"{name}{GRAPH}": replace(
            contender, run=Replay(contender.run), shrunk=None, saved_bytes=None, peak_bytes=None
        )
        for name, contender in contenders.items()
        if contender.capturable
    }
    return contenders | replays


def run(
    benchmark: str,
    options: argparse.Namespace,
    points: list[Any],
    contenders: Callable[[Any, str], dict[str, Contender]],
    *,
    acceptance: Callable[[Record], list[dict[str, str]]] | None = None,
    gpu_acceptance: Callable[[Record], list[dict[str, str]]] | None = None,
    **measuring: Any,
) -> Record:
    """Measure `points` as the options of `parser_of` say, print what was found, and save it.

    Args:
        contenders: given a point and the device, those of the point.
        acceptance, gpu_acceptance: given the record, the bars to reach on the CPU or on a GPU.
        measuring: further arguments of `Record.measure_points`.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    console = Console()
    console.width = max(console.width, 160)  # The table needs as much; a narrower terminal wraps its lines.
    record = Record(
        benchmark=f"{benchmark}-quick" if options.quick else benchmark,
        machine=machine_facts(options.device),
        ceilings=measure_ceilings([DTYPES[name] for name in options.dtype], options.device),
    )
    path = options.json or record.default_path()
    for fact in record.facts():
        console.print(fact, highlight=False)
    record.measure_points(
        points,
        lambda point: (with_replays if options.graphs else dict)(contenders(point, options.device)),
        path,
        console,
        cap=options.cap,
        budget=options.budget,
        cuda=options.device == "cuda",
        **measuring,
    )
    bars = acceptance if options.device == "cpu" else gpu_acceptance
    if bars is not None:
        record.acceptance = bars(record)
    record.save(path)
    record.print(console)
    console.print(f"Record: {path}", highlight=False)
    return record


def shape(text: str) -> tuple[int, int]:
    """The argument KxN: in_features x out_features."""
    K, _, N = text.partition("x")
    if not (K.isdecimal() and N.isdecimal() and int(K) and int(N)):
        raise argparse.ArgumentTypeError(f"{text!r} is not KxN, such as 4096x11008")
    return int(K), int(N)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def probability(text: str) -> float:
    """An argument that is a rate of dropout."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not in [0, 1)")
    return value


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/record.py RECORD.json   (prints it as Markdown)")
    print(Record.load(Path(sys.argv[1])).markdown(), end="")


if __name__ == "__main__":
    main()
