"""What each op must compute: plain PyTorch, any dtype, no cleverness. The truth of the tests.

Names: M tokens, K in_features, N out_features, R rank. `state` is the dropout state, int64 [2]
(seed, offset), and None where p is 0. Arguments are checked by the public functions.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora.codebooks import (
    STATS_GROUP,
    ZERO_CODE,
    dynamic_lut,
    nf4_code,
    nf4_thresholds,
)

if TYPE_CHECKING:
    from fastlora.nf4 import NF4Weight

_LOW = 0xFFFFFFFF  # lower 32 bits

# --- NF4 -------------------------------------------------------------------------------------


def quantize_blocks(w: Tensor, blocksize: int) -> tuple[Tensor, Tensor, int]:
    """Codes and scales of w: packed uint8 [ceil(n/2)], absmax fp32 [blocks], NaN and Inf count."""
    nonfinite = w.numel() - int(torch.isfinite(w).sum())
    blocks = _as_groups(w.reshape(-1).float(), blocksize)
    absmax = blocks.abs().amax(dim=1)
    reciprocal = 1 / absmax
    codes = torch.bucketize(blocks * reciprocal[:, None], nf4_thresholds(w.device), out_int32=True)
    codes = torch.where(reciprocal.isfinite()[:, None], codes, ZERO_CODE).to(torch.uint8)
    codes = codes.reshape(-1)[: w.numel() + w.numel() % 2]
    if w.numel() % 2:
        codes[-1] = ZERO_CODE
    return codes[::2] << 4 | codes[1::2], absmax, nonfinite


def quantize_stats(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the scales: codes uint8 [blocks], absmax2 fp32 [groups], offset fp32 []."""
    offset = absmax.mean()
    groups = _as_groups(absmax - offset, STATS_GROUP)
    absmax2 = groups.abs().amax(dim=1)
    reciprocal = 1 / absmax2
    index = ((groups * reciprocal[:, None] + 1) * 32767.5 + 0.5).nan_to_num(0).long()
    index = torch.where(reciprocal.isfinite()[:, None], index, 0)
    return dynamic_lut(absmax.device)[index].reshape(-1)[: absmax.numel()], absmax2, offset


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
    if absmax.dtype == torch.uint8:
        group_scale = absmax2.repeat_interleave(STATS_GROUP)[: absmax.numel()]
        absmax = code2[absmax.int()] * group_scale + offset
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:numel]
    scale = absmax.repeat_interleave(blocksize)[:numel]
    return (nf4_code(packed.device)[codes.int()] * scale).to(dtype)


def dequantize(weights: "Sequence[NF4Weight]", dtype: torch.dtype) -> Iterator[Tensor]:
    """[N, K] of each weight."""
    for q in weights:
        yield dequantize_blocks(*q.tensors(), q.blocksize, q.numel, dtype).view(q.shape)


