"""`fastlora generate`: answer a prompt, or a file of them, as the tokens come."""

import contextlib
import json
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fastlora.cli import runs
from fastlora.cli.console import UserError, check_text, console, reported, require
from fastlora.cli.data import read_prompts
from fastlora.cli.settings import TrainSettings

if TYPE_CHECKING:
    from fastlora.cli.generation import Prompt


def generate(
    model: runs.ModelArgument = None,
    prompt: Annotated[str | None, typer.Option(help="What to complete.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Or a file of prompts: JSONL or CSV with prompt or messages, or a .txt with one "
            "on each line."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter; without it the base model answers.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="New JSONL file for prompts and completions, each written as soon as it is there.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="0: take the likeliest token; above: draw one."),
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            max=1,
            help="Draw from the likeliest tokens that have this share of the probability.",
            show_default="1",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Of what is drawn.")
    ] = 0,
    template: runs.TemplateOption = None,
    fields: runs.FieldsOption = None,
    quantize: runs.QuantizeOption = None,
    dtype: runs.DtypeOption = None,
) -> None:
    """Complete a prompt, or each of a file, with a model and an adapter."""
    if (prompt is None) == (prompts is None):
        both = "neither" if prompt is None else "both"
        raise UserError(f"either --prompt or --prompts must be given, got {both}")
    _check_choice(temperature, top_p)
    if output is not None:
        _check_new(output)
    settings = runs.settings_of(
        model, adapter, template=template, fields=fields, quantize=quantize, dtype=dtype
    )
    if settings.labels:
        raise UserError(
            f"adapter must be one of a language model, got {adapter}, which classifies: "
            "fastlora eval has its predictions"
        )
    if prompt is not None:
        check_text(prompt, "prompt")
    asked = [prompt] if prompts is None else read_prompts(prompts, _fields(settings, prompts))
    require("transformers", "accelerate")
    from transformers import set_seed

    from fastlora.cli.generation import Choice, encoded, stream

    base = runs.load(settings, adapter)
    # so that a prompt that cannot be is found before the first answer
    encoded(base, asked, settings.template)
    set_seed(seed)
    choice = Choice(temperature, 1.0 if top_p is None else top_p)
    with _opened(output) as file:
        for question in asked:
            if prompts is not None:
                _show(question)
            answer = stream(base, question, settings.template, max_new_tokens, choice)
            if file is not None:
                _write(file, question, answer)


def _check_choice(temperature: float, top_p: float | None) -> None:
    if not math.isfinite(temperature):
        raise UserError(f"temperature must be finite, got {temperature}")
    if top_p is not None and not temperature:
        raise UserError("top-p must have a temperature above 0, got 0, which draws nothing")
    if top_p is not None and not top_p > 0:
        raise UserError(f"top-p must be above 0, got {top_p}")


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"output must be a new file, got {output}, which exists")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output must be in a folder that exists, got {output}")


def _fields(settings: TrainSettings, path: Path) -> dict[str, str]:
    """Those of the run that prompts have."""
    if path.suffix.lower() == ".txt":
        return {}
    names = settings.field_names
    return {ours: theirs for ours, theirs in names.items() if ours in ("prompt", "messages")}


def _opened(output: Path | None) -> Any:
    if output is None:
        return contextlib.nullcontext()
    with reported(OSError):
        return output.open("x", encoding="utf-8")


def _show(question: "Prompt") -> None:
    turns = (
        [question]
        if isinstance(question, str)
        else [f"{turn['role']}: {turn['content']}" for turn in question]
    )
    for turn in turns:
        console.print(Text(turn, "dim"), soft_wrap=True)


def _write(file: IO[str], question: "Prompt", answer: str) -> None:
    name = "prompt" if isinstance(question, str) else "messages"
    row = {name: question, "completion": answer}
    with reported(OSError):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        # nothing that was answered is lost, whatever happens next
        file.flush()
