"""Ops of the CPU backend: the C++ kernels of csrc/, and torch's GEMMs over dense weights.

Sums are fp32, gradients that are reduced over tokens come back in fp32. Results do not depend on
the number of threads, except for db, which is the same for the same number. Arguments are on the
CPU and were checked by the public functions.
"""

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora import reference
from fastlora.codebooks import nf4_code
from fastlora.native import (
    DTYPES,
    dequantize_blocks,
    dropout_arguments,
    library,
    quantize_blocks,
    quantize_stats,
    threads,
)

if TYPE_CHECKING:
    from fastlora.nf4 import NF4Weight

__all__ = ["quantize_blocks", "quantize_stats"]


def dequantize(weights: "Sequence[NF4Weight]", dtype: torch.dtype) -> Iterator[Tensor]:
    """[N, K] of each weight, decoded when it is asked for."""
    for q in weights:
        yield dequantize_blocks(*q.tensors(), q.blocksize, q.numel, dtype).view(q.shape)


# --- dense weights ---------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] = x w^T + bias."""
    y = torch.nn.functional.linear(_wide(x), _wide(w), None if bias is None else _wide(bias))
    return y.to(x.dtype)


def linear_added(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """y [M, N] + x w^T; may overwrite y."""
    return linear_dx(x, w.T, y)


def lora_term(s: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[M, N] = scale * s b^T + bias."""
    bias = None if bias is None else _wide(bias)
    return reference.lora_term(_wide(s), _wide(b), scale, bias).to(s.dtype)


def linear_dx(dy: Tensor, w: Tensor, dx: Tensor | None = None) -> Tensor:
    """dx [M, K] = dy w, added to dx where it is given; may overwrite dx."""
    if dx is None:
        return _mm(dy, w)
    return _wide(dx).addmm_(_wide(dy), _wide(w)).to(dx.dtype)


def linear_dw(dy: Tensor, x: Tensor) -> Tensor:
    """dw [N, K] = dy^T x."""
    return _mm(dy.T, x)


def _wide(t: Tensor) -> Tensor:
    """torch's fp16 GEMM on CPUs is up to a thousand times slower than fp32."""
    return t.float() if t.dtype == torch.float16 else t


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) @ _wide(b)).to(a.dtype)


# --- packed weights --------------------------------------------------------------------------


