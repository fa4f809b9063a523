"""`fastlora merge`: put an adapter into the weights, for programs that know no adapters."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastlora.cli import runs
from fastlora.cli.console import UserError, check_output, require
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
    report: Annotated[
        bool,
        typer.Option(
            "--report/--no-report",
            help="Compare what was written with the unmerged model: logits, perplexity.",
        ),
    ] = True,
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

    The model is loaded as in training, or dense with --quantize none: then an adapter trained over
    4 bits goes into the original weights. They are summed in fp32 and rounded once. What is written
    is read again, and compared with the unmerged model.
    """
    if check_data is not None and not report:
        raise UserError("check-data must come with a report, got --no-report")
    check_output(output)
    settings = runs.settings_of(
        model, adapter, template=template, fields=fields, quantize=quantize, dtype=dtype
    )
    data = None
    if check_data is not None:
        data = read(check_data, settings.field_names)
    require("transformers", "accelerate")
    from fastlora.cli import merging

    merging.run(settings, adapter, output, format, data, report)
