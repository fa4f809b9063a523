"""The C++ kernels against the reference, bit for bit, in every instruction set that runs here."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastlora import native, reference
from fastlora.codebooks import BLOCKSIZES, dynamic_map, nf4_thresholds

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# one element, odd counts, less than a block, whole blocks, a partial last block, work for threads
COUNTS = [1, 2, 31, 33, 64, 127, 4096, 5001, 70_000, 70_033]

needs_kernels = pytest.mark.skipif(
    not native.available(), reason=native.unavailable_reason() or "built"
)


def weights(n: int, dtype: torch.dtype) -> Tensor:
    """Normal weights, a stretch of zeros, and one whose absmax has no finite reciprocal."""
    w = torch.randn(n)
    if n > 1000:
        w[96:200] = 0
        w[256:512] *= 1e-39
        w[512:600] *= 1e-6
    return w.to(dtype)


def bits(t: Tensor) -> Tensor:
    """The bytes of t, so that 0 and -0 differ."""
    return t.reshape(-1).view(torch.uint8)


def equal(got: tuple, expected: tuple) -> bool:
    """Whether tensors have equal bytes and numbers are equal."""
    return all(
        torch.equal(bits(a), bits(b)) if isinstance(a, Tensor) else a == b
        for a, b in zip(got, expected, strict=True)
    )


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in another process, away from the source tree, at most a minute."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        cwd=Path(sys.executable).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- NF4 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_quantize_blocks(isa, blocksize, dtype):
    for n in COUNTS:
        w = weights(n, dtype)
        assert equal(
            native.quantize_blocks(w, blocksize), reference.quantize_blocks(w, blocksize)
        ), n


def test_thresholds_are_strict(isa):
    t = nf4_thresholds()
    inf = torch.tensor(torch.inf)
    w = torch.cat([torch.tensor([1.0]), t, torch.nextafter(t, inf), torch.nextafter(t, -inf)])
    packed, absmax, _ = native.quantize_blocks(w, 64)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)
    below = torch.arange(15)
    assert absmax.tolist() == [1.0]
    assert codes.tolist() == [15, *below.tolist(), *(below + 1).tolist(), *below.tolist()]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_16_bit_weight(isa, dtype):
    w = torch.arange(65536).to(torch.uint16).view(dtype)
    w = w[w.isfinite()]
    for order in (torch.arange(len(w)), torch.randperm(len(w))):
        assert equal(native.quantize_blocks(w[order], 32), reference.quantize_blocks(w[order], 32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_weights_are_counted(isa, dtype):
    w = weights(140_033, dtype)
    assert native.quantize_blocks(w, 64)[2] == 0
    where = torch.tensor([0, 1, 63, 64, 96, 5000, 70_000, 140_031, 140_032])
    w[where] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3, dtype=dtype)
    assert native.quantize_blocks(w, 64)[2] == len(where)
    assert native.quantize_blocks(w, 4096)[2] == len(where)


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 1000, 70_001])
def test_quantize_stats(isa, blocks):
    for absmax in (
        torch.rand(blocks),
        torch.randn(blocks).abs() * 1e-30,
        torch.zeros(blocks),
        torch.full((blocks,), 0.25),  # no deviation from the mean: 1 / 0
    ):
        assert equal(native.quantize_stats(absmax), reference.quantize_stats(absmax))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_dequantize_blocks(isa, blocksize, nested, dtype):
    for n in COUNTS:
        # scales from below the smallest to above the largest fp16; every third a tie of 16 bits
        absmax = torch.exp2(torch.empty(-(-n // blocksize)).uniform_(-30, 18))
        absmax[::6], absmax[3::6] = 1 + 2**-8, 1 + 2**-11
        packed = torch.randint(0, 256, ((n + 1) // 2,), dtype=torch.uint8)
        stats = (absmax, None, None, None)
        if nested:
            codes, absmax2, offset = reference.quantize_stats(absmax)
            stats = (codes, absmax2, dynamic_map(), offset)
        args = (packed, *stats, blocksize, n, dtype)
        assert equal((native.dequantize_blocks(*args),), (reference.dequantize_blocks(*args),)), n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_scale_stays_nan(isa, dtype):
    # all ones: adding the half of rounding to nearest would carry into the sign
    absmax = torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)
    packed = torch.randint(0, 256, (64,), dtype=torch.uint8)
    got = native.dequantize_blocks(packed, absmax, None, None, None, 64, 128, dtype)
    assert torch.all(got.isnan())


def test_dequantize_reads_unaligned_views(isa):
    packed = torch.randint(0, 256, (2051,), dtype=torch.uint8)[3:]
    codes = torch.randint(0, 256, (65,), dtype=torch.uint8)[1:]
    args = (packed, codes, torch.rand(1), dynamic_map(), torch.rand(()), 64, 4096, torch.float32)
    assert equal((native.dequantize_blocks(*args),), (reference.dequantize_blocks(*args),))


# --- dropout ---------------------------------------------------------------------------------

SHAPES = [
    (1, 1),
    (3, 27),  # less than the width of a vector
    (5, 64),
    (2, 129),  # one element after whole vectors
    (3, 9001),  # more than one unit of work in a row
    (300, 577),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K"), SHAPES)
def test_dropout(isa, M, K, dtype):
    x = torch.randn(M, K).to(dtype)
    for seed, offset, p in ((0, 0, 0.05), (2**63 - 1, 2**33 + 7, 0.5), (-5, 2**31, 0.999)):
        state = torch.tensor([seed, offset])
        got, expected = native.dropout(x, state, p), reference.dropout(x, state, p)
        # a dropped element is +0 in both, whatever the sign of x
        assert equal((got,), (expected,)), (seed, offset, p)


@pytest.mark.parametrize(
    ("seed", "offset", "row", "halves"),
    [
        (0, 0, 0, "b709 5f6f 3f64 0d89 1f81 4f12 0a48 4f73 586e 983a"),
        (0x1234567890ABCDEF, 5, 3, "e559 2a04 da2d 5a79 d683 d38c 9464 149c 93fe f8c0"),
    ],
)
def test_dropout_known_answers(isa, seed, offset, row, halves):
    x, state = torch.ones(row + 1, 10), torch.tensor([seed, offset])
    for k, half in enumerate(int(h, 16) for h in halves.split()):
        kept = native.dropout(x, state, half / 65536)[row, k].item()
        assert kept == torch.tensor(65536 / (65536 - half)).item()
        assert native.dropout(x, state, (half + 1) / 65536)[row, k].item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_reads_any_strides(isa, dtype):
    state = torch.tensor([11, 22])
    big = torch.randn(40, 90).to(dtype)
    for x in (big[:, 3:70], big[::3], big.t(), big[:1].expand(7, -1), big[:, 5:6]):
        expected = reference.dropout(x.contiguous(), state, 0.3)
        assert equal((native.dropout(x, state, 0.3),), (expected,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_removes_nan_and_keeps_it(isa, dtype):
    state = torch.tensor([1, 2])
    kept = native.dropout(torch.ones(4, 100, dtype=dtype), state, 0.5) != 0
    got = native.dropout(torch.full((4, 100), torch.nan, dtype=dtype), state, 0.5)
    assert torch.equal(got.isnan(), kept)
    assert torch.equal(got[~kept], torch.zeros_like(got[~kept]))


def test_no_dropout_needs_no_state():
    x = torch.randn(3, 4)
    assert native.dropout(x, None, 0.0) is x


# --- memory and threads ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_past_an_output(isa, dtype, guards):
    for n in (1, 31, 33, 63, 64, 65, 5001):
        w = weights(n, dtype)
        packed, absmax, _ = native.quantize_blocks(w, 32)
        codes, absmax2, offset = native.quantize_stats(absmax)
        native.dequantize_blocks(packed, codes, absmax2, dynamic_map(), offset, 32, n, dtype)
        native.dequantize_blocks(packed, absmax, None, None, None, 32, n, dtype)
        native.dropout(w[None], torch.tensor([3, 4]), 0.5)
    assert guards() == 7 * 7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(isa, dtype, threads):
    w, state = weights(600_001, dtype), torch.tensor([5, 6])
    x = w[:600_000].view(4, -1)
    results = []
    for n in (1, 2, 3, 8):
        threads(n)
        packed, absmax, nonfinite = native.quantize_blocks(w, 64)
        back = native.dequantize_blocks(packed, absmax, None, None, None, 64, len(w), dtype)
        # the mean is torch's, which does depend on the number of threads: only its use is ours
        results.append((packed, absmax, nonfinite, back, native.dropout(x, state, 0.1)))
    assert all(equal(r, results[0]) for r in results[1:])


@needs_kernels
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime():
    code = """
