"""Checkpoints of a training run: each whole or not there, in a folder beside the output, until the run has ended well.

OUT.checkpoints/checkpoint-40/run.json       what the run was told, where it was, and its files: size and SHA-256
                              trained_weights.safetensors
                              optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json       of Trainer
                              rng_state_0.pth, rng_state_1.pth, ...       instead, of several processes
                              adapter_model.safetensors, ...      of PEFT, unless every weight is trained
OUT.checkpoints/checkpoint-60/...
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peftfast.cli.errors import UserError, first_sentence
from peftfast.cli.settings import TrainSettings, option

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
PROFILE_FILE = "expert_profile.json"
HELD_OUT_BY = ("eval_file", "eval_split", "eval_share")  # the first that is told
KEPT = 2
# Options in which a run and its continuation may differ; of the data it is the examples that must be the same, of a
# batch their number in all processes.
FREE = (
    *("data", "eval_file", "out", "json", "overwrite", "save_steps", "saves_per_epoch", "resume"),
    *("report_to", "micro_batch_size", "gradient_accumulation_steps", "activation_offloading"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, its step, and what its run.json holds."""

    path: Path
    step: int
    run: dict


class Checkpoints:
    """The checkpoints of the run that writes to `out`; nothing is read or written before a method is called."""

    def __init__(self, out: Path) -> None:
        self.out = Path(os.path.abspath(out))
        self.folder = self.out.with_name(f"{self.out.name}.checkpoints")

    def newest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint."""
        return next(reversed(self._whole()), None)

    def to_resume(self, settings: TrainSettings) -> Checkpoint | None:
        """Return the checkpoint that `settings` go on from, None if they start anew.

        Raises:
            UserError: there is none and there should be one, or the other way round; the run's settings differ; or a
                file does not hold what was written.
        """
        newest = self.newest()
        if not settings.resume:
            if newest and not settings.overwrite:
                raise UserError(
                    f"{self.folder} holds an interrupted run's checkpoints: pass --resume to go on with it, or "
                    "--overwrite to start anew."
                )
            return None
        if newest is None:
            state = "holds no whole checkpoint" if self.folder.is_dir() else "does not exist"
            raise UserError(f"--resume: there is nothing to resume, {self.folder} {state}.")
        told, before = jsonable(settings), newest.run["settings"]
        for name in sorted(told.keys() & before.keys() - set(FREE)):
            if told[name] != before[name]:
                now, then = ("not given" if value is None else value for value in (told[name], before[name]))
                raise UserError(f"--resume: {option(name)} is {now}, but {then} in the interrupted run.")
        self._check_files(newest)
        return newest

    def _check_files(self, newest: Checkpoint) -> None:
        """Raise UserError unless every file holds what was written: torch and safetensors do not look for that."""
        earlier = self._whole()[:-1]
        then = f" Without {newest.path} the run goes on from step {earlier[-1].step}." if earlier else ""
        for name, file in newest.run["files"].items():
            path = newest.path / name
            with _said(f"--resume: {path} cannot be read"):
                digest = _digest(path)
            if digest != file["sha256"]:
                raise UserError(f"--resume: {path} is corrupt, it does not hold what was written.{then}")

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder to oneself inside the block; it is removed at its end, unless checkpoints are to be resumed.

        Raises:
            UserError: it cannot be written, holds something else, or another run is writing to it.
        """
        with _said(f"{self.folder} cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder / LOCK_FILE, os.O_CREAT | os.O_RDWR)
        try:
            with contextlib.suppress(OSError):  # of a file system without locks
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"--out {self.out}: another run is writing to it.") from None
            self._clear()
            try:
                yield
            except BaseException:
                if self.newest() is None:
                    shutil.rmtree(self.folder, ignore_errors=True)
                raise
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            os.close(lock)

    def forget(self) -> None:
        """Remove all checkpoints."""
        for path in self._folders().values():
            shutil.rmtree(path)

    def keep(self, written: Path, step: int, run: dict) -> None:
        """Make of a folder of files the checkpoint of `step`, and remove all but the last two.

        Args:
            written: complete but for run.json, on the file system of `self.folder`.
            run: for run.json.
        """
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _digest(path)} for path in written.iterdir()
        }
        (written / RUN_FILE).write_text(json.dumps(run | {"files": files}, indent=1), encoding="utf-8")
        for path in (*written.iterdir(), written):
            _sync(path)
        path = self.folder / f"checkpoint-{step}"
        shutil.rmtree(path, ignore_errors=True)  # one that is not whole
        os.rename(written, path)
        _sync(self.folder)
        kept = [checkpoint.path for checkpoint in self._whole()[-KEPT:]]
        for path in self._folders().values():
            if path not in kept:
                shutil.rmtree(path)

    def _folders(self) -> dict[int, Path]:
        """Return what is named like a checkpoint, by step, in its order."""
        named = {
            re.fullmatch(r"checkpoint-(\d+)", path.name): path for path in self.folder.glob("checkpoint-*")
        }
        return dict(sorted((int(name[1]), path) for name, path in named.items() if name))

    def _whole(self) -> list[Checkpoint]:
        found = []
        for step, path in self._folders().items():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                run = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
                if all((path / name).stat().st_size == file["size"] for name, file in run["files"].items()):
                    found.append(Checkpoint(path, step, run))
        return found

    def _clear(self) -> None:
        """Remove what a killed run was just writing; refuse what no run has written."""
        checkpoints = set(self._folders().values())
        others = [p for p in self.folder.iterdir() if p not in checkpoints and p.name != LOCK_FILE]
        for path in others:
            if not path.name.startswith(f".{self.out.name}-"):
                raise UserError(
                    f"{path} is in the way: that folder is for the checkpoints of --out {self.out}."
                )
        for path in others:
            shutil.rmtree(path)


