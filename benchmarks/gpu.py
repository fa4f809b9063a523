"""`python -m benchmarks gpu`: check and time everything on one GPU within one time limit.

Most important first: bandwidth, decoding, the ways of the plan and whole layers at the size that
the targets are about, single kernels, then other sizes. Files are written anew after every case.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from fastlora import backend, plan
from fastlora.benchmarks import nf4
from fastlora.benchmarks.facts import machine_facts
from fastlora.benchmarks.graphs import graphed
from fastlora.benchmarks.group import dropout_of, group_benchmark, sizes_of
from fastlora.benchmarks.kernels import kernel_benchmarks, tuning_benchmarks
from fastlora.benchmarks.parity import differing
from fastlora.benchmarks.report import header, to_json, write_text
from fastlora.benchmarks.run import Case, Options, run
from fastlora.benchmarks.shapes import MODELS
from fastlora.benchmarks.sheet import Sheet
from fastlora.benchmarks.spec import Benchmark, Call, Provider, Sizes, Work
from fastlora.benchmarks.ways import problem_of, rows, ways_benchmarks, winners
from fastlora.kernels.common import INTERPRET

SCHEMA = 1
MODEL = "llama-3-8b"
COPY_BYTES = 2 << 30
# what packages raise beside what `run` expects; Triton's compiler has an error of its own
_FOREIGN = (AssertionError, AttributeError, ImportError, KeyError, TypeError, TritonError)
CASE_SECONDS = 0.3  # the providers of a case take turns at least ten times and for so long

# what the results are held against
TARGET_TOKENS, TARGET_RANK = 8192, 16
DENSE_AT_MOST = 1.08  # times the frozen dense layer
PEFT_AT_LEAST = {0.0: 1.25, 0.05: 1.5}  # times as fast as PEFT+bitsandbytes, by dropout
COPY_AT_LEAST = 0.85  # of the bandwidth of a copy, K0


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        device: "cuda", "cuda:1", or "cpu" to try it out.
        small: tiny shapes.
        seconds: no new case is started after so long.
        tune: only time all configurations of the kernels.
    """

    device: str = "cuda"
    small: bool = False
    seconds: float = 420.0
    tune: bool = False


@dataclass(frozen=True)
class Job:
    """Some cases: one benchmark at one shape.

    Attributes:
        section: heading of the report.
        benchmark: with this shape alone.
        shape: its name.
    """

    section: str
    benchmark: Benchmark
    shape: str


@dataclass
class Run:
    """What was found so far.

    Attributes:
        settings: what was asked for.
        facts: of the machine.
        cases: by section, in their order.
        ways: which way the plan took in whole layers.
        left_out: jobs there was no time for.
    """

    settings: Settings
    facts: dict[str, Any]
    cases: list[tuple[str, Case]] = field(default_factory=list)
    ways: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def of(self, section: str) -> list[Case]:
        """Cases of one section."""
        return [case for name, case in self.cases if name == section]


# --- what is run -----------------------------------------------------------------------------


def jobs(settings: Settings) -> list[Job]:
    """Everything there is to do, most important first.

    Args:
        settings: what was asked for.

    Returns:
        Jobs in their order.
    """
    device = torch.device(settings.device)
    if settings.tune:
        return [*_tuning(settings.small, device)]
    found = [Job("copy", _copy_benchmark(settings.small, device), "copy")]
    layers = _layers(settings.small)
    single = {name: sizes for name, sizes in layers.items() if len(sizes["N"]) == 1}
    decoded = {name: {"N": sizes["N"][0], "K": sizes["K"]} for name, sizes in single.items()}
    found += _each("K0 decode", partial(_decode_benchmark, device=device), decoded)
    tokens = (8,) if settings.small else (TARGET_TOKENS, 2048, 16384, 512)
    rank, other = (8, 16) if settings.small else (TARGET_RANK, 64)
    for M, R in [(tokens[0], rank), *((M, rank) for M in tokens[1:]), (tokens[0], other)]:
        sizes = {f"{name}@{M} r={R}": sizes_of(M, s["N"], s["K"], R) for name, s in layers.items()}
        for i in (0, 1):
            found += _each("ways", lambda s, i=i: ways_benchmarks(s, device)[i], sizes)
        found += _each("layers", partial(group_benchmark, device=device), sizes)
        if (M, R) in ((tokens[0], rank), (tokens[0], other)):
            one = {name: s for name, s in sizes.items() if "N" in s}
            for i in range(len(kernel_benchmarks(one, device))):
                found += _each("kernels", lambda s, i=i: kernel_benchmarks(s, device)[i], one)
    return found


def _layers(small: bool) -> Mapping[str, Mapping[str, Any]]:
    if small:
        return {"one": {"N": (32,), "K": 64}, "two": {"N": (32, 16), "K": 64}}
    return MODELS[MODEL]


def _each(
    section: str, make: Callable[[Mapping[str, Sizes]], Benchmark], shapes: Mapping[str, Sizes]
) -> list[Job]:
    return [Job(section, make({name: sizes}), name) for name, sizes in shapes.items()]


