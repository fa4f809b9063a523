"""The frozen layers under LoRA layers of PEFT, as `fastlora.ops` takes them.

Dense ones are PyTorch's and transformers', 4-bit ones are ours or bitsandbytes'; the latter say
themselves how they run (`bnb.py`).
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastlora import ops
from fastlora.member import Member
from fastlora.nf4 import FLOATS
from fastlora.nn import Linear4bit, is_hooked
from fastlora.targets import is_bnb


def why_not(base: nn.Module) -> str:
    """Why the layer cannot run here; empty if it can."""
    if is_hooked(base):
        return "hooks on the base layer"
    if type(base) is Linear4bit:
        return "sharded parameters" if is_sharded(base.qweight) else ""
    if type(base) not in (nn.Linear, Conv1D):
        own = getattr(base, "why_not", None)
        return own() if own else f"the base layer is {type(base).__name__}"
    weight = base.weight
    if is_sharded(weight):
        return "sharded parameters"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the base weight is {type(weight).__name__}"
    return "" if weight.dtype in FLOATS else f"the base weight is {weight.dtype}"


def member(base: nn.Module) -> Member:
    """The layer's weight and bias, nothing copied."""
    if type(base) is Conv1D:
        return Member(base.weight.T, base.bias)
    return Member(base.weight, base.bias) if type(base) is nn.Linear else base.member()


def run(base: nn.Module, x: Tensor, m: Member, p: float) -> Tensor:
    """y [..., N] for x [..., K], in the dtype that the layer returns."""
    return base.run(x, m, p) if hasattr(type(base), "run") else ops.linear_group(x, [m], p)[0]


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of it only: DTensor, DeepSpeed ZeRO-3."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def is_4bit(base: nn.Module) -> bool:
    """Whether the weight is packed, and has to be merged by decoding it."""
    return hasattr(base, "requantize")


def kind(base: nn.Module) -> str:
    """What the weight is, for people."""
    if isinstance(base, Linear4bit):
        return "nf4"
    if is_bnb(base):
        return f"bitsandbytes {base.weight.quant_type}"
    weight = getattr(base, "weight", None)
    return type(base).__name__ if weight is None else str(weight.dtype).removeprefix("torch.")
