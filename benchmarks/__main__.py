"""`python -m benchmarks`: what a developer of the kernels runs; users have `fastlora bench`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _benchmarks() -> None:
    """Reports about the kernels."""


@app.command()
def compile_report(
    out: Annotated[Path | None, typer.Option(help="Write .md and .json to this folder.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Such as sm_90; may be repeated. Default: all.")
    ] = None,
    kernel: Annotated[
        list[str] | None, typer.Option(help="Such as lora_down; may be repeated. Default: all.")
    ] = None,
) -> None:
    """Compile every kernel for every kind of device, which takes none, and show what came out.

    Takes ten minutes on two cores, one when Triton's cache has all of it. The exit code is 1 if a
    default configuration has a problem.
    """
    from fastlora.benchmarks import aot
    from fastlora.benchmarks import compile_report as report
    from fastlora.kernels.common import INTERPRET

    if INTERPRET:
        raise typer.BadParameter("TRITON_INTERPRET must not be set, it replaces the compiler")
    try:
        todo = report.jobs(target or [*aot.TARGETS], kernel or ())
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    done = track(report.compile_all(todo), "compiling", total=len(todo))
    rows = [row for compiled in done for row in compiled]
    console = _wide_console()
    for name in dict.fromkeys(row.job.kernel for row in rows):
        console.print(report.table(name, [row for row in rows if row.job.kernel == name]))
    if out is not None:
        report.write(out, rows)
    bad = [row for row in rows if row.problems]
    defaults = sum(row.job.config == 0 for row in bad)
    console.print(
        f"{len(rows)} kernels, problems in {defaults} defaults and {len(bad) - defaults} candidates"
    )
    raise typer.Exit(1 if defaults else 0)


@app.command()
def roofline(
    out: Annotated[Path | None, typer.Option(help="Write .md and .json to this folder.")] = None,
) -> None:
    """What every way to compute a layer must move and launch: a model, nothing is timed."""
    from fastlora.benchmarks import roofline as model

    _make(out)
    console = _wide_console()
    for sheet in model.report(out):
        console.print(sheet.rich(), "")
    console.print("\n".join((model.CAVEAT, *model.NOTES)))


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Folder of .json, .md and the plan of the device.")],
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to try it out.")] = "cuda",
    seconds: Annotated[float, typer.Option(help="Start no case after so long.")] = 420.0,
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes, to try it out.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Only time all configurations of the kernels.")
    ] = False,
) -> None:
    """Check and time kernels, ways of the plan and whole layers on one GPU, in eight minutes.

    Written to --out after every case: gpu.json, gpu.md and plan-DEVICE.json, the ways that won,
    which goes to fastlora/plans/DEVICE.json. With --tune: tune.json and tune.md.
    """
    import torch

    from fastlora.benchmarks import gpu as bench
    from fastlora.benchmarks.report import header, table

    if device != "cpu" and not torch.cuda.is_available():
        typer.echo("there is no GPU here; --device cpu --small tries the command out", err=True)
        raise typer.Exit(2)
    _make(out)
    console, found = Console(highlight=False), None
    for job, case, found in bench.benchmark(bench.Settings(device, small, seconds, tune), out):
        if len(found.cases) == 1:
            console.print(header(found.facts))
        console.print(f"[bold]{job.section}[/bold]", table(case))
    if found is None:
        typer.echo(f"no case was started in {seconds} s", err=True)
        raise typer.Exit(2)
    for line in [*(t.line() for t in bench.targets(found)), *found.left_out]:
        console.print(line, soft_wrap=True)
    results = [result for _, case in found.cases for result in case.results]
    bad = [r for r in results if r.provider == "fastlora" and r.status in ("wrong", "failed")]
    raise typer.Exit(1 if bad else 0)


def _wide_console() -> Console:
    """For tables wider than the 80 columns that a pipe or a file would have."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console


def _make(folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
