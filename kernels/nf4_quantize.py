"""NF4 quantisation of a flat weight: block scales, and the codes of the nearest values.

    absmax[b] = max_e |w[e]| over block b          code[e] = #{t : t < fl(w[e] * fl(1 / absmax[b]))}

Where 1 / absmax is not finite (zeros, tiny or NaN) every code of the block is 7, the value 0.
Bound by memory: reads each weight once (2 bytes in bf16), writes half a byte.
Source: Dettmers et al. 2023, arXiv:2305.14314, section 3; thresholds and bytes of bitsandbytes.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import nf4_tables
from .common import arch, cdiv

NF4_THRESHOLDS = tl.constexpr(nf4_tables.NF4_THRESHOLDS)


@cache
def configs(arch: str) -> tuple[triton.Config, ...]:
    """TILE weights a program, or one block if that is larger."""
    tiles = (256,) if arch == "interpret" else (4096, 2048)
    return tuple(triton.Config({"TILE": tile}, num_warps=4) for tile in tiles)


@triton.jit
def _nf4_quantize_kernel(
    w_ptr,  # [numel]
    q_ptr,  # uint8 [size], out
    absmax_ptr,  # fp32 [blocks], out
    nonfinite_ptr,  # int32 [programs], out
    numel,
    size,  # ceil(numel / 2)
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = max(TILE // BLOCKSIZE, 1)
    pid = tl.program_id(0).to(tl.int64)
    start = pid * (ROWS * BLOCKSIZE)
    row = tl.arange(0, ROWS)
    offs = row[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    # what lies behind the end is 0 and so gets code 7
    w = tl.load(w_ptr + start + offs, mask=offs < numel - start, other=0.0).to(tl.float32)
    nonfinite = 1 - (tl.abs(w) < float("inf")).to(tl.int32)  # NaN compares false
    tl.store(nonfinite_ptr + pid, tl.sum(nonfinite))

    absmax = tl.max(tl.abs(w), 1)
    # tl.max passes over NaN
    absmax = tl.where(tl.max((w != w).to(tl.int32), 1) == 1, float("nan"), absmax)
    block = pid * ROWS + row
    tl.store(absmax_ptr + block, absmax, mask=row * BLOCKSIZE < numel - start)
    reciprocal = tl.div_rn(1.0, absmax)
    scaled = w * reciprocal[:, None]
    code = tl.full([ROWS, BLOCKSIZE], 15, tl.int32)
    for i in tl.static_range(15):
        # not `+= (scaled > t)`: the NaN of Inf * 0 has code 15
        code -= (scaled <= NF4_THRESHOLDS[i]).to(tl.int32)
    code = tl.where((reciprocal < float("inf"))[:, None], code, 7)

    high, low = tl.split(code.reshape([ROWS, BLOCKSIZE // 2, 2]))
    offs = row[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    q = ((high << 4) | low).to(tl.uint8)
    tl.store(q_ptr + start // 2 + offs, q, mask=offs < size - start // 2)


def quantize_blocks(
    w: Tensor, blocksize: int, config: triton.Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a weight, byte for byte as the reference.

    Args:
        w: [n], fp32, fp16 or bf16, contiguous.
        blocksize: elements per block scale, a power of two from 32 to 4096.
        config: one of `configs`.

    Returns:
        uint8 [ceil(n/2)] codes, high nibble first; fp32 [ceil(n/blocksize)] block scales;
        int64 [] number of NaN and Inf in `w`.
    """
    config = config or configs(arch())[0]
    blocks = cdiv(w.numel(), blocksize)
    programs = cdiv(blocks, max(config.kwargs["TILE"] // blocksize, 1))
    packed = torch.empty(cdiv(w.numel(), 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=w.device)
    nonfinite = torch.empty(programs, dtype=torch.int32, device=w.device)
    _nf4_quantize_kernel[(programs,)](
        w,
        packed,
        absmax,
        nonfinite,
        w.numel(),
        packed.numel(),
        BLOCKSIZE=blocksize,
        enable_fp_fusion=False,
        **config.all_kwargs(),
    )
    return packed, absmax, nonfinite.sum()
