"""Adapter files in PEFT's format, written atomically and read strictly.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Files written here also carry
sha256 sums of tensors and settings in the safetensors metadata, which PEFT ignores. Nothing is ever
unpickled.
"""

import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fastlora.atomic import sync_folder, write_file
from fastlora.config import LoraConfig
from fastlora.model import (
    adapted,
    adapters_of,
    check_adapter,
    install,
    original_of,
    state_of,
    unwrap,
)
from fastlora.nf4 import FLOATS
from fastlora.nn import LoraLinear, SavedModule, is_conv1d
from fastlora.targets import Plan, make_plan, with_task_heads

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."  # PEFT wraps the model twice
_MARK = "fastlora"  # our key in the metadata
_STAMP = re.compile(r"1 tensors=([0-9a-f]{64}) config=([0-9a-f]{64})")
_MAX_JSON = 32 * 2**20  # bytes; a header or config beyond is an attack or garbage
_STALE = 3600  # seconds; no save takes that long


class AdapterError(ValueError):
    """An adapter on disk or in memory that is damaged, incomplete or not the one expected."""


@dataclass(frozen=True)
class _Stamp:
    """The sums in a file: of its tensors, and of the settings that belong to them."""

    tensors: str
    config: str

    def __str__(self) -> str:
        return f"1 tensors={self.tensors} config={self.config}"

    @property
    def pair(self) -> str:
        """Names the config that is written together with the tensors."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str | None = None
) -> Path:
    """Write an adapter in PEFT's format, atomically.

    Both files are written under temporary names and synchronised to disk before they replace what
    is there. After a crash or power cut at any moment `load_adapter` finds the old or the new
    adapter, complete.

    Args:
        model: with adapters.
        path: a folder, made if missing.
        adapter_name: of the adapter; the active one if None.

    Returns:
        The folder.

    Raises:
        AdapterError: a tensor is not finite or does not have its full shape.
        NotImplementedError: a tensor is sharded.
        OSError: the files cannot be written; what was there stays.
        ValueError: there is no such adapter.
    """
    root = unwrap(model)
    name = state_of(root).active if adapter_name is None else adapter_name
    check_adapter(root, name)
    tensors = _live_tensors(root, name)
    _check_lora_shapes(root, name, tensors)
    return write_adapter(tensors, state_of(root).configs[name], path)


def write_adapter(
    tensors: dict[str, Tensor], config: LoraConfig, path: str | os.PathLike[str]
) -> Path:
    """Write tensors and settings as `save_adapter` does.

    Args:
        tensors: PEFT's key -> tensor, any shape and dtype.
        config: what they were trained with.
        path: a folder, made if missing.

    Returns:
        The folder.

    Raises:
        AdapterError: a tensor is not finite.
        NotImplementedError: a tensor is sharded.
        OSError: the files cannot be written; what was there stays.
    """
    folder = Path(path)
    tensors = {key: _on_cpu(key, t) for key, t in tensors.items()}
    _check_finite(tensors)
    config = replace(config, inference_mode=True)  # as PEFT writes it
    stamp = _Stamp(_digest(tensors), config.digest())
    text = json.dumps(config.to_dict(), indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)
    data = to_safetensors(tensors, {"format": "pt", _MARK: str(stamp)})
    _commit(folder, stamp, text.encode(), data)
    return folder


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default"
) -> nn.Module:
    """Read an adapter written by fastlora or PEFT; the model is changed only if all is well.

    Missing layers are added, as in `add_lora`: the first adapter becomes active, and everything
    else is frozen. If the model has an adapter of that name, its tensors are overwritten, provided
    that both have the same layers, ranks and scales; dropout stays as it is in the model.

    Args:
        model: dense, quantised, or with adapters.
        path: the folder.
        adapter_name: what to call the adapter.

    Returns:
        The model.

    Raises:
        AdapterError: a file is damaged, a tensor is missing, unexpected, of a wrong shape or dtype
            or not finite, or the configuration disagrees; the message names the tensor or file.
        FileNotFoundError: there is no adapter in the folder.
        NotImplementedError: the configuration asks for what is not supported; names the field.
        ValueError: the configuration does not fit the model.
    """
    root, folder = unwrap(model), Path(path)
    with _opened(folder) as file:
        stamp = _read_stamp(file)
        cfg = with_task_heads(replace(_read_config(folder, stamp), inference_mode=False))
        plan = make_plan(root, cfg, strict=False)
        tensors = _read_tensors(file, _expected(root, plan))
        _check_finite(tensors)
        if stamp and _digest(tensors) != stamp.tensors:
            raise AdapterError(
                f"{folder / WEIGHTS} must hold the tensors it was saved with, got another sha256"
            )
    if adapter_name in state_of(root).configs:
        _check_agrees(root, cfg, plan, adapter_name)
    else:
        install(root, cfg, plan, adapter_name)
    live = _live_tensors(root, adapter_name)
    with torch.no_grad():
        for key, tensor in tensors.items():
            live[key].copy_(tensor)
    return model


def _live_tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """PEFT's key -> the model's own tensor, for everything that belongs to an adapter."""
    live = {}
    for path, layer in adapted(root):
        if name not in adapters_of(layer):
            continue
        key = _key(path)
        if isinstance(layer, LoraLinear):
            live[f"{key}.lora_A.weight"] = layer.lora_A[name].weight
            live[f"{key}.lora_B.weight"] = layer.lora_B[name].weight
        else:
            state = layer.modules_to_save[name].state_dict(keep_vars=True)
            live |= {f"{key}.{part}": tensor for part, tensor in state.items()}
    return live


def _expected(root: nn.Module, plan: Plan) -> dict[str, tuple[list[int], torch.dtype]]:
    """PEFT's key -> shape and dtype of every tensor that a plan needs."""
    expected = {}
    for path, (r, _) in plan.layers.items():
        layer, key = root.get_submodule(path), _key(path)
        N, K = _features(layer)
        if layer.weight.is_meta:
            raise ValueError(f"the model must have its weights, got {path} on the meta device")
        expected[f"{key}.lora_A.weight"] = [r, K], torch.float32
        expected[f"{key}.lora_B.weight"] = [N, r], torch.float32
    for path in plan.saved:
        module, key = root.get_submodule(path), _key(path)
        original = original_of(module) if isinstance(module, SavedModule) else module
        for part, tensor in original.state_dict().items():
            expected[f"{key}.{part}"] = [*tensor.shape], tensor.dtype
    return expected