def dequantize_augmented(
    weights: "Sequence[NF4Weight]",
    bs: Sequence[Tensor],
    scales: Sequence[float],
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """[N, K + R] of each weight: scale * b stands in its own of the R columns, zeros in the others.

    Each b is [N, R_i], and R is the sum of all R_i.
    """
    before, after = 0, sum(b.shape[1] for b in bs)
    for w, b, scale in zip(dequantize(weights, dtype), bs, scales, strict=True):
        after -= b.shape[1]
        yield torch.cat([w, F.pad((scale * b).to(dtype), (before, after))], dim=1)
        before += b.shape[1]


def _as_groups(x: Tensor, size: int) -> Tensor:
    """[ceil(n / size), size], the last group filled up with zeros."""
    return F.pad(x, (0, -x.numel() % size)).view(-1, size)


# --- dropout ---------------------------------------------------------------------------------


def dropout_threshold(p: float) -> int:
    """An element is dropped iff its 16-bit number is below this."""
    return round(p * 65536)


def dropout(x: Tensor, state: Tensor | None, p: float) -> Tensor:
    """x [M, K] with elements dropped with probability p and the others scaled up.

    The mask is a function of (seed, offset, m, k) alone; a Philox call gives eight 16-bit numbers.
    """
    if p == 0:
        return x
    threshold = dropout_threshold(p)
    keep = dropout_halves(state, *x.shape) >= threshold
    return torch.where(keep, x * (65536 / (65536 - threshold)), 0)


def dropout_halves(state: Tensor, M: int, K: int) -> Tensor:
    """The 16-bit number of every element, int64 [M, K]."""
    seed, offset = state[0], state[1]
    m = torch.arange(M, device=state.device)[:, None]
    group = torch.arange((K + 7) // 8, device=state.device)[None, :]
    counter = torch.broadcast_tensors(group, m & _LOW, m >> 32, offset & _LOW)
    words = torch.stack(philox4x32(*counter, seed & _LOW, seed >> 32 & _LOW), dim=-1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1)  # low half first
    return halves.flatten(1)[:, :K]


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, rounds: int = 7
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of 32-bit words kept in int64.

    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 4.3.
    """
    for _ in range(rounds):
        # the product may wrap to a negative number; its 64 bits are still right
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


# --- the linear layer ------------------------------------------------------------------------


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """y [M, N] = x w^T + bias."""
    return F.linear(x, w, bias)


def linear_dx(dy: Tensor, w: Tensor, dx: Tensor | None = None) -> Tensor:
    """dx [M, K] = dy w, added to dx where it is given; may overwrite dx."""
    return dy @ w if dx is None else dx.addmm_(dy, w)


def linear_dw(dy: Tensor, x: Tensor) -> Tensor:
    """dw [N, K] = dy^T x."""
    return dy.T @ x


def lora_down(x: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """s [M, R] = drop(x) a^T."""
    return dropout(x, state, p) @ a.T


def lora_down_augmented(
    x: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """x beside s, [M, K + R], and s [M, R] = drop(x) a^T."""
    s = lora_down(x, a, state, p)
    return torch.cat([x, s], dim=1), s


def lora_up(y: Tensor, s: Tensor, b: Tensor, scale: float) -> Tensor:
    """y [M, N] + scale * s b^T; may overwrite y."""
    return y.addmm_(s, b.T, alpha=scale)


def lora_term(s: Tensor, b: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """[M, N] = scale * s b^T + bias."""
    # with beta 0 the first argument only stands there
    first, beta = (s.new_empty(()), 0) if bias is None else (bias, 1)
    return torch.addmm(first, s, b.T, beta=beta, alpha=scale)


def linear_added(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """y [M, N] + x w^T; may overwrite y."""
    return y.addmm_(x, w.T)


def linear_lora(
    x: Tensor, w: Tensor, bias: Tensor | None, s: Tensor, b: Tensor, scale: float
) -> Tensor:
    """y [M, N] = x w^T + bias + scale * s b^T."""
    return lora_up(linear(x, w, bias), s, b, scale)


def lora_bwd_ds_db(dy: Tensor, b: Tensor, s: Tensor, scale: float, ds: Tensor) -> Tensor:
    """db [N, R] = scale * dy^T s; scale * dy b is written into ds [M, R]."""
    ds.copy_((dy @ b).mul_(scale))
    return (dy.T @ s).mul_(scale)


def lora_bwd_da(x: Tensor, ds: Tensor, state: Tensor | None, p: float) -> Tensor:
    """da [R, K] = ds^T drop(x)."""
    return ds.T @ dropout(x, state, p)


def lora_bwd_dx(dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float) -> Tensor:
    """dx [M, K] + mask * (ds a); may overwrite dx."""
    if p == 0:
        return dx.addmm_(ds, a)
    return dx.add_(dropout(ds @ a, state, p))


def lora_bwd_da_dx(
    x: Tensor, dx: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> tuple[Tensor, Tensor]:
    """da [R, K] = ds^T drop(x) and dx [M, K] + mask * (ds a); may overwrite dx."""
    return lora_bwd_da(x, ds, state, p), lora_bwd_dx(dx, ds, a, state, p)


def linear_dx_lora(
    dy: Tensor, w: Tensor, ds: Tensor, a: Tensor, state: Tensor | None, p: float
) -> Tensor:
    """dx [M, K] = dy w + mask * (ds a)."""
    return lora_bwd_dx(linear_dx(dy, w), ds, a, state, p)


def linear_packed(
    x: Tensor,
    q: "NF4Weight",
    bias: Tensor | None,
    s: Tensor | None,
    b: Tensor | None,
    scale: float,
) -> Tensor:
    """y [M, N] = x w^T + bias + scale * s b^T, without s and b the base layer alone."""
    (w,) = dequantize([q], x.dtype)
    return linear(x, w, bias) if s is None else linear_lora(x, w, bias, s, b, scale)


def linear_dx_packed(
    dys: Sequence[Tensor],
    weights: "Sequence[NF4Weight]",
    dx: Tensor | None,
    ds: Tensor | None,
    a: Tensor | None,
    state: Tensor | None,
    p: float,
) -> Tensor:
    """dx [M, K] = sum of dy w + mask * (ds a), added to dx where it is given; may overwrite dx."""
    for dy, w in zip(dys, dequantize(weights, dys[0].dtype), strict=True):
        dx = linear_dx(dy, w, dx)
    return dx if ds is None else lora_bwd_dx(dx, ds, a, state, p)
