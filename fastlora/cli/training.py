"""How this project trains: a run from its settings to its adapter, for every command."""

import dataclasses
import os
import re
import shlex
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations

import fastlora
from fastlora.cli import checkpoints, packing
from fastlora.cli.console import UserError, console, duration, note, reported, size
from fastlora.cli.encoding import Collator, Dataset
from fastlora.cli.guards import AllDone, Interrupts, Length
from fastlora.cli.models import Base
from fastlora.cli.plot import CURVE_FILE, save_curve
from fastlora.cli.progress import Bar, Record, RunLog, peak_memory
from fastlora.cli.settings import SETTINGS_FILE, TrainSettings
from fastlora.cli.trainer import AdapterTrainer
from fastlora.integrations.transformers import optimizer_cls_and_kwargs
from fastlora.optim import AdamW, MemoryBudgetError

ADAPTER_FILE = "adapter_model.safetensors"
METRICS_FILE = "metrics.jsonl"
SAMPLE = 32  # training examples to score where none are held out
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# Trainer's own; with ours its argument has no say
_OPTIMIZERS = {"adafactor": "adafactor", "sgd": "sgd"}
_OUTPUTS = (ADAPTER_FILE, "adapter_config.json", METRICS_FILE, CURVE_FILE, SETTINGS_FILE)


@dataclass(frozen=True)
class Task:
    """What a run trains and is measured on.

    Attributes:
        train: encoded examples.
        held_out: encoded examples that are not trained on; None: a sample of `train` is scored.
    """

    train: Dataset
    held_out: Dataset | None = None

    @property
    def scored(self) -> Dataset:
        """What is scored before and after."""
        few = dataclasses.replace(self.train, examples=self.train.examples[:SAMPLE])
        return self.held_out or few

    @property
    def scored_name(self) -> str:
        """What it is called in a table."""
        count = len(self.scored.examples)
        return f"{count} {'held-out examples' if self.held_out else 'of the training examples'}"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        records: the lines of metrics.jsonl that tell of steps.
        trainable: trained weights.
        memory_bytes: peak memory of the process.
        before: scores of the model without adapter, from `evaluation.score`; empty where a resumed
            run has none on record.
        after: scores with the adapter.
        best: step of the adapter that was kept, where it is not the last.
        optimizer: label and text of what the optimizer kept and how it paged; empty where it is
            not ours.
    """

    records: list[Record]
    trainable: int
    memory_bytes: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    best: int | None
    optimizer: tuple[tuple[str, str], ...]

    @property
    def tokens_per_second(self) -> float:
        """Mean over the steps; padding does not count, but for that of packed rows."""
        return self.records[-1]["tokens"] / self.records[-1]["seconds"]

    @property
    def step_seconds(self) -> float:
        """Mean time of an optimizer step."""
        return self.records[-1]["seconds"] / self.records[-1]["step"]


def refuse_many_processes() -> None:
    """Check that this is the only process of the run.

    Raises:
        UserError: a launcher such as torchrun started several.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise UserError(f"training must run in one process for now, got WORLD_SIZE={processes}")


