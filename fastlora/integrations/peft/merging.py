"""Merging adapters of PEFT into 4-bit weights, and taking them out again.

As in PEFT, adapter by adapter, each time quantised anew. Other than in PEFT 0.21 a bias of the
adapter is scaled as in the forward, and `safe_merge` looks at it too.
"""

import warnings

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from fastlora.integrations.peft.bases import is_4bit
from fastlora.targets import is_bnb


def check_biases(layer: LoraLayer, names: list[str] | None) -> None:
    """Check, before anything is changed, that adapters with a bias have where to merge it.

    Args:
        layer: over any base.
        names: of the adapters; None means the active ones.

    Raises:
        NotImplementedError: one has a bias and the base layer is a subclass of bitsandbytes' that
            others made, where PEFT merges, without the scale.
        RuntimeError: one has a bias and the base layer has none.
    """
    base = layer.get_base_layer()
    for name in layer.active_adapters if names is None else names:
        if not layer.lora_bias.get(name):
            continue
        if is_bnb(base) and not is_4bit(base):
            raise NotImplementedError(
                "merging an adapter with lora_bias=True needs bitsandbytes' own 4-bit layer, got "
                f"{type(base).__name__}"
            )
        if base.bias is None:
            raise RuntimeError(
                f"the base layer must have a bias to merge an adapter with lora_bias=True, got "
                f"none for adapter {name!r}"
            )


def merge(layer: LoraLayer, safe_merge: bool, names: list[str] | None) -> None:
    """Add adapters to the weight.

    Args:
        layer: over a 4-bit base.
        safe_merge: change nothing for an adapter that makes NaN or Inf.
        names: of the adapters; None means the active ones.

    Raises:
        ValueError: the weights would hold NaN or Inf.
    """
    for name in check_adapters_to_merge(layer, names) or ():
        if name not in layer.lora_A:
            continue
        _warn()
        base, variant = layer.get_base_layer(), layer.lora_variant.get(name)
        w = base.dequantize(torch.float32)
        w = (
            w + layer.get_delta_weight(name)
            if variant is None
            else variant.merge_safe(layer, name, w)
        )
        bias = _bias(layer, name, 1)
        if safe_merge and not all(t is None or torch.isfinite(t).all() for t in (w, bias)):
            raise ValueError(f"merged weights must be finite, got NaN or Inf of adapter {name!r}")
        base.requantize(w.detach())
        if bias is not None:
            base.bias.data = bias
        layer.merged_adapters.append(name)


def unmerge(layer: LoraLayer) -> None:
    """Take all merged adapters out of the weight.

    Args:
        layer: over a 4-bit base.
    """
    if not layer.merged:
        warnings.warn("no adapter is merged, nothing to do", stacklevel=3)
    while layer.merged_adapters:
        name = layer.merged_adapters.pop()
        if name not in layer.lora_A:
            continue
        _warn()
        base, variant = layer.get_base_layer(), layer.lora_variant.get(name)
        w = base.dequantize(torch.float32)
        w = w - layer.get_delta_weight(name) if variant is None else variant.unmerge(layer, name, w)
        base.requantize(w.detach())
        bias = _bias(layer, name, -1)
        if bias is not None:
            base.bias.data = bias


def _bias(layer: LoraLayer, name: str, sign: int) -> Tensor | None:
    """The base layer's bias with that of an adapter added or taken out."""
    if not layer.lora_bias[name]:
        return None
    old, added = layer.get_base_layer().bias.data, layer.lora_B[name].bias.data
    return (old + sign * layer.scaling[name] * added).to(old.dtype)


def _warn() -> None:
    warnings.warn(
        "an adapter is merged into, or taken out of, a 4-bit weight, which is quantised anew and "
        "therefore rounded",
        stacklevel=5,
    )
