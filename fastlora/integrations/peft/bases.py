"""The frozen layers under LoRA layers of PEFT, as `fastlora.ops` takes them.

Dense ones are PyTorch's and transformers', 4-bit ones are ours or bitsandbytes'; the latter say
themselves how they run (`bnb.py`).
"""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import ops
from fastlora.member import Member
from fastlora.nf4 import FLOATS
from fastlora.nn import Linear4bit, is_hooked
from fastlora.targets import is_bnb

# as of now: FSDP gathers them for a forward, which then may be fast
SHARDED = "sharded parameters, unless gathered in a forward"


def why_not(base: nn.Module) -> str:
    """Why the layer cannot run here; empty if it can."""
    if is_hooked(base):
        return "hooks on the base layer"
    if type(base) is Linear4bit:
        return SHARDED if is_sharded(base.qweight) else ""
    if type(base) not in (nn.Linear, Conv1D):
        own = getattr(base, "why_not", None)
        return own() if own else f"the base layer is {type(base).__name__}"
    weight = base.weight
    if is_sharded(weight):
        return SHARDED
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the base weight is {type(weight).__name__}"
    return "" if weight.dtype in FLOATS else f"the base weight is {weight.dtype}"


def takes(base: nn.Module, x: Tensor) -> bool:
    """Whether the layer can run here on such an input."""
    return not x.is_nested and (not hasattr(type(base), "takes") or base.takes(x))


def member(base: nn.Module) -> Member:
    """The layer's weight and bias, nothing copied."""
    if type(base) is Conv1D:
        return Member(base.weight.T, base.bias)
    return Member(base.weight, base.bias) if type(base) is nn.Linear else base.member()


def run(base: nn.Module, x: Tensor, m: Member, p: float) -> Tensor:
    """y [..., N] for x [..., K], in the dtype that the layer returns."""
    return base.run(x, m, p) if hasattr(type(base), "run") else ops.linear_group(x, [m], p)[0]


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of it only: DTensor, DeepSpeed ZeRO-3, FSDP of PyTorch."""
    marks = ("full_tensor", "ds_id", "_fsdp_flattened")
    return any(hasattr(parameter, mark) for mark in marks)


def state_of(layer: nn.Module) -> Any:
    """The `QuantState` of a 4-bit layer of bitsandbytes; None before it is quantised.

    Where FSDP or nn.DataParallel put another tensor for the parameter, the layer still has it.
    """
    state = getattr(layer.weight, "quant_state", None)
    return layer.quant_state if state is None else state


def quant_type(layer: nn.Module) -> str:
    """Of a 4-bit layer of bitsandbytes: "nf4" or "fp4"."""
    state = state_of(layer)
    return layer.weight.quant_type if state is None else state.quant_type


def is_4bit(base: nn.Module) -> bool:
    """Whether the weight is packed, and has to be merged by decoding it."""
    return hasattr(base, "requantize")


def kind(base: nn.Module) -> str:
    """What the weight is, for people."""
    if isinstance(base, Linear4bit):
        return "nf4"
    if is_bnb(base):
        return f"bitsandbytes {quant_type(base)}"
    weight = getattr(base, "weight", None)
    return type(base).__name__ if weight is None else str(weight.dtype).removeprefix("torch.")
