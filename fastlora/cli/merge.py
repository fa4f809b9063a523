"""`fastlora merge`: put an adapter into the weights, for programs that know no adapters."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastlora.cli import runs
from fastlora.cli.console import check_output, require
from fastlora.cli.data import read

Format = Literal["bf16", "fp16", "fp32", "nf4"]


def merge(
    model: runs.ModelArgument = None,
    adapter: Annotated[Path, typer.Option(help="Folder of the adapter.", show_default=False)] = ...,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="New folder for the merged model.", show_default=False),
    ] = ...,
    format: Annotated[
        Format | None,
        typer.Option(
            help="Of the merged weights.",
            show_default="as in training if that is 16-bit, else bf16",
        ),
    ] = None,
    check_data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Data to measure the drift on, beside a few sentences."),
    ] = None,
    template: runs.TemplateOption = None,
    fields: runs.FieldsOption = None,
    quantize: runs.QuantizeOption = None,
    dtype: runs.DtypeOption = None,
) -> None:
    """Merge an adapter into its model.

    The model is loaded as in training, the weights are summed in fp32 and rounded once. What is
    written is read again, and its logits are compared with those of the unmerged model.
    """
    check_output(output)
    settings = runs.settings_of(
        model, adapter, template=template, fields=fields, quantize=quantize, dtype=dtype
    )
    data = None
    if check_data is not None:
        data = read(check_data, settings.field_names)
    require("transformers", "accelerate")
    from fastlora.cli import merging

    merging.run(settings, adapter, output, format, data)
