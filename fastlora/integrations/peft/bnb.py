"""bitsandbytes' 4-bit layers under PEFT; imported only where bitsandbytes is."""

import math
from dataclasses import replace

import torch
from bitsandbytes import functional, matmul_4bit, nn
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor

from fastlora import ops
from fastlora.integrations.peft.bases import SHARDED, is_sharded, quant_type, state_of
from fastlora.integrations.peft.layers import FastLora
from fastlora.member import Member
from fastlora.nf4 import NF4Weight, dequantize_nf4, quantize_nf4


class FastLinear4bit(nn.Linear4bit):
    """bitsandbytes' layer over the same bytes, which never repacks them.

    bitsandbytes 0.50 rewrites the weight for its CPU kernel in the first forward in eval mode; from
    then on gradients stop at the layer, scales are rounded to bf16, and whoever decodes the bytes
    (merge, dequantize) gets other values.

    It computes in `compute_dtype`, whatever autocast says, and returns the dtype of x, as
    bitsandbytes does. FP4 runs by bitsandbytes' own op.
    """

    def why_not(self) -> str:
        """Why LoRA over the layer cannot run on `fastlora.ops`; empty if it can."""
        if quant_type(self) != "nf4":
            return f"{quant_type(self)} weights of bitsandbytes"
        return SHARDED if is_sharded(self.weight) else ""

    def takes(self, x: Tensor) -> bool:
        """Whether an adapter's gradients, too, may be computed in the dtype that the layer uses.

        PEFT computes them in fp32 where x is; in fp16 small ones would be lost.
        """
        wide = x.dtype == torch.float32 and ops.autocast_dtype(x.device) is None
        return not wide or self.compute_dtype != torch.float16

    def member(self) -> Member:
        """The layer as `ops.linear_group` takes it; nothing is copied."""
        return Member(self._nf4(), self.bias)

    def run(self, x: Tensor, m: Member, p: float) -> Tensor:
        """y [..., N] for x [..., K], of a member that may have an adapter."""
        autocast = ops.autocast_dtype(x.device)
        operand = x.to(self.compute_dtype or autocast or x.dtype)
        if autocast is None:
            return ops.linear_group(operand, [m], p)[0].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return ops.linear_group(operand, [m], p)[0].to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., N] for x [..., K], dtype of x."""
        if not isinstance(self, FastLinear4bit):  # unpatched, but a hook has kept this method
            return type(self).forward(self, x)
        if not self.why_not():
            return self.run(x, self.member(), 0.0)
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        state = self._state()
        return matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=state).to(x.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight's values [N, K], a new tensor."""
        if quant_type(self) == "nf4":
            return dequantize_nf4(self._nf4(), dtype)
        return functional.dequantize_4bit(self.weight.data, self._state()).to(dtype)

    def requantize(self, w: Tensor) -> None:
        """Give the layer other values [N, K], quantised as the old ones were."""
        old, state = self.weight, self._state()
        settings = {
            name: getattr(old, name)
            for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        }
        if old.quant_type != "nf4":
            new = nn.Params4bit(w.to(state.dtype), requires_grad=False, module=self, **settings)
            self.weight = new.to(old.device)
            return
        q = replace(quantize_nf4(w, state.blocksize, state.nested), dtype=state.dtype)
        packed, state = q.to_bnb()
        self.quant_state = state
        self.weight = nn.Params4bit(
            packed.view(-1).view(old.quant_storage).view(-1, 1),
            requires_grad=False,
            quant_state=state,
            module=self,
            bnb_quantized=True,
            **settings,
        )

    def _state(self) -> functional.QuantState:
        state = state_of(self)
        check_layout(state)
        if state is None:
            raise ValueError(
                "the 4-bit layer must be quantised, which its .to(device) does, got weights of "
                f"{self.weight.dtype}"
            )
        return state

    def _nf4(self) -> NF4Weight:
        # not NF4Weight.from_bnb, which looks at the values of the table: that was done once
        state, stats = self._state(), [None, None, None]
        N, K = state.shape
        packed = self.weight.detach().reshape(-1).view(torch.uint8)  # .data cannot be exported
        if state.nested:
            stats = [state.state2.absmax, state.state2.code, state.offset]
        packed = packed.view(N, K // 2) if K % 2 == 0 else packed.view(-1, 1)
        facts = (N, K), state.blocksize, state.dtype
        return NF4Weight.unchecked(facts, [packed, state.absmax, *stats])


class FastLinearNF4(FastLinear4bit, nn.LinearNF4):
    """bitsandbytes' layer by its other name."""


class FastLinearFP4(FastLinear4bit, nn.LinearFP4):
    """bitsandbytes' layer by its other name."""


class FastLoraLinear4bit(FastLora, PeftLinear4bit):
    """`peft.tuners.lora.bnb.Linear4bit` that runs on `fastlora.ops` where it can."""


def check_layout(state: functional.QuantState | None) -> None:
    """Check that bitsandbytes has not repacked the weight.

    Args:
        state: of any 4-bit layer of bitsandbytes; None, before it is quantised, passes.

    Raises:
        ValueError: it has.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "the 4-bit weight must have the bytes it was loaded with, got bytes that bitsandbytes "
            "repacked for its CPU kernel in an eval forward, which rounds the scales to bf16: load "
            "the model again, and call fastlora.enable() or patch_peft before the first forward"
        )


def check_adoptable(layer: nn.Linear4bit) -> None:
    """Check what `FastLinear4bit` takes for granted of a layer that becomes one.

    Args:
        layer: any 4-bit layer of bitsandbytes; one that is not quantised yet passes.

    Raises:
        ValueError: the weight is repacked, or NF4 with another table or statistics than usual.
    """
    state, weight = state_of(layer), layer.weight
    check_layout(state)
    if state is None or state.quant_type != "nf4":
        return
    if is_sharded(weight):  # its bytes were whole when they were sharded
        weight = torch.empty(-(-math.prod(state.shape) // 2), dtype=torch.uint8, device="meta")
    NF4Weight.from_bnb(weight, state)
