"""fastlora: kernel-level LoRA and QLoRA with drop-in linear layers."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from fastlora import nn, ops, optim
from fastlora.adapters import load_adapter, save_adapter
from fastlora.config import LoraConfig
from fastlora.model import (
    add_lora,
    delete_adapter,
    disable_adapters,
    merge_lora,
    prepare_for_training,
    quantize_model,
    set_adapter,
    unload_lora,
)
from fastlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from fastlora.report import explain, print_trainable_parameters

__version__ = version("fastlora-engine")

__all__ = [
    "LoraConfig",
    "NF4Weight",
    "add_lora",
    "delete_adapter",
    "dequantize_nf4",
    "disable_adapters",
    "explain",
    "load_adapter",
    "merge_lora",
    "nn",
    "ops",
    "optim",
    "prepare_for_training",
    "print_trainable_parameters",
    "quantize_model",
    "quantize_nf4",
    "save_adapter",
    "set_adapter",
    "unload_lora",
]

# exported by name only, because these libraries are optional and slow to import
_LAZY = {
    **dict.fromkeys(("PatchReport", "disable", "enable", "patch_peft", "unpatch_peft"), "peft"),
    "FastLoraConfig": "transformers",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"fastlora.integrations.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
