"""The mask of the kernels against the reference, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import DEVICE
from triton_helpers import needs_triton

from fastlora import reference
from fastlora.kernels.dropout import keep_mask, keep_scale

pytestmark = needs_triton

STATES = [  # seed, offset
    (0, 0),
    (-1, 1),  # all bits of the key
    (2**63 - 1, 2**33 + 7),  # only the low word of the offset counts
    (-(2**63), -2),
    (0x1234567890ABCDEF, 5),
]
TILES = [  # BLOCK_M, BLOCK_K, row0, k0
    (4, 32, 0, 0),
    (1, 8, 3, 0),  # one call of Philox
    (16, 16, 5, 24),  # a block that does not start at a multiple of its width
    (2, 128, 2**31 - 1, 2**20),
    (8, 64, 2**32 - 3, 8),  # the low word of the row wraps within the tile
    (4, 32, 2**40 + 11, 0),
]


@triton.jit
def _keep_kernel(
    state_ptr,  # int64 [2]
    threshold_ptr,  # int32 [BLOCK_M, BLOCK_K]
    keep_ptr,  # int8 [BLOCK_M, BLOCK_K], out
    row0,
    k0,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
    seed, offset = tl.load(state_ptr), tl.load(state_ptr + 1)
    # a threshold of its own for every element shows the whole number, not one bit of it
    keep = keep_mask(seed, offset, rows, k0, tl.load(threshold_ptr + offs), BLOCK_K)
    tl.store(keep_ptr + offs, keep.to(tl.int8), mask=offs >= 0)


def keep(state, thresholds, row0, k0):
    """The mask of the kernels for the tile at [row0, k0], bool."""
    out = torch.empty(thresholds.shape, dtype=torch.int8, device=DEVICE).fill_(-1)
    BLOCK_M, BLOCK_K = thresholds.shape
    _keep_kernel[(1,)](state, thresholds, out, row0, k0, BLOCK_M=BLOCK_M, BLOCK_K=BLOCK_K)
    assert ((out == 0) | (out == 1)).all()
    return out.bool()


def numbers(state, rows, k):
    """`reference.dropout_halves` of any rows and columns, from its Philox."""
    low = 0xFFFFFFFF
    seed, offset = state.tolist()
    counter = (
        k[None, :] >> 3,
        rows[:, None] & low,
        rows[:, None] >> 32,
        torch.tensor(offset & low, device=DEVICE),
    )
    counter = torch.broadcast_tensors(*counter)
    words = torch.stack(reference.philox4x32(*counter, seed & low, seed >> 32 & low))
    word = words.gather(0, ((k & 7) >> 1).expand(1, *words.shape[1:]))[0]
    return word >> 16 * (k & 1) & 0xFFFF


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("state", STATES, ids=str)
def test_numbers(state, tile):
    BLOCK_M, BLOCK_K, row0, k0 = tile
    state = torch.tensor(state, device=DEVICE)
    rows = torch.arange(row0, row0 + BLOCK_M, device=DEVICE)
    expected = numbers(state, rows, torch.arange(k0, k0 + BLOCK_K, device=DEVICE))
    if row0 < 100:
        whole = reference.dropout_halves(state, row0 + BLOCK_M, k0 + BLOCK_K)
        assert torch.equal(whole[row0:, k0:], expected)
    assert keep(state, expected.int(), row0, k0).all(), "a number is below the reference's"
    above = keep(state, (expected + 1).clamp(max=0xFFFF).int(), row0, k0)
    assert torch.equal(above, expected == 0xFFFF), "a number is above the reference's"


@pytest.mark.parametrize("threshold", [0, 1, 16, 3277, 32768, 65535])
def test_threshold(threshold):
    state = torch.tensor([7, 0], device=DEVICE)
    got = keep(state, torch.full((16, 64), threshold, dtype=torch.int32, device=DEVICE), 0, 0)
    assert torch.equal(got, reference.dropout_halves(state, 16, 64) >= threshold)


def test_known_answers():
    # elements 0..9 of row 3, the contract's own
    expected = [0xE559, 0x2A04, 0xDA2D, 0x5A79, 0xD683, 0xD38C, 0x9464, 0x149C, 0x93FE, 0xF8C0]
    state = torch.tensor([0x1234567890ABCDEF, 5], device=DEVICE)
    thresholds = torch.zeros(1, 16, dtype=torch.int32, device=DEVICE)
    thresholds[0, :10] = torch.tensor(expected)
    assert keep(state, thresholds, 3, 0).all()
    assert not keep(state, thresholds + 1, 3, 0)[0, :10].any()


def test_keep_scale():
    assert keep_scale(0) == 1
    assert keep_scale(round(0.25 * 65536)) == 4 / 3
