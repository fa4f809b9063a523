"""Launches that are prepared once: what is started again, and what Triton has to look at anew."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastlora.kernels.common import INTERPRET
from fastlora.kernels.launch import Launch

FAKE_GPU = Path(__file__).with_name("fake_gpu.py")


class Kernel:
    """Stands for a Triton kernel of two pointers; writes down who started it with what."""

    arg_names = ("x_ptr", "y_ptr", "M", "scale", "BLOCK")

    def __init__(self, compiles=True):
        self.compiles, self.by_triton, self.again = compiles, [], []

    def __getitem__(self, grid):
        def start(*args, **kwargs):
            self.by_triton.append((grid, args, kwargs))
            return Compiled(self) if self.compiles else None

        return start


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.again.append((grid, args))


def prepared(kernel):
    return Launch(kernel, (5, 2), 33, 0.5, BLOCK=16, num_warps=4)


def test_a_second_start_does_not_ask_triton():
    kernel, x, y = Kernel(), torch.zeros(8), torch.zeros(8)
    launch = prepared(kernel)
    launch(x, y)
    assert kernel.by_triton == [((5, 2), (x, y, 33, 0.5), {"BLOCK": 16, "num_warps": 4})]
    z = torch.ones(8)
    launch(z, None)
    launch(z, y)
    (grid, (first, second, *rest)), *more = kernel.again
    assert len(kernel.by_triton) == 2, "None is another kind of argument"
    assert not more
    # options of the compiler are no arguments
    assert (grid, rest) == ((5, 2, 1), [33, 0.5, 16])
    assert first is z
    assert second is y


@pytest.mark.parametrize(
    "other",
    [torch.zeros(8, dtype=torch.float16), torch.zeros(9)[1:], None, (torch.zeros(8),), 3],
    ids=["dtype", "alignment", "none", "tuple", "number"],
)
def test_other_kinds_of_arguments_are_compiled_for(other):
    kernel, x = Kernel(), torch.zeros(8)
    launch = prepared(kernel)
    for args in ((x, x), (other, x), (x, other)) * 2:
        launch(*args)
    assert len(kernel.by_triton) == len(kernel.again) == 3


def test_numbers_in_tuples_count():
    kernel, x = Kernel(), torch.zeros(8)
    launch = prepared(kernel)
    for N in (3, 4, 3):
        launch((x, N), x)
    assert len(kernel.by_triton) == 2


@pytest.mark.parametrize("hip", [None, "7.0"])
@pytest.mark.parametrize("compiles", [True, False])
def test_only_what_cuda_compiles_is_kept(compiles, hip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    kernel, x = Kernel(compiles), torch.zeros(8)
    launch = prepared(kernel)
    launch(x, x)
    launch(x, x)
    assert len(kernel.by_triton) == (1 if compiles and hip is None else 2)


@pytest.mark.skipif(INTERPRET, reason="the interpreter launches nothing")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has a real one")
def test_launches_are_those_of_triton(tmp_path):
    done = subprocess.run(
        [sys.executable, FAKE_GPU, tmp_path],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "launches are the same" in done.stdout
