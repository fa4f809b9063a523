"""The command line, `fastlora` and `python -m fastlora`.

One file per command: `fastlora/cli/<name>.py` defines a function `<name>`, and COMMANDS lists the
name. The file is imported when its command is run or its help is shown; it holds the options, and
imports what is heavy (torch, transformers) when it runs.
"""

import inspect
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from fastlora.cli.console import UsageError, UserError, error_line

COMMANDS = ("demo", "train", "eval", "generate", "merge", "bench", "doctor")


class _LazyCommands(Mapping[str, Any]):
    """The commands by name, imported when they are looked up."""

    def __getitem__(self, name: str) -> Any:
        if name not in COMMANDS:
            raise KeyError(name)
        single = typer.Typer(add_completion=False)
        function = getattr(import_module(f"fastlora.cli.{name}"), name)
        single.command(name, help=_paragraphs(inspect.getdoc(function)))(function)
        return typer.main.get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


def _paragraphs(text: str) -> str:
    """Without line breaks inside: typer would keep those, at any width of the terminal."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


class _Commands(TyperGroup):
    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = _LazyCommands()

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """Names in the order of the help."""
        return [*COMMANDS]

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> None:
        """Run a command and exit: 0 done, 1 failed, 2 bad input, 130 interrupted."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, **extra) or 0
            if code == 130:  # some versions of typer turn Ctrl-C into this code themselves
                error_line("interrupted")
        except (KeyboardInterrupt, typer.Abort):
            error_line("interrupted")
            code = 130
        except UserError as error:
            error_line(str(error))
            code = error.exit_code
        except UsageError as error:
            error_line(error.format_message())
            code = 2
        raise SystemExit(code)


app = typer.Typer(
    cls=_Commands, add_completion=False, invoke_without_command=True, pretty_exceptions_enable=False
)


@app.callback()
def _fastlora(context: typer.Context) -> None:
    """LoRA and QLoRA fine-tuning with exact 4-bit layers."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Entry point of the installed `fastlora`."""
    # what a terminal cannot write becomes a question mark, not an error
    sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="fastlora")
    finally:
        # one more Ctrl-C must not break into an exit that is under way
        signal.signal(signal.SIGINT, signal.SIG_IGN)
