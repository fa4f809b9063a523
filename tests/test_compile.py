"""Every kernel compiles well for every kind of device; no device is needed."""

import json
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers import ROOT
from typer.testing import CliRunner

from fastlora.kernels.common import INTERPRET, arch

if INTERPRET:
    pytest.skip("TRITON_INTERPRET replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastlora.benchmarks.__main__ import app
from fastlora.benchmarks.aot import TARGETS, Compiled, overwritten, pretend
from fastlora.benchmarks.compile_report import (
    MATRIX_UNIT,
    cases,
    compile_all,
    isolated,
    jobs,
)

KERNELS = tuple(dict.fromkeys(case.kernel for case in cases()))
GOOD = Compiled(
    kernel="k",
    target="sm_90",
    threads=128,
    stages=1,
    registers=32,
    spills=0,
    shared=0,
    loads={"16": 1},
    stores={"16": 1},
    matrix={},
    instructions=10,
    loop=0,
    unreachable=False,
    overwritten=False,
    ir="",
)


def sample(kernel):
    """The variant of a kernel that is compiled here; the command compiles all."""
    variants = [case.variant for case in cases() if case.kernel == kernel]
    return "R 16, dropout" if "R 16, dropout" in variants else variants[0]


@pytest.fixture(scope="module")
def rows():
    """Rows of the default configuration of one case, by kernel and target."""
    todo = [j for j in jobs([*TARGETS]) if j.config == 0 and j.variant == sample(j.kernel)]
    return {(j.kernel, j.target): r for j, r in zip(todo, compile_all(todo), strict=True)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_default_configuration(rows, kernel, target):
    found = rows[kernel, target]
    assert found
    assert [row.problems for row in found] == [[] for _ in found]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", ["gemm_lora", "gemm_lora_dx"])
def test_gemms_use_the_matrix_unit(rows, kernel, target):
    assert rows[kernel, target][0].matrix[MATRIX_UNIT[target]] > 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spills": 3}, "3 spills"),
        ({"shared": 232_449}, "232449 bytes of shared memory, there are 232448"),
        ({"target": "sm_86", "shared": 101_377}, "101377 bytes of shared memory, there are 101376"),
        ({"stores": {}}, "no store"),
        ({"unreachable": True}, "unreachable code"),
        ({"overwritten": True}, "a buffer too few"),
    ],
)
def test_problems(change, problem):
    assert GOOD.problems() == []
    assert replace(GOOD, **change).problems() == [problem]


# two loads run ahead of a product
PIPELINED = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x64x128xbf16, #shared, #smem, mutable>
    %x_1 = ttg.memdesc_index %x[%c0_i32] : !ttg.memdesc<64x128xbf16>
    %x_2 = ttg.async_copy_global_to_local %ptrs, %x_1 mask %m : tensor<64x128x!tt.ptr<bf16>>
    %x_3 = ttg.memdesc_index %x[%c1_i32] : !ttg.memdesc<64x128xbf16>
    %x_4 = ttg.async_copy_global_to_local %ptrs, %x_3 mask %m : tensor<64x128x!tt.ptr<bf16>>
    %acc = scf.for %k = %c0 to %n step %c1 {{
      %x_5 = ttg.memdesc_index %x[%i] : !ttg.memdesc<64x128xbf16>
      %acc_1 = ttng.warp_group_dot %x_5, %a, %acc_0 {{isAsync = true}} : !ttg.memdesc<64x128xbf16>
      %acc_2:2 = ttng.warp_group_dot_wait %acc_1, %x_5 {{pendings = {pendings} : i32}}
"""


@pytest.mark.parametrize(
    ("buffers", "pendings", "expected"), [(2, 1, True), (3, 1, False), (2, 0, False)]
)
def test_a_load_over_what_a_product_reads(buffers, pendings, expected):
    assert overwritten(PIPELINED.format(buffers=buffers, pendings=pendings)) is expected


def test_pretend_leaves_nothing_behind():
    run, before = JITFunction.run, driver._active
    with pytest.raises(KeyError), pretend("gfx942"):
        raise KeyError(arch())
    assert JITFunction.run is run
    assert driver._active is before


def test_an_abort_of_the_compiler_is_a_row():
    (row,) = isolated(signal.raise_signal, signal.SIGABRT)
    assert row.problems == ["crashed"]


def test_command(tmp_path):
    args = ["--kernel", "nf4_quantize", "--target", "sm_90", "--out", str(tmp_path / "new")]
    done = CliRunner().invoke(app, ["compile-report", *args])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "new" / "compile-report.json").read_text())["rows"]
    assert len(rows) == len(jobs(["sm_90"], ["nf4_quantize"]))
    text = (tmp_path / "new" / "compile-report.md").read_text()
    assert text.count("| sm_90 |") == len(rows)


@pytest.mark.parametrize("option", ["--target", "--kernel"])
def test_unknown_names_are_refused(option):
    done = CliRunner().invoke(app, ["compile-report", option, "nope"])
    assert done.exit_code == 2
    assert "got nope" in " ".join(done.output.split())


def test_module_runs_in_a_checkout():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compile-report" in done.stdout
