"""The C++ CPU kernels of csrc/, called through ctypes; same names and meaning as in `reference`.

Tensors are on the CPU and were checked by the public functions. Calls release the GIL and use
`torch.get_num_threads()` threads of the OpenMP runtime that PyTorch loaded, one in a forked child.
FASTLORA_CPU_ISA forces an instruction set lower than the best that this CPU has.
"""

import ctypes
import importlib.util
import os
from ctypes import c_char_p, c_float, c_int, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor

from fastlora.codebooks import STATS_GROUP, dynamic_lut, nf4_code, nf4_thresholds
from fastlora.reference import dropout_threshold

ISAS = ("amx", "avx512bf16", "avx512", "avx2", "neon", "portable")  # best first
_ABI = 3  # FASTLORA_ABI of csrc/fastlora.h
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_I, _L, _U, _F, _P = c_int, c_int64, c_uint32, c_float, c_void_p
_ROWS = (_P, _L)  # a matrix and how far apart its rows are
_DROPOUT = (_P, _U, _F)  # state, threshold, scale of what is kept
_SIGNATURES = {
    "fastlora_abi": (_I, []),
    "fastlora_isas": (c_char_p, []),
    "fastlora_isa": (c_char_p, []),
    "fastlora_use_isa": (_I, [c_char_p]),
    "fastlora_has_threads": (_I, []),
    "fastlora_quantize_blocks": (_L, [_P, _I, _L, _L, _P, _P, _P, _I]),
    "fastlora_quantize_stats": (None, [_P, _L, _P, _P, _P, _P, _I]),
    "fastlora_dequantize_blocks": (None, [*[_P] * 7, _L, _L, _I, _P, _I]),
    "fastlora_dropout": (None, [_P, _I, _L, _L, _L, *_DROPOUT, _P, _I]),
    "fastlora_adamw32": (None, [_P, _L, _L, _P, _P, _I]),
    "fastlora_adamw8": (None, [_P, _L, _L, *[_P] * 6, _I]),
    "fastlora_lora_down": (None, [*_ROWS, _I, _L, _L, *_ROWS, _L, *_DROPOUT, _P, _I]),
    "fastlora_linear": (None, [*_ROWS, _I, _L, _L, _P, _P, *_ROWS, *_ROWS, _L, _F, _P, _I]),
    "fastlora_lora_bwd_ds_db": (
        None,
        [*_ROWS, _I, _L, _L, *_ROWS, *_ROWS, _L, _F, *_ROWS, _P, _I],
    ),
    "fastlora_lora_bwd_da": (None, [*_ROWS, _I, _L, _L, *_ROWS, _L, *_DROPOUT, _P, _I]),
    "fastlora_linear_dx": (
        None,
        [_P, _P, _P, _L, _I, _L, _L, *_ROWS, *_ROWS, _L, *_DROPOUT, _I, _P, _I],
    ),
}

_forked = False


def _after_fork() -> None:
    # the pool's threads do not survive a fork, and waiting for them would never end
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- the library -----------------------------------------------------------------------------


def available() -> bool:
    """Whether the C++ kernels were built and can be loaded.

    Returns:
        False is no error: `unavailable_reason` says why.

    Raises:
        RuntimeError: FASTLORA_CPU_ISA names an instruction set that is unknown or cannot run here.
    """
    return _load()[0] is not None


def unavailable_reason() -> str:
    """Why `available` is False and what to do, one sentence without full stop; else empty."""
    return _load()[1]


def isas() -> tuple[str, ...]:
    """The instruction sets that were built and run on this CPU, best first."""
    return tuple(library().fastlora_isas().decode().split(","))


def isa() -> str:
    """The instruction set in use: one of `ISAS`."""
    return library().fastlora_isa().decode()


def use_isa(name: str) -> None:
    """Use another instruction set from now on, in the whole process.

    Args:
        name: one of `ISAS`.

    Raises:
        RuntimeError: `name` is unknown or does not run on this CPU.
    """
    _use_isa(library(), name)


