"""Every test: the installed package, a fixed seed, NaN in unwritten memory, no network."""

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

# read at import by transformers, matplotlib, tokenizers, cuBLAS and libgomp
os.environ.update(
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_OFFLINE="1",
    MPLBACKEND="Agg",
    # threads that spin at barriers make small ops a hundred times slower on a busy machine
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_OFFLINE="1",
)

import numpy as np  # noqa: E402  the environment comes first
import pytest  # noqa: E402
import torch  # noqa: E402

from fastlora import native  # noqa: E402

if os.environ.get("TRITON_INTERPRET"):
    np.seterr(all="ignore")  # the interpreter computes in NumPy, which warns where a GPU does not


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


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest):
    """Run the test once in each instruction set of the C++ kernels."""
    if not native.available():
        pytest.skip(native.unavailable_reason())
    if request.param not in native.isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


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
