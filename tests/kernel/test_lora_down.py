"""K1, the down-projection, and the second pass of split sums."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_as_accurate, crossed
from triton_helpers import needs_triton, strided

from fastlora import reference
from fastlora.kernels import lora_down as k1
from fastlora.kernels.common import arch
from fastlora.kernels.dropout import keep_scale
from fastlora.kernels.reduce import Sum, reduce, split

pytestmark = needs_triton

SHAPES = [  # M, K, R
    (0, 64, 16),  # no tokens
    (1, 40, 1),  # one token, one rank
    (7, 129, 8),  # K odd, few rows: K is split
    (63, 33, 16),
    (129, 70, 64),  # rows enough for no split
    (33, 100, 5),
    (7, 50, 256),
    (18, 40, 768),  # stacked adapters: three blocks of ranks
]


def run(M, K, R, dtype, p, index=0, augment=False):
    """s, what it is in `dtype` and in fp64, x, and x_aug or None."""
    x, a = strided(M, K, dtype), torch.randn(R, K, device=DEVICE).to(dtype)
    state = torch.tensor([-(2**62) - 3, 5], device=DEVICE) if p else None
    threshold = reference.dropout_threshold(p)
    config = k1.configs(arch(), R, x.element_size(), p > 0)[index]
    x_aug = strided(M, K + R, dtype).fill_(float("nan")) if augment else None
    s = k1.lora_down(x, a, state, threshold, x_aug, config)
    eager = reference.lora_down(x, a, state, p)
    return s, eager, reference.lora_down(x.double(), a.double(), state, p), x, x_aug


@pytest.mark.parametrize(("shape", "dtype", "p"), crossed(SHAPES, DTYPES, [0, 0.3]), ids=str)
def test_parity(shape, dtype, p):
    s, eager, exact, *_ = run(*shape, dtype, p)
    assert s.is_contiguous()
    assert_as_accurate(s, eager, exact)


@pytest.mark.parametrize("p", [0, 0.3])
@pytest.mark.parametrize("index", range(len(k1.configs("interpret", 16))))
def test_configurations(index, p):
    if index >= len(k1.configs(arch(), 24, 4)):
        pytest.skip(f"{arch()} has fewer configurations in fp32")
    s, eager, exact, *_ = run(63, 129, 24, torch.float32, p, index)
    assert_as_accurate(s, eager, exact)


@pytest.mark.parametrize("shape", [(7, 129, 8), (129, 70, 16), (5, 33, 300)], ids=str)
def test_augmented(shape):
    # with and without a split, and with several programs that read the same x
    s, eager, exact, x, x_aug = run(*shape, torch.float16, 0.3, augment=True)
    assert_as_accurate(s, eager, exact)
    assert torch.equal(x_aug, torch.cat([x, s], dim=1))


def test_threshold_of_one():
    # Triton turns an argument of 1 into a constant
    s, eager, exact, *_ = run(7, 40, 8, torch.float32, 1 / 65536)
    assert_as_accurate(s, eager, exact)


def test_same_bits_twice():
    torch.manual_seed(1)
    first = run(129, 70, 16, torch.float16, 0.3)[0]
    torch.manual_seed(1)
    assert torch.equal(first, run(129, 70, 16, torch.float16, 0.3)[0])


@pytest.mark.gpu
def test_more_than_2_31_elements():
    M, K, rows, threshold = 2**20 + 5, 2056, 7, 20_000
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    # only the first columns count, so the reference needs no mask of the others
    a = torch.zeros(16, K, device=DEVICE, dtype=torch.bfloat16)
    a[:, :8] = torch.randn(16, 8)
    state = torch.tensor([3, 5], device=DEVICE)
    s = k1.lora_down(x, a, state, threshold)[-rows:]
    kept = reference.dropout_halves(state, M, 8)[-rows:] >= threshold
    exact = torch.where(kept, x[-rows:, :8].double(), 0) @ a[:, :8].double().T
    exact *= keep_scale(threshold)
    assert_as_accurate(s, exact.to(s.dtype), exact)


# --- the second pass -------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 64, 257])
@pytest.mark.parametrize("blocks", [1, 3, 1000])
@pytest.mark.parametrize("waves", [1, 4])
def test_split(blocks, steps, waves):
    parts, turns = split(blocks, steps, waves, 3)
    assert (parts - 1) * turns < steps <= parts * turns, "every step once, no empty part"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduce(dtype):
    # more than a block of columns; the results differ in rows, parts and scale
    first, second = torch.randn(3, 5, 600, device=DEVICE), torch.randn(9, 2, 600, device=DEVICE)
    outs = [strided(5, 600, dtype), strided(2, 600, dtype)]
    reduce([Sum(first, outs[0], 0.5), Sum(second, outs[1], 3.0)])
    for parts, out, scale in ((first, outs[0], 0.5), (second, outs[1], 3.0)):
        eager = (parts.sum(0) * scale).to(dtype)
        assert_as_accurate(out, eager, parts.double().sum(0) * scale)
