"""The course of `fastlora eval`: load, score, answer, show."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoConfig

from fastlora.cli import encoding, generation, models, runs
from fastlora.cli.console import UserError, console, note, reported
from fastlora.cli.data import Chat, Data, Pair
from fastlora.cli.evaluation import Advance, by_class, classify, score, totals
from fastlora.cli.models import Base
from fastlora.cli.settings import TrainSettings

SHORT = 64  # tokens of a completion, up to which answers are compared unless they are asked for
_SLACK = 8  # tokens that an answer may have beyond the longest completion
_HEADS = {"f1": "F1", "exact_match": "exact match"}


def run(
    data: Data,
    settings: TrainSettings,
    adapter: Path | None,
    batch_size: int,
    max_new_tokens: int | None,
    exact_match: bool | None,
) -> dict[str, Any]:
    """Evaluate a model on data and print the figures.

    Args:
        data: of any form.
        settings: with the model.
        adapter: folder of the adapter, if there is one.
        batch_size: examples at once.
        max_new_tokens: of an answer; None: by the completions.
        exact_match: whether to answer the prompts; None: where completions are short.

    Returns:
        The figures and what they are of, for JSON.

    Raises:
        UserError: model, adapter and data do not fit together.
    """
    if exact_match and data.form not in ("prompt", "messages"):
        raise UserError(
            f"--exact-match must have data with prompt and completion or messages, got {data.path}"
        )
    labels = _classes(data, settings, adapter)
    base = runs.load(settings, adapter, labels)
    models.describe(base, settings)
    settings = replace(settings, max_length=min(settings.max_length, base.positions))
    about = {
        "model": settings.model,
        "adapter": None if adapter is None else str(adapter),
        "data": str(data.path),
        "form": data.form,
        "quantize": settings.quantize,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "max_length": settings.max_length,
    }
    with reported(torch.OutOfMemoryError, about="the GPU must have enough memory: "):
        if labels:
            return about | _classes_run(base, data, settings, batch_size)
        figures = _language_run(base, data, settings, batch_size)
        if data.form != "text" and exact_match is not False:
            asked = exact_match is True
            figures |= _matches(base, data, settings, batch_size, max_new_tokens, asked)
    _show(figures)
    return about | figures


def _language_run(
    base: Base, data: Data, settings: TrainSettings, batch_size: int
) -> dict[str, Any]:
    dataset = encoding.encode(data, base.tokenizer, settings.template, settings.max_length)
    encoding.describe(dataset, settings.max_length)
    with _bar("scoring", len(dataset.examples)) as advance:
        scores = score(base, dataset, batch_size, advance)
    return scores | {"cut": dataset.cut, "dropped": dataset.dropped}


def _matches(
    base: Base,
    data: Data,
    settings: TrainSettings,
    batch_size: int,
    max_new_tokens: int | None,
    asked: bool,
) -> dict[str, Any]:
    """Exact match; nothing where completions are long and it was not asked for."""
    questions = [_question(row) for row in data.rows if isinstance(row, Pair | Chat)]
    completions = [completion.strip() for _, completion in questions]
    ids = base.tokenizer(completions, add_special_tokens=False, verbose=False).input_ids
    longest = max(map(len, ids))
    if longest > SHORT and not asked:
        note(
            "answers",
            f"left out, as the longest completion has {longest} tokens (over {SHORT}); "
            "--exact-match asks for them",
        )
        return {}
    with _bar("answering", len(questions)) as advance:
        answers = generation.complete(
            base,
            [prompt for prompt, _ in questions],
            settings.template,
            max_new_tokens or longest + _SLACK,
            batch_size,
            advance,
        )
    right = sum(a.strip() == b for a, b in zip(answers, completions, strict=True))
    return {"exact_match": right / len(questions), "answers": len(questions)}


def _question(row: Pair | Chat) -> tuple[generation.Prompt, str]:
    """What is asked, and the right answer: the last one of a conversation."""
    if isinstance(row, Pair):
        return row.prompt, row.completion
    last = max(i for i, turn in enumerate(row.messages) if turn["role"] == "assistant")
    if last == 0:
        raise UserError(f"{row.where}: the assistant must answer a turn, got none before it")
    return row.messages[:last], row.messages[last]["content"]


def _classes_run(
    base: Base, data: Data, settings: TrainSettings, batch_size: int
) -> dict[str, Any]:
    dataset = encoding.encode_labelled(data, base.tokenizer, base.labels, settings.max_length)
    encoding.describe(dataset, settings.max_length)
    with _bar("classifying", len(dataset.examples)) as advance:
        classified = classify(base, dataset, batch_size, advance)
    figures = totals(classified)
    classes = by_class(classified, base.labels)
    _show({name: figures[name] for name in ("examples", "loss", "accuracy")})
    means = {name: figures[name] for name in ("precision", "recall", "f1", "examples")}
    _show_classes(classes | {"mean over classes": means})
    return {
        **figures,
        "cut": dataset.cut,
        "dropped": dataset.dropped,
        "labels": [*base.labels],
        "classes": classes,
    }


def _classes(data: Data, settings: TrainSettings, adapter: Path | None) -> tuple[str, ...]:
    """The classes to tell apart; none for a language model."""
    labels = settings.classes
    if data.form != "label":
        if labels:
            raise UserError(
                f"data must have text and label for a classifier, got {data.form} in {data.path}"
            )
        return ()
    own = _own_classes(models.find(settings.model, labelled=True))
    if not labels and adapter is not None:
        raise UserError(
            "adapter must be one of a classifier for text and label, or labels be given with it, "
            f"got {adapter}"
        )
    # with another number of classes its head would be made anew, at random
    if adapter is None and (not own or len(labels or own) != len(own)):
        what = f"for {len(labels)} classes" if labels else "for text and label"
        got = f"one for {len(own)}" if own else "a language model"
        raise UserError(f"model must be a classifier {what}, got {got} in {settings.model}")
    return labels or own


def _own_classes(source: models.Source) -> tuple[str, ...]:
    """Those that a model was trained for; none of a language model."""
    if source.gguf:
        return ()
    with reported(*models.UNREADABLE, about=f"{source.name} cannot be loaded: "):
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
        if not any("SequenceClassification" in name for name in config.architectures or ()):
            return ()
        return tuple(config.id2label[index] for index in range(len(config.id2label)))


def _show(figures: dict[str, float]) -> None:
    """One row, a column for each figure that is asked about."""
    order = "examples", "tokens", "loss", "perplexity", "accuracy", "exact_match"
    shown = [name for name in order if name in figures]
    table = _table()
    for name in shown:
        table.add_column(_HEADS.get(name, name), justify="right")
    table.add_row(*(_number(name, figures[name]) for name in shown))
    console.print("", table)


def _show_classes(rows: dict[str, dict[str, float]]) -> None:
    table = _table()
    table.add_column("class", overflow="fold")
    columns = "precision", "recall", "f1", "examples"
    for name in columns:
        table.add_column(_HEADS.get(name, name), justify="right", no_wrap=True)
    *_, last = rows
    for label, figures in rows.items():
        numbers = (_number(name, figures[name]) for name in columns)
        table.add_row(label, *numbers, style="bold" if label == last else None)
    console.print("", table)


def _table() -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold cyan")


def _number(name: str, value: float) -> str:
    if name in ("exact_match", "accuracy"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if name == "perplexity" else f"{value:.4f}"


@contextmanager
def _bar(what: str, total: int) -> Iterator[Advance]:
    """On stderr, as stdout may be for JSON; nothing where it is no terminal."""
    screen = Console(stderr=True)
    bar = Progress(
        TextColumn(f"[bold cyan]{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
