"""NF4 weights: the container, quantising, dequantising, and the bitsandbytes format in and out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports all of dynamo

from fastlora import backend
from fastlora.codebooks import STATS_GROUP, check_blocksize, dynamic_map, nf4_code

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight [N, K] in 4-bit NormalFloat, byte for byte as bitsandbytes stores it.

    Blocks are `blocksize` consecutive elements of the flat, row-major weight. Statistics are nested
    (double-quantised) when `absmax` is uint8, else flat.

    Source: Dettmers et al. 2023, arXiv:2305.14314, section 3.

    Attributes:
        qweight: uint8 [N, K/2], or [ceil(N*K/2), 1] when K is odd; high nibble first.
        absmax: block scales: fp32 [blocks], or uint8 [blocks] codes of `code2` when nested.
        shape: (N, K).
        blocksize: elements per block scale, a power of two from 32 to 4096.
        dtype: what the weight was quantised from; the default of `dequantize_nf4`.
        absmax2: fp32 [ceil(blocks/256)], nested only: second-level scales.
        code2: fp32 [256], nested only: the values of the codes in `absmax`.
        offset: fp32 [], nested only: mean of the block scales.
    """

    qweight: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int
    dtype: torch.dtype
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: a shape, dtype or block size does not fit; the message names the part.
        """
        check_blocksize(self.blocksize)
        if self.dtype not in FLOATS:
            raise ValueError(f"dtype must be fp32, fp16 or bf16, got {self.dtype}")
        numel, blocks = self.numel, -(-self.numel // self.blocksize)
        _check_part("qweight", self.qweight, (torch.uint8,), -(-numel // 2))
        _check_part("absmax", self.absmax, (torch.uint8, torch.float32), blocks)
        parts = {"absmax2": -(-blocks // STATS_GROUP), "code2": 256, "offset": 1}
        for name, count in parts.items():
            part = getattr(self, name)
            if (part is not None) != self.nested:
                raise ValueError(
                    f"{name} must be given exactly when absmax is uint8 (nested statistics), "
                    f"got absmax {self.absmax.dtype} and {name} "
                    f"{'missing' if part is None else 'given'}"
                )
            if part is not None:
                _check_part(name, part, (torch.float32,), count)

    @classmethod
    def unchecked(cls, facts: tuple, tensors: Sequence[Tensor | None]) -> "NF4Weight":
        """Rebuild a weight from its `facts` and `tensors()`, without the cost of the checks."""
        q = object.__new__(cls)
        names = ("qweight", "absmax", "absmax2", "code2", "offset", "shape", "blocksize", "dtype")
        # as a frozen dataclass does it: torch.compile of torch 2.11 follows no other way
        for name, value in zip(names, (*tensors, *facts), strict=True):
            object.__setattr__(q, name, value)
        return q

    @property
    def facts(self) -> tuple[tuple[int, int], int, torch.dtype]:
        """What is not a tensor: shape, blocksize, dtype."""
        return self.shape, self.blocksize, self.dtype

    @property
    def nested(self) -> bool:
        """Whether the block scales are themselves quantised."""
        return self.absmax.dtype == torch.uint8

    @property
    def numel(self) -> int:
        """Number of weights, N * K."""
        return self.shape[0] * self.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the bytes live."""
        return self.qweight.device

    @property
    def nbytes(self) -> int:
        """Bytes kept: packed codes and all statistics."""
        return sum(t.nbytes for t in self.tensors() if t is not None)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """qweight, absmax, absmax2, code2, offset."""
        return self.qweight, self.absmax, self.absmax2, self.code2, self.offset

    def to(self, device: torch.device | str) -> "NF4Weight":
        """The same weight on another device."""
        tensors = [None if t is None else t.to(device) for t in self.tensors()]
        return NF4Weight.unchecked(self.facts, tensors)

    @classmethod
    def from_bnb(cls, qweight: Tensor, quant_state: "QuantState") -> "NF4Weight":
        """Adopt a live bitsandbytes weight; its bytes are shared, not copied.

        Args:
            qweight: packed codes, any storage dtype: `bitsandbytes.nn.Linear4bit().weight`.
            quant_state: its `bitsandbytes.functional.QuantState`.

        Returns:
            A view of the same memory.

        Raises:
            ValueError: not NF4, not 2-D, or repacked by bitsandbytes for its CPU kernel.
        """
        if getattr(quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "qweight must be in the canonical bitsandbytes layout, got bytes that bitsandbytes "
                "repacked for its CPU kernel in an eval forward: read the layer's state_dict(), "
                "which restores them, or adopt the layer before its first eval forward"
            )
        if not hasattr(quant_state, "quant_type"):
            raise ValueError(f"quant_state must be a QuantState, got {type(quant_state).__name__}")
        _check_code(quant_state.quant_type, quant_state.code)
        shape, nested = _check_shape(quant_state.shape), {}
        if quant_state.nested:
            state2 = quant_state.state2
            _check_stats_group(state2.blocksize)
            nested = {"absmax2": state2.absmax, "code2": state2.code, "offset": quant_state.offset}
        return cls(
            qweight=_as_matrix(qweight.detach(), shape),
            absmax=quant_state.absmax.detach(),
            shape=shape,
            blocksize=quant_state.blocksize,
            dtype=quant_state.dtype,
            **nested,
        )

    def to_bnb(self) -> tuple[Tensor, "QuantState"]:
        """The weight as bitsandbytes has it, codes [N*K/2, 1] and a `QuantState`; no copy."""
        from bitsandbytes.functional import QuantState

        nested = {}
        if self.nested:
            state2 = QuantState(
                absmax=self.absmax2, blocksize=STATS_GROUP, code=self.code2, dtype=torch.float32
            )
            nested = {"offset": self.offset, "state2": state2}
        quant_state = QuantState(
            absmax=self.absmax,
            shape=torch.Size(self.shape),
            code=nf4_code(self.device).clone(),
            blocksize=self.blocksize,
            quant_type="nf4",
            dtype=self.dtype,
            **nested,
        )
        return self.qweight.view(-1, 1), quant_state

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], key: str) -> "NF4Weight":
        """Read one weight of a bitsandbytes 4-bit checkpoint; bitsandbytes is not needed.

        Args:
            state_dict: the checkpoint's tensors; only keys that begin with `key` are read.
            key: name of the weight, such as "model.layers.0.mlp.up_proj.weight".

        Returns:
            The weight, over the checkpoint's own tensors.

        Raises:
            KeyError: a tensor of the weight is missing; the message names it.
            ValueError: FP4, damaged metadata, or parts that do not fit together.
        """
        if f"{key}.quant_state.bitsandbytes__fp4" in state_dict:
            raise ValueError(f"{key} must be NF4, got FP4, which is not supported")
        meta = _read_meta(state_dict, f"{key}.{_META}")
        try:
            return cls(**_read_parts(state_dict, key, meta))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    def state_dict(self, key: str) -> dict[str, Tensor]:
        """The tensors that bitsandbytes writes for this weight.

        Args:
            key: name of the weight, such as "layer.weight".

        Returns:
            name -> tensor, ready for safetensors; `from_state_dict` and bitsandbytes read it.
        """
        meta = {
            "quant_type": "nf4",
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(self.shape),
        }
        tensors = {
            key: self.qweight.view(-1, 1),
            f"{key}.absmax": self.absmax,
            f"{key}.quant_map": nf4_code(self.device).clone(),
        }
        if self.nested:
            meta |= {
                "nested_blocksize": STATS_GROUP,
                "nested_dtype": "float32",
                "nested_offset": self.offset.item(),
            }
            tensors[f"{key}.nested_absmax"] = self.absmax2
            tensors[f"{key}.nested_quant_map"] = self.code2
        text = list(json.dumps(meta).encode())
        tensors[f"{key}.{_META}"] = torch.tensor(text, dtype=torch.uint8, device="cpu")
        return tensors


