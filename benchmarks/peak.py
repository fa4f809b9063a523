"""Peak memory of one provider, weights included, in a process of its own.

Run as `python -m fastlora.benchmarks.peak JSON`, which prints MiB: of the GPU, or on a CPU the peak
resident memory of the process while it runs the call, above what it had after a run of a tiny case
that imported and set up everything. What only the building took does not count.
"""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastlora.benchmarks.spec import Benchmark, Call, Provider, Sizes

CALLS = 3  # the first allocates what stays, such as the optimizer's state


def peak_mib(
    bench: Benchmark, provider: Provider, sizes: Sizes, device: str, dtype: str, mode: str
) -> float | None:
    """Start the process and wait for its answer.

    Args:
        bench: in the registry.
        provider: of the benchmark.
        sizes: of the case.
        device: where.
        dtype: name in `run.DTYPES`.
        mode: of the case.

    Returns:
        MiB; None where the system cannot tell: that of a CPU needs Linux.

    Raises:
        RuntimeError: the process failed.
    """
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    case = {"op": bench.name, "provider": provider.label, "sizes": dict(sizes)}
    case |= {"device": device, "dtype": dtype, "mode": mode}
    command = [sys.executable, "-m", "fastlora.benchmarks.peak", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{provider.label}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.splitlines()[-1])


def _measure(case: Mapping[str, Any]) -> float:
    from fastlora.benchmarks.registry import BENCHMARKS

    bench = BENCHMARKS[case["op"]]
    _build(bench, next(iter(bench.small.values())), case)()
    before = _settled(case["device"])
    call = _build(bench, case["sizes"], case)
    _settled(case["device"])
    for _ in range(CALLS):
        call()
    return _peak(case["device"]) - before


def _build(bench: Benchmark, sizes: Sizes, case: Mapping[str, Any]) -> Call:
    from fastlora.benchmarks.run import DTYPES

    torch.manual_seed(0)
    problem = bench.problem(sizes, torch.device(case["device"]), DTYPES[case["dtype"]])
    provider = next(p for p in bench.providers if p.label == case["provider"])
    return provider.build(problem, case["mode"])


def _settled(device: str) -> float:
    """Give back what is free, forget the peak so far, and return what is left, MiB."""
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # see proc(5): resets the peak
    return _status("VmRSS")


def _peak(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _status("VmHWM")


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


if __name__ == "__main__":
    print(_measure(json.loads(sys.argv[1])))
