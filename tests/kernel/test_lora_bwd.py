"""K5, K6 and K7: the gradients of the LoRA part, and the two results of one pass over x."""

import pytest
import torch
from helpers import DEVICE, DTYPES, assert_as_accurate, crossed
from triton_helpers import needs_triton, strided

from fastlora import reference
from fastlora.kernels import lora_bwd_da as k6
from fastlora.kernels import lora_bwd_ds_db as k5
from fastlora.kernels import lora_bwd_dx as k7
from fastlora.kernels.common import arch

pytestmark = needs_triton

SHAPES = [  # M, K or N, R
    (0, 64, 16),  # no tokens
    (1, 40, 1),  # one token, one rank
    (7, 129, 8),  # odd sizes, fewer rows than a block
    (63, 33, 16),
    (129, 70, 64),  # M is split
    (33, 100, 5),
    (18, 50, 256),  # dy is read twice
    (18, 40, 768),  # stacked adapters: several blocks of ranks
]
SCALE = 0.7


def make(M, K, R, dtype, p=0.0):
    """x (or dy), ds (or s), a, dx and the dropout state; what is beside the first two is NaN."""
    x, ds, dx = strided(M, K, dtype), strided(M, R, dtype), strided(M, K, dtype)
    a = torch.randn(R, K, device=DEVICE).to(dtype)
    state = torch.tensor([2**62 + 12345, -7], device=DEVICE) if p else None
    return x, ds, a, dx, state


def check_fp32(got, reference_op, *args):
    """Compare an fp32 result with the op in fp32, not in the dtype of its inputs, and in fp64."""
    eager, exact = (reference_op(*(a.to(to) for a in args)) for to in (torch.float, torch.double))
    assert_as_accurate(got, eager, exact)


# --- K5 --------------------------------------------------------------------------------------


