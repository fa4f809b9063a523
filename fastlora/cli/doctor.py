"""`fastlora doctor`: what is installed, what runs where, and whether it computes right."""

import typer
from rich.markup import escape
from rich.table import Table

from fastlora.cli.console import console


def doctor() -> None:
    """Show versions, devices and kernels, and test them; exit code 1 when a test fails."""
    from fastlora.cli import selftest

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in selftest.facts().items():
        table.add_row(name, escape(fact) or "[yellow]not installed[/]")
    problems = selftest.problems()
    for name, problem in problems.items():
        table.add_row(name, f"[red]fail: {escape(problem)}[/]" if problem else "[green]pass[/]")
    console.print(table)
    if any(problems.values()):
        raise typer.Exit(1)
