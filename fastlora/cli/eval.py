"""`fastlora eval`: how good a model, or an adapter on it, is on a file."""

import contextlib
import json as json_module
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlora.atomic import replace_file
from fastlora.cli import runs
from fastlora.cli.console import UserError, console, reported, require
from fastlora.cli.data import read

_STDOUT = Path("-")


def eval(
    model: runs.ModelArgument = None,
    data: Annotated[
        str | None,
        typer.Argument(
            help="JSONL or CSV with prompt and completion, messages, text, or text and label.",
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter; without it the model alone.")
    ] = None,
    exact_match: Annotated[
        bool | None,
        typer.Option(
            "--exact-match/--no-exact-match",
            help="Also answer each prompt, and count the answers that are right to the letter.",
            show_default="where completions have at most 64 tokens",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens of an answer at most.",
            show_default="a few more than the longest completion",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the figures to this file; -: to stdout, and nothing else.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Examples at once.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=2,
            help="Tokens per example; longer ones are cut.",
            show_default="as in training",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="The classes, in order, for text and label.",
            show_default="as in training, or the model's",
        ),
    ] = None,
    template: runs.TemplateOption = None,
    fields: runs.FieldsOption = None,
    quantize: runs.QuantizeOption = None,
    dtype: runs.DtypeOption = None,
) -> None:
    """Evaluate a model on a file.

    Of texts: the loss and the perplexity. Of prompts and completions, and of messages: those of the
    completions, and exact match. Of texts with labels: accuracy, precision, recall and F1.
    """
    if data is None:
        # the first of two that may be left out is the one that was
        model, data = None, model
    if data is None:
        raise UserError("data must be given, got none")
    if model is None and adapter is None:
        raise UserError(f"model and data must be given where there is no adapter, got only {data}")
    if json not in (None, _STDOUT):
        _check_file(json)
    settings = runs.settings_of(
        model,
        adapter,
        template=template,
        max_length=max_length,
        fields=fields,
        labels=labels,
        quantize=quantize,
        dtype=dtype,
    )
    rows = read(Path(data), settings.field_names)
    require("transformers", "accelerate", *(["sklearn"] if rows.form == "label" else []))
    from fastlora.cli import eval_run

    with _quiet(json == _STDOUT):
        report = eval_run.run(rows, settings, adapter, batch_size, max_new_tokens, exact_match)
    if json is not None:
        _write(json, report)


def _check_file(file: Path) -> None:
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise UserError(f"--json must name a file in a folder that exists, got {file}")


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    console.quiet = quiet
    try:
        yield
    finally:
        console.quiet = False


def _write(file: Path, report: dict[str, Any]) -> None:
    text = json_module.dumps(report, indent=2, ensure_ascii=False) + "\n"
    if file == _STDOUT:
        print(text, end="")
        return
    with reported(OSError):
        replace_file(file.absolute(), text.encode())
