"""A linear layer over an NF4 weight."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastlora.codebooks import STATS_GROUP
from fastlora.member import Member
from fastlora.nf4 import FLOATS, NF4Weight, dequantize_nf4, quantize_nf4
from fastlora.nn.group import GroupedLinear

_BYTES = ("qweight", "absmax", "absmax2", "code2", "offset")  # order of NF4Weight.tensors()


class Linear4bit(GroupedLinear):
    """A frozen linear layer whose weight is kept in NF4 and decoded in each forward and backward.

    The weight lives in plain uint8 parameters without gradient: `qweight` [N, K/2] (flat when K is
    odd), `absmax`, and with double quantisation `absmax2`, `code2`, `offset`; fp32 statistics are
    kept as their bytes, so that no cast, sharding or checkpoint changes them.

    `weight` is a placeholder for code that asks for its shape, dtype or device: it takes no memory,
    cannot be written, and its values are NaN. Use `dequantize()` for the values.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        blocksize: elements per block scale, a power of two from 32 to 4096.
        double_quant: whether the block scales are quantised as well.
        device: where the parameters are made; on "meta" they stay empty.
        dtype: of the bias and of what a reader of `weight` sees.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        blocksize: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.blocksize = in_features, out_features, blocksize
        self.compute_dtype = torch.get_default_dtype() if dtype is None else dtype
        numel = in_features * out_features
        blocks = -(-numel // blocksize)
        groups = -(-blocks // STATS_GROUP)
        odd = in_features % 2
        shapes = {
            "qweight": (-(-numel // 2), 1) if odd else (out_features, in_features // 2),
            "absmax": (blocks if double_quant else 4 * blocks,),
            "absmax2": (4 * groups,) if double_quant else None,
            "code2": (4 * 256,) if double_quant else None,
            "offset": (4,) if double_quant else None,
        }
        for name, shape in shapes.items():
            part = None
            if shape is not None:
                part = torch.empty(shape, dtype=torch.uint8, device=device)
                part = nn.Parameter(part, requires_grad=False)
            self.register_parameter(name, part)
        bias_ = None
        if bias:
            bias_ = nn.Parameter(torch.empty(out_features, dtype=self.compute_dtype, device=device))
        self.register_parameter("bias", bias_)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, blocksize: int = 64, double_quant: bool = True
    ) -> "Linear4bit":
        """Quantise a layer; its bias is shared, its weight is not kept.

        Args:
            linear: any `nn.Linear` with a weight in fp32, fp16 or bf16.
            blocksize: elements per block scale, a power of two from 32 to 4096.
            double_quant: whether the block scales are quantised as well.

        Returns:
            The 4-bit layer, on the same device and in the same train/eval mode.

        Raises:
            TypeError: the layer's weight is 4-bit already.
            ValueError: the weight has another dtype or holds NaN or Inf.
        """
        if isinstance(linear, Linear4bit) or hasattr(linear.weight, "quant_state"):
            raise TypeError(f"linear must have a dense weight, got {type(linear).__name__}")
        if linear.weight.is_meta:
            N, K = linear.weight.shape
            new = cls(
                K, N, linear.bias is not None, blocksize, double_quant, "meta", linear.weight.dtype
            )
        else:
            new = cls.from_nf4(quantize_nf4(linear.weight, blocksize, double_quant), linear.bias)
        return new.train(linear.training)

    @classmethod
    def from_nf4(cls, q: NF4Weight, bias: Tensor | None = None) -> "Linear4bit":
        """A layer over the memory of `q`, which is not copied.

        Args:
            q: the weight [N, K].
            bias: [N]; a parameter is kept as it is.

        Returns:
            The layer.
        """
        N, K = q.shape
        layer = cls(K, N, bias=False, device="meta", dtype=q.dtype)
        layer._set_nf4(q)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_bnb(cls, layer: nn.Linear) -> "Linear4bit":
        """Adopt a live `bitsandbytes.nn.Linear4bit`; its bytes are shared, not copied.

        Args:
            layer: the bitsandbytes layer, quantised as NF4.

        Returns:
            The layer, in the same train/eval mode.

        Raises:
            ValueError: not quantised yet, not NF4, or repacked by bitsandbytes for its CPU kernel.
        """
        quant_state = getattr(layer.weight, "quant_state", None)
        if quant_state is None:
            raise ValueError(
                "layer must hold quantised bytes, got a bitsandbytes layer that is not quantised "
                "yet: move it to its device first"
            )
        new = cls.from_nf4(NF4Weight.from_bnb(layer.weight, quant_state), layer.bias)
        return new.train(layer.training)

    @property
    def nf4(self) -> NF4Weight:
        """The weight as `NF4Weight`, a view of the parameters."""
        # at each call, and a module's attributes are slow to find
        qweight, absmax, absmax2, code2, offset = map(self._parts().get, _BYTES)
        if absmax2 is None:
            tensors = qweight, _as_fp32(absmax), None, None, None
        else:
            stats = _as_fp32(absmax2), _as_fp32(code2), _as_fp32(offset).view(())
            tensors = qweight, absmax, *stats
        facts = (self.out_features, self.in_features), self.blocksize, self.compute_dtype
        return NF4Weight.unchecked(facts, tensors)

    @property
    def weight(self) -> Tensor:
        """NaN placeholder [N, K] of the compute dtype, without memory; see `dequantize`."""
        nan = torch.full((), math.nan, dtype=self.compute_dtype, device=self.qweight.device)
        placeholder = nan.expand(self.out_features, self.in_features)
        placeholder._is_hf_initialized = True  # transformers: nothing to initialise here
        return placeholder

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight's values.

        Args:
            dtype: fp32, fp16 or bf16; the layer's compute dtype if None.

        Returns:
            [N, K], a new tensor.
        """
        return dequantize_nf4(self.nf4, dtype)

    def requantize(self, w: Tensor) -> None:
        """Give the layer other values, quantised as the old ones were.

        Args:
            w: [N, K], fp32, fp16 or bf16.

        Raises:
            ValueError: w has another shape or dtype, or holds NaN or Inf.
        """
        if w.shape != (self.out_features, self.in_features):
            wanted = [self.out_features, self.in_features]
            raise ValueError(f"w must be {wanted}, got {[*w.shape]}")
        q = quantize_nf4(w, self.blocksize, self.absmax2 is not None)
        self._set_nf4(replace(q, dtype=self.compute_dtype))

    def member(self) -> Member:
        """The layer as `ops.linear_group` takes it."""
        return Member(self.nf4, self.bias)

    def sources(self) -> list[Tensor]:
        """All tensors that the output depends on, beside x; the weight is the first."""
        parts = self._parts()
        found = [parts.get(name) for name in (*_BYTES, "bias")]
        return [part for part in found if part is not None]

    def _parts(self) -> dict[str, Tensor | None]:
        """The parameters by name; a replica of `nn.DataParallel` has them as attributes."""
        return self._parameters if "qweight" in self._parameters else vars(self)

    def reset_parameters(self) -> None:
        """Random weights as `nn.Linear` has them, quantised; nothing on the meta device."""
        if self.qweight.is_meta:
            return
        dense = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.qweight.device,
            dtype=self.compute_dtype,
        )
        self._set_nf4(quantize_nf4(dense.weight, self.blocksize, self.absmax2 is not None))
        if self.bias is not None:
            self.bias.data.copy_(dense.bias.data)

    def extra_repr(self) -> str:
        """What `print` shows beside the class name."""
        kind = "nested" if self.absmax2 is not None else "flat"
        return f"{super().extra_repr()}, nf4, blocksize={self.blocksize}, {kind} statistics"

    def _set_nf4(self, q: NF4Weight) -> None:
        self.blocksize, self.compute_dtype = q.blocksize, q.dtype
        for name, part in zip(_BYTES, q.tensors(), strict=True):
            if part is not None:
                part = part if name == "qweight" else part.reshape(-1).view(torch.uint8)
                part = nn.Parameter(part, requires_grad=False)
            setattr(self, name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        """Follow `.to()`, `.half()`, ...: bytes move but are never cast."""
        device = self.qweight.device
        byte = fn(torch.empty(1, dtype=torch.uint8, device=device))
        if byte.dtype != torch.uint8:
            raise TypeError(
                "Linear4bit can be cast by to(dtype), half(), bfloat16() or float(), got a cast "
                f"of its packed bytes to {byte.dtype}"
            )
        dtype = fn(torch.empty(1, dtype=self.compute_dtype, device=device)).dtype
        if dtype not in FLOATS:
            raise TypeError(f"Linear4bit can compute in fp32, fp16 or bf16, got a cast to {dtype}")
        self.compute_dtype = dtype
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Also read the keys of a bitsandbytes 4-bit checkpoint."""
        key = f"{prefix}weight"
        if f"{key}.quant_map" in state_dict:
            q = NF4Weight.from_state_dict(state_dict, key)
            if q.shape != (self.out_features, self.in_features):
                wanted = [self.out_features, self.in_features]
                raise ValueError(f"{key} must be {wanted}, got {[*q.shape]}")
            for bnb_key in q.state_dict(key):
                del state_dict[bnb_key]
            device = None if self.qweight.is_meta else self.qweight.device
            self._set_nf4(q if device is None else q.to(device))
            state_dict |= {
                prefix + name: getattr(self, name)
                for name in _BYTES
                if getattr(self, name) is not None
            }
        super()._load_from_state_dict(state_dict, prefix, *args)


def _as_fp32(stored: Tensor) -> Tensor:
    """fp32 values of bytes: a view, or a copy where sharding left the bytes misaligned."""
    # a graph cannot ask; there the view of misaligned bytes raises
    if not torch.compiler.is_compiling() and stored.storage_offset() % 4:
        stored = stored.clone()
    return stored.view(torch.float32)
