"""`compile-report`: what the compiler makes of every kernel on every kind of device, without one.

A case is a call of a real launcher on bf16 tensors. Each is compiled for each target with each
configuration, in processes of their own, since the compiler may abort. What a GPU would reject or
run badly is named in the last column: see `Compiled.problems` and `_judge`.
"""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from triton.errors import TritonError

from fastlora.benchmarks.aot import TARGETS, Compiled, pretend
from fastlora.benchmarks.report import in_words, write_text
from fastlora.kernels import (
    adamw,
    gemm_lora,
    lora_bwd_da,
    lora_bwd_ds_db,
    lora_bwd_dx,
    lora_down,
    nf4_dequant,
    nf4_quantize,
)
from fastlora.kernels.common import SHARED_BYTES
from fastlora.optim import gpu
from fastlora.optim.flat import Flat, Step

M, N, K = 8192, 14336, 4096  # tensors are never written, so their memory is never taken
THRESHOLD = 3277  # p = 0.05
SECOND_PASS = "_reduce_kernel"
MATRIX_UNIT = {
    "sm_80": "mma",
    "sm_86": "mma",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "gfx942": "mfma",
}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    Attributes:
        kernel: name of the launcher.
        variant: what sets it apart from the other calls.
        configs: arch -> configurations, the default first.
        launch: calls the launcher with a configuration.
        tile: names of the constants whose product is the elements that one turn of the loop, or a
            program without loop, works through; empty for none worth counting.
        candidates: compile all configurations, not only the default.
        gemm: bound by arithmetic, so it must use the best matrix unit of the target.
        wide: "loads" and "stores" that must fill the memory bus: bytes are the limit.
    """

    kernel: str
    variant: str
    configs: Callable[[str], Sequence[triton.Config]]
    launch: Callable[[triton.Config], Any]
    tile: tuple[str, ...] = ()
    candidates: bool = True
    gemm: bool = False
    wide: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One case with one configuration on one target.

    Attributes:
        kernel: of the case.
        variant: of the case.
        target: key of `aot.TARGETS`.
        config: its place among the configurations of the target, 0 is the default.
    """

    kernel: str
    variant: str
    target: str
    config: int


@dataclass(frozen=True)
class Row:
    """One kernel that a job compiled; if it failed, only its problems are there.

    Attributes:
        job: what was compiled.
        config: the configuration in words.
        problems: why it must not be shipped, empty if it may.
        function: name of the kernel's function.
        registers: a thread has.
        spills: loads and stores of registers that did not fit.
        shared: bytes a program takes.
        limit: bytes of shared memory a program may take.
        loads: of global memory by width in bytes, "async", "tma".
        stores: to global memory by width in bytes, "tma".
        matrix: instructions of the matrix units by kind.
        instructions: in the code, not in a run.
        per_element: instructions of a thread per element, None where it is not worth counting.
    """

    job: Job
    config: str
    problems: list[str]
    function: str = ""
    registers: int = 0
    spills: int = 0
    shared: int = 0
    limit: int = 0
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    matrix: dict[str, int] = field(default_factory=dict)
    instructions: int = 0
    per_element: float | None = None


# --- the cases -------------------------------------------------------------------------------


@cache
def cases() -> tuple[Case, ...]:
    """Every kernel, in the order of the table; of each the plainest case comes first."""
    found = [*_nf4(), *_adamw()]
    for R in (8, 16, 48, 64, 128, 256):
        for threshold in (0, THRESHOLD):
            found += _lora(R, threshold)
    order = list(dict.fromkeys(case.kernel for case in found))
    return tuple(sorted(found, key=lambda case: order.index(case.kernel)))


