"""Every instruction set that the machine has: chosen by name, refused by name, and correct."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import peftfast

TESTS = Path(__file__).parent
KNOWN = ["amx", "avx512_bf16", "avx512", "avx2", "scalar"]  # best first
IN_USE, ISAS = peftfast.build_info()["isa"], list(peftfast.build_info()["isas"])


def run(*command, isa):
    env = {name: value for name, value in os.environ.items() if name != "PEFTFAST_CPU_ISA"}
    if isa is not None:
        env["PEFTFAST_CPU_ISA"] = isa
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, cwd=TESTS)


def import_under(isa):
    return run("-c", "import peftfast; print(peftfast.build_info()['isa'])", isa=isa)


def test_this_machine_runs_at_least_scalar():
    assert "scalar" in ISAS and IN_USE in ISAS
    assert [isa for isa in KNOWN if isa in ISAS] == ISAS


def test_the_best_one_is_the_default():
    assert import_under(None).stdout.strip() == ISAS[0]


@pytest.mark.parametrize("isa", ISAS)
def test_one_can_be_forced(isa):
    result = import_under(isa)
    assert (result.returncode, result.stdout.strip()) == (0, isa), result.stderr


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", " scalar", *(isa for isa in KNOWN if isa not in ISAS)])
def test_one_that_cannot_run_is_refused_at_import(isa):
    """One sentence names the variable, what it held, and what it may hold; no slower path in silence."""
    result = import_under(isa)
    assert result.returncode != 0 and not result.stdout
    sentence = result.stderr.strip().splitlines()[-1]
    assert "PEFTFAST_CPU_ISA" in sentence and isa in sentence
    assert all(name in sentence for name in ISAS)


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != IN_USE])
def test_core_checks_under(isa):
    files = " ".join(
        str(TESTS / f"test_{noun}.py")
        for noun in ("lora", "fourbit", "moe", "adapter", "attention", "rowwise")
    )
    command = f"-m pytest -q --tb=line -p no:cacheprovider -m every_isa {files}".split()
    result = run(*command, isa=isa)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
