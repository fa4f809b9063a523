"""Models and tokenizers as the user has them: a Hugging Face folder, a GGUF file, a hub's name."""

import contextlib
import io
import json
import os
import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

import fastlora
from fastlora.cli.console import UserError, console, note, reported, size
from fastlora.cli.settings import TrainSettings
from fastlora.integrations.transformers import check_quantization, load_bnb_4bit
from fastlora.report import count_parameters

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
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# what bitsandbytes keeps beside the packed weights
_NF4_PART = re.compile(r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.")
_HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model is, after the checks that need no weights.

    Attributes:
        name: as the user gave it.
        folder: that holds its files.
        gguf: name of the GGUF file in the folder; None: a folder as transformers saves it.
        nf4: whether the weights are 4-bit already, as bitsandbytes writes them.
    """

    name: str
    folder: Path
    gguf: str | None = None
    nf4: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' from_pretrained takes beside the folder."""
        files = {"gguf_file": self.gguf} if self.gguf else {}
        return {"local_files_only": True, **files}


@dataclass(frozen=True)
class Base:
    """A loaded model.

    Attributes:
        source: where it came from.
        model: on the device it runs on, in eval mode.
        tokenizer: its tokenizer.
        labels: the classes of a sequence classifier; empty for a language model.
        fresh: names of the weights that no file had: a new head's, which are random.
        fp32_bytes: what all its weights take in fp32.
        weight_bytes: what they take now.
    """

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...]
    fresh: tuple[str, ...]
    fp32_bytes: int
    weight_bytes: int

    @property
    def pad_id(self) -> int:
        """The token that rows are padded with."""
        return pad_id(self.tokenizer)

    @property
    def positions(self) -> int:
        """The most tokens of a row that the model knows positions for."""
        config = self.model.config.get_text_config()
        known = getattr(config, "max_position_embeddings", None) or sys.maxsize
        # some encoders keep the first ones for padding, which their tokenizer knows
        return min(known, self.tokenizer.model_max_length) if self.labels else known


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token for padding, whose places are masked: the end of sequence where none is meant."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


def device() -> torch.device:
    """The device that models run on: the first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str) -> str:
    """The compute dtype that an option means on this machine.

    Args:
        name: auto, fp32, bf16 or fp16; auto is bf16 where the hardware multiplies in bf16.

    Returns:
        fp32, bf16 or fp16.

    Raises:
        UserError: fp16 without a GPU.
    """
    on_gpu = device().type == "cuda"
    if name == "fp16" and not on_gpu:
        raise UserError("dtype fp16 must run on a GPU, got cpu; use fp32 or bf16")
    if name != "auto":
        return name
    fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_bf16()
    return "bf16" if fast_bf16 else "fp32"


def find(name: str, labelled: bool = False) -> Source:
    """Find a model, and download it where it is on the hub and not here yet.

    Args:
        name: a folder, a .gguf file, or organisation/model on the Hugging Face hub. From there only
            JSON, tokenizer files and safetensors are taken, nothing that is unpickled or run.
        labelled: whether it is to classify sequences; else it is a causal language model.

    Returns:
        Where it is.

    Raises:
        UserError: there is no such model, or it is of a kind that cannot be trained here.
    """
    path = Path(name)
    # not Path.exists, which raises on names that are too long
    if path.suffix.lower() == ".gguf" and os.path.isfile(path):
        return Source(name, path.parent, gguf=path.name)
    if not os.path.exists(path) and HUB_NAME.fullmatch(name):
        path = _download(name)
    config = path / "config.json"
    if not os.path.isfile(config):
        raise UserError(
            "model must be a folder with config.json, a .gguf file or a name on the hub "
            f"(organisation/model), got {name}"
        )
    values = _json_object(config)
    kind = values.get("model_type")
    what = "a sequence classifier" if labelled else "a causal language model"
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if labelled else MODEL_FOR_CAUSAL_LM_MAPPING
    known = isinstance(kind, str) and kind in CONFIG_MAPPING
    if not known or CONFIG_MAPPING[kind] not in mapping:
        raise UserError(f"{config}: model_type must be {what}, got {kind!r}")
    quantised = values.get("quantization_config")
    if quantised is not None:
        if not isinstance(quantised, dict):
            raise UserError(f"{config}: quantization_config must be an object, got {quantised!r}")
        with reported(ValueError, NotImplementedError, about=f"{config}: "):
            check_quantization(quantised)
    return Source(name, path, nf4=quantised is not None)


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that holds every dense weight of a model as its files have it.

    Args:
        source: from `find`.

    Returns:
        bf16 or fp16 if all have it, else fp32.

    Raises:
        UserError: a file is damaged.
    """
    found = set()
    for file in [] if source.gguf else source.folder.glob("*.safetensors"):
        with (
            reported(OSError, SafetensorError, about=f"{file} cannot be read: "),
            safe_open(file, "pt") as opened,
        ):
            names = [name for name in opened.keys() if not _NF4_PART.search(name)]  # noqa: SIM118
            found |= {opened.get_slice(name).get_dtype() for name in names}
    floats = {kind for kind in found if kind.startswith(("F", "BF"))}
    return _HALVES.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32


