"""What tests of Triton kernels share."""

import pytest
import torch
from helpers import DEVICE
from torch import Tensor

from fastlora.kernels.common import INTERPRET

needs_triton = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="Triton kernels need a GPU or TRITON_INTERPRET=1",
)


def strided(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Normal [rows, cols] out of a larger buffer; what lies around it is NaN."""
    buffer = torch.full((rows + 1, cols + 3), float("nan"), device=DEVICE, dtype=dtype)
    view = buffer[:rows, 1 : cols + 1]
    return view.copy_(torch.randn(rows, cols))
