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

from .common import arch, cdiv

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
def configs(arch: str, bits: int) -> tuple[triton.Config, ...]:
    """TILE elements a program, a multiple of 256; with 8 bits LOOKUP in L1 or shared memory."""
    if bits == 32:
        sizes = ((512, 4), (256, 4)) if arch == "interpret" else ((1024, 4), (2048, 8), (512, 4))
        return tuple(_config(*size) for size in sizes)
    if arch == "interpret":
        return _config(512, 4, LOOKUP="gather"), _config(256, 4, LOOKUP="load")
    # the larger a tile, the fewer copies of the tables; with 16 elements a thread AMD would spill
    sizes = ((2048, 8), (1024, 4), (4096, 16))
    if arch != "gfx942":
        sizes = ((2048, 4), (4096, 8), *sizes)
    return (*(_config(*size, LOOKUP="gather") for size in sizes), _config(1024, 4, LOOKUP="load"))


def _config(tile: int, warps: int, **constants: str) -> triton.Config:
    return triton.Config({"TILE": tile, **constants}, num_warps=warps)


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
def _lookup(table_ptr, i, SIZE: tl.constexpr, LOOKUP: tl.constexpr):
    if LOOKUP == "load":
        found = tl.load(table_ptr + i)
    else:
        table = tl.load(table_ptr + tl.arange(0, SIZE))
        found = tl.gather(table, i.reshape([i.numel]), 0).reshape(i.shape)
    return found


@triton.jit
def _decode(code, scale, map_ptr, LOOKUP: tl.constexpr):
    return _lookup(map_ptr, code.to(tl.int32), 256, LOOKUP) * scale[:, None]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _scaled(x):
    """Blocks of numbers, divided by the largest magnitude of the block, and that."""
    scale = tl.reduce(tl.abs(x), 1, _larger)
    reciprocal = tl.div_rn(1.0, scale)
    reciprocal = tl.where(reciprocal < float("inf"), reciprocal, 0.0)
    return x * reciprocal[:, None], scale


# Codes of x, in bits 24 to 31 of a sum: see `codebooks.code_sums`. What is below the table's first
# number has the code of that; bits that are no number find some entry too.


@triton.jit
def _encode_signed(x, sums_ptr, LOOKUP: tl.constexpr):
    x = tl.maximum(x, -0.995)  # there is no -1, beyond the last midpoint is only 1
    bits = x.to(tl.uint32, bitcast=True)
    # the sign decides where |x| is a midpoint
    key = tl.maximum((bits << 1) | (bits >> 31), 0x30000000 << 1)
    total = _lookup(sums_ptr, ((key >> 18) & 2047).to(tl.int32), 2048, LOOKUP)
    total += (key << 6).to(tl.int32, bitcast=True)
    # 127 + n, or 127 - n = ~(127 + n) - 1
    negative = x.to(tl.int32, bitcast=True) >> 31
    return (((total ^ negative) + (negative << 24)) >> 24).to(tl.uint8)


