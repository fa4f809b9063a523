"""Every test: the installed package, a fixed seed, NaN in unwritten memory, no network."""

import gc
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# kernels/ in the root would shadow the package `kernels` of others, fastlora/ the installed one
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]

# a job in the background inherits an ignored SIGINT, and tests interrupt themselves
signal.signal(signal.SIGINT, signal.default_int_handler)

# read at import by transformers, matplotlib, tokenizers, inductor, cuBLAS and libgomp
os.environ.update(
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    # threads that spin at barriers make small ops a hundred times slower on a busy machine
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    # inductor would build and start a program for each kind of vector to see whether it runs
    TORCHINDUCTOR_VEC_ISA_OK="1",
    TRANSFORMERS_OFFLINE="1",
)

import numpy as np  # noqa: E402  the environment comes first
import pytest  # noqa: E402
import torch  # noqa: E402

from fastlora import native  # noqa: E402

if os.environ.get("TRITON_INTERPRET"):
    np.seterr(all="ignore")  # the interpreter computes in NumPy, which warns where a GPU does not


# a process takes a file at a time, and whoever begins with one of these last is waited for
LONGEST = (
    "test_cli_installed.py",
    "test_compile.py",
    "test_curves.py",
    "test_optim_curves.py",
    "test_peft_curves.py",
    "test_cli_resume.py",
    "test_ops.py",
    "test_cpu_linear.py",
    "test_cli_generate.py",
    "test_cli_merge.py",
    "test_cli_eval.py",
    "test_step_bench.py",
    "test_packaging.py",
    "test_native_cpp.py",
    "test_graphs.py",
    "test_causal_lm.py",
)
# in an instruction set of another CPU every test would only skip; test_native.py says which do
ISAS = native.isas() if native.available() else ("portable",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Spare every collection of garbage the hundred thousands of objects that imports made."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give them back: libraries report as leaks what is never collected."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")


@pytest.fixture(autouse=True)
def reproducible():
    """Fix all seeds, and fill torch.empty with NaN so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Run the test once in each instruction set of the C++ kernels."""
    if not native.available():
        pytest.skip(native.unavailable_reason())
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture(scope="module")
def one_thread():
    """Matrices of tiny models are faster without threads, many times so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """Give the number of threads back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def guards(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Lay guard bytes around whatever `torch.empty` returns, aligned to its elements and no more.

    Returns:
        A function that asserts that no guard was written to, and returns how many tensors have
        been guarded.
    """
    guarded = []

    def empty(*shape: int | torch.Size, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], torch.Size) else shape)
        first = 64 + dtype.itemsize
        last = first + size.numel() * dtype.itemsize
        buffer = torch.full((last + 128,), 0xA5, dtype=torch.uint8, device=device)
        guarded.append((buffer[:first], buffer[last:]))
        return buffer[first:last].view(dtype).view(size)

    def check() -> int:
        for guard in (guard for pair in guarded for guard in pair):
            assert torch.all(guard == 0xA5)
        return len(guarded)

    monkeypatch.setattr(torch, "empty", empty)
    return check
