"""How this project trains: transformers' Trainer over fastlora's layers, for every command."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

import fastlora
from fastlora.cli.console import UserError, duration, note, reported, size
from fastlora.cli.encoding import Collator, Dataset
from fastlora.cli.models import Base
from fastlora.cli.progress import Bar, Record, RunLog, peak_memory
from fastlora.cli.settings import SETTINGS_FILE, TrainSettings

ADAPTER_FILE = "adapter_model.safetensors"
METRICS_FILE = "metrics.jsonl"
_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        records: the lines of metrics.jsonl.
        trainable: trained weights.
        memory_bytes: peak memory of the process.
    """

    records: list[Record]
    trainable: int
    memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Mean over the run; padding does not count."""
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


def check_output(output: Path, reuse: bool) -> None:
    """Check that the folder of a run may be used; it is made when there is something to write.

    Args:
        output: may be missing, with its parents.
        reuse: take a folder that has files; those of the run are replaced.

    Raises:
        UserError: it has files and may not be reused, or it cannot be made or written to.
    """
    with reported(OSError):
        there = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output must be in a folder that can be written to, got {there}")
        if not reuse and output.exists() and any(output.iterdir()):
            raise UserError(f"output must be a new or empty folder, got {output}; or --overwrite")


def lora_config(settings: TrainSettings, model: Path) -> fastlora.LoraConfig:
    """The adapter that the settings describe.

    Args:
        settings: of the run.
        model: where the base model came from, for the record.

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
            task_type="CAUSAL_LM",
            base_model_name_or_path=str(model.resolve()),
        )


def train(
    base: Base,
    data: Dataset,
    settings: TrainSettings,
    config: fastlora.LoraConfig,
    output: Path,
) -> Result:
    """Add an adapter to a model, train it, and save it.

    Args:
        base: a model without adapters; has one, trained and in eval mode, afterwards.
        data: encoded examples.
        settings: of the run.
        config: of the adapter, from `lora_config`.
        output: folder for the adapter, metrics.jsonl and settings.json.

    Returns:
        The account of the run.

    Raises:
        UserError: the settings do not fit the model, or the loss is not finite.
    """
    set_seed(settings.seed)
    with reported(ValueError, NotImplementedError):
        fastlora.add_lora(base.model, config)
    layers = sum(isinstance(m, fastlora.nn.LoraLinear) for m in base.model.modules())
    trainable = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
    note("adapter", f"rank {settings.rank} on {layers} layers, {trainable / 1e6:.3g} M trainable")
    fastlora.prepare_for_training(
        base.model,
        gradient_checkpointing=settings.gradient_checkpointing,
        chunked_loss=settings.chunked_loss,
    )
    settings.save(output)
    records = _run_trainer(base, data, settings, output)
    base.model.eval()
    fastlora.save_adapter(base.model, output)
    return Result(records, trainable, peak_memory())


def summarise(result: Result, output: Path) -> None:
    """Print the account of a run."""
    first, last = result.records[0], result.records[-1]
    steps = f"{last['step']} step{'s' if last['step'] > 1 else ''}"
    note("loss", f"{first['loss']:.4f} → {last['loss']:.4f}")
    note(
        "speed",
        f"{steps} in {duration(last['seconds'])}: {result.step_seconds:.3g} s a step, "
        f"{result.tokens_per_second:.0f} tokens/s",
    )
    note("memory", f"{size(result.memory_bytes)} at most")
    note("saved", f"{output / ADAPTER_FILE}, {METRICS_FILE}, {SETTINGS_FILE}")


def _run_trainer(base: Base, data: Dataset, settings: TrainSettings, output: Path) -> list[Record]:
    pad = base.tokenizer.pad_token_id
    with Bar() as bar:
        log = RunLog(output / METRICS_FILE, bar)
        trainer = Trainer(
            model=base.model,
            args=_arguments(settings, base.model.dtype, output),
            train_dataset=data.examples,
            data_collator=Collator(base.tokenizer.eos_token_id if pad is None else pad),
            callbacks=[log],
        )
        # prints a dictionary per log
        trainer.remove_callback(PrinterCallback)
        with reported(torch.OutOfMemoryError, about="the GPU must have enough memory: "):
            trainer.train()
    return log.records


def _arguments(settings: TrainSettings, dtype: torch.dtype, output: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1.0 if settings.epochs is None else settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.lr,
        lr_scheduler_type=_SCHEDULERS[settings.scheduler],
        warmup_steps=settings.warmup,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.clip,
        weight_decay=settings.weight_decay,
        # fp16 needs the loss scaler; bf16 not even autocast: the layers mix it with fp32 adapters
        fp16=dtype == torch.float16,
        seed=settings.seed,
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # with several GPUs in one process Trainer would copy the model to all of them (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
