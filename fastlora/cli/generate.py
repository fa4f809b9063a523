"""`fastlora generate`: complete one prompt."""

from pathlib import Path
from typing import Annotated

import typer

from fastlora.cli.console import UserError, check_text, reported, require
from fastlora.cli.settings import Dtype, Quantize, TrainSettings

AS_TRAINED = "as in training"


def generate(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder or a .gguf file.")],
    prompt: Annotated[str, typer.Option(help="What to complete.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter; without it the base model answers.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    quantize: Annotated[
        Quantize | None,
        typer.Option(help="How the frozen weights are kept.", show_default=AS_TRAINED),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Compute dtype.", show_default=AS_TRAINED)
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help=r"What a prompt becomes: {prompt}, \n.", show_default=AS_TRAINED),
    ] = None,
) -> None:
    """Complete a prompt with a model and an adapter, greedily."""
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UserError(f"adapter must be a folder with adapter_config.json, got {adapter}")
    check_text(prompt, "prompt")
    given = {"quantize": quantize, "dtype": dtype, "template": template}
    settings = TrainSettings.load(adapter or Path(), **given)
    require("transformers", "accelerate")
    from fastlora.cli import generation, models

    base = models.load(model, settings)
    if adapter is not None:
        with reported(OSError, ValueError, NotImplementedError):
            models.fastlora.load_adapter(base.model, adapter)
    generation.stream(base, prompt, settings.template, max_new_tokens)
