"""What is recorded of a training run, and what a person sees while it goes on."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastlora.atomic import replace_file
from fastlora.cli.console import UserError, console, duration, note, reported, size

Record = dict[str, Any]


def peak_memory() -> int:
    """Peak memory of this process so far in bytes: the GPU's where one is used, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Bar:
    """The progress bar; where there is no terminal, a line now and then."""

    SECONDS = 30  # between two lines

    def __init__(self) -> None:
        self._bar = Progress(
            TextColumn("[bold cyan]   train[/] "),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=None, text="")
        self._printed = time.perf_counter()

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show what is done while no step is."""
        self._bar.update(self._task, text=text)

    def show(self, step: int, steps: int, record: Record | None) -> None:
        """Show a step, with the figures of `record` when there are new ones."""
        if record is None:
            self._bar.update(self._task, completed=step, total=steps)
            return
        loss = "skipped" if record["loss"] is None else f"loss {record['loss']:.3f}"
        text = f"{loss}  {record['tokens_per_second']:.0f} tok/s  {size(record['memory_bytes'])}"
        self._bar.update(self._task, completed=step, total=steps, text=text)
        now = time.perf_counter()
        if not console.is_terminal and (now - self._printed > self.SECONDS or step == steps):
            left = duration(record["seconds"] / step * (steps - step))
            console.print(f"   train  {step}/{steps}  {text}  {left} left", soft_wrap=True)
            self._printed = now


class RunLog(TrainerCallback):
    """Writes metrics.jsonl, one line per logged step or evaluation, and feeds the bar.

    Args:
        path: metrics.jsonl; what was there of later steps than the first is replaced.
        bar: shows the progress.
        skipped: steps that were skipped so far; grows while the run goes on.
    """

    def __init__(self, path: Path, bar: Bar, skipped: list[int]) -> None:
        self.records: list[Record] = []
        self._path = path
        self._bar = bar
        self._skipped = skipped
        self._last = 0.0

    @property
    def steps(self) -> list[Record]:
        """The records of steps, without evaluations."""
        return [record for record in self.records if "loss" in record]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Go on after the records of the steps that were trained, start the clock."""
        if state.global_step:
            self.records = [r for r in read_metrics(self._path) if r["step"] <= state.global_step]
        with reported(OSError, exit_code=1):
            replace_file(self._path, _lines(self.records))
        self._last = time.perf_counter()
        self._bar.show(state.global_step, state.max_steps, None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Move the bar; a step after which something happens is logged first.

        So the records of a run that goes on are the same, and times are those of training alone.
        """
        self._bar.show(state.global_step, state.max_steps, None)
        happens = control.should_evaluate or control.should_save or control.should_training_stop
        if happens or state.global_step == state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Record one logged step; the last log of a run carries no loss and is passed over."""
        if "loss" not in logs:
            return
        record = self._record(state, logs)
        self._add(record)
        self._bar.show(state.global_step, state.max_steps, record)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: object,
    ) -> None:
        """Record an evaluation; its time is not that of the next step."""
        self._add({"step": state.global_step} | metrics)
        note("eval", f"step {state.global_step}: " + in_words(metrics))
        self._last = time.perf_counter()

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """The time of saving is not that of the next step."""
        self._last = time.perf_counter()

    def _add(self, record: Record) -> None:
        self.records.append(record)
        with reported(OSError, exit_code=1), self._path.open("ab") as file:
            file.write(_lines([record]))

    def _record(self, state: TrainerState, logs: dict[str, float]) -> Record:
        now = time.perf_counter()
        start = {"step": 0, "tokens": 0, "seconds": 0.0}
        before = next((r for r in reversed(self.records) if "loss" in r), start)
        steps, tokens = state.global_step - before["step"], state.num_input_tokens_seen
        skipped = sum(step > before["step"] for step in self._skipped)
        record = {
            "step": state.global_step,
            "epoch": round(logs["epoch"], 4),
            # skipped steps went into the mean as zeros
            "loss": logs["loss"] * steps / (steps - skipped) if steps > skipped else None,
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "skipped": skipped,
            "tokens": tokens,
            "tokens_per_second": round((tokens - before["tokens"]) / (now - self._last), 1),
            "seconds": round(before["seconds"] + now - self._last, 3),
            "memory_bytes": peak_memory(),
        }
        self._last = now
        return record


def read_metrics(path: Path) -> list[Record]:
    """The lines of a metrics.jsonl.

    Args:
        path: the file.

    Returns:
        Its records, without a last line that a killed process did not finish; none where there is
        no file.

    Raises:
        UserError: another line is damaged.
    """
    if not path.exists():
        return []
    # what follows the last line break is not complete
    *lines, _ = path.read_text("utf-8").split("\n")
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise UserError(f"{path} must have JSON on each line, got {error}") from error


def in_words(scores: dict[str, float]) -> str:
    """Scores for reading: loss 1.234, perplexity 3.43."""
    shown = {name.removeprefix("eval_"): value for name, value in scores.items()}
    return ", ".join(
        f"{name} {value:.4g}" for name, value in shown.items() if name not in ("tokens", "examples")
    )


def _lines(records: list[Record]) -> bytes:
    """JSON, in which numbers that it does not have become null."""
    finite = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
        for r in records
    ]
    return "".join(json.dumps(record) + "\n" for record in finite).encode()