import os, re, torch
from fastlora import cpu, native
tasks = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
w, x, a = torch.ones(1 << 20), torch.ones(2048, 512), torch.ones(64, 512)
counts = [tasks()]
for n in (1, 2, 4):
    torch.set_num_threads(n)
    native.quantize_blocks(w, 64)
    counts.append(tasks())
    cpu.lora_down(x, a, None, 0)
    cpu.lora_up(x, x[:, :64], x[:512, :64], 1.0)
    counts.append(tasks())
w.fill_(1)
counts.append(tasks())
runtimes = re.findall(r"/\\S*/lib(?:gomp|omp|iomp)\\S*", open("/proc/self/maps").read())
print(native.threads(), *(n - counts[0] for n in counts[1:]), len(set(runtimes)))
"""
    done = run_python(code)
    # ours start what is missing beside the calling thread, PyTorch's next operation reuses them
    assert done.stdout.split() == ["4", "0", "0", "1", "1", "3", "3", "3", "1"], done.stderr


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_child_does_not_wait_for_threads():
    # bytes, because comparing tensors in the child would enter PyTorch's own parallel regions
    code = """
import os, torch, fastlora
from fastlora import cpu, native
torch.set_num_threads(2)
w, x = torch.randn(512, 1024), torch.randn(512, 1024)
q = fastlora.quantize_nf4(w)
def results():
    y = cpu.linear_packed(x, q, None, None, None, 1.0)
    packed = native.quantize_blocks(w, 64)[0]
    return [bytes(t.numpy()) for t in (packed, cpu.lora_down(x, w, None, 0), y)]
