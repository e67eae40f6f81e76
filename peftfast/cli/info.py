"""`peftfast info`: the machine, the build, and what of a model would run on the fast path."""

import dataclasses
import json
import os
import platform
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.model import is_local_model, load_config, load_model

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")


def machine() -> dict:
    """Facts of the machine, the libraries and the build, in groups of name and value.

    "build" is all of `peftfast.build_info()`; sizes are bytes.
    """
    import torch

    import peftfast

    build = peftfast.build_info()
    build.setdefault("cuda", "missing: this build has no CUDA part, so on GPUs PEFT's own code runs")
    return {
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "logical cores": os.cpu_count(),
            "cores for this process": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory": _memory(),
            "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] or _why_no_gpu(),
        },
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "build": build,
    }


def model_report(model: str, adapter: Path | None = None):
    """What `peftfast.report` says of a model with `adapter` once peftfast is enabled, and why not, layer by layer.

    Returns:
        peftfast.Report
    Raises:
        UserError: the model or the adapter cannot be loaded.
    """
    from peft import PeftModel

    import peftfast

    local = is_local_model(model)
    config = load_config(model)
    quantized = getattr(config, "quantization_config", None) is not None
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    loaded = load_model(model, dtype, local, peftfast.FourBitConfig() if quantized else None)
    if adapter is not None:
        try:
            loaded = PeftModel.from_pretrained(loaded, adapter)
        except Exception as error:  # whatever a library raises over a folder's contents
            raise UserError(
                f"--adapter {adapter} does not fit the model: {first_sentence(error)}."
            ) from error
    with peftfast.enabled():
        return peftfast.report(loaded)


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system without these names
        return None


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 1e9
    return f"{properties.name}, {memory:.1f} GB, sm_{properties.major}{properties.minor}"


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this torch is built for the CPU alone"
    return "none: torch sees no device"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _text(name: str, value) -> str:
    if name == "memory" and value:
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def command(
    model: Annotated[str | None, Option(help="A model's folder or name: what of it runs fused?")] = None,
    adapter: Annotated[Path | None, Option(help="An adapter's folder, to go with --model.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON; sizes are bytes.")] = False,
) -> None:
    """Show the machine, the libraries and the build, and with --model what would run on the fast path."""
    from transformers import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if adapter is not None and model is None:
        raise UserError(f"--adapter {adapter} goes with --model, its base.")
    facts = machine()
    report = None if model is None else model_report(model, adapter)
    if as_json:
        if report is not None:
            layers = [dataclasses.asdict(layer) for layer in report]
            facts["model"] = {"summary": report.summary, "layers": layers, "fourbit": report.fourbit}
        sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")
        return
    console = Console()
    width = max(len(name) for group in facts.values() for name in group)
    for title, group in facts.items():
        console.print(title, style="bold")
        for name, value in group.items():
            console.print(f"  {name:{width}}  {_text(name, value)}", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(str(report), highlight=False, soft_wrap=True)
