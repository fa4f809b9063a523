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

from fastlora.cli.console import UserError, console, duration, size

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

    def show(self, step: int, steps: int, record: Record | None) -> None:
        """Show a step, with the figures of `record` when there are new ones."""
        if record is None:
            self._bar.update(self._task, completed=step, total=steps)
            return
        text = (
            f"loss {record['loss']:.3f}  {record['tokens_per_second']:.0f} tok/s"
            f"  {size(record['memory_bytes'])}"
        )
        self._bar.update(self._task, completed=step, total=steps, text=text)
        now = time.perf_counter()
        if not console.is_terminal and (now - self._printed > self.SECONDS or step == steps):
            left = duration(record["seconds"] / step * (steps - step))
            console.print(f"   train  {step}/{steps}  {text}  {left} left", soft_wrap=True)
            self._printed = now


class RunLog(TrainerCallback):
    """Writes metrics.jsonl, one line per logged step, and feeds the bar.

    Args:
        path: metrics.jsonl; what was there is replaced.
        bar: shows the progress.
    """

    def __init__(self, path: Path, bar: Bar) -> None:
        self.records: list[Record] = []
        self._path = path
        self._bar = bar
        self._start = self._last = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Empty the file, start the clock."""
        self._path.write_text("", encoding="utf-8")
        self._start = self._last = time.perf_counter()
        self._bar.show(0, state.max_steps, None)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Move the bar; the last step is always logged."""
        self._bar.show(state.global_step, state.max_steps, None)
        if state.global_step == state.max_steps:
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
        if not math.isfinite(record["loss"]):
            raise UserError(
                f"loss must stay finite, got {record['loss']} at step {state.global_step}; "
                "a lower learning rate may help",
                exit_code=1,
            )
        self.records.append(record)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._bar.show(state.global_step, state.max_steps, record)

    def _record(self, state: TrainerState, logs: dict[str, float]) -> Record:
        now = time.perf_counter()
        tokens = state.num_input_tokens_seen
        new = tokens - (self.records[-1]["tokens"] if self.records else 0)
        record = {
            "step": state.global_step,
            "epoch": round(logs["epoch"], 4),
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_second": round(new / (now - self._last), 1),
            "seconds": round(now - self._start, 3),
            "memory_bytes": peak_memory(),
        }
        self._last = now
        return record
