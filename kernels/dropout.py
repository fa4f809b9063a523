"""The dropout mask, made again wherever it is needed and never stored.

Philox4x32 with 7 rounds, key = seed, counter = (k >> 3, m low, m high, offset low); one call gives
eight 16-bit numbers, those of elements k..k+7 of row m. An element is dropped iff its number is
below the threshold = round(p * 65536). So the mask is a function of (seed, offset, m, k) alone.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 4.3.
"""

import triton
import triton.language as tl


def keep_scale(threshold: int) -> float:
    """Factor of kept elements, no unit: 1 / (1 - p) of the p that `threshold` stands for."""
    return 65536 / (65536 - threshold)


@triton.jit
def keep_mask(
    seed,  # int64 scalar, state[0]
    offset,  # int64 scalar, state[1]
    rows,  # int64 [BLOCK_M]
    k0,  # first column, a multiple of 8
    threshold,  # int32 scalar in [0, 65536)
    BLOCK_K: tl.constexpr,  # power of two, >= 8
):
    """Which elements of the tile [rows, k0 : k0 + BLOCK_K] are kept: int1 [BLOCK_M, BLOCK_K].

    Load `seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)` once, outside of loops.
    """
    group = (k0 // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)
    m_low, m_high = rows.to(tl.uint32), (rows >> 32).to(tl.uint32)
    # words that depend on the row or the column alone stay vectors: two rounds of seven are cheap
    c0, c1, c2, c3 = tl.philox(
        seed, group[None, :], m_low[:, None], m_high[:, None], offset.to(tl.uint32), 7
    )
    words = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (rows.shape[0], BLOCK_K // 2))
    # halves, low one first, as upper halves of words: what lies below cannot change a comparison
    halves = tl.reshape(tl.join(words << 16, words), (rows.shape[0], BLOCK_K))
    return halves >= tl.cast(threshold, tl.uint32) << 16
