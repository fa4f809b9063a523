"""AdamW for all parameters at once, with moments in fp32 or in blocks of 256 8-bit codes.

    m = m + (1 - beta1) (g - m)          v = beta2 v + ((1 - beta2) g) g
    w = w decay - step_size (m / (sqrt(v) correction + eps))

Parameters lie one after another in a flat vector, and a program updates one tile of it, whatever
parameters that holds: their addresses are in a table. Every operation is rounded, none is fused.

Bound by memory: an fp32 element moves 28 bytes, a bf16 one 22; with 8-bit moments 16 and 10.
Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; Dettmers et al. 2022,
arXiv:2110.02861 (8-bit moments; the decoded ones of this step update the parameter).
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import arch

BLOCK = 256  # 8-bit moments that share one scale
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Table(NamedTuple):
    """Where the parameters of a flat vector are, on its device.

    Attributes:
        pointers: int64 [3, P]: address of each parameter, of its gradient (0 without), and its row
            of `hypers`.
        starts: int64 [P + 1]: its first element in the vector, and at last the vector's length.
        tiles: int32 [ceil(length / TABLE_TILE), 2]: the first parameter of each tile, and the one
            after its last.
        hypers: fp32 [rows, 8], see `optim.flat.adamw_hypers`.
        dtype: of parameters and gradients.
        aligned: whether all addresses and starts are multiples of 16.
    """

    pointers: Tensor
    starts: Tensor
    tiles: Tensor
    hypers: Tensor
    dtype: torch.dtype
    aligned: bool


TABLE_TILE = 1024  # elements of an entry of `Table.tiles`; a program may have another tile


@cache
def configs(arch: str) -> tuple[triton.Config, ...]:
    """TILE elements a program, a multiple of 256."""
    if arch == "interpret":
        return _config(512, 4), _config(256, 4)
    return tuple(_config(*c) for c in ((1024, 4), (2048, 8), (2048, 4), (512, 4)))


def _config(tile: int, warps: int) -> triton.Config:
    return triton.Config({"TILE": tile}, num_warps=warps)


@triton.jit
def _update(w, g, m, v, hypers_ptr):
    decay, step_size = tl.load(hypers_ptr), tl.load(hypers_ptr + 1)
    correction, eps = tl.load(hypers_ptr + 2), tl.load(hypers_ptr + 3)
    rest1, beta2 = tl.load(hypers_ptr + 4), tl.load(hypers_ptr + 5)
    rest2, sign = tl.load(hypers_ptr + 6), tl.load(hypers_ptr + 7)
    g = g * sign
    m = m + rest1 * (g - m)
    v = beta2 * v + (rest2 * g) * g
    step = tl.div_rn(m, tl.sqrt_rn(v) * correction + eps)
    return w * decay - step_size * step, m, v


@triton.jit
def _slot(i, P, pointers_ptr, starts_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Of parameter i: pointers to it and its gradient, start, end, and row."""
    pointer: tl.constexpr = tl.pointer_type(DTYPE)
    w_ptr = tl.load(pointers_ptr + i).to(pointer)
    given = tl.load(pointers_ptr + P + i)
    g_ptr = given.to(pointer)
    row = tl.load(pointers_ptr + 2 * P + i)
    start, end = tl.load(starts_ptr + i), tl.load(starts_ptr + i + 1)
    if ALIGNED:
        w_ptr, g_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16)
        start, end = tl.multiple_of(start, 16), tl.multiple_of(end, 16)
    return w_ptr, g_ptr, given != 0, start, end, row


