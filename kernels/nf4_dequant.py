"""NF4 dequantisation: packed codes and block scales to dense rows, up to four weights a launch.

    a[i] = fl(fl(code2[absmax[i]] * absmax2[i / 256]) + offset)    or absmax[i], flat statistics
    w[e] = cast(fl(NF4[code[e]] * a[e / blocksize]))               e = n * K + k

Right of them it can write scale * b (K-augmentation): then [x | s] [w | scale * b]^T is the output
of the linear layer with LoRA, in one GEMM.

Bound by memory: 0.5 bytes a weight read and, in bf16, 2 written; the scales are 1 / blocksize more.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; the bytes are those of bitsandbytes.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Chip, cdiv, chip
from .launch import Launch, prepared
from .nf4_tables import NF4_CODE

MAX_WEIGHTS = 4  # a launch


class Packed(NamedTuple):
    """A quantised weight [N, K]; its statistics are flat, or nested and then all there.

    Attributes:
        qweight: uint8, ceil(N*K/2) elements, contiguous. Two codes a byte, high nibble first.
        absmax: [blocks], fp32 or, nested, uint8. Block scales, or their codes.
        absmax2: [ceil(blocks/256)], fp32, nested only. Second-level scales.
        code2: [256], fp32, nested only. Values of the codes in `absmax`.
        offset: [], fp32, nested only. Mean of the block scales.
        N: rows.
    """

    qweight: Tensor
    absmax: Tensor
    absmax2: Tensor | None
    code2: Tensor | None
    offset: Tensor | None
    N: int


class Tail(NamedTuple):
    """The LoRA up-projections of the weights, which go right of their columns.

    Attributes:
        b: [N_i, R_i] each, fp32, fp16 or bf16, contiguous.
        scales: alpha / R_i each, no unit.
    """

    b: tuple[Tensor, ...]
    scales: tuple[float, ...]


@cache
def configs(arch: str) -> tuple[triton.Config, ...]:
    """TILE weights a program; LOOKUP of a code in L1 ("load") or in shared memory ("gather")."""
    if arch == "interpret":
        return _config(256, "load"), _config(256, "gather")
    # gather has fewer instructions but barriers; others measured it fastest on Blackwell
    lookups = ("gather", "load") if arch == "sm_100" else ("load", "gather")
    # 8 weights a thread: small matrices, more programs; 64: large ones, more bytes in flight
    lanes, each = (64, (32, 8)) if arch == "gfx942" else (32, (32, 8, 64))  # there 64 would spill
    return tuple(_config(4 * lanes * n, lookup) for n in each for lookup in lookups)


def _config(tile: int, lookup: str) -> triton.Config:
    return triton.Config({"TILE": tile, "LOOKUP": lookup}, num_warps=4)


@triton.jit(do_not_specialize=["first_programs", "first_rows"])
def _nf4_dequant_kernel(
    weights,  # a `Packed` each
    b_ptrs,  # [N_i, R_i] each, () without tail
    code_ptr,  # fp32 [16]
    out_ptrs,  # [N_i, K + T] each, out
    scales,  # of b
    first_programs,  # of each weight and, last, of the tail
    first_rows,  # of each weight and, last, the number of rows
    WEIGHTS: tl.constexpr,  # how many; Triton 3.6 has no len of tuples that hold None
    K: tl.constexpr,
    LD: tl.constexpr,  # row stride of out
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,  # runs of G weights share row and scale and are whole words; 0: there are none
    LOOKUP: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of the tail, the first of each b
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,  # power of two, >= T
    ROWS_T: tl.constexpr,  # of the tail, a program
):
    pid = tl.program_id(0)
    if pid < first_programs[WEIGHTS]:
        _store_weights(
            pid,
            weights,
            code_ptr,
            out_ptrs,
            first_programs,
            WEIGHTS,
            K,
            LD,
            BLOCKSIZE,
            TILE,
            G,
            LOOKUP,
        )
    elif len(b_ptrs) > 0:
        _store_tail(
            pid - first_programs[WEIGHTS],
            b_ptrs,
            out_ptrs[0] + K,
            scales,
            first_rows,
            LD,
            RANKS,
            COLUMNS,
            T,
            BLOCK_T,
            ROWS_T,
        )


@triton.jit
def _store_weights(
    pid,
    weights,
    code_ptr,
    out_ptrs,
    first_programs,
    WEIGHTS: tl.constexpr,
    K: tl.constexpr,
    LD: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    # the weight that this program belongs to
    w = weights[0]
    q_ptr, absmax_ptr, absmax2_ptr = w.qweight, w.absmax, w.absmax2
    code2_ptr, offset_ptr, N = w.code2, w.offset, w.N
    out_ptr, first = out_ptrs[0], first_programs[0]
    for i in tl.static_range(1, WEIGHTS):
        w, mine = weights[i], pid >= first_programs[i]
        q_ptr = tl.where(mine, w.qweight, q_ptr)
        absmax_ptr = tl.where(mine, w.absmax, absmax_ptr)
        if absmax2_ptr is not None:
            absmax2_ptr = tl.where(mine, w.absmax2, absmax2_ptr)
            code2_ptr = tl.where(mine, w.code2, code2_ptr)
            offset_ptr = tl.where(mine, w.offset, offset_ptr)
        N = tl.where(mine, w.N, N)
        out_ptr = tl.where(mine, out_ptrs[i], out_ptr)
        first = tl.where(mine, first_programs[i], first)

    start = (pid - first).to(tl.int64) * TILE
    left = N * tl.full([], K, tl.int64) - start
    if G > 0:
        ROWS: tl.constexpr = TILE // G
        # what K is a multiple of, so that all elements of a vector have one mask
        left = tl.multiple_of(tl.minimum(left, TILE).to(tl.int32), 32 if K % 32 == 0 else 8)
        run = tl.arange(0, ROWS)
        g = tl.arange(0, G)
        block = start // BLOCKSIZE + run // (BLOCKSIZE // G)
        a = _scale(block, run * G < left, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr)
        words = run[:, None] * (G // 8) + tl.arange(0, G // 8)[None, :]
        word_ptrs = q_ptr.to(tl.pointer_type(tl.int32)) + start // 8 + words
        q = tl.load(word_ptrs, mask=words < left // 8, other=0)
        j = tl.arange(0, 8)
        shift = (j // 2) * 8 + (1 - j % 2) * 4  # bytes in order, of each the high nibble first
        code = ((q[:, :, None] >> shift[None, None, :]) & 15).reshape([ROWS, G])
        w = _lookup(code, code_ptr, LOOKUP) * a[:, None]
        offs = run[:, None] * G + g[None, :]
        mask = offs < left
        if LD == K:
            w_ptrs = out_ptr + start + offs
        else:
            run = start // G + run
            n = run // (K // G)
            k = run % (K // G) * G
            w_ptrs = out_ptr + (n * LD + k)[:, None] + g[None, :]
    else:
        offs = start + tl.arange(0, TILE)
        mask = tl.arange(0, TILE) < left
        a = _scale(offs // BLOCKSIZE, mask, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr)
        q = tl.load(q_ptr + offs // 2, mask=mask, other=0).to(tl.int32)
        code = (q >> (1 - offs % 2).to(tl.int32) * 4) & 15
        w = _lookup(code, code_ptr, LOOKUP) * a
        w_ptrs = out_ptr + offs // K * LD + offs % K
    tl.store(w_ptrs, w.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_tail(
    pid,
    b_ptrs,
    out_ptr,
    scales,
    first_rows,
    LD: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
):
    n = pid.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    t = tl.arange(0, BLOCK_T)[None, :]
    value = tl.zeros([ROWS, BLOCK_T], tl.float32)
    for i in tl.static_range(len(b_ptrs)):
        r = t - COLUMNS[i]
        mask = (n >= first_rows[i]) & (n < first_rows[i + 1]) & (r >= 0) & (r < RANKS[i])
        b = tl.load(b_ptrs[i] + (n - first_rows[i]) * RANKS[i] + r, mask=mask, other=0.0)
        value = tl.where(mask, b.to(tl.float32) * scales[i], value)
    mask = (n < first_rows[len(b_ptrs)]) & (t < T)
    tl.store(out_ptr + n * LD + t, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _scale(block, mask, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr):
    """Scales of blocks, fp32."""
    a = tl.load(absmax_ptr + block, mask=mask, other=0)
    if absmax2_ptr is not None:
        c = tl.load(code2_ptr + a.to(tl.int32))
        s = tl.load(absmax2_ptr + block // 256, mask=mask, other=0.0)
        # c * s + offset would be contracted to one rounding
        a = tl.fma(c, s, 0.0) + tl.load(offset_ptr)
    return a


@triton.jit
def _lookup(code, code_ptr, LOOKUP: tl.constexpr):
    if LOOKUP == "load":
        w = tl.load(code_ptr + code)
    else:
        table = tl.load(code_ptr + tl.arange(0, 16))
        w = tl.gather(table, code.reshape([code.numel]), 0).reshape(code.shape)
    return w


def nf4_dequant(
    weights: Sequence[Packed],
    K: int,
    blocksize: int,
    out: Tensor,
    tail: Tail | None = None,
    config: triton.Config | None = None,
) -> None:
    """Decode weights into stacked rows, bit for bit as the reference.

    Args:
        weights: [N_i, K] each.
        K: columns of every weight.
        blocksize: elements per block scale, a power of two from 32 to 4096.
        out: [sum N_i, K + T], fp32, fp16 or bf16, any row stride. Receives the weights in the first
            K columns; the other T columns are written only with `tail`.
        tail: scales[i] * b[i] goes into the rows of weight i and the columns right of those of
            b[i - 1]; everything else right of column K becomes zero.
        config: one of `configs`.
    """
    # words hold codes of one row only, and are aligned
    words = K % 8 == 0 and all(weight.qweight.data_ptr() % 4 == 0 for weight in weights)
    b, scales = tail or ((), ())
    ranks = tuple(b_i.shape[1] for b_i in b)
    columns = tuple(accumulate(ranks, initial=0))
    T = out.shape[1] - K if tail else 0
    row = 0
    for part in _launches(weights):
        mine = tuple(weights[part])
        sizes = tuple(weight.N for weight in mine)
        shape = sizes, K, out.stride(0), blocksize
        beside = scales[part], ranks[part], columns[part], T
        launch = _prepare(chip(), shape, words, beside, config)
        rows = out[row : row + sum(sizes)].split_with_sizes(sizes)
        row += sum(sizes)
        launch(mine, b[part], _code_table(out.device), rows)


@prepared
def _prepare(
    chip: Chip,
    shape: tuple[tuple[int, ...], int, int, int],  # rows of each weight, K, stride, block size
    words: bool,
    beside: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...], int],  # of the tail
    config: triton.Config | None,
) -> Launch:
    (sizes, K, ld, blocksize), (scales, ranks, columns, T) = shape, beside
    config = config or configs(chip.family)[0]
    # without words a weight takes more registers
    tile = config.kwargs["TILE"] if words else min(config.kwargs["TILE"], 1024)
    block_t = 1 << max(T - 1, 0).bit_length()
    rows_t = max(tile // block_t, 1)
    first_programs = tuple(accumulate((cdiv(N * K, tile) for N in sizes), initial=0))
    first_rows = tuple(accumulate(sizes, initial=0))
    tail_programs = cdiv(first_rows[-1], rows_t) if ranks else 0
    return Launch(
        _nf4_dequant_kernel,
        (first_programs[-1] + tail_programs,),
        scales,
        first_programs,
        first_rows,
        WEIGHTS=len(sizes),
        K=K,
        LD=ld,
        BLOCKSIZE=blocksize,
        G=min(blocksize, tile, K & -K if ld != K else tile) if words else 0,
        RANKS=ranks,
        COLUMNS=columns,
        T=T,
        BLOCK_T=block_t,
        ROWS_T=rows_t,
        enable_fp_fusion=False,
        **config.all_kwargs() | {"TILE": tile},
    )


def _launches(weights: Sequence[Packed]) -> Iterator[slice]:
    """Slices of at most MAX_WEIGHTS neighbours with the same kind of statistics."""
    first = 0
    for i in range(1, len(weights) + 1):
        full = i == len(weights) or i - first == MAX_WEIGHTS
        if full or weights[i].absmax.dtype != weights[first].absmax.dtype:
            yield slice(first, i)
            first = i


@cache
def _code_table(device: torch.device) -> Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)
