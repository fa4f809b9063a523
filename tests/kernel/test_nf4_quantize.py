"""The Triton NF4 encoder: every byte equal to the reference, whatever a block holds."""

import pytest
import torch
from helpers import DEVICE, DTYPES
from torch import Tensor
from triton_helpers import needs_triton

from fastlora import reference
from fastlora.codebooks import nf4_thresholds
from fastlora.kernels.common import arch
from fastlora.kernels.nf4_quantize import NF4_THRESHOLDS, configs, quantize_blocks

pytestmark = [
    needs_triton,
    # the interpreter is NumPy, which reports 1 / 0 and Inf * 0
    pytest.mark.filterwarnings("ignore:.* encountered in (divide|multiply):RuntimeWarning"),
]

# number of weights, blocksize
CASES = [
    (1, 32),  # half a byte is left over
    (2, 64),
    (64, 64),  # one block
    (65, 64),  # a last block of one weight
    (1000, 64),  # several programs, the last one partial
    (1001, 32),  # odd
    (4095, 128),
    (4096, 4096),  # a block larger than the interpreter's tile
    (5001, 4096),
    (130 * 7, 256),  # a block as large as the tile
]


def assert_equal_to_the_reference(w: Tensor, blocksize: int) -> None:
    expected, expected_absmax, expected_count = reference.quantize_blocks(w, blocksize)
    for config in configs(arch()):
        packed, absmax, nonfinite = quantize_blocks(w, blocksize, config)
        assert torch.equal(packed, expected)
        torch.testing.assert_close(absmax, expected_absmax, rtol=0, atol=0, equal_nan=True)
        assert nonfinite.dtype == torch.int64
        assert nonfinite.shape == ()
        assert nonfinite == expected_count


def test_the_thresholds_are_those_of_the_format():
    assert torch.equal(torch.tensor(NF4_THRESHOLDS.value), nf4_thresholds())


@pytest.mark.parametrize(("numel", "blocksize"), CASES)
def test_equal_to_the_reference(numel, blocksize):
    for dtype in DTYPES:
        assert_equal_to_the_reference(torch.randn(numel, dtype=dtype, device=DEVICE), blocksize)


def test_a_weight_on_a_threshold_belongs_below_it():
    t = nf4_thresholds(DEVICE)
    below, above = (torch.nextafter(t, torch.full_like(t, end)) for end in (-1.0, 1.0))
    one = torch.ones(1, device=DEVICE)
    w = torch.cat([one, t, below, above, -one, 0 * one])  # absmax 1: the weights are not scaled
    assert_equal_to_the_reference(w, 64)


def test_weights_are_multiplied_with_the_rounded_reciprocal():
    absmax = torch.rand(64, 1, device=DEVICE) + 0.5
    ulps = 1 + torch.arange(-2, 2, device=DEVICE) * 2**-23
    near = absmax * (nf4_thresholds(DEVICE)[:, None] * ulps).reshape(1, 60)
    w = torch.cat([absmax.expand(64, 4), near], dim=1).reshape(-1)
    divided = w.view(64, 64) / absmax
    assert not torch.equal(divided, w.view(64, 64) * (1 / absmax))
    assert_equal_to_the_reference(w, 64)


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1e-45, 2.9387358770557188e-39, 2.938737278354183e-39, 1e-38, 3.4e38],
    ids=["0", "-0", "smallest", "1/x overflows", "1/x is finite", "subnormal", "1/x is subnormal"],
)
def test_block_of_tiny_or_huge_weights(value):
    w = torch.randn(192, device=DEVICE)
    w[64:128] = value * torch.linspace(-1, 1, 64, device=DEVICE)
    assert_equal_to_the_reference(w, 64)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_counted(value):
    for dtype in DTYPES:
        w = torch.randn(1000, dtype=dtype, device=DEVICE)
        w[[3, 64, 65, 999]] = value
        assert_equal_to_the_reference(w, 64)


@pytest.mark.gpu
def test_more_than_2_31_weights():
    numel = 2**31 + 64 * 5 + 1
    w = torch.randn(numel, dtype=torch.bfloat16, device=DEVICE)
    packed, absmax, nonfinite = quantize_blocks(w, 64)
    assert nonfinite == 0
    for start in (0, 2**30, 2**31 - 64, 2**31, 2**31 + 64 * 4):
        expected, scales, _ = reference.quantize_blocks(w[start : start + 129], 64)
        assert torch.equal(packed[start // 2 :][:64], expected[:64])
        assert torch.equal(absmax[start // 64 :][:2], scales[:2])
    assert packed[-1] & 15 == 7