def jsonable(settings: TrainSettings) -> dict:
    """Return settings as JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))


def fingerprint(settings: TrainSettings, examples: list, held_out: list) -> dict[str, str]:
    """Return what must be the same when a run is resumed, by the option to name if it is not."""

    def of_examples(examples: list) -> str:
        digest = hashlib.sha256()
        for example in examples:
            digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        return digest.hexdigest()

    folder = Path(settings.model).expanduser()
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "model": hashlib.sha256(repr(stats).encode()).hexdigest(),
        "data": of_examples(examples),
        next(name for name in HELD_OUT_BY if getattr(settings, name) is not None): of_examples(held_out),
    }


def check_fingerprint(checkpoint: Checkpoint, now: dict[str, str]) -> None:
    """Raise UserError if the model or the examples are not those of the interrupted run."""
    before = checkpoint.run["fingerprint"]
    for name, what in {
        "model": "the weights have been written anew since the run was interrupted",
        "data": "the training examples are not those of the interrupted run",
        **dict.fromkeys(HELD_OUT_BY, "the held-out examples are not those of the interrupted run"),
    }.items():
        if before.get(name) != now.get(name):
            raise UserError(f"--resume: {option(name)}: {what}.")


def check_batch(checkpoint: Checkpoint, settings: TrainSettings, processes: int) -> None:
    """Raise UserError if a step takes more or fewer sequences than in the interrupted run.

    Its steps would be others then, and so would be what of the data they have seen.
    """
    before = checkpoint.run["settings"]
    now = settings.micro_batch_size * settings.gradient_accumulation_steps * processes
    then = (
        before["micro_batch_size"] * before["gradient_accumulation_steps"] * len(checkpoint.run["processes"])
    )
    if now != then:
        raise UserError(
            f"--resume: a step takes {now} sequences, but {then} in the interrupted run: have --micro-batch-size × "
            f"--gradient-accumulation-steps × processes be {then} again."
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have a file or a folder on the disk before anything that follows."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _said(sentence: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{sentence}: {error.strerror}.") from error


@contextlib.contextmanager
def written(what: str, folder: Path, then: str = "") -> Iterator[None]:
    """Turn a failure to write within the block to `folder` into a sentence: `what` cannot be written, why, `then`.

    Raises:
        UserError: something could not be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, folder)
        if reason is None:
            raise
        raise UserError(f"{what} cannot be written: {reason}.{then}") from error


def _reason(error: BaseException, folder: Path) -> str | None:
    """Return why writing failed; None if it was something else.

    torch and safetensors wrap what the system said in words of their own, so that the system is asked again.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    message = f"{error} {error.__context__}"
    if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", message):
        return None
    told = re.search(
        r"No space left on device|File too large|Disk quota exceeded|Read-only file system", message
    )
    if told:
        return told[0]
    probe = folder / ".probe"
    try:
        probe.write_bytes(bytes(2**20))
    except OSError as refused:
        return refused.strerror
    finally:
        probe.unlink(missing_ok=True)
    return first_sentence(error)
