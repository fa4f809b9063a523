"""4-bit checkpoints of bitsandbytes loaded into our layers; bitsandbytes is not needed.

transformers reads the files, so that shards, renamed keys and tied weights are its own; a quantizer
in place of bitsandbytes' makes `Linear4bit` layers of the bytes.
"""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from fastlora.integrations.transformers.formats import check_quantization, check_version
from fastlora.integrations.transformers.quantizer import NF4Quantizer

_KEYS = ("bitsandbytes_4bit", "bitsandbytes_8bit")  # of bitsandbytes in transformers' mapping
_LOCK = threading.RLock()
_theirs: dict[str, Any] = {}  # what is taken over


def take_over_bitsandbytes() -> None:
    """Let `from_pretrained` read all checkpoints of bitsandbytes into `Linear4bit` from now on.

    NF4 checkpoints need no other argument and no bitsandbytes. FP4 and int8 ones are refused with
    a `NotImplementedError`, and so are dense models with a `BitsAndBytesConfig`: they would be
    quantised by other rules than `FastLoraConfig`'s. Calling it again does nothing.
    """
    with _LOCK:
        if not _theirs:
            _theirs.update({key: AUTO_QUANTIZER_MAPPING[key] for key in _KEYS})
            AUTO_QUANTIZER_MAPPING.update(dict.fromkeys(_KEYS, NF4Quantizer))


def give_back_bitsandbytes() -> None:
    """Undo `take_over_bitsandbytes`; models that are loaded stay as they are."""
    with _LOCK:
        AUTO_QUANTIZER_MAPPING.update(_theirs)
        _theirs.clear()


def load_bnb_4bit(
    folder: str | os.PathLike[str], auto_class: Any, dtype: torch.dtype | str, **kwargs: Any
) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model whose linear layers are stored in NF4; they become `Linear4bit`.

    The packed bytes and statistics are those of the files, neither decoded nor copied. Layers that
    the files hold dense stay dense, as do layers that the files do not hold, which transformers
    reports as missing. While it loads, no other thread should load a bitsandbytes model.

    Args:
        folder: as written by `save_pretrained` or `save_nf4`, one safetensors file or shards.
        auto_class: whose `from_pretrained` loads, such as `AutoModelForCausalLM`.
        dtype: of everything else, and of what the 4-bit layers compute in: fp32, fp16, bf16.
        kwargs: for `from_pretrained`, such as `num_labels` or `output_loading_info`.

    Returns:
        What `from_pretrained` returns: the model in eval mode, with `output_loading_info=True` the
        pair of model and information.

    Raises:
        FileNotFoundError: there is no config.json in the folder.
        KeyError: statistics of a weight are missing; the message names them.
        NotImplementedError: the weights are quantised in another format, or transformers merges
            4-bit weights of several layers.
        RuntimeError: transformers is too old, or refuses the files, such as weights of other shapes
            without `ignore_mismatched_sizes`.
        ValueError: the folder is not quantised, or a 4-bit weight is damaged or does not fit; the
            message names it.
    """
    check_version()
    config = json.loads((Path(folder) / "config.json").read_bytes())
    found = config.get("quantization_config")
    if found is None:
        found = (config.get("text_config") or {}).get("quantization_config")
    if found is None:
        raise ValueError(f"config.json must have quantization_config, got none in {folder}")
    check_quantization(found)
    with _taken_over():
        return auto_class.from_pretrained(folder, dtype=dtype, **kwargs)


@contextmanager
def _taken_over() -> Iterator[None]:
    with _LOCK:
        before = bool(_theirs)
        take_over_bitsandbytes()
        try:
            yield
        finally:
            if not before:
                give_back_bitsandbytes()
