"""`fastlora train`: fine-tune a model on a file."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fastlora.cli import data
from fastlora.cli.console import UserError, check_output, note, require
from fastlora.cli.settings import (
    CHAT,
    SETTINGS_FILE,
    TrainSettings,
    option,
    use_config,
    with_settings,
)

_IN_USE = "; --overwrite replaces what is in it, --resume goes on with it"


@with_settings
def train(
    settings: TrainSettings,
    given: dict[str, Any],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            is_eager=True,
            callback=use_config,
            help="YAML with any of these settings; what is given here as well wins.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest complete checkpoint in the output."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
) -> None:
    """Fine-tune a model: 4-bit frozen weights, LoRA adapters, loss on the answers only.

    The data has, on each line, prompt and completion, messages (the loss is on the assistant's
    turns), text, or text and label (which trains a classifier). An interrupted run (Ctrl-C) ends
    its step, writes a checkpoint and goes on with --resume.
    """
    if settings.output is None:
        raise UserError("output must be given, got none: --output FOLDER, or output in the config")
    if resume and overwrite:
        raise UserError("resume and overwrite must not both be given")
    checkpoint = _checkpoint(settings.output) if resume else None
    if checkpoint is not None:
        settings = TrainSettings.load(settings.output).resumed(given)
    settings = settings.absolute()
    check_output(settings.output, reuse=overwrite or resume, hint=_IN_USE)
    if settings.page_folder is not None and not settings.page_folder.is_dir():
        raise UserError(f"page-folder must be a folder, got {settings.page_folder}")
    for name in ("model", "data"):
        if getattr(settings, name) is None:
            raise UserError(f"{name} must be given, got none: as an argument, or in the config")
    examples = data.read(settings.data, settings.field_names)
    _check_used(settings, examples)
    require("transformers", "accelerate", "matplotlib", "sklearn")
    # transformers takes seconds to import, so what needs it comes after the quick checks
    from fastlora.cli import encoding, models, preview, training

    training.refuse_many_processes()
    training.check_trackers(settings.report_to)
    if examples.form == "label" and settings.dtype == "auto":
        # the head of a classifier is trained whole, and in 16 bits small updates would be lost
        settings = dataclasses.replace(settings, dtype="fp32")
    settings = dataclasses.replace(
        settings, dtype=models.pick_dtype(settings.dtype), **_resolved(settings, examples)
    )
    examples, held_out = _divided(settings, examples)
    adapter = training.lora_config(settings)
    labels = settings.classes
    source = models.find(settings.model, labelled=bool(labels))
    training.set_seed(settings.seed)  # a new head starts at random
    base = models.load(source, settings, labels)
    models.describe(base, settings)
    if base.fresh:
        note("head", f"{', '.join(base.fresh)} start at random")
    if examples.form == "prompt" and settings.template != CHAT and base.tokenizer.chat_template:
        note("hint", "the model has a chat template, which --template chat puts prompts into")
    if base.positions < settings.max_length:
        note("length", f"{base.positions} tokens at most, as many as the model has positions")
        settings = dataclasses.replace(settings, max_length=base.positions)

    def encode(rows: data.Data) -> encoding.Dataset:
        if labels:
            return encoding.encode_labelled(rows, base.tokenizer, labels, settings.max_length)
        return encoding.encode(rows, base.tokenizer, settings.template, settings.max_length)

    task = training.Task(encode(examples), encode(held_out) if held_out else None)
    encoding.describe(task.train, settings.max_length)
    preview.show(task.train, base.tokenizer, labels)
    result = training.train(base, task, settings, adapter, checkpoint)
    training.summarise(result, task, settings.output)


def _checkpoint(output: Path) -> Path:
    """Where a run goes on."""
    from fastlora.cli import checkpoints

    newest = checkpoints.newest(output)
    if newest is None:
        raise UserError(f"resume must have a complete checkpoint, got none in {output}")
    if not (output / SETTINGS_FILE).is_file():
        raise UserError(
            f"resume must have the settings of the run, got no {output / SETTINGS_FILE}"
        )
    note("resumed", f"from {newest}")
    return newest


def _check_used(settings: TrainSettings, examples: data.Data) -> None:
    """What is asked for must have a meaning for this data, and beside the other settings."""
    data_reason = f"for other data, got {examples.form} in {settings.data}"
    unused = dict.fromkeys(
        {
            "label": ["template", "packing", "chunked_loss"],
            "messages": ["labels", *(["template"] if settings.template != CHAT else [])],
        }.get(examples.form, ["labels"]),
        data_reason,
    )
    if settings.quantize == "none":
        unused |= dict.fromkeys(["blocksize", "double_quant"], "for quantize nf4, got none")
    for field in dataclasses.fields(settings):
        if field.name in unused and getattr(settings, field.name) != field.default:
            raise UserError(f"{option(field.name)} must be {unused[field.name]}")


def _divided(settings: TrainSettings, examples: data.Data) -> tuple[data.Data, data.Data | None]:
    """The training examples, and those that are held out."""
    held_out = None
    if settings.eval_data:
        held_out = data.read(settings.eval_data, settings.field_names)
        if held_out.form != examples.form:
            raise UserError(
                f"eval-data must be {examples.form} as the data, got {held_out.form} in "
                f"{settings.eval_data}"
            )
    elif settings.eval_share:
        examples, held_out = data.split(examples, settings.eval_share, settings.seed)
    if held_out and settings.eval_examples:
        held_out = dataclasses.replace(held_out, rows=held_out.rows[: settings.eval_examples])
    return examples, held_out


def _resolved(settings: TrainSettings, examples: data.Data) -> dict[str, str]:
    """Settings that the data decides; they are saved with the run."""
    if examples.form == "messages":
        return {"template": CHAT}
    if examples.form != "label" or settings.labels:
        return {}
    from fastlora.cli.encoding import label_set

    labels = label_set(examples)
    commas = [label for label in labels if "," in label]
    if commas:
        raise UserError(f"labels must have no commas, got {commas[0]!r}")
    return {"labels": ",".join(labels)}
