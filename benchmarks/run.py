"""Run benchmarks: choose cases, check that every provider is right, then time those that are."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fastlora.benchmarks.peak import peak_mib
from fastlora.benchmarks.registry import BENCHMARKS
from fastlora.benchmarks.spec import Benchmark, Call, Deviation, Provider, Sizes, Work
from fastlora.benchmarks.timing import Spread, clock_for, interleaved

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEED = 0

# unit -> what is counted, and how many make one
_RATES: dict[str, tuple[Callable[[Work], int], float]] = {
    "GB/s": (lambda work: work.bytes, 1e9),
    "Gw/s": (lambda work: work.weights, 1e9),
    "GFLOP/s": (lambda work: work.flops, 1e9),
    "tok/s": (lambda work: work.tokens, 1),
}


@dataclass(frozen=True)
class Options:
    """What to run and for how long; an empty tuple is everything.

    Attributes:
        ops: names of benchmarks.
        device: "cpu", "cuda" or "cuda:1".
        dtypes: of inputs and weights: "bf16", "fp32", "fp16".
        shapes: "model.layer@tokens", or the part before "@" for all tokens.
        providers: names without variant; the baseline always runs.
        modes: "fwd", "fwd+bwd"; only for ops that have the choice.
        sizes: (name, size) in place of those of the shapes.
        small: the small shapes instead of the real ones.
        cold: empty the CPU's caches before each sample; a GPU's always are.
        rounds: at least so many rounds per case.
        seconds: go on for so long per case.
        profile: also time the parts of each call; only for ops that have them.
    """

    ops: tuple[str, ...] = ()
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("bf16",)
    shapes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    small: bool = False
    cold: bool = False
    rounds: int = 10
    seconds: float = 2.0
    profile: bool = False


@dataclass(frozen=True)
class Result:
    """One provider in one case.

    Attributes:
        provider: name.
        variant: what sets it apart from others of that name.
        status: "ok", "wrong" (parity failed), "absent" (not installed) or "failed" (raised).
        note: why it was not timed; empty if it was.
        deviations: all results that were checked.
        ms: time of one call.
        ratio: time over the baseline's of the same round; above 1 is slower.
        rates: of the median, by unit.
        peak_mib: GPU memory of one call above what was taken before, None on the CPU; or that of a
            process of its own, where the benchmark says so and the shapes are not small.
        parts: ms of each part of a call, where they were asked for.
        rounds: how many samples.
    """

    provider: str
    variant: str
    status: str
    note: str = ""
    deviations: list[Deviation] = field(default_factory=list)
    ms: Spread | None = None
    ratio: Spread | None = None
    rates: dict[str, float] = field(default_factory=dict)
    peak_mib: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    rounds: int = 0

    @property
    def label(self) -> str:
        """Name and variant in one."""
        return f"{self.provider} {self.variant}".strip()


@dataclass(frozen=True)
class Case:
    """One op at one shape, dtype and mode, with the results of all providers.

    Attributes:
        op: name of the benchmark.
        shape: name of the shape.
        sizes: dimension -> size.
        dtype: "bf16", "fp32" or "fp16".
        mode: what one call does.
        work: least work of one call.
        baseline: name of the provider that ratios are relative to.
        results: one per provider, in the order of the registry.
    """

    op: str
    shape: str
    sizes: Sizes
    dtype: str
    mode: str
    work: Work
    baseline: str
    results: list[Result]


def run(options: Options, benchmarks: Mapping[str, Benchmark] = BENCHMARKS) -> Iterator[Case]:
    """Run all cases that the options choose.

    Args:
        options: what to run.
        benchmarks: name -> benchmark.

    Returns:
        The cases, each measured when it is asked for.

    Raises:
        ValueError: a name in the options is unknown, or the device is not there.
    """
    _check(options, benchmarks)
    return _cases(options, benchmarks)


def _cases(options: Options, benchmarks: Mapping[str, Benchmark]) -> Iterator[Case]:
    for op in options.ops or benchmarks:
        bench = benchmarks[op]
        for shape, sizes in _chosen_shapes(bench, options).items():
            for dtype in options.dtypes:
                yield from _run_shape(bench, shape, sizes, dtype, options)


def _check(options: Options, benchmarks: Mapping[str, Benchmark]) -> None:
    chosen = [benchmarks[op] for op in options.ops if op in benchmarks] or [*benchmarks.values()]
    known = {
        "op": (options.ops, set(benchmarks)),
        "dtype": (options.dtypes, set(DTYPES)),
        "provider": (options.providers, {p.name for b in chosen for p in b.providers}),
        "mode": (options.modes, {m for b in chosen for m in b.modes}),
        "shape": (
            options.shapes,
            {n for b in chosen for s in _shapes(b, options) for n in _names(s)},
        ),
    }
    for kind, (names, allowed) in known.items():
        for name in names:
            if name not in allowed:
                raise ValueError(f"{kind} must be one of {', '.join(sorted(allowed))}, got {name}")
    for name, size in options.sizes:
        names = {
            size for bench in chosen for sizes in _shapes(bench, options).values() for size in sizes
        }
        if name not in names or size < 1:
            raise ValueError(
                f"size must be at least 1 and of one of {', '.join(sorted(names))}, "
                f"got {name}={size}"
            )
    if options.profile and any(bench.parts is None for bench in chosen):
        able = ", ".join(sorted(name for name, bench in benchmarks.items() if bench.parts))
        raise ValueError(f"profile must be of an op that has parts: {able}")
    if options.rounds < 1 or options.seconds < 0:
        raise ValueError(
            "rounds must be at least 1 and seconds not negative, "
            f"got {options.rounds} and {options.seconds}"
        )
    if options.device != "cpu" and not _has_gpu(options.device):
        raise ValueError(f"device must be cpu or a CUDA device that is there, got {options.device}")


def _has_gpu(name: str) -> bool:
    kind, _, index = name.partition(":")
    return (
        kind == "cuda" and (index or "0").isdigit() and int(index or 0) < torch.cuda.device_count()
    )


def _shapes(bench: Benchmark, options: Options) -> Mapping[str, Sizes]:
    return bench.small if options.small else bench.shapes


def _names(shape: str) -> set[str]:
    """The names that choose a shape: its own and that of its layer."""
    return {shape, shape.partition("@")[0]}


def _chosen_shapes(bench: Benchmark, options: Options) -> dict[str, Sizes]:
    wanted = set(options.shapes)
    shapes = _shapes(bench, options).items()
    given = dict(options.sizes)
    return {
        name: {**sizes, **given} for name, sizes in shapes if not wanted or _names(name) & wanted
    }


def _chosen_providers(bench: Benchmark, options: Options) -> list[Provider]:
    return [
        p
        for p in bench.providers
        if not options.providers or p.name in options.providers or p is bench.baseline
    ]


def _run_shape(
    bench: Benchmark, shape: str, sizes: Sizes, dtype: str, options: Options
) -> Iterator[Case]:
    torch.manual_seed(SEED)
    problem = None  # which may need the packages of its providers
    if not all(provider.absent() for provider in _chosen_providers(bench, options)):
        problem = bench.problem(sizes, torch.device(options.device), DTYPES[dtype])
    for mode in bench.modes:
        if options.modes and len(bench.modes) > 1 and mode not in options.modes:
            continue
        work = bench.work(sizes, DTYPES[dtype].itemsize, mode)
        results = _run_providers(bench, problem, mode, work, options)
        if bench.whole_memory and not options.small:
            results = [_with_memory(bench, r, sizes, dtype, mode, options) for r in results]
        yield Case(bench.name, shape, sizes, dtype, mode, work, bench.baseline.label, results)


def _run_providers(
    bench: Benchmark, problem: Any, mode: str, work: Work, options: Options
) -> list[Result]:
    results: dict[Provider, Result] = {}
    calls: dict[Provider, Call] = {}
    for provider in _chosen_providers(bench, options):
        results[provider], call = _checked(bench, problem, mode, provider)
        if call is not None:
            calls[provider] = call
    clock = clock_for(torch.device(options.device), options.cold)
    times = interleaved([*calls.values()], clock, options.rounds, options.seconds)
    by_provider = dict(zip(calls, times, strict=True))
    baseline = by_provider.get(bench.baseline)
    for provider, ms in by_provider.items():
        call = calls[provider]
        peak = _peak_mib(call, options.device)
        result = _timed(results[provider], ms, baseline, work, bench.rates, peak)
        parts = bench.parts(call) if options.profile else {}
        results[provider] = replace(result, parts=parts)
    return [*results.values()]


def _checked(
    bench: Benchmark, problem: Any, mode: str, provider: Provider
) -> tuple[Result, Call | None]:
    """Build a provider and compare its results to the truth; no call if it may not be timed."""
    result = Result(provider.name, provider.variant, "ok")
    if absent := provider.absent():
        return replace(result, status="absent", note=f"not installed: {', '.join(absent)}"), None
    try:
        call = provider.build(problem, mode)
        deviations = bench.check(problem, mode, provider, call)
    # what a package raises about a dtype, shape or device it does not support ends its turn only
    except (IndexError, RuntimeError, ValueError) as error:
        message = str(error).partition("\n")[0]
        return replace(result, status="failed", note=f"{type(error).__name__}: {message}"), None
    result = replace(result, deviations=deviations)
    if wrong := [d for d in deviations if not d.ok]:
        found = ", ".join(
            f"{d.name} is off by {d.error:.2g} (at most {d.bound:.2g})" for d in wrong
        )
        return replace(result, status="wrong", note=found), None
    return result, call


def _timed(
    result: Result,
    ms: list[float],
    baseline: list[float] | None,
    work: Work,
    units: tuple[str, ...],
    peak_mib: float | None,
) -> Result:
    spread = Spread.of(ms)
    ratio = Spread.of([t / b for t, b in zip(ms, baseline, strict=True)]) if baseline else None
    rates = {}
    for unit in units:
        count, one = _RATES[unit]
        rates[unit] = count(work) / one / (spread.median / 1e3)
    return replace(result, ms=spread, ratio=ratio, rates=rates, peak_mib=peak_mib, rounds=len(ms))


def _with_memory(
    bench: Benchmark, result: Result, sizes: Sizes, dtype: str, mode: str, options: Options
) -> Result:
    if result.status != "ok":
        return result
    provider = next(p for p in bench.providers if p.label == result.label)
    return replace(result, peak_mib=peak_mib(bench, provider, sizes, options.device, dtype, mode))


def _peak_mib(call: Call, device: str) -> float | None:
    """GPU memory that one call takes at its peak, in MiB."""
    if device == "cpu":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
