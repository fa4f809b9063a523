"""The number tables of the NF4 format: 16 weight codes, their decision thresholds, 256 scale codes.

Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E (NF4); Dettmers 2015, arXiv:1511.04561
(dynamic 8-bit type). Values are those of bitsandbytes, whose checkpoints are read bit by bit.
"""

from functools import cache

import torch
from torch import Tensor

from fastlora.kernels.nf4_tables import NF4_CODE, NF4_THRESHOLDS

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATS_GROUP = 256  # block scales that share one second-level scale
ZERO_CODE = 7  # NF4_CODE[7] == 0


def check_blocksize(blocksize: int) -> None:
    """Check a number of elements per block scale.

    Args:
        blocksize: a power of two from 32 to 4096.

    Raises:
        ValueError: it is something else, such as a float of that value.
    """
    if not isinstance(blocksize, int) or blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}")


@cache
def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of a code, fp32 [16], ascending."""
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@cache
def nf4_thresholds(device: torch.device | str = "cpu") -> Tensor:
    """fp32 [15]: the code of r in [-1, 1] is the number of thresholds strictly below r."""
    return torch.tensor(NF4_THRESHOLDS, dtype=torch.float32, device=device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The signed 8-bit dynamic type, fp32 [256], ascending.

    Decade e in 10^-6 .. 10^0 is cut into 2^(e+6) equal intervals between 0.1 and 1, whose centres
    are codes with both signs; 0 and 1 complete them, so that there is no -1.
    """
    magnitudes = _magnitudes(1)
    return torch.cat([magnitudes, -magnitudes, _ENDS]).sort().values.to(device)


@cache
def unsigned_dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The unsigned 8-bit dynamic type, fp32 [256], ascending: twice the intervals, no signs."""
    return torch.cat([_magnitudes(2), _ENDS]).sort().values.to(device)


_ENDS = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")


def _magnitudes(intervals: int) -> Tensor:
    positive = []
    for bits in range(7):
        count = intervals * 2**bits
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32, device="cpu")
        positive.append(10.0 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2))
    return torch.cat(positive)


def midpoints(codes: Tensor) -> Tensor:
    """Where the nearest code changes, fp32 [255]: a code is the number of midpoints below."""
    codes = codes.double()
    return ((codes[:-1] + codes[1:]) / 2).float()


@cache
def code_guess(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The code of a number, or the one below it, by the upper 16 bits of its fp32.

    So that nothing is searched: the code is g + (x > midpoints[g]), g being the guess. No bucket
    of numbers that share their upper 16 bits holds two midpoints.

    Args:
        signed: of `dynamic_map`, else of `unsigned_dynamic_map`.
        device: where.

    Returns:
        uint8 [65536].
    """
    upper = torch.arange(65536, dtype=torch.int64, device="cpu") << 16
    # the lowest number of a bucket: negative ones grow in magnitude with their lower bits
    lowest = torch.where(upper >= 1 << 31, upper | 0xFFFF, upper)
    lowest = torch.where(lowest >= 1 << 31, lowest - (1 << 32), lowest).int().view(torch.float32)
    edges = midpoints(dynamic_map() if signed else unsigned_dynamic_map())
    guess = torch.bucketize(lowest.nan_to_num(0.0), edges)
    return guess.clamp(max=254).to(torch.uint8).to(device)


@cache
def code_sums(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """What to add to the bits of a number, so that its code is in bits 24 to 31 of the sum.

    One look-up and no comparison. Numbers that share their upper bits have one entry; among them is
    one midpoint at most, beyond which their lower bits carry into the code. In 32 bits:

        unsigned    key = bits of x                  sum = table[(key >> 16) % 4096] + (key << 8)
        signed      key = 2 (bits of |x|) + (x < 0)  sum = table[(key >> 18) % 2048] + (key << 6)

    Signed gives the code of |x|, that of -|x| is 254 minus it; the sign in the key decides where
    |x| is a midpoint, to which the lower code belongs. There are entries from 2^-31 to below 2.

    Of the unsigned type numbers below 2^-21 have code 0, and all others at least 1.

    Args:
        signed: of `dynamic_map`, else of `unsigned_dynamic_map`.
        device: where.

    Returns:
        int32 [2048] if signed, else [4096].
    """
    low, size = (18, 2048) if signed else (16, 4096)
    edges = midpoints(dynamic_map() if signed else unsigned_dynamic_map())
    edges = edges[edges > 0] if signed else edges.index_fill(0, torch.tensor([0]), _below(2.0**-21))
    keys = edges.view(torch.int32).long() << signed
    exponent = torch.tensor(2.0**-31, device="cpu").view(torch.int32).long() << signed
    first = exponent + (torch.arange(size, device="cpu") << low)  # key of each entry
    before, behind = (torch.searchsorted(keys, k) for k in (first, first + (1 << low) - 1))
    # the largest one of an entry must not carry unless it is beyond a midpoint
    carry = torch.where(
        behind > before, first + (1 << low) - 1 - keys[before.clamp(max=len(keys) - 1)], 0
    )
    total = ((before + 127 * signed) << 24) + (carry << (24 - low)) - (first << (24 - low))
    return total.to(torch.int32).to(device)


def _below(x: float) -> float:
    return torch.nextafter(torch.tensor(x, device="cpu"), torch.tensor(0.0, device="cpu")).item()


@cache
def dynamic_lut(device: torch.device | str = "cpu") -> Tensor:
    """The code nearest to i / 32767.5 - 1, uint8 [65536].

    bitsandbytes' CPU kernel rounds to this grid before the look-up, so equal bytes need it.
    """
    codes = dynamic_map().double()
    midpoints = (codes[:-1] + codes[1:]) / 2
    grid = torch.arange(65536, dtype=torch.float64, device="cpu") / 32767.5 - 1
    return torch.bucketize(grid, midpoints).to(torch.uint8).to(device)
