"""LoRA down-projection: s = drop(x) a^T for one adapter or several stacked ones.

    s[m, r] = keep_scale * sum_k keep[m, k] * x[m, k] * a[r, k]

Bound by memory: reads x once, M * K elements (again per 256 ranks, then mostly from L2), writes
M * R. The mask is made in registers. Where M gives too few programs to fill the device, K is split
and a second pass adds the parts up.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3.
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
    arch: str, R: int, itemsize: int = 2, dropout: bool = False
) -> tuple[triton.Config, ...]:
    """Configurations for a family of devices, the default first.

    Args:
        arch: family of the device, see `common.arch`.
        R: rank, of all adapters together.
        itemsize: bytes of an element of x.
        dropout: whether the mask is made.

    Returns:
        The default and candidates for tuning.
    """
    block_r = min(256, max(16, next_power_of_2(R)))

    def config(m: int, k: int, warps: int, stages: int) -> triton.Config:
        blocks = {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_R": block_r}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if arch == "interpret":
        return config(16, 32, 4, 1), config(32, 16, 4, 1)
    if itemsize == 4:  # no tensor cores, twice the shared memory
        return (config(32, 32, 4 if R <= 64 else 8, 2),)
    # how much shared memory there is
    stages = {"gfx942": 2, "sm_86": 3}.get(arch, 4)
    if arch == "gfx942" and dropout and R <= 64:  # wider blocks spill beside x_aug
        return config(64, 64, 4, stages), config(128, 64, 8, stages)
    if R <= 64 and arch == "sm_100":
        return config(64, 128, 4, stages), config(128, 64, 8, 3)
    if R <= 64 and dropout and arch == "sm_90":  # an H200 at ranks 16 and 64
        small, large = config(32, 128, 4, stages), config(128, 64, 8, stages)
        return (small, large) if R <= 16 else (large, small)
    if R <= 64 and dropout:
        # often one program a multiprocessor, which the mask keeps busy
        found = [config(64, 128, 4, stages), config(128, 64, 8, stages)]
        found += [config(64, 128, 8, stages), config(64, 64, 8, stages), config(32, 128, 4, stages)]
        return tuple(found)
    if R <= 64:
        return config(64, 128, 4, stages), config(128, 64, 8, stages)
    if R <= 128:
        return config(64, 64, 4, stages), config(64, 64, 8, stages)
    return config(64, 64, 8, min(stages, 3)), config(64, 32, 8, stages)


@triton.jit(do_not_specialize=["threshold"])
def _lora_down_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K], any strides
    state_ptr,  # int64 [2], None without dropout
    out_ptr,  # [M, R], out, or fp32 [splits, M, R] parts of it
    aug_ptr,  # [M, K + R], out, or None: x, and s where it is complete
    M,
    K,
    k_chunk,  # columns of a part, a multiple of BLOCK_K
    threshold,
    scale,
    stride_x_m,
    stride_a_r,
    stride_a_k,
    stride_out_m: tl.constexpr,  # small ranks: rows that are not 16 apart, and still vectors
    stride_aug_m: tl.constexpr,
    R: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two, >= 16
):
    # programs that read the same rows of x are neighbours
    R_BLOCKS: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_r = tl.program_id(0) % R_BLOCKS
    pid_split = tl.program_id(1).to(tl.int64)
    offs_m = (tl.program_id(0) // R_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    mask_m, mask_r = offs_m < M, offs_r < R
    if aug_ptr is not None:
        mask_copy = offs_m < tl.where(pid_r == 0, M, 0)  # one program of those that read x
    if state_ptr is not None:
        seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)

    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    k_end = tl.minimum(tl.program_id(1) * k_chunk + k_chunk, K)
    for k0 in range(tl.program_id(1) * k_chunk, k_end, BLOCK_K):
        offs_k = k0 + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x_ptrs = x_ptr + offs_m[:, None] * stride_x_m + offs_k[None, :]
        a_ptrs = a_ptr + offs_r[None, :] * stride_a_r + offs_k[:, None].to(tl.int64) * stride_a_k
        mask_mk = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptrs, mask=mask_mk, other=0.0)
        a = tl.load(a_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if aug_ptr is not None:
            aug_ptrs = aug_ptr + offs_m[:, None] * stride_aug_m + offs_k[None, :]
            tl.store(aug_ptrs, x, mask=mask_copy[:, None] & mask_k[None, :])
            # changes nothing, but brings x to the product in registers: Triton 3.6 has a buffer too
            # few for an x that is stored too, and would load over the one that wgmma still reads
            x = tl.where(mask_mk, x, 0.0)
        if state_ptr is not None:
            x = tl.where(keep_mask(seed, offset, offs_m, k0, threshold, BLOCK_K), x, 0.0)
        acc = tl.dot(x, a, acc, input_precision="ieee")

    s = (acc * scale).to(out_ptr.dtype.element_ty)
    mask_s = mask_m[:, None] & mask_r[None, :]
    if SPLIT:
        out_ptr += pid_split * M * R
    tl.store(out_ptr + offs_m[:, None] * stride_out_m + offs_r[None, :], s, mask=mask_s)
    if aug_ptr is not None and not SPLIT:
        aug_ptrs = aug_ptr + offs_m[:, None] * stride_aug_m + K + offs_r[None, :]
        tl.store(aug_ptrs, s, mask=mask_s)


def lora_down(
    x: Tensor,
    a: Tensor,
    state: Tensor | None,
    threshold: int,
    x_aug: Tensor | None = None,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch. Arguments are checked by `fastlora.ops`; last dims have stride 1.

    Args:
        x: [M, K], fp32, fp16 or bf16.
        a: [R, K], dtype of `x`, contiguous. Down-projections, stacked.
        state: int64 [2]. Dropout state (seed, offset), None where `threshold` is 0.
        threshold: round(p * 65536), no unit.
        x_aug: [M, K + R], dtype of `x`. Also receives x in its first K columns and s in the others.
        config: None for the default of the device.

    Returns:
        [M, R], dtype of `x`: drop(x) a^T.
    """
    s = x.new_empty(x.shape[0], a.shape[0])
    reduce(project(x, a, s, keep_scale(threshold), state, threshold, x_aug, config))
    return s


