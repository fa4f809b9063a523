"""bitsandbytes' 4-bit layers under PEFT; imported only where bitsandbytes is."""

from dataclasses import replace

import torch
from bitsandbytes import functional, matmul_4bit, nn
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from torch import Tensor

from fastlora import ops
from fastlora.integrations.peft.bases import is_sharded
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
        if not isinstance(self.weight, nn.Params4bit):  # a replica of nn.DataParallel
            fix_4bit_weight_quant_state_from_module(self)
        if self.weight.quant_type != "nf4":
            return f"{self.weight.quant_type} weights of bitsandbytes"
        return "sharded parameters" if is_sharded(self.weight) else ""

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
        if self.weight.quant_type == "nf4":
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
        if getattr(self.weight, "quant_state", None) is None:
            fix_4bit_weight_quant_state_from_module(self)
        check_layout(self)
        return self.weight.quant_state

    def _nf4(self) -> NF4Weight:
        # not NF4Weight.from_bnb, which looks at the values of the table: that was done once
        state, stats = self._state(), [None, None, None]
        N, K = state.shape
        packed = self.weight.data.reshape(-1).view(torch.uint8)
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


def check_layout(layer: nn.Linear4bit) -> None:
    """Check that bitsandbytes has not repacked the weight.

    Args:
        layer: any 4-bit layer of bitsandbytes.

    Raises:
        ValueError: it has.
    """
    state = getattr(layer.weight, "quant_state", None)
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
    check_layout(layer)
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and layer.weight.quant_type == "nf4":
        NF4Weight.from_bnb(layer.weight, state)
