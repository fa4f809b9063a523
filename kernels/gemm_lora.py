"""GEMM with the dense weight that adds the LoRA term before its one rounding.

    y[m, n]  = sum_k x[m, k] w[n, k] + bias[n] + scale * sum_r s[m, r] b[n, r]
    dx[m, k] = sum_n dy[m, n] w[n, k] + mask[m, k] * sum_r ds[m, r] a[r, k]

Bound by arithmetic, 2 * M * N * K operations. Adding the LoRA term to the result of a library's
GEMM would read and write that again: 2 * M * N elements, for dx 2 * M * K.
Source: Zhu et al. 2025, LoRAFusion, arXiv:2510.00206, the LoRA term inside of the GEMM; here after
the loop, where it takes no registers while the loop runs.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import Chip, cdiv, chip, next_power_of_2
from .dropout import keep_mask, keep_scale
from .launch import Launch, prepared


def _config(
    form: str, m: int, n: int, k: int, parts: int, warps: int, stages: int, flatten: bool = False
) -> triton.Config:
    tile = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": parts}
    kwargs = {"FORM": form, "FLATTEN": flatten, **tile}
    return triton.Config(kwargs, num_warps=warps, num_stages=stages)


# for fp32, which the matrix units cannot multiply exactly
_FP32 = _config("pointers", 64, 64, 16, 1, 4, 2)
# for rows that begin anywhere, read element by element: many addresses
_UNALIGNED = _config("pointers", 64, 64, 32, 1, 8, 2)
_INTERPRET = (
    _config("tma", 32, 32, 16, 2, 4, 1),
    _config("pointers", 16, 32, 32, 1, 4, 1),
    _config("pointers", 16, 64, 16, 4, 4, 1),
)


@cache
def configs(
    arch: str, R: int, itemsize: int = 2, aligned: bool = True
) -> tuple[triton.Config, ...]:
    """Configurations, the default first.

    Args:
        arch: key of `common.SHARED_BYTES`.
        R: rank.
        itemsize: bytes of an element of x and w.
        aligned: whether the rows of x, w and y begin at multiples of 16 bytes.

    Returns:
        At least one.
    """
    if arch == "interpret":
        return _INTERPRET if aligned else _INTERPRET[1:]
    if itemsize == 4 or not aligned:
        return (_FP32 if itemsize == 4 else _UNALIGNED,)
    narrow = R <= 64  # more ranks at once would spill
    if arch in ("sm_90", "sm_100"):
        found = [_config("tma", 128, 256, 64, 4 if narrow else 8, 8, 4)]
        # two programs a multiprocessor: one multiplies while the other finishes its tile
        found += [_config("tma", 128, 128, 64, 4 if narrow else 8, 4, 3)]
        if arch == "sm_90" and R <= 32:
            found += [_config("tma", 128, 256, 64, 4, 8, 4, flatten=True)]
    elif arch == "gfx942":
        found = [_config("pointers", 128, 128, 64, 2, 8, 2)]
        found += [_config("pointers", 256, 128, 32, 4, 8, 2)]
    elif narrow:
        depth, stages = (32, 4) if arch == "sm_86" else (64, 3)
        found = [_config("pointers", 128, 128, depth, 4, 8, stages)]
        found += [_config("pointers", 128, 256, 32, 4, 8, 3)] if R <= 16 else []
    else:
        found = [_config("pointers", 128, 64, 64, 2, 8, 3)]
    return tuple(found)


@triton.jit(do_not_specialize=["threshold"])
def _gemm_lora_kernel(
    x_ptr,  # [M, K]; in the form "tma" x, w and y are descriptors
    w_ptr,  # [N, K], BACKWARD: [K, N]
    s_ptr,  # [M, R]
    up_ptr,  # [N, R], BACKWARD: [R, N]
    bias_ptr,  # [N] or None
    state_ptr,  # int64 [2] or None
    y_ptr,  # [M, N], out
    M,
    N,
    K,
    factor,
    threshold,
    stride_x_m,
    stride_w,
    stride_s_m: tl.constexpr,  # small ranks: rows that are not 16 apart, and still vectors
    stride_up: tl.constexpr,
    stride_y_m,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BACKWARD: tl.constexpr,
    FORM: tl.constexpr,  # "tma" or "pointers"
    FLATTEN: tl.constexpr,  # the next tile is loaded while one is finished
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4: a tile is finished in so many, to save registers
):
    COLS: tl.constexpr = BLOCK_N // PARTS
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, col = _origin(tile, M, N, BLOCK_M, BLOCK_N)
        if FORM == "tma":
            acc = _product_tma(x_ptr, w_ptr, row, col, K, BACKWARD, BLOCK_M, BLOCK_N, BLOCK_K)
        else:
            acc = _product_pointers(
                x_ptr, w_ptr, row, col, M, N, K, stride_x_m, stride_w,
                BACKWARD, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        for part in tl.static_range(PARTS):
            y = _part(acc, part, PARTS)
            first = col + part * COLS
            y += factor * _lora(
                s_ptr, up_ptr, state_ptr, row, first, M, N, threshold,
                stride_s_m, stride_up, R, BLOCK_R, BACKWARD, BLOCK_M, COLS,
            )  # fmt: skip
            if bias_ptr is not None:
                offs_n = first + tl.arange(0, COLS)
                y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
            _store(y_ptr, y, row, first, M, N, stride_y_m, BLOCK_M, COLS, FORM)


@triton.jit
def _origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of a tile: eight tiles of rows run together, for the sake of the L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (8 * tiles_n)
    rows = tl.minimum(tiles_m - group * 8, 8)
    inside = tile % (8 * tiles_n)
    return (group * 8 + inside % rows) * BLOCK_M, inside // rows * BLOCK_N


@triton.jit
def _product_tma(
    x, w, row, col, K, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile of x w^T, BACKWARD of x w, from descriptors: fp32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        w_tile = w.load([k, col]) if BACKWARD else w.load([col, k]).T
        acc = tl.dot(x.load([row, k]), w_tile, acc, input_precision="ieee")
    return acc


@triton.jit
def _product_pointers(
    x_ptr, w_ptr, row, col, M, N, K, stride_x_m, stride_w, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same from pointers: rows stay while a number advances, which costs few registers."""
    offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = col + tl.arange(0, BLOCK_N).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_rows = x_ptr + offs_m[:, None] * stride_x_m
    stride_w_row = tl.cast(stride_w, tl.int64)
    w_rows = w_ptr + (offs_k if BACKWARD else offs_n)[:, None] * stride_w_row
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        cols, mask_k = k + offs_k, k + offs_k < K
        x = tl.load(x_rows + cols[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if BACKWARD:
            w_ptrs = w_rows + (k * stride_w_row + offs_n)[None, :]
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        else:
            mask = mask_n[:, None] & mask_k[None, :]
            w = tl.load(w_rows + cols[None, :], mask=mask, other=0.0).T
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _load(source, row, col, rows, cols, stride, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """Tile of a matrix [rows, cols], zeros outside of it."""
    offs_row = row + tl.arange(0, BLOCK_ROW).to(tl.int64)
    offs_col = col + tl.arange(0, BLOCK_COL)
    mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
    return tl.load(source + offs_row[:, None] * stride + offs_col[None, :], mask=mask, other=0.0)


@triton.jit
def _store(
    target, y, row, col, rows, cols, stride, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, FORM
):
    """Round a tile and write it to a matrix [rows, cols]."""
    if FORM == "tma":
        target.store([row, col], y.to(target.dtype))
    else:
        offs_row = row + tl.arange(0, BLOCK_ROW).to(tl.int64)
        offs_col = col + tl.arange(0, BLOCK_COL)
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        ptrs = target + offs_row[:, None] * stride + offs_col[None, :]
        tl.store(ptrs, y.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _part(acc, part: tl.constexpr, PARTS: tl.constexpr):
    """Columns of one part: [BLOCK_M, BLOCK_N / PARTS]."""
    if PARTS > 1:
        low, high = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()
        half: tl.constexpr = PARTS // 2
        acc = _part(low if part < half else high, part % half, half)
    return acc


@triton.jit
def _lora(
    s_ptr, up_ptr, state_ptr, row, col, M, N, threshold, stride_s_m, stride_up,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Unscaled LoRA term of a tile, with dropout if there is a state: fp32 [BLOCK_M, COLS]."""
    term = tl.zeros([BLOCK_M, COLS], tl.float32)
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        s = _load(s_ptr, row, r, M, R, stride_s_m, BLOCK_M, BLOCK_R)
        if BACKWARD:
            up = _load(up_ptr, r, col, R, N, stride_up, BLOCK_R, COLS)
        else:
            up = _load(up_ptr, col, r, N, R, stride_up, COLS, BLOCK_R).T
        term = tl.dot(s, up, term, input_precision="ieee")
    if state_ptr is not None:
        seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
        offs_m = row + tl.arange(0, BLOCK_M).to(tl.int64)
        term = tl.where(keep_mask(seed, offset, offs_m, col, threshold, COLS), term, 0.0)
    return term


def gemm_lora(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    config: triton.Config | None = None,
) -> torch.Tensor:
    """y [M, N] = x w^T + bias + scale * s b^T, dtype of x; arguments are checked by `ops`."""
    y = torch.empty(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, w, s, b, bias, None, y, scale, 0, False, config)
    return y


def gemm_lora_dx(
    dy: torch.Tensor,
    w: torch.Tensor,
    ds: torch.Tensor,
    a: torch.Tensor,
    state: torch.Tensor | None,
    threshold: int,
    config: triton.Config | None = None,
) -> torch.Tensor:
    """dx [M, K] = dy w + mask * (ds a), dtype of dy; the mask is that of `state`."""
    dx = torch.empty(dy.shape[0], w.shape[1], dtype=dy.dtype, device=dy.device)
    state = state if threshold else None
    _launch(dy, w, ds, a, None, state, dx, keep_scale(threshold), threshold, True, config)
    return dx


def _launch(x, w, s, up, bias, state, y, factor, threshold, backward, config) -> None:
    (M, K), N, R = x.shape, y.shape[1], s.shape[1]
    if y.numel() == 0:
        return
    aligned = all(map(_aligned, (x, w, y)))
    strides = tuple(t.stride(0) for t in (x, w, s, up, y))
    launch, blocks = _prepare(
        chip(),
        (M, N, K, R),
        x.element_size(),
        aligned,
        float(factor),
        threshold,
        strides,
        backward,
        config,
    )
    if blocks is not None:
        x, w, y = map(TensorDescriptor.from_tensor, (x, w, y), blocks)
    launch(x, w, s, up, bias, state, y)


@prepared
def _prepare(
    chip: Chip,
    sizes: tuple[int, int, int, int],  # M, N, K, R
    itemsize: int,
    aligned: bool,
    factor: float,
    threshold: int,
    strides: tuple[int, ...],  # of x, w, s, up and y
    backward: bool,
    config: triton.Config | None,
) -> tuple[Launch, list[list[int]] | None]:
    """The launch, and the blocks of x, w and y where it takes descriptors."""
    M, N, K, R = sizes
    config = config or configs(chip.family, R, itemsize, aligned)[0]
    meta = config.kwargs
    programs = cdiv(M, meta["BLOCK_M"]) * cdiv(N, meta["BLOCK_N"])
    blocks = None
    if meta["FORM"] == "tma":
        # eight warps with their tile fill a multiprocessor
        programs = min(programs, chip.multiprocessors * 8 // config.num_warps)
        deep, wide = meta["BLOCK_K"], meta["BLOCK_N"]
        of_w = [deep, wide] if backward else [wide, deep]
        blocks = [[meta["BLOCK_M"], deep], of_w, [meta["BLOCK_M"], wide // meta["PARTS"]]]
    launch = Launch(
        _gemm_lora_kernel,
        (programs,),
        M,
        N,
        K,
        factor,
        threshold,
        *strides,
        R=R,
        BLOCK_R=min(32, max(16, next_power_of_2(R))),
        BACKWARD=backward,
        enable_fp_fusion=True,
        **config.all_kwargs(),
    )
    return launch, blocks


def _aligned(matrix: torch.Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, and none in another one."""
    pitch = matrix.stride(0) * matrix.element_size()
    apart = matrix.stride(0) >= matrix.shape[1] > 0
    return apart and matrix.data_ptr() % 16 == 0 and pitch % 16 == 0