@triton.jit
def _encode_unsigned(x, v, sums_ptr, LOOKUP: tl.constexpr):
    # 2^-21, if v > 0, has code 1, the number before it 0: m, divided by a lost v, would explode
    least = 0x34FFFFFF + tl.minimum(v.to(tl.int32, bitcast=True), 1)
    key = tl.maximum(x.to(tl.int32, bitcast=True), least)
    total = _lookup(sums_ptr, (key >> 16) & 4095, 4096, LOOKUP) + (key << 8)
    return (total >> 24).to(tl.uint8)


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
    m_sums_ptr,  # int32 [2048]
    v_sums_ptr,  # int32 [4096]
    first,  # of the span
    last,
    P,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    TABLE_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    begin = first + tl.program_id(0).to(tl.int64) * TILE
    end = tl.minimum(begin + TILE, last)
    low = tl.load(tiles_ptr + 2 * (begin // TABLE_TILE))
    stop = tl.load(starts_ptr + low + 1)  # of the first parameter
    # a part of a tile: masks take registers
    PART: tl.constexpr = TILE // 4 if TILE >= 4 * BLOCK else BLOCK
    if (stop >= begin + TILE) & (last >= begin + TILE):
        _one_parameter(
            low,
            P,
            begin,
            begin - first,
            pointers_ptr,
            starts_ptr,
            hypers_ptr,
            m_ptr,
            v_ptr,
            m_scale_ptr,
            v_scale_ptr,
            m_map_ptr,
            v_map_ptr,
            m_sums_ptr,
            v_sums_ptr,
            DTYPE,
            ALIGNED,
            BLOCK,
            TILE,
            LOOKUP,
        )
    else:
        high = tl.load(tiles_ptr + 2 * ((end - 1) // TABLE_TILE) + 1)
        for part in range(0, TILE, PART):
            _any_parameters(
                low,
                high,
                P,
                begin + part,
                end,
                begin + part - first,
                pointers_ptr,
                starts_ptr,
                hypers_ptr,
                m_ptr,
                v_ptr,
                m_scale_ptr,
                v_scale_ptr,
                m_map_ptr,
                v_map_ptr,
                m_sums_ptr,
                v_sums_ptr,
                DTYPE,
                ALIGNED,
                BLOCK,
                PART,
                LOOKUP,
            )


@triton.jit
def _one_parameter(
    i,
    P,
    begin,
    at,  # begin, counted from the span's
    pointers_ptr,
    starts_ptr,
    hypers_ptr,
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    m_map_ptr,
    v_map_ptr,
    m_sums_ptr,
    v_sums_ptr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """A tile that lies in parameter i: nothing is masked."""
    w_ptr, g_ptr, given, start, _, row = _slot(i, P, pointers_ptr, starts_ptr, DTYPE, ALIGNED)
    rows = tl.arange(0, TILE // BLOCK)
    offs = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w_ptrs, g_ptrs = w_ptr + (begin - start) + offs, g_ptr + (begin - start) + offs
    m_ptrs, v_ptrs = m_ptr + at + offs, v_ptr + at + offs
    m_scale_ptrs, v_scale_ptrs = m_scale_ptr + at // BLOCK + rows, v_scale_ptr + at // BLOCK + rows
    if given:
        w, g = tl.load(w_ptrs).to(tl.float32), tl.load(g_ptrs).to(tl.float32)
        m = _decode(tl.load(m_ptrs), tl.load(m_scale_ptrs), m_map_ptr, LOOKUP)
        v = _decode(tl.load(v_ptrs), tl.load(v_scale_ptrs), v_map_ptr, LOOKUP)
        w, m, v = _update(w, g, m, v, hypers_ptr + 8 * row)
        tl.store(w_ptrs, w.to(DTYPE))
        x, scale = _scaled(m)
        tl.store(m_ptrs, _encode_signed(x, m_sums_ptr, LOOKUP))
        tl.store(m_scale_ptrs, scale)
        x, scale = _scaled(v)
        tl.store(v_ptrs, _encode_unsigned(x, v, v_sums_ptr, LOOKUP))
        tl.store(v_scale_ptrs, scale)


@triton.jit
def _any_parameters(
    low,
    high,
    P,
    begin,
    end,
    at,  # begin, counted from the span's
    pointers_ptr,
    starts_ptr,
    hypers_ptr,
    m_ptr,
    v_ptr,
    m_scale_ptr,
    v_scale_ptr,
    m_map_ptr,
    v_map_ptr,
    m_sums_ptr,
    v_sums_ptr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """A tile, or what is left of it before `end`, that holds some of parameters low .. high - 1."""
    size = tl.minimum(end - begin, TILE).to(tl.int32)  # below 0 if nothing is left
    rows = tl.arange(0, TILE // BLOCK)
    offs = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    m_ptrs, v_ptrs = m_ptr + at + offs, v_ptr + at + offs
    m_scale_ptrs, v_scale_ptrs = m_scale_ptr + at // BLOCK + rows, v_scale_ptr + at // BLOCK + rows
    there, there_block = offs < size, rows * BLOCK < size
    scale = tl.load(m_scale_ptrs, mask=there_block, other=0.0)
    m = _decode(tl.load(m_ptrs, mask=there, other=0), scale, m_map_ptr, LOOKUP)
    scale = tl.load(v_scale_ptrs, mask=there_block, other=0.0)
    v = _decode(tl.load(v_ptrs, mask=there, other=0), scale, v_map_ptr, LOOKUP)
    updated = tl.zeros([TILE // BLOCK], tl.int32)
    for i in range(low, high):
        w_ptr, g_ptr, given, start, stop, row = _slot(
            i, P, pointers_ptr, starts_ptr, DTYPE, ALIGNED
        )
        if given:
            w_ptrs, g_ptrs = w_ptr + (begin - start) + offs, g_ptr + (begin - start) + offs
            from_here = tl.minimum(tl.maximum(start - begin, 0), TILE).to(tl.int32)
            to_here = tl.maximum(tl.minimum(stop - begin, size), 0).to(tl.int32)
            inside = (offs >= from_here) & (offs < to_here)
            updated |= tl.max(inside.to(tl.int32), 1)
            w = tl.load(w_ptrs, mask=inside).to(tl.float32)
            g = tl.load(g_ptrs, mask=inside).to(tl.float32)
            w, new_m, new_v = _update(w, g, m, v, hypers_ptr + 8 * row)
            tl.store(w_ptrs, w.to(DTYPE), mask=inside)
            m, v = tl.where(inside, new_m, m), tl.where(inside, new_v, v)
    # what lies behind the end has no say in the scale
    m, v = tl.where(there, m, 0.0), tl.where(there, v, 0.0)
    # decoded and encoded again, moments would change
    there, there_block = there & (updated[:, None] == 1), there_block & (updated == 1)
    x, scale = _scaled(m)
    tl.store(m_ptrs, _encode_signed(x, m_sums_ptr, LOOKUP), mask=there)
    tl.store(m_scale_ptrs, scale, mask=there_block)
    x, scale = _scaled(v)
    tl.store(v_ptrs, _encode_unsigned(x, v, v_sums_ptr, LOOKUP), mask=there)
    tl.store(v_scale_ptrs, scale, mask=there_block)


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
    _launch(_adamw32_kernel, table, first, (m, v), {}, config or configs(arch(), 32)[0])


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
        maps: values of the codes, fp32 [256], signed and unsigned, and the same way
            `codebooks.code_sums`.
        config: one of `configs`.
    """
    _launch(
        _adamw8_kernel,
        table,
        first,
        (*moments, *maps),
        {"BLOCK": BLOCK},
        config or configs(arch(), 8)[0],
    )


def _launch(
    kernel: triton.JITFunction,
    table: Table,
    first: int,
    tensors: tuple[Tensor, ...],
    constants: dict[str, int],
    config: triton.Config,
) -> None:
    n = tensors[0].numel()
    kernel[(cdiv(n, config.kwargs["TILE"]),)](
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
