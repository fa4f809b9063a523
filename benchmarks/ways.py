"""Each way of `plan` to compute a layer or a group: which one is fastest on this device.

Forward and backward are whole, since ways differ in more than the GEMM, but as one CUDA graph.
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch

from fastlora import backend, passes, plan
from fastlora.benchmarks.graphs import graphed
from fastlora.benchmarks.group import (
    DROPOUT,
    MODES,
    GroupProblem,
    compare,
    dropout_of,
    make_problem,
    widths,
)
from fastlora.benchmarks.run import Case
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.plan import Path, Problem

# op of a backend that a way needs, where not every backend has it
_NEEDS = {"augment": "lora_down_augmented", "gemm": "linear_lora"}
FORWARD, DX = ("addmm", "augment", "gemm"), ("tail", "gemm")


def ways_benchmarks(shapes: Mapping[str, Sizes], device: torch.device) -> list[Benchmark]:
    """Each way forward, and each way backward.

    Args:
        shapes: name -> sizes of a layer or a group.
        device: where.

    Returns:
        Two benchmarks, "ways forward" and "ways dx".
    """
    sides = {"ways forward": (_forward, FORWARD), "ways dx": (_backward, DX)}
    return [
        Benchmark(
            name=name,
            summary="each way of the plan",
            shapes=shapes,
            small=shapes,
            problem=make_problem,
            providers=tuple(graphed(Provider(w, partial(build, way=w)), device) for w in ways),
            check=_check,
            work=_work,
            rates=("GFLOP/s",),
            modes=MODES,
        )
        for name, (build, ways) in sides.items()
    ]


def problem_of(sizes: Sizes, mode: str) -> Problem:
    """What the plan chooses a path by."""
    N, R, M = tuple(widths(sizes)), sizes["R"], plan.bucket(sizes["M"])
    return Problem(M, N, sizes["K"], (R,) * len(N), dropout_of(mode) > 0, stackable=True)


def winners(cases: Iterable[Case]) -> dict[Problem, Path]:
    """The fastest way of everything that was measured forward and backward.

    Args:
        cases: of any benchmark.

    Returns:
        problem -> path.
    """
    fastest: dict[Problem, dict[str, str]] = {}
    for case in cases:
        timed = [r for r in case.results if r.ms is not None]
        if case.op in ("ways forward", "ways dx") and timed:
            best = min(timed, key=lambda result: result.ms.median)
            problem = problem_of(case.sizes, case.mode)
            fastest.setdefault(problem, {})[case.op.split()[1]] = best.provider
    return {
        problem: Path(found["forward"], found["dx"], "measured in this run")
        for problem, found in fastest.items()
        if len(found) == 2
    }


def rows(table: Mapping[Problem, Path]) -> list[dict]:
    """What `plan.measured` reads."""
    names = ("M", "N", "K", "R", "dropout", "stackable")
    return [
        {name: getattr(problem, name) for name in names} | {"forward": path.forward, "dx": path.dx}
        for problem, path in table.items()
    ]


def _work(sizes: Sizes, itemsize: int, mode: str) -> Work:
    return Work(flops=2 * sizes["M"] * sum(widths(sizes)) * sizes["K"])


def _check(problem: GroupProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    mask = problem.mask if dropout_of(mode) else None
    return compare(call(), problem.truth([mask] * len(problem.layers), lora=True), problem)


def _forward(problem: GroupProblem, mode: str, way: str) -> Call:
    impl, path = _implementation(problem, way), Path(way, "tail", "")
    x, members, state, p = _given(problem, mode)

    def call() -> dict[str, torch.Tensor]:
        ys, _ = passes.forward(impl, path, x, members, state, p)
        return {f"y{i}": y for i, y in enumerate(ys)}

    return call


def _backward(problem: GroupProblem, mode: str, way: str) -> Call:
    if way == "gemm" and len(problem.layers) > 1:
        raise ValueError("the way gemm must have one layer, got a group")
    impl, path = _implementation(problem, way), Path("addmm", way, "")
    x, members, state, p = _given(problem, mode)
    _, s = passes.forward(impl, path, x, members, state, p)
    dys = [layer.dy for layer in problem.layers]
    needs = [passes.Needs(False, False, True, True)] * len(members)

    def call() -> dict[str, torch.Tensor]:
        dx, grads = passes.backward(impl, path, dys, x, s, members, state, p, True, needs)
        found = {f"da{i}": g.da for i, g in enumerate(grads)}
        return found | {f"db{i}": g.db for i, g in enumerate(grads)} | {"dx": dx}

    return call


def _given(problem: GroupProblem, mode: str) -> tuple:
    p = dropout_of(mode)
    return problem.x.detach(), problem.members, problem.state if p else None, p


def _implementation(problem: GroupProblem, way: str):
    """The backend, if it has this way for these sizes."""
    name = backend.name_for(problem.x.device)
    impl = backend.load(name)
    if not hasattr(impl, _NEEDS.get(way, "linear")):
        raise ValueError(f"the way {way} must have the ops of the Triton backend, got {name}")
    layers = problem.layers
    sizes = plan.problem(len(problem.x), problem.members, DROPOUT, problem.x.element_size())
    able = plan.forward_seconds(plan.DEVICES["A100"], sizes).keys()
    if name == "triton" and way not in (*able, *DX[:1]):
        raise ValueError(f"the way {way} cannot run {[*layers[0].w.shape]} with these ranks")
    return impl
