"""The second pass of split reductions: fp32 partial sums added up in their order.

    out[i, j] = scale * sum_p parts[p, i, j]

Deterministic: every partial sum has one writer, every result one reader of its parts, and how many
parts there are depends on shapes and on the device alone. Bound by memory: reads every part once.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Chip, cdiv, chip, next_power_of_2
from .launch import Launch, prepared

# elements of a result that a program adds up: four a thread
BLOCK = 512


class Sum(NamedTuple):
    """One result of the second pass."""

    parts: Tensor  # [P, rows, cols], fp32, contiguous
    out: Tensor  # [rows, cols], any float dtype, rows may be apart
    scale: float  # no unit


def split(blocks: int, steps: int, waves: int, multiprocessors: int) -> tuple[int, int]:
    """Cut a loop into parts, so that a grid fills the device.

    Args:
        blocks: programs of the grid without the split.
        steps: turns of the loop, at least 1.
        waves: programs a multiprocessor should get, at most.
        multiprocessors: how many the device has.

    Returns:
        Number of parts, and turns of each; the last part may have fewer, but never none.
    """
    parts = min(max(waves * multiprocessors // max(blocks, 1), 1), max(steps, 1))
    turns = cdiv(steps, parts)
    return cdiv(steps, turns), turns


@triton.jit
def _reduce_kernel(
    parts0_ptr,  # fp32 [count0, rows0, cols]
    parts1_ptr,  # fp32 [count1, rows1, cols]
    out0_ptr,  # [rows0, cols], out
    out1_ptr,  # [rows1, cols], out
    count0,
    count1,
    rows0,
    rows1,
    cols,
    blocks0,  # programs of the first result
    scale0,
    scale1,
    stride_out0,
    stride_out1,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    pid = tl.program_id(0)
    second = pid >= blocks0
    pid -= tl.where(second, blocks0, 0)
    parts_ptr = tl.where(second, parts1_ptr, parts0_ptr)
    rows = tl.where(second, rows1, rows0)
    col_blocks = tl.cdiv(cols, BLOCK_COLS)
    offs_i = (pid // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_j = pid % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (offs_i < rows)[:, None] & (offs_j < cols)[None, :]
    ptrs = parts_ptr + offs_i[:, None] * cols + offs_j[None, :]
    size = rows.to(tl.int64) * cols
    acc = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    # several loads in flight: the sum waits for memory, not for arithmetic
    for part in tl.range(tl.where(second, count1, count0), loop_unroll_factor=4):
        acc += tl.load(ptrs + part * size, mask=mask, other=0.0)
    acc *= tl.where(second, scale1, scale0)
    # two names, because the results may differ in dtype
    if second:
        out1_ptrs = out1_ptr + offs_i[:, None] * stride_out1 + offs_j[None, :]
        tl.store(out1_ptrs, acc.to(out1_ptr.dtype.element_ty), mask=mask)
    else:
        out0_ptrs = out0_ptr + offs_i[:, None] * stride_out0 + offs_j[None, :]
        tl.store(out0_ptrs, acc.to(out0_ptr.dtype.element_ty), mask=mask)


def reduce(sums: list[Sum]) -> None:
    """Launch the second pass of none, one or two results with equally many columns."""
    if not sums:
        return
    first, second = sums[0], sums[-1]
    cols = first.out.shape[1]
    launch = _prepare(chip(), len(sums), cols, _numbers(first), _numbers(second))
    launch(first.parts, second.parts, first.out, second.out)


def _numbers(s: Sum) -> tuple[int, int, float, int]:
    return s.parts.shape[0], s.out.shape[0], s.scale, s.out.stride(0)


@prepared
def _prepare(
    chip: Chip,
    sums: int,
    cols: int,
    first: tuple[int, int, float, int],
    second: tuple[int, int, float, int],
) -> Launch:
    block_cols = min(next_power_of_2(cols), BLOCK)
    block_rows = BLOCK // block_cols
    counts, rows, scales, strides = zip(first, second, strict=True)
    blocks = [cdiv(n, block_rows) * cdiv(cols, block_cols) for n in rows]
    return Launch(
        _reduce_kernel,
        (sum(blocks[:sums]),),
        *counts,
        *rows,
        cols,
        blocks[0],
        *scales,
        *strides,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
        num_warps=4,
        enable_fp_fusion=True,
    )