def run_k5(M, N, R, dtype, config):
    dy, s, b, *_ = make(M, N, R, dtype)
    b = b.T.contiguous()
    # ds is a slice of a buffer, whose other columns must stay
    buffer = torch.full((M, R + 9), 7.0, device=DEVICE, dtype=dtype)
    ds = buffer[:, 4 : 4 + R].fill_(float("nan"))
    db = k5.lora_bwd_ds_db(dy, b, s, SCALE, ds, config)
    assert (buffer[:, :4] == 7).all()
    assert (buffer[:, 4 + R :] == 7).all()
    assert_as_accurate(ds, SCALE * (dy @ b), SCALE * dy.double() @ b.double())
    check_fp32(db, lambda dy, s: SCALE * dy.T @ s, dy, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ds_db(shape, dtype):
    run_k5(*shape, dtype, None)


@pytest.mark.parametrize("index", range(len(k5.configs("interpret", 16))))
def test_ds_db_configurations(index):
    found = k5.configs(arch(), 24)
    if index >= len(found):
        pytest.skip(f"{arch()} has fewer configurations")
    run_k5(63, 129, 24, torch.float16, found[index])


# --- K6 --------------------------------------------------------------------------------------


def run_k6(M, K, R, dtype, p, config):
    x, ds, _, _, state = make(M, K, R, dtype, p)
    da = k6.lora_bwd_da(x, ds, state, reference.dropout_threshold(p), config)
    check_fp32(da, lambda x, ds: reference.lora_bwd_da(x, ds, state, p), x, ds)


@pytest.mark.parametrize(("shape", "dtype", "p"), crossed(SHAPES, DTYPES, [0, 0.3]), ids=str)
def test_da(shape, dtype, p):
    run_k6(*shape, dtype, p, None)


@pytest.mark.parametrize("p", [0, 0.3])
@pytest.mark.parametrize("index", range(len(k6.configs("interpret", 16))))
def test_da_configurations(index, p):
    run_k6(63, 129, 24, torch.float16, p, k6.configs(arch(), 24, 2, p > 0)[index])


def run_k6_dx(M, K, R, dtype, p, config):
    x, ds, a, dx, state = make(M, K, R, dtype, p)
    eager = reference.lora_bwd_dx(dx.clone(), ds, a, state, p)
    exact = reference.lora_bwd_dx(dx.double(), ds.double(), a.double(), state, p)
    da = k6.lora_bwd_da_dx(x, ds, a, dx, state, reference.dropout_threshold(p), config)
    assert_as_accurate(dx, eager, exact)
    check_fp32(da, lambda x, ds: reference.lora_bwd_da(x, ds, state, p), x, ds)


@pytest.mark.parametrize(
    ("shape", "dtype", "p"),
    crossed([s for s in SHAPES if s[2] <= 64], DTYPES, [0, 0.3]),
    ids=str,
)
def test_da_dx(shape, dtype, p):
    run_k6_dx(*shape, dtype, p, None)


@pytest.mark.parametrize("p", [0, 0.3])
@pytest.mark.parametrize("index", range(len(k6.configs("interpret", 16, dx=True))))
def test_da_dx_configurations(index, p):
    config = k6.configs(arch(), 24, 2, p > 0, dx=True)[index]
    run_k6_dx(63, 129, 24, torch.float16, p, config)


# --- K7 --------------------------------------------------------------------------------------


def run_k7(M, K, R, dtype, p, config):
    _, ds, a, dx, state = make(M, K, R, dtype, p)
    eager = reference.lora_bwd_dx(dx.clone(), ds, a, state, p)
    exact = reference.lora_bwd_dx(dx.double(), ds.double(), a.double(), state, p)
    k7.lora_bwd_dx(dx, ds, a, state, reference.dropout_threshold(p), config)
    assert_as_accurate(dx, eager, exact)


@pytest.mark.parametrize(("shape", "dtype", "p"), crossed(SHAPES, DTYPES, [0, 0.3]), ids=str)
def test_dx(shape, dtype, p):
    run_k7(*shape, dtype, p, None)


@pytest.mark.parametrize("p", [0, 0.3])
@pytest.mark.parametrize("index", range(len(k7.configs("interpret", 16))))
def test_dx_configurations(index, p):
    run_k7(63, 129, 24, torch.float16, p, k7.configs(arch(), 24, 2, p > 0)[index])


# --- all -------------------------------------------------------------------------------------


def test_same_mask_everywhere():
    # a dropped element is zero in x a^T, in da and in dx alike; each kernel has its own tiles
    M, K, p = 40, 72, 0.5
    threshold = reference.dropout_threshold(p)
    state = torch.tensor([99, 3], device=DEVICE)
    kept = reference.dropout_halves(state, M, K) >= threshold
    ones = torch.ones(M, K, device=DEVICE)
    da = k6.lora_bwd_da(ones, torch.eye(M, device=DEVICE), state, threshold)
    assert torch.equal(da, 2.0 * kept)
    dx, dx_fused = torch.zeros(2, M, K, device=DEVICE)
    ds, a = torch.ones(M, 1, device=DEVICE), torch.ones(1, K, device=DEVICE)
    k7.lora_bwd_dx(dx, ds, a, state, threshold)
    k6.lora_bwd_da_dx(ones, ds, a, dx_fused, state, threshold)
    assert torch.equal(dx, 2.0 * kept)
    assert torch.equal(dx_fused, 2.0 * kept)


@pytest.mark.gpu
def test_same_bits_twice():
    x, ds, a, dx, state = make(4099, 1030, 16, torch.bfloat16, 0.3)
    b = a.T.contiguous()
    results = []
    for _ in range(2):
        out, update = torch.empty_like(ds), dx.clone()
        db = k5.lora_bwd_ds_db(x, b, ds, SCALE, out)
        da = k6.lora_bwd_da_dx(x, ds, a, update, state, 19661)
        results.append((out, update, db, da, k6.lora_bwd_da(x, ds, state, 19661)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    # all rows but the last are zero, so those alone make the sums
    M, K, R, rows = 2**20 + 5, 2056, 16, 7
    x, dx = (torch.zeros(M, K, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ds = torch.zeros(M, R, device=DEVICE, dtype=torch.bfloat16)
    for t in (x, ds):
        t[-rows:] = torch.randn(rows, t.shape[1], device=DEVICE)
    a = torch.randn(R, K, device=DEVICE).bfloat16()
    b, out = a.T.contiguous(), torch.empty_like(ds)
    last, last_ds = x[-rows:].clone(), ds[-rows:].clone()
    check_fp32(k6.lora_bwd_da(x, ds, None, 0), lambda x, ds: ds.T @ x, last, last_ds)
    check_fp32(k5.lora_bwd_ds_db(x, b, ds, 1.0, out), lambda x, ds: x.T @ ds, last, last_ds)
    assert_as_accurate(out[-rows:], last @ b, last.double() @ b.double())
    check_fp32(k6.lora_bwd_da_dx(x, ds, a, dx, None, 0), lambda x, ds: ds.T @ x, last, last_ds)
    k7.lora_bwd_dx(dx, ds, a, None, 0)
    exact = 2 * last_ds.double() @ a.double()
    assert_as_accurate(dx[-rows:], exact.to(dx.dtype), exact)
