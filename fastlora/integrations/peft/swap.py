"""One class for another in a module that stays the same object."""

import sys

from peft.tuners import lora
from torch import nn

from fastlora.integrations.peft.layers import FastLoraLinear
from fastlora.targets import is_bnb


def classes() -> dict[type, type]:
    """PEFT's and bitsandbytes' class -> ours."""
    found = {lora.Linear: FastLoraLinear}
    if "bitsandbytes.nn.modules" in sys.modules:
        import bitsandbytes
        from peft.tuners.lora.bnb import Linear4bit

        from fastlora.integrations.peft import bnb

        theirs = bitsandbytes.nn
        found |= {
            Linear4bit: bnb.FastLoraLinear4bit,
            theirs.Linear4bit: bnb.FastLinear4bit,
            theirs.LinearNF4: bnb.FastLinearNF4,
            theirs.LinearFP4: bnb.FastLinearFP4,
        }
    return found


def take_over_bases(model: nn.Module) -> None:
    """Take over the 4-bit layers of bitsandbytes in a model, also those without an adapter.

    Subclasses that others made keep their class and forward, and no longer repack their weights.

    Args:
        model: any module.

    Raises:
        ValueError: one cannot be taken over; the message names it. Nothing is changed.
    """
    layers = {path: module for path, module in model.named_modules() if is_bnb(module)}
    if not layers:
        return
    from fastlora.integrations.peft.bnb import check_adoptable

    for path, layer in layers.items():
        try:
            check_adoptable(layer)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    found = classes()
    for layer in layers.values():
        if type(layer) in found:
            layer.__class__ = found[type(layer)]
        elif not isinstance(layer, tuple(found.values())):
            layer.support_avx512bf16_for_cpu = False  # bitsandbytes' own switch for repacking


def swap(model: nn.Module, found: dict[type, type]) -> None:
    """Give modules another class.

    Args:
        model: walked whole.
        found: class -> the one that takes its place.
    """
    for module in model.modules():
        if type(module) in found:
            module.__class__ = found[type(module)]
