"""Drop-in replacements of `torch.nn.Linear`: `Linear4bit` holds NF4, `LoraLinear` adds adapters."""

from fastlora.nn.linear4bit import Linear4bit
from fastlora.nn.lora import LoraLinear, is_conv1d
from fastlora.nn.saved import SavedModule
from fastlora.nn.switch import disabled

__all__ = ["Linear4bit", "LoraLinear", "SavedModule", "disabled", "is_conv1d"]
