"""Codes of 8-bit moments in one look-up: every number gets the one between its midpoints."""

import pytest
import torch
from torch import Tensor

from fastlora.codebooks import code_sums, dynamic_map, midpoints, unsigned_dynamic_map

ONE = 0x3F800000  # bits of 1.0


def numbers(signed: bool) -> Tensor:
    """Bits of where codes may change: the ends of all entries, and midpoints with neighbours.

    Between them nothing changes, so they stand for all numbers from 0 to 1 and one step beyond, as
    far as rounding may lead.
    """
    low = 17 if signed else 16
    first = torch.arange((ONE >> low) + 1) << low
    edges = midpoints(dynamic_map() if signed else unsigned_dynamic_map())
    edges = edges[edges > 0].view(torch.int32)
    bits = torch.cat([first, first - 1, first + 1, edges, edges - 1, edges + 1])
    return bits.clamp(0, ONE + 1).unique().int()


@pytest.mark.parametrize("negative", [False, True])
def test_signed(negative):
    bits = numbers(signed=True)
    x = bits.view(torch.float32) * (-1 if negative else 1)
    key = (bits.clamp(max=0x3F7EB852) if negative else bits).clamp(min=0x30000000) * 2 + negative
    total = code_sums(True)[((key >> 18) & 2047).long()] + (key << 6)
    code = (total >> 24) & 255
    expected = torch.bucketize(x, midpoints(dynamic_map()), out_int32=True)
    assert torch.equal(254 - code if negative else code, expected)


def test_unsigned():
    bits = numbers(signed=False)
    key = bits.clamp(min=0x34FFFFFF)
    code = ((code_sums(False)[((key >> 16) & 4095).long()] + (key << 8)) >> 24) & 255
    expected = torch.bucketize(
        bits.view(torch.float32), midpoints(unsigned_dynamic_map()), out_int32=True
    )
    small = bits < 0x35000000  # 2^-21
    assert torch.equal(code[~small], expected[~small].clamp(min=1))
    assert not code[small].any()
    assert expected[small].max() == 1  # the code of all that is above zero