@triton.jit
def _adamw32_kernel(
    pointers_ptr,
    starts_ptr,
    tiles_ptr,
    hypers_ptr,
    m_ptr,  # fp32 [last - first], of the span
    v_ptr,
    first,  # of the span
    last,
    P,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):
    begin = first + tl.program_id(0).to(tl.int64) * TILE
    end = tl.minimum(begin + TILE, last)
    element = begin + tl.arange(0, TILE)
    m_ptr += begin - first
    v_ptr += begin - first
    offs = tl.arange(0, TILE)
    low = tl.load(tiles_ptr + 2 * (begin // TABLE_TILE))
    high = tl.load(tiles_ptr + 2 * ((end - 1) // TABLE_TILE) + 1)
    for i in range(low, high):
        w_ptr, g_ptr, given, start, stop, row = _slot(
            i, P, pointers_ptr, starts_ptr, DTYPE, ALIGNED
        )
        if given:
            inside = (element >= start) & (element < tl.minimum(stop, end))
            at = element - start
            w = tl.load(w_ptr + at, mask=inside).to(tl.float32)
            g = tl.load(g_ptr + at, mask=inside).to(tl.float32)
            m = tl.load(m_ptr + offs, mask=inside)
            v = tl.load(v_ptr + offs, mask=inside)
            w, m, v = _update(w, g, m, v, hypers_ptr + 8 * row)
            tl.store(w_ptr + at, w.to(DTYPE), mask=inside)
            tl.store(m_ptr + offs, m, mask=inside)
            tl.store(v_ptr + offs, v, mask=inside)


@triton.jit
def _decode(code_ptr, scale_ptr, map_ptr, block, offs, mask, mask_block):
    code = tl.load(code_ptr + offs, mask=mask, other=0).to(tl.int32)
    scale = tl.load(scale_ptr + block, mask=mask_block, other=0.0)
    return tl.load(map_ptr + code) * scale[:, None]


@triton.jit
def _encode(x, guess_ptr, edges_ptr):
    """Codes and scales: the code is a guess by x's upper 16 bits, or the next one."""
    scale = tl.max(tl.abs(x), 1)
    # tl.max passes over NaN
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) == 1, float("nan"), scale)
    reciprocal = tl.div_rn(1.0, scale)
    reciprocal = tl.where(reciprocal < float("inf"), reciprocal, 0.0)
    x = x * reciprocal[:, None]
    guess = tl.load(guess_ptr + (x.to(tl.uint32, bitcast=True) >> 16)).to(tl.int32)
    return guess + (x > tl.load(edges_ptr + guess)).to(tl.int32), scale


@triton.jit
def _adamw8_kernel(
    pointers_ptr,
    starts_ptr,
    tiles_ptr,
    hypers_ptr,
    m_ptr,  # uint8 [last - first], of the span
    v_ptr,
    m_scale_ptr,  # fp32 [ceil((last - first) / 256)]
    v_scale_ptr,
    m_map_ptr,  # fp32 [256], values of the codes
    v_map_ptr,
    m_guess_ptr,  # uint8 [65536]
    v_guess_ptr,
    m_edges_ptr,  # fp32 [255]
    v_edges_ptr,
    first,  # of the span
    last,
    P,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // BLOCK
    begin = first + tl.program_id(0).to(tl.int64) * TILE
    end = tl.minimum(begin + TILE, last)
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    element = begin + offs
    m_ptr += begin - first
    v_ptr += begin - first
    m_scale_ptr += (begin - first) // BLOCK
    v_scale_ptr += (begin - first) // BLOCK
    there, there_block = element < end, begin + rows * BLOCK < end
    m = _decode(m_ptr, m_scale_ptr, m_map_ptr, rows, offs, there, there_block)
    v = _decode(v_ptr, v_scale_ptr, v_map_ptr, rows, offs, there, there_block)
    low = tl.load(tiles_ptr + 2 * (begin // TABLE_TILE))
    high = tl.load(tiles_ptr + 2 * ((end - 1) // TABLE_TILE) + 1)
    updated = tl.zeros([ROWS], tl.int32)
    for i in range(low, high):
        w_ptr, g_ptr, given, start, stop, row = _slot(
            i, P, pointers_ptr, starts_ptr, DTYPE, ALIGNED
        )
        if given:
            inside = (element >= start) & (element < tl.minimum(stop, end))
            updated |= tl.max(inside.to(tl.int32), 1)
            at = element - start
            w = tl.load(w_ptr + at, mask=inside).to(tl.float32)
            g = tl.load(g_ptr + at, mask=inside).to(tl.float32)
            w, new_m, new_v = _update(w, g, m, v, hypers_ptr + 8 * row)
            tl.store(w_ptr + at, w.to(DTYPE), mask=inside)
            m, v = tl.where(inside, new_m, m), tl.where(inside, new_v, v)
    # what lies behind the end has no say in the scale
    m, v = tl.where(there, m, 0.0), tl.where(there, v, 0.0)
    # decoded and encoded again, moments would change
    there, there_block = there & (updated[:, None] == 1), there_block & (updated == 1)
    code, scale = _encode(m, m_guess_ptr, m_edges_ptr)
    tl.store(m_ptr + offs, code.to(tl.uint8), mask=there)
    tl.store(m_scale_ptr + rows, scale, mask=there_block)
    code, scale = _encode(v, v_guess_ptr, v_edges_ptr)
    code = tl.maximum(code, (v > 0).to(tl.int32))  # m, divided by a lost v, would explode
    tl.store(v_ptr + offs, code.to(tl.uint8), mask=there)
    tl.store(v_scale_ptr + rows, scale, mask=there_block)


def adamw32(
    table: Table, first: int, m: Tensor, v: Tensor, config: triton.Config | None = None
) -> None:
    """Update a span of the vector, with moments in fp32.

    Args:
        table: the parameters, which are overwritten.
        first: where the span begins.
        m: fp32 [n], the first moments of the span; overwritten.
        v: fp32 [n], the second ones; overwritten.
        config: one of `configs`.
    """
    _launch(_adamw32_kernel, table, first, (m, v), {}, config)


def adamw8(
    table: Table,
    first: int,
    moments: tuple[Tensor, Tensor, Tensor, Tensor],
    maps: tuple[Tensor, ...],
    config: triton.Config | None = None,
) -> None:
    """Update a span of the vector, with moments in 8 bits.

    Args:
        table: the parameters, which are overwritten.
        first: where the span begins, a multiple of 256.
        moments: codes of the first and second moments, uint8 [n], and their scales, fp32
            [ceil(n / 256)]; overwritten.
        maps: values of the codes, fp32 [256], guesses of a code, uint8 [65536], and where codes
            change, fp32 [255]: two of each, signed and unsigned.
        config: one of `configs`.
    """
    _launch(_adamw8_kernel, table, first, (*moments, *maps), {"BLOCK": BLOCK}, config)


def _launch(
    kernel: triton.JITFunction,
    table: Table,
    first: int,
    tensors: tuple[Tensor, ...],
    constants: dict[str, int],
    config: triton.Config | None,
) -> None:
    config = config or configs(arch())[0]
    n = tensors[0].numel()
    kernel[(triton.cdiv(n, config.kwargs["TILE"]),)](
        table.pointers,
        table.starts,
        table.tiles,
        table.hypers,
        *tensors,
        first,
        first + n,
        table.pointers.shape[1],
        DTYPE=DTYPES[table.dtype],
        ALIGNED=table.aligned,
        TABLE_TILE=TABLE_TILE,
        enable_fp_fusion=False,
        **constants,
        **config.all_kwargs(),
    )
