"""Speed from commit to commit: `pytest tests/test_speed.py -m slow --benchmark-autosave`, then
`--benchmark-compare`. Against other packages `fastlora bench` is the tool. No time is asserted."""

import pytest
import torch

from fastlora.benchmarks.registry import BENCHMARKS

pytest.importorskip("pytest_benchmark")

CASES = [
    pytest.param(op, shape, mode, provider.label, id=f"{op}-{shape}-{mode}-{provider.label}")
    for op, bench in BENCHMARKS.items()
    for shape in [*bench.shapes][:2]
    for mode in bench.modes
    for provider in bench.providers
    if provider.name == "fastlora"
]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "shape", "mode", "label"), CASES)
def test_speed(op, shape, mode, label, benchmark):
    bench = BENCHMARKS[op]
    problem = bench.problem(bench.shapes[shape], torch.device("cpu"), torch.float32)
    provider = next(p for p in bench.providers if p.label == label)
    call = provider.build(problem, mode)
    assert all(d.ok for d in bench.check(problem, mode, provider, call))
    benchmark(call)
