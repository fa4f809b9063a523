"""The LoRA part of dx, added in place where no GEMM has it as its epilogue.

    dx[m, k] += keep_scale * keep[m, k] * sum_r ds[m, r] * a[r, k]

Bound by memory: reads and writes dx once, 2 * M * K elements. The mask is made in registers.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from .common import Chip, cdiv, chip, next_power_of_2
from .dropout import keep_mask, keep_scale
from .launch import Launch, prepared


@cache
def configs(
    arch: str, R: int, itemsize: int = 2, dropout: bool = False
) -> tuple[triton.Config, ...]:
    """Configurations for a family of devices, the default first.

    Args:
        arch: family of the device, see `common.arch`.
        R: rank.
        itemsize: bytes of an element of dx.
        dropout: whether the mask is made.

    Returns:
        The default and candidates for tuning.
    """
    block_r = min(64, max(16, next_power_of_2(R)))

    def config(m: int, k: int, warps: int, stages: int) -> triton.Config:
        blocks = {"BLOCK_M": m, "BLOCK_K": k, "BLOCK_R": block_r}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if arch == "interpret":
        return config(16, 32, 4, 1), config(32, 16, 4, 1)
    if itemsize == 4:  # no tensor cores, twice the shared memory
        return (config(32, 32, 8, 2),)
    square, flat = config(64, 64, 4 if R <= 64 else 8, 2), config(32, 128, 4, 2)
    # an H200: a tenth less time at rank 16, as much at 64
    return (flat, square) if arch == "sm_90" and R <= 64 else (square, flat)


@triton.jit(do_not_specialize=["threshold"])
def _lora_bwd_dx_kernel(
    dx_ptr,  # [M, K], in and out
    ds_ptr,  # [M, R]
    a_ptr,  # [R, K]
    state_ptr,  # int64 [2], None without dropout
    M,
    K,
    threshold,
    scale,
    stride_dx_m,
    stride_ds_m: tl.constexpr,  # small ranks: rows that are not 16 apart, and still vectors
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two, >= 16
):
    k_blocks = tl.cdiv(K, BLOCK_K)
    k0 = tl.program_id(0) % k_blocks * BLOCK_K
    offs_m = (tl.program_id(0) // k_blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = k0 + tl.arange(0, BLOCK_K)
    mask_m, mask_k = offs_m < M, offs_k < K
    mask_mk = mask_m[:, None] & mask_k[None, :]
    # first, because its bytes take longest
    dx_ptrs = dx_ptr + offs_m[:, None] * stride_dx_m + offs_k[None, :]
    dx = tl.load(dx_ptrs, mask=mask_mk, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        offs_r = r0 + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = offs_r < R
        ds_ptrs = ds_ptr + offs_m[:, None] * stride_ds_m + offs_r[None, :]
        a_ptrs = a_ptr + offs_r[:, None] * K + offs_k[None, :]
        ds = tl.load(ds_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        a = tl.load(a_ptrs, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        acc = tl.dot(ds, a, acc, input_precision="ieee")
    update = acc * scale
    if state_ptr is not None:
        seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
        update = tl.where(keep_mask(seed, offset, offs_m, k0, threshold, BLOCK_K), update, 0.0)
    tl.store(dx_ptrs, (dx.to(tl.float32) + update).to(dx_ptr.dtype.element_ty), mask=mask_mk)


def lora_bwd_dx(
    dx: Tensor,
    ds: Tensor,
    a: Tensor,
    state: Tensor | None,
    threshold: int,
    config: triton.Config | None = None,
) -> None:
    """Launch. Arguments are checked by `fastlora.ops`; last dims have stride 1.

    Args:
        dx: [M, K], fp32, fp16 or bf16. mask * (ds a) is added in place, with one rounding.
        ds: [M, R], dtype of `dx`.
        a: [R, K], dtype of `dx`, contiguous.
        state: int64 [2]. Dropout state of the forward pass, None where `threshold` is 0.
        threshold: round(p * 65536), no unit.
        config: None for the default of the device.
    """
    (M, K), R = dx.shape, a.shape[0]
    if M == 0:
        return
    strides = dx.stride(0), ds.stride(0)
    launch = _prepare(chip(), M, K, R, dx.element_size(), threshold, strides, config)
    launch(dx, ds, a, state if threshold else None)


@prepared
def _prepare(
    chip: Chip,
    M: int,
    K: int,
    R: int,
    itemsize: int,
    threshold: int,
    strides: tuple[int, int],  # of dx and ds
    config: triton.Config | None,
) -> Launch:
    config = config or configs(chip.family, R, itemsize, threshold > 0)[0]
    blocks = cdiv(M, config.kwargs["BLOCK_M"]) * cdiv(K, config.kwargs["BLOCK_K"])
    return Launch(
        _lora_bwd_dx_kernel,
        (blocks,),
        M,
        K,
        threshold,
        keep_scale(threshold),
        *strides,
        R=R,
        enable_fp_fusion=True,
        **config.all_kwargs(),
    )
