"""`fastlora merge`: put an adapter into the weights, for programs that know no adapters."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastlora.cli import runs
from fastlora.cli.console import UserError, check_output, require
from fastlora.cli.data import read
from fastlora.cli.settings import Quantize

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
            show_default="16 bits: as the model has them, or as in training, or bf16",
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
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="Merge into the model's own weights (none), or their NF4 values as in training.",
            show_default="what the model's files have",
        ),
    ] = None,
    dtype: runs.DtypeOption = None,
) -> None:
    """Merge an adapter into its model.

    It goes into the weights as the model's files have them, also when it was trained over 4 bits of
    them (--quantize nf4 takes those 4 bits). They are summed in fp32 and rounded once. What is
    written is read again, and compared with the model as it was trained.
    """
    if check_data is not None and not report:
        raise UserError("check-data must come with a report, got --no-report")
    check_output(output)
    trained = runs.settings_of(model, adapter, template=template, fields=fields, dtype=dtype)
    data = None if check_data is None else read(check_data, trained.field_names)
    require("transformers", "accelerate")
    from fastlora.cli import merging

    merging.run(merging.Merge(trained, adapter, output, quantize, format, report, data))
