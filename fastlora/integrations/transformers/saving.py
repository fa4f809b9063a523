"""Models with `Linear4bit` layers, written as transformers and bitsandbytes read them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastlora.atomic import replaced_folder
from fastlora.integrations.transformers.adopt import reversible
from fastlora.integrations.transformers.tensors import bnb_config, bnb_state, four_bit, has_adapters
from fastlora.model import adapted, unwrap
from fastlora.nn import Linear4bit

_CONFIG = "config.json"


def save_nf4(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
) -> Path:
    """Write a model with `Linear4bit` layers as transformers and bitsandbytes read it, atomically.

    Args:
        model: of transformers, without adapters.
        folder: must not exist; nothing is there under its name until all is on disk.
        max_shard_size: bytes of one file, or a number with a unit such as "5GB".

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        NotImplementedError: bitsandbytes would not read a layer in 4 bits, or a tensor is sharded.
        OSError: the files cannot be written.
        ValueError: the model is not one of transformers, has adapters, no 4-bit layers, or tensors
            without values.
    """
    parts = _savable(model)
    with replaced_folder(Path(folder)) as new:
        _write(*parts, new, max_shard_size)
    return Path(folder)


def write_nf4(
    model: nn.Module, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
) -> None:
    """Write the files of `save_nf4` into a folder that is there, beside what else it has.

    Args:
        model: as in `save_nf4`.
        folder: exists; whoever made it sees to it that it is complete or not there.
        max_shard_size: as in `save_nf4`.

    Raises:
        NotImplementedError: as in `save_nf4`.
        OSError: the files cannot be written.
        ValueError: as in `save_nf4`.
    """
    _write(*_savable(model), Path(folder), max_shard_size)


@contextmanager
def _never_quantised(root: PreTrainedModel) -> Iterator[None]:
    """Hide what transformers remembers of a quantizer, ours or one whose layers were adopted.

    With it save_pretrained would ignore the tensors that it is given.
    """
    names = ("hf_quantizer", "_weight_conversions")
    hidden = {name: vars(root).pop(name) for name in names if name in vars(root)}
    if "_weight_conversions" in hidden:
        root._weight_conversions = reversible(hidden["_weight_conversions"])
    try:
        yield
    finally:
        vars(root).update(hidden)


def _savable(model: nn.Module) -> tuple[PreTrainedModel, dict[str, Linear4bit], dict[str, Any]]:
    """The unwrapped model, its 4-bit layers by path, and what bitsandbytes must know of them."""
    root = unwrap(model)
    _check_savable(root)
    layers = four_bit(root)
    if not layers:
        raise ValueError(f"the model must have 4-bit layers, got none in {type(root).__name__}")
    return root, layers, bnb_config(root, layers)


def _write(
    root: PreTrainedModel,
    layers: dict[str, Linear4bit],
    quantization: dict[str, Any],
    folder: Path,
    max_shard_size: int | str,
) -> None:
    with _never_quantised(root):
        state = bnb_state(root, layers)
        root.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    file = folder / _CONFIG
    config = json.loads(file.read_bytes()) | {"quantization_config": quantization}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_savable(root: nn.Module) -> None:
    if not isinstance(root, PreTrainedModel):
        raise ValueError(f"the model must be one of transformers, got {type(root).__name__}")
    if has_adapters(root):
        some = next((path for path, _ in adapted(root)), "layers of PEFT")
        raise ValueError(
            f"the model must have no adapters, got some on {some}: merge or unload them first"
        )
    for name, parameter in root.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise NotImplementedError(f"saving sharded tensors is not supported, got {name}")
        if parameter.is_meta:
            raise ValueError(f"{name} must have values, got a tensor on the meta device")
