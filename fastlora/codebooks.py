"""The number tables of the NF4 format: 16 weight codes, their decision thresholds, 256 scale codes.

Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E (NF4); Dettmers 2015, arXiv:1511.04561
(dynamic 8-bit type). Values are those of bitsandbytes, whose checkpoints are read bit by bit.
"""

from functools import cache

import torch
from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATS_GROUP = 256  # block scales that share one second-level scale
ZERO_CODE = 7  # NF4_CODE[7] == 0

_NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF4_THRESHOLDS = (
    -0.8480964005,
    -0.6106329262,
    -0.4599952698,
    -0.3396794349,
    -0.2346074060,
    -0.1379117332,
    -0.0455250181,
    0.0397901498,
    0.1202552505,
    0.2035212517,
    0.2920137718,
    0.3893125355,
    0.5016634166,
    0.6427869201,
    0.8614784181,
)


@cache
def nf4_code(device: torch.device | str = "cpu") -> Tensor:
    """The 16 values of a code, fp32 [16], ascending."""
    return torch.tensor(_NF4_CODE, dtype=torch.float32, device=device)


@cache
def nf4_thresholds(device: torch.device | str = "cpu") -> Tensor:
    """fp32 [15]: the code of r in [-1, 1] is the number of thresholds strictly below r."""
    return torch.tensor(_NF4_THRESHOLDS, dtype=torch.float32, device=device)


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