def check_trackers(names: str) -> None:
    """Check that the trackers of `--report-to` are there.

    Args:
        names: with commas between.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    there = get_available_reporting_integrations()
    trackers = _trackers(names)
    for name in trackers:
        if name not in there and trackers not in (["none"], ["all"]):
            raise UserError(
                f"report-to must name trackers that are installed ({', '.join(there) or 'none'}), "
                f"got {name}"
            )


def lora_config(settings: TrainSettings) -> fastlora.LoraConfig:
    """The adapter that the settings describe.

    Args:
        settings: of the run.

    Returns:
        The configuration for `add_lora`.

    Raises:
        UserError: a value that the engine does not take.
    """
    targets: str | list[str] = settings.target_modules
    # names with commas are a list of suffixes, as in PEFT; anything else is all-linear or a regex
    if targets != "all-linear" and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets):
        targets = [name.strip() for name in targets.split(",")]
    with reported(ValueError, NotImplementedError):
        return fastlora.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
            use_rslora=settings.rslora,
            task_type="SEQ_CLS" if settings.labels else "CAUSAL_LM",
            base_model_name_or_path=settings.model,
        )


def train(
    base: Base,
    task: Task,
    settings: TrainSettings,
    config: fastlora.LoraConfig,
    checkpoint: Path | None = None,
) -> Result:
    """Add an adapter to a model, train it, and save it.

    Args:
        base: a model without adapters; has one, trained and in eval mode, afterwards.
        task: encoded examples.
        settings: of the run, with an output folder.
        config: of the adapter, from `lora_config`.
        checkpoint: where to go on; None: from the start, and what an earlier run left in the
            output folder is removed.

    Returns:
        The account of the run.

    Raises:
        UserError: the settings do not fit the model, the run was interrupted, or it trains nothing.
    """
    set_seed(settings.seed)
    _add_adapter(base, settings, config)
    if settings.packing:
        packing.check(base.model)
    begun = _begun(checkpoint, task, settings) if checkpoint else 0
    checkpoints.clear(settings.output, after=begun if checkpoint else -1)
    if checkpoint is None:
        for name in _OUTPUTS:
            (settings.output / name).unlink(missing_ok=True)
    settings.save(settings.output)
    trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    with Bar() as bar:
        return _run(base, task, settings, checkpoint, bar, trainable)


def _begun(checkpoint: Path, task: Task, settings: TrainSettings) -> int:
    """The step to go on from, when the run is the one that it was."""
    step, epoch = checkpoints.step_of(checkpoint), checkpoints.progress_of(checkpoint)
    if settings.steps is not None and settings.steps < step:
        raise UserError(f"steps must be at least those that are done, {step}, got {settings.steps}")
    if settings.epochs is not None and settings.epochs < epoch:
        raise UserError(
            f"epochs must be at least those that are done, {epoch:.4g}, got {settings.epochs}"
        )
    if checkpoints.examples_of(checkpoint) != task.train.digest:
        raise UserError(
            f"data must have the examples that the run began with, got others in {settings.data}"
        )
    return step


def summarise(result: Result, task: Task, output: Path) -> None:
    """Print the account of a run."""
    last = result.records[-1]
    steps = f"{last['step']} step{'s' if last['step'] > 1 else ''}"
    losses = [r["loss"] for r in result.records if r["loss"] is not None]
    first_last = f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else "never finite"
    skipped = sum(r["skipped"] for r in result.records)
    lost = f", {skipped} steps skipped" if skipped else ""
    note("loss", f"{first_last} from the first to the last step{lost}")
    note(
        "speed",
        f"{steps} in {duration(last['seconds'])}: {result.step_seconds:.3g} s a step, "
        f"{result.tokens_per_second:.0f} tokens/s",
    )
    note("memory", f"{size(result.memory_bytes)} at most")
    for label, text in result.optimizer:
        note(label, text)
    if result.best is not None:
        note("best", f"the adapter of step {result.best} is kept")
    note("saved", f"{output / ADAPTER_FILE}, {METRICS_FILE}, {CURVE_FILE}, {SETTINGS_FILE}")
    console.print(_scores_table(result, task))


def _scores_table(result: Result, task: Task) -> Table:
    table = Table(title=task.scored_name, title_justify="left", title_style="bold")
    table.add_column("")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for name, after in result.after.items():
        if name not in ("tokens", "examples"):
            before = result.before.get(name)
            table.add_row(name, "not known" if before is None else f"{before:.4f}", f"{after:.4f}")
    return table


def _add_adapter(base: Base, settings: TrainSettings, config: fastlora.LoraConfig) -> None:
    with reported(ValueError, NotImplementedError):
        fastlora.add_lora(base.model, config)
    layers = sum(isinstance(m, fastlora.nn.LoraLinear) for m in base.model.modules())
    trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    note("adapter", f"rank {settings.rank} on {layers} layers, {trainable / 1e6:.3g} M trainable")
    with reported(ValueError):
        fastlora.prepare_for_training(
            base.model,
            gradient_checkpointing=settings.gradient_checkpointing,
            chunked_loss=settings.chunked_loss,
        )


def _run(
    base: Base,
    task: Task,
    settings: TrainSettings,
    checkpoint: Path | None,
    bar: Bar,
    trainable: int,
) -> Result:
    interrupts = Interrupts()
    trainer = _trainer(base, task, settings, interrupts)
    log = RunLog(settings.output / METRICS_FILE, bar, trainer.non_finite.steps)
    trainer.add_callback(log)
    trainer.add_callback(Length())
    bar.say(f"scoring {task.scored_name}")
    try:
        with interrupts.caught():
            if checkpoint is None:
                trainer.evaluate()
            _train(trainer, settings, interrupts, checkpoint)
            kept = _save(trainer, settings, interrupts)
            bar.say(f"scoring {task.scored_name}")
            scores = [r for r in log.records if "eval_loss" in r]
            # what was scored on the way is not scored again
            after = next((r for r in scores if r["step"] == kept), None) or trainer.evaluate()
    except KeyboardInterrupt:
        raise _interrupted(settings, interrupts) from None
    title = f"{Path(base.source.name).name}, rank {settings.rank}"
    with reported(OSError, exit_code=1):
        save_curve(log.records, title, task.scored_name, settings.output / CURVE_FILE)
    return Result(
        records=log.steps,
        trainable=trainable,
        memory_bytes=peak_memory(),
        before=_unprefixed(next((r for r in scores if r["step"] == 0), {})),
        after=_unprefixed(after),
        best=kept if kept != trainer.state.global_step else None,
        optimizer=(*_account(trainer.optimizer),),
    )


def _train(
    trainer: AdapterTrainer,
    settings: TrainSettings,
    interrupts: Interrupts,
    checkpoint: Path | None,
) -> None:
    memory = reported(
        *(torch.OutOfMemoryError, MemoryBudgetError),
        about="the GPU must have more memory: ",
        exit_code=1,
    )
    try:
        with interrupts.training(), memory, reported(OSError, exit_code=1):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AllDone:
        note("done", f"all {trainer.state.max_steps} steps; --steps or --epochs take it further")
    if interrupts.signal is not None and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt


def _save(trainer: AdapterTrainer, settings: TrainSettings, interrupts: Interrupts) -> int:
    """Save the adapter, with early stopping the best one; its step."""
    with interrupts.writing(), reported(OSError, ValueError, exit_code=1):
        best = trainer.load_best() if settings.early_stopping else None
        trainer.model.eval()
        fastlora.save_adapter(trainer.model, settings.output)
    if interrupts.signal is not None:
        raise KeyboardInterrupt
    return trainer.state.global_step if best is None else best


def _interrupted(settings: TrainSettings, interrupts: Interrupts) -> UserError:
    """What is said when a signal ended a run, with the exit code that shells expect."""
    code = 128 + (interrupts.signal or signal.SIGINT)
    newest = checkpoints.newest(settings.output)
    if newest is None:
        return UserError("interrupted before the first checkpoint", exit_code=code)
    command = shlex.join(["fastlora", "train", "--resume", "--output", str(settings.output)])
    step = checkpoints.step_of(newest)
    return UserError(f"interrupted, saved at step {step}; to go on: {command}", exit_code=code)


def _trainer(
    base: Base, task: Task, settings: TrainSettings, interrupts: Interrupts
) -> AdapterTrainer:
    stops: list[TrainerCallback] = []
    if settings.early_stopping:
        stops = [EarlyStoppingCallback(settings.early_stopping)]
    collator = packing.PackedCollator if settings.packing else Collator
    train = task.train.examples
    arguments = _arguments(settings, base.model.dtype)
    return AdapterTrainer(
        base=base,
        scored=task.scored,
        keep=settings.keep,
        grouped=settings.group_by_length,
        interrupts=interrupts,
        digest=task.train.digest,
        callbacks=stops,
        args=arguments,
        optimizer_cls_and_kwargs=_optimizer(base.model, settings, arguments),
        train_dataset=packing.pack(train, settings.max_length) if settings.packing else train,
        # Trainer wants one where it is to evaluate, which is done by `scored`
        eval_dataset=task.scored.examples,
        data_collator=collator(base.pad_id),
    )


def _optimizer(
    model: nn.Module, settings: TrainSettings, arguments: TrainingArguments
) -> tuple[type[AdamW], dict[str, Any]] | None:
    """Ours for Trainer; None where it is to make its own."""
    if settings.optim in _OPTIMIZERS:
        return None
    return optimizer_cls_and_kwargs(
        arguments,
        settings.optim,
        model,
        page_budget=settings.page_bytes,
        page_folder=settings.page_folder,
        lora_plus_ratio=settings.lora_plus_ratio,
    )


def _account(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Label and text of what an optimizer of ours kept, and how it paged."""
    ours = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    if isinstance(ours, AdamW):
        memory = ours.memory()
        where = "in pages" if memory.host_bytes else "resident"
        total = size(memory.device_bytes + memory.host_bytes)
        yield "moments", f"{total} {where}, {memory.bytes_per_parameter:.3g} bytes a trained weight"
        yield from (("pages", str(stats)) for stats in ours.page_stats())


def _arguments(settings: TrainSettings, dtype: torch.dtype) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        num_train_epochs=1.0 if settings.epochs is None else settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=_SCHEDULERS[settings.scheduler],
        warmup_steps=settings.warmup,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.clip,
        weight_decay=settings.weight_decay,
        optim=_OPTIMIZERS.get(settings.optim, "adamw_torch"),
        # fp16 needs the loss scaler; bf16 not even autocast: the layers mix it with fp32 adapters
        fp16=dtype == torch.float16,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        # packed rows have no mask: the little padding at their ends counts too
        include_num_input_tokens_seen="all" if settings.packing else "non_padding",
        use_cpu=not torch.cuda.is_available(),
        report_to=_trackers(settings.report_to),
        eval_strategy="steps" if settings.eval_steps else "no",
        eval_steps=settings.eval_steps,
        metric_for_best_model="loss" if settings.early_stopping else None,
        # early stopping counts on where it was
        restore_callback_states_from_checkpoint=True,
        save_strategy="steps",
        save_steps=settings.save_steps,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # with several GPUs in one process Trainer would copy the model to all of them (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _trackers(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()] or ["none"]


def _unprefixed(metrics: Mapping[str, Any]) -> dict[str, float]:
    prefix = "eval_"
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}
