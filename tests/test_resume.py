"""How `peftfast train` runs: killed and resumed, out of disk or memory, its schedule, its log, what it shows."""

import contextlib
import ctypes
import errno
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import time
from functools import partial
from pathlib import Path

import hypothesis
import pytest
import torch
from rich.console import Console
from test_cli import model_folder, moe_folder, refusal, run, tokenizer, write_jsonl  # noqa: F401
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import peftfast
from peftfast.cli import main, trainer
from peftfast.cli import train as train_module
from peftfast.cli.checkpoints import Checkpoints
from peftfast.cli.errors import UserError, is_out_of_memory
from peftfast.cli.progress import LINES, ProgressBar
from peftfast.cli.settings import OPTIMIZERS, TrainSettings
from peftfast.cli.train import LOG_FILE, PICTURE_FILE, RESULT_FILE, train
from peftfast.cli.trainer import WEIGHTS_FILE, FineTuner, training_arguments
from peftfast.integrations import offload

WORDS = ["".join(chr(97 + (7 * i + 3 * j) % 26) for j in range(3)) for i in range(20)]


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Pictures take longer than these runs: they are drawn where a test asks for it."""
    monkeypatch.setattr("peftfast.ExpertProfile.plot", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr("peftfast.cli.train.draw", lambda *_: None)
        yield patch


@pytest.fixture
def words(tmp_path):
    records = [{"prompt": f"{word}=", "completion": word.upper()} for word in WORDS]
    return write_jsonl(tmp_path / "words.jsonl", records)


@pytest.fixture
def settings(model_folder, words, tmp_path):  # noqa: F811
    """Of a run of 10 steps in 2 epochs, with a checkpoint in between two entries of the log."""

    def with_options(out="out", **options):
        common = dict(
            model=str(model_folder), data=words, out=tmp_path / out, learning_rate=1e-2, max_steps=10,
            micro_batch_size=2, gradient_accumulation_steps=2, logging_steps=3, eval_share=0.1,
            max_eval_examples=1,
        )  # fmt: skip
        return TrainSettings(**common | options)

    return with_options


def interrupt(monkeypatch, step):
    """Have training end as on Ctrl-C when a step is done; None: no more."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "on_step_end", on_step_end)