_META = "quant_state.bitsandbytes__nf4"  # JSON as uint8
_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


@_disable_dynamo  # traced into, the C++ calls would give garbage
def quantize_nf4(w: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Weight:
    """Quantise a weight to NF4: 4.5 bits per weight, 4.127 with double quantisation (blocks of 64).

    The bytes are those of bitsandbytes' CPU kernels on every device. Its CUDA kernels store a block
    of zeros as codes of -1 with a scale of 0, which double quantisation rounds to another scale.

    Args:
        w: [N, K], fp32, fp16 or bf16.
        blocksize: elements per block scale, a power of two from 32 to 4096.
        double_quant: quantise the block scales to 8 bits as well.

    Returns:
        The quantised weight on w's device; its `dtype` is w's.

    Raises:
        ValueError: w is not 2-D, is empty, has another dtype, is fake or a subclass that wraps
            other tensors, or holds NaN or Inf (counted).
    """
    if w.ndim != 2 or w.numel() == 0:
        raise ValueError(f"w must be [N, K] and not empty, got {[*w.shape]}")
    if w.dtype not in FLOATS:
        raise ValueError(f"w must be fp32, fp16 or bf16, got {w.dtype}")
    check_blocksize(blocksize)
    w = w.detach().resolve_neg().contiguous()
    _check_memory("w", w)
    impl = backend.implementation(w.device)
    with backend.on(w.device):
        packed, absmax, nonfinite = impl.quantize_blocks(w, blocksize)
    if nonfinite:
        raise ValueError(f"w must be finite, got {nonfinite} NaN or Inf of {w.numel()} weights")
    nested = {}
    if double_quant:
        absmax, absmax2, offset = impl.quantize_stats(absmax)
        code2 = dynamic_map(w.device).clone()
        nested = {"absmax2": absmax2, "code2": code2, "offset": offset}
    shape = tuple(w.shape)
    return NF4Weight(_as_matrix(packed, shape), absmax, shape, blocksize, w.dtype, **nested)


@_disable_dynamo  # traced into, the C++ calls would give garbage
def dequantize_nf4(q: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Decode a weight, bit for bit as bitsandbytes' CUDA kernels do.

    w = cast(code[nibble] * a) with a = code2[absmax] * absmax2 + offset: three fp32 roundings.

    Args:
        q: the quantised weight.
        dtype: fp32, fp16 or bf16; q.dtype if None.

    Returns:
        [N, K] on q's device.

    Raises:
        ValueError: dtype is another one, or q is of fake tensors.
    """
    dtype = q.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be fp32, fp16 or bf16, got {dtype}")
    _check_memory("q", q.qweight)
    with backend.on(q.device):
        return next(iter(backend.implementation(q.device).dequantize([q], dtype)))


def has_memory(t: Tensor) -> bool:
    """Whether a kernel may read it.

    Not a subclass that is fake or wraps other tensors, nor zeros or negated values that PyTorch
    has yet to write, as autograd makes them.
    """
    # what a class has that leaves operations to PyTorch
    left = torch._C._disabled_torch_dispatch_impl
    own = getattr(type(t), "__torch_dispatch__", left) is not left
    return not (own or t._is_zerotensor() or t.is_neg())


def _check_memory(name: str, t: Tensor) -> None:
    if not has_memory(t):
        raise ValueError(f"{name} must be a tensor with memory of its own, got {type(t).__name__}")


def _as_matrix(packed: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed codes of any storage dtype and layout as uint8 [N, K/2] (or flat when K is odd)."""
    packed = packed.reshape(-1).view(torch.uint8)
    N, K = shape
    if packed.numel() != -(-N * K // 2):
        raise ValueError(
            f"qweight must hold {-(-N * K // 2)} bytes for shape {[N, K]}, got {packed.numel()}"
        )
    return packed.view(N, K // 2) if K % 2 == 0 else packed.view(-1, 1)


def _check_part(name: str, part: Tensor, dtypes: tuple[torch.dtype, ...], count: int) -> None:
    if part.dtype not in dtypes or part.numel() != count:
        raise ValueError(
            f"{name} must have {count} elements of {' or '.join(map(str, dtypes))}, "
            f"got {part.numel()} of {part.dtype}"
        )


def _check_code(quant_type: str, code: Tensor) -> None:
    if quant_type != "nf4" or not torch.equal(code.float().cpu(), nf4_code()):
        raise ValueError(f"the weight must be NF4 with its standard code table, got {quant_type}")


def _read_meta(state_dict: Mapping[str, Tensor], key: str) -> dict[str, Any]:
    """The JSON facts of a checkpoint's weight, with every field of the type it must have."""
    text = bytes(_get(state_dict, key).tolist())
    try:
        meta = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{key} must hold JSON, got {text[:40]!r}") from error
    wanted: dict[str, type] = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if isinstance(meta, dict) and "nested_offset" in meta:
        wanted |= {"nested_blocksize": int, "nested_offset": float}
    for name, kind in wanted.items():
        got = meta.get(name) if isinstance(meta, dict) else None
        if not isinstance(got, kind) or (name == "dtype" and got not in _BY_NAME):
            allowed = f"one of {[*_BY_NAME]}" if name == "dtype" else kind.__name__
            raise ValueError(f"{name} in {key} must be {allowed}, got {got!r}")
    return meta


def _read_parts(state_dict: Mapping[str, Tensor], key: str, meta: dict[str, Any]) -> dict[str, Any]:
    """What an `NF4Weight` is made of."""
    _check_code(meta["quant_type"], _get(state_dict, f"{key}.quant_map"))
    shape, absmax = _check_shape(meta["shape"]), _get(state_dict, f"{key}.absmax")
    parts = {
        "qweight": _as_matrix(_get(state_dict, key), shape),
        "absmax": absmax,
        "shape": shape,
        "blocksize": meta["blocksize"],
        "dtype": _BY_NAME[meta["dtype"]],
    }
    if "nested_offset" in meta:
        _check_stats_group(meta["nested_blocksize"])
        parts["absmax2"] = _get(state_dict, f"{key}.nested_absmax")
        parts["code2"] = _get(state_dict, f"{key}.nested_quant_map")
        parts["offset"] = torch.tensor(
            meta["nested_offset"], dtype=torch.float32, device=absmax.device
        )
    return parts


def _check_shape(shape: Any) -> tuple[int, int]:
    if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"the weight must be [N, K] with positive sizes, got {[*shape]}")
    return shape[0], shape[1]


def _check_stats_group(blocksize: int) -> None:
    if blocksize != STATS_GROUP:
        raise ValueError(f"nested statistics must have groups of {STATS_GROUP}, got {blocksize}")


def _get(state_dict: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state_dict:
        raise KeyError(f"a 4-bit checkpoint must have {key}, got none")
    return state_dict[key]
