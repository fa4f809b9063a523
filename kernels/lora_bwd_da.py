"""Gradient of the LoRA down-projection, and on request the LoRA part of dx in the same pass.

    da[r, k] = keep_scale * sum_m ds[m, r] * keep[m, k] * x[m, k]
    dx[m, k] += keep_scale * keep[m, k] * sum_r ds[m, r] * a[r, k]      (R <= 64)

Bound by memory: reads x once, M * K elements (again per 256 ranks, then mostly from L2), and reads
and writes dx, 2 * M * K more. The mask is made in registers, once for both results. M is split to
fill the device and a second pass adds the parts of da up.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Chip, cdiv, chip, next_power_of_2
from .dropout import keep_mask, keep_scale
from .launch import Launch, prepared
from .reduce import Sum, reduce, split


@cache
def configs(
    arch: str, R: int, itemsize: int = 2, dropout: bool = False, dx: bool = False
) -> tuple[triton.Config, ...]:
    """Configurations for a family of devices, the default first.

    Args:
        arch: family of the device, see `common.arch`.
        R: rank.
        itemsize: bytes of an element of x.
        dropout: whether the mask is made.
        dx: whether dx is updated in the same pass.

    Returns:
        The default and candidates for tuning.
    """
    block_r = min(256 if itemsize == 2 else 64, max(16, next_power_of_2(R)))

    def config(form: str, m: int, k: int, warps: int, stages: int) -> triton.Config:
        blocks = {"FORM": form, "BLOCK_M": m, "BLOCK_K": k, "BLOCK_R": block_r}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if arch == "interpret":
        return config("rk", 16, 32, 4, 1), config("kr", 32, 16, 4, 1)
    if itemsize == 4:  # no tensor cores, twice the shared memory
        return (config("rk", 16 if dx else 32, 32, 8, 2),)
    warps = 4 if R <= 64 else 8
    mma_sync = arch in ("sm_80", "sm_86")
    if arch == "gfx942":
        return config("kr", 64, 64, warps, 2), config("rk", 64, 64, warps, 2)
    if dx and mma_sync:
        return config("rk", 32, 64, 4, 4), config("kr", 64, 64, 4, 3)
    if dx:
        found = [config("kr", 64, 64, 8, 3), config("kr", 64, 64, 4, 3)]
        found += [config("kr", 64, 64, 8, 4), config("kr", 64, 128, 8, 3)]
        return tuple(found)
    # wgmma wants "kr"; without it the form decides whether x comes by cp.async
    form, warps = ("rk", 8) if mma_sync and not dropout else ("kr", warps)
    if R > 64:
        return (config(form, 64, 64, warps, 3),)
    found = [config(form, 128, 64, warps, 3), config(form, 64, 64, warps, 3)]
    if not mma_sync:
        found += [config(form, 128, 64, 8, 3), config(form, 64, 128, 8, 3)]
    if arch == "sm_90" and dropout:  # the last is the fastest on an H200 at ranks 16 and 64
        found.reverse()
    return tuple(found)


@triton.jit(do_not_specialize=["threshold"])
def _lora_bwd_da_kernel(
    x_ptr,  # [M, K]
    ds_ptr,  # [M, R]
    a_ptr,  # [R, K], None without dx
    state_ptr,  # int64 [2], None without dropout
    dx_ptr,  # [M, K], in and out, None without dx
    parts_ptr,  # fp32 [splits, R, K] or, by strides, [splits, K, R], out
    M,
    K,
    m_chunk,  # rows of a part, a multiple of BLOCK_M
    threshold,
    scale,  # of dx
    stride_x_m,
    stride_ds_m: tl.constexpr,  # small ranks: rows that are not 16 apart, and still vectors
    stride_dx_m,
    stride_parts_r,
    stride_parts_k,
    R: tl.constexpr,
    STAGES: tl.constexpr,
    FORM: tl.constexpr,  # "rk": da = ds^T x; "kr": da^T = x^T ds, wgmma for any R
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two, >= 16; with dx >= R
):
    # programs that read the same columns of x are neighbours
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    k0 = tl.program_id(0) // R_BLOCKS * BLOCK_K
    offs_k = k0 + tl.arange(0, BLOCK_K)
    offs_r = tl.program_id(0) % R_BLOCKS * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_k, mask_r = offs_k < K, offs_r < R
    mask_rk = mask_r[:, None] & mask_k[None, :]
    if state_ptr is not None:
        seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
    if dx_ptr is not None:
        a = tl.load(a_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_rk, other=0.0)

    acc = tl.zeros([BLOCK_R, BLOCK_K] if FORM == "rk" else [BLOCK_K, BLOCK_R], tl.float32)
    m_end = tl.minimum(tl.program_id(1) * m_chunk + m_chunk, M)
    # with the number of stages here, loads that feed no dot are pipelined too
    for m0 in tl.range(tl.program_id(1) * m_chunk, m_end, BLOCK_M, num_stages=STAGES):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        mask_mk = mask_m[:, None] & mask_k[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k[None, :]
        ds_ptrs = ds_ptr + offs_m[:, None] * stride_ds_m + offs_r[None, :]
        x = tl.load(x_ptrs, mask=mask_mk, other=0.0)
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        if state_ptr is not None:
            keep = keep_mask(seed, offset, offs_m, k0, threshold, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        if FORM == "rk":
            acc = tl.dot(tl.trans(ds), x, acc, input_precision="ieee")
        else:
            acc = tl.dot(tl.trans(x), ds, acc, input_precision="ieee")
        if dx_ptr is not None:
            update = tl.dot(ds, a, input_precision="ieee") * scale
            if state_ptr is not None:
                update = tl.where(keep, update, 0.0)
            dx_ptrs = dx_ptr + offs_m[:, None] * stride_dx_m + offs_k[None, :]
            dx = tl.load(dx_ptrs, mask=mask_mk, other=0.0).to(tl.float32)
            tl.store(dx_ptrs, (dx + update).to(dx_ptr.dtype.element_ty), mask=mask_mk)

    if FORM == "kr":
        acc = tl.trans(acc)
    parts_ptr += tl.program_id(1).to(tl.int64) * R * K
    offs_k = offs_k.to(tl.int64)
    ptrs = parts_ptr + offs_r[:, None] * stride_parts_r + offs_k[None, :] * stride_parts_k
    tl.store(ptrs, acc, mask=mask_rk)


def lora_bwd_da(
    x: Tensor,
    ds: Tensor,
    state: Tensor | None,
    threshold: int,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch. Arguments are checked by `fastlora.ops`; last dims have stride 1.

    Args:
        x: [M, K], fp32, fp16 or bf16.
        ds: [M, R], dtype of `x`.
        state: int64 [2]. Dropout state of the forward pass, None where `threshold` is 0.
        threshold: round(p * 65536), no unit.
        config: None for the default of the device.

    Returns:
        [R, K], fp32: ds^T drop(x).
    """
    return _add_up(partial_da(x, ds, "rk", state, threshold, config=config), threshold)


