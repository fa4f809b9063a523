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
    positive = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32, device="cpu")
        positive.append(10.0 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2))
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32, device="cpu")
    codes = torch.cat([magnitudes, -magnitudes, ends])
    return codes.sort().values.to(device)


@cache
def dynamic_lut(device: torch.device | str = "cpu") -> Tensor:
    """The code nearest to i / 32767.5 - 1, uint8 [65536].

    bitsandbytes' CPU kernel rounds to this grid before the look-up, so equal bytes need it.
    """
    codes = dynamic_map().double()
    midpoints = (codes[:-1] + codes[1:]) / 2
    grid = torch.arange(65536, dtype=torch.float64, device="cpu") / 32767.5 - 1
    return torch.bucketize(grid, midpoints).to(torch.uint8).to(device)
