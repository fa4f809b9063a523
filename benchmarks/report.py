"""What is left of a run: a table per case to read, one JSON file to keep."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastlora.benchmarks.run import Case, Options, Result

if TYPE_CHECKING:
    import triton

SCHEMA = 1


def table(case: Case) -> RenderableType:
    """One case as a table of at most 80 columns, the providers that were not timed below it.

    Args:
        case: to show.

    Returns:
        Something for `rich.print`.
    """
    sizes = " ".join(f"{name}={size}" for name, size in case.sizes.items())
    grid = Table(
        title=" ".join((case.op, case.mode, case.dtype, case.shape, f"({sizes})")),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    timed = [result for result in case.results if result.status == "ok"]
    units = [*timed[0].rates] if timed else []
    memory = ["MiB"] if any(result.peak_mib is not None for result in timed) else []
    # names may take several lines, numbers may not
    ratio = f"x {case.baseline}"
    grid.add_column("provider")
    for head in ("ms", "IQR", ratio, "IQR", *units, *memory):
        grid.add_column(head, justify="right", no_wrap=head != ratio)
    for result in timed:
        grid.add_row(*_row(result))
    notes = [
        Text(f"{result.label}: {result.status}, {result.note}", style="yellow")
        for result in case.results
        if result.status != "ok"
    ]
    return Group(grid, *notes, "")


def header(facts: Mapping[str, Any]) -> str:
    """The machine and the versions in two lines.

    Args:
        facts: see `facts.machine_facts`.

    Returns:
        Text for `rich.print`.
    """
    cpu, gpu = facts["cpu"], facts["gpu"]
    machine = f"{cpu['model']}, {cpu['threads']} threads, {cpu['torch_isa']}"
    if gpu is not None:
        machine = f"{gpu['name']}, driver {gpu['driver']}, {machine}"
    packages = ", ".join(
        f"{name} {version}" for name, version in facts["packages"].items() if version
    )
    return f"{machine}\n{packages}\n"


def in_words(config: "triton.Config") -> str:
    """A kernel's configuration in one line, such as "M=64 K=128 warps=4 stages=2"."""
    parts = [f"{name.removeprefix('BLOCK_')}={value}" for name, value in config.kwargs.items()]
    return " ".join([*parts, f"warps={config.num_warps}", f"stages={config.num_stages}"])


def _row(result: Result) -> list[str]:
    ms, ratio = result.ms, ["", ""]
    if result.ratio is not None:
        ratio = [
            _number(result.ratio.median),
            f"{_number(result.ratio.q1)}-{_number(result.ratio.q3)}",
        ]
    spread = f"{100 * (ms.q3 - ms.q1) / ms.median:.0f}%"
    rates = map(_number, result.rates.values())
    memory = [] if result.peak_mib is None else [_number(result.peak_mib)]
    return [result.label, _number(ms.median), spread, *ratio, *rates, *memory]


def parts_table(case: Case) -> RenderableType:
    """Where the time goes, a column for each provider that was timed.

    Args:
        case: to show; nothing is shown unless the parts were timed.

    Returns:
        Something for `rich.print`.
    """
    timed = [result for result in case.results if result.parts]
    if not timed:
        return ""
    grid = Table(title="ms of one step", title_justify="left", box=None, pad_edge=False)
    grid.add_column("part", no_wrap=True)
    for result in timed:
        grid.add_column(result.label, justify="right", overflow="fold")
    for part in timed[0].parts:
        shares = [f"{_number(r.parts[part])} {_share(r.parts, part)}" for r in timed]
        grid.add_row(part, *shares)
    return Group(grid, "")


def _share(parts: Mapping[str, float], part: str) -> str:
    return f"{100 * parts[part] / sum(parts.values()):.0f}%".rjust(4)


def _number(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 123, 1230."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def write_json(path: Path, facts: Mapping[str, Any], options: Options, cases: list[Case]) -> None:
    """Write a run as JSON; a reader finds the old file or the whole new one, never a part.

    Args:
        path: in a folder that exists.
        facts: of the machine, see `facts.machine_facts`.
        options: what was asked for.
        cases: what was measured.
    """
    content = {
        "schema": SCHEMA,
        "facts": facts,
        "options": asdict(options),
        "cases": [asdict(case) for case in cases],
    }
    write_text(path, to_json(content))


def to_json(content: Any) -> str:
    """JSON text; NaN and infinity, which it has no numbers for, become text."""
    return json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file; a reader finds the old file or the whole new one, never a part.

    Args:
        path: in a folder that exists.
        text: all of it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