def _key(path: str) -> str:
    """PEFT's key of a module; blocks under torch.compile have one more name in their paths."""
    return _PREFIX + path.replace("_orig_mod.", "")


def _features(layer: nn.Module) -> tuple[int, int]:
    return (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)


def _read_tensors(
    file: Any, expected: dict[str, tuple[list[int], torch.dtype]]
) -> dict[str, Tensor]:
    """All tensors of an open file, after names, shapes and dtypes were found right."""
    keys = set(file.keys())
    missing, extra = sorted(expected.keys() - keys), sorted(keys - expected.keys())
    if missing or extra:
        raise AdapterError(
            f"{WEIGHTS} must have the tensors that the model and {CONFIG} ask for, got "
            f"{_shorten(missing)} missing and {_shorten(extra)} unexpected"
        )
    tensors = {}
    for key, (shape, dtype) in expected.items():
        got = file.get_slice(key).get_shape()
        if got != shape:
            raise AdapterError(
                f"{key} must be {shape} by the model and the rank in {CONFIG}, got {got}"
            )
        tensors[key] = file.get_tensor(key)
        # nobody trains LoRA in fp64, and rounding it to fp32 would be silent
        if tensors[key].dtype != dtype and not {dtype, tensors[key].dtype} <= set(FLOATS):
            wanted = "fp32, fp16 or bf16" if dtype in FLOATS else dtype
            raise AdapterError(f"{key} must be {wanted}, got {tensors[key].dtype}")
    return tensors


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The open safetensors file of a folder; whatever is wrong with it becomes an AdapterError."""
    file = folder / WEIGHTS
    if not file.is_file():
        is_pickle = folder.is_file() and folder.suffix in (".bin", ".pt", ".pth")
        if is_pickle or (folder / PICKLE).exists():
            raise AdapterError(
                f"an adapter must be in {WEIGHTS}, got a pickle at {folder}, which could run "
                "code: load it with PEFT where you trust it and save it again"
            )
        raise FileNotFoundError(
            f"an adapter must have {WEIGHTS} in its folder, got none in {folder}"
        )
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    size = file.stat().st_size
    if size < 8 or header > min(size - 8, _MAX_JSON):
        raise AdapterError(
            f"{file} must begin with a header that fits in it and in {_MAX_JSON} bytes, got "
            f"{size} bytes that announce {header}"
        )
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise AdapterError(f"{file} must be a complete safetensors file, got {error}") from error


def _read_stamp(file: Any) -> _Stamp | None:
    """Our sums from the metadata; None for files of others."""
    metadata = file.metadata() or {}
    if not any(_MARK in key or _STAMP.search(text) for key, text in metadata.items()):
        return None
    found = _STAMP.fullmatch(metadata.get(_MARK, ""))
    if not found or metadata.keys() != {"format", _MARK} or metadata["format"] != "pt":
        raise AdapterError(f"{WEIGHTS} must have intact metadata, got {metadata}")
    return _Stamp(*found.groups())


def _read_config(folder: Path, stamp: _Stamp | None) -> LoraConfig:
    """The config of a folder; if a crash tore the pair of files, the one the tensors came with."""
    staged = sorted(folder.glob(f".{CONFIG}.{stamp.pair}.*.tmp")) if stamp else []
    problem: Exception | None = None
    for file in [folder / CONFIG, *staged]:
        try:
            cfg = _parse_config(file)
        except (AdapterError, FileNotFoundError, NotImplementedError) as error:
            problem = problem or error
            continue
        if stamp is None or cfg.digest() == stamp.config:
            return cfg
        problem = problem or AdapterError(
            f"{file} must hold the settings that the tensors were saved with, got another sha256 "
            f"for r={cfg.r}, lora_alpha={cfg.lora_alpha} and the rest"
        )
    raise problem


def _parse_config(file: Path) -> LoraConfig:
    if not file.is_file():
        raise FileNotFoundError(f"an adapter must have {CONFIG} in its folder, got no {file}")
    if file.stat().st_size > _MAX_JSON:
        raise AdapterError(f"{file} must be at most {_MAX_JSON} bytes, got {file.stat().st_size}")
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise AdapterError(f"{file} must be JSON, got {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{file} must hold a JSON object, got {type(values).__name__}")
    try:
        return LoraConfig.from_dict(values)
    except NotImplementedError as error:
        raise NotImplementedError(f"{file}: {error}") from error
    except ValueError as error:
        raise AdapterError(f"{file}: {error}") from error


def _check_agrees(root: nn.Module, cfg: LoraConfig, plan: Plan, name: str) -> None:
    """An adapter in the model computes the same, but for its tensors, as the one in a file."""
    theirs = {
        path: (r, alpha / (math.sqrt(r) if cfg.use_rslora else r))
        for path, (r, alpha) in plan.layers.items()
    } | dict.fromkeys(plan.saved, "trained whole")
    mine: dict[str, Any] = {}
    for path, layer in adapted(root):
        if name in adapters_of(layer):
            lora = isinstance(layer, LoraLinear)
            mine[path] = (layer.r[name], layer.scaling[name]) if lora else "trained whole"
    for path in sorted(theirs.keys() | mine.keys()):
        if theirs.get(path) != mine.get(path):
            got = mine.get(path, "nothing"), theirs.get(path, "nothing")
            raise AdapterError(
                f"adapter {name!r} must have the same rank and scale in the model and in the file, "
                f"got {got[0]} and {got[1]} for {path}"
            )


def _check_lora_shapes(root: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """What is saved can be loaded: a sharded or flattened parameter is not whole."""
    for path, layer in adapted(root):
        if isinstance(layer, LoraLinear) and name in layer.r:
            key = _key(path)
            N, K, r = layer.out_features, layer.in_features, layer.r[name]
            for part, shape in (("A", [r, K]), ("B", [N, r])):
                got = [*tensors[f"{key}.lora_{part}.weight"].shape]
                if got != shape:
                    raise AdapterError(f"{key}.lora_{part}.weight must be {shape}, got {got}")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        bad = tensor.numel() - int(tensor.isfinite().sum())
        if bad:
            raise AdapterError(f"{key} must be finite, got {bad} NaN or Inf of {tensor.numel()}")


def _on_cpu(key: str, tensor: Tensor) -> Tensor:
    if hasattr(tensor, "full_tensor"):  # a DTensor
        raise NotImplementedError(f"saving sharded tensors is not supported, got {key}")
    if tensor.is_meta:
        raise AdapterError(f"{key} must have values, got a tensor on the meta device")
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        total.update(f"{key} {tensor.dtype} {[*tensor.shape]}\n".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _commit(folder: Path, stamp: _Stamp, config: bytes, weights: bytes) -> None:
    """Replace both files; the new adapter counts from the rename of its tensors on."""
    token = uuid.uuid4().hex[:8]  # two processes may save the same adapter at once
    new_config = folder / f".{CONFIG}.{stamp.pair}.{token}.tmp"
    new_weights = folder / f".{WEIGHTS}.{token}.tmp"
    try:
        write_file(new_config, config)
        write_file(new_weights, weights)
        sync_folder(folder)
        os.replace(new_weights, folder / WEIGHTS)
    except BaseException:
        new_config.unlink(missing_ok=True)
        new_weights.unlink(missing_ok=True)
        raise
    # from here on the new config counts, if need be under its temporary name: see _read_config
    sync_folder(folder)
    os.replace(new_config, folder / CONFIG)
    sync_folder(folder)
    for leftover in folder.glob(".adapter_*.tmp"):  # of processes that were killed
        if time.time() - leftover.stat().st_mtime > _STALE:
            leftover.unlink(missing_ok=True)


def _shorten(keys: list[str]) -> str:
    return f"{keys[:3]} and {len(keys) - 3} more" if len(keys) > 3 else str(keys)
