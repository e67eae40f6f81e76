"""The processes that share a run (torchrun, accelerate launch): what one alone finds out, and all have to know."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

from peftfast.cli.errors import UserError


def rank() -> int:
    """Return this process's number among those that share the run, 0 of one that is alone."""
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def check_launch() -> None:
    """Raise UserError if accelerate was told to divide the weights among processes.

    To evaluate, the first process alone has the model answer, and what is written is what one process holds.
    """
    for kind in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() in ("true", "1"):
            raise UserError(
                "peftfast train shares batches among processes, not weights: launch it without FSDP and DeepSpeed."
            )


def joined():
    """Return accelerate's PartialState, which this process shares with the others from here on."""
    import torch
    from accelerate import PartialState

    # While the first process evaluates, the others wait.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=12))


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Have all processes fail where one fails in the block, by its sentence: none waits for one that has ended.

    They talk to each other at the end of the block, so that within it none may wait for another once it can fail.

    Raises:
        UserError: that of the first process that has one.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":  # no need of torch
        yield
        return
    failed = None
    try:
        yield
    except UserError as error:
        failed = error
    from accelerate.utils import gather_object

    joined()
    for sentence in gather_object([failed and str(failed)]):
        if sentence:
            raise UserError(sentence) from failed