def linear_packed(
    x: Tensor,
    q: "NF4Weight",
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> Tensor:
    """y [M, N] = x w^T + bias + scale * s b^T, without s and b the base layer alone."""
    y = torch.empty(x.shape[0], q.shape[0], dtype=x.dtype, device="cpu")
    return _linear(x, q, bias, s, b, scale, y)


def linear_dx_packed(
    dys: Sequence[Tensor],
    weights: "Sequence[NF4Weight]",
    dx: Tensor | None,
    ds: Tensor | None,
    a: Tensor | None,
    state: Tensor | None,
    p: float,
) -> Tensor:
    """dx [M, K] = sum of dy w + mask * (ds a), added to dx where it is given; overwrites dx."""
    dys = [_rows(dy) for dy in dys]
    accumulate = dx is not None
    if dx is None:
        M, K = dys[0].shape[0], weights[0].shape[1]
        dx = torch.empty(M, K, dtype=dys[0].dtype, device="cpu")
    ds, a = (None, None) if a is None else (_rows(ds), _rows(a))
    packed = [_Packed(q) for q in weights]
    count = len(packed)
    library().fastlora_linear_dx(
        _array(c_void_p, count)(*(dy.data_ptr() for dy in dys)),
        _array(c_int64, count)(*(dy.stride(0) for dy in dys)),
        _array(_Nf4, count)(*(p.struct for p in packed)),
        count,
        DTYPES[dx.dtype],
        *dx.shape,
        *_matrix(ds),
        *_matrix(a),
        0 if a is None else a.shape[0],
        *dropout_arguments(state, p),
        accumulate,
        dx.data_ptr(),
        threads(),
    )
    return dx


class _Nf4(ctypes.Structure):
    """fastlora_nf4 of csrc/fastlora.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("packed", "absmax", "absmax_codes", "absmax2", "code2")),
        *((name, c_void_p) for name in ("offset", "code")),
        *((name, c_int64) for name in ("n", "k", "blocksize")),
    )


class _Packed:
    """A weight as the library takes it, and the tensors that the pointers point into."""

    def __init__(self, q: "NF4Weight") -> None:
        self.tensors = [None if t is None else t.contiguous() for t in q.tensors()]
        packed, absmax, absmax2, code2, offset = map(_pointer, self.tensors)
        scales = (None, absmax) if q.nested else (absmax, None)
        code = nf4_code().data_ptr()
        self.struct = _Nf4(packed, *scales, absmax2, code2, offset, code, *q.shape, q.blocksize)


# --- adapters --------------------------------------------------------------------------------


def lora_down(x: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """s [M, R] = drop(x) a^T."""
    x, a = _rows(x), _rows(a)
    R = a.shape[0]
    s = torch.empty(x.shape[0], R, dtype=x.dtype, device="cpu")
    library().fastlora_lora_down(
        *_matrix(x),
        DTYPES[x.dtype],
        *x.shape,
        *_matrix(a),
        R,
        *dropout_arguments(state, p),
        s.data_ptr(),
        threads(),
    )
    return s


def lora_up(y: Tensor, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [M, N] + scale * s b^T; overwrites y."""
    return _linear(None, None, None, s, b, scale, y)


def lora_bwd_ds_db(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    """db [N, R] = scale * dy^T s in fp32; scale * dy b is written into ds [M, R]."""
    dy, b, s = _rows(dy), _rows(b), _rows(s)
    db = torch.empty(b.shape, dtype=torch.float32, device="cpu")
    library().fastlora_lora_bwd_ds_db(
        *_matrix(dy),
        DTYPES[dy.dtype],
        *dy.shape,
        *_matrix(b),
        *_matrix(s),
        b.shape[1],
        scale,
        *_matrix(ds),
        db.data_ptr(),
        threads(),
    )
    return db


def lora_bwd_da(x: Tensor, ds: Tensor, state: Tensor | None, p: float) -> Tensor:
    """da [R, K] = ds^T drop(x) in fp32."""
    x, ds = _rows(x), _rows(ds)
    R = ds.shape[1]
    da = torch.empty(R, x.shape[1], dtype=torch.float32, device="cpu")
    library().fastlora_lora_bwd_da(
        *_matrix(x),
        DTYPES[x.dtype],
        *x.shape,
        *_matrix(ds),
        R,
        *dropout_arguments(state, p),
        da.data_ptr(),
        threads(),
    )
    return da


def lora_bwd_dx(dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """dx [M, K] + mask * (ds a); overwrites dx."""
    return linear_dx_packed((), (), dx, ds, a, state, p)


def lora_bwd_da_dx(
    x: Tensor, dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """da [R, K] = ds^T drop(x) in fp32 and dx [M, K] + mask * (ds a); overwrites dx."""
    return lora_bwd_da(x, ds, state, p), lora_bwd_dx(dx, ds, a, state, p)


def _linear(
    x: Tensor | None,
    q: "NF4Weight | None",
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    scale: float,
    y: Tensor,
) -> Tensor:
    x = None if x is None else _rows(x)
    bias = None if bias is None else bias.contiguous()
    s, b = (None, None) if b is None else (_rows(s), _rows(b))
    packed = None if q is None else _Packed(q)
    library().fastlora_linear(
        *_matrix(x),
        DTYPES[y.dtype],
        *y.shape,
        None if packed is None else ctypes.byref(packed.struct),
        _pointer(bias),
        *_matrix(s),
        *_matrix(b),
        0 if b is None else b.shape[1],
        scale,
        y.data_ptr(),
        threads(),
    )
    return y


@cache
def _array(kind: type, count: int) -> type:
    """The type of a C array, which takes longer to make than the array."""
    return kind * count


def _rows(t: Tensor) -> Tensor:
    """[rows, columns] whose columns are neighbours."""
    return t if t.stride(1) == 1 else t.contiguous()


def _matrix(t: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if t is None else (t.data_ptr(), t.stride(0))


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
