"""The course of `fastlora merge`: measure, merge, write, read again, measure, say what next."""

import gc
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fastlora
from fastlora.atomic import replaced_folder
from fastlora.cli import drift, models, runs
from fastlora.cli.console import UserError, console, note, reported, size
from fastlora.cli.data import Data
from fastlora.cli.models import DTYPES, Base
from fastlora.cli.settings import TrainSettings
from fastlora.integrations.transformers import write_nf4

_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Merge:
    """What is merged, and into what.

    Attributes:
        trained: settings of the run that made the adapter.
        adapter: its folder.
        output: new or empty folder for the merged model.
        quantize: none: into the weights as the model's files have them. nf4: into their NF4
            values, as in training. None: what the files have, so none unless these are NF4.
        format: bf16, fp16, fp32 or nf4, of what is written. None: 16 bits, of the kind that the
            model's files have, else of the kind that was trained in, else bf16.
        report: read what was written, and compare it with what was trained.
        data: to measure on, besides the sentences; None: only those.
    """

    trained: TrainSettings
    adapter: Path
    output: Path
    quantize: str | None = None
    format: str | None = None
    report: bool = True
    data: Data | None = None


def run(merge: Merge) -> None:
    """Merge an adapter, write the model and print what came of it.

    Args:
        merge: what, and into what.

    Raises:
        UserError: the parts do not fit together, or a weight does not fit in the format.
    """
    before = _measure(merge) if merge.report else None
    target = _target(merge)
    base = runs.load(target.settings, merge.adapter, merge.trained.classes, target.loaded)
    models.describe(base, target.settings)
    with console.status("merging"):
        _merge(base, target)
    _write(base, merge.output, target.format)
    del base
    gc.collect()
    if before is not None:
        _report(before, merge, target)
    _what_next(merge.output, target.format, bool(merge.trained.classes))


def _measure(merge: Merge) -> drift.Measured:
    """The model as it was trained, which is gone again before another is loaded."""
    base = runs.load(merge.trained, merge.adapter, merge.trained.classes)
    return drift.measure(base, merge.trained, merge.data)


@dataclass(frozen=True)
class _Target:
    """How the model is loaded that the adapter is merged into, and how it is written.

    Attributes:
        settings: to load it with.
        loaded: dtype to load it in.
        format: bf16, fp16, fp32 or nf4.
        dtype: that is written, of what is dense.
    """

    settings: TrainSettings
    loaded: torch.dtype
    format: str
    dtype: torch.dtype


def _target(merge: Merge) -> _Target:
    source = models.find(merge.trained.model, labelled=bool(merge.trained.classes))
    quantize = merge.quantize or ("nf4" if source.nf4 else "none")
    stored = models.stored_dtype(source)
    computed = DTYPES[models.pick_dtype(merge.trained.dtype)]
    half = next((_HALVES[dtype] for dtype in (stored, computed) if dtype in _HALVES), "bf16")
    format = merge.format or half
    dtype = DTYPES[half if format == "nf4" else format]
    if quantize == "nf4" and not source.nf4:
        loaded = computed  # the NF4 of training is that of weights in its dtype
    elif dtype == stored and (format != "nf4" or source.nf4):
        loaded = stored
    else:  # holds every stored value, so that only what is written is rounded, and once
        loaded = torch.float32
    return _Target(replace(merge.trained, quantize=quantize), loaded, format, dtype)


def _report(before: drift.Measured, merge: Merge, target: _Target) -> None:
    # what is written, in the arithmetic of before: so that the weights alone make the difference
    again = replace(
        merge.trained,
        model=str(merge.output),
        quantize="nf4" if target.format == "nf4" else "none",
    )
    merged = runs.load(again, None, merge.trained.classes)
    drift.report(before, merged, target.format)
    if target.settings.quantize == "none" and merge.trained.quantize == "nf4":
        console.print(
            "\nThe adapter was trained over the NF4 values of the weights, and is merged into the "
            "weights themselves, which is part of the difference. --quantize nf4 merges it into "
            "what it was trained over."
        )


def _merge(base: Base, target: _Target) -> None:
    nf4 = target.format == "nf4"
    quantises = nf4 and target.settings.quantize == "none"
    if base.model.dtype != target.dtype or quantises:
        base.model.float()
    with reported(ValueError, NotImplementedError, torch.OutOfMemoryError):
        fastlora.merge_lora(base.model, quantize=nf4)
        if quantises:
            blocks = target.settings.blocksize, target.settings.double_quant
            fastlora.quantize_model(base.model, blocksize=blocks[0], double_quant=blocks[1])
    base.model.to(target.dtype)
    for name, weight in base.model.named_parameters():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(
                f"every merged weight must fit in {target.format}, got Inf or NaN in {name}"
            )


def _write(base: Base, output: Path, format: str) -> None:
    # how it was loaded is nothing of the model: the reader of GGUF and of tokenizers leave it there
    vars(base.model.config).pop("_model_name_or_path", None)
    for name in ("is_local", "local_files_only"):
        base.tokenizer.init_kwargs.pop(name, None)
    with console.status("writing"), reported(OSError, ValueError, NotImplementedError):
        if output.is_dir():
            output.rmdir()  # empty; it comes back whole
        with replaced_folder(output) as folder:
            if format == "nf4":
                write_nf4(base.model, folder)
            else:
                base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
    total = sum(file.stat().st_size for file in output.iterdir())
    note("saved", f"{output}, {format}, {size(total)}, with tokenizer")


def _what_next(output: Path, format: str, classifies: bool) -> None:
    folder = str(output.absolute())
    if classifies:
        _commands("Evaluate it", shlex.join(["fastlora", "eval", folder]) + " DATA")
        return
    if format == "nf4":
        console.print("\nFor GGUF, merge to 16 bits: llama.cpp does not read NF4.")
        serve = ["vllm", "serve", folder, "--quantization", "bitsandbytes"]
    else:
        kind = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}[format]
        whole, small = f"{folder}.gguf", f"{folder}-Q4_K_M.gguf"
        convert = ["python", "convert_hf_to_gguf.py", folder, "--outfile", whole]
        _commands(
            "To GGUF, in the folder of llama.cpp",
            shlex.join([*convert, "--outtype", kind]),
            shlex.join(["llama-quantize", whole, small, "Q4_K_M"]),
        )
        serve = ["vllm", "serve", folder]
    _commands("To serve it with vLLM", shlex.join(serve))


def _commands(what: str, *lines: str) -> None:
    console.print(f"\n{what}:")
    for line in lines:
        # whole, so that it can be pasted
        print(line)
