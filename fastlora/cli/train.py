"""`fastlora train`: fine-tune a model on a file."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.console import require
from fastlora.cli.data import read
from fastlora.cli.settings import TrainSettings, with_settings


@with_settings
def train(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a .gguf file.")],
    data: Annotated[
        Path, typer.Argument(help="JSONL with prompt and completion, or with text, on each line.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the adapter.")],
    settings: TrainSettings,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Use a folder that has files.")
    ] = False,
) -> None:
    """Fine-tune a model: 4-bit frozen weights, LoRA adapters, loss on the completions only."""
    examples = read(data)
    require("transformers", "accelerate")
    # transformers takes seconds to import, so what needs it comes after the quick checks
    from fastlora.cli import encoding, models, training

    training.refuse_many_processes()
    config = training.lora_config(settings, model)
    training.check_output(output, reuse=overwrite)
    base = models.load(model, settings)
    models.describe(base, settings)
    dataset = encoding.encode(examples, base.tokenizer, settings.template, settings.max_length)
    encoding.describe(dataset, settings.max_length)
    result = training.train(base, dataset, settings, config, output)
    training.summarise(result, output)
