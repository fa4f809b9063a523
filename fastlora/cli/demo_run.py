"""The demo's course: answer, train with the code of `fastlora train`, answer again, report."""

import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from fastlora.cli import demo_model, demo_task, encoding, models, preview, training
from fastlora.cli.console import UserError, check_output, console, duration, note
from fastlora.cli.data import Data, Pair, write_jsonl
from fastlora.cli.generation import complete_lines
from fastlora.cli.models import Base
from fastlora.cli.settings import SETTINGS_FILE, TrainSettings
from fastlora.cli.training import Result

REPORT_FILE = "report.json"
TRAIN_FILE = "train.jsonl"
TEST_FILE = "test.jsonl"
LEARNING_RATE = 2e-3  # high, because the run is short
MAX_BEFORE, MIN_AFTER = 0.1, 0.9
MAX_NEW_TOKENS = 32  # an answer has at most 28
BATCH = 100
SHOWN = 3


@dataclass(frozen=True)
class Answers:
    """What a model said to the test sentences.

    Attributes:
        data: sentences and right answers.
        lines: the model's answers, in the same order.
    """

    data: list[Pair]
    lines: list[str]

    @property
    def exact_match(self) -> float:
        """Share of answers that are right to the letter."""
        right = sum(e.completion == line for e, line in zip(self.data, self.lines, strict=True))
        return right / len(self.data)


def run(output: Path, steps: int, test_items: int, seed: int) -> None:
    """Run the demo.

    Args:
        output: folder for the data, the adapter, the metrics and the report.
        steps: optimizer steps.
        test_items: held-out sentences.
        seed: of the task and of the training.

    Raises:
        UserError: something is missing, or exact match is not what was promised.
    """
    start = time.perf_counter()
    training.refuse_many_processes()
    # the folder of an earlier demo may be used again
    check_output(output, reuse=all((output / name).exists() for name in (SETTINGS_FILE, TEST_FILE)))
    model = demo_model.fetch_model()
    settings = TrainSettings(
        model=str(model),
        data=output / TRAIN_FILE,
        output=output,
        steps=steps,
        lr=LEARNING_RATE,
        seed=seed,
    ).absolute()
    settings.save(output)
    train_data, test_data = _task(steps * settings.batch_size, test_items, seed)
    write_jsonl(output / TRAIN_FILE, train_data)
    write_jsonl(output / TEST_FILE, test_data)

    base = models.load(models.find(settings.model), settings)
    models.describe(base, settings)
    before = _answer(base, test_data, settings, "before")
    task = training.Task(
        _encode(base, train_data, settings), _encode(base, test_data[: training.SAMPLE], settings)
    )
    encoding.describe(task.train, settings.max_length)
    preview.show(task.train, base.tokenizer)
    result = training.train(base, task, settings, training.lora_config(settings))
    after = _answer(base, test_data, settings, "after")

    training.summarise(result, task, output)
    _show_rows(before, after)
    report = _report(settings, base, result, before, after, time.perf_counter() - start)
    (output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    _conclude(report, model, output, test_data[0])


def _encode(base: Base, rows: list[Pair], settings: TrainSettings) -> encoding.Dataset:
    data = Data(settings.data, "prompt", rows)
    return encoding.encode(data, base.tokenizer, settings.template, settings.max_length)


def _task(train_items: int, test_items: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    pairs = demo_task.make_pairs(train_items, test_items, seed)
    train_data, test_data = (
        [Pair(f"{name}, line {line}", *pair) for line, pair in enumerate(part, 1)]
        for name, part in zip((TRAIN_FILE, TEST_FILE), pairs, strict=True)
    )
    return train_data, test_data


def _answer(base: Base, data: list[Pair], settings: TrainSettings, when: str) -> Answers:
    with console.status(f"answering {len(data)} held-out sentences"):
        prompts = [example.prompt for example in data]
        lines = complete_lines(base, prompts, settings.template, MAX_NEW_TOKENS, BATCH)
    answers = Answers(data, lines)
    note(when, f"exact match {answers.exact_match:.1%} of {len(data)} held-out sentences")
    return answers


def _show_rows(before: Answers, after: Answers) -> None:
    console.print()
    rows = zip(before.data, before.lines, after.lines, strict=True)
    for example, old, new in [*rows][:SHOWN]:
        console.print(Text(example.prompt, style="bold"))
        for label, line in (("expected", example.completion), ("before", old), ("after", new)):
            right = line == example.completion
            text = Text.assemble((f"{label:>8}  ", "cyan"), (line, "green" if right else "red"))
            console.print(text, overflow="ellipsis", no_wrap=True)
    console.print()


def _report(
    settings: TrainSettings,
    base: Base,
    result: Result,
    before: Answers,
    after: Answers,
    seconds: float,
) -> dict[str, Any]:
    last = result.records[-1]
    return {
        "model": settings.model,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "seconds": seconds,
        "exact_match": {
            "items": len(after.data),
            "before": before.exact_match,
            "after": after.exact_match,
        },
        "training": {
            **{name: last[name] for name in ("step", "tokens", "seconds", "loss")},
            "step_seconds": result.step_seconds,
            "tokens_per_second": result.tokens_per_second,
            "trainable_weights": result.trainable,
        },
        "memory_bytes": {
            "peak": result.memory_bytes,
            "base_weights": base.weight_bytes,
            "base_weights_fp32": base.fp32_bytes,
        },
        "wrong": [
            {"prompt": e.prompt, "expected": e.completion, "got": line}
            for e, line in zip(after.data, after.lines, strict=True)
            if e.completion != line
        ],
    }


def _conclude(report: dict[str, Any], model: Path, output: Path, example: Pair) -> None:
    before, after = report["exact_match"]["before"], report["exact_match"]["after"]
    headline = f"Exact match {before:.1%} → {after:.1%}", "bold"
    rest = f" in {duration(report['seconds'])}. Report: {output / REPORT_FILE}. Try it by hand:\n"
    console.print(Text.assemble(headline, rest), soft_wrap=True)
    # the line must run where it is pasted, and there the environment may not be active
    program = ["fastlora"] if shutil.which("fastlora") else [sys.executable, "-m", "fastlora"]
    words = ["generate", str(model), "--adapter", str(output), "--prompt", example.prompt]
    print(shlex.join(program + words))
    if before >= MAX_BEFORE or after <= MIN_AFTER:
        raise UserError(
            f"exact match must rise from under {MAX_BEFORE:.0%} to over {MIN_AFTER:.0%}, "
            f"got {before:.1%} and {after:.1%}",
            exit_code=1,
        )
