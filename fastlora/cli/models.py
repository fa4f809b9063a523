"""Models and tokenizers as the user has them: a local Hugging Face folder or a GGUF file."""

import contextlib
import io
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

import fastlora
from fastlora.cli.console import UserError, console, note, reported, size
from fastlora.cli.settings import TrainSettings

# what transformers' readers raise on files that are damaged, of another kind or of values that they
# do not check, and where a reader is not installed
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
    struct.error,
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A loaded model.

    Attributes:
        path: where it came from.
        model: on the device it runs on, in eval mode.
        tokenizer: its tokenizer.
        fp32_bytes: what all its weights take in fp32.
        weight_bytes: what they take now.
    """

    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fp32_bytes: int
    weight_bytes: int


def device() -> torch.device:
    """The device that models run on: the first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str) -> torch.dtype:
    """The compute dtype that an option names.

    Args:
        name: auto, fp32, bf16 or fp16; auto is bf16 where the hardware multiplies in bf16.

    Returns:
        The dtype.

    Raises:
        UserError: fp16 without a GPU.
    """
    on_gpu = device().type == "cuda"
    if name == "fp16" and not on_gpu:
        raise UserError("dtype fp16 must run on a GPU, got cpu; use fp32 or bf16")
    if name != "auto":
        return DTYPES[name]
    fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_bf16()
    return torch.bfloat16 if fast_bf16 else torch.float32


def load(path: Path, settings: TrainSettings) -> Base:
    """Load a model and quantise it.

    Args:
        path: a folder with config.json, weights and tokenizer, or a .gguf file.
        settings: dtype, quantize, blocksize and double_quant are read.

    Returns:
        The model on its device.

    Raises:
        UserError: this is not a model that can be loaded, or the settings do not fit it.
    """
    dtype = pick_dtype(settings.dtype)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with console.status("loading the model"):
        tokenizer = _load_tokenizer(path)
        model = _load_model(path, dtype)
        fp32_bytes = 4 * sum(p.numel() for p in model.parameters())
        if settings.quantize == "nf4":
            # RuntimeError: FASTLORA_BACKEND names what does not run here
            with reported(ValueError, RuntimeError):
                fastlora.quantize_model(
                    model, blocksize=settings.blocksize, double_quant=settings.double_quant
                )
        model.to(device()).eval()
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return Base(path, model, tokenizer, fp32_bytes, weight_bytes)


def describe(base: Base, settings: TrainSettings) -> None:
    """Print what was loaded."""
    kind = "NF4" if settings.quantize == "nf4" else "dense"
    dtype = str(base.model.dtype).removeprefix("torch.")
    note(
        "model",
        f"{base.path.name}: {base.fp32_bytes / 4e6:.4g} M weights, {kind} in {dtype}, "
        f"{size(base.weight_bytes)} (fp32: {size(base.fp32_bytes)})",
    )


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    folder, extra = _source(path)
    file = path / "tokenizer.json"
    if file.is_file() and not isinstance(_json_object(file).get("model"), dict):
        raise UserError(f"{file} must be a tokenizer, with an object model, got none")
    # Exception itself is what tokenizers raises on any value that it does not know
    with reported(Exception, about=f"{path} cannot be loaded: "):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **extra)


def _load_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    folder, extra = _source(path)
    # the GGUF reader draws a bar that no setting turns off
    quiet = contextlib.redirect_stderr(io.StringIO()) if extra else contextlib.nullcontext()
    with reported(*UNREADABLE, about=f"{path} cannot be loaded: "), quiet:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, **extra
        )
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise UserError(
            f"{path} must hold every weight, got none for {missing[0]} ({len(missing)} missing)"
        )
    if extra:
        _drop_gguf_marks(model)
    return model


def _source(path: Path) -> tuple[Path, dict[str, str]]:
    """What from_pretrained takes for a path, checked as far as one line of error needs."""
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, {"gguf_file": path.name}
    config = path / "config.json"
    if not config.is_file():
        raise UserError(f"model must be a folder with config.json or a .gguf file, got {path}")
    values = _json_object(config)
    kind = values.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config}: model_type must be a causal language model, got {kind!r}")
    quantised = values.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{config}: the model must not be quantised already, got {method!r}")
    return path, {}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must be a JSON object, got {type(values).__name__}")
    return values


def _drop_gguf_marks(model: PreTrainedModel) -> None:
    # the weights are dense now, but Trainer and save_pretrained refuse what looks quantised;
    # older transformers do not mark such models
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
        model.config._is_quantized = False


def _cpu_bf16() -> bool:
    # torch.cpu.get_capabilities() is public but younger than the oldest torch that is supported
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