before = results()
child = os.fork()
if child == 0:
    os._exit(0 if native.threads() == 1 and results() == before else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, native.threads(), results() == before)
"""
    done = run_python(code)
    assert done.stdout.split() == ["0", "2", "True"], done.stderr


# --- which library, which instruction set ----------------------------------------------------


def test_built_where_there_is_a_compiler():
    if not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("no C++ compiler")
    assert native.available(), native.unavailable_reason()
    assert native.isa() == native.isas()[0] or "FASTLORA_CPU_ISA" in os.environ


@needs_kernels
@pytest.mark.parametrize("name", native.ISAS)
def test_instruction_sets_that_run_here(name):
    """The tests of `isa` run in these and in no others."""
    if name not in native.isas():
        pytest.skip(f"this CPU has no {name}")
    before = native.isa()
    native.use_isa(name)
    assert native.isa() == name
    native.use_isa(before)


@needs_kernels
def test_environment_forces_an_instruction_set():
    code = """
import os
from fastlora import native
print(native.isa())
os.environ["FASTLORA_CPU_ISA"] = "sse9"
native._load.cache_clear()
native.isa()
"""
    done = run_python(code, FASTLORA_CPU_ISA="portable")
    assert done.stdout.strip() == "portable"
    assert done.returncode == 1
    message = f"FASTLORA_CPU_ISA must be one of {[*native.ISAS]}, got 'sse9'"
    assert done.stderr.strip().endswith(f"RuntimeError: {message}")


def test_instruction_set_this_cpu_lacks():
    lacking = SimpleNamespace(
        fastlora_use_isa=lambda name: 1, fastlora_isas=lambda: b"avx2,portable"
    )
    message = r"FASTLORA_CPU_ISA=avx512 cannot run on this CPU, use one of \['avx2', 'portable'\]"
    with pytest.raises(RuntimeError, match=message):
        native._use_isa(lacking, "avx512")


@pytest.mark.parametrize("case", ["missing", "broken", "old"])
def test_without_kernels(case, monkeypatch, tmp_path):
    if case == "missing":
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
        because = "were not built, install a C++17 compiler"
    elif case == "broken":
        (tmp_path / "lib.so").write_bytes(b"not a library")
        spec = SimpleNamespace(origin=str(tmp_path / "lib.so"))
        monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: spec)
        because = "cannot be loaded"
    else:
        if not native.available():
            pytest.skip(native.unavailable_reason())
        monkeypatch.setattr(native, "_ABI", -1)
        because = "are of another version"
    native._load.cache_clear()
    try:
        assert not native.available()
        assert because in native.unavailable_reason()
        with pytest.raises(RuntimeError, match=re.escape(because)):
            native.quantize_blocks(torch.zeros(64), 64)
    finally:
        native._load.cache_clear()


def test_build_without_compiler_succeeds_and_says_so(tmp_path):
    pytest.importorskip("setuptools")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"-b{tmp_path}/lib", f"-t{tmp_path}/tmp"],
        env={**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("fastlora: the C++ kernels were not built") == 1
    assert not list((tmp_path / "lib").rglob("*native*"))
