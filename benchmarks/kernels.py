"""The passes beside the GEMM one by one, and the candidates of every kernel's configuration.

The baseline copies as many bytes as a pass has to move: a ratio of 1.0 is the speed of memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastlora import backend
from fastlora.benchmarks.graphs import graphed
from fastlora.benchmarks.group import (
    MODES,
    GroupProblem,
    compare,
    dropout_of,
    make_problem,
)
from fastlora.benchmarks.linear import SCALE
from fastlora.benchmarks.report import in_words
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.reference import dropout_threshold

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Operands:
    """One layer's tensors as kernels take them, in x's dtype.

    Attributes:
        x: [M, K].
        dy: [M, N].
        a: [R, K].
        b: [N, R].
        s: [M, R].
        ds: [M, R].
        dx: [M, K]. Is added to in place.
        state: int64 [2], None without dropout.
        p: dropout probability.
    """

    x: Tensor
    dy: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    ds: Tensor
    dx: Tensor
    state: Tensor | None
    p: float


def operands(problem: GroupProblem, p: float) -> Operands:
    """The tensors of a problem of one layer.

    Args:
        problem: of one layer.
        p: dropout probability.

    Returns:
        The operands; s and ds are those of `truth`.
    """
    layer, dtype = problem.layers[0], problem.x.dtype
    x, a, b = problem.x.detach(), layer.a.to(dtype), layer.b.to(dtype)
    found = truth(problem, p)
    s, ds = (found[name].to(dtype) for name in ("s", "ds"))
    return Operands(x, layer.dy, a, b, s, ds, problem.dx, problem.state if p else None, p)


def truth(problem: GroupProblem, p: float) -> Results:
    """fp64 results of every kernel; of dx what is added to it, in the compared rows.

    Args:
        problem: of one layer.
        p: dropout probability.

    Returns:
        name -> tensor.
    """
    layer = problem.layers[0]
    mask = problem.mask if p else None
    x, dy, a, b = (t.detach().double() for t in (layer.x, layer.dy, layer.a, layer.b))
    ds = SCALE * dy @ b
    full = layer.truth(mask, lora=True)
    return {
        "s": (x if mask is None else x * mask) @ a.T,
        "ds": ds,
        "db": full["db"],
        "da": full["da"],
        "dx": full["dx"] - layer.base["dx"],
    }


@dataclass(frozen=True)
class Kernel:
    """One pass.

    Attributes:
        name: number and what it computes.
        run: backend and operands -> results.
        elements: it has to move, of x's dtype.
        modes: with dropout, without, or both.
    """

    name: str
    run: Callable[[ModuleType, Operands], Results]
    elements: Callable[[int, int, int, int], int]
    modes: tuple[str, ...] = MODES


def _k1(impl: ModuleType, t: Operands) -> Results:
    return {"s": impl.lora_down(t.x, t.a, t.state, t.p)}


def _k5(impl: ModuleType, t: Operands) -> Results:
    ds = torch.empty_like(t.ds)
    return {"db": impl.lora_bwd_ds_db(t.dy, t.b, t.s, SCALE, ds), "ds": ds}


def _k6(impl: ModuleType, t: Operands) -> Results:
    return {"da": impl.lora_bwd_da(t.x, t.ds, t.state, t.p)}


def _k6_k7(impl: ModuleType, t: Operands) -> Results:
    da, dx = impl.lora_bwd_da_dx(t.x, t.dx, t.ds, t.a, t.state, t.p)
    return {"da": da, "dx": dx}


def _k7(impl: ModuleType, t: Operands) -> Results:
    return {"dx": impl.lora_bwd_dx(t.dx, t.ds, t.a, t.state, t.p)}


KERNELS = (
    Kernel("K1 s", _k1, lambda M, N, K, R: M * K + R * K + M * R),
    Kernel("K5 ds, db", _k5, lambda M, N, K, R: M * N + 2 * N * R + 2 * M * R, MODES[:1]),
    Kernel("K6 da", _k6, lambda M, N, K, R: M * K + R * K + M * R),
    Kernel("K6+K7 da, dx", _k6_k7, lambda M, N, K, R: 3 * M * K + 2 * R * K + M * R, MODES[1:]),
    Kernel("K7 dx", _k7, lambda M, N, K, R: 2 * M * K + R * K + M * R),
)


def _work(kernel: Kernel, sizes: Sizes, itemsize: int, mode: str) -> Work:
    return Work(bytes=itemsize * kernel.elements(*(sizes[name] for name in "MNKR")))


def _check(problem: GroupProblem, mode: str, provider: Provider, call: Call) -> list[Deviation]:
    if provider.name == "copy":
        return []
    problem.dx.zero_()  # what is added to it is compared
    return compare(call(), truth(problem, dropout_of(mode)), problem)


def _copy(problem: GroupProblem, mode: str, kernel: Kernel) -> Call:
    (M, K), (R, N) = problem.x.shape, problem.layers[0].b.shape[::-1]
    half = kernel.elements(M, N, K, R) * problem.x.element_size() // 2
    source = torch.randint(256, (half,), dtype=torch.uint8, device=problem.x.device)
    target = torch.empty_like(source)
    return lambda: {"copy": target.copy_(source)}


def _ours(problem: GroupProblem, mode: str, kernel: Kernel) -> Call:
    impl = backend.implementation(problem.x.device)
    given = operands(problem, dropout_of(mode))
    return lambda: kernel.run(impl, given)


def _benchmark(
    kernel: Kernel, shapes: Mapping[str, Sizes], providers: tuple[Provider, ...]
) -> Benchmark:
    return Benchmark(
        name=kernel.name,
        summary="one pass beside the GEMM",
        shapes=shapes,
        small=shapes,
        problem=make_problem,
        providers=providers,
        check=_check,
        work=partial(_work, kernel),
        rates=("GB/s",),
        modes=kernel.modes,
    )


def kernel_benchmarks(shapes: Mapping[str, Sizes], device: torch.device) -> list[Benchmark]:
    """Each pass against a copy of as many bytes.

    Args:
        shapes: name -> sizes of one layer.
        device: where.

    Returns:
        One benchmark a kernel.
    """
    found = []
    for kernel in KERNELS:
        copy = Provider("copy", partial(_copy, kernel=kernel))
        ours = Provider("fastlora", partial(_ours, kernel=kernel))
        found.append(_benchmark(kernel, shapes, tuple(graphed(p, device) for p in (copy, ours))))
    return found


# --- tuning ----------------------------------------------------------------------------------


def tuning_benchmarks(shape: str, sizes: Sizes, device: torch.device) -> list[Benchmark]:
    """Every candidate of `configs` of every kernel; the default is the baseline.

    Args:
        shape: name of the sizes.
        sizes: of one layer.
        device: one that Triton runs on.

    Returns:
        One benchmark a kernel and mode, its providers named by what the configuration sets.
    """
    found = []
    for kernel, modes, work, configs, launch in _tunable(sizes):
        for mode in modes:
            providers = tuple(
                graphed(Provider(in_words(config), partial(_candidate, launch, config)), device)
                for config in configs(dropout_of(mode) > 0)
            )
            found.append(
                Benchmark(
                    name=f"tune {kernel}",
                    summary="candidates of a kernel's configuration",
                    shapes={shape: sizes},
                    small={shape: sizes},
                    problem=make_problem,
                    providers=providers,
                    check=_check_candidate,
                    work=work,
                    rates=("GB/s",) if kernel[0] == "K" else ("GFLOP/s",),
                    modes=(mode,),
                )
            )
    return found


def _candidate(
    launch: Callable[[GroupProblem, Operands, Any], Results],
    config: Any,
    problem: GroupProblem,
    mode: str,
) -> Call:
    given = operands(problem, dropout_of(mode))
    return lambda: launch(problem, given, config)


def _check_candidate(
    problem: GroupProblem, mode: str, provider: Provider, call: Call
) -> list[Deviation]:
    problem.dx.zero_()
    p = dropout_of(mode)
    layer = problem.layers[0]
    whole = layer.truth(problem.mask if p else None, lora=True)
    expected = truth(problem, p) | {"y": whole["y"], "dx whole": whole["dx"]}
    results = call()
    expected["w"] = layer.weight.decoded.double()
    if "dx whole" in results:
        results["dx whole"] = results["dx whole"][layer.rows]
    return compare(results, expected, problem)


def _tunable(sizes: Sizes) -> list[tuple]:
    """Name, modes, work, configurations by dropout, and launch of each kernel."""
    from fastlora.gpu import FUSED_RANK
    from fastlora.kernels import gemm_lora as gemm
    from fastlora.kernels import lora_bwd_da as k6
    from fastlora.kernels import lora_bwd_ds_db as k5
    from fastlora.kernels import lora_bwd_dx as k7
    from fastlora.kernels import lora_down as k1
    from fastlora.kernels import nf4_dequant as k0
    from fastlora.kernels.common import arch

    R, M, N, K = (sizes[name] for name in "RMNK")
    family, t = arch(), dropout_threshold

    def decode(problem: GroupProblem, o: Operands, config: Any) -> Results:
        q = problem.layers[0].weight.quantized
        w = torch.empty(q.shape, dtype=o.x.dtype, device=o.x.device)
        k0.nf4_dequant([k0.Packed(*q.tensors(), N=N)], K, q.blocksize, w, config=config)
        return {"w": w}

    def down(problem: GroupProblem, o: Operands, config: Any) -> Results:
        return {"s": k1.lora_down(o.x, o.a, o.state, t(o.p), config=config)}

    def ds_db(problem: GroupProblem, o: Operands, config: Any) -> Results:
        ds = torch.empty_like(o.ds)
        return {"db": k5.lora_bwd_ds_db(o.dy, o.b, o.s, SCALE, ds, config), "ds": ds}

    def da(problem: GroupProblem, o: Operands, config: Any) -> Results:
        return {"da": k6.lora_bwd_da(o.x, o.ds, o.state, t(o.p), config)}

    def da_dx(problem: GroupProblem, o: Operands, config: Any) -> Results:
        found = k6.lora_bwd_da_dx(o.x, o.ds, o.a, o.dx, o.state, t(o.p), config)
        return {"da": found, "dx": o.dx}

    def dx(problem: GroupProblem, o: Operands, config: Any) -> Results:
        k7.lora_bwd_dx(o.dx, o.ds, o.a, o.state, t(o.p), config)
        return {"dx": o.dx}

    def gemm_y(problem: GroupProblem, o: Operands, config: Any) -> Results:
        w = problem.layers[0].weight.decoded
        return {"y": gemm.gemm_lora(o.x, w, o.s, o.b, SCALE, None, config)}

    def gemm_dx(problem: GroupProblem, o: Operands, config: Any) -> Results:
        w = problem.layers[0].weight.decoded
        found = gemm.gemm_lora_dx(o.dy, w, o.ds, o.a, o.state, t(o.p), config)
        return {"dx whole": found}

    def flops(sizes: Sizes, itemsize: int, mode: str) -> Work:
        return Work(flops=2 * M * N * K)

    def decoded(sizes: Sizes, itemsize: int, mode: str) -> Work:
        return Work(bytes=N * K // 2 + N * K * itemsize)

    one, two = (partial(_work, kernel) for kernel in KERNELS[:2])
    three, four, five = (partial(_work, kernel) for kernel in KERNELS[2:])
    tma = 2 * K % 16 == 0 == 2 * N % 16
    tunable = [
        ("K0 decode", MODES[:1], decoded, lambda drop: k0.configs(family), decode),
        ("K1 s", MODES, one, lambda drop: k1.configs(family, R, 2, drop), down),
        ("K5 ds, db", MODES[:1], two, lambda drop: k5.configs(family, R), ds_db),
        ("K6 da", MODES, three, lambda drop: k6.configs(family, R, 2, drop), da),
        ("K7 dx", MODES[1:], five, lambda drop: k7.configs(family, R, 2, drop), dx),
        ("GEMM y", MODES[:1], flops, lambda drop: gemm.configs(family, R, 2, tma), gemm_y),
        ("GEMM dx", MODES[1:], flops, lambda drop: gemm.configs(family, R, 2, tma), gemm_dx),
    ]
    if R <= FUSED_RANK:
        fused = ("K6+K7 da, dx", MODES[1:], four)
        tunable.append((*fused, lambda drop: k6.configs(family, R, 2, drop, True), da_dx))
    return tunable
