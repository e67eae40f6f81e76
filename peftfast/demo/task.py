"""Make the demo's task: write a name of the standard library in CamelCase.

    python -m peftfast.demo.task --out peftfast/demo

    {"prompt": "get_default_encoding -> ", "completion": "GetDefaultEncoding"}

The names are real, and the base model has read many of them, but it has never been asked for this. No
held-out name is in a training example. The same Python and seed give the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from pathlib import Path

from peftfast.demo import HELD_OUT_DATA, TRAIN_DATA

NAME = re.compile(r"(?<![\w.])[a-z]{2,}(?:_[a-z]{2,})+(?!\w)")
LONGEST_NAME = 24
SKIPPED_FOLDERS = {"site-packages", "dist-packages"}


def collect_names() -> list[str]:
    """Return the snake_case names, of two words or more, in the standard library: sorted, each once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names: set[str] = set()
    for module in root.rglob("*.py"):
        if not SKIPPED_FOLDERS.intersection(module.relative_to(root).parts):
            names.update(NAME.findall(module.read_text(encoding="utf-8", errors="replace")))
    return sorted(name for name in names if len(name) <= LONGEST_NAME)


def make_example(name: str) -> dict[str, str]:
    """Return the prompt/completion pair of a snake_case name."""
    return {"prompt": f"{name} -> ", "completion": "".join(word.capitalize() for word in name.split("_"))}


def make_task(
    names: list[str], *, train: int = 4000, held_out: int = 400, seed: int = 0
) -> tuple[list[dict], list[dict]]:
    """Return (training, held-out) examples, drawn without replacement from `names`."""
    drawn = random.Random(seed).sample(names, train + held_out)
    examples = [make_example(name) for name in drawn]
    return examples[:train], examples[train:]


def main() -> None:
    """Read the command line and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder that receives both .jsonl files")
    out = parser.parse_args().out
    for path, examples in zip((TRAIN_DATA, HELD_OUT_DATA), make_task(collect_names()), strict=True):
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (out / path.name).write_text(lines, encoding="utf-8")
        print(f"{path.name}: {len(examples)} examples")


if __name__ == "__main__":
    main()