def _nf4() -> Iterator[Case]:
    def dequant(weights: int, k: int, tail: bool, nested: bool, config: triton.Config) -> None:
        blocks = 1024 * k // 64
        second = [
            _empty(blocks // 256, dtype=torch.float32),
            _empty(256, dtype=torch.float32),
            _empty(dtype=torch.float32),
        ]
        packed = nf4_dequant.Packed(
            _empty(1024 * k // 2, dtype=torch.uint8),
            _empty(blocks, dtype=torch.uint8 if nested else torch.float32),
            *(second if nested else [None] * 3),
            1024,
        )
        ends = nf4_dequant.Tail(tuple(_empty(1024, 16) for _ in range(weights)), (2.0,) * weights)
        out = _empty(1024 * weights, k + 16 * weights * tail)
        nf4_dequant.nf4_dequant([packed] * weights, k, 64, out, ends if tail else None, config)

    for variant, weights, k, tail, nested in (
        ("one weight", 1, K, False, True),
        ("three weights", 3, K, False, True),
        ("three weights, tail", 3, K, True, True),
        ("three weights, tail, flat", 3, K, True, False),
        ("odd K", 1, K - 1, False, True),
    ):
        yield Case(
            "nf4_dequant",
            variant,
            nf4_dequant.configs,
            partial(dequant, weights, k, tail, nested),
            tile=() if tail else ("TILE",),
            wide=("stores",) if k == K else (),
        )
    yield Case(
        "nf4_quantize",
        "block 64",
        nf4_quantize.configs,
        lambda config: nf4_quantize.quantize_blocks(_empty(N * K), 64, config),
        tile=("TILE",),
        wide=("loads",),
    )


def _adamw() -> Iterator[Case]:
    maps = gpu.maps(torch.device("cpu"))
    for kind, sizes in (("aligned", (65536, 4096)), ("odd", (65, 33))):
        params = [_empty(size) for size in sizes]
        table = gpu.prepare(Step(Flat(sizes), params, params, [0, 0], torch.zeros(1, 8))).table
        n, blocks = sum(sizes), -(-sum(sizes) // adamw.BLOCK)
        floats = [_empty(n, dtype=torch.float32) for _ in range(2)]
        codes = [_empty(n, dtype=torch.uint8) for _ in range(2)]
        scales = [_empty(blocks, dtype=torch.float32) for _ in range(2)]
        wide = ("loads", "stores") if kind == "aligned" else ()
        for variant, launch in (
            ("fp32 moments", partial(adamw.adamw32, table, 0, *floats)),
            ("8-bit moments", partial(adamw.adamw8, table, 0, (*codes, *scales), maps)),
        ):
            yield Case(
                "adamw",
                f"{variant}, {kind}",
                partial(adamw.configs, bits=32 if launch.func is adamw.adamw32 else 8),
                launch,
                tile=("TILE",),
                wide=wide if launch.func is adamw.adamw32 else (),
            )


def _lora(R: int, threshold: int) -> Iterator[Case]:
    drop, state = threshold > 0, _empty(2, dtype=torch.int64)
    variant = f"R {R}, dropout" if drop else f"R {R}"
    wide = partial(Case, variant=variant, candidates=R <= 64, wide=("loads",))
    yield wide(
        "lora_down",
        configs=lambda arch: lora_down.configs(arch, R, 2, drop),
        launch=lambda config: lora_down.lora_down(
            _empty(M, K), _empty(R, K), state, threshold, None, config
        ),
        tile=("BLOCK_M", "BLOCK_K"),
    )
    yield wide(
        "lora_down",
        variant=f"{variant}, beside x",
        configs=lambda arch: lora_down.configs(arch, R, 2, drop),
        launch=lambda config: lora_down.lora_down(
            _empty(M, K), _empty(R, K), state, threshold, _empty(M, K + R), config
        ),
        tile=("BLOCK_M", "BLOCK_K"),
        candidates=False,
    )
    if not drop:
        yield wide(
            "lora_bwd_ds_db",
            configs=lambda arch: lora_bwd_ds_db.configs(arch, R, 2),
            launch=lambda config: lora_bwd_ds_db.lora_bwd_ds_db(
                _empty(M, N), _empty(N, R), _empty(M, R), 2.0, _empty(M, R), config
            ),
            tile=("BLOCK_M", "BLOCK_N"),
        )
    yield wide(
        "lora_bwd_da",
        configs=lambda arch: lora_bwd_da.configs(arch, R, 2, drop),
        launch=lambda config: lora_bwd_da.lora_bwd_da(
            _empty(M, K), _empty(M, R), state, threshold, config
        ),
        tile=("BLOCK_M", "BLOCK_K"),
    )
    if R <= 64:
        yield wide(
            "lora_bwd_da_dx",
            configs=lambda arch: lora_bwd_da.configs(arch, R, 2, drop, True),
            launch=lambda config: lora_bwd_da.lora_bwd_da_dx(
                _empty(M, K), _empty(M, R), _empty(R, K), _empty(M, K), state, threshold, config
            ),
            tile=("BLOCK_M", "BLOCK_K"),
        )
    yield wide(
        "lora_bwd_dx",
        configs=lambda arch: lora_bwd_dx.configs(arch, R, 2, drop),
        launch=lambda config: lora_bwd_dx.lora_bwd_dx(
            _empty(M, K), _empty(M, R), _empty(R, K), state, threshold, config
        ),
        tile=("BLOCK_M", "BLOCK_K"),
        wide=("loads", "stores"),
    )
    gemm = partial(
        Case,
        variant=variant,
        configs=lambda arch: gemm_lora.configs(arch, R),
        candidates=R <= 64,
        gemm=True,
    )
    if not drop:
        yield gemm(
            "gemm_lora",
            launch=lambda config: gemm_lora.gemm_lora(
                _empty(M, K), _empty(N, K), _empty(M, R), _empty(N, R), 2.0, _empty(N), config
            ),
        )
    yield gemm(
        "gemm_lora_dx",
        launch=lambda config: gemm_lora.gemm_lora_dx(
            _empty(M, N), _empty(N, K), _empty(M, R), _empty(R, K), state, threshold, config
        ),
    )


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# --- compiling -------------------------------------------------------------------------------


def jobs(targets: Sequence[str], kernels: Sequence[str] = ()) -> list[Job]:
    """What there is to compile.

    Args:
        targets: keys of `aot.TARGETS`.
        kernels: names of launchers, none for all.

    Returns:
        Jobs in the order of the table.

    Raises:
        ValueError: a name is unknown.
    """
    names = tuple(dict.fromkeys(case.kernel for case in cases()))
    for what, chosen, known in (("target", targets, TARGETS), ("kernel", kernels, names)):
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {unknown[0]}")
    return [
        Job(case.kernel, case.variant, target, i)
        for case in cases()
        for target in targets
        if not kernels or case.kernel in kernels
        for i in range(len(case.configs(target)) if case.candidates else 1)
    ]


def compile_all(todo: Sequence[Job]) -> Iterator[list[Row]]:
    """Compile on all cores, each job in a process that may die of it.

    Args:
        todo: see `jobs`.

    Yields:
        The rows of one job, in the order of the jobs.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        yield from threads.map(partial(isolated, compile_one), todo)


def isolated(work: Callable[[Job], list[Row]], job: Job) -> list[Row]:
    """Run `work` in another process, one that this thread keeps.

    Args:
        work: importable function.
        job: its argument.

    Returns:
        What it returns; one row that says "crashed" if the process died.
    """
    if not hasattr(_own, "processes"):
        spawn = multiprocessing.get_context("spawn")
        _own.processes = ProcessPoolExecutor(1, mp_context=spawn, initializer=_silence)
    try:
        return _own.processes.submit(work, job).result()
    except BrokenProcessPool:
        del _own.processes
        return [Row(job, "", ["crashed"])]


_own = threading.local()


def _silence() -> None:
    # the compiler dumps whole modules on stderr before it raises
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def compile_one(job: Job) -> list[Row]:
    """Compile in this process.

    Args:
        job: what to compile.

    Returns:
        A row per kernel that the launcher launches.
    """
    case = next(c for c in cases() if (c.kernel, c.variant) == (job.kernel, job.variant))
    config = case.configs(job.target)[job.config]
    try:
        with pretend(job.target) as compiled:
            case.launch(config)
    except (RuntimeError, TritonError) as error:
        return [Row(job, in_words(config), [f"{type(error).__name__}: {error}".splitlines()[0]])]
    return [_row(job, case, config, kernel) for kernel in compiled]


def _row(job: Job, case: Case, config: triton.Config, kernel: Compiled) -> Row:
    per_element = None
    first = kernel.kernel != SECOND_PASS
    if first and all(name in config.kwargs for name in case.tile) and case.tile:
        elements = prod(config.kwargs[name] for name in case.tile)
        per_element = (kernel.loop or kernel.instructions) * kernel.threads / elements
    return Row(
        job=job,
        config=in_words(config) if first else "",
        problems=kernel.problems() + (_judge(case, kernel) if first else []),
        function=kernel.kernel,
        registers=kernel.registers,
        spills=kernel.spills,
        shared=kernel.shared,
        limit=SHARED_BYTES[job.target],
        loads=kernel.loads,
        stores=kernel.stores,
        matrix=kernel.matrix,
        instructions=kernel.instructions,
        per_element=per_element and round(per_element, 1),
    )


def _judge(case: Case, kernel: Compiled) -> list[str]:
    """What is wrong with this kernel as a kernel of its kind."""
    found = []
    unit = MATRIX_UNIT[kernel.target]
    if case.gemm and unit not in kernel.matrix:
        found.append(f"no {unit}")
    # a wavefront has twice the threads of a warp
    enough = {"8", "16"} if kernel.target == "gfx942" else {"16", "async", "tma"}
    for what in case.wide:
        if not enough & getattr(kernel, what).keys():
            found.append(f"narrow {what}")
    return found


# --- the table -------------------------------------------------------------------------------

HEADS = (
    "case", "target", "configuration", "regs", "spills", "shared", "loads", "stores", "matrix",
    "instr", "/elem", "verdict",
)  # fmt: skip
_NUMBERS = ("regs", "spills", "shared", "instr", "/elem")


def _cells(row: Row) -> list[str]:
    case = row.job.variant if row.job.config == 0 else f"{row.job.variant}, candidate"
    if row.function == SECOND_PASS:
        case += ", second pass"
    verdict = "; ".join(row.problems) or "ok"
    if not row.function:
        return [case, row.job.target, row.config, *[""] * 8, verdict]
    counts = (
        " ".join(f"{n}x{kind}" for kind, n in count.items())
        for count in (row.loads, row.stores, row.matrix)
    )
    per_element = "" if row.per_element is None else f"{row.per_element:.1f}"
    return [
        case,
        row.job.target,
        row.config,
        str(row.registers),
        str(row.spills),
        f"{row.shared / 1024:.0f}/{row.limit / 1024:.0f}",
        *counts,
        str(row.instructions),
        per_element,
        verdict,
    ]


def table(kernel: str, rows: Sequence[Row]) -> RenderableType:
    """The rows of one launcher for the terminal: defaults, and candidates with problems.

    Args:
        kernel: name of the launcher.
        rows: its rows.

    Returns:
        Something for `rich.print`.
    """
    grid = Table(title=kernel, title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown = [row for row in rows if row.job.config == 0 or row.problems]
    # what is the same in all rows or too long is in the file
    hidden = {"configuration"} | {
        head
        for head, *cells in zip(HEADS, *map(_cells, shown), strict=True)
        if head in ("matrix", "/elem") and not any(cells)
    }
    for head in HEADS:
        if head not in hidden:
            right = "right" if head in _NUMBERS else "left"
            grid.add_column(head, justify=right, no_wrap=head != "verdict")
    for row in shown:
        style = "green" if not row.problems else "red" if row.job.config == 0 else "yellow"
        cells = dict(zip(HEADS, map(escape, _cells(row)), strict=True))
        cells["verdict"] = f"[{style}]{cells['verdict']}[/]"
        grid.add_row(*(cell for head, cell in cells.items() if head not in hidden))
    rest = len(rows) - len(shown)
    return Group(grid, f"{rest} candidates are ok\n" if rest else "")


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write compile-report.md and compile-report.json.

    Args:
        folder: made if it is not there.
        rows: see `compile_all`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    content = f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
    write_text(folder / "compile-report.json", content)
    write_text(folder / "compile-report.md", _markdown(rows))


def _markdown(rows: Sequence[Row]) -> str:
    lines = [
        "# What the compiler makes of the kernels",
        "",
        f"By `python -m benchmarks compile-report --out benchmarks/results` with Triton "
        f"{triton.__version__}, bf16, M={M}, N={N}, K={K}. Nothing here was timed or run: counts "
        "are of the code, not of a run. The first configuration of a case is the default, the "
        "others are candidates for tuning on a GPU.",
        "",
        "* shared: KiB a program takes, of what the device has; Triton does not check it.",
        "* loads, stores: of global memory, count x bytes a thread; async: through shared memory, "
        "tma: the copy engine. matrix: instructions of the matrix units. instr: of all.",
        "* /elem: instructions of a thread per element of the tensor that is streamed.",
    ]
    for kernel in dict.fromkeys(row.job.kernel for row in rows):
        lines += ["", f"## {kernel}", "", f"| {' | '.join(HEADS)} |"]
        lines += ["|" + "|".join("-:" if head in _NUMBERS else "-" for head in HEADS) + "|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in rows if row.job.kernel == kernel]
    return "\n".join(lines) + "\n"