def load(
    source: Source,
    settings: TrainSettings,
    labels: Sequence[str] = (),
    dtype: torch.dtype | None = None,
) -> Base:
    """Load a model and quantise it.

    Args:
        source: from `find`.
        settings: dtype, quantize, blocksize and double_quant are read.
        labels: the classes of a sequence classifier, in the order of its outputs.
        dtype: of the dense weights, instead of settings.dtype: to merge them, not to compute.

    Returns:
        The model on its device.

    Raises:
        UserError: this is not a model that can be loaded, or the settings do not fit it.
    """
    dtype = dtype or DTYPES[pick_dtype(settings.dtype)]
    if source.nf4 and settings.quantize != "nf4":
        raise UserError(
            f"quantize must be nf4 for {source.name}, which has 4-bit weights, got none"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with console.status("loading the model"):
        tokenizer = _load_tokenizer(source)
        model, fresh = _load_model(source, dtype, labels)
        if labels:
            # a decoder finds the last token of a sequence by its padding
            model.config.get_text_config().pad_token_id = pad_id(tokenizer)
        fp32_bytes = 4 * count_parameters(model)[1]
        if source.nf4:
            _check_quantised(source, model, settings)
        elif settings.quantize == "nf4":
            # RuntimeError: FASTLORA_BACKEND names what does not run here
            with reported(ValueError, RuntimeError):
                fastlora.quantize_model(
                    model, blocksize=settings.blocksize, double_quant=settings.double_quant
                )
        model.to(device()).eval()
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return Base(source, model, tokenizer, tuple(labels), fresh, fp32_bytes, weight_bytes)


def add_adapter(base: Base, adapter: Path | None) -> None:
    """Load an adapter into a model.

    Args:
        base: without adapters.
        adapter: folder of the adapter; None: nothing is done.

    Raises:
        UserError: there is none, it is damaged, or it does not fit the model.
    """
    if adapter is not None:
        with reported(OSError, ValueError, NotImplementedError):
            fastlora.load_adapter(base.model, adapter)
        base.model.eval()


def describe(base: Base, settings: TrainSettings) -> None:
    """Print what was loaded."""
    kind = "NF4" if settings.quantize == "nf4" else "dense"
    dtype = str(base.model.dtype).removeprefix("torch.")
    head = f", {len(base.labels)} classes" if base.labels else ""
    note(
        "model",
        f"{base.source.gguf or Path(base.source.name).name}: {base.fp32_bytes / 4e6:.4g} M weights"
        f"{head}, {kind} in {dtype}, {size(base.weight_bytes)} (fp32: {size(base.fp32_bytes)})",
    )


def _download(name: str) -> Path:
    with (
        console.status(f"looking {name} up on the hub"),
        reported(OSError, ValueError, about=f"model must be there or on the hub, got {name}: "),
    ):
        # no pickles, and nothing out of subfolders, where other formats lie
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))


def _load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    file = source.folder / "tokenizer.json"
    if not source.gguf and file.is_file() and not isinstance(_json_object(file).get("model"), dict):
        raise UserError(f"{file} must be a tokenizer, with an object model, got none")
    # Exception itself is what tokenizers raises on any value that it does not know
    with reported(Exception, about=f"{source.name} cannot be loaded: "):
        return AutoTokenizer.from_pretrained(source.folder, **source.arguments)


def _load_model(
    source: Source, dtype: torch.dtype, labels: Sequence[str]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model, and the names of its weights that no file had."""
    auto: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    arguments = {**source.arguments, "dtype": dtype, "output_loading_info": True}
    if labels:
        ids = dict(enumerate(labels))
        arguments |= {"id2label": ids, "label2id": {label: i for i, label in ids.items()}}
        # a head for other classes is made anew
        arguments |= {"num_labels": len(labels), "ignore_mismatched_sizes": True}
    read = partial(load_bnb_4bit, auto_class=auto) if source.nf4 else auto.from_pretrained
    # the GGUF reader draws a bar that no setting turns off
    quiet = contextlib.redirect_stderr(io.StringIO()) if source.gguf else contextlib.nullcontext()
    with reported(*UNREADABLE, about=f"{source.name} cannot be loaded: "), quiet:
        model, loaded = read(source.folder, **arguments)
    fresh = _missing(source, model, loaded, bool(labels))
    if source.gguf:
        _drop_gguf_marks(model)
    return model, fresh


def _missing(
    source: Source, model: PreTrainedModel, loaded: dict[str, Any], labelled: bool
) -> tuple[str, ...]:
    """What did not come from the files, which only the head of a new task may do."""
    unfit = {key for key, *_ in loaded.get("mismatched_keys") or ()}
    missing = sorted({*loaded["missing_keys"], *unfit})
    body = f"{model.base_model_prefix}." if labelled else ""
    needed = [key for key in missing if key.startswith(body)]
    if needed:
        raise UserError(
            f"{source.name} must hold every weight in its shape, got none for {needed[0]} "
            f"({len(needed)} missing)"
        )
    return tuple(missing)


def _check_quantised(source: Source, model: PreTrainedModel, settings: TrainSettings) -> None:
    """The weights of a 4-bit checkpoint stay as they are, so the settings must be theirs."""
    wanted = settings.blocksize, settings.double_quant
    for layer in model.modules():
        if not isinstance(layer, fastlora.nn.Linear4bit):
            continue
        got = layer.blocksize, layer.nf4.nested
        # the defaults ask for nothing
        if wanted not in (got, (TrainSettings.blocksize, TrainSettings.double_quant)):
            raise UserError(
                f"blocksize and double-quant must be those of {source.name}, {got[0]} and "
                f"{got[1]}, got {wanted[0]} and {wanted[1]}"
            )


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
