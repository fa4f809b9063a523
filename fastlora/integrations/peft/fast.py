"""Whether a LoRA layer of PEFT can run on `fastlora.ops` at this moment, and how it does."""

from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastlora import reference
from fastlora.integrations.peft import bases
from fastlora.nf4 import FLOATS
from fastlora.nn import is_hooked


def why_not(layer: LoraLayer) -> str:
    """Why the layer has to run PEFT's own forward now; empty if it does not.

    Args:
        layer: one of ours.

    Returns:
        The reason in a few words.
    """
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "merged"
    names = _running(layer)
    if not names:
        return "no active adapter"
    if _has_any_global_hook():
        return "hooks on all modules"
    reasons = [bases.why_not(layer.base_layer), _why_not_parallel(layer)]
    reasons += [_why_not_adapter(layer, name) for name in names]
    if len({_dropout(layer, name) for name in names}) > 1:
        reasons.append("active adapters have different dropout")
    return next((reason for reason in reasons if reason), "")


def is_plain_call(layer: LoraLayer, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call has nothing that only PEFT's own forward knows.

    Args:
        layer: one of ours.
        x: [..., K].
        args: positional, after x.
        kwargs: by name, such as `adapter_names`.

    Returns:
        Whether it may run on `fastlora.ops`.
    """
    given = args or any(value is not None for value in kwargs.values())
    return not given and bases.takes(layer.base_layer, x)


def forward(layer: LoraLayer, x: Tensor) -> Tensor:
    """What PEFT computes, by one op.

    Several adapters become one of all their ranks, with one dropout mask.

    Args:
        layer: one for which there is no reason in `why_not`.
        x: [..., K], fp32, fp16 or bf16.

    Returns:
        [..., N], in the dtype that PEFT returns.
    """
    names, base = _running(layer), layer.base_layer
    member = bases.member(base)
    a, b, scale = _stacked(layer, names)
    bias = member.bias
    for name in names:
        added = layer.lora_B[name].bias
        if added is not None:
            added = added * layer.scaling[name]
            bias = added if bias is None else bias + added
    member = replace(member, bias=bias, a=a, b=b, scale=scale)
    return bases.run(base, x, member, _dropout(layer, names[0]))


def _running(layer: LoraLayer) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _stacked(layer: LoraLayer, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """a [R, K], b [N, R] and scale of the adapters together."""
    parts = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in names]
    a, b, scale = parts[0]
    # hot-swapping under torch.compile makes a tensor of it
    if len(parts) == 1 and not isinstance(scale, Tensor):
        return a, b, scale
    return torch.cat([a for a, _, _ in parts]), torch.cat([b * s for _, b, s in parts], 1), 1.0


def _dropout(layer: LoraLayer, name: str) -> float:
    module = layer.lora_dropout[name]
    return module.p if isinstance(module, nn.Dropout) and module.training else 0.0


def _why_not_adapter(layer: LoraLayer, name: str) -> str:
    if name in layer.lora_variant:
        return f"adapter {name!r} is no plain LoRA: {type(layer.lora_variant[name]).__name__}"
    a, b, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    for part, module in (("lora_A", a), ("lora_B", b), ("lora_dropout", dropout)):
        if is_hooked(module):
            return f"hooks on {part}"
    if type(dropout) not in (nn.Identity, nn.Dropout):
        return f"dropout is {type(dropout).__name__}"
    if reference.dropout_threshold(_dropout(layer, name)) == reference.dropout_threshold(1.0):
        return "dropout leaves nothing"
    for module in (a, b):
        if type(module) is not nn.Linear:
            return f"an adapter of {type(module).__name__}"
        weight = module.weight
        if bases.is_sharded(weight):
            return bases.SHARDED
        if type(weight) not in (nn.Parameter, Tensor):
            return f"an adapter whose weight is {type(weight).__name__}"
        if weight.dtype not in FLOATS:
            return f"an adapter of {weight.dtype}"
    if a.bias is not None:
        return "lora_A has a bias"
    return ""


def _why_not_parallel(layer: LoraLayer) -> str:
    # looked up as what they are: at every forward, and a module takes long to say that it lacks one
    marks = vars(layer).get("_tp_info"), vars(layer.base_layer).get("_hf_tp_plan")
    return "" if marks == (None, None) else "tensor parallel"