def project(
    x: Tensor,
    a: Tensor,
    out: Tensor,
    scale: float,
    state: Tensor | None = None,
    threshold: int = 0,
    x_aug: Tensor | None = None,
    config: triton.Config | None = None,
) -> list[Sum]:
    """First pass of out = scale * (mask x) a^T, `a` of any strides: what `reduce` has to add up."""
    (M, K), R = x.shape, a.shape[0]
    if M == 0:
        return []
    stride_aug = 0 if x_aug is None else x_aug.stride(0)
    strides = x.stride(0), *a.stride(), out.stride(0), stride_aug
    splits, launch = _prepare(
        chip(), M, K, R, x.element_size(), threshold, float(scale), strides, config
    )
    parts = out if splits == 1 else x.new_empty(splits, M, R, dtype=torch.float32)
    launch(x, a, state if threshold else None, parts, x_aug)
    if splits == 1:
        return []
    sums = [Sum(parts, out, 1.0)]
    return sums if x_aug is None else [*sums, Sum(parts, x_aug[:, K:], 1.0)]


@prepared
def _prepare(
    chip: Chip,
    M: int,
    K: int,
    R: int,
    itemsize: int,
    threshold: int,
    scale: float,
    strides: tuple[int, int, int, int, int],  # of x, a, a's columns, out and x_aug
    config: triton.Config | None,
) -> tuple[int, Launch]:
    """Into how many parts K is split, and the launch."""
    config = config or configs(chip.family, R, itemsize, threshold > 0)[0]
    block_m, block_k, block_r = (config.kwargs[f"BLOCK_{dim}"] for dim in "MKR")
    blocks = cdiv(M, block_m) * cdiv(R, block_r)
    # a second launch costs more than idle multiprocessors: at most one program each
    splits, steps = split(blocks, cdiv(K, block_k), 1, chip.multiprocessors)
    *inputs, stride_out, stride_aug = strides
    return splits, Launch(
        _lora_down_kernel,
        (blocks, splits),
        M,
        K,
        steps * block_k,
        threshold,
        scale,
        *inputs,
        stride_out if splits == 1 else R,
        stride_aug,
        R=R,
        SPLIT=splits > 1,
        enable_fp_fusion=True,
        **config.all_kwargs(),
    )
