"""The borders between the layers of the code, kept by grep."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {".cpp", ".h", ".cu", ".cuh"}


def files(folder, suffixes):
    found = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in suffixes]
    assert found, f"no {suffixes} in {folder}: the test looks in the wrong place"
    return found


def lines(path, pattern):
    """Line numbers where the pattern occurs outside of // comments."""
    pattern = re.compile(pattern)
    return [
        i for i, line in enumerate(path.read_text().splitlines(), 1) if pattern.search(line.split("//")[0])
    ]


def trespasses(folder, suffixes, pattern, allowed):
    """Places under folder where the pattern occurs, but for the paths that `allowed` matches."""
    return [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files(folder, suffixes)
        if not re.fullmatch(allowed, str(path.relative_to(ROOT)))
        for number in lines(path, pattern)
    ]


INTRINSICS = r"\b_mm\d*_|\b__m(64|128|256|512)|\bv(ld|st)1q_|\b__builtin_ia32_"
INTRINSICS_HEADER = r"#\s*include\s*[<\"](\w*intrin|arm_neon|arm_sve)\.h"
OTHER_LIBRARY = r"^\s*(from|import)\s+(peft|transformers|bitsandbytes)\b"

BORDERS = {
    "torch and pybind11 only in csrc/torch": (
        "csrc",
        SOURCES,
        r"#\s*include\s*[<\"](torch|ATen|c10|pybind11|Python\.h)|\btorch::|\bat::|\bpybind11::",
        r"csrc/torch/.*",
    ),
    "intrinsics only in csrc/cpu/simd_*.h": ("csrc", SOURCES, INTRINSICS, r"csrc/cpu/simd_\w+\.h"),
    "their header only there, and ahead of the target regions": (
        "csrc",
        SOURCES,
        INTRINSICS_HEADER,
        r"csrc/cpu/(simd_\w+|generic/before_region)\.h",
    ),
    "no preprocessor tests of instruction sets": (
        "csrc",
        SOURCES,
        r"#\s*(if|ifdef|ifndef|elif)\b.*__(AVX|SSE|FMA|F16C|BMI|ARM_NEON)",
        "",
    ),
    "kernels know no host language": ("csrc", SOURCES, r"\bPyObject\b|\bpy::", r"csrc/torch/.*"),
    "the backends do not know each other": (
        "csrc/cpu",
        SOURCES,
        r"#\s*include\s*[<\"](\.\./)*(cuda|torch)/|\bcuda::",
        "",
    ),
    "other libraries' insides only in integrations": (
        "peftfast",
        {".py"},
        OTHER_LIBRARY,
        r"peftfast/(integrations|cli|demo)/.*",
    ),
    "the library does not import its tests or benchmarks": (
        "peftfast",
        {".py"},
        r"^\s*(from|import)\s+(tests|benchmarks|pytest|hypothesis)\b",
        r"peftfast/testing\.py",
    ),
}


@pytest.mark.parametrize("border", BORDERS.values(), ids=BORDERS.keys())
def test_border(border):
    assert trespasses(*border) == []


@pytest.mark.parametrize(
    "pattern, line",
    [
        (INTRINSICS, "  __m256 a = _mm256_setzero_ps();"),
        (INTRINSICS_HEADER, "#include <immintrin.h>"),
        (OTHER_LIBRARY, "    from peft.tuners import lora"),
        (OTHER_LIBRARY, "import bitsandbytes"),
        (BORDERS["torch and pybind11 only in csrc/torch"][2], "#include <torch/csrc/stable/tensor.h>"),
        (BORDERS["no preprocessor tests of instruction sets"][2], "#ifdef __AVX512F__"),
    ],
)
def test_the_greps_find_what_they_look_for(pattern, line, tmp_path):
    (tmp_path / "file.h").write_text(f"// a comment\n{line}\n")
    assert lines(tmp_path / "file.h", pattern) == [2]


def test_the_contract_page():
    path = ROOT / "csrc/kernels.h"
    text = path.read_text()
    assert len(text.splitlines()) < 200
    assert set(re.findall(r"#\s*include\s*(\S+)", text)) <= {"<cstdint>", "<cstddef>"}
    assert "torch" not in re.sub(r"//.*", "", text)


NOUNS = sorted({path.stem for path in (ROOT / "csrc/torch").glob("*.cpp")} - {"library", "python"})


def test_the_first_family_is_there():
    assert "lora" in NOUNS


@pytest.mark.parametrize("noun", NOUNS)
def test_a_family_is_found_in_every_folder(noun):
    for place in (
        f"csrc/torch/{noun}.cpp",
        f"csrc/cpu/{noun}.cpp",
        f"csrc/cpu/generic/{noun}.h",
        f"peftfast/ops/{noun}.py",
        f"peftfast/nn/{noun}.py",
        f"tests/test_{noun}.py",
        f"benchmarks/bench_{noun}.py",
    ):
        assert (ROOT / place).is_file(), place


def test_instruction_sets_and_their_files():
    """Each set has its file that opens the target region, and its Simd."""
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx"):
        assert (ROOT / f"csrc/cpu/{isa}.cpp").is_file() and (ROOT / f"csrc/cpu/simd_{isa}.h").is_file()
