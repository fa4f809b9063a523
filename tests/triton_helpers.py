"""What tests of Triton kernels share."""

import pytest
import torch

from fastlora.kernels.common import INTERPRET

needs_triton = pytest.mark.skipif(
    not (INTERPRET or torch.cuda.is_available()),
    reason="Triton kernels need a GPU or TRITON_INTERPRET=1",
)