def lora_bwd_da_dx(
    x: Tensor,
    ds: Tensor,
    a: Tensor,
    dx: Tensor,
    state: Tensor | None,
    threshold: int,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch. Arguments are checked by `fastlora.ops`; last dims have stride 1.

    Args:
        x: [M, K], fp32, fp16 or bf16.
        ds: [M, R], dtype of `x`, R <= 64.
        a: [R, K], dtype of `x`, contiguous.
        dx: [M, K], dtype of `x`. mask * (ds a) is added in place, with one rounding.
        state: int64 [2]. Dropout state of the forward pass, None where `threshold` is 0.
        threshold: round(p * 65536), no unit.
        config: None for the default of the device.

    Returns:
        [R, K], fp32: ds^T drop(x).
    """
    return _add_up(partial_da(x, ds, "rk", state, threshold, a, dx, config), threshold)


def _add_up(parts: Tensor, threshold: int) -> Tensor:
    if len(parts) == 0:
        return parts.new_zeros(parts.shape[1:])
    da = torch.empty_like(parts[0])
    reduce([Sum(parts, da, keep_scale(threshold))])
    return da


def partial_da(
    x: Tensor,
    ds: Tensor,
    order: str,
    state: Tensor | None = None,
    threshold: int = 0,
    a: Tensor | None = None,
    dx: Tensor | None = None,
    config: triton.Config | None = None,
) -> Tensor:
    """First pass: fp32 parts [splits, R, K], or [splits, K, R] for order "kr"; none if M is 0."""
    (M, K), R = x.shape, ds.shape[1]
    shape = (R, K) if order == "rk" else (K, R)
    if M == 0:
        return x.new_empty(0, *shape, dtype=torch.float32)
    strides = x.stride(0), ds.stride(0), None if dx is None else dx.stride(0)
    launch = _prepare(chip(), M, K, R, x.element_size(), threshold, strides, order, config)
    parts = x.new_empty(launch.grid[1], *shape, dtype=torch.float32)
    launch(x, ds, a, state if threshold else None, dx, parts)
    return parts


@prepared
def _prepare(
    chip: Chip,
    M: int,
    K: int,
    R: int,
    itemsize: int,
    threshold: int,
    strides: tuple[int, int, int | None],  # of x, ds and dx
    order: str,
    config: triton.Config | None,
) -> Launch:
    *inputs, stride_dx = strides
    config = config or configs(chip.family, R, itemsize, threshold > 0, stride_dx is not None)[0]
    block_m, block_k, block_r = (config.kwargs[f"BLOCK_{dim}"] for dim in "MKR")
    blocks = cdiv(K, block_k) * cdiv(R, block_r)
    splits, steps = split(blocks, cdiv(M, block_m), 2, chip.multiprocessors)
    return Launch(
        _lora_bwd_da_kernel,
        (blocks, splits),
        M,
        K,
        steps * block_m,
        threshold,
        keep_scale(threshold),
        *inputs,
        stride_dx or 0,
        *((K, 1) if order == "rk" else (1, R)),
        R=R,
        STAGES=config.num_stages,
        enable_fp_fusion=True,
        **config.all_kwargs(),
    )
