"""`fastlora bench`: time one op, or all, against its peers."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.console import UserError, console, reported


def bench(
    op: Annotated[
        str, typer.Argument(help="quantize, dequantize, linear, step, optimizer, or all.")
    ],
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[
        list[str] | None, typer.Option(help="bf16 (default), fp32 or fp16; may be repeated.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Such as llama-8b.up or llama-8b.up@512; may be repeated."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help="Such as fastlora; may be repeated. The baseline always runs."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="fwd or fwd+bwd, for linear; plain or dropout, for step; may be repeated."
        ),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=N",
            help="Another size of the shapes: batch, length or R, for step; may be repeated.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="At least so many rounds a case.")] = 10,
    seconds: Annotated[float, typer.Option(help="Go on for so long a case.")] = 2.0,
    small: Annotated[bool, typer.Option("--small", help="Tiny shapes, to try it out.")] = False,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Empty the CPU's caches before each sample; a GPU's always are."
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where the time goes, for step.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> None:
    """Time an op against its peers, after a check that each gives the right result.

    Providers take turns, so that a slow moment of the machine hits all. A time is the median, with
    the interquartile range (IQR); "x" is the time over the baseline's in the same round, above 1
    is slower. A provider whose results are wrong is reported and not timed; if it is fastlora, the
    exit code is 1.
    """
    from fastlora.benchmarks.facts import machine_facts
    from fastlora.benchmarks.registry import BENCHMARKS
    from fastlora.benchmarks.report import header, parts_table, table, write_json
    from fastlora.benchmarks.run import Case, Options, run

    options = Options(
        ops=() if op == "all" else (op,),
        device=device,
        dtypes=tuple(dtype or ("bf16",)),
        shapes=tuple(shape or ()),
        providers=tuple(provider or ()),
        modes=tuple(mode or ()),
        sizes=tuple(map(_size, size or ())),
        small=small,
        cold=cold,
        rounds=rounds,
        seconds=seconds,
        profile=profile,
    )
    if json is not None and not json.absolute().parent.is_dir():
        raise UserError(f"--json must name a file in a folder that exists, got {json}")
    with reported(ValueError):
        running = run(options)
    facts = machine_facts(device)
    console.print(header(facts))
    cases: list[Case] = []
    for case in running:
        if not cases or cases[-1].op != case.op:
            console.print(f"{case.op}: {BENCHMARKS[case.op].summary}\n", soft_wrap=True)
        cases.append(case)
        console.print(table(case))
        if profile:
            console.print(parts_table(case))
        if json is not None:  # after every case, so that what was measured outlives an interruption
            write_json(json, facts, options, cases)
    if any(
        r.provider == "fastlora" and r.status in ("wrong", "failed")
        for c in cases
        for r in c.results
    ):
        raise UserError("fastlora must give the right result, see the tables above", exit_code=1)


def _size(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise UserError(f"size must be NAME=N with a whole number, got {text}")
    return name, int(number)