def _guarded(provider: Provider) -> Provider:
    """The same provider; what its first call raises ends its turn, not the run."""

    def build(problem: Any, mode: str) -> Call:
        try:
            call = provider.build(problem, mode)
            call()
        except _FOREIGN as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return call

    return replace(provider, build=build)


def _tuning(small: bool, device: torch.device) -> Iterator[Job]:
    M = 8 if small else TARGET_TOKENS
    for R in (8,) if small else (TARGET_RANK, 64, 256):
        for name, layer in _layers(small).items():
            if len(layer["N"]) == 1:
                shape = f"{name}@{M} r={R}"
                sizes = sizes_of(M, layer["N"], layer["K"], R)
                for benchmark in tuning_benchmarks(shape, sizes, device):
                    yield Job(benchmark.name, benchmark, shape)


def _copy_benchmark(small: bool, device: torch.device) -> Benchmark:
    """The bandwidth of the card: what everything that moves bytes is held against."""

    def build(source: torch.Tensor, mode: str) -> Callable[[], dict[str, torch.Tensor]]:
        target = torch.empty_like(source)
        return lambda: {"copy": target.copy_(source)}

    def problem(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.randint(256, (sizes["bytes"],), dtype=torch.uint8, device=device)

    shapes = {"copy": {"bytes": 1 << 16 if small else COPY_BYTES}}
    return Benchmark(
        name="copy",
        summary="a large copy, bytes read and written",
        shapes=shapes,
        small=shapes,
        problem=problem,
        providers=(graphed(Provider("copy", build), device),),
        check=lambda problem, mode, provider, call: differing(call(), {"copy": problem}, {}),
        work=lambda sizes, itemsize, mode: Work(bytes=2 * sizes["bytes"]),
        rates=("GB/s",),
    )


def _decode_benchmark(shapes: Mapping[str, Sizes], device: torch.device) -> Benchmark:
    providers = (graphed(p, device) for p in nf4.DEQUANTIZE.providers if p.name != "fill")
    return replace(nf4.DEQUANTIZE, shapes=shapes, small=shapes, providers=tuple(providers))


# --- running ---------------------------------------------------------------------------------


def benchmark(settings: Settings, out: Path) -> Iterator[tuple[Job, Case, Run]]:
    """Run all jobs; the files in `out` are whole after every case.

    Args:
        settings: what to run.
        out: a folder that exists.

    Yields:
        Each case when it is measured, with all that was found so far.
    """
    deadline = time.monotonic() + settings.seconds
    if torch.device(settings.device).type == "cuda":
        # graphs are captured on the current device; "cuda" stands for it
        torch.cuda.set_device(torch.device(settings.device).index or 0)
    facts = machine_facts(settings.device)
    facts["command"] = facts["command"].replace("fastlora", "python -m benchmarks", 1)
    found = Run(settings, facts)
    for job in jobs(settings):
        if time.monotonic() >= deadline:
            found.left_out.append(f"{job.section}: {job.benchmark.name} {job.shape}")
            continue
        for case in _cases(job, settings, found):
            found.cases.append((job.section, case))
            write(found, out)
            yield job, case, found
        if torch.device(settings.device).type == "cuda":
            torch.cuda.empty_cache()  # what graphs held
    write(found, out)


def _cases(job: Job, settings: Settings, found: Run) -> Iterator[Case]:
    # the interpreter has no bf16
    dtype = "fp16" if INTERPRET else "bf16"
    options = Options(
        ops=(job.benchmark.name,),
        device=settings.device,
        dtypes=(dtype,),
        shapes=(job.shape,),
        small=settings.small,
        seconds=0.0 if settings.small else CASE_SECONDS,
        rounds=1 if settings.small else 10,
    )
    bench = replace(job.benchmark, providers=tuple(map(_guarded, job.benchmark.providers)))
    # whole layers take the ways that won in this run, as they will once these are shipped
    layers = job.section == "layers"
    with plan.forced(winners(case for _, case in found.cases) if layers else {}):
        for case in run(options, {bench.name: bench}):
            if layers:
                found.ways.append(_way(case, settings.device))
            yield case


def _way(case: Case, device: str) -> dict[str, Any]:
    where = torch.device(device)
    problem = problem_of(case.sizes, case.mode)
    path = plan.choose(backend.name_for(where), where, problem)
    return {"shape": case.shape, "mode": case.mode, **asdict(path)}


# --- targets ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One aim and what was reached.

    Attributes:
        what: is measured.
        aim: such as "at most 1.08".
        got: the number, None where it was not measured.
        met: whether the aim was reached, None where it was not measured.
        note: why it was not measured.
    """

    what: str
    aim: str
    got: float | None
    met: bool | None
    note: str = ""

    def line(self) -> str:
        """For a list."""
        if self.got is None:
            return f"not measured: {self.what}, {self.aim} ({self.note})"
        return f"{'pass' if self.met else 'FAIL'}: {self.what} {self.got:.2f}, {self.aim}"


def targets(found: Run) -> list[Target]:
    """The aims at 8192 tokens and rank 16, as far as there are cases.

    Args:
        found: what was measured.

    Returns:
        Targets in the order of the cases.
    """
    lines: list[Target] = []
    if found.settings.small:
        return lines
    copies = [_median(case, "copy", rate=True) for case in found.of("copy")]
    for case in found.of("K0 decode"):
        share = _over(_median(case, "fastlora", rate=True), copies[0] if copies else None)
        what = f"K0 {case.shape}, share of the bandwidth of a copy"
        lines.append(_target(what, share, COPY_AT_LEAST, True, case, "fastlora"))
    for case in found.of("layers"):
        if (case.sizes["M"], case.sizes["R"]) != (TARGET_TOKENS, TARGET_RANK):
            continue
        for variant in ("", " graph"):
            ours = _median(case, f"fastlora{variant}")
            dense = _over(ours, _median(case, f"dense{variant}"))
            peft = f"peft+bitsandbytes fp32{variant}"
            faster = _over(_median(case, peft), ours)
            where = f"{case.shape} {case.mode}{variant}"
            lines.append(
                _target(
                    f"{where}, x dense", dense, DENSE_AT_MOST, False, case, f"fastlora{variant}"
                )
            )
            least = PEFT_AT_LEAST[dropout_of(case.mode)]
            lines.append(
                _target(f"{where}, times as fast as PEFT", faster, least, True, case, peft)
            )
    return lines


def _target(what: str, got: float | None, aim: float, least: bool, case: Case, name: str) -> Target:
    words = f"at {'least' if least else 'most'} {aim}"
    if got is not None:
        return Target(what, words, got, got >= aim if least else got <= aim)
    result = next((r for r in case.results if r.label == name), None)
    return Target(what, words, None, None, result.note if result else f"no {name} here")


def _median(case: Case, label: str, rate: bool = False) -> float | None:
    result = next((r for r in case.results if r.label == label and r.ms is not None), None)
    if result is None:
        return None
    return result.rates["GB/s"] if rate else result.ms.median


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


# --- files -----------------------------------------------------------------------------------


def write(found: Run, out: Path) -> None:
    """Write what was found: gpu.json, gpu.md and the plan, or tune.json and tune.md.

    Args:
        found: so far.
        out: a folder that exists.
    """
    name = "tune" if found.settings.tune else "gpu"
    content = {
        "schema": SCHEMA,
        "facts": found.facts,
        "settings": asdict(found.settings),
        "targets": [asdict(target) for target in targets(found)],
        "left_out": found.left_out,
        "ways": found.ways,
        "cases": [{"section": section, **asdict(case)} for section, case in found.cases],
    }
    write_text(out / f"{name}.json", to_json(content))
    write_text(out / f"{name}.md", markdown(found))
    table = rows(winners(case for _, case in found.cases))
    if table:
        kind = plan.device_kind(torch.device(found.settings.device))
        write_text(out / f"plan-{plan.file_name(kind)}", to_json(table))


def markdown(found: Run) -> str:
    """The whole report.

    Args:
        found: so far.

    Returns:
        Markdown.
    """
    text = ["# Kernels and layers on one GPU", "", header(found.facts)]
    text += [f"Commit {found.facts['commit']}, {found.facts['time']}, `{found.facts['command']}`."]
    text += ["Medians in ms, in brackets the interquartile range in % and the ratio to the first"]
    text += ["column; calls are interleaved and begin with a cold L2. A graph is one launch.", ""]
    if lines := targets(found):
        text += ["## Targets", "", *(f"- {target.line()}" for target in lines), ""]
    if found.left_out:
        text += ["## Left out, no time", "", *(f"- {job}" for job in found.left_out), ""]
    for section in dict.fromkeys(section for section, _ in found.cases):
        text += [f"## {section}", "", *_section(found.of(section))]
    return "\n".join(text)


def _section(cases: Iterable[Case]) -> Iterator[str]:
    """One table per op and set of providers, and below it why something is missing."""
    alike: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        alike.setdefault((case.op, *(r.label for r in case.results)), []).append(case)
    for (op, *labels), some in alike.items():
        body = tuple((f"{c.shape} {c.mode}", *map(_cell, c.results)) for c in some)
        yield Sheet(op, ("", *labels), body).markdown()
        notes = {f"- {r.label}: {r.status}, {r.note}": 0 for c in some for r in c.results if r.note}
        yield from (*notes, "") if notes else ()


def _cell(result: Any) -> str:
    if result.ms is None:
        return result.status
    ms = result.ms
    spread = 100 * (ms.q3 - ms.q1) / ms.median
    ratio = f", x {result.ratio.median:.2f}" if result.ratio else ""
    rate = "".join(f", {value:.0f} {unit}" for unit, value in result.rates.items())
    return f"{ms.median:.4f} ({spread:.0f} %{ratio}{rate})"