def interrupted(settings, monkeypatch, step=8, save_steps=4, **options):
    """Return the checkpoints of a run that was interrupted."""
    interrupt(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(settings(save_steps=save_steps, **options))
    interrupt(monkeypatch, None)
    return Checkpoints(settings(**options).out)


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


def untimed(log):
    return [
        {name: value for name, value in entry.items() if name not in ("tokens_per_second", "peak_memory_mib")}
        for entry in log
    ]


# ---- resumed is as if never interrupted ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(method="lora", lora_dropout=0.1, eval_steps=3),
        dict(method="lora", objective="pretrain", weight_decay=0.01),
        dict(method="qlora", dtype="bf16", backend="peft"),
        dict(method="mixture", mixture_experts=3),
        dict(method="bottleneck", bottleneck_size=4),
        dict(method="prefix", encoder_hidden_size=8),
        dict(method="prompt", gradient_checkpointing=True),
        dict(method="full", dtype="bf16", optimizer="adafactor"),
        dict(method="lora", experts="profile:0.5", router="train", eval_steps=2),
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_resumed_is_as_if_never_interrupted(settings, moe_folder, tmp_path, monkeypatch, options):  # noqa: F811
    if "experts" in options:
        options = options | {"model": str(moe_folder)}
    if options.get("objective") == "pretrain":
        options = options | {"data": write_jsonl(tmp_path / "t.jsonl", [{"text": 6 * w} for w in WORDS])}
    if "eval_steps" not in options:
        options = options | {"eval_share": 0}
    whole = train(settings("whole", **options))
    checkpoints = interrupted(settings, monkeypatch, **options)
    assert checkpoints.newest().step == 4  # and not 8, where it was interrupted before the checkpoint
    monkeypatch.setattr(peftfast, "profile_experts", None)
    resumed = train(settings(resume=True, **options))

    assert resumed.losses == whole.losses
    assert untimed(resumed.log) == untimed(whole.log)
    assert resumed.tokens == whole.tokens
    assert resumed.expert_load == whole.expert_load
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert (resumed.gradient_bytes, resumed.optimizer_bytes) == (whole.gradient_bytes, whole.optimizer_bytes)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert not checkpoints.folder.exists()


@pytest.fixture(scope="module")
def forks():
    """Processes that begin with all that takes long to import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peftfast.cli.trainer", "peft", "peftfast"])
    return context


KILLS = max(2, hypothesis.settings().max_examples // 500)  # --hypothesis-profile fuzz: 20


def test_killed_at_any_moment_it_resumes(settings, forks, tmp_path):
    """Each time some steps further on: by turns at a random moment and while a checkpoint is written."""

    def start(options):
        arguments = ["train", *options.to_arguments()]
        process = forks.Process(target=main, args=(arguments,))
        process.start()
        return process

    steps = dict(max_steps=10 * KILLS, lora_dropout=0.1, eval_share=0)
    process = start(settings("whole", **steps))
    process.join()
    assert process.exitcode == 0

    checkpoints, moments, killed = Checkpoints(tmp_path / "out"), random.Random(0), 0
    partial = f".out-*/checkpoint-*/{WEIGHTS_FILE}"
    for kill in range(KILLS):
        least, writing = 1 + 8 * kill, kill % 2 == 1
        resume = checkpoints.newest() is not None
        process = start(settings(save_steps=3, resume=resume, **steps))
        while process.is_alive():
            newest = checkpoints.newest()
            if newest and newest.step >= least and (not writing or any(checkpoints.folder.glob(partial))):
                time.sleep(0.05 * moments.random() * (not writing))
                process.kill()
                break
            time.sleep(0.001)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        assert checkpoints.newest() is not None
        assert not (tmp_path / "out").exists()
    assert killed == KILLS

    process = start(settings(save_steps=3, resume=True, **steps))
    process.join()
    assert process.exitcode == 0
    whole, resumed = (json.loads((tmp_path / name / RESULT_FILE).read_text()) for name in ("whole", "out"))
    assert resumed["losses"] == whole["losses"]
    assert resumed["tokens"] == whole["tokens"]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole", "words.jsonl"]


def test_the_two_newest_checkpoints_are_kept_and_a_broken_one_is_not_taken(settings, monkeypatch):
    checkpoints = interrupted(settings, monkeypatch, step=9, save_steps=2)
    found = sorted(path.name for path in checkpoints.folder.glob("*"))
    assert found == [".lock", "checkpoint-6", "checkpoint-8"]
    assert checkpoints.newest().step == 8
    assert {weight.dtype for weight in trained_in(checkpoints.newest()).values()} == {torch.float32}
    file = checkpoints.newest().path / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoints.newest().step == 6
    whole = train(settings("whole"))
    assert train(settings(resume=True)).losses == whole.losses


@pytest.mark.parametrize("save_steps", [3, 4])
def test_a_changed_byte_in_a_checkpoint_is_refused(settings, monkeypatch, capsys, save_steps):
    """Of which torch and safetensors say nothing, or many lines."""
    newest = interrupted(settings, monkeypatch, save_steps=save_steps).newest()
    then = f" Without {newest.path} the run goes on from step 3." if save_steps == 3 else ""
    files = [newest.path / name for name in newest.run["files"]]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", WEIGHTS_FILE} <= {
        file.name for file in files
    }
    for file in files:
        held = file.read_bytes()
        for place in (0, len(held) // 2):
            file.write_bytes(held[:place] + bytes([held[place] ^ 1]) + held[place + 1 :])
            assert f"--resume: {file} is corrupt, it does not hold what was written.{then}\n" in refusal(
                capsys, *arguments(settings(resume=True))
            )
        file.write_bytes(held)
    assert train(settings(resume=True)).steps == 10


def trained_in(checkpoint):
    from safetensors.torch import load_file

    return load_file(checkpoint.path / WEIGHTS_FILE)


def test_seconds_are_those_of_the_steps_that_count(settings, monkeypatch):
    checkpoints = interrupted(settings, monkeypatch)
    file = checkpoints.newest().path / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps(run | {"seconds": run["seconds"] + 1000, "peak_memory_mib": 1e9}))
    resumed = train(settings(resume=True))
    assert 1000 < resumed.seconds < 1100
    assert resumed.peak_memory_mib == 1e9
    assert resumed.tokens_per_second == resumed.tokens / resumed.seconds


# ---- on two processes -----------------------------------------------------------------------------------------


def take_part(rank, processes, port, said, full_disk, arguments):
    """Be one of several processes, as torchrun starts them, on a CPU."""
    os.environ |= dict(
        RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    if full_disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    main(arguments)


@pytest.fixture
def start(forks, tmp_path_factory):
    """Start the command on two processes, or so many; each has what it `said` in a file."""

    def started(settings, count=2, full_disk=None):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        folder, processes = tmp_path_factory.mktemp("said"), []
        for rank in range(count):
            said = folder / str(rank)
            told = (rank, count, port, said, rank == full_disk, [*arguments(settings)])
            processes.append(forks.Process(target=take_part, args=told))
            processes[-1].said = said
            processes[-1].start()
        return processes

    return started


def ended(processes):
    """Return with what code each has ended and what it said."""
    for process in processes:
        process.join(timeout=60)
        process.kill()  # one that waits for another that has ended
    return [(process.exitcode, process.said.read_text()) for process in processes]


def assert_trained(processes):
    found = ended(processes)
    assert {code for code, _ in found} == {0}, found


def killed(processes, checkpoints):
    """Kill them as soon as there is a checkpoint."""
    while checkpoints.newest() is None:
        assert all(process.is_alive() for process in processes), ended(processes)
        time.sleep(0.001)
    for process in processes:
        process.kill()
    assert {code for code, _ in ended(processes)} == {-signal.SIGKILL}


def record(out):
    return json.loads((out / RESULT_FILE).read_text())


# A checkpoint within the second epoch, and between two entries of the log; the held-out examples are evaluated by the
# first process alone before training, so that the two have random states of their own.
TWO = dict(max_steps=20, save_steps=7, gradient_accumulation_steps=1, lora_dropout=0.1)


def test_two_processes_resumed_are_as_if_never_interrupted(settings, start, moe_folder, tmp_path):  # noqa: F811
    options = TWO | dict(model=str(moe_folder), experts="profile:0.5", eval_steps=6)
    assert_trained(start(settings("whole", **options)))
    checkpoints = Checkpoints(tmp_path / "out")
    killed(start(settings(**options)), checkpoints)
    assert sorted(path.name for path in checkpoints.newest().path.glob("rng*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert not (tmp_path / "out").exists()
    assert_trained(start(settings(resume=True, **options)))

    whole, resumed = record(tmp_path / "whole"), record(tmp_path / "out")
    assert len(whole["losses"]) == 6
    for name in ("losses", "tokens", "expert_load", "before", "after"):
        assert resumed[name] == whole[name], name
    assert untimed(resumed["log"]) == untimed(whole["log"])
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole", "words.jsonl"]


def test_another_number_of_processes_goes_on(settings, start, tmp_path, capsys):
    """Up to the order of sums, if the batch is the same; 20 examples by 4, so that there is no rest to share."""
    two = TWO | dict(lora_dropout=0, eval_share=0)
    one = two | dict(gradient_accumulation_steps=2)
    again = one | dict(micro_batch_size=1)  # on two
    assert_trained(start(settings("whole", **one), 1))

    killed(start(settings("fewer", **two)), Checkpoints(tmp_path / "fewer"))
    assert (
        "--resume: a step takes 2 sequences, but 4 in the interrupted run: have --micro-batch-size × "
        "--gradient-accumulation-steps × processes be 4 again."
    ) in refusal(capsys, *arguments(settings("fewer", resume=True, **two)))
    assert_trained(start(settings("fewer", resume=True, **one), 1))

    killed(start(settings("more", **one), 1), Checkpoints(tmp_path / "more"))
    for code, said in ended(start(settings("more", resume=True, **one))):
        assert code == 2 and "a step takes 8 sequences, but 4 in the interrupted run" in said
    assert_trained(start(settings("more", resume=True, **again)))

    whole = record(tmp_path / "whole")
    for resumed in (record(tmp_path / "fewer"), record(tmp_path / "more")):
        assert dict(resumed["losses"]) == pytest.approx(dict(whole["losses"]), rel=1e-4)
        assert resumed["tokens"] == whole["tokens"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_ends_both(settings, start, tmp_path, rank):
    sentence = (
        f"the checkpoint of step 7 in {tmp_path / 'out.checkpoints'} cannot be written: File too large."
    )
    (first, said), (second, said_too) = ended(start(settings(**TWO), full_disk=rank))
    assert (first, second) == (2, 2)
    assert said.endswith(f"peftfast: {sentence}\n")
    assert said_too.endswith(f"peftfast, process 1: {sentence}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["words.jsonl"]


def test_what_the_first_process_cannot_do_ends_both(settings, start, tmp_path):
    with Checkpoints(tmp_path / "out").opened():
        for code, said in ended(start(settings(**TWO))):
            assert code == 2 and "out: another run is writing to it." in said


# ---- refusals -----------------------------------------------------------------------------------------------


def arguments(settings):
    return ("train", *settings.to_arguments())


def test_what_cannot_be_resumed_is_refused(settings, words, tmp_path, monkeypatch, capsys):
    error = refusal(capsys, *arguments(settings(resume=True)))
    assert f"--resume: there is nothing to resume, {tmp_path / 'out.checkpoints'} does not exist." in error
    checkpoints = interrupted(settings, monkeypatch)
    held = {path: path.read_bytes() for path in checkpoints.folder.rglob("*") if path.is_file()}
    for options, message in (
        (dict(), "holds an interrupted run's checkpoints: pass --resume to go on with it, or --overwrite"),
        (dict(resume=True, learning_rate=2e-2), "--learning-rate is 0.02, but 0.01 in the interrupted run."),
        (dict(resume=True, seed=1), "--resume: --seed is 1, but 0 in the interrupted run."),
        (dict(resume=True, weight_decay=0.1), "--resume: --weight-decay is 0.1, but 0.0 in the interrupted"),
    ):
        assert message in refusal(capsys, *arguments(settings(**options)))
    text = words.read_text()
    words.write_text(text.replace(WORDS[3], "zzz"))
    assert "--resume: --data: the training examples are not those" in refusal(
        capsys, *arguments(settings(resume=True))
    )
    words.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.utils.gather_object", lambda steps: [*steps, 2])
        assert "--resume: not every process sees the same checkpoints in" in refusal(
            capsys, *arguments(settings(resume=True))
        )
    assert held == {path: path.read_bytes() for path in checkpoints.folder.rglob("*") if path.is_file()}

    other = json.loads((checkpoints.newest().path / "run.json").read_text())
    assert other["settings"]["seed"] == 0
    for path in checkpoints.folder.glob("checkpoint-*"):
        (path / WEIGHTS_FILE).unlink()
    assert "holds no whole checkpoint" in refusal(capsys, *arguments(settings(resume=True)))
    assert run(*arguments(settings(save_steps=4))) == 0  # it stands in nobody's way


def test_overwrite_starts_anew(settings, monkeypatch):
    checkpoints = interrupted(settings, monkeypatch)
    train(settings(overwrite=True, max_steps=3))
    assert not checkpoints.folder.exists()


def test_a_second_run_to_the_same_folder_is_refused(settings, monkeypatch):
    checkpoints = interrupted(settings, monkeypatch)
    with checkpoints.opened():
        with pytest.raises(UserError, match=r"out: another run is writing to it\."):
            train(settings(resume=True))
        assert checkpoints.newest().step == 4


def test_what_is_no_checkpoint_is_left_alone(settings, tmp_path):
    (tmp_path / "out.checkpoints").mkdir()
    mine = tmp_path / "out.checkpoints" / "mine"
    mine.write_text("kept")
    with pytest.raises(UserError, match=r"mine is in the way"):
        train(settings(save_steps=2))
    assert mine.read_text() == "kept"


# ---- what may run out ---------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_earlier_checkpoint(settings, monkeypatch, tmp_path, capsys):
    """By the limit on the size of a file: weights fit, the optimizer's twice as many numbers do not."""
    whole = train(settings("whole"))
    size = (tmp_path / "whole" / "adapter_model.safetensors").stat().st_size
    limits, keep = resource.getrlimit(resource.RLIMIT_FSIZE), Checkpoints.keep

    def then_full(self, *args):
        keep(self, *args)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(1.5 * size), limits[1]))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", then_full)
        try:
            error = refusal(capsys, *arguments(settings(save_steps=4)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = tmp_path / "out.checkpoints"
    assert f"the checkpoint of step 8 in {folder} cannot be written: File too large." in error
    assert "With --resume the run goes on from step 4." in error
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "checkpoint-4"]
    assert train(settings(resume=True)).losses == whole.losses


def test_a_result_that_cannot_be_written_can_be_resumed(settings, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("peftfast.cli.train._write", full)
        error = refusal(capsys, *arguments(settings(save_steps=4, eval_share=0)))
    assert (
        "out cannot be written: No space left on device. With --resume the run goes on from step 8." in error
    )
    assert train(settings(resume=True, eval_share=0)).steps == 10


@contextlib.contextmanager
def permissions_in_force():
    """No permission stops root, unless it does without CAP_DAC_OVERRIDE, as in the block."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    held = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, the lower halves of all first
    assert libc.capget(header, held) == 0
    without = type(held)(*held)
    without[0] &= ~(1 << 1)
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def test_a_place_that_cannot_be_written_is_named_before_training(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FineTuner, "fine_tune", None)
    (tmp_path / "out.checkpoints").write_text("a file")
    error = refusal(capsys, *arguments(settings(save_steps=4)))
    assert "out.checkpoints cannot be written: File exists." in error
    (tmp_path / "closed").mkdir(mode=0o555)
    with permissions_in_force():
        error = refusal(capsys, *arguments(settings("closed/out", save_steps=4)))
    assert "out.checkpoints cannot be written: Permission denied." in error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_takes_less(settings, monkeypatch, tmp_path, capsys, error):
    def raise_it(*args):
        raise error

    monkeypatch.setattr(FineTuner, "training_step", raise_it)
    message = refusal(capsys, *arguments(settings()))
    assert "memory ran out: lower --micro-batch-size 2 or --sequence-len 1024, or pass --gradient-" in message
    assert [path.name for path in tmp_path.iterdir()] == ["words.jsonl"]


def test_out_of_memory_is_known_by_its_words():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    words = [
        "CUDA out of memory. peftfast tried to allocate 1024 bytes.",
        "Out of memory: peftfast cannot allocate a panel.",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ]
    errors = [real.value, MemoryError(), torch.OutOfMemoryError(), *map(RuntimeError, words)]
    assert all(map(is_out_of_memory, errors))
    others = [RuntimeError("the shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
    assert not any(map(is_out_of_memory, others))


def test_divergence_keeps_the_last_good_checkpoint(settings, monkeypatch, tmp_path, capsys):
    step = Trainer.training_step

    def diverging(self, *args):
        loss = step(self, *args)
        return loss * math.nan if self.state.global_step >= 5 else loss

    monkeypatch.setattr(Trainer, "training_step", diverging)
    assert "training diverged (the loss is not finite)" in refusal(
        capsys, *arguments(settings(save_steps=1, logging_steps=10))
    )
    assert Checkpoints(tmp_path / "out").newest().step == 5


def test_an_interruption_says_how_to_go_on(settings, monkeypatch, capsys):
    interrupt(monkeypatch, 6)
    assert run(*arguments(settings(save_steps=4))) == 130
    assert "Training was interrupted: with --resume it goes on from step 4." in capsys.readouterr().out
    assert run(*arguments(settings("other"))) == 130
    assert "Training was interrupted: nothing was written." in capsys.readouterr().out


# ---- options with Trainer's names -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["qlora", "mixture", "bottleneck", "prefix", "full", "experts"])
def test_checkpointed_layers_train_alike(settings, moe_folder, monkeypatch, method):  # noqa: F811
    options = dict(method=method, max_steps=2, logging_steps=1, eval_share=0)
    if method == "experts":
        options |= dict(method="lora", model=str(moe_folder), lora_dropout=0.1, experts="profile:1")
    plain, step, seen = train(settings("plain", **options)), FineTuner.training_step, set()

    def watched(self, model, *args):
        seen.add(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
        return step(self, model, *args)

    monkeypatch.setattr(FineTuner, "training_step", watched)
    checkpointed = train(settings("checkpointed", gradient_checkpointing=True, **options))
    assert seen == {True}
    torch.testing.assert_close(torch.tensor(checkpointed.losses), torch.tensor(plain.losses))
    assert checkpointed.expert_load == plain.expert_load


@pytest.mark.parametrize("checkpointing", [False, True])
def test_offloaded_activations_train_bit_for_bit_alike(settings, monkeypatch, checkpointing):
    options = dict(max_steps=3, logging_steps=1, eval_share=0, gradient_checkpointing=checkpointing)
    plain, offloaded = train(settings("plain", **options)), []
    original = offload._Offloaded.__init__
    # On a machine without a GPU, the CPU plays it.
    monkeypatch.setattr(train_module, "check_offloading", lambda: None)
    monkeypatch.setattr(trainer, "offload_activations", partial(offload.offload_activations, device="cpu"))
    monkeypatch.setattr(offload, "SMALLEST", 2**10)
    monkeypatch.setattr(
        offload._Offloaded, "__init__", lambda self, *args: offloaded.append(original(self, *args))
    )
    result = train(settings("offloaded", activation_offloading=True, **options))
    assert offloaded
    assert result.losses == plain.losses


def test_mlps_train_in_tiles(settings, monkeypatch, capsys):
    options = dict(max_steps=3, logging_steps=1, eval_share=0, gradient_checkpointing=True)
    plain, tiled = train(settings("plain", **options)), []
    tile_mlps = trainer.tile_mlps
    monkeypatch.setattr(trainer, "tile_mlps", lambda model: tiled.append(tile_mlps(model, 8)))
    result = train(settings("tiled", tiled_mlp=True, **options))
    assert len(tiled) == 1
    assert dict(result.losses) == pytest.approx(dict(plain.losses), rel=1e-5)
    monkeypatch.setattr(trainer, "tile_mlps", lambda model: tile_mlps(torch.nn.Identity()))
    told = arguments(settings(tiled_mlp=True, overwrite=True))
    assert "--tiled-mlp: model has no gated MLP that could run in tiles." in refusal(capsys, *told)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is what this machine must lack")
def test_offloading_takes_a_gpu(settings, capsys):
    assert "--activation-offloading takes a GPU" in refusal(
        capsys, *arguments(settings(activation_offloading=True))
    )


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adafactor", "sgd"])
def test_optimizers_of_torch_train(settings, optimizer, monkeypatch):
    made, create = [], FineTuner.create_optimizer

    def watched(self, *args):
        made.append(create(self, *args))
        return made[-1]

    monkeypatch.setattr(FineTuner, "create_optimizer", watched)
    result = train(settings(optimizer=optimizer, max_steps=2, logging_steps=1, eval_share=0))
    assert type(made[0]).__name__.lower() == optimizer.split("_")[0]
    assert result.losses[-1][1] != result.losses[0][1]


def test_steps_are_told_by_the_epoch(settings, tmp_path, monkeypatch):
    """Of five to an epoch: 18 examples by 4."""
    result = train(settings("evaluated", evals_per_epoch=2))
    assert [entry["step"] for entry in result.log if "eval_loss" in entry] == [3, 6, 9, 10]
    arguments = training_arguments(settings(evals_per_epoch=9, saves_per_epoch=1), tmp_path, 18)
    assert (arguments.eval_steps, arguments.save_steps) == (1, 5)
    checkpoints = interrupted(settings, monkeypatch, save_steps=None, saves_per_epoch=2)
    assert checkpoints.newest().step == 6
    assert train(settings(resume=True)).losses == result.losses


def test_steps_of_warmup_override_their_share(settings, tmp_path):
    for steps, taken in (None, 5), (4, 4), (0, 0):
        told = settings(warmup_ratio=0.5, warmup_steps=steps)
        assert training_arguments(told, tmp_path, 18).warmup_steps == taken


def test_attention_is_what_is_told(settings, monkeypatch, capsys):
    step, seen = FineTuner.training_step, []

    def watched(self, model, *args):
        seen.append(model.config._attn_implementation)
        return step(self, model, *args)

    monkeypatch.setattr(FineTuner, "training_step", watched)
    for told in ("eager", None):
        train(settings(str(told), attn_implementation=told, max_steps=1, gradient_accumulation_steps=1))
    assert seen == ["eager", "sdpa"]
    monkeypatch.setattr("transformers.LlamaForCausalLM._supports_flex_attn", False)
    assert (
        "the model cannot be loaded with --attn-implementation flex_attention: LlamaForCausalLM"
        in refusal(capsys, *arguments(settings(attn_implementation="flex_attention")))
    )


def test_the_log_is_reported_where_told(settings, tmp_path, monkeypatch):
    seen = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            runs = Path(args.output_dir, "runs")
            runs.mkdir()
            (runs / "events").write_text("kept")

        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(logs)

    for name in ("one", "two"):
        monkeypatch.setitem(INTEGRATION_TO_CALLBACK, name, Recorder if name == "one" else TrainerCallback)
    result = train(settings(report_to="one, two"))
    assert [logs["loss"] for logs in seen if "loss" in logs] == [loss for _, loss in result.losses]
    runs = tmp_path / "out" / "runs"
    assert (runs / "events").read_text() == "kept"
    assert runs.stat().st_mode & 0o700 == 0o700  # else its owner could not enter it
    assert training_arguments(settings(), tmp_path, 1).report_to == []


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("nowhere", "--report-to nowhere: nowhere is not supported, only "),
        ("none,wandb", "--report-to none: none is not supported, only "),
        ("wandb", "--report-to wandb: WandbCallback requires wandb to be installed."),
    ],
)
def test_what_cannot_be_reported_to_is_refused(settings, monkeypatch, capsys, told, message):
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    monkeypatch.setattr(train_module, "load_model", None)
    assert message in refusal(capsys, *arguments(settings(report_to=told)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_known_to_trainer(settings, tmp_path, optimizer):
    assert training_arguments(settings(optimizer=optimizer), tmp_path, 1).optim == optimizer


def test_optimizers_of_bitsandbytes_train_or_are_refused(settings, monkeypatch):
    pytest.importorskip("bitsandbytes")
    try:
        whole = train(settings("whole", optimizer="adamw_8bit"))
    except UserError as error:
        assert "--optimizer adamw_8bit: bitsandbytes has it not for " in str(error)
        return
    interrupted(settings, monkeypatch, optimizer="adamw_8bit")
    assert train(settings(resume=True, optimizer="adamw_8bit")).losses == whole.losses
    assert train(settings("named", optimizer="adamw_bnb_8bit")).losses == whole.losses


def test_what_bitsandbytes_cannot_do_is_a_sentence(settings, monkeypatch, capsys):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def refuse(*args):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", refuse)
    error = refusal(capsys, *arguments(settings(optimizer="paged_adamw_8bit")))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    assert f"--optimizer paged_adamw_8bit: bitsandbytes has it not for {device.type}: no kernel." in error


def test_a_missing_bitsandbytes_is_named(settings, monkeypatch, capsys):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    error = refusal(capsys, *arguments(settings(optimizer="adamw_8bit")))
    assert "--optimizer adamw_8bit takes bitsandbytes, which is not installed: pip install" in error


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("cosine", [0, 0.5, 1, *((1 + math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3))]),
        ("constant_with_warmup", [0, 0.5, 1, 1, 1, 1]),
    ],
)
def test_schedules(settings, schedule, shares):
    result = train(
        settings(
            lr_scheduler_type=schedule, warmup_ratio=0.3, max_steps=6, logging_steps=1, eval_share=0,
            max_grad_norm=1e-9,
        )
    )  # fmt: skip
    assert [entry["learning_rate"] for entry in result.log] == pytest.approx([1e-2 * s for s in shares])
    assert all(entry["grad_norm"] > 0 for entry in result.log)
    assert result.losses[0][1] > 0


def test_gradients_are_clipped_and_weights_decay(settings, tmp_path):
    plain = dict(max_steps=2, warmup_ratio=0, optimizer="sgd", eval_share=0)
    train(settings("plain", **plain))
    for out, options in {"clipped": dict(max_grad_norm=1e-3), "decayed": dict(weight_decay=0.5)}.items():
        train(settings(out, **plain | options))
        assert weights(tmp_path / out) != weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(optimizer="adam"), "--optimizer is one of adamw_torch, "),
        (dict(lr_scheduler_type="step"), "--lr-scheduler-type is one of linear, cosine, constant, "),
        (dict(warmup_ratio=1.0), "--warmup-ratio lies in"),
        (dict(weight_decay=-1.0), "--weight-decay is a number of at least 0"),
        (dict(max_grad_norm=-1.0), "--max-grad-norm is a number of at least 0"),
        (dict(logging_steps=0), "--logging-steps is at least 1"),
        (dict(tiled_mlp=True, backend="peft"), "--tiled-mlp goes with --backend peftfast"),
        (dict(save_steps=0), "--save-steps is at least 1"),
        (dict(eval_steps=2, eval_share=0.0), "--eval-steps goes with held-out data"),
        (dict(evals_per_epoch=2, eval_share=0.0), "--evals-per-epoch goes with held-out data"),
        (dict(evals_per_epoch=0), "--evals-per-epoch is at least 1"),
        (dict(saves_per_epoch=2, save_steps=2), "--save-steps and --saves-per-epoch exclude each other"),
        (dict(warmup_steps=-1), "--warmup-steps is at least 0"),
        (
            dict(attn_implementation="fast"),
            "--attn-implementation is one of eager, sdpa, flash_attention_2, ",
        ),
        (
            dict(attn_implementation="flash_attention_3"),
            "flash_attention_3 computes in 16 bits: it goes with --dtype bf16",
        ),
        (
            dict(method="prefix", backend="peft", gradient_checkpointing=True),
            "PEFT cannot checkpoint a prefix",
        ),
    ],
)
def test_bad_options_are_refused(settings, options, message):
    with pytest.raises(UserError, match=message):
        settings(**options)


# ---- what is seen of it ---------------------------------------------------------------------------------------


def test_the_log_holds_what_is_expected(settings, tmp_path):
    result = train(settings(eval_steps=4, max_eval_examples=2))
    lines = [json.loads(line) for line in (tmp_path / "out" / LOG_FILE).read_text().splitlines()]
    assert lines == result.log == json.loads((tmp_path / "out" / RESULT_FILE).read_text())["log"]
    losses = [entry for entry in lines if "loss" in entry]
    assert [entry["step"] for entry in losses] == [3, 6, 9]
    # A prompt of 4 tokens, a completion of 3 and the end; 18 examples by 4, and the rest of 2 at the end of an epoch.
    assert [entry["tokens"] for entry in losses] == [8 * 3 * 4, 8 * (18 + 4), 8 * (18 + 4 * 4)]
    for entry in losses:
        assert entry.keys() == {
            *("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens"),
            *("tokens_per_second", "peak_memory_mib"),
        }
        assert 0 < entry["tokens_per_second"] < 1e7
        assert 50 < entry["peak_memory_mib"] <= result.peak_memory_mib
    evaluated = {entry["step"]: entry for entry in lines if "eval_loss" in entry}
    assert list(evaluated) == [4, 8, 10]
    assert evaluated[8]["eval_perplexity"] == math.exp(evaluated[8]["eval_loss"])
    # Looking changes nothing.
    assert train(settings("unseen", max_eval_examples=2)).losses == result.losses


def test_the_losses_are_drawn(settings, tmp_path, pictures):
    pytest.importorskip("matplotlib")
    pictures.undo()
    train(settings(eval_steps=4))
    picture = (tmp_path / "out" / PICTURE_FILE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_lines_now_and_then_without_a_terminal(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("peftfast.cli.progress.time.monotonic", lambda: clock[0])
    state, control = TrainerState(max_steps=1000), TrainerControl()
    bar = ProgressBar(Console(width=120))
    bar.on_train_begin(None, state, control)
    for step in range(1, 1001):
        clock[0], state.global_step = 2.0 * step, step
        bar.on_step_end(None, state, control)
        bar.on_log(None, state, control, logs={"loss": 1.25, "tokens_per_second": 3456.0})
    bar.on_train_end(None, state, control)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == LINES
    assert lines[0] == "step 50 of 1,000, loss 1.250, 3,456 tokens/s, 31:40 left"
