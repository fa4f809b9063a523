"""Ops of the Triton backend: our kernels, and the vendor's GEMM where it is the faster one.

The names and meanings are those of `reference`. Products accumulate in fp32, reductions are
deterministic, and tensors that are reduced come back in fp32.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlora import reference
from fastlora.kernels import gemm_lora as gemm
from fastlora.kernels import lora_bwd_da as k6
from fastlora.kernels import lora_bwd_ds_db as k5
from fastlora.kernels import lora_bwd_dx as k7
from fastlora.kernels import lora_down as k1
from fastlora.kernels import nf4_dequant as k0
from fastlora.kernels import nf4_quantize
from fastlora.reference import dropout_threshold, quantize_stats

if TYPE_CHECKING:
    from fastlora.nf4 import NF4Weight

__all__ = [
    "linear",
    "linear_added",
    "linear_dw",
    "linear_dx",
    "lora_term",
    "lora_up",
    "quantize_stats",
]

linear, linear_dx, linear_dw = reference.linear, reference.linear_dx, reference.linear_dw
linear_added, lora_term, lora_up = reference.linear_added, reference.lora_term, reference.lora_up

# rows begin at multiples of so many elements, whole cache lines: on an H200 the GEMM over K + 16
# columns then takes 1 to 3 % less time than with rows of 16 bytes
ROW = 64
FUSED_RANK = 64  # up to here one pass computes da and the LoRA part of dx: registers


def quantize_blocks(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor, int]:
    """Codes and scales of w: packed uint8 [ceil(n/2)], absmax fp32 [blocks], NaN and Inf count."""
    packed, absmax, nonfinite = nf4_quantize.quantize_blocks(w.view(-1), blocksize)
    return packed, absmax, int(nonfinite)


def dequantize(weights: "Sequence[NF4Weight]", dtype: torch.dtype) -> Sequence[Tensor]:
    """[N, K] of each weight: slices of one buffer, one launch for weights of one kind."""
    Ns, K = [q.shape[0] for q in weights], weights[0].shape[1]
    out = torch.empty(sum(Ns), K, dtype=dtype, device=weights[0].device)
    start = 0
    for (blocksize, _), alike in groupby(weights, key=lambda q: (q.blocksize, q.nested)):
        packed = [_packed(q) for q in alike]
        rows = sum(part.N for part in packed)
        k0.nf4_dequant(packed, K, blocksize, out[start : start + rows])
        start += rows
    return out.split_with_sizes(Ns)


def dequantize_augmented(
    weights: "Sequence[NF4Weight]",
    bs: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> Sequence[Tensor]:
    """[N, K + R] of each weight, all of one kind: see `reference.dequantize_augmented`."""
    Ns, K = [q.shape[0] for q in weights], weights[0].shape[1]
    R = sum(b.shape[1] for b in bs)
    out = _beside(sum(Ns), K + R, dtype, weights[0].device)
    tail = k0.Tail(tuple(b.contiguous() for b in bs), tuple(scales))
    k0.nf4_dequant([_packed(q) for q in weights], K, weights[0].blocksize, out, tail)
    return out.split_with_sizes(Ns)


def lora_down(x: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """s [M, R] = drop(x) a^T."""
    return k1.lora_down(x, a.contiguous(), state, dropout_threshold(p))


def lora_down_augmented(
    x: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """x beside s, [M, K + R], and s [M, R] = drop(x) a^T: x is read once."""
    x_aug = _beside(x.shape[0], x.shape[1] + a.shape[0], x.dtype, x.device)
    s = k1.lora_down(x, a.contiguous(), state, dropout_threshold(p), x_aug)
    return x_aug, s


def linear_lora(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
    """y [M, N] = x w^T + bias + scale * s b^T, in one GEMM."""
    bias = None if bias is None else bias.contiguous()
    return gemm.gemm_lora(x, _row_major(w), s, b.contiguous(), scale, bias)


def lora_bwd_ds_db(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    """db [N, R] = scale * dy^T s in fp32, and ds [M, R] = scale * dy b, written into ds."""
    return k5.lora_bwd_ds_db(dy, b.contiguous(), s, scale, ds)


def lora_bwd_da(x: Tensor, ds: Tensor, state: Tensor | None, p: float) -> Tensor:
    """da [R, K] = ds^T drop(x) in fp32. One pass over x."""
    return k6.lora_bwd_da(x, ds, state, dropout_threshold(p))


def lora_bwd_dx(dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """dx [M, K] + mask * (ds a); overwrites dx."""
    if p == 0:
        return reference.lora_bwd_dx(dx, ds, a, state, p)
    k7.lora_bwd_dx(dx, ds, a.contiguous(), state, dropout_threshold(p))
    return dx


def lora_bwd_da_dx(
    x: Tensor, dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """da [R, K] in fp32 and dx [M, K] + mask * (ds a); overwrites dx. Draws the mask once."""
    if p == 0 or len(a) > FUSED_RANK:
        return lora_bwd_da(x, ds, state, p), lora_bwd_dx(dx, ds, a, state, p)
    threshold = dropout_threshold(p)
    return k6.lora_bwd_da_dx(x, ds, a.contiguous(), dx, state, threshold), dx


def linear_dx_lora(
    dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> Tensor:
    """dx [M, K] = dy w + mask * (ds a), in one GEMM."""
    w, a = _row_major(w), a.contiguous()
    return gemm.gemm_lora_dx(dy, w, ds, a, state, dropout_threshold(p))


def _beside(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, columns] that begin at multiples of `ROW`."""
    return torch.empty(rows, -(-columns // ROW) * ROW, dtype=dtype, device=device)[:, :columns]


def _row_major(w: Tensor) -> Tensor:
    """The weight with neighbouring elements in its rows; `plan` avoids this path for others."""
    return w if w.stride(1) == 1 else w.contiguous()


def _packed(q: "NF4Weight") -> k0.Packed:
    tensors = (None if t is None else t.contiguous() for t in q.tensors())
    return k0.Packed(*tensors, N=q.shape[0])
