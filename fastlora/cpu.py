"""Ops of the CPU backend: C++ for bytes and dropout (`native`), torch's GEMMs, fp16 in fp32.

torch's fp16 GEMM on CPUs is up to a thousand times slower than fp32 in the backward layout.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora.native import dequantize_blocks, dropout, quantize_blocks, quantize_stats

if TYPE_CHECKING:
    from fastlora.nf4 import NF4Weight

__all__ = ["quantize_blocks", "quantize_stats"]


def dequantize(weights: "Sequence[NF4Weight]", dtype: torch.dtype) -> Iterator[Tensor]:
    """[N, K] of each weight, decoded when it is asked for."""
    for q in weights:
        yield dequantize_blocks(*q.tensors(), q.blocksize, q.numel, dtype).view(q.shape)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] = x w^T + bias."""
    y = torch.nn.functional.linear(_wide(x), _wide(w), None if bias is None else _wide(bias))
    return y.to(x.dtype)


def linear_dx(dy: Tensor, w: Tensor, dx: Tensor | None = None) -> Tensor:
    """dx [M, K] = dy w, added to dx where it is given; may overwrite dx."""
    return _mm(dy, w) if dx is None else _addmm(dx, dy, w, 1.0)


def linear_dw(dy: Tensor, x: Tensor) -> Tensor:
    """dw [N, K] = dy^T x."""
    return _mm(dy.T, x)


def lora_down(x: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """s [M, R] = drop(x) a^T."""
    return _mm(dropout(x, state, p), a.T)


def lora_up(y: Tensor, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [M, N] + scale * s b^T; may overwrite y."""
    return _addmm(y, s, b.T, scale)


def lora_bwd_ds_db(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    """db [N, R] = scale * dy^T s; scale * dy b is written into ds [M, R]."""
    ds.copy_(_mm(dy, b).mul_(scale))
    return _mm(dy.T, s).mul_(scale)


def lora_bwd_da(x: Tensor, ds: Tensor, state: Tensor | None, p: float) -> Tensor:
    """da [R, K] = ds^T drop(x)."""
    return _mm(ds.T, dropout(x, state, p))


def lora_bwd_dx(dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """dx [M, K] + mask * (ds a); may overwrite dx."""
    if p == 0:
        return _addmm(dx, ds, a, 1.0)
    return dx.add_(dropout(_mm(ds, a), state, p))


def lora_bwd_da_dx(
    x: Tensor, dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """da [R, K] = ds^T drop(x) and dx [M, K] + mask * (ds a); may overwrite dx."""
    return lora_bwd_da(x, ds, state, p), lora_bwd_dx(dx, ds, a, state, p)


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.float16 else t


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) @ _wide(b)).to(a.dtype)


def _addmm(c: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    return _wide(c).addmm_(_wide(a), _wide(b), alpha=alpha).to(c.dtype)
