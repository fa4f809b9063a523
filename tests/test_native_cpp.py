"""The C ABI of csrc/ called from C++ (tests/cpp): as installed, with sanitizers, and on Arm."""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT

from fastlora import native

PROGRAM = ROOT / "tests" / "cpp" / "abi_test.cpp"
KERNELS = sorted((ROOT / "csrc").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", f"-I{ROOT}/csrc"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
ISAS = native.isas() if native.available() else ()
# weak references alone do not make a linker keep a runtime
OPENMP = ["-Wl,--no-as-needed", "-lgomp"]


def run(*command: str | Path) -> str:
    """What a command prints; fails with the start of it where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        pytest.fail(f"{command[0]} returned {done.returncode}\n{done.stdout[:5000]}", pytrace=False)
    return done.stdout


def build(compiler: str, flags: Sequence[str], libraries: Sequence[str], folder: Path) -> Path:
    """Compile the kernels and the program, a file on each core, and link them."""
    objects = {path: folder / f"{path.stem}.o" for path in (*KERNELS, PROGRAM)}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(run, compiler, *FLAGS, *flags, "-c", path, "-o", output)
            for path, output in objects.items()
        ]
        for job in jobs:
            job.result()
    program = folder / "abi_test"
    run(compiler, *flags, *objects.values(), *libraries, "-o", program)
    return program


def find(*names: str) -> str:
    """The first of these programs that there is, or skip the test."""
    found = next(filter(None, map(shutil.which, names)), None)
    return found or pytest.skip(f"needs {' or '.join(names)}")


def host_compiler() -> str:
    return find(os.environ.get("CXX", "c++"), "g++", "clang++")


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
@pytest.mark.skipif(not native.available(), reason=native.unavailable_reason() or "built")
def test_installed_library(tmp_path):
    library = importlib.util.find_spec("fastlora._native").origin
    program = tmp_path / "abi_test"
    run(host_compiler(), *FLAGS, *WARNINGS, PROGRAM, library, *OPENMP, "-o", program)
    assert run(program) == f"{','.join(native.isas())}, threads\n"


@pytest.mark.skipif("avx512" not in ISAS, reason="needs an AVX-512 processor")
def test_emulated(tmp_path):
    """AMX and products of bf16 in pairs, which this processor may not have."""
    program = build(find("g++"), ["-DFASTLORA_EMULATE"], OPENMP, tmp_path)
    # the others run as installed, and optimised
    assert run(program, "amx,avx512bf16").startswith("amx,avx512bf16,avx512,")


@pytest.mark.slow
def test_with_sanitizers(tmp_path):
    compiler = host_compiler()
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
    (tmp_path / "empty.cpp").write_text("int main() {}")
    probe = [compiler, *sanitize, tmp_path / "empty.cpp", "-o", tmp_path / "empty"]
    if subprocess.run(probe, capture_output=True).returncode != 0:
        pytest.skip(f"{compiler} has no address and undefined behaviour sanitizers")
    # pairs of bf16 numbers are packed on any AVX-512 processor, whatever multiplies them
    program = build(compiler, [*sanitize, "-DFASTLORA_EMULATE"], OPENMP, tmp_path)
    assert run(program).endswith("portable, threads\n")


def test_compiles_for_arm():
    compiler = find("aarch64-linux-gnu-g++")
    for path in KERNELS:
        run(compiler, *FLAGS, *WARNINGS, "-fsyntax-only", path)


@pytest.mark.slow
def test_on_arm(tmp_path):
    compiler, emulator = find("aarch64-linux-gnu-g++"), find("qemu-aarch64")
    program = build(compiler, ["-static", "-O2"], [], tmp_path)
    assert run(emulator, program) == "neon,portable, no threads\n"
