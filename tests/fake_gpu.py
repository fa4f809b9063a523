"""Start every kernel of linear layers on a GPU that is not there: does it get what it should?

A driver that does nothing lets Triton compile, load and launch as on an H100, over memory of the
CPU. Compared are a launch that Triton prepared from all its arguments, and the same launch as
`kernels.launch` repeats it: compiled kernel, grid, stream and arguments.

Run by test_launch.py in a process of its own, as it replaces functions of torch.cuda.
"""

import itertools
import os
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("cpp") / "fake_cuda.cpp"
folder = Path(sys.argv[1])
subprocess.run(
    ["c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", SOURCE, "-o", folder / "libcuda.so.1"],
    check=True,
)
(folder / "libcuda.so").symlink_to("libcuda.so.1")
os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
# Triton's own module finds the library only where the process had it before
os.environ["LD_LIBRARY_PATH"] = str(folder)

import ctypes  # noqa: E402

ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from fastlora import backend, ops, plan, quantize_nf4  # noqa: E402

SIZES = [  # M, K, N, R: Triton's GEMM with descriptors, augmented, odd, more ranks than a block
    (16, 64, 64, 16),
    (2048, 128, 256, 16),
    (64, 65, 7, 5),
    (257, 128, 64, 128),
]


def facts(value):
    """What a launch depends on, where memory may lie elsewhere."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return facts(value.base), *map(tuple, (value.shape, value.strides, value.block_shape))
    return tuple(map(facts, value)) if isinstance(value, tuple) else (type(value), value)


def main():
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 7
    driver.set_active(CudaDriver())
    plan.device_kind = lambda device: "NVIDIA H100"

    launches, by_triton = [], []
    launch, run = CudaLauncher.__call__, JITFunction.run

    def record(self, gx, gy, gz, stream, function, *rest):
        launches.append((gx, gy, gz, stream, function, facts(rest[4:])))
        return launch(self, gx, gy, gz, stream, function, *rest)

    def count(self, *args, **kwargs):
        by_triton.append(self)
        return run(self, *args, **kwargs)

    CudaLauncher.__call__, JITFunction.run = record, count

    total = 0
    cases = itertools.product(SIZES, (True, False), ((0.0, 1), (0.1, 3)))
    for (M, K, N, R), nf4, (p, count_of_layers) in cases:
        backend.name_for = lambda device: "reference"  # the kernel would not quantise anything
        members = []
        for i in range(count_of_layers):
            w = torch.randn(N, K).bfloat16()
            a, b = (torch.randn(size, requires_grad=True) for size in ((R, K), (N, R)))
            bias = torch.randn(N) if i else None
            members.append(ops.Member(quantize_nf4(w) if nf4 else w, bias, a, b, 2.0))
        backend.name_for = lambda device: "triton"
        x = torch.randn(M, K, dtype=torch.bfloat16, requires_grad=True)
        wanted = [x, *(m.a for m in members), *(m.b for m in members)]

        def step(x=x, members=members, wanted=wanted, p=p):
            launches.clear()
            by_triton.clear()
            ys = ops.linear_group(x, members, p)
            torch.autograd.grad(ys, wanted, [torch.ones_like(y) for y in ys])
            return [*launches], len(by_triton)

        first, _ = step()
        second, found_by_triton = step()
        assert second == first, (M, K, N, R, nf4, p, count_of_layers)
        assert found_by_triton == 0, "everything was prepared by the first step"
        total += len(first)
    print(f"{total} launches are the same")


if __name__ == "__main__":
    main()
