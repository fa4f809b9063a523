"""Drop-in replacements of `torch.nn.Linear`: `Linear4bit` holds NF4, `LoraLinear` adds adapters."""

from fastlora.nn.group import Group, group_layers, group_of, is_hooked, keep_group, ungroup
from fastlora.nn.linear4bit import Linear4bit
from fastlora.nn.lora import LoraLinear, is_conv1d
from fastlora.nn.saved import SavedModule
from fastlora.nn.switch import disabled

__all__ = [
    "Group",
    "Linear4bit",
    "LoraLinear",
    "SavedModule",
    "disabled",
    "group_layers",
    "group_of",
    "is_conv1d",
    "is_hooked",
    "keep_group",
    "ungroup",
]
