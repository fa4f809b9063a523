"""Gradients through the LoRA up-projection: ds and db in one pass over dy.

    ds[m, r] = scale * sum_n dy[m, n] * b[n, r]
    db[n, r] = scale * sum_m dy[m, n] * s[m, r]

Bound by memory: reads dy once, M * N elements. A program owns BLOCK_N columns and keeps their db in
registers, while ds leaves as one fp32 part per column block: 2 * R / BLOCK_N of the bytes of a
16-bit dy, written and read again. From R = 128 this costs more than a second pass over dy, so two
launches read it then. One more launch adds all parts up.
Source: Hu et al. 2021, arXiv:2106.09685, eq. 3, differentiated.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Chip, cdiv, chip, next_power_of_2
from .launch import Launch, prepared
from .lora_bwd_da import partial_da
from .lora_down import project
from .reduce import Sum, reduce, split

# form of the two launches that each read dy
APART = triton.Config({"FORM": "apart"})


@cache
def configs(arch: str, R: int, itemsize: int = 2) -> tuple[triton.Config, ...]:
    """Configurations for a family of devices, the default first.

    Args:
        arch: family of the device, see `common.arch`.
        R: rank.
        itemsize: bytes of an element of dy.

    Returns:
        The default and candidates for tuning.
    """
    block_r = max(16, next_power_of_2(R))

    def config(form: str, m: int, n: int, warps: int, stages: int, waves: int = 2) -> triton.Config:
        blocks = {"FORM": form, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_R": block_r, "WAVES": waves}
        return triton.Config(blocks, num_warps=warps, num_stages=stages)

    if R > 64:
        return (APART,)
    if arch == "interpret":
        return config("rn", 16, 32, 4, 1), config("nr", 32, 16, 4, 1), APART
    # no tensor cores, twice the shared memory; or parts without vectors, which spill
    if itemsize == 4 or R % 4:
        return (APART,)
    if arch == "sm_90":  # an H200 at ranks 16 and 64, and by interpolation at 32
        wide, narrow = config("nr", 64, 512, 8, 3, 1), config("nr", 64, 256, 8, 4, 1)
        if R <= 16:
            return wide, narrow, APART
        return (narrow, APART) if R <= 32 else (APART, narrow)
    if arch == "sm_100":
        # of the larger tile there is one program a multiprocessor, and nothing to hide its waits
        found = [config("nr", 64, 512, 8, 2), config("nr", 64, 512, 8, 2, 1)]
        found += [config("nr", 64, 512, 8, 3, 1)] if R <= 16 else []
        found += [config("nr", 64, 256, warps, 2, 2) for warps in (4, 8)]
        found += [config("nr", 64, 256, warps, 3, waves) for warps in (4, 8) for waves in (1, 2)]
        found += [config("nr", 64, 256, warps, 4, 1) for warps in (4, 8)]
        return *found, APART
    if arch == "gfx942":  # wider blocks do not fit, narrower ones write too many parts
        return (config("rn", 64, 256, 8, 2), APART) if R <= 16 else (APART,)
    if R <= 16:
        return config("rn", 64, 512, 8, 2), config("rn", 64, 256, 8, 2), APART
    return config("rn", 64, 256, 8, 2), APART


@triton.jit
def _lora_bwd_ds_db_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # [N, R]
    s_ptr,  # [M, R]
    ds_ptr,  # fp32 [column blocks, M, R], out
    db_ptr,  # fp32 [splits, N, R], out
    M,
    N,
    m_chunk,  # rows of a part of db, a multiple of BLOCK_M
    stride_dy_m,
    stride_s_m: tl.constexpr,  # small ranks: rows that are not 16 apart, and still vectors
    R: tl.constexpr,
    STAGES: tl.constexpr,
    FORM: tl.constexpr,  # "rn": db^T = s^T dy, cp.async for dy; "nr": db = dy^T s, all wgmma
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,  # power of two, >= max(R, 16)
    WAVES: tl.constexpr,  # programs a multiprocessor should get; for the launcher
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    mask_nr = mask_n[:, None] & mask_r[None, :]
    b = tl.load(b_ptr + offs_n[:, None] * R + offs_r[None, :], mask=mask_nr, other=0.0)
    ds_ptr += tl.program_id(0).to(tl.int64) * M * R
    db_ptr += tl.program_id(1).to(tl.int64) * N * R

    db = tl.zeros([BLOCK_R, BLOCK_N] if FORM == "rn" else [BLOCK_N, BLOCK_R], tl.float32)
    m_end = tl.minimum(tl.program_id(1) * m_chunk + m_chunk, M)
    # with the number of stages here, loads that feed no dot are pipelined too
    for m0 in tl.range(tl.program_id(1) * m_chunk, m_end, BLOCK_M, num_stages=STAGES):
        offs_m = m0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask_m = offs_m < M
        mask_mr = mask_m[:, None] & mask_r[None, :]
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dy_m + offs_n[None, :]
        s_ptrs = s_ptr + offs_m[:, None] * stride_s_m + offs_r[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        s = tl.load(s_ptrs, mask=mask_mr, other=0.0)
        ds = tl.dot(dy, b, input_precision="ieee")
        if FORM == "rn":
            db = tl.dot(tl.trans(s), dy, db, input_precision="ieee")
        else:
            db = tl.dot(tl.trans(dy), s, db, input_precision="ieee")
        tl.store(ds_ptr + offs_m[:, None] * R + offs_r[None, :], ds, mask=mask_mr)

    if FORM == "rn":
        db = tl.trans(db)
    tl.store(db_ptr + offs_n[:, None] * R + offs_r[None, :], db, mask=mask_nr)


def lora_bwd_ds_db(
    dy: Tensor,
    b: Tensor,
    s: Tensor,
    scale: float,
    ds: Tensor,
    config: triton.Config | None = None,
) -> Tensor:
    """Launch. Arguments are checked by `fastlora.ops`; last dims have stride 1.

    Args:
        dy: [M, N], fp32, fp16 or bf16.
        b: [N, R], dtype of `dy`, contiguous.
        s: [M, R], dtype of `dy`.
        scale: alpha / R, no unit.
        ds: [M, R], dtype of `dy`, out: scale * dy b.
        config: None for the default of the device.

    Returns:
        [N, R], fp32: scale * dy^T s.
    """
    (M, N), R = dy.shape, b.shape[1]
    db = dy.new_empty(N, R, dtype=torch.float32)
    if M == 0:
        return db.zero_()
    launch = _prepare(chip(), M, N, R, dy.element_size(), (dy.stride(0), s.stride(0)), config)
    if launch is None:
        sums = project(dy, b.T, ds, scale)
        reduce([*sums, Sum(partial_da(dy, s, "kr"), db, scale)])
        return db
    blocks, splits = launch.grid
    ds_parts = dy.new_empty(blocks, M, R, dtype=torch.float32)
    db_parts = dy.new_empty(splits, N, R, dtype=torch.float32)
    launch(dy, b, s, ds_parts, db_parts)
    reduce([Sum(ds_parts, ds, scale), Sum(db_parts, db, scale)])
    return db


@prepared
def _prepare(
    chip: Chip,
    M: int,
    N: int,
    R: int,
    itemsize: int,
    strides: tuple[int, int],  # of dy and s
    config: triton.Config | None,
) -> Launch | None:
    """None for two kernels of others, which is faster at high ranks."""
    config = config or configs(chip.family, R, itemsize)[0]
    if config.kwargs["FORM"] == "apart":
        return None
    block_m, block_n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
    blocks = cdiv(N, block_n)
    splits, steps = split(blocks, cdiv(M, block_m), config.kwargs["WAVES"], chip.multiprocessors)
    return Launch(
        _lora_bwd_ds_db_kernel,
        (blocks, splits),
        M,
        N,
        steps * block_m,
        *strides,
        R=R,
        STAGES=config.num_stages,
        enable_fp_fusion=True,
        **config.all_kwargs(),
    )
