"""A model with the adapter of a run, for the commands that use what `fastlora train` made."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlora.cli.console import UserError
from fastlora.cli.settings import SETTINGS_FILE, Dtype, Quantize, TrainSettings

if TYPE_CHECKING:
    import torch

    from fastlora.cli.models import Base

_as_trained = {"show_default": "as in training"}
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        help="A Hugging Face folder, a .gguf file, or a name on the hub.",
        show_default="the one that the adapter was trained on",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT", help=r"What a prompt becomes: {prompt}, \n; or chat.", **_as_trained
    ),
]
FieldsOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="What fields are called in the data: prompt=question.",
        **_as_trained,
    ),
]
QuantizeOption = Annotated[
    Quantize | None,
    typer.Option(
        help="How the frozen weights are kept.",
        show_default="as in training; without an adapter as they are stored",
    ),
]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(metavar="TYPE", help="Compute in auto, fp32, bf16 or fp16.", **_as_trained),
]
_CONFIG_FILE = "adapter_config.json"


def settings_of(model: str | None, adapter: Path | None, **given: Any) -> TrainSettings:
    """The settings to use a model with, those of the run that made the adapter where it has some.

    Args:
        model: folder, file or name; None: the one that the adapter was trained on.
        adapter: its folder, if there is one.
        **given: settings to use instead; None: those of the run, or without one the defaults, but
            with weights as they are stored.

    Returns:
        The settings, with a model.

    Raises:
        UserError: there is no such adapter, its settings are not readable, or no model is named.
    """
    if adapter is None:
        if model is None:
            raise UserError("model must be given where there is no adapter that names it")
        chosen = {name: value for name, value in given.items() if value is not None}
        # a model that stands alone, such as a merged one, is taken as it is
        return TrainSettings(**{"quantize": "none"} | chosen, model=model)
    if not (adapter / _CONFIG_FILE).is_file():
        raise UserError(f"adapter must be a folder with {_CONFIG_FILE}, got {adapter}")
    settings = TrainSettings.load(adapter, model=model, **given)
    if settings.model is None:
        raise UserError(
            f"model must be given for an adapter without a model in {SETTINGS_FILE}, got {adapter}"
        )
    return settings


def load(
    settings: TrainSettings,
    adapter: Path | None,
    labels: tuple[str, ...] = (),
    dtype: "torch.dtype | None" = None,
) -> "Base":
    """Load a model and its adapter.

    Args:
        settings: from `settings_of`.
        adapter: its folder, if there is one.
        labels: the classes of a classifier.
        dtype: of the dense weights, instead of that of the settings.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: it cannot be loaded, or the adapter is of another kind of model.
    """
    from fastlora.cli import models

    _check_task(adapter, bool(labels))
    source = models.find(settings.model, labelled=bool(labels))
    if adapter is None and source.nf4:
        settings = replace(settings, quantize="nf4")  # as it is stored
    base = models.load(source, settings, labels, dtype)
    models.add_adapter(base, adapter)
    return base


def _check_task(adapter: Path | None, labelled: bool) -> None:
    """Without this a classifier's head would be random, with an adapter of a language model."""
    if adapter is None:
        return
    try:
        task = json.loads((adapter / _CONFIG_FILE).read_bytes()).get("task_type")
    except (AttributeError, OSError, RecursionError, ValueError):
        return  # reading the adapter says what is wrong
    if labelled and task != "SEQ_CLS":
        raise UserError(f"adapter must be one of a classifier (SEQ_CLS), got {task} in {adapter}")
    if not labelled and task == "SEQ_CLS":
        raise UserError(
            f"adapter must be one of a language model, got {adapter}, which classifies: "
            "labels must be given, as it has none in its settings"
        )
