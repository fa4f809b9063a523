"""The Triton steps of AdamW: every bit equal to the reference, in every configuration."""

import pytest
import torch
from helpers import DEVICE, DTYPES
from torch import Tensor
from triton_helpers import needs_triton

from fastlora.kernels import adamw as kernels
from fastlora.kernels.common import arch
from fastlora.optim import gpu, reference
from fastlora.optim.flat import Flat, Moments, Step, adamw_hypers, moments, nbytes

pytestmark = [
    needs_triton,
    # the interpreter is NumPy, which computes what masks leave out too
    pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning"),
]

# the third one has no gradient, and whole blocks of its own
ALIGNED = (256, 1024, 512, 16, 3072)
# blocks of several parameters, parameters of several tiles, an end inside a block
ODD = (1, 5, 300, 7, 2000, 1, 1, 255, 256, 1500)
ONE = (1000,)
HYPERS = torch.tensor(
    [
        adamw_hypers(1e-2, (0.9, 0.999), 1e-8, 0.01, False, 3),
        adamw_hypers(1e-1, (0.5, 0.9), 1e-4, 0.0, True, 1),
    ]
)


def tensors(sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(size).to(DEVICE, dtype) for size in sizes]


def zeros(numel: int, bits: int) -> Moments:
    buffer = torch.zeros(nbytes(numel, bits), dtype=torch.uint8, device=DEVICE)
    return moments(buffer, numel, bits)


def problem(sizes: tuple[int, ...], dtype: torch.dtype, bits: int) -> tuple[Step, Moments]:
    """A step with moments of other steps, one gradient missing."""
    grads: list[Tensor | None] = tensors(sizes, dtype)
    for grad in grads:
        grad[::5] = 0
        grad[1::5] *= 1e-4
    if len(grads) > 2:
        grads[2] = None
    rows = [i % len(HYPERS) for i in range(len(sizes))]
    flat = Flat(sizes)
    full = zeros(flat.numel, 32)
    # of all sizes, and zero
    full.m.normal_().mul_(10 ** (-9 * torch.rand_like(full.m)))
    full.v.exponential_().mul_(10 ** (-9 * torch.rand_like(full.v)))
    full.v[::5] = 0
    coded = zeros(flat.numel, 8)
    reference.encode(full, coded)
    return Step(flat, tensors(sizes, dtype), grads, rows, HYPERS), full if bits == 32 else coded


def copy(step: Step, state: Moments) -> tuple[Step, Moments]:
    params = [p.clone() for p in step.params]
    state = Moments(*(t.clone() for t in state.tensors()))
    return Step(step.flat, params, step.grads, step.rows, step.hypers), state


def assert_equal(got: tuple[Step, Moments], expected: tuple[Step, Moments]) -> None:
    for a, b in zip(got[0].params, expected[0].params, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(got[1].tensors(), expected[1].tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("sizes", [ALIGNED, ODD, ONE], ids=["aligned", "odd", "one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_to_the_reference(dtype, sizes, bits):
    step, state = problem(sizes, dtype, bits)
    expected = copy(step, state)
    reference.adamw(expected[0], 0, expected[1])
    for config in kernels.configs(arch(), bits):
        mine = copy(step, state)
        table = gpu.prepare(mine[0]).table
        assert table.aligned == (sizes == ALIGNED)
        if bits == 32:
            kernels.adamw32(table, 0, mine[1].m, mine[1].v, config)
        else:
            maps = gpu.maps(torch.device(DEVICE))
            kernels.adamw8(table, 0, mine[1].tensors(), maps, config)
        assert_equal(mine, expected)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
def test_spans_together_are_the_whole(sizes, bits):
    step, state = problem(sizes, torch.float32, bits)
    expected = copy(step, state)
    reference.adamw(expected[0], 0, expected[1])
    prepared = gpu.prepare(step)
    span = 768  # no multiple of a tile
    for first in range(0, step.flat.numel, span):
        part = state.part(first, min(first + span, step.flat.numel))
        gpu.adamw(prepared, first, part)
    assert_equal((step, state), expected)


def test_a_span_of_nothing():
    step, state = problem((0,), torch.float32, 32)
    gpu.adamw(gpu.prepare(step), 0, state)


@pytest.mark.parametrize("bits", [32, 8])
def test_not_a_number_is_not_swallowed(bits):
    step, state = problem((600,), torch.float32, bits)
    step.grads[0][300] = float("nan")
    gpu.adamw(gpu.prepare(step), 0, state)
    if bits == 32:
        assert state.m.isnan().nonzero().tolist() == [[300]]
    else:
        assert (
            state.m_scale.isnan().tolist() == state.v_scale.isnan().tolist() == [False, True, False]
        )
    assert step.params[0].isnan().nonzero().tolist() == [[300]]