def threads() -> int:
    """How many threads large work uses: 1 in a forked child and without an OpenMP runtime."""
    if _forked or not library().fastlora_has_threads():
        return 1
    return torch.get_num_threads()


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why."""
    rebuild = "install a C++17 compiler such as g++ and install fastlora again"
    spec = importlib.util.find_spec("fastlora._native")
    if spec is None or spec.origin is None:
        return None, f"the C++ kernels of fastlora were not built, {rebuild}"
    try:
        library = ctypes.CDLL(spec.origin)
        abi = library.fastlora_abi()
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels of fastlora cannot be loaded ({error}), {rebuild}"
    if abi != _ABI:
        return (
            None,
            f"the C++ kernels of fastlora are of another version ({abi}, not {_ABI}), {rebuild}",
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    forced = os.environ.get("FASTLORA_CPU_ISA")
    if forced is not None:
        _use_isa(library, forced)
    return library, ""


def library() -> ctypes.CDLL:
    """The library, loaded once.

    Returns:
        Its functions are those of csrc/fastlora.h.

    Raises:
        RuntimeError: it was not built or cannot be loaded; the message says what to do.
    """
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


def _use_isa(library: ctypes.CDLL, name: str) -> None:
    if name not in ISAS:
        raise RuntimeError(f"FASTLORA_CPU_ISA must be one of {[*ISAS]}, got {name!r}")
    if library.fastlora_use_isa(name.encode()):
        able = library.fastlora_isas().decode().split(",")
        raise RuntimeError(f"FASTLORA_CPU_ISA={name} cannot run on this CPU, use one of {able}")


# --- NF4 -------------------------------------------------------------------------------------


def quantize_blocks(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor, int]:
    """Codes, block scales and NaN+Inf count of w: uint8 [ceil(n/2)], fp32 [blocks], int."""
    w = w.contiguous()
    n = w.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-n // blocksize), dtype=torch.float32, device="cpu")
    nonfinite = library().fastlora_quantize_blocks(
        w.data_ptr(),
        DTYPES[w.dtype],
        n,
        blocksize,
        nf4_thresholds().data_ptr(),
        packed.data_ptr(),
        absmax.data_ptr(),
        threads(),
    )
    return packed, absmax, nonfinite


def quantize_stats(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: codes uint8 [blocks], group scales fp32 [groups], offset fp32 []."""
    absmax = absmax.contiguous()
    blocks = absmax.numel()
    offset = absmax.mean()  # by torch, so that the order of summation is bitsandbytes'
    codes = torch.empty(blocks, dtype=torch.uint8, device="cpu")
    absmax2 = torch.empty(-(-blocks // STATS_GROUP), dtype=torch.float32, device="cpu")
    library().fastlora_quantize_stats(
        absmax.data_ptr(),
        blocks,
        offset.data_ptr(),
        dynamic_lut().data_ptr(),
        codes.data_ptr(),
        absmax2.data_ptr(),
        threads(),
    )
    return codes, absmax2, offset


def dequantize_blocks(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    numel: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights of packed codes, [numel]: three fp32 roundings and the cast, never a fused one."""
    packed, absmax = packed.contiguous(), absmax.contiguous()
    nested = absmax.dtype == torch.uint8
    out = torch.empty(numel, dtype=dtype, device="cpu")
    library().fastlora_dequantize_blocks(
        packed.data_ptr(),
        None if nested else absmax.data_ptr(),
        absmax.data_ptr() if nested else None,
        absmax2.data_ptr() if nested else None,
        code2.data_ptr() if nested else None,
        offset.data_ptr() if nested else None,
        nf4_code().data_ptr(),
        numel,
        blocksize,
        DTYPES[dtype],
        out.data_ptr(),
        threads(),
    )
    return out


# --- dropout ---------------------------------------------------------------------------------


def dropout(x: Tensor, state: Tensor | None, p: float) -> Tensor:
    """x [M, K] with elements dropped with probability p and the others scaled up.

    The mask is a function of (seed, offset, m, k) alone; `x` itself is returned where p is 0.
    """
    if p == 0:
        return x
    if x.stride(1) != 1:
        x = x.contiguous()
    M, K = x.shape
    out = torch.empty(M, K, dtype=x.dtype, device="cpu")
    library().fastlora_dropout(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.stride(0),
        M,
        K,
        *dropout_arguments(state, p),
        out.data_ptr(),
        threads(),
    )
    return out


def dropout_arguments(state: Tensor | None, p: float) -> tuple[int | None, int, float]:
    """The pointer to a dropout state, the threshold, and the scale of what is kept."""
    if p == 0:
        return None, 0, 1.0
    threshold = dropout_threshold(p)
    return state.data_ptr(), threshold, 65536 / (65536 - threshold)
